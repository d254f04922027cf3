"""Converted models of torch and MLX as folders that mlx-lm reads, and what only mlxq reads beside them.

config.json   "activation_fake_quantization": {layer: how its inputs were rounded in training, in the
              words of mlxq.qat.config}; mlx-lm ignores the key and multiplies the same weights with x
              itself, mlxq.load and mlxq.load_torch round x as training did
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxq import bridge
from mlxq.checkpoint.huggingface import read_config
from mlxq.checkpoint.partial import partial_folder
from mlxq.checkpoint.safetensors import SHARD_BYTES, STORED, Planned, Writer
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.checkpoint.summary import TRAINED as KEY
from mlxq.format import Format, Packed, dtype_name
from mlxq.qat.config import FakeQuantizeConfigBase, activation_from_json, activation_to_json
from mlxq.qat.training import framework_of


def save(model, source: str | Path, dst: str | Path, overwrite: bool = False) -> None:
    """Write a model that mlxq.qat converted as the new model folder dst, for mlx-lm, mlxq and their chat.

    model    of torch (transformers') or MLX (mlx-lm's), after the step "convert"
    source   the folder that it was loaded from: its config.json, tokenizer and other files are taken over

    Raises ValueError, naming the layer, for a model with layers that are still fake-quantized or without
    packed ones, for a float head that shares its table with a packed embedding, and for a model of
    transformers whose tensors mlx-lm stores otherwise; FileExistsError for dst.
    """
    source = Path(source).expanduser()
    framework = framework_of(model)
    api = importlib.import_module(f"mlxq.qat.{framework}.api")
    config = read_config(source)
    weights = dict(api.stored(model, config.get("tie_word_embeddings", False)))
    formats = {path: value.format for path, value in weights.items() if isinstance(value, Packed)}
    if not formats:
        raise ValueError("save: the model has no packed layer; convert it first")
    if framework == "torch" and not stores_as_transformers(config, source, _float_shapes(weights)):
        raise ValueError(
            f"save: mlx-lm stores tensors of {source} otherwise than transformers; train it in MLX, with "
            "mlxq.qat.mlx"
        )
    config |= {name: quantization_block(formats) for name in ("quantization", "quantization_config")}
    config.pop(KEY, None)
    if rounded := _activations(model):
        config[KEY] = {path: activation_to_json(settings) for path, settings in rounded.items()}
    write(dst, source, config, weights.items(), overwrite)


def _activations(model) -> dict[str, FakeQuantizeConfigBase]:
    """{path: how its inputs are rounded} of a converted model of either framework."""
    found = ((path, getattr(layer, "activation_quantizer", None)) for path, layer in model.named_modules())
    return {path: quantizer.config for path, quantizer in found if quantizer is not None}


def write(
    dst: str | Path,
    source: Path,
    config: dict[str, Any],
    weights: Iterable[tuple[str, Any]],
    overwrite: bool,
    texts: dict[str, str] | None = None,
) -> None:
    """The new folder dst: weights, config.json, texts by file name, and the other files of source.

    weights   (path of a packed layer, Packed) and (name of a float tensor, array of any framework)
    """
    arrays: dict[str, Any] = {}
    for name, value in weights:
        if isinstance(value, Packed):
            parts = (("weight", value.words), ("scales", value.scales), ("biases", value.biases))
            arrays |= {f"{name}.{part}": array for part, array in parts}
        else:
            arrays[name] = value
    plan = [Planned(name, STORED[dtype_name(a)], tuple(a.shape)) for name, a in arrays.items()]
    count = sum(math.prod(array.shape) for array in arrays.values())
    with partial_folder(Path(dst).expanduser(), overwrite) as folder:
        with Writer(folder, plan, SHARD_BYTES, count) as writer:
            for name, array in arrays.items():
                writer.write(name, bridge.host_bits(array))
        (folder / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)
        for path in source.iterdir():
            weights_of_it = (
                path.suffix in (".safetensors", ".bin", ".pt", ".gguf") or "index.json" in path.name
            )
            if path.is_file() and not weights_of_it and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def quantization_block(formats: dict[str, Format]) -> dict[str, Any]:
    """config.json's block as mlx-lm reads it: the format of most layers, then what differs."""
    kinds = list(formats.values())
    common = max(set(kinds), key=kinds.count)
    block: dict[str, Any] = {"group_size": common.group_size, "bits": common.bits, "mode": "affine"}
    for path, fmt in formats.items():
        if fmt != common:
            block[path] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": "affine"}
    return block


def _float_shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} that the weights would have in float."""
    return {
        f"{name}.weight" if isinstance(value, Packed) else name: tuple(value.shape)
        for name, value in weights.items()
    }


def stores_as_transformers(config: dict[str, Any], folder: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether mlx-lm takes float tensors of these names and shapes as they are."""
    zeros = {name: mx.zeros(shape) for name, shape in shapes.items()}
    kept = Skeleton(config, folder).sanitize(dict(zeros))
    return set(kept) == set(zeros) and all(kept[name] is zeros[name] for name in zeros)


def read(config: dict[str, Any], folder: Path) -> dict[str, FakeQuantizeConfigBase]:
    """{layer: how its inputs are rounded}. Raises ValueError, naming the layer, for what does not exist."""
    block = config.get(KEY) or {}
    if not isinstance(block, dict):
        raise ValueError(f"load: {folder}/config.json: {KEY} is {block!r}; wanted an object")
    found = {}
    for path, said in block.items():
        try:
            found[path] = activation_from_json(said)
        except ValueError as error:
            raise ValueError(f"load: {KEY} of {folder}: {path}: {error}") from None
    return found


def restore(model, config: dict[str, Any], folder: Path) -> None:
    """Layers that round their inputs, where config.json says so, on the same arrays; torch or MLX.

    Raises ValueError, naming the layer, when a setting is unknown or the layer is not a packed linear one.
    """
    settings = read(config, folder)
    if not settings:
        return
    api = importlib.import_module(f"mlxq.qat.{framework_of(model)}.api")
    modules = dict(model.named_modules())
    for path, activation in settings.items():
        if path not in modules:
            raise ValueError(f"load: {KEY} of {folder} names {path}, which is no layer")
        try:
            layer = api.with_activation(modules.get(path), activation)
        except ValueError as error:
            raise ValueError(f"load: {KEY} of {folder} names {path}, {error}") from None
        api.replace(model, path, layer)
