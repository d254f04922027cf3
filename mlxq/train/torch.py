"""What `mlxq train` does with torch: models of transformers, one process or torchrun's."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn

from mlxq import ops, qat
from mlxq.checkpoint.huggingface import read_config
from mlxq.checkpoint.safetensors import read_header
from mlxq.checkpoint.trained import stores_as_transformers
from mlxq.format import Format, Packed
from mlxq.qat import torch as qt
from mlxq.qat.torch.api import stored
from mlxq.torch_model import load_torch
from mlxq.train.files import Loaded, weight_config

FLOAT_HEADS = (nn.Linear, nn.Embedding)
FILLED = 0.75  # of a GPU, above which models are cut up; the rest is for activations
CELL = 0.45  # of a scale, from a code's value: within its cell after rounding to 16 bits too


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def session(device: str, sharded: bool | None = None):
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


def gpu_bytes(device: torch.device) -> int | None:
    """Memory of an NVIDIA GPU; None for other devices, which share the host's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def bytes_to_train(model: Path, teacher: Path | None, settings) -> int:
    """What training the model in this folder fills in a process that holds it whole, but for activations.

    As stored: the model, its teacher, gradients and DistributedDataParallel's copy of them, and with qat the
    fake-quantized weights. In float32: copies of what trains, their gradients, two moments, and with qat
    matrices, their gradients and codes too.
    """
    entries = [item for file in model.glob("*.safetensors") for item in read_header(file)[0].items()]
    everything = settings.qat or settings.train == "all"
    total = 0
    for name, entry in entries:
        size, held = math.prod(entry.shape), entry.nbytes
        if settings.qat and len(entry.shape) > 1:
            held = 4 * size
        total += held
        learns = everything or name.rpartition(".")[2] in ("scales", "biases")
        if learns and entry.dtype in ("F16", "BF16", "F32"):
            total += 2 * held + 16 * size
            total += entry.nbytes + held if settings.qat else 0
    if teacher is not None:
        total += sum(e.nbytes for f in teacher.glob("*.safetensors") for e in read_header(f)[0].values())
    return total


class Session:
    """sharded: models are read on the CPU, and the trainer moves this process's part to the device.

    None: settle() decides.
    """

    def __init__(self, device: str, sharded: bool | None = None):
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"train: torch has no device {device!r} here: {error}") from None
        self.sharded = sharded
        if sharded:
            self.device = torch.device("cpu")

    def settle(self, model: Path, teacher: Path | None, settings) -> None:
        """Shard where nothing was said, and a GPU of one of the processes is too small for the whole."""
        if self.sharded is not None:
            return
        self.sharded = False
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        memory = gpu_bytes(self.device)
        if memory is None:
            return
        small = bytes_to_train(model, teacher, settings) > FILLED * memory
        told = torch.tensor(float(small), device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if told.item():
            self.sharded, self.device = True, torch.device("cpu")
            if dist.get_rank() == 0:
                print("train: a GPU cannot hold all of it: --fsdp is on", file=sys.stderr, flush=True)

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
        qt.hold_in_float32(module)
        if settings.start is not None:
            start_from_folder(module, Path(settings.start).expanduser())
        elif settings.ranges == "learned":
            start_from_affine(module)

    def finished(self, model: Loaded, settings):
        """(path, Packed) and (name, tensor) of the trained model, converted."""
        module = model.module
        if settings.qat:
            qt.quantize_(module, qat.QATConfig(step="convert"))
        yield from stored(module, model.config.get("tie_word_embeddings", False))


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
            packed = ops.quantize(w.detach().float().cpu(), fmt, "affine", quantizer.storage(w))
            scale, bias = packed.scales.to(w.device).float(), packed.biases.to(w.device).float()
            _set_grid(quantizer, scale, bias)


def _set_grid(quantizer, scale, bias) -> None:
    """Learned ranges that are this stored grid."""
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(bias + scale * ((quantizer.config.bounds[1] + 1) / 2))


def start_from_folder(module: nn.Module, folder: Path) -> None:
    """Fake-quantized layers begin with the codes, scales and biases of a quantized folder.

    Each weight stays where it is in its code's cell, and moves to the cell's edge where its code is another
    than the nearest one, as GPTQ's are. Raises ValueError where a layer is missing or of another format.
    """
    source, _ = load_torch(folder)
    done = set()
    with torch.no_grad():
        for path, layer in module.named_modules():
            quantizer = getattr(layer, "weight_fake_quantizer", None)
            if quantizer is None or id(layer.weight) in done:
                continue
            done.add(id(layer.weight))
            found = dict(source.named_modules()).get(path)
            wanted = Format(quantizer.config.bounds[1].bit_length(), quantizer.config.group_size)
            packed = getattr(found, "packed", None)
            if packed is None or packed.format != wanted or packed.shape != tuple(layer.weight.shape):
                has = "no packed layer" if packed is None else f"{packed.format}, {packed.shape}"
                shape = tuple(layer.weight.shape)
                raise ValueError(f"train: {path} of {folder} is {has}; --start wants {wanted}, {shape}")
            parts = [part.detach() for part in (packed.words, packed.scales, packed.biases)]
            value = ops.dequantize(Packed(*parts, wanted), "float32").to(layer.weight.device)
            scale, bias = (part.float().to(layer.weight.device) for part in parts[1:])
            _set_grid(quantizer, scale, bias)
            reach = CELL * scale.abs().repeat_interleave(wanted.group_size, -1)
            layer.weight.copy_(layer.weight.float().clamp(value - reach, value + reach))


def _check_names(folder: Path, config: dict) -> None:
    """Raises ValueError when mlx-lm stores the model's tensors otherwise than transformers."""
    try:
        settings = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"train: transformers does not load {folder}: {str(error)[:300]}") from None
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    shapes = {n: tuple(v.shape) for n, v in model.named_parameters() if n not in tied}
    if not stores_as_transformers(config, folder, shapes):
        raise ValueError(
            f"train: mlx-lm stores tensors of {folder} otherwise than transformers; add --backend mlx"
        )
