"""mlx-lm's own adapters, fusing and saving take a model with our layers for a stock one."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers
from mlx_lm.utils import dequantize_model, save
from tiny_models import VOCAB, make_hf_model

import mlxq
from mlxq.nn import mlx as layers

TOKENS = mx.array(np.random.default_rng(2).integers(3, VOCAB, (2, 40)))  # 80 tokens: experts are sorted
TOLERANCE = 2 * 1e-5 * 25  # the bar of one product for each of a model's products, twice
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def difference(got, want):
    got, want = (np.asarray(a.astype(mx.float32), np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def folder(request, tmp_path_factory):
    """A quantized model with biases and a tied embedding, and one with experts; float32, 4-bit/32."""
    path = tmp_path_factory.mktemp(request.param)
    make_hf_model(request.param, path / "hf", "float32", seed=5)
    mlx_lm.convert(str(path / "hf"), str(path / "mlx"), quantize=True, q_group_size=32)
    return path / "mlx"


@pytest.fixture
def pair(folder):
    """(stock model, our model), freshly loaded."""
    return mlx_lm.load(str(folder))[0], mlxq.load(folder)[0]


def add_adapters(model, seed=None, keys=None, **kwargs):
    """Adapters on a frozen model; with a seed their values are random in place of the neutral start."""
    model.freeze()
    linear_to_lora_layers(model, 2, LORA | ({"keys": keys} if keys else {}), **kwargs)
    if seed is not None:
        rng = np.random.default_rng(seed)
        random = tree_map_with_path(
            lambda name, a: (
                mx.array(0.1 * rng.standard_normal(a.shape, dtype=np.float32))
                if name.endswith(("lora_a", "lora_b"))
                else a
            ),
            model.trainable_parameters(),
        )
        model.update(random)
    return model


def fuse(model, dequantize=False):
    """As mlx_lm.fuse does it."""
    fused = [(n, m.fuse(dequantize=dequantize)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return model


def names(model):
    return [(name, value.shape) for name, value in tree_flatten(model.parameters())]


def test_adapters_wrap_the_same_layers_as_in_stock(pair):
    stock, model = (add_adapters(m, 1) for m in pair)
    assert names(model) == names(stock)
    assert [n for n, _ in tree_flatten(model.trainable_parameters())] == [
        n for n, _ in tree_flatten(stock.trainable_parameters())
    ]
    wrapped = [m for _, m in model.named_modules() if isinstance(m, LoRALinear | LoRASwitchLinear)]
    ours = layers.QuantizedLinear, layers.QuantizedSwitchLinear
    assert len(wrapped) >= 14 and all(isinstance(m.linear, ours) for m in wrapped)
    assert difference(model(TOKENS), stock(TOKENS)) < TOLERANCE


def test_adapters_on_an_embedding_equal_stock(pair):
    stock, model = (add_adapters(m, 1, keys=["model.embed_tokens"]) for m in pair)
    assert type(model.model.embed_tokens) is LoRAEmbedding
    assert type(model.model.embed_tokens.embedding) is layers.QuantizedEmbedding
    assert difference(model(TOKENS), stock(TOKENS)) < TOLERANCE


def test_dora_equals_stock(pair):
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    stock, model = (add_adapters(m, 1, keys=keys, use_dora=True) for m in pair)
    assert isinstance(model.layers[0].self_attn.q_proj, DoRALinear)
    assert difference(model(TOKENS), stock(TOKENS)) < TOLERANCE


def loss(model):
    return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:], reduction="mean")


def test_adapter_gradients_equal_stock(pair):
    (_, want), (_, got) = (nn.value_and_grad(add_adapters(m, 1), lambda m=m: loss(m))() for m in pair)
    got, want = dict(tree_flatten(got)), dict(tree_flatten(want))
    assert list(got) == list(want) and len(got) >= 28
    for name in want:
        assert difference(got[name], want[name]) < 2 * TOLERANCE, name  # forward and back


def test_training_adapters_lowers_the_loss_and_leaves_codes_alone(folder):
    model = add_adapters(mlxq.load(folder)[0])
    model.train()
    before = {n: mx.array(a) for n, a in tree_flatten(model.parameters()) if "lora" not in n}
    optimizer, step = optim.Adam(3e-3), nn.value_and_grad(model, lambda: loss(model))
    history = []
    for _ in range(8):
        value, gradients = step()
        optimizer.update(model, gradients)
        history.append(value.item())
    assert history[-1] < history[0] - 0.3
    assert all(mx.array_equal(dict(tree_flatten(model.parameters()))[n], a) for n, a in before.items())


def test_dequantized_fuse_equals_the_adapted_model(pair):
    model = add_adapters(pair[1], 1)
    want = model(TOKENS)
    fuse(model, dequantize=True)
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear
    assert difference(model(TOKENS), want) < TOLERANCE


def test_quantized_fuse_equals_stock_bit_for_bit_and_is_adopted(pair):
    stock, model = (fuse(add_adapters(m, 1)) for m in pair)
    for (name, got), (_, want) in zip(
        tree_flatten(model.parameters()), tree_flatten(stock.parameters()), strict=True
    ):
        assert mx.array_equal(got, want), name
    assert type(layers.adopt(model).layers[0].self_attn.q_proj) is layers.QuantizedLinear
    assert difference(model(TOKENS), stock(TOKENS)) < TOLERANCE


def test_quantized_fuse_keeps_what_the_adapter_learned(pair):
    """Quantizing again costs about as much as it did before; losing the adapter costs several times that."""
    base, model = pair
    add_adapters(model, 1)
    want, without = model(TOKENS), base(TOKENS)
    assert difference(fuse(model)(TOKENS), want) < 0.5 * difference(without, want)


def test_removing_adapters_gives_the_model_back(pair):
    model = pair[1]
    want = model(TOKENS)
    keys = ["self_attn.q_proj"]
    assert mx.array_equal(remove_lora_layers(add_adapters(model, 1, keys=keys))(TOKENS), want)


def test_dequantized_model_equals_ours(pair):
    stock, model = pair
    want = model(TOKENS)
    dequantize_model(model)
    assert not any(isinstance(m, layers._AffineLayer) for m in model.modules())
    assert difference(model(TOKENS), want) < TOLERANCE
    assert difference(dequantize_model(stock)(TOKENS), want) < TOLERANCE


@pytest.mark.parametrize("fused", [False, True])
def test_what_mlx_lm_saves_of_ours_loads_in_both(folder, tmp_path, fused):
    model, tokenizer, config = mlxq.load(folder, return_config=True)
    if fused:
        model = fuse(add_adapters(model, 1))
    want, kept = model(TOKENS), names(model)
    save(tmp_path / "saved", folder, model, tokenizer, config, donate_model=False)
    stock, again = mlx_lm.load(str(tmp_path / "saved"))[0], mlxq.load(tmp_path / "saved")[0]
    assert names(stock) == names(again) == kept
    assert mx.array_equal(again(TOKENS), layers.adopt(model)(TOKENS))
    assert difference(stock(TOKENS), want) < TOLERANCE


def test_adapters_saved_from_ours_load_in_both(folder, tmp_path):
    model = add_adapters(mlxq.load(folder)[0], 1)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    again, _ = mlxq.load(folder, adapter_path=tmp_path)
    assert not any(module.training for module in again.modules())
    assert isinstance(again.layers[1].self_attn.o_proj.linear, layers.QuantizedLinear)
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    stock, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    assert difference(stock(TOKENS), model(TOKENS)) < TOLERANCE


def test_size_in_bits_per_weight_equals_stock(pair):
    stock, model = pair
    assert mlx_lm.utils.compute_bits_per_weight(model) == mlx_lm.utils.compute_bits_per_weight(stock)
