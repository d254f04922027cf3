"""Operations on quantized arrays: qwix's own results, exact integers, types and errors."""

import mlx.core as mx
import numpy as np
import pytest
from golden import make_qwix

from mlxq.ptq import functional as F
from mlxq.ptq import qarray
from mlxq.ptq.qarray import HowToQuantize, dequantize, quantize
from mlxq.rules import QuantizationRule

torch = pytest.importorskip("torch", reason="needs the package torch")
GOLDEN = make_qwix.stored()
FROM = {"numpy": lambda a: a, "mlx": mx.array, "torch": torch.from_numpy}
ROUNDINGS = 2**-24  # one float32 rounding, relative


def as_numpy(array):
    return np.asarray(array if not isinstance(array, mx.array) else np.array(array))


def made(case, side, arrays, subscripts):
    """An operand of a golden case, quantized as the case says."""
    left = side == "lhs"
    if case[side] is None:
        return arrays[0 if left else 1]
    name, _, method = case[side].partition(" ")
    parts = F.Subscripts(subscripts, *(a.ndim for a in arrays))
    return quantize(arrays[0 if left else 1], parts.how(left, name, case["tile"], method or "absmax"))


@pytest.mark.parametrize("kind", FROM)
def test_products_are_those_of_qwix(kind):
    for number, case in enumerate(make_qwix.products()):
        raw = make_qwix.operands(case)
        arrays = [FROM[kind](a) for a in raw]
        subscripts = case["subscripts"]
        lhs, rhs = (made(case, side, arrays, subscripts) for side in ("lhs", "rhs"))
        got, want = as_numpy(F.einsum(subscripts, lhs, rhs)), GOLDEN[f"product.{number}"]
        assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
        exact = case["lhs"] is not None and case["rhs"] is not None and case["tile"] is None
        exact = exact and "float8" not in case["lhs"]
        if exact:  # integers summed exactly, then two roundings: none may differ
            np.testing.assert_array_equal(got, want, err_msg=str(case))
        else:  # a float32 sum of K products in another order
            size = np.einsum(subscripts, *(np.abs(a) for a in raw))
            K = 2 * 256
            assert (np.abs(got - want) <= K * ROUNDINGS * size).all(), case


@pytest.mark.parametrize("kind", ["mlx", "torch"])
def test_convolutions_are_those_of_qwix(kind):
    x, w = make_qwix.convolution_operands()
    for number, case in enumerate(make_qwix.convolutions()):
        arrays = [
            FROM[kind](a if kind == "mlx" else np.ascontiguousarray(np.moveaxis(a, -1, 1))) for a in (x, w)
        ]
        operands = []
        for array, side in zip(arrays, ("lhs", "rhs"), strict=True):
            name, _, method = case[side].partition(" ")
            how = HowToQuantize(qtype=name, channelwise_axes=(0,), calibration_method=method or "absmax")
            operands.append(quantize(array, how))
        got = as_numpy(F.conv_general(*operands, stride=case["stride"], padding=case["padding"]))
        got = got if kind == "mlx" else np.moveaxis(got, 1, -1)
        np.testing.assert_array_equal(got, GOLDEN[f"conv.{number}"], err_msg=str(case))


@pytest.mark.parametrize("kind", FROM)
@pytest.mark.parametrize("tile", [None, 128, 32])
def test_an_integer_product_is_exact_in_float64(kind, tile):
    rng = np.random.default_rng(7)
    x, w = (rng.standard_normal((n, 1536), dtype=np.float32) for n in (3, 5))
    how = HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})
    a, b = quantize(FROM[kind](x), how), quantize(FROM[kind](w), how)
    got = as_numpy(F.einsum("mk,nk->mn", a, b))
    wide = [np.asarray(as_numpy(q.qvalue), np.float64) for q in (a, b)]
    scales = [np.repeat(as_numpy(q.scale).astype(np.float64), 1536 // q.scale.shape[1], 1) for q in (a, b)]
    want = (wide[0] * scales[0]) @ (wide[1] * scales[1]).T
    size = np.abs(wide[0] * scales[0]) @ np.abs(wide[1] * scales[1]).T
    # Untiled: the sum to float32 and two scales. Tiled: that for each tile, and the sum of them (or all K).
    bound = 3 * np.abs(want) if tile is None else (3 + (1536 // tile if tile >= 128 else 1536 + 4)) * size
    assert (np.abs(got - want) <= ROUNDINGS * bound).all()


RULE = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_calibration_method="absmax")


@pytest.mark.parametrize("kind", FROM)
def test_matmul_and_einsum_follow_a_rule(kind):
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((2, 3, 64), dtype=np.float32), rng.standard_normal((64, 5), dtype=np.float32)
    x, w = FROM[kind](x), FROM[kind](w)
    rows = HowToQuantize(qtype="int8", channelwise_axes=(0, 1))
    columns = HowToQuantize(qtype="int8", channelwise_axes=(1,))
    want = as_numpy(dequantize(quantize(x, rows))).astype(np.float64) @ as_numpy(
        dequantize(quantize(w, columns))
    )
    for got in (F.matmul(x, w, RULE), F.einsum("...k,kn->...n", x, w, RULE)):
        np.testing.assert_allclose(as_numpy(got), want, atol=1e-5)
    weight_only = F.matmul(x, w, QuantizationRule(weight_qtype="int8"))
    np.testing.assert_allclose(
        as_numpy(weight_only), as_numpy(x) @ as_numpy(dequantize(quantize(w, columns))), atol=1e-4
    )
    for rule in (None, QuantizationRule(act_qtype="int8")):  # inputs alone are left in float, as in qwix
        np.testing.assert_allclose(as_numpy(F.matmul(x, w, rule)), as_numpy(x) @ as_numpy(w), atol=1e-4)


def test_a_product_of_two_inputs_takes_the_inputs_type():
    rng = np.random.default_rng(8)
    q, k = (
        rng.standard_normal((2, 3, 64), dtype=np.float32),
        rng.standard_normal((2, 5, 64), dtype=np.float32),
    )
    rule = QuantizationRule(weight_qtype="int4", act_qtype="int8", act_calibration_method="absmax")
    got = F.einsum("bqd,bkd->bqk", q, k, rule, rhs_is_weight=False)
    how = HowToQuantize(qtype="int8", channelwise_axes=(0, 1))
    want = np.einsum("bqd,bkd->bqk", *(dequantize(quantize(a, how)).astype(np.float64) for a in (q, k)))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("a, b, want", [
    ("float32", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"),
    ("float16", "bfloat16", "float32"),
])  # fmt: skip
def test_the_result_has_the_dtype_of_the_scales(a, b, want):
    how = HowToQuantize(qtype="int8", channelwise_axes=(0,))
    x, w = (quantize(mx.random.normal((2, 64)).astype(getattr(mx, d)), how) for d in (a, b))
    assert F.einsum("mk,nk->mn", x, w).dtype == getattr(mx, want)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda q, a: F.einsum("mk,nk,k->mn", q, q), "two operands"),
        (lambda q, a: F.einsum("mk,nj->mn", q, q), "axis of one operand only"),
        (lambda q, a: F.einsum("mm,nm->mn", q, q), "a letter of its own"),
        (lambda q, a: F.dot_general(q, q.transpose(), (((1,), (1,)), ((), ()))), "is paired with"),
        (lambda q, a: F.dot_general(a, a, (((1,), (1,)), ((), ()))), "only one operand can be asymmetric"),
        (lambda q, a: F.matmul(np.ones(3), np.ones((3, 2))), "wanted two or more"),
        (lambda q, a: F.conv_general(q, a), "the weight is asymmetric"),
    ],
)
def test_what_cannot_be_multiplied_is_an_error(call, said):
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    q = quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    a = quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="minmax"))
    with pytest.raises(ValueError, match=said):
        call(q, a)


def test_tiles_that_differ_are_an_error():
    x = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    a, b = (
        quantize(x, HowToQuantize(qtype="int8", channelwise_axes=(0,), tiled_axes={1: t})) for t in (128, 256)
    )
    with pytest.raises(ValueError, match="2 tiles on one side and 4 on the other"):
        F.einsum("mk,nk->mn", a, b)


def test_an_embedding_gives_the_rows_of_the_quantized_table():
    table = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)
    ids = np.array([[1, 9], [0, 1]])
    for rule, how in (
        (QuantizationRule(weight_qtype="int8"), HowToQuantize(qtype="int8", channelwise_axes=(0,))),
        (QuantizationRule(weight_qtype="nf4", tile_size=16),
         HowToQuantize(qtype="nf4", channelwise_axes=(0,), tiled_axes={1: 16})),
    ):  # fmt: skip
        want = dequantize(quantize(table, how))[ids]
        for kind in FROM:
            got = as_numpy(F.embedding(FROM[kind](ids), FROM[kind](table), rule))
            # code * scale + bias rounds twice where (code - zero) * scale rounds once.
            np.testing.assert_allclose(got, want, atol=2 * 128 * ROUNDINGS * np.abs(table).max() / 127)


def test_weights_alone_of_a_convolution_may_be_quantized():
    """qwix refuses; the result is the convolution with the dequantized weight."""
    x, w = (mx.array(a) for a in make_qwix.convolution_operands())
    got = F.conv_general(x, w, QuantizationRule(weight_qtype="int4"))
    how = HowToQuantize(qtype="int4", channelwise_axes=(0,))
    want = mx.conv_general(x, dequantize(quantize(w, how)))
    np.testing.assert_array_equal(np.array(got), np.array(want))
    with pytest.raises(ValueError, match="convolutions have one scale for each output"):
        F.conv_general(x, w, QuantizationRule(weight_qtype="int4", tile_size=4))


def test_zero_points_of_an_input_reach_the_padding_of_a_convolution_as_zeros():
    x, w = (mx.array(a) for a in make_qwix.convolution_operands())
    a = quantize(x + 5, HowToQuantize(qtype="int8", channelwise_axes=(0,), calibration_method="minmax"))
    b = quantize(w, HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    want = mx.conv_general(dequantize(a), dequantize(b), 1, 1)
    got = F.conv_general(a, b, padding=1)
    assert mx.abs(got - want).max().item() <= 72 * 8 * ROUNDINGS * mx.abs(x + 5).max().item() * 4
    assert qarray.decode(a, "float32").min().item() >= 0
