"""The tuning file: which products stock MLX answers faster than our kernels, on this machine.

`mlxq autotune` (mlxq.autotune) measures and writes it, mlxq.ops.native follows it. JSON, in the cache folder:

    format    1
    machine   what the times depend on; a file of another machine or of other versions is not followed
    written   seconds since 1970
    classes   [{device, op, bits, group_size, dtype, rows, size, winner, mlxq_ms, stock_ms}]

A class is all products of one kind with about as many rows and weights:

    device    cpu, gpu
    op        qmm; qmm_n, which is qmm with transpose=False; gather_qmm, transpose=True
    dtype     of x and of scales and biases: stock MLX is compared where they agree, as in stock models
    rows      of x, in gather_qmm of the whole result: the least of ROWS that is not smaller; the last is open
    size      of one weight matrix: small below 2^20 weights, medium below 2^23, large

On the CPU stock MLX may win in float32 only. In bfloat16 and float16 it sums in that type and is wrong by up
to 10 % at K = 8192: how accurate an answer is on the CPU is not for a clock to decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxq import format
from mlxq.cache import cache_folder

DEVICES = ("cpu", "gpu")
OPS = ("qmm", "qmm_n", "gather_qmm")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SIZES = ("small", "medium", "large")
MARGIN = 1.05  # stock MLX wins a class only where our kernel takes this many times as long
COMMAND = "mlxq autotune"

# By bit_length, which is what a call can afford: of M - 1, and of N * K.
ROWS_BY_BITS = tuple(min(1 << bits, ROWS[-1]) for bits in range(64))
SIZE_BY_BITS = tuple(SIZES[(bits > 20) + (bits > 23)] for bits in range(64))


@dataclass(frozen=True)
class Class:
    """What one decision covers."""

    device: str
    op: str
    bits: int
    group_size: int
    dtype: str
    rows: int
    size: str

    def __str__(self) -> str:
        rows = f"over {self.rows // 2}" if self.rows == ROWS[-1] else f"up to {self.rows}"
        kind = f"{self.op} {self.bits}-bit/{self.group_size} {self.dtype}"
        return f"{self.device} {kind}, {rows} row{'s' if self.rows > 1 else ''}, {self.size} weights"

    @property
    def stock_may_win(self) -> bool:
        return self.device != "cpu" or self.dtype == "float32"


def class_of(device: str, op: str, fmt: format.Format, dtype: str, M: int, N: int, K: int) -> Class:
    """The class of a product of M rows with an (N, K) weight; M >= 1."""
    rows, size = ROWS_BY_BITS[(M - 1).bit_length()], SIZE_BY_BITS[(N * K).bit_length()]
    return Class(device, op, fmt.bits, fmt.group_size, dtype, rows, size)


@dataclass(frozen=True)
class Times:
    """Median milliseconds of one call: of the product in the class in which we compare worst."""

    mlxq_ms: float
    stock_ms: float

    @property
    def winner(self) -> str:
        return "stock" if self.mlxq_ms > MARGIN * self.stock_ms else "mlxq"


@dataclass(frozen=True)
class Tuning:
    """A tuning file's content."""

    written: float
    classes: dict[Class, Times]

    def stock(self) -> list[Class]:
        """The classes in which stock MLX is to be used."""
        return [c for c, times in self.classes.items() if times.winner == "stock" and c.stock_may_win]


def path() -> Path:
    """Where the tuning file is, if there is one."""
    return cache_folder() / "autotune.json"


def switched_off() -> bool:
    """Whether MLXQ_AUTOTUNE=0 is set: then no tuning file is followed."""
    return os.environ.get("MLXQ_AUTOTUNE") == "0"


def read(machine: dict, always: bool = False) -> Tuning | None:
    """The tuning file if it is one of this machine; None when there is none.

    With MLXQ_AUTOTUNE=0 there is none, unless always. Raises ValueError, saying what is the matter, for a
    file that is damaged or of another machine.
    """
    if switched_off() and not always:
        return None
    try:
        text = path().read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{path()} cannot be read ({error.strerror})") from error
    try:
        found = json.loads(text)
        if found["format"] != 1:
            raise ValueError(f"its format is {found['format']}")
        made_for, written = dict(found["machine"]), float(found["written"])
        classes = dict(map(_parse, found["classes"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path()} is damaged ({reason[:80]})") from error
    if made_for != machine:
        other = [k for k in {**machine, **made_for} if machine.get(k) != made_for.get(k)]
        told = ", ".join(f"{k} {made_for.get(k)}, here {machine.get(k)}" for k in other)
        raise ValueError(f"{path()} was measured elsewhere ({told})")
    return Tuning(written, classes)


def _parse(entry: dict) -> tuple[Class, Times]:
    kind = Class(*(entry[name] for name in Class.__dataclass_fields__))
    times = Times(float(entry["mlxq_ms"]), float(entry["stock_ms"]))
    known = (
        kind.device in DEVICES
        and kind.op in OPS
        and kind.dtype in format.STORAGE
        and kind.rows in ROWS
        and kind.size in SIZES
        and times.mlxq_ms > 0
        and times.stock_ms > 0
    )
    if not known or entry["winner"] != times.winner:
        raise ValueError(f"an entry is {entry}")
    format.Format(kind.bits, kind.group_size)
    return kind, times


def write(machine: dict, classes: dict[Class, Times]) -> Path:
    """Replace the tuning file by one with these classes, or leave it as it is and raise OSError."""
    entries = [asdict(c) | {"winner": t.winner} | asdict(t) for c, t in classes.items()]
    content = {"format": 1, "machine": machine, "written": time.time(), "classes": entries}
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".autotune-", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return target


def clear() -> bool:
    """Remove the tuning file; whether there was one."""
    try:
        path().unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def status(machine: dict) -> dict:
    """What `mlxq doctor` shows: file, state and, while it is followed, age, counts and exceptions."""
    found: dict = {"file": str(path()).replace(str(Path.home()), "~")}
    try:
        tuning = read(machine)
    except ValueError as error:
        return found | {"state": f"not used: {error}"}
    if tuning is None:
        off = "switched off by MLXQ_AUTOTUNE=0"
        return found | {"state": off if switched_off() else f"none; to make one: {COMMAND}"}
    stock = tuning.stock()
    found |= {
        "state": "in use",
        "age": _age(time.time() - tuning.written),
        "decided": f"mlxq {len(tuning.classes) - len(stock)} classes, stock MLX {len(stock)}",
    }
    if stock:
        ratios = [tuning.classes[c].mlxq_ms / tuning.classes[c].stock_ms for c in stock]
        lines = zip(stock, ratios, strict=True)
        found["on stock MLX"] = [f"{c}: mlxq takes {ratio:.2f} times as long" for c, ratio in lines]
    return found


def _age(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {name}"
    return f"{max(seconds, 0):.0f} seconds"
