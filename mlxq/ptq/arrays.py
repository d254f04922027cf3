"""The dozen array functions that quantization needs, under one name for numpy, MLX and torch.

Each is one IEEE operation an element (or a reduction), so the frameworks agree to the bit; but for `mean`,
whose order of summation is each framework's own.
"""

from __future__ import annotations

import functools
import math
import sys

import numpy as np

from mlxq import bridge
from mlxq.format import dtype_name

FLOATS = ("float32", "float16", "bfloat16", "float64")
_TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


class Namespace:
    """One framework's functions; made once for each, by namespace()."""

    def __init__(self, kind: str):
        self.kind = kind
        if kind == "mlx":
            import mlx.core as mx

            self.xp = mx
        else:
            self.xp = np if kind == "numpy" else sys.modules["torch"]
        for name in ("abs", "square", "sqrt", "round", "where", "clip"):
            setattr(self, name, getattr(self.xp, name))

    def dtype(self, name: str):
        """The framework's dtype. Raises TypeError for bfloat16 in numpy, which has none."""
        if self.kind == "numpy" and name == "bfloat16":
            raise TypeError("numpy has no bfloat16: pass an mx.array or a torch tensor, or float32 values")
        return getattr(self.xp, name)

    def cast(self, array, name: str):
        if dtype_name(array) == name:
            return array
        return array.to(self.dtype(name)) if self.kind == "torch" else array.astype(self.dtype(name))

    def reduce(self, name: str, array, axes: tuple[int, ...]):
        """max, min, mean or sum over axes, which stay as axes of 1."""
        if not axes:
            return array
        if self.kind == "torch":
            function = {"max": self.xp.amax, "min": self.xp.amin, "mean": self.xp.mean, "sum": self.xp.sum}[
                name
            ]
            return function(array, dim=axes, keepdim=True)
        return getattr(self.xp, name)(array, axis=axes, keepdims=True)

    def full(self, shape, value, like):
        if self.kind == "torch":
            return self.xp.full(tuple(shape), value, dtype=like.dtype, device=like.device)
        return self.xp.full(shape, value, dtype=like.dtype)

    def constant(self, values: np.ndarray, like):
        """A numpy array on the device of like."""
        return bridge.like(values, like)

    def broadcast(self, array, shape):
        return self.xp.broadcast_to(array, tuple(shape))

    def permute(self, array, axes):
        if tuple(axes) == tuple(range(array.ndim)):
            return array
        return array.permute(*axes) if self.kind == "torch" else self.xp.transpose(array, tuple(axes))

    def bits_of(self, array):
        """float32 as the int32 that lies in the same bytes."""
        return array.view(self.xp.int32)

    def floats_of(self, array):
        return array.view(self.xp.float32)

    def take(self, table: np.ndarray, codes):
        """table[codes], float32."""
        table = self.constant(table, codes)
        return table[codes.long()] if self.kind == "torch" else table[codes]

    def argmin(self, array):
        """Index of the first smallest along the last axis."""
        return array.argmin(-1)

    def exact_matmul(self, a, b):
        """Sums of products of integers, exact: (..., M, K) @ (..., K, N) as int32 (MLX) or float64.

        a, b   float32 arrays of integers, -255 to 255 on one side and -128 to 128 on the other
        """
        if self.kind != "mlx":
            return self.cast(a, "float64") @ self.cast(b, "float64")
        K, total = a.shape[-1], self.full((*a.shape[:-1], b.shape[-1]), 0, self.cast(a[:0], "int32"))
        for start in range(0, K, 512):  # 512 * 255 * 128 fits the 24 bits of a float32
            part = slice(start, min(K, start + 512))
            total = total + self.cast(a[..., part] @ b[..., part, :], "int32")
        return total


@functools.cache
def _namespace(kind: str) -> Namespace:
    return Namespace(kind)


def namespace(array) -> Namespace:
    """The functions for an array's framework. Raises TypeError for cupy and for what is no array."""
    kind = bridge.kind(array)
    if kind == "cupy":
        raise TypeError("rule-driven quantization serves numpy, MLX and torch; move cupy arrays to torch")
    return _namespace(kind)


def tiny_scale(dtype: str) -> float:
    """Scales below this become 1: the root of the smallest normal number; in float16 2^-24.

    qwix takes the root in float16 too, 2^-7: that makes the scale of ordinary weights 1 and their codes 0.
    """
    return 2.0**-24 if dtype == "float16" else math.sqrt(_TINY[dtype])
