"""W8A8: linear layers whose weights and inputs are both 8-bit integers, summed exactly in int32.

    y = s_x * s_w * (q_x @ q_w.T)        q_x = clip(rint((x + bias_a) / s_x), -128, 127), q_w likewise

torch.py and mlx.py hold Q8Linear for their framework. The formulas are here, once, over a namespace `xp`:
numpy, mlx.core or torch. Every one is elementwise IEEE float32 (but for the mean of `lsq`), so that the
frameworks agree on the codes.

Learned activation scales: Esser et al., "Learned Step Size Quantization", 2020. `lsq` is the weight scale of
bitorch-engine's Q8 layer, which uses codes up to 34 of 127 for Gaussian weights: 27.8 dB where `row` has 42.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxq.format import GROUP_SIZES, KERNEL_BITS, SMALLEST_SCALE, Format

LOW, HIGH = -128, 127
ZERO = 128  # int8 codes are stored as unsigned bytes: code + 128, so that biases = -128 * scales
EPS = 1e-5  # the least activation scale: a learned one below it acts as this, in every formula

ACTIVATIONS = ("token", "tile", "learned", "static", "static_tile")
WEIGHT_SCALES = ("row", "tensor", "group", "lsq")


@dataclass(frozen=True)
class Settings:
    """How a Q8Linear quantizes.

    activation     "token": max|row| / 127 of every row of x, at each call; "tile": the same of every
                   group_size values of a row; "learned": one number for the layer, a parameter with LSQ's
                   gradient; "static": one number, set by observing data; "static_tile": one number for
                   every group_size inputs, set likewise
    weight_scales  "row": max|row| / 127; "tensor": max|W| / 127; "group": one per group_size weights of a
                   row; "lsq": 2 mean|W| / sqrt(127). Recomputed at each call while the weight is float
    group_size     weights that share a stored scale: "group" chooses a scale for each, the others repeat
                   theirs, for files have one per group
    bits           8; layers over weights that came packed may have 2 or 4

    Raises ValueError for anything else.
    """

    activation: str = "token"
    weight_scales: str = "row"
    group_size: int = 64
    bits: int = 8

    def __post_init__(self):
        for name, allowed in (("activation", ACTIVATIONS), ("weight_scales", WEIGHT_SCALES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Q8Linear: {name} {getattr(self, name)!r} does not exist; built: {', '.join(allowed)}"
                )
        if self.bits not in KERNEL_BITS:
            raise ValueError(f"Q8Linear: {self.bits}-bit weights are not served; built: {KERNEL_BITS}")
        Format(self.bits, self.group_size)

    @classmethod
    def fitting(cls, K: int, activation: str, weight_scales: str, group_size: int | None) -> Settings:
        """Settings for layers of K inputs; group_size None: the largest that divides K.

        Raises ValueError when none does, or the one that was asked for does not.
        """
        if group_size is None:
            group_size = max((g for g in GROUP_SIZES if K % g == 0), default=GROUP_SIZES[0])
        settings = cls(activation, weight_scales, group_size)
        settings.format.groups(K)
        return settings

    @property
    def format(self) -> Format:
        return Format(self.bits, self.group_size)

    @property
    def per_row(self) -> bool:
        """Whether rows of weights and of x have one scale each, so that a whole sum is one integer."""
        return self.weight_scales != "group" and self.tile is None

    @property
    def is_dynamic(self) -> bool:
        """Whether activation scales come from each input, so that the layer keeps none."""
        return self.activation in ("token", "tile")

    @property
    def tile(self) -> int | None:
        """Neighbours in a row of x that share a scale; None: one scale for the row, or for all."""
        return self.group_size if self.activation in ("tile", "static_tile") else None

    @property
    def clips_weights(self) -> bool:
        """Whether weights may lie outside of the codes: only `lsq` does not look at the largest."""
        return self.weight_scales == "lsq"


def _over_high(x, xp):
    """x / 127 on every device: on a GPU torch multiplies by the reciprocal of a plain number."""
    return x / xp.full_like(x, float(HIGH))


def weight_scales(w, settings: Settings, storage: str, xp):
    """float32 scales, not yet rounded to storage: (N, groups) for "group", (N, 1) or (1, 1) otherwise.

    w   float32   (N, K)
    """
    if settings.weight_scales == "lsq":
        scale = xp.abs(w).mean().reshape(1, 1) * (2 / math.sqrt(HIGH))
        return xp.clip(scale, EPS, math.inf)
    parts = {"row": w, "tensor": w.reshape(1, -1), "group": w.reshape(-1, settings.group_size)}
    largest = _largest(xp.abs(parts[settings.weight_scales]), xp)
    scale = xp.clip(_over_high(largest, xp), float(SMALLEST_SCALE[storage]), math.inf)
    return scale.reshape(w.shape[0], -1) if settings.weight_scales == "group" else scale


def weight_codes(w, scales, settings: Settings, xp):
    """Integers as float32, (N, K): -128 .. 127 for `lsq`, -127 .. 127 otherwise.

    w   float32   (N, K)        scales   float32   as weight_scales gave them, rounded to storage
    """
    low = LOW if settings.clips_weights else -HIGH
    if scales.shape[1] > 1:
        grouped = w.reshape(*scales.shape, settings.group_size)
        return xp.clip(xp.round(grouped / scales[..., None]), low, HIGH).reshape(w.shape)
    return xp.clip(xp.round(w / scales), low, HIGH)


def of_values(scale, x, xp):
    """The scale of each of x's values: the one there is, or (K,) from those of tiles (K / tile,)."""
    if scale.ndim == 0:
        return scale
    tiles, K = scale.shape[0], x.shape[-1]
    return xp.broadcast_to(scale.reshape(tiles, 1), (tiles, K // tiles)).reshape(K)


def activation_codes(x, scale, xp):
    """Integers as float32, x's shape, by one scale or those of tiles, which are EPS or more."""
    scale = of_values(scale, x, xp)
    return xp.clip(xp.round(x / scale), LOW, HIGH)


def dequantized(codes, scales):
    """codes (..., K) times scales, as float32: of rows (...), of tiles (..., K / tile), or one number ()."""
    if scales.ndim < codes.ndim:
        return codes * (scales[..., None] if scales.ndim else scales)
    tiles = codes.reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])
    return (tiles * scales[..., None]).reshape(codes.shape)


def activation_gradients(h, x, scale, xp):
    """(dL/dx, dL/dscale) of a product with activation codes by one scale.

    h       float   x's shape   dL/dx as if nothing had been rounded: dL/dy @ W
    scale   float               EPS or more; the gradient passes a clamp to EPS, so a scale can come back.
                                Of tiles: they never learn, so theirs is 0

    Codes that were clipped pass nothing to x, and -128 or 127 to the scale; the others pass h to x and
    round(x / scale) - x / scale to the scale. The scale's sum is divided by sqrt(x.size * 127).
    """
    v = x / of_values(scale, x, xp)
    inside = (v >= LOW) & (v <= HIGH)
    slope = xp.where(inside, xp.round(v) - v, xp.clip(v, LOW, HIGH))
    size = math.prod(x.shape)
    learns = size and scale.ndim == 0
    dscale = (h * slope).sum() / math.sqrt(size * HIGH) if learns else xp.zeros_like(scale)
    return xp.where(inside, h, xp.zeros_like(h)), dscale


def observed_scale(x, settings: Settings, xp):
    """What a batch suggests: 2 mean|x| / sqrt(127) to learn from, max|x| / 127 for static scales.

    float32 (), or (K / tile,) for "static_tile".
    """
    if settings.activation == "learned":
        return xp.abs(x).mean() * (2 / math.sqrt(HIGH))
    if settings.tile:
        tiles = xp.abs(x).reshape(-1, x.shape[-1] // settings.tile, settings.tile)
        largest = _largest(_largest(tiles, xp).reshape(tiles.shape[:2]).T, xp)
        return _over_high(largest.reshape(-1), xp)
    return _over_high(xp.abs(x).max(), xp)


def given_scale(scale, settings: Settings, K: int):
    """A static or learned scale as a float or a list of one for each tile; None stays.

    Raises ValueError for another number of tiles.
    """
    if scale is None:
        return None
    scale = scale.tolist() if hasattr(scale, "tolist") else scale
    wanted = K // settings.tile if settings.activation == "static_tile" else None
    came = len(scale) if isinstance(scale, list) else None
    if came != wanted:
        said = [f"{n} numbers" if n else "one number" for n in (came, wanted)]
        raise ValueError(
            f"Q8Linear: the {settings.activation} scale of {K} inputs has {said[0]}; wanted {said[1]}"
        )
    return scale


def _largest(x, xp):
    """The largest of the last axis, which stays as an axis of 1."""
    return (xp.amax if hasattr(xp, "amax") else xp.max)(x, axis=-1, keepdims=True)


def is_per_row(bits: int, scales, biases) -> bool:
    """Whether each row has one scale and biases are -2^(bits-1) times it; arrays (N, G) of any framework."""
    return bool((scales == scales[:, :1]).all()) and bool((biases == scales * -(2 ** (bits - 1))).all())
