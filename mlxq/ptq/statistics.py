"""Ranges of inputs, summed over calibration batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


class Statistics:
    """By name: how many batches were seen, and float32 sums of their ranges.

    A name is that of the module, the operation with its number, and the side: "model/layers/0/mlp/up_proj/
    linear0_lhs". Sums are float32 whatever the model computes in: 16 bits would stop growing.
    """

    def __init__(self):
        self.sums: dict[str, dict[str, np.ndarray]] = {}
        self.counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.counts

    def __len__(self) -> int:
        return len(self.counts)

    def register(self, name: str) -> None:
        """A name that no batch has reached yet."""
        self.counts.setdefault(name, 0)
        self.sums.setdefault(name, {})

    def update(self, name: str, ranges: Mapping[str, np.ndarray]) -> None:
        """Add one batch, {"absmax": a} or {"min": a, "max": a}. Raises ValueError when shapes change."""
        arrays = {key: np.asarray(value, np.float32) for key, value in ranges.items()}
        for key, value in arrays.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name}: {key} of the inputs is NaN or infinite")
        self.register(name)
        sums = self.sums[name]
        shapes = [{key: value.shape for key, value in some.items()} for some in (arrays, sums)]
        if sums and shapes[0] != shapes[1]:
            raise ValueError(f"{name}: ranges of {shapes[0]} do not add to {shapes[1]}")
        self.sums[name] = {key: sums.get(key, np.float32(0)) + value for key, value in arrays.items()}
        self.counts[name] += 1

    def average(self, name: str) -> dict[str, np.ndarray]:
        """sum / count of each range. Raises ValueError where no batch was counted."""
        if not self.counts.get(name):
            raise ValueError(f"{name} has seen no input: run calibration data that reaches it, or exclude it")
        return {key: value / np.float32(self.counts[name]) for key, value in self.sums[name].items()}

    def save(self, path: str | Path) -> None:
        """Write the statistics as one .npz file: NAME:count, NAME:sum_of_absmax, ..."""
        arrays = {f"{name}:count": np.array(count, np.int32) for name, count in self.counts.items()}
        for name, sums in self.sums.items():
            arrays |= {f"{name}:sum_of_{key}": value for key, value in sums.items()}
        with open(Path(path).expanduser(), "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Statistics that save wrote. Raises FileNotFoundError, ValueError for other files."""
        found = cls()
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                for entry in file.files:
                    name, _, what = entry.rpartition(":")
                    if what == "count":
                        found.register(name)
                        found.counts[name] = int(file[entry])
                    elif what.startswith("sum_of_"):
                        found.sums.setdefault(name, {})[what.removeprefix("sum_of_")] = file[entry]
                    else:
                        raise ValueError(f"an entry {entry!r}")
        except ValueError as error:
            raise ValueError(f"{path} holds no statistics: {error}") from None
        if found.sums.keys() != found.counts.keys():
            raise ValueError(f"{path} holds sums without a count")
        return found
