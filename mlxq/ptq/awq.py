"""AWQ: input channels that matter get finer steps, by a factor that the operation before takes back.

If y = W x and x = n(...) * a with a weight a per channel (a norm's), then W x = (W diag(s)) (diag(1/s) x),
and diag(1/s) goes into a: the float function is the same, but rounding W diag(s) leaves an error that is s[k]
times smaller on channel k. s = (mean |x|)^ratio, with the ratio, one for all layers that read x, that makes
the outputs' error least. Between two linear layers the rows of the first take 1/s.

What stands in front of a layer is found by trial, so no architecture is named: candidates are changed, and
one that leaves the block's output as it was is the one. Where none does, the layer is named as not scaled.

Source: AWQ (Lin et al., 2023), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxq import format
from mlxq.format import Format

RATIOS = tuple(np.linspace(0.0, 1.0, 11)[1:-1])
F32 = np.float32


@dataclass
class Fold:
    """How a factor 1/s per channel gets into the parameter in front of a layer.

    path    of that parameter      kind   "weight" multiplies it, "offset" multiplies 1 + it, "rows" its rows
    """

    path: str
    kind: str

    def apply(self, value: np.ndarray, s: np.ndarray) -> np.ndarray:
        """The parameter with 1/s in it, float32."""
        if self.kind == "offset":
            return ((1 + value) / s - 1).astype(F32)
        if self.kind == "rows" and value.ndim == 2:
            return (value / s[:, None]).astype(F32)
        return (value / s).astype(F32)


def scale_error(
    weights: list[np.ndarray], hessian: np.ndarray, s: np.ndarray, formats: list[Format], dtypes: list[str]
) -> float:
    """Summed error of the outputs when columns are multiplied by s, rounded, and divided by s again."""
    total = 0.0
    for weight, fmt, dtype in zip(weights, formats, dtypes, strict=True):
        packed = format.quantize((weight * s).astype(F32), fmt, scale_dtype=dtype)
        e = weight - format.dequantize(packed) / s
        total += float(np.einsum("nk,nk->", e @ hessian, e))
    return total


def channel_scales(
    weights: list[np.ndarray],
    hessian: np.ndarray,
    magnitudes: np.ndarray,
    formats: list[Format],
    dtypes: list[str],
) -> tuple[np.ndarray, float] | None:
    """(s, error over that without scaling) of the best ratio; None where scaling does not lower the error.

    weights     float32  (N, K) each, layers that read the same input
    hessian     float32  (K, K)   mean of x^T x        magnitudes   float32  (K,)   mean |x|
    """
    plain = scale_error(weights, hessian, np.ones_like(magnitudes), formats, dtypes)
    size = np.maximum(magnitudes, 1e-4 * magnitudes.max() + 1e-12)
    best, lowest = None, plain
    for ratio in RATIOS:
        s = size ** F32(ratio)
        s = (s / np.sqrt(s.max() * s.min())).astype(F32)
        error = scale_error(weights, hessian, s, formats, dtypes)
        if error < lowest:
            best, lowest = s, error
    return None if best is None else (best, lowest / plain)


TRIED = 1e-4  # relative change of a block's output that two float32 computations of the same may show


@dataclass
class Change:
    """What a parameter becomes: (value * columns + offset) * rows; None leaves a factor out."""

    columns: np.ndarray | None = None
    rows: np.ndarray | None = None
    offset: np.ndarray | None = None

    def apply(self, value: np.ndarray) -> np.ndarray:
        """Of the whole parameter, or of some rows when self is cut to them."""
        if self.columns is not None:
            value = value * self.columns
        if self.offset is not None:
            value = value + self.offset
        if self.rows is not None:
            value = value * self.rows.reshape(-1, *[1] * (value.ndim - 1))
        return value.astype(F32)

    def cut(self, start: int, stop: int) -> Change:
        """The same for rows start to stop of a matrix."""
        return Change(self.columns, None if self.rows is None else self.rows[start:stop], self.offset)

    def then(self, later: Change) -> Change:
        """Both in turn; each axis is scaled, an offset stands only in vectors, which change once."""

        def product(a, b):
            return b if a is None else a if b is None else a * b

        return Change(
            product(self.columns, later.columns),
            product(self.rows, later.rows),
            later.offset if self.offset is None else self.offset,
        )


def fold_block(stream, number: int, layers: dict, wanted: dict[str, tuple[Format, str]], storage: str):
    """({parameter: Change}, paths that were not scaled with the reason) of a block that has been entered.

    The stream's parameters are changed; the block's float function is not. storage is the dtype that vectors
    will be stored in: the factor that the matrices take is that of the rounded vector.
    """
    changes: dict[str, Change] = {}
    skipped: dict[str, str] = {}
    for paths, hessian, magnitudes in stream.inputs(number, layers):
        chosen = [path for path in paths if path in wanted]
        if not chosen:
            continue
        weights = [stream.weight(path) for path in chosen]
        if any(weight.ndim != 2 for weight in weights):
            skipped |= dict.fromkeys(chosen, "experts are not scaled")
            continue
        fold = _in_front(stream, number, paths, len(magnitudes))
        if fold is None:
            skipped |= dict.fromkeys(chosen, "no norm or linear layer in front takes the scales")
            continue
        found = channel_scales(
            weights, hessian, magnitudes, [wanted[p][0] for p in chosen], [wanted[p][1] for p in chosen]
        )
        if found is None:
            continue
        s, _ = found
        for name, change in _changes(stream, paths, fold, s, storage).items():
            stream.put(name, change.apply(stream.parameter(name)))
            changes[name] = changes[name].then(change) if name in changes else change
    return changes, skipped


def _changes(stream, paths: list[str], fold: Fold, s: np.ndarray, storage: str) -> dict[str, Change]:
    value = stream.parameter(fold.path)
    if fold.kind == "rows":
        out = {fold.path: Change(rows=(1 / s).astype(F32))}
        bias = fold.path.removesuffix("weight") + "bias"
        if stream.has(bias):
            out[bias] = Change(columns=(1 / s).astype(F32))
    else:
        one = F32(1 if fold.kind == "offset" else 0)
        stored = format.store(fold.apply(value, s), storage)
        usable = (np.abs(stored + one) > 0) & (np.abs(value + one) > 0)
        s = np.where(usable, (value + one) / np.where(usable, stored + one, 1), F32(1)).astype(F32)
        offset = None if fold.kind == "weight" else (1 / s - 1).astype(F32)
        out = {fold.path: Change(columns=(1 / s).astype(F32), offset=offset)}
    return out | {f"{path}.weight": Change(columns=s) for path in paths}


def _in_front(stream, number: int, paths: list[str], K: int) -> Fold | None:
    """The parameter of the block that can take 1/s for the layers that read one input, found by trial."""
    s = np.exp2(np.random.default_rng(0).uniform(-1, 1, K)).astype(F32)
    want = stream.trial(number)
    for name in stream.names[number]:
        value = stream.parameter(name)
        own = name.removesuffix(".weight") in paths
        if own or not name.endswith("weight") or value.ndim > 2 or value.shape[0] != K:
            continue
        kinds = ("weight", "offset") if value.ndim == 1 else ("rows",)
        for kind in kinds:
            fold = Fold(name, kind)
            changes = _changes(stream, paths, fold, s, "float32")
            before = {n: stream.parameter(n) for n in changes}
            for n, change in changes.items():
                stream.put(n, change.apply(before[n]))
            got = stream.trial(number)
            for n, old in before.items():
                stream.put(n, old)
            if np.abs(got - want).max() <= TRIED * np.abs(want).max():
                return fold
    return None
