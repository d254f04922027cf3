"""Products of quantized arrays, and the operations that a model calls directly, quantized by a rule.

dot_general, einsum and conv_general multiply codes where they can: both operands quantized, no table of
numbers (nf4), and no tile of a summed axis below 128. Integer products are summed exactly, whatever the
framework. Everything else is dequantized and multiplied in float32. Results have the dtype of the scales.

Compared with qwix 0.1.8, whose order of operations this is: float sums may differ in their last bits, and
16-bit results are rounded once, at the end.
"""

from __future__ import annotations

import math
from typing import Any

from mlxq import bridge, ops
from mlxq.format import KERNEL_BITS, Packed, dtype_name
from mlxq.nn.q8 import is_per_row
from mlxq.ptq.arrays import namespace
from mlxq.ptq.pack import pack, packed_format
from mlxq.ptq.plan import Site, site_of
from mlxq.ptq.qarray import (
    HowToQuantize,
    QArray,
    decode,
    dequantize,
    generic,
    quantize,
    quantize_unread,
    quantize_with,
    scale_and_zero_point,
)
from mlxq.ptq.straight import Rounding, may_clip, rounded_product, straight_through
from mlxq.rules import QTYPES, QuantizationRule

SHORTEST_TILE = 128  # of a summed axis whose codes are multiplied; shorter ones are dequantized first
Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dot_general(lhs, rhs, dimension_numbers: Numbers):
    """Products summed over pairs of axes, batched over others: axes (batch, rest of lhs, rest of rhs).

    lhs, rhs            QArray or float array, of one framework
    dimension_numbers   ((lhs summed, rhs summed), (lhs batch, rhs batch)), axes in pairs

    Raises ValueError for tiles that differ, two asymmetric operands and shapes that do not fit.
    """
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    for a, b in zip((*lhs_sum, *lhs_batch), (*rhs_sum, *rhs_batch), strict=True):
        if lhs.shape[a] != rhs.shape[b]:
            raise ValueError(
                f"dot_general: axis {a} of {tuple(lhs.shape)} is paired with axis {b} of {tuple(rhs.shape)}"
            )
    operands = [_Operand(lhs, lhs_sum, lhs_batch), _Operand(rhs, rhs_sum, rhs_batch)]
    if all(operand.keeps_codes for operand in operands):
        return _of_codes(*operands)
    values = [operand.without_codes() for operand in operands]
    return _of_codes(*(_Operand(v, o.summed, o.batch) for v, o in zip(values, operands, strict=True)))


class _Operand:
    """One side of a product: its codes and scales, and which axes are summed, batched and free."""

    def __init__(self, array, summed, batch):
        self.array, self.summed, self.batch = array, tuple(summed), tuple(batch)
        self.quantized = isinstance(array, QArray)
        if self.quantized:
            array.validate()
        self.shape = tuple(array.shape)
        self.free = tuple(a for a in range(len(self.shape)) if a not in (*self.summed, *self.batch))
        self.xp = namespace(array.qvalue if self.quantized else array)
        self.dtype = array.dtype if self.quantized else dtype_name(array)

    @property
    def keeps_codes(self) -> bool:
        if not self.quantized or self.array.qtype == "nf4":
            return False
        scale = self.array.scale.shape
        return all(scale[a] == 1 or self.shape[a] // scale[a] >= SHORTEST_TILE for a in self.summed)

    @property
    def is_integer(self) -> bool:
        return self.quantized and QTYPES[self.array.qtype].is_integer

    def without_codes(self):
        return dequantize(self.array) if self.quantized else self.array

    def counts(self) -> list[int]:
        """Tiles along each summed axis."""
        return [self.array.scale.shape[a] if self.quantized else 1 for a in self.summed]

    def scales(self):
        """float32 scales, one for each index of the axes that are not summed."""
        scale = self.xp.cast(self.array.scale, "float32")
        pairs = enumerate(zip(self.shape, scale.shape, strict=True))
        shape = [s if axis in self.summed else n for axis, (n, s) in pairs]
        if list(scale.shape) == shape:
            return scale
        return generic(lambda a, b: a * b, self.xp.full(shape, 1, scale), scale, self.xp)

    def arranged(self, array, counts, free_first: bool):
        """The array as (batch, tiles, free, summed), or with the last two swapped; axes flattened in each."""
        shape, order, tile_axes, sum_axes, position = [], [], [], [], {}
        for axis, dim in enumerate(array.shape):
            position[axis] = len(shape)
            if axis in self.summed:
                count = counts[self.summed.index(axis)] if dim > 1 or self.shape[axis] == 1 else 1
                count = min(count, dim)
                shape += [count, dim // count]
            else:
                shape.append(dim)
        tile_axes = [position[a] for a in self.summed]
        sum_axes = [position[a] + 1 for a in self.summed]
        batch, free = [position[a] for a in self.batch], [position[a] for a in self.free]
        order = batch + tile_axes + (free + sum_axes if free_first else sum_axes + free)
        split = self.xp.permute(array.reshape(shape), order)
        sizes = [math.prod(shape[a] for a in axes) for axes in (batch, tile_axes, free, sum_axes)]
        b, t, f, s = sizes
        return split.reshape((b, t, f, s) if free_first else (b, t, s, f))


def _of_codes(lhs: _Operand, rhs: _Operand):
    xp = lhs.xp
    counts = []
    for a, b in zip(lhs.counts(), rhs.counts(), strict=True):
        if a > 1 and b > 1 and a != b:
            raise ValueError(
                f"dot_general: summed axes have {a} tiles on one side and {b} on the other; wanted the same"
            )
        counts.append(max(a, b))
    zeros = [o.quantized and o.array.zero_point is not None for o in (lhs, rhs)]
    if all(zeros):
        raise ValueError("dot_general: only one operand can be asymmetric")
    exact = lhs.is_integer and rhs.is_integer
    values = [decode(o.array, "float32") if o.quantized else xp.cast(o.array, "float32") for o in (lhs, rhs)]
    a, b = lhs.arranged(values[0], counts, True), rhs.arranged(values[1], counts, False)
    y = xp.cast(xp.exact_matmul(a, b), "float32") if exact else a @ b
    for operand, first in ((lhs, True), (rhs, False)):
        if operand.quantized:
            y = y * operand.arranged(operand.scales(), counts, first)
    y = xp.reduce("sum", y, (1,)) if math.prod(counts) > 1 else y
    shape = [lhs.shape[a] for a in (*lhs.batch, *lhs.free)] + [rhs.shape[a] for a in rhs.free]
    return xp.cast(y.reshape(shape), _wider(lhs.dtype, rhs.dtype))


def _wider(a: str, b: str) -> str:
    order = ("bfloat16", "float16", "float32", "float64")
    return a if a == b else "float32" if {a, b} == {"bfloat16", "float16"} else max(a, b, key=order.index)


class Subscripts:
    """Subscripts like mk,nk->mn taken apart, an ellipsis spelt out. Raises ValueError for other forms."""

    def __init__(self, text: str, lhs_ndim: int, rhs_ndim: int):
        said = f"einsum {text!r}"
        inputs, arrow, output = text.replace(" ", "").partition("->")
        sides = inputs.split(",")
        if len(sides) != 2 or not arrow:
            raise ValueError(f"{said}: wanted two operands and an output, as in 'mk,nk->mn'")
        dots = [n - len(s.replace("...", "")) for s, n in zip(sides, (lhs_ndim, rhs_ndim), strict=True)]
        spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in text]
        run = "".join(spare[: max(dots)]) if "..." in text else ""
        self.lhs, self.rhs = (
            s.replace("...", run[len(run) - d :] if d > 0 else "") for s, d in zip(sides, dots, strict=True)
        )
        self.output = output.replace("...", run)
        for name, subs, ndim in (("left", self.lhs, lhs_ndim), ("right", self.rhs, rhs_ndim)):
            if len(subs) != ndim or len(set(subs)) != ndim or not subs.isalpha():
                raise ValueError(
                    f"{said}: the {name} operand has {ndim} axes, each wants a letter of its own"
                )
        self.summed = [c for c in self.lhs if c in self.rhs and c not in self.output]
        alone = set(self.lhs) ^ set(self.rhs)
        if alone - set(self.output) or set(self.output) - set(self.lhs) - set(self.rhs):
            raise ValueError(f"{said}: an axis of one operand only must be in the output, and no others")

    @property
    def dimension_numbers(self) -> Numbers:
        """Of dot_general(right operand, left operand)."""
        batch = [c for c in self.lhs if c in self.rhs and c in self.output]
        sides = (self.rhs, self.lhs)
        return tuple(tuple(tuple(map(s.index, letters)) for s in sides) for letters in (self.summed, batch))

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of dot_general's result in the output's order."""
        (_, (batch, _)) = self.dimension_numbers
        made = [self.rhs[a] for a in batch]
        made += [c for c in self.rhs if c not in self.lhs] + [c for c in self.lhs if c not in self.rhs]
        return tuple(made.index(c) for c in self.output)

    def how(self, left: bool, qtype: str, tile, method: str) -> HowToQuantize:
        """A scale for each index of the axes that are not summed; the last summed axis in tiles."""
        subs = self.lhs if left else self.rhs
        summed = [a for a, c in enumerate(subs) if c in self.summed]
        tile = QTYPES[qtype].tile or tile
        return HowToQuantize(
            qtype=qtype,
            channelwise_axes=tuple(a for a in range(len(subs)) if a not in summed),
            tiled_axes={summed[-1]: tile} if tile and summed else {},
            calibration_method=method,
        )


def einsum(
    subscripts: str,
    lhs,
    rhs,
    rule: QuantizationRule | None = None,
    *,
    rhs_is_weight: bool = True,
    static=(None, None),
):
    """The einsum of two operands, quantized by the rule; QArrays among them are taken as they are.

    static   (scale, zero point or None) of each input; None: its own range

    The left operand becomes act_qtype; the right one weight_qtype, or act_qtype if rhs_is_weight is False.
    A rule without weight_qtype quantizes nothing. Gradients pass straight through the rounding of both, as in
    mlxq.ptq.straight. Raises ValueError for other forms of einsum.
    """
    parts = Subscripts(subscripts, lhs.ndim, rhs.ndim)
    roundings: list[Rounding | None] = [None, None]
    if rule is not None and rule.weight_qtype is not None:
        act = (rule.act_qtype, rule.act_calibration_method or "absmax")
        weight = (rule.weight_qtype, rule.weight_calibration_method) if rhs_is_weight else act
        if rule.grid:
            raise ValueError(f"einsum: {rule.grid} chooses packed weights of layers; use absmax")
        roundings = [
            None if qtype is None else rounding(parts.how(left, qtype, rule.tile_size, method), given)
            for left, (qtype, method), given in zip((True, False), (act, weight), static, strict=True)
        ]

    def product(lhs, rhs):
        # opt_einsum's order, so qwix's: rhs is scaled first.
        y = dot_general(rhs, lhs, parts.dimension_numbers)
        return namespace(y).permute(y, parts.order)

    return rounded_product(product, (lhs, rhs), roundings)


def rounding(how: HowToQuantize, static=None) -> Rounding:
    """By an array's own range, or by a static (scale, zero point or None)."""
    clips = may_clip(how.calibration_method, static is not None)
    if static is None:
        return Rounding(lambda array: quantize_unread(array, how), clips)
    return Rounding(
        lambda array: quantize_with(
            array, how.qtype, namespace(array).cast(static[0], dtype_name(array)), static[1]
        ),
        clips,
    )


def matmul(lhs, rhs, rule: QuantizationRule | None = None, **options):
    """lhs (..., M, K) @ rhs (K, N) or (..., K, N), quantized by the rule and the options as einsum says."""
    return einsum(matmul_subscripts(lhs, rhs), lhs, rhs, rule, **options)


def matmul_subscripts(lhs, rhs) -> str:
    """A matmul as einsum writes it. Raises ValueError for operands of one axis and batches that differ."""
    if lhs.ndim < 2 or rhs.ndim < 2:
        raise ValueError(f"matmul: operands of {lhs.ndim} and {rhs.ndim} axes; wanted two or more")
    if rhs.ndim not in (2, lhs.ndim):
        raise ValueError(f"matmul: the right operand has {rhs.ndim} axes; wanted 2 or {lhs.ndim}")
    batch = "abcdefgh"[: lhs.ndim - 2]
    right = batch if rhs.ndim > 2 else ""
    return f"{batch}mk,{right}kn->{batch}mn"


def store_weight(weight, site: Site) -> Packed | QArray:
    """A float weight as its site keeps it: packed where a format holds it, else codes one by one."""
    widths = (KERNEL_BITS,) if site.integer else ()
    if packed_format(site.weight, tuple(weight.shape), *widths) is not None:
        return pack(weight, site.weight, *widths)
    return quantize(weight, site.weight)


def input_range(stats: dict[str, Any], site: Site):
    """(scale, zero point or None) of a static input, from averaged statistics."""
    return scale_and_zero_point(stats, site.rule.act_qtype)


def quantize_input(x, site: Site, static=None) -> QArray:
    """The codes of an input (..., K): by rows or tiles, by its own range, or by a static (scale, zero)."""
    rule = site.rule
    if static is not None:
        xp, (scale, zero) = namespace(x), static
        ones = (1,) * (x.ndim - 1)
        spread = [None if a is None else a.reshape(*ones, -1) for a in (scale, zero)]
        return quantize_with(x, rule.act_qtype, xp.cast(spread[0], dtype_name(x)), spread[1])
    if site.integer:
        codes, scales = ops.q8_rows(x, site.act_tile)
        return QArray(codes, scales if site.act_tile else scales[..., None], None, "int8")
    return quantize_unread(x, site.act(x.ndim))


def linear_with(x, weight: Packed | QArray, site: Site, bias=None, static=None):
    """x @ W.T + bias for a stored weight: x (..., K) -> (..., N) in x's dtype.

    static   (scale, zero point) of the input, as input_range gives it; None: its own range at each call

    What the layers of quantize_model compute, and what training with fake quantization computes forward.
    Gradients reach x straight through its rounding: dx = dy @ W, dequantized; where a static, fixed or rms
    range clips x, 0. The weight's codes and scales pass none.
    """
    if site.rule.act_qtype is None:
        y = _linear(x, weight, site, static)
    else:
        y = straight_through(
            lambda x: _linear(x, weight, site, static),
            lambda arrays, dy: [_to_input(arrays[0], dy, weight, site, static)],
            x,
        )
    return y if bias is None else y + namespace(x).cast(bias, dtype_name(x))


def _linear(x, weight: Packed | QArray, site: Site, static):
    dtype = dtype_name(x)
    if site.rule.act_qtype is None:
        return ops.qmm(x, weight) if isinstance(weight, Packed) else x @ dequantize(weight.astype(dtype)).T
    inputs = quantize_input(namespace(x).cast(x, "float32"), site, static)
    if site.integer:
        scales = inputs.scale
        if site.act_tile is None:
            scales = scales.reshape(scales.shape[:-1] if static is None else ())
        by_rows = site.act_tile is None and is_per_row(weight.format.bits, weight.scales, weight.biases)
        y = ops.q8mm(inputs.qvalue, scales, weight, per_row=by_rows)
    elif site.sums_codes:
        y = ops.q8mm(inputs.qvalue, _kernel_scales(inputs), weight)
    elif isinstance(weight, Packed):
        y = ops.qmm(dequantize(inputs), weight)
    else:
        rows = inputs.reshape(-1, x.shape[-1]) if inputs.ndim != 2 else inputs
        y = dot_general(rows, weight.astype("float32"), (((1,), (1,)), ((), ())))
        y = y.reshape(*x.shape[:-1], weight.shape[0])
    return namespace(x).cast(y, dtype)


def _kernel_scales(inputs: QArray):
    """The scales of inputs as ops.q8mm takes them: one number, (...) of rows, or (..., tiles)."""
    scale = inputs.scale
    if math.prod(scale.shape) == 1:
        return scale.reshape(())
    if scale.shape[-1] == 1:
        return scale[..., 0]
    xp = namespace(scale)
    return xp.broadcast(scale, (*inputs.shape[:-1], scale.shape[-1]))


def input_rounding(site: Site, static=None) -> Rounding:
    """How inputs of a site are rounded, in float32."""
    clips = may_clip(site.rule.act_calibration_method or "absmax", static is not None)
    return Rounding(lambda x: quantize_input(namespace(x).cast(x, "float32"), site, static), clips)


def _to_input(x, dy, weight: Packed | QArray, site: Site, static):
    """float32 dy @ W, 0 where x was clipped."""
    dy = namespace(x).cast(dy, "float32")
    if isinstance(weight, Packed):
        dx = ops.qmm(dy, weight, transpose=False)
    else:
        dx = dy @ dequantize(weight.astype("float32"))
    return dx if site.rule.act_qtype is None else input_rounding(site, static).gradient(x, dx)


def linear(x, weight, bias=None, rule: QuantizationRule | None = None, static=None):
    """x @ weight.T + bias quantized by the rule: what a layer that the rule matches computes, to the bit.

    weight   float (N, K)

    Gradients as of linear_with, and for the weight dy.T @ (x as it was rounded).
    """
    if rule is None or rule.weight_qtype is None:
        y = x @ weight.T
        return y if bias is None else y + bias
    site = site_of("linear", "linear", tuple(weight.shape), dtype_name(weight), rule)

    def gradients(arrays, dy):
        x, weight = arrays
        xp, rounds = namespace(x), input_rounding(site, static)
        used = dequantize(rounds.quantize(x)) if rule.act_qtype is not None else xp.cast(x, "float32")
        dweight = xp.cast(dy, "float32").reshape(-1, dy.shape[-1]).T @ used.reshape(-1, x.shape[-1])
        return [_to_input(x, dy, store_weight(weight, site), site, static), dweight]

    y = straight_through(
        lambda x, weight: _linear(x, store_weight(weight, site), site, static), gradients, x, weight
    )
    return y if bias is None else y + namespace(x).cast(bias, dtype_name(x))


def embedding(ids, table, rule: QuantizationRule | None = None):
    """Rows of a table (V, K) quantized by the rule: integers (...) -> (..., K) in the table's dtype."""
    if rule is None or rule.weight_qtype is None:
        return table[ids]
    site = site_of("embedding", "embedding", tuple(table.shape), dtype_name(table), rule)
    return rows_of(store_weight(table, site), ids)


def rows_of(table: Packed | QArray, ids):
    """Dequantized rows of a stored table; only the rows asked for are unpacked."""
    shape = tuple(ids.shape)
    flat = ids.reshape(-1)
    if isinstance(table, Packed):
        part = Packed(table.words[flat], table.scales[flat], table.biases[flat], table.format)
        return ops.dequantize(part).reshape(*shape, table.K)
    zero = None if table.zero_point is None else table.zero_point[flat]
    part = QArray(table.qvalue[flat], table.scale[flat], zero, table.qtype)
    return dequantize(part).reshape(*shape, table.shape[1])


def conv_general(
    x,
    weight,
    rule: QuantizationRule | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    static=None,
):
    """A convolution of any rank, quantized by the rule, in the framework's own layout.

    MLX     x (B, ..., C)   weight (O, ..., C / groups)
    torch   x (B, C, ...)   weight (O, C / groups, ...)

    static   (scale, zero point or None) of the input; None: the range of each image

    A scale for each image and for each output; QArrays are taken as they are. Weights alone may be quantized,
    which qwix refuses. Raises ValueError for tiles and for asymmetric weights, TypeError for numpy.
    Gradients pass straight through the rounding of both, as in mlxq.ptq.straight.
    """
    roundings: list[Rounding | None] = [None, None]
    if rule is not None and rule.weight_qtype is not None:
        site = site_of("conv_general", "conv_general", tuple(weight.shape), "float32", rule)
        act = site.act(x.ndim)
        roundings = [None if act is None else rounding(act, static), rounding(site.weight)]
    return conv_rounded(x, weight, roundings, stride, padding, dilation, groups)


def conv_rounded(x, weight, roundings, stride=1, padding=0, dilation=1, groups: int = 1):
    """conv_with of an input and a weight that are rounded first, where these say how."""
    return rounded_product(
        lambda x, weight: conv_with(x, weight, stride, padding, dilation, groups), (x, weight), roundings
    )


def image_rounding(site: Site, ndim: int, static=None) -> Rounding:
    """How the input of a convolution is rounded: by each image's range, or by a static one for all."""
    if static is None:
        return rounding(site.act(ndim))

    def codes(x):
        return quantize_input(x.reshape(x.shape[0], -1), site, static).reshape(*x.shape)

    return Rounding(codes, True)


def conv_with(x, weight, stride=1, padding=0, dilation=1, groups: int = 1):
    """The convolution of arrays or QArrays: codes where both are QArrays, else of dequantized values."""
    both = isinstance(x, QArray) and isinstance(weight, QArray)
    for name, array in (("input", x), ("weight", weight)):
        if isinstance(array, QArray) and array.tiles:
            raise ValueError(f"conv_general: the {name} has tiles; wanted one scale for each image or output")
    if isinstance(weight, QArray) and weight.zero_point is not None:
        raise ValueError("conv_general: the weight is asymmetric; only the input may be")
    if not both or "nf4" in (x.qtype, weight.qtype):
        values = [dequantize(a) if isinstance(a, QArray) else a for a in (x, weight)]
        return _convolve(*values, stride, padding, dilation, groups)
    exact = all(QTYPES[a.qtype].is_integer for a in (x, weight))
    xp = namespace(x.qvalue)
    # Integers below 2^24 are exact in float32; torch has float64 for longer sums.
    wide = "float64" if exact and xp.kind == "torch" else "float32"
    y = _convolve(decode(x, wide), decode(weight, wide), stride, padding, dilation, groups)
    outputs = [1] * y.ndim
    outputs[-1 if xp.kind == "mlx" else 1] = weight.shape[0]
    y = (
        xp.cast(y, "float32")
        * xp.cast(x.scale, "float32")
        * xp.cast(weight.scale, "float32").reshape(outputs)
    )
    return xp.cast(y, _wider(x.dtype, weight.dtype))


def _convolve(x, weight, stride, padding, dilation, groups):
    kind = bridge.kind(x)
    if kind == "mlx":
        import mlx.core as mx

        return mx.conv_general(x, weight, stride, padding, kernel_dilation=dilation, groups=groups)
    if kind != "torch":
        raise TypeError("conv_general: numpy has no convolution; pass an mx.array or a torch tensor")
    functions = namespace(x).xp.nn.functional
    convolve = getattr(functions, f"conv{x.ndim - 2}d")
    return convolve(x, weight, None, stride, padding, dilation, groups)
