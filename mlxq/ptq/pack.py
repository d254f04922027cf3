"""Integer weights in the packed format of mlxq and MLX, chosen as a HowToQuantize says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlxq import bridge, format, ops
from mlxq.format import BITS, GROUP_SIZES, Format, Packed
from mlxq.ptq.qarray import HowToQuantize, QArray, quantize_unread
from mlxq.rules import GRIDS, QTYPES, calibration

DEFAULT_GROUP = 64  # of affine and mlx where a rule names none
SLAB_WEIGHTS = 1 << 20  # weights in float32 at once, so that memory stays near the weight and its codes


def grid_of(how: HowToQuantize) -> str | None:
    """The packed format's own quantizer, "affine" or "mlx", if that is the calibration method."""
    name = calibration(how.calibration_method)[0]
    return name if name in GRIDS else None


def packed_format(
    how: HowToQuantize, shape: tuple[int, ...], widths: tuple[int, ...] = BITS
) -> Format | None:
    """The format that holds an array of this shape quantized so along its last axis; None where none can.

    widths   bits to choose from: KERNEL_BITS for products with int8 inputs

    Codes of fewer bits go into the next width. A scale that serves more weights than a group has is repeated.
    """
    how = how.of_rank(len(shape))
    grid = grid_of(how)
    bits = int(how.qtype[3:]) if grid else QTYPES[how.qtype].bits
    axis, K = len(shape) - 1, shape[-1]
    if not how.qtype.startswith("int") or len(shape) < 2 or set(how.tiled_axes) - {axis}:
        return None
    if set(how.channelwise_axes) != set(range(axis)):
        return None
    run = how.tiles(shape).get(axis, DEFAULT_GROUP if grid else K)
    groups = [g for g in GROUP_SIZES if run % g == 0 and K % g == 0]
    wide = [b for b in widths if b >= bits]
    if not groups or not wide or (grid and (run not in GROUP_SIZES or wide[0] != bits)):
        return None
    return Format(wide[0], run if grid else groups[-1])


def pack(
    weight, how: HowToQuantize, widths: tuple[int, ...] = BITS, scale_dtype: str | None = None
) -> Packed:
    """The packed form of a float weight (..., N, K), in its own framework.

    scale_dtype   None: the weight's dtype, but float32 for asymmetric codes, whose bias is a product

    Codes, scales and zero points are those of qarray.quantize, or of ops.quantize for affine and mlx.
    Raises ValueError where packed_format gives None, and for NaN and infinity.
    """
    fmt = packed_format(how, tuple(weight.shape), widths)
    if fmt is None:
        raise ValueError(
            f"{how.qtype} of shape {tuple(weight.shape)} with tiles {how.tiled_axes or 'of the whole axis'} "
            f"has no packed format: groups are {', '.join(map(str, GROUP_SIZES))} along the last axis"
        )
    if grid := grid_of(how):
        return ops.quantize(weight, fmt, rule=grid, scale_dtype=scale_dtype)
    flat = weight.reshape(-1, weight.shape[-1])
    tile = how.tiles(tuple(weight.shape)).get(weight.ndim - 1)
    rows = replace(how, channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})
    step, parts = max(1, SLAB_WEIGHTS // flat.shape[1]), []
    for start in range(0, flat.shape[0], step):
        slab = flat[start : start + step]
        format.check_finite("pack", bridge.to_numpy(slab))
        parts.append(_pack_codes(quantize_unread(slab, rows), fmt, scale_dtype))
    words, scales, biases, dtype = (list(column) for column in zip(*parts, strict=True))
    leading = tuple(weight.shape[:-1])

    def whole(slabs: list[np.ndarray], name: str | None):
        return bridge.like(np.concatenate(slabs).reshape(*leading, -1), weight, name)

    words_name = "uint32" if bridge.kind(weight) == "torch" else None
    return Packed(whole(words, words_name), whole(scales, dtype[0]), whole(biases, dtype[0]), fmt)


def _pack_codes(array: QArray, fmt: Format, scale_dtype: str | None):
    """(words, scales, biases, dtype of these) of integer codes (N, K), in numpy.

    code + 2^(bits-1), bias = -(2^(bits-1) + zero) * scale. The bias of symmetric codes is exact in every
    dtype. fmt must hold the codes and divide their tiles.
    """
    zero = 1 << (fmt.bits - 1)
    codes = (bridge.to_numpy(array.qvalue).astype(np.int16) + zero).astype(np.uint8)
    dtype = scale_dtype or (array.dtype if array.zero_point is None else "float32")
    groups = fmt.groups(array.shape[-1])

    def grouped(a):
        every = np.repeat(bridge.to_numpy(a), groups // a.shape[-1], axis=-1).astype(np.float32)
        return np.broadcast_to(every, (codes.shape[0], groups))  # fixed has one range for all rows

    scales = grouped(array.scale)
    offset = np.float32(-zero) if array.zero_point is None else -(zero + grouped(array.zero_point))
    biases = scales * offset
    if not np.isfinite(format.store(biases, dtype)).all():
        raise ValueError(
            f"pack: {dtype} cannot hold {zero} times the largest scale, {np.abs(scales).max():g}; "
            "use bfloat16 or float32 weights"
        )
    return format.pack(codes, fmt.bits), scales, biases, dtype
