"""What a quantized layer computes, beside training's fake quantization written out in numpy, and beside qwix.

literal() shares nothing with mlxq: codes by the formulas of qwix 0.1.8 (a division by a constant or by a
broadcast scale is a product with its reciprocal, as XLA makes it), small floats as torch rounds them.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from golden import make_qwix
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq import format, ops
from mlxq.format import Format
from mlxq.nn.q8.mlx import Q8Linear
from mlxq.ptq.calibrate import quantize_model
from mlxq.ptq.mlx import RuleLinear
from mlxq.ptq.plan import plan
from mlxq.ptq.tensors import quantize_params
from mlxq.rules import QTYPES, QuantizationRule, parse_rule

torch = pytest.importorskip("torch", reason="needs the package torch")
GOLDEN = make_qwix.stored()
EPS = 2.0**-24
f32 = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], f32)
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
     1.0], f32,
)  # fmt: skip
BOUND = {f"int{bits}": 2 ** (bits - 1) - 0.5 for bits in range(2, 9)}
BOUND |= {"float8_e4m3fn": 448, "float8_e5m2": 57344, "nf4": 1, "mxfp8": 448, "mxfp4": 6, "nvfp4": 6}
TILE = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}


def as_float8(x, kind=torch.float8_e4m3fn):
    return torch.from_numpy(x).to(kind).float().numpy()


def literal(x, qtype, tile=None, method="absmax"):
    """(code - zero point, scale), of float32 x (R, K), both (R, K) in float64."""
    tile = TILE.get(qtype) or tile or x.shape[1]
    x = x.reshape(x.shape[0], -1, tile)
    bound = BOUND[qtype]
    largest, zero = np.abs(x).max(-1, keepdims=True), f32(0)
    name, *factor = method.split(",")
    if name == "kernel":  # of int8 inputs: from -127 to 127
        scale = np.where(largest == 0, f32(1), largest / f32(127))
        codes = np.clip(np.rint(x / scale), -127, 127)
        return _whole(codes, scale)
    if name == "fixed":
        largest = np.full_like(largest, f32(factor[0]))
    elif factor:
        largest = largest * f32(factor[0])
    scale = largest * (f32(1) / f32(bound))
    if name == "minmax":
        low = np.minimum(x.min(-1, keepdims=True), f32(0))
        high = np.maximum(x.max(-1, keepdims=True), f32(0))
        scale = (high - low) * (f32(1) / f32(2 * bound))
    scale = np.where(scale < 2.0**-63, f32(1), scale)
    if qtype in ("mxfp4", "mxfp8"):
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(f32(1), exponent - (fraction == 0.5))
    if qtype == "nvfp4":
        scale = np.maximum(as_float8(scale), f32(2.0**-9))
    if name == "minmax":
        zero = np.clip(np.rint(f32(-bound - 0.5) - low / scale), -bound - 0.5, bound - 0.5)
    ratio = x * (f32(1) / scale) + zero
    if qtype.startswith("int"):
        codes = np.clip(np.rint(ratio), -bound - 0.5, bound - 0.5) - zero
    elif qtype == "nf4":
        codes = NF4[np.abs(ratio[..., None] - NF4).argmin(-1)]
    elif BOUND[qtype] == 6:
        away = np.abs(np.minimum(np.abs(ratio), f32(6))[..., None] - E2M1)
        tied = away == away.min(-1, keepdims=True)
        place = np.where(tied, np.arange(8) % 2 * 8 + np.arange(8), 99).argmin(-1)  # the even one of a tie
        codes = np.copysign(E2M1[place], ratio)
    else:
        kind = torch.float8_e5m2 if qtype == "float8_e5m2" else torch.float8_e4m3fn
        codes = as_float8(np.clip(ratio, -bound, bound), kind)
    return _whole(codes, scale)


def _whole(codes, scale):
    shape = (codes.shape[0], -1)
    return (np.broadcast_to(a, codes.shape).reshape(shape).astype(np.float64) for a in (codes, scale))


def computed(kind, rule, x, w, b):
    """What the layer of quantize_model gives for x, as numpy."""
    if kind == "mlx":
        layer = nn.Linear(*w.shape[::-1])
        layer.weight, layer.bias = mx.array(w), mx.array(b)
        return np.array(quantize_model(nn.Sequential(layer), [rule])(mx.array(x)))
    layer = torch.nn.Linear(*w.shape[::-1])
    layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)
    return quantize_model(torch.nn.Sequential(layer), [rule])(torch.from_numpy(x)).detach().numpy()


def operands(K=128, N=16):
    rng = np.random.default_rng(K)
    x, w = (rng.standard_normal((n, K), dtype=np.float32) for n in (5, N))
    x[1], x[2, :32], w[3], w[4, 32:64] = 0, 0, 0, 0
    x[3] += 1  # so that minmax has something to gain
    return x, w / 8, rng.standard_normal(N, dtype=np.float32)


def meets_kernel(act, method, weight, tile, K):
    """Whether ops.q8_rows quantizes int8 inputs: what QuantizationRule says of act_calibration_method."""
    fits = K % 32 == 0 and (tile is None or tile in (32, 64, 128))
    return act == "int8" and method is None and weight.startswith("int") and fits


def assert_computes(kind, rule, K=128):
    x, w, b = operands(K)
    tile, act, method = rule.tile_size, rule.act_qtype, rule.act_calibration_method
    codes_w, scale_w = literal(w, rule.weight_qtype, tile, rule.weight_calibration_method)
    if act is None:
        codes_x, scale_x = x.astype(np.float64), np.ones_like(x, np.float64)
    else:
        kernel = meets_kernel(act, method, rule.weight_qtype, tile, K)
        codes_x, scale_x = literal(x, act, tile, "kernel" if kernel else method or "absmax")
    got = computed(kind, rule, x, w, b)
    integers = act and act.startswith("int") and rule.weight_qtype.startswith("int")
    if integers and tile is None and (K % 32 or (kernel and rule.weight_calibration_method != "minmax")):
        sums = codes_x.astype(np.int32) @ codes_w.astype(np.int32).T
        sx, sw = scale_x[:, :1].astype(f32), scale_w[:, 0].astype(f32)
        # One rounding of the sum, one of each product with a scale, in this order, one of adding the bias.
        product = sums.astype(f32) * (sx * sw) if kernel else sums.astype(f32) * sx * sw
        np.testing.assert_array_equal(got, product + b)
        return
    want = (codes_x * scale_x) @ (codes_w * scale_w).T + b
    # Packed weights are scale * code + bias of codes up to 2^bits, which may all but cancel.
    steps = 2 * (BOUND[rule.weight_qtype] + 0.5) if rule.weight_qtype.startswith("int") else 0
    size = np.abs(codes_x * scale_x) @ (np.abs(codes_w * scale_w) + 2 * max(steps, 4) * scale_w).T
    # A float32 sum of K products, of factors rounded up to three times, and the bias.
    assert (np.abs(got - want) <= EPS * ((K + 6) * size + np.abs(want))).all(), str(rule)


def accepted(**settings):
    try:
        return QuantizationRule(**settings)
    except ValueError as error:
        assert "asymmetric" in str(error)
        return None


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("weight", BOUND)
def test_a_layer_computes_fake_quantization_for_every_pair_of_types(weight, kind):
    assert set(BOUND) == set(QTYPES)
    for act in (None, *BOUND):
        for method in (None, "absmax", "minmax") if act in ("int4", "int8") else (None,):
            assert_computes(
                kind, QuantizationRule(weight_qtype=weight, act_qtype=act, act_calibration_method=method)
            )


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_a_layer_computes_fake_quantization_in_tiles(tile, kind):
    for weight, act, method in (
        ("int8", "int8", None), ("int8", "int8", "absmax"), ("int4", "int8", "absmax,0.8"),
        ("int4", "int8", None), ("int4", "int4", "minmax"), ("int8", "float8_e4m3fn", None),
        ("nf4", "int8", None), ("nf4", None, None), ("int3", "int8", "fixed,2"), ("int5", None, None),
        ("float8_e5m2", "nf4", None), ("int8", "mxfp8", None),
    ):  # fmt: skip
        assert_computes(
            kind,
            QuantizationRule(
                weight_qtype=weight, act_qtype=act, act_calibration_method=method, tile_size=tile
            ),
        )


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("method", ["minmax", "absmax,0.8", "fixed,0.25"])
def test_the_calibration_of_weights_is_followed(method, kind):
    for weight in ("int4", "int8"):
        for act in (None, "int8", "int4", "float8_e4m3fn"):
            assert_computes(
                kind, QuantizationRule(weight_qtype=weight, act_qtype=act, weight_calibration_method=method)
            )


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("K", [80, 72])
def test_codes_that_no_packed_format_holds_are_summed_exactly(K, kind):
    for weight in ("int8", "int4", "int2"):
        for act, method in (("int8", None), ("int8", "absmax"), ("int4", None), ("int8", "minmax")):
            assert_computes(
                kind, QuantizationRule(weight_qtype=weight, act_qtype=act, act_calibration_method=method), K
            )


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_packed_formats_own_grid_meets_every_kind_of_input(bits, kind):
    x, w, b = operands()
    packed = format.quantize(w, Format(bits, 64))
    weight, scales = format.dequantize(packed).astype(np.float64), np.repeat(np.abs(packed.scales), 64, 1)
    for act in (None, "int8", "int4", "float8_e4m3fn", "nf4"):
        # 3 bits are no kernel's: their inputs are rounded as qwix does.
        rule = QuantizationRule(
            weight_qtype=f"int{bits}", weight_calibration_method="affine", tile_size=64, act_qtype=act
        )
        values = x.astype(np.float64)
        if act:
            codes, scale = literal(x, act, None, "kernel" if act == "int8" and bits != 3 else "absmax")
            values = codes * scale
        size = np.abs(values) @ (np.abs(weight) + 2 * 2**bits * scales).T
        got = computed(kind, rule, x, w, b)
        want = values @ weight.T + b
        assert (np.abs(got - want) <= EPS * ((128 + 6) * size + np.abs(want))).all(), str(rule)


def test_a_layer_gives_what_qwix_gives_for_the_same_operands():
    """The stored products of qwix 0.1.8, with the right operand as the weight of a layer."""
    compared = 0
    for number, case in enumerate(make_qwix.products()):
        if case["subscripts"] != "mk,nk->mn" or case["rhs"] is None:
            continue
        x, w = make_qwix.operands(case)
        act, _, act_method = (case["lhs"] or "").partition(" ")
        weight, _, weight_method = case["rhs"].partition(" ")
        rule = QuantizationRule(
            weight_qtype=weight,
            weight_calibration_method=weight_method or "absmax",
            act_qtype=act or None,
            act_calibration_method=(act_method or "absmax") if act else None,
            tile_size=case["tile"],
        )
        want = GOLDEN[f"product.{number}"]
        for kind in ("mlx", "torch"):
            got = computed(kind, rule, x, w, np.zeros(w.shape[0], f32))
            # Both are float32 sums of the same 256 products of codes, in another order.
            size = np.abs(x) @ (np.abs(w) + np.abs(w).max(-1, keepdims=True)).T
            assert (np.abs(got - want) <= 2 * 256 * EPS * size).all(), case
        compared += 1
    assert compared == 11


@pytest.mark.parametrize("kind", ["mlx", "torch"])
def test_a_quantized_model_computes_what_qwix_computes(kind):
    """The stored outputs of qwix's PTQ model, down(relu(up(x))), under the same rules."""
    arrays = make_qwix.model_operands()
    for number, settings in enumerate(make_qwix.models()):
        layers = []
        for path in ("up", "down"):
            w, b = arrays[f"{path}.weight"], arrays[f"{path}.bias"]
            layer = (nn if kind == "mlx" else torch.nn).Linear(*w.shape[::-1])
            if kind == "mlx":
                layer.weight, layer.bias = mx.array(w), mx.array(b)
            else:
                layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)
            layers.append(layer)
        model = nn.Module() if kind == "mlx" else torch.nn.Module()
        model.up, model.down = layers
        exact = np.maximum(arrays["x"] @ arrays["up.weight"].T + arrays["up.bias"], 0)
        exact = exact @ arrays["down.weight"].T + arrays["down.bias"]
        quantize_model(model, [QuantizationRule(**settings)])
        to, relu = (mx.array, nn.relu) if kind == "mlx" else (torch.from_numpy, torch.relu)
        got = model.down(relu(model.up(to(arrays["x"]))))
        got = np.array(got) if kind == "mlx" else got.detach().numpy()
        want = GOLDEN[f"model.{number}"]
        # The hidden values' last bits may move a code by one at a tie: seen as noise, not as a shift.
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < (2e-3 if "act_qtype" in settings else 2e-6), settings
        assert np.linalg.norm(want - exact) / np.linalg.norm(want) > 3 * error


class Reshaping(nn.Module):
    """A module that computes with its weights in another shape than they come in, as scanned layers do."""

    def __init__(self):
        super().__init__()
        self.stack = SwitchLinear(64, 64, 3, bias=False)

    def __call__(self, x):
        for layer in range(3):
            x = x + self.stack(x[:, None, None], mx.full((x.shape[0], 1), layer)).reshape(x.shape)
        return x


@pytest.mark.parametrize(
    "settings", ["weight_qtype:int8", "weight_qtype:int4,tile_size:32", "weight_qtype:int8,act_qtype:int8"]
)
def test_a_stack_of_layers_is_quantized_as_its_layers_are_one_by_one(settings):
    """A scanned module: one array (layers, N, K) under quantize_model, and its parameters in any shape."""
    model, rule = Reshaping(), parse_rule(f".*={settings}")
    model.stack.weight = mx.random.normal((3, 64, 64)) / 8
    weight, x = model.stack.weight, mx.random.normal((5, 64))
    alone = []
    for layer in range(3):
        single = nn.Linear(64, 64, bias=False)
        single.weight = weight[layer]
        # Experts' inputs are rounded as qwix does, not by the kernel.
        one = QuantizationRule(**rule.settings() | {"act_calibration_method": "absmax"} if rule.act_qtype
                               else rule.settings())  # fmt: skip
        alone.append(quantize_model(nn.Sequential(single), [one]))
    made = plan(model, [rule])
    flat = quantize_params({"stack.weight": weight.reshape(3 * 64, 64)}, made)
    quantize_model(model, made)
    stored = dict(tree_flatten(model.parameters()))
    assert flat.keys() == stored.keys() and all(mx.array_equal(flat[k], stored[k]) for k in flat)
    want = x
    for single in alone:
        want = want + single(want)
    got = model(x)
    # Sums in another order; they may move an input's code by one.
    error = mx.linalg.norm(got - want).item() / mx.linalg.norm(want).item()
    assert error < (2e-3 if rule.act_qtype else 1e-6)


def test_inputs_without_a_named_calibration_meet_the_kernels_own_rounding():
    """Named difference 7 of mlxq.ptq.qarray: max / 127 where absmax has max / 127.5; both sum integers."""
    x, w, b = operands()
    made = {}
    for method, layer in ((None, Q8Linear), ("absmax", RuleLinear)):
        rule = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_calibration_method=method)
        assert_computes("mlx", rule)
        model = quantize_model(nn.Sequential(nn.Linear(128, 16)), [rule])
        assert type(model.layers[0]) is layer
        made[method] = computed("mlx", rule, x, w, b)
        before = ops.kernel_calls()
        mx.eval(model(mx.array(x)))
        calls = {name for name, count in ops.kernel_calls().items() if count > before.get(name, 0)}
        assert not ops.native_available() or any("q8" in name for name in calls), calls
    assert 0 < np.abs(made[None] - made["absmax"]).max() < 0.05
    rows = np.random.default_rng(0).standard_normal((64, 32), dtype=f32)
    codes = [next(literal(rows, "int8", None, method)) for method in ("kernel", "absmax")]
    assert codes[0].min() == -127 and codes[1].min() == -128
