"""Which reader joins the parts of a quantized checkpoint to weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlxq.checkpoint import awq, bitsandbytes, compressed_tensors, gba, gptq, mlx, mxfp4
from mlxq.checkpoint.tensors import Tensor


class Method(NamedTuple):
    """How a checkpoint is quantized: a name for messages, its settings in config.json, the reader."""

    name: str
    settings: dict
    join: Callable[[dict[str, Tensor], dict], dict[str, Tensor]]


_READERS = {
    "awq": awq.join,
    "bitsandbytes": bitsandbytes.join,
    "compressed-tensors": compressed_tensors.join,
    "fp8": compressed_tensors.join,
    "gba": gba.join,
    "gptq": gptq.join,
    "mxfp4": mxfp4.join,
}


def method_of(config: dict) -> Method | None:
    """The method that config.json names, None for float checkpoints.

    Raises ValueError for a method without a reader and for a quantization block that is none.
    """
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"config.json's quantization is {found!r}, not a JSON object")
    name = found.get("quant_method")
    if name is None and "group_size" in found and "config_groups" not in found:
        return Method("MLX", found, mlx.join)
    if name is None and "config_groups" in found:
        name = "compressed-tensors"
    if not isinstance(name, str) or name not in _READERS:
        raise ValueError(
            f"config.json says that the model is quantized with {name!r}; "
            f"built: {', '.join(_READERS)}, MLX, GGUF"
        )
    return Method(name, found, _READERS[name])


def unnamed(folder: Path, names) -> Method | None:
    """The method of a folder whose config.json names none: GPTQ's file, or GBA's tensors; None: floats.

    Raises ValueError when GPTQ's file does not hold its settings.
    """
    if not any(name.endswith(".qweight") for name in names):
        return None
    file = folder / "quantize_config.json"
    if not file.exists():
        return Method("gba", {}, gba.join)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds {type(settings).__name__}, not a JSON object")
    return Method("gptq", settings, gptq.join)
