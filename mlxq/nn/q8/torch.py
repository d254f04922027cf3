"""Q8Linear for torch: on mlxq's own kernels, its weight int8 codes in the format of mlxq and mlx-lm."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from mlxq import ops
from mlxq.format import Packed, dtype_name
from mlxq.nn import q8
from mlxq.nn.q8 import Settings


class Q8Linear(nn.Module):
    """(x + bias_a) @ W.T + bias with 8-bit x and W and exact sums: x (..., K) -> (..., N) in x's dtype.

    The weight is float, (N, K), and trains; after pack() it is the triple of mlxq.format and mlx-lm, three
    buffers: weight (words, as int32), scales, biases. Both give the same bits, in training and in evaluation.

    scale_a   float32 ()      activations "learned" (a parameter) and "static" (a buffer); NaN until observed;
                              "static_tile": (K / group_size,), a buffer
    bias_a    (K,)            what is added to x first; absent unless asked for
    bias      (N,)            absent with bias=False

    A learned scale is taken from the first training batch that is not all zeros, or within observing();
    evaluation never changes a layer. Gradients: mlxq.nn.q8.activation_gradients for x, bias_a and scale_a;
    dL/dy.T @ (scale * codes of x) for the weight, nothing where `lsq` clipped it; none for its scales.

    Raises ValueError for settings that do not exist and group sizes that do not divide K.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "token",
        weight_scales: str = "row",
        group_size: int | None = None,
        bias_a: bool = False,
    ):
        settings = Settings.fitting(in_features, activation, weight_scales, group_size)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._set(settings, in_features, out_features, linear.weight.device)
        self.weight, self.bias = linear.weight, linear.bias
        self._set_bias_a(torch.zeros_like(linear.weight[0]) if bias_a else None)

    def _set(self, settings: Settings, in_features, out_features, device, scale_a=None):
        super().__init__()
        self.settings, self.per_row = settings, settings.per_row
        self.in_features, self.out_features = in_features, out_features
        self._observing = False
        self._has_scale = scale_a is not None or settings.is_dynamic
        scale_a = q8.given_scale(scale_a, settings, in_features)
        shape = () if settings.tile is None else (in_features // settings.tile,)
        scale = torch.full(shape, float("nan")) if scale_a is None else torch.tensor(scale_a)
        scale = scale.to(device, torch.float32)
        if settings.activation == "learned":
            self.scale_a = nn.Parameter(scale)
        else:
            self.register_buffer("scale_a", None if settings.is_dynamic else scale)
        self.register_buffer("scales", None)
        self.register_buffer("biases", None)

    def _set_bias_a(self, bias_a: torch.Tensor | None) -> None:
        self.bias_a = None if bias_a is None else nn.Parameter(bias_a.detach().clone())

    @property
    def is_packed(self) -> bool:
        return self.scales is not None

    @property
    def packed(self) -> Packed:
        """The weight as one operand of mlxq.ops, (N, K); made anew at each call while it is float."""
        if self.is_packed:
            return Packed(self.weight.view(torch.uint32), self.scales, self.biases, self.settings.format)
        return quantize_weight(self.weight.detach(), self.settings)

    def pack(self) -> Q8Linear:
        """This layer, its weight packed in place. Raises ValueError for NaN, infinity and overflow."""
        if self.is_packed:
            return self
        packed = self.packed
        if not (self.weight.isfinite().all() & packed.biases.isfinite().all()):
            raise ValueError(
                f"Q8Linear: the weight holds NaN or infinity, or {dtype_name(packed.scales)} cannot hold "
                "128 times its scales; use float32"
            )
        del self.weight
        self._hold(packed)
        return self

    def _hold(self, packed: Packed) -> None:
        self.register_buffer("weight", packed.words.view(torch.int32))  # pickle knows no uint32
        self.scales, self.biases = packed.scales, packed.biases

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        activation: str = "token",
        weight_scales: str = "row",
        group_size: int | None = None,
        bias_a: bool = False,
        scale_a: float | torch.Tensor | list[float] | None = None,
    ) -> Q8Linear:
        """The layer with the float weight and the bias of an nn.Linear, shared; pack() it to deploy it."""
        N, K = linear.weight.shape
        settings = Settings.fitting(K, activation, weight_scales, group_size)
        layer = cls._blank(settings, K, N, linear.weight.device, scale_a)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._set_bias_a(torch.zeros_like(linear.weight[0]) if bias_a else None)
        return layer

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: torch.Tensor | None = None,
        *,
        activation: str = "token",
        bias_a: torch.Tensor | None = None,
        scale_a: float | torch.Tensor | list[float] | None = None,
    ) -> Q8Linear:
        """The layer over packed tensors (N, K), of 8, 4 or 2 bits, symmetric or not.

        A weight with one scale a row and biases = -2^(bits-1) * scales is summed as one integer; of any
        other, and with tiles, each group is. Raises ValueError when the tensors disagree.
        """
        packed.validate()
        fmt = packed.format
        settings = Settings(activation, "group", fmt.group_size, fmt.bits)
        layer = cls._blank(settings, packed.K, packed.N, packed.words.device, scale_a)
        layer._hold(packed)
        layer.per_row = settings.tile is None and q8.is_per_row(fmt.bits, packed.scales, packed.biases)
        layer.bias = None if bias is None else nn.Parameter(bias.detach())
        layer._set_bias_a(bias_a)
        return layer

    @classmethod
    def _blank(cls, *settings) -> Q8Linear:
        layer = cls.__new__(cls)
        layer._set(*settings)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"Q8Linear: x has shape {tuple(x.shape)}; wanted (..., K={self.in_features})")
        wide = x.float()
        if self.bias_a is not None:
            wide = wide + self.bias_a.float()
        learning = self.training and self.settings.activation == "learned"
        if self._observing or (learning and not self._has_scale):
            self._observe(wide.detach())
        y = self._product(wide)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)

    @torch.compiler.disable  # a graph break: the product is MLX's, which dynamo cannot trace
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.is_packed else self.weight
        return _Product.apply(x, self._scale(), weight, self.packed, self.settings, self.per_row)

    def _scale(self) -> torch.Tensor | None:
        """The activation scale; None for "token" and "tile"."""
        if self.scale_a is None:
            return None
        if not self._has_scale:
            if self.scale_a.isnan().any():
                if self._observing or (self.training and self.settings.activation == "learned"):
                    # Only zeros so far, which are codes of 0 by any scale.
                    return torch.full_like(self.scale_a, q8.EPS, requires_grad=False)
                raise ValueError(
                    f"Q8Linear: no {self.settings.activation} activation scale yet; run data through the "
                    "model within mlxq.nn.q8.torch.observing(model)"
                )
            self._has_scale = True
        return self.scale_a

    @torch.compiler.disable
    @torch.no_grad()
    def _observe(self, x: torch.Tensor) -> None:
        """Take the scale from a batch: the first one for "learned", the largest of all for "static"."""
        if self.scale_a is None or not x.numel():
            return
        known = not self.scale_a.isnan().any()
        if known and self.settings.activation == "learned":
            self._has_scale = True
            return
        scale = q8.observed_scale(x, self.settings, torch)
        if known:
            scale = torch.maximum(scale, self.scale_a)
        if scale.max() > 0:  # a batch of zeros says nothing
            self.scale_a.copy_(scale)
            self._has_scale = True

    def _apply(self, fn, recurse=True):
        """As Module._apply, but the activation scale stays float32: .half() would stop it from learning."""
        kept = None if self.scale_a is None else self.scale_a.detach().clone()
        super()._apply(fn, recurse)
        if kept is not None and self.scale_a.dtype != torch.float32:
            self.scale_a.data = kept.to(self.scale_a.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._has_scale = self.scale_a is None
        if self.is_packed and not self.weight.is_meta:
            rows = q8.is_per_row(self.settings.bits, self.scales, self.biases)
            self.per_row = rows and self.settings.tile is None

    def extra_repr(self) -> str:
        s = self.settings
        weight = f"{s.format} packed" if self.is_packed else f"float, scales per {s.weight_scales}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={s.activation}, weight={weight}"
        )


def quantize_weight(weight: torch.Tensor, settings: Settings) -> Packed:
    """A float weight (N, K) as 8-bit codes with scales in its dtype and biases of exactly -128 scales."""
    wide = weight.float()
    scales = q8.weight_scales(wide, settings, dtype_name(weight), torch).to(weight.dtype)
    codes = q8.weight_codes(wide, scales.float(), settings, torch)
    words = (codes + q8.ZERO).to(torch.uint8).view(torch.uint32)
    scales = scales.expand(weight.shape[0], settings.format.groups(weight.shape[1])).contiguous()
    return Packed(words, scales, scales * -q8.ZERO, settings.format)


class _Product(torch.autograd.Function):
    """(x, activation scale, float weight or None, packed weight, ...) -> y, all float32."""

    @staticmethod
    def codes(x, scale, settings):
        if settings.is_dynamic:
            return ops.q8_rows(x, settings.tile)
        scale = scale.clamp(min=q8.EPS)
        codes = q8.activation_codes(x, scale, torch).to(torch.int8)
        return codes, scale.expand(*x.shape[:-1], -1).contiguous() if scale.ndim else scale

    @staticmethod
    def forward(ctx, x, scale, weight, packed, settings, per_row):
        ctx.save_for_backward(x, scale, weight)
        ctx.packed, ctx.settings = packed, settings
        codes, scales = _Product.codes(x, scale, settings)
        return ops.q8mm(codes, scales, packed, per_row=per_row, dtype="float32")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, scale, weight = ctx.saved_tensors
        settings, packed = ctx.settings, ctx.packed
        dx = dscale = dweight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx = ops.qmm(dy.contiguous(), packed, transpose=False)
            if scale is not None:
                dx, dscale = q8.activation_gradients(dx, x, scale.clamp(min=q8.EPS), torch)
        if ctx.needs_input_grad[2]:
            codes, scales = _Product.codes(x, scale, settings)
            rounded = q8.dequantized(codes.float(), scales)
            dweight = dy.reshape(-1, dy.shape[-1]).T @ rounded.reshape(-1, x.shape[-1])
            if settings.clips_weights:
                v = weight.float() / packed.scales[:, :1].float()
                dweight = torch.where((v >= q8.LOW) & (v <= q8.HIGH), dweight, 0)
            dweight = dweight.to(weight.dtype)
        return dx, dscale, dweight, None, None, None


def layers(model: nn.Module) -> dict[str, Q8Linear]:
    """The model's Q8Linear layers by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Q8Linear)}


@contextlib.contextmanager
def observing(model: nn.Module):
    """Forward passes inside the block set the scales of "learned" and "static" activations.

    "learned" layers without a scale take it from their first batch that is not all zeros; "static" ones from
    the largest input of all batches. Raises ValueError at the end, naming the layers that have none still.
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
