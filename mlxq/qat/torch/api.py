"""prepare and convert for torch.nn models."""

from __future__ import annotations

from torch import nn

from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear
from mlxq.qat import steps
from mlxq.qat.steps import ComposableQATQuantizer, Report
from mlxq.qat.torch.fake import (
    FAKE_LAYERS,
    ActivationFakeQuantizer,
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    packed_weight,
)

__all__ = ["ComposableQATQuantizer", "quantize_"]


class QuantizedActivationLinear(QuantizedLinear):
    """A packed linear layer whose input goes through the quantizer that it trained with."""

    def forward(self, x):
        return super().forward(self.activation_quantizer(x))


class _Torch(steps.Framework):
    """steps.Framework over torch.nn."""

    @staticmethod
    def modules(model):
        return model.named_modules(remove_duplicate=False)

    @staticmethod
    def is_layer(module) -> bool:
        return isinstance(module, (nn.Linear, nn.Embedding))

    @staticmethod
    def replace(model, path, layer):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)

    @staticmethod
    def is_fake(layer) -> bool:
        return isinstance(layer, FAKE_LAYERS)

    @staticmethod
    def is_embedding(layer) -> bool:
        return isinstance(layer, nn.Embedding)

    @staticmethod
    def weight_id(layer) -> int:
        return id(layer.weight)

    @staticmethod
    def prepared(layer, activation, weight):
        if type(layer) is nn.Linear:
            return FakeQuantizedLinear.from_linear(layer, activation, weight)
        if type(layer) is nn.Embedding:
            return FakeQuantizedEmbedding.from_embedding(layer, weight)
        raise ValueError(f"a {type(layer).__name__} computes in its own way, which would be lost")

    @staticmethod
    def packed(layer):
        return packed_weight(layer)

    @staticmethod
    def converted(layer, packed):
        if isinstance(layer, FakeQuantizedEmbedding):
            if layer.max_norm is not None:
                raise ValueError("max_norm rewrites rows, and packed rows cannot be rewritten")
            table = QuantizedEmbedding.from_packed(packed)
            if layer.weight_dtype != table.scales.dtype:  # what follows computes in the weight's
                table.rows_dtype = layer.weight_dtype
            return table
        config, bias = _Torch.activation_config(layer), layer.bias
        if bias is not None and layer.weight_dtype != layer.weight.dtype:
            bias = bias.detach().to(layer.weight_dtype)
        if config is None:
            return QuantizedLinear.from_packed(packed, bias)
        new = QuantizedActivationLinear.from_packed(packed, bias)
        new.activation_quantizer = ActivationFakeQuantizer(config)
        return new


def quantize_(model: nn.Module, config, filter_fn=None) -> Report:
    """mlxq.qat.steps.quantize_ for a torch model, in place; the report lists what changed and what not."""
    return steps.quantize_(_Torch, model, config, filter_fn)


class Int8DynActInt4WeightQATQuantizer(steps.Int8DynActInt4WeightQATQuantizer):
    framework = _Torch


class Int4WeightOnlyQATQuantizer(steps.Int4WeightOnlyQATQuantizer):
    framework = _Torch


class Float8ActInt4WeightQATQuantizer(steps.Float8ActInt4WeightQATQuantizer):
    framework = _Torch


class Int4WeightOnlyEmbeddingQATQuantizer(steps.Int4WeightOnlyEmbeddingQATQuantizer):
    framework = _Torch
