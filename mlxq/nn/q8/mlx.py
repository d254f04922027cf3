"""Q8Linear for mlx.nn and mlx-lm models."""

from __future__ import annotations

import contextlib
import functools

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mlxq import ops
from mlxq.format import Format, Packed, dtype_name
from mlxq.nn import q8
from mlxq.nn.q8 import Settings
from mlxq.ops import native


class Q8Linear(nn.Module):
    """(x + bias_a) @ W.T + bias with 8-bit x and W and exact sums: x (..., K) -> (..., N) in x's dtype.

    The weight is float, (N, K), and trains; after pack() it is the triple of mlxq.format and mlx-lm: weight
    (words), scales, biases, all frozen. Both give the same bits, in training and in evaluation.

    scale_a   float32 ()      activations "learned" (trains) and "static" (frozen); NaN until it is observed;
                              "static_tile": (K / group_size,)
    bias_a    (K,)            what is added to x first; absent unless asked for
    bias      (N,)            absent with bias=False

    Gradients: mlxq.nn.q8.activation_gradients for x, bias_a and scale_a; dL/dy.T @ (scale * codes of x) for
    the weight, nothing where `lsq` clipped it; none for its scales.

    Raises ValueError for settings that do not exist and group sizes that do not divide K.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        *,
        activation: str = "token",
        weight_scales: str = "row",
        group_size: int | None = None,
        bias_a: bool = False,
    ):
        super().__init__()
        self._set(Settings.fitting(input_dims, activation, weight_scales, group_size), input_dims)
        bound = input_dims**-0.5
        self.weight = mx.random.uniform(-bound, bound, (output_dims, input_dims))
        if bias:
            self.bias = mx.random.uniform(-bound, bound, (output_dims,))
        if bias_a:
            self.bias_a = mx.zeros((input_dims,))

    def _set(self, settings: Settings, K: int, scale_a: float | list[float] | None = None) -> None:
        self.settings, self.per_row = settings, settings.per_row
        self._observing = False
        # A layer without a scale gives NaN where nobody looks, and raises where one call may look.
        self._has_scale = scale_a is not None or settings.is_dynamic
        if not settings.is_dynamic:
            scale = q8.given_scale(scale_a, settings, K)
            shape = () if settings.tile is None else (K // settings.tile,)
            self.scale_a = mx.full(shape, float("nan")) if scale is None else mx.array(scale, mx.float32)
            self._freeze_own()

    def _freeze_own(self) -> None:
        keys = ["scale_a"] if self.settings.activation in ("static", "static_tile") else []
        keys += ["weight", "scales", "biases"] if self.is_packed else []
        if keys:
            self.freeze(recurse=False, keys=keys)

    def unfreeze(self, *args, **kwargs):
        """As Module.unfreeze, but packed weights and static scales stay frozen."""
        super().unfreeze(*args, **kwargs)
        self._freeze_own()

    @property
    def is_packed(self) -> bool:
        return "scales" in self

    @property
    def packed(self) -> Packed:
        """The weight as one operand of mlxq.ops, (N, K); made anew at each call while it is float."""
        if self.is_packed:
            return Packed(self["weight"], self["scales"], self["biases"], self.settings.format)
        return quantize_weight(self["weight"], self.settings)

    def pack(self) -> Q8Linear:
        """This layer, its weight packed in place. Raises ValueError for NaN, infinity and overflow."""
        if self.is_packed:
            return self
        packed = self.packed
        if not (mx.isfinite(self["weight"]).all() & mx.isfinite(packed.biases).all()).item():
            raise ValueError(
                f"Q8Linear: the weight holds NaN or infinity, or {dtype_name(packed.scales)} cannot hold "
                "128 times its scales; use float32"
            )
        self.weight, self.scales, self.biases = packed.words, packed.scales, packed.biases
        self._freeze_own()
        return self

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        activation: str = "token",
        weight_scales: str = "row",
        group_size: int | None = None,
        bias_a: bool = False,
        scale_a: float | mx.array | list[float] | None = None,
    ) -> Q8Linear:
        """The layer with the float weight and the bias of an nn.Linear, shared; pack() it to deploy it."""
        N, K = linear.weight.shape
        layer = cls._blank(Settings.fitting(K, activation, weight_scales, group_size), K, scale_a)
        layer.weight = linear.weight
        if "bias" in linear:
            layer.bias = linear.bias
        if bias_a:
            layer.bias_a = mx.zeros((K,), linear.weight.dtype)
        return layer

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: mx.array | None = None,
        *,
        activation: str = "token",
        bias_a: mx.array | None = None,
        scale_a: float | mx.array | list[float] | None = None,
    ) -> Q8Linear:
        """The layer over packed mx.arrays (N, K), of 8, 4 or 2 bits, symmetric or not.

        A weight with one scale a row and biases = -2^(bits-1) * scales is summed as one integer; of any
        other, and with tiles, each group is. Raises ValueError when the arrays disagree.
        """
        packed.validate()
        fmt = packed.format
        settings = Settings(activation, "group", fmt.group_size, fmt.bits)
        layer = cls._blank(settings, packed.K, scale_a)
        layer.weight, layer.scales, layer.biases = packed.words, packed.scales, packed.biases
        layer.per_row = settings.tile is None and q8.is_per_row(fmt.bits, packed.scales, packed.biases)
        if bias is not None:
            layer.bias = bias
        if bias_a is not None:
            layer.bias_a = bias_a
        layer._freeze_own()
        return layer

    @classmethod
    def _blank(cls, settings: Settings, K: int, scale_a) -> Q8Linear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(settings, K, scale_a)
        return layer

    @property
    def float_weight(self) -> mx.array:
        """The dequantized weight, (N, K)."""
        return ops.dequantize(self.packed)

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        """This layer inside of an adapter of mlx-lm's; linear_to_lora_layers calls it."""
        return wrap_in_lora(self, self.packed.shape, r, dropout, scale)

    def __call__(self, x: mx.array) -> mx.array:
        wide = x
        if "bias_a" in self:
            wide = x.astype(mx.float32) + self["bias_a"].astype(mx.float32)
        y = None
        if self.is_packed and self.settings.is_dynamic:
            dtype = "float32" if "bias" in self else dtype_name(x)
            y = native.q8_linear(wide, self.packed, self.per_row, self.settings.tile, dtype)
        if y is None:
            y = self._any_product(wide.astype(mx.float32))
        if "bias" in self:
            y = y + self["bias"].astype(mx.float32)
        return y.astype(x.dtype)

    def _any_product(self, x: mx.array) -> mx.array:
        """float32 x times the weight, with every setting and gradient."""
        if self._observing:
            self._observe(x)
        weight = (self["weight"],)
        if self.is_packed:
            weight += (self["scales"], self["biases"])
        return _product(self.settings, self.per_row)(x, self._scale(), *weight)

    def _scale(self) -> mx.array:
        """The activation scale; a placeholder that nobody reads for "token" and "tile"."""
        if self.settings.is_dynamic:
            return mx.zeros(())
        scale = self["scale_a"].astype(mx.float32)
        if not self._has_scale:
            if self._observing:
                return mx.array(q8.EPS)  # only zeros so far, which are codes of 0 by any scale
            try:
                missing = bool(mx.isnan(scale).any().item())
            except ValueError:  # inside mx.compile no value can be read; NaN will show in y
                missing = False
            else:
                self._has_scale = not missing
            if missing:
                raise ValueError(
                    f"Q8Linear: no {self.settings.activation} activation scale yet; run data through the "
                    "model within mlxq.nn.q8.mlx.observing(model)"
                )
        return scale

    def _observe(self, x: mx.array) -> None:
        """Take the scale from a batch: the first one for "learned", the largest of all for "static"."""
        if self.settings.is_dynamic or (self.settings.activation == "learned" and self._has_scale):
            return
        scale = q8.observed_scale(x, self.settings, mx)
        if self._has_scale:
            scale = mx.maximum(scale, self["scale_a"])
        if scale.max().item() > 0:  # a batch of zeros says nothing
            self.scale_a, self._has_scale = scale, True
            self._freeze_own()

    def _extra_repr(self) -> str:
        s = self.settings
        K = self["weight"].shape[1] * (32 // s.bits if self.is_packed else 1)
        weight = f"{s.format} packed" if self.is_packed else f"float, scales per {s.weight_scales}"
        return (
            f"input_dims={K}, output_dims={self['weight'].shape[0]}, bias={'bias' in self}, "
            f"activation={s.activation}, weight={weight}"
        )


class QuantizedLoRALinear(LoRALinear):
    """mlx-lm's adapter around a layer of ours, which mlx-lm does not know; the layer has a float_weight."""

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """A float layer with the adapter in it. Raises ValueError unless dequantize is asked for."""
        if not dequantize:
            raise ValueError(
                f"fuse: {type(self.linear).__name__} cannot take an adapter into its codes; "
                "fuse(dequantize=True) and quantize_model again"
            )
        weight = self.linear.float_weight
        fused = nn.Linear(*reversed(weight.shape), bias="bias" in self.linear)
        fused.weight = weight + ((self.scale * self.lora_b.T) @ self.lora_a.T).astype(weight.dtype)
        if "bias" in self.linear:
            fused.bias = self.linear.bias
        return fused


def wrap_in_lora(layer: nn.Module, shape, r: int, dropout: float, scale: float) -> QuantizedLoRALinear:
    """An adapter of rank r around a layer with a weight of shape (N, K)."""
    N, K = shape
    wrapped = QuantizedLoRALinear(K, N, r=r, dropout=dropout, scale=scale)
    wrapped.linear = layer
    return wrapped


def quantize_weight(weight: mx.array, settings: Settings) -> Packed:
    """A float weight (N, K) as 8-bit codes with scales in its dtype and biases of exactly -128 scales."""
    storage = dtype_name(weight)
    wide = weight.astype(mx.float32)
    scales = q8.weight_scales(wide, settings, storage, mx).astype(weight.dtype)
    codes = q8.weight_codes(wide, scales.astype(mx.float32), settings, mx)
    words = (codes + q8.ZERO).astype(mx.uint8).view(mx.uint32)
    groups = settings.format.groups(weight.shape[1])
    scales = mx.contiguous(mx.broadcast_to(scales, (weight.shape[0], groups)))
    return Packed(words, scales, scales * -q8.ZERO, settings.format)


@functools.cache
def _product(settings: Settings, per_row: bool):
    """(x, scale, weight) or (x, scale, words, scales, biases) -> y, all float32, with its gradients."""

    def operand(weight) -> Packed:
        return Packed(*weight, settings.format) if len(weight) > 1 else quantize_weight(weight[0], settings)

    def codes_of(x, scale):
        if settings.is_dynamic:
            return ops.q8_rows(x, settings.tile)
        scale = mx.maximum(scale, q8.EPS)
        codes = q8.activation_codes(x, scale, mx).astype(mx.int8)
        return codes, mx.broadcast_to(scale, (*x.shape[:-1], *scale.shape)) if scale.ndim else scale

    @mx.custom_function
    def product(x, scale, *weight):
        return ops.q8mm(*codes_of(x, scale), operand(weight), per_row=per_row, dtype="float32")

    @product.vjp
    def gradients(primals, dy, _):
        x, scale, *weight = primals
        packed = operand(weight)
        dx, dscale = ops.qmm(dy, packed, transpose=False), mx.zeros_like(scale)
        if not settings.is_dynamic:
            dx, dscale = q8.activation_gradients(dx, x, mx.maximum(scale, q8.EPS), mx)
        if len(weight) > 1:
            return dx, dscale, *(mx.zeros_like(a) for a in weight)
        codes, scales = codes_of(x, scale)
        rounded = q8.dequantized(codes.astype(mx.float32), scales)
        K = x.shape[-1]
        dweight = dy.reshape(-1, dy.shape[-1]).T @ rounded.reshape(-1, K)
        if settings.clips_weights:
            v = weight[0].astype(mx.float32) / packed.scales[:, :1].astype(mx.float32)
            dweight = mx.where((v >= q8.LOW) & (v <= q8.HIGH), dweight, 0)
        return dx, dscale, dweight.astype(weight[0].dtype)

    return product


def layers(model: nn.Module) -> dict[str, Q8Linear]:
    """The model's Q8Linear layers by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Q8Linear)}


@contextlib.contextmanager
def observing(model: nn.Module):
    """Forward passes inside the block set the scales of "learned" and "static" activations.

    "learned" layers without a scale take it from their first batch that is not all zeros; "static" ones from
    the largest input of all batches. Nothing else ever sets a scale. Raises ValueError at the end, naming the
    layers that have none still.
    """
    found = layers(model)
    for layer in found.values():
        layer._observing = True
    try:
        yield
    finally:
        for layer in found.values():
            layer._observing = False
    if empty := [path or "the layer" for path, layer in found.items() if not layer._has_scale]:
        raise ValueError(f"observing: {', '.join(empty)} saw no input but zeros and has no scale")


def replace_linears(
    model: nn.Module,
    *,
    activation: str = "token",
    weight_scales: str = "row",
    group_size: int | None = None,
    bias_a: bool = False,
    predicate=lambda path, layer: True,
) -> list[str]:
    """Paths of the layers that became Q8Linear in the model: float ones trainable, packed ones as they are.

    predicate(path, layer) chooses among nn.Linear, and nn.QuantizedLinear of mode affine and 2, 4 or 8 bits.
    A float layer whose K no group size divides is left alone.
    """
    changed = []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear) and layer.mode == "affine" and layer.bits in (2, 4, 8):
            if predicate(path, layer):
                fmt = Format(layer.bits, layer.group_size)
                packed = Packed(layer.weight, layer.scales, layer.biases, fmt)
                new = Q8Linear.from_packed(
                    packed,
                    layer.get("bias"),
                    activation=activation,
                    bias_a=mx.zeros((packed.K,)) if bias_a else None,
                )
                changed.append((path, new))
        elif isinstance(layer, nn.Linear) and layer.weight.shape[1] % (group_size or 32) == 0:
            if predicate(path, layer):
                settings = {"activation": activation, "weight_scales": weight_scales}
                new = Q8Linear.from_linear(layer, **settings, group_size=group_size, bias_a=bias_a)
                changed.append((path, new))
    model.update_modules(tree_unflatten(changed))
    return [path for path, _ in changed]
