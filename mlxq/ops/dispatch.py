"""Which implementation serves which array.

mx.array -> native; numpy -> reference (quantizer: format); torch and cupy on an NVIDIA GPU -> cuda;
torch elsewhere -> native, through the bridge.
"""

from __future__ import annotations

import functools

import numpy as np

from mlxq import bridge, format
from mlxq.ops import native, reference


def _on_gpu(array) -> bool:
    """Whether ops.cuda serves the array: torch on an NVIDIA GPU, or cupy."""
    which = bridge.kind(array)
    return which == "cupy" or (which == "torch" and array.is_cuda)


@functools.cache
def _cuda():
    """ops.cuda, imported when an array of a GPU first comes."""
    from mlxq.ops import cuda

    return cuda


def _on_mx(op: str, x, w: format.Packed):
    """A torch tensor as an mx.array, to meet w.

    Raises TypeError, as native.check does, for dtypes that op lacks, ValueError for torch weights elsewhere.
    """
    if (name := format.dtype_name(x)) not in format.STORAGE:
        raise TypeError(f"{op}: x is {name}; wanted float32, float16 or bfloat16")
    if bridge.kind(w.words) == "torch" and w.words.device != x.device:
        raise ValueError(f"{op}: x is on {x.device} but words on {w.words.device}; move them together first")
    return bridge.to_mx(x)


def qmm(x, w: format.Packed, transpose: bool = True):
    """x times packed weights, in x's dtype with float32 accumulation.

    x            float32/float16/bfloat16   (..., K), or (..., N) when transpose is False
    w.words      uint32                     (N, K * bits / 32)
    w.scales     float32/float16/bfloat16   (N, K / group_size), likewise w.biases
    result       x's dtype                  (..., N), or (..., K) when transpose is False

    transpose=False computes x @ W on the same packed bytes: it is the gradient of transpose=True.
    mx.array: differentiable with respect to x, w.scales and w.biases. numpy: float64 inside. torch: the
    result has no autograd history (the layers of mlxq.nn.torch have).
    Raises ValueError for shapes and formats that disagree, TypeError for dtypes.
    """
    which = bridge.kind(x)
    if which == "mlx":
        return native.qmm(x, w, transpose)
    if which == "numpy":
        native.check("qmm", x, w, transpose)
        return reference.qmm(x, w, transpose).astype(x.dtype)
    if which == "cupy" or (which == "torch" and x.is_cuda):
        return _cuda().qmm(x, w, transpose)
    return bridge.to_torch(native.qmm(_on_mx("qmm", x, w), w, transpose), x.device)


def gather_qmm(x, w: format.Packed, lhs_indices=None, rhs_indices=None, transpose=True, sorted_indices=False):
    """Blocks of x times the experts that the indices choose, in x's dtype with float32 accumulation.

    x            (*X, M, K)     lhs_indices  integers into the flattened *X; None: 0, 1, 2 ... in shape *X
    w            (*E, N, K)     rhs_indices  integers into the flattened *E; None: 0, 1, 2 ... in shape *E
    result       (*broadcast(lhs_indices, rhs_indices), M, N), or (..., M, K) when transpose is False

    sorted_indices promises that rhs_indices ascend; the answer does not depend on it.
    An index out of range raises on a CPU stream, when the result is evaluated. A GPU cannot raise, nor can
    stock MLX where that serves: there the last block or expert is taken for it. Raises as qmm does.
    """
    which = bridge.kind(x)
    if which == "mlx":
        return native.gather_qmm(x, w, lhs_indices, rhs_indices, transpose, sorted_indices)
    if which == "numpy":
        native.check("gather_qmm", x, w, transpose, lhs_indices, rhs_indices)
        return reference.gather_qmm(x, w, lhs_indices, rhs_indices, transpose).astype(x.dtype)
    if _on_gpu(x):
        return _cuda().gather_qmm(x, w, lhs_indices, rhs_indices, transpose)
    y = native.gather_qmm(_on_mx("gather_qmm", x, w), w, lhs_indices, rhs_indices, transpose, sorted_indices)
    return bridge.to_torch(y, x.device)


def q8_rows(x, group_size: int | None = None):
    """(codes int8 (..., K), scales float32 (...)) of float x (..., K): one scale for each row.

    codes = clamp(rint(x / scale), -127, 127), scale = max |x| / 127 of the row, 1 for a row of zeros; float32
    operations, the same bits on every device. A row with NaN or Inf gets a scale that is not finite.
    group_size 32, 64 or 128: so many neighbours of a row count as a row; scales are (..., K / group_size).
    Raises TypeError for dtypes, ValueError for rows of no elements or no whole groups. No gradient.
    """
    which = bridge.kind(x)
    if which == "mlx":
        return native.q8_rows(x, group_size)
    native.check_rows(x, group_size)
    if which == "numpy":
        return reference.q8_rows(x, group_size)
    if _on_gpu(x):
        return _cuda().q8_rows(x, group_size)
    codes, scales = native.q8_rows(bridge.to_mx(x), group_size)
    return bridge.to_torch(codes, x.device), bridge.to_torch(scales, x.device)


def q8mm(x_codes, x_scales, w: format.Packed, *, per_row: bool = False, dtype: str = "float32"):
    """int8 activations times packed weights (W8A8, W4A8, W2A8), sums of integers exact, as (..., N) in dtype.

    x_codes   int8     (..., K), K up to 131071
    x_scales  float32  (...), or an array of one number, or (..., K / group_size): tiled
    w         2, 4 or 8 bits, (N, K);  z = 2^(bits - 1); int8 weights q are codes q + 128, biases -128 * scale

    y[m, n] = x_scales[m] * sum_g( scales[n, g] * s_g + (biases[n, g] + z * scales[n, g]) * e_g )
        s_g = sum of x_codes * (code - z) over the group, int32     e_g = sum of its x_codes
    per_row: y[m, n] = float32(sum_g s_g) * (x_scales[m] * scales[n, 0]), the same bits everywhere; the caller
        promises scales that are equal along a row, and biases = -z * scales.
    tiled: y[m, n] = sum_g x_scales[m, g] * ( the same terms ); not with per_row.

    Where none of our kernels runs (MLX without our extension or on a GPU without our shaders) it is a product
    in float32: ops.qmm of the codes, tiled ones times their scales. Raises ValueError for shapes and formats
    that disagree, TypeError for dtypes. No gradient: layers define it.
    """
    which = bridge.kind(x_codes)
    if which == "mlx":
        return native.q8mm(x_codes, x_scales, w, per_row, dtype)
    native.check_q8mm(x_codes, x_scales, w, per_row, dtype)
    if which == "numpy":
        out = reference.q8mm(x_codes, x_scales, w, per_row)
        return out.astype("float32" if dtype == "bfloat16" else dtype)
    if _on_gpu(x_codes):
        return _cuda().q8mm(x_codes, x_scales, w, per_row, dtype)
    y = native.q8mm(bridge.to_mx(x_codes), x_scales, w, per_row, dtype)
    return bridge.to_torch(y, x_codes.device)


def quantize(w, fmt: format.Format, rule: str = "affine", scale_dtype: str | None = None) -> format.Packed:
    """Packed weights in w's own framework, by rule "affine" or "mlx" (formulas: mlxq.format.quantize).

    w            float32/float16/bfloat16   (..., N, K), K a multiple of fmt.group_size
    scale_dtype  storage of scales and biases, a name of format.STORAGE; None: w's dtype

    The same bits on every device and for every framework. Raises ValueError for NaN or Inf (how many, where),
    for shapes, and for scales that the storage cannot hold; TypeError for dtypes.
    """
    bridge.kind(w)
    if (name := format.dtype_name(w)) not in format.STORAGE:
        raise TypeError(f"quantize: w is {name}; wanted {', '.join(format.STORAGE)}")
    scale_dtype = scale_dtype or name
    if scale_dtype not in format.STORAGE:
        raise TypeError(f"quantize: scales in {scale_dtype} do not exist; built: {', '.join(format.STORAGE)}")
    if rule == "affine" and _on_gpu(w):
        packed = _cuda().quantize(w, fmt, scale_dtype)
    else:
        packed = native.quantize(w, fmt, rule, scale_dtype)
    if packed is not None:
        return packed
    packed = format.quantize(bridge.to_numpy(w), fmt, rule, scale_dtype)
    return format.Packed(
        bridge.like(packed.words, w, None if bridge.kind(w) != "torch" else "uint32"),
        bridge.like(packed.scales, w, scale_dtype),
        bridge.like(packed.biases, w, scale_dtype),
        fmt,
    )


def dequantize(packed: format.Packed, dtype: str | None = None):
    """scale * code + bias as (..., N, K) in the packed arrays' framework, computed in float32.

    dtype is a name of format.STORAGE; None: the scales' dtype.
    """
    dtype = dtype or format.dtype_name(packed.scales)
    which = bridge.kind(packed.words)
    if which == "mlx":
        return native.dequantize(packed, dtype)
    if which == "torch" and not packed.words.is_cuda:
        return bridge.to_torch(native.dequantize(packed.validate(), dtype), packed.words.device)
    if _on_gpu(packed.words) and packed.format.bits in format.KERNEL_BITS:
        return _cuda().dequantize(packed, dtype)
    parts = (bridge.to_numpy(a) for a in (packed.words, packed.scales, packed.biases))
    host = format.Packed(*parts, packed.format)
    out = format.dequantize(host).astype(np.float32)
    if which in ("torch", "cupy"):
        return bridge.like(out, packed.words, dtype)
    return out if dtype == "bfloat16" else out.astype(dtype)
