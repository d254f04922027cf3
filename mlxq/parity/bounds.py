"""How far a right answer may be from float64: every bound of `mlxq parity`, and where it comes from.

Notation: u = 2^-24, half a unit in the last place of float32, in which every kernel sums; r = 2^-24, 2^-11 or
2^-8, the same of the dtype of x, to which a product is rounded; T x N outputs, K inputs.

One product, y = sum_k x_k w_k.  The kernels add a_k = scale * code * x_k and b_k = bias * x_k, in whatever
order.  Let s^2 = sum_k (a_k^2 + b_k^2).  Rounding errors are independent and spread evenly over +-u of what
is rounded, so one addition adds u |partial sum| / sqrt(3) to the deviation.  Partial sums of terms that are
not all of one sign stay below s or so; K additions make

    deviation = u s sqrt(K / 3)                                            root mean square, of one output
    limit     = deviation * sqrt(2 ln(T N)) + r |y|                        no output may be farther
    mean      = deviation * sqrt(2 / pi) + r |y| / 2, averaged             nor may the mean error be larger

sqrt(2 ln n) deviations are what the largest of n normal numbers reaches.  This is for one chain of K
additions, as of the scalar kernel, and partial sums that are large from the beginning.  Fast kernels have
LANES or more chains of K / LANES additions, whose partial sums walk randomly, half of s^2 on average: their

    typical deviation = deviation / sqrt(2 LANES)

With 16-bit activations the fast CPU kernels round one operand of each multiplication to the precision of x
(integers of x's own width, or weights in bfloat16): r^2 / 3 sum_k (w_k x_k)^2 is added to both variances.

AMX has bfloat16 tiles only, so its kernels take float32 x and weights as pairs of bfloat16
(metal/cpu/amx.cpp) and leave out the product of the smaller parts. A part is off by at most 2^-9 of it,
evenly spread, a pair by 2^-17; so to both variances of such a kernel SPLIT^2 sum_k (w_k x_k)^2 is added, with

    SPLIT^2 = 2 * (2^-17)^2 / 3 + ((2^-9)^2 / 3)^2

One product with 8-bit activations.  Sums over a group are exact, K is the number of groups G, plus the three
roundings of the scales; a_k and b_k are the terms of the groups. Where a row of weights or of activations has
more than one scale, LANES chains hold parts of each group: s^2 is that of single products if that is larger,
and K has log2(LANES) more additions, of the chains, and one more rounding, of the product of two scales.

An embedding is scale * code + bias with two roundings: K = 2.

Logits.  Which errors reach the logits is a property of the model, so it is measured: the reference runs once
more with normal noise of the typical deviation (and r |y| / sqrt(3)) on every packed product, which changes
the logits by `noise`.  A device has such errors in its other operations too (norms, rotations, attention,
activations and residual sums: about as many roundings, a factor of sqrt(2)), and it may have longer chains,
or its largest error be less lucky than the noise's (a factor of 2, together LOGITS):

    largest error, mean error   LOGITS times those of the noise
    mean KL                     LOGITS^2 times that of the noise: KL is quadratic in small errors
    tokens                      another choice than the reference's must be one between logits that differ by
                                less than two largest errors

With 8-bit activations a difference of any size flips some codes and comes out as steps of 1/127; noise in the
reference flips codes just so, which is why it is injected rather than multiplied through.  Two right devices
then differ by about as much as the quantization does: there the layers are the proof, and the logits are only
plausible.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from mlxq import bridge, format
from mlxq.nn.q8 import is_per_row

UNIT = 2.0**-24
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SPLIT = math.sqrt(2 * 2.0**-34 / 3 + (2.0**-18 / 3) ** 2)
LANES = 16
LOGITS = 3.0
_ROWS = 4096  # of a weight that are decoded to float64 at a time


@dataclass(frozen=True)
class Answer:
    """What one packed layer should give.

    y           float64   (T, N)
    deviation   float32   (T, N)   root mean square of the error of a chain before it is rounded to dtype
    typical     float32   (T, N)   that of a fast kernel
    rounded     float64   (T, N)   what is rounded to dtype, in size: |y|, with a bias |y - bias| too
    split       float32   (T, N)   what pairs of bfloat16 add to deviation and typical, in squares; or 0
    """

    y: np.ndarray
    deviation: np.ndarray
    typical: np.ndarray
    rounded: np.ndarray
    dtype: str
    split: np.ndarray | float = 0.0

    def plus(self, bias: np.ndarray) -> Answer:
        """The answer of a layer that adds a bias (N,) afterwards."""
        y = self.y + bias
        return dataclasses.replace(self, y=y, rounded=self.rounded + np.abs(y))

    def noise(self, rng: np.random.Generator, split: bool = False) -> np.ndarray:
        """float32 (T, N): errors as a right answer typically has; split: one of pairs of bfloat16."""
        rounding = ROUNDING[self.dtype] / math.sqrt(3) * self.rounded
        pairs = self.split if split else 0.0
        size = np.sqrt(self.typical.astype(np.float64) ** 2 + pairs + rounding**2)
        return (size * rng.standard_normal(self.y.shape)).astype(np.float32)

    def compare(self, y: np.ndarray, split: bool = False) -> dict:
        """How far y (T', N) is from the answer's last T' rows, and from its bounds.

        split: y is of a kernel that takes float32 as pairs of bfloat16.

        {"max": largest error, "mean": mean error, "mean_y": mean |y|, "share": the larger of error / bound
        over all outputs and of their mean, "ok"}
        """
        want, deviation = self.y[-len(y) :], self.deviation[-len(y) :]
        if split:
            pairs = np.broadcast_to(self.split, self.y.shape)[-len(y) :]
            deviation = np.sqrt(deviation.astype(np.float64) ** 2 + pairs)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(y.astype(np.float64) - want)
        tail = math.sqrt(2 * math.log(max(want.size, 2)))
        rounding = ROUNDING[self.dtype] * self.rounded[-len(y) :]
        limit = deviation * tail + rounding
        mean = float((deviation * math.sqrt(2 / math.pi) + rounding / 2).mean())
        # Where nothing is added nothing is rounded: 0 is the only right answer.
        share = float(np.max(np.where(error == 0, 0, error / np.maximum(limit, 1e-300)), initial=0))
        share = max(share, float(error.mean()) / max(mean, 1e-300) if error.any() else 0)
        share = share if math.isfinite(share) else math.inf
        return {
            "max": float(error.max(initial=0)),
            "mean": float(error.mean()) if error.size else 0.0,
            "mean_y": float(np.abs(want).mean()) if want.size else 0.0,
            "share": share,
            "ok": share <= 1,
        }


def _answer(y, additions: int, size, dtype: str, products=None) -> Answer:
    """size: s^2; products: sum_k (w_k x_k)^2 where a kernel may round or split an operand, else None."""
    chain, operands, split = UNIT**2 * additions / 3 * size, 0.0, 0.0
    if products is not None and dtype == "float32":
        split = (SPLIT**2 * products).astype(np.float32)
    elif products is not None:
        operands = ROUNDING[dtype] ** 2 / 3 * products
    deviation, typical = np.sqrt(chain + operands), np.sqrt(chain / (2 * LANES) + operands)
    return Answer(y, deviation.astype(np.float32), typical.astype(np.float32), np.abs(y), dtype, split)


def product(packed: format.Packed, x: np.ndarray, dtype: str) -> Answer:
    """x @ W.T: x (T, K)."""
    wide = x.astype(np.float64)
    square, ys, sizes, products = wide**2, [], [], []
    for scaled, biases in _decoded(packed):
        w = scaled + biases
        ys.append(wide @ w.T)
        sizes.append(square @ (scaled**2 + biases**2).T)
        products.append(square @ (w**2).T)
    y, size, products = (np.concatenate(column, axis=1) for column in (ys, sizes, products))
    return _answer(y, packed.K, size, dtype, products)


def embedding(packed: format.Packed, ids: np.ndarray, dtype: str) -> Answer:
    """Rows of the table: ids (T,)."""
    rows = (bridge.to_numpy(a)[ids] for a in (packed.words, packed.scales, packed.biases))
    scaled, biases = next(_decoded(format.Packed(*rows, packed.format), len(ids)))
    return _answer(scaled + biases, 2, scaled**2 + biases**2, dtype)


def product_of_codes(packed: format.Packed, codes: np.ndarray, scales: np.ndarray, dtype: str) -> Answer:
    """scales * (codes @ W.T): codes int (T, K), scales float32 (T, 1), or (T, groups) inside of the sum."""
    fmt, zero = packed.format, 1 << (packed.format.bits - 1)
    grouped = codes.reshape(len(codes), -1, fmt.group_size).astype(np.float64)
    x_sums, scales = grouped.sum(-1), scales.astype(np.float64)
    tiled = scales.shape[1] > 1
    whole = not tiled and is_per_row(fmt.bits, *(bridge.to_numpy(a) for a in (packed.scales, packed.biases)))
    ys, sizes = [], []
    for rows in _slices(packed.N):
        w, s, b = (bridge.to_numpy(a[rows]) for a in (packed.words, packed.scales, packed.biases))
        w = format.unpack(w, fmt.bits, packed.K).astype(np.float64) - zero
        s, b = s.astype(np.float64), b.astype(np.float64)
        w = w.reshape(*s.shape, fmt.group_size)
        y = size = single = 0
        for g in range(s.shape[1]):
            by = scales[:, g : g + 1] if tiled else scales
            terms = grouped[:, g] @ w[:, g].T * s[:, g], x_sums[:, g : g + 1] * (b[:, g] + zero * s[:, g])
            terms = terms[0] * by, terms[1] * by
            y, size = y + terms[0] + terms[1], size + terms[0] ** 2 + terms[1] ** 2
            if not whole:
                single = single + (grouped[:, g] ** 2 @ (w[:, g] ** 2).T) * (s[:, g] * by) ** 2
        ys.append(y)
        sizes.append(np.maximum(np.maximum(size, single), y**2))
    y, size = np.concatenate(ys, axis=1), np.concatenate(sizes, axis=1)
    additions = grouped.shape[1] + 3 + (0 if whole else 1 + int(math.log2(LANES)))
    return _answer(y, additions, size, dtype)


def _slices(N: int):
    return (slice(start, start + _ROWS) for start in range(0, N, _ROWS))


def _decoded(packed: format.Packed, rows_at_once: int | None = None):
    """(scale * code, bias) of some rows after the other, float64 (rows, K)."""
    fmt = packed.format
    for rows in _slices(packed.N) if rows_at_once is None else (slice(None),):
        parts = (packed.words, packed.scales, packed.biases)
        words, scales, biases = (bridge.to_numpy(a[rows]) for a in parts)
        scales, biases = (np.repeat(a.astype(np.float64), fmt.group_size, axis=-1) for a in (scales, biases))
        yield scales * format.unpack(words, fmt.bits, packed.K), biases


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def differences(logits: np.ndarray, reference: np.ndarray) -> dict:
    """{"max": largest, "mean": mean error, "kl": mean KL(reference || logits) in nats}; both (T, V)."""
    error = np.abs(logits.astype(np.float64) - reference)
    p, q = log_softmax(reference), log_softmax(logits)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return {"max": float(error.max()), "mean": float(error.mean()), "kl": float(max(kl.mean(), 0.0))}


def logit_bounds(noise: dict) -> dict:
    """The bounds of differences(), from those that injected noise made."""
    return {"max": LOGITS * noise["max"], "mean": LOGITS * noise["mean"], "kl": LOGITS**2 * noise["kl"]}


def choices(logits: np.ndarray, reference: np.ndarray, limit: float, start: int) -> dict:
    """What the device would choose, beside the reference: position t chooses token t + 1.

    {"agreement": share of positions with the same top-1, "unexplained": positions whose other choice the
    reference puts farther than 2 * limit below its own, "divergence": at which generated token, counted from
    0 at position `start`, greedy decoding leaves the reference's; None if it does not}
    """
    ours, theirs = logits.argmax(-1), reference.argmax(-1)
    differ = np.flatnonzero(ours != theirs)
    gap = reference[differ, theirs[differ]] - reference[differ, ours[differ]]
    later = differ[differ >= start]
    return {
        "agreement": float((ours == theirs).mean()),
        "unexplained": [int(t) for t in differ[~(gap <= 2 * limit)]],
        "divergence": int(later[0] - start) if len(later) else None,
    }
