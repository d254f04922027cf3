"""Plans and quantized models: what rules change; nothing is allocated; a stream gives the same model."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxq import ops
from mlxq.format import KERNEL_BITS
from mlxq.nn.mlx import QuantizedEmbedding, QuantizedLinear, QuantizedSwitchLinear
from mlxq.nn.q8.mlx import Q8Linear
from mlxq.ptq import functional as F
from mlxq.ptq import pack
from mlxq.ptq.calibrate import quantize_model
from mlxq.ptq.mlx import RuleConv, RuleEmbedding, RuleLinear
from mlxq.ptq.plan import operation, plan
from mlxq.ptq.qarray import HowToQuantize, dequantize, quantize
from mlxq.ptq.tensors import quantize_params
from mlxq.rules import QuantizationRule, parse_rule

torch = pytest.importorskip("torch", reason="needs the package torch")
EPS = 2.0**-24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def __call__(self, x):
        return x + self.down(nn.silu(self.up(x)))


class Model(nn.Module):
    """An embedding, two blocks, a convolution, experts, a norm."""

    def __init__(self, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.embed = nn.Embedding(50, 64)
        self.layers = [Block(), Block()]
        self.conv = nn.Conv1d(64, 32, 3, padding=1)
        self.experts = SwitchLinear(32, 64, 4)
        self.norm = nn.RMSNorm(64)

    def __call__(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        h = self.conv(h)
        chosen = (ids % 4)[..., None]
        return self.norm(self.experts(h[..., None, None, :], chosen).squeeze((-2, -3)))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 64)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 128), torch.nn.Linear(128, 64, bias=False)])
        self.conv = torch.nn.Conv1d(64, 32, 3, padding=1)
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, ids):
        h = self.embed(ids)
        h = self.layers[1](self.layers[0](h).relu())
        return self.norm(self.conv(h.transpose(1, 2)).transpose(1, 2))


IDS = np.random.default_rng(0).integers(0, 50, (2, 9))
W8A8 = "layers/.*=weight_qtype:int8,act_qtype:int8"


def params(model):
    return dict(tree_flatten(model.parameters()))


def test_a_plan_names_each_module_with_its_operation_and_format():
    rules = ["embed=bits:8", "layers/0/.*=bits:none", "layers/.*=bits:4,group_size:32",
             "experts=weight_qtype:int8",
             "conv=weight_qtype:int8,act_qtype:int8"]  # fmt: skip
    made = plan(Model(), rules)
    assert {path: (site.operation, site.shape, site.stored) for path, site in made.items()} == {
        "embed": ("embedding", (50, 64), "8-bit/64"),
        "layers/1/up": ("linear", (128, 64), "4-bit/32"),
        "layers/1/down": ("linear", (64, 128), "4-bit/32"),
        "experts": ("switch_linear", (4, 64, 32), "8-bit/32"),
        "conv": ("conv_general", (32, 3, 64), "int8/row + int8 inputs"),
    }
    assert set(made.kept) == {"layers/0/up", "layers/0/down"} and made.rules.unused_rules() == []


def test_a_plan_allocates_nothing():
    before = mx.get_active_memory()
    model = nn.Sequential(*[nn.Linear(1 << 14, 1 << 14) for _ in range(8)])  # 8 GB, if it were made
    made = plan(model, ["layers/.*=weight_qtype:int4,tile_size:64"])
    assert len(made) == 8 and mx.get_active_memory() - before < 1 << 20
    with torch.device("meta"):
        model = torch.nn.Linear(1 << 16, 1 << 16)
    assert next(iter(plan(torch.nn.Sequential(model), [".*=bits:4"]).values())).shape == (1 << 16, 1 << 16)


def test_norms_and_what_no_rule_matches_stay_as_they_are():
    model = Model()
    before = params(model)
    quantize_model(model, [W8A8])
    after = params(model)
    for name in ("norm.weight", "embed.weight", "conv.weight", "experts.weight"):
        assert after[name] is before[name] or mx.array_equal(after[name], before[name])
    assert operation(model.norm) is None and type(model.layers[0].up) is Q8Linear


def test_rules_that_match_nothing_are_refused_unless_allowed():
    with pytest.raises(ValueError, match="layers are named like .*layers/0/up"):
        plan(Model(), ["layers/0/upp=bits:4"])
    assert len(plan(Model(), ["layers/0/upp=bits:4"], allow_unused_rules=True)) == 0


@pytest.mark.parametrize("make, rule, kind", [
    (Model, W8A8, "layers/0/down (Q8Linear) and 3 more"),
    (Model, "layers/0/.*=weight_qtype:nf4,tile_size:16", "layers/0/down (RuleLinear) and 1 more"),
    (Model, "experts=bits:4,group_size:32", "experts (QuantizedSwitchLinear)"),
    (Model, "conv=weight_qtype:int8", "conv (RuleConv)"),
    (Torch, "layers/0=bits:4", "layers/0 (QuantizedLinear)"),
    (Torch, "layers/.*=weight_qtype:float8_e4m3fn", "layers/0 (RuleLinear) and 1 more"),
])  # fmt: skip
def test_layers_that_are_quantized_already_are_named(make, rule, kind):
    model = quantize_model(make(), [rule])
    with pytest.raises(ValueError, match=re.escape(f"; {kind}: quantized already")):
        quantize_model(model, [rule])
    with pytest.raises(ValueError) as other:
        quantize_model(model, ["nowhere=bits:4"])
    assert "already" not in str(other.value)
    quantize_model(model, ["embed=weight_qtype:int8"])  # what is still float may follow


@pytest.mark.parametrize(
    "rule, said",
    [
        ("layers/0/up=weight_qtype:int8,tile_size:48", "layers/0/up: .*64 is no multiple; 64 would fit"),
        ("conv=weight_qtype:int8,tile_size:16", "conv: convolutions have one scale for each output"),
    ],
)
def test_a_rule_that_cannot_be_followed_names_the_path_and_the_way_out(rule, said):
    with pytest.raises(ValueError, match=said):
        plan(Model(), [rule])


@pytest.mark.parametrize(
    "rule, kind",
    [
        ("layers/.*=bits:4", QuantizedLinear),
        ("layers/.*=weight_qtype:int3,tile_size:32", QuantizedLinear),
        ("layers/.*=weight_qtype:int4,tile_size:64,weight_calibration_method:minmax", QuantizedLinear),
        (W8A8, Q8Linear),
        ("layers/.*=bits:4,group_size:64,act_qtype:int8", Q8Linear),
        ("layers/.*=weight_qtype:int8,act_qtype:int8,tile_size:32", Q8Linear),
        ("layers/.*=weight_qtype:int8,act_qtype:int8,tile_size:16", RuleLinear),
        ("layers/.*=weight_qtype:int8,act_qtype:int8,act_calibration_method:minmax", RuleLinear),
        ("layers/.*=weight_qtype:nf4,tile_size:16", RuleLinear),
        ("layers/.*=weight_qtype:float8_e4m3fn,act_qtype:float8_e4m3fn", RuleLinear),
        ("layers/.*=weight_qtype:mxfp4,act_qtype:mxfp8", RuleLinear),
        ("layers/.*=weight_qtype:int8,tile_size:16", RuleLinear),
        ("embed=weight_qtype:int8", QuantizedEmbedding),
        ("embed=weight_qtype:nf4,tile_size:16", RuleEmbedding),
        ("experts=weight_qtype:int4", QuantizedSwitchLinear),
        ("experts=weight_qtype:int8,act_qtype:int8", QuantizedSwitchLinear),
        ("conv=weight_qtype:int8,act_qtype:int8", RuleConv),
        ("conv=weight_qtype:int8", RuleConv),
    ],
)
def test_each_module_is_replaced_and_the_model_stays_close(rule, kind):
    model, want = Model(), Model()(mx.array(IDS))
    quantize_model(model, [rule])
    path = parse_rule(rule).module_path.replace("layers/.*", "layers.1.up")
    layer = dict(model.named_modules())[path]
    assert isinstance(layer, kind)
    error = (mx.linalg.norm(model(mx.array(IDS)) - want) / mx.linalg.norm(want)).item()
    bar = 0.25 if "int3" in rule else 0.03 if "8" in rule and "4" not in rule else 0.12
    assert 0 < error < bar
    assert not set(dict(tree_flatten(model.trainable_parameters()))) & {f"{path}.weight", f"{path}.scales"}


@pytest.mark.parametrize("qtype, group, bits", [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_mx_types_go_into_mlx_lms_own_layers_with_our_codes(qtype, group, bits):
    layer = nn.Linear(64, 32)
    model = nn.Sequential(layer)
    weight = layer.weight
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: group})
    want = dequantize(quantize(weight, how))
    quantize_model(model, [f".*=weight_qtype:{qtype}"])
    stock = model.layers[0]
    assert type(stock) is nn.QuantizedLinear and stock.mode == qtype
    got = mx.dequantize(stock.weight, stock.scales, group_size=group, bits=bits, mode=qtype).astype(
        mx.float32
    )
    # MLX dequantizes into bfloat16.
    assert mx.abs(got - want).max().item() <= 2**-8 * mx.abs(want).max().item()


@pytest.mark.parametrize("qtype", ["mxfp4", "mxfp8", "nvfp4"])
def test_experts_of_mx_types_compute_in_mlx_lms_own_layer(qtype):
    model, x = nn.Module(), mx.random.normal((5, 1, 1, 64))
    model.experts = SwitchLinear(64, 32, 3, bias=False)
    weight, chosen = model.experts.weight, mx.array([[0], [2], [1], [2], [0]])
    want = (x @ weight[chosen].swapaxes(-1, -2)).squeeze()
    got = quantize_model(model, [f"experts=weight_qtype:{qtype}"]).experts(x, chosen).squeeze()
    assert 0 < mx.linalg.norm(got - want).item() / mx.linalg.norm(want).item() < 0.15


@pytest.mark.parametrize("act", ["", ",act_qtype:int8", ",act_qtype:int8,act_calibration_method:absmax"])
@pytest.mark.parametrize(
    "weight",
    ["weight_qtype:int8", "weight_qtype:int4", "bits:4,group_size:64", "bits:2,group_size:32",
     "weight_qtype:int7",
     "weight_qtype:int8,tile_size:32", "weight_qtype:int8,tile_size:64", "weight_qtype:nf4,tile_size:16"],
)  # fmt: skip
def test_a_layer_computes_what_its_rule_says_to_the_bit(weight, act):
    """The layer of quantize_model and the functional, which quantizes anew: the forward pass of training."""
    rule = parse_rule(f".*={weight}{act}")
    x = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    layer = nn.Linear(64, 32)
    want = F.linear(mx.array(x), layer.weight, layer.bias, rule)
    model = quantize_model(nn.Sequential(layer), [rule])
    np.testing.assert_array_equal(np.array(model(mx.array(x))), np.array(want))
    other = torch.nn.Linear(64, 32)
    want = F.linear(torch.from_numpy(x), other.weight.detach(), other.bias.detach(), rule)
    got = quantize_model(torch.nn.Sequential(other), [rule])(torch.from_numpy(x))
    np.testing.assert_array_equal(got.detach().numpy(), want.numpy())


@pytest.mark.parametrize(
    "rule, tile",
    [
        (".*=weight_qtype:int8,act_qtype:int8", 256),
        (".*=bits:4,group_size:64,act_qtype:int8", 256),
        (".*=weight_qtype:int8,act_qtype:int8,tile_size:64", 64),
        (".*=weight_qtype:int4,act_qtype:int8,tile_size:0.125", 32),
    ],
)
def test_integer_products_meet_the_float64_answer(rule, tile):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 256), dtype=np.float32)
    layer = nn.Linear(256, 64, bias=False)
    site = plan(nn.Sequential(layer), [rule])["layers/0"]
    packed = pack.pack(layer.weight, site.weight, KERNEL_BITS)
    weight = np.array(ops.dequantize(packed, "float32"), np.float64)
    largest = np.abs(x).reshape(5, -1, tile).max(-1)
    scale = np.repeat(largest / np.float32(127), tile, axis=1)
    codes = np.rint(x / scale)
    want = (codes * scale.astype(np.float64)) @ weight.T
    made = quantize_model(nn.Sequential(layer), [rule])
    assert made.layers[0].settings.activation == ("token" if tile == 256 else "tile")
    got = np.array(made(mx.array(x)))
    # Exact sums; roundings of dequantize's two steps, of each group and of the scales.
    size = np.abs(codes * scale) @ (np.abs(weight).T + 128 * np.array(mx.abs(packed.scales)).max())
    assert (np.abs(got - want) <= 8 * EPS * size).all()


def test_the_weight_of_a_packed_layer_is_that_of_the_quantized_array_to_two_roundings():
    w = np.random.default_rng(3).standard_normal((16, 128), dtype=np.float32)
    for method, qtype in (("absmax", "int8"), ("minmax", "int8"), ("minmax", "int4"), ("absmax,0.8", "int5")):
        how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: 64}, calibration_method=method)
        want = dequantize(quantize(w, how)).astype(np.float64)
        packed = pack.pack(w, how)
        got = ops.dequantize(packed, "float32")
        bound = 2 * EPS * 512 * packed.scales.max()
        assert packed.format.bits == int(qtype[3:]) and np.abs(got - want).max() <= bound
    assert pack.pack(w, HowToQuantize(qtype="int8", channelwise_axes=(0,))).scales.shape == (16, 1)


@pytest.mark.parametrize("make, ids", [(Model, mx.array(IDS)), (Torch, torch.from_numpy(IDS))])
def test_a_stream_of_single_parameters_gives_the_model_to_the_bit(make, ids):
    rules = ["embed=weight_qtype:int8", W8A8, "conv=weight_qtype:int4"]
    if make is Torch:
        named = {name: a.detach() for name, a in make().named_parameters()}
    else:
        named = params(make())
    made = plan(make(), rules)
    streamed = {}
    for item in named.items():
        streamed |= quantize_params([item], made)
    model = quantize_model(make(), rules)
    have = params(model) if make is Model else model.state_dict()
    assert {k for k in have if have[k] is not None} == set(streamed)
    for name, array in streamed.items():
        assert bool((have[name] == array).all()) and have[name].dtype == array.dtype, name
    assert bool((model(ids) == model(ids)).all())


def test_scanned_and_reshaped_weights_take_the_shape_they_are_computed_in():
    model = nn.Module()
    model.scanned = SwitchLinear(32, 64, 4, bias=False)
    made = plan(model, ["scanned=weight_qtype:int4"])
    weight = model.scanned.weight
    whole = quantize_params({"scanned.weight": weight}, made)
    flat = quantize_params({"scanned.weight": weight.reshape(4 * 64, 32)}, made)
    assert all(mx.array_equal(whole[name], flat[name]) for name in whole)
    alone = [
        quantize_params({"w.weight": weight[n]}, plan(_linear(weight[n]), ["w=weight_qtype:int4"]))
        for n in range(4)
    ]
    assert mx.array_equal(whole["scanned.weight"], mx.stack([a["w.weight"] for a in alone]))
    with pytest.raises(ValueError, match=re.escape("wanted (4, 64, 32)")):
        quantize_params({"scanned.weight": weight[0]}, made)


def _linear(weight):
    model = nn.Module()
    model.w = nn.Linear(*reversed(weight.shape), bias=False)
    return model


def test_extra_and_wrong_parameters_are_errors():
    made = plan(Model(), [W8A8])
    extra = {"layers.0.up.weight": mx.zeros((128, 64)), "loss.weight": mx.zeros((2,))}
    with pytest.raises(ValueError, match="the model has no loss.weight; allow_extra_params"):
        quantize_params(extra, made)
    assert set(quantize_params(extra, made, allow_extra_params=True)) == {
        f"layers.0.up.{part}" for part in ("weight", "scales", "biases")
    }
    with pytest.raises(TypeError, match="expected a numpy array"):
        quantize_params({"layers.0.up.weight": [1, 2]}, made)
    with pytest.raises(TypeError, match="layers/0/up: the weight is int32"):
        quantize_params({"layers.0.up.weight": mx.zeros((128, 64), mx.int32)}, made)
    for bad in (float("nan"), float("inf")):
        for rule in (W8A8, "layers/.*=weight_qtype:nf4,tile_size:16"):
            with pytest.raises(ValueError, match=r"layers/0/up: .*(NaN|finite)"):
                quantize_params({"layers.0.up.weight": mx.full((128, 64), bad)}, plan(Model(), [rule]))


def test_attention_of_torch_that_reads_a_weight_itself_is_left_alone():
    model = torch.nn.MultiheadAttention(64, 2)
    assert operation(model.out_proj) is None


# Layers of every kind, and every way in which the codes of inputs meet those of weights.
ADAPTED = [
    W8A8, "layers/.*=weight_qtype:nf4,tile_size:16", "layers/.*=bits:4",
    "layers/.*=weight_qtype:float8_e4m3fn,act_qtype:float8_e4m3fn",
    "layers/.*=weight_qtype:mxfp4,act_qtype:mxfp8",
    "layers/.*=weight_qtype:int4,act_qtype:float8_e4m3fn",
    "layers/.*=weight_qtype:int8,act_qtype:int8,tile_size:16",
    "layers/.*=weight_qtype:int8,act_qtype:int8,act_calibration_method:minmax",
]  # fmt: skip


@pytest.mark.parametrize("rule", ADAPTED)
def test_mlx_lms_adapters_wrap_and_train_every_kind_of_layer(rule):
    model = quantize_model(Model(), [rule])
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": {"up", "down"}})
    before = model(mx.array(IDS))

    def loss(model):
        return (model(mx.array(IDS)) ** 2).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    names = [name for name, _ in tree_flatten(gradients)]
    assert len(names) == 8 and all(name.endswith(("lora_a", "lora_b")) for name in names)
    for name, g in tree_flatten(gradients):  # of the first block too: all that a gradient passes, it passes
        assert name.endswith("lora_a") or np.count_nonzero(np.array(g)) > 0.99 * g.size
    up = model.layers[1].up
    up.lora_b = mx.ones_like(up.lora_b) / 8
    after, x = model(mx.array(IDS)), mx.random.normal((3, 64))
    assert mx.abs(after - before).max().item() > 1e-3
    fused = up.fuse(dequantize=True)
    assert type(fused) is nn.Linear
    rough = (mx.linalg.norm(fused(x) - up(x)) / mx.linalg.norm(up(x))).item()
    assert rough < (1e-5 if "act_qtype" not in rule else 0.02 if "act_qtype:int8" in rule else 0.05)
    if "bits" not in rule:
        with pytest.raises(ValueError, match="dequantize=True"):
            up.fuse()


@pytest.mark.parametrize("rule", ADAPTED)
def test_adapters_of_peft_wrap_and_train_every_kind_of_layer(rule):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    from mlxq.ptq.torch import lora_config

    base = quantize_model(Torch(), [rule]).requires_grad_(False)
    ids = torch.from_numpy(IDS)
    before = base(ids)
    config = lora_config(peft.LoraConfig(r=4, target_modules=["layers.0", "layers.1"]))
    model = peft.get_peft_model(base, config)
    assert bool((model(ids) == before).all())  # an adapter starts as nothing
    model(ids).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name and grad is not None for name, grad in trained.items())
    for name, grad in trained.items():
        assert "lora_A" in name or grad.count_nonzero() > 0.99 * grad.numel()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1
    assert (model(ids) - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="codes cannot take an adapter in"):
        model.merge_and_unload()


def test_a_rule_set_serves_torch_and_mlx_alike():
    """The same weights by the same rules give the same codes and scales in both frameworks."""
    w = np.random.default_rng(5).standard_normal((32, 64), dtype=np.float32)
    for text in ("w=weight_qtype:int8", "w=bits:4",
                 "w=weight_qtype:int4,weight_calibration_method:rms,3,tile_size:32",
                 "w=weight_qtype:nf4,tile_size:16"):  # fmt: skip
        made = plan(_linear(mx.array(w)), [text])
        ours = quantize_params({"w.weight": mx.array(w)}, made)
        theirs = quantize_params({"w.weight": torch.from_numpy(w)}, made)
        for name, array in ours.items():
            got = theirs[name].numpy()
            rms = "rms" in text and name != "w.weight"  # the sum's order is the framework's
            np.testing.assert_allclose(
                got.view(np.array(array).dtype), np.array(array), rtol=1e-6 if rms else 0
            )


def test_rules_print_as_they_are_planned():
    assert (
        str(plan(Model(), [QuantizationRule(module_path="embed", weight_qtype="int8")])) == "embed: 8-bit/64"
    )
