"""Round to nearest: each group gets its own scale and bias, and every weight the nearest code."""

from __future__ import annotations

from mlxq import ops
from mlxq.format import Format, Packed


def rtn(weight, statistics, fmt: Format, *, rule: str = "affine", scale_dtype: str | None = None) -> Packed:
    """Packed weights of weight's own array kind.

    weight      float   (..., N, K)
    statistics  unused: this method needs no calibration
    rule        "affine" (ours) or "mlx" (bit-identical to mx.quantize on the CPU)

    Raises ValueError for NaN, Inf and shapes that the format cannot hold.
    """
    return ops.quantize(weight, fmt, rule=rule, scale_dtype=scale_dtype)
