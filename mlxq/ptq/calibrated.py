"""Every layer of a model quantized by what its inputs are on calibration text, block after block."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxq import format
from mlxq.format import Format, Packed
from mlxq.ptq.awq import Change, fold_block
from mlxq.ptq.gptq import DRIFT, gptq
from mlxq.ptq.host import host
from mlxq.ptq.rtn import rtn
from mlxq.ptq.stream import Stream

SEARCHED_BITS = 6  # wider codes round so finely that rounding to nearest stays, as measured at 8 bits
KEEP_SECONDS = 10.0  # between two times that states are written, which are 2 x tokens x width floats
ROUNDED_AT_ONCE = 1 << 18  # weights


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
    """Packed layers in a folder, so that a model's worth of them needs no memory, and how far they go.

    changes   what has to be done to parameters before they are stored, by name
    solved    paths of the layers that are saved
    skipped   by reason, paths that awq did not scale
    settings  a digest of all that decides what is solved; a run with another one begins anew
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.changes: dict[str, Change] = {}
        self.solved: list[str] = []
        self.skipped: dict[str, list[str]] = {}
        self.settings = ""
        self._kept_at = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, path: str, packed: Packed) -> None:
        for name in ("words", "scales", "biases"):
            _write(self.folder / f"{path}.{name}.npy", np.save, getattr(packed, name))
        (self.folder / f"{path}.format").write_text(f"{packed.format.bits} {packed.format.group_size}")

    def load(self, path: str) -> Packed | None:
        """The layer, mapped, or None when it was never saved."""
        note = self.folder / f"{path}.format"
        if not note.exists():
            return None
        names = ("words", "scales", "biases")
        arrays = [np.load(self.folder / f"{path}.{name}.npy", mmap_mode="r") for name in names]
        return Packed(*arrays, Format(*map(int, note.read_text().split())))

    def _holds(self, path: str) -> bool:
        try:
            return self.load(path) is not None
        except (OSError, ValueError, EOFError):
            return False

    def keep(self, block: int, states: list[list[np.ndarray]], last: bool = False) -> None:
        """Note that the blocks before this one are done, with the states that enter it, for another run.

        Unless it is the last time, nothing happens within KEEP_SECONDS of the time before.
        """
        if not last and time.monotonic() - self._kept_at < KEEP_SECONDS:
            return
        facts = {name: getattr(self, name) for name in ("settings", "solved", "skipped")}
        facts |= {"block": block, "last": last}
        arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
        arrays |= {f"states/{i}/{w}": one for i, many in enumerate(states) for w, one in enumerate(many)}
        for name, change in self.changes.items():
            arrays |= {f"{k}/{name}": v for k, v in vars(change).items() if v is not None}
        half = self.folder / "progress.part"
        _write(half, np.savez, **arrays)
        half.replace(self.folder / "progress.npz")
        self._kept_at = time.monotonic()

    def resume(self, settings: str) -> tuple[int, bool, list[list[np.ndarray]]]:
        """(block to go on with, whether nothing is left, states as given to keep) of an earlier run."""
        self.settings = settings
        try:
            with np.load(self.folder / "progress.npz", allow_pickle=False) as file:
                arrays = dict(file)
            facts = json.loads(arrays.pop("facts").tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return 0, False, []  # there is none, or it is damaged
        if facts["settings"] != settings or not all(map(self._holds, facts["solved"])):
            return 0, False, []
        self.solved, self.skipped = facts["solved"], facts["skipped"]
        states: list[list[np.ndarray]] = []
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            if kind == "states":
                at = int(rest.partition("/")[0])
                states += [[] for _ in range(at + 1 - len(states))]
                states[at].append(array)
            else:
                setattr(self.changes.setdefault(rest, Change()), kind, array)
        return facts["block"], facts["last"], states


def _write(path: Path, save: Callable, *args, **arrays) -> None:
    """save(file, ...) to a path, on the disk."""
    with open(path, "wb") as file:
        save(file, *args, **arrays)
        file.flush()
        os.fsync(file.fileno())


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

    What the spool's folder holds of an earlier run with the same arguments is not solved again.

    Layers of more than 6 bits, and wanted layers outside the blocks, are rounded to nearest; the former are
    part of what later layers see, like the embedding. Raises ValueError for models that cannot be streamed.
    """
    options = options or {}
    if method == "gptq" and all(fmt.bits > SEARCHED_BITS for fmt, _ in wanted.values()):
        return [], [f"gptq: every layer has more than {SEARCHED_BITS} bits and is rounded to nearest"]
    solves = "gptq" in method
    everything = (wanted, method, rule, storage, options, hashlib.sha256(windows.tobytes()).hexdigest())
    first, complete, states = spool.resume(repr(everything))
    if not complete:
        stream = Stream(model, read, windows, drift=solves and bool(options.get("drift", DRIFT)))
        _round_outside(stream, wanted, rule)
        if states:
            stream.states, stream.float_states = ([mx.array(one) for one in many] for many in states)
        shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
        advance(sum(math.prod(shapes[f"{path}.weight"]) for path in spool.solved))
        _solve_blocks(stream, first, wanted, spool, method, rule, storage, advance, options)
    remarks = [
        f"awq, not scaled: {len(paths)} layers ({paths[0]}, ...): {reason}"
        for reason, paths in spool.skipped.items()
    ]
    return spool.solved, remarks


def _round_outside(stream: Stream, wanted: dict[str, tuple[Format, str]], rule: str) -> None:
    """Round the wanted layers outside of the blocks, in the stream alone."""
    outside = [path for path in wanted if f"{path}.weight" in stream.outer]
    for path in outside:
        fmt, dtype = wanted[path]
        stream.put_weight(path, format.dequantize(_rounded(stream.weight(path), fmt, dtype, rule)))
    if outside:
        stream.re_enter()


def _solve_blocks(stream: Stream, first: int, wanted, spool: Spool, method, rule, storage, advance, options):
    def prepare(number: int, layers: dict) -> None:
        if number > first:
            spool.keep(number, [[host(s) for s in many] for many in (stream.states, stream.float_states)])
        if "awq" in method:
            changes, skipped = fold_block(stream, number, layers, wanted, storage)
            spool.changes |= changes
            for path, reason in skipped.items():
                spool.skipped.setdefault(reason, []).append(path)

    for stage in stream.stages(prepare, first):
        for path, weight in stage.weights.items():
            if path in wanted:
                statistics = stage.statistics if "gptq" in method else None
                packed = _solve(weight, statistics, *wanted[path], rule, options)
                spool.save(path, packed)
                stream.put_weight(path, format.dequantize(packed))
                spool.solved.append(path)
                advance(weight.size)
    spool.keep(len(stream.blocks), [], last=True)


def _rounded(weight: np.ndarray, fmt: Format, dtype: str, rule: str) -> Packed:
    """rtn of a weight, some rows at a time: its temporaries are a dozen times as large as what it rounds."""
    rows = weight.reshape(-1, weight.shape[-1])
    height = max(1, ROUNDED_AT_ONCE // rows.shape[1])
    parts = [
        rtn(rows[start : start + height], None, fmt, rule=rule, scale_dtype=dtype)
        for start in range(0, len(rows), height)
    ]
    arrays = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("words", "scales", "biases")
    )
    return Packed(*(a.reshape(*weight.shape[:-1], a.shape[-1]) for a in arrays), fmt)


def _solve(weight, statistics, fmt: Format, dtype: str, rule: str, options: dict) -> Packed:
    if fmt.bits > SEARCHED_BITS or statistics is None:
        return _rounded(weight, fmt, dtype, rule)
    if not isinstance(statistics, list):
        return gptq(weight, statistics, fmt, scale_dtype=dtype, **options)
    experts = [
        gptq(one, own, fmt, scale_dtype=dtype, **options) for one, own in zip(weight, statistics, strict=True)
    ]
    arrays = (np.stack([getattr(e, name) for e in experts]) for name in ("words", "scales", "biases"))
    return Packed(*arrays, fmt)
