"""The numbers of fake quantization, once for every framework.

Each function takes `xp`, the few array operations it needs (see Arrays), so that torch and MLX run the same
formulas in the same order, and stays on the caller's device. A weight (..., N, K) is cut into groups of g
along K; a grid is a scale and a bias for each group, as they will be stored:

    symmetric      scale = store(max|w| / ((hi - lo) / 2))      bias = lo * scale
    int domain     scale = store((max - min) / (hi - lo))       bias = store((lo - zero) * scale)
                   with min <= 0 <= max, codes from lo to hi, zero = clip(lo - rint(min / scale), lo, hi)
    float domain   scale = store((max - min) / (hi - lo))       bias = zero - scale * 2^(bits - 1)
                   with zero = store(min + scale * 2^(bits - 1)), tinygemm's

    code u = clip(rint(w * (1 / scale)) - lo, 0, hi - lo)       symmetric: a product, as torchao has it
           = clip(rint((w - bias) / scale), 0, hi - lo)         otherwise
    value  = scale * u + bias in float32, rounded to w's dtype: what mlxq.ops.dequantize makes of the codes

So a prepared layer sees the very numbers of the converted one. Scales and codes are torchao 0.18's; its value
(u + lo) * scale is rounded once where ours is rounded twice if scales are float32, and equal for 16-bit ones.

Gradients are straight through: rint has gradient 1, clip 0 outside. With v = (w - bias) / scale,

    dw = g * inside    dscale = sum over the group of g * (u - v * inside)    dbias = sum of g * (1 - inside)

which for bias = lo * scale is the gradient of LSQ (Esser et al. 2020, eq. 3) without its 1/sqrt(n).

Grids that are chosen anew from each weight are computed in its dtype, as torchao does; codes on learned and
static grids in float32: in bfloat16 (w - bias) / scale has 8 bits, and codes above 128 would be even.

Where torchao 0.12 does otherwise, 0.18 is followed (tests/test_qat_torch.py has each of them):

    least scale         0.12: machine epsilon, 2^-7 in bfloat16. Here: the smallest normal number
    learned ranges      0.12: begin no lower than that either. Here: LEARNED_EPS, and above 0 as stored
    float8 rows         0.12: float8(x * m) / m with m = 448 / max(|x|, 1e-12) in float64, the quotient in x's
                        dtype. Here: scale * float8(x / scale) in float32, no floor but hp_value_lb
    int4 for float8     0.12: no Int4WeightFakeQuantizeConfig; its weights are "int4", max|w| / 7.5 of the
                        weight itself. Here that is Float8ActInt4WeightQATQuantizer, and the configuration
                        has 0.18's: max|w| / 8 of the weight after float8 rows
    groups for float8   0.12: 64, or per channel, in that quantizer. Its base here has 0.18's 128
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from mlxq.format import BITS, GROUP_SIZES, Format, dtype_name
from mlxq.qat.config import (
    FLOAT8,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
)

SMALLEST_NORMAL = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
LEAST = SMALLEST_NORMAL | {"float16": 2.0**-24}  # the least scale that is not 0
FLOAT_DOMAIN_EPS = 1e-6  # torchao's floor for scales of tinygemm and of its int4 kernels
LEARNED_EPS = 1e-9  # the least scale that learning may start from, in float32


class Arrays(Protocol):
    """The operations of one framework, each as in numpy; reductions are over the last axis."""

    def min(self, x): ...
    def max(self, x): ...
    def sum(self, x): ...
    def abs(self, x): ...
    def round(self, x): ...
    def clip(self, x, low, high): ...
    def where(self, condition, a, b): ...
    def full_like(self, x, value): ...
    def cast(self, x, dtype: str): ...
    def repeat(self, x, times: int):
        """Every value of the last axis `times` times in a row."""

    def power_of_two(self, x):
        """2^floor(log2|x|) of normal float32 values; 0 for 0."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points (..., N, groups) of a weight, in the dtypes of the configuration.

    zero   None for symmetric codes; an integer code in domain "int"; a weight in domain "float"
    """

    scale: Any
    zero: Any = None


@dataclass(frozen=True)
class Coded:
    """A weight on its grid.

    codes    whole numbers 0 .. levels as floats, (..., N, groups, g)
    inside   1 where the code was not clipped, bool, same shape
    scale    stored scales, (..., N, groups)         bias   stored biases, same
    """

    codes: Any
    inside: Any
    scale: Any
    bias: Any


def group_size_of(config, K: int) -> int:
    """Weights under one scale. Raises ValueError when groups do not divide K."""
    if isinstance(config, Float8FakeQuantizeConfig):
        return K
    size = config.granularity.group_size if isinstance(config.granularity, PerGroup) else K
    if K % size:
        fits = [g for g in GROUP_SIZES if K % g == 0]
        raise ValueError(
            f"K={K} is not a multiple of the group size {size}" + (f"; {fits[-1]} would fit" if fits else "")
        )
    return size


def storage_of(config, weight_dtype: str) -> str:
    """The dtype in which scales and biases are stored."""
    if isinstance(config, Int4WeightFakeQuantizeConfig) and config.scale_precision is None:
        return "float32" if config.activation_dtype == "bfloat16" else weight_dtype
    return config.scale_precision or weight_dtype


def has_zero_point(config) -> bool:
    """Whether the grid needs a zero point beside its scale."""
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        return config.activation_dtype == "bfloat16"
    return not config.is_symmetric


def stored_format(config, K: int) -> Format:
    """The format of the packed weight: its scales may be repeated, never merged.

    Raises ValueError when no stored group divides the group of the configuration.
    """
    if isinstance(config, Float8FakeQuantizeConfig):
        raise ValueError("float8 weights have no packed integer form; train with integer weights to convert")
    bits = 4 if isinstance(config, Int4WeightFakeQuantizeConfig) else int(config.dtype.lstrip("uint"))
    size = group_size_of(config, K)
    fits = [g for g in GROUP_SIZES if size % g == 0]
    if not fits:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"groups of {size} have no stored form; wanted multiples of one of {sizes}")
    return Format(min(b for b in BITS if b >= bits), fits[-1])


def _grouped(x, size: int):
    return x.reshape((*x.shape[:-1], x.shape[-1] // size, size))


def _over(xp: Arrays, x, number):
    """x / number in x's dtype everywhere: torch on a GPU multiplies by a plain number's reciprocal."""
    return x / xp.full_like(x, float(number))


def least_scale(storage: str) -> float:
    """The least scale that learning may come to: above 0 in the dtype that it is stored in."""
    return max(LEARNED_EPS, SMALLEST_NORMAL[storage])


def choose(xp: Arrays, w, config, dtype: str | None = None) -> Grid:
    """The grid of each group of w (..., N, K), chosen from its least and largest weight. No gradient.

    dtype   what the weight is a copy of, and its scales are stored in unless the configuration says more;
            None: its own
    """
    name = dtype or dtype_name(w)
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        return _choose_int4(xp, w, config, name)
    lo, hi = config.bounds
    storage, grouped = config.scale_precision or name, _grouped(w, group_size_of(config, w.shape[-1]))
    least, most = xp.min(grouped), xp.max(grouped)
    if config.zero_point_domain == "float":
        eps = max(FLOAT_DOMAIN_EPS if config.eps is None else config.eps, LEAST[storage])
        scale = xp.clip(_over(xp, most - least, hi - lo), eps, None)
        zero = least + scale * float((hi + lo + 1) / 2)
        return Grid(xp.cast(scale, storage), xp.cast(zero, config.zero_point_precision or storage))
    # Below the smallest normal number of float16 a scale has no reciprocal there.
    eps = max(config.eps or 0.0, SMALLEST_NORMAL[name], SMALLEST_NORMAL[storage])
    least, most = xp.clip(least, None, 0.0), xp.clip(most, 0.0, None)
    if config.is_symmetric:
        largest = xp.where(-least > most, -least, most)
        return Grid(xp.cast(xp.clip(_over(xp, largest, (hi - lo) / 2), eps, None), storage))
    scale = xp.clip(_over(xp, most - least, hi - lo), eps, None)
    zero = xp.clip(float(lo) - xp.round(least / scale), float(lo), float(hi))
    return Grid(xp.cast(scale, storage), xp.cast(zero, config.zero_point_precision or "int32"))


def _choose_int4(xp: Arrays, w, config: Int4WeightFakeQuantizeConfig, name: str) -> Grid:
    storage = storage_of(config, name)
    if config.activation_dtype == "bfloat16":
        grouped = _grouped(xp.cast(w, "float32"), config.group_size)
        least = xp.min(grouped)
        scale = _over(xp, xp.clip(xp.max(grouped) - least, FLOAT_DOMAIN_EPS, None), 15)
        return Grid(xp.cast(scale, storage), xp.cast(least, storage))
    grouped = _grouped(through_float8_rows(xp, w), config.group_size)
    scale = xp.clip(xp.max(xp.abs(grouped)) / 8.0, FLOAT_DOMAIN_EPS, None)
    return Grid(xp.cast(scale, storage))


def through_float8_rows(xp: Arrays, w):
    """w rounded to float8 e4m3 rows and back, as torchao's float8 kernels store it before 4 bits."""
    return fake_float8(xp, w, Float8FakeQuantizeConfig(hp_value_lb=1e-12))


def bias_of(xp: Arrays, grid: Grid, config, storage: str):
    """Stored biases (..., N, groups) of a grid; differentiable in scale and zero but for the rounding."""
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        return grid.zero if grid.zero is not None else grid.scale * -8.0
    lo, hi = config.bounds
    if grid.zero is None:
        return grid.scale * float(lo)  # a power of two: exact
    if config.zero_point_domain == "float":
        return xp.cast(grid.zero - grid.scale * float((hi + lo + 1) / 2), storage)
    scale = xp.cast(grid.scale, "float32")
    return xp.cast((float(lo) - xp.cast(grid.zero, "float32")) * scale, storage)


def encode(xp: Arrays, w, config, grid: Grid, bias) -> Coded:
    """Codes of w (..., N, K) on a grid whose stored biases are `bias`. No gradient."""
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        lo, hi = -8, 7
        float8 = config.activation_dtype != "bfloat16"
        w = through_float8_rows(xp, w) if float8 else xp.cast(w, "float32")
    else:
        lo, hi = config.bounds
    grouped = _grouped(w, w.shape[-1] // grid.scale.shape[-1])
    scale, first = grid.scale[..., None], bias[..., None]
    if not getattr(config, "is_dynamic", True):
        grouped, scale, first = (xp.cast(a, "float32") for a in (grouped, scale, first))
    if grid.zero is None:
        raw = xp.round(grouped * (1.0 / scale)) - float(lo)
    else:
        raw = xp.round((grouped - first) / scale)
    inside = (raw >= 0) & (raw <= hi - lo)
    return Coded(xp.clip(raw, 0.0, float(hi - lo)), inside, grid.scale, bias)


def decode(xp: Arrays, coded: Coded, dtype: str):
    """scale * code + bias in float32, rounded to dtype, shape (..., N, K)."""
    scale, bias = xp.cast(coded.scale, "float32")[..., None], xp.cast(coded.bias, "float32")[..., None]
    value = scale * xp.cast(coded.codes, "float32") + bias
    return xp.cast(value.reshape((*value.shape[:-2], value.shape[-2] * value.shape[-1])), dtype)


def gradients(xp: Arrays, g, w, coded: Coded):
    """(dw, dscale, dbias) of `decode` for the gradient g (..., N, K) of its value; formulas above."""
    size = coded.codes.shape[-1]
    g32 = _grouped(xp.cast(g, "float32"), size)
    one = xp.cast(coded.inside, "float32")
    scale, bias = xp.cast(coded.scale, "float32")[..., None], xp.cast(coded.bias, "float32")[..., None]
    v = (_grouped(xp.cast(w, "float32"), size) - bias) / scale
    dscale = xp.sum(g32 * (xp.cast(coded.codes, "float32") - xp.where(coded.inside, v, v * 0.0)))
    dbias = xp.sum(g32 * (1.0 - one))
    dw = xp.cast((g32 * one).reshape(g.shape), dtype_name(w))
    return dw, xp.cast(dscale, dtype_name(coded.scale)), xp.cast(dbias, dtype_name(coded.bias))


def fake_activation(xp: Arrays, x, config: IntxFakeQuantizeConfig):
    """(value, inside): x (..., K) on its own dynamic grid, as torchao rounds it, in x's dtype.

    scale and zero as for weights in domain "int", per row of x or per group of it
    value = (clip(rint(x * (1 / scale)) + zero, lo, hi) - zero) * scale
    """
    lo, hi = config.bounds
    per_token = isinstance(config.granularity, PerToken)
    grid = choose(xp, x, config if not per_token else _whole_rows(config))
    scale = grid.scale[..., None]
    grouped = _grouped(x, x.shape[-1] // grid.scale.shape[-1])
    raw = xp.round(grouped * (1.0 / scale))
    zero = 0.0 if grid.zero is None else xp.cast(grid.zero, dtype_name(raw))[..., None]
    raw = raw + zero
    inside = (raw >= lo) & (raw <= hi)
    code = xp.cast(xp.clip(raw, float(lo), float(hi)), dtype_name(x))
    zero = zero if grid.zero is None else xp.cast(zero, dtype_name(x))
    value = xp.cast((code - zero) * scale, dtype_name(x))
    return value.reshape(x.shape), inside.reshape(x.shape)


def _whole_rows(config: IntxFakeQuantizeConfig) -> IntxFakeQuantizeConfig:
    """The same with one group a row: PerToken's grid."""
    config = copy(config)
    object.__setattr__(config, "granularity", PerAxis(0))
    return config


def fake_float8(xp: Arrays, x, config: Float8FakeQuantizeConfig):
    """x rounded to float8 under one scale a row (or one for all), in x's dtype.

    scale = max|x| / largest, in x's dtype, then float32; rows of zeros: 1
        value = scale * float8(x / scale)
    """
    mantissa, least_exponent, largest = FLOAT8[config.dtype]
    flat = x.reshape((-1,)) if isinstance(config.granularity, PerTensor) else x
    most = xp.max(xp.abs(flat))
    if config.hp_value_lb is not None or config.hp_value_ub is not None:
        most = xp.clip(most, config.hp_value_lb, config.hp_value_ub)
    scale = xp.cast(_over(xp, most, largest), "float32")
    # torchao divides 0 by 0 here and makes NaN of a row of zeros.
    scale = xp.where(scale == 0, scale + 1.0, scale)[..., None]
    v = xp.clip(xp.cast(flat, "float32") / scale, -largest, largest)
    step = xp.clip(xp.power_of_two(v), 2.0**least_exponent, None) * 2.0**-mantissa
    value = xp.cast(xp.round(v / step) * step * scale, dtype_name(x))
    return value.reshape(x.shape)


def stored(xp: Arrays, coded: Coded, fmt: Format):
    """Codes (..., N, K) uint8, scales and biases (..., N, K / fmt.group_size), repeated to stored groups."""
    *leading, groups, size = coded.codes.shape
    repeats = size // fmt.group_size

    codes = xp.cast(coded.codes.reshape((*leading, groups * size)), "uint8")
    return codes, xp.repeat(coded.scale, repeats), xp.repeat(coded.bias, repeats)
