"""What runs a checkpoint for `mlxq parity`: each back end gives logits, and single layers' answers."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxq import bridge, ops
from mlxq.checkpoint import q8 as q8_files
from mlxq.format import KERNEL_BITS, Format, Packed, dtype_name
from mlxq.nn.q8 import EPS, HIGH, activation_codes
from mlxq.nn.q8.mlx import Q8Linear
from mlxq.ops import native
from mlxq.parity import bounds

LINEAR, HEAD, EMBEDDING, W8A8 = "linear", "head", "embedding", "w8a8"
SLOW_ROWS = 8  # of each layer through the scalar kernels, which take a minute for all of a small model's


class Absent(Exception):
    """A back end that does not run here; the message says what is missing."""


@dataclass
class Backend:
    """One way to run the checkpoint.

    forward      ids -> logits float32 (T, V); None where only single layers run
    layer        (path, kind, x (T, K) or ids (T,)) -> y float32 (T, N); KeyError for a layer that it lacks
    only         the layers that it runs, (path, kind); None: all
    rows         how many of a layer's last rows it is given; None: all
    note         what the report says of it
    split        several rows of float32 go through AMX, as pairs of bfloat16
    """

    name: str
    layer: Callable
    forward: Callable | None = None
    only: list[tuple[str, str]] | None = None
    rows: int | None = None
    note: str = ""
    split: bool = False


def kinds(model: nn.Module) -> dict[str, str]:
    """The model's packed layers that are compared, path -> kind. A tied table appears as its embedding."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Q8Linear):
            found[path] = W8A8
        elif isinstance(layer, nn.QuantizedLinear) and layer.mode == "affine":
            found[path] = LINEAR
        elif isinstance(layer, nn.QuantizedEmbedding) and layer.mode == "affine":
            found[path] = EMBEDDING
    return found


def packed_of(layer: nn.Module) -> Packed:
    """A layer's packed weight, whichever class it has."""
    if isinstance(layer, Q8Linear):
        return layer.packed
    return Packed(layer.weight, layer.scales, layer.biases, Format(layer.bits, layer.group_size))


@contextlib.contextmanager
def tapped(model: nn.Module, hook: Callable):
    """Inside the block each packed layer answers hook(path, kind, x, call): call(x) is its own answer."""
    paths = {id(layer): path for path, layer in model.named_modules()}
    chosen = kinds(model)
    with contextlib.ExitStack() as undo:
        for cls in {type(layer) for path, layer in model.named_modules() if path in chosen}:
            for method in ("__call__", "as_linear"):
                if hasattr(cls, method):
                    _tap(cls, method, paths, chosen, hook, undo)
        yield


def _tap(cls, method, paths, chosen, hook, undo) -> None:
    original, own, busy = getattr(cls, method), method in vars(cls), set()

    def tap(layer, x):
        path = paths.get(id(layer))
        if path is None or path in busy:  # busy: a subclass that calls this one
            return original(layer, x)
        kind = HEAD if method == "as_linear" else chosen[path]
        busy.add(path)
        try:
            return hook(path, kind, x, lambda x: original(layer, x))
        finally:
            busy.discard(path)

    setattr(cls, method, tap)
    undo.callback(setattr, cls, method, original) if own else undo.callback(delattr, cls, method)


def codes_of(layer: Q8Linear, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes int64 (T, K), scales float32 (T, 1)) of a layer's input in numpy, by its own settings.

    With tiles, scales are (T, K / group_size).
    """
    x = x.astype(np.float32)
    if "bias_a" in layer:
        x = x + bridge.to_numpy(layer["bias_a"]).astype(np.float32)
    if layer.settings.is_dynamic:
        tiles = x.reshape(len(x), -1, layer.settings.tile or x.shape[-1])
        largest = np.abs(tiles).max(-1)
        scales = np.where(largest == 0, np.float32(1), largest / np.float32(HIGH))
        codes = np.clip(np.rint(tiles / scales[..., None]), -HIGH, HIGH)
        return codes.reshape(x.shape).astype(np.int64), scales
    scale = np.maximum(bridge.to_numpy(layer["scale_a"]).astype(np.float32), np.float32(EPS))
    codes = activation_codes(x, scale, np).astype(np.int64)
    return codes, np.repeat(scale.reshape(1, -1), len(x), 0)


def name_of(array: mx.array) -> str:
    """The dtype's bare name."""
    return dtype_name(array)


def rows_of(x: mx.array, kind: str) -> np.ndarray:
    """A layer's input with its leading axes flattened: float32 (T, K), or integers (T,) for an embedding."""
    if kind == EMBEDDING:
        return np.array(x).reshape(-1)
    return bridge.to_numpy(x.astype(mx.float32)).reshape(-1, x.shape[-1])


def answer(layer: nn.Module, kind: str, x: np.ndarray, dtype: str) -> bounds.Answer:
    """What a layer should give for x, as rows_of gives it, when it answers in dtype."""
    packed = packed_of(layer)
    if kind == EMBEDDING:
        return bounds.embedding(packed, x, dtype)
    if kind == W8A8:
        found = bounds.product_of_codes(packed, *codes_of(layer, x), dtype)
    else:
        found = bounds.product(packed, x, dtype)
    if kind != HEAD and "bias" in layer:
        found = found.plus(bridge.to_numpy(layer["bias"]).astype(np.float64))
    return found


# ---------------------------------------------------------------------------------------------------- MLX


def mlx_backend(name: str, model: nn.Module, device: mx.Device, dtype: str, family: str | None = None):
    """The model, whose floats are dtype, on a device of MLX; family: the CPU kernels that it is held to."""

    def held():
        stack = contextlib.ExitStack()
        stack.enter_context(mx.stream(device))
        if family is not None:
            stack.enter_context(ops.forced_isa(family))
        return stack

    modules = dict(model.named_modules())

    def layer(path, kind, x):
        with held():
            module = modules[path]
            given = mx.array(x) if kind == EMBEDDING else mx.array(x).astype(getattr(mx, dtype))
            y = (module.as_linear if kind == HEAD else module)(given)
            mx.eval(y)
            return bridge.to_numpy(y).astype(np.float32)

    def forward(ids):
        with held():
            logits = model(mx.array([ids]))[0].astype(mx.float32)
            mx.eval(logits)
            return np.array(logits)

    rows = SLOW_ROWS if family == "scalar" else None
    note = f"MLX {mx.__version__}"
    return Backend(name, layer, forward, rows=rows, note=note, split=splits(family, dtype))


def splits(family: str | None, dtype: str) -> bool:
    """Whether this family of CPU kernels multiplies pairs of bfloat16 where x is of this dtype."""
    return family is not None and family.startswith("amx") and dtype == "float32"


def cpu_backends(model: nn.Module, dtype: str) -> dict[str, Callable[[], Backend]]:
    """A back end for each family of CPU kernels that runs here, best first."""
    if not ops.native_available():
        return {"mlx-cpu": lambda: mlx_backend("mlx-cpu", model, mx.cpu, dtype)}
    names = reversed(ops.isa_levels())
    return {n: (lambda n=n: mlx_backend(n, model, mx.cpu, dtype, n)) for n in names}


def metal_backend(model: nn.Module, dtype: str) -> Backend:
    """MLX on a GPU of Apple. Raises Absent elsewhere."""
    if not mx.metal.is_available():
        raise Absent("MLX has no Metal on this machine")
    return mlx_backend("metal", model, mx.gpu, dtype)


# ------------------------------------------------------------------------------------------- shader harness


def shader_backend(model: nn.Module, chosen: dict[str, str]) -> Backend:
    """The Metal shader of one layer, lane by lane on this CPU. Raises Absent outside of a checkout."""
    root = Path(sys.modules["mlxq"].__file__).parent.parent
    shaders = root / "metal" / "shaders"
    if not (root / "tools" / "msl" / "harness.py").exists() or not shaders.exists():
        raise Absent("the shader harness is part of a checkout (tools/msl), not of an installed mlxq")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    harness = importlib.import_module("tools.msl.harness")
    if reason := harness.absent():
        raise Absent(reason)
    try:
        harness.compiler()
    except FileNotFoundError as error:
        raise Absent(str(error)) from error
    modules = dict(model.named_modules())
    served = [path for path, kind in chosen.items() if _shader_serves(modules[path], kind)]
    if not served:
        raise Absent("no layer of this model is one that the shaders serve alone (2, 4 or 8 bits)")
    path = min(served, key=lambda p: packed_of(modules[p]).N * packed_of(modules[p]).K)
    table = json.loads((shaders / "kernels.json").read_text(encoding="utf-8"))["kernels"]

    def layer(path, kind, x):
        try:
            return np.concatenate([_on_shader(harness, table, shaders, modules[path], row) for row in x])
        except harness.CompileError as error:
            raise Absent(f"the shaders do not compile here: {str(error).splitlines()[0]}") from error

    return Backend("shaders", layer, only=[(path, chosen[path])], note=f"tools/msl, {path} only")


def _shader_serves(layer: nn.Module, kind: str) -> bool:
    return kind == W8A8 or (kind == LINEAR and layer.bits in KERNEL_BITS)


def _on_shader(harness, table, shaders: Path, layer: nn.Module, x: np.ndarray) -> np.ndarray:
    """One row of x (K,) through the shader that a GPU would run for it, float32 (1, N)."""
    packed = packed_of(layer)
    words, scales, biases = (bridge.to_numpy(a) for a in (packed.words, packed.scales, packed.biases))
    fmt, y = packed.format, np.full((1, packed.N), np.nan, np.float32)
    if isinstance(layer, Q8Linear):
        codes, x_scales = codes_of(layer, x[None])
        grouped = 0 if layer.per_row else 2 if layer.settings.tile else 1
        kernel, arguments = "q8_mv", ("float", fmt.bits, fmt.group_size, grouped, 1)
        inputs = {"x": codes.astype(np.int8).view(np.uint32), "x_scales": x_scales}
    else:
        kernel, arguments = "qmv", ("float", "float", fmt.bits, fmt.group_size, 1)
        inputs = {"x": x[None].astype(np.float32)}
    inputs |= {"words": words, "scales": scales.astype(np.float32), "biases": biases.astype(np.float32)}
    inputs |= {"y": y, "N": np.int32(packed.N), "K": np.int32(packed.K)}
    row = table[kernel]
    entry = (kernel, ", ".join(map(str, arguments)))
    library = harness.compile(shaders / row["file"], [entry])
    numbers = {"N": packed.N, "K": packed.K}

    def size(of) -> int:
        if isinstance(of, list):
            return -(-size(of[0]) // size(of[1]))
        return numbers[of] if isinstance(of, str) else of

    buffers = {n: inputs[name] for n, (name, *_) in enumerate(row["buffers"])}
    grid, threads = (tuple(map(size, row[key])) for key in ("grid", "threads"))
    library.run(entry, buffers, grid, threads)
    if "bias" in layer:
        y = y + bridge.to_numpy(layer["bias"]).astype(np.float32)
    return y


# --------------------------------------------------------------------------------------------------- torch


def torch_backend(name: str, folder: Path, device: str, dtype: str) -> Backend:
    """The checkpoint in transformers on torch, in our layers. Raises Absent where torch or the GPU is not."""
    try:
        from mlxq.parity import torch as on_torch
    except ImportError as error:
        raise Absent(f"{error}") from error
    if device == "cuda":
        if not on_torch.has_cuda():
            raise Absent("torch finds no NVIDIA GPU on this machine")
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(q8_files.KEY) or {}
        for activation in sorted({layer["activation"] for layer in said.values()}):
            if refusal := on_torch.q8_refusal(activation):
                raise Absent(f"activations {activation}: {refusal}")
    try:
        model = on_torch.TorchModel(folder, device, dtype)
    except ValueError as error:  # mlxq.load took the folder: this is about what transformers has
        raise Absent(str(error)) from error
    family = native.machine()["isa"] if device == "cpu" else None
    return Backend(name, model.layer, model.forward, note=model.note, split=splits(family, dtype))
