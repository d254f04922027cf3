"""Act-order that costs nothing: columns sorted by their groups, and the rows in front in the same order.

A layer of act-order has its columns spread over groups. MLX's groups are runs of columns, so they must be
sorted, and the input with them. Between the two halves of a gated MLP every column of the second layer is a
row of the first ones and nothing else, so there the order is free: the product is the same. Everywhere else
it is not.
"""

from __future__ import annotations

import numpy as np

from mlxq.checkpoint.tensors import CodesTensor, FileTensor, Tensor

_FRONT = {"down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)), "w2": (("w1", "w3"),)}


def absorb(tensors: dict[str, Tensor]) -> None:
    """Sort the columns of each second layer of an MLP that has act-order, and the rows before, in place."""
    for name, tensor in tensors.items():
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer not in _FRONT or not isinstance(tensor, CodesTensor) or tensor.group_of is None:
            continue
        inside = {other for other in tensors if other.startswith(f"{parent}.")}
        for front in _FRONT[layer]:
            weights = [f"{parent}.{part}.weight" for part in front]
            biases = [f"{parent}.{part}.bias" for part in front]
            rest = inside - {*weights, *biases, name, f"{parent}.{layer}.bias"}
            movable = all(isinstance(tensors.get(w), CodesTensor | FileTensor) for w in weights)
            # a norm between the two would have a weight for each column
            if not movable or any(tensor.K in tensors[other].shape for other in rest):
                continue
            halves = {tensors[w].shape[0] // tensor.K for w in weights}
            if halves != {2 if len(front) == 1 else 1} or (order := tensor.sort_columns()) is None:
                continue
            if len(front) == 1:
                order = np.concatenate([order, order + tensor.K])
            for moved in (*weights, *(b for b in biases if b in tensors)):
                tensors[moved].order = order
            break
