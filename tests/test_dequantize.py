"""`convert --dequantize`: folders of floats that transformers loads, with the weights of the source."""

import json

import gguf
import numpy as np
import pytest
import tiny_models
from foreign_models import quantized_model, read_mlx
from test_gguf import write_gguf
from test_sources_awq import SETTINGS, awq_layer

from mlxq.checkpoint.plain import dequantize
from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.tensors import FileTensor, map_file
from mlxq.convert import convert

torch = pytest.importorskip("torch", reason="transformers loads models with torch")


def floats(folder) -> dict[str, np.ndarray]:
    mapped = map_file(folder / "model.safetensors")
    entries = read_header(folder / "model.safetensors")[0]
    return {name: FileTensor(mapped, entry).floats() for name, entry in entries.items()}


def transformers_logits(folder) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor([[1, 17, 200, 3, 44, 90, 2, 150]])).logits.numpy()


def mlx_logits(folder) -> np.ndarray:
    from foreign_models import logits

    return logits(folder)


@pytest.mark.parametrize("arch", ("llama", "qwen3_moe", "mixtral", "gemma3_text"))
def test_mlx_models_go_back_to_transformers(arch, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src")
    convert(source, tmp_path / "q", bits=4, group_size=32, progress=False)
    dequantize(tmp_path / "q", tmp_path / "back")
    assert floats(tmp_path / "back").keys() == tiny_models.tensor_shapes(arch).keys()
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((tmp_path / "back" / "config.json").read_text()).keys()
    )
    # float32 sums in another order, and two implementations of the model
    found, wanted = transformers_logits(tmp_path / "back"), mlx_logits(tmp_path / "q")
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_awq_goes_back_to_floats(tmp_path):
    source, weights = quantized_model(tmp_path / "src", SETTINGS, awq_layer(64))
    dequantize(source, tmp_path / "back", dtype="float32")
    found = floats(tmp_path / "back")
    assert found.keys() == weights.keys()
    assert all(np.abs(found[name] - wanted).max() < 1e-6 for name, wanted in weights.items())
    assert np.isfinite(transformers_logits(tmp_path / "back")).all()


def test_a_gguf_goes_back_to_floats(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    path = write_gguf(source, tmp_path / "m.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    convert(path, tmp_path / "q", dtype="float32", progress=False)
    dequantize(path, tmp_path / "back", dtype="float32")
    found, wanted = floats(tmp_path / "back"), read_mlx(tmp_path / "q")
    assert all(np.abs(found[name] - wanted[name]).max() < 1e-6 for name in wanted)
    assert np.isfinite(transformers_logits(tmp_path / "back")).all()


def test_the_command_line_dequantizes(tmp_path, capsys):
    from mlxq.cli import main

    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    convert(source, tmp_path / "q", progress=False)
    arguments = ["convert", str(tmp_path / "q"), str(tmp_path / "back"), "--dequantize", "--dtype", "float16"]
    assert main(arguments) == 0 and "for transformers" in capsys.readouterr().out
    assert main(arguments) == 2 and "exists already" in capsys.readouterr().err
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float16"
