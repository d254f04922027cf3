"""Safetensors files: a header checked before anything trusts it, and a writer that holds no shard in memory.

A file is  u64 length | JSON header | tensors  with, per tensor, {"dtype", "shape", "data_offsets":
[begin, end]} relative to the end of the header.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxq import format

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}
SHARD_BYTES = 5 << 30  # mlx-lm's
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype as the header spells it, shape, and its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by tensor name, in file order, and the metadata. No tensor is read.

    Raises ValueError, naming the file, when the header is cut off, is not JSON, or does not describe the
    file: spans that overlap, leave gaps, end outside the file or disagree with dtype and shape.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: {size} bytes are too few for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: the header claims {length} bytes of a file of {size}: truncated, or not safetensors"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}  # mx.save_safetensors writes null
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__ is not a JSON object")

    data_begin, entries = 8 + length, {}
    for name, fields in header.items():
        entries[name] = _entry(path, name, fields, data_begin, size)
    at, before = data_begin, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a gap after"
            raise ValueError(f"{path}: tensor {name} {what} {before}")
        at, before = entry.end, name
    if at != size:
        raise ValueError(
            f"{path}: {size - at} bytes follow the last tensor: truncated header, or not safetensors"
        )
    return entries, metadata


def _entry(path: Path, name: str, fields: object, data_begin: int, size: int) -> Entry:
    def is_list_of_counts(value: object) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)

    known = isinstance(fields, dict) and isinstance(fields.get("dtype"), str) and fields["dtype"] in BYTES
    if not known:
        dtype = fields.get("dtype") if isinstance(fields, dict) else fields
        raise ValueError(f"{path}: tensor {name} has dtype {dtype!r}; known: {', '.join(BYTES)}")
    shape, span = fields.get("shape"), fields.get("data_offsets")
    if not is_list_of_counts(shape) or not is_list_of_counts(span) or len(span) != 2:
        raise ValueError(
            f"{path}: tensor {name} has shape {shape!r} and data_offsets {span!r}: not lists of counts"
        )
    begin, end = (data_begin + offset for offset in span)
    if begin > end or end > size:
        raise ValueError(
            f"{path}: tensor {name} lies at bytes {begin} to {end} of a file of {size}: truncated"
        )
    wanted = math.prod(shape) * BYTES[fields["dtype"]]
    if end - begin != wanted:
        raise ValueError(
            f"{path}: {name}, {fields['dtype']} {tuple(shape)}, needs {wanted} bytes, has {end - begin}"
        )
    return Entry(fields["dtype"], tuple(shape), begin, end)


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in the bytes of float32, float16 or bfloat16 (as uint16), rounded to nearest even."""
    if dtype == "bfloat16":
        return (format.store(values, dtype).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its name, dtype as the header spells it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def header_of(tensors: Iterable[Planned], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a file before its tensors, which follow one another in this order."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Writer:
    """MLX's shard files in `folder`, written piece by piece: headers first, because every shape is known.

    with Writer(folder, plan, max_shard_bytes, parameters) as writer:
        writer.write(name, array)        any number of times per tensor, in order of the bytes
        writer.skip(name)                the bytes are there from an earlier run, or another process writes
                                         them

    Files that are there are gone on with. Leaving the block without an exception checks that every byte came,
    writes the index and syncs to the disk.
    """

    def __init__(
        self,
        folder: Path,
        plan: Iterable[Planned],
        max_shard_bytes: int,
        parameters: int,
        made_for: str = "mlx",
    ):
        self.folder, self.parameters = Path(folder), parameters
        shards: list[list[Planned]] = [[]]
        filled = 0
        for tensor in plan:
            if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += tensor.nbytes
        count = len(shards)
        self.weight_map: dict[str, str] = {}
        self.next_byte: dict[str, int] = {}
        self.last_byte: dict[str, int] = {}
        self.headers: dict[str, bytes] = {}
        self.files: dict[str, int] = {}
        for number, shard in enumerate(shards, 1):
            file_name = (
                "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            )
            self.headers[file_name] = header_of(shard, {"format": made_for})
            begin = len(self.headers[file_name])
            for tensor in shard:
                self.weight_map[tensor.name] = file_name
                self.next_byte[tensor.name] = begin
                begin += tensor.nbytes
                self.last_byte[tensor.name] = begin
        self.total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard)
        self.file_bytes = self.total_bytes + sum(map(len, self.headers.values()))

    def __enter__(self) -> Writer:
        for file_name, header in self.headers.items():
            self.files[file_name] = os.open(self.folder / file_name, os.O_WRONLY | os.O_CREAT, 0o644)
            _write_all(self.files[file_name], header, 0)
        return self

    def holds(self, name: str) -> bool:
        """Whether the file that an earlier run left is long enough to hold the tensor."""
        file = self.folder / self.weight_map[name]
        return file.exists() and file.stat().st_size >= self.last_byte[name]

    def skip(self, name: str) -> None:
        """Count the tensor as written."""
        self.next_byte[name] = self.last_byte[name]

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the array's bytes to the tensor."""
        data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
        at = self.next_byte[name]
        if at + len(data) > self.last_byte[name]:
            raise AssertionError(f"{name}: more bytes than planned")
        _write_all(self.files[self.weight_map[name]], data, at)
        self.next_byte[name] = at + len(data)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                short = [name for name, at in self.next_byte.items() if at != self.last_byte[name]]
                if short:
                    raise AssertionError(f"not written: {short}")
                for descriptor in self.files.values():
                    os.fsync(descriptor)
                metadata = {"total_size": self.total_bytes, "total_parameters": self.parameters}
                index = {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}
                (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
        finally:
            for descriptor in self.files.values():
                os.close(descriptor)
            self.files.clear()


def _write_all(descriptor: int, data, at: int) -> None:
    view = memoryview(data)
    while view:  # pwrite may write less than asked
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
