"""MPQLinear for MLX against float64 autograd, the formulas of the checkpoint, and stock MLX."""

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from test_mpq import MODES, K, N, random_tensors, shuffled, spec_weight

import mlxq.nn.mlx
from mlxq.format import Format
from mlxq.nn.mpq import Layout
from mlxq.nn.mpq.mlx import MPQLinear, collect_layers, freeze_words, pack_layers, prepare_layers


def layer_of(layout, tensors, bias=None, prepare=True, **kwargs) -> MPQLinear:
    layer = MPQLinear(
        layout.in_channels, layout.out_channels, w_bit=layout.w_bit, group_size=layout.group_size,
        use_gba_quant=layout.use_gba_quant, dq_group_size=layout.dq_group_size, dq_mode=layout.dq_mode,
        asym=layout.asym, gptq_version=layout.gptq_version, disable_bias=bias is None, **kwargs,
    )  # fmt: skip
    arrays = {name: mx.array(t) for name, t in tensors.items()}
    if bias is not None:
        arrays["bias"] = mx.array(bias)
    layer.load_weights(list(arrays.items()), strict=False)  # the names are the checkpoint's
    if prepare:
        layer.prepare_params()
    return layer


@pytest.mark.parametrize("mode", MODES)
def test_products_and_both_gradients_are_those_of_float64(mode):
    layout = Layout(K, N, 4, 64, **MODES[mode])
    tensors = random_tensors(layout, g_idx=shuffled(K, 64) if mode != "gba" else None)
    bias = np.arange(N, dtype=np.float32)
    layer = layer_of(layout, tensors, bias)
    W = torch.from_numpy(spec_weight(layout, tensors)).requires_grad_()
    for shape in ((K,), (5, K), (2, 3, K)):
        x = np.random.default_rng(1).standard_normal(shape)
        wanted_x = torch.from_numpy(x).requires_grad_()
        W.grad = None
        y = wanted_x @ W + torch.from_numpy(bias)
        y.sin().sum().backward()
        x32 = mx.array(x.astype(np.float32))
        found = np.array(layer(x32))
        assert np.linalg.norm(found - y.detach().numpy()) < 1e-5 * y.norm()
        dx = np.array(mx.grad(lambda x: mx.sin(layer(x)).sum())(x32))
        # the sine's argument is bias + product: its float32 rounding, 2^-24 of 96, is in the cosine
        assert np.linalg.norm(dx - wanted_x.grad.numpy()) < 3e-5 * wanted_x.grad.norm()
        gradients = nn.value_and_grad(layer, lambda layer: mx.sin(layer(x32)).sum())(layer)[1]  # noqa: B023
        assert list(gradients) == ["handle"]
        privileged = np.array(gradients["handle"])
        assert privileged.shape == (K, N)
        assert np.linalg.norm(privileged - W.grad.numpy()) < 3e-5 * W.grad.norm()


def test_gradients_work_under_compile_and_frozen_layers_have_none():
    layout = Layout(K, N, 4, 64, dq_mode=0)
    layer, x = layer_of(layout, random_tensors(layout)), mx.random.normal((4, K))
    plain = nn.value_and_grad(layer, lambda layer: layer(x).square().sum())
    compiled = mx.compile(lambda: plain(layer)[1]["handle"])
    assert mx.allclose(compiled(), plain(layer)[1]["handle"])
    assert [name for name, _ in tree_flatten(layer.trainable_parameters())] == ["handle"]
    frozen = layer_of(layout, random_tensors(layout), requires_grad=False)
    assert not tree_flatten(frozen.trainable_parameters())
    frozen.unfreeze()
    assert not tree_flatten(frozen.trainable_parameters())
    layer.unfreeze()
    assert [name for name, _ in tree_flatten(layer.trainable_parameters())] == ["handle"]


@pytest.mark.parametrize("mode", MODES)
def test_prepared_twice_saved_and_loaded_a_layer_is_the_same(mode, tmp_path):
    layout = Layout(K, N, 4, 64, **MODES[mode])
    tensors = random_tensors(layout, g_idx=shuffled(K, 64))
    layer = layer_of(layout, tensors, np.ones(N, np.float16))
    y = np.array(layer(mx.eye(K)))
    weight = layer.weight
    layer.prepare_params()
    assert layer.weight is weight
    found = layer.checkpoint()
    assert set(found) == {*tensors, "bias"}
    for name, tensor in tensors.items():
        assert np.array_equal(np.array(found[name]), tensor), name
    mx.save_safetensors(str(tmp_path / "layer.safetensors"), found)
    other = layer_of(layout, random_tensors(layout, seed=4), np.zeros(N, np.float16))
    other.load_checkpoint(mx.load(str(tmp_path / "layer.safetensors")))
    assert np.array_equal(np.array(other(mx.eye(K))), y)


def test_bad_tensors_are_refused_before_anything_changes():
    layout = Layout(K, N, 4, 64)
    tensors = random_tensors(layout)
    tensors["g_idx"] = np.zeros(K, np.int32) + np.arange(K, dtype=np.int32) % 3
    layer = layer_of(layout, tensors, prepare=False)
    before = set(layer.parameters())
    with pytest.raises(ValueError, match="g_idx puts 86 rows into group 0"):
        layer.prepare_params()
    assert set(layer.parameters()) == before and not layer.prepared
    with pytest.raises(RuntimeError, match="prepare_params"):
        layer(mx.zeros((1, K)))
    good = layer_of(layout, random_tensors(layout))
    y = np.array(good(mx.eye(K)))
    with pytest.raises(ValueError, match="g_idx puts 86 rows"):
        good.load_checkpoint({name: mx.array(t) for name, t in tensors.items()})
    assert np.array_equal(np.array(good(mx.eye(K))), y)
    with pytest.raises(ValueError, match=r"x has shape \(2, 100\)"):
        good(mx.zeros((2, 100)))
    with pytest.raises(ValueError, match="a_bit is 8"):
        MPQLinear(K, N, a_bit=8)
    with pytest.raises(TypeError, match="dtype is mlx.core.int8"):
        MPQLinear(K, N, dtype=mx.int8)


def test_models_are_packed_trained_layers_return_to_mlx_and_stock_mlx_agrees():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))
    x = mx.random.normal((5, 64))
    assert sorted(pack_layers(model, Format(4, 32))) == ["layers.0", "layers.2"]
    assert set(collect_layers(model)) == {"layers.0", "layers.2"} and prepare_layers(model) is model
    y = np.array(model(x))
    assert sorted(freeze_words(model)) == ["layers.0", "layers.2"]
    assert all(type(model.layers[i]) is mlxq.nn.mlx.QuantizedLinear for i in (0, 2))
    stock = nn.QuantizedLinear(64, 96, bias=True, group_size=32, bits=4)
    first = model.layers[0]
    stock.weight, stock.scales, stock.biases, stock.bias = (
        first.weight,
        first.scales,
        first.biases,
        first.bias,
    )
    hidden = np.maximum(np.array(stock(x)), 0)
    w = np.array(mx.dequantize(*(model.layers[2][n] for n in ("weight", "scales", "biases")), 32, 4))
    assert np.linalg.norm(hidden @ w.T - y) < 1e-5 * np.linalg.norm(y)
    assert len(pack_layers(model, Format(2, 32))) == 2  # packed layers keep their words
    assert np.array_equal(np.array(model(x)), y) and model.layers[0].w_bit == 4
    layout = Layout(K, N, 4, 64, use_gba_quant=False)
    ordered = nn.Sequential(layer_of(layout, random_tensors(layout, g_idx=shuffled(K, 64))))
    with pytest.raises(ValueError, match="layers.0 has act-order"):
        freeze_words(ordered)


def test_both_frameworks_offer_their_trained_layers_beside_the_others():
    import mlxq.nn.mpq.torch
    import mlxq.nn.q8.mlx
    import mlxq.nn.q8.torch
    import mlxq.nn.torch

    for beside, mpq, q8 in (
        (mlxq.nn.mlx, mlxq.nn.mpq.mlx, mlxq.nn.q8.mlx),
        (mlxq.nn.torch, mlxq.nn.mpq.torch, mlxq.nn.q8.torch),
    ):
        for name in ("MPQLinear", "prepare_layers", "pack_layers", "collect_layers", "freeze_words"):
            assert getattr(beside, name) is getattr(mpq, name)
        assert beside.Q8Linear is q8.Q8Linear


MODULES = ("nn.mlx", "nn.torch", "nn.mpq.mlx", "nn.mpq.torch", "nn.q8.mlx", "nn.q8.torch")


@pytest.mark.parametrize("module", MODULES)
def test_each_module_of_layers_is_imported_first(module):
    """A cycle of imports shows only in the order that nobody tried."""
    code = f"import mlxq.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
