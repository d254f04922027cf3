"""Every layer of a model quantized by what its inputs are on calibration text, block after block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq import format
from mlxq.format import Format, Packed
from mlxq.ptq.awq import Change, fold_block
from mlxq.ptq.gptq import DRIFT, gptq
from mlxq.ptq.rtn import rtn
from mlxq.ptq.stream import Stream

SEARCHED_BITS = 6  # wider codes round so finely that rounding to nearest stays, as measured at 8 bits


@dataclass
class Solved:
    """A tensor of a checkpoint together with its quantized form, which lies in files and is mapped.

    Reads like the tensor; read_packed gives rows of the quantized form, as tensors that are repacked do.
    """

    tensor: object
    packed: Packed

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def read_packed(self, start: int, stop: int, fmt: Format) -> Packed:
        """Rows of the quantized form, which has this format."""
        arrays = (self.packed.words, self.packed.scales, self.packed.biases)
        return Packed(*(a.reshape(-1, a.shape[-1])[start:stop] for a in arrays), fmt)


@dataclass
class Changed:
    """A tensor of a checkpoint with a change made to it as it is read."""

    tensor: object
    change: Change

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32."""
        values = self.tensor.read(start, stop)
        return self.change.cut(start, stop).apply(values)


class Spool:
    """Packed layers in a folder, so that a model's worth of them needs no memory.

    changes  what has to be done to parameters before they are stored, by name
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.changes: dict[str, Change] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, path: str, packed: Packed) -> None:
        for name in ("words", "scales", "biases"):
            np.save(self.folder / f"{path}.{name}.npy", getattr(packed, name))
        (self.folder / f"{path}.format").write_text(f"{packed.format.bits} {packed.format.group_size}")

    def load(self, path: str) -> Packed | None:
        """The layer, mapped, or None when it was never saved."""
        note = self.folder / f"{path}.format"
        if not note.exists():
            return None
        names = ("words", "scales", "biases")
        arrays = [np.load(self.folder / f"{path}.{name}.npy", mmap_mode="r") for name in names]
        return Packed(*arrays, Format(*map(int, note.read_text().split())))


def quantize_blocks(
    model,
    read: Callable[[str], np.ndarray],
    windows: np.ndarray,
    wanted: dict[str, tuple[Format, str]],
    spool: Spool,
    *,
    method: str = "gptq",
    rule: str = "affine",
    storage: str = "float32",
    advance: Callable[[int], None] = lambda weights: None,
    options: dict | None = None,
) -> tuple[list[str], list[str]]:
    """Solve the layers that stand in blocks, save them in spool; (their paths, remarks).

    model    an mlx-lm model without weights        read     see Stream
    windows  token ids, (count, length)             wanted   path -> (format, dtype of scales and biases)
    method   "gptq"; "awq": scaled channels, then rounding to nearest; "awq+gptq": scaled, then solved
    storage  dtype of what stays in float
    advance  called with the number of weights whenever a layer is done
    options  keyword arguments of gptq

    Layers of more than 6 bits, and wanted layers outside the blocks, are rounded to nearest; the former are
    part of what later layers see, like the embedding. Raises ValueError for models that cannot be streamed.
    """
    options = options or {}
    if method == "gptq" and all(fmt.bits > SEARCHED_BITS for fmt, _ in wanted.values()):
        return [], [f"gptq: every layer has more than {SEARCHED_BITS} bits and is rounded to nearest"]
    solves = "gptq" in method
    stream = Stream(model, read, windows, drift=solves and bool(options.get("drift", DRIFT)))
    outside = [path for path in wanted if f"{path}.weight" in stream.outer]
    for path in outside:
        fmt, dtype = wanted[path]
        packed = rtn(stream.weight(path), None, fmt, rule=rule, scale_dtype=dtype)
        stream.put_weight(path, format.dequantize(packed))
    if outside:
        stream.re_enter()
    solved, reasons = [], {}

    def fold(number: int, layers: dict) -> None:
        changes, skipped = fold_block(stream, number, layers, wanted, storage)
        spool.changes |= changes
        for path, reason in skipped.items():
            reasons.setdefault(reason, []).append(path)

    for stage in stream.stages(fold if "awq" in method else None):
        for path, weight in stage.weights.items():
            if path in wanted:
                statistics = stage.statistics if solves else None
                packed = _solve(weight, statistics, *wanted[path], rule, options)
                spool.save(path, packed)
                stream.put_weight(path, format.dequantize(packed))
                solved.append(path)
                advance(weight.size)
    remarks = [f"awq, not scaled: {len(paths)} layers ({paths[0]}, ...): {r}" for r, paths in reasons.items()]
    return solved, remarks


def _solve(weight, statistics, fmt: Format, dtype: str, rule: str, options: dict) -> Packed:
    if fmt.bits > SEARCHED_BITS or statistics is None:
        return rtn(weight, None, fmt, rule=rule, scale_dtype=dtype)
    if not isinstance(statistics, list):
        return gptq(weight, statistics, fmt, scale_dtype=dtype, **options)
    experts = [
        gptq(one, own, fmt, scale_dtype=dtype, **options)
        for one, own in zip(weight, statistics, strict=True)
    ]
    arrays = (np.stack([getattr(e, name) for e in experts]) for name in ("words", "scales", "biases"))
    return Packed(*arrays, fmt)
