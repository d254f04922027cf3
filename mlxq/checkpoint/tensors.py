"""Tensors that are read a few rows at a time: floats in files, integer codes, stacks of either.

Every tensor has `shape`, and its rows are all leading axes flattened. `read(start, stop)` gives rows as
float32, `packs_into(fmt)` tells whether a format holds the codes as they are, and `read_packed(start, stop,
fmt)` gives them so; `release()` drops what is held. Nothing is held but maps of files, except by ArrayTensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxq.checkpoint.safetensors import Entry
from mlxq.format import BITS, GROUP_SIZES, Format, Packed, dtype_name, pack, unpack

_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8, "U16": np.uint16, "I16": np.int16, "F16": np.float16, "BF16": np.uint16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64,
    "F64": np.float64, "C64": np.complex64,
}  # fmt: skip
_NAMES = {"F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0", "BF16": "bfloat16"}


def _float8(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The 256 values of an 8-bit float with one sign bit, its not-a-numbers still numbers."""
    byte = np.arange(256)
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    size = np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias))
    return np.where(byte < 128, size, -size).astype(np.float32)


E4M3 = _float8(4, 3)
E4M3[[0x7F, 0xFF]] = np.nan  # the only two; it has no infinities
E5M2 = _float8(5, 2)
E5M2[[0x7C, 0xFC]] = np.inf, -np.inf
E5M2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
with np.errstate(over="ignore"):
    E8M0 = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
E8M0[255] = np.nan
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
_FLOAT8 = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}


class Tensor:
    """What all tensors share: a float tensor without codes unless a subclass says otherwise.

    source_bits   bits of a weight where it lies, None for floats
    repacks_to    the format nearest to the source's own that holds its codes exactly, None when there is none
    requantized   why codes cannot be taken over, None for floats and for codes that can
    mx_mode       MLX's mode that holds the codes as they are, with read_mx to give them; None: none does
    """

    source_bits: float | None = None
    repacks_to: Format | None = None
    is_quantized = False
    requantized: str | None = None
    mx_mode: str | None = None
    shape: tuple[int, ...]
    dtype: str

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def K(self) -> int:
        return self.shape[-1] if self.shape else 1

    def packs_into(self, fmt: Format) -> bool:
        """Whether the format holds the codes, scales and biases as they are (before scales are rounded)."""
        return False

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop what is held."""


class FileTensor(Tensor):
    """A tensor of a safetensors file, mapped and not read.

    order   row (element, of a vector) of the file for each row that is given; None when they are the same
    """

    order: np.ndarray | None = None

    def __init__(self, mapped: np.ndarray, entry: Entry):
        self.entry, self.shape = entry, entry.shape
        self.values = mapped[entry.begin : entry.end].view(_NUMPY[entry.dtype]).reshape(-1, self.K)

    @property
    def dtype(self) -> str:
        return _NAMES.get(self.entry.dtype) or np.dtype(_NUMPY[self.entry.dtype]).name

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        return self.as_float(self.read_raw(start, stop))

    def as_float(self, raw: np.ndarray) -> np.ndarray:
        """Raw values of this tensor's dtype as float32."""
        if self.entry.dtype == "BF16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if self.entry.dtype in _FLOAT8:
            return _FLOAT8[self.entry.dtype][raw]
        with np.errstate(over="ignore"):
            return raw.astype(np.float32)

    def read_raw(self, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the file; bfloat16 and 8-bit floats as integers."""
        if self.order is None:
            return self.values[start:stop]
        return (
            self.values[start:stop, self.order]
            if len(self.shape) == 1
            else self.values[self.order[start:stop]]
        )

    @property
    def whole(self) -> np.ndarray:
        """All values as they lie in the file, in the tensor's shape."""
        return self.values.reshape(self.shape)

    def floats(self) -> np.ndarray:
        """All values as float32, in the tensor's shape; for small tensors."""
        return self.as_float(self.values).reshape(self.shape)


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped."""
    return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)


class ArrayTensor(Tensor):
    """A lazy mx.array: evaluated whole when its first row is read, freed by release()."""

    def __init__(self, array: mx.array):
        self.array = array
        self.shape = tuple(array.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.array)

    def _rows(self, start: int, stop: int) -> mx.array:
        return self.array.reshape(-1, self.K)[start:stop]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        mx.eval(self.array)
        return np.array(self._rows(start, stop).astype(mx.float32), copy=False)

    def read_raw(self, start: int, stop: int) -> np.ndarray:
        """Rows in their own dtype, for integers and booleans."""
        mx.eval(self.array)
        return np.array(self._rows(start, stop), copy=False)

    def release(self) -> None:
        """Drop the values."""
        self.array = None
        mx.clear_cache()  # Metal's allocator keeps freed buffers otherwise


def repack(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, group: int, fmt: Format) -> Packed:
    """Codes in another format that holds them: equal or more bits, groups that divide the source's.

    codes           uint8    (rows, K)
    scales, biases  float32  (rows, ceil(K / group))    the last group may be short

    The caller has asked whether it fits (CodesTensor.packs_into).
    """
    groups = fmt.groups(codes.shape[-1])
    if scales.shape[-1] != groups or group != fmt.group_size:
        of = np.arange(groups) * fmt.group_size // group
        scales, biases = scales[:, of], biases[:, of]
    return Packed(pack(codes, fmt.bits), scales, biases, fmt)


def nearest_format(bits: int, group: int, K: int) -> Format | None:
    """The narrowest format with the longest groups that holds codes of `bits` in groups of `group`."""
    width = next((b for b in BITS if b >= bits), None)
    sizes = [g for g in GROUP_SIZES if group % g == 0 and K % g == 0 or group >= K and K % g == 0]
    return Format(width, sizes[-1]) if width and sizes else None


class CodesTensor(Tensor):
    """Integer codes with a scale and a bias per group: W = scale * code + bias.

    A subclass sets shape, bits and group (K or more: one group a row), and gives codes(rows), uint8 (n, K),
    and scales_and_biases(rows), float32 (n, groups); rows is a slice or an array of row numbers.

    group_of   int64 (K,), the group of each column; None when column k is in group k // group
    order      row of the source for each row that is given, None when they are the same
    columns    the same for columns; what codes gives is in the source's order
    """

    bits: int
    group: int
    dtype = "float32"
    is_quantized = True
    group_of: np.ndarray | None = None
    order: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def source_bits(self) -> float:
        return self.bits

    @property
    def requantized(self) -> str | None:
        if self.group_of is not None:
            return "its columns are in act-order, which no MLX format holds"
        if self.repacks_to is None:
            return f"no MLX format holds groups of {self.group} in rows of {self.K}"
        return None

    @property
    def repacks_to(self) -> Format | None:
        return None if self.group_of is not None else nearest_format(self.bits, self.group, self.K)

    def packs_into(self, fmt: Format) -> bool:
        if self.group_of is not None or fmt.bits < self.bits or self.K % fmt.group_size:
            return False
        return self.group % fmt.group_size == 0 or self.group >= self.K

    def codes(self, rows) -> np.ndarray:
        """uint8 (n, K)."""
        raise NotImplementedError

    def scales_and_biases(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """float32 (n, groups) each."""
        raise NotImplementedError

    def _rows(self, start: int, stop: int):
        return slice(start, stop) if self.order is None else self.order[start:stop]

    def _ordered_codes(self, rows) -> np.ndarray:
        codes = self.codes(rows)
        return codes if self.columns is None else codes[:, self.columns]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        rows = self._rows(start, stop)
        scales, biases = self.scales_and_biases(rows)
        of = self.group_of if self.group_of is not None else np.arange(self.K) // self.group
        values = self._ordered_codes(rows).astype(np.float32)
        values *= scales[:, of]
        values += biases[:, of]
        return values

    def read_packed(self, start: int, stop: int, fmt: Format | None = None) -> Packed:
        """Rows as they are, in a format that holds them (default: repacks_to), with float32 scales."""
        rows = self._rows(start, stop)
        return repack(
            self._ordered_codes(rows), *self.scales_and_biases(rows), self.group, fmt or self.repacks_to
        )

    def sort_columns(self) -> np.ndarray | None:
        """Put the columns in the order of their groups; the order, or None when groups differ in size.

        The product stays the same when the rows of the layers in front are put in that order too.
        """
        order = np.argsort(self.group_of, kind="stable")
        if not np.array_equal(self.group_of[order], np.arange(self.K) // self.group):
            return None
        self.columns, self.group_of = order, None
        return order

    def largest_scale(self) -> float:
        """The largest |scale| or |bias|; NaN or Inf when the source has such a scale."""
        groups = -(-self.K // self.group)
        largest, height = [0.0], max(1, (1 << 16) // groups)
        for start in range(0, self.rows, height):
            pair = self.scales_and_biases(slice(start, min(self.rows, start + height)))
            largest += [float(np.abs(part).max()) for part in pair]  # max keeps NaN
        return float(np.max(largest))


class StackedTensor(Tensor):
    """Equal tensors as one with a new first axis: the experts of a layer."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = list(parts)
        self.shape = (len(self.parts), *self.parts[0].shape)
        self.dtype = self.parts[0].dtype
        self.source_bits = self.parts[0].source_bits
        self.is_quantized = any(part.is_quantized for part in self.parts)
        self.requantized = next((part.requantized for part in self.parts if part.requantized), None)
        formats = {part.repacks_to for part in self.parts}
        self.repacks_to = formats.pop() if len(formats) == 1 else None
        modes = {part.mx_mode for part in self.parts}
        self.mx_mode = modes.pop() if len(modes) == 1 else None

    def packs_into(self, fmt: Format) -> bool:
        return all(part.packs_into(fmt) for part in self.parts)

    def _pieces(self, start: int, stop: int):
        height = max(1, self.rows // len(self.parts))
        for number in range(start // height, -(-stop // height)):
            first = number * height
            yield self.parts[number], max(start - first, 0), min(stop - first, height)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        return np.concatenate(
            [part.read(a, b).reshape(b - a, -1) for part, a, b in self._pieces(start, stop)]
        )

    def read_raw(self, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the file."""
        return np.concatenate([part.read_raw(a, b) for part, a, b in self._pieces(start, stop)])

    def read_packed(self, start: int, stop: int, fmt: Format) -> Packed:
        """Rows as they are, in a format that holds them; scales and biases are float32."""
        pieces = [part.read_packed(a, b, fmt) for part, a, b in self._pieces(start, stop)]
        words, scales, biases = (
            np.concatenate([getattr(piece, name) for piece in pieces])
            for name in ("words", "scales", "biases")
        )
        return Packed(words, scales, biases, fmt)

    def read_mx(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as MLX stores them in mx_mode: words and scales."""
        pieces = [part.read_mx(a, b) for part, a, b in self._pieces(start, stop)]
        return tuple(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))

    def largest_scale(self) -> float:
        """The largest |scale| or |bias| of all parts."""
        return float(np.max([part.largest_scale() for part in self.parts]))

    def release(self) -> None:
        """Drop what the parts hold."""
        for part in self.parts:
            part.release()


class FloatCodes(Tensor):
    """Codes of a small float type with one scale for each block: W = table[code] * scale.

    codes      uint8 (N, K), or (N, K / 2) with the lower column in the low nibble, for tables of 16
    scales     float32 (ceil(N / row_block), ceil(K / group)), held: a hundredth of the codes' size or less
    """

    dtype = "float32"
    is_quantized = True

    def __init__(self, codes: np.ndarray, table: np.ndarray, scales: np.ndarray, row_block: int, group: int):
        self.data, self.table, self.scales = codes, table, scales
        self.row_block, self.group = row_block, group
        self.source_bits = 4 if len(table) == 16 else 8
        self.shape = (codes.shape[0], codes.shape[1] * (2 if len(table) == 16 else 1))
        self.requantized = f"its codes are {self.source_bits}-bit floats, and MLX's format has integers"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        codes = np.asarray(self.data[start:stop])
        if len(self.table) == 16:
            codes = np.stack([codes & np.uint8(15), codes >> 4], axis=-1).reshape(len(codes), -1)
        values = self.table[codes]
        rows, columns = np.arange(start, stop) // self.row_block, np.arange(self.K) // self.group
        values *= self.scales[rows][:, columns]
        return values


class MxCodes(Tensor):
    """4-bit floats with an exponent of two for 32 columns, the bytes of MLX's mode mxfp4: (..., N, K).

    codes      uint8  (..., N, K / 2)     e2m1, the lower column in the low nibble
    exponents  uint8  (..., N, K / 32)    127 more than the power of two; 255 is not a number
    """

    dtype = "float32"
    is_quantized = True
    source_bits = 4
    mx_mode = "mxfp4"
    requantized = "its codes are 4-bit floats, and the wanted format has integers"

    def __init__(self, codes: np.ndarray, exponents: np.ndarray):
        self.data, self.exponents = codes, exponents
        self.shape = (*codes.shape[:-1], 2 * codes.shape[-1])

    def packs_into(self, fmt) -> bool:
        return getattr(fmt, "mode", None) == self.mx_mode

    def read_mx(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows as MLX stores them: words uint32 (n, K / 8), exponents uint8 (n, K / 32)."""
        # rows by number, because half of a tensor's rows are no run of memory to be reshaped
        at = np.unravel_index(np.arange(start, stop), self.shape[:-1])
        return np.ascontiguousarray(self.data[at]).view(np.uint32), np.ascontiguousarray(self.exponents[at])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as float32, (stop - start, K)."""
        words, exponents = self.read_mx(start, stop)
        codes = words.view(np.uint8)
        values = E2M1[np.stack([codes & np.uint8(15), codes >> 4], axis=-1)].reshape(len(codes), -1, 32)
        values *= E8M0[exponents][..., None]
        return values.reshape(len(codes), -1)

    def largest_scale(self) -> float:
        """The largest scale; NaN when the source has such a scale."""
        return float(E8M0[self.exponents.max(initial=0)])


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes, uint8, of each row of 32-bit words: one bit stream, low bits first."""
    words = np.ascontiguousarray(words).view(np.uint32)
    padded = -(-count // 32) * 32
    missing = padded * bits // 32 - words.shape[-1]
    if missing > 0:
        words = np.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, missing)])
    return unpack(words[..., : padded * bits // 32], bits, padded)[..., :count]


def expect(
    tensors: dict[str, Tensor], name: str, dtypes: Sequence[str], shape: Sequence[int | None]
) -> FileTensor:
    """The tensor of that name. Raises ValueError unless it is there with one of the dtypes and the shape.

    shape   None for an axis of any length
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"tensors are missing: {name}")
    fits = len(tensor.shape) == len(shape) and all(
        w in (None, n) for n, w in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}; wanted {' or '.join(dtypes)} ({wanted})")
    return tensor


def setting(settings: dict, name: str, allowed: Sequence, default=None):
    """A value of a quantization block. Raises ValueError unless it is one of `allowed`."""
    value = settings.get(name, default)
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        listed = ", ".join(map(str, allowed[:12]))
        raise ValueError(f"config.json's quantization says {name}: {value!r}; built: {listed}")
    return value


FLOATS = ("float32", "float16", "bfloat16")
