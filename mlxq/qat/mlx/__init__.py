"""Quantization-aware training for mlx.nn: prepare, train as any MLX model, convert to packed layers."""

from __future__ import annotations

from mlxq.qat.mlx.api import (
    ComposableQATQuantizer,
    Float8ActInt4WeightQATQuantizer,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    QuantizedActivationLinear,
    quantize_,
)
from mlxq.qat.mlx.fake import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FakeQuantizedSwitchLinear,
    FakeQuantizer,
    hold_in_float32,
    initialize_fake_quantizers,
    packed_weight,
    set_fake_quant,
)

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "FakeQuantizedSwitchLinear",
    "FakeQuantizer",
    "Float8ActInt4WeightQATQuantizer",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATQuantizer",
    "QuantizedActivationLinear",
    "hold_in_float32",
    "initialize_fake_quantizers",
    "packed_weight",
    "quantize_",
    "set_fake_quant",
]
