"""The two steps over any framework: which layers are swapped, what must agree, and the classic quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlxq.format import STORAGE
from mlxq.qat.config import (
    Float8FakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    QATConfig,
    dtype_name,
)


@dataclass
class Report:
    """Paths of layers: those that a step changed, and those that it could have changed and did not."""

    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Framework(Protocol):
    """What the steps need of a framework, as a class that is not instantiated; a layer has one weight."""

    @classmethod
    def layers(cls, model) -> Iterable[tuple[str, Any]]:
        """Every module below the model that holds a weight that could be quantized, fake or not, by path."""
        return [(path, module) for path, module in cls.modules(model) if cls.is_layer(module)]

    @staticmethod
    def weight_config(layer):
        """The configuration of the layer's weight, None where it has none."""
        return _config_of(layer, "weight_fake_quantizer")

    @staticmethod
    def activation_config(layer):
        """The configuration of the layer's input, None where it has none."""
        return _config_of(layer, "activation_fake_quantizer")

    @classmethod
    def unwrapped(cls, layer):
        """The float layer that a fake-quantized one was made around."""
        return layer.to_embedding() if cls.is_embedding(layer) else layer.to_linear()

    def modules(self, model): ...
    def is_layer(self, module) -> bool: ...
    def replace(self, model, path: str, layer) -> None: ...
    def is_fake(self, layer) -> bool: ...
    def is_embedding(self, layer) -> bool: ...
    def weight_id(self, layer) -> int:
        """The same number for layers that share one weight."""

    def prepared(self, layer, activation, weight): ...
    def converted(self, layer, packed): ...
    def packed(self, layer): ...


def check_storable(path: str, layer, fakes: tuple, others: tuple) -> None:
    """Raises ValueError for a layer that is fake-quantized still, or of a kind that has other files."""
    if isinstance(layer, fakes):
        raise ValueError(f"save: {path} is fake-quantized still; convert the model first")
    if isinstance(layer, others):
        raise ValueError(f"save: {path} is a {type(layer).__name__}, which has files of its own kind")


def _config_of(layer, name: str):
    quantizer = getattr(layer, name, None)
    return None if quantizer is None else quantizer.config


def quantize_(framework: Framework, model, config: QATConfig, filter_fn: Callable | None = None) -> Report:
    """Swap the model's layers in place: float to fake-quantized ("prepare"), or those to packed ("convert").

    filter_fn(layer, path) chooses layers; None: every linear layer and every embedding, and in convert every
    fake-quantized layer. Embeddings get the weight's quantizer only. Without a base, convert of a
    configuration that was prepared explicitly packs too: the fake quantizers say to what. Weights that two
    layers share stay shared.

    Raises ValueError, naming the layer, before anything is changed: when a layer does not fit (K and groups,
    a form that cannot be packed), when filter_fn takes a module that is neither, when layers that share one
    weight would get different formats, and in convert when base_config is not the one prepared with.
    """
    if not isinstance(config, QATConfig):
        raise ValueError(f"quantize_: {config!r} is no QATConfig")
    found = dict(framework.layers(model))
    if "" in found:
        raise ValueError(
            "quantize_: the model is one layer, which cannot be swapped in place; put it in a module"
        )
    _check_filter(framework, model, found, filter_fn)
    step = _prepare if config.step == "prepare" else _convert
    swaps, report = step(framework, found, config, filter_fn)
    for path, layer in swaps.items():
        framework.replace(model, path, layer)
    return report


def _check_filter(framework, model, found, filter_fn) -> None:
    if filter_fn is None:
        return
    for path, module in framework.modules(model):
        if path and path not in found and filter_fn(module, path):
            raise ValueError(
                f"quantize_: {path} is a {type(module).__name__}; "
                "only linear layers and embeddings train quantized"
            )


def _prepare(framework, found, config: QATConfig, filter_fn):
    activation, weight = config.fake_quantizers()
    swaps, report, sharing, made = {}, Report(), {}, {}
    for path, layer in found.items():
        chosen = not framework.is_fake(layer) and (filter_fn is None or filter_fn(layer, path))
        if chosen and id(layer) in made:
            swaps[path] = made[id(layer)]
        elif chosen:
            try:
                if framework.is_embedding(layer):
                    if activation is not None and filter_fn is not None and config.base_config is None:
                        raise ValueError(
                            "an embedding has no activations to quantize; give it no activation_config"
                        )
                    swaps[path] = framework.prepared(layer, None, weight)
                else:
                    swaps[path] = framework.prepared(layer, activation, weight)
            except ValueError as error:
                raise ValueError(f"quantize_: {path}: {error}; filter_fn can leave it in float") from None
            made[id(layer)] = swaps[path]
        (report.changed if chosen else report.left).append(path)
        sharing.setdefault(framework.weight_id(layer), []).append((path, swaps.get(path, layer)))
    _check_shared(framework, sharing)
    return swaps, report


def _check_shared(framework, sharing: dict[int, list]) -> None:
    """Layers with one weight have one configuration, and one set of learned ranges."""
    for group in sharing.values():
        quantized = [(path, layer) for path, layer in group if framework.weight_config(layer) is not None]
        for path, layer in quantized[1:]:
            first, other = quantized[0]
            if framework.weight_config(layer) != framework.weight_config(other):
                raise ValueError(
                    f"quantize_: {first} and {path} share one weight but not one format: "
                    f"{framework.weight_config(other)} and {framework.weight_config(layer)}"
                )
            layer.weight_fake_quantizer = other.weight_fake_quantizer


def _convert(framework, found, config: QATConfig, filter_fn):
    swaps, report, packs = {}, Report(), {}
    expected = config.base_config.fake_quantizers() if config.base_config is not None else None
    for path, layer in found.items():
        if not framework.is_fake(layer):
            continue
        if filter_fn is not None and not filter_fn(layer, path):
            report.left.append(path)
            continue
        activation, weight = framework.activation_config(layer), framework.weight_config(layer)
        if expected is not None:
            wanted = None if framework.is_embedding(layer) else expected[0]
            if not _same(activation, wanted) or not _same(weight, expected[1]):
                raise ValueError(
                    f"quantize_: {path} was prepared with {activation} and {weight}, which is not what "
                    f"{config.base_config} asks for"
                )
        try:
            if weight is None:
                swaps[path] = framework.unwrapped(layer)
            else:
                key = framework.weight_id(layer)
                if key not in packs:
                    packs[key] = framework.packed(layer)
                swaps[path] = framework.converted(layer, packs[key])
        except ValueError as error:
            raise ValueError(f"quantize_: {path}: {error}") from None
        report.changed.append(path)
    if not report.changed and not report.left:
        raise ValueError("quantize_: the model has no fake-quantized layer to convert; prepare it first")
    return swaps, report


def _same(config, other) -> bool:
    """Equal, but for learned or static ranges, which no base asks for."""
    if isinstance(config, IntxFakeQuantizeConfig) and isinstance(other, IntxFakeQuantizeConfig):
        ignored = {"is_dynamic", "range_learning", "zero_point_precision"}
        return {k: v for k, v in vars(config).items() if k not in ignored} == {
            k: v for k, v in vars(other).items() if k not in ignored
        }
    return config == other


class TwoStepQuantizer:
    """prepare(model) and convert(model), both in place and returning the model."""

    framework: Framework
    activation_config: Any = None
    weight_config: Any = None
    embeddings = False

    def _chosen(self, layer, path: str) -> bool:
        return self.framework.is_embedding(layer) == self.embeddings and self.framework.is_layer(layer)

    def prepare(self, model):
        """Fake quantizers into every layer of this kind. Raises ValueError for one that does not fit."""
        config = QATConfig(activation_config=self.activation_config, weight_config=self.weight_config)
        quantize_(self.framework, model, config, self._chosen)
        return model

    def convert(self, model):
        """Packed layers in place of the fake-quantized ones of this quantizer's kind."""
        quantize_(self.framework, model, QATConfig(step="convert"), self._chosen)
        return model

    def get_activation_fake_quantize_config(self):
        return self.activation_config

    def get_weight_fake_quantize_config(self):
        return self.weight_config


def _check_precision(quantizer, precision) -> None:
    if dtype_name(precision) not in STORAGE:
        kinds = ", ".join(STORAGE)
        raise ValueError(f"{type(quantizer).__name__}: precision {precision!r} is not built; wanted {kinds}")


class Int8DynActInt4WeightQATQuantizer(TwoStepQuantizer):
    """8da4w: int8 activations, asymmetric per token, symmetric int4 weights in groups.

    precision and padding_allowed are torchao's and change nothing: weights keep their dtype, and a K that
    groups do not divide is refused instead of left in float. Scales of activations are float32.
    """

    def __init__(self, groupsize=256, padding_allowed=False, precision="float32", scales_precision="float32"):
        if padding_allowed:
            raise ValueError(
                "Int8DynActInt4WeightQATQuantizer: padding is not built; choose a group that divides K"
            )
        _check_precision(self, precision)
        self.groupsize = groupsize
        self.activation_config = IntxFakeQuantizeConfig(
            "int8", "per_token", is_symmetric=False, eps=2.0**-23, zero_point_precision="float32"
        )
        self.weight_config = IntxFakeQuantizeConfig(
            "int4", group_size=groupsize, is_symmetric=True, scale_precision=scales_precision
        )


class Int4WeightOnlyQATQuantizer(TwoStepQuantizer):
    """tinygemm's int4 weights: 0..15 with a float zero point a group.

    inner_k_tiles is torchao's packing and changes nothing. Layers with a bias are converted too.
    """

    def __init__(self, groupsize=256, inner_k_tiles=8, precision="bfloat16", scales_precision="bfloat16"):
        if groupsize not in (32, 64, 128, 256):
            raise ValueError(f"Int4WeightOnlyQATQuantizer: groups of {groupsize}; wanted 32, 64, 128 or 256")
        if inner_k_tiles not in (2, 4, 8):
            raise ValueError(f"Int4WeightOnlyQATQuantizer: inner_k_tiles={inner_k_tiles}; wanted 2, 4 or 8")
        _check_precision(self, precision)
        self.groupsize = groupsize
        self.weight_config = IntxFakeQuantizeConfig(
            "uint4",
            group_size=groupsize,
            is_symmetric=False,
            zero_point_domain="float",
            scale_precision=scales_precision,
        )


class Float8ActInt4WeightQATQuantizer(TwoStepQuantizer):
    """Float8 activation rows times symmetric int4 weights in groups (None: per channel)."""

    def __init__(self, group_size=64, scale_precision="bfloat16"):
        self.activation_config = Float8FakeQuantizeConfig()
        granularity = "per_channel" if group_size is None else "per_group"
        self.weight_config = IntxFakeQuantizeConfig(
            "int4", granularity, group_size=group_size, scale_precision=scale_precision
        )


class Int4WeightOnlyEmbeddingQATQuantizer(TwoStepQuantizer):
    """Symmetric int4 embeddings in groups."""

    embeddings = True

    def __init__(self, group_size=256, scale_precision="float32", zero_point_precision="int32"):
        self.weight_config = IntxFakeQuantizeConfig(
            "int4",
            group_size=group_size,
            scale_precision=scale_precision,
            zero_point_precision=zero_point_precision,
        )


class ComposableQATQuantizer:
    """Several quantizers, applied in order; each must be for layers of its own.

    Raises ValueError when two are for the same kind of layer.
    """

    def __init__(self, quantizers):
        self.quantizers = list(quantizers)
        kinds = [q.embeddings for q in self.quantizers if isinstance(q, TwoStepQuantizer)]
        if len(set(kinds)) < len(kinds):
            raise ValueError("ComposableQATQuantizer: two quantizers are for the same kind of layer")

    def prepare(self, model):
        for quantizer in self.quantizers:
            model = quantizer.prepare(model)
        return model

    def convert(self, model):
        for quantizer in self.quantizers:
            model = quantizer.convert(model)
        return model
