"""Packed layers for torch that compute with mlxq.ops on the CPU, NVIDIA GPUs and MPS, and have gradients.

Names, shapes and bytes of weight, scales, biases and bias are those of the MLX layers, but the words are
kept as int32: torch 2.13 can neither pickle uint32 nor compute with it, while int32 passes through
state_dict, safetensors, torch.save and .to() as it is. `layer.packed` shows them as uint32. Casts (.half(),
.to(dtype)) change scales, biases and bias, never the words.

On the CPU a layer keeps its arrays in memory that MLX shares (mlxq.bridge), so nothing is held twice. The
products are operators of torch, torch.ops.mlxq.qmm and torch.ops.mlxq.dequantize, with fake kernels and
gradients: they go through torch.compile and torch.export whole.

    y  = x @ W.T           W[n, k] = scales[n, j] * code[n, k] + biases[n, j],   j = k // group_size
    dx = g @ W             on the same packed bytes
    dbiases[n, j] = sum over k of group j of dW[n, k],   dW = g.T @ x in float32
    dscales[n, j] = the same with dW[n, k] * code[n, k]

The words themselves have no gradient.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch import nn

from mlxq import bridge, ops
from mlxq.format import STORAGE, Format, Packed
from mlxq.nn.mpq.torch import MPQLinear as MPQLinear
from mlxq.nn.mpq.torch import MPQWeight as MPQWeight
from mlxq.nn.mpq.torch import collect_layers as collect_layers
from mlxq.nn.mpq.torch import freeze_words as freeze_words
from mlxq.nn.mpq.torch import load_layers as load_layers
from mlxq.nn.mpq.torch import pack_layers as pack_layers
from mlxq.nn.mpq.torch import prepare_layers as prepare_layers
from mlxq.nn.q8.torch import Q8Linear as Q8Linear

_FLOATS = tuple(getattr(torch, name) for name in STORAGE)
_ROWS_AT_ONCE = 1 << 22  # weights of which dW and the codes exist at a time, 32 MiB in float32
_format = functools.cache(Format)  # a layer asks for its format at every call

_library = torch.library.Library("mlxq", "FRAGMENT")
_library.define(
    "qmm(Tensor x, Tensor words, Tensor scales, Tensor biases, int bits, int group_size, "
    "bool transpose=True) -> Tensor"
)
_library.define(
    "dequantize(Tensor words, Tensor scales, Tensor biases, int bits, int group_size, ScalarType dtype) "
    "-> Tensor"
)

# id of a words tensor -> (weak references to words, scales and biases, their Packed), so that what ops learns
# of a weight is kept between calls. The Packed holds aliases: it never keeps a weight that its owner let go.
_known: dict[int, tuple] = {}


def _packed(words, scales, biases, bits: int, group_size: int) -> Packed:
    found = _known.get(id(words))
    if found is not None:
        references, packed = found
        if (
            references[0]() is words
            and references[1]() is scales
            and references[2]() is biases
            and (packed.format.bits, packed.format.group_size) == (bits, group_size)
            and packed.words.data_ptr() == words.data_ptr()  # tensor.data = other keeps the object
            and packed.scales.data_ptr() == scales.data_ptr()
            and packed.biases.data_ptr() == biases.data_ptr()
            and packed.scales.dtype == scales.dtype
        ):
            return packed
    packed = _aliases(words, scales, biases, bits, group_size)
    key = id(words)

    def forget(_):
        _known.pop(key, None)

    _known[key] = tuple(weakref.ref(a, forget) for a in (words, scales, biases)), packed
    return packed


def _aliases(words, scales, biases, bits, group_size) -> Packed:
    as_words = words.detach() if words.dtype == torch.uint32 else words.detach().view(torch.uint32)
    return Packed(as_words, scales.detach(), biases.detach(), _format(bits, group_size)).validate()


def _qmm(x, words, scales, biases, bits, group_size, transpose=True):
    return ops.qmm(x, _packed(words, scales, biases, bits, group_size), transpose)


def _dequantize(words, scales, biases, bits, group_size, dtype):
    name = str(dtype).removeprefix("torch.")
    return ops.dequantize(_aliases(words, scales, biases, bits, group_size), name)


_library.impl("qmm", _qmm, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("mlxq::qmm", lib=_library)
def _(x, words, scales, biases, bits, group_size, transpose=True):
    N, K = words.shape[0], scales.shape[-1] * group_size
    inner, outer = (K, N) if transpose else (N, K)
    if x.dtype not in _FLOATS:
        raise TypeError(f"qmm: x is {x.dtype}; wanted float32, float16 or bfloat16")
    if not x.ndim or x.shape[-1] != inner:
        raise ValueError(f"qmm: x has shape {tuple(x.shape)}; wanted (..., {inner})")
    return x.new_empty((*x.shape[:-1], outer))


@torch.library.register_fake("mlxq::dequantize", lib=_library)
def _(words, scales, biases, bits, group_size, dtype):
    return scales.new_empty((*words.shape[:-1], scales.shape[-1] * group_size), dtype=dtype)


def _qmm_setup(ctx, inputs, output):
    x, words, scales, biases, ctx.bits, ctx.group_size, ctx.transpose = inputs
    # x is needed for the gradients of scales and biases alone: a frozen layer holds no activation back.
    learns = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if learns else None, words, scales, biases)


def _qmm_backward(ctx, g):
    x, words, scales, biases = ctx.saved_tensors
    dx = dscales = dbiases = None
    if ctx.needs_input_grad[0]:
        parts = words, scales, biases, ctx.bits, ctx.group_size
        dx = torch.ops.mlxq.qmm(g.contiguous(), *parts, not ctx.transpose)  # of a sum: one number for all
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        over_n, over_k = (g, x) if ctx.transpose else (x, g)
        over_n = over_n.reshape(-1, over_n.shape[-1]).float()
        over_k = over_k.reshape(-1, over_k.shape[-1]).float()
        if ctx.needs_input_grad[2]:
            dscales = _scales_gradient(over_n, over_k, words, scales, ctx.bits, ctx.group_size)
        if ctx.needs_input_grad[3]:
            sums = over_k.unflatten(-1, (-1, ctx.group_size)).sum(-1)
            dbiases = (over_n.T @ sums).to(biases.dtype)
    return dx, None, dscales, dbiases, None, None, None


def _scales_gradient(over_n, over_k, words, scales, bits, group_size):
    """Sums of dW * code over each group, (N, K / group_size), without a float weight of the whole layer."""
    N, K = words.shape[0], over_k.shape[-1]
    step = max(1, _ROWS_AT_ONCE // max(K, 1))
    pieces = []
    for start in range(0, N, step):
        rows = slice(start, start + step)
        product = (over_n[:, rows].T @ over_k) * _codes(words[rows], scales[rows], bits, group_size)
        pieces.append(product.unflatten(-1, (-1, group_size)).sum(-1))
    return torch.cat(pieces).to(scales.dtype) if pieces else torch.zeros_like(scales)


def _codes(words, scales, bits, group_size):
    one = torch.ones_like(scales, dtype=torch.float32)
    return torch.ops.mlxq.dequantize(words, one, torch.zeros_like(one), bits, group_size, torch.float32)


def _dequantize_setup(ctx, inputs, output):
    words, scales, biases, ctx.bits, ctx.group_size, _ = inputs
    ctx.save_for_backward(words, scales)
    ctx.biases_dtype = biases.dtype


def _dequantize_backward(ctx, g):
    words, scales = ctx.saved_tensors
    g, dscales, dbiases = g.float(), None, None
    if ctx.needs_input_grad[1]:
        product = g * _codes(words, scales, ctx.bits, ctx.group_size)
        dscales = product.unflatten(-1, (-1, ctx.group_size)).sum(-1).to(scales.dtype)
    if ctx.needs_input_grad[2]:
        dbiases = g.unflatten(-1, (-1, ctx.group_size)).sum(-1).to(ctx.biases_dtype)
    return None, dscales, dbiases, None, None, None


torch.library.register_autograd("mlxq::qmm", _qmm_backward, setup_context=_qmm_setup, lib=_library)
torch.library.register_autograd(
    "mlxq::dequantize", _dequantize_backward, setup_context=_dequantize_setup, lib=_library
)


@torch.library.register_vmap("mlxq::qmm", lib=_library)
def _(info, in_dims, x, words, scales, biases, bits, group_size, transpose=True):
    settings = bits, group_size, transpose
    if in_dims[1:4] == (None, None, None):  # rows of x are a batch already
        return torch.ops.mlxq.qmm(x.movedim(in_dims[0], 0), words, scales, biases, *settings), 0
    lanes = [
        (a,) * info.batch_size if dim is None else a.unbind(dim)
        for a, dim in zip((x, words, scales, biases), in_dims, strict=False)
    ]
    return torch.stack([torch.ops.mlxq.qmm(*lane, *settings) for lane in zip(*lanes, strict=True)]), 0


@torch.library.register_vmap("mlxq::dequantize", lib=_library)
def _(info, in_dims, words, scales, biases, bits, group_size, dtype):
    lanes = (
        a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)
        for a, dim in zip((words, scales, biases), in_dims, strict=False)
    )
    return torch.ops.mlxq.dequantize(*lanes, bits, group_size, dtype), 0


def qmm(x, w: Packed, transpose: bool = True):
    """ops.qmm for torch tensors with gradients for x, w.scales and w.biases, under autocast too.

    Shapes, dtypes and errors are those of mlxq.ops.qmm.
    """
    return torch.ops.mlxq.qmm(
        _autocast(x), w.words, w.scales, w.biases, w.format.bits, w.format.group_size, transpose
    )


def dequantize(w: Packed, dtype=None):
    """ops.dequantize for torch tensors with gradients for w.scales and w.biases; dtype is a torch.dtype."""
    fmt = w.format
    return torch.ops.mlxq.dequantize(
        w.words, w.scales, w.biases, fmt.bits, fmt.group_size, dtype or w.scales.dtype
    )


def _autocast(x):
    where = x.device.type
    if where != "meta" and torch.is_autocast_enabled(where) and x.dtype in _FLOATS:
        return x.to(torch.get_autocast_dtype(where))
    return x


class _PackedLayer(nn.Module):
    """What the layers share: weight (int32 words) is a buffer, scales and biases are frozen parameters.

    borrowed   True: scales and biases lie in memory that another owner empties and fills between calls
               without torch counting it, as fully_shard does; each product then takes copies of them
    """

    borrowed = False

    def _operands(self):
        if self.borrowed:
            return self.weight, self.scales.clone(), self.biases.clone()
        return self.weight, self.scales, self.biases

    def _hold(self, words, scales, biases, fmt: Format) -> None:
        self.bits, self.group_size = fmt.bits, fmt.group_size
        self.register_buffer("weight", words)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.biases = nn.Parameter(biases, requires_grad=False)

    def _hold_zeros(self, N: int, K: int, bits: int, group_size: int, device, dtype) -> None:
        fmt, dtype = Format(bits, group_size), dtype or torch.get_default_dtype()
        if dtype not in _FLOATS:
            kind = type(self).__name__
            raise TypeError(f"{kind}: scales cannot be {dtype}; wanted one of {', '.join(STORAGE)}")
        words = torch.zeros(N, fmt.words_per_row(K), dtype=torch.int32, device=device)
        scales = torch.zeros(N, fmt.groups(K), dtype=dtype, device=device)
        self._hold(words, scales, torch.zeros_like(scales), fmt)
        self._share()

    @property
    def packed(self) -> Packed:
        """The layer's own tensors, not copied, as one operand: (N, K)."""
        words = self.weight.view(torch.uint32)
        return Packed(words, self.scales, self.biases, _format(self.bits, self.group_size))

    def _share(self) -> None:
        """Move what lies in torch's own CPU memory into memory that MLX shares; the values stay."""
        for tensor in (self.weight, self.scales, self.biases):
            if tensor.device.type != "cpu" or tensor.is_inference() or tensor.is_shared():
                continue
            if tensor.dtype in (torch.int32, *_FLOATS) and not bridge.is_shared(tensor):
                tensor.data = bridge.in_mx_memory(tensor.detach())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._share()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._share()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        words = state_dict.get(f"{prefix}weight")
        if words is not None and words.dtype == torch.uint32:  # from a file of MLX's
            state_dict[f"{prefix}weight"] = words.view(torch.int32)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._share()

    def _hold_packed(self, packed: Packed) -> None:
        packed.validate()
        if len(packed.shape) != 2:
            shape = tuple(packed.words.shape)
            raise ValueError(f"{type(self).__name__}: words are {shape}; wanted (N, K * bits / 32)")
        parts = packed.words, packed.scales, packed.biases
        words, scales, biases = (bridge.to_torch(a).detach() for a in parts)
        self._hold(words.view(torch.int32), scales, biases, packed.format)
        self._share()


class QuantizedLinear(_PackedLayer):
    """x @ W.T + bias, in x's dtype (autocast's, inside): x (..., K) -> (..., N).

    weight   int32     (N, K * bits / 32)     buffer; the uint32 words of mlxq.format.Packed
    scales   float     (N, K / group_size)    parameter, frozen until .requires_grad_(); likewise biases
    bias     float     (N,)                   parameter, or None

    Made by from_linear or from_packed. The constructor makes a layer of zeros, to load into; it raises
    ValueError for a format that does not exist or a group that does not divide K.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, bits=4, group_size=64, device=None, dtype=None
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._hold_zeros(out_features, in_features, bits, group_size, device, dtype)
        zeros = torch.zeros(out_features, dtype=self.scales.dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    @classmethod
    def from_packed(cls, packed: Packed, bias=None):
        """A layer that holds packed arrays (N, K) of any framework, shared where the bridge can.

        Raises ValueError when they disagree with each other.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = packed.K, packed.N
        layer._hold_packed(packed)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bridge.to_torch(bias))
        layer.bias = bias
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits=4, group_size=64, rule="affine", scale_dtype=None):
        """The packed form of a float layer, its bias kept; scales in scale_dtype (None: the weight's).

        Raises ValueError for NaN or Inf in the weights and for shapes, TypeError for float64.
        """
        packed = ops.quantize(linear.weight.detach(), Format(bits, group_size), rule, scale_dtype)
        return cls.from_packed(packed, linear.bias)

    def forward(self, x):
        y = torch.ops.mlxq.qmm(_autocast(x), *self._operands(), self.bits, self.group_size)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
        )


class QuantizedEmbedding(_PackedLayer):
    """Rows of a packed table: integers (...) -> (..., K) in the scales' dtype, unpacking only those rows.

    weight, scales and biases as in QuantizedLinear, N rows of the vocabulary.
    rows_dtype   a torch.dtype for the rows instead, which casts of the module leave as it is
    """

    rows_dtype = None

    def __init__(self, num_embeddings, embedding_dim, *, bits=4, group_size=64, device=None, dtype=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._hold_zeros(num_embeddings, embedding_dim, bits, group_size, device, dtype)

    @classmethod
    def from_packed(cls, packed: Packed):
        """A layer that holds packed arrays (N, K) of any framework, shared where the bridge can."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_embeddings, layer.embedding_dim = packed.N, packed.K
        layer._hold_packed(packed)
        return layer

    @classmethod
    def from_embedding(cls, table: nn.Embedding, bits=4, group_size=64, rule="affine", scale_dtype=None):
        """The packed form of a float table; raises as QuantizedLinear.from_linear does."""
        packed = ops.quantize(table.weight.detach(), Format(bits, group_size), rule, scale_dtype)
        return cls.from_packed(packed)

    def forward(self, ids):
        flat = ids.reshape(-1)
        rows = self.weight[flat], self.scales[flat], self.biases[flat]
        dtype = self.rows_dtype or self.scales.dtype
        out = torch.ops.mlxq.dequantize(*rows, self.bits, self.group_size, dtype)
        return out.reshape(*ids.shape, self.embedding_dim)

    def as_linear(self, x):
        """x @ W.T, for output projections tied to the table: (..., K) -> (..., N) in x's dtype."""
        return torch.ops.mlxq.qmm(_autocast(x), *self._operands(), self.bits, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


class TiedHead(nn.Module):
    """The output projection of a model whose head is its embedding: x (..., K) -> (..., N).

    It has no tensors of its own: the table is not its submodule, so state_dict names it once.
    """

    def __init__(self, table: QuantizedEmbedding):
        super().__init__()
        self.__dict__["table"] = table
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings

    @property
    def weight(self):
        return self.table.weight

    def forward(self, x):
        return self.table.as_linear(x)
