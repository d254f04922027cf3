"""Fake quantization for mlx.nn: layers that train on the numbers that the packed layers will have."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq import format
from mlxq.format import Packed
from mlxq.qat import numerics
from mlxq.qat.config import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig, check_activation, check_weight
from mlxq.qat.numerics import Grid, has_zero_point, least_scale


class MlxArrays:
    """numerics.Arrays over MLX."""

    min = staticmethod(lambda x: x.min(-1))
    max = staticmethod(lambda x: x.max(-1))
    sum = staticmethod(lambda x: x.sum(-1))
    abs = staticmethod(mx.abs)
    round = staticmethod(mx.round)
    clip = staticmethod(mx.clip)
    where = staticmethod(mx.where)
    full_like = staticmethod(mx.full_like)

    @staticmethod
    def cast(x, dtype):
        return x.astype(getattr(mx, dtype))

    @staticmethod
    def repeat(x, times):
        return mx.repeat(x, times, -1)

    @staticmethod
    def power_of_two(x):
        return (x.view(mx.uint32) & 0x7F800000).view(mx.float32)


def _weight_function(config, dtype: str | None = None):
    """value(w, scale, bias) of fake-quantized weights in dtype (None: w's), with numerics' gradients."""

    def coded(w, scale, bias):
        return numerics.encode(
            MlxArrays, w, config, Grid(scale, bias if has_zero_point(config) else None), bias
        )

    @mx.custom_function
    def value(w, scale, bias):
        return numerics.decode(MlxArrays, coded(w, scale, bias), dtype or format.dtype_name(w))

    @value.vjp
    def value_vjp(primals, cotangent, _):
        return numerics.gradients(MlxArrays, cotangent, primals[0], coded(*primals))

    return value


def _activation_function(config):
    """value(x) of fake-quantized activations; the gradient passes where nothing was clipped."""

    @mx.custom_function
    def value(x):
        if isinstance(config, Float8FakeQuantizeConfig):
            return numerics.fake_float8(MlxArrays, x, config)
        return numerics.fake_activation(MlxArrays, x, config)[0]

    @value.vjp
    def value_vjp(x, cotangent, _):
        x = x[0] if isinstance(x, (list, tuple)) else x
        if isinstance(config, Float8FakeQuantizeConfig):
            return cotangent
        inside = numerics.fake_activation(MlxArrays, x, config)[1]
        return cotangent * inside.astype(cotangent.dtype)

    return value


class FakeQuantizer(nn.Module):
    """A weight rounded to its quantized numbers and back; `enabled` off gives it without rounding to codes.

    config   one of mlxq.qat's fake quantizers
    weight   needed where scales are learned or static: they are arrays `scale` and `zero_point` from the
             start, trainable if learned and frozen if static. A dynamic one has no arrays.
    dtype    the name of the values' dtype; None: the weight's own. See hold_in_float32
    """

    def __init__(self, config, weight: mx.array | None = None):
        super().__init__()
        self.config, self.enabled, self.dtype = config, True, None
        self.is_static = isinstance(config, IntxFakeQuantizeConfig) and not config.is_dynamic
        self._function = _activation_function(config) if self._is_float8 else _weight_function(config)
        if self.is_static:
            if weight is None:
                raise ValueError("FakeQuantizer: static and learned scales are made from a weight; give it")
            self.initialize(weight)

    @property
    def _is_float8(self) -> bool:
        return isinstance(self.config, Float8FakeQuantizeConfig)

    def initialize(self, weight: mx.array) -> None:
        """Choose the static or learned ranges from this weight."""
        grid = numerics.choose(MlxArrays, weight, self.config, self.dtype)
        least = least_scale(format.dtype_name(grid.scale))
        self.scale = mx.maximum(grid.scale, least).astype(mx.float32 if self.dtype else grid.scale.dtype)
        if grid.zero is not None:
            wide = self.dtype or self.config.zero_point_domain == "int"
            self.zero_point = grid.zero.astype(mx.float32) if wide else grid.zero
        if not self.config.range_learning:
            self.freeze()

    def grid(self, w: mx.array) -> Grid:
        """The grid of w now: from w itself, or the static or learned one."""
        if not self.is_static:
            grid = numerics.choose(MlxArrays, mx.stop_gradient(w), self.config, self.dtype)
            return Grid(*(None if a is None else mx.stop_gradient(a) for a in (grid.scale, grid.zero)))
        storage = self.storage(w)
        least = least_scale(storage)
        scale = mx.clip(self.scale, least, None)
        if self.config.zero_point_domain == "float":  # a stored grid may count from its largest weight down
            scale = mx.where(self.scale < 0, mx.clip(self.scale, None, -least), scale)
        scale = MlxArrays.cast(scale, storage)
        if self.config.is_symmetric:
            return Grid(scale)
        zero = self.zero_point
        if self.config.zero_point_domain == "int":
            low, high = self.config.bounds
            zero = zero + mx.stop_gradient(mx.clip(mx.round(zero), low, high) - zero)
        return Grid(scale, zero)

    def storage(self, w: mx.array) -> str:
        """The dtype in which scales and biases of w are stored."""
        return numerics.storage_of(self.config, self.dtype or format.dtype_name(w))

    def hold(self, dtype: str) -> None:
        """Give values in this dtype from float32 weights and learned ranges."""
        self.dtype = dtype
        if not self._is_float8:
            self._function = _weight_function(self.config, dtype)
        for name in ("scale", "zero_point"):
            if name in self:
                self[name] = self[name].astype(mx.float32)

    def _bias(self, grid: Grid, w: mx.array) -> mx.array:
        return numerics.bias_of(MlxArrays, grid, self.config, self.storage(w))

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled or self._is_float8:
            x = MlxArrays.cast(x, self.dtype) if self.dtype else x
            return self._function(x) if self.enabled else x
        grid = self.grid(x)
        return self._function(x, grid.scale, self._bias(grid, x))

    def coded(self, w: mx.array) -> numerics.Coded:
        """Codes, stored scales and stored biases of a weight as a call sees them."""
        grid = self.grid(w)
        return numerics.encode(MlxArrays, w, self.config, grid, self._bias(grid, w))

    def _extra_repr(self) -> str:
        return str(self.config)


class ActivationFakeQuantizer(nn.Module):
    """The same for activations: every token (or group of it) has its own scale."""

    def __init__(self, config):
        super().__init__()
        check_activation(config)
        self.config, self.enabled = config, True
        self._function = _activation_function(config)

    def __call__(self, x: mx.array) -> mx.array:
        return self._function(x) if self.enabled else x


def _attach(layer, activation_config, weight_config):
    """The layer with its quantizers. Raises ValueError where they do not fit it."""
    weight = layer["weight"]
    layer.activation_fake_quantizer = layer.weight_fake_quantizer = None
    if activation_config is not None:
        layer.activation_fake_quantizer = ActivationFakeQuantizer(activation_config)
        if isinstance(activation_config, IntxFakeQuantizeConfig):
            numerics.group_size_of(activation_config, weight.shape[-1])
    if weight_config is not None:
        check_weight(weight_config)
        numerics.group_size_of(weight_config, weight.shape[-1])
        layer.weight_fake_quantizer = FakeQuantizer(weight_config, weight)
    return layer


def _around(cls, layer: nn.Module, drop: tuple[str, ...] = ()):
    """A layer of class cls around the very arrays and settings of another, frozen parts included."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    hidden = {name: value for name, value in vars(layer).items() if name not in drop}
    vars(new).update(hidden)
    vars(new)["_no_grad"] = set(layer._no_grad)
    for name, value in layer.items():
        if name not in drop:
            new[name] = value
    return new


_QUANTIZERS = ("activation_fake_quantizer", "weight_fake_quantizer")


def stored_bias(layer) -> mx.array | None:
    """The layer's bias, in the dtype that its values are in."""
    quantizer, bias = layer.weight_fake_quantizer, layer.get("bias")
    held = bias is not None and quantizer is not None and quantizer.dtype is not None
    return MlxArrays.cast(bias, quantizer.dtype) if held else bias


def _weight(layer) -> mx.array:
    """The weight that the layer computes with: fake-quantized where it has a quantizer."""
    quantizer = layer.weight_fake_quantizer
    return layer["weight"] if quantizer is None else quantizer(layer["weight"])


class FakeQuantizedLinear(nn.Linear):
    """nn.Linear that fake-quantizes its input and its weight; either configuration may be None."""

    def __init__(self, input_dims, output_dims, bias=True, activation_config=None, weight_config=None):
        super().__init__(input_dims, output_dims, bias)
        _attach(self, activation_config, weight_config)

    def __call__(self, x: mx.array) -> mx.array:
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        w = _weight(self)
        return mx.addmm(stored_bias(self), x, w.T) if "bias" in self else x @ w.T

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_config=None, weight_config=None):
        """The layer around the very arrays of `linear`."""
        return _attach(_around(cls, linear), activation_config, weight_config)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear around the very same arrays."""
        return _around(nn.Linear, self, _QUANTIZERS)


class FakeQuantizedEmbedding(nn.Embedding):
    """nn.Embedding with fake-quantized weights, also as the output head of a tied model."""

    def __init__(self, num_embeddings, dims, weight_config=None):
        super().__init__(num_embeddings, dims)
        _attach(self, None, weight_config)

    def __call__(self, ids: mx.array) -> mx.array:
        quantizer = self.weight_fake_quantizer
        if quantizer is None:
            return self["weight"][ids]
        if quantizer.is_static and quantizer.enabled:  # its ranges belong to rows of the table
            return quantizer(self["weight"])[ids]
        rows = self["weight"][ids]
        return quantizer(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _weight(self).T

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight_config=None):
        """The layer around the very table of `embedding`."""
        return _attach(_around(cls, embedding), None, weight_config)

    def to_embedding(self) -> nn.Embedding:
        """A plain nn.Embedding around the very same table."""
        return _around(nn.Embedding, self, _QUANTIZERS)


class FakeQuantizedSwitchLinear(SwitchLinear):
    """mlx-lm's experts with fake-quantized weights (experts, N, K)."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        w = _weight(self)
        y = mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(stored_bias(self)[indices], -2) if "bias" in self else y

    @classmethod
    def from_linear(cls, experts: SwitchLinear, activation_config=None, weight_config=None):
        return _attach(_around(cls, experts), activation_config, weight_config)

    def to_linear(self) -> SwitchLinear:
        return _around(SwitchLinear, self, _QUANTIZERS)


FAKE_LAYERS = (FakeQuantizedLinear, FakeQuantizedEmbedding, FakeQuantizedSwitchLinear)


def hold_in_float32(model: nn.Module) -> None:
    """Fake-quantized weights of 16-bit models as float32 arrays, with their biases and learned ranges.

    Values, stored scales and what convert makes of it stay in the dtype that the weights had. Without it a
    weight moves in steps of its own 16 bits, which at 8 bits are as coarse as its codes.
    """
    for layer in model.modules():
        if not isinstance(layer, FAKE_LAYERS) or layer.weight_fake_quantizer is None:
            continue
        if layer["weight"].dtype != mx.float32:
            layer.weight_fake_quantizer.hold(format.dtype_name(layer["weight"]))
            for name in ("weight", "bias"):
                if name in layer:
                    layer[name] = layer[name].astype(mx.float32)


def packed_weight(layer) -> Packed:
    """The layer's weight as it trained with it, packed: the same scales, biases and codes.

    Raises ValueError where the configuration has no packed form.
    """
    quantizer, weight = layer.weight_fake_quantizer, layer["weight"]
    fmt = numerics.stored_format(quantizer.config, weight.shape[-1])
    codes, scales, biases = numerics.stored(MlxArrays, quantizer.coded(weight), fmt)
    return Packed(mx.array(format.pack(np.array(codes), fmt.bits)), scales, biases, fmt)


def initialize_fake_quantizers(model: nn.Module, example_inputs: tuple = ()) -> None:
    """Choose every learned or static range again from the weights as they are now."""
    for layer in model.modules():
        if isinstance(layer, FAKE_LAYERS) and layer.weight_fake_quantizer is not None:
            if layer.weight_fake_quantizer.is_static:
                layer.weight_fake_quantizer.initialize(layer["weight"])


def set_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Turn every fake quantizer of the model on or off; off, each layer is its float layer exactly."""
    for module in model.modules():
        if isinstance(module, (FakeQuantizer, ActivationFakeQuantizer)):
            module.enabled = enabled
