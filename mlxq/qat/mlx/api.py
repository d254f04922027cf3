"""prepare and convert for mlx.nn models, mlx-lm's included."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq.nn.mlx import MPQLinear, Q8Linear, QuantizedEmbedding, QuantizedLinear, QuantizedSwitchLinear
from mlxq.qat import steps
from mlxq.qat.config import IntxFakeQuantizeConfig, check_activation
from mlxq.qat.mlx.fake import (
    FAKE_LAYERS,
    ActivationFakeQuantizer,
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FakeQuantizedSwitchLinear,
    packed_weight,
    stored_bias,
)
from mlxq.qat.numerics import group_size_of
from mlxq.qat.steps import ComposableQATQuantizer, Report

__all__ = ["ComposableQATQuantizer", "quantize_"]


class QuantizedActivationLinear(QuantizedLinear):
    """A packed linear layer whose input goes through the quantizer that it trained with."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(self.activation_quantizer(x))


class QuantizedActivationSwitchLinear(QuantizedSwitchLinear):
    """Packed experts whose input goes through the quantizer that they trained with."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return super().__call__(self.activation_quantizer(x), indices, sorted_indices)


_PREPARED = {
    nn.Linear: FakeQuantizedLinear.from_linear,
    SwitchLinear: FakeQuantizedSwitchLinear.from_linear,
}


class _Mlx(steps.Framework):
    """steps.Framework over mlx.nn."""

    @staticmethod
    def modules(model):
        return model.named_modules()

    @staticmethod
    def is_layer(module) -> bool:
        return isinstance(module, (nn.Linear, nn.Embedding, SwitchLinear))

    @staticmethod
    def replace(model, path, layer):
        model.update_modules(tree_unflatten([(path, layer)]))

    @staticmethod
    def is_fake(layer) -> bool:
        return isinstance(layer, FAKE_LAYERS)

    @staticmethod
    def is_embedding(layer) -> bool:
        return isinstance(layer, nn.Embedding)

    @staticmethod
    def weight_id(layer) -> int:
        return id(layer)

    @staticmethod
    def prepared(layer, activation, weight):
        if type(layer) is nn.Embedding:
            return FakeQuantizedEmbedding.from_embedding(layer, weight)
        if type(layer) not in _PREPARED:
            raise ValueError(f"a {type(layer).__name__} computes in its own way, which would be lost")
        return _PREPARED[type(layer)](layer, activation, weight)

    @staticmethod
    def packed(layer):
        return packed_weight(layer)

    @staticmethod
    def converted(layer, packed):
        if isinstance(layer, FakeQuantizedEmbedding):
            return QuantizedEmbedding.from_packed(packed)
        kind = QuantizedSwitchLinear if isinstance(layer, SwitchLinear) else QuantizedLinear
        config, new = _Mlx.activation_config(layer), kind.from_packed(packed, stored_bias(layer))
        return new if config is None else with_activation(new, config)


replace = _Mlx.replace
_ROUNDING = {
    QuantizedLinear: QuantizedActivationLinear,
    QuantizedSwitchLinear: QuantizedActivationSwitchLinear,
}


def with_activation(layer: nn.Module, config) -> nn.Module:
    """The layer on the same arrays, its input rounded. Raises ValueError for other layers and widths."""
    if type(layer) not in _ROUNDING:
        raise ValueError(f"which is a {type(layer).__name__}; wanted a packed linear layer")
    check_activation(config)
    if isinstance(config, IntxFakeQuantizeConfig):
        group_size_of(config, layer.packed.K)
    new = _ROUNDING[type(layer)].from_packed(layer.packed, layer.get("bias"))
    new.activation_quantizer = ActivationFakeQuantizer(config)
    return new


def stored(model: nn.Module, tied: bool = False) -> Iterator[tuple]:
    """(path, Packed) and (name, array) of a converted model, as they lie on the disk.

    tied   as in torch; of MLX's models the head is the table itself

    Raises ValueError for layers that are no weights of such a file.
    """
    written = set()
    for path, layer in model.named_modules():
        steps.check_storable(path, layer, FAKE_LAYERS, (Q8Linear, MPQLinear))
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear)):
            yield path, layer.packed
            written |= {f"{path}.{part}" for part in ("weight", "scales", "biases")}
    for name, array in tree_flatten(model.parameters()):
        if name not in written:
            yield name, array


def quantize_(model: nn.Module, config, filter_fn=None) -> Report:
    """mlxq.qat.steps.quantize_ for an MLX model, in place; the report lists what changed and what not.

    A converted model is one of mlx-lm: its layers are drop-ins for the stock quantized ones. Quantizers of
    activations live in ours only.
    """
    return steps.quantize_(_Mlx, model, config, filter_fn)


class Int8DynActInt4WeightQATQuantizer(steps.Int8DynActInt4WeightQATQuantizer):
    framework = _Mlx


class Int4WeightOnlyQATQuantizer(steps.Int4WeightOnlyQATQuantizer):
    framework = _Mlx


class Float8ActInt4WeightQATQuantizer(steps.Float8ActInt4WeightQATQuantizer):
    framework = _Mlx


class Int4WeightOnlyEmbeddingQATQuantizer(steps.Int4WeightOnlyEmbeddingQATQuantizer):
    framework = _Mlx
