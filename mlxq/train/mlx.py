"""What `mlxq train` does with MLX: models of mlx-lm."""

from __future__ import annotations

import contextlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from mlxq import ops, qat
from mlxq.checkpoint.huggingface import read_config
from mlxq.format import Format
from mlxq.load import load
from mlxq.qat import mlx as qm
from mlxq.qat.mlx.api import stored
from mlxq.train.files import Loaded, weight_config

CELL = 0.45  # of a scale, from a code's value: within its cell after rounding to 16 bits too


def best_device() -> str:
    return "gpu" if mx.metal.is_available() else "cpu"


@contextlib.contextmanager
def session(device: str, sharded: bool | None = None):
    """The Session of this process; MLX's default device is `device` while it lasts."""
    if sharded:
        raise ValueError("train: --fsdp is torch's; leave it out with MLX, or add --backend torch")
    if device not in ("cpu", "gpu") or (device == "gpu" and not mx.metal.is_available()):
        raise ValueError(f"train: MLX has no device {device!r} here; wanted {best_device()}")
    before = mx.default_device()
    mx.set_default_device(mx.Device(getattr(mx, device)))
    try:
        yield Session()
    finally:
        mx.set_default_device(before)


class Session:
    def settle(self, model: Path, teacher: Path | None, settings) -> None:
        """Nothing: MLX's models stay whole in every process."""

    def options(self) -> dict:
        return {}

    def load(self, folder: Path, dtype: str | None) -> Loaded:
        """A quantized folder through mlxq.load, a float one through mlx-lm."""
        config = read_config(folder)
        quantized = bool(config.get("quantization") or config.get("quantization_config"))
        try:
            module, tokenizer = (load if quantized else mlx_lm.load)(str(folder))
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"train: mlx-lm does not load {folder}: {str(error)[:300]}") from None
        if dtype is not None:
            module.set_dtype(getattr(mx, dtype))
        return Loaded(module, tokenizer, config, folder, quantized)

    def prepare(self, model: Loaded, settings) -> None:
        """Fake quantizers into every linear layer and embedding whose K the group size divides."""
        module = model.module
        for bits, of_vocabulary in ((settings.bits, False), (settings.embedding_bits or settings.bits, True)):
            config = weight_config(bits, settings.group_size, settings.ranges)

            def chosen(layer, path, of_vocabulary=of_vocabulary):
                if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % settings.group_size:
                    return False
                vocabulary = isinstance(layer, nn.Embedding) or path.split(".")[-1] == "lm_head"
                return vocabulary == of_vocabulary

            qm.quantize_(module, qat.QATConfig(weight_config=config), chosen)
        qm.hold_in_float32(module)
        if settings.start is not None:
            start_from_folder(module, Path(settings.start).expanduser())
        elif settings.ranges == "learned":
            start_from_affine(module)

    def finished(self, model: Loaded, settings):
        """(path, Packed) and (name, array) of the trained model, converted."""
        module = model.module
        if settings.qat:
            qm.quantize_(module, qat.QATConfig(step="convert"))
        yield from stored(module)


def start_from_affine(module: nn.Module) -> None:
    """Learned ranges begin where rounding to nearest by rule "affine" has them, the best grid of three."""
    for layer in module.modules():
        quantizer = getattr(layer, "weight_fake_quantizer", None)
        if quantizer is None or not quantizer.is_static:
            continue
        fmt = Format(quantizer.config.bounds[1].bit_length(), quantizer.config.group_size)
        packed = ops.quantize(layer.weight, fmt, "affine", quantizer.storage(layer.weight))
        _set_grid(quantizer, packed.scales.astype(mx.float32), packed.biases.astype(mx.float32))


def _set_grid(quantizer, scale, bias) -> None:
    """Learned ranges that are this stored grid."""
    middle = bias + scale * ((quantizer.config.bounds[1] + 1) / 2)
    quantizer.scale = scale.astype(quantizer.scale.dtype)
    quantizer.zero_point = middle.astype(quantizer.zero_point.dtype)


def start_from_folder(module: nn.Module, folder: Path) -> None:
    """As mlxq.train.torch's: codes, scales and biases of a quantized folder, weights within their cells."""
    source = dict(load(str(folder))[0].named_modules())
    for path, layer in module.named_modules():
        quantizer = getattr(layer, "weight_fake_quantizer", None)
        if quantizer is None:
            continue
        wanted = Format(quantizer.config.bounds[1].bit_length(), quantizer.config.group_size)
        packed = getattr(source.get(path), "packed", None)
        if packed is None or packed.format != wanted or packed.shape != layer.weight.shape:
            has = "no packed layer" if packed is None else f"{packed.format}, {packed.shape}"
            shape = tuple(layer.weight.shape)
            raise ValueError(f"train: {path} of {folder} is {has}; --start wants {wanted}, {shape}")
        value = ops.dequantize(packed, "float32")
        scale, bias = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
        _set_grid(quantizer, scale, bias)
        reach = CELL * mx.repeat(mx.abs(scale), wanted.group_size, -1)
        w = mx.clip(layer.weight.astype(mx.float32), value - reach, value + reach)
        layer.weight = w.astype(layer.weight.dtype)
