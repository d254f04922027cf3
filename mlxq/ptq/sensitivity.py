"""Which layers of a model can do with fewer bits: measured in KL divergence, spent by marginal gain.

Each layer alone is quantized to one probing format, all others staying float, and the KL divergence of the
model's predictions from the float model's is measured on text. The blocks stream by once: behind a layer's
block its perturbed states travel beside the clean ones, so each costs the rest of a forward pass. Layers that
are solved on text are solved on other text than the KL is measured on: on their own they look far too good.

KL grows with the square of a small error, so

    KL(format) = KL(probe) * error(format) / error(probe)

where the error of rounding to nearest is the square of the grid's step, range of a group / (2^bits - 1) with
the mean range of g normal weights, and that of solved layers has been measured (SOLVED). Bits are then spent
where KL falls most for each byte, along the lower convex hull of every layer's formats.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import switch_layers

from mlxq import format
from mlxq.format import Format
from mlxq.ptq.gptq import gptq
from mlxq.ptq.host import host, host_products
from mlxq.ptq.rtn import rtn
from mlxq.ptq.stream import Stream

PROBE_BITS = 3
CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)
# Mean range of g standard normal numbers.
NORMAL_RANGE = {32: 4.139, 64: 4.687, 128: 5.191}
STORED_SCALE_BITS = 32  # of a scale and a bias of 16 bits
# Squared error of the outputs of layers solved by gptq, over that at 3 bits in groups of 64: geometric means
# over the layers of 3 blocks of SmolLM2.
SOLVED = {2: 4.0, 3: 1.0, 4: 0.241, 5: 0.0597, 6: 0.0146, 8: 0.00091}
# Of groups of 32 over groups of 64, in the same layers; from 4 bits on it is that of the ranges.
SOLVED_IN_32 = {2: 0.89, 3: 0.82}
PROBE_WINDOWS, PROBE_LENGTH = 4, 128  # tokens on which KL is measured: 210 layers, each half a pass
FIT_WINDOWS = 48  # of that length, on which the layers are solved for it


@dataclass
class Cost:
    """What a layer's error costs.

    kl       mean KL divergence, nats per token, with only this layer quantized to the format probe
    weights  number of weights        K  their row length
    solved   whether gptq made the error, and will again; else rounding to nearest
    """

    kl: float
    weights: int
    K: int
    probe: Format
    solved: bool = False


def pieces(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(windows to measure KL on, windows to solve layers on) of token ids (count, length), evenly spread.

    They share no token unless the text is one piece only.
    """
    length = min(PROBE_LENGTH, windows.shape[1])
    cut = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    at = np.unique(np.linspace(0, len(cut) - 1, min(PROBE_WINDOWS, max(1, len(cut) // 2))).astype(int))
    rest = np.delete(cut, at, 0) if len(cut) > 1 else cut
    return cut[at], rest[np.linspace(0, len(rest) - 1, min(FIT_WINDOWS, len(rest))).astype(int)]


def sensitivities(
    model,
    read: Callable[[str], np.ndarray],
    windows: np.ndarray,
    wanted: dict[str, str],
    fit: np.ndarray | None = None,
    *,
    advance: Callable[[int], None] = lambda weights: None,
) -> dict[str, Cost]:
    """The cost of each wanted layer; some group size divides its K.

    model, read, windows   see Stream; a few windows are enough
    wanted                 path -> dtype of scales and biases
    fit                    windows, as long, on which layers are solved; None: the same

    Raises ValueError for models that cannot be streamed.
    """
    every = windows if fit is None else np.concatenate([windows, fit])
    stream = Stream(model, read, every, drift=False)
    first = 0 if fit is None else len(windows)  # of the windows that layers are solved on
    costs: dict[str, Cost] = {}
    moved: dict[str, list[mx.array]] = {}

    def probed(path: str, weight: np.ndarray, statistics) -> np.ndarray:
        K = weight.shape[-1]
        probe = Format(PROBE_BITS, 64 if K % 64 == 0 else 32)
        costs[path] = Cost(0.0, weight.size, K, probe, statistics is not None)
        if statistics is None:
            packed = rtn(weight, None, probe, scale_dtype=wanted[path])
        else:
            packed = gptq(weight, statistics, probe, scale_dtype=wanted[path], rounds=0)
        advance(weight.size)
        return format.dequantize(packed)

    outer: dict[str, np.ndarray] = {}
    clean = stream.states[: len(windows)]
    for path in wanted:
        if f"{path}.weight" in stream.outer:
            original = np.array(stream.weight(path))
            outer[path] = probed(path, original, None)
            stream.put_weight(path, outer[path])
            stream.re_enter()
            moved[path] = stream.states[: len(windows)]
            stream.put_weight(path, original)
    fitted = stream.float_states[first:]
    for number in range(len(stream.blocks)):
        layers = stream.enter(number)
        with host_products():
            statistics, fitted = stream.watched(number, layers, fitted, first)
            after = fitted if fit is None else stream.advance(number, clean)
            moved = {path: stream.advance(number, states) for path, states in moved.items()}
            for path, layer in layers.items():
                if path in wanted and path in statistics:
                    original = np.array(host(layer.weight))
                    stacked = isinstance(layer, switch_layers.SwitchLinear)
                    stream.put_weight(path, probed(path, original, None if stacked else statistics[path]))
                    moved[path] = stream.advance(number, clean)
                    stream.put_weight(path, original)
        stream.leave(number)
        clean = after
    with host_products():
        truth = [_log_probabilities(stream.finish(w, state)) for w, state in enumerate(clean)]
        for path, states in moved.items():
            if path in outer:
                original = np.array(stream.weight(path))
                stream.put_weight(path, outer[path])
            costs[path].kl = float(
                np.mean([_divergence(truth[w], stream.finish(w, state)) for w, state in enumerate(states)])
            )
            if path in outer:
                stream.put_weight(path, original)
    return costs


def _log_probabilities(logits: mx.array) -> np.ndarray:
    values = np.array(host(logits))[0]
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def _divergence(truth: np.ndarray, logits: mx.array) -> float:
    return float((np.exp(truth) * (truth - _log_probabilities(logits))).sum(-1).mean())


def step(fmt: Format) -> float:
    """The step of a format's grid on weights of unit variance."""
    return NORMAL_RANGE[fmt.group_size] / (2**fmt.bits - 1)


def error(fmt: Format, solved: bool) -> float:
    """The squared error of a layer in a format, in a unit that depends on `solved` alone."""
    if not solved:
        return step(fmt) ** 2
    ranges = (NORMAL_RANGE[fmt.group_size] / NORMAL_RANGE[64]) ** 2
    if fmt.bits in SOLVED_IN_32 and fmt.group_size != 64:
        ranges = SOLVED_IN_32[fmt.bits] if fmt.group_size == 32 else 1 / SOLVED_IN_32[fmt.bits]
    return SOLVED[fmt.bits] * ranges


def stored_bits(fmt: Format) -> float:
    """Bits of a weight with its share of a scale and a bias of 16 bits."""
    return fmt.bits + STORED_SCALE_BITS / fmt.group_size


def allocate(
    costs: dict[str, Cost], budget_bits: float, bits=CANDIDATE_BITS, group_sizes=format.GROUP_SIZES
) -> dict[str, Format]:
    """The format of each layer that keeps the summed KL low within a budget in bits for all of them together.

    Raises ValueError when even the smallest formats do not fit.
    """
    chosen: dict[str, int] = {}
    hulls: dict[str, list[tuple[float, float, Format]]] = {}
    for path, cost in costs.items():
        probe = error(cost.probe, cost.solved)
        points = [
            (cost.weights * stored_bits(fmt), max(cost.kl, 0.0) * error(fmt, cost.solved) / probe, fmt)
            for fmt in (Format(b, g) for b in bits for g in group_sizes if cost.K % g == 0)
        ]
        hulls[path], chosen[path] = _lower_hull(points), 0
    spent = sum(hull[0][0] for hull in hulls.values())
    if spent > budget_bits:
        weights = sum(cost.weights for cost in costs.values())
        raise ValueError(
            f"the smallest formats take {spent / weights:.3f} bits of a weight, and "
            f"{budget_bits / weights:.3f} are left for the layers that can be quantized: raise the target"
        )

    def gain(path: str) -> tuple[float, str]:
        here, there = hulls[path][chosen[path]], hulls[path][chosen[path] + 1]
        return -(here[1] - there[1]) / (there[0] - here[0]), path

    queue = [gain(path) for path in sorted(hulls) if len(hulls[path]) > 1]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        hull, at = hulls[path], chosen[path]
        price = hull[at + 1][0] - hull[at][0]
        if spent + price > budget_bits:
            continue  # a cheaper step of another layer may still fit
        spent += price
        chosen[path] += 1
        if chosen[path] + 1 < len(hull):
            heapq.heappush(queue, gain(path))
    return {path: hulls[path][at][2] for path, at in chosen.items()}


def _lower_hull(points):
    """Points by rising size, of which each lowers the KL by less a bit than the one before."""
    hull = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return hull


def write_costs(costs: dict[str, Cost], path: Path) -> None:
    """The costs as a .json file, for read_costs."""
    lines = {
        name: {
            "kl": cost.kl,
            "weights": cost.weights,
            "K": cost.K,
            "probe": asdict(cost.probe),
            "solved": cost.solved,
        }
        for name, cost in costs.items()
    }
    half = path.with_name(path.name + ".part")  # other processes may look for the file meanwhile
    half.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def read_costs(path: Path, wanted: dict[str, tuple[int, int]]) -> dict[str, Cost]:
    """The wanted layers' costs from a file of write_costs.

    wanted   path -> (number of weights, row length)

    Raises ValueError, naming the file, for other content and for layers that it lacks or has otherwise.
    """
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        costs = {
            name: Cost(
                float(line["kl"]), line["weights"], line["K"], Format(**line["probe"]), bool(line["solved"])
            )
            for name, line in lines.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no costs of layers ({error}): delete it, and they are measured"
        ) from None
    for name, (weights, K) in wanted.items():
        cost = costs.get(name)
        if cost is None or (cost.weights, cost.K) != (weights, K) or not np.isfinite(cost.kl):
            raise ValueError(f"{path} has no cost of {name} as this model has it: it is of another model")
    return {name: costs[name] for name in wanted}


def plan_rules(formats: dict[str, Format]) -> list[dict[str, object]]:
    """Rules for a .json file, as mlxq.rules reads them: one for each layer, by its whole path."""
    return [
        {"module_path": path.replace(".", "/"), "bits": fmt.bits, "group_size": fmt.group_size}
        for path, fmt in formats.items()
    ]
