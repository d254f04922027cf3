"""mx.array operations on the compiled primitive, and on stock MLX where there is none.

The extension serves 2, 4 and 8 bits. Other widths go to stock MLX, and so does every call when the extension
cannot be loaded (said once, as a warning): in float32 on the CPU, where stock MLX sums in x's dtype, and in
x's dtype on a GPU, where it sums in float32. Products that stock MLX answers faster on this machine, as the
tuning file says (mlxq.ops.tuning), go there directly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import re
import threading
import warnings

import mlx.core as mx
import numpy as np

from mlxq import __version__, bridge, format
from mlxq.ops import tuning


def _declared_mlx() -> str | None:
    """The version of mlx that the installed mlxq asks for; None where it is not installed as a package."""
    try:
        declared = importlib.metadata.requires("mlxq") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"mlx(?:\[\w+\])?==([\d.]+)", line) for line in declared)
    return next((match[1] for match in found if match), None)


def _built_for(version: str) -> str:
    return (
        f"mlxq's compiled kernels were built for mlx {version} and this is mlx {mx.__version__}; "
        f"run: pip install mlx=={version}"
    )


@functools.cache
def _load():
    """(module, None), or (None, why not) in one sentence."""
    try:
        from mlxq import _ext

        _ext.probe(mx.zeros((1,)))
    except ImportError as error:
        wanted = _declared_mlx()
        if wanted not in (None, mx.__version__):  # the loader names a missing symbol, which tells nobody
            return None, _built_for(wanted)
        return None, f"mlxq's compiled kernels could not be loaded ({error}); reinstall mlxq"
    except TypeError:
        return None, _built_for(getattr(_ext, "MLX_VERSION", "?"))
    count = os.environ.get("MLXQ_THREADS", "1")
    if not count.isdecimal() or int(count) == 0:
        raise ValueError(f"MLXQ_THREADS={count} is not a number of threads; wanted 1 or more")
    if isa := os.environ.get("MLXQ_ISA"):
        _ext.set_isa(isa)  # ValueError for a family that this machine lacks: never a silent substitute
    return _ext, None


@functools.cache
def _ext():
    module, error = _load()
    if module is None:
        warnings.warn(f"{error}. Stock MLX operations are used instead.", RuntimeWarning, stacklevel=4)
    return module


def native_available() -> bool:
    """Whether the compiled kernels are in use."""
    return _load()[0] is not None


def native_error() -> str | None:
    """Why the compiled kernels are not in use, in one sentence; None when they are."""
    return _load()[1]


def isa_levels() -> tuple[str, ...]:
    """Names of the CPU kernel families that run here, best last; ("stock",) without the extension."""
    module = _load()[0]
    return tuple(module.isa_levels()) if module else ("stock",)


def cpu_features() -> list[str]:
    """CPU features that the kernels look for and this machine has, as CPU vendors name them."""
    module = _load()[0]
    return list(module.cpu_features()) if module else []


def threads() -> int:
    """How many threads one operation may use: MLXQ_THREADS, or the cores this process may run on."""
    module = _load()[0]
    return module.threads() if module else 1


def metal_status() -> dict | None:
    """What our Metal kernels do for GPU streams; None where MLX has no Metal.

    {"architecture", "generation", "nax": MLX prefills on matrix units, "error": why stock MLX serves or None,
    "kernels": {name: how often dispatched} of those compiled so far}
    """
    module = _load()[0]
    return module.metal_status() if module else None


def kernel_calls() -> dict[str, int]:
    """How often each CPU kernel has run since import."""
    module = _load()[0]
    return dict(module.kernel_calls()) if module else {}


def kernel_for(M, N, K, bits, group_size, x_dtype="float32", scale_dtype="float32", transpose=True) -> str:
    """Name of the CPU kernel that would serve this product, "family:kernel"; "stock" where stock MLX does."""
    module = _load()[0]
    if module is None or bits not in format.KERNEL_BITS:
        return "stock"
    op, fmt = "qmm" if transpose else "qmm_n", format.Format(bits, group_size)
    if x_dtype == scale_dtype and choice("cpu", op, fmt, x_dtype, M, N, K) == "stock":
        return "stock"
    return module.kernel_for(M, N, K, bits, group_size, x_dtype, scale_dtype, transpose)


@contextlib.contextmanager
def forced_isa(name: str):
    """Use no kernel family better than `name` inside the block, as MLXQ_ISA does for a whole run.

    The tuning file is not followed inside. Raises ValueError when this machine has no such family.
    """
    module = _ext()
    if module is None:
        raise ValueError(f"forced_isa: {native_error()}")
    before = module.isa()
    module.set_isa(name)
    try:
        with untuned():
            yield
    finally:
        module.set_isa(before)


def advise_huge_pages(arrays) -> int:
    """Ask the kernel to back evaluated arrays with huge pages; how many bytes it took (0 where it cannot)."""
    module = _load()[0]
    return sum(module.advise_huge_pages(a) for a in arrays) if module else 0


# What of the tuning file a call looks up, None until the first call reads it:
# (op, bits, group_size) -> (rows, size) -> dtype of x and scales -> devices on which stock MLX serves.
_tuned: dict | None = None
_ROWS, _SIZES = tuning.ROWS_BY_BITS, tuning.SIZE_BY_BITS
_reading = threading.Lock()


def machine() -> dict:
    """What the times of a tuning file depend on, as plain strings and numbers."""
    module = _load()[0]
    about = mx.device_info(mx.cpu)
    found = {
        "cpu": f"{about.get('device_name', 'unknown')} {about.get('architecture', '')}".strip(),
        "isa": (module.isa() if module else "") or isa_levels()[-1],
        "threads": threads(),
        "mlx": mx.__version__,
        "mlxq": __version__,
    }
    if mx.metal.is_available() or mx.cuda.is_available():
        about = mx.device_info(mx.gpu)
        found["gpu"] = str(about.get("architecture") or about.get("device_name", "unknown"))
    return found


def _read_tuning() -> dict:
    global _tuned
    with _reading:
        if _tuned is not None:
            return _tuned
        found: dict = {}
        try:
            read = tuning.read(machine())
        except ValueError as error:
            text = f"{error} and is not used. Run: {tuning.COMMAND}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
            read = None
        for c in read.stock() if read else ():
            of_format = found.setdefault((c.op, c.bits, c.group_size), {})
            of_dtype, dtype = of_format.setdefault((c.rows, c.size), {}), getattr(mx, c.dtype)
            of_dtype[dtype] = of_dtype.get(dtype, ()) + (c.device,)
        _tuned = found
    return found


def retune() -> None:
    """Read the tuning file anew at the next call."""
    global _tuned
    _tuned = None


@contextlib.contextmanager
def untuned():
    """Follow no tuning file inside the block."""
    global _tuned
    before, _tuned = _tuned, {}
    try:
        yield
    finally:
        _tuned = before


def choice(device: str, op: str, fmt: format.Format, dtype: str, M: int, N: int, K: int) -> str:
    """ "stock" where stock MLX serves a product by the tuning file or without a kernel, else "mlxq".

    device is "cpu" or "gpu", op one of tuning.OPS, dtype that of x and of the scales, M as in tuning.Class.
    Without a tuning file it is "mlxq" wherever there is a kernel. That is final on the CPU. On a GPU stream
    the primitive then decides by its own table (metal/eval_metal.cpp), which may still choose stock MLX.
    """
    if not native_available() or fmt.bits not in format.KERNEL_BITS:
        return "stock"
    tuned = _tuned if _tuned is not None else _read_tuning()
    kind = tuning.class_of(device, op, fmt, dtype, M, N, K)
    of_dtype = tuned.get((op, fmt.bits, fmt.group_size), {}).get((kind.rows, kind.size), {})
    return "stock" if device in of_dtype.get(getattr(mx, dtype), ()) else "mlxq"


def tuning_status() -> dict:
    """What `mlxq doctor` shows of the tuning file; see mlxq.ops.tuning.status."""
    return tuning.status(machine())


LONGEST = 131071  # K of q8mm: 131071 products of int8 fit an int32


def _parts(w: format.Packed) -> tuple[mx.array, mx.array, mx.array]:
    if type(w.words) is mx.array and type(w.scales) is mx.array and type(w.biases) is mx.array:
        return w.words, w.scales, w.biases  # every call of every layer comes this way
    return bridge.packed_on_mx(w)


def qmm(x: mx.array, w: format.Packed, transpose: bool = True) -> mx.array:
    """x times packed weights; see mlxq.ops.qmm."""
    words, scales, biases = _parts(w)
    bits, group_size = w.format.bits, w.format.group_size
    module = _ext() if bits in format.KERNEL_BITS else None
    if module is not None:
        tuned = _tuned if _tuned is not None else _read_tuning()
        op = "qmm" if transpose else "qmm_n"
        if not (tuned and _stock_serves(tuned, op, x, words, scales, biases, w.format)):
            return module.qmm(x, words, scales, biases, transpose, group_size, bits)
        try:
            return mx.quantized_matmul(x, words, scales, biases, transpose, group_size=group_size, bits=bits)
        except (ValueError, TypeError):
            check("qmm", x, w, transpose)  # raises, in the words of this package
            raise
    check("qmm", x, w, transpose)
    if x.size == 0:  # stock MLX divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.N if transpose else w.K), x.dtype)
    wide = _stock_dtype(x, scales, biases)
    parts = (x.astype(wide), words, scales.astype(wide), biases.astype(wide))
    y = mx.quantized_matmul(*parts, transpose=transpose, group_size=group_size, bits=bits)
    return y.astype(x.dtype)


def gather_qmm(x, w: format.Packed, lhs_indices=None, rhs_indices=None, transpose=True, sorted_indices=False):
    """Blocks of x times chosen experts; see mlxq.ops.gather_qmm."""
    words, scales, biases = _parts(w)
    lhs, rhs = (None if i is None else bridge.to_mx(i) for i in (lhs_indices, rhs_indices))
    bits, group_size = w.format.bits, w.format.group_size
    module = _ext() if bits in format.KERNEL_BITS else None
    if module is not None:
        tuned = _tuned if _tuned is not None else _read_tuning()
        tunable = tuned and transpose and rhs is not None
        if not (tunable and _stock_serves(tuned, "gather_qmm", x, words, scales, biases, w.format, rhs)):
            parts = (x, words, scales, biases, lhs, rhs)
            return module.gather_qmm(*parts, transpose, group_size, bits, sorted_indices)
        settings = {"group_size": group_size, "bits": bits, "sorted_indices": sorted_indices}
        lhs, rhs = _inside(lhs, x), _inside(rhs, words)
        try:
            return mx.gather_qmm(x, words, scales, biases, lhs, rhs, transpose, **settings)
        except (ValueError, TypeError):
            check("gather_qmm", x, w, transpose, lhs_indices, rhs_indices)  # as above
            raise
    check("gather_qmm", x, w, transpose, lhs_indices, rhs_indices)
    if x.size == 0:
        batches = (x.shape[:-2] if lhs is None else lhs.shape, words.shape[:-2] if rhs is None else rhs.shape)
        leading = np.broadcast_shapes(*batches)
        return mx.zeros((*leading, x.shape[-2], w.N if transpose else w.K), x.dtype)
    wide = _stock_dtype(x, scales, biases)
    y = mx.gather_qmm(
        x.astype(wide),
        words,
        scales.astype(wide),
        biases.astype(wide),
        lhs_indices=_inside(lhs, x),
        rhs_indices=_inside(rhs, words),
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        sorted_indices=sorted_indices,
    )
    return y.astype(x.dtype)


def q8_rows(x: mx.array, group_size: int | None = None) -> tuple[mx.array, mx.array]:
    """int8 codes and float32 scales of x's rows, or of groups of these; see mlxq.ops.q8_rows."""
    if (module := _ext()) is not None:
        return module.q8_rows(x, group_size or 0)
    check_rows(x, group_size)
    wide = x.astype(mx.float32)
    if group_size:
        wide = wide.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    peak = mx.max(mx.abs(wide), axis=-1, keepdims=True)
    scales = mx.where(peak == 0, mx.array(1.0), peak / mx.array(127.0))
    codes = mx.clip(mx.round(wide / scales), -127, 127).astype(mx.int8)
    return codes.reshape(x.shape), scales.squeeze(-1)


def q8mm(x_codes, x_scales, w: format.Packed, per_row: bool, dtype: str) -> mx.array:
    """int8 codes times packed weights; see mlxq.ops.q8mm."""
    words, scales, biases = _parts(w)
    x_scales = bridge.to_mx(x_scales)
    bits, group_size = w.format.bits, w.format.group_size
    if (module := _ext()) is not None:
        return module.q8mm(x_codes, x_scales, words, scales, biases, group_size, bits, per_row, dtype)
    check_q8mm(x_codes, x_scales, w, per_row, dtype)
    w = format.Packed(words, scales, biases, w.format)
    if x_scales.size != 1 and x_scales.ndim == x_codes.ndim:
        tiles = x_codes.astype(mx.float32).reshape(*x_scales.shape, group_size) * x_scales[..., None]
        return qmm(tiles.reshape(x_codes.shape), w).astype(getattr(mx, dtype))
    y = qmm(x_codes.astype(mx.float32), w)
    return (y * (x_scales[..., None] if x_scales.size != 1 else x_scales.reshape(()))).astype(
        getattr(mx, dtype)
    )


def q8_linear(x: mx.array, w: format.Packed, per_row: bool, group_size: int | None, dtype: str):
    """q8mm of the codes and scales that q8_rows gives x, to the bit; None where one primitive does not serve.

    One does on MLX's CPU with our kernels; its gradient for x is that of the unrounded x. Raises as q8_rows
    and q8mm.
    """
    module = _ext()
    if (
        module is None
        or mx.default_device() != mx.Device(mx.cpu)
        or group_size not in (None, w.format.group_size)
    ):
        return None
    fmt, tiled = w.format, group_size is not None
    return module.q8_linear(x, w.words, w.scales, w.biases, fmt.group_size, fmt.bits, per_row, tiled, dtype)


def check_rows(x, group_size: int | None = None) -> None:
    """The argument checks of q8_rows, for the paths that do not reach the primitive."""
    if format.dtype_name(x) not in format.STORAGE:
        raise TypeError(f"q8_rows: x is {format.dtype_name(x)}; wanted float32, float16 or bfloat16")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"q8_rows: x has shape {tuple(x.shape)}; wanted (..., K), K at least 1")
    if group_size and group_size not in format.GROUP_SIZES:
        raise ValueError(f"q8_rows: group_size is {group_size}; wanted 32, 64 or 128")
    if group_size and x.shape[-1] % group_size:
        raise ValueError(
            f"q8_rows: x has shape {tuple(x.shape)}, whose rows are no multiple of group_size={group_size}"
        )


def check_q8mm(x_codes, x_scales, w: format.Packed, per_row: bool, dtype: str) -> None:
    """The argument checks of q8mm, for the paths that do not reach the primitive."""
    w.validate()
    if w.format.bits not in format.KERNEL_BITS or len(w.shape) != 2:
        raise ValueError(f"q8mm: weights are {w.format} of shape {w.shape}; wanted 2, 4 or 8 bits and (N, K)")
    for what, given, wanted in (("x_codes", x_codes, "int8"), ("x_scales", x_scales, "float32")):
        if format.dtype_name(given) != wanted:
            raise TypeError(f"q8mm: {what} are {format.dtype_name(given)}; wanted {wanted}")
    if dtype not in format.STORAGE:
        raise ValueError(f"q8mm: dtype is {dtype}; wanted {', '.join(format.STORAGE)}")
    if x_codes.ndim < 1 or x_codes.shape[-1] != w.K:
        raise ValueError(f"q8mm: x_codes have shape {tuple(x_codes.shape)} but w holds K={w.K}")
    if w.K > LONGEST:
        raise ValueError(f"q8mm: K={w.K} int8 products may not fit an int32; at most {LONGEST}")
    rows, shape = tuple(x_codes.shape[:-1]), tuple(x_scales.shape)
    one = np.prod(shape) == 1
    tiled = not one and shape == (*rows, w.format.groups(w.K))
    if not one and shape != rows and not tiled:
        raise ValueError(
            f"q8mm: x_scales have shape {shape}; wanted one number, or one for each row of x of shape "
            f"{tuple(x_codes.shape)}, or for each {w.format.group_size} codes of a row"
        )
    if tiled and per_row:
        raise ValueError(
            f"q8mm: x_scales have shape {shape}, one for each group, and per_row sums whole rows; wanted "
            "per_row=False, or one scale for each row"
        )


def _inside(indices: mx.array | None, of: mx.array) -> mx.array | None:
    """Integer indices into the flattened leading axes of `of`, the last for what is outside.

    Stock MLX reads whatever memory an index leads to; as unsigned numbers, negative ones are too large.
    """
    if indices is None or not mx.issubdtype(indices.dtype, mx.integer):
        return indices
    return mx.minimum(indices.astype(mx.uint32), max(math.prod(of.shape[:-2]), 1) - 1)


def _stock_serves(tuned, op, x, words, scales, biases, fmt: format.Format, experts=None) -> bool:
    """Whether the tuning file gives this product to stock MLX; experts: gather_qmm's rhs_indices.

    Never while MLX traces a transformation: stock's products have no vmap, and no jvp of scales or experts.
    """
    bits = fmt.bits
    of_format = tuned.get((op, bits, fmt.group_size))
    if of_format is None:
        return False
    shape, size = x.shape, x.size
    if not shape or not size:
        return False
    if experts is None:
        M, weights = size // shape[-1], words.size * 32 // bits
    else:
        of_words = words.shape
        if len(shape) < 2 or len(of_words) < 3 or not experts.size:
            return False
        M, weights = experts.size * shape[-2], of_words[-2] * of_words[-1] * 32 // bits
    of_dtype = of_format.get((_ROWS[(M - 1).bit_length()], _SIZES[weights.bit_length()]))
    if of_dtype is None or (experts is None and words.ndim != 2):
        return False
    dtype = x.dtype
    if scales.dtype != dtype or biases.dtype != dtype:
        return False
    if ("gpu" if mx.default_device() == mx.gpu else "cpu") not in of_dtype.get(dtype, ()):
        return False
    return not _ext().traced(x, words, scales, biases)


def _stock_dtype(x, scales, biases) -> mx.Dtype:
    """In which dtype stock MLX computes for us: its sums are in float32 on a GPU, in x's dtype on the CPU."""
    same = x.dtype == scales.dtype == biases.dtype
    return x.dtype if same and mx.default_device() == mx.gpu else mx.float32


def check(op: str, x, w: format.Packed, transpose: bool, *indices) -> None:
    """The argument checks of the compiled primitive, in its words, for the paths that do not reach it.

    Arrays of any framework; indices, each maybe None, belong to op "gather_qmm".
    """
    if format.dtype_name(x) not in format.STORAGE:
        raise TypeError(f"{op}: x is {format.dtype_name(x)}; wanted float32, float16 or bfloat16")
    w.validate()
    experts = op == "gather_qmm"
    if not experts and len(w.shape) != 2:
        raise ValueError(f"{op}: words have shape {tuple(w.words.shape)}; wanted (N, K * bits / 32)")
    inner, name = (w.K, "K") if transpose else (w.N, "N")
    if x.ndim < (2 if experts else 1):
        wanted = f"(..., {'M, ' if experts else ''}{name}={inner})"
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; wanted {wanted}")
    if x.shape[-1] != inner:
        raise ValueError(f"{op}: x has {name}={x.shape[-1]} but w holds {name}={inner}")
    for what, given in zip(("lhs_indices", "rhs_indices"), indices, strict=False):
        if given is not None and "int" not in format.dtype_name(given):
            raise TypeError(f"{op}: {what} are {format.dtype_name(given)}; wanted integers")


def quantize(w, fmt: format.Format, rule: str, scale_dtype: str) -> format.Packed | None:
    """Packed weights through the compiled quantizer; None when it does not serve or refuses them.

    An mx.array on a Metal GPU is quantized there.
    """
    name = format.dtype_name(w)
    module = _ext() if rule == "affine" and name in format.STORAGE and w.ndim > 1 else None
    if module is None:
        return None
    if bridge.kind(w) == "mlx" and fmt.bits in format.KERNEL_BITS:
        made = module.quantize_on_gpu(w, fmt.group_size, fmt.bits, scale_dtype)
        if made is not None:
            *parts, refused = made
            return None if any(refused.tolist()) else format.Packed(*parts, fmt)
    bits_of_w = bridge.host_bits(w)
    if bits_of_w.size == 0:
        return None  # -1 would stand for any size below
    rows = bits_of_w.reshape(-1, bits_of_w.shape[-1])
    parts = module.quantize(rows, name, fmt.bits, fmt.group_size, scale_dtype)
    if parts is None:
        return None  # NaN, overflow or a wrong shape: the plain path says which
    words, scales, biases = (a.reshape(*bits_of_w.shape[:-1], -1) for a in parts)
    return format.Packed(
        bridge.like(words, w),
        bridge.from_host_bits(scales, w, scale_dtype),
        bridge.from_host_bits(biases, w, scale_dtype),
        fmt,
    )


def dequantize(packed: format.Packed, dtype: str) -> mx.array:
    """scale * code + bias in float32, then cast to dtype."""
    words, scales, biases = _parts(packed)
    if words.size == 0:  # stock MLX cannot reshape an empty array
        return mx.zeros(packed.shape, getattr(mx, dtype))
    module = _ext() if packed.format.bits in format.KERNEL_BITS else None
    if module is not None and not module.traced(words, words, scales, biases):  # ours has no gradient
        settings = (packed.format.group_size, packed.format.bits, dtype)
        if (made := module.dequantize_on_gpu(words, scales, biases, *settings)) is not None:
            return made
    out = mx.dequantize(
        words,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=packed.format.group_size,
        bits=packed.format.bits,
    )
    return out.astype(getattr(mx, dtype))
