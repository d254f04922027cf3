"""Quantized arrays: qwix's own codes, scales and values; degenerate ranges; three frameworks, one answer."""

import re

import mlx.core as mx
import numpy as np
import pytest
from golden import make_qwix

from mlxq.ptq import qarray
from mlxq.ptq.arrays import tiny_scale
from mlxq.ptq.qarray import HowToQuantize, QArray, dequantize, quantize
from mlxq.rules import QTYPES

torch = pytest.importorskip("torch", reason="needs the package torch")
GOLDEN = make_qwix.stored()
SETTINGS = make_qwix.settings()
FROM = {"numpy": lambda a: a, "mlx": mx.array, "torch": torch.from_numpy}
PROBLEMS = {"numpy": np.ndarray, "mlx": mx.array, "torch": torch.Tensor}


def as_numpy(array):
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, mx.array):
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


def how_of(case):
    return HowToQuantize(**{k: v for k, v in case.items() if k not in ("input", "dtype")})


def golden_of(number):
    names = ("qvalue", "scale", "zero_point", "values")
    return {name: GOLDEN.get(f"quantize.{number}.{name}") for name in names}


@pytest.mark.parametrize("kind", FROM)
def test_codes_scales_and_values_are_those_of_qwix(kind):
    compared = 0
    for number, case in enumerate(SETTINGS):
        dtype = case.get("dtype")
        if (kind, dtype) in (("numpy", "bfloat16"), ("mlx", "float64")):  # which these do not have
            continue
        array = FROM[kind](GOLDEN[f"input.{case['input']}"])
        if dtype:
            array = array.astype(getattr(mx, dtype)) if kind == "mlx" else (
                array.to(getattr(torch, dtype)) if kind == "torch" else array.astype(dtype)
            )  # fmt: skip
        want, got = golden_of(number), quantize(array, how_of(case))
        assert isinstance(got.qvalue, PROBLEMS[kind])
        scale, values = as_numpy(got.scale).astype(np.float64), as_numpy(dequantize(got)).astype(np.float64)
        assert scale.shape == want["scale"].shape, case
        if case.get("calibration_method", "").startswith("rms"):  # named difference 5
            np.testing.assert_allclose(scale, want["scale"], rtol=4 * 2**-24)
            continue
        np.testing.assert_array_equal(scale, want["scale"], err_msg=str(case))
        codes = as_numpy(got.qvalue)
        if want["qvalue"].dtype == np.float32:  # float4: its numbers are stored, not their bits
            codes = qarray._values_of(case["qtype"])[codes]
        np.testing.assert_array_equal(codes, want["qvalue"], err_msg=str(case))
        np.testing.assert_array_equal(values, want["values"], err_msg=str(case))
        if want["zero_point"] is None:
            assert got.zero_point is None
        else:
            np.testing.assert_array_equal(as_numpy(got.zero_point), want["zero_point"], err_msg=str(case))
        compared += 1
    assert compared > 130


def test_the_stored_values_are_what_qwix_computes_here():
    pytest.importorskip("qwix", reason="needs the package qwix: pip install 'mlxq[qwix]'")
    live = make_qwix.compute()
    assert live.keys() == GOLDEN.keys()
    for name, value in live.items():
        np.testing.assert_array_equal(value, GOLDEN[name], err_msg=name)


@pytest.mark.parametrize(
    "qtype, error",
    # The step of each type against Gaussian weights, 16 to a scale; qwix's own tests list such figures.
    [("int2", 0.44), ("int3", 0.19), ("int4", 0.09), ("int8", 0.006), ("float8_e4m3fn", 0.03),
     ("float8_e5m2", 0.06), ("nf4", 0.09), ("mxfp8", 0.04), ("mxfp4", 0.15), ("nvfp4", 0.1)],
)  # fmt: skip
def test_the_relative_error_of_each_type_is_bounded(qtype, error):
    x = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: QTYPES[qtype].tile or 16})
    got = np.linalg.norm(dequantize(quantize(x, how)) - x) / np.linalg.norm(x)
    assert error / 2 < got < error


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("number, case", list(enumerate(make_qwix.errors())), ids=str)
def test_the_relative_errors_are_those_that_qwix_lists(number, case, kind):
    """Of its own test's random bfloat16 numbers, mean |x - got| / mean |x|, each rounded to bfloat16."""
    bits = GOLDEN["drawn." + "x".join(map(str, case["shape"]))]
    assert bits.shape == case["shape"]
    how = HowToQuantize(**{k: v for k, v in case.items() if k not in ("shape", "error")})
    shift = 1 if how.calibration_method == "minmax" else 0
    if kind == "mlx":
        array = mx.array(bits).view(mx.bfloat16) + shift
        difference = mx.abs(array - dequantize(quantize(array, how)))
    else:
        array = torch.from_numpy(bits).view(torch.bfloat16) + shift
        difference = (array - dequantize(quantize(array, how))).abs()
    means = [as_bfloat16(np.abs(as_numpy(a)).mean(dtype=np.float64)) for a in (difference, array)]
    got, live = as_bfloat16(means[0] / means[1]), GOLDEN[f"error.{number}"]
    assert abs(got - case["error"]) < 1e-6 and got == live


def as_bfloat16(number: float) -> float:
    return torch.tensor(number, dtype=torch.float64).to(torch.bfloat16).item()


@pytest.mark.parametrize("kind", FROM)
@pytest.mark.parametrize("error", [0, 1e-7])
def test_steps_of_1_255_become_the_codes_from_minus_128_to_127(kind, error):
    """qwix's own exact grid, and with a little noise on it."""
    x = np.arange(256, dtype=np.float32) / np.float32(255)
    x += np.random.default_rng(42).uniform(-error, error, 256).astype(np.float32)
    got = quantize(FROM[kind](x), HowToQuantize(qtype="int8", calibration_method="minmax"))
    assert as_numpy(got.zero_point).item() == -128
    np.testing.assert_array_equal(as_numpy(got.qvalue), np.arange(-128, 128))
    np.testing.assert_allclose(as_numpy(dequantize(got)), x, rtol=1e-5, atol=1e-6 if error else 1e-8)


@pytest.mark.parametrize("qtype", QTYPES)
def test_an_array_on_the_grid_comes_back_exactly(qtype):
    kind = QTYPES[qtype]
    if kind.is_integer:
        values = np.arange(-kind.high, kind.high + 1, dtype=np.float32)
        scale = np.float32(0.5)
        array = qarray.quantize_with(values[None], qtype, np.full((1, 1), scale))
        np.testing.assert_array_equal(
            qarray.quantize_with(values[None] * scale, qtype, array.scale).qvalue[0], values
        )
        return
    table = qarray._values_of(qtype)
    table = np.unique(table[np.isfinite(table)])  # -0 and 0 are one number
    got = qarray.quantize_with(table[None], qtype, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(dequantize(got)[0], table)


def test_every_small_float_is_rounded_half_to_even_as_torch_does():
    x = np.concatenate([np.linspace(-500, 500, 20001), 2.0 ** np.arange(-20, 10), [-0.0, 0.0]]).astype(
        np.float32
    )
    for qtype in ("float8_e4m3fn", "float8_e5m2"):
        got = qarray.quantize_with(x[None], qtype, np.ones((1, 1), np.float32)).qvalue[0]
        bound = QTYPES[qtype].bound
        want = torch.from_numpy(x).clip(-bound, bound).to(getattr(torch, qtype)).view(torch.uint8).numpy()
        np.testing.assert_array_equal(got, want)


def test_the_tables_of_small_floats_are_torchs():
    for qtype in ("float8_e4m3fn", "float8_e5m2"):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        want = codes.view(getattr(torch, qtype)).float().numpy()
        got = qarray._values_of(qtype)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[finite], want[finite])
        assert np.isnan(got[~finite]).all()


@pytest.mark.parametrize("kind", FROM)
@pytest.mark.parametrize("qtype", QTYPES)
def test_arrays_of_zeros_and_of_tiny_numbers_give_no_nan(kind, qtype):
    tile = QTYPES[qtype].tile or 16
    for value in (0.0, 1e-30, 1e-44, 1e37):
        x = np.full((2, 64), value, np.float32)
        got = quantize(FROM[kind](x), HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: tile}))
        values = as_numpy(dequantize(got))
        assert np.isfinite(values).all() and np.isfinite(as_numpy(got.scale)).all()
        assert value > 1e30 or np.abs(values).max() <= 1e-10


def test_float16_keeps_the_scale_of_ordinary_weights():
    """Named difference 1: qwix makes it 1 and every code 0."""
    x = (np.random.default_rng(0).standard_normal((4, 64)) / 10).astype(np.float16)
    got = dequantize(quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,))))
    assert got.dtype == np.float16 and np.linalg.norm(got - x) / np.linalg.norm(x) < 0.01
    assert tiny_scale("float16") == 2.0**-24 and tiny_scale("float32") == 2.0**-63


def test_scales_of_mx_types_are_the_least_power_of_two_that_does_not_clip():
    """Named difference 2: from the bits, right at and around each power of two."""
    for exponent in (-20, -3, 0, 5):
        for factor, want in ((1 - 2**-24, 0), (1, 0), (1 + 2**-23, 1)):
            peak = np.float32(6 * 2.0**exponent * factor)
            x = np.zeros((1, 32), np.float32)
            x[0, 7] = peak
            scale = quantize(x, HowToQuantize(qtype="mxfp4", tiled_axes={1: 32})).scale
            assert scale.item() == 2.0 ** (exponent + (want if peak / 6 > 2.0**exponent else 0))


def test_a_scale_that_nvfp4_cannot_hold_is_its_smallest():
    """Named difference 3."""
    got = quantize(np.full((1, 16), 1e-6, np.float32), HowToQuantize(qtype="nvfp4", tiled_axes={1: 16}))
    assert got.scale.item() == 2.0**-9 and dequantize(got).max() == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"qtype": "int9"}, "'int9' does not exist"),
        ({"qtype": "uint8"}, "unsigned codes"),
        ({"qtype": "mxfp4"}, "give tiled_axes"),
        ({"qtype": "mxfp4", "tiled_axes": {1: 16}}, "tiles of 32"),
        (
            {"qtype": "int8", "channelwise_axes": (1,), "tiled_axes": {1: 2}},
            "axis 1 cannot be channelwise and tiled",
        ),
        ({"qtype": "int8", "calibration_method": "median"}, "'median' does not exist"),
        ({"qtype": "int8", "calibration_method": "rms"}, "rms takes 1 numbers, got 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        HowToQuantize(**arguments)


def test_shapes_and_types_that_cannot_work_are_errors():
    x = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match="6 is no multiple"):
        quantize(x, HowToQuantize(qtype="int8", tiled_axes={1: 4}))
    with pytest.raises(TypeError, match="the array is int32"):
        qarray.quantize_with(x.astype(np.int32), "int8", np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="no asymmetric form"):
        quantize(x, HowToQuantize(qtype="int2", calibration_method="minmax"))
    with pytest.raises(ValueError, match="of another rank"):
        QArray(np.zeros((4, 6), np.int8), np.ones(6, np.float32)).validate()
    with pytest.raises(ValueError, match="does not divide"):
        QArray(np.zeros((4, 6), np.int8), np.ones((4, 4), np.float32)).validate()
    with pytest.raises(ValueError, match="codes are int32"):
        QArray(np.zeros((4, 6), np.int32), np.ones((4, 1), np.float32)).validate()


@pytest.mark.parametrize("kind", FROM)
@pytest.mark.parametrize("qtype", QTYPES)
def test_nan_and_infinity_are_refused_and_unread_they_make_their_tile_nan(kind, qtype):
    """Named difference 6."""
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: QTYPES[qtype].tile or 16})
    for bad in (np.nan, np.inf, -np.inf):
        x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
        x[1, 5] = x[2, 63] = bad
        with pytest.raises(ValueError, match=rf"quantize: 2 of 192 .* first, {bad}, at index \(1, 5\)"):
            quantize(FROM[kind](x), how)
        got = as_numpy(dequantize(qarray.quantize_unread(FROM[kind](x), how)))
        tile = how.tiled_axes[1]
        for row, start in ((1, 0), (2, 64 - tile)):
            assert np.isnan(got[row, start : start + tile]).all()
        assert np.isnan(got).sum() == 2 * tile
    with pytest.raises(ValueError, match="are NaN or infinite"):  # a range that knows nothing of the values
        quantize(FROM[kind](x), HowToQuantize(**vars(how) | {"calibration_method": "fixed,2"}))


def test_inside_of_mx_compile_nothing_is_read():
    how = HowToQuantize(qtype="int8", channelwise_axes=(0,))
    x = mx.random.normal((4, 64))
    got = mx.compile(lambda x: dequantize(quantize(x, how)))(x)
    assert mx.array_equal(got, dequantize(quantize(x, how)))


@pytest.mark.parametrize("kind", FROM)
def test_arrays_that_are_not_float_or_hold_nothing_are_errors(kind):
    to, rows = FROM[kind], HowToQuantize(qtype="int8", channelwise_axes=(0,))
    for dtype in (np.int32, np.int8, np.bool_):
        with pytest.raises(
            TypeError, match=r"quantize: the array is (int32|int8|bool\w*); wanted one of float32"
        ):
            quantize(to(np.ones((4, 6), dtype)), rows)
    for how in (rows, HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="minmax")):
        with pytest.raises(ValueError, match=r"shape \(4, 0\) has no values along axis 1, so no range"):
            quantize(to(np.ones((4, 0), np.float32)), how)
        got = quantize(to(np.ones((0, 6), np.float32)), how)  # no rows need no scale
        assert tuple(got.scale.shape) == (0, 1) and tuple(dequantize(got).shape) == (0, 6)
    with pytest.raises(ValueError, match=r"scales of shape \(4,\), an array of \(4, 6\); wanted one axis"):
        qarray.quantize_with(to(np.ones((4, 6), np.float32)), "int8", to(np.ones(4, np.float32)))


@pytest.mark.parametrize("kind", FROM)
def test_axes_count_from_the_end_too_and_those_that_do_not_exist_are_errors(kind):
    x = FROM[kind](np.random.default_rng(0).standard_normal((2, 3, 64), dtype=np.float32))
    for qtype, tile, method in (("mxfp4", 32, "absmax"), ("int8", 16, "minmax"), ("nvfp4", 16, "absmax")):
        both = [
            quantize(
                x,
                HowToQuantize(
                    qtype=qtype, channelwise_axes=rows, tiled_axes={last: tile}, calibration_method=method
                ),
            )
            for rows, last in (((0, 1), 2), ((-2, 0), -1))
        ]
        assert tuple(both[1].scale.shape) == (2, 3, 64 // tile)
        for name in ("qvalue", "scale"):
            want, got = (as_numpy(getattr(q, name)) for q in both)
            np.testing.assert_array_equal(got, want)
    for settings, said in (
        ({"tiled_axes": {3: 16}}, "tiled_axes names axis 3, but the array has 3 axes; wanted -3 to 2"),
        ({"channelwise_axes": (-4,)}, "channelwise_axes names axis -4, but the array has 3 axes"),
        ({"channelwise_axes": (2,), "tiled_axes": {-1: 16}}, "name one of them twice"),
        ({"channelwise_axes": (0, -3)}, "name one of them twice"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            quantize(x, HowToQuantize(qtype="int8", **settings))


SHAPED = quantize(
    np.random.default_rng(3).standard_normal((2, 2, 6), dtype=np.float32),
    HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={2: 2}),
)


@pytest.mark.parametrize("shape", [(4, 6), (2, 12), (2, 2, 6), (2, 2, 3, 2), (1, 2, 2, 6), (2, 2, 1, 6)])
def test_a_reshaped_array_has_the_reshaped_values_or_is_refused(shape):
    try:
        got = dequantize(SHAPED.reshape(*shape))
    except ValueError as error:
        assert shape == (2, 12) and "with scales of shape" in str(error)  # tiles of axis 2, none of axis 1
    else:
        assert shape != (2, 12)
        np.testing.assert_array_equal(got, dequantize(SHAPED).reshape(shape))


def test_channels_survive_a_reshape_that_splits_them():
    """What a module that reshapes its weight needs: (6, 8) with a scale a row as (2, 3, 8)."""
    x = np.random.default_rng(3).standard_normal((6, 8), dtype=np.float32)
    got = quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    np.testing.assert_array_equal(dequantize(got.reshape(2, 3, 8)), dequantize(got).reshape(2, 3, 8))
    with pytest.raises(ValueError, match="does not fit"):
        got.reshape(7, 8)


@pytest.mark.parametrize(
    "index", [0, 1, slice(1, None), (0, 1), (slice(None), 1), (..., 5), (0, 0, 3), (slice(None), slice(1), 2)]
)
def test_a_part_of_a_quantized_array_has_that_part_of_its_values(index):
    np.testing.assert_array_equal(
        np.asarray(dequantize(SHAPED))[index],
        dequantize(SHAPED[index]) if SHAPED[index].ndim else SHAPED[index].qvalue * SHAPED[index].scale,
    )


def test_a_slice_through_tiles_is_an_error():
    with pytest.raises(ValueError, match="would cut tiles of 2"):
        SHAPED[..., 1:5]


def test_a_transposed_array_has_the_transposed_values():
    np.testing.assert_array_equal(
        dequantize(SHAPED.transpose(2, 0, 1)), dequantize(SHAPED).transpose(2, 0, 1)
    )
    assert SHAPED.tiles == {2: 2} and SHAPED.astype("float64").dtype == "float64"
