"""A trained model as a folder, as mlxq convert writes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq import bridge
from mlxq.checkpoint.partial import partial_folder
from mlxq.checkpoint.safetensors import STORED, Planned, Writer
from mlxq.convert import SHARD_BYTES
from mlxq.format import Format, Packed, dtype_name


@dataclass
class Loaded:
    """A model of one framework, and the folder that it came from."""

    module: Any
    tokenizer: Any
    config: dict
    folder: Path
    quantized: bool


def write_model(
    dst: Path, model: Loaded, weights: Iterable[tuple[str, Any]], report: dict, overwrite: bool
) -> None:
    """The new folder dst: weights, config.json, the tokenizer's files, training.json.

    weights   (path of a packed layer, Packed) and (name of a float tensor, array of any framework)
    """
    arrays, formats = {}, {}
    for name, value in weights:
        if isinstance(value, Packed):
            formats[name] = value.format
            parts = (("weight", value.words), ("scales", value.scales), ("biases", value.biases))
            arrays |= {f"{name}.{part}": array for part, array in parts}
        else:
            arrays[name] = value
    plan = [Planned(name, STORED[dtype_name(a)], tuple(a.shape)) for name, a in arrays.items()]
    config = dict(model.config)
    if not model.quantized:
        config["quantization"] = config["quantization_config"] = _block(formats)
    with partial_folder(dst, overwrite) as folder:
        with Writer(folder, plan, SHARD_BYTES, sum(_count(value) for value in arrays.values())) as writer:
            for name, array in arrays.items():
                writer.write(name, bridge.host_bits(array))
        (folder / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
        (folder / "training.json").write_text(json.dumps(report, indent=1))
        for path in model.folder.iterdir():
            weights_of_it = (
                path.suffix in (".safetensors", ".bin", ".pt", ".gguf") or "index.json" in path.name
            )
            if path.is_file() and not weights_of_it and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _count(array) -> int:
    size = 1
    for extent in array.shape:
        size *= extent
    return size


def _block(formats: dict[str, Format]) -> dict:
    """config.json's block as mlx-lm reads it: the format of most layers, then what differs."""
    kinds = list(formats.values())
    common = max(set(kinds), key=kinds.count)
    block: dict[str, object] = {"group_size": common.group_size, "bits": common.bits, "mode": "affine"}
    for path, fmt in formats.items():
        if fmt != common:
            block[path] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": "affine"}
    return block


def weight_config(bits: int, group_size: int, ranges: str):
    """How a weight trains for the affine format: codes from 0, a float zero point, a scale of its own."""
    from mlxq.qat import IntxFakeQuantizeConfig

    learned = ranges == "learned"
    return IntxFakeQuantizeConfig(
        f"uint{bits}",
        group_size=group_size,
        is_symmetric=False,
        zero_point_domain="float",
        scale_precision=None,
        # The middle of a group's range is no stored number; its bias is, and comes back exact from a float32.
        zero_point_precision="float32" if learned else None,
        is_dynamic=not learned,
        range_learning=learned,
    )
