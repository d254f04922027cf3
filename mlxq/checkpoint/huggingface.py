"""Hugging Face folders: configuration, lazy tensors under mlx-lm's names, the files that travel along."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import mlx.core as mx

from mlxq.checkpoint import sources
from mlxq.checkpoint.actorder import absorb
from mlxq.checkpoint.arrange import arrange, materialized, stand_in
from mlxq.checkpoint.safetensors import STORED, Entry, Planned, header_of, read_header
from mlxq.checkpoint.tensors import ArrayTensor, FileTensor, Tensor, map_file

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_TRAVELLING = (
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
_WANTED_FROM_HUB = (*_TRAVELLING, "model*.safetensors", "pytorch_model*.bin", "additional_chat_templates/*")


def is_hub_id(text: str) -> bool:
    """Whether text can be a model's name on the Hugging Face hub, owner/name, rather than a path."""
    file = text.endswith((".gguf", ".safetensors", ".bin"))
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)) and not text.startswith(".") and not file


def resolve(src: str | Path) -> Path:
    """The folder or GGUF file that src names, downloaded from the Hugging Face hub when it is a hub id.

    Raises FileNotFoundError when it is neither a path that exists nor a model that the hub gives.
    """
    path = Path(src).expanduser()
    if path.exists():
        return path
    text = str(src)
    if not is_hub_id(text):
        raise FileNotFoundError(f"{text}: no such file or folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=list(_WANTED_FROM_HUB)))
    except (HFValidationError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{text}: no such folder here, and the Hugging Face hub says: {reason}"
        ) from None
    except Exception as error:  # without a network every layer below raises a class of its own
        raise FileNotFoundError(
            f"{text}: no such folder, and the Hugging Face hub is out of reach ({type(error).__name__}); "
            "download the model where there is a network and give its folder"
        ) from None


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or ValueError that name the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """File name by tensor name, from an index of shards. Raises ValueError when it has no such map."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    return weight_map


def read_config(folder: Path) -> dict:
    """config.json as mlx-lm's models want it.

    transformers 5 nests rope_theta and rope_scaling under rope_parameters; most models of mlx-lm 0.32
    look for them at the top and silently take 10000 otherwise, so they are put there too.
    """
    from mlx_lm.utils import load_config

    read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    config = load_config(folder)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        full = rope.get("full_attention", rope)
        if isinstance(full, dict) and "rope_theta" in full:
            config.setdefault("rope_theta", full["rope_theta"])
            if full.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
                config["rope_scaling"] = {"type": full["rope_type"]} | full
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    kinds = config.get("layer_types")
    if config.get("model_type") == "gemma3_text" and isinstance(kinds, list) and "full_attention" in kinds:
        config.setdefault("sliding_window_pattern", kinds.index("full_attention") + 1)
    return config


class HuggingFaceCheckpoint:
    """A local folder in Hugging Face's layout: safetensors, sharded or not, or pickled .bin files.

    config    config.json, read as mlx-lm reads it
    method    how the weights are quantized, None for floats
    Raises FileNotFoundError and ValueError that name the file at fault.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder)
        if not (self.path / "config.json").is_file():
            ggufs = sorted(file.name for file in self.path.glob("*.gguf"))
            hint = f"; it holds {ggufs[0]}: give that file" if ggufs else ""
            raise FileNotFoundError(f"{self.path} is not a model folder: it has no config.json{hint}")
        self.config = read_config(self.path)
        try:
            self.method = sources.method_of(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.workspace: Path | None = None
        self._tensors: dict[str, Tensor] | None = None
        self._computed: dict[str, mx.array] | None = None
        self.pickled = False
        self.weight_map: dict[str, str] = {}
        self.files = self._find_files()
        self.entries = {} if self.pickled else self._read_headers(self.files)
        self.method = self.method or sources.unnamed(self.path, self.entries)
        if "lm_head.weight" in self.entries:
            self.config.setdefault("tie_word_embeddings", False)  # mlx-lm would drop the head

    def _find_files(self) -> list[Path]:
        for index_name, single in (
            ("model.safetensors.index.json", "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            self.pickled = single.endswith(".bin")
            index = self.path / index_name
            if index.exists():
                return self._indexed(index)
            if (self.path / single).exists():
                return [self.path / single]
            shards = sorted(self.path.glob(single.replace(".", "-*-of-*.", 1)))
            if shards:
                self._check_shard_count(shards)
                return shards
        raise FileNotFoundError(
            f"{self.path} holds no weights: no model*.safetensors and no pytorch_model*.bin"
        )

    def _indexed(self, index: Path) -> list[Path]:
        self.weight_map = read_weight_map(index)
        names = sorted(set(self.weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not a file name")
            if not (self.path / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which does not exist")
        if not names:
            raise ValueError(f"{index} names no tensor")
        return [self.path / name for name in names]

    def _check_shard_count(self, shards: list[Path]) -> None:
        wanted = (
            int(re.search(r"-of-(\d+)\.", shards[0].name)[1])
            if re.search(r"-of-\d+\.", shards[0].name)
            else 0
        )
        if wanted and wanted != len(shards):
            raise FileNotFoundError(f"{self.path} holds {len(shards)} of {wanted} shards")

    def _read_headers(self, files: list[Path]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for file in files:
            found, _ = read_header(file)
            twice = entries.keys() & found.keys()
            if twice:
                raise ValueError(f"{file}: tensor {min(twice)} is in another shard too")
            for name, where in self.weight_map.items():
                if where == file.name and name not in found:
                    raise ValueError(f"the index says that {name} is in {file}, which does not hold it")
            entries |= found
        empty = [name for name, entry in entries.items() if entry.size == 0]
        if empty:
            raise ValueError(f"{self.path}: zero-size tensors: {', '.join(empty[:5])}")
        return entries

    def prepare(self, workspace: Path, values: bool = True) -> None:
        """Name the folder for what must be written to be read; pickled files become safetensors in it.

        They are written one tensor at a time, so that they load lazily; without values, for a plan, they are
        holes. Raises ImportError without torch,
        ValueError for pickles that hold anything but tensors.
        """
        self.workspace = workspace if values else None
        if not self.pickled:
            return
        workspace.mkdir(exist_ok=True)
        self.files = [unpickle(file, workspace / f"{file.stem}.safetensors", values) for file in self.files]
        self.entries = self._read_headers(self.files)
        self.method = self.method or sources.unnamed(self.path, self.entries)
        if "lm_head.weight" in self.entries:
            self.config.setdefault("tie_word_embeddings", False)

    @property
    def is_quantized(self) -> bool:
        return self.method is not None

    @property
    def tensor_count(self) -> int:
        """How many tensors the files hold, known once they are prepared."""
        return len(self.entries)

    def float_dtype(self) -> str:
        """The float dtype that most weights have; config.json decides when MLX computes in none of them."""
        names = {stored: name for name, stored in STORED.items() if name != "uint32"}
        sizes = dict.fromkeys(names.values(), 0)
        for entry in self.entries.values():
            if entry.dtype in names:
                sizes[names[entry.dtype]] += entry.size
        said = self.config.get("dtype", self.config.get("torch_dtype"))
        said = said if isinstance(said, str) else None
        if self.is_quantized and said in sizes:
            return (
                said  # a few scales say little; bitsandbytes has float32 ones whatever the model computes in
            )
        best = max(sizes, key=sizes.get)
        if sizes[best]:
            return best
        return said if said in sizes else "bfloat16"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors under the checkpoint's own names, mapped and not read; packed parts are one weight each.

        Raises ValueError, naming the folder, when the parts of a quantized weight do not fit each other.
        """
        if self._tensors is None:
            found: dict[str, Tensor] = {}
            for file in self.files:
                mapped = map_file(file)
                found |= {name: FileTensor(mapped, entry) for name, entry in read_header(file)[0].items()}
            if self.method is not None:
                try:
                    found = self.method.join(found, self.method.settings)
                except ValueError as error:
                    raise ValueError(f"{self.path}: {error}") from None
                absorb(found)
            self._tensors = found
        return self._tensors

    def weights(self, skeleton) -> dict[str, Tensor]:
        """Tensors under mlx-lm's names, none of them read yet.

        What mlx-lm computes from codes, instead of renaming or stacking it, is computed from floats that are
        written to the workspace first; without a workspace it has a shape and no values.
        """
        tensors = self.tensors()
        arrays: dict[str, mx.array] = {}
        for file in self.files:
            try:
                arrays |= mx.load(str(file), format="safetensors")
            except RuntimeError:  # float64 and some 8-bit floats, which MLX does not load
                continue
        lazy = {
            name: arrays[name] for name, t in tensors.items() if name in arrays and isinstance(t, FileTensor)
        }
        missing = {name: stand_in(tensors[name]) for name in tensors.keys() - lazy.keys()}
        if missing:
            found, left = arrange(skeleton.copy(), tensors, lazy | missing)
            left &= missing.keys()
            if left and any(isinstance(tensor, ArrayTensor) for tensor in found.values()):
                if self.workspace is not None:
                    self.workspace.mkdir(exist_ok=True)
                    if self._computed is None:
                        chosen = {name: tensors[name] for name in sorted(left)}
                        self._computed = materialized(chosen, self.workspace / "computed.safetensors")
                    missing |= self._computed
        return arrange(skeleton, tensors, {name: (lazy | missing)[name] for name in tensors})[0]

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy what belongs to the model besides weights, configuration and index; notices for the user."""
        copied = set()
        for pattern in _TRAVELLING:
            for file in self.path.glob(pattern):
                if file.name == "config.json" or file.name.endswith(".index.json") or not file.is_file():
                    continue
                shutil.copyfile(file, folder / file.name)
                copied.add(file.name)
        templates = self.path / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, folder / templates.name)
        known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
        if not copied & set(known) and not any(name.endswith(".tiktoken") for name in copied):
            return [f"{self.path} holds no tokenizer files: the model will not chat"]
        return []


def unpickle(source: Path, target: Path, values: bool = True) -> Path:
    """Write the tensors of a .bin file as safetensors, one at a time, and return target.

    Only tensors are unpickled (weights_only). Raises ImportError without torch, ValueError for anything else.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{source} is a pickle, which only torch reads: pip install 'mlxq[torch]'"
        ) from None
    import pickle

    def load(**options):
        return torch.load(source, map_location="cpu", weights_only=True, **options)

    try:
        try:
            state = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            state = load()  # files of torch before 1.6 cannot be mapped
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{source} does not load as a pickle of plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{source} is not a flat dictionary of tensors")
    stored = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
        torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
    }  # fmt: skip
    plan = []
    for name, tensor in state.items():
        if tensor.dtype not in stored:
            raise ValueError(f"{source}: {name} is {tensor.dtype}, which has no place in a checkpoint")
        plan.append(Planned(name, stored[tensor.dtype], tuple(tensor.shape)))
    header = header_of(plan)
    with open(target, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in plan))
        for tensor in state.values() if values else ():
            flat = tensor.contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if math.prod(tensor.shape) else b"")
    return target
