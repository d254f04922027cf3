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


def q8_rows(x, group_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(codes int8 (..., K), scales float32 (...)) of x's rows; mlxq.ops.q8_rows says how."""
    x = bridge.to_numpy(x).astype(np.float32)
    if group_size:
        codes, scales = q8_rows(x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size))
        return codes.reshape(x.shape), scales
    peak = np.abs(x).max(-1)
    scales = np.where(peak == 0, np.float32(1), peak / np.float32(127))
    return np.clip(np.rint(x / scales[..., None]), -127, 127).astype(np.int8), scales


def q8mm(x_codes, x_scales, packed: format.Packed, per_row: bool = False) -> np.ndarray:
    """int8 codes (..., K) times packed (N, K) as (..., N): sums of integers exact, the rest in float64.

    With per_row in float32, to the bit what every kernel gives: float32(sum) * (x_scale * scale).
    """
    fmt = packed.format
    zero = 1 << (fmt.bits - 1)
    weights = format.unpack(bridge.to_numpy(packed.words), fmt.bits, packed.K).astype(np.int64) - zero
    x = bridge.to_numpy(x_codes).astype(np.int64)
    x_scales = bridge.to_numpy(x_scales)
    tiled = x_scales.size != 1 and x_scales.ndim == x.ndim
    if not tiled:
        x_scales = np.broadcast_to(x_scales.reshape(-1), x[..., 0].size).reshape(x.shape[:-1])
    scales, biases = (bridge.to_numpy(a) for a in (packed.scales, packed.biases))
    if per_row:
        return (x @ weights.T).astype(np.float32) * (x_scales[..., None] * scales[:, 0].astype(np.float32))
    grouped = x.reshape(*x.shape[:-1], -1, fmt.group_size)
    sums = np.einsum("...gk,ngk->...ng", grouped, weights.reshape(packed.N, -1, fmt.group_size))
    scales, biases = scales.astype(np.float64), biases.astype(np.float64)
    if tiled:
        sums, grouped = sums * x_scales[..., None, :], grouped * x_scales[..., None].astype(np.float64)
    rest = grouped.sum(-1) @ (biases + zero * scales).T
    if tiled:
        return (sums * scales).sum(-1) + rest
    return ((sums * scales).sum(-1) + rest) * x_scales[..., None].astype(np.float64)


def _indices(given, batch: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(batch))).reshape(batch) if given is None else bridge.to_numpy(given)
