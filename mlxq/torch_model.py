"""A quantized MLX checkpoint as a transformers model for torch, its weights packed in our layers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlxq import bridge
from mlxq.checkpoint import q8, trained
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.format import Format, Packed
from mlxq.load import checked_config, in_one_line, model_folder

try:
    import torch
    import transformers
    from torch import nn
    from torch.overrides import TorchFunctionMode

    from mlxq.nn.q8.torch import Q8Linear
    from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear, TiedHead
except ImportError as missing:
    raise ImportError(f"load_torch needs torch (pip install 'mlxq[torch]'): {missing}") from missing


def load_torch(path: str | Path, device=None, dtype=None, revision: str | None = None):
    """(model, tokenizer) of a quantized MLX model for torch: mlxq.load for the other framework.

    path     a folder that mlxq convert or mlx_lm.convert wrote, or a hub id when there is a network
    device   what torch.device takes; None: the CPU
    dtype    a torch.dtype for every float tensor, scales among them; None: as stored

    The architecture is transformers' own, by model_type; linear layers and embeddings are mlxq.nn.torch's on
    the packed bytes, and no float copy of a packed weight is made. On the CPU torch and MLX share the memory.
    Layers with 8-bit activations (mlxq.checkpoint.q8) become Q8Linear; those that trained with rounded inputs
    round them (mlxq.checkpoint.trained).

    Raises ImportError without torch, and as mlxq.load does for the folder. Raises ValueError when
    transformers lacks the architecture, when mlx-lm arranges its tensors in another way than transformers
    (experts, transposed or split weights), for modes other than affine, and for missing or extra tensors.
    """
    folder = model_folder(path, revision)
    config = checked_config(folder, {})
    settings = config.get("quantization") or config.get("quantization_config") or {}
    arrays: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        arrays.update(mx.load(str(shard)))  # read when they are used, one after the other
    model = _empty_model(folder, config)
    packed = {name.removesuffix(".scales") for name in arrays if name.endswith(".scales")}
    tied = _tied_head(model, arrays)
    _check_names(folder, config, model, arrays, packed, tied)
    where = torch.device("cpu" if device is None else device)

    def take(name: str):
        tensor = bridge.to_torch(arrays.pop(name), where)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    for path_of in sorted(packed):
        fmt = _format(folder, settings, path_of)
        weight = Packed(*(take(f"{path_of}.{part}") for part in ("weight", "scales", "biases")), fmt)
        bias = take(f"{path_of}.bias") if f"{path_of}.bias" in arrays else None
        model.set_submodule(path_of, _layer(folder, model.get_submodule(path_of), path_of, weight, bias))
    _restore_q8(folder, config, model)
    trained.restore(model, config, folder)
    if tied is not None:
        table = model.get_submodule(tied)
        if isinstance(table, QuantizedEmbedding):
            model.set_output_embeddings(TiedHead(table))
            model._tied_weights_keys, model.all_tied_weights_keys = None, {}  # a module is tied, not tensors
    for name in list(arrays):
        owner, _, leaf = name.rpartition(".")
        module, values = model.get_submodule(owner), take(name)
        setattr(module, leaf, nn.Parameter(values) if leaf in module._parameters else values)
    if tied is not None and not isinstance(model.get_submodule(tied), QuantizedEmbedding):
        model.tie_weights()
    _to_device(model, where)
    model.config.dtype = model.dtype
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval(), _tokenizer(folder)


class _WeightsOnMeta(TorchFunctionMode):
    """torch.empty, with which layers make their weights, takes no memory; computed tensors are real.

    So rotary frequencies and their kin, which no checkpoint holds, are those of the constructor.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _empty_model(folder: Path, config: dict) -> nn.Module:
    ours = ("quantization", "quantization_config", q8.KEY, trained.KEY)
    own = {key: value for key, value in config.items() if key not in ours}
    name = own.pop("model_type")
    if name not in transformers.CONFIG_MAPPING:
        version = transformers.__version__
        raise ValueError(f"load_torch: transformers {version} has no model of type {name!r} ({folder})")
    try:
        settings = transformers.AutoConfig.for_model(name, **own)
        with _WeightsOnMeta():
            return transformers.AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # transformers and huggingface_hub check settings with errors of their own
        said = in_one_line(error)
        raise ValueError(f"load_torch: transformers makes no language model of {folder}: {said}") from error


def _tied_head(model, arrays) -> str | None:
    """Path of the table that also serves as output projection; None where the checkpoint has a head."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    if head is None or f"{paths[id(head)]}.weight" in arrays or not model.config.tie_word_embeddings:
        return None
    return paths[id(table)]


def _check_names(folder, config, model, arrays, packed, tied) -> None:
    """Raises ValueError unless each stored tensor is one of transformers' as it is, and none is missing."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if tied is not None:
        paths = {id(module): path for path, module in model.named_modules()}
        del wanted[f"{paths[id(model.get_output_embeddings())]}.weight"]
    parts = {f"{path}.{part}" for path in packed for part in ("scales", "biases")}
    missing = [name for name in wanted if name not in arrays]
    missing += [name for name in parts if name not in arrays]
    if missing:
        raise ValueError(f"load_torch: {folder} lacks tensors of transformers' model: {_some(missing)}")
    extra = [name for name in arrays if name not in wanted and name not in parts]
    if extra:
        raise ValueError(f"load_torch: {folder} has tensors that transformers' model lacks: {_some(extra)}")
    for name, shape in wanted.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in packed:
            continue
        if tuple(arrays[name].shape) != shape:
            got = tuple(arrays[name].shape)
            raise ValueError(f"load_torch: {folder}: {name} has shape {got}; transformers wants {shape}")
    # mlx-lm may store a tensor of the same name and shape with other values in it: it is asked, with zeros.
    zeros = {name: mx.zeros(shape) for name, shape in wanted.items()}
    kept = Skeleton(config, folder).sanitize(dict(zeros))
    changed = [name for name in wanted if kept.get(name) is not zeros[name]]
    if changed:
        raise ValueError(
            f"load_torch: mlx-lm stores tensors of {folder} otherwise than transformers: {_some(changed)}"
        )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _format(folder: Path, settings: dict, path: str) -> Format:
    own = settings.get(path)
    chosen = settings | own if isinstance(own, dict) else settings
    mode = chosen.get("mode", "affine")
    if mode != "affine":
        raise ValueError(f"load_torch: {path} of {folder} is in mode {mode}; built for torch: affine")
    try:
        return Format(chosen["bits"], chosen["group_size"])
    except KeyError as error:
        raise ValueError(f"load_torch: {folder}/config.json has no {error} for {path}") from None


class ScaledEmbedding(QuantizedEmbedding):
    """A table whose rows are multiplied by one number on the way out (Gemma)."""

    def forward(self, ids):
        rows = super().forward(ids)
        return rows * self.embed_scale.to(rows.dtype)


def _layer(folder: Path, module: nn.Module, path: str, weight: Packed, bias) -> nn.Module:
    """Our layer in the place of transformers' float one. Raises ValueError when they disagree."""
    kind = type(module)
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    if kind not in (nn.Linear, nn.Embedding) and scale is None:
        raise ValueError(
            f"load_torch: {path} of {folder} is packed, but transformers has a {kind.__name__} there"
        )
    try:
        weight.validate()
    except ValueError as error:
        raise ValueError(f"load_torch: {path} of {folder}: {error}") from error
    wanted = tuple(module.weight.shape)
    if weight.shape != wanted:
        raise ValueError(f"load_torch: {path} of {folder} holds {weight.shape}; transformers wants {wanted}")
    if kind is nn.Linear:
        return QuantizedLinear.from_packed(weight, bias)
    if scale is None:
        return QuantizedEmbedding.from_packed(weight)
    layer = ScaledEmbedding.from_packed(weight)
    layer.register_buffer("embed_scale", torch.as_tensor(scale), persistent=False)
    return layer


def _restore_q8(folder: Path, config: dict, model: nn.Module) -> None:
    """Q8Linear in the place of the layers whose inputs config.json says are 8-bit; see mlxq.checkpoint.q8.

    Raises ValueError, naming the layer, when a setting is unknown or the layer is not a packed linear one.
    """
    block = config.get(q8.KEY) or {}
    shifts = mx.load(str(folder / q8.SHIFTS)) if (folder / q8.SHIFTS).exists() else {}
    modules = dict(model.named_modules())
    for path, said in block.items():
        layer = modules.get(path)
        if type(layer) is not QuantizedLinear:
            what = "no layer" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(f"load_torch: {q8.KEY} of {folder} names {path}, which is {what}")
        shift = shifts.pop(f"{path}.bias_a", None)
        if shift is not None:
            shift = bridge.to_torch(shift, layer.weight.device).to(layer.scales.dtype)
        try:
            settings = {"activation": said["activation"], "scale_a": said.get("scale_a")}
            packed = Packed(
                *(a.detach() for a in (layer.packed.words, layer.scales, layer.biases)), layer.packed.format
            )
            new = Q8Linear.from_packed(packed, layer.bias, bias_a=shift, **settings)
        except (ValueError, KeyError, TypeError) as error:
            text = in_one_line(error)
            raise ValueError(f"load_torch: {q8.KEY} of {folder}: {path}: {text}") from error
        model.set_submodule(path, new)
    if shifts:
        names = ", ".join(sorted(shifts))
        raise ValueError(f"load_torch: {folder}/{q8.SHIFTS} holds {names}, which no layer takes")


def _to_device(model: nn.Module, where) -> None:
    """What transformers computed itself follows the weights. Raises ValueError for what nobody filled."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ValueError(f"load_torch: nothing fills {name} of transformers' model")
    model.to(where)


def _tokenizer(folder: Path):
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = in_one_line(error)
        raise ValueError(f"load_torch: the tokenizer in {folder} does not load: {said}") from error
