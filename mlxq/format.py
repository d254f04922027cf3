"""The format: every packed weight is codes in [0, 2^bits - 1] with one scale and one bias per group.

    W[n, k] = scales[n, k // group_size] * code[n, k] + biases[n, k // group_size]

Codes of a row are one little-endian bit stream along K, viewed as uint32 words: code k occupies bits
[k * bits, (k + 1) * bits), lowest first. This is MLX's own layout for its mode "affine". format.h holds the
same constants for C++, Metal and CUDA; a test compares the two.

Two rules choose the codes. `mlx` is bit for bit what mx.quantize does on the CPU. `affine` is ours, specified
below operation by operation so that every device gives the same bits. numpy's version here is the oracle of
the native ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

if sys.byteorder != "little":  # words are views of byte streams
    raise ImportError("mlxq needs a little-endian machine")

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
KERNEL_BITS = (2, 4, 8)
STORAGE = ("float32", "float16", "bfloat16")
RULES = ("affine", "mlx")

F32 = np.float32
# Of rule "affine" (affine_groups); format.h has the same. With these no float32 subnormal decides a result.
FLUSH_BELOW = F32(2.0**-126)
CONSTANT_BELOW = F32(2.0**-80)
ERROR_BELOW = F32(2.0**-80)
RANGE_LIMIT = F32(2.0**127)
CONSTANT_SCALE = F32(2.0**-14)  # exact in every storage and normal in each
SMALLEST_SCALE = {"float32": F32(2.0**-90), "float16": F32(2.0**-24), "bfloat16": F32(2.0**-90)}

_BLOCK = 1 << 18  # elements quantized at a time: the temporaries stay in the cache, memory stays flat


def _listed(values) -> str:
    return ", ".join(str(v) for v in values)


@dataclass(frozen=True)
class Format:
    """A width in bits and the number of weights that share one scale and one bias.

    Raises ValueError for a pair that does not exist.
    """

    bits: int
    group_size: int

    def __post_init__(self):
        if self.bits not in BITS or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"Format: {self.bits}-bit groups of {self.group_size} do not exist; "
                f"bits: {_listed(BITS)}; group sizes: {_listed(GROUP_SIZES)}"
            )

    def __str__(self) -> str:
        return f"{self.bits}-bit/{self.group_size}"

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, K: int) -> int:
        """Groups in a row of K weights. Raises ValueError if group_size does not divide K."""
        if K % self.group_size:
            raise ValueError(f"{self}: K={K} is not a multiple of the group size {self.group_size}")
        return K // self.group_size

    def words_per_row(self, K: int) -> int:
        """uint32 words in a row of K codes. Raises ValueError if group_size does not divide K."""
        return self.groups(K) * self.group_size * self.bits // 32

    def bits_per_weight(self, scale_bytes: int = 2) -> float:
        """Stored bits of one weight, its share of a scale and a bias of scale_bytes each included."""
        return self.bits + 16 * scale_bytes / self.group_size


FORMATS = tuple(Format(bits, group_size) for bits in KERNEL_BITS for group_size in GROUP_SIZES)


@dataclass(frozen=True)
class Packed:
    """A packed weight; the arrays may be numpy arrays, mx.arrays or torch.Tensors.

    words    uint32  (..., N, K * bits / 32)     lowest bits first
    scales   float   (..., N, K / group_size)
    biases   float   (..., N, K / group_size)    leading axes are experts
    """

    words: Any
    scales: Any
    biases: Any
    format: Format

    @property
    def N(self) -> int:
        return self.words.shape[-2]

    @property
    def K(self) -> int:
        return self.scales.shape[-1] * self.format.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the packed arrays stand for, (..., N, K)."""
        return (*self.words.shape[:-1], self.K)

    @property
    def nbytes(self) -> int:
        return sum(int(a.nbytes) for a in (self.words, self.scales, self.biases))

    def validate(self) -> Packed:
        """This same object. Raises ValueError if a dtype or a shape disagrees with the format."""
        words, scales, biases = (tuple(a.shape) for a in (self.words, self.scales, self.biases))
        if dtype_name(self.words) != "uint32":
            raise ValueError(f"Packed: words are {dtype_name(self.words)}; wanted uint32")
        names = dtype_name(self.scales), dtype_name(self.biases)
        if names[0] not in STORAGE or names[0] != names[1]:
            raise ValueError(
                f"Packed: scales are {names[0]} and biases {names[1]}; both must be one of {_listed(STORAGE)}"
            )
        if len(words) < 2:
            raise ValueError(f"Packed: words have shape {words}; wanted (..., N, K * bits / 32)")
        if scales != biases:
            raise ValueError(f"Packed: scales have shape {scales} but biases {biases}")
        if scales[:-1] != words[:-1]:
            raise ValueError(f"Packed: words are {words} but scales {scales}; only the last axis may differ")
        if words[-1] != self.format.words_per_row(self.K):
            raise ValueError(
                f"Packed: words hold K={words[-1] * 32 / self.format.bits:g} ({words[-1]} words of "
                f"{self.format.bits}-bit codes) but scales hold K={self.K} "
                f"({scales[-1]} groups of {self.format.group_size})"
            )
        return self


def dtype_name(array) -> str:
    """The dtype of an array of any framework, without the framework's name: "float32", "uint32", ..."""
    return str(array.dtype).rpartition(".")[2]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as uint32 words, shape (..., K * bits / 32).

    codes   uint8   (..., K)   K a multiple of 32

    Raises ValueError if K is not a multiple of 32 or a code does not fit in the width.
    """
    _check_width("pack", bits)
    codes = np.asarray(codes)
    if codes.dtype != np.uint8 or codes.ndim < 1:
        raise ValueError(f"pack: codes are {codes.dtype} of shape {codes.shape}; wanted uint8 (..., K)")
    K = codes.shape[-1]
    if K % 32:
        raise ValueError(f"pack: K={K} is not a multiple of 32")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"pack: code {int(codes.max())} does not fit in {bits} bits")
    # Eight codes fill exactly `bits` bytes, at every width.
    eights = np.ascontiguousarray(codes).reshape(-1, 8)
    if bits == 8:
        stream = eights
    else:
        lanes = np.zeros(len(eights), np.uint64)
        for i in range(8):
            lanes |= eights[:, i].astype(np.uint64) << np.uint64(i * bits)
        stream = np.ascontiguousarray(lanes.view(np.uint8).reshape(-1, 8)[:, :bits])
    return stream.reshape(-1).view(np.uint32).reshape(*codes.shape[:-1], K * bits // 32)


def unpack(words: np.ndarray, bits: int, K: int) -> np.ndarray:
    """Codes of packed words, uint8, shape (..., K).

    words   uint32   (..., K * bits / 32)   K a multiple of 32

    Raises ValueError if the words do not hold K codes a row.
    """
    _check_width("unpack", bits)
    words = np.asarray(words)
    if words.dtype != np.uint32 or words.ndim < 1:
        raise ValueError(f"unpack: words are {words.dtype} of shape {words.shape}; wanted uint32 (..., n)")
    if K % 32 or words.shape[-1] * 32 != K * bits:
        raise ValueError(
            f"unpack: {words.shape[-1]} words do not hold K={K} codes of {bits} bits; "
            "wanted K * bits / 32 words and K a multiple of 32"
        )
    stream = np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, bits)
    if bits == 8:
        return stream.reshape(*words.shape[:-1], K).copy()
    lanes = np.zeros((len(stream), 8), np.uint8)
    lanes[:, :bits] = stream
    lanes = lanes.reshape(-1).view(np.uint64)
    codes = np.empty((len(lanes), 8), np.uint8)
    for i in range(8):
        codes[:, i] = (lanes >> np.uint64(i * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], K)


def quantize(w: np.ndarray, fmt: Format, rule: str = "affine", scale_dtype: str = "float32") -> Packed:
    """The packed form of w in numpy arrays, by the named rule.

    w   float32 or float16   (..., N, K)   bfloat16 weights come as float32 arrays of the same values

    Scales and biases are float32 for "float32", float16 for "float16" and, for "bfloat16", float32 arrays of
    values that are exactly bfloat16. Raises ValueError if group_size does not divide K, if w holds NaN or
    infinity (how many, and the first index), or if a scale or bias is too large for scale_dtype.

    Rule "mlx": mx.quantize(w.astype(scale_dtype)) as the CPU back end of MLX 0.32.4 computes it, to the bit.
    Rule "affine": see affine_groups.
    """
    if rule not in RULES:
        raise ValueError(f"quantize: there is no rule {rule!r}; rules: {_listed(RULES)}")
    if scale_dtype not in STORAGE:
        raise ValueError(f"quantize: scales cannot be {scale_dtype}; wanted one of {_listed(STORAGE)}")
    w = np.asarray(w)
    if w.dtype not in (np.float32, np.float16):
        raise ValueError(f"quantize: w is {w.dtype}; wanted float32 or float16 (bfloat16 as float32 values)")
    if w.ndim < 2:
        raise ValueError(f"quantize: w has shape {w.shape}; wanted (..., N, K)")
    K = w.shape[-1]
    if K % fmt.group_size:
        raise ValueError(f"quantize: w has K={K}, not a multiple of the group size {fmt.group_size}")
    check_finite("quantize", w)
    groups_of = affine_groups if rule == "affine" else mlx_groups
    flat = np.ascontiguousarray(w).reshape(-1, fmt.group_size)
    codes = np.empty(flat.shape, np.uint8)
    stored = np.float16 if scale_dtype == "float16" else np.float32
    scales, biases = np.empty(len(flat), stored), np.empty(len(flat), stored)
    step = _BLOCK // fmt.group_size
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        codes[rows], scales[rows], biases[rows] = groups_of(flat[rows].astype(F32), fmt.levels, scale_dtype)
    grouped = (*w.shape[:-1], K // fmt.group_size)
    words = pack(codes.reshape(w.shape), fmt.bits)
    return Packed(words, scales.reshape(grouped), biases.reshape(grouped), fmt)


def dequantize(packed: Packed) -> np.ndarray:
    """Weights as float32, shape (..., N, K): scale * code, rounded, then + bias, rounded.

    Takes numpy arrays. Raises ValueError if the shapes disagree with the format.
    """
    packed.validate()
    codes = unpack(packed.words, packed.format.bits, packed.K)
    w = codes.reshape(*packed.scales.shape, packed.format.group_size).astype(F32)
    w *= np.asarray(packed.scales, F32)[..., None]
    w += np.asarray(packed.biases, F32)[..., None]
    return w.reshape(packed.shape)


def affine_groups(w: np.ndarray, levels: int, storage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 (G, group_size), scales and biases float32 (G,), rounded to storage: rule "affine".

    w   float32   (G, group_size)   finite; one group a row

    Every operation is one IEEE float32 operation, rounded to nearest even, none contracted, no division made
    a product. store(x) is x rounded to storage. No float32 subnormal decides anything, so devices that flush
    them agree.

        w = 0 where |w| < 2^-126;   lo = min(w), hi = max(w), range = hi - lo, half = range / 2^(bits + 1)

        Three grids are tried:
        span  bias = store(lo)         scale = store((hi - bias) / levels)
              the ends of the range are on the grid
        bins  bias = store(lo + half)  scale = store(((hi - half) - bias) / levels)
              the middles of 2^bits equal bins
        zero  bias = store(edge)       |scale| = store(|bias| / max(rint(|edge| / (range / levels)), 1))
              zero is on the grid; if |lo| > |hi|, edge = lo and scale > 0, else edge = hi and scale < 0
        |scale| is at least 2^-24 in float16 and 2^-90 otherwise; scales of span and bins are positive.

        code  = rint(clip((w - bias) / scale, 0, levels))
        error = (w - (scale * code + bias)) * 2^-floor(log2(range))
        Squared, set to 0 below 2^-80, and summed in halves: t[i] += t[i + n/2] for i < n/2 until one is left.
        The smallest sum wins, the earlier grid at a tie. A grid with an infinite scale or bias is left out.

    A group whose range is below 2^-80 has code 0 everywhere, bias = store(lo) and scale 2^-14. Raises
    ValueError if the range is 2^127 or more, or if storage cannot hold any of the three grids.
    """
    w = np.where(np.abs(w) < FLUSH_BELOW, F32(0), w)
    steps = F32(levels)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lo, hi = w.min(-1), w.max(-1)
        reach = hi - lo
        constant = reach < CONSTANT_BELOW
        usable = reach < RANGE_LIMIT
        scale, bias = np.full_like(lo, CONSTANT_SCALE), store(lo, storage)
        codes = np.zeros_like(w)
        best = np.where(constant & np.isfinite(bias), F32(0), F32(np.inf))
        unit = (np.uint32(254 << 23) - (reach.view(np.uint32) & np.uint32(0x7F800000))).view(F32)
        for s, b in _grids(lo, hi, reach, steps, storage):
            q = w - b[:, None]
            q /= s[:, None]
            q = np.rint(np.clip(q, F32(0), steps, out=q), out=q)
            t = q * s[:, None]
            t += b[:, None]
            t = np.subtract(w, t, out=t)
            t *= unit[:, None]
            t *= t
            t[t < ERROR_BELOW] = 0
            while t.shape[1] > 1:
                half = t.shape[1] // 2
                t = t[:, :half] + t[:, half:]
            better = ~constant & usable & np.isfinite(s) & np.isfinite(b) & (t[:, 0] < best)
            best = np.where(better, t[:, 0], best)
            scale, bias = np.where(better, s, scale), np.where(better, b, bias)
            codes = np.where(better[:, None], q, codes)
    too_large = np.isinf(best)
    if too_large.any():
        first = int(np.argmax(too_large))
        _refuse_overflow(f"a group that spans {lo[first]:g} to {hi[first]:g}", storage)
    return codes.astype(np.uint8), scale, bias


def _grids(lo, hi, reach, steps, storage):
    """The (scale, bias) pairs that rule "affine" tries, in its order."""
    smallest = SMALLEST_SCALE[storage]
    bias = store(lo, storage)
    yield np.maximum(store((hi - bias) / steps, storage), smallest), bias
    half = reach * (F32(0.5) / (steps + F32(1)))
    bias = store(lo + half, storage)
    yield np.maximum(store(((hi - half) - bias) / steps, storage), smallest), bias
    low = np.abs(lo) > np.abs(hi)
    edge = np.where(low, lo, hi)
    bias = store(edge, storage)
    count = np.maximum(np.rint(np.abs(edge) / (reach / steps)), F32(1))
    scale = np.maximum(store(np.abs(bias) / count, storage), smallest)
    yield np.where(low, scale, -scale), bias


def mlx_groups(w: np.ndarray, levels: int, storage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 (G, group_size), scales and biases float32 (G,), rounded to storage: rule "mlx".

    w   float32   (G, group_size)   finite; one group a row; rounded to storage first, as MLX would see it

    Source: quantize() in mlx/backend/cpu/quantized.cpp. Codes come from scales and biases not yet rounded to
    storage. Raises ValueError if a scale or bias is too large for storage, where MLX would write infinity.
    """
    w = store(w, storage)
    lo, hi = w.min(-1), w.max(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if levels == 1:
            scale = np.maximum(hi - lo, F32(1e-7))
            # The first of equal minima, as a sequential std::min keeps it: it decides the sign of a zero.
            bias = np.take_along_axis(w, w.argmin(-1)[:, None], -1)[:, 0]
        else:
            scale = np.maximum((hi - lo) / F32(levels), F32(1e-7))
            low_edge = np.abs(lo) > np.abs(hi)
            scale = np.where(low_edge, scale, -scale)
            edge = np.where(low_edge, lo, hi)
            steps = np.rint(edge / scale)
            moved = steps != 0
            scale = np.where(moved, edge / np.where(moved, steps, F32(1)), scale)
            bias = np.where(moved, edge, F32(0))
        codes = np.clip(np.rint((w - bias[:, None]) / scale[:, None]), 0, levels)
        scale, bias = store(scale, storage), store(bias, storage)
    finite = np.isfinite(scale) & np.isfinite(bias)
    if not finite.all():
        first = int(np.argmin(finite))
        _refuse_overflow(f"a group that spans {lo[first]:g} to {hi[first]:g}", storage)
    return codes.astype(np.uint8), scale, bias


def store(x: np.ndarray, storage: str) -> np.ndarray:
    """The float32 values nearest to x that storage can hold, ties to even; overflow gives infinity."""
    if storage == "float32":
        return x
    if storage == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(F32)
    bits = np.ascontiguousarray(x, F32).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits & np.uint32(0xFFFF0000)).view(F32)


def check_finite(where: str, w: np.ndarray) -> None:
    """Raises ValueError saying how many weights are NaN or infinite, and where the first one is."""
    finite = np.isfinite(w)
    if finite.all():
        return
    first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), w.shape))
    raise ValueError(
        f"{where}: {w.size - np.count_nonzero(finite)} of {w.size} weights are NaN or infinite, "
        f"the first, {w[first]}, at index {first}"
    )


def _check_width(where: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{where}: {bits}-bit codes do not exist; bits: {_listed(BITS)}")


def _refuse_overflow(what: str, storage: str) -> None:
    largest = {"float32": "3.4e38", "float16": "65504", "bfloat16": "3.39e38"}[storage]
    way_out = "use bfloat16 or float32 scales" if storage == "float16" else "scale the weights down"
    raise ValueError(
        f"quantize: {storage} cannot hold the scale or the bias of {what} (its largest value is {largest}); "
        f"{way_out}"
    )
