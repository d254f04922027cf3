"""prepare and convert for torch.nn models."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mlxq.format import Packed
from mlxq.nn.torch import MPQLinear, Q8Linear, QuantizedEmbedding, QuantizedLinear, TiedHead
from mlxq.qat import steps
from mlxq.qat.config import IntxFakeQuantizeConfig, check_activation
from mlxq.qat.numerics import group_size_of
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
        new = QuantizedLinear.from_packed(packed, bias)
        return new if config is None else with_activation(new, config)


replace = _Torch.replace


def with_activation(layer: QuantizedLinear, config) -> QuantizedActivationLinear:
    """The layer on the same tensors, its input rounded. Raises ValueError for other layers and widths."""
    if type(layer) is not QuantizedLinear:
        raise ValueError(f"which is a {type(layer).__name__}; wanted a packed linear layer")
    check_activation(config)
    if isinstance(config, IntxFakeQuantizeConfig):
        group_size_of(config, layer.in_features)
    packed = layer.packed
    parts = (a.detach() for a in (packed.words, packed.scales, packed.biases))
    new = QuantizedActivationLinear.from_packed(Packed(*parts, packed.format), layer.bias)
    new.activation_quantizer = ActivationFakeQuantizer(config)
    return new


def stored(model: nn.Module, tied: bool = False) -> Iterator[tuple]:
    """(path, Packed) and (name, tensor) of a converted model, as they lie on the disk.

    tied   the output head is the embedding's table and has no tensors of its own there

    Raises ValueError for layers that are no weights of such a file, and for a float head that is tied.
    """
    head = model.get_output_embeddings() if tied and hasattr(model, "get_output_embeddings") else None
    packed_head = isinstance(head, (QuantizedLinear, TiedHead))
    written = set()
    for path, layer in model.named_modules():
        steps.check_storable(path, layer, FAKE_LAYERS, (Q8Linear, MPQLinear))
        if isinstance(layer, QuantizedEmbedding) and head is not None and not packed_head:
            raise ValueError(
                f"save: the output head shares the table {path} in the file, but here it is float; "
                "quantize both, or untie them"
            )
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) and layer is not head:
            packed = layer.packed
            parts = (a.detach() for a in (packed.words, packed.scales, packed.biases))
            yield path, Packed(*parts, packed.format)
            written |= {f"{path}.{part}" for part in ("weight", "scales", "biases")}
    for name, parameter in model.named_parameters():
        of_head = head is not None and model.get_submodule(name.rpartition(".")[0]) is head
        if name not in written and not of_head:
            yield name, parameter.detach()


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
