"""W8A8 layers of torch and MLX: exact sums, the gradients of spec B.2 against float64 autograd, files."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as mlx_nn
import mlx.optimizers
import mlx.utils
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import make_hf_model

import mlxq.convert
import mlxq.load
from mlxq import format as fm
from mlxq.checkpoint.q8 import save
from mlxq.checkpoint.summary import inspect
from mlxq.format import Format, Packed
from mlxq.nn import q8
from mlxq.nn.q8 import mlx as q8_mlx
from mlxq.ptq import Statistics, quantize_model

torch = pytest.importorskip("torch", reason="needs the package torch: pip install 'mlxq[torch]'")
from mlxq.nn.q8 import torch as q8_torch  # noqa: E402

EPS = 2.0**-24  # of float32, relative error of one operation


def host(a):
    return a.detach().numpy() if isinstance(a, torch.Tensor) else np.array(a)


def mlx_linear(w, bias):
    layer = mlx_nn.Linear(w.shape[1], w.shape[0], bias is not None)
    layer.weight = mx.array(w)
    if bias is not None:
        layer.bias = mx.array(bias)
    return layer


def torch_linear(w, bias):
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias is not None)
    layer.weight.data = torch.from_numpy(w.copy())
    if bias is not None:
        layer.bias.data = torch.from_numpy(bias.copy())
    return layer


def mlx_gradients(layer, x, dy):
    """{name: gradient} of sum(layer(x) * dy) as numpy arrays, "x" among them."""
    parameters = layer.trainable_parameters()

    def loss(parameters, x):
        layer.update(parameters)
        return (layer(x) * mx.array(dy)).sum()

    by_name, dx = mx.grad(loss, argnums=(0, 1))(parameters, mx.array(x))
    return {name: np.array(g) for name, g in by_name.items()} | {"x": np.array(dx)}


def torch_gradients(layer, x, dy):
    x = torch.from_numpy(x).requires_grad_()
    (layer(x) * torch.from_numpy(dy)).sum().backward()
    return {name: p.grad.numpy() for name, p in layer.named_parameters()} | {"x": x.grad.numpy()}


FRAMEWORKS = {
    "mlx": SimpleNamespace(
        Linear=q8_mlx.Q8Linear,
        plain=mlx_linear,
        array=mx.array,
        run=lambda layer, x: np.array(layer(mx.array(x))),
        gradients=mlx_gradients,
        observing=q8_mlx.observing,
    ),
    "torch": SimpleNamespace(
        Linear=q8_torch.Q8Linear,
        plain=torch_linear,
        array=lambda a: torch.from_numpy(np.array(a)),
        run=lambda layer, x: layer(torch.from_numpy(np.array(x))).detach().numpy(),
        gradients=torch_gradients,
        observing=q8_torch.observing,
    ),
}


@pytest.fixture(params=FRAMEWORKS)
def fw(request):
    return FRAMEWORKS[request.param]


def normal(*shape, seed=0, size=1.0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def written_out(x, w, rule, group_size, activation, scale_a=None, bias_a=None):
    """Spec B.1 and the other scales, literally: x and w as integers, their scales, in float32 and int64.

    q_x (M, K), s_x (M, 1), (M, K), (1, K) or number, q_w (N, K), s_w broadcast to (N, K); y in float64.
    """
    x = x.reshape(-1, x.shape[-1])
    if bias_a is not None:
        x = x + bias_a
    if activation in ("token", "tile"):
        tile = x.shape[1] if activation == "token" else group_size or 64
        s_x = np.abs(x).reshape(len(x), -1, tile).max(2) / np.float32(127)
        s_x[s_x == 0] = 1
        s_x = s_x if activation == "token" else np.repeat(s_x, tile, axis=1)
    elif activation == "static_tile":
        tile = group_size or 64
        s_x = np.repeat(np.float32(tile_scales(scale_a, x.shape[1] // tile)), tile)[None]
    else:
        s_x = max(np.float32(scale_a), np.float32(1e-5))
    q_x = np.clip(np.rint(x / s_x), -128, 127).astype(np.int64)
    if rule == "row":
        s_w = np.abs(w).max(1, keepdims=True) / np.float32(127)
    elif rule == "tensor":
        s_w = np.abs(w).max() / np.float32(127)
    elif rule == "lsq":
        s_w = np.float32(max(2 * np.abs(w).mean(dtype=np.float64) / math.sqrt(127), 1e-5))
    else:
        grouped = np.abs(w).reshape(len(w), -1, group_size).max(2) / np.float32(127)
        s_w = np.repeat(grouped, group_size, axis=1)
    s_w = np.broadcast_to(np.maximum(s_w, np.float32(2.0**-90)), w.shape)
    q_w = np.clip(np.rint(w / s_w), -128, 127).astype(np.int64)
    y = np.einsum("mk,nk,nk->mn", q_x * np.float64(s_x), q_w, np.float64(s_w))
    return SimpleNamespace(q_x=q_x, s_x=s_x, q_w=q_w, s_w=s_w, y=y)


RULES = ("row", "tensor", "group", "lsq")


def tile_scales(scale_a, tiles):
    return [float(scale_a) * (1 + 0.25 * (t % 3)) for t in range(tiles)]


def make(fw, w, bias=None, scale_a=0.02, **settings):
    activation, K = settings.get("activation", "token"), w.shape[1]
    if activation in ("learned", "static"):
        settings["scale_a"] = scale_a
    elif activation == "static_tile":
        group_size = settings.get("group_size") or max(g for g in (32, 64, 128) if K % g == 0)
        settings["scale_a"] = tile_scales(scale_a, K // group_size)
    return fw.Linear.from_linear(fw.plain(w, bias), **settings)


# ------------------------------------------------------------------------------------------ B1: integers


@pytest.mark.parametrize("activation", q8.ACTIVATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_the_sum_is_the_exact_integer_one(fw, rule, activation):
    K, N, M = 288, 40, 9
    x, w = normal(M, K, seed=1), normal(N, K, seed=2, size=0.1)
    layer = make(fw, w, activation=activation, weight_scales=rule, group_size=32)
    want = written_out(x, w, rule, 32, activation, 0.02)
    packed = layer.packed
    codes = fm.unpack(host(packed.words), 8, K).astype(np.int64) - 128
    if rule == "lsq":  # the mean's last bit is the framework's own; the sum is still exact for its codes
        assert np.abs(codes - want.q_w).max() <= 1
        s_w = np.float64(host(packed.scales)[0, 0])
        want.y = (np.float64(want.s_x) * want.q_x) @ codes.T * s_w
    else:
        assert np.array_equal(codes, want.q_w)
    y = fw.run(layer, x)
    # Whole rows: the integer, two scales, two products. Groups: nine terms added one by one.
    if rule != "group" and activation not in ("tile", "static_tile"):
        bound = 4 * EPS * np.abs(want.y)
    else:
        bound = 13 * EPS * np.abs(want.s_x * want.q_x) @ np.abs(codes.T) * want.s_w.max()
    assert (np.abs(y - want.y) <= bound).all()


def test_a_row_of_one_scale_is_one_integer_to_the_bit(fw):
    """Sums up to 2^24 are exact in float32, so y is that integer times the product of two scales."""
    K, N, M = 1024, 24, 5
    x, w = normal(M, K, seed=3), normal(N, K, seed=4)
    layer, want = make(fw, w), written_out(x, w, "row", None, "token")
    sums = want.q_x @ want.q_w.T
    assert np.abs(sums).max() < 2**24
    scales = (want.s_x * want.s_w[:, 0]).astype(np.float32)
    assert np.array_equal(fw.run(layer, x), sums.astype(np.float32) * scales)


def test_the_two_frameworks_give_the_same_bits():
    x, w, b, shift = normal(7, 192, seed=5), normal(33, 192, seed=6), normal(33, seed=7), normal(192, seed=8)
    for rule in ("row", "tensor", "group"):
        for activation in q8.ACTIVATIONS:
            ys = []
            for fw in FRAMEWORKS.values():
                layer = make(fw, w, b, weight_scales=rule, activation=activation, bias_a=True)
                if fw is FRAMEWORKS["mlx"]:
                    layer.bias_a = mx.array(shift)
                else:
                    layer.bias_a.data = torch.from_numpy(shift)
                ys.append(fw.run(layer, x))
            assert np.array_equal(*ys), (rule, activation)


# --------------------------------------------------------------------------------------- B2: gradients


def autograd_float64(x, w, dy, s_w, activation, scale_a, shift, clipped_weights):
    """Gradients of sum(y * dy) by torch's autograd in float64, straight through the two roundings only."""
    x, w, s, shift, bias = (
        torch.tensor(np.float64(a), requires_grad=True) for a in (x, w, scale_a, shift, np.zeros(len(w)))
    )
    s_w, dy = torch.tensor(np.float64(s_w)), torch.tensor(np.float64(dy))

    def rounded(v):
        return v + (v.round() - v).detach()

    moved = x + shift
    if activation in ("token", "tile"):
        tiles = moved.detach().float().reshape(len(x), -1, 32 if activation == "tile" else x.shape[1])
        step = tiles.abs().amax(-1, keepdim=True).div(127).double().expand(tiles.shape).reshape(x.shape)
    else:
        # LSQ's factor on the scale's gradient alone: a number whose value is s and whose gradient is c ds.
        c = 1 / math.sqrt(x.numel() * 127)
        step = s * c + (s * (1 - c)).detach()
    # Clamped before it is rounded, so that gradients pass where v itself is in range.
    if activation == "static_tile":
        tiles = np.float32(tile_scales(scale_a, w.shape[1] // 32))
        step = torch.tensor(np.repeat(tiles, 32).astype(np.float64))
    v = moved / step
    q_x = rounded(v if activation in ("token", "tile") else v.clamp(-128, 127))
    q_w = rounded((w / s_w).clamp(-128, 127) if clipped_weights else w / s_w)
    y = (step * q_x) @ (s_w * q_w).T + bias
    (y * dy).sum().backward()
    found = {"x": x.grad, "weight": w.grad, "bias": bias.grad, "bias_a": shift.grad}
    if activation == "learned":
        found["scale_a"] = s.grad
    return {name: g.numpy() for name, g in found.items()}


CLIPPING = {"unclipped": 0.05, "clipped": 0.008}  # times 127: 6.3 and 1.0 standard deviations


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ["learned", "token", "tile", "static", "static_tile"])
def test_gradients_equal_float64_autograd(fw, activation, rule, clipping):
    K, N, M = 96, 40, 24
    x, w, dy = normal(M, K, seed=11), normal(N, K, seed=12, size=0.1), normal(M, N, seed=13)
    if rule == "lsq":
        w[::3, ::5] *= 40  # far beyond 128 steps of twice the mean
    scale_a, shift = np.float32(CLIPPING[clipping]), normal(K, seed=14, size=0.01)
    layer = make(
        fw, w, np.zeros(N, np.float32), scale_a=float(scale_a),
        activation=activation, weight_scales=rule, group_size=32, bias_a=True,
    )  # fmt: skip
    assign(layer, "bias_a", shift)
    s_w = np.repeat(host(layer.packed.scales).astype(np.float64), 32, axis=1)
    share = np.mean(np.abs(x + shift) / scale_a > 127.5)
    assert activation in ("token", "tile") or (share > 0.2) == (clipping == "clipped")
    want = autograd_float64(x, w, dy, s_w, activation, scale_a, shift, rule == "lsq")
    got = fw.gradients(layer, x, dy)
    assert set(got) == set(want)
    for name in want:
        error, size = np.linalg.norm(got[name] - want[name]), np.linalg.norm(want[name])
        if name == "scale_a":  # its terms cancel when nothing is clipped: the error is small beside them
            h = dy.astype(np.float64) @ (s_w * np.rint(w / s_w).clip(-128, 127))
            v = (x + shift) / np.float64(scale_a)
            size = np.abs(h * (np.rint(v.clip(-128, 127)) - v.clip(-128, 127) + v.clip(-128, 127) * (
                np.abs(v) > 127))).sum() / math.sqrt(x.size * 127)  # fmt: skip
        # float32 sums of 24 to 2304 terms; v = x / s has an error of 2^-24 * 127 beside differences of 0.25.
        assert error < 3e-6 * size, (name, error / size)


def assign(layer, name, value):
    if isinstance(layer, mlx_nn.Module):
        layer[name] = mx.array(value)
    else:
        getattr(layer, name).data = torch.from_numpy(np.array(value))


def test_the_scales_gradient_by_hand(fw):
    """One input of each kind; h is 1, s is 0.5, c = 1 / sqrt(32 * 127)."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = 70, -80, 0.6, 0.25  # v = 140 clipped: 127; -160: -128; 1.2: -0.2; 0.5 rounds to even 0: -0.5
    w = np.full((1, 32), 127, np.float32)  # scale 1
    layer = make(fw, w, scale_a=0.5, activation="learned")
    got = fw.gradients(layer, x, np.full((1, 1), 1 / 127, np.float32))
    want = (127 - 128 - 0.2 - 0.5) / math.sqrt(32 * 127)
    assert got["scale_a"] == pytest.approx(want, rel=1e-5)
    assert np.allclose(got["x"][0, :5], [0, 0, 1, 1, 1], rtol=1e-6)


def test_a_scale_that_is_too_small_grows_and_the_loss_falls(fw):
    """Upstream multiplied by the mask, so that clipped inputs never asked for a larger scale."""
    x, w = normal(64, 64, seed=21), normal(32, 64, seed=22)
    layer = make(fw, w, scale_a=0.002, activation="learned")
    target = x @ w.T
    losses, scale = [], 0.002
    for _ in range(60):
        error = fw.run(layer, x) - target
        losses.append(float((error**2).mean()))
        step = 0.02 * fw.gradients(layer, x, (2 * error / error.size).astype(np.float32))["scale_a"]
        scale -= float(step)
        assign(layer, "scale_a", np.float32(scale))
        if isinstance(layer, torch.nn.Module):
            layer.zero_grad()
    assert scale > 0.015 and losses[-1] < 0.05 * losses[0]


def test_a_scale_below_eps_acts_as_eps_everywhere_and_can_come_back(fw):
    x, w, dy = normal(4, 32, seed=23), normal(8, 32, seed=24), normal(4, 8, seed=25)
    outputs, gradients = [], []
    for scale in (1e-5, 1e-9, -3.0):
        layer = make(fw, w, scale_a=scale, activation="learned")
        outputs.append(fw.run(layer, x))
        gradients.append(fw.gradients(layer, x, dy))
    for y, g in zip(outputs[1:], gradients[1:], strict=True):
        assert np.array_equal(y, outputs[0]) and g["scale_a"] == gradients[0]["scale_a"] != 0


# --------------------------------------------------------------------------------- B3: initialisation


def test_observing_takes_the_first_batch_that_is_not_zero(fw):
    zeros, first, second = (
        np.zeros((3, 64), np.float32),
        normal(3, 64, seed=31),
        normal(3, 64, seed=32, size=9),
    )
    for activation, want in (
        ("learned", 2 * np.abs(first).mean() / math.sqrt(127)),
        ("static", np.abs(second).max() / 127),
        ("static_tile", np.abs(np.concatenate([first, second])).reshape(6, 2, 32).max((0, 2)) / 127),
    ):
        layer = fw.Linear(64, 16, activation=activation, group_size=32)
        with fw.observing(layer):
            for batch in (zeros, first, second, first):
                fw.run(layer, batch)
        assert np.array(layer.scale_a.tolist()) == pytest.approx(want, rel=1e-6)
        assert layer.scale_a.dtype in (mx.float32, torch.float32)


def test_observing_only_zeros_raises_and_names_the_layer(fw):
    layer = fw.Linear(64, 16, activation="static")
    with pytest.raises(ValueError, match="observing: the layer saw no input but zeros"), fw.observing(layer):
        fw.run(layer, np.zeros((3, 64), np.float32))


def test_an_all_zero_first_batch_leaves_a_torch_layer_waiting():
    layer = q8_torch.Q8Linear(64, 16, activation="learned").train()
    y = layer(torch.zeros(3, 64))
    assert torch.equal(y, layer.bias.expand(3, 16)) and layer.scale_a.isnan()
    y.sum().backward()
    assert layer.scale_a.grad is None or layer.scale_a.grad.isfinite()
    x = torch.from_numpy(normal(3, 64, seed=33))
    layer(x)
    assert layer.scale_a.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(127), rel=1e-6)
    layer(10 * x)
    assert layer.scale_a.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(127), rel=1e-6)


@pytest.mark.parametrize("activation", ["learned", "static", "static_tile"])
def test_evaluation_never_sets_a_scale(fw, activation):
    layer = fw.Linear(64, 16, activation=activation)
    layer.eval()
    with pytest.raises(ValueError, match=f"no {activation} activation scale yet; run data .*observing"):
        fw.run(layer, normal(3, 64))
    assert np.isnan(layer.scale_a.tolist()).all()
    layer = make(fw, normal(8, 64), activation=activation)
    layer.eval()
    before = state(layer)
    fw.run(layer, normal(3, 64, size=50))
    after = state(layer)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def state(layer):
    """Copies of a layer's arrays by name."""
    if isinstance(layer, mlx_nn.Module):
        return {name: np.array(a) for name, a in layer.parameters().items()}
    return {name: a.detach().clone().numpy() for name, a in layer.state_dict().items()}


# -------------------------------------------------------------------------- B4, B5: shapes, train = eval


@pytest.mark.parametrize("activation", q8.ACTIVATIONS)
def test_three_dimensional_input_is_its_rows(fw, activation):
    x, dy = normal(2, 3, 64, seed=41), normal(2, 3, 24, seed=42)
    layer = make(fw, normal(24, 64, seed=43), normal(24, seed=44), activation=activation, bias_a=True)
    y = fw.run(layer, x)
    assert y.shape == (2, 3, 24)
    assert np.array_equal(y.reshape(6, 24), fw.run(layer, x.reshape(6, 64)))
    alone = fw.run(layer, x[1, 2])
    if activation in ("tile", "static_tile"):  # groups are added in the order of the kernel for so many rows
        assert np.allclose(y[1, 2], alone, rtol=0, atol=8 * EPS * np.abs(y).max())
    else:
        assert np.array_equal(y[1, 2], alone)
    deep = fw.gradients(layer, x, dy)
    if isinstance(layer, torch.nn.Module):
        layer.zero_grad()
    flat = fw.gradients(layer, x.reshape(6, 64), dy.reshape(6, 24))
    for name in deep:
        assert np.allclose(deep[name].reshape(flat[name].shape), flat[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("activation", q8.ACTIVATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_training_evaluation_and_packed_give_the_same_bits(fw, rule, activation):
    x = normal(5, 128, seed=51)
    layer = make(fw, normal(24, 128, seed=52), normal(24, seed=53), weight_scales=rule, activation=activation)
    layer.train()
    trained = fw.run(layer, x)
    layer.eval()
    assert np.array_equal(fw.run(layer, x), trained)
    assert not layer.is_packed and layer.pack() is layer and layer.is_packed
    assert np.array_equal(fw.run(layer, x), trained)
    layer.train()
    assert np.array_equal(fw.run(layer, x), trained)


def test_packed_layers_train_their_activations_and_freeze_their_weights(fw):
    x, dy = normal(6, 64, seed=54), normal(6, 24, seed=55)
    layer = make(fw, normal(24, 64, seed=56), normal(24, seed=57), activation="learned", bias_a=True)
    loose = fw.gradients(layer, x, dy)
    layer.pack()
    if isinstance(layer, mlx_nn.Module):
        layer.unfreeze()
    else:
        layer.zero_grad()
    packed = fw.gradients(layer, x, dy)
    assert set(packed) == {"x", "bias", "bias_a", "scale_a"}
    assert all(np.array_equal(packed[name], loose[name]) for name in packed)


# ----------------------------------------------------------------------------------------- B6: quality


def test_weights_keep_40_dB_per_row_and_27_8_by_lsq(fw):
    w = normal(256, 1024, seed=61)
    quality = {}
    for rule in RULES:
        packed = make(fw, w, weight_scales=rule).packed
        parts = (host(a) for a in (packed.words, packed.scales, packed.biases))
        restored = fm.dequantize(Packed(*parts, packed.format))
        quality[rule] = 10 * math.log10((w.astype(np.float64) ** 2).sum() / ((restored - w) ** 2).sum())
    assert quality["row"] >= 40 and abs(quality["lsq"] - 27.8) <= 0.3, quality
    assert quality["lsq"] < quality["tensor"] < quality["row"] < quality["group"]


# ------------------------------------------------------------------------------ what a layer goes through


def test_torch_layers_survive_state_dict_deepcopy_pickle_and_half():
    x = torch.from_numpy(normal(4, 64, seed=71))
    for activation in q8.ACTIVATIONS:
        for packed in (False, True):
            layer = make(FRAMEWORKS["torch"], normal(24, 64, seed=72), normal(24, seed=73),
                         activation=activation, bias_a=True)  # fmt: skip
            other = q8_torch.Q8Linear(64, 24, activation=activation, bias_a=True)
            if packed:
                layer.pack(), other.pack()
            y = layer.eval()(x)
            other.load_state_dict(layer.state_dict())
            for again in (other.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(again(x), y)
            half = copy.deepcopy(layer).half()
            assert half(x.half()).dtype == torch.float16
            assert torch.allclose(half(x.half()).float(), y, rtol=0.02, atol=0.05 * y.abs().max().item())
            if activation not in ("token", "tile"):
                assert half.scale_a.dtype == torch.float32 and torch.equal(half.scale_a, layer.scale_a)


def test_a_state_without_a_scale_is_noticed_after_loading():
    layer = make(FRAMEWORKS["torch"], normal(24, 64), np.zeros(24, np.float32), activation="learned").eval()
    layer.load_state_dict(q8_torch.Q8Linear(64, 24, activation="learned").state_dict())
    with pytest.raises(ValueError, match="no learned activation scale yet"):
        layer(torch.ones(1, 64))


def test_device_and_dtype_reach_the_weight():
    layer = q8_torch.Q8Linear(64, 24, device="meta", dtype=torch.float16, activation="static", bias_a=True)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.weight.dtype == layer.bias_a.dtype == torch.float16 and layer.scale_a.dtype == torch.float32


def test_torch_optimisers_and_compiled_mlx_training_steps_train():
    x, target = normal(128, 64, seed=81), normal(128, 16, seed=82)
    layer = q8_torch.Q8Linear(64, 16, activation="learned", bias_a=True)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((layer(torch.from_numpy(x)) - torch.from_numpy(target)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    layer = q8_mlx.Q8Linear(64, 16, activation="learned", bias_a=True)
    with q8_mlx.observing(layer):
        layer(mx.array(x))
    optimizer = mlx.optimizers.AdamW(1e-2)
    step = mlx_nn.value_and_grad(layer, lambda x, y: ((layer(x) - y) ** 2).mean())

    def train(x, y):
        loss, gradients = step(x, y)
        optimizer.update(layer, gradients)
        return loss

    arrays = [layer.state, optimizer.state]
    compiled = mx.compile(train, inputs=arrays, outputs=arrays)
    losses = []
    for _ in range(30):
        losses.append(compiled(mx.array(x), mx.array(target)).item())
        mx.eval(arrays)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_torch_layers_give_the_same_bits_and_gradients(packed):
    layer = make(FRAMEWORKS["torch"], normal(24, 64, seed=83), activation="learned", bias_a=True)
    layer = layer.pack() if packed else layer
    compiled = torch.compile(layer, backend="aot_eager")
    inputs = [torch.from_numpy(normal(4, 64, seed=84)).requires_grad_() for _ in range(2)]
    outputs = [run(x) for run, x in zip((layer, compiled), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs) and torch.equal(inputs[0].grad, inputs[1].grad)


def test_half_inputs_give_half_outputs(fw):
    layer = make(fw, normal(24, 64, seed=91), normal(24, seed=92))
    x = normal(4, 64, seed=93)
    for name in ("float16", "bfloat16"):
        if isinstance(layer, mlx_nn.Module):
            y = layer(mx.array(x).astype(getattr(mx, name)))
        else:
            y = layer(torch.from_numpy(x).to(getattr(torch, name)))
        assert str(y.dtype).rpartition(".")[2] == name


def test_layers_over_packed_weights_of_any_served_width(fw):
    """Not symmetric, groups of their own: float64 on the dequantized weight and the codes of x."""
    x, w = normal(3, 128, seed=95), normal(24, 128, seed=96)
    for bits in (2, 4, 8):
        packed = fm.quantize(w, Format(bits, 64))
        parts = (fw.array(a) for a in (packed.words, packed.scales, packed.biases))
        layer = fw.Linear.from_packed(Packed(*parts, packed.format))
        assert not layer.per_row
        want = written_out(x, w, "row", None, "token")
        want = want.s_x * want.q_x @ fm.dequantize(packed).astype(np.float64).T
        assert np.linalg.norm(fw.run(layer, x) - want) < 1e-6 * np.linalg.norm(want)


def test_packed_q8_weights_are_known_by_their_one_scale_a_row(fw):
    for rule in RULES:
        packed = make(fw, normal(24, 256, seed=97), weight_scales=rule).packed
        assert fw.Linear.from_packed(packed).per_row == (rule != "group")


# ------------------------------------------------------------------------------------------ bad settings


def test_bad_settings_are_one_sentence(fw):
    with pytest.raises(
        ValueError, match="activation 'row' does not exist; built: token, tile, learned, static, static_tile"
    ):
        fw.Linear(64, 16, activation="row")
    with pytest.raises(
        ValueError, match="weight_scales 'max' does not exist; built: row, tensor, group, lsq"
    ):
        fw.Linear(64, 16, weight_scales="max")
    with pytest.raises(ValueError, match="K=48 is not a multiple of the group size 32"):
        fw.Linear(48, 16)
    with pytest.raises(ValueError, match="8-bit groups of 48 do not exist"):
        fw.Linear(96, 16, group_size=48)
    layer = make(fw, np.full((4, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        layer.pack()
    assert not layer.is_packed


def test_zero_rows_and_empty_inputs_work(fw):
    w = normal(8, 64, seed=99)
    w[3] = 0
    layer = make(fw, w)
    y = fw.run(layer, normal(3, 64))
    assert (y[:, 3] == 0).all() and np.isfinite(y).all()
    assert fw.run(layer, np.zeros((0, 64), np.float32)).shape == (0, 8)
    assert (fw.run(layer, np.zeros((2, 64), np.float32)) == 0).all()


# -------------------------------------------------------------------------------------------------- on disk


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_hf_model("qwen2", tmp_path_factory.mktemp("float") / "model", "float32", seed=4)


TOKENS = mx.array([[5, 17, 99, 200, 31, 2, 77, 140]])


def w8a8_model(tiny, **settings):
    model, config = mlx_lm.utils.load_model(tiny)
    changed = q8_mlx.replace_linears(model, **settings)
    assert "model.layers.0.mlp.down_proj" in changed and "model.layers.1.self_attn.q_proj" in changed
    if settings["activation"] not in ("token", "tile"):
        with q8_mlx.observing(model):
            mx.eval(model(TOKENS))
    return model, config


@pytest.mark.parametrize("activation", q8.ACTIVATIONS)
def test_a_model_survives_the_disk_and_mlx_lm_reads_the_same_weights(tiny, tmp_path, activation):
    model, config = w8a8_model(tiny, activation=activation, bias_a=True)
    layer = model.model.layers[0].self_attn.q_proj
    weight, scales = np.array(layer.weight), np.array(layer.packed.scales)
    layer.bias_a = mx.full(layer.bias_a.shape, 0.25)
    want = model(TOKENS)
    save(model, mlx_lm.utils.load_tokenizer(tiny), config, tmp_path / "m")
    assert np.array_equal(model(TOKENS), want)  # saving packs the layers and takes nothing from them

    ours, _, read = mlxq.load(tmp_path / "m", return_config=True)
    again = ours.model.layers[0].self_attn.q_proj
    assert type(again) is q8_mlx.Q8Linear and again.settings.activation == activation
    assert again.per_row == (activation not in ("tile", "static_tile"))
    assert np.array_equal(ours(TOKENS), want)
    assert ours.training == again.training is False

    stock, _ = mlx_lm.load(str(tmp_path / "m"))
    stock_layer = stock.model.layers[0].self_attn.q_proj
    assert type(stock_layer) is mlx_nn.QuantizedLinear and stock_layer.bits == 8
    fmt = {"group_size": stock_layer.group_size, "bits": 8}
    floats = mx.dequantize(stock_layer.weight, stock_layer.scales, stock_layer.biases, **fmt)
    assert np.abs(np.array(floats) - weight).max() <= 0.501 * scales.max()
    save(ours, mlx_lm.utils.load_tokenizer(tiny), read, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "m" / "config.json").read_text()
    first, second = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("m", "again"))
    assert set(first) == set(second) and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_quantized_model_takes_8_bit_activations_as_it_is(tiny, tmp_path):
    mlx_lm.convert(str(tiny), str(tmp_path / "q4"), quantize=True, q_group_size=32)
    model, tokenizer, config = mlxq.load(tmp_path / "q4", return_config=True)
    exact = np.array(model(TOKENS))
    q8_mlx.replace_linears(model, activation="token")
    want = np.array(model(TOKENS))
    assert 1e-4 < np.linalg.norm(want - exact) / np.linalg.norm(exact) < 0.05
    save(model, tokenizer, config, tmp_path / "w4a8")
    again, _ = mlxq.load(tmp_path / "w4a8")
    assert np.array_equal(again(TOKENS), want)
    stock, _ = mlx_lm.load(str(tmp_path / "w4a8"))
    assert np.linalg.norm(np.array(stock(TOKENS)) - exact) < 1e-4 * np.linalg.norm(exact)


def test_a_loaded_model_takes_adapters_of_mlx_lm_and_trains_them(tiny, tmp_path):
    model, config = w8a8_model(tiny, activation="token")
    save(model, mlx_lm.utils.load_tokenizer(tiny), config, tmp_path / "m")
    model, _ = mlxq.load(tmp_path / "m")
    want = model(TOKENS)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    adapter = model.model.layers[1].mlp.down_proj
    assert isinstance(adapter, LoRALinear) and type(adapter.linear) is q8_mlx.Q8Linear
    assert mx.array_equal(model(TOKENS), want)  # an adapter begins with zeros
    trained = dict(mlx.utils.tree_flatten(model.trainable_parameters()))
    assert len(trained) == 28 and all("lora" in name for name in trained)

    def loss(model):
        return mlx_nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).mean()

    optimizer, losses = mlx.optimizers.Adam(1e-2), []
    for _ in range(8):
        value, gradients = mlx_nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    fused = adapter.fuse(dequantize=True)
    x = mx.array(normal(3, fused.weight.shape[1], seed=91))
    error = mx.linalg.norm(fused(x) - adapter(x)) / mx.linalg.norm(adapter(x))
    assert error < 0.02  # 8-bit inputs


@pytest.mark.parametrize("static", [False, True])
def test_a_file_converted_by_a_rule_with_tiles_holds_the_layers_of_the_live_model(tiny, tmp_path, static):
    rule = ".*_proj=weight_qtype:int8,act_qtype:int8,tile_size:32" + ",act_static_scale:true" * static
    stats = None
    (tmp_path / "text.txt").write_text("One text, a few words long, for the ranges of the inputs. " * 40)
    of = {"calibration": tmp_path / "text.txt"} if static else {}
    mlxq.convert.convert(tiny, tmp_path / "m", rules=[rule], progress=False, **of)
    loaded, _ = mlxq.load(tmp_path / "m")
    if static:
        stats = Statistics.load(tmp_path / "m" / mlxq.convert.STATISTICS)
    live = quantize_model(mlx_lm.utils.load_model(tiny)[0], [rule], stats)
    kind = "static_tile" if static else "tile"
    shown = {layer.stored for layer in inspect(tmp_path / "m").layers if "inputs" in layer.stored}
    assert shown == {f"8-bit/32 + int8 {kind.replace('_', ' ')} inputs"}
    for have, want in zip(loaded.model.layers, live.model.layers, strict=True):
        have, want = have.mlp.down_proj, want.mlp.down_proj
        x = mx.array(normal(3, want.packed.K, seed=81))
        assert have.settings.activation == want.settings.activation == kind
        assert mx.array_equal(have(x), want(x))


def test_what_cannot_be_saved_or_restored_names_the_layer(tiny, tmp_path):
    model, config = mlx_lm.utils.load_model(tiny)
    tokenizer = mlx_lm.utils.load_tokenizer(tiny)
    with pytest.raises(ValueError, match="save: the model has no Q8Linear layer"):
        save(model, tokenizer, config, tmp_path / "m")
    q8_mlx.replace_linears(model, activation="static")
    with pytest.raises(ValueError, match="save: .*_proj has the activation scale nan; wanted a positive"):
        save(model, tokenizer, config, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with q8_mlx.observing(model):
        mx.eval(model(TOKENS))
    save(model, tokenizer, config, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    good, layer = json.loads(path.read_text()), "model.layers.0.mlp.up_proj"
    for entry, words in (
        ({"lm_tail": {"activation": "token"}}, "lm_tail, which is no layer"),
        ({"model.norm": {"activation": "token"}}, "model.norm, which is a RMSNorm"),
        ({layer: {"activation": "static"}}, f"{layer} has .* wanted scale_a"),
        ({layer: {"activation": "static_tile", "scale_a": 0.1}}, f"{layer} has .* a list for static_tile"),
        ({layer: {"activation": "static_tile", "scale_a": [0.1] * 9}}, f"{layer}: .* has 9 numbers; wanted"),
        ({layer: {"activation": "row", "scale_a": 1.0}}, f"{layer}: .*'row' does not exist"),
        ({layer: 4}, f"{layer} is 4; wanted an object"),
    ):
        path.write_text(json.dumps(good | {"activation_quantization": entry}))
        with pytest.raises(ValueError, match=f"load: activation_quantization .*{words}"):
            mlxq.load(tmp_path / "m")
