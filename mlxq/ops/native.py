"""mx.array operations on the compiled primitive, and on stock MLX where there is none.

The extension serves 2, 4 and 8 bits on CPU streams. Everything else goes to stock MLX in float32: other
widths, GPU streams, and every call when the extension cannot be loaded (said once, as a warning).
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings

import mlx.core as mx
import numpy as np

from mlxq import bridge, format


@functools.cache
def _load():
    """(module, None), or (None, why not) in one sentence."""
    try:
        from mlxq import _ext

        _ext.probe(mx.zeros((1,)))
    except ImportError as error:
        return None, f"mlxq's compiled kernels could not be loaded ({error}); reinstall mlxq"
    except TypeError:
        built = getattr(_ext, "MLX_VERSION", "?")
        return None, (
            f"mlxq's compiled kernels were built for mlx {built} and this is mlx {mx.__version__}; "
            f"run: pip install mlx=={built}"
        )
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


def kernel_calls() -> dict[str, int]:
    """How often each CPU kernel has run since import."""
    module = _load()[0]
    return dict(module.kernel_calls()) if module else {}


def kernel_for(M, N, K, bits, group_size, x_dtype="float32", scale_dtype="float32", transpose=True) -> str:
    """Name of the CPU kernel that would serve this product, "family:kernel"; "stock" where stock MLX does."""
    module = _load()[0]
    if module is None or bits not in format.KERNEL_BITS:
        return "stock"
    return module.kernel_for(M, N, K, bits, group_size, x_dtype, scale_dtype, transpose)


@contextlib.contextmanager
def forced_isa(name: str):
    """Use no kernel family better than `name` inside the block, as MLXQ_ISA does for a whole run.

    Raises ValueError when this machine has no such family.
    """
    module = _ext()
    if module is None:
        raise ValueError(f"forced_isa: {native_error()}")
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def advise_huge_pages(arrays) -> int:
    """Ask the kernel to back evaluated arrays with huge pages; how many bytes it took (0 where it cannot)."""
    module = _load()[0]
    return sum(module.advise_huge_pages(a) for a in arrays) if module else 0


def _parts(w: format.Packed) -> tuple[mx.array, mx.array, mx.array]:
    if type(w.words) is mx.array and type(w.scales) is mx.array and type(w.biases) is mx.array:
        return w.words, w.scales, w.biases  # every call of every layer comes this way
    return bridge.to_mx(w.words), bridge.to_mx(w.scales), bridge.to_mx(w.biases)


def qmm(x: mx.array, w: format.Packed, transpose: bool = True) -> mx.array:
    """x times packed weights; see mlxq.ops.qmm."""
    words, scales, biases = _parts(w)
    bits, group_size = w.format.bits, w.format.group_size
    module = _ext() if bits in format.KERNEL_BITS else None
    if module is not None:
        return module.qmm(x, words, scales, biases, transpose, group_size, bits)
    check("qmm", x, w, transpose)
    if x.size == 0:  # stock MLX divides by the number of rows
        return mx.zeros((*x.shape[:-1], w.N if transpose else w.K), x.dtype)
    y = mx.quantized_matmul(
        x.astype(mx.float32),
        words,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        transpose=transpose,
        group_size=group_size,
        bits=bits,
    )
    return y.astype(x.dtype)


def gather_qmm(x, w: format.Packed, lhs_indices=None, rhs_indices=None, transpose=True, sorted_indices=False):
    """Blocks of x times chosen experts; see mlxq.ops.gather_qmm."""
    words, scales, biases = _parts(w)
    lhs, rhs = (None if i is None else bridge.to_mx(i) for i in (lhs_indices, rhs_indices))
    bits, group_size = w.format.bits, w.format.group_size
    module = _ext() if bits in format.KERNEL_BITS else None
    if module is not None:
        parts = (x, words, scales, biases, lhs, rhs)
        return module.gather_qmm(*parts, transpose, group_size, bits, sorted_indices)
    check("gather_qmm", x, w, transpose, lhs_indices, rhs_indices)
    if x.size == 0:
        batches = (x.shape[:-2] if lhs is None else lhs.shape, words.shape[:-2] if rhs is None else rhs.shape)
        leading = np.broadcast_shapes(*batches)
        return mx.zeros((*leading, x.shape[-2], w.N if transpose else w.K), x.dtype)
    y = mx.gather_qmm(
        x.astype(mx.float32),
        words,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        lhs_indices=lhs,
        rhs_indices=rhs,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        sorted_indices=sorted_indices,
    )
    return y.astype(x.dtype)


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
    """Packed weights through the compiled quantizer; None when it does not serve or refuses them."""
    name = format.dtype_name(w)
    module = _ext() if rule == "affine" and name in format.STORAGE and w.ndim > 1 else None
    if module is None:
        return None
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
    out = mx.dequantize(
        words,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=packed.format.group_size,
        bits=packed.format.bits,
    )
    return out.astype(getattr(mx, dtype))
