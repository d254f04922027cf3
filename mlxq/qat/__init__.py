"""Quantization-aware training: mlxq.qat.torch for torch.nn, mlxq.qat.mlx for mlx.nn, one set of formulas."""

from __future__ import annotations

from mlxq.qat.config import (
    FakeQuantizeConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxFakeQuantizeConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    QATConfig,
)

__all__ = [
    "FakeQuantizeConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8DynamicActivationInt4WeightConfig",
    "Float8FakeQuantizeConfig",
    "Int4WeightFakeQuantizeConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "IntxFakeQuantizeConfig",
    "IntxWeightOnlyConfig",
    "PerAxis",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerToken",
    "QATConfig",
]
