"""int8 codes times packed weights: sums of integers against int64, products against float64, every family."""

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, ops
from mlxq.format import FORMATS, Format, Packed, pack, unpack
from mlxq.ops import native

if not ops.native_available():
    pytest.skip(f"the compiled extension is missing: {ops.native_error()}", allow_module_level=True)

FAMILIES = ops.isa_levels()
DTYPE = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Half a unit in the last place of y, and a float32 sum of up to 132 groups with their two scales, each
# rounded: relative to the sum of the absolute values of its terms.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUM_ERROR = 140 * 2.0**-24
# (M, N, groups): rows 1 to 37, columns that no tile divides, odd numbers of groups.
SHAPES = [(1, 3, 1), (2, 17, 3), (4, 5, 7), (5, 40, 2), (9, 33, 4), (13, 66, 33), (37, 21, 2)]


def weight(fmt, N, K, per_row=False, scale_dtype="float32", seed=0):
    """Random codes; per row: one scale a row and biases -z * scale, the promise that q8mm's caller gives."""
    rng = np.random.default_rng((seed, fmt.bits, fmt.group_size, N, K))
    codes = rng.integers(0, fmt.levels + 1, (N, K))
    scales = (rng.random((N, K // fmt.group_size), np.float32) + 0.5) / fmt.levels
    scales = np.repeat(scales[:, :1], scales.shape[1], 1) if per_row else scales
    scales = mx.array(scales).astype(DTYPE[scale_dtype])
    zero = 2 ** (fmt.bits - 1)
    away = 0 if per_row else mx.array(rng.normal(size=scales.shape).astype(np.float32))
    biases = (away * scales - zero * scales).astype(DTYPE[scale_dtype])
    return Packed(mx.array(pack(codes.astype(np.uint8), fmt.bits)), scales, biases, fmt)


def activations(M, K, seed=1):
    """Codes of all values from -128 on, with rows of the extremes, and a scale for each row."""
    rng = np.random.default_rng((seed, M, K))
    x = rng.integers(-128, 128, (M, K), dtype=np.int8)
    x[-1], x[M // 2, ::2] = 127, -128
    return x, rng.uniform(1e-3, 2e-2, M).astype(np.float32)


def parts(w):
    """int64 codes less z, float64 scales, and float64 biases less those of codes without z."""
    zero = 2 ** (w.format.bits - 1)
    codes = unpack(np.array(w.words), w.format.bits, w.K).astype(np.int64) - zero
    scales, biases = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (w.scales, w.biases))
    return codes, scales, biases + zero * scales


def answer(x, x_scales, w):
    """(y, sum of |terms|) in float64 from int64 sums of groups; x_scales (M,) or (M, groups)."""
    codes, scales, rest = parts(w)
    x = x.astype(np.int64).reshape(len(x), -1, w.format.group_size)
    sums = np.einsum("mgk,ngk->mng", x, codes.reshape(w.N, -1, w.format.group_size))
    by = x_scales.astype(np.float64).reshape(len(x), 1, -1)
    terms = np.concatenate([sums * scales * by, x.sum(-1)[:, None] * rest * by], -1)
    # The rest is a difference of two numbers as large as z * scale, rounded.
    lost = np.abs(x.sum(-1)[:, None] * (2 ** (w.format.bits - 1)) * scales * by).sum(-1)
    return terms.sum(-1), np.abs(terms).sum(-1) + lost


def tile_scales(M, groups):
    """A scale for each group of each row, over four orders of magnitude."""
    return (10 ** np.random.default_rng((M, groups)).uniform(-4, 0, (M, groups))).astype(np.float32)


def whole_rows(x, x_scales, w):
    """float32(int64 sum) * (x_scale * scale): what per_row is to the bit."""
    scale = np.array(w.scales.astype(mx.float32))[:, 0]
    return (x.astype(np.int64) @ parts(w)[0].T).astype(np.float32) * (x_scales[:, None] * scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_family_is_within_float32_of_the_integer_sums(fmt):
    for i, (M, N, groups) in enumerate(SHAPES):
        K = groups * fmt.group_size
        scale_dtype, dtype = list(DTYPE)[i % 3], list(DTYPE)[i // 2 % 3]
        w = weight(fmt, N, K, scale_dtype=scale_dtype)
        x, x_scales = activations(M, K)
        want, size = answer(x, x_scales, w)
        for family in FAMILIES:
            with ops.forced_isa(family):
                y = ops.q8mm(mx.array(x), mx.array(x_scales), w, dtype=dtype)
                mx.eval(y)
            assert y.dtype == DTYPE[dtype]
            off = np.abs(np.array(y.astype(mx.float32)) - want)
            bound = SUM_ERROR * size + ROUNDING[dtype] * np.abs(want)
            assert (off <= bound).all(), (family, M, N, K, dtype, np.max(off / bound))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_family_scales_each_group_of_a_row_by_its_own_number(fmt):
    for i, (M, N, groups) in enumerate(SHAPES):
        K = groups * fmt.group_size
        scale_dtype, dtype = list(DTYPE)[i % 3], list(DTYPE)[i // 2 % 3]
        w = weight(fmt, N, K, scale_dtype=scale_dtype)
        x, _ = activations(M, K)
        x_scales = tile_scales(M, groups)
        want, size = answer(x, x_scales, w)
        for family in FAMILIES:
            with ops.forced_isa(family):
                y = ops.q8mm(mx.array(x), mx.array(x_scales), w, dtype=dtype)
                mx.eval(y)
            off = np.abs(np.array(y.astype(mx.float32)) - want)
            bound = SUM_ERROR * size + ROUNDING[dtype] * np.abs(want)
            assert (off <= bound).all(), (family, M, N, K, dtype, np.max(off / bound))


def test_equal_scales_of_the_groups_are_the_scale_of_the_row():
    """By powers of two nothing is rounded, so the bits are those of a row's scale."""
    w = weight(Format(4, 64), 40, 320)
    for M in (1, 9):
        x, _ = activations(M, 320)
        rows = (2.0 ** -np.arange(M, dtype=np.float32)).astype(np.float32)
        for family in FAMILIES:
            with ops.forced_isa(family):
                by_row = ops.q8mm(mx.array(x), mx.array(rows), w)
                by_group = ops.q8mm(mx.array(x), mx.array(np.repeat(rows[:, None], 5, 1)), w)
                assert mx.array_equal(by_row, by_group), family


def test_tiles_of_views_cubes_vectors_and_lanes_are_those_of_the_rows():
    w = weight(Format(8, 32), 21, 96)
    x, x_scales = activations(12, 96)[0], tile_scales(12, 3)
    flat = np.array(ops.q8mm(mx.array(x), mx.array(x_scales), w))
    cube = [mx.array(a.reshape(3, 4, -1)) for a in (x, x_scales)]
    np.testing.assert_array_equal(np.array(ops.q8mm(*cube, w)).reshape(12, 21), flat)
    lanes = mx.vmap(lambda x, s: ops.q8mm(x, s, w), in_axes=(1, 1))(*cube)
    np.testing.assert_array_equal(np.array(lanes), flat.reshape(3, 4, 21).swapaxes(0, 1))
    strided = ops.q8mm(mx.array(x)[::2], mx.array(x_scales.T.copy()).T[::2], w)
    np.testing.assert_allclose(np.array(strided), flat[::2], rtol=1e-5, atol=1e-5)
    row = ops.q8mm(mx.array(x[3]), mx.array(x_scales[3]), w)
    np.testing.assert_allclose(np.array(row), flat[3], rtol=1e-5, atol=1e-5)
    assert ops.q8mm(mx.zeros((0, 96), mx.int8), mx.zeros((0, 3)), w).shape == (0, 21)


def test_numpy_torch_and_mlx_without_our_kernels_serve_tiles(monkeypatch):
    torch = pytest.importorskip("torch")
    w = weight(Format(2, 64), 9, 192)
    x, x_scales = activations(5, 192)[0], tile_scales(5, 3)
    want, size = answer(x, x_scales, w)
    y = np.array(ops.q8mm(mx.array(x), mx.array(x_scales), w))
    host = Packed(np.array(w.words), np.array(w.scales), np.array(w.biases), w.format)
    np.testing.assert_allclose(ops.q8mm(x, x_scales, host), want, rtol=1e-6)
    words = torch.from_numpy(np.array(w.words).view(np.int32)).view(torch.uint32)
    there = Packed(words, *(torch.from_numpy(np.array(a)) for a in (w.scales, w.biases)), w.format)
    on_torch = ops.q8mm(torch.from_numpy(x), torch.from_numpy(x_scales), there)
    np.testing.assert_array_equal(on_torch.numpy(), y)
    floats = mx.random.normal((5, 192))
    codes, scales = ops.q8_rows(floats, 64)
    monkeypatch.setattr(native, "_ext", lambda: None)
    stock = np.array(ops.q8mm(mx.array(x), mx.array(x_scales), w))
    assert (np.abs(stock - want) <= (192 + 8) * 2.0**-24 * size).all()
    for ours, theirs in zip((codes, scales), ops.q8_rows(floats, 64), strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_per_row_is_the_same_bits_in_every_family(fmt):
    for M, N, groups in SHAPES:
        K = groups * fmt.group_size
        w = weight(fmt, N, K, per_row=True, scale_dtype=list(DTYPE)[M % 3])
        x, x_scales = activations(M, K)
        want = whole_rows(x, x_scales, w)
        for family in FAMILIES:
            with ops.forced_isa(family):
                y = ops.q8mm(mx.array(x), mx.array(x_scales), w, per_row=True)
                np.testing.assert_array_equal(np.array(y), want, str((family, M, N, K)))
        for dtype in ("float16", "bfloat16"):
            y = ops.q8mm(mx.array(x), mx.array(x_scales), w, per_row=True, dtype=dtype)
            assert mx.array_equal(y, mx.array(want).astype(DTYPE[dtype]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row_of_extremes_fits(family):
    """131040 products of -128 with code 0, which is -128: 2^31 less 1.2 million, in one int32."""
    fmt, K = Format(8, 32), 131040
    shape = (3, K // 4)
    words = mx.concatenate([mx.zeros((1, shape[1]), mx.uint32), mx.full((2, shape[1]), 2**32 - 1, mx.uint32)])
    ones = mx.ones((3, K // 32))
    w = Packed(words, ones, -128 * ones, fmt)
    for M in (1, 9, 37):
        with ops.forced_isa(family):
            y = ops.q8mm(mx.full((M, K), -128, mx.int8), mx.array([1.0]), w, per_row=True)
        want = np.float32([[K * 2**14, -128 * 127 * K, -128 * 127 * K]] * M)
        np.testing.assert_array_equal(np.array(y), want)


def test_every_q8_kernel_that_runs_here_is_reached():
    before = ops.kernel_calls()
    w = weight(Format(4, 32), 3, 64)
    for family in FAMILIES:
        for M in (1, 9, 37):
            x, x_scales = activations(M, 64)
            with ops.forced_isa(family):
                mx.eval(ops.q8mm(mx.array(x), mx.array(x_scales), w))
    ran = {name for name, n in ops.kernel_calls().items() if n > before[name]}
    here = {name for name in ops.kernel_calls() if ":q8" in name and name.split(":")[0] in FAMILIES}
    assert ran == here and "scalar:q8" in here


@pytest.mark.parametrize("dtype", DTYPE)
def test_rows_become_codes_and_scales_as_numpy_makes_them(dtype):
    for M, K in ((1, 1), (3, 96), (7, 1060), (2, 4224)):
        x = mx.array(np.random.default_rng(K).normal(size=(M, K)).astype(np.float32)).astype(DTYPE[dtype])
        x[0, : K // 2] = 0
        if M > 2:
            x[1] = 0
        x[-1, 0] = 1e4
        exact = np.array(x.astype(mx.float32))
        peak = np.abs(exact).max(-1)
        want = np.where(peak == 0, np.float32(1), peak / np.float32(127))
        rounded = np.clip(np.rint(exact / want[:, None]), -127, 127).astype(np.int8)
        for family in FAMILIES:
            with ops.forced_isa(family):
                codes, scales = ops.q8_rows(x)
                mx.eval(codes, scales)
            np.testing.assert_array_equal(np.array(scales), want, family)
            np.testing.assert_array_equal(np.array(codes), rounded, family)
        assert codes.dtype == mx.int8 and np.abs(np.array(codes)).max() == 127


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_tiles_of_a_row_become_codes_as_rows_of_their_own(group_size):
    torch = pytest.importorskip("torch")
    for dtype, storage in DTYPE.items():
        x = mx.array(np.random.default_rng(7).normal(size=(3, 5, 384)).astype(np.float32)).astype(storage)
        x[1, 2, :group_size] = 0
        exact = np.array(x.astype(mx.float32)).reshape(3, 5, -1, group_size)
        peak = np.abs(exact).max(-1)
        want = np.where(peak == 0, np.float32(1), peak / np.float32(127))
        rounded = np.clip(np.rint(exact / want[..., None]), -127, 127).astype(np.int8).reshape(x.shape)
        on_torch = torch.from_numpy(exact.reshape(x.shape)).to(getattr(torch, dtype))
        for given in (x, exact.reshape(x.shape), on_torch):
            codes, scales = ops.q8_rows(given, group_size)
            np.testing.assert_array_equal(bridge.to_numpy(scales), want)
            np.testing.assert_array_equal(bridge.to_numpy(codes), rounded)


def test_a_row_with_nan_or_infinity_gets_a_scale_that_says_so():
    x = np.ones((3, 40), np.float32)
    x[0, 7], x[1, 39] = np.nan, -np.inf
    for family in FAMILIES:
        with ops.forced_isa(family):
            codes, scales = ops.q8_rows(mx.array(x))
            mx.eval(codes, scales)
        assert np.isnan(scales[0].item()) and np.isposinf(scales[1].item()) and np.isfinite(scales[2].item())
        assert (np.array(codes)[2] == 127).all()
        assert (np.array(codes)[0] == -127).all(), family  # x / NaN
        assert (np.array(codes)[1] == np.where(np.isinf(x[1]), -127, 0)).all(), family


@pytest.mark.parametrize("dtype", DTYPE)
@pytest.mark.parametrize("kind", ["rows", "groups", "tiles"])
def test_one_step_from_floats_gives_the_bits_of_two(kind, dtype):
    for fmt, M in ((Format(8, 64), 1), (Format(4, 32), 37)):
        w = weight(fmt, 40, 5 * fmt.group_size, per_row=kind == "rows", scale_dtype=dtype)
        x = mx.random.normal((2, M, w.K), key=mx.random.key(M)).astype(DTYPE[dtype])
        tile, per_row = fmt.group_size if kind == "tiles" else None, kind == "rows"

        def one(x, w=w, per_row=per_row, tile=tile):
            return native.q8_linear(x, w, per_row, tile, dtype)

        want = ops.q8mm(*ops.q8_rows(x, tile), w, per_row=per_row, dtype=dtype)
        assert one(x).dtype == DTYPE[dtype] and mx.array_equal(one(x), want)
        assert mx.array_equal(one(x.swapaxes(0, 1)), want.swapaxes(0, 1))
        assert mx.array_equal(mx.compile(one)(x), want) and mx.array_equal(mx.vmap(one)(x), want)
        dy = mx.random.normal(want.shape)
        _, (dx,) = mx.vjp(one, [x], [dy.astype(want.dtype)])
        straight = ops.qmm(dy.astype(want.dtype).astype(mx.float32), w, transpose=False).astype(x.dtype)
        assert mx.array_equal(dx, straight)
    assert one(mx.zeros((0, w.K), DTYPE[dtype])).shape == (0, 40)


def test_one_step_refuses_what_two_refuse_and_leaves_gpus_and_builds_without_kernels_to_them(monkeypatch):
    w = weight(Format(8, 64), 9, 128)
    with pytest.raises(ValueError, match=r"x has shape \(3, 64\) and w holds K=128"):
        native.q8_linear(mx.zeros((3, 64)), w, False, None, "float32")
    with pytest.raises(TypeError, match="int8"):
        native.q8_linear(mx.zeros((3, 128), mx.int8), w, False, None, "float32")
    monkeypatch.setattr(native, "_ext", lambda: None)
    assert native.q8_linear(mx.zeros((3, 128)), w, False, None, "float32") is None


def test_leading_axes_views_and_one_scale_for_all_are_served():
    w = weight(Format(4, 32), 21, 96, per_row=True)
    x, x_scales = activations(12, 96)
    flat = whole_rows(x, x_scales, w)
    cube = ops.q8mm(mx.array(x.reshape(3, 4, 96)), mx.array(x_scales.reshape(3, 4)), w, per_row=True)
    np.testing.assert_array_equal(np.array(cube).reshape(12, 21), flat)
    strided = ops.q8mm(mx.array(x.T.copy()).T[::2], mx.array(x_scales)[::2], w, per_row=True)
    np.testing.assert_array_equal(np.array(strided), flat[::2])
    row = ops.q8mm(mx.array(x[3]), mx.array(x_scales[3]), w, per_row=True)
    np.testing.assert_array_equal(np.array(row), flat[3])
    one = ops.q8mm(mx.array(x), mx.array([0.5]), w, per_row=True)
    each = ops.q8mm(mx.array(x), mx.full((12,), 0.5), w, per_row=True)
    np.testing.assert_array_equal(np.array(one), np.array(each))
    assert ops.q8mm(mx.zeros((0, 96), mx.int8), mx.zeros((0,)), w).shape == (0, 21)


def test_vmap_and_compile_give_the_rows_one_by_one():
    w = weight(Format(8, 64), 9, 128, per_row=True)
    x, x_scales = activations(10, 128)
    want = np.array(ops.q8mm(mx.array(x), mx.array(x_scales), w, per_row=True)).reshape(2, 5, 9)
    x, x_scales = mx.array(x.reshape(2, 5, 128)), mx.array(x_scales.reshape(2, 5))

    def call(x, s):
        return ops.q8mm(x, s, w, per_row=True)

    np.testing.assert_array_equal(np.array(mx.vmap(call)(x, x_scales)), want)
    turned = mx.vmap(call, in_axes=(1, 1))(x.swapaxes(0, 1), x_scales.T)
    np.testing.assert_array_equal(np.array(turned), want)
    np.testing.assert_array_equal(np.array(mx.compile(call)(x, x_scales)), want)
    codes, scales = mx.vmap(ops.q8_rows)(x.astype(mx.float32))
    np.testing.assert_array_equal(np.array(codes), np.array(ops.q8_rows(x.astype(mx.float32))[0]))
    with pytest.raises(ValueError, match="vmap over packed weights"):
        mx.vmap(lambda s: ops.q8mm(x[0], x_scales[0], Packed(w.words, s, w.biases, w.format)))(
            mx.stack([w.scales, w.scales])
        )


@pytest.mark.parametrize("per_row", [False, True])
def test_numpy_and_torch_give_what_mlx_gives(per_row):
    torch = pytest.importorskip("torch")
    w = weight(Format(8, 64), 9, 128, per_row)
    x, x_scales = activations(5, 128)
    y = np.array(ops.q8mm(mx.array(x), mx.array(x_scales), w, per_row=per_row))
    host = Packed(np.array(w.words), np.array(w.scales), np.array(w.biases), w.format)
    want, size = answer(x, x_scales, w)
    on_numpy = ops.q8mm(x, x_scales, host, per_row=per_row)
    assert (np.abs(on_numpy - want) <= SUM_ERROR * size + 2.0**-24 * np.abs(want)).all()
    if per_row:
        np.testing.assert_array_equal(on_numpy, y)
    words = torch.from_numpy(np.array(w.words).view(np.int32)).view(torch.uint32)
    there = Packed(words, *(torch.from_numpy(np.array(a)) for a in (w.scales, w.biases)), w.format)
    codes, scales = torch.from_numpy(x), torch.from_numpy(x_scales)
    for dtype in ("float32", "bfloat16"):
        on_torch = ops.q8mm(codes, scales, there, per_row=per_row, dtype=dtype)
        assert on_torch.dtype == getattr(torch, dtype)
        want = mx.array(y).astype(DTYPE[dtype]).astype(mx.float32)
        got = ops.q8mm(mx.array(x), mx.array(x_scales), w, per_row=per_row, dtype=dtype).astype(mx.float32)
        np.testing.assert_array_equal(on_torch.float().numpy(), np.array(got))
        assert not per_row or mx.array_equal(got, want)
    rows = torch.randn(4, 96)
    for a, b in zip(ops.q8_rows(rows), ops.q8_rows(rows.numpy()), strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def test_no_gradient_is_invented():
    w = weight(Format(8, 64), 9, 128)
    x, x_scales = activations(2, 128)
    with pytest.raises(ValueError, match=r"int8 codes have no gradient; a layer defines its own"):
        mx.grad(lambda s: ops.q8mm(mx.array(x), s, w).sum())(mx.array(x_scales))
    with pytest.raises(ValueError, match="int8 codes have no gradient"):
        mx.grad(lambda x: ops.q8_rows(x)[1].sum())(mx.ones((2, 64)))


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"x": mx.zeros((2, 128))}, TypeError, "x_codes are float32; wanted int8"),
        ({"x": mx.zeros((2, 64), mx.int8)}, ValueError, r"x_codes have shape \(2, 64\) but w holds K=128"),
        ({"s": mx.zeros((3,))}, ValueError, r"x_scales have shape \(3,?\); wanted one number, or one for"),
        ({"s": mx.zeros((2, 3))}, ValueError, r"x_scales have shape \(2, 3\); .* for each 64 codes of a row"),
        ({"s": mx.zeros((2, 2)), "per_row": True}, ValueError, r"\(2, 2\), one for each group, and per_row"),
        ({"s": mx.zeros((2,), mx.float16)}, TypeError, "x_scales are float16; wanted float32"),
        ({"dtype": "int8"}, ValueError, "dtype is int8; wanted float32, float16"),
        ({"bits": 5}, ValueError, "5-bit"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_by_mlx_and_numpy(given, error, message):
    fmt = Format(given.get("bits", 8), 64)
    w = weight(fmt, 9, 128)
    x, s = given.get("x", mx.zeros((2, 128), mx.int8)), given.get("s", mx.ones((2,)))
    host = Packed(np.array(w.words), np.array(w.scales), np.array(w.biases), fmt)
    settings = {"dtype": given.get("dtype", "float32"), "per_row": given.get("per_row", False)}
    with pytest.raises(error, match=message):
        ops.q8mm(x, s, w, **settings)
    with pytest.raises(error, match=message):
        ops.q8mm(np.array(x), np.array(s), host, **settings)


def test_too_long_a_row_and_rows_of_nothing_are_refused():
    fmt = Format(2, 32)
    w = Packed(mx.zeros((1, 8192), mx.uint32), mx.zeros((1, 4096)), mx.zeros((1, 4096)), fmt)
    with pytest.raises(ValueError, match=r"K=131072 int8 products may not fit an int32; at most 131071"):
        ops.q8mm(mx.zeros((1, 131072), mx.int8), mx.ones((1,)), w)
    for empty in (mx.zeros((3, 0)), np.zeros((3, 0), np.float32)):
        with pytest.raises(ValueError, match=r"q8_rows: x has shape \(3, 0\)"):
            ops.q8_rows(empty)
    for given in (mx.zeros((3, 96)), np.zeros((3, 96), np.float32)):
        with pytest.raises(ValueError, match="q8_rows: group_size is 48; wanted 32, 64 or 128"):
            ops.q8_rows(given, 48)
        with pytest.raises(ValueError, match=r"\(3, 96\), whose rows are no multiple of group_size=64"):
            ops.q8_rows(given, 64)
    with pytest.raises(TypeError, match="q8_rows: x is int32"):
        ops.q8_rows(mx.zeros((3, 4), mx.int32))
