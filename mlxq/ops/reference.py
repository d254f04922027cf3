"""The answer: quantized matrix products in float64 numpy. Slow, obvious, never used by a fast path."""

from __future__ import annotations

import numpy as np

from mlxq import bridge, format

# Relative Frobenius error against float64 that a product may have, by x's dtype; the bars hold at K = 4096.
# Most of it is the rounding of the answer: 2^-24, 2^-11 and 2^-8 half a unit in the last place.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def dequantize(packed: format.Packed) -> np.ndarray:
    """Weights as float64, shape (..., N, K): scale * code + bias without rounding."""
    codes = format.unpack(bridge.to_numpy(packed.words), packed.format.bits, packed.K).astype(np.float64)
    scales, biases = (
        np.repeat(bridge.to_numpy(a).astype(np.float64), packed.format.group_size, axis=-1)
        for a in (packed.scales, packed.biases)
    )
    return scales * codes + biases


def qmm(x, packed: format.Packed, transpose: bool = True) -> np.ndarray:
    """x @ W.T (transpose) or x @ W in float64: (..., K) -> (..., N), or (..., N) -> (..., K)."""
    w = dequantize(packed)
    return bridge.to_numpy(x).astype(np.float64) @ (w.T if transpose else w)


def gather_qmm(x, packed: format.Packed, lhs_indices=None, rhs_indices=None, transpose=True) -> np.ndarray:
    """Row blocks x[lhs] times experts w[rhs] in float64; shapes as mx.gather_qmm.

    x            (*X, M, K)            lhs_indices  index into the flattened *X
    packed       (*E, N, K)            rhs_indices  index into the flattened *E
    result       (*broadcast(lhs, rhs), M, N)
    """
    x = bridge.to_numpy(x).astype(np.float64)
    w = dequantize(packed)
    lhs = _indices(lhs_indices, x.shape[:-2])
    rhs = _indices(rhs_indices, w.shape[:-2])
    lhs, rhs = np.broadcast_arrays(lhs, rhs)
    blocks, experts = x.reshape(-1, *x.shape[-2:]), w.reshape(-1, *w.shape[-2:])
    out = np.empty((*lhs.shape, x.shape[-2], w.shape[-2] if transpose else w.shape[-1]))
    for where in np.ndindex(lhs.shape):
        expert = experts[rhs[where]]
        out[where] = blocks[lhs[where]] @ (expert.T if transpose else expert)
    return out


def _indices(given, batch: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(batch))).reshape(batch) if given is None else bridge.to_numpy(given)
