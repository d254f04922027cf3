"""Packed layers that train, against the published formulas written out, float64 autograd and MLX."""

import copy
import io
import pickle

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxq import ops
from mlxq.format import Format, dequantize, quantize
from mlxq.nn.mpq import Layout
from mlxq.nn.mpq.torch import (
    MPQLinear,
    MPQWeight,
    collect_layers,
    freeze_words,
    pack_layers,
    prepare_layers,
)
from mlxq.nn.torch import QuantizedLinear

K, N = 256, 96

# name -> constructor arguments; every way a checkpoint can hold a layer
MODES = {
    "gptq": dict(use_gba_quant=False),
    "gptq_v2": dict(use_gba_quant=False, gptq_version=2),
    "gba": dict(dq_group_size=32),
    "gba_whole": dict(),
    "gba_dq1": dict(dq_mode=1),
    "gba_plain": dict(dq_mode=0),
    "gba_asym": dict(asym=True, dq_group_size=32),
    "gba_asym_dq1": dict(asym=True, dq_mode=1),
    "gba_asym_plain": dict(asym=True, dq_mode=0),
}


def shuffled(K, group_size, seed=5):
    """An act-order g_idx: rows in groups of the right size, in no order."""
    return np.random.default_rng(seed).permutation(np.arange(K) // group_size).astype(np.int32)


def random_tensors(layout: Layout, seed=0, g_idx=None, dtype=np.float16) -> dict[str, np.ndarray]:
    """A checkpoint's tensors for a layout: any codes, scales of about 0.01, and the default g_idx."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (shape, kind) in layout.shapes.items():
        if kind == "int32":
            tensors[name] = rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
        elif kind == "uint8":
            tensors[name] = rng.integers(0, 16 if name == "qscales" else 256, shape).astype(np.uint8)
        else:
            values = rng.uniform(0.005, 0.02, shape)
            if name in ("qscales_zeros", "qzeros_zeros"):
                values = -1 - 5 * rng.random(shape)
            tensors[name] = (values * 8 if name == "zeros" else values).astype(dtype)
    tensors["g_idx"] = layout.default_g_idx() if g_idx is None else g_idx
    return tensors


def spec_weight(layout: Layout, t: dict[str, np.ndarray]) -> np.ndarray:
    """W, float64 (K, N), element by element, by the formulas of the specification."""
    b, p, D = layout.w_bit, 32 // layout.w_bit, layout.dq_group_size
    mask = 2**b - 1
    q = np.empty((layout.in_channels, layout.out_channels), np.int64)
    for k in range(layout.in_channels):
        q[k] = (t["qweight"][k // p].astype(np.int64) >> (b * (k % p))) & mask
    G = layout.groups
    scale, zero = np.empty((G, layout.out_channels)), np.empty((G, layout.out_channels))
    for n in range(layout.out_channels):
        if layout.double_quantized:
            block = (slice(None), n // D, n % D)
            if layout.asym:
                code = t["qscales"][block] if layout.w_bit == 4 else t["qscales"][:, n]
            else:
                code = t["qstatistic"][block] >> 4
            at = (0, n, 0) if layout.dq_mode == 1 else (slice(None), n // D, 0)
            scale[:, n] = (code - t["qscales_zeros"][at].astype(float)) * t["qscales_scales"][at].astype(
                float
            )
        else:
            scale[:, n] = t["scales"][:, n]
        if layout.asym:
            zp = (t["qzeros"][:, n // p].astype(np.int64) >> (b * (n % p))) & mask
            zero[:, n] = (zp + (layout.gptq_version == 1)) * scale[:, n]
        elif layout.double_quantized:
            code = t["qstatistic"][:, n // D, n % D] & 15
            at = (slice(None), n // D, 0)
            zero[:, n] = (code - t["qzeros_zeros"][at].astype(float)) * t["qzeros_scales"][at].astype(float)
        else:
            zero[:, n] = t["zeros"][:, n]
    return scale[t["g_idx"]] * q - zero[t["g_idx"]]


def layer_of(layout: Layout, tensors, bias=None, requires_grad=True, prepare=True, **kwargs) -> MPQLinear:
    layer = MPQLinear(
        layout.in_channels, layout.out_channels, w_bit=layout.w_bit, group_size=layout.group_size,
        use_gba_quant=layout.use_gba_quant, dq_group_size=layout.dq_group_size, dq_mode=layout.dq_mode,
        asym=layout.asym, gptq_version=layout.gptq_version, disable_bias=bias is None,
        requires_grad=requires_grad, **kwargs,
    )  # fmt: skip
    state = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
    if bias is not None:
        state["bias"] = torch.from_numpy(bias)
    layer.load_state_dict(state, strict=True)
    if prepare:
        layer.prepare_params()
    return layer


def weight_of(layer: MPQLinear) -> np.ndarray:
    """The layer's weight, float64 (K, N), from its triple: the formula of mlxq.format in float64."""
    packed = layer.packed
    words, fmt = packed.words.view(torch.int32).numpy().view(np.uint32), packed.format
    k = np.arange(layer.in_channels)
    codes = (words[:, k * fmt.bits // 32] >> (k * fmt.bits % 32).astype(np.uint32)) & fmt.levels
    j = k // fmt.group_size
    w = packed.scales.numpy()[:, j].astype(float) * codes + packed.biases.numpy()[:, j]
    out = np.empty_like(w)
    out[:, k if layer.order is None else layer.order.numpy()] = w
    return out.T


def steps_of(layout, tensors) -> np.ndarray:
    """The size of a quantization step, (G, N)."""
    return np.abs(layout.scales_and_zeros(tensors)[0])


@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
@pytest.mark.parametrize("b", [2, 4, 8])
def test_a1_packing_is_undone_by_unpacking_bit_for_bit(b, act_order):
    layout = Layout(K, N, b, 64, dq_mode=0)
    tensors = random_tensors(layout, g_idx=shuffled(K, 64) if act_order else None)
    layer = layer_of(layout, tensors)
    state = layer.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(state[name].numpy(), tensor), name
    # Twice the same words: what the state holds, a fresh layer turns into the same triple.
    again = layer_of(layout, {name: t.numpy() for name, t in state.items()})
    assert torch.equal(again.words, layer.words)


@pytest.mark.parametrize("b", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_a2_a3_a4_every_mode_decodes_to_the_formulas_within_2e_6_of_a_step(mode, b):
    for g_idx in (None, shuffled(K, 64)):
        layout = Layout(K, N, b, 64, **MODES[mode])
        tensors = random_tensors(layout, seed=b, g_idx=g_idx)
        layer = layer_of(layout, tensors)
        wanted = spec_weight(layout, tensors)
        assert np.ptp(wanted) > 0
        error = np.abs(weight_of(layer) - wanted) / steps_of(layout, tensors)[tensors["g_idx"]]
        # A zero of z steps is rounded to float32 once: z * 2^-24 of a step; z is at most 256 in 8 bits.
        assert error.max() < (2e-6 if b < 8 else 256 * 2.0**-24)


WIDE = [(32, 96, 64), (128, 384, 32), (256, 512, 64), (-1, 576, 64), (128, 320, 32)]


@pytest.mark.parametrize("group_size, K, N", WIDE)
def test_a2_wide_and_short_groups_decode_too(group_size, K, N):
    """256 becomes twice 128, 576 nine times 64; the last group of 320 rows is half as long."""
    for kwargs in (dict(), dict(use_gba_quant=False)):
        layout = Layout(K, N, 4, group_size, **kwargs)
        tensors = random_tensors(layout, seed=1)
        error = np.abs(weight_of(layer_of(layout, tensors)) - spec_weight(layout, tensors))
        assert (error / steps_of(layout, tensors)[tensors["g_idx"]]).max() < 2e-6


def test_a3_double_quantization_decodes_in_float32_not_in_half():
    layout = Layout(64, 32, 4, 32)
    tensors = random_tensors(layout)
    scale = (tensors["qstatistic"] >> 4).astype(np.float64).reshape(2, 32)
    scale = (scale - tensors["qscales_zeros"][..., 0]) * tensors["qscales_scales"][..., 0]
    found = layer_of(layout, tensors).group_scales.numpy().T
    assert np.abs(found / scale - 1).max() < 2.0**-23 < np.abs(found.astype(np.float16) / scale - 1).max()


X_SHAPES = [(K,), (1, K), (5, K), (2, 3, K)]


@pytest.mark.parametrize("mode", ["gptq", "gba", "gba_asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in_order", "act_order"])
def test_a5_products_are_those_of_the_dequantized_weight(mode, act_order):
    layout = Layout(K, N, 4, 64, **MODES[mode])
    tensors = random_tensors(layout, g_idx=shuffled(K, 64) if act_order else None)
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(N).astype(np.float32)
    layer, W = layer_of(layout, tensors, bias), spec_weight(layout, tensors)
    for shape in X_SHAPES:
        x = rng.standard_normal(shape).astype(np.float32)
        y = layer(torch.from_numpy(x)).detach().numpy()
        wanted = x.astype(float) @ W + bias
        assert y.shape == wanted.shape
        assert np.linalg.norm(y - wanted) / np.linalg.norm(wanted) < 1e-5
    x = torch.from_numpy(rng.standard_normal((K, 7)).astype(np.float32)).T
    assert not x.is_contiguous()
    wanted = x.numpy().astype(float) @ W + bias
    assert np.linalg.norm(layer(x).detach().numpy() - wanted) / np.linalg.norm(wanted) < 1e-5
    half = layer(x.half())  # half an ulp of x, of the product, of the bias and of the sum
    assert half.dtype == torch.float16
    assert np.linalg.norm(half.detach().numpy() - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_a5_mlx_computes_the_same_product_from_the_same_words():
    layout = Layout(K, N, 4, 64, use_gba_quant=False)
    layer = layer_of(layout, random_tensors(layout))
    x = np.random.default_rng(2).standard_normal((4, K)).astype(np.float32)
    words = mx.array(layer.words.numpy().view(np.uint32))
    scales, biases = mx.array(layer.group_scales.numpy()), mx.array(layer.group_biases.numpy())
    theirs = np.array(mx.quantized_matmul(mx.array(x), words, scales, biases, True, 64, 4))
    ours = layer(torch.from_numpy(x)).detach().numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5


@pytest.mark.parametrize("K, N", [(256, 96), (96, 256), (128, 128)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_a6_dx_and_the_privileged_gradient_are_autograds_in_float64(K, N, shape):
    layout = Layout(K, N, 4, 32, use_gba_quant=False)
    tensors = random_tensors(layout, g_idx=shuffled(K, 32))
    layer = layer_of(layout, tensors)
    W = torch.from_numpy(spec_weight(layout, tensors)).requires_grad_()
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((*shape, K))).requires_grad_()
    ((x @ W).sin().sum()).backward()
    x32 = x.detach().float().requires_grad_()
    layer(x32).sin().sum().backward()
    for ours, theirs in ((x32.grad, x.grad), (layer.weight.privileged_grad, W.grad)):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-5


def test_a7_the_privileged_gradient_accumulates_and_frozen_layers_have_none():
    layout = Layout(K, N, 4, 64, dq_mode=0)
    layer = layer_of(layout, random_tensors(layout))
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(0))
    weight = layer.weight
    assert isinstance(weight, MPQWeight) and weight.privileged_grad is None and weight.grad is None
    layer(x).square().sum().backward()
    whole = weight.privileged_grad.clone()
    assert whole.shape == (K, N) and whole.dtype == torch.float32 and weight.grad is not None
    layer.zero_grad()
    assert weight.privileged_grad is None
    for part in x.split(2):
        layer(part).square().sum().backward()
    assert torch.allclose(weight.privileged_grad, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    layer.zero_grad()
    (layer(x[:3]).square().sum() + layer(x[3:]).square().sum()).backward()  # twice in one graph
    assert torch.allclose(weight.privileged_grad, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))

    frozen = layer_of(layout, random_tensors(layout), requires_grad=False)
    x.requires_grad_()
    frozen(x).square().sum().backward()
    assert x.grad is not None and frozen.weight.privileged_grad is None and frozen.weight.grad is None
    assert not frozen(x.detach()).requires_grad


@pytest.mark.parametrize("mode", ["gptq", "gba", "gba_asym_dq1", "gba_plain"])
def test_a9_prepared_twice_saved_and_loaded_a_layer_gives_the_same_output(mode, tmp_path):
    layout = Layout(K, N, 4, 64, **MODES[mode])
    bias = np.arange(N, dtype=np.float32)
    tensors = random_tensors(layout, g_idx=shuffled(K, 64))
    layer = layer_of(layout, tensors, bias)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    words = layer.words
    layer.prepare_params()
    assert layer.words is words and torch.equal(layer(x), y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert {name: t.shape for name, t in state.items() if name in layout.shapes} == {
        name: torch.Size(shape) for name, (shape, _) in layout.shapes.items()
    }
    other = random_tensors(layout, seed=9)
    unprepared = layer_of(layout, other, np.zeros(N, np.float32), prepare=False)
    unprepared.load_state_dict(state)
    unprepared.prepare_params()
    prepared = layer_of(layout, other, np.zeros(N, np.float32))
    assert not torch.equal(prepared(x), y)
    prepared.load_state_dict(state)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for same in (unprepared, prepared, copied, pickled):
        assert torch.equal(same(x), y)
        same(x).sum().backward()
        assert same.weight.privileged_grad is not None
    assert layer.weight.privileged_grad is None  # a copy has a weight of its own
    assert torch.equal(layer.half()(x), y) and layer.group_scales.dtype == torch.float32


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_layer_made_without_memory_is_loaded_and_trains(way):
    layout = Layout(K, N, 4, 64, dq_mode=0)
    real = layer_of(layout, random_tensors(layout), np.arange(N, dtype=np.float32))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    arguments = dict(group_size=64, dq_mode=0, disable_bias=False, dtype=torch.float16)
    layer = MPQLinear(K, N, device="meta", **arguments)
    assert layer.weight.is_meta and layer.qweight.is_meta
    state = real.state_dict()
    if way == "to_empty":
        layer.to_empty(device="cpu").load_state_dict(state)
    else:
        layer.load_state_dict(state, assign=True)
        assert layer.qweight.data_ptr() == state["qweight"].data_ptr()
    layer.prepare_params()
    assert isinstance(layer.weight, MPQWeight) and not layer.weight.is_meta
    assert torch.equal(layer(x), real(x))
    layer(x).sum().backward()
    assert layer.weight.privileged_grad.shape == (K, N)


def test_a_layer_without_memory_says_what_it_lacks():
    layout = Layout(K, N, 4, 64, dq_mode=0)
    state = layer_of(layout, random_tensors(layout)).state_dict()
    layer = MPQLinear(K, N, group_size=64, dq_mode=0, device="meta", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="on the meta device.*assign=True"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="on the meta device"):
        layer.prepare_params()


BAD_ARGUMENTS = {
    "w_bit": (dict(w_bit=3), "w_bit is 3; wanted one of 2, 4, 8"),
    "a_bit": (dict(a_bit=8), "a_bit is 8"),
    "K": (dict(in_channels=100), "in_channels is 100; wanted a multiple of 32"),
    "N": (dict(out_channels=0), "both must be positive"),
    "group": (dict(group_size=16), "group_size is 16; wanted a multiple of 32"),
    "zero group": (dict(group_size=0), "group_size is 0"),
    "dq_mode": (dict(dq_mode=3), "dq_mode is 3; wanted 0"),
    "dq_group": (dict(dq_group_size=36), "dq_group_size is 36; it must divide out_channels 96"),
    "zeros": (dict(out_channels=48, use_gba_quant=False), "out_channels is 48; integer zeros are packed"),
    "version": (dict(gptq_version=3), "gptq_version is 3"),
    "gba v2": (dict(gptq_version=2), "belongs to GPTQ"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a10_each_impossible_configuration_has_its_own_error(name):
    arguments, said = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=said):
        MPQLinear(**{"in_channels": 256, "out_channels": 96, "group_size": 64} | arguments)


def test_a10_types_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="in_channels is 64.0; wanted an integer"):
        MPQLinear(64.0, 32)
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        MPQLinear(64, 32, dtype=torch.int8)


def _ragged(layer):
    layer.g_idx[0] = 1


def _beyond(layer):
    layer.g_idx[5] = 40


def _not_finite(layer):
    layer.qscales_scales.view(-1)[1] = float("nan")


def _other_shape(layer):
    layer.qstatistic = layer.qstatistic[:1]


def _other_dtype(layer):
    layer.qweight = layer.qweight.long()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (_ragged, "g_idx puts 63 rows into group 0; wanted a multiple of 32"),
        (_beyond, "g_idx runs from 0 to 40; wanted 0 to 3"),
        (_not_finite, "qscales_scales holds NaN or infinity"),
        (_other_shape, r"qstatistic has shape \(1, 1, 96\); wanted \(4, 1, 96\)"),
        (_other_dtype, "qweight is int64; wanted int32"),
    ],
)
def test_a10_bad_tensors_are_refused_before_anything_changes(spoil, said):
    layout = Layout(K, N, 4, 64)
    layer = layer_of(layout, random_tensors(layout), prepare=False)
    spoil(layer)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        layer.prepare_params()
    after = layer.state_dict()
    assert not layer.prepared and set(before) == set(after)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)
    with pytest.raises(RuntimeError, match="prepare_params"):
        layer(torch.zeros(1, K))


def test_a10_a_state_that_does_not_fit_leaves_a_prepared_layer_as_it_was():
    layout = Layout(K, N, 4, 64)
    layer, tensors = layer_of(layout, random_tensors(layout)), random_tensors(layout, seed=1)
    x = torch.ones(1, K)
    y = layer(x)
    tensors["g_idx"] = np.zeros(K, np.int32) + np.arange(K, dtype=np.int32) % 3
    for state, said in (
        ({name: torch.from_numpy(t) for name, t in tensors.items()}, "g_idx puts 86 rows"),
        ({"qweight": torch.zeros(3, 3, dtype=torch.int32)}, r"qweight has shape \(3, 3\)"),
        ({}, "Missing key"),
        ({**layer.state_dict(), "stranger": x}, "Unexpected key"),
    ):
        with pytest.raises(RuntimeError, match=said):
            layer.load_state_dict(state)
        assert torch.equal(layer(x), y)
    with pytest.raises(ValueError, match=r"x has shape \(2, 100\); wanted \(..., 256\)"):
        layer(torch.zeros(2, 100))


def test_a11_1_32_and_33_rows_agree():
    layout = Layout(K, N, 4, 64, use_gba_quant=False)
    layer = layer_of(layout, random_tensors(layout))
    x = torch.randn(33, K, generator=torch.Generator().manual_seed(0))
    whole = layer(x).detach()
    # One accumulation rule: float32 at every M, so that only the order of the sum may differ.
    for rows in (1, 32):
        assert torch.allclose(layer(x[:rows]), whole[:rows], rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    half, x16 = layer(x.half()), x.half()
    assert torch.allclose(layer(x16[:1]), half[:1], rtol=2e-3, atol=2e-3)


def test_autocast_decides_the_dtype_of_products():
    layout = Layout(K, N, 4, 64, dq_mode=0)
    layer = layer_of(layout, random_tensors(layout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, K)).dtype == torch.bfloat16


def test_on_a_stand_in_a_gpu_gets_one_packed_for_all_steps_until_a_tensor_is_another(monkeypatch):
    """ops.cuda keeps what it worked out on the Packed: a new one each call would be checked anew."""

    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    calls = []

    class Cuda:
        @staticmethod
        def qmm(x, w, transpose=True):
            calls.append((w, transpose))
            return torch.zeros(*x.shape[:-1], w.N if transpose else w.K)

    monkeypatch.setattr(ops.dispatch, "_cuda", lambda: Cuda)
    layout = Layout(K, N, 4, 64, dq_mode=0)
    layer = layer_of(layout, random_tensors(layout))
    x = torch.ones(2, K).as_subclass(OnCuda).requires_grad_()
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
        layer.words.add_(1)  # as an optimiser does
    assert len(calls) >= 2 and all(w is calls[0][0] for w, _ in calls)
    assert calls[0][0].words.data_ptr() == layer.words.data_ptr()
    layer.half().words.data = layer.words.clone()
    layer(x)
    assert calls[-1][0].words.data_ptr() == layer.words.data_ptr() != calls[0][0].words.data_ptr()


def test_words_that_an_optimiser_changed_are_not_differentiated_silently():
    layout = Layout(K, N, 4, 64, dq_mode=0)
    layer = layer_of(layout, random_tensors(layout))
    loss = layer(torch.ones(2, K)).sum()
    layer.words.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_models_are_packed_collected_and_prepared():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32, bias=False))
    weights = [model[0].weight.detach().numpy(), model[2].weight.detach().numpy()]
    x = torch.randn(5, 64)
    biases = model[0].bias.detach().clone()
    assert pack_layers(model, Format(4, 32), skip=lambda path, layer: False) == ["0", "2"]
    assert list(collect_layers(model)) == ["0", "2"]
    first, second = (dequantize(quantize(w, Format(4, 32))) for w in weights)
    wanted = torch.relu(x @ torch.from_numpy(first).T + biases) @ torch.from_numpy(second).T
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert prepare_layers(model) is model
    assert [p.numel() for p in model.parameters()] == [0, 0]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert torch.load(io.BytesIO(buffer.getvalue()))["2.qweight"].shape == (12, 32)
    with pytest.raises(ValueError, match="pack_layers: 0: quantize: w has K=40, not a multiple"):
        pack_layers(torch.nn.Sequential(torch.nn.Linear(40, 8)), Format(4, 32))


def test_layers_become_mlx_layers_and_back_on_the_same_words():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32, bias=False))
    pack_layers(model, Format(2, 32))
    x = torch.randn(5, 64)
    y, words = model(x).detach(), model[0].words.clone()
    assert freeze_words(model) == ["0", "1"]
    assert type(model[0]) is QuantizedLinear and torch.equal(model[0].weight, words)
    assert torch.allclose(model(x), y, atol=1e-6)
    assert pack_layers(model) == ["0", "1"] and torch.equal(model[0].words, words)
    assert torch.allclose(model(x), y, atol=1e-6)
    layout = Layout(K, N, 4, 64, use_gba_quant=False)
    ordered = torch.nn.Sequential(layer_of(layout, random_tensors(layout, g_idx=shuffled(K, 64))))
    with pytest.raises(ValueError, match="freeze_words: 0 has act-order"):
        freeze_words(ordered)
