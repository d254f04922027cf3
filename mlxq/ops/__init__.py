"""One function per operation, for every array type."""

from __future__ import annotations

from mlxq.ops.dispatch import dequantize, gather_qmm, q8_rows, q8mm, qmm, quantize
from mlxq.ops.native import (
    advise_huge_pages,
    choice,
    cpu_features,
    forced_isa,
    isa_levels,
    kernel_calls,
    kernel_for,
    metal_status,
    native_available,
    native_error,
    threads,
    tuning_status,
)

__all__ = [
    "advise_huge_pages",
    "choice",
    "cpu_features",
    "dequantize",
    "forced_isa",
    "gather_qmm",
    "isa_levels",
    "kernel_calls",
    "kernel_for",
    "metal_status",
    "native_available",
    "native_error",
    "q8_rows",
    "q8mm",
    "qmm",
    "quantize",
    "threads",
    "tuning_status",
]
