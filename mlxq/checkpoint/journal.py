"""What an interrupted conversion has finished: a file in its partial folder that the next run reads.

The first line says what is being converted, and how; a folder whose first line differs is not gone on with.
Each further line is a tensor whose bytes are on the disk, not only in the system's memory, with its line of
the report. The folder FOUND beside it holds what calibration has found: measured costs, solved layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

FLUSH_BYTES = 64 << 20  # what a power cut may cost at most, with FLUSH_SECONDS; a kill costs less
FLUSH_SECONDS = 5.0
FOUND = "found"  # folder of what calibration has found so far, in the partial folder


def identity(src: Path, arguments: dict) -> str:
    """A digest of the source's files (names, sizes, times of change) and of the arguments."""
    files = sorted(path for path in src.rglob("*") if path.is_file()) if src.is_dir() else [src]
    listed = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([listed, arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """The finished tensors of one process of a conversion."""

    def __init__(self, folder: Path, digest: str, rank: int = 0):
        self.path = folder / f"journal-{rank}.jsonl"
        self._lines: list[str] = []
        self._bytes, self._since = 0, time.monotonic()
        self._file = open(self.path, "a", encoding="utf-8")
        if not self.path.stat().st_size:
            self._file.write(json.dumps({"identity": digest}) + "\n")
            self._file.flush()

    def add(self, name: str, line: dict, size: int, files) -> None:
        """Note that the tensor is written; files are descriptors to sync before the disk says so."""
        self._lines.append(json.dumps({"tensor": name} | line) + "\n")
        self._bytes += size
        if self._bytes >= FLUSH_BYTES or time.monotonic() - self._since >= FLUSH_SECONDS:
            self.flush(files)

    def flush(self, files) -> None:
        """Put everything added so far on the disk."""
        for descriptor in files:
            os.fsync(descriptor)
        self._file.writelines(self._lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines, self._bytes, self._since = [], 0, time.monotonic()

    def close(self) -> None:
        """Close the file; what was not flushed is forgotten."""
        self._file.close()


def read(folder: Path, digest: str) -> dict[str, dict] | None:
    """Lines by tensor name of a partial folder; None when it is not one of this conversion."""
    done: dict[str, dict] = {}
    files = sorted(folder.glob("journal-*.jsonl"))
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            if json.loads(lines[0]) != {"identity": digest}:
                return None
        except (OSError, ValueError):
            return None
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                done[entry.pop("tensor")] = entry
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # cut off by the kill
    return done if files else None


def begun(folder: Path, digest: str) -> bool:
    """Whether a partial folder is one of this conversion and holds something to go on with."""
    done = read(folder, digest)
    found = (path for path in (folder / FOUND).rglob("*") if path.suffix in (".json", ".npz"))
    return done is not None and (bool(done) or any(found))


def remove(folder: Path) -> None:
    """Remove the journals of a conversion that is complete, and what calibration found."""
    shutil.rmtree(folder / FOUND, ignore_errors=True)
    for file in folder.glob("journal-*.jsonl"):
        file.unlink()
