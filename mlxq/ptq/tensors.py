"""The arrays of a quantized layer, from a float weight: the same for a live model and for a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxq import bridge, format
from mlxq.format import Packed, dtype_name
from mlxq.ptq.arrays import namespace
from mlxq.ptq.functional import input_range, store_weight
from mlxq.ptq.plan import Plan, Site
from mlxq.ptq.qarray import QArray, to_small_float
from mlxq.ptq.statistics import Statistics
from mlxq.rules import QTYPES

MX_TYPES = {"mxfp8": 8, "mxfp4": 4, "nvfp4": 4}  # that mlx-lm computes with itself, and their bits


@dataclass(frozen=True)
class MxFormat:
    """How MLX stores one of MX_TYPES: codes in uint32 words, a byte for each tile's scale, no biases."""

    mode: str

    @property
    def bits(self) -> int:
        return MX_TYPES[self.mode]

    @property
    def group_size(self) -> int:
        return QTYPES[self.mode].tile

    def groups(self, K: int) -> int:
        """Scales in a row of K weights."""
        return K // self.group_size

    def words_per_row(self, K: int) -> int:
        """uint32 words in a row of K codes."""
        return K * self.bits // 32

    def __str__(self) -> str:
        return self.mode


def weight_tensors(weight, site: Site) -> dict[str, Any]:
    """Arrays by their name in the layer, in the weight's framework.

    packed          weight (words; int32 in torch), scales, biases
    mx types, MLX   weight (words), scales (bytes), as mx.quantize stores them
    others          weight (codes int8 or uint8; two of 4 bits in a byte), scales, maybe zero_points

    The weight may come in another shape of as many elements: it takes the site's. Raises TypeError for what
    is no float array, ValueError for other shapes, NaN and infinity.
    """
    if dtype_name(weight) not in format.STORAGE:
        raise TypeError(
            f"{site.path}: the weight is {dtype_name(weight)}; wanted {', '.join(format.STORAGE)}"
        )
    if tuple(weight.shape) != site.shape:
        if int(np.prod(weight.shape)) != int(np.prod(site.shape)):
            raise ValueError(f"{site.path}: the weight has shape {tuple(weight.shape)}; wanted {site.shape}")
        weight = weight.reshape(site.shape)
    try:
        stored = store_weight(weight, site)
    except ValueError as error:
        raise ValueError(f"{site.path}: {error}") from None
    if isinstance(stored, Packed):
        words = stored.words
        if bridge.kind(words) == "torch":
            words = words.view(namespace(weight).xp.int32)
        return {"weight": words, "scales": stored.scales, "biases": stored.biases}
    if is_stock_mx(site, weight):
        return mx_tensors(stored)
    xp = namespace(weight)
    if not bool(xp.xp.isfinite(stored.scale).all()):
        raise ValueError(f"{site.path}: the weight holds NaN or infinity")
    codes = pack_nibbles(stored.qvalue) if holds_nibbles(site) else stored.qvalue
    zeros = {} if stored.zero_point is None else {"zero_points": stored.zero_point}
    return {"weight": codes, "scales": stored.scale} | zeros


def mx_format(site: Site) -> MxFormat | None:
    """The format of MLX's own that holds a site's weights: inputs in float, rows of a multiple of 32."""
    if (
        site.weight.qtype in MX_TYPES
        and site.rule.act_qtype is None
        and site.operation in ("linear", "switch_linear", "embedding")
        and site.shape[-1] % 32 == 0
    ):
        return MxFormat(site.weight.qtype)
    return None


def is_stock_mx(site: Site, array) -> bool:
    """Whether mlx-lm's own layer of that mode serves: as mx_format, in MLX."""
    return mx_format(site) is not None and bridge.kind(array) == "mlx"


def holds_nibbles(site: Site) -> bool:
    """Whether two codes share a byte: 4-bit types without a packed format, of an even last axis."""
    return site.weight.qtype in ("nf4", "mxfp4", "nvfp4") and site.shape[-1] % 2 == 0


def pack_nibbles(codes):
    """Two 4-bit codes in a byte, the first one low: (..., K) -> (..., K / 2)."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed):
    """The reverse of pack_nibbles."""
    xp = namespace(packed).xp
    stacked = xp.stack([packed & 15, packed >> 4], -1)
    return stacked.reshape(*packed.shape[:-1], -1)


def codes_of(weight, scales, zero_points, site: Site) -> QArray:
    """The quantized array of a layer that holds codes one by one."""
    codes = unpack_nibbles(weight) if holds_nibbles(site) else weight
    return QArray(codes, scales, zero_points, site.weight.qtype)


def mx_tensors(stored: QArray) -> dict[str, Any]:
    """Codes and scales of an mx type in the layout of mx.quantize(mode=...)."""
    bits = MX_TYPES[stored.qtype]
    words = format.pack(bridge.to_numpy(stored.qvalue), bits)
    scale = bridge.to_numpy(stored.scale).astype(np.float32)
    if stored.qtype == "nvfp4":
        code = to_small_float(scale, QTYPES["float8_e4m3fn"])
    else:
        code = (scale.view(np.uint32) >> 23).astype(np.uint8)  # a power of two is its exponent
    like = stored.qvalue
    return {"weight": bridge.like(words, like), "scales": bridge.like(code, like)}


def input_tensors(site: Site, stats: Statistics | None, like) -> dict[str, Any]:
    """What a layer keeps of its input's static range: scale_a, or act_scale and maybe act_zero_point.

    Raises ValueError where the rule wants one and there are no statistics.
    """
    if not site.rule.act_static_scale:
        return {}
    if stats is None or site.input_name not in stats:
        raise ValueError(
            f"{site.path}: the rule wants a static scale and there are no statistics: pass those of "
            "mlxq.ptq.calibrate"
        )
    averages = {name: bridge.like(value, like) for name, value in stats.average(site.input_name).items()}
    scale, zero = input_range(averages, site)
    if site.integer:
        return {"scale_a": scale.reshape((-1,) if site.act_tile else ())}
    return {"act_scale": scale} | ({} if zero is None else {"act_zero_point": zero})


def quantize_params(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    plan: Plan,
    stats: Statistics | None = None,
    *,
    allow_extra_params: bool = False,
) -> dict[str, Any]:
    """Quantized parameters by name: what quantize_model's layers hold, without a model.

    params   float arrays by name, "model.layers.0.mlp.up_proj.weight"; any part of the model's, so that a
             checkpoint larger than memory comes shard by shard, or tensor by tensor

    Parameters that no rule quantizes pass through. Raises ValueError for a name that the model does not have
    (unless allow_extra_params: it is left out) and for shapes, TypeError for what is no array.
    """
    sites = {site.tensor: site for site in plan.values()}
    out: dict[str, Any] = {}
    for name, array in params.items() if isinstance(params, Mapping) else params:
        bridge.kind(array)
        site = sites.get(name)
        if site is None:
            if name in plan.shapes:
                out[name] = array
            elif not allow_extra_params:
                raise ValueError(
                    f"quantize_params: the model has no {name}; allow_extra_params=True leaves it out"
                )
            continue
        tensors = weight_tensors(array, site) | input_tensors(site, stats, array)
        prefix = name.removesuffix("weight")
        out |= {prefix + part: value for part, value in tensors.items()}
    return out
