"""What quantization-aware training converts, saved: mlx-lm reads the weights, mlxq how inputs are rounded."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

import mlxq
from mlxq import bridge, qat
from mlxq.checkpoint.summary import inspect
from mlxq.checkpoint.trained import KEY, save
from mlxq.qat import mlx as qm
from mlxq.qat.config import activation_from_json, activation_to_json

FRAMEWORKS = ["torch", "mlx"]
IDS = np.array([[5, 9, 300, 17, 2, 80, 41, 7]])
QUANTIZERS = {
    "8da4w": lambda side: side.Int8DynActInt4WeightQATQuantizer(64),
    "int4 weights": lambda side: side.Int4WeightOnlyQATQuantizer(64),
    "float8, int4 weights": lambda side: side.Float8ActInt4WeightQATQuantizer(64),
    "int4 embedding": lambda side: side.Int4WeightOnlyEmbeddingQATQuantizer(64),
    "embedding and 8da4w": lambda side: side.ComposableQATQuantizer(
        [side.Int4WeightOnlyEmbeddingQATQuantizer(32), side.Int8DynActInt4WeightQATQuantizer(128)]
    ),
}
ROUNDED = {"8da4w": 15, "float8, int4 weights": 15, "embedding and 8da4w": 15}  # linear layers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_hf_model("llama", tmp_path_factory.mktemp("llama") / "float")


def side_of(framework):
    if framework == "mlx":
        return qm
    pytest.importorskip("torch", reason="needs the package torch")
    from mlxq.qat import torch as side

    return side


def loaded(framework, folder):
    if framework == "mlx":
        return mlx_lm.load(str(folder))[0]
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def logits(model) -> np.ndarray:
    if isinstance(model, nn.Module):
        return bridge.to_numpy(model(mx.array(IDS)).astype(mx.float32))
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def rounding(model, enabled: bool) -> int:
    """Turn the rounding of inputs on or off; how many layers have it."""
    found = [
        q for _, m in model.named_modules() if (q := getattr(m, "activation_quantizer", None)) is not None
    ]
    for quantizer in found:
        quantizer.enabled = enabled
    return len(found)


def distance(a, b) -> float:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_converted_model_is_saved_and_runs_in_mlx_lm_and_as_it_trained_in_mlxq(
    llama, tmp_path, framework, name
):
    quantizer, model = QUANTIZERS[name](side_of(framework)), loaded(framework, llama)
    plain = logits(model)
    trained = logits(quantizer.prepare(model))
    model = quantizer.convert(model)
    as_trained = logits(model)
    mlxq.save(model, llama, tmp_path / "saved")

    assert rounding(model, False) == ROUNDED.get(name, 0)
    weights_alone = logits(model)
    stock, tokenizer = mlx_lm.load(str(tmp_path / "saved"))
    assert distance(logits(stock), weights_alone) < 1e-4 and tokenizer.encode("the")
    assert distance(weights_alone, plain) > 1e-2

    # Sums in another order, by which an input may round the other way: in float8 that is up to 6 % of it.
    tolerance = max(1e-4, 0.5 * distance(weights_alone, as_trained))
    ours, _ = mlxq.load(tmp_path / "saved")
    assert rounding(ours, True) == ROUNDED.get(name, 0)
    assert distance(logits(ours), as_trained) < (1e-6 if framework == "mlx" else tolerance)
    assert distance(as_trained, trained) < tolerance
    if name in ROUNDED:
        assert distance(weights_alone, as_trained) > 1e-3
        block = json.loads((tmp_path / "saved" / "config.json").read_text())[KEY]
        assert set(block) >= {"lm_head", "model.layers.1.mlp.down_proj"} and len(block) == ROUNDED[name]
        shown = {layer.path: layer.stored for layer in inspect(tmp_path / "saved").layers}
        dtype = block["model.layers.1.mlp.down_proj"]["dtype"]
        assert shown["model/layers/1/mlp/down_proj"].endswith(f" + {dtype} inputs")
    if framework == "torch":
        there, _ = mlxq.load_torch(tmp_path / "saved")
        assert rounding(there, True) == ROUNDED.get(name, 0)
        assert distance(logits(there), as_trained) < 1e-6


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_no_converted_model_is_refused_by_the_name_of_the_layer(llama, tmp_path, framework):
    side, model = side_of(framework), loaded(framework, llama)
    with pytest.raises(ValueError, match="no packed layer; convert it first"):
        save(model, llama, tmp_path / "saved")
    quantizer = side.Int8DynActInt4WeightQATQuantizer(64)
    model = quantizer.prepare(model)
    with pytest.raises(
        ValueError, match="(lm_head|self_attn.*) is fake-quantized still; convert the model first"
    ):
        save(model, llama, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model = quantizer.convert(model)
    save(model, llama, tmp_path / "saved")
    with pytest.raises(FileExistsError):
        save(model, llama, tmp_path / "saved")
    save(model, llama, tmp_path / "saved", overwrite=True)


def test_a_float_head_on_a_packed_table_is_refused(tmp_path):
    side = side_of("torch")
    make_hf_model("qwen2", tmp_path / "tied")
    quantizer, model = side.Int4WeightOnlyEmbeddingQATQuantizer(64), loaded("torch", tmp_path / "tied")
    model = quantizer.convert(quantizer.prepare(model))
    with pytest.raises(ValueError, match="shares the table model.embed_tokens in the file"):
        save(model, tmp_path / "tied", tmp_path / "saved")


@pytest.mark.parametrize(
    "block, says",
    [
        ([], None),
        ("all", "wanted an object"),
        ({"model.layers.9.mlp.up_proj": {"dtype": "int8", "granularity": "per_token"}}, "which is no layer"),
        ({"model.norm": {"dtype": "int8", "granularity": "per_token"}}, "which is a RMSNorm"),
        ({"lm_head": {"dtype": "int9", "granularity": "per_token"}}, "lm_head: .*int9"),
        ({"lm_head": {"dtype": "int8", "granularity": "per_channel"}}, "no output channels"),
        ({"lm_head": {"dtype": "int8", "group_size": 96}}, "lm_head, K=128 is not a multiple"),
        ({"lm_head": {"dtype": "int8", "colour": "red"}}, "says no rounding"),
        ({"lm_head": 8}, "says no rounding"),
    ],
)
def test_rounding_that_does_not_exist_is_refused_when_it_is_loaded(llama, tmp_path, block, says):
    quantizer, model = qm.Int4WeightOnlyQATQuantizer(64), loaded("mlx", llama)
    save(quantizer.convert(quantizer.prepare(model)), llama, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: block}))
    if says is None:
        mlxq.load(tmp_path / "saved")
        return
    with pytest.raises(ValueError, match=says):
        mlxq.load(tmp_path / "saved")


@pytest.mark.parametrize(
    "config",
    [
        qat.IntxFakeQuantizeConfig("int8", "per_token", is_symmetric=False, eps=2.0**-23),
        qat.IntxFakeQuantizeConfig("int4", group_size=32, scale_precision=None),
        qat.Float8FakeQuantizeConfig("float8_e5m2", "per_tensor", hp_value_ub=3.0),
    ],
    ids=str,
)
def test_every_rounding_of_inputs_survives_json(config):
    assert activation_from_json(json.loads(json.dumps(activation_to_json(config)))) == config
