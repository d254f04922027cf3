"""Models with Q8Linear layers on disk: 8-bit checkpoints that mlx-lm reads, and beside the weights what only
mlxq reads.

    config.json              "activation_quantization": {layer: {"activation": "token" | "tile" | "learned" |
                             "static" | "static_tile", "scale_a": the scale of the last three, a list of one
                             for each tile for the last}}; mlx-lm ignores the key. A tile is as long as the
                             weight's groups
    activations.safetensors  LAYER.bias_a of the layers that have one; mlx-lm reads model*.safetensors only

mlx-lm multiplies the same weights with x itself: it neither rounds x nor adds bias_a.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxq.checkpoint.partial import partial_folder
from mlxq.checkpoint.summary import ACTIVATIONS as KEY
from mlxq.format import KERNEL_BITS, Format, Packed
from mlxq.nn.q8 import EPS, Settings
from mlxq.nn.q8 import mlx as q8

SHIFTS = "activations.safetensors"


def save(
    model: nn.Module, tokenizer, config: dict[str, Any], dst: str | Path, overwrite: bool = False
) -> None:
    """Write an mlx-lm model with Q8Linear layers as a model folder; float ones among them are packed first.

    config is the model's config.json, as mlxq.load(..., return_config=True) gives it. Raises ValueError for
    a model without such layers and for layers without an activation scale, FileExistsError for dst.
    """
    from mlx_lm.utils import save_config, save_model

    layers = q8.layers(model)
    if not layers:
        raise ValueError("save: the model has no Q8Linear layer; see mlxq.nn.q8.mlx.replace_linears")
    config = copy.deepcopy(config) | {KEY: {path: _settings(path, layer) for path, layer in layers.items()}}
    for layer in layers.values():
        layer.pack()
    config["quantization"] = _quantization(config.get("quantization"), layers)
    shifts = {f"{path}.bias_a": layer["bias_a"] for path, layer in layers.items() if "bias_a" in layer}
    with partial_folder(Path(dst).expanduser(), overwrite) as folder:
        # mlx-lm's model has no place for what only we read.
        kept = {
            path: (layer.pop("scale_a", None), layer.pop("bias_a", None)) for path, layer in layers.items()
        }
        try:
            save_model(folder, model)
        finally:
            for path, arrays in kept.items():
                for name, array in zip(("scale_a", "bias_a"), arrays, strict=True):
                    if array is not None:
                        layers[path][name] = array
        if shifts:
            mx.save_safetensors(str(folder / SHIFTS), shifts, metadata={"format": "mlx"})
        save_config(config, folder / "config.json")
        tokenizer.save_pretrained(folder)


def _settings(path: str, layer: q8.Q8Linear) -> dict[str, Any]:
    found: dict[str, Any] = {"activation": layer.settings.activation}
    if "scale_a" in layer:
        scale = layer["scale_a"]
        found["scale_a"] = (mx.maximum(scale, EPS) if scale.ndim else scale).tolist()
        if not (scale.max() > 0).item():
            raise ValueError(
                f"save: {path} has the activation scale {found['scale_a']}; wanted a positive number, see "
                "mlxq.nn.q8.mlx.observing"
            )
    return found


def _quantization(block: dict[str, Any] | None, layers: dict[str, q8.Q8Linear]) -> dict[str, Any]:
    """The block of config.json for stock mlx-lm: one common format, and the layers that differ."""
    formats = {path: layer.settings.format for path, layer in layers.items()}
    common = Counter(formats.values()).most_common(1)[0][0]
    block = (
        {"group_size": common.group_size, "bits": common.bits, "mode": "affine"} if not block else dict(block)
    )
    for path, fmt in formats.items():
        block.pop(path, None)
        if (fmt.bits, fmt.group_size) != (block["bits"], block["group_size"]):
            block[path] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": "affine"}
    return block


def read(config: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """{layer: {"activation", "scale_a", "bias_a"}} of a model folder; bias_a is an mx.array, or None.

    Raises ValueError, naming the layer, for settings that do not exist.
    """
    block = config.get(KEY) or {}
    if not isinstance(block, dict):
        raise ValueError(f"load: {folder}/config.json: {KEY} is {block!r}; wanted an object")
    shifts = mx.load(str(folder / SHIFTS)) if block and (folder / SHIFTS).exists() else {}
    found = {}
    for path, said in block.items():
        if not isinstance(said, dict):
            raise ValueError(f"load: {KEY} of {folder}: {path} is {said!r}; wanted an object")
        activation, scale = said.get("activation"), said.get("scale_a")
        try:
            settings = Settings(activation)
        except ValueError as error:
            raise ValueError(f"load: {KEY} of {folder}: {path}: {error}") from None
        kind = type(None) if settings.is_dynamic else list if activation == "static_tile" else float
        numbers = scale if kind is list and isinstance(scale, list) else []
        if not isinstance(scale, kind) or not all(isinstance(one, float) for one in numbers):
            raise ValueError(
                f"load: {KEY} of {folder}: {path} has {said}; wanted scale_a for learned and static alone, a "
                "list for static_tile"
            )
        shift = shifts.pop(f"{path}.bias_a", None)
        found[path] = {"activation": activation, "scale_a": scale, "bias_a": shift}
    if shifts:
        raise ValueError(f"load: {folder}/{SHIFTS} holds {', '.join(sorted(shifts))}, which no layer takes")
    return found


def restore(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Put Q8Linear layers where config.json says that activations are quantized, on the same arrays.

    Raises ValueError, naming the layer, when a setting is unknown or the layer is not a packed linear one.
    """
    modules, replaced = dict(model.named_modules()), []
    for path, settings in read(config, folder).items():
        layer = modules.get(path)
        if (
            not isinstance(layer, nn.QuantizedLinear)
            or layer.mode != "affine"
            or layer.bits not in KERNEL_BITS
        ):
            what = "no layer" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(
                f"load: {KEY} of {folder} names {path}, which is {what}; wanted a packed linear one of "
                f"{', '.join(map(str, KERNEL_BITS))} bits"
            )
        packed = Packed(layer.weight, layer.scales, layer.biases, Format(layer.bits, layer.group_size))
        try:
            replaced.append((path, q8.Q8Linear.from_packed(packed, layer.get("bias"), **settings)))
        except ValueError as error:
            raise ValueError(f"load: {KEY} of {folder}: {path}: {error}") from None
    model.update_modules(tree_unflatten(replaced))
    model.train(model.training)
