"""Float models on a CPU at the speed of numpy's BLAS; MLX brings netlib's reference, 37 times slower."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import switch_layers

from mlxq.bridge import to_numpy

QUERY_ROWS = 128  # of a causal attention at once: keys after the last of them are not multiplied


@contextlib.contextmanager
def host_products() -> Iterator[None]:
    """While the block runs on the CPU outside macOS, float products of models go through numpy, in float32.

    Linear layers, output projections tied to an embedding, experts of mixture models and attention; results
    have the dtype that MLX gives. On a GPU, and on a Mac, whose BLAS is Apple's, nothing changes. No
    gradients: for calibration and measurement only.
    """
    if sys.platform == "darwin" or mx.default_device().type != mx.cpu:
        yield
        return
    places = [
        (nn.Linear, "__call__", _linear),
        (nn.Embedding, "as_linear", _as_linear),
        (switch_layers.SwitchLinear, "__call__", _switch),
        (mx.fast, "scaled_dot_product_attention", _attention),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, ours in places:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), old in zip(places, before, strict=True):
            setattr(owner, name, old)


def host(array: mx.array) -> np.ndarray:
    """The values as float32, without a copy where they are float32 already."""
    return np.array(array if array.dtype == mx.float32 else array.astype(mx.float32), copy=False)


def _linear(self, x):
    y = mx.array(host(x) @ host(self["weight"]).T).astype(x.dtype)
    return y + self["bias"] if "bias" in self else y


def _as_linear(self, x):
    return mx.array(host(x) @ host(self["weight"]).T).astype(x.dtype)


def _switch(self, x, indices, sorted_indices=False):
    chosen = to_numpy(indices)
    rows, weight = host(x), host(self["weight"])
    *_, M, K = rows.shape
    rows = np.broadcast_to(rows, (*chosen.shape, M, K)).reshape(-1, M, K)
    flat = chosen.reshape(-1)
    y = np.empty((len(flat), M, weight.shape[1]), np.float32)
    for expert in np.unique(flat):
        mine = flat == expert
        y[mine] = rows[mine] @ weight[expert].T
    y = mx.array(y.reshape(*chosen.shape, M, -1)).astype(x.dtype)
    return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


_stock_attention = mx.fast.scaled_dot_product_attention


def _attention(q, k, v, *, scale, mask=None, sinks=None, **options):
    if sinks is not None or options or q.shape[1] % k.shape[1]:
        return _stock_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    queries, keys, values = host(q), host(k), host(v)
    B, heads, L, D = queries.shape
    kv, S = keys.shape[1:3]
    repeats = heads // kv
    causal = isinstance(mask, str)
    bias = None
    if mask is not None and not causal:
        bias = to_numpy(mask)
        if bias.dtype == bool:
            bias = np.where(bias, np.float32(0), np.float32(-np.inf))
        bias = np.broadcast_to(bias, (B, heads, L, S)).reshape(B, kv, repeats, L, S)
    queries = queries.reshape(B, kv, repeats, L, D) * np.float32(scale)
    out = np.empty((B, kv, repeats, L, values.shape[-1]), np.float32)
    for start in range(0, L, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, L)
        seen = stop + S - L if causal else S
        scores = queries[:, :, :, start:stop] @ keys[:, :, None, :seen].swapaxes(-1, -2)
        if causal:
            later = np.arange(seen) > np.arange(start, stop)[:, None] + (S - L)
            scores[..., later] = -np.inf
        elif bias is not None:
            scores += bias[:, :, :, start:stop]
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        out[:, :, :, start:stop] = scores @ values[:, :, None, :seen]
    return mx.array(out.reshape(B, heads, L, -1)).astype(q.dtype)
