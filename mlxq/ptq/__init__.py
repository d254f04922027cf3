"""Quantizers: each takes (weight, statistics, format) and returns a Packed. METHODS names them."""

from __future__ import annotations

from mlxq.ptq.rtn import rtn

METHODS = {"rtn": rtn}

__all__ = ["METHODS", "rtn"]
