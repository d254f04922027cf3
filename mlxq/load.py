"""Load a quantized model folder through mlx-lm, with our layers in place."""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm import utils
from safetensors import SafetensorError, safe_open

from mlxq import ops
from mlxq.checkpoint import q8, trained
from mlxq.checkpoint.huggingface import is_hub_id, read_weight_map
from mlxq.checkpoint.skeleton import CONFIG_LIES
from mlxq.nn.mlx import adopt


def load(
    path: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer), or (model, tokenizer, config) if return_config, of a quantized MLX model.

    path is a folder that mlxq convert or mlx_lm.convert wrote, or a hub id when there is a network; the other
    arguments are those of mlx_lm.load. Affine layers run on mlxq.ops, those with 8-bit activations
    (mlxq.checkpoint.q8) as Q8Linear, those that trained with rounded inputs round them
    (mlxq.checkpoint.trained), and layers of other modes stay mlx-lm's.

    Raises FileNotFoundError when the model or a file that it needs is not there, and ValueError for anything
    else that keeps it from loading: float weights (convert them first), an architecture that mlx-lm lacks,
    tensors that are missing, truncated or disagree with config.json, a tokenizer that does not load.
    """
    folder = model_folder(path, revision)
    config = checked_config(folder, model_config or {})
    if "model_file" in config and not trust_remote_code:
        raise ValueError(
            f"load: {folder} has its own code, {config['model_file']}; to run it pass trust_remote_code=True"
        )
    arguments = {"model_config": model_config}
    if "trust_remote_code" in inspect.signature(utils.load_model).parameters:  # mlx-lm 0.31 never asks
        arguments["trust_remote_code"] = trust_remote_code
    try:
        model, config = utils.load_model(folder, lazy, **arguments)
    except CONFIG_LIES as error:
        raise ValueError(
            f"load: mlx-lm {mlx_lm.__version__} cannot build {folder}: {in_one_line(error)}"
        ) from error
    adopt(model)
    q8.restore(model, config, folder)
    trained.restore(model, config, folder)
    if adapter_path is not None:
        model = utils.load_adapters(model, str(adapter_path))
        model.eval()
    try:
        tokenizer = utils.load_tokenizer(folder, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: the tokenizer in {folder} does not load: {in_one_line(error)}") from error
    if not lazy:
        ops.advise_huge_pages(a for _, a in tree_flatten(model.parameters()))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def model_folder(path: str | Path, revision: str | None) -> Path:
    """The local folder of a model, downloaded from the hub when path is not here and reads as a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        if local.suffix.lower() == ".gguf":
            raise ValueError(f"load: {path} is a GGUF file; convert it first: mlxq convert {path} DST")
        raise ValueError(f"load: {path} is a file; wanted a model folder")
    name = str(path)
    if not is_hub_id(name):
        raise FileNotFoundError(f"load: {path} does not exist")
    try:
        return utils._download(name, revision=revision)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these two kinds
        raise FileNotFoundError(
            f"load: {path} is neither a folder nor a model that the Hugging Face hub gave: "
            f"{in_one_line(error)}"
        ) from error


def checked_config(folder: Path, model_config: dict[str, Any]) -> dict[str, Any]:
    """config.json with model_config over it, of a folder whose files are all there, whole and quantized.

    Raises ValueError or FileNotFoundError for what mlx-lm would reject obscurely, or would run in float.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        if ggufs := sorted(folder.glob("*.gguf")):
            raise ValueError(f"load: {folder} holds a GGUF; convert it first: mlxq convert {ggufs[0]} DST")
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"load: {folder} holds PyTorch weights; convert it first: mlxq convert {folder} DST"
            )
    config = _json(folder, "config.json") | model_config
    if not shards:
        raise FileNotFoundError(f"load: {folder} has no model*.safetensors")
    if "model_type" not in config:
        raise ValueError(f"load: {folder}/config.json has no model_type")
    if (folder / "model.safetensors.index.json").exists():
        wanted = set(read_weight_map(folder / "model.safetensors.index.json").values())
        if missing := sorted(wanted - {shard.name for shard in shards}):
            raise FileNotFoundError(f"load: {folder} lacks {', '.join(missing)}, which its index names")
    names: set[str] = set()
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as tensors:
                names.update(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"load: {shard} is damaged or truncated: {error}") from error
    blocks = (config, config.get("text_config") or {})
    says_quantized = any(b.get("quantization") or b.get("quantization_config") for b in blocks)
    if says_quantized or (folder / "hf_quant_config.json").exists():
        return config
    if any(name.endswith(".scales") for name in names):
        raise ValueError(
            f"load: the weights in {folder} are quantized but config.json has no quantization block"
        )
    raise ValueError(f"load: {folder} holds float weights; convert it first: mlxq convert {folder} DST")


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the model. Raises FileNotFoundError, ValueError when it is none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"load: {folder} has no {name}") from None
    except ValueError as error:
        raise ValueError(f"load: {folder}/{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load: {folder}/{name} holds a {type(content).__name__}; wanted an object")
    return content


def in_one_line(error: Exception, lines: int = 4) -> str:
    """An error of another library in one line: MLX lists every missing tensor, the first few are enough."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    said = [line.strip() for line in text.splitlines() if line.strip()]
    more = f" ... and {len(said) - lines} more" if len(said) > lines else ""
    return " ".join(said[:lines]) + more


class _CallableModule(types.ModuleType):
    """Importing this module binds the name mlxq.load to it, over the function: so it can be called."""

    def __call__(self, *args, **kwargs):
        return load(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
