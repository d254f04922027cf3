"""GBA files: fixtures made by the published packing formulas (tests/fixtures/make_mpq_fixtures.py)."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxq import format
from mlxq.checkpoint import gba, gptq
from mlxq.nn.mpq import mlx as mlx_layers
from mlxq.nn.mpq import torch as torch_layers

FIXTURES = Path(__file__).parent / "fixtures"
PATH = "model.layers.0.mlp.up_proj"
# name -> (bits, group size, dq_group_size, asym, dq_mode), as the script was told
NAMES = {
    "gba_2_32_32": (2, 32, 32, False, 2),
    "gba_4_64": (4, 64, 64, False, 1),
    "gba_asym_4_64_32": (4, 64, 32, True, 2),
    "gba_asym_2_32": (2, 32, 64, True, 1),
}


def wanted(name: str) -> np.ndarray:
    """The weight (N, K) that the fixture's script computed before it packed anything, float64."""
    return np.load(FIXTURES / name / "dequantized.npz")[PATH]


def step(layer) -> np.ndarray:
    """The largest step of each row, (N, 1)."""
    return np.abs(layer.packed.scales).max(1, keepdims=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_decodes_to_the_weights_it_was_made_of(name):
    (layer,) = gba.read_layers(FIXTURES / name)
    layout = layer.layout
    found = layout.w_bit, layout.group_size, layout.dq_group_size, layout.asym, layout.dq_mode
    assert layer.path == PATH and found == NAMES[name] and layer.bias is None
    canonical = layer.canonical()
    packed = canonical.packed
    scales = np.repeat(packed.scales.astype(float), packed.format.group_size, axis=1)
    biases = np.repeat(packed.biases.astype(float), packed.format.group_size, axis=1)
    w = scales * format.unpack(packed.words, packed.format.bits, packed.K) + biases
    assert (np.abs(w - wanted(name)) < 2e-6 * step(canonical)).all()


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_mlx_layers_of_a_file_compute_with_its_weights(name):
    (found,) = gba.read_layers(FIXTURES / name)
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    y = x.astype(float) @ wanted(name).T
    layer = torch_layers.from_layer(found)
    assert np.linalg.norm(layer(torch.from_numpy(x)).detach().numpy() - y) < 1e-5 * np.linalg.norm(y)
    # a layer upstream loads strictly: scales and zeros are in the state beside the codes they decode from
    assert {*found.tensors, *found.layout.derived} == set(layer.state_dict())
    layer = mlx_layers.from_layer(found)
    assert np.linalg.norm(np.array(layer(mx.array(x))) - y) < 1e-5 * np.linalg.norm(y)


@pytest.mark.parametrize("name", NAMES)
def test_the_converter_repacks_the_codes(name):
    joined = gba.join(gptq.open_folder(FIXTURES / name), {})
    assert set(joined) == {f"{PATH}.weight"}
    w = format.dequantize(joined[f"{PATH}.weight"].read_packed(0, 64))
    assert np.abs(w - wanted(name)).max() < 1e-6


def test_a_file_with_plain_scales_of_wide_groups_decodes(tmp_path):
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (512 // 8, 32), dtype=np.int64).astype(np.int32)
    scales, zeros = random.random((2, 32)).astype(np.float16), random.random((2, 32)).astype(np.float16)
    g_idx = (np.arange(512) // 256).astype(np.int32)
    tensors = {"qweight": words, "scales": scales, "zeros": zeros, "g_idx": g_idx}
    save_file({f"a.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (layer,) = gba.read_layers(tmp_path)
    k = np.arange(512)
    codes = (words[k // 8] >> (4 * (k % 8))[:, None]) & 15
    wide = scales.astype(float)[g_idx] * codes - zeros.astype(float)[g_idx]
    assert layer.layout.group_size == 256
    y = torch_layers.from_layer(layer)(torch.eye(512)).detach().numpy()
    assert np.abs(y - wide).max() < 1e-5


@pytest.mark.parametrize(
    "part, value, said",
    [
        ("g_idx", None, "tensors are missing: model.layers.0.mlp.up_proj.g_idx"),
        ("qzeros_scales", None, "tensors are missing: .*qzeros_scales"),
        ("qstatistic", np.zeros((4, 1, 64), np.uint8), r"qzeros_zeros is float16 \(4, 2, 1\)"),
        ("qweight", np.zeros((9, 64), np.int32), "9 rows of words for the 128 rows of g_idx"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(tmp_path, part, value, said):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "spoiled"
    shutil.copytree(FIXTURES / "gba_2_32_32", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{PATH}.{part}"]
    if value is not None:
        tensors[f"{PATH}.{part}"] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        list(gba.read_layers(folder))
