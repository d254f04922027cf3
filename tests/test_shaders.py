"""The Metal shaders, run on this CPU by tools/msl, equal float64, and move the bytes that they say.

MLXQ_SHADERS=all runs every instantiation of the table (about half an hour) and the 10^7 groups of the
quantizer's golden hash, as tools/msl/golden.py does.

Nothing here says how fast an Apple GPU runs them, or that Apple's compiler takes them.
"""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import shader_cases as sc
from test_quantize import ALL, FMT, by_numpy, chunk, digest, storage_of

from mlxq.format import FORMATS, Format

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "msl")]  # tools/ is no installed package

import mlx_kernels  # noqa: E402

from tools.msl import harness, source  # noqa: E402
from tools.msl.golden import SHADER, by_shader  # noqa: E402
from tools.msl.proxies import COUNTED as COUNTED_TEXTS  # noqa: E402

pytestmark = pytest.mark.skipif(harness.absent() is not None, reason=str(harness.absent()))
EVERYTHING = os.environ.get("MLXQ_SHADERS") == "all"
CASES = sc.every() if EVERYTHING else sc.core()
SEEDS = (0, 3) if EVERYTHING else (0, 1, 2, 5)
WIDTHS = (2, 4, 8)
CHUNK = 64  # cases that a process runs
FMT64 = Format(4, 64)
COUNTED = (Format(2, 32), FMT64, Format(8, 128))  # each width and each group size


@pytest.fixture(scope="module")
def pool():
    """Processes that run shaders: the harness never frees a module, nor the stacks of its lanes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, max_tasks_per_child=1 if EVERYTHING else None) as processes:
        yield processes


@pytest.fixture(scope="module")
def runs(pool):
    """{kernel: futures of its cases, run on the harness in every order of lanes}."""
    chunks: dict[str, list] = {}
    for kernel in sc.KERNELS:
        cases = [case for case in CASES if case.kernel == kernel]
        chunks[kernel] = [
            pool.submit(sc.run_on_harness, cases[at : at + CHUNK], SEEDS)
            for at in range(0, len(cases), CHUNK)
        ]
    return chunks


@pytest.mark.parametrize("kernel", sc.KERNELS)
def test_shader_equals_float64_in_every_order_of_lanes(runs, kernel):
    assert runs[kernel]
    for future in runs[kernel]:
        future.result()


def test_the_core_cases_meet_every_format_type_tile_and_number_of_rows():
    met: dict[str, set] = {}
    for case in sc.core():
        row = sc.KERNELS[case.kernel]
        given = dict(zip(row["template"], case.arguments, strict=True))
        for names in row["values"]:
            chosen = tuple(given[name] for name in names.split(", "))
            met.setdefault(f"{case.kernel} {names}", set()).add(chosen)
        if {"bits", "group_size"} <= set(given):
            met.setdefault(f"{case.kernel} format", set()).add((given["bits"], given["group_size"]))
            met.setdefault(f"{case.kernel} types", set()).add(case.arguments[:2])
        if "grouped" in given:
            met.setdefault(f"{case.kernel} kinds", set()).add(case.arguments[1:4])
    for kernel in ("qmv", "qmm", "qmm_n", "qvm", "quantize", "dequantize"):
        assert len(met[f"{kernel} format"]) == 9 and len(met[f"{kernel} types"]) == 9, kernel
    for kernel in ("q8_mm", "q8_mv"):
        assert len(met[f"{kernel} kinds"]) == 27 and len(met[f"{kernel} S"]) == 3, kernel
    for kernel in ("qmv", "qvm", "q8_mv"):
        assert len(met[f"{kernel} M"]) == 8, kernel
    for kernel in ("qmm", "qmm_n"):
        assert len(met[f"{kernel} BM, BN, WM, WN"]) == 3, kernel


# -------------------------------------------------------------------------------- traced


def traced_cases() -> dict[str, sc.Case]:
    """Each kernel at each width, on shapes with all edges, and the products whose bytes are counted."""
    rng = np.random.default_rng(7)
    found = {}
    tile = sc.TILES[0]
    for i, bits in enumerate(WIDTHS):
        fmt = (bits, (32, 64, 128)[i])
        pair = (("half", "bfloat", "float")[i], "half" if i < 2 else "float")
        K = 3 * fmt[1]
        for kernel in ("qmv", "qvm", "qvm_split"):
            found[f"{kernel} {bits}"] = sc.product(
                rng, kernel, (*pair, *fmt, 3), 3, 70, K, 32 if "split" in kernel else 0
            )
        for kernel in ("qmm", "qmm_split", "qmm_n", "qmm_n_split"):
            span = {"qmm_split": fmt[1], "qmm_n_split": 32}.get(kernel, 0)
            found[f"{kernel} {bits}"] = sc.product(rng, kernel, (*pair, *fmt, *tile), 67, 70, K, span)
        for kernel in ("gather_qmv", "gather_qvm"):
            found[f"{kernel} {bits}"] = sc.gathered(rng, kernel, (*pair, *fmt, 2), 2, 19, K, 3, 4)
        for kernel in ("gather_qmm", "gather_qmm_n", "gather_qmm_sorted", "gather_qmm_n_sorted"):
            found[f"{kernel} {bits}"] = sc.gathered(rng, kernel, (*pair, *fmt, *sc.TILES[2]), 3, 35, K, 3, 9)
        w = rng.normal(size=(19, fmt[1])).astype(np.float16).astype(np.float32)
        found[f"quantize {bits}"] = sc.quantized(w, Format(*fmt), "half", "half")
        found[f"dequantize {bits}"] = sc.dequantized(rng, Format(*fmt), "half", "half", 19)
        for grouped in range(3):
            arguments = ("half", *fmt, grouped)
            found[f"q8_mm {bits} {grouped}"] = sc.q8(rng, "q8_mm", arguments, 67, 70, K)
            found[f"q8_mv {bits} {grouped}"] = sc.q8(rng, "q8_mv", (*arguments, 3), 3, 19, K)
    found["q8_rows"] = sc.q8_rows(rng, "half", 3, 1060)
    found["sum_splits"] = sc.sum_splits(rng, "half", 700, 3)
    found["schedule_tiles"] = sc.schedule(np.sort(rng.integers(0, 300, 90, dtype=np.int32)), 3, 300, 16)
    for fmt in FORMATS:
        arguments = ("half", "half", fmt.bits, fmt.group_size, 1)
        found[f"bytes qmv {fmt} M=1"] = sc.product(rng, "qmv", arguments, 1, 16, 1152)
    for fmt, M in [
        (Format(2, 64), 4),
        (Format(2, 32), 8),
        (Format(8, 128), 8),
        *((FMT64, M) for M in range(2, 9)),
    ]:
        arguments = ("half", "half", fmt.bits, fmt.group_size, M)
        found[f"bytes qmv {fmt} M={M}"] = sc.product(rng, "qmv", arguments, M, 16, 1152)
    for fmt in COUNTED:
        arguments = ("half", "half", fmt.bits, fmt.group_size)
        found[f"bytes qvm {fmt}"] = sc.product(rng, "qvm", (*arguments, 4), 4, 19, 384)
        found[f"bytes qmm {fmt}"] = sc.product(rng, "qmm", (*arguments, *tile), 512, 128, 128)
        found[f"bytes qmm_n {fmt}"] = sc.product(rng, "qmm_n", (*arguments, *tile), 512, 128, 128)
    return found


TRACED = traced_cases()


@pytest.fixture(scope="module")
def counted(pool):
    """{name: Result} of the traced runs, in which races, uninitialised and misaligned reads raise."""
    futures = {}
    for kernel in sc.KERNELS:
        named = {name: case for name, case in TRACED.items() if case.kernel == kernel}
        # Aligned to 4 bytes: no vector may be loaded through a pointer.
        futures[pool.submit(sc.run_on_harness, list(named.values()), (2,), count=True, alignment=4)] = named
    return {
        name: result
        for future, named in futures.items()
        for name, result in zip(named, future.result(), strict=True)
    }


def share(counted, name: str, buffer: str, what: str = "read") -> float:
    """Bytes moved of a buffer as a multiple of its size, summed over lanes."""
    case = TRACED[name]
    return counted[name].device_bytes[case.index(buffer)][what] / case.inputs[buffer].nbytes


def bytes_read(counted, name: str) -> int:
    return sum(counts["read"] for n, counts in counted[name].device_bytes.items() if n < 4)


def test_traced_runs_find_no_race_and_no_undefined_read(counted):
    assert set(counted) == set(TRACED)


def test_threadgroup_memory_fits_twice_into_a_core(counted):
    # 32 KiB is the limit of a threadgroup; half of it lets two of them hide each other's barriers.
    for name, result in counted.items():
        types = TRACED[name].arguments[:2]
        assert result.threadgroup_bytes <= (32768 if "float" in types else 16384), name


def test_qmv_and_qvm_read_each_word_scale_and_bias_once_for_all_rows(counted):
    names = [name for name in TRACED if name.startswith(("bytes qmv", "bytes qvm"))]
    assert len(names) == 22
    for name in names:
        assert [share(counted, name, b) for b in ("words", "scales", "biases")] == [1, 1, 1], name
        assert share(counted, name, "y", "written") == 1, name


def test_int8_vector_products_read_each_word_scale_and_bias_once_for_all_rows(counted):
    for bits in WIDTHS:
        for grouped in range(3):
            name = f"q8_mv {bits} {grouped}"
            # Two lanes share a word of 2-bit codes.
            assert share(counted, name, "words") == (2 if bits == 2 else 1), name
            if grouped:
                assert [share(counted, name, b) for b in ("scales", "biases")] == [1, 1], name
            assert share(counted, name, "y", "written") == 1, name


def test_qmv_loads_x_once_for_four_outputs(counted):
    for name, case in TRACED.items():
        if name.startswith("bytes qmv"):
            assert share(counted, name, "x") == case.inputs["N"] / 4, name


def test_two_bit_weights_are_half_of_four_bit_weights_at_every_number_of_rows(counted):
    for group_size, M in ((32, 1), (64, 1), (128, 1), (64, 4)):
        two, four = (counted[f"bytes qmv {b}-bit/{group_size} M={M}"].device_bytes[1]["read"] for b in (2, 4))
        assert 2 * two == four


@pytest.mark.parametrize("fmt", COUNTED, ids=str)
def test_qmm_reads_half_of_what_any_32_by_32_tile_must(counted, fmt):
    name = f"bytes qmm {fmt}"
    M, N, K = (TRACED[name].inputs[d] for d in "MNK")
    # x for 32 columns, W for 32 rows, each scale once: no less can be read, and stock's tile reads more.
    tile = 32 * K * 2 + 32 * K * fmt.bits / 8 + 32 * K / fmt.group_size * 4
    assert bytes_read(counted, name) <= 0.5 * tile * (M // 32) * (N // 32)


@pytest.mark.parametrize("fmt", COUNTED, ids=str)
def test_qmm_n_reads_and_multiplies_within_a_tenth_of_qmm(counted, fmt):
    forward, backward = f"bytes qmm {fmt}", f"bytes qmm_n {fmt}"
    assert bytes_read(counted, backward) <= 1.1 * bytes_read(counted, forward)
    products = "simdgroup_multiply_accumulate"
    assert (
        counted[backward].simdgroup_ops[products]
        == counted[forward].simdgroup_ops[products]
        == 512 * 128 * 128 / 512
    )


# MLX's kernel, its template arguments, threadgroups, threads, numbers in order, our case of the same shape.
STOCK_QMV = sc.product(np.random.default_rng(0), "qmv", ("half", "half", 4, 64, 1), 1, 16, 1024)
STOCK = {
    "qmv": ("affine_qmv_fast", "half, 64, 4, false", (1, 2, 1), (32, 2, 1), "KN", STOCK_QMV),
    "qmm": ("affine_qmm_t", "half, 64, 4, false, false", (4, 16, 1), (32, 2, 2), "KNM", "bytes qmm 4-bit/64"),
    "qmm_n": ("affine_qmm_n", "half, 64, 4, false", (4, 16, 1), (32, 2, 2), "NKM", "bytes qmm_n 4-bit/64"),
}


@pytest.fixture(scope="module")
def stock():
    """{our kernel: {operand: bytes that MLX's kernel reads of it}} for the same arrays."""
    if isinstance(mlx_kernels.wheel(), str):
        pytest.skip(mlx_kernels.wheel())
    lib = mlx_kernels.quantized([row[:2] for row in STOCK.values()])
    read = {}
    for ours, (name, arguments, grid, threads, numbers, case) in STOCK.items():
        given = (TRACED[case] if isinstance(case, str) else case).inputs
        x = given["g" if ours == "qmm_n" else "x"]
        arrays = [given["words"], given["scales"], given["biases"], x, given["y"].copy()]
        buffers = dict(enumerate([*arrays, *(np.int32(given[d]) for d in numbers)]))
        buffers |= mlx_kernels.no_batch(len(buffers))
        result = lib.run((name, arguments), buffers, grid, threads, count=True)
        operands = ("words", "scales", "biases", "x")
        read[ours] = {operand: result.device_bytes[n]["read"] for n, operand in enumerate(operands)}
    return read


def test_qmv_reads_no_more_than_mlx(pool, stock):
    (result,) = pool.submit(sc.run_on_harness, [STOCK_QMV], (0,), count=True).result()
    for name, theirs in stock["qmv"].items():
        ours = result.device_bytes[STOCK_QMV.index(name)]["read"]
        assert ours == theirs if name in ("words", "x") else 4 * ours == theirs, name


@pytest.mark.parametrize("kernel", ["qmm", "qmm_n"])
def test_prefill_reads_at_most_half_of_what_mlx_reads(counted, stock, kernel):
    assert bytes_read(counted, f"bytes {kernel} 4-bit/64") <= 0.5 * sum(stock[kernel].values())


def test_sorted_experts_are_read_once_per_tile_of_rows(counted):
    for bits in WIDTHS:
        case = TRACED[f"gather_qmm_sorted {bits}"]
        tiles = np.count_nonzero(case.inputs["tiles"][:, 2])
        words = case.inputs["words"]
        read = counted[f"gather_qmm_sorted {bits}"].device_bytes[case.index("words")]["read"]
        assert read == tiles * words[0].nbytes < case.scalars["B"] * words[0].nbytes


def test_one_barrier_a_step_of_32(counted):
    for kernel, steps in (("qmm", 4), ("qmm_n", 4)):
        name = f"bytes {kernel} 4-bit/64"
        threadgroups = np.prod(TRACED[name].grid)
        assert counted[name].barriers == threadgroups * (steps + 1), "and one after the first loads"


# -------------------------------------------------------------------------------- quantizer


@pytest.fixture(scope="module")
def quantizer():
    entries = [sc.entry("quantize", "float", S, *f) for S in sc.STORED for f in ((4, 32), (2, 64), (8, 128))]
    return {SHADER: harness.compile(SHADER, entries)}


def test_quantizer_gives_the_hash_of_rule_affine_over_all_kinds_of_groups(quantizer):
    S = {name: short for short, name in sc.STORED.items()}
    if EVERYTHING:
        library = quantizer[SHADER]
        assert digest(by_shader(library, chunk(i), FMT, S[storage_of(i)]) for i in range(100)) == ALL
    for fmt in (FMT, Format(2, 64), Format(8, 128)):
        for kind in range(30):  # ten kinds of weights in each of the three storages
            w = chunk(kind)[: 1200 * fmt.group_size // 32].reshape(-1, fmt.group_size)
            storage = storage_of(kind)
            assert digest([by_shader(quantizer[SHADER], w, fmt, S[storage])]) == digest(
                [by_numpy(w, fmt, storage)]
            ), (fmt, kind)


# For this thread, which runs the shaders, float32 subnormals count as zero, as on GPUs that flush them.
FLUSH = r"""
#if defined(__x86_64__)
#include <xmmintrin.h>
extern "C" void flush(int on) { _mm_setcsr((_mm_getcsr() & ~0x8040u) | (on ? 0x8040u : 0u)); }
#else
extern "C" void flush(int on) {
  unsigned long fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  fpcr = (fpcr & ~(1ul << 24)) | (on ? 1ul << 24 : 0ul);
  __asm__ volatile("msr fpcr, %0" : : "r"(fpcr));
}
#endif
"""


@pytest.fixture(scope="module")
def flushed(tmp_path_factory):
    """A context in which this thread flushes float32 subnormals."""
    folder = tmp_path_factory.mktemp("flush")
    source_file, library_file = folder / "flush.cpp", folder / "flush.so"
    source_file.write_text(FLUSH)
    command = [harness.compiler(), "-shared", "-fPIC", str(source_file), "-o", str(library_file)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(library_file))

    @contextlib.contextmanager
    def flushing():
        library.flush(1)
        try:
            yield
        finally:
            library.flush(0)

    return flushing


def test_flushed_subnormals_change_no_bit_of_the_quantizer(quantizer, flushed):
    smallest = np.array([2.0**-126], np.float32)
    with flushed():
        assert not (smallest * np.float32(0.5)).any()
    assert (smallest * np.float32(0.5)).any()
    for fmt in (FMT, Format(2, 64), Format(8, 128)):
        for kind in range(30):
            w = chunk(kind)[: 300 * fmt.group_size // 32].reshape(-1, fmt.group_size)
            storage = storage_of(kind)
            with flushed():
                got = by_shader(quantizer[SHADER], w, fmt, {n: s for s, n in sc.STORED.items()}[storage])
            assert digest([got]) == digest([by_numpy(w, fmt, storage)]), (fmt, kind)


@pytest.mark.parametrize("stored", sc.STORED)
def test_flushed_subnormals_change_no_bit_of_the_weights(flushed, stored):
    case = sc.dequantized(np.random.default_rng(8), FMT64, "float", stored, 37)
    buffers, library = case.buffers(), harness.compile(case.file, [case.entry])
    with flushed():
        library.run(case.entry, buffers, case.grid, case.threads)
    case.check(buffers)


def newest_log(name: str) -> dict:
    return json.loads(max((ROOT / "tools" / "results").glob(f"{name}-*.json")).read_text())


def test_the_log_of_ten_million_groups_is_of_this_shader():
    """`python tools/msl/golden.py` took 18 minutes on a busy core; what it found is committed."""
    log = newest_log("metal-golden")
    assert log["groups"] == 10**7 and log["hash"] == log["wanted"] == ALL
    assert log["shader_sha256"] == hashlib.sha256(SHADER.read_bytes()).hexdigest()


def test_the_committed_proxies_are_of_these_shaders_and_meet_the_bars():
    log = newest_log("metal-proxies")
    assert tuple(log["shader_sha256"]) == COUNTED_TEXTS
    for name, digest_ in log["shader_sha256"].items():
        assert digest_ == hashlib.sha256((sc.SHADERS / name).read_bytes()).hexdigest(), name
    products = {(r["kernel"], r["stock_kernel"], r["bits"], r["M"]): r for r in log["products"]}
    assert len(products) == len(log["products"]) == 27
    for (kernel, _, bits, M), row in products.items():
        ours, stock = row["ours"], row["stock"]
        if kernel == "qmv":
            assert ours["weight_bytes_over_least"] == 1 <= stock["weight_bytes_over_least"]
            assert ours["x_bytes_per_multiply_add"] <= stock["x_bytes_per_multiply_add"]
        else:
            assert M >= 512
            read = "read_bytes_per_multiply_add"
            assert ours[read] <= 0.5 * stock[read]
            forward = products["qmm", "affine_qmm_t", bits, M]["ours"]
            for what in (read, "matrix_products_per_512_multiply_adds"):
                assert ours[what] <= 1.1 * forward[what]


def test_quantizer_counts_what_it_cannot_hold(quantizer):
    w = np.ones((5, 32), np.float32)
    w[1, 3], w[1, 4], w[2, 0] = np.nan, -np.inf, 1e7
    entry = sc.entry("quantize", "float", "half", 4, 32)
    words, scales = np.ones((5, 4), np.uint32), np.ones(5, np.float16)
    biases, report = scales.copy(), np.zeros(2, np.uint32)
    buffers = {0: w, 1: words, 2: scales, 3: biases, 4: report, 5: np.int32(5)}
    quantizer[SHADER].run(entry, buffers, (1, 1, 1), (32, 8, 1))
    assert report.tolist() == [2, 1]
    assert not words[1:3].any() and not scales[1:3].any() and not biases[1:3].any()
    assert biases[[0, 3, 4]].tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------- the table


def signatures() -> dict[str, tuple[str, list[str], dict[int, tuple[str, str]]]]:
    """{kernel: (file, template parameters, {n of buffer(n): (name, type)})} as the shaders' text has them."""
    found = {}
    for path in sorted(sc.SHADERS.glob("*.metal")):
        text = source.without_comments(path.read_text())
        pattern = r"(?:template <([^>]*)>\s*)?\[\[kernel\]\] void (\w+)\((.*?)\) \{"
        for template, name, parameters in re.findall(pattern, text, re.DOTALL):
            buffers = {}
            for type_, argument, n in re.findall(r"([\w\s*&]+?)\s*(\w+) \[\[buffer\((\d+)\)\]\]", parameters):
                buffers[int(n)] = (argument, " ".join(type_.split()))
            found[name] = (path.name, [p.split()[-1] for p in template.split(",") if p], buffers)
    return found


def test_the_table_says_what_the_shaders_say():
    found = signatures()
    assert set(found) == set(sc.KERNELS)
    for name, row in sc.KERNELS.items():
        file, template, buffers = found[name]
        assert (row["file"], row["template"]) == (file, template), name
        assert {n: (b[0], b[1]) for n, b in enumerate(row["buffers"])} == buffers, name
        assert sum(len(names.split(", ")) for names in row["values"]) == len(template), name


def test_the_table_builds_the_formats_of_the_format():
    for name, row in sc.KERNELS.items():
        if "bits" in row["values"]:
            pairs = {(b, g) for b in row["values"]["bits"] for g in row["values"]["group_size"]}
            assert pairs == {(f.bits, f.group_size) for f in FORMATS}, name


def test_the_table_refuses_what_is_not_built():
    with pytest.raises(ValueError, match=r"qmv: M cannot be \[9\]"):
        sc.entry("qmv", "half", "half", 4, 64, 9)
    with pytest.raises(ValueError, match="template arguments"):
        sc.entry("qmv", "half", "half", 4)


def test_every_head_tells_layout_limits_and_where_it_has_not_run():
    for path in sc.SHADERS.glob("*.metal"):
        text = path.read_text()
        head = text[: text.index("#pragma once")]
        assert text.isascii(), path.name
        for words in ("buffer 0", "Threadgroup", "imited by", "on Apple hardware"):
            assert words in head.replace("threadgroup", "Threadgroup"), (path.name, words)


def test_half_scales_that_are_subnormal_are_not_flushed():
    # Hardware that flushes would give 0: patterns below 2^-14 take the way through integers.
    text = (sc.SHADERS / "tile.h").read_text()
    assert "static_cast<float>(magnitude) * 5.9604645e-08f" in text
    assert np.float32("5.9604645e-08") == np.float32(2.0**-24)
