"""MPQLinear for MLX: the layer of mlxq.nn.mpq.torch for mlx.nn models and their functional gradients.

The layer has one trainable parameter, `handle`: one number that nothing reads, whose gradient under
nn.value_and_grad is the privileged gradient x.T @ grad_y, float32 (K, N). Sums, clipping and averaging of
gradient trees work on it; mlxq.optim.mlx turns it into changes of the packed words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxq import bridge, ops
from mlxq.format import Format, Packed, dtype_name
from mlxq.nn.mpq import Layout, QuantizedLayer, layout_of

_format = functools.cache(Format)
_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


@functools.cache
def _product(fmt: Format, ordered: bool):
    """x @ W.T on packed words, with gradients for x and for the handle."""

    def parts(primals):
        x, _, words, scales, biases, *order = primals
        return (mx.take(x, order[0], axis=-1) if ordered else x), Packed(words, scales, biases, fmt)

    @mx.custom_function
    def product(*primals):
        return ops.qmm(*parts(primals))

    @product.vjp
    def gradients(primals, grad, output):
        x, packed = parts(primals)
        dx = ops.qmm(grad, packed, transpose=False)
        grad2, x2 = (a.reshape(-1, a.shape[-1]).astype(mx.float32) for a in (grad, x))
        privileged = x2.T @ grad2
        if ordered:
            inverse = mx.argsort(primals[5])
            dx, privileged = mx.take(dx, inverse, axis=-1), mx.take(privileged, inverse, axis=0)
        return dx, privileged, *(mx.zeros_like(a) for a in primals[2:])

    return product


@dataclass
class _Source:
    """The checkpoint's layout and, once prepared, its tensors but for qweight and bias, and their dtypes."""

    layout: Layout
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, mx.Dtype]


class MPQLinear(nn.Module):
    """x @ W + bias with 2-, 4- or 8-bit W: x (..., in_channels) -> (..., out_channels) in x's dtype.

    The arguments are bitorch-engine's; see mlxq.nn.mpq.torch.MPQLinear. The parameters have the checkpoint's
    names until prepare_params; then they are weight, scales and biases as in nn.QuantizedLinear, and handle.
    checkpoint() gives, load_checkpoint() takes the checkpoint's layout at any time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        a_bit: int = 16,
        w_bit: int = 4,
        dtype: mx.Dtype = mx.float16,
        group_size: int = -1,
        use_gba_quant: bool = True,
        dq_group_size: int = -1,
        dq_mode: int = 2,
        disable_bias: bool = True,
        asym: bool = False,
        requires_grad: bool = True,
        *,
        gptq_version: int = 1,
    ):
        if a_bit != 16:
            raise ValueError(f"MPQLinear: a_bit is {a_bit}; activations are floats: wanted 16")
        if dtype not in _DTYPES:
            raise TypeError(f"MPQLinear: dtype is {dtype}; wanted one of {', '.join(map(str, _DTYPES))}")
        layout = Layout(
            in_channels,
            out_channels,
            w_bit,
            group_size,
            use_gba_quant,
            dq_group_size,
            dq_mode,
            asym,
            gptq_version,
        )
        super().__init__()
        self._source, self._requires_grad, self.dtype = _Source(layout, {}, {}), requires_grad, dtype
        self.prepared = False
        for name, (shape, kind) in layout.shapes.items():
            fill = float("scales" in name and kind == "float")
            # mx.full follows the fill's own type where that is a float
            self[name] = mx.full(shape, fill).astype(dtype if kind == "float" else getattr(mx, kind))
        self.g_idx = mx.array(layout.default_g_idx())
        if not disable_bias:
            self.bias = mx.zeros((out_channels,), dtype=dtype)
        self.handle = mx.zeros((1,))
        self._freeze_words()

    @property
    def layout(self) -> Layout:
        return self._source.layout

    in_channels = property(lambda self: self.layout.in_channels)
    out_channels = property(lambda self: self.layout.out_channels)
    w_bit = property(lambda self: self.layout.w_bit)
    group_size = property(lambda self: self.layout.group_size)

    def _freeze_words(self) -> None:
        self.freeze(recurse=False)
        if self._requires_grad:
            super().unfreeze(recurse=False, keys=["handle"])

    def unfreeze(self, *args, **kwargs):
        """Only the handle can be trained, and only where requires_grad was not False."""
        super().unfreeze(*args, **kwargs)
        self._freeze_words()
        return self

    @classmethod
    def from_packed(cls, packed: Packed, bias: mx.array | None = None, *, requires_grad=True) -> MPQLinear:
        """A prepared layer of a canonical triple (N, K), arrays of any framework: GBA layout, plain zeros."""
        layout = layout_of(packed.validate())
        words, scales, biases = (bridge.to_numpy(a) for a in (packed.words, packed.scales, packed.biases))
        layer = cls(
            layout.in_channels,
            layout.out_channels,
            w_bit=layout.w_bit,
            group_size=layout.group_size,
            dtype=getattr(mx, dtype_name(packed.scales)),
            dq_mode=0,
            disable_bias=bias is None,
            requires_grad=requires_grad,
        )
        layer.qweight = mx.array(layout.encode_qweight(words, None))
        layer.scales = mx.array(np.ascontiguousarray(scales.T)).astype(layer.dtype)
        layer.zeros = mx.array(np.ascontiguousarray(-biases.T)).astype(layer.dtype)
        if bias is not None:
            layer.bias = bias
        layer.prepare_params()
        return layer

    @property
    def packed(self) -> Packed:
        """The canonical triple, shared, columns in the order `_order`. Raises RuntimeError before prepare."""
        self._need_prepared()
        fmt = _format(self.w_bit, self.in_channels // self.scales.shape[1])
        return Packed(self.weight, self.scales, self.biases, fmt)

    def prepare_params(self) -> None:
        """Turn the checkpoint's tensors into the canonical triple that products run on; twice is once.

        Raises ValueError, before anything has changed, for tensors that disagree with the layout.
        """
        if self.prepared:
            return
        tensors = {name: bridge.to_numpy(self[name]) for name in self.layout.shapes}
        canonical = self.layout.decode(tensors)
        dtypes = {name: self[name].dtype for name in tensors}
        source = _Source(self.layout, {name: t for name, t in tensors.items() if name != "qweight"}, dtypes)
        for name in tensors:
            self.pop(name)
        self._source = source
        # Of trained zeros: plain float ones keep their storage, double-quantized ones become float32.
        self.zero_dtype = None if self.layout.asym else dtypes.get("zeros", mx.float32)
        self.smallest_zero, self.zeros_moved = self.layout.smallest_zero, False
        packed = canonical.packed
        self.weight, self.scales, self.biases = map(mx.array, (packed.words, packed.scales, packed.biases))
        self._owner = mx.array(canonical.owner)
        if canonical.order is not None:
            self._order = mx.array(canonical.order)
        self.prepared = True
        self._freeze_words()

    def _need_prepared(self) -> None:
        if not self.prepared:
            raise RuntimeError("MPQLinear: call prepare_params() after loading and before the first product")

    def __call__(self, x: mx.array) -> mx.array:
        self._need_prepared()
        if x.ndim < 1 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"MPQLinear: x has shape {x.shape}; wanted (..., {self.in_channels}), in_channels last"
            )
        if self.handle.size != 1:
            raise RuntimeError(
                "MPQLinear: an optimiser that cannot move packed words has stepped over this layer; use "
                "MPQAdamW or MPQSign of mlxq.optim.mlx"
            )
        packed, order = self.packed, [self._order] if "_order" in self else []
        product = _product(packed.format, bool(order))
        y = product(x, self.handle, packed.words, packed.scales, packed.biases, *order)
        return y + self.bias.astype(y.dtype) if "bias" in self else y

    def _extra_repr(self) -> str:
        kind = "GBA" if self.layout.use_gba_quant else f"GPTQ v{self.layout.gptq_version}"
        return f"{self.in_channels}, {self.out_channels}, {self.w_bit}-bit/{self.group_size}, {kind}"

    def checkpoint(self) -> dict[str, mx.array]:
        """The layer's tensors in the checkpoint's layout; trained zeros are plain floats or integers."""
        bias = {"bias": self.bias} if "bias" in self else {}
        if not self.prepared:
            return {name: self[name] for name in self.layout.shapes} | bias
        layout, tensors, dtypes = self.layout, self._source.tensors, self._source.dtypes
        if self.zeros_moved:
            arrays = (bridge.to_numpy(a) for a in (self.scales, self.biases, self._owner))
            layout, tensors = layout.with_zeros(tensors, *arrays)
        order = bridge.to_numpy(self._order) if "_order" in self else None
        words = layout.encode_qweight(bridge.to_numpy(self.weight), order)
        found = {name: mx.array(t).astype(dtypes.get(name, mx.float32)) for name, t in tensors.items()}
        return {"qweight": mx.array(words)} | found | bias

    def load_checkpoint(self, tensors: dict[str, mx.array]) -> None:
        """Take tensors in the checkpoint's layout and prepare. Raises ValueError with nothing changed.

        Plain scales and zeros are taken for double-quantized ones.
        """
        layout = self.layout
        if layout.double_quantized and not set(layout.plain().shapes) - set(tensors):
            if set(layout.shapes) - set(tensors):
                layout = layout.plain()
        given = {"g_idx": mx.array(layout.default_g_idx())} | tensors
        arrays = {name: given[name] for name in layout.shapes if name in given}
        layout.decode({name: bridge.to_numpy(array) for name, array in arrays.items()})
        if "bias" in self and "bias" not in tensors:
            raise ValueError("MPQLinear: the tensor bias is missing")
        for name in ("weight", "scales", "biases", "_owner", "_order", *self.layout.shapes):
            self.pop(name, None)
        self._source, self.prepared = _Source(layout, {}, {}), False
        for name, array in arrays.items():
            self[name] = array
        if "bias" in self:
            self.bias = tensors["bias"]
        self.prepare_params()


def collect_layers(model: nn.Module) -> dict[str, MPQLinear]:
    """Every MPQLinear of a model by its path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, MPQLinear)}


def prepare_layers(model: nn.Module) -> nn.Module:
    """The same model after prepare_params of every MPQLinear. Raises ValueError that names the layer."""
    for path, layer in collect_layers(model).items():
        try:
            layer.prepare_params()
        except ValueError as error:
            raise ValueError(f"prepare_layers: {path}: {error}") from error
    return model


def pack_layers(
    model: nn.Module,
    fmt: Format,
    *,
    skip: Callable[[str, nn.Module], bool] = lambda path, layer: False,
    requires_grad: bool = True,
) -> list[str]:
    """Put an MPQLinear in the place of each linear layer, float or packed affine; their paths.

    A float weight is rounded to nearest as fmt says; nn.QuantizedLinear (and ours) keeps its own words.
    skip(path, layer) leaves a layer alone. Raises ValueError, naming the layer, when fmt does not fit.
    """
    new = []
    for path, layer in model.named_modules():
        kind = type(layer)
        if not (kind is nn.Linear or isinstance(layer, nn.QuantizedLinear)) or skip(path, layer):
            continue
        try:
            if kind is nn.Linear:
                packed = ops.quantize(layer.weight, fmt, scale_dtype="float32")
            else:
                packed = Packed(
                    layer.weight, layer.scales, layer.biases, _format(layer.bits, layer.group_size)
                )
            made = MPQLinear.from_packed(packed, layer.get("bias"), requires_grad=requires_grad)
        except ValueError as error:
            raise ValueError(f"pack_layers: {path}: {error}") from error
        new.append((path, made))
    model.update_modules(tree_unflatten(new))
    return [path for path, _ in new]


def freeze_words(model: nn.Module) -> list[str]:
    """Put mlxq's QuantizedLinear, sharing the arrays, in the place of each MPQLinear; their paths.

    So a trained model is saved as an MLX checkpoint. Raises ValueError for act-order layers, whose rows MLX's
    format cannot reorder.
    """
    from mlxq.nn.mlx import QuantizedLinear  # which offers this module's layer under its own name

    new = []
    for path, layer in collect_layers(model).items():
        if "_order" in layer:
            raise ValueError(f"freeze_words: {path} has act-order; MLX's format has no order of rows")
        new.append((path, QuantizedLinear.from_packed(layer.packed, layer.get("bias"))))
    model.update_modules(tree_unflatten(new))
    return [path for path, _ in new]


def from_layer(found: QuantizedLayer, *, requires_grad: bool = True) -> MPQLinear:
    """A prepared MPQLinear of one quantized layer of a checkpoint."""
    layout = found.layout
    layer = MPQLinear(
        layout.in_channels,
        layout.out_channels,
        w_bit=layout.w_bit,
        dtype=getattr(mx, found.dtype),
        group_size=layout.group_size,
        use_gba_quant=layout.use_gba_quant,
        dq_group_size=layout.dq_group_size,
        dq_mode=layout.dq_mode,
        disable_bias=found.bias is None,
        asym=layout.asym,
        requires_grad=requires_grad,
        gptq_version=layout.gptq_version,
    )
    bias = {} if found.bias is None else {"bias": mx.array(found.bias)}
    layer.load_checkpoint({name: mx.array(t) for name, t in found.tensors.items()} | bias)
    return layer
