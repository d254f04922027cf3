"""GPTQ files: fixtures made by the published packing formulas (tests/fixtures/make_mpq_fixtures.py)."""

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxq import format
from mlxq.checkpoint import gptq, sources
from mlxq.nn.mpq import mlx as mlx_layers
from mlxq.nn.mpq import torch as torch_layers

FIXTURES = Path(__file__).parent / "fixtures"
PATH = "model.layers.0.mlp.up_proj"
NAMES = ("gptq_v1", "gptq_v2", "gptq_act_order", "gptq_2bit", "gptq_8bit")


def wanted(name: str) -> np.ndarray:
    """The weight (N, K) that the fixture's script computed before it packed anything, float64."""
    return np.load(FIXTURES / name / "dequantized.npz")[PATH]


def weight_of(layer) -> np.ndarray:
    """(N, K) of a canonical form, float64."""
    packed = layer.packed
    scales = np.repeat(packed.scales.astype(float), packed.format.group_size, axis=1)
    biases = np.repeat(packed.biases.astype(float), packed.format.group_size, axis=1)
    w = scales * format.unpack(packed.words, packed.format.bits, packed.K) + biases
    if layer.order is None:
        return w
    out = np.empty_like(w)
    out[:, layer.order] = w
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_file_decodes_to_the_weights_it_was_made_of(name):
    (layer,) = gptq.read_layers(FIXTURES / name)
    assert layer.path == PATH and layer.dtype == "float16" and layer.bias.shape == (64,)
    # float16 scale times integer zero is exact in float32
    assert np.array_equal(weight_of(layer.canonical()), wanted(name))
    assert (layer.canonical().order is not None) == (name == "gptq_act_order")


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_mlx_layers_of_a_file_compute_with_its_weights_and_give_it_back(name):
    (found,) = gptq.read_layers(FIXTURES / name)
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    y = x.astype(float) @ wanted(name).T + found.bias
    layer = torch_layers.from_layer(found)
    assert np.linalg.norm(layer(torch.from_numpy(x)).detach().numpy() - y) < 1e-5 * np.linalg.norm(y)
    for part, tensor in found.tensors.items():
        assert np.array_equal(layer.state_dict()[part].numpy(), tensor), part
    layer = mlx_layers.from_layer(found)
    assert np.linalg.norm(np.array(layer(mx.array(x))) - y) < 1e-5 * np.linalg.norm(y)
    for part, tensor in found.tensors.items():
        assert np.array_equal(np.array(layer.checkpoint()[part]), tensor), part


def nested(module):
    """A torch model with one linear layer at PATH."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.model.layers[0].mlp = torch.nn.ModuleDict({"up_proj": module})
    return model


def test_layers_are_put_where_the_file_names_them():
    model = nested(torch.nn.Linear(128, 64))
    assert torch_layers.load_layers(model, gptq.read_layers(FIXTURES / "gptq_v1")) == [PATH]
    assert isinstance(model.get_submodule(PATH), torch_layers.MPQLinear)
    with pytest.raises(ValueError, match=r"is \(64, 128\) in the file but \(64, 96\) in the model"):
        torch_layers.load_layers(nested(torch.nn.Linear(96, 64)), gptq.read_layers(FIXTURES / "gptq_v1"))
    with pytest.raises(ValueError, match=f"the model has no module {PATH}"):
        torch_layers.load_layers(torch.nn.Sequential(), gptq.read_layers(FIXTURES / "gptq_v1"))


@pytest.mark.parametrize("name", NAMES)
def test_the_converter_sees_one_weight_and_repacks_its_codes(name):
    tensors = gptq.open_folder(FIXTURES / name)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    method = sources.method_of(config)
    joined = method.join(tensors, method.settings)
    assert set(joined) == {f"{PATH}.weight", f"{PATH}.bias"}
    tensor = joined[f"{PATH}.weight"]
    assert np.abs(tensor.read(0, 64) - wanted(name)).max() < 1e-7
    if name == "gptq_act_order":
        assert tensor.repacks_to is None and "act-order" in tensor.requantized
        return
    packed = tensor.read_packed(10, 30)
    assert np.abs(format.dequantize(packed) - wanted(name)[10:30]).max() < 1e-7


def spoiled(tmp_path, name="gptq_v1", config=None, **parts):
    """A copy of a fixture with other tensors (None: left out) or settings."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    tensors = load_file(folder / "model.safetensors")
    for part, value in parts.items():
        tensors.pop(f"{PATH}.{part}")
        if value is not None:
            tensors[f"{PATH}.{part}"] = value
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_file_without_g_idx_has_its_rows_in_order(tmp_path):
    (layer,) = gptq.read_layers(spoiled(tmp_path, g_idx=None))
    assert np.array_equal(weight_of(layer.canonical()), wanted("gptq_v1"))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(config={"bits": 5}), "says bits: 5"),
        (dict(config={"bits": 3}), "up_proj: MPQ: w_bit is 3; wanted one of 2, 4, 8"),
        (dict(config={"checkpoint_format": "marlin"}), "says checkpoint_format: 'marlin'"),
        (dict(config={"group_size": 64}), r"up_proj.qzeros is int32 \(4, 8\); wanted int32 \(2, 8\)"),
        (dict(qzeros=None), "tensors are missing: model.layers.0.mlp.up_proj.qzeros"),
        (dict(scales=np.ones((4, 64), np.int32)), "up_proj.scales is int32"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        list(gptq.read_layers(spoiled(tmp_path, **change)))


def test_a_folder_without_tensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(FileNotFoundError, match="holds no tensors"):
        list(gptq.read_layers(tmp_path))


def test_the_fixtures_are_what_their_script_makes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_mpq_fixtures", FIXTURES / "make_mpq_fixtures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.make_all()
    names = [folder.name for pattern in ("gptq_*", "gba_*") for folder in FIXTURES.glob(pattern)]
    assert sorted(names) == sorted(folder.name for folder in tmp_path.iterdir()) and len(names) == 9
    for name in names:
        made, kept = tmp_path / name, FIXTURES / name
        assert (made / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
        assert (made / "config.json").read_text() == (kept / "config.json").read_text()
        with np.load(made / "dequantized.npz") as fresh, np.load(kept / "dequantized.npz") as stored:
            assert list(fresh) == list(stored)  # the zip around them holds the date
            assert all(np.array_equal(fresh[path], stored[path]) for path in fresh)
