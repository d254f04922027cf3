"""The format against MLX: packing at every code and lane, the rule "mlx" to the bit, and what is refused."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxq import format as fm
from mlxq.format import BITS, FORMATS, GROUP_SIZES, KERNEL_BITS, STORAGE, Format, Packed, pack, unpack

HEADER = Path(fm.__file__).with_suffix(".h")
EVERY = [Format(b, g) for b, g in itertools.product(BITS, GROUP_SIZES)]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_lane_is_where_mlx_reads_it(bits):
    lanes, levels = 32, 2**bits - 1  # 32 codes fill a whole number of words at every width
    codes = np.full((levels + 1, lanes, lanes), levels // 2, np.uint8)
    for lane in range(lanes):
        codes[:, lane, lane] = np.arange(levels + 1)
    codes = codes.reshape(-1, lanes)
    words = pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (len(codes), bits)
    np.testing.assert_array_equal(unpack(words, bits, lanes), codes)
    ones, zeros = mx.ones((len(codes), 1)), mx.zeros((len(codes), 1))
    read = mx.dequantize(mx.array(words), ones, zeros, group_size=lanes, bits=bits, stream=mx.cpu)
    np.testing.assert_array_equal(np.array(read), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_one_little_endian_bit_stream(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (4, 64), np.uint8)
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little", count=bits).reshape(4, -1)
    want = np.packbits(stream, axis=-1, bitorder="little")
    np.testing.assert_array_equal(pack(codes, bits).view(np.uint8), want)


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing_with_leading_axes_and_strides(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 5, 96), np.uint8)
    words = pack(codes, bits)
    assert words.shape == (2, 3, 5, 96 * bits // 32)
    np.testing.assert_array_equal(unpack(words, bits, 96), codes)
    np.testing.assert_array_equal(unpack(words[:, ::2, ::-1], bits, 96), codes[:, ::2, ::-1])
    np.testing.assert_array_equal(pack(codes[..., ::-1], bits), pack(codes[..., ::-1].copy(), bits))
    for empty in (codes[:0], codes[..., :0]):
        np.testing.assert_array_equal(unpack(pack(empty, bits), bits, empty.shape[-1]), empty)


def test_pack_and_unpack_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(np.full((1, 32), 8, np.uint8), 3)
    with pytest.raises(ValueError, match="K=31 is not a multiple of 32"):
        pack(np.zeros((1, 31), np.uint8), 4)
    with pytest.raises(ValueError, match="codes are int64"):
        pack(np.zeros((1, 32), np.int64), 4)
    with pytest.raises(ValueError, match="7-bit codes do not exist; bits: 1, 2, 3, 4, 5, 6, 8"):
        pack(np.zeros((1, 32), np.uint8), 7)
    with pytest.raises(ValueError, match="5 words do not hold K=32 codes of 4 bits"):
        unpack(np.zeros((1, 5), np.uint32), 4, 32)
    with pytest.raises(ValueError, match="words are int32"):
        unpack(np.zeros((1, 4), np.int32), 4, 32)


def test_format_describes_itself_and_refuses_what_is_not_built():
    f = Format(3, 64)
    assert str(Format(4, 64)) == "4-bit/64"
    assert (f.levels, f.groups(192), f.words_per_row(192), f.bits_per_weight()) == (7, 3, 18, 3.5)
    assert Format(4, 32).bits_per_weight(scale_bytes=4) == 6
    assert f == Format(3, 64) and len({f, Format(3, 64)}) == 1
    with pytest.raises(ValueError, match="7-bit groups of 64 do not exist; bits: 1, .* sizes: 32, 64, 128"):
        Format(7, 64)
    with pytest.raises(ValueError, match="4-bit groups of 16 do not exist"):
        Format(4, 16)
    with pytest.raises(ValueError, match="K=100 is not a multiple of the group size 64"):
        f.words_per_row(100)


def test_the_header_says_the_same_as_this_module():
    expand = (
        f'#include "{HEADER}"\n#define CELL(b, g) {{b g}}\n#define BIT(b) {{b}}\n'
        "FORMATS MLXQ_FOR_EACH_FORMAT(CELL)\nBITS MLXQ_FOR_EACH_BITS(BIT)\n"
        "GROUPS MLXQ_FOR_EACH_GROUP_SIZE(CELL, 0)\n"
    )
    command = [os.environ.get("CXX", "c++"), "-E", "-P", "-x", "c++", "-"]
    text = subprocess.run(command, input=expand, capture_output=True, text=True, check=True).stdout
    text = text[text.index("FORMATS") :]

    def cells(name):
        line = re.search(rf"{name}((?:\s*{{[^}}]*}})+)", text).group(1)
        return tuple(tuple(map(int, cell.split())) for cell in re.findall(r"{([^}]*)}", line))

    assert cells("FORMATS") == tuple((f.bits, f.group_size) for f in FORMATS)
    assert cells("BITS") == tuple((b,) for b in BITS)
    assert cells("GROUPS") == tuple((0, g) for g in GROUP_SIZES)
    assert FORMATS == tuple(Format(b, g) for b in KERNEL_BITS for g in GROUP_SIZES)

    constants = dict(re.findall(r"#define MLXQ_(\w+) (\d[\d.e+-]*)f\b", HEADER.read_text()))
    names = ("FLUSH_BELOW", "CONSTANT_BELOW", "ERROR_BELOW", "RANGE_LIMIT", "CONSTANT_SCALE")
    want = {name: getattr(fm, name) for name in names}
    want |= {f"SMALLEST_SCALE_{s.upper()}": fm.SMALLEST_SCALE[s] for s in STORAGE}
    assert {name: np.float32(value) for name, value in constants.items()} == want
    assert "{ f32, f16, bf16 }" in HEADER.read_text()  # the order of STORAGE


def awkward_weights(rng, group_size: int) -> np.ndarray:
    """Rows of three groups, float32, that meet every branch of a quantizer."""
    K = 3 * group_size
    plain = rng.standard_normal((60, K))
    rows = [
        plain * np.exp(rng.uniform(-30, 30, (60, 1))),  # 1e-13 to 1e13
        plain * 1e30,
        plain * 1e-38,  # subnormals among them
        plain * 1e-44,
        plain * 1e-7,  # around MLX's smallest scale
        np.rint(plain * 4) / 2,  # ties
        rng.integers(0, 16, (60, K)) * 0.25 - 2,  # on a grid
        -np.abs(plain),
        np.abs(plain),
        plain * 0.01 + 5,
        np.repeat(plain[:, :3], group_size, axis=1),  # constant groups
        np.where(rng.random((60, K)) < 0.5, 0.0, -0.0),
        np.where(rng.random((60, K)) < 0.9, -0.0, plain),
    ]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_rule_mlx_is_mx_quantize_to_the_bit(fmt, storage):
    w = awkward_weights(np.random.default_rng(fmt.bits), fmt.group_size)
    if storage == "float16":
        w = np.clip(w, -30000, 30000)  # 1-bit steps then fit
    seen = mx.array(w).astype(getattr(mx, storage))
    words, scales, biases = mx.quantize(seen, group_size=fmt.group_size, bits=fmt.bits, stream=mx.cpu)
    ours = fm.quantize(w, fmt, "mlx", storage)
    assert ours.scales.dtype == (np.float16 if storage == "float16" else np.float32)
    np.testing.assert_array_equal(bits_of(ours.scales), bits_of(scales))
    np.testing.assert_array_equal(bits_of(ours.biases), bits_of(biases))
    np.testing.assert_array_equal(ours.words, np.array(words))


def bits_of(array) -> np.ndarray:
    """The bit patterns, so that -0 differs from 0; bfloat16 as float32."""
    if isinstance(array, mx.array):
        array = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    return array.view(np.uint16 if array.dtype == np.float16 else np.uint32)


@pytest.mark.parametrize("rule", fm.RULES)
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_mlx_dequantizes_our_files_to_the_same_float32(fmt, rule):
    w = np.random.default_rng(0).standard_normal((2, 5, 3 * fmt.group_size)).astype(np.float32)
    packed = fm.quantize(w, fmt, rule, "float32").validate()
    assert packed.shape == w.shape and (packed.N, packed.K) == w.shape[-2:]
    operands = (mx.array(a) for a in (packed.words, packed.scales, packed.biases))
    theirs = mx.dequantize(*operands, group_size=fmt.group_size, bits=fmt.bits, stream=mx.cpu)
    # Two roundings here; the compiler of MLX may fuse them into one: half a unit in the product's last place.
    atol = 2.0**-24 * 2 * np.abs(w).max()
    np.testing.assert_allclose(fm.dequantize(packed), np.array(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("storage", STORAGE)
def test_store_rounds_like_mlx(storage):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    edges = np.float32([65519.9, 65520, 2**-25, 3 * 2**-25, 2**-14, 3.4e38, 0, -0.0])
    x = np.concatenate([x[np.isfinite(x)], edges])
    want = mx.array(x).astype(getattr(mx, storage)).astype(mx.float32)
    np.testing.assert_array_equal(bits_of(fm.store(x, storage)), bits_of(want))


@pytest.mark.parametrize("rule", fm.RULES)
def test_non_finite_weights_are_counted_and_located(rule):
    w = np.zeros((3, 4, 64), np.float32)
    w[1, 2, 5], w[2, 0, 0], w[2, 3, 63] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"3 of 768 weights .* the first, nan, at index \(1, 2, 5\)"):
        fm.quantize(w, Format(4, 32), rule)


def test_quantize_says_what_it_wants():
    w = np.zeros((2, 96), np.float32)
    with pytest.raises(ValueError, match="K=96, not a multiple of the group size 64"):
        fm.quantize(w, Format(4, 64))
    with pytest.raises(ValueError, match="no rule 'best'; rules: affine, mlx"):
        fm.quantize(w, Format(4, 32), "best")
    with pytest.raises(ValueError, match="scales cannot be int8; wanted one of float32, float16, bfloat16"):
        fm.quantize(w, Format(4, 32), scale_dtype="int8")
    with pytest.raises(ValueError, match="w is float64; wanted float32 or float16"):
        fm.quantize(w.astype(np.float64), Format(4, 32))
    with pytest.raises(ValueError, match=r"w has shape \(96,\); wanted \(..., N, K\)"):
        fm.quantize(w[0], Format(4, 32))


@pytest.mark.parametrize("rule", fm.RULES)
def test_strides_float16_and_empty_weights_are_served(rule):
    w = np.random.default_rng(2).standard_normal((6, 128)).astype(np.float16)
    a = fm.quantize(w[::2, ::-1], Format(4, 64), rule, "float16")
    b = fm.quantize(w[::2, ::-1].astype(np.float32).copy(), Format(4, 64), rule, "float16")
    for x, y in ((a.words, b.words), (a.scales, b.scales), (a.biases, b.biases)):
        np.testing.assert_array_equal(x, y)
    empty = fm.quantize(w[:0], Format(4, 64), rule).validate()
    assert empty.shape == (0, 128) and empty.nbytes == 0 and fm.dequantize(empty).shape == (0, 128)


def test_packed_refuses_shapes_and_dtypes_that_disagree():
    good = fm.quantize(np.zeros((4, 128), np.float32), Format(4, 64))
    assert good.nbytes == 4 * 128 // 2 + 2 * 4 * 2 * 4
    words, scales, biases = good.words, good.scales, good.biases
    wrong = {
        "words are int32; wanted uint32": (words.astype(np.int32), scales, biases),
        "scales are float64 and biases float64": (words, scales.astype(float), biases.astype(float)),
        "scales are float32 and biases float16": (words, scales, biases.astype(np.float16)),
        r"scales have shape \(4, 2\) but biases \(4, 1\)": (words, scales, biases[:, :1]),
        r"words are \(3, 16\) but scales \(4, 2\)": (words[:3], scales, biases),
        r"words hold K=96 \(12 words of 4-bit codes\) but scales hold K=128 \(2 groups of 64\)": (
            words[:, :12],
            scales,
            biases,
        ),
        r"words have shape \(16,\); wanted": (words[0], scales[0], biases[0]),
    }
    for message, arrays in wrong.items():
        with pytest.raises(ValueError, match=message):
            Packed(*arrays, Format(4, 64)).validate()


def test_packed_reads_shapes_and_dtypes_of_mlx_and_torch():
    torch = pytest.importorskip("torch")
    host = fm.quantize(np.ones((2, 3, 64), np.float32), Format(4, 32))
    arrays = (host.words, host.scales, host.biases)
    as_mx = Packed(*(mx.array(a) for a in arrays), host.format).validate()
    as_torch = Packed(*(torch.from_numpy(a) for a in arrays), host.format).validate()
    assert as_mx.shape == as_torch.shape == host.shape == (2, 3, 64)
    assert as_mx.nbytes == as_torch.nbytes == host.nbytes
