"""MLX checkpoints that are quantized already, ours or mlx-lm's, to be read as codes or as floats.

Mode "affine" is our own format. mxfp4, mxfp8 and nvfp4 hold small floats: weight uint32, lowest bits first,
scales uint8, exponents of two for 32 columns or e4m3 for 16.
"""

from __future__ import annotations

import math

import numpy as np

from mlxq.checkpoint.tensors import (
    E2M1,
    E4M3,
    E8M0,
    FLOATS,
    CodesTensor,
    FileTensor,
    FloatCodes,
    StackedTensor,
    Tensor,
    expect,
    unpack_words,
)  # fmt: skip
from mlxq.format import BITS, GROUP_SIZES

_MODES = {"mxfp4": (E2M1, E8M0, 4, 32), "mxfp8": (E4M3, E8M0, 8, 32), "nvfp4": (E2M1, E4M3, 4, 16)}


class AffineTensor(CodesTensor):
    """One layer in MLX's own format, (..., N, K)."""

    def __init__(self, words: FileTensor, scales: FileTensor, biases: FileTensor, bits: int, group: int):
        self.words, self.scales, self.biases, self.bits, self.group = words, scales, biases, bits, group
        self.shape = (*words.shape[:-1], scales.shape[-1] * group)

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        return unpack_words(self.words.values[rows], self.bits, self.K)

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        return tuple(part.as_float(part.values[rows]) for part in (self.scales, self.biases))


def affine_format(words_per_row: int, scales_per_row: int, said: dict) -> tuple[int, int] | None:
    """(bits, group size) that fit the arrays: what config.json says, else the first that does."""
    bits, group = said.get("bits"), said.get("group_size")
    product = words_per_row * 32 / scales_per_row if scales_per_row else 0  # bits * group_size, whatever K is
    if type(bits) is int and type(group) is int and bits in BITS and bits * group == product:
        return bits, group
    groups = (group, *GROUP_SIZES) if type(group) is int else GROUP_SIZES
    return next(((b, g) for g in groups for b in BITS if b * g == product), None)


def _small_floats(tensors, base: str, mode: str) -> Tensor:
    codes, scales_table, bits, group = _MODES[mode]
    words, scales = tensors[f"{base}.weight"], tensors[f"{base}.scales"]
    K = words.shape[-1] * 32 // bits
    expect(tensors, f"{base}.weight", ("uint32",), words.shape)
    expect(tensors, f"{base}.scales", ("uint8",), (*words.shape[:-1], K // group))
    factor = np.float32(1)
    if f"{base}.global_scale" in tensors:
        factor = tensors[f"{base}.global_scale"].floats().reshape(-1)[0]
    rows = words.values.view(np.uint8)
    values = scales_table[scales.values] * factor
    if len(words.shape) == 2:
        return FloatCodes(rows, codes, values, 1, group)
    N = words.shape[-2]
    parts = [slice(i * N, (i + 1) * N) for i in range(math.prod(words.shape[:-2]))]
    if len(words.shape) != 3:
        raise ValueError(f"{base}.weight has {len(words.shape)} axes; wanted 2 or 3")
    return StackedTensor([FloatCodes(rows[part], codes, values[part], 1, group) for part in parts])


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for each weight, scales and biases. Raises ValueError."""
    joined, used = {}, set()
    for name in tensors:
        base = name.removesuffix(".scales")
        if base == name:
            continue
        own = settings.get(base)
        said = own if isinstance(own, dict) else settings
        mode = said.get("mode", "affine")
        words = tensors.get(f"{base}.weight")
        if words is None or len(words.shape) < 2:
            words = expect(tensors, f"{base}.weight", ("uint32",), (None, None))
        if isinstance(mode, str) and mode in _MODES:
            joined[f"{base}.weight"] = _small_floats(tensors, base, mode)
        elif mode == "affine":
            leading, scales = words.shape[:-1], tensors[name]
            scales = expect(tensors, name, FLOATS, (*leading, None))
            biases = expect(tensors, f"{base}.biases", FLOATS, scales.shape)
            expect(tensors, f"{base}.weight", ("uint32",), words.shape)
            found = affine_format(words.shape[-1], scales.shape[-1], said)
            if found is None:
                raise ValueError(
                    f"{base}: {words.shape[-1]} words and {scales.shape[-1]} scales a row fit no format"
                )
            joined[f"{base}.weight"] = AffineTensor(words, scales, biases, *found)
        else:
            raise ValueError(f"{base} is quantized in the mode {mode!r}; built: affine, {', '.join(_MODES)}")
        used |= {f"{base}.{part}" for part in ("weight", "scales", "biases", "global_scale")}
    return {name: tensor for name, tensor in tensors.items() if name not in used} | joined
