import importlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_hf_model

import mlxq.load
from mlxq import ops
from mlxq.checkpoint.summary import inspect as inspect_model
from mlxq.nn import mlx as layers


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    return make_hf_model("llama", tmp_path_factory.mktemp("float") / "model", "float32", seed=4)


@pytest.fixture(scope="module")
def quantized(float_model, tmp_path_factory):
    """A folder as mlx-community's are: written by mlx_lm.convert."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    mlx_lm.convert(str(float_model), str(folder), quantize=True, q_group_size=32)
    return folder


@pytest.fixture
def damaged(quantized, tmp_path):
    """A copy of the quantized folder that a test may spoil."""
    return Path(shutil.copytree(quantized, tmp_path / "model"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(folder, change):
    path = str(folder / "model.safetensors")
    weights = {name: mx.array(np.array(value)) for name, value in mx.load(path).items()}
    change(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})


def test_load_takes_the_arguments_of_mlx_lm():
    ours, stock = (inspect.signature(f).parameters for f in (mlxq.load.load, mlx_lm.load))
    assert list(ours)[1:] == list(stock)[1:]
    assert [p.default for p in ours.values()] == [p.default for p in stock.values()]


def test_load_is_callable_before_and_after_its_module_is_imported(quantized, monkeypatch):
    for name in ("mlxq.load", "mlxq"):
        monkeypatch.delitem(sys.modules, name)
    package = importlib.import_module("mlxq")
    assert callable(package.load)
    importlib.import_module("mlxq.load")
    model, _ = package.load(quantized)
    assert type(model.lm_head).__name__ == "QuantizedLinear"


def test_load_puts_our_layers_in_place(quantized):
    model, tokenizer = mlxq.load(quantized)
    assert type(model.model.embed_tokens) is layers.QuantizedEmbedding
    assert type(model.model.layers[1].mlp.down_proj) is layers.QuantizedLinear
    assert not model.training and model.trainable_parameters()["lm_head"] == {}
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_load_returns_config_and_honours_model_config(quantized):
    model, _, config = mlxq.load(quantized, return_config=True, model_config={"rms_norm_eps": 0.5})
    assert config["quantization"]["group_size"] == 32
    assert model.model.norm.eps == 0.5


def test_tokenizer_config_reaches_the_tokenizer(quantized):
    _, tokenizer = mlxq.load(quantized, tokenizer_config={"eos_token": "<|endoftext|>"})
    assert tokenizer.eos_token == "<|endoftext|>"


def test_lazy_load_reads_no_weights(quantized, damaged):
    mx.clear_cache()
    before = mx.get_active_memory()
    model, _ = mlxq.load(damaged, lazy=True)
    assert mx.get_active_memory() - before < 2**14
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > 2**16


def test_huge_pages_are_asked_for_every_array_that_was_read(quantized, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "advise_huge_pages", asked.extend)
    model, _ = mlxq.load(quantized)
    assert len(asked) == len(tree_flatten(model.parameters()))
    asked.clear()
    mlxq.load(quantized, lazy=True)
    assert asked == []


def test_layers_of_other_modes_stay_stock(float_model, tmp_path):
    mlx_lm.convert(str(float_model), str(tmp_path / "m"), quantize=True, q_mode="mxfp4")
    model, _ = mlxq.load(tmp_path / "m")
    assert type(model.lm_head) is nn.QuantizedLinear and model.lm_head.mode == "mxfp4"


@pytest.mark.parametrize("path", ["./nothing/here", "/nothing", "~/no/such", "a/b/c", "nothing/", "my.gguf"])
def test_a_path_that_does_not_exist_is_named_and_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(mlx_lm.utils, "_download", None)  # calling it would be a TypeError
    with pytest.raises(FileNotFoundError, match=f"^load: {path} does not exist$"):
        mlxq.load(path)


@pytest.mark.parametrize("name", ["mlx-community/no-such-model", "no-such-model"])
def test_a_hub_id_without_a_network_is_one_error(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=f"^load: {name} is neither a folder nor a model that .* hub gave"
    ):
        mlxq.load(name)


def test_a_gguf_is_sent_to_convert(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for path in (gguf, tmp_path):
        with pytest.raises(ValueError, match=f"GGUF.*convert it first: mlxq convert {gguf} DST"):
            mlxq.load(path)


def test_a_float_folder_is_sent_to_convert(float_model):
    with pytest.raises(
        ValueError, match=f"^load: .* float weights; convert it first: mlxq convert {float_model} DST$"
    ):
        mlxq.load(float_model)


def test_pytorch_weights_are_sent_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="PyTorch weights; convert it first"):
        mlxq.load(tmp_path)


def test_a_file_that_is_no_model_is_refused(damaged):
    with pytest.raises(ValueError, match="config.json is a file; wanted a model folder"):
        mlxq.load(damaged / "config.json")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^load: {tmp_path} has no config.json$"):
        mlxq.load(tmp_path)


def test_a_folder_without_weights_is_refused(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.*safetensors$"):
        mlxq.load(damaged)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list; wanted an object")]
)
def test_a_broken_config_is_refused(damaged, text, message):
    (damaged / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        mlxq.load(damaged)


def test_a_config_without_model_type_is_refused(damaged):
    change_config(damaged, model_type=None)
    with pytest.raises(ValueError, match="config.json has no model_type"):
        mlxq.load(damaged)


def test_an_unknown_architecture_is_refused(damaged):
    change_config(damaged, model_type="perceptron9000")
    with pytest.raises(
        ValueError, match=r"^load: mlx-lm [\d.]+ cannot build .*: Model type perceptron9000 not"
    ):
        mlxq.load(damaged)


def test_a_config_that_lacks_a_dimension_is_refused(damaged):
    change_config(damaged, hidden_size=None)
    with pytest.raises(ValueError, match="cannot build .* 'hidden_size'"):
        mlxq.load(damaged)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 256}, {"num_hidden_layers": 3}, {"intermediate_size": 100}, {"vocab_size": 0}]
)
def test_a_config_that_lies_about_dimensions_is_refused(damaged, change):
    change_config(damaged, **change)
    with pytest.raises(ValueError, match="^load: mlx-lm .* cannot build"):
        mlxq.load(damaged)


@pytest.mark.parametrize("lie", [{"bits": 8, "group_size": 32}, {"bits": 4, "group_size": 64}, {"bits": 7}])
def test_a_layer_override_that_lies_is_refused(damaged, lie):
    lie = {"bits": 4, "group_size": 32, "lm_head": {"bits": 4, "group_size": 32} | lie}
    change_config(damaged, quantization=lie, quantization_config=lie)
    with pytest.raises(ValueError, match="^load: mlx-lm .* cannot build"):
        mlxq.load(damaged)


def test_a_default_that_lies_is_overruled_by_the_arrays(damaged, quantized):
    lie = {"bits": 8, "group_size": 64}
    change_config(damaged, quantization=lie, quantization_config=lie)
    model, _ = mlxq.load(damaged)
    want, _ = mlxq.load(quantized)
    assert (model.lm_head.bits, model.lm_head.group_size) == (4, 32)
    assert mx.array_equal(model(mx.array([[5, 6]])), want(mx.array([[5, 6]])))


def test_quantized_weights_without_a_quantization_block_are_refused(damaged):
    change_config(damaged, quantization=None, quantization_config=None)
    with pytest.raises(
        ValueError, match="weights .* are quantized but config.json has no quantization block"
    ):
        mlxq.load(damaged)


def test_a_quantization_block_can_be_given_by_the_caller(damaged):
    change_config(damaged, quantization=None, quantization_config=None)
    model, _ = mlxq.load(damaged, model_config={"quantization": {"bits": 4, "group_size": 32}})
    assert type(model.lm_head) is layers.QuantizedLinear


def test_an_adapter_that_is_not_there_is_named(quantized, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"adapter path does not exist: {tmp_path}/none"):
        mlxq.load(quantized, adapter_path=tmp_path / "none")


def test_missing_tensors_are_counted_and_named(damaged):
    def drop(weights):
        for name in [n for n in weights if "layers.1." in n]:
            del weights[name]

    change_weights(damaged, drop)
    message = (
        r"cannot build .* Missing \d+ parameters: model.layers.1.input_layernorm.weight,.* and \d+ more$"
    )
    with pytest.raises(ValueError, match=message) as raised:
        mlxq.load(damaged)
    assert len(str(raised.value)) < 400


def test_tensors_of_the_wrong_shape_or_dtype_are_named(damaged):
    def spoil(weights):
        weights["lm_head.scales"] = weights["lm_head.scales"].astype(mx.int32)

    change_weights(damaged, spoil)
    with pytest.raises((ValueError, TypeError), match="layer lm_head: .*int32"):
        mlxq.load(damaged)

    def cut(weights):
        weights["lm_head.scales"] = weights["lm_head.scales"][:5]

    change_weights(damaged, cut)
    with pytest.raises(ValueError, match="lm_head.scales"):
        mlxq.load(damaged)


def test_a_missing_shard_is_named(damaged):
    index = damaged / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(named))
    with pytest.raises(
        FileNotFoundError, match="lacks model-00002-of-00002.safetensors, which its index names"
    ):
        mlxq.load(damaged)


@pytest.mark.parametrize("lie", [{"weight_map": 3}, {"weight_map": {"lm_head.weight": 3}}, {}])
def test_an_index_without_a_map_is_refused(damaged, lie):
    (damaged / "model.safetensors.index.json").write_text(json.dumps(lie))
    with pytest.raises(ValueError, match="index.json has no weight_map from tensor names to file names"):
        mlxq.load(damaged)
    with pytest.raises(ValueError, match="index.json has no weight_map from tensor names to file names"):
        inspect_model(damaged)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_shard_is_named(damaged, keep):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        mlxq.load(damaged)


def test_a_model_without_a_tokenizer_is_refused(damaged):
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"^load: the tokenizer in {damaged} does not load"):
        mlxq.load(damaged)


def test_code_of_the_model_runs_only_when_asked_for(damaged):
    (damaged / "mine.py").write_text(
        "from pathlib import Path\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
        "(Path(__file__).parent / 'ran').touch()\n"
    )
    change_config(damaged, model_file="mine.py")
    with pytest.raises(ValueError, match=r"has its own code, mine.py; to run it pass trust_remote_code=True"):
        mlxq.load(damaged)
    assert not (damaged / "ran").exists()
    mlxq.load(damaged, trust_remote_code=True)
    assert (damaged / "ran").exists()
