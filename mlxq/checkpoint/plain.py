"""Any source as a Hugging Face folder of floats, which transformers loads: `mlxq convert --dequantize`."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np

from mlxq.checkpoint.arrange import arrange, stand_in
from mlxq.checkpoint.gguf import GgufCheckpoint
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint, resolve
from mlxq.checkpoint.partial import check_destination, partial_folder
from mlxq.checkpoint.safetensors import STORED, Planned, Writer, as_stored
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.checkpoint.summary import Layer, Summary
from mlxq.checkpoint.tensors import Tensor
from mlxq.format import STORAGE

_SLAB_WEIGHTS = 1 << 20
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class _Part(Tensor):
    """One of the tensors that were stacked along a first axis."""

    def __init__(self, whole: Tensor, number: int):
        self.whole, self.shape, self.dtype = whole, whole.shape[1:], whole.dtype
        self.first = number * self.rows

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.whole.read(self.first + start, self.first + stop)


def dequantize(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = 5 << 30,
) -> Summary:
    """Write the model src with float weights under Hugging Face's names as the new folder dst, and report.

    src     what convert takes
    dtype   of every float tensor; default: the source's, float16 for a GGUF

    Raises what convert raises, and ValueError for stacked experts that mlx-lm's names do not lead back from.
    """
    begin = time.monotonic()
    if dtype is not None and dtype not in STORAGE:
        raise ValueError(f"dequantize: dtype {dtype!r} does not exist; built: {', '.join(STORAGE)}")
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, overwrite)
    src = resolve(src)
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise ValueError(f"{dst} is or holds the source {src}: choose another folder")
    checkpoint = HuggingFaceCheckpoint(src) if src.is_dir() else GgufCheckpoint(src)
    with partial_folder(dst, overwrite) as folder:
        workspace = folder / "workspace"
        checkpoint.prepare(workspace)
        dtype = dtype or checkpoint.float_dtype()
        tensors = _under_their_first_names(checkpoint, trust_remote_code)
        plan = [Planned(name, _stored(tensor, dtype), tensor.shape) for name, tensor in tensors.items()]
        report = Summary(dst, f"{dst.name}: {checkpoint.config.get('model_type')}, floats")
        count = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors.values())
        with Writer(folder, plan, max_shard_bytes, count, made_for="pt") as writer:
            for planned in plan:
                _write(planned, tensors[planned.name], dtype, writer)
                stored = {v: k for k, v in STORED.items()}.get(planned.dtype, planned.dtype)
                size = int(np.prod(planned.shape, dtype=np.int64))
                report.layers.append(Layer(planned.name.replace(".", "/"), stored, size, planned.nbytes))
        config = {k: v for k, v in checkpoint.config.items() if not k.startswith("quantization")}
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        report.notices += checkpoint.write_tokenizer(folder)
        with contextlib.suppress(FileNotFoundError):
            (folder / "quantize_config.json").unlink()
        shutil.rmtree(workspace, ignore_errors=True)
    report.seconds = time.monotonic() - begin
    return report


def _stored(tensor: Tensor, dtype: str) -> str:
    return STORED[dtype] if "float" in tensor.dtype else tensor.entry.dtype


def _write(planned: Planned, tensor: Tensor, dtype: str, writer: Writer) -> None:
    height = max(1, _SLAB_WEIGHTS // tensor.K)
    for start in range(0, tensor.rows, height):
        stop = min(tensor.rows, start + height)
        if "float" not in tensor.dtype:
            writer.write(planned.name, tensor.read_raw(start, stop))
            continue
        values = tensor.read(start, stop)
        stored = as_stored(values, dtype)
        if dtype == "float16" and not np.isfinite(stored).all() and np.isfinite(values).all():
            largest = float(np.abs(values).max())
            raise ValueError(f"{planned.name}: {largest:.6g} is too much for float16; choose another --dtype")
        writer.write(planned.name, stored)
    tensor.release()


def _under_their_first_names(checkpoint, trust_remote_code: bool) -> dict[str, Tensor]:
    """Tensors as transformers names them. Raises ValueError when mlx-lm's names do not lead back to those."""
    if (getattr(checkpoint, "method", None) or ("",))[0] == "mxfp4":
        raise ValueError(
            f"{checkpoint.path}: transformers itself opens mxfp4 as floats: load it there with "
            "Mxfp4Config(dequantize=True)"
        )
    from_mlx = isinstance(checkpoint, GgufCheckpoint) or (checkpoint.method or ("",))[0] == "MLX"
    if not from_mlx:
        return checkpoint.tensors()
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    skeleton = Skeleton(checkpoint.config, folder, trust_remote_code, checkpoint.tensor_count)
    tensors = checkpoint.weights(skeleton)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.(\w+)", name)
        if match is None:
            found[name] = tensor
            continue
        before, layer, kind = match.groups()
        layer = _MIXTRAL[layer] if before.endswith("block_sparse_moe") else layer
        for number in range(tensor.shape[0]):
            found[f"{before}.experts.{number}.{layer}.{kind}"] = _Part(tensor, number)
    # mlx-lm must make of these names what it was given: shapes, and nothing left over
    again, left = arrange(skeleton.copy(), found, {name: stand_in(t) for name, t in found.items()})
    if left or {n: t.shape for n, t in again.items()} != {n: t.shape for n, t in tensors.items()}:
        kind = checkpoint.config.get("model_type")
        raise ValueError(f"{checkpoint.path}: the names of mlx-lm's {kind} do not lead back to transformers'")
    return found
