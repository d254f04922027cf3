"""What `mlxq train` does with torch: models of transformers, one process or torchrun's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import mlx.core as mx
import torch
import torch.distributed as dist
import transformers
from torch import nn

from mlxq import ops, qat
from mlxq.checkpoint.huggingface import read_config
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.format import Format, Packed
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear
from mlxq.qat import torch as qt
from mlxq.torch_model import load_torch
from mlxq.train.files import Loaded, weight_config

FLOAT_HEADS = (nn.Linear, nn.Embedding)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def session(device: str, sharded: bool = False):
    """The Session of this process, in torchrun's group if it started this one."""
    if sharded and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("train: --fsdp wants several processes; start them: torchrun ... -m mlxq train")
    grouped = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if device == "cuda" and grouped:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if grouped:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Session(device, sharded)
    finally:
        if grouped:
            dist.destroy_process_group()


class Session:
    """sharded: models are read on the CPU, and the trainer moves this process's part to the device."""

    def __init__(self, device: str, sharded: bool = False):
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"train: torch has no device {device!r} here: {error}") from None
        self.sharded = sharded
        if sharded:
            self.device = torch.device("cpu")

    def options(self) -> dict:
        return {"sharded": True} if self.sharded else {}

    def load(self, folder: Path, dtype: str | None) -> Loaded:
        """A quantized folder through load_torch, a float one through transformers."""
        config = read_config(folder)
        wanted = None if dtype is None else getattr(torch, dtype)
        quantized = bool(config.get("quantization") or config.get("quantization_config"))
        if quantized:
            module, tokenizer = load_torch(folder, self.device, wanted)
        else:
            _check_names(folder, config)
            try:
                module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted or "auto")
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"train: transformers does not load {folder}: {str(error)[:300]}") from None
            module.to(self.device)
        module.config.use_cache = False
        return Loaded(module, tokenizer, config, folder, quantized)

    def prepare(self, model: Loaded, settings) -> None:
        """Fake quantizers into every linear layer and embedding whose K the group size divides."""
        module = model.module
        vocabulary = {id(module.get_input_embeddings()), id(module.get_output_embeddings())}
        for bits, of_vocabulary in ((settings.bits, False), (settings.embedding_bits or settings.bits, True)):
            config = weight_config(bits, settings.group_size, settings.ranges)

            def chosen(layer, path, of_vocabulary=of_vocabulary):
                fits = isinstance(layer, FLOAT_HEADS) and layer.weight.shape[-1] % settings.group_size == 0
                return fits and (id(layer) in vocabulary) == of_vocabulary

            qt.quantize_(module, qat.QATConfig(weight_config=config), chosen)
        if settings.ranges == "learned":
            start_from_affine(module)

    def finished(self, model: Loaded, settings):
        """(path, Packed) and (name, tensor) of the trained model, converted."""
        module = model.module
        if settings.qat:
            qt.quantize_(module, qat.QATConfig(step="convert"))
        tied = model.config.get("tie_word_embeddings", False)
        head = module.get_output_embeddings()
        written = set()
        for path, layer in module.named_modules():
            if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) and not (tied and layer is head):
                parts = (getattr(layer.packed, name).detach() for name in ("words", "scales", "biases"))
                yield path, Packed(*parts, layer.packed.format)
                written |= {f"{path}.{part}" for part in ("weight", "scales", "biases")}
        for name, parameter in module.named_parameters():
            of_head = tied and head is not None and module.get_submodule(name.rpartition(".")[0]) is head
            if name not in written and not of_head:
                yield name, parameter.detach()


def start_from_affine(module: nn.Module) -> None:
    """Learned ranges begin where rounding to nearest by rule "affine" has them, the best grid of three."""
    with torch.no_grad():
        for layer in module.modules():
            quantizer = getattr(layer, "weight_fake_quantizer", None)
            if quantizer is None or not quantizer.is_static or layer.weight.device.type == "meta":
                continue
            config, w = quantizer.config, layer.weight
            levels = config.bounds[1]
            fmt = Format(levels.bit_length(), config.group_size)
            packed = ops.quantize(w.detach().float().cpu(), fmt, "affine", "float32")
            scale, bias = packed.scales.to(w.device), packed.biases.to(w.device)
            bias = torch.where(scale < 0, bias + levels * scale, bias)  # code u becomes levels - u
            quantizer.scale.copy_(scale.abs())
            quantizer.zero_point.copy_(bias + scale.abs() * ((levels + 1) / 2))


def _check_names(folder: Path, config: dict) -> None:
    """Raises ValueError when mlx-lm stores the model's tensors otherwise than transformers."""
    try:
        settings = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"train: transformers does not load {folder}: {str(error)[:300]}") from None
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    zeros = {n: mx.zeros(tuple(v.shape)) for n, v in model.named_parameters() if n not in tied}
    kept = Skeleton(config, folder).sanitize(dict(zeros))
    if set(kept) != set(zeros) or any(kept[name] is not zeros[name] for name in zeros):
        raise ValueError(
            f"train: mlx-lm stores tensors of {folder} otherwise than transformers; add --backend mlx"
        )
