"""Quantized arrays: codes, scales for tiles of any axes, and maybe zero points.

    value = (code - zero_point) * scale

The numerics are those of qwix 0.1.8, operation by operation, for numpy, MLX and torch alike: divide by the
scale, add the zero point, round half to even, saturate. XLA makes a division by a broadcast scale, and by a
constant, a product with the reciprocal; so do we, since an element of largest magnitude lies on a tie, where
the two round apart. 16-bit arrays are divided in float32 and rounded. Named differences, each held by a test:

1  float16: scales down to 2^-24 are kept (arrays.tiny_scale says why)
2  mxfp8, mxfp4: the scale is rounded up to a power of two from its bits; qwix takes a rounded log2, which can
   end one power higher or lower next to a power of two, and often in 16-bit arrays
3  nvfp4: a scale that e4m3 cannot hold becomes its smallest number, 2^-9, not 0 (qwix: NaN or infinity)
4  float8: float32 is rounded once; some XLA versions round through float16 first
5  rms: the order of the sum is each framework's own, so the scale may differ in its last bits
6  quantize refuses NaN and infinity; qwix makes codes of them. Forward passes do not read their inputs: there
   a tile that holds one becomes NaN, but for a fixed or a static range, which makes any code of it
7  int8 inputs whose rule names no act_calibration_method are rounded by max / 127, as ops.q8_rows does, where
   ops.q8mm takes the layer's weight; qwix's None is absmax, max / 127.5: say "absmax" for that
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlxq import bridge
from mlxq.format import dtype_name
from mlxq.ptq.arrays import FLOATS, namespace, tiny_scale
from mlxq.rules import GRIDS, QTYPES, QType, calibration, qtype_of

NF4 = np.array(
    # QLoRA (Dettmers et al., 2023), appendix E.
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0,
    ],
    np.float32,
)  # fmt: skip
Tile = int | float


@dataclass(frozen=True, kw_only=True)
class HowToQuantize:
    """How one array is quantized.

    qtype              a name of rules.QTYPES, or a framework's dtype
    channelwise_axes   axes whose every index has its own scale
    tiled_axes         {axis: tile}: so many neighbours share a scale; a float is 1/count of tiles
    calibration_method see rules.calibration

    Axes may count from the end, -1 the last. Raises ValueError for types that want another tile, and settings
    that do not exist.
    """

    qtype: str
    channelwise_axes: tuple[int, ...] = ()
    tiled_axes: Mapping[int, Tile] = field(default_factory=dict)
    calibration_method: str = "absmax"

    def __post_init__(self):
        if calibration(self.calibration_method)[0] not in GRIDS:
            object.__setattr__(self, "qtype", qtype_of(self.qtype))
            tile = QTYPES[self.qtype].tile
            if tile is not None and not self.tiled_axes:
                raise ValueError(
                    f"{self.qtype} has a scale for {tile} values: give tiled_axes, {{axis: {tile}}}"
                )
            for axis, size in self.tiled_axes.items():
                if tile is not None and size != tile:
                    raise ValueError(f"{self.qtype} has tiles of {tile}, but axis {axis} got {size}")
        object.__setattr__(self, "channelwise_axes", tuple(sorted(self.channelwise_axes)))
        object.__setattr__(self, "tiled_axes", dict(self.tiled_axes))
        if both := set(self.channelwise_axes) & set(self.tiled_axes):
            raise ValueError(f"axis {min(both)} cannot be channelwise and tiled at once")

    def __hash__(self):
        tiles = tuple(sorted(self.tiled_axes.items()))
        return hash((self.qtype, self.channelwise_axes, tiles, self.calibration_method))

    def of_rank(self, ndim: int) -> HowToQuantize:
        """The same for an array of so many axes, all counted from the front.

        Raises ValueError for an axis that it does not have, and for one that is named twice.
        """
        named = (*self.channelwise_axes, *self.tiled_axes)
        for axis in named:
            if not -ndim <= axis < ndim:
                what = "channelwise_axes" if axis in self.channelwise_axes else "tiled_axes"
                raise ValueError(
                    f"quantize: {what} names axis {axis}, but the array has {ndim} axes; wanted "
                    f"{-ndim} to {ndim - 1}"
                )
        if all(axis >= 0 for axis in named):
            return self
        front = [axis % ndim for axis in named]
        if len(set(front)) < len(front):
            raise ValueError(f"quantize: axes {named} of an array of {ndim} axes name one of them twice")
        tiles = {axis % ndim: tile for axis, tile in self.tiled_axes.items()}
        channels = tuple(axis % ndim for axis in self.channelwise_axes)
        return replace(self, channelwise_axes=channels, tiled_axes=tiles)

    def tiles(self, shape: tuple[int, ...]) -> dict[int, int]:
        """{axis: tile} as counts. Raises ValueError when an axis is no multiple of its tile."""
        sizes = {}
        for axis, tile in self.of_rank(len(shape)).tiled_axes.items():
            size = round(shape[axis] * tile) if isinstance(tile, float) else tile
            if size <= 0 or shape[axis] % size:
                raise ValueError(
                    f"an array of shape {tuple(shape)} cannot be tiled by {tile} along axis {axis}: "
                    f"{shape[axis]} is no multiple"
                )
            sizes[axis] = size
        return sizes

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an array of this shape, one axis for each of the array's."""
        tiles, channels = self.tiles(shape), self.of_rank(len(shape)).channelwise_axes
        return tuple(
            dim if axis in channels else dim // tiles[axis] if axis in tiles else 1
            for axis, dim in enumerate(shape)
        )


@dataclass(frozen=True)
class QArray:
    """Codes with their scales; arrays of one framework.

    qvalue      int8 for integer types, else uint8: the bits of a small float, a place in NF4
    scale       float, one axis for each of qvalue's, each of which divides it
    zero_point  int8, the scale's shape; None: symmetric
    """

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: str = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.qvalue.shape)

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    @property
    def dtype(self) -> str:
        """What dequantize gives: the scale's dtype, by its name."""
        return dtype_name(self.scale)

    @property
    def tiles(self) -> dict[int, int]:
        """{axis: tile} of the axes that have more than one scale but not one for each index."""
        pairs = enumerate(zip(self.shape, self.scale.shape, strict=True))
        return {axis: n // s for axis, (n, s) in pairs if s not in (n, 1)}

    def validate(self) -> QArray:
        """This same object. Raises ValueError when the arrays disagree."""
        for name, part in (("scale", self.scale), ("zero_point", self.zero_point)):
            if part is None:
                continue
            if part.ndim != self.ndim:
                raise ValueError(
                    f"QArray: {name} has shape {tuple(part.shape)}, of another rank than {self.shape}"
                )
            if any(n != s and (s == 0 or n % s) for n, s in zip(self.shape, part.shape, strict=True)):
                raise ValueError(f"QArray: {name} of shape {tuple(part.shape)} does not divide {self.shape}")
        if self.dtype not in FLOATS:
            raise ValueError(f"QArray: scales are {self.dtype}; wanted one of {', '.join(FLOATS)}")
        wanted = "int8" if QTYPES[self.qtype].is_integer else "uint8"
        if dtype_name(self.qvalue) != wanted:
            raise ValueError(f"QArray: {self.qtype} codes are {dtype_name(self.qvalue)}; wanted {wanted}")
        return self

    def _map(self, function) -> QArray:
        zero = None if self.zero_point is None else function(self.zero_point)
        return QArray(function(self.qvalue), function(self.scale), zero, self.qtype)

    def astype(self, dtype: str) -> QArray:
        """The same codes, with scales of another dtype: so another dtype of the values."""
        return replace(self, scale=namespace(self.scale).cast(self.scale, dtype))

    def transpose(self, *axes: int) -> QArray:
        order = axes or tuple(reversed(range(self.ndim)))
        return self._map(lambda a: namespace(a).permute(a, order))

    def reshape(self, *shape: int) -> QArray:
        """The array in another shape, -1 for what is left. Raises ValueError where tiles would be torn."""
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
        if -1 in shape:
            rest = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // rest if n == -1 else n for n in shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"QArray: {self.shape} does not fit {shape}")
        blocks = _blocks(self.shape, shape)
        return self._map(lambda a: a.reshape(_reshaped(tuple(a.shape), self.shape, blocks, shape)))

    def __getitem__(self, index) -> QArray:
        """Rows, slices and ellipsis of axes with one scale for each index, or one for all; integers of tiles.

        Raises ValueError for a slice through tiles.
        """
        index = list(index) if isinstance(index, tuple) else [index]
        if any(i is Ellipsis for i in index):
            at = next(n for n, i in enumerate(index) if i is Ellipsis)
            index[at : at + 1] = [slice(None)] * (self.ndim - len(index) + 1)
        index += [slice(None)] * (self.ndim - len(index))

        def take(a):
            parts = []
            for n, s, i in zip(self.shape, a.shape, index, strict=True):
                if n == s or (isinstance(i, slice) and i == slice(None)):
                    parts.append(i)
                elif s == 1:
                    parts.append(0 if isinstance(i, int) else slice(None))
                elif isinstance(i, int):
                    parts.append((i % n) // (n // s))
                else:
                    raise ValueError(f"QArray: {i} would cut tiles of {n // s} along an axis of {n}")
            return a[tuple(parts)]

        return self._map(take)


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes that hold the same elements, as short as can be; axes of 1 alone."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [], []
        if i < len(old) and (old[i] == 1 or j == len(new)):
            a, i = [old[i]], i + 1
        elif j < len(new) and (new[j] == 1 or i == len(old)):
            b, j = [new[j]], j + 1
        else:
            a, b, i, j = [old[i]], [new[j]], i + 1, j + 1
            while math.prod(a) != math.prod(b):
                if math.prod(a) < math.prod(b):
                    a, i = [*a, old[i]], i + 1
                else:
                    b, j = [*b, new[j]], j + 1
        blocks.append((a, b))
    return blocks


def _reshaped(shape, whole, blocks, new) -> list[int]:
    """The new shape of codes, scales or zero points: each run of axes keeps its scales or is refused."""
    out, at = [], 0
    for a, b in blocks:
        have = list(shape[at : at + len(a)])
        at += len(a)
        if have == a:
            out += b
        elif math.prod(have) == 1:
            out += [1] * len(b)
        elif math.prod(have) == have[0] and b and b[0] % have[0] == 0:
            out += [have[0]] + [1] * (len(b) - 1)
        else:
            raise ValueError(
                f"QArray: {whole} cannot become {tuple(new)} with scales of shape {tuple(shape)}"
            )
    return out


def _float_namespace(array):
    if dtype_name(array) not in FLOATS:
        raise TypeError(f"quantize: the array is {dtype_name(array)}; wanted one of {', '.join(FLOATS)}")
    return namespace(array)


def calibrate(array, how: HowToQuantize) -> dict[str, Any]:
    """{"absmax": a} or {"min": a, "max": a}, of the scale's shape and the array's dtype.

    fixed has one range for the whole array. Raises TypeError for arrays that are not float, ValueError for
    axes that do not exist or hold nothing, and for shapes that no tile divides.
    """
    xp, how = _float_namespace(array), how.of_rank(array.ndim)
    name, numbers = calibration(how.calibration_method)
    shape = how.scale_shape(tuple(array.shape))
    if name in GRIDS:
        raise ValueError(f"{name} chooses whole packed grids: see mlxq.ptq.pack")
    if name == "fixed":
        low, high = numbers
        one = (1,) * array.ndim
        if low + high == 0:
            return {"absmax": xp.full(one, high, array)}
        return {"min": xp.full(one, low, array), "max": xp.full(one, high, array)}
    split, axes, offset = [], [], 0
    tiles = how.tiles(tuple(array.shape))
    for axis, dim in enumerate(array.shape):
        if axis in tiles:
            split += [dim // tiles[axis], tiles[axis]]
            offset += 1
        else:
            split.append(dim)
        if axis not in how.channelwise_axes:
            if dim == 0:
                raise ValueError(
                    f"quantize: an array of shape {tuple(array.shape)} has no values along axis {axis}, so "
                    "no range; wanted one or more, or channelwise_axes with that axis"
                )
            axes.append(axis + offset)
    tiled, axes = array.reshape(split), tuple(axes)
    if name == "minmax":
        low, high = xp.reduce("min", tiled, axes), xp.reduce("max", tiled, axes)
        zero = xp.full(low.shape, 0, low)
        stats = {"min": xp.where(low > 0, zero, low), "max": xp.where(high < 0, zero, high)}
    elif name == "rms":
        stats = {"absmax": xp.sqrt(xp.reduce("mean", xp.square(tiled), axes))}
    else:
        stats = {"absmax": xp.reduce("max", xp.abs(tiled), axes)}
    factor = numbers[0] if numbers else None
    return {key: (value if factor is None else value * factor).reshape(shape) for key, value in stats.items()}


def scale_and_zero_point(stats: Mapping[str, Any], qtype: str):
    """(scale, zero point or None) of calibrated ranges, in their dtype.

    Raises ValueError for types without an asymmetric form.
    """
    kind = QTYPES[qtype_of(qtype)]
    some = next(iter(stats.values()))
    xp, dtype = namespace(some), dtype_name(some)
    if "absmax" in stats:
        scale = _over(stats["absmax"], kind.bound, xp)
    else:
        if not kind.is_integer or kind.bits not in (4, 8):
            raise ValueError(f"{qtype} has no asymmetric form: minmax serves int4 and int8; use absmax")
        scale = _over(stats["max"] - stats["min"], kind.high - kind.low, xp)
    scale = xp.where(scale < tiny_scale(dtype), xp.full(scale.shape, 1, scale), scale)
    is_number = xp.xp.isfinite(scale)
    if kind.name in ("mxfp8", "mxfp4"):
        scale = _power_above(scale, xp)
    elif kind.name == "nvfp4":
        codes = to_small_float(xp.cast(scale, "float32"), QTYPES["float8_e4m3fn"])
        codes = xp.where(codes == 0, xp.full(codes.shape, 1, codes), codes)
        scale = xp.cast(xp.take(_values_of("float8_e4m3fn"), codes), dtype)
    # Whatever codes infinity and NaN have, and whatever the bits above made of them, their tile is NaN.
    scale = xp.where(is_number, scale, xp.full(scale.shape, float("nan"), scale))
    if "absmax" in stats:
        return scale, None
    zero = xp.clip(xp.round(float(kind.low) - stats["min"] / scale), kind.low, kind.high)
    return scale, xp.cast(zero, "int8")


def _over(array, number: float, xp):
    """array / number as XLA computes it for a constant: times 1 / number, in float32 for 16-bit arrays."""
    dtype = dtype_name(array)
    if dtype == "float64":
        return array * (1.0 / number)
    return xp.cast(xp.cast(array, "float32") * float(np.float32(1) / np.float32(number)), dtype)


def _power_above(scale, xp):
    """The smallest power of two that is not below each scale, whose dtype it keeps."""
    bits = xp.bits_of(xp.cast(scale, "float32"))
    up = xp.cast((bits & 0x7FFFFF) != 0, "int32")
    return xp.cast(xp.floats_of(((bits >> 23) + up) << 23), dtype_name(scale))


def to_small_float(x, kind: QType):
    """uint8 codes of float32 values in a float type: sign, exponent, mantissa; rounded half to even.

    What is too large becomes the largest number. A code counts the numbers of one sign from zero up, so one
    formula serves normals and subnormals: mantissa steps above the smallest exponent.
    """
    xp, (mantissa, least) = namespace(x), kind.mantissa
    bits = xp.bits_of(x)
    size = xp.clip(xp.abs(x), 0.0, kind.bound)
    exponent = ((xp.bits_of(size) >> 23) & 255) - 127
    exponent = xp.where(exponent < least, xp.full(exponent.shape, least, exponent), exponent)
    step = xp.floats_of((exponent - mantissa + 127) << 23)
    code = xp.cast(xp.round(size / step), "int32") + ((exponent - least) << mantissa)
    negative = xp.where(bits < 0, xp.full(bits.shape, 1, bits), xp.full(bits.shape, 0, bits))
    return xp.cast(code + (negative << (kind.bits - 1)), "uint8")


def _values_of(qtype: str) -> np.ndarray:
    """float32 values of all codes of a type that has a table; codes that are no number give NaN."""
    kind = QTYPES[qtype]
    if kind.name == "nf4":
        return NF4
    mantissa, least = kind.mantissa
    half = 1 << (kind.bits - 1)
    codes = np.arange(half)
    exponent = np.maximum(codes >> mantissa, 1) - 1 + least
    steps = (codes & ((1 << mantissa) - 1)) + np.where(codes >> mantissa, 1 << mantissa, 0)
    values = np.ldexp(steps.astype(np.float32), exponent - mantissa).astype(np.float32)
    values[values > kind.bound] = np.nan
    return np.concatenate([values, -values])


def generic(operation, x, y, xp):
    """operation(x, y) where each axis of y divides x's, or the other way round: tiles share an element."""
    x_shape, y_shape, out = [], [], []
    for a, b in zip(x.shape, y.shape, strict=True):
        out.append(max(a, b))
        if a == b or 1 in (a, b):
            x_shape.append(a)
            y_shape.append(b)
        elif a % b == 0:
            x_shape += [b, a // b]
            y_shape += [b, 1]
        elif b % a == 0:
            x_shape += [a, 1]
            y_shape += [a, b // a]
        else:
            raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} do not tile each other")
    return operation(x.reshape(x_shape), y.reshape(y_shape)).reshape(out)


def quantize_with(array, qtype: str, scale, zero_point=None) -> QArray:
    """The codes of an array by a given scale and zero point.

    Raises TypeError for arrays that are not float, ValueError for shapes.
    """
    qtype = qtype_of(qtype)
    xp, kind = _float_namespace(array), QTYPES[qtype]
    dtype = dtype_name(array)
    if scale.ndim != array.ndim:
        raise ValueError(
            f"quantize: scales of shape {tuple(scale.shape)}, an array of {tuple(array.shape)}; wanted one "
            "axis for each of the array's, 1 where all share a scale"
        )
    if zero_point is not None and tuple(zero_point.shape) != tuple(scale.shape):
        raise ValueError(
            f"quantize: zero points of shape {tuple(zero_point.shape)}, scales of {tuple(scale.shape)}"
        )
    scale = xp.cast(scale, dtype)
    wide = dtype if dtype == "float64" else "float32"
    ratio = xp.cast(generic(lambda a, b: a * b, xp.cast(array, wide), 1 / xp.cast(scale, wide), xp), dtype)
    if zero_point is not None:
        ratio = generic(lambda a, b: a + b, ratio, xp.cast(zero_point, dtype), xp)
    if kind.is_integer:
        codes = xp.cast(xp.clip(xp.round(ratio), kind.low, kind.high), "int8")
    elif qtype == "nf4":
        codes = _to_nf4(xp.cast(ratio, "float32"), xp)
    else:
        codes = to_small_float(xp.cast(ratio, "float32"), kind)
    return QArray(codes, scale, zero_point, qtype)


def _to_nf4(x, xp):
    """Places of the nearest numbers in NF4, the lower at a tie of the rounded distances."""
    best = xp.abs(x - float(NF4[0]))
    place = xp.full(x.shape, 0, xp.bits_of(x))
    for number, value in enumerate(NF4[1:], 1):
        distance = xp.abs(x - float(value))
        nearer = distance < best
        best = xp.where(nearer, distance, best)
        place = xp.where(nearer, xp.full(x.shape, number, place), place)
    return xp.cast(place, "uint8")


def quantize(array, how: HowToQuantize) -> QArray:
    """The array's codes and scales, from its own range.

    Raises as calibrate and quantize_with do, and ValueError for NaN and infinity: it reads the array. Inside
    of mx.compile, where nothing can be read, it is quantize_unread.
    """
    xp = _float_namespace(array)
    try:
        finite = bool(xp.xp.isfinite(array).all())
    except ValueError:  # MLX's, inside of mx.compile
        finite = True
    if not finite:
        values = bridge.to_numpy(array).astype(np.float64)
        bad = ~np.isfinite(values)
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        raise ValueError(
            f"quantize: {np.count_nonzero(bad)} of {bad.size} values are NaN or infinite, the first, "
            f"{values[first]}, at index {first}; repair them, or keep the array in float"
        )
    return quantize_unread(array, how)


def quantize_unread(array, how: HowToQuantize) -> QArray:
    """As quantize, without a look at the values, so that lazy arrays stay lazy: tiles with NaN become NaN."""
    stats = calibrate(array, how)
    return quantize_with(array, how.qtype, *scale_and_zero_point(stats, how.qtype))


def dequantize(array: QArray):
    """(code - zero point) * scale, in the scale's dtype."""
    xp, dtype = namespace(array.validate().qvalue), array.dtype
    values = decode(array, dtype)
    return generic(lambda a, b: a * b, values, array.scale, xp)


def decode(array: QArray, dtype: str):
    """What the codes stand for without the scale: code - zero point, or the number that a code names."""
    xp = namespace(array.qvalue)
    if not QTYPES[array.qtype].is_integer:
        return xp.cast(xp.take(_values_of(array.qtype), array.qvalue), dtype)
    values = xp.cast(array.qvalue, dtype)
    if array.zero_point is not None:
        values = generic(lambda a, b: a - b, values, xp.cast(array.zero_point, dtype), xp)
    return values
