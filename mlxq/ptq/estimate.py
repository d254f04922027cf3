"""What calibration will take on this machine: seconds from shapes and a few timed samples, bytes from shapes.

A layer of N rows of K weights is solved in N K (a + b K) seconds: columns one by one, and products of K
columns. a and b are timed on two small layers of random weights; the states' products are timed too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mlxq.format import Format
from mlxq.ptq.awq import RATIOS, scale_error
from mlxq.ptq.calibrated import SEARCHED_BITS
from mlxq.ptq.gptq import Statistics, gptq

# Products of all states with a block: the float pass, one after the block is solved, and the way to the input
# of each stage (in a llama block nothing, 30 %, 36 % and 79 % of its weights); awq looks at the inputs and
# tries candidates besides.
PASSES, AWQ_PASSES = 3.5, 2.0
# Times the products' own time: attention, norms, copies, products narrower than the timed one. Two blocks of
# SmolLM2 over 16 x 512 tokens took, on one core of a Xeon, 10.5 times one product of their weights.
STREAMED = 3.0
INPUTS = 0.6  # different inputs of a layer: 4 of the 7 of a llama block, that is, with some room
SOLVER_BYTES = 64  # for a weight being solved: itself, ordered, codes and errors; the drift's float64
SQUARE_BYTES = 48  # for an element of a Hessian being used: H, its drift, copies in order, float64 factors
REFIT_BYTES = 8 << 24  # of gptq's normal equations at once
COPIES_BYTES = 8  # for a weight of the largest parameter outside of the blocks, while it is read or rounded


@dataclass(frozen=True)
class Task:
    """A layer that is to be solved: its shape, (N, K) or (experts, N, K), and its format."""

    shape: tuple[int, ...]
    format: Format

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def seconds(tasks: Iterable[Task], tokens: int, method: str, experts_used: int = 1) -> float:
    """What solving the tasks takes with statistics over this many tokens.

    experts_used   experts of a mixture that a token goes through
    """
    tasks = list(tasks)
    if _nothing(tasks, method):
        return 0.0
    typical = max(tasks, key=lambda task: task.weights).format
    product = _product_seconds()
    total = 0.0
    used = [task.weights * (experts_used / task.shape[0] if len(task.shape) > 2 else 1) for task in tasks]
    passes = PASSES + (AWQ_PASSES if "awq" in method else 0)
    total += STREAMED * passes * sum(used) * tokens * product
    kinds = 2 if "gptq" in method else 1  # H, and the drift
    total += sum(kinds * INPUTS * tokens * task.shape[-1] ** 2 * product for task in tasks)
    searched = [task for task in tasks if task.format.bits <= SEARCHED_BITS]
    for name, sample, times, its in (
        ("gptq", _gptq_sample, 1, searched), ("awq", _awq_sample, len(RATIOS) + 1, tasks),
    ):  # fmt: skip
        if name in method:
            each, square = _rates(sample, typical)
            total += times * sum(t.weights * (each + square * t.shape[-1]) for t in its)
    return total


def peak_bytes(
    blocks: list[list[Task]], block_weights: int, outer: list[int], tokens: int, width: int, method: str
) -> int:
    """The most that calibration holds at once, beside what the process has already.

    Two blocks of SmolLM2 over 16 x 512 tokens held 466 MB, of which this counts 443.

    blocks          tasks of each block          block_weights   of the largest block, all of it
    outer           weights of each parameter outside of the blocks
    width           of a state
    """
    tasks = [task for block in blocks for task in block]
    if _nothing(tasks, method):
        return 0
    held = 4 * (block_weights + sum(outer))
    states = 2 * 4 * tokens * width
    inputs = max(sum(4 * INPUTS * tokens * t.shape[-1] for t in block) for block in blocks)
    largest = 0
    for task in tasks:
        N, K = task.shape[-2:]
        experts = task.shape[0] if len(task.shape) > 2 else 0
        G = max(1, task.format.groups(K))
        refit = min(REFIT_BYTES, 32 * N * G * G) if "gptq" in method else 0
        largest = max(largest, SOLVER_BYTES * N * K + (SQUARE_BYTES + 8 * experts) * K * K + refit)
    return int(held + max(COPIES_BYTES * max(outer, default=0), states + inputs + largest))


def _nothing(tasks: list[Task], method: str) -> bool:
    return not tasks or (method == "gptq" and all(task.format.bits > SEARCHED_BITS for task in tasks))


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the faster of two runs."""
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def _product_seconds(size: int = 1024) -> float:
    """Seconds of a product for each row and weight."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return _timed(lambda: a @ a.T) / size**3


def _rates(sample: Callable, fmt: Format, N: int = 256, K: tuple[int, int] = (256, 1024)):
    """(a, b) of N K (a + b K) seconds."""
    small, large = (_timed(sample(N, k, fmt)) / (N * k) for k in K)
    square = max(0.0, (large - small) / (K[1] - K[0]))
    return max(small - square * K[0], 0.0), square


def _layer(N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights, Hessian) of a random layer."""
    rng = np.random.default_rng(K)
    x = rng.standard_normal((2 * K, K), np.float32)
    return rng.standard_normal((N, K), np.float32), x.T @ x / np.float32(2 * K)


def _gptq_sample(N: int, K: int, fmt: Format) -> Callable[[], object]:
    w, hessian = _layer(N, K)
    return lambda: gptq(w, Statistics(hessian, hessian, 2 * K), fmt)


def _awq_sample(N: int, K: int, fmt: Format) -> Callable[[], object]:
    w, hessian = _layer(N, K)
    return lambda: scale_error([w], hessian, np.ones(K, np.float32), [fmt], ["float16"])
