"""Quantized layers for torch models, and how they take the place of float ones.

Weights that the packed format holds run on mlxq.nn.torch, with int8 inputs on mlxq.nn.q8; all others store
codes and dequantize them for each product.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mlxq.format import Packed
from mlxq.nn.q8.torch import Q8Linear
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear
from mlxq.ptq.functional import conv_rounded, image_rounding, linear_with, rows_of
from mlxq.ptq.plan import Plan, Site
from mlxq.ptq.statistics import Statistics
from mlxq.ptq.tensors import codes_of, input_tensors, weight_tensors


class _RuleLayer(nn.Module):
    """Buffers by their names in mlxq.ptq.tensors, and the site that says what they mean."""

    def __init__(self, site: Site, tensors: Mapping[str, torch.Tensor], bias: nn.Parameter | None = None):
        super().__init__()
        self.site = site
        for name in ("weight", "scales", "biases", "zero_points", "act_scale", "act_zero_point"):
            self.register_buffer(name, tensors.get(name))
        self.bias = bias

    @property
    def stored(self):
        """The weight as a Packed or a QArray."""
        if self.site.packed is not None:
            return Packed(self.weight.view(torch.uint32), self.scales, self.biases, self.site.packed)
        return codes_of(self.weight, self.scales, self.zero_points, self.site)

    @property
    def static(self):
        return None if self.act_scale is None else (self.act_scale, self.act_zero_point)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.site.shape))}, {self.site.stored}"


class RuleLinear(_RuleLayer):
    """x @ W.T + bias as functional.linear_with computes it: x (..., K) -> (..., N) in x's dtype.

    Gradients reach x through the dequantized weight, straight through the rounding of x: dx = dy @ W. So does
    the straight-through estimator of qwix's QtProvider, with the float weight, which this layer has not.
    """

    def __init__(self, site: Site, tensors, bias=None):
        super().__init__(site, tensors, bias)
        self.out_features, self.in_features = site.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_with(x, self.stored, self.site, self.bias, self.static)


class RuleEmbedding(_RuleLayer):
    """Rows of a table of codes: integers (...) -> (..., K) in the scales' dtype."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return rows_of(self.stored, ids)


class RuleConv(_RuleLayer):
    """A convolution of any rank: x (B, C, ...) -> (B, O, ...) in x's dtype; gradients as RuleLinear's."""

    def __init__(self, site: Site, tensors, layer: nn.Module):
        if layer.padding_mode != "zeros":
            raise ValueError(
                f"{site.path}: padding_mode {layer.padding_mode!r} is not built; keep the layer in float by "
                "an earlier rule"
            )
        super().__init__(site, tensors, layer.bias)
        self.how = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, roundings = x, [None, None]
        if self.site.rule.act_qtype is not None:
            wide, roundings[0] = x.float(), image_rounding(self.site, x.ndim, self.static)
        y = conv_rounded(wide, self.stored, roundings, *self.how)
        if self.bias is not None:
            y = y + self.bias.reshape(-1, *[1] * (y.ndim - 2))
        return y.to(x.dtype)


def quantized_layer(layer: nn.Module, site: Site, stats: Statistics | None) -> nn.Module:
    """The layer that takes a float one's place. Raises ValueError where none is built for the site."""
    weight, kind = layer.weight.detach(), site.operation
    static = input_tensors(site, stats, weight)
    tensors = weight_tensors(weight, site)
    if kind == "conv_general":
        return RuleConv(site, tensors | static, layer)
    packed = None
    if site.packed is not None:
        words = tensors["weight"].view(torch.uint32)
        packed = Packed(words, tensors["scales"], tensors["biases"], site.packed)
    if site.integer:
        scale = static.get("scale_a")
        return Q8Linear.from_packed(packed, layer.bias, activation=site.activation, scale_a=scale)
    if kind == "embedding":
        return RuleEmbedding(site, tensors) if packed is None else QuantizedEmbedding.from_packed(packed)
    if packed is not None and site.rule.act_qtype is None:
        return QuantizedLinear.from_packed(packed, layer.bias)
    return RuleLinear(site, tensors | static, layer.bias)


def replace_layers(model: nn.Module, plan: Plan, stats: Statistics | None) -> nn.Module:
    """The model with the plan's layers in it. Raises as quantized_layer does."""
    for path, site in plan.items():
        parent, _, name = path.rpartition("/")
        owner = model.get_submodule(parent.replace("/", "."))
        layer = quantized_layer(getattr(owner, name), site, stats)
        setattr(owner, name, layer.train(model.training))
    return model


@contextlib.contextmanager
def watching(model: nn.Module, sites: Mapping[str, Site], see: Callable):
    """Forward passes inside the block call see(input, site) for each site, without gradients."""
    hooks = [
        model.get_submodule(path.replace("/", ".")).register_forward_pre_hook(
            lambda module, inputs, site=site: see(inputs[0].detach(), site)
        )
        for path, site in sites.items()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def lora_config(config):
    """The same peft.LoraConfig, which now wraps our linear layers too: adapters over frozen codes.

    Adapters train; merging one into codes is refused with a ValueError, as these cannot hold it.
    """
    config._register_custom_module(dict.fromkeys((QuantizedLinear, Q8Linear, RuleLinear), _adapter_class()))
    return config


@functools.cache
def _adapter_class() -> type:
    """peft's own adapter around a linear layer, but for merging; whoever has a LoraConfig has imported it."""
    linear = sys.modules["peft"].tuners.lora.layer.Linear

    class PackedLoraLinear(linear):
        """An adapter beside a layer whose weight is codes."""

        def merge(self, safe_merge=False, adapter_names=None):
            raise ValueError(
                "merge: codes cannot take an adapter in; keep it beside them, or start from float"
            )

    return PackedLoraLinear
