"""A trained model as a folder, as mlxq convert writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.checkpoint.trained import quantization_block, write
from mlxq.format import Packed


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
    weights = dict(weights)
    config = dict(model.config)
    if not model.quantized:
        formats = {path: value.format for path, value in weights.items() if isinstance(value, Packed)}
        config["quantization"] = config["quantization_config"] = quantization_block(formats)
    report_text = {"training.json": json.dumps(report, indent=1)}
    write(dst, model.folder, config, weights.items(), overwrite, report_text)


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
