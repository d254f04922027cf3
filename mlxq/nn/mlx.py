"""Packed layers for mlx.nn and mlx-lm that compute with mlxq.ops: drop-ins for the stock layers above them.

Same parameters under the same names (weight, scales, biases, bias), frozen in the same way, so that files,
adapters and every isinstance test of mlx-lm take them for the stock layers. Two differences: a product has
x's dtype (stock: promoted with the scales'), and sums are float32 for every x (stock on the CPU: x's dtype).
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import mla, switch_layers

from mlxq import ops
from mlxq.format import Format, Packed
from mlxq.nn.mpq.mlx import MPQLinear as MPQLinear
from mlxq.nn.mpq.mlx import collect_layers as collect_layers
from mlxq.nn.mpq.mlx import freeze_words as freeze_words
from mlxq.nn.mpq.mlx import pack_layers as pack_layers
from mlxq.nn.mpq.mlx import prepare_layers as prepare_layers
from mlxq.nn.q8.mlx import Q8Linear as Q8Linear

_format = functools.cache(Format)  # a layer asks for its format at every call


class _AffineLayer:
    """What the packed layers share: their weights as one Packed, and how they are made from others.

    rule names the default quantizer of from_float (see mlxq.ops.quantize).
    """

    rule = "affine"

    def __init__(self, *args, **kwargs):
        """The stock layer's arguments and random weights. Raises ValueError for modes other than affine."""
        super().__init__(*args, **kwargs)
        _refuse_other_modes(type(self), self.mode)

    @property
    def packed(self) -> Packed:
        """The layer's own arrays, shared, as one operand of mlxq.ops: (N, K), or (experts or heads, N, K)."""
        return Packed(self["weight"], self["scales"], self["biases"], _format(self.bits, self.group_size))

    @classmethod
    def from_packed(cls, packed: Packed, bias: mx.array | None = None):
        """A layer that holds packed mx.arrays, frozen, and maybe a bias, trainable as in stock from_linear.

        packed   (N, K), or (experts or heads, N, K)        bias   (N,) or (experts, N)

        Raises ValueError when the packed arrays disagree with each other.
        """
        packed.validate()
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.group_size, layer.bits, layer.mode = packed.format.group_size, packed.format.bits, "affine"
        layer.weight, layer.scales, layer.biases = packed.words, packed.scales, packed.biases
        layer.freeze()
        if bias is not None:
            layer.bias = bias
        return layer

    @classmethod
    def from_float(cls, layer: nn.Module, group_size=None, bits=None, mode="affine", rule=None):
        """The packed form of a float layer by quantizer `rule` (None: cls.rule), unless told 4-bit/64.

        Raises ValueError for modes other than affine, for NaN or Inf in the weights, when no group fits K.
        """
        _refuse_other_modes(cls, mode)
        packed = ops.quantize(layer.weight, _format(bits or 4, group_size or 64), rule or cls.rule)
        return cls.from_packed(packed, layer.get("bias"))


def _refuse_other_modes(cls: type, mode: str) -> None:
    if mode != "affine":
        raise ValueError(
            f"{cls.__name__}: mode {mode!r} belongs to the stock layer; mlxq's layers hold 'affine' only"
        )


class QuantizedLinear(_AffineLayer, nn.QuantizedLinear):
    """x @ W.T + bias: x (..., K) -> (..., N) in x's dtype; a bias promotes as in stock layers."""

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.qmm(x, self.packed)
        return y + self["bias"] if "bias" in self else y

    @classmethod
    def from_linear(cls, linear_layer: nn.Module, group_size=None, bits=None, mode="affine", rule=None):
        """from_float under its stock name."""
        return cls.from_float(linear_layer, group_size, bits, mode, rule)


class QuantizedEmbedding(_AffineLayer, nn.QuantizedEmbedding):
    """Rows of a table: integers (...) -> (..., K) in the scales' dtype, unpacking only the rows asked for."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim == 0:
            return self(x[None])[0]
        table = self.packed
        return ops.dequantize(Packed(table.words[x], table.scales[x], table.biases[x], table.format))

    def as_linear(self, x: mx.array) -> mx.array:
        """x @ W.T, for output projections tied to the table: (..., K) -> (..., N) in x's dtype."""
        return ops.qmm(x, self.packed)

    @classmethod
    def from_packed(cls, packed: Packed, bias: None = None):
        """A frozen layer that holds packed mx.arrays (N, K). Raises ValueError when they disagree."""
        layer = super().from_packed(packed)
        layer.num_embeddings, layer.dims = packed.N, packed.K
        return layer

    @classmethod
    def from_embedding(cls, embedding_layer: nn.Module, group_size=None, bits=None, mode="affine", rule=None):
        """from_float under its stock name."""
        return cls.from_float(embedding_layer, group_size, bits, mode, rule)


class QuantizedSwitchLinear(_AffineLayer, switch_layers.QuantizedSwitchLinear):
    """Each block of rows through the expert that `indices` chooses: mixture-of-experts layers of mlx-lm.

    x (*X, M, K), indices that *X broadcasts to -> (*indices, M, N) in x's dtype; a bias promotes as in stock
    layers. sorted_indices promises that the indices ascend and changes no answer.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = ops.gather_qmm(x, self.packed, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


class QuantizedMultiLinear(_AffineLayer, mla.QuantizedMultiLinear):
    """One matrix per head (latent attention of DeepSeek V3 and its kin), in both orientations.

    x (*X, M, K), *X broadcast against the heads -> (..., heads, M, N); with transpose=False (*X, M, N) ->
    (..., heads, M, K).
    """

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        # Without indices block i of x meets head i, and a head axis of 1 in x is shared by every head.
        return ops.gather_qmm(x, self.packed, transpose=transpose)


_OURS = {
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
    switch_layers.QuantizedSwitchLinear: QuantizedSwitchLinear,
    mla.QuantizedMultiLinear: QuantizedMultiLinear,
}


def adopt(model: nn.Module) -> nn.Module:
    """The same model, its stock affine layers turned into ours in place: no array copied, no layer replaced.

    So every reference to a layer (tied weights, adapters around it) sees the change. Layers of other modes
    (mxfp4, mxfp8, nvfp4) stay stock. A subclass of a stock layer keeps its own methods and runs ours where it
    calls the stock ones. Raises ValueError, naming the layer, when its arrays disagree with its format.
    """
    for path, layer in model.named_modules():
        ours = _adopted(type(layer))
        if ours is None or layer.mode != "affine":
            continue
        try:
            Packed(layer.weight, layer.scales, layer.biases, _format(layer.bits, layer.group_size)).validate()
        except ValueError as error:
            raise ValueError(f"adopt: layer {path or type(layer).__name__}: {error}") from error
        layer.__class__ = ours
    return model


@functools.cache
def _adopted(stock: type) -> type | None:
    """Our class for a stock layer's class or its subclass; None for every other class, ours included."""
    if issubclass(stock, _AffineLayer):
        return None
    if stock in _OURS:
        return _OURS[stock]
    for base, ours in _OURS.items():
        if issubclass(stock, base):
            # Methods resolve in the subclass, then ours, then the base. Pickle cannot find the class by name.
            def reduce(layer, stock=stock):
                return _blank, (stock,), vars(layer), None, iter(layer.items())

            return type(stock.__name__, (stock, ours), {"__reduce__": reduce})
    return None


def _blank(stock: type) -> nn.Module:
    ours = _adopted(stock)
    return ours.__new__(ours)
