"""A model's transformer blocks one after another over calibration text, one of them in memory at a time.

Works on any mlx-lm model whose blocks stand in lists and hand on one hidden state. What else a block is
called with (mask, cache, inputs of its own) is noted in a dry run, in which no block computes; a second one
with other states finds models whose blocks get more from each other than the state; those are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import switch_layers

from mlxq.bridge import to_numpy
from mlxq.ptq.gptq import Statistics
from mlxq.ptq.host import host, host_products

# An expert that few rows reached borrows the shape of all experts' inputs, counted as this share of K rows.
BORROWED = 0.5


@dataclass
class Stage:
    """Layers of one block that read the same input and are quantized together.

    weights     their float32 weights by path: (N, K), or (experts, N, K)
    statistics  of their input; for experts a list with one for each
    """

    block: int
    weights: dict[str, np.ndarray]
    statistics: Statistics | list[Statistics]


class Stream:
    """The blocks of an mlx-lm model that holds no weights yet.

    read     read(name) -> array of that parameter, float32 where it is a float; called once for each
    windows  token ids, integers (count, length)
    drift    whether statistics compare the inputs with those of the float model (Statistics.cross)

    Raises ValueError, with the reason, for models whose blocks cannot run one by one.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], np.ndarray], windows, drift: bool = True):
        self.model, self.read, self.drift = model, read, drift
        self.windows = np.asarray(windows)
        self.paths, self.blocks, self.places = _find_blocks(model)
        inside = tuple(f"{path}." for path in self.paths)
        names = [name for name, _ in tree_flatten(model.parameters())]
        self.names = [[n for n in names if n.startswith(f"{path}.")] for path in self.paths]
        self.outer = [n for n in names if not n.startswith(inside)]
        self._load(self.outer)
        self.calls, self.float_states = self._enter()
        self.states = self.float_states

    def parameter(self, name: str) -> np.ndarray:
        """A parameter that is loaded, float32, not copied."""
        found = self.model
        for part in name.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        return host(found)

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return any(name in names for names in self.names) or name in self.outer

    def put(self, name: str, values: np.ndarray) -> None:
        """Give a parameter other values, such as those of its quantized form."""
        self.model.update(tree_unflatten([(name, mx.array(values))]))

    def weight(self, path: str) -> np.ndarray:
        """The weights of a layer that is loaded."""
        return self.parameter(f"{path}.weight")

    def put_weight(self, path: str, values: np.ndarray) -> None:
        """Give a layer other weights."""
        self.put(f"{path}.weight", values)

    def re_enter(self) -> None:
        """Take the quantized stream's first states from the outer layers as they are now."""
        _, self.states = self._enter()

    def stages(self, prepare: Callable[[int, dict], None] | None = None, first: int = 0) -> Iterator[Stage]:
        """Each stage of each block from `first` on, in the order of computation, until the last.

        Before asking for the next stage, `put_weight` the quantized weights: what follows sees their errors.
        prepare(number, layers by path) is called when a block is loaded, and may change it. states and
        float_states are those that enter the block `first`.
        """
        for number in range(first, len(self.blocks)):
            layers = self.enter(number)
            with host_products():
                if prepare is not None:
                    prepare(number, layers)
                seen, self.float_states = self._float_pass(number, layers)
                for paths in _same_input(seen):
                    yield self._stage(number, paths, layers, seen)
                    for path in paths:
                        seen[path].rows.clear()
                self.states = self.advance(number, self.states)
            self.leave(number)

    def enter(self, number: int) -> dict[str, nn.Module]:
        """Load a block, and its layers that can be calibrated, by path."""
        self._load(self.names[number])
        return {
            f"{self.paths[number]}.{path}": layer
            for path, layer in self.blocks[number].named_modules()
            if isinstance(layer, CALIBRATED) and type(layer).__call__ in _STOCK_CALLS
        }

    def leave(self, number: int) -> None:
        """Drop a block's weights."""
        self._forget(self.names[number])

    def advance(self, number: int, states: list[mx.array], first: int = 0) -> list[mx.array]:
        """Each window's state after a block that has been entered; states are of the windows from `first`."""
        return [self._run(number, window, state) for window, state in enumerate(states, first)]

    def watched(
        self, number: int, layers: dict[str, nn.Module], states: list[mx.array], first: int = 0
    ) -> tuple[dict[str, Statistics], list[mx.array]]:
        """(statistics by path, states after the block) of states in a block that has been entered."""
        with _watch(layers, keep=True) as seen:
            states = self.advance(number, states, first)
        found = {}
        for paths in _same_input(seen):
            sums = _Sums(seen[paths[0]].rows[0].shape[-1], False)
            for rows in seen[paths[0]].rows:
                sums.add(rows, None)
            found |= dict.fromkeys(paths, sums.statistics())
        return found, states

    def inputs(self, number: int, layers: dict[str, nn.Module]):
        """(paths, Hessian, mean magnitude of each channel) of layers that share an input of self.states."""
        with _watch(layers, keep=True) as seen:
            self.advance(number, self.states)
        for paths in _same_input(seen):
            rows = np.concatenate(seen[paths[0]].rows)
            yield paths, rows.T @ rows / np.float32(len(rows)), np.abs(rows).mean(0)

    def trial(self, number: int) -> np.ndarray:
        """What a block that has been entered gives for the first window."""
        return np.array(host(self._run(number, 0, self.states[0])))

    def finish(self, window: int, state: mx.array) -> mx.array:
        """The model's output when `state` leaves its last block."""
        last = len(self.blocks) - 1
        return self._dry_run(self.windows[window], lambda s, at: state if at == last else s)[1]

    def _float_pass(self, number: int, layers) -> tuple[dict[str, _Seen], list[mx.array]]:
        with _watch(layers, keep=self.drift) as seen:
            states = self.advance(number, self.float_states)
        return {path: one for path, one in seen.items() if one.first is not None}, states

    def _stage(self, number: int, paths: list[str], layers, before: dict[str, _Seen]) -> Stage:
        """Statistics of what reaches paths[0] with everything before it quantized."""
        path = paths[0]
        layer, total = layers[path], None
        for window, state in enumerate(self.states):
            with _watch({path: layer}, keep=True, stop=True) as seen:
                try:
                    self._run(number, window, state)
                except _StopError:
                    pass
            found = seen[path]
            if isinstance(layer, switch_layers.SwitchLinear):
                total = total or _ExpertSums(layer.weight.shape[0], found.rows[0].shape[-1])
                total.add(found.rows[0], found.experts[0])
            else:
                total = total or _Sums(found.rows[0].shape[-1], self.drift)
                total.add(found.rows[0], before[path].rows[window] if self.drift else None)
        return Stage(number, {p: host(layers[p].weight) for p in paths}, total.statistics())

    def _run(self, number: int, window: int, state: mx.array) -> mx.array:
        args, kwargs = self.calls[window][number]
        out = self.blocks[number](state, *args, **kwargs)
        mx.eval(out)
        return out

    def _load(self, names: list[str]) -> None:
        self.model.update(tree_unflatten([(name, mx.array(self.read(name))) for name in names]))

    def _forget(self, names: list[str]) -> None:
        """Replace weights by lazy zeros, which take no memory."""
        shapes = {name: array.shape for name, array in tree_flatten(self.model.parameters())}
        self.model.update(tree_unflatten([(name, mx.zeros(shapes[name])) for name in names]))
        mx.clear_cache()

    def _enter(self) -> tuple[list[list], list[mx.array]]:
        """(calls[window][block], states[window]): what blocks are called with, and what enters the first."""
        calls, states = [], []
        for window in self.windows:
            stands, _ = self._dry_run(window, lambda state, at: state)
            calls.append([stand.call for stand in stands])
            states.append(stands[0].state.astype(mx.float32))
            mx.eval(states[-1])
        moved, _ = self._dry_run(self.windows[-1], lambda state, at: state * 1.5 + 0.25)
        entered = states[-1]
        for stand, call in zip(moved, calls[-1], strict=True):
            same = mx.allclose(stand.state, entered.astype(stand.state.dtype))
            if not same or not _equal(stand.call, call):
                raise ValueError("its blocks pass more to each other than one hidden state")
            entered = entered * 1.5 + 0.25
        return calls, states

    def _dry_run(self, window, change) -> tuple[list[_Stand], mx.array]:
        """Stands that noted one pass, and the model's output; block `at` gives change(state, at)."""
        stands = [_Stand(block, partial(change, at=at)) for at, block in enumerate(self.blocks)]
        try:
            for (holder, index), stand in zip(self.places, stands, strict=True):
                holder[index] = stand
            out = self.model(mx.array(window[None]))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"its blocks do not take and give one hidden state ({error})") from error
        finally:
            for (holder, index), block in zip(self.places, self.blocks, strict=True):
                holder[index] = block
        if any(stand.count != 1 for stand in stands):
            raise ValueError("a block does not run exactly once in a pass")
        return stands, out


class _Stand:
    """Stands in a block's place: notes what the block is called with and computes nothing."""

    def __init__(self, block: nn.Module, change):
        self.block, self.change = block, change
        self.count, self.state, self.call = 0, None, None

    def __getattr__(self, name):
        return getattr(self.block, name)

    def __call__(self, state, *args, **kwargs):
        self.count, self.state, self.call = self.count + 1, state, (args, kwargs)
        return self.change(state)


def _equal(a, b) -> bool:
    if isinstance(a, mx.array):
        return isinstance(b, mx.array) and a.shape == b.shape and mx.array_equal(a, b).item()
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or a == b


def _find_blocks(model: nn.Module):
    """(paths, blocks, places): each block with its path and the (list, index) that holds it."""
    blocks = list(getattr(model, "layers", ()))
    if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
        raise ValueError("it has no list of blocks named layers")
    found: dict[int, tuple[str, list, int]] = {}
    for path, module in model.named_modules():
        for key, children in module.items():
            if isinstance(children, list):
                for index, child in enumerate(children):
                    found[id(child)] = (f"{path}.{key}.{index}".lstrip("."), children, index)
    if any(id(block) not in found for block in blocks):
        raise ValueError("its blocks do not stand in lists")
    paths = [found[id(block)][0] for block in blocks]
    return paths, blocks, [found[id(block)][1:] for block in blocks]


@dataclass
class _Seen:
    """What one layer was called with, window after window; first keeps the first input itself."""

    first: mx.array | None = None
    rows: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)


class _StopError(Exception):
    """The layer whose input is wanted has been reached."""


class _watch:
    """While it lasts, calls of these layers are noted: with entering, {path: _Seen} in the order of calls."""

    def __init__(self, layers: dict[str, nn.Module], keep: bool, stop: bool = False):
        self.layers, self.keep, self.stop = layers, keep, stop
        self.classes: list[tuple[nn.Module, type]] = []

    def __enter__(self) -> dict[str, _Seen]:
        seen: dict[str, _Seen] = {}
        for path, layer in self.layers.items():
            stock = type(layer)

            def call(layer, x, *args, path=path, stock=stock, **kwargs):
                one = seen.setdefault(path, _Seen())
                if one.first is None:
                    one.first = x
                if self.keep:
                    _note(one, x, args)
                if self.stop:
                    raise _StopError
                return stock.__call__(layer, x, *args, **kwargs)

            self.classes.append((layer, stock))
            layer.__class__ = type(stock.__name__, (stock,), {"__call__": call})
        return seen

    def __exit__(self, *error) -> None:
        for layer, stock in self.classes:
            layer.__class__ = stock


def _note(seen: _Seen, x: mx.array, args) -> None:
    rows = host(x)
    if args:  # of experts: (..., M, K) rows for each of the indices
        chosen = to_numpy(args[0])
        *_, M, K = rows.shape
        rows = np.broadcast_to(rows, (*chosen.shape, M, K)).reshape(-1, K)
        seen.experts.append(np.repeat(chosen.reshape(-1), M))
    seen.rows.append(rows.reshape(-1, rows.shape[-1]))


def _same_input(seen: dict[str, _Seen]) -> list[list[str]]:
    """Paths in the order of their calls, those together whose first input was the same array."""
    groups: dict[int, list[str]] = {}
    for path, one in seen.items():
        groups.setdefault(id(one.first), []).append(path)
    return list(groups.values())


class _Sums:
    """Sums of x^T x and x0^T x."""

    def __init__(self, K: int, drift: bool):
        self.hessian = np.zeros((K, K), np.float32)
        self.cross = np.zeros((K, K), np.float32) if drift else None
        self.rows = 0

    def add(self, x: np.ndarray, x0: np.ndarray | None) -> None:
        self.hessian += x.T @ x
        if self.cross is not None:
            self.cross += x0.T @ x
        self.rows += len(x)

    def statistics(self) -> Statistics:
        count = np.float32(max(self.rows, 1))
        return Statistics(self.hessian / count, None if self.cross is None else self.cross / count, self.rows)


class _ExpertSums:
    """The same for each expert; without x0, because the float model may send a row to other experts."""

    def __init__(self, experts: int, K: int):
        self.sums = [_Sums(K, False) for _ in range(experts)]

    def add(self, x: np.ndarray, experts: np.ndarray) -> None:
        for expert in np.unique(experts):
            self.sums[expert].add(x[experts == expert], None)

    def statistics(self) -> list[Statistics]:
        total, rows = sum(s.hessian for s in self.sums), sum(s.rows for s in self.sums)
        common = total / np.float32(max(rows, 1))
        borrowed = np.float32(BORROWED * len(common))
        return [
            Statistics((s.hessian + borrowed * common) / (s.rows + borrowed), None, s.rows) for s in self.sums
        ]


CALIBRATED = (nn.Linear, switch_layers.SwitchLinear)
# A subclass with a product of its own may read its input otherwise: it is rounded without calibration.
_STOCK_CALLS = tuple(kind.__call__ for kind in CALIBRATED)
