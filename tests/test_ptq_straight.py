"""Gradients straight through rounding: dx = dy @ W, whatever rounds x, beside float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq.ptq import Operations
from mlxq.ptq import functional as F
from mlxq.ptq.calibrate import calibrate, quantize_model
from mlxq.ptq.plan import plan
from mlxq.ptq.qarray import HowToQuantize, dequantize, quantize
from mlxq.rules import QuantizationRule, parse_rule

torch = pytest.importorskip("torch", reason="needs the package torch")
EPS = 2.0**-24
K, N = 64, 32
# What plan accepts: every path that an input's codes take to a product.
SETTINGS = [
    "weight_qtype:int8,act_qtype:int8",
    "weight_qtype:int4,act_qtype:int8,tile_size:32",
    "weight_qtype:int8,act_qtype:int8,tile_size:16",
    "weight_qtype:int8,act_qtype:int8,act_calibration_method:minmax",
    "weight_qtype:int8,act_qtype:int8,act_calibration_method:absmax",
    "weight_qtype:float8_e4m3fn,act_qtype:float8_e4m3fn",
    "weight_qtype:int4,act_qtype:float8_e4m3fn",
    "weight_qtype:mxfp4,act_qtype:mxfp8",
    "weight_qtype:nf4,tile_size:16,act_qtype:int8",
    "weight_qtype:int8,act_qtype:nf4",
    "bits:2,group_size:32,act_qtype:int4",
    "weight_qtype:nf4,tile_size:16",
]
TO = {"mlx": mx.array, "torch": torch.from_numpy}


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def gradients(kind, function, arrays, dy):
    """(function(*arrays), dy through it to each of them), as numpy."""
    if kind == "mlx":
        y, found = mx.vjp(function, [mx.array(a) for a in arrays], [mx.array(dy)])
        return np.array(y[0]), [np.array(d) for d in found]
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = function(*leaves)
    return y.detach().numpy(), [d.numpy() for d in torch.autograd.grad(y, leaves, torch.from_numpy(dy))]


def wide(array):
    array = array.detach().numpy() if isinstance(array, torch.Tensor) else np.array(array)
    return array.astype(np.float64)


def assert_sums(got, a, b):
    """got is a @ b: a float32 sum of as many products, of factors that were rounded up to three times."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert (np.abs(got - a @ b) <= (a.shape[-1] + 4) * EPS * (np.abs(a) @ np.abs(b))).all()
    assert np.count_nonzero(got) > 0.99 * got.size


def quantized_linear(kind, rule, stats_from=None):
    """(the layer that the rule makes of a linear one, its dequantized weight in float64)."""
    w, b = data(N, K, seed=1) / 8, data(N, seed=2)
    if kind == "mlx":
        layer = nn.Linear(K, N)
        layer.weight, layer.bias = mx.array(w), mx.array(b)
        model = nn.Sequential(layer)
    else:
        layer = torch.nn.Linear(K, N)
        layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)
        model = torch.nn.Sequential(layer)
    made = plan(model, [rule])
    weight = F.store_weight(TO[kind](w), next(iter(made.values())))
    stats = None if stats_from is None else calibrate(model, made, [TO[kind](stats_from)])
    values = F.ops.dequantize(weight, "float32") if hasattr(weight, "words") else dequantize(weight)
    return quantize_model(model, made, stats), wide(values)


@pytest.mark.parametrize("kind", TO)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_of_an_input_is_dy_times_the_dequantized_weight(settings, kind):
    rule = parse_rule(f".*={settings}")
    model, weight = quantized_linear(kind, rule)
    x, dy = data(2, 5, K), data(2, 5, N, seed=3)
    y, (dx,) = gradients(kind, model, [x], dy)
    assert_sums(dx, dy, weight)
    np.testing.assert_array_equal(y, wide(model(TO[kind](x))))
    w, b = data(N, K, seed=1) / 8, TO[kind](data(N, seed=2))
    again, (dx, dw) = gradients(kind, lambda x, w: F.linear(x, w, b, rule), [x, w], dy)
    np.testing.assert_array_equal(again, y)
    assert_sums(dx, dy, weight)
    site = plan(_linear(), [rule])["w"]
    used = dequantize(F.quantize_input(x, site)) if rule.act_qtype else x
    assert_sums(dw, dy.reshape(-1, N).T, used.reshape(-1, K))


def _linear():
    model = nn.Module()
    model.w = nn.Linear(K, N)
    return model


@pytest.mark.parametrize("kind", TO)
@pytest.mark.parametrize("act", ["int8", "float8_e4m3fn", "int8,act_calibration_method:minmax"])
def test_what_a_static_range_clips_passes_nothing(kind, act):
    rule = parse_rule(f".*=weight_qtype:int8,tile_size:16,act_qtype:{act},act_static_scale:true")
    seen = data(3, K)
    model, weight = quantized_linear(kind, rule, np.concatenate([seen, -seen]))
    x, dy = data(3, K, seed=4) * 2, data(3, N, seed=3)
    _, (dx,) = gradients(kind, model, [x], dy)
    peak = np.abs(seen).reshape(3, 4, 16).max(-1).mean(0).repeat(16)
    clipped = np.abs(x) > peak * (1 + 1 / 250)  # 'minmax' moves its range by up to half a step
    inside = np.abs(x) < peak * (1 - 1 / 250)
    if "minmax" in act:
        both = np.concatenate([seen, -seen]).reshape(6, 4, 16)
        high, low = both.max(-1).mean(0).repeat(16), both.min(-1).mean(0).repeat(16)
        edge = (high - low) / 250
        clipped, inside = (x > high + edge) | (x < low - edge), (x < high - edge) & (x > low + edge)
    assert 20 < clipped.sum() < inside.sum() and (dx[clipped] == 0).all()
    want, size = dy.astype(np.float64) @ weight, np.abs(dy).astype(np.float64) @ np.abs(weight)
    assert (np.abs(dx - want) <= (N + 4) * EPS * size)[inside].all()


@pytest.mark.parametrize("kind", TO)
@pytest.mark.parametrize("settings", [
    "weight_qtype:int8,act_qtype:int8", "weight_qtype:int8,act_qtype:float8_e4m3fn",
    "weight_qtype:nf4,act_qtype:int8", "weight_qtype:int8,act_qtype:int8,act_calibration_method:minmax",
])  # fmt: skip
def test_gradients_pass_straight_through_a_convolution(settings, kind):
    x, w = data(2, 8, 16), data(5, 3, 16, seed=1)
    turn = (lambda a: a) if kind == "mlx" else (lambda a: np.ascontiguousarray(a.swapaxes(1, 2)))
    layer = nn.Conv1d(16, 5, 3, padding=1) if kind == "mlx" else torch.nn.Conv1d(16, 5, 3, padding=1)
    if kind == "mlx":
        layer.weight = mx.array(w)
        model = nn.Sequential(layer)
    else:
        layer.weight.data = torch.from_numpy(turn(w))
        model = torch.nn.Sequential(layer)
    quantize_model(model, [f".*={settings}"])
    dy = data(2, 8, 5, seed=3)
    _, (dx,) = gradients(kind, model, [turn(x)], turn(dy))
    how = HowToQuantize(qtype=parse_rule(f".*={settings}").weight_qtype, channelwise_axes=(0,))
    weight = dequantize(quantize(w, how)).astype(np.float64)
    padded = np.pad(dy.astype(np.float64), ((0, 0), (1, 1), (0, 0)))
    windows = np.concatenate([padded[:, 2 - t : 10 - t] for t in range(3)], -1)  # y[i] reads x[i + t - 1]
    assert_sums(turn(dx), windows, weight.transpose(1, 0, 2).reshape(15, 16))


@pytest.mark.parametrize("act", ["int8", "float8_e4m3fn", "mxfp8"])
def test_gradients_pass_straight_through_the_inputs_of_experts(act):
    model = nn.Module()
    model.experts = SwitchLinear(K, N, 3, bias=False)
    rule = parse_rule(f".*=weight_qtype:int8,act_qtype:{act}")
    how = HowToQuantize(qtype="int8", channelwise_axes=(0, 1))
    weight = wide(dequantize(quantize(model.experts.weight, how)))
    quantize_model(model, [rule])
    x, dy, chosen = data(4, 1, 1, K), data(4, 1, 1, N, seed=3), np.array([[2], [0], [1], [2]])
    _, (dx,) = gradients("mlx", lambda x: model.experts(x, mx.array(chosen)), [x], dy)
    for row, expert in enumerate(chosen[:, 0]):
        assert_sums(dx[row, 0], dy[row, 0], weight[expert])


@pytest.mark.parametrize("kind", TO)
@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn", "nf4"])
def test_both_operands_of_an_einsum_receive_gradients_as_they_were_rounded(qtype, kind):
    q, k, dy = data(3, 5, K), data(3, 7, K, seed=1), data(3, 5, 7, seed=3)
    rule = QuantizationRule(weight_qtype="int8", act_qtype=qtype)
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0, 1))
    values = [dequantize(quantize(a, how)) for a in (q, k)]

    def scores(q, k):
        return F.einsum("bqd,bkd->bqk", q, k, rule, rhs_is_weight=False)

    y, (dq, dk) = gradients(kind, scores, [q, k], dy)
    np.testing.assert_array_equal(y, wide(scores(*map(TO[kind], (q, k)))))
    assert_sums(dq, dy, values[1])
    assert_sums(dk, dy.swapaxes(1, 2), values[0])


@pytest.mark.parametrize("kind", TO)
def test_operations_with_static_ranges_pass_gradients_too(kind):
    rule = QuantizationRule(weight_qtype="int8", act_qtype="float8_e4m3fn", act_static_scale=True)
    operations = Operations([rule])
    q, k, dy = data(3, 5, K), data(3, 7, K, seed=1), data(3, 5, 7, seed=3)

    def scores(q, k):
        return operations.module("m").einsum("bqd,bkd->bqk", q, k, rhs_is_weight=False)

    with operations.calibrating():
        scores(*(TO[kind](4 * a) for a in (q, k)))  # the range leaves nothing out
    _, (dq, dk) = gradients(kind, scores, [q, k], dy)
    for got, other, given in ((dq, k, dy), (dk, q, dy.swapaxes(1, 2))):
        want = given.astype(np.float64) @ other
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05  # float8's step, 2^-4, uniform


def test_16_bit_inputs_have_16_bit_gradients():
    for settings in SETTINGS:
        model, weight = quantized_linear("mlx", parse_rule(f".*={settings}"))
        x, dy = (mx.array(data(3, n)).astype(mx.bfloat16) for n in (K, N))
        (dx,) = mx.vjp(model, [x], [dy])[1]
        want = wide(dy.astype(mx.float32)) @ weight
        assert dx.dtype == mx.bfloat16
        assert np.linalg.norm(wide(dx.astype(mx.float32)) - want) / np.linalg.norm(want) < 2**-7
