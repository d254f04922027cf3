"""Fake quantization over torch, against torchao 0.18 run live, autograd and float64."""

import copy
import math
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the package torch")
nn = torch.nn
F = torch.nn.functional

from mlxq import ops, qat  # noqa: E402
from mlxq.qat import Float8FakeQuantizeConfig, Int4WeightFakeQuantizeConfig, IntxFakeQuantizeConfig  # noqa: E402
from mlxq.qat import torch as qt  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
N, K = 24, 256


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao", reason="needs the package torchao")
        import torchao.quantization.qat
    return torchao


def sqnr(wanted, got) -> float:
    wanted, got = wanted.double(), got.double()
    noise = (wanted - got).norm().item()
    return math.inf if noise == 0 else 20 * math.log10(wanted.norm().item() / noise)


def linear(dtype=torch.float32, K=K, N=N, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(K, N, bias=bias).to(dtype))


def prepared(model, config):
    qt.quantize_(model, config if isinstance(config, qat.QATConfig) else qat.QATConfig(weight_config=config))
    return model


def signed_codes(layer):
    coded = layer.weight_fake_quantizer.coded(layer.weight)
    low = 8 if not isinstance(layer.weight_fake_quantizer.config, IntxFakeQuantizeConfig) else None
    low = -layer.weight_fake_quantizer.config.bounds[0] if low is None else low
    return (coded.codes.reshape(layer.weight.shape) - low).to(torch.int32), coded.scale


# Prepare, convert and torchao.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 128, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dynamic", [False, True], ids=["weight-only", "8da"])
def test_prepare_is_convert_bit_for_bit_and_has_the_codes_and_scales_of_torchao(
    torchao, dtype, group, bits, dynamic
):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    theirs, ours = linear(dtype), linear(dtype)
    x = torch.randn(5, K, dtype=dtype)
    weight_dtype = getattr(torch, f"int{bits}")
    wide = PerGroup(group) if group else PerAxis(0), qat.PerGroup(group) if group else qat.PerAxis(0)
    base = (Int8DynamicActivationIntxWeightConfig if dynamic else IntxWeightOnlyConfig)(
        **{"weight_dtype": weight_dtype, ("weight_granularity" if dynamic else "granularity"): wide[0]}
    )
    kind = qat.Int8DynamicActivationIntxWeightConfig if dynamic else qat.IntxWeightOnlyConfig
    config = kind(weight_dtype, wide[1])

    quantize_(theirs, torchao.quantization.qat.QATConfig(base, step="prepare"))
    prepared(ours, qat.QATConfig(config))
    y, layer = ours(x), ours[0]
    if dtype == torch.bfloat16:  # 8-bit scales times codes are exact in float32
        assert torch.equal(y, theirs(x))
    else:  # their value is rounded once, ours twice
        assert sqnr(theirs(x), y) > 120
    codes, scale = signed_codes(layer)
    quantize_(theirs, torchao.quantization.qat.QATConfig(base, step="convert"))
    packed_there = theirs[0].weight
    assert torch.equal(codes, packed_there.qdata.int())
    assert torch.equal(scale, packed_there.scale.reshape(scale.shape))

    fake = layer.weight_fake_quantizer(layer.weight)
    seen = layer.activation_fake_quantizer(x) if dynamic else x
    qt.quantize_(ours, qat.QATConfig(config, step="convert"))
    packed = ours[0].packed
    assert torch.equal(ops.dequantize(packed, str(dtype).removeprefix("torch.")), fake)
    assert torch.equal(F.linear(seen, fake, ours[0].bias), y)
    if dynamic:
        assert torch.equal(ours[0].activation_quantizer(x), seen)
    assert sqnr(y, ours(x)) >= 45


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_classic_8da4w_quantizer_has_torchaos_numbers(torchao, dtype):
    from torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer

    theirs, ours = linear(dtype, bias=False), linear(dtype, bias=False)
    x = torch.randn(3, K, dtype=dtype)
    x[1] = 0  # its scale is torchao's floor for activations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream = Int8DynActInt4WeightQATQuantizer(groupsize=64, precision=dtype, scales_precision=dtype)
        theirs = upstream.prepare(theirs)
    quantizer = qt.Int8DynActInt4WeightQATQuantizer(groupsize=64, precision=dtype, scales_precision=dtype)
    ours = quantizer.prepare(ours)
    ours[0].weight = theirs[0].weight
    assert torch.equal(ours[0].activation_fake_quantizer(x), theirs[0].activation_fake_quantizer(x))
    y = ours(x)
    assert sqnr(theirs(x), y) > (100 if dtype == torch.float32 else 60)
    codes, scale = signed_codes(ours[0])
    theirs = upstream.convert(theirs)
    assert torch.equal(codes, theirs[0].weight.int()) and torch.equal(scale, theirs[0].scales)
    assert sqnr(y, quantizer.convert(ours)(x)) >= 45


def test_the_classic_int4_quantizer_has_torchaos_numbers_and_converts_layers_with_a_bias(torchao):
    from torchao.quantization.utils import get_groupwise_affine_qparams, groupwise_affine_quantize_tensor

    model = linear(torch.bfloat16)
    quantizer = qt.Int4WeightOnlyQATQuantizer(groupsize=64)
    model = quantizer.prepare(model)
    w, x = model[0].weight, torch.randn(7, K, dtype=torch.bfloat16)
    coded = model[0].weight_fake_quantizer.coded(w)
    scale, zero = get_groupwise_affine_qparams(w, 4, 64, torch.bfloat16)
    theirs, _ = groupwise_affine_quantize_tensor(w, 4, 64, torch.bfloat16)
    assert torch.equal(coded.scale, scale)
    assert torch.equal(coded.bias, zero - scale * 8)
    assert torch.equal(coded.codes.reshape(N, K).int(), theirs.int())
    y = model(x)
    model = quantizer.convert(model)
    assert type(model[0]).__name__ == "QuantizedLinear" and model[0].bias is not None
    assert sqnr(y, model(x)) >= 45


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["float8_e4m3fn", "bfloat16"])
def test_int4_weights_for_float8_and_bfloat16_activations_are_torchaos(torchao, dtype, activation):
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig as Theirs
    from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer

    model = prepared(linear(dtype), Int4WeightFakeQuantizeConfig(64, activation))
    w = model[0].weight.detach()
    theirs = Int4WeightFakeQuantizer(Theirs(64, getattr(torch, activation)))(w)
    ours = model[0].weight_fake_quantizer(w)
    # Their zero point is a rounding away from our bias.
    assert sqnr(theirs, ours) > (110 if dtype == torch.float32 else 55)
    scale = model[0].weight_fake_quantizer.coded(w).scale
    step = scale.float().repeat_interleave(64, -1)
    assert ((theirs.float() - ours.float()).abs() < step * 0.02).all()  # a code off would be a whole step
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert torch.equal(ops.dequantize(model[0].packed, str(dtype).removeprefix("torch.")), ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("rows", [True, False])
def test_float8_rounds_as_torchao_and_the_hardware_cast_do(torchao, dtype, kind, rows):
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.qat import Float8FakeQuantizeConfig as Theirs
    from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer

    x = torch.randn(40, 64, dtype=dtype) * torch.logspace(-6, 3, 40, dtype=dtype)[:, None]
    ours = Float8FakeQuantizeConfig(kind, "per_row" if rows else "per_tensor", hp_value_ub=50.0)
    theirs = Theirs(kind, PerRow() if rows else PerTensor(), hp_value_ub=50.0)
    layer = qt.FakeQuantizedLinear(64, 8, activation_config=ours)
    assert torch.equal(layer.activation_fake_quantizer(x), Float8FakeQuantizer(theirs)(x))


def test_every_float8_value_is_kept_and_a_row_of_zeros_stays_zero():
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(kind).float()
        every = every[every.isfinite()]
        layer = qt.FakeQuantizedLinear(len(every), 1, activation_config=Float8FakeQuantizeConfig(kind))
        assert torch.equal(layer.activation_fake_quantizer(every[None])[0], every)
        assert torch.equal(
            layer.activation_fake_quantizer(torch.zeros(2, len(every))), torch.zeros(2, len(every))
        )


def test_float8_activations_with_int4_weights_convert():
    x = torch.randn(6, K, dtype=torch.bfloat16)
    for group in (64, None):
        model = linear(torch.bfloat16)
        quantizer = qt.Float8ActInt4WeightQATQuantizer(group)
        y = quantizer.prepare(model)(x)
        assert quantizer.get_activation_fake_quantize_config() == Float8FakeQuantizeConfig()
        assert sqnr(y, quantizer.convert(model)(x)) >= 45
    model = linear(torch.bfloat16)
    base = qat.Float8DynamicActivationInt4WeightConfig()
    y = prepared(model, qat.QATConfig(base))(x)
    qt.quantize_(model, qat.QATConfig(base, step="convert"))
    assert sqnr(y, model(x)) >= 45


# The traps of torchao.


def test_small_bfloat16_weights_keep_their_levels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 64).to(torch.bfloat16))
    w = model[0].weight.detach()
    config = IntxFakeQuantizeConfig("int4", group_size=32, scale_precision="bfloat16")
    assert sqnr(w, prepared(model, config)[0].weight_fake_quantizer(w)) >= 20
    # torchao 0.12 floors the scale at machine epsilon, 2^-7: here asked for by name.
    floored = IntxFakeQuantizeConfig("int4", group_size=32, scale_precision="bfloat16", eps=2.0**-7)
    assert sqnr(w, prepared(linear(torch.bfloat16, 4096, 64), floored)[0].weight_fake_quantizer(w)) < 15


def least_scale_of_0_12(dtype):
    """A group of small weights: (ours, 0.12's) scale of a dynamic and of a learned grid, and what it is."""
    model = linear(dtype)
    with torch.no_grad():
        model[0].weight.mul_(0.02)
    found = []
    for kind in ({}, {"is_dynamic": False, "range_learning": True}):
        config = IntxFakeQuantizeConfig("int4", group_size=64, scale_precision=None, **kind)
        w = model[0].weight.detach()
        quantizer = prepared(copy.deepcopy(model), config)[0].weight_fake_quantizer
        theirs = quantizer.grid(w).scale.clamp(min=torch.finfo(dtype).eps)
        wanted = w.reshape(N, -1, 64).abs().amax(-1) / 7.5
        found.append((quantizer.grid(w).scale, theirs, wanted))
    return found


def float8_rows_of_0_12(dtype):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[3] *= 1e-17  # far below 0.12's floor
    times = 448 / x.abs().amax(-1, keepdim=True).double().clamp(min=1e-12)
    theirs = (x * times).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype) / times.to(dtype)
    layer = qt.FakeQuantizedLinear(64, 8, activation_config=Float8FakeQuantizeConfig())
    return [(layer.activation_fake_quantizer(x), theirs, x)]


def int4_for_float8_of_0_12(dtype):
    w = linear(dtype)[0].weight.detach()
    found = []
    for config, steps in (
        (Int4WeightFakeQuantizeConfig(64), 8.0),
        (qt.Float8ActInt4WeightQATQuantizer(64, str(dtype)[6:]).get_weight_fake_quantize_config(), 7.5),
    ):
        scale = prepared(linear(dtype), config)[0].weight_fake_quantizer.coded(w).scale
        largest = w.reshape(N, -1, 64).abs().amax(-1)
        found.append((scale, largest / (7.5 if steps == 8 else 8.0), largest / steps))
    return found


def groups_for_float8_of_0_12(dtype):
    base = qat.Float8DynamicActivationInt4WeightConfig().fake_quantizers()[1].group_size
    classic = qt.Float8ActInt4WeightQATQuantizer().get_weight_fake_quantize_config().group_size
    sizes = ((base, 64, 128), (classic, 128, 64))
    return [tuple(torch.tensor([float(n)]) for n in row) for row in sizes]


CASES_OF_0_12 = [
    (least_scale_of_0_12, torch.bfloat16),  # the epsilon of float32 is no trap
    *((float8_rows_of_0_12, dtype) for dtype in DTYPES),
    *((int4_for_float8_of_0_12, dtype) for dtype in DTYPES),
    (groups_for_float8_of_0_12, torch.float32),
]


@pytest.mark.parametrize(
    "case, dtype", CASES_OF_0_12, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_where_torchao_0_12_does_otherwise(case, dtype):
    for ours, theirs, wanted in case(dtype):
        assert not torch.equal(ours, theirs)
        assert sqnr(wanted, ours) > 25  # 8-bit floats; scales are nearer
        assert sqnr(wanted, ours) > sqnr(wanted, theirs) - 3
        if case is float8_rows_of_0_12:
            assert ours[3].any() and sqnr(wanted[3], ours[3]) > 25 > sqnr(wanted[3], theirs[3])


@pytest.mark.parametrize("weights, scales", [("float16", None), ("float32", "float16")])
@pytest.mark.parametrize("symmetric, domain", [(True, "int"), (False, "int"), (False, "float")])
def test_groups_of_zeros_stay_zero_in_float16_whatever_eps_says(weights, scales, domain, symmetric):
    for eps in (None, 1e-30):
        model = linear(getattr(torch, weights))
        with torch.no_grad():
            model[0].weight[1:3, :64] = 0
        dtype = "int4" if symmetric else "uint4"
        kind = {"is_symmetric": symmetric, "zero_point_domain": domain, "scale_precision": scales}
        prepared(model, IntxFakeQuantizeConfig(dtype, group_size=64, eps=eps, **kind))
        value = model[0].weight_fake_quantizer(model[0].weight)
        assert value.isfinite().all() and value[1:3, :64].abs().max() < 1e-5
        assert sqnr(model[0].weight, value) > 15


@pytest.mark.parametrize("dtype", ["uint4", "int4", "uint8", "int8"])
def test_asymmetric_groups_in_the_integer_domain_decode_to_what_was_encoded(torchao, dtype):
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    model = linear()
    with torch.no_grad():
        model[0].weight.add_(0.02)
    w = model[0].weight.detach()
    config = IntxFakeQuantizeConfig(dtype, group_size=64, is_symmetric=False)
    ours = prepared(model, config)[0].weight_fake_quantizer(w)
    low, high = config.bounds
    arguments = (torch.int32, low, high)
    scale, zero = choose_qparams_affine(w, MappingType.ASYMMETRIC, (1, 64), *arguments)
    codes = quantize_affine(w, (1, 64), scale, zero, *arguments)
    theirs = dequantize_affine(codes, (1, 64), scale, zero, *arguments)
    assert sqnr(w, ours) > (45 if dtype.endswith("8") else 20)
    assert abs(sqnr(w, ours) - sqnr(w, theirs)) < 0.05
    coded = model[0].weight_fake_quantizer.coded(w)
    assert torch.equal(coded.scale, scale.reshape(coded.scale.shape))
    # QAT of torchao takes tinygemm's parameters here and decodes them as integers.
    theirs = torchao.quantization.qat.IntxFakeQuantizeConfig(
        getattr(torch, dtype), group_size=64, is_symmetric=False
    )
    wrong = torchao.quantization.qat.FakeQuantizerBase.from_config(theirs)(w)
    assert sqnr(w, wrong) < sqnr(w, ours) - 5


def test_16_bit_biases_cost_no_level():
    for dtype in ("uint8", "uint4"):
        model = linear(torch.bfloat16)
        w = model[0].weight.detach()
        wide = prepared(
            copy.deepcopy(model), IntxFakeQuantizeConfig(dtype, group_size=64, is_symmetric=False)
        )
        tight = prepared(
            model,
            IntxFakeQuantizeConfig(dtype, group_size=64, is_symmetric=False, scale_precision="bfloat16"),
        )
        loss = sqnr(w, wide[0].weight_fake_quantizer(w)) - sqnr(w, tight[0].weight_fake_quantizer(w))
        assert loss < (6 if dtype == "uint8" else 1)


def test_embeddings_are_prepared_and_converted_and_only_asked_rows_are_quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64, padding_idx=3), nn.Linear(64, 8))
    report = qt.quantize_(model, qat.QATConfig(qat.IntxWeightOnlyConfig("int4", qat.PerGroup(32))))
    assert report.changed == ["0", "1"] and not report.left
    ids = torch.tensor([[1, 3], [49, 1]])
    table = model[0].weight_fake_quantizer(model[0].weight)
    y = model[0](ids)
    assert torch.equal(y, table[ids])
    y.sum().backward()
    grad = model[0].weight.grad
    assert grad[1].sum() > 0 and not grad[3].any() and not grad[0].any()
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert [type(m).__name__ for m in model] == ["QuantizedEmbedding", "QuantizedLinear"]
    assert torch.equal(model[0](ids), table[ids])


def test_the_embedding_quantizer_has_torchaos_codes(torchao):
    from torchao.quantization.utils import get_group_qparams_symmetric

    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 8))
    quantizer = qt.ComposableQATQuantizer(
        [qt.Int4WeightOnlyEmbeddingQATQuantizer(32), qt.Int8DynActInt4WeightQATQuantizer(64)]
    )
    model = quantizer.prepare(model)
    scale, _ = get_group_qparams_symmetric(model[0].weight.detach(), 4, 32)
    assert torch.equal(signed_codes(model[0])[1], scale)
    y = model(torch.arange(50))
    model = quantizer.convert(model)
    assert type(model[0]).__name__ == "QuantizedEmbedding" and model[0].group_size == 32
    assert type(model[1]).__name__ == "QuantizedActivationLinear"
    assert sqnr(y, model(torch.arange(50))) >= 45
    with pytest.raises(ValueError, match="same kind"):
        qt.ComposableQATQuantizer([qt.Int8DynActInt4WeightQATQuantizer(), qt.Int4WeightOnlyQATQuantizer()])


@pytest.mark.parametrize("dtype, scales", [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")], ids=str)
def test_a_converted_table_gives_the_rows_that_it_trained_with_in_the_models_dtype(dtype, scales):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 8)).to(dtype)
    quantizer = qt.Int4WeightOnlyEmbeddingQATQuantizer(32, scale_precision=scales)
    rows = quantizer.prepare(model)[0](torch.arange(40))
    model = quantizer.convert(model)
    assert model[0].scales.dtype == getattr(torch, scales)
    assert torch.equal(model[0](torch.arange(40)), rows) and rows.dtype == dtype
    assert model(torch.arange(40)).dtype == dtype


# Gradients, toggling, identity.


def test_off_is_the_float_layer_exactly_forward_and_backward():
    for base in (
        qat.Int8DynamicActivationIntxWeightConfig("int4", qat.PerGroup(32)),
        qat.Float8DynamicActivationInt4WeightConfig(64),
        qat.IntxWeightOnlyConfig("int2", qat.PerGroup(64)),
    ):
        plain = nn.Sequential(nn.Embedding(11, K), nn.Linear(K, N))
        fake = copy.deepcopy(plain)
        qt.quantize_(fake, qat.QATConfig(base))
        ids = torch.arange(11)
        assert not torch.equal(fake(ids), plain(ids))
        qt.set_fake_quant(fake, False)
        for model in (plain, fake):
            model.zero_grad()
            model(ids).square().sum().backward()
        assert torch.equal(fake(ids), plain(ids))
        for mine, theirs in zip(fake.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        fake.apply(qt.enable_linear_fake_quant)
        assert fake[1].weight_fake_quantizer.enabled and not fake[0].weight_fake_quantizer.enabled
        fake.apply(qt.disable_linear_fake_quant)
        assert not fake[1].weight_fake_quantizer.enabled


def test_weights_are_shared_through_both_steps_and_state_dicts_are_the_float_models():
    model = nn.Sequential(nn.Embedding(11, K), nn.Linear(K, N))
    before, keys = list(model.parameters()), list(model.state_dict())
    qt.quantize_(model, qat.QATConfig(qat.Int8DynamicActivationIntxWeightConfig("int4")))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    back = nn.Sequential(model[0].to_embedding(), model[1].to_linear())
    assert all(a is b for a, b in zip(back.parameters(), before, strict=True))
    assert type(back[0]) is nn.Embedding and type(back[1]) is nn.Linear
    assert repr(back) == repr(nn.Sequential(nn.Embedding(11, K), nn.Linear(K, N)))


def test_activation_quantizers_alone_are_unwrapped_by_convert():
    model = linear()
    weight = model[0].weight
    qt.quantize_(model, qat.QATConfig(activation_config=IntxFakeQuantizeConfig("int8", "per_token")))
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert type(model[0]) is nn.Linear and model[0].weight is weight


def test_models_on_the_meta_device_are_prepared_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N))
    learned = IntxFakeQuantizeConfig("int4", group_size=64, is_dynamic=False, range_learning=True)
    prepared(model, learned)
    assert all(p.is_meta for p in model.parameters()) and len(list(model.parameters())) == 3
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.zero_()
    with pytest.raises(ValueError, match="initialize_fake_quantizers"):
        model(torch.randn(1, K))
    qt.initialize_fake_quantizers(model)
    w = model[0].weight.detach()
    assert sqnr(w, model[0].weight_fake_quantizer(w)) > 15


def reference_ste(w, group, bits):
    """Symmetric fake quantization from autograd's own pieces, float64: rint passes, clip masks."""
    z = 2 ** (bits - 1)
    grouped = w.reshape(w.shape[0], -1, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / (z - 0.5)).detach()
    v = grouped / scale
    rounded = v + (v.round() - v).detach()
    return (rounded.clamp(-z, z - 1) * scale).reshape(w.shape)


def test_weight_gradients_pass_where_the_code_was_not_clipped_and_nowhere_else():
    w = torch.randn(6, 64, dtype=torch.float64)
    w[0, 0] = 9.0  # 9 / (9 / 7.5) is 7.5 in float32, which rounds to 8 and is clipped
    g = torch.randn(6, 64, dtype=torch.float64)
    truth = w.clone().requires_grad_()
    reference_ste(truth, 32, 4).backward(g)
    # The largest weight of a group lies on 7.5, where the last bit decides whether it is clipped.
    grouped = w.reshape(-1, 32)
    decided = (grouped.abs() < grouped.abs().amax(-1, keepdim=True)).reshape(w.shape)
    layer = qt.FakeQuantizedLinear(64, 6, weight_config=IntxFakeQuantizeConfig("int4", group_size=32))
    mine = w.float().requires_grad_()
    layer.weight_fake_quantizer(mine).backward(g.float())
    torch.testing.assert_close(mine.grad.double()[decided], truth.grad[decided], rtol=1e-6, atol=0)
    assert mine.grad[0, 0] == 0


def test_gradients_agree_with_torchaos(torchao):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    theirs, ours = linear(), linear()
    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(theirs, torchao.quantization.qat.QATConfig(base, step="prepare"))
    prepared(ours, qat.QATConfig(qat.Int8DynamicActivationIntxWeightConfig("int4")))
    x, gradients = torch.randn(5, K), []
    for model in (theirs, ours):
        mine = x.clone().requires_grad_()
        model(mine).square().sum().backward()
        gradients.append([mine.grad, model[0].weight.grad, model[0].bias.grad])
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# Range learning.


@pytest.mark.parametrize("bits", [2, 4])
def test_learned_scales_have_the_gradient_of_lsq_and_of_torchao(torchao, bits):
    config = IntxFakeQuantizeConfig(f"int{bits}", group_size=32, is_dynamic=False, range_learning=True)
    model = prepared(linear(bias=False), config)
    quantizer, w = model[0].weight_fake_quantizer, model[0].weight
    with torch.no_grad():
        quantizer.scale.mul_(0.55)  # so that some codes are clipped
    g = torch.randn_like(w)
    quantizer(w).backward(g)

    z = 2 ** (bits - 1)
    truth, scale = w.detach().double().requires_grad_(), quantizer.scale.detach().double().requires_grad_()
    v = truth.reshape(N, -1, 32) / scale[..., None]
    code = (v + (v.round() - v).detach()).clamp(-z, z - 1)
    (code * scale[..., None]).reshape(w.shape).backward(g.double())
    torch.testing.assert_close(quantizer.scale.grad.double(), scale.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), truth.grad, rtol=1e-6, atol=1e-7)

    theirs = torchao.quantization.qat.IntxFakeQuantizeConfig(
        getattr(torch, f"int{bits}"), group_size=32, is_dynamic=False, range_learning=True
    )
    upstream = torchao.quantization.qat.FakeQuantizerBase.from_config(theirs)
    upstream._initialized = True
    upstream.scale = nn.Parameter(quantizer.scale.detach().clone())
    upstream.zero_point = torch.zeros_like(upstream.scale)
    upstream(w.detach()).backward(g)
    torch.testing.assert_close(quantizer.scale.grad, upstream.scale.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("domain", ["int", "float"])
def test_learned_zero_points_move_by_clipped_weights_only(domain):
    config = IntxFakeQuantizeConfig(
        "uint4",
        group_size=32,
        is_symmetric=False,
        zero_point_domain=domain,
        is_dynamic=False,
        range_learning=True,
    )
    model = prepared(linear(bias=False), config)
    quantizer, w = model[0].weight_fake_quantizer, model[0].weight.detach()
    quantizer(w).sum().backward()
    before = quantizer.zero_point.grad.abs().max()
    quantizer.zero_grad()
    with torch.no_grad():
        quantizer.scale.mul_(0.5)
    g = torch.randn_like(w)
    quantizer(w).backward(g)

    scale = quantizer.scale.detach().double()[..., None].requires_grad_()
    zero = quantizer.zero_point.detach().double()[..., None].requires_grad_()
    bias = -zero * scale if domain == "int" else zero - 8 * scale
    v = (w.double().reshape(N, -1, 32) - bias) / scale
    code = (v + (v.round() - v).detach()).clamp(0, 15)
    (code * scale + bias).reshape(w.shape).backward(g.double())
    assert before <= quantizer.zero_point.grad.abs().max()
    for mine, truth in ((quantizer.scale, scale), (quantizer.zero_point, zero)):
        torch.testing.assert_close(mine.grad.double(), truth.grad[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held", [False, True])
def test_codes_on_learned_grids_are_float64s_and_a_negative_scale_counts_down(held):
    config = IntxFakeQuantizeConfig(
        "uint8", group_size=64, is_symmetric=False, zero_point_domain="float", scale_precision=None,
        zero_point_precision="float32", is_dynamic=False, range_learning=True,
    )  # fmt: skip
    model = prepared(linear(torch.bfloat16), config)
    if held:
        qt.hold_in_float32(model)
        with torch.no_grad():  # what bfloat16 would lose
            model[0].weight.mul_(1 + 2e-4 * torch.randn_like(model[0].weight))
    quantizer, w = model[0].weight_fake_quantizer, model[0].weight
    with torch.no_grad():
        quantizer.scale[::2] *= -1
    coded = quantizer.coded(w)
    scale, bias = coded.scale.double()[..., None], coded.bias.double()[..., None]
    assert coded.scale.dtype == coded.bias.dtype == torch.bfloat16 and (coded.scale[::2] < 0).all()
    codes = ((w.detach().double().reshape(N, -1, 64) - bias) / scale).clamp(0, 255)
    assert (codes - coded.codes).abs().max() < 0.5 + 1e-4
    assert (coded.codes % 2 == 1).float().mean() > 0.45
    value = (scale * coded.codes.double() + bias).reshape(N, K).to(torch.bfloat16)
    assert torch.equal(quantizer(w), value)
    y = model(torch.eye(K, dtype=torch.bfloat16))
    y.sum().backward()
    assert w.grad.dtype == w.dtype and quantizer.scale.grad.dtype == quantizer.scale.dtype
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert torch.equal(ops.dequantize(model[0].packed, "bfloat16"), value)
    assert model[0].bias.dtype == torch.bfloat16
    quantizer.enabled = False
    assert torch.equal(quantizer(w), w.to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_convert_passes_on_what_was_learned(symmetric):
    torch.manual_seed(1)
    config = IntxFakeQuantizeConfig(
        "int2", group_size=64, is_symmetric=symmetric, is_dynamic=False, range_learning=True
    )
    model, x = prepared(linear(), config), torch.randn(64, K)
    start = model[0].weight_fake_quantizer.scale.detach().clone()
    target = F.linear(x, model[0].weight.detach(), model[0].bias.detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    learned = model[0].weight_fake_quantizer.scale.detach().clone()
    assert not torch.equal(learned, start)
    fake, y = model[0].weight_fake_quantizer(model[0].weight.detach()), model(x)
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert torch.equal(model[0].scales, learned)
    assert torch.equal(ops.dequantize(model[0].packed, "float32"), fake)
    assert sqnr(y, model(x)) >= 45


# Whole models: what quantize_ refuses, tied weights.


def test_a_layer_that_does_not_fit_is_named_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    with pytest.raises(ValueError, match=r"quantize_: 1: K=48 is not a multiple of the group size 32"):
        prepared(model, IntxFakeQuantizeConfig("int4", group_size=32))
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    report = qt.quantize_(
        model,
        qat.QATConfig(weight_config=IntxFakeQuantizeConfig("int4", group_size=32)),
        lambda layer, path: layer.in_features == 64,
    )
    assert report.changed == ["0"] and report.left == ["1"]


def test_modules_that_cannot_train_quantized_are_refused():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(64, 8))
    config = qat.QATConfig(qat.IntxWeightOnlyConfig("int4"))
    with pytest.raises(ValueError, match="0 is a Conv1d"):
        qt.quantize_(model, config, lambda layer, path: True)
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        qt.quantize_(nn.Sequential(nn.MultiheadAttention(64, 2)), config)
    with pytest.raises(ValueError, match="one layer"):
        qt.quantize_(nn.Linear(64, 8), config)
    with pytest.raises(ValueError, match="no activations"):
        both = qat.QATConfig(
            activation_config=IntxFakeQuantizeConfig("int8", "per_token"),
            weight_config=IntxFakeQuantizeConfig("int4", group_size=32),
        )
        qt.quantize_(nn.Sequential(nn.Embedding(8, 64)), both, lambda layer, path: True)
    with pytest.raises(ValueError, match="prepare it first"):
        qt.quantize_(model, qat.QATConfig(step="convert"))


def test_convert_refuses_a_base_that_it_was_not_prepared_for():
    model = prepared(linear(), qat.QATConfig(qat.IntxWeightOnlyConfig("int4", qat.PerGroup(64))))
    with pytest.raises(ValueError, match="not what"):
        qt.quantize_(model, qat.QATConfig(qat.IntxWeightOnlyConfig("int2", qat.PerGroup(64)), step="convert"))
    with pytest.raises(ValueError, match="no packed integer form"):
        model = prepared(linear(), qat.QATConfig(qat.Float8DynamicActivationFloat8WeightConfig()))
        qt.quantize_(model, qat.QATConfig(step="convert"))


def test_tied_weights_stay_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    learned = IntxFakeQuantizeConfig("int4", group_size=32, is_dynamic=False, range_learning=True)
    model = prepared(Tied(), learned)
    assert model.head.weight is model.embed.weight
    assert model.head.weight_fake_quantizer is model.embed.weight_fake_quantizer
    y = model(torch.arange(32))
    qt.quantize_(model, qat.QATConfig(step="convert"))
    assert sqnr(y, model(torch.arange(32))) >= 45
    assert torch.equal(model.head.packed.words, model.embed.packed.words)
    model = Tied()
    qt.quantize_(model, qat.QATConfig(weight_config=learned), lambda layer, path: path == "embed")
    with pytest.raises(ValueError, match="share one weight but not one format"):
        other = IntxFakeQuantizeConfig("int8", group_size=32)
        qt.quantize_(model, qat.QATConfig(weight_config=other), lambda layer, path: path == "head")
