"""Fake quantization over MLX: the numbers of the torch side, which torchao checks, and their gradients."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import Adam
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq import bridge, ops, qat
from mlxq.qat import Float8FakeQuantizeConfig, Int4WeightFakeQuantizeConfig, IntxFakeQuantizeConfig
from mlxq.qat import mlx as qm

N, K = 24, 256
CONFIGS = {
    "int2": IntxFakeQuantizeConfig("int2", group_size=64, scale_precision=None),
    "int4": IntxFakeQuantizeConfig("int4", group_size=32, scale_precision=None),
    "int8 channel": IntxFakeQuantizeConfig("int8", "per_channel", scale_precision=None),
    "uint4 int": IntxFakeQuantizeConfig("uint4", group_size=64, is_symmetric=False, scale_precision=None),
    "uint4 float": IntxFakeQuantizeConfig(
        "uint4", group_size=64, is_symmetric=False, zero_point_domain="float", scale_precision=None
    ),
    "int4 learned": IntxFakeQuantizeConfig("int4", group_size=32, is_dynamic=False, range_learning=True),
    "uint8 learned": IntxFakeQuantizeConfig(
        "uint8",
        group_size=64,
        is_symmetric=False,
        zero_point_domain="float",
        scale_precision=None,
        is_dynamic=False,
        range_learning=True,
    ),
    "int4 for float8": Int4WeightFakeQuantizeConfig(64),
    "int4 for bfloat16": Int4WeightFakeQuantizeConfig(64, "bfloat16"),
}
DTYPES = ["float32", "bfloat16"]


def sqnr(wanted, got) -> float:
    wanted, got = (np.asarray(bridge.to_numpy(a), np.float64) for a in (wanted, got))
    noise = np.linalg.norm(wanted - got)
    return math.inf if noise == 0 else 20 * math.log10(np.linalg.norm(wanted) / noise)


def same(a, b) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b))


def linear(dtype="float32", bias=True):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias))
    model.set_dtype(getattr(mx, dtype))
    return model


def prepared(model, config):
    qm.quantize_(model, config if isinstance(config, qat.QATConfig) else qat.QATConfig(weight_config=config))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_weights_have_the_codes_scales_and_values_of_the_torch_side(dtype, config):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    from mlxq.qat import torch as qt

    layer = prepared(linear(dtype), config).layers[0]
    theirs = qt.FakeQuantizedLinear(K, N, weight_config=None, dtype=getattr(torch, dtype))
    theirs.weight = torch.nn.Parameter(bridge.to_torch(layer.weight).clone())
    theirs = qt.FakeQuantizedLinear.from_linear(theirs, None, config)
    mine, torchs = (
        layer.weight_fake_quantizer.coded(layer.weight),
        theirs.weight_fake_quantizer.coded(theirs.weight),
    )
    for name in ("codes", "inside", "scale", "bias"):
        a, b = bridge.to_numpy(getattr(mine, name)), bridge.to_numpy(getattr(torchs, name).detach())
        assert np.array_equal(a, b), name
    a, b = layer.weight_fake_quantizer(layer.weight), theirs.weight_fake_quantizer(theirs.weight).detach()
    assert np.array_equal(bridge.to_numpy(a), bridge.to_numpy(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        IntxFakeQuantizeConfig("int8", "per_token", is_symmetric=False),
        IntxFakeQuantizeConfig("int8", "per_token", is_symmetric=False, scale_precision=None),
        IntxFakeQuantizeConfig("int4", group_size=32),
        Float8FakeQuantizeConfig(),
        Float8FakeQuantizeConfig("float8_e5m2", "per_tensor"),
    ],
    ids=str,
)
def test_activations_and_their_gradients_are_those_of_the_torch_side(dtype, config):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    from mlxq.qat import torch as qt

    x = torch.randn(2, 5, 64, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(3))
    x[0, 0] = 0
    theirs = qt.FakeQuantizedLinear(64, 8, activation_config=config).activation_fake_quantizer
    mine = qm.FakeQuantizedLinear(64, 8, activation_config=config).activation_fake_quantizer
    y = mine(bridge.to_mx(x))
    assert np.array_equal(bridge.to_numpy(y), bridge.to_numpy(theirs(x)))
    g = torch.randn_like(x)
    x.requires_grad_()
    theirs(x).backward(g)
    _, (dx,) = mx.vjp(mine, [bridge.to_mx(x)], [bridge.to_mx(g)])
    assert np.array_equal(bridge.to_numpy(dx), bridge.to_numpy(x.grad))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_gradients_of_weights_and_learned_scales_are_those_of_the_torch_side(config):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    from mlxq.qat import torch as qt

    model = prepared(linear(bias=False), config)
    layer = model.layers[0]
    theirs = qt.FakeQuantizedLinear(K, N)
    theirs.weight = torch.nn.Parameter(bridge.to_torch(layer.weight).clone())
    theirs = qt.FakeQuantizedLinear.from_linear(theirs, None, config)
    if "scale" in layer.weight_fake_quantizer:
        layer.weight_fake_quantizer.scale = layer.weight_fake_quantizer.scale * 0.55
        with torch.no_grad():
            theirs.weight_fake_quantizer.scale.mul_(0.55)
    x = mx.random.normal((7, K))
    loss, gradients = nn.value_and_grad(model, lambda m: (m(x) ** 2).sum())(model)
    theirs(bridge.to_torch(x)).square().sum().backward()
    named = dict(tree_flatten(gradients))
    wanted = {"layers.0.weight": theirs.weight.grad}
    for name, parameter in theirs.weight_fake_quantizer.named_parameters():
        wanted[f"layers.0.weight_fake_quantizer.{name}"] = parameter.grad
    assert set(named) == set(wanted)
    for name, gradient in wanted.items():
        assert sqnr(gradient, named[name]) > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dynamic", [False, True], ids=["weight-only", "8da"])
def test_prepare_is_convert_bit_for_bit_and_45_db_on_packed_kernels(dtype, bits, dynamic):
    group = qat.PerGroup(64)
    base = (
        qat.Int8DynamicActivationIntxWeightConfig(f"int{bits}", group)
        if dynamic
        else qat.IntxWeightOnlyConfig(f"int{bits}", group)
    )
    model = prepared(linear(dtype), qat.QATConfig(base))
    x = mx.random.normal((5, K)).astype(getattr(mx, dtype))
    y, layer = model(x), model.layers[0]
    fake = layer.weight_fake_quantizer(layer.weight)
    seen = layer.activation_fake_quantizer(x) if dynamic else x
    qm.quantize_(model, qat.QATConfig(base, step="convert"))
    packed = model.layers[0].packed
    assert same(ops.dequantize(packed, dtype), fake)
    assert same(mx.addmm(layer.bias, seen, fake.T), y)
    assert sqnr(y, model(x)) >= (45 if dtype == "float32" else 40)  # MLX's float matmul sums in bfloat16
    exact = bridge.to_numpy(seen).astype(np.float64) @ bridge.to_numpy(fake).astype(np.float64).T
    exact += bridge.to_numpy(layer.bias).astype(np.float64)
    assert sqnr(exact, model(x)) >= 45


def test_off_is_the_float_model_exactly_and_parameters_are_the_float_models():
    plain = nn.Sequential(nn.Embedding(11, K), nn.Linear(K, N))
    fake = nn.Sequential(nn.Embedding(11, K), nn.Linear(K, N))
    fake.update(plain.parameters())
    prepared(fake, qat.QATConfig(qat.Int8DynamicActivationIntxWeightConfig("int4")))
    names = [name for name, _ in tree_flatten(plain.parameters())]
    assert [name for name, _ in tree_flatten(fake.parameters())] == names
    assert [name for name, _ in tree_flatten(fake.trainable_parameters())] == names
    ids = mx.arange(11)
    assert not same(fake(ids), plain(ids))
    qm.set_fake_quant(fake, False)
    results = [nn.value_and_grad(m, lambda m: (m(ids) ** 2).sum())(m) for m in (plain, fake)]
    assert results[0][0].item() == results[1][0].item()
    for (name, a), (_, b) in zip(*(tree_flatten(r[1]) for r in results), strict=True):
        assert same(a, b), name


def test_frozen_layers_stay_frozen_and_both_ways_share_the_arrays():
    model = linear()
    model.layers[0].freeze(keys=["weight"])
    weight = model.layers[0].weight
    prepared(model, CONFIGS["int4"])
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == ["layers.0.bias"]
    back = model.layers[0].to_linear()
    assert type(back) is nn.Linear and back.weight is weight and list(back) == ["weight", "bias"]


def test_embeddings_and_tied_heads_are_prepared_and_converted():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(33, 64)

        def __call__(self, ids):
            return self.embed.as_linear(self.embed(ids))

    for learns in (False, True):
        config = IntxFakeQuantizeConfig("int4", group_size=32, is_dynamic=not learns, range_learning=learns)
        model = Tied()
        ids = mx.array([[1, 3], [32, 1]])
        y_float = model(ids)
        prepared(model, config)
        y, table = model(ids), model.embed.weight_fake_quantizer(model.embed.weight)
        assert same(model.embed(ids), table[ids]) and not same(y, y_float)
        qm.quantize_(model, qat.QATConfig(step="convert"))
        assert same(model.embed(ids), table[ids]) and sqnr(y, model(ids)) >= 45


def test_experts_are_prepared_and_converted():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchLinear(64, 16, 3, bias=True)

        def __call__(self, x, indices):
            return self.experts(x, indices)

    model, x, indices = (
        Experts(),
        mx.random.normal((5, 1, 1, 64)),
        mx.array([[0, 2], [1, 1], [2, 0], [0, 1], [2, 2]]),
    )
    plain = model(x, indices)
    prepared(model, qat.QATConfig(qat.Int8DynamicActivationIntxWeightConfig("int4")))
    y = model(x, indices)
    assert 10 < sqnr(plain, y) < 40
    model.experts.weight_fake_quantizer.enabled = model.experts.activation_fake_quantizer.enabled = False
    assert same(model(x, indices), plain)
    model.experts.weight_fake_quantizer.enabled = model.experts.activation_fake_quantizer.enabled = True
    qm.quantize_(model, qat.QATConfig(step="convert"))
    assert sqnr(y, model(x, indices)) >= 45


def test_training_compiled_lowers_the_loss_and_convert_passes_on_what_was_learned():
    mx.random.seed(1)
    config = IntxFakeQuantizeConfig("int2", group_size=64, is_dynamic=False, range_learning=True)
    model = linear()
    x = mx.random.normal((64, K))
    target = model(x)
    prepared(model, config)
    start = model.layers[0].weight_fake_quantizer.scale
    optimizer = Adam(1e-3)
    state = [model.state, optimizer.state]
    step_of = nn.value_and_grad(model, lambda m, x, t: ((m(x) - t) ** 2).mean())

    def step(x, t):
        loss, gradients = step_of(model, x, t)
        optimizer.update(model, gradients)
        return loss

    step, losses = mx.compile(step, inputs=state, outputs=state), []
    for _ in range(60):
        losses.append(step(x, target).item())
    assert losses[-1] < 0.5 * losses[0]
    layer = model.layers[0]
    learned, fake, y = layer.weight_fake_quantizer.scale, layer.weight_fake_quantizer(layer.weight), model(x)
    assert not same(learned, start)
    qm.quantize_(model, qat.QATConfig(step="convert"))
    assert same(model.layers[0].scales, learned)
    assert same(ops.dequantize(model.layers[0].packed), fake)
    assert sqnr(y, model(x)) >= 45


def test_classic_quantizers_compose():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32), nn.Linear(32, 8))
    quantizer = qm.ComposableQATQuantizer(
        [qm.Int4WeightOnlyEmbeddingQATQuantizer(32), qm.Int8DynActInt4WeightQATQuantizer(32)]
    )
    model = quantizer.prepare(model)
    y = model(mx.arange(50))
    model = quantizer.convert(model)
    assert [type(m).__name__ for m in model.layers] == [
        "QuantizedEmbedding",
        "QuantizedActivationLinear",
        "QuantizedActivationLinear",
    ]
    # A value within rounding of a tie of the second layer's 8-bit activations may go the other way.
    assert sqnr(y, model(mx.arange(50))) >= 45
    for quantizer in (
        qm.Int4WeightOnlyQATQuantizer(64, scales_precision="float32"),
        qm.Float8ActInt4WeightQATQuantizer(),
    ):
        model = linear()
        y = quantizer.prepare(model)(mx.ones((1, K)))
        assert sqnr(y, quantizer.convert(model)(mx.ones((1, K)))) >= 45


def test_what_cannot_be_trained_is_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    with pytest.raises(ValueError, match=r"layers.1: K=48 is not a multiple of the group size 32"):
        prepared(model, CONFIGS["int4"])
    assert [type(m) for m in model.layers] == [nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match="one layer"):
        prepared(nn.Linear(64, 8), CONFIGS["int4"])

    class Own(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Own computes in its own way"):
        prepared(nn.Sequential(Own(64, 8)), CONFIGS["int4"])
    with pytest.raises(ValueError, match="prepare it first"):
        qm.quantize_(model, qat.QATConfig(step="convert"))


def test_mlx_lms_trainer_trains_a_prepared_model(tmp_path):
    from mlx_lm.models import llama
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train

    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=128,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = llama.Model(arguments)
    report = qm.quantize_(model, qat.QATConfig(qat.IntxWeightOnlyConfig("int4", qat.PerGroup(32))))
    assert len(report.changed) == 8 and not report.left

    class Rows:
        def __getitem__(self, i):
            return [(3 * i + j) % 32 for j in range(16)]

        def __len__(self):
            return 8

        def process(self, row):
            return row, 0

    losses = []

    class Listener:
        def on_train_loss_report(self, told):
            losses.append(told["train_loss"])

        def on_val_loss_report(self, told):
            pass

    train(
        model,
        Adam(3e-3),
        CacheDataset(Rows()),
        CacheDataset(Rows()),
        TrainingArgs(
            batch_size=4,
            iters=30,
            val_batches=1,
            steps_per_report=10,
            steps_per_eval=100,
            max_seq_length=32,
            adapter_file=str(tmp_path / "weights.safetensors"),
        ),
        training_callback=Listener(),
    )
    assert losses[-1] < 0.8 * losses[0]
    ids = mx.arange(16)[None]
    y = model(ids)
    qm.quantize_(model, qat.QATConfig(step="convert"))
    assert sqnr(y, model(ids)) >= 45
