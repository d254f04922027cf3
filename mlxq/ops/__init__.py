"""One function per operation, for every array type."""

from __future__ import annotations

from mlxq.ops.dispatch import dequantize, gather_qmm, qmm, quantize
from mlxq.ops.native import (
    advise_huge_pages,
    cpu_features,
    forced_isa,
    isa_levels,
    kernel_calls,
    kernel_for,
    native_available,
    native_error,
    threads,
)

__all__ = [
    "advise_huge_pages",
    "cpu_features",
    "dequantize",
    "forced_isa",
    "gather_qmm",
    "isa_levels",
    "kernel_calls",
    "kernel_for",
    "native_available",
    "native_error",
    "qmm",
    "quantize",
    "threads",
]
