"""Quantized layers for mlx.nn and mlx-lm models, and how they take the place of float ones.

Weights that the packed format holds run on mlxq.nn.mlx, with int8 inputs on mlxq.nn.q8; mx types with float
inputs on mlx-lm's own layers. What is left - other types, other inputs, convolutions - is here: it stores
codes and dequantizes them for each product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models import switch_layers

from mlxq import ops
from mlxq.format import Packed
from mlxq.nn.mlx import QuantizedEmbedding, QuantizedLinear, QuantizedMultiLinear, QuantizedSwitchLinear
from mlxq.nn.q8.mlx import Q8Linear, wrap_in_lora
from mlxq.ptq.functional import conv_rounded, image_rounding, input_rounding, linear_with, rows_of
from mlxq.ptq.plan import Plan, Site
from mlxq.ptq.qarray import dequantize
from mlxq.ptq.statistics import Statistics
from mlxq.ptq.straight import rounded_values
from mlxq.ptq.tensors import MxFormat, codes_of, input_tensors, is_stock_mx, weight_tensors


class _RuleLayer(nn.Module):
    """Arrays by their names in mlxq.ptq.tensors, frozen, and the site that says what they mean."""

    def __init__(self, site: Site, tensors: Mapping[str, mx.array], bias: mx.array | None = None):
        super().__init__()
        self.site = site
        for name, array in tensors.items():
            self[name] = array
        self.freeze()
        if bias is not None:
            self.bias = bias

    def unfreeze(self, *args, **kwargs):
        """As Module.unfreeze, but only the bias thaws."""
        super().unfreeze(*args, **kwargs)
        self.freeze(recurse=False, keys=[name for name in self if name != "bias"])

    @property
    def stored(self):
        """The weight as a Packed or a QArray."""
        if self.site.packed is not None:
            return Packed(self["weight"], self["scales"], self["biases"], self.site.packed)
        return codes_of(self["weight"], self["scales"], self.get("zero_points"), self.site)

    @property
    def static(self):
        return (self["act_scale"], self.get("act_zero_point")) if "act_scale" in self else None

    def _extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.site.shape))}, {self.site.stored}"


class RuleLinear(_RuleLayer):
    """x @ W.T + bias as functional.linear_with computes it: x (..., K) -> (..., N) in x's dtype.

    Gradients reach x through the dequantized weight, straight through the rounding of x: dx = dy @ W. So does
    the straight-through estimator of qwix's QtProvider, with the float weight, which this layer has not.
    """

    def __call__(self, x: mx.array) -> mx.array:
        return linear_with(x, self.stored, self.site, self.get("bias"), self.static)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """This layer inside of an adapter of mlx-lm's."""
        return wrap_in_lora(self, self.site.shape, r, dropout, scale)

    @property
    def float_weight(self) -> mx.array:
        """The dequantized weight, (N, K)."""
        stored = self.stored
        return ops.dequantize(stored) if isinstance(stored, Packed) else dequantize(stored)


class RuleEmbedding(_RuleLayer):
    """Rows of a table of codes: integers (...) -> (..., K) in the scales' dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        return rows_of(self.stored, x)

    def as_linear(self, x: mx.array) -> mx.array:
        """x @ W.T, for output projections tied to the table."""
        return linear_with(x, self.stored, self.site)


class RuleConv(_RuleLayer):
    """A convolution of any rank, channels last: x (B, ..., C) -> (B, ..., O) in x's dtype.

    Gradients as RuleLinear's.
    """

    def __init__(self, site: Site, tensors, layer: nn.Module):
        super().__init__(site, tensors, layer.get("bias"))
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = getattr(layer, "dilation", 1), getattr(layer, "groups", 1)

    def __call__(self, x: mx.array) -> mx.array:
        wide, roundings = x, [None, None]
        if self.site.rule.act_qtype is not None:
            wide, roundings[0] = x.astype(mx.float32), image_rounding(self.site, x.ndim, self.static)
        how = self.stride, self.padding, self.dilation, self.groups
        y = conv_rounded(wide, self.stored, roundings, *how)
        y = y + self["bias"] if "bias" in self else y
        return y.astype(x.dtype)


class RuleSwitchLinear(QuantizedSwitchLinear):
    """Packed experts whose inputs are rounded to the site's type first; gradients as RuleLinear's."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rounding = input_rounding(self.site, self.static)
        rounded = rounded_values(x.astype(mx.float32), rounding)
        return super().__call__(rounded, indices, sorted_indices).astype(x.dtype)


_STOCK_MX = {
    "linear": nn.QuantizedLinear,
    "switch_linear": switch_layers.QuantizedSwitchLinear,
    "embedding": nn.QuantizedEmbedding,
}
_PACKED = {
    "linear": QuantizedLinear,
    "embedding": QuantizedEmbedding,
    "switch_linear": QuantizedSwitchLinear,
    "multi_linear": QuantizedMultiLinear,
}


def quantized_layer(layer: nn.Module, site: Site, stats: Statistics | None) -> nn.Module:
    """The layer that takes a float one's place. Raises ValueError where none is built for the site."""
    bias, kind = layer.get("bias"), site.operation
    static = input_tensors(site, stats, layer.weight)
    tensors = weight_tensors(layer.weight, site)
    if kind == "conv_general":
        return RuleConv(site, tensors | static, layer)
    if is_stock_mx(site, layer.weight):
        return _stock_mx(site, tensors, bias)
    packed = None
    if site.packed is not None:
        packed = Packed(tensors["weight"], tensors["scales"], tensors["biases"], site.packed)
    if site.integer:
        scale = static.get("scale_a")
        return Q8Linear.from_packed(packed, bias, activation=site.activation, scale_a=scale)
    if packed is not None and (site.rule.act_qtype is None or kind == "embedding"):
        return _PACKED[kind].from_packed(packed, *(() if kind == "embedding" else (bias,)))
    if kind == "switch_linear" and packed is not None:
        made = RuleSwitchLinear.from_packed(packed, bias)
        made.site = site
        made.static = (static["act_scale"], static.get("act_zero_point")) if static else None
        return made
    if kind in ("linear", "embedding"):
        return {"linear": RuleLinear, "embedding": RuleEmbedding}[kind](site, tensors | static, bias)
    raise ValueError(
        f"{site.path}: {site.stored} is not built for {kind}: experts and heads want packed weights "
        "(int2 to int6, int8, groups of 32, 64 or 128)"
        + (" and float inputs" if kind == "multi_linear" else "")
    )


def _stock_mx(site: Site, tensors, bias) -> nn.Module:
    cls = _STOCK_MX[site.operation]
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    fmt = MxFormat(site.weight.qtype)
    layer.mode, layer.bits, layer.group_size = fmt.mode, fmt.bits, fmt.group_size
    layer.weight, layer.scales, layer.biases = tensors["weight"], tensors["scales"], None
    layer.global_scale = None  # mlx-lm's experts ask for it from 0.32 on
    if site.operation == "embedding":
        layer.num_embeddings, layer.dims = site.shape
    layer.freeze()
    if bias is not None:
        layer.bias = bias
    return layer


def replace_layers(model: nn.Module, plan: Plan, stats: Statistics | None) -> nn.Module:
    """The model with the plan's layers in it. Raises as quantized_layer does."""
    modules = dict(model.named_modules())
    for path, site in plan.items():
        dotted = path.replace("/", ".")
        layer = quantized_layer(modules.pop(dotted), site, stats)
        mx.eval(layer.parameters())
        model.update_modules(tree_unflatten([(dotted, layer)]))
    model.train(model.training)
    return model


@contextlib.contextmanager
def watching(model: nn.Module, sites: Mapping[str, Site], see: Callable):
    """Forward passes inside the block call see(input, site) for each site; the model is itself afterwards.

    Layers get another class meanwhile, a subclass of theirs, so that a model can still read their attributes.
    """
    modules = dict(model.named_modules())
    watched: list[tuple[nn.Module, type]] = []
    try:
        for path, site in sites.items():
            layer = modules[path.replace("/", ".")]
            stock = type(layer)

            def call(layer, x, *args, site=site, stock=stock, **kwargs):
                see(x, site)
                return stock.__call__(layer, x, *args, **kwargs)

            watched.append((layer, stock))
            layer.__class__ = type(stock.__name__, (stock,), {"__call__": call})
        yield
    finally:
        for layer, stock in reversed(watched):
            layer.__class__ = stock
