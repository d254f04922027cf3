"""Fake quantization for torch.nn: layers that train on the numbers that the packed layers will have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mlxq import bridge, format
from mlxq.format import Packed
from mlxq.qat import numerics
from mlxq.qat.config import (
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    check_activation,
    check_weight,
)
from mlxq.qat.numerics import Grid, has_zero_point, least_scale


class TorchArrays:
    """numerics.Arrays over torch."""

    min = staticmethod(lambda x: x.amin(-1))
    max = staticmethod(lambda x: x.amax(-1))
    sum = staticmethod(lambda x: x.sum(-1))
    abs = staticmethod(torch.abs)
    round = staticmethod(torch.round)
    clip = staticmethod(torch.clamp)
    where = staticmethod(torch.where)
    full_like = staticmethod(torch.full_like)

    @staticmethod
    def cast(x, dtype):
        return x.to(getattr(torch, dtype))

    @staticmethod
    def repeat(x, times):
        return x.repeat_interleave(times, -1)

    @staticmethod
    def power_of_two(x):
        return (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)


class _FakeWeight(torch.autograd.Function):
    """w (N, K) on the grid (scale, bias): the value of its codes in dtype, with the gradients of numerics."""

    @staticmethod
    def forward(ctx, w, scale, bias, config, dtype):
        grid = Grid(scale, bias if has_zero_point(config) else None)
        coded = numerics.encode(TorchArrays, w, config, grid, bias)
        ctx.learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if ctx.learns:
            ctx.save_for_backward(w, *(getattr(coded, name) for name in ("codes", "inside", "scale", "bias")))
        else:
            ctx.save_for_backward(coded.inside)
        return numerics.decode(TorchArrays, coded, dtype)

    @staticmethod
    def backward(ctx, g):
        if ctx.learns:
            w, *coded = ctx.saved_tensors
            return *numerics.gradients(TorchArrays, g, w, numerics.Coded(*coded)), None, None
        (inside,) = ctx.saved_tensors
        return g * inside.reshape(g.shape), None, None, None, None


class _FakeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, config):
        value, inside = numerics.fake_activation(TorchArrays, x, config)
        ctx.save_for_backward(inside)
        return value

    @staticmethod
    def backward(ctx, g):
        (inside,) = ctx.saved_tensors
        return g * inside, None


class _FakeFloat8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, config):
        return numerics.fake_float8(TorchArrays, x, config)

    @staticmethod
    def backward(ctx, g):
        return g, None


class FakeQuantizer(nn.Module):
    """A tensor rounded to its quantized numbers and back; `enabled` off gives it without rounding to codes.

    config   one of mlxq.qat's fake quantizers
    weight   the weight that it will quantize; needed where scales are learned or static, which then are
             parameters or buffers `scale` and `zero_point` from the start, for the optimiser to find
    dtype    the name of the values' dtype; None: the weight's own. See hold_in_float32

    A dynamic one has no state. Made for a weight on the meta device, a learned one must be given its ranges
    by initialize_fake_quantizers once the weight is there, and raises ValueError until then.
    """

    def __init__(self, config: FakeQuantizeConfigBase, weight: torch.Tensor | None = None):
        super().__init__()
        self.config, self.enabled, self.dtype = config, True, None
        self.ready = True
        self.is_static = isinstance(config, IntxFakeQuantizeConfig) and not config.is_dynamic
        if self.is_static:
            if weight is None:
                raise ValueError("FakeQuantizer: static and learned scales are made from a weight; give it")
            self.initialize(weight)

    def initialize(self, weight: torch.Tensor) -> None:
        """Choose the static or learned ranges from this weight."""
        with torch.no_grad():
            grid = numerics.choose(TorchArrays, weight, self.config, self.dtype)
            scale = grid.scale.clamp(min=least_scale(format.dtype_name(grid.scale)))
            zero = grid.zero
            if zero is not None and self.config.zero_point_domain == "int":
                zero = zero.float()
            if self.dtype is not None:
                scale, zero = scale.float(), None if zero is None else zero.float()
        self.ready = weight.device.type != "meta"
        for name, value in (("scale", scale), ("zero_point", zero)):
            if value is None:
                continue
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(value)
            elif self.config.range_learning:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def grid(self, w: torch.Tensor) -> Grid:
        """The grid of w now: from w itself, or the static or learned one."""
        if not self.is_static:
            with torch.no_grad():
                return numerics.choose(TorchArrays, w, self.config, self.dtype)
        if not self.ready:
            raise ValueError(
                "FakeQuantizer: its ranges were made on the meta device; "
                "call initialize_fake_quantizers(model)"
            )
        storage = self.storage(w)
        least = least_scale(storage)
        scale = self.scale.clamp(min=least)
        if self.config.zero_point_domain == "float":  # a stored grid may count from its largest weight down
            scale = torch.where(self.scale < 0, self.scale.clamp(max=-least), scale)
        scale = TorchArrays.cast(scale, storage)
        if self.config.is_symmetric:
            return Grid(scale)
        zero = self.zero_point
        if self.config.zero_point_domain == "int":
            lo, hi = self.config.bounds
            zero = zero + (zero.round().clamp(lo, hi) - zero).detach()
        return Grid(scale, zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype or format.dtype_name(x)
        if not self.enabled:
            return TorchArrays.cast(x, dtype)
        if isinstance(self.config, Float8FakeQuantizeConfig):
            return _FakeFloat8.apply(TorchArrays.cast(x, dtype), self.config)
        grid = self.grid(x)
        return _FakeWeight.apply(x, grid.scale, self._bias(grid, x), self.config, dtype)

    def storage(self, w: torch.Tensor) -> str:
        """The dtype in which scales and biases of w are stored."""
        return numerics.storage_of(self.config, self.dtype or format.dtype_name(w))

    def _bias(self, grid: Grid, w: torch.Tensor) -> torch.Tensor:
        return numerics.bias_of(TorchArrays, grid, self.config, self.storage(w))

    @torch.no_grad()
    def coded(self, w: torch.Tensor) -> numerics.Coded:
        """Codes, stored scales and stored biases of a weight as forward sees them."""
        grid = self.grid(w)
        return numerics.encode(TorchArrays, w, self.config, grid, self._bias(grid, w))

    def extra_repr(self) -> str:
        return str(self.config)


class ActivationFakeQuantizer(FakeQuantizer):
    """The same for activations: every token (or group of it) has its own scale."""

    def __init__(self, config: FakeQuantizeConfigBase):
        check_activation(config)
        super().__init__(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        if isinstance(self.config, Float8FakeQuantizeConfig):
            return _FakeFloat8.apply(x, self.config)
        return _FakeActivation.apply(x, self.config)


def _weight_quantizer(config, weight: torch.Tensor) -> FakeQuantizer | None:
    if config is None:
        return None
    check_weight(config)
    numerics.group_size_of(config, weight.shape[-1])
    return FakeQuantizer(config, weight)


class FakeQuantizedLinear(nn.Linear):
    """nn.Linear that fake-quantizes its input and its weight; either configuration may be None.

    Raises ValueError for configurations that do not fit in_features, activations or weights.
    """

    def __init__(
        self, in_features, out_features, bias=False, activation_config=None, weight_config=None, **kwargs
    ):
        super().__init__(in_features, out_features, bias, **kwargs)
        self._attach(activation_config, weight_config)

    def _attach(self, activation_config, weight_config) -> None:
        self.activation_fake_quantizer = (
            None if activation_config is None else ActivationFakeQuantizer(activation_config)
        )
        self.weight_fake_quantizer = _weight_quantizer(weight_config, self.weight)
        for config in (activation_config,):
            if isinstance(config, IntxFakeQuantizeConfig):
                numerics.group_size_of(config, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        w = self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)
        held = self.bias is not None and self.bias.dtype != self.weight_dtype
        return F.linear(x, w, self.bias.to(self.weight_dtype) if held else self.bias)

    weight_dtype = property(lambda self: _weight_dtype(self), doc="What the layer computes with.")

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_config=None, weight_config=None):
        """The layer around the very parameters of `linear`, which may be on the meta device."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias, layer.training = linear.weight, linear.bias, linear.training
        layer._attach(activation_config, weight_config)
        return layer

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear around the very same parameters."""
        layer = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = self.in_features, self.out_features
        layer.weight, layer.bias, layer.training = self.weight, self.bias, self.training
        return layer


class FakeQuantizedEmbedding(nn.Embedding):
    """nn.Embedding with fake-quantized weights: only the rows that are asked for are quantized."""

    def __init__(self, num_embeddings, embedding_dim, padding_idx=None, *args, weight_config=None, **kwargs):
        super().__init__(num_embeddings, embedding_dim, padding_idx, *args, **kwargs)
        self.weight_fake_quantizer = _weight_quantizer(weight_config, self.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        quantizer = self.weight_fake_quantizer
        if quantizer is not None and quantizer.enabled and quantizer.is_static:
            # Static ranges belong to rows of the table, so the whole table is quantized.
            return self._lookup(ids, quantizer(self.weight))
        rows = self._lookup(ids, self.weight)
        if quantizer is None:
            return rows
        return quantizer(rows.reshape(-1, self.embedding_dim)).reshape(rows.shape)

    weight_dtype = property(lambda self: _weight_dtype(self), doc="What the layer computes with.")

    def _lookup(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    _SETTINGS = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        "weight",
        "training",
    )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight_config=None):
        """The layer around the very table of `embedding`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in cls._SETTINGS:
            setattr(layer, name, getattr(embedding, name))
        layer.weight_fake_quantizer = _weight_quantizer(weight_config, layer.weight)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """A plain nn.Embedding around the very same table."""
        layer = nn.Embedding.__new__(nn.Embedding)
        nn.Module.__init__(layer)
        for name in self._SETTINGS:
            setattr(layer, name, getattr(self, name))
        return layer


FAKE_LAYERS = (FakeQuantizedLinear, FakeQuantizedEmbedding)


def _weight_dtype(layer) -> torch.dtype:
    quantizer = layer.weight_fake_quantizer
    held = quantizer is not None and quantizer.dtype is not None
    return getattr(torch, quantizer.dtype) if held else layer.weight.dtype


@torch.no_grad()
def hold_in_float32(model: nn.Module) -> None:
    """Fake-quantized weights of 16-bit models as float32 parameters, with their biases and learned ranges.

    Values, stored scales and what convert makes of it stay in the dtype that the weights had. Without it a
    weight moves in steps of its own 16 bits, which at 8 bits are as coarse as its codes.
    """
    made: dict[int, nn.Parameter] = {}

    def held(parameter):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(parameter.float(), parameter.requires_grad)
        return made[id(parameter)]

    for layer in model.modules():
        if not isinstance(layer, FAKE_LAYERS) or layer.weight_fake_quantizer is None:
            continue
        if layer.weight.dtype == torch.float32:
            continue
        quantizer = layer.weight_fake_quantizer
        if quantizer.dtype is None:
            quantizer.dtype = format.dtype_name(layer.weight)
            for name, parameter in list(quantizer.named_parameters()):
                setattr(quantizer, name, held(parameter))
        layer.weight = held(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias = held(layer.bias)


def packed_weight(layer: FakeQuantizedLinear | FakeQuantizedEmbedding) -> Packed:
    """The layer's weight as it trained with it, packed: the same scales, biases and codes.

    Raises ValueError where the configuration has no packed form.
    """
    quantizer, weight = layer.weight_fake_quantizer, layer.weight.detach()
    fmt = numerics.stored_format(quantizer.config, weight.shape[-1])
    codes, scales, biases = numerics.stored(TorchArrays, quantizer.coded(weight), fmt)
    words = format.pack(codes.cpu().numpy(), fmt.bits)
    return Packed(bridge.like(words, weight, "uint32"), scales.contiguous(), biases.contiguous(), fmt)


def initialize_fake_quantizers(model: nn.Module, example_inputs: tuple = ()) -> None:
    """Choose every learned or static range again from the weights as they are now.

    Ranges are of weights only, so example_inputs, which torchao asks for, are not needed.
    """
    for layer in model.modules():
        if isinstance(layer, FAKE_LAYERS):
            quantizer = layer.weight_fake_quantizer
            if quantizer is not None and quantizer.is_static:
                quantizer.initialize(layer.weight)


def set_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Turn every fake quantizer of the model on or off; off, each layer is its float layer exactly."""
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = enabled


def enable_linear_fake_quant(module: nn.Module, enabled: bool = True) -> None:
    """Turn the fake quantizers of one linear layer on: for model.apply, as in torchao."""
    if isinstance(module, FakeQuantizedLinear):
        set_fake_quant(module, enabled)


def disable_linear_fake_quant(module: nn.Module) -> None:
    enable_linear_fake_quant(module, enabled=False)
