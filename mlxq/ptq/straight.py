"""Gradients straight through rounding: forward what codes compute, backward what they stand for.

    y = product(round(a), b)        da = d product / da at (round(a), b), as if round(a) were a

qwix's QtProvider does the same with the operands before they were rounded; a quantized layer has kept the
rounded ones only. Where a range may clip - static, fixed, rms, or a factor below 1 - what lies outside of it
passes nothing, as in qwix and in mlxq.nn.q8; the range of the array itself clips nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxq.ptq.arrays import namespace
from mlxq.ptq.qarray import QArray, dequantize, generic
from mlxq.rules import QTYPES, calibration


@dataclass(frozen=True)
class Rounding:
    """How an operand becomes codes, quantize(array) -> QArray, and whether its range may clip some values."""

    quantize: Callable
    clips: bool

    def gradient(self, array, dy):
        """dy where the array was rounded, 0 where it was clipped."""
        if not self.clips:
            return dy
        xp = namespace(array)
        return xp.where(inside(array, self.quantize(array)), dy, xp.full(dy.shape, 0, dy))


def may_clip(method: str, static: bool = False) -> bool:
    """Whether a range by this calibration may leave values out; static: it is not the array's own."""
    name, numbers = calibration(method)
    return static or name in ("fixed", "rms") or (bool(numbers) and numbers[0] < 1)


def inside(array, codes: QArray):
    """Which values have a code within half a step of them, or a float type's range around them."""
    xp, kind = namespace(array), QTYPES[codes.qtype]
    scale = xp.cast(codes.scale, "float32")
    ratio = generic(lambda a, b: a * b, xp.cast(array, "float32"), 1 / scale, xp)
    if codes.zero_point is not None:
        ratio = generic(lambda a, b: a + b, ratio, xp.cast(codes.zero_point, "float32"), xp)
    low, high = (kind.low - 0.5, kind.high + 0.5) if kind.is_integer else (-kind.bound, kind.bound)
    return (ratio >= low) & (ratio <= high)


def rounded_product(product: Callable, operands: Sequence, roundings: Sequence[Rounding | None]):
    """product(*operands) of operands that are rounded first, with gradients for all that came as floats.

    product     of float arrays and QArrays, differentiable where it is of float arrays
    roundings   one for each operand; None: as it is, like QArrays
    """
    places = [n for n, operand in enumerate(operands) if not isinstance(operand, QArray)]
    if not any(roundings[n] for n in places):
        return product(*operands)

    def rounded(arrays) -> list:
        made = list(operands)
        for n, array in zip(places, arrays, strict=True):
            made[n] = roundings[n].quantize(array) if roundings[n] else array
        return made

    def run(*arrays):
        return product(*rounded(arrays))

    def gradients(arrays, dy):
        xp = namespace(dy)
        values = [
            dequantize(v.astype("float32")) if isinstance(v, QArray) else xp.cast(v, "float32")
            for v in rounded(arrays)
        ]

        def of(*chosen):
            whole = list(values)
            for n, value in zip(places, chosen, strict=True):
                whole[n] = value
            return product(*whole)

        found = _through(of, [values[n] for n in places], xp.cast(dy, "float32"))
        return [
            roundings[n].gradient(a, d) if roundings[n] else d
            for n, a, d in zip(places, arrays, found, strict=True)
        ]

    return straight_through(run, gradients, *(operands[n] for n in places))


def rounded_values(array, rounding: Rounding):
    """The numbers that the array's codes stand for, in the codes' dtype; gradients pass through."""
    return straight_through(
        lambda array: dequantize(rounding.quantize(array)),
        lambda arrays, dy: [rounding.gradient(arrays[0], dy)],
        array,
    )


def straight_through(run: Callable, gradients: Callable, *arrays):
    """run(*arrays), whose gradients are gradients(arrays, dy): one for each array, in any float dtype.

    Of numpy, MLX (custom_function) or torch (autograd.Function); second derivatives do not exist.
    """
    xp = namespace(arrays[0])
    if xp.kind == "numpy":
        return run(*arrays)
    if xp.kind == "torch":
        return _function(xp.xp).apply(run, gradients, *arrays)
    made = xp.xp.custom_function(run)

    @made.vjp
    def vjp(primals, dy, _):
        alone = not isinstance(primals, list | tuple)  # MLX unwraps a single one
        primals = (primals,) if alone else primals
        found = [d.astype(a.dtype) for a, d in zip(primals, gradients(primals, dy), strict=True)]
        return found[0] if alone else tuple(found)

    return made(*arrays)


@functools.cache
def _function(torch) -> type:
    """The autograd.Function of straight_through; whoever has a tensor has imported torch."""

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, gradients, *arrays):
            ctx.gradients = gradients
            ctx.save_for_backward(*arrays)
            return run(*arrays)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):
            arrays = ctx.saved_tensors
            found = ctx.gradients(arrays, dy.contiguous())
            return None, None, *(d.to(a.dtype) for a, d in zip(arrays, found, strict=True))

    return Straight


def _through(product: Callable, values: list, dy) -> Sequence:
    """dy through a differentiable product, to each of its operands."""
    xp = namespace(dy)
    if xp.kind == "mlx":
        return xp.xp.vjp(product, values, [dy])[1]
    with xp.xp.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        return xp.xp.autograd.grad(product(*leaves), leaves, dy)
