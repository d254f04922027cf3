"""Checkpoints of quant_method "mxfp4" (gpt-oss): experts in 4-bit floats, taken over code by code.

    BASE_blocks  uint8  (experts, N, K / 32, 16)   e2m1, the lower column in the low nibble
    BASE_scales  uint8  (experts, N, K / 32)       exponents of two, 127 more than they are

BASE is experts.gate_up_proj, whose even rows are the gate's and odd rows the other's, or experts.down_proj.
These are the bytes of MLX's mode mxfp4. Each weight, and each BASE_bias, comes under the name that mlx-lm
gives it: then its sanitize leaves all of them alone.
"""

from __future__ import annotations

import numpy as np

from mlxq.checkpoint.tensors import FLOATS, FileTensor, MxCodes, Tensor, expect

_HALVES = {"gate_proj": 0, "up_proj": 1}


class _Half(Tensor):
    """Every second column of a bias for each expert, (experts, 2 N): one of the two that share a tensor."""

    def __init__(self, whole: FileTensor, first: int):
        self.whole, self.first, self.dtype = whole, first, whole.dtype
        self.shape = (whole.shape[0], whole.shape[1] // 2)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, N)."""
        return self.whole.read(start, stop)[:, self.first :: 2]


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for each projection of the experts.

    Raises ValueError for parts that are missing or do not fit each other.
    """
    joined, used = {}, set()
    for name in tensors:
        base = name.removesuffix("_blocks")
        if base == name:
            if name.endswith("_scales"):
                _blocks(tensors, name.removesuffix("_scales"))
            continue
        codes, exponents = _blocks(tensors, base)
        used |= {name, f"{base}_scales", f"{base}_bias"}
        before, _, layer = base.rpartition(".")
        bias = tensors.get(f"{base}_bias")
        if bias is not None:
            bias = expect(tensors, f"{base}_bias", FLOATS, codes.shape[:2])
        if layer != "gate_up_proj":
            joined[f"{base}.weight"] = MxCodes(codes, exponents)
            if bias is not None:
                joined[f"{base}.bias"] = bias
            continue
        if codes.shape[1] % 2:
            raise ValueError(f"{name} has {codes.shape[1]} rows for two projections; wanted an even number")
        for half, first in _HALVES.items():
            joined[f"{before}.{half}.weight"] = MxCodes(codes[:, first::2], exponents[:, first::2])
            if bias is not None:
                joined[f"{before}.{half}.bias"] = _Half(bias, first)
    if not joined:
        raise ValueError(
            "config.json says quant_method mxfp4, but no tensor's name ends in _blocks, as gpt-oss has them"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in used} | joined


def _blocks(tensors, base: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 (experts, N, K / 2), exponents uint8 (experts, N, K / 32)), mapped."""
    blocks = expect(tensors, f"{base}_blocks", ("uint8",), (None, None, None, 16))
    exponents = expect(tensors, f"{base}_scales", ("uint8",), blocks.shape[:-1])
    return blocks.whole.reshape(*blocks.shape[:2], -1), exponents.whole
