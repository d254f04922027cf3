"""mlx-lm's own arrangement of a checkpoint's tensors, done without reading them.

mlx-lm renames, drops, stacks and sometimes computes in a model's `sanitize`, on mx.arrays. Here every array
that goes in stands for a tensor. What comes out as the same object was renamed, what mx.stack made of such
objects is a stack, and both are read from the source row by row, codes included. Only what was computed is
evaluated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxq.checkpoint.safetensors import Planned, header_of
from mlxq.checkpoint.tensors import ArrayTensor, StackedTensor, Tensor

_DTYPES = {
    "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "bool": mx.bool_,
    "int8": mx.int8, "int16": mx.int16, "int32": mx.int32, "int64": mx.int64,
    "uint8": mx.uint8, "uint16": mx.uint16, "uint32": mx.uint32, "uint64": mx.uint64,
}  # fmt: skip


@contextlib.contextmanager
def _stacks_recorded() -> Iterator[dict[int, tuple[mx.array, list[mx.array]]]]:
    """By the id of each result of mx.stack along the first axis: the result and its parts."""
    found: dict[int, tuple[mx.array, list[mx.array]]] = {}
    stack = mx.stack

    def recorded(arrays, axis=0, **options):
        arrays = list(arrays)
        result = stack(arrays, axis, **options)
        if axis == 0:
            found[id(result)] = result, arrays  # both are kept, so that no id is used again
        return result

    mx.stack = recorded
    try:
        yield found
    finally:
        mx.stack = stack


def stand_in(tensor: Tensor) -> mx.array:
    """An array of the tensor's shape that is never evaluated."""
    return mx.zeros(tensor.shape, _DTYPES.get(tensor.dtype, mx.float32))


def arrange(skeleton, tensors: dict[str, Tensor], arrays: dict[str, mx.array]) -> tuple[dict, set[str]]:
    """Tensors under mlx-lm's names, and the names of the given ones that are in none of them as they are.

    arrays   one for each tensor, by the same name: what mlx-lm computes with when it does more than rename
    """
    origin = {id(array): name for name, array in arrays.items()}
    left = set(tensors)
    with _stacks_recorded() as stacks:
        sanitized = skeleton.sanitize(dict(arrays))
    result: dict[str, Tensor] = {}
    for name, array in sanitized.items():
        parts = stacks[id(array)][1] if id(array) in stacks else [array]
        names = [origin.get(id(part)) for part in parts]
        if None in names:
            result[name] = ArrayTensor(array)
            continue
        left.difference_update(names)
        found = [tensors[part] for part in names]
        result[name] = StackedTensor(found) if id(array) in stacks else found[0]
    return result, left


def materialized(tensors: dict[str, Tensor], target: Path) -> dict[str, mx.array]:
    """The tensors as lazy float32 arrays of a file written for them, a few rows in memory at a time."""
    with open(target, "wb") as file:
        file.write(header_of(Planned(name, "F32", tensor.shape) for name, tensor in tensors.items()))
        for tensor in tensors.values():
            height = max(1, (1 << 20) // tensor.K)
            for start in range(0, tensor.rows, height):
                rows = tensor.read(start, min(tensor.rows, start + height))
                file.write(np.ascontiguousarray(rows, np.float32).data)
    return mx.load(str(target), format="safetensors")
