"""GBA checkpoints of bitorch-engine: 2-, 4- and 8-bit codes whose scales and zeros may be double quantized.

Nothing but the tensors is needed: their names and shapes say how they decode (mlxq.nn.mpq has the layouts).

    qstatistic                  scales and zeros of 4 bits ("symmetric"); its last axis is dq_group_size
    qscales, qzeros             scales of 8 bits and integer zeros ("asymmetric")
    zeros, or qzeros and scales alone    groups of 256 and more, plain
    qscales_scales (1, N, 1)    dq_mode 1; otherwise 2
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlxq.checkpoint.gptq import MPQTensor, bias_of, open_folder, values_of
from mlxq.checkpoint.tensors import FLOATS, Tensor, expect
from mlxq.nn.mpq import Layout, QuantizedLayer


def join(tensors: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The checkpoint's tensors with one weight for the parts of each quantized layer. Raises ValueError."""
    joined = dict(tensors)
    for layer in _layers(tensors):
        for part in (*layer.layout.shapes, *layer.layout.derived, "wf"):
            joined.pop(f"{layer.path}.{part}", None)
        joined[f"{layer.path}.weight"] = MPQTensor(layer)
    return joined


def read_layers(folder: str | Path) -> Iterator[QuantizedLayer]:
    """The quantized layers of a GBA folder, in the order of their paths, mapped and not read.

    Raises FileNotFoundError and ValueError that name the file or the tensor at fault.
    """
    yield from _layers(open_folder(Path(folder)))


def _layers(tensors: dict[str, Tensor]) -> Iterator[QuantizedLayer]:
    for name in sorted(name for name in tensors if name.endswith(".qweight")):
        path = name.removesuffix(".qweight")
        try:
            yield _layer(tensors, path)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _layer(tensors: dict[str, Tensor], path: str) -> QuantizedLayer:
    words = expect(tensors, f"{path}.qweight", ("int32",), (None, None))
    order = expect(tensors, f"{path}.g_idx", ("int32",), (None,))
    (K,), N = order.shape, words.shape[1]
    if words.shape[0] == 0 or words.shape[0] * 32 % K:
        raise ValueError(f"{path}.qweight has {words.shape[0]} rows of words for the {K} rows of g_idx")
    if order.whole.min() < 0 or order.whole.max() >= K:
        raise ValueError(f"{path}.g_idx names group {order.whole.max()} of at most {K}")
    at = f"{path}."
    shapes = {name.removeprefix(at): t.shape for name, t in tensors.items() if name.startswith(at)}
    mode, D = 0, N
    if "qscales_scales" in shapes:
        statistics = expect(tensors, f"{path}.qscales_scales", FLOATS, (None, None, 1)).shape
        mode = 1 if statistics[:2] == (1, N) else 2
        coded = shapes.get("qstatistic", shapes.get("qscales", ()))
        D = coded[2] if len(coded) == 3 else N if mode == 1 else N // max(1, statistics[1])
    rows = np.bincount(order.whole)
    layout = Layout(
        K,
        N,
        words.shape[0] * 32 // K,
        int(rows.max()),
        dq_group_size=D,
        dq_mode=mode,
        asym="qzeros" in shapes,
    )
    parts = {
        part: expect(tensors, f"{path}.{part}", FLOATS if kind == "float" else (kind,), shape)
        for part, (shape, kind) in layout.shapes.items()
    }
    values = {part: values_of(tensor) for part, tensor in parts.items()}
    dtype = parts["qscales_scales" if mode else "scales"].dtype
    return QuantizedLayer(path, layout, dtype, values, bias_of(tensors, path, N))
