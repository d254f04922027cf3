"""Quantizers: each takes (weight, statistics, format) and returns a Packed. METHODS names them."""

from __future__ import annotations

from mlxq.ptq.gptq import gptq
from mlxq.ptq.rtn import rtn

METHODS = {"rtn": rtn, "gptq": gptq}

__all__ = ["METHODS", "gptq", "rtn"]
