"""The folder in which mlxq keeps, between runs, what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """MLXQ_CACHE, or mlxq in XDG_CACHE_HOME, or ~/.cache/mlxq. It need not exist."""
    if chosen := os.environ.get("MLXQ_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxq"
