"""GPTQ checkpoints as AutoGPTQ (v1) and GPTQModel (v1, v2) write them, act-order included.

The layout is in mlxq.nn.mpq. config.json's quantization_config, or quantize_config.json, says bits,
group_size and checkpoint_format; where there is a g_idx, it decides the groups. Version 1 stores zeros less
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.tensors import FLOATS, CodesTensor, FileTensor, Tensor, expect, map_file, setting
from mlxq.format import unpack
from mlxq.nn.mpq import Layout, QuantizedLayer

VERSIONS = {"gptq": 1, "gptq_v2": 2}


class MPQTensor(CodesTensor):
    """The codes of one GPTQ or GBA layer, (N, K); the columns of act-order keep their places."""

    def __init__(self, layer: QuantizedLayer):
        layout = layer.layout
        layout.check(layer.tensors)
        self.layout, self.bits, self.group = layout, layout.w_bit, layout.group_size
        self.words = layer.tensors["qweight"]
        self.shape = (layout.out_channels, layout.in_channels)
        self._scales, zeros = layout.scales_and_zeros(layer.tensors)
        self._biases = -(zeros * self._scales) if layout.asym else -zeros
        g_idx = layer.tensors["g_idx"]
        if (g_idx != layout.default_g_idx()).any():
            self.group_of = g_idx.astype(np.int64)

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        words = np.ascontiguousarray(self.words[:, rows].T).view(np.uint32)
        return unpack(words, self.bits, self.layout.in_channels)

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        return tuple(np.ascontiguousarray(a[:, rows].T) for a in (self._scales, self._biases))


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for the parts of each quantized layer. Raises ValueError."""
    joined = dict(tensors)
    for layer in _layers(tensors, settings):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            joined.pop(f"{layer.path}.{part}", None)
        joined[f"{layer.path}.weight"] = MPQTensor(layer)
    return joined


def read_layers(folder: str | Path) -> Iterator[QuantizedLayer]:
    """The quantized layers of a GPTQ folder, in the order of their paths, mapped and not read.

    Raises FileNotFoundError and ValueError that name the file or the tensor at fault.
    """
    from mlxq.checkpoint.huggingface import read_json  # which imports this module, through sources

    folder = Path(folder)
    settings = read_json(folder / "config.json").get("quantization_config")
    if settings is None:
        settings = read_json(folder / "quantize_config.json")
    yield from _layers(open_folder(folder), settings)


def open_folder(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of a folder's safetensors files by its name. Raises FileNotFoundError without any."""
    tensors: dict[str, FileTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        mapped = map_file(file)
        tensors |= {name: FileTensor(mapped, entry) for name, entry in read_header(file)[0].items()}
    if not tensors:
        raise FileNotFoundError(f"{folder} holds no tensors in safetensors files")
    return tensors


def values_of(tensor: FileTensor) -> np.ndarray:
    """A tensor's values as they lie in the file, bfloat16 as float32."""
    return tensor.floats() if tensor.dtype == "bfloat16" else tensor.whole


def _layers(tensors: dict[str, Tensor], settings: dict) -> Iterator[QuantizedLayer]:
    bits = setting(settings, "bits", (2, 3, 4, 8))
    version = VERSIONS[setting(settings, "checkpoint_format", tuple(VERSIONS), "gptq")]
    said = settings.get("group_size", -1)
    for name in sorted(name for name in tensors if name.endswith(".qweight")):
        path = name.removesuffix(".qweight")
        try:
            yield _layer(tensors, path, bits, said, version)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _layer(tensors, path: str, bits: int, group_size: int, version: int) -> QuantizedLayer:
    words = expect(tensors, f"{path}.qweight", ("int32",), (None, None))
    K, N = words.shape[0] * 32 // bits, words.shape[1]
    layout = Layout(K, N, bits, group_size, use_gba_quant=False, gptq_version=version)
    parts = {"qweight": words}
    for part, (shape, kind) in layout.shapes.items():
        if part == "g_idx" and f"{path}.g_idx" not in tensors:
            continue
        parts[part] = expect(tensors, f"{path}.{part}", FLOATS if kind == "float" else (kind,), shape)
    values = {part: values_of(tensor) for part, tensor in parts.items()}
    values.setdefault("g_idx", layout.default_g_idx())
    return QuantizedLayer(path, layout, parts["scales"].dtype, values, bias_of(tensors, path, N))


def bias_of(tensors: dict[str, Tensor], path: str, N: int) -> np.ndarray | None:
    """The layer's bias (N,) where there is one, as it lies in the file."""
    if f"{path}.bias" not in tensors:
        return None
    return values_of(expect(tensors, f"{path}.bias", FLOATS, (N,)))
