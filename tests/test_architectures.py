"""Every architecture runs on our layers: a tiny random model of each, through mlx-lm's own model code."""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import afm7, deepseek_v3
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from tiny_models import ARCHITECTURES, VOCAB, make_hf_model

import mlxq
from mlxq.convert import convert
from mlxq.nn import mlx as layers

OURS = (
    layers.QuantizedLinear,
    layers.QuantizedEmbedding,
    layers.QuantizedSwitchLinear,
    layers.QuantizedMultiLinear,
)
STOCK = nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear
PROMPT = np.random.default_rng(1).integers(3, VOCAB, 70)  # long enough for mlx-lm to sort tokens by expert


def quantized_layers(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, STOCK)}


def tolerance(model):
    """Relative error that two float32 runs may differ by: the bar of one product, for each product, twice."""
    return 2 * 1e-5 * len(quantized_layers(model))


def difference(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def logits(model, tokens=PROMPT):
    return np.array(model(mx.array(tokens)[None]).astype(mx.float32))[0]


def in_float32(model):
    model.set_dtype(mx.float32)
    return model


def margins(model, prompt, count):
    """Greedy tokens, and the smallest lead of a chosen token over the second best."""
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    tokens, leads, ids = [], [], mx.array(prompt)[None]
    for _ in range(count):
        last = np.array(model(ids, cache=cache)[0, -1])
        second, best = np.partition(last, -2)[-2:]
        tokens.append(int(last.argmax()))
        leads.append(best - second)
        ids = mx.array([[tokens[-1]]])
    return tokens, min(leads)


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Without mx.compile, whose calls of the C++ compiler for mlx-lm's own functions take seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory):
    """(stock model, our model, tokenizer) of one architecture in float32, from one converted folder."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = make_hf_model(request.param, folder / "hf", "float32", seed=3)
    convert(hf, folder / "mlx", bits=4, group_size=32)
    stock, tokenizer = mlx_lm.load(str(folder / "mlx"))
    model, _ = mlxq.load(folder / "mlx")
    return in_float32(stock), in_float32(model), tokenizer


def test_every_quantized_layer_is_ours(pair):
    stock, model, _ = pair
    want, got = quantized_layers(stock), quantized_layers(model)
    assert list(got) == list(want) and len(got) >= 9
    assert all(isinstance(layer, OURS) for layer in got.values())


def test_logits_equal_stock_in_float32(pair):
    stock, model, _ = pair
    want = logits(stock)
    assert want.std() > 0.05  # the model says something
    assert difference(logits(model), want) < tolerance(model)


def test_greedy_generation_equals_stock(pair):
    stock, model, tokenizer = pair
    want, lead = margins(stock, PROMPT[:9], 8)
    assert (
        lead > 4 * tolerance(model) * np.abs(logits(stock, PROMPT[:9])).max()
    )  # no tie that rounding decides
    assert margins(model, PROMPT[:9], 8)[0] == want
    answers = [
        mlx_lm.generate(m, tokenizer, prompt=PROMPT[:9].tolist(), max_tokens=8, verbose=False)
        for m in (stock, model)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "gemma3_text", "phi3", "olmo2"]
)  # no router that rounding flips
def test_bfloat16_logits_are_nearer_the_truth_than_stock(arch, tmp_path):
    hf = make_hf_model(arch, tmp_path / "hf", "bfloat16", seed=3)
    convert(hf, tmp_path / "mlx", bits=4, group_size=32)
    stock, _ = mlx_lm.load(str(tmp_path / "mlx"))
    model, _ = mlxq.load(tmp_path / "mlx")
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.uint32, mx.bfloat16}
    stock, got = logits(stock), logits(model)
    truth = logits(in_float32(model))
    # One product's bar in bfloat16, for every product, adding up like independent errors.
    assert difference(got, truth) < 8e-3 * len(quantized_layers(model)) ** 0.5
    assert difference(got, truth) < 0.5 * difference(stock, truth)


def test_each_layer_keeps_its_own_format(tmp_path):
    hf = make_hf_model("llama", tmp_path / "hf", "float32", seed=3)
    rules = [
        "model/layers/0/self_attn/.*=bits:8,group_size:32",
        "model/layers/0/mlp/up_proj=bits:3,group_size:128",
        "model/layers/1/mlp/.*=bits:2,group_size:64",
        "lm_head=bits:none",
    ]
    convert(hf, tmp_path / "mlx", bits=4, group_size=64, rules=rules, embedding_bits=6)
    stock, model = (
        in_float32(m[0]) for m in (mlx_lm.load(str(tmp_path / "mlx")), mlxq.load(tmp_path / "mlx"))
    )
    formats = {path: (m.bits, m.group_size) for path, m in quantized_layers(model).items()}
    assert formats == {path: (m.bits, m.group_size) for path, m in quantized_layers(stock).items()}
    assert formats["model.layers.0.self_attn.q_proj"] == (8, 32)
    assert formats["model.layers.0.mlp.up_proj"] == (3, 128)
    assert formats["model.layers.0.mlp.gate_proj"] == (4, 64)
    assert formats["model.layers.1.mlp.down_proj"] == (2, 64)
    assert formats["model.embed_tokens"] == (6, 64)
    assert type(model.lm_head) is nn.Linear
    assert difference(logits(model), logits(stock)) < tolerance(model)


def test_a_mixed_recipe_of_mlx_lm_loads(tmp_path):
    hf = make_hf_model("llama", tmp_path / "hf", "float32", seed=3)
    mlx_lm.convert(
        str(hf), str(tmp_path / "mlx"), quantize=True, q_group_size=64, quant_predicate="mixed_3_6"
    )
    stock, model = (
        in_float32(m[0]) for m in (mlx_lm.load(str(tmp_path / "mlx")), mlxq.load(tmp_path / "mlx"))
    )
    assert {m.bits for m in quantized_layers(model).values()} == {3, 6}
    assert all(isinstance(m, OURS) for m in quantized_layers(model).values())
    assert difference(logits(model), logits(stock)) < tolerance(model)


SLIDING_WINDOW = ("gemma3_text",)  # mlx-lm cannot quantize its cache


@pytest.mark.parametrize("pair", [a for a in ARCHITECTURES if a not in SLIDING_WINDOW], indirect=True)
def test_quantized_key_value_cache_generates_as_stock(pair):
    stock, model, tokenizer = pair
    arguments = {"prompt": PROMPT[:9].tolist(), "max_tokens": 6, "kv_bits": 8, "kv_group_size": 32}
    want, got = (mlx_lm.generate(m, tokenizer, **arguments) for m in (stock, model))
    assert got == want


def built(model):
    """(stock, ours) of a model made from its arguments, with the same random weights."""
    mx.random.seed(11)
    model.update(
        tree_unflatten([(n, 0.1 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())])
    )
    # A dict, for afm7's layer does not take the mode that nn.quantize would add.
    own_format = {"group_size": 32, "bits": 4}
    nn.quantize(model, class_predicate=lambda _, m: own_format if hasattr(m, "to_quantized") else False)
    return model, layers.adopt(copy.deepcopy(model))


def test_latent_attention_with_a_matrix_per_head_equals_stock():
    arguments = deepseek_v3.ModelArgs(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_rope_head_dim=32,
        v_head_dim=32,
        qk_nope_head_dim=32,
        first_k_dense_replace=1,
    )
    stock, model = built(deepseek_v3.Model(arguments))
    assert isinstance(model.layers[0].self_attn.embed_q, layers.QuantizedMultiLinear)
    assert difference(logits(model), logits(stock)) < tolerance(model)  # the prompt takes one orientation ...
    assert margins(model, PROMPT[:5], 4)[0] == margins(stock, PROMPT[:5], 4)[0]  # ... and decoding the other


def test_an_architecture_with_its_own_quantized_layer_equals_stock():
    arguments = afm7.ModelArgs("afm7", VOCAB, 128, 2, 1, 4, 2, hidden_dim_scale_factor=2.0)
    stock, model = built(afm7.Model(arguments))
    fused = [m for m in model.modules() if isinstance(m, afm7.FusedQuantizedLinear)]
    assert fused and all(isinstance(m, layers.QuantizedLinear) for m in fused)
    assert difference(logits(model), logits(stock)) < tolerance(model)
