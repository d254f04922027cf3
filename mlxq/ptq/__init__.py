"""Quantizers and rules. A quantizer takes (weight, statistics, format) and returns a Packed: see METHODS.

By rules: plan says what they make of a model, calibrate measures static ranges of inputs, quantize_model
replaces layers, quantize_params quantizes a flat dict of parameters, Operations what a model calls directly.
qarray and functional are the numerics.
"""

from __future__ import annotations

from mlxq.ptq.calibrate import calibrate, quantize_model
from mlxq.ptq.gptq import gptq
from mlxq.ptq.operations import Operations
from mlxq.ptq.plan import plan
from mlxq.ptq.rtn import rtn
from mlxq.ptq.statistics import Statistics
from mlxq.ptq.tensors import quantize_params

METHODS = {"rtn": rtn, "gptq": gptq}

__all__ = [
    "METHODS", "Operations", "Statistics", "calibrate", "gptq", "plan", "quantize_model", "quantize_params",
    "rtn",
]  # fmt: skip
