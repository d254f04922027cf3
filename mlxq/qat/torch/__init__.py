"""Quantization-aware training for torch.nn: prepare, train with any optimiser, convert to packed layers."""

from __future__ import annotations

from mlxq.qat.torch.api import (
    ComposableQATQuantizer,
    Float8ActInt4WeightQATQuantizer,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    QuantizedActivationLinear,
    quantize_,
)
from mlxq.qat.torch.fake import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FakeQuantizer,
    disable_linear_fake_quant,
    enable_linear_fake_quant,
    hold_in_float32,
    initialize_fake_quantizers,
    packed_weight,
    set_fake_quant,
)

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "FakeQuantizer",
    "Float8ActInt4WeightQATQuantizer",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATQuantizer",
    "QuantizedActivationLinear",
    "disable_linear_fake_quant",
    "enable_linear_fake_quant",
    "hold_in_float32",
    "initialize_fake_quantizers",
    "packed_weight",
    "quantize_",
    "set_fake_quant",
]
