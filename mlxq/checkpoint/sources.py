"""Which reader joins the parts of a quantized checkpoint to weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mlxq.checkpoint import awq, bitsandbytes, compressed_tensors, gptq, mlx
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
    "gptq": gptq.join,
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
