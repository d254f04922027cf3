"""prepare and convert for mlx.nn models, mlx-lm's included."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlxq.nn.mlx import QuantizedEmbedding, QuantizedLinear, QuantizedSwitchLinear
from mlxq.qat import steps
from mlxq.qat.mlx.fake import (
    FAKE_LAYERS,
    ActivationFakeQuantizer,
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FakeQuantizedSwitchLinear,
    packed_weight,
    stored_bias,
)
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
        config, experts = _Mlx.activation_config(layer), isinstance(layer, SwitchLinear)
        kinds = (QuantizedLinear, QuantizedActivationLinear)
        if experts:
            kinds = (QuantizedSwitchLinear, QuantizedActivationSwitchLinear)
        new = kinds[config is not None].from_packed(packed, stored_bias(layer))
        if config is not None:
            new.activation_quantizer = ActivationFakeQuantizer(config)
        return new


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
