"""Mixed-precision packed linear layers (MPQ): their checkpoint layouts, and the canonical triple of each.

K = in_channels, N = out_channels, b = w_bit, g = group_size, G = ceil(K / g), p = 32 / b, D = dq_group_size.
Names and shapes are bitorch-engine's; GPTQ's are a subset of them. A checkpoint holds W as (K, N):

    name            shape             dtype   when
    qweight         (K / p, N)        int32   always; codes run along K, lowest bits first
    g_idx           (K,)              int32   always; the group of each row of W (act-order shuffles it)
    bias            (N,)              float   unless disable_bias
    scales          (G, N)            float   always; derived where scales are double quantized
    zeros           (G, N)            float   GBA symmetric; derived where zeros are double quantized
    qzeros          (G, N / p)        int32   GPTQ and GBA asymmetric; integers packed along N
    qstatistic      (G, N / D, D)     uint8   GBA symmetric, double quantized: scale code high, zero code low
    qscales         (G, N / D, D)     uint8   GBA asymmetric, double quantized; (G, N) where b is not 4
    qscales_zeros, qscales_scales     float   double quantized: (G, N / D, 1), or (1, N, 1) in dq_mode 1
    qzeros_zeros, qzeros_scales       float   GBA symmetric, double quantized: (G, N / D, 1)

    q[k, n]  = (qweight[k // p, n] >> b * (k mod p)) & (2^b - 1)
    zp[j, n] = ((qzeros[j, n // p] >> b * (n mod p)) & (2^b - 1)) + 1       GPTQ v2: without the + 1
    integer zeros   W[k, n] = scales[j, n] * (q[k, n] - zp[j, n])           j = g_idx[k]
    float zeros     W[k, n] = scales[j, n] * q[k, n] - zeros[j, n]          GBA "symmetric"
    double quantized   scale = (code - qscales_zeros) * qscales_scales, zero likewise

The canonical triple (mlxq.format) is W.T with its columns gathered by `order`, which makes groups contiguous;
groups that MLX does not have become several of 128, 64 or 32 that repeat a scale and a bias. Everything here
is numpy and float32. Source of the layouts: bitorch-engine 0.2.6, AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mlxq.format import GROUP_SIZES, KERNEL_BITS, Format, Packed, pack, unpack

DQ_BELOW = 256  # groups this wide or wider carry plain scales and zeros
GPTQ_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Layout:
    """Which tensors a checkpoint holds for one layer, and how they decode.

    dq_mode   0: plain scales and zeros; 1: scales of scales per output; 2: per dq_group_size outputs
    gptq_version   2 stores zeros as they are, 1 less one; GBA stores them as 1 does

    group_size -1 means K, dq_group_size -1 means N. Raises ValueError, one sentence for each thing that
    cannot be, TypeError for sizes that are not integers.
    """

    in_channels: int
    out_channels: int
    w_bit: int = 4
    group_size: int = -1
    use_gba_quant: bool = True
    dq_group_size: int = -1
    dq_mode: int = 2
    asym: bool = False
    gptq_version: int = 1

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "w_bit", "group_size", "dq_group_size", "dq_mode"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise TypeError(f"MPQ: {name} is {value!r}; wanted an integer")
        K, N = self.in_channels, self.out_channels
        if self.w_bit not in KERNEL_BITS:
            raise ValueError(f"MPQ: w_bit is {self.w_bit}; wanted one of {', '.join(map(str, KERNEL_BITS))}")
        if K <= 0 or N <= 0:
            raise ValueError(f"MPQ: in_channels is {K} and out_channels {N}; both must be positive")
        if K % 32:
            raise ValueError(f"MPQ: in_channels is {K}; wanted a multiple of 32")
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 32):
            raise ValueError(
                f"MPQ: group_size is {self.group_size}; wanted a multiple of 32, or -1 for in_channels"
            )
        if self.dq_mode not in (0, 1, 2):
            raise ValueError(f"MPQ: dq_mode is {self.dq_mode}; wanted 0 (none), 1 or 2")
        if self.gptq_version not in GPTQ_VERSIONS:
            raise ValueError(f"MPQ: gptq_version is {self.gptq_version!r}; wanted 1 or 2")
        if self.use_gba_quant and self.gptq_version != 1:
            raise ValueError("MPQ: gptq_version 2 belongs to GPTQ; pass use_gba_quant=False with it")
        set_field = object.__setattr__
        set_field(self, "group_size", K if self.group_size == -1 else self.group_size)
        set_field(self, "dq_group_size", N if self.dq_group_size == -1 else self.dq_group_size)
        set_field(self, "asym", bool(self.asym) or not self.use_gba_quant)
        if self.double_quantized and (self.dq_group_size <= 0 or N % self.dq_group_size):
            raise ValueError(
                f"MPQ: dq_group_size is {self.dq_group_size}; it must divide out_channels {N} (-1: all)"
            )
        if self.asym and N % 32:
            raise ValueError(f"MPQ: out_channels is {N}; integer zeros are packed, wanted a multiple of 32")

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.in_channels // self.group_size)

    @property
    def double_quantized(self) -> bool:
        return self.use_gba_quant and self.dq_mode != 0 and self.group_size < DQ_BELOW

    def plain(self) -> Layout:
        """The same layer with scales and zeros that are not double quantized."""
        return replace(self, dq_mode=0)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, "int32" or "uint8" or "float") of each tensor that this layout decodes from; bias aside."""
        K, N, G, p, D = self.in_channels, self.out_channels, self.groups, 32 // self.w_bit, self.dq_group_size
        shapes = {"qweight": ((K // p, N), "int32"), "g_idx": ((K,), "int32")}
        if self.asym:
            shapes["qzeros"] = ((G, N // p), "int32")
        if not self.double_quantized:
            shapes["scales"] = ((G, N), "float")
            if not self.asym:
                shapes["zeros"] = ((G, N), "float")
            return shapes
        by_group, blocks = (G, N // D, D), (G, N // D, 1)
        if self.asym:
            shapes["qscales"] = (by_group if self.w_bit == 4 else (G, N), "uint8")
        else:
            shapes["qstatistic"] = (by_group, "uint8")
            shapes["qzeros_zeros"] = shapes["qzeros_scales"] = (blocks, "float")
        of_scales = (1, N, 1) if self.dq_mode == 1 else blocks
        shapes["qscales_zeros"] = shapes["qscales_scales"] = (of_scales, "float")
        return shapes

    @property
    def derived(self) -> tuple[str, ...]:
        """Tensors that upstream's files carry beside those of `shapes` and that decoding does not read."""
        plain = ("scales",) if self.double_quantized else ()
        floats = ("zeros",) if self.use_gba_quant and (self.double_quantized or self.asym) else ()
        return plain + floats

    def default_g_idx(self) -> np.ndarray:
        """The groups of rows that nobody has reordered: k // g, int32 (K,)."""
        return (np.arange(self.in_channels) // self.group_size).astype(np.int32)

    def check(self, tensors: dict[str, np.ndarray]) -> None:
        """Raises ValueError, naming the tensor, for one that is missing or has another shape or dtype."""
        for name, (shape, dtype) in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"MPQ: the tensor {name} is missing")
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"MPQ: {name} has shape {tuple(tensor.shape)}; wanted {shape}")
            if dtype == "float" and tensor.dtype.kind != "f" or dtype != "float" and tensor.dtype != dtype:
                raise ValueError(f"MPQ: {name} is {tensor.dtype}; wanted {dtype}")
            if dtype == "float" and not np.isfinite(tensor).all():
                raise ValueError(f"MPQ: {name} holds NaN or infinity")
        g_idx = tensors["g_idx"]
        if g_idx.min() < 0 or g_idx.max() >= self.groups:
            raise ValueError(
                f"MPQ: g_idx runs from {g_idx.min()} to {g_idx.max()}; wanted 0 to {self.groups - 1}"
            )

    def decode(self, tensors: dict[str, np.ndarray]) -> Canonical:
        """The canonical form of checked tensors. Raises ValueError as check does, and for ragged groups."""
        self.check(tensors)
        b, K = self.w_bit, self.in_channels
        order, owner, size = grouping(tensors["g_idx"])
        scales, zeros = self.scales_and_zeros(tensors)
        biases = -(zeros * scales) if self.asym else -zeros
        words = np.ascontiguousarray(tensors["qweight"].T).view(np.uint32)
        if order is not None:
            words = pack(unpack(words, b, K)[:, order], b)
        packed = Packed(
            words,
            np.ascontiguousarray(scales[owner].T),
            np.ascontiguousarray(biases[owner].T),
            Format(b, size),
        )
        return Canonical(packed.validate(), order, owner)

    def scales_and_zeros(self, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros as float32 (G, N); zeros are integers where the layout is asymmetric."""
        G, N, D = self.groups, self.out_channels, self.dq_group_size

        def column(name: str) -> np.ndarray:
            """A statistic of blocks of outputs as one of each output: (G or 1, N)."""
            t = tensors[name].astype(np.float32)[..., 0]
            return t if t.shape[1] == N else np.repeat(t, D, axis=1)

        if not self.double_quantized:
            scales = tensors["scales"].astype(np.float32)
        else:
            codes = tensors["qscales"] if self.asym else tensors["qstatistic"] >> 4
            codes = codes.reshape(G, N).astype(np.float32)
            scales = (codes - column("qscales_zeros")) * column("qscales_scales")
        if self.asym:
            zeros = unpack(tensors["qzeros"].view(np.uint32), self.w_bit, N).astype(np.float32)
            zeros += self.smallest_zero
        elif self.double_quantized:
            codes = (tensors["qstatistic"] & 15).reshape(G, N).astype(np.float32)
            zeros = (codes - column("qzeros_zeros")) * column("qzeros_scales")
        else:
            zeros = tensors["zeros"].astype(np.float32)
        return scales, zeros

    @property
    def smallest_zero(self) -> int:
        """The integer zero that is stored as 0."""
        return 1 if self.gptq_version == 1 else 0

    def encode_qweight(self, words: np.ndarray, order: np.ndarray | None) -> np.ndarray:
        """qweight, int32 (K / p, N), of canonical words uint32 (N, K / p): the reverse of decode."""
        if order is not None:
            codes = unpack(words, self.w_bit, self.in_channels)
            back = np.empty_like(codes)
            back[:, order] = codes
            words = pack(back, self.w_bit)
        return np.ascontiguousarray(words.view(np.int32).T)

    def encode_qzeros(self, zeros: np.ndarray) -> np.ndarray:
        """qzeros, int32 (G, N / p), of integer zeros (G, N). Raises ValueError for one that has no code."""
        codes = zeros - self.smallest_zero
        if codes.min() < 0 or codes.max() >= 1 << self.w_bit:
            raise ValueError(
                f"MPQ: integer zeros run from {zeros.min():g} to {zeros.max():g}; {self.w_bit} bits hold "
                f"{self.smallest_zero} to {self.smallest_zero + (1 << self.w_bit) - 1}"
            )
        return pack(codes.astype(np.uint8), self.w_bit).view(np.int32)

    def with_zeros(self, tensors, scales, biases, owner) -> tuple[Layout, dict[str, np.ndarray]]:
        """The layout and tensors, qweight aside, that hold trained zeros: those of a canonical triple.

        tensors   the checkpoint's     scales, biases, owner   the triple's, numpy

        Integer zeros are rounded to nearest. Double-quantized zeros become plain, and so do their scales.
        """
        first = np.unique(owner, return_index=True)[1]
        scales, zeros = scales[:, first].T, -biases[:, first].T
        tensors = {name: t for name, t in tensors.items() if name != "qweight"}
        if self.asym:
            steps = np.rint(np.divide(zeros, scales, out=np.ones_like(zeros), where=scales != 0))
            return self, tensors | {"qzeros": self.encode_qzeros(steps)}
        layout = self.plain()
        if self.double_quantized:
            tensors = {name: t for name, t in tensors.items() if name in layout.shapes}
            tensors["scales"] = np.ascontiguousarray(scales)
        dtype = tensors["zeros"].dtype if "zeros" in tensors else np.float32
        return layout, tensors | {"zeros": np.ascontiguousarray(zeros).astype(dtype)}


@dataclass(frozen=True)
class Canonical:
    """A layer ready for mlxq.ops: y = qmm(x[..., order], packed).

    packed   words uint32 (N, K / p), scales and biases float32 (N, K / size), numpy
    order    int64 (K,) or None: column i of packed is row order[i] of the checkpoint's W
    owner    int64 (K / size,): which of the checkpoint's groups each of packed's groups belongs to
    """

    packed: Packed
    order: np.ndarray | None
    owner: np.ndarray


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized layer of a checkpoint, as its files hold it.

    path      of the module                        tensors   numpy, those of layout.shapes
    dtype     "float16", ... of scales and zeros   bias      (N,) or None

    bfloat16 tensors come as float32 of the same values.
    """

    path: str
    layout: Layout
    dtype: str
    tensors: dict[str, np.ndarray]
    bias: np.ndarray | None

    def canonical(self) -> Canonical:
        """The canonical form. Raises ValueError for tensors that disagree with the layout."""
        return self.layout.decode(self.tensors)


def grouping(g_idx: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, int]:
    """(order, owner, group size) that make the groups of g_idx contiguous and of a size that MLX has.

    order is None where they are so already. Raises ValueError when no size fits: a group whose number of rows
    is not a multiple of 32.
    """
    counts = np.bincount(g_idx)
    fits = [size for size in GROUP_SIZES if not (counts % size).any()]
    if not fits:
        ragged = int(np.argmax(counts % 32 != 0))
        raise ValueError(
            f"MPQ: g_idx puts {counts[ragged]} rows into group {ragged}; wanted a multiple of 32 in each"
        )
    order = np.argsort(g_idx, kind="stable")
    owner = g_idx[order][:: fits[-1]].astype(np.int64)
    return (None if (order == np.arange(len(order))).all() else order), owner, fits[-1]


def layout_of(packed: Packed) -> Layout:
    """The GBA layout with plain float zeros that holds a canonical triple as it is."""
    return Layout(packed.K, packed.N, packed.format.bits, packed.format.group_size, dq_mode=0)
