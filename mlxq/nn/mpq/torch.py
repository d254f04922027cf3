"""MPQLinear for torch: a linear layer on packed words that can be trained while packed.

Autograd has no float gradient for integer words. So the layer owns an MPQWeight, a parameter of zero
elements: autograd and optimisers see it, the backward pass leaves on it the gradient with respect to the
dequantized weight (the *privileged* gradient), and mlxq.optim.torch changes the words that it points at.
That gradient is its .grad: torch.nn.utils.clip_grad_norm_ and torch.amp.GradScaler find it where they look.
Torch's own optimisers have no elements to move; a step of one of them is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mlxq import bridge, ops
from mlxq.format import Format, Packed, dtype_name, quantize
from mlxq.nn.mpq import Layout, QuantizedLayer, layout_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STORED = {"int32": torch.int32, "uint8": torch.uint8}


class MPQWeight(torch.nn.Parameter):
    """A float parameter of zero elements that stands for packed words, (K, N) weights in checkpoint terms.

    grad              float32 (N, K) or None: the privileged gradient as the kernels want it, columns in
                      canonical order, summed over backward passes since it was None
    privileged_grad   the same as (K, N) in the checkpoint's order: x.T @ grad_y
    words, scales, biases, order, owner, format    the layer's canonical tensors, shared; see mlxq.nn.mpq
    zero_dtype        the storage dtype of float zeros; None: they are integers, smallest_zero the least
    zeros_moved       whether an optimiser has changed zeros, so that double-quantized ones are out of date
    on_grad           None, or called with this parameter when a backward pass has added to the gradient
    path              of the layer in its model, where it is known, or None
    """

    def __new__(cls, requires_grad: bool = True, device=None):
        data = torch.empty(0, dtype=torch.float32, device=device)
        weight = torch.Tensor._make_subclass(cls, data, requires_grad)
        weight.words = weight.scales = weight.biases = weight.order = weight.owner = weight.format = None
        weight.zero_dtype, weight.smallest_zero, weight.zeros_moved = None, 0, False
        weight.on_grad = weight.path = weight._gradient = weight._packed = None
        _refuse_other_optimizers()
        return weight

    @property
    def grad(self) -> torch.Tensor | None:
        return self._gradient

    @grad.setter
    def grad(self, gradient: torch.Tensor | None) -> None:
        self._gradient = gradient
        if gradient is None:
            torch.Tensor.grad.__set__(self, None)  # autograd's own, of no elements

    @property
    def privileged_grad(self) -> torch.Tensor | None:
        found = self.grad
        if found is None:
            return None
        if self.order is not None:
            found = torch.empty_like(found).index_copy_(1, self.order, found)
        return found.T

    @property
    def packed(self) -> Packed:
        """The layer's triple, one object while its tensors stay: ops keeps on it what it learns."""
        parts = self.words, self.scales, self.biases
        known = self._packed
        if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)) or (
            known[1].words.data_ptr() != self.words.data_ptr()  # tensor.data = other keeps the object
        ):
            known = parts, Packed(self.words.view(torch.uint32), self.scales, self.biases, self.format)
            self._packed = known
        return known[1]

    def accumulate(self, gradient: torch.Tensor) -> None:
        """Add float32 (N, K) in canonical order to .grad."""
        if self._gradient is None:
            self._gradient = gradient
        else:
            self._gradient += gradient
        if self.on_grad is not None:
            self.on_grad(self)

    def __deepcopy__(self, memo):
        copied = MPQWeight(self.requires_grad, self.device)
        copied.zeros_moved, copied.path = self.zeros_moved, self.path
        memo[id(self)] = copied
        return copied  # the copied layer's next forward points it at the copied words

    def __reduce_ex__(self, protocol):
        return _restored, (self.requires_grad, self.zeros_moved)

    def __repr__(self):
        return f"MPQWeight(requires_grad={self.requires_grad}, format={self.format})"


@functools.cache
def _refuse_other_optimizers() -> None:
    """From now on an optimiser that would step over packed words and move none raises TypeError."""

    def check(optimizer, args, kwargs):
        if getattr(optimizer, "moves_packed_words", False):
            return
        for group in optimizer.param_groups:
            if any(isinstance(p, MPQWeight) and p.grad is not None for p in group["params"]):
                raise TypeError(
                    f"{type(optimizer).__name__} cannot move packed words; use MPQAdamW or MPQSign of "
                    "mlxq.optim.torch, which also step over the other parameters"
                )

    register_optimizer_step_pre_hook(check)


def _restored(requires_grad: bool, zeros_moved: bool) -> MPQWeight:
    weight = MPQWeight(requires_grad)
    weight.zeros_moved = zeros_moved
    return weight


class _Product(torch.autograd.Function):
    """x @ W.T on packed words; dx on the same words, and the privileged gradient left on the MPQWeight."""

    @staticmethod
    def forward(ctx, x, weight, words, scales, biases, packed):
        ctx.weight, ctx.packed = weight, packed
        ctx.needs_weight = weight.requires_grad
        # Saving words lets autograd refuse a backward pass after an optimiser changed them in place.
        ctx.save_for_backward(x if ctx.needs_weight else None, words, scales, biases)
        return ops.qmm(x, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *_ = ctx.saved_tensors
        grad, dx = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            dx = ops.qmm(grad, ctx.packed, transpose=False)
        if not ctx.needs_weight:
            return dx, None, None, None, None, None
        ctx.weight.accumulate(_sum_of_products(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])))
        return dx, torch.zeros_like(ctx.weight), None, None, None, None


def _sum_of_products(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad.T @ x in float32, whatever the operands' dtype."""
    if grad.is_cuda and grad.dtype != torch.float32:
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return grad.float().T @ x.float()


class MPQLinear(torch.nn.Module):
    """x @ W + bias with 2-, 4- or 8-bit W: x (..., in_channels) -> (..., out_channels) in x's dtype.

    The arguments are bitorch-engine's; further ones are keywords. Load a checkpoint's tensors, then call
    prepare_params once (mlxq.nn.mpq lists names, shapes and formulas). state_dict is in the checkpoint's
    layout, before and after; loading into a prepared layer prepares it again.

    dtype          of scales and zeros until a checkpoint brings its own; x may be any of the three
    dq_mode        0: plain scales and zeros; 1, 2: double quantized, as upstream
    gptq_version   2: zeros are stored as they are
    Sums are float32 at every number of rows. Raises ValueError or TypeError for what cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        a_bit: int = 16,
        w_bit: int = 4,
        dtype: torch.dtype = torch.half,
        group_size: int = -1,
        use_gba_quant: bool = True,
        dq_group_size: int = -1,
        dq_mode: int = 2,
        disable_bias: bool = True,
        asym: bool = False,
        requires_grad: bool = True,
        *,
        gptq_version: int = 1,
        device=None,
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
        self.layout, self.dtype, self.a_bit, self.disable_bias = layout, dtype, a_bit, disable_bias
        self.prepared = False
        self.weight = MPQWeight(requires_grad, device)
        self._allocate(device)

    def _allocate(self, device) -> None:
        """Buffers in the checkpoint's layout: zeros, scales of one, rows in order."""
        for name, (shape, kind) in self.layout.shapes.items():
            fill = float("scales" in name and kind == "float")
            tensor = torch.full(shape, fill, dtype=_STORED.get(kind, self.dtype), device=device)
            self.register_buffer(name, tensor)
        self.g_idx.copy_(torch.from_numpy(self.layout.default_g_idx()))
        if "bias" not in self._buffers:
            shape = None if self.disable_bias else self.out_channels
            bias = None if shape is None else torch.zeros(shape, dtype=self.dtype, device=device)
            self.register_buffer("bias", bias)

    in_channels = property(lambda self: self.layout.in_channels)
    out_channels = property(lambda self: self.layout.out_channels)
    w_bit = property(lambda self: self.layout.w_bit)
    group_size = property(lambda self: self.layout.group_size)
    in_features, out_features = in_channels, out_channels

    @classmethod
    def from_packed(cls, packed: Packed, bias=None, *, dtype=torch.float32, requires_grad=True) -> MPQLinear:
        """A prepared layer that holds the canonical triple (N, K) as GBA layout with plain float zeros.

        packed   arrays of any framework        bias   torch (N,) or None        dtype   of scales and zeros

        The device is the packed arrays', or the CPU.
        """
        parts = [bridge.to_numpy(a) for a in (packed.words, packed.scales, packed.biases)]
        device = packed.words.device if isinstance(packed.words, torch.Tensor) else None
        layout = layout_of(packed.validate())
        layer = cls(
            layout.in_channels,
            layout.out_channels,
            w_bit=layout.w_bit,
            dtype=dtype,
            group_size=layout.group_size,
            dq_mode=0,
            disable_bias=bias is None,
            requires_grad=requires_grad,
        )
        layer.qweight.copy_(torch.from_numpy(layout.encode_qweight(parts[0], None)))
        layer.scales.copy_(torch.from_numpy(np.ascontiguousarray(parts[1].T)))
        layer.zeros.copy_(torch.from_numpy(np.ascontiguousarray(-parts[2].T)))
        if bias is not None:
            layer.bias.copy_(bias.detach())
        layer.prepare_params()
        return layer.to(device)

    @property
    def packed(self) -> Packed:
        """The canonical triple, shared, columns in the order `order`. Raises RuntimeError before prepare."""
        self._need_prepared()
        fmt = Format(self.w_bit, self.in_channels // self.group_scales.shape[1])
        return Packed(self.words.view(torch.uint32), self.group_scales, self.group_biases, fmt)

    def prepare_params(self) -> None:
        """Turn the checkpoint's tensors into the canonical triple that products run on; twice is once.

        Raises ValueError, before anything has changed, for tensors that disagree with the layout.
        """
        if self.prepared:
            return
        if self.qweight.is_meta:
            raise ValueError("MPQLinear: the layer is on the meta device; load a checkpoint into it first")
        tensors = {name: bridge.to_numpy(getattr(self, name)) for name in self.layout.shapes}
        canonical = self.layout.decode(tensors)
        device, packed = self.qweight.device, canonical.packed

        def put(name: str, array: np.ndarray | None) -> None:
            tensor = None if array is None else torch.from_numpy(np.array(array)).to(device)
            self.register_buffer(name, tensor, persistent=False)

        del self.qweight
        put("words", packed.words.view(np.int32))
        put("group_scales", packed.scales)
        put("group_biases", packed.biases)
        put("order", canonical.order)
        put("inverse", None if canonical.order is None else np.argsort(canonical.order))
        put("owner", canonical.owner)
        self.prepared, self.weight.zeros_moved = True, False
        self._point()

    def _need_prepared(self) -> None:
        if not self.prepared:
            raise RuntimeError("MPQLinear: call prepare_params() after loading and before the first product")

    def _point(self) -> None:
        """Let the MPQWeight share this layer's tensors."""
        weight = self.weight
        weight.words, weight.scales, weight.biases = self.words, self.group_scales, self.group_biases
        weight.order, weight.owner, weight.format = self.order, self.owner, self.packed.format
        weight.zero_dtype = None
        if not self.layout.asym:  # trained zeros leave double quantization and are stored in full
            weight.zero_dtype = torch.float32 if self.layout.double_quantized else self.zeros.dtype
        weight.smallest_zero = self.layout.smallest_zero

    @torch.compiler.disable  # the backward pass leaves its gradient on a parameter, which no graph can hold
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._need_prepared()
        if x.ndim < 1 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"MPQLinear: x has shape {tuple(x.shape)}; wanted (..., {self.in_channels}), in_channels last"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        self._point()
        if self.order is not None:
            x = x.index_select(-1, self.order)
        arrays = self.words, self.group_scales, self.group_biases
        y = _Product.apply(x.contiguous(), self.weight, *arrays, self.weight.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        kind = "GBA" if self.layout.use_gba_quant else f"GPTQ v{self.layout.gptq_version}"
        return f"{self.in_channels}, {self.out_channels}, {self.w_bit}-bit/{self.group_size}, {kind}"

    def _apply(self, fn, recurse=True):
        exact = (self.group_scales, self.group_biases) if self.prepared else ()
        super()._apply(fn, recurse)
        if not isinstance(self.weight, MPQWeight):  # leaving the meta device makes plain parameters
            self.weight = MPQWeight(self.weight.requires_grad, self.weight.device)
        if self.prepared:
            # .half() and its kin are meant for activations: scales of products stay float32.
            for name, before in zip(("group_scales", "group_biases"), exact, strict=True):
                if getattr(self, name).dtype != torch.float32:
                    setattr(self, name, before.to(self.words.device))
            self._point()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.prepared and self.weight.zeros_moved:
            self._store_zeros()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]
        if not self.prepared:
            return
        order = None if self.order is None else bridge.to_numpy(self.order)
        words = bridge.to_numpy(self.words).view(np.uint32)
        device, layout = self.words.device, self.layout
        destination[prefix + "qweight"] = torch.from_numpy(layout.encode_qweight(words, order)).to(device)
        if layout.derived:
            tensors = {
                name: bridge.to_numpy(getattr(self, name)) for name in layout.shapes if name != "qweight"
            }
            for name, values in zip(("scales", "zeros"), layout.scales_and_zeros(tensors), strict=True):
                if name in layout.derived:
                    destination[prefix + name] = torch.from_numpy(values).to(device, self.dtype)

    def _store_zeros(self) -> None:
        """Bring the checkpoint's zeros up to date with trained ones; double-quantized ones become plain."""
        names = [name for name in self.layout.shapes if name != "qweight"]
        tensors = {name: bridge.to_numpy(getattr(self, name)) for name in names}
        arrays = (bridge.to_numpy(a) for a in (self.group_scales, self.group_biases, self.owner))
        layout, fresh = self.layout.with_zeros(tensors, *arrays)
        for name in names:
            if name not in fresh:
                del self._buffers[name]
        for name in ("scales", "qzeros", "zeros"):
            if name in fresh and fresh[name] is not tensors.get(name):
                # numpy has no bfloat16: the buffer, where there is one, says what is stored.
                dtype = getattr(self, name).dtype if name in self._buffers else None
                self.register_buffer(name, torch.from_numpy(fresh[name]).to(self.words.device, dtype))
        self.layout, self.weight.zeros_moved = layout, False

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        given = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
        layout = self.layout
        if layout.double_quantized and "scales" in given and not set(layout.plain().shapes) - set(given):
            if set(layout.shapes) - set(given):  # zeros have been trained, or never were double quantized
                layout = layout.plain()
        wanted = {name: shape for name, (shape, _) in layout.shapes.items()}
        if not self.disable_bias:
            wanted["bias"] = (self.out_channels,)
        for name, shape in wanted.items():
            if name not in given:
                if name != "g_idx":
                    missing.append(prefix + name)
            elif tuple(given[name].shape) != shape:
                errors.append(f"{prefix}{name} has shape {tuple(given[name].shape)}; wanted {shape}")
        known = {*wanted, *layout.derived, "bias", "wf", "zeros", "scales"}
        if strict:
            unexpected += [prefix + name for name in given if name not in known]
        if errors or not set(wanted) - {"g_idx"} <= set(given):
            return
        fresh = {name: given[name].detach() for name in wanted if name in given}
        fresh.setdefault("g_idx", torch.from_numpy(layout.default_g_idx()))
        if self.prepared:
            try:
                layout.decode({name: bridge.to_numpy(fresh[name]) for name in layout.shapes})
            except ValueError as error:
                errors.append(f"{prefix.rstrip('.')}: {error}")
                return
        assign = metadata.get("assign_to_params_buffers", False)
        if self.g_idx.is_meta and not assign:
            errors.append(
                f"{prefix.rstrip('.')}: the layer is on the meta device; pass assign=True or call "
                "to_empty(device=...) first"
            )
            return
        was_prepared, device = self.prepared, fresh["qweight"].device if assign else self.g_idx.device
        if self.weight.device != device:
            self.weight = MPQWeight(self.weight.requires_grad, device)
        for name in set(self.layout.shapes) & set(self._buffers):
            del self._buffers[name]
        self.layout, self.prepared = layout, False
        self._allocate(device)
        for name, tensor in fresh.items():
            keep = tensor.dtype if tensor.dtype in _DTYPES else getattr(self, name).dtype
            self.register_buffer(name, tensor.to(device, keep, copy=not assign))
        if was_prepared:
            for name in ("words", "group_scales", "group_biases", "order", "inverse", "owner"):
                delattr(self, name)
            self.prepare_params()


def collect_layers(model: torch.nn.Module) -> dict[str, MPQLinear]:
    """Every MPQLinear of a model by its path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, MPQLinear)}


def prepare_layers(model: torch.nn.Module) -> torch.nn.Module:
    """The same model after prepare_params of every MPQLinear. Raises ValueError that names the layer."""
    for path, layer in collect_layers(model).items():
        try:
            layer.prepare_params()
        except ValueError as error:
            raise ValueError(f"prepare_layers: {path}: {error}") from error
        layer.weight.path = path
    return model


def pack_layers(
    model: torch.nn.Module,
    fmt: Format | None = None,
    *,
    skip: Callable[[str, torch.nn.Module], bool] = lambda path, layer: False,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = True,
) -> list[str]:
    """Put an MPQLinear in the place of each linear layer, float or packed; their paths.

    fmt     of torch.nn.Linear, whose weights are rounded to nearest; None leaves such layers alone.
            mlxq.nn.torch.QuantizedLinear keeps its own words
    skip(path, layer)   leaves a layer alone        dtype   of scales and zeros

    One layer at a time: a weight is freed before the next is packed. Raises ValueError, naming the layer,
    when fmt does not fit.
    """
    from mlxq.nn.torch import QuantizedLinear  # which offers this module's layer under its own name

    replaced = []
    for path, layer in list(model.named_modules()):
        is_float = type(layer) is torch.nn.Linear and fmt is not None
        if not (is_float or isinstance(layer, QuantizedLinear)) or skip(path, layer):
            continue
        device = layer.weight.device
        try:
            if is_float:
                w = layer.weight.detach().float().cpu().numpy()
                packed = quantize(w, fmt, scale_dtype=dtype_name(torch.empty(0, dtype=dtype)))
            else:
                packed = layer.packed
            new = MPQLinear.from_packed(packed, layer.bias, dtype=dtype, requires_grad=requires_grad)
        except ValueError as error:
            raise ValueError(f"pack_layers: {path}: {error}") from error
        put_layer(model, path, new.to(device))
        replaced.append(path)
    return replaced


def freeze_words(model: torch.nn.Module) -> list[str]:
    """Put mlxq.nn.torch.QuantizedLinear in the place of each MPQLinear, on the same words; their paths.

    Its tensors are those of MLX's format. Raises ValueError for act-order layers, whose rows that format
    cannot reorder.
    """
    from mlxq.nn.torch import QuantizedLinear

    layers = collect_layers(model)
    for path, layer in layers.items():
        if layer.packed and layer.order is not None:
            raise ValueError(f"freeze_words: {path} has act-order; MLX's format has no order of rows")
    for path, layer in layers.items():
        put_layer(model, path, QuantizedLinear.from_packed(layer.packed, layer.bias))
    return list(layers)


def put_layer(model: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    """Replace the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    layer.train(model.training)
    if isinstance(layer, MPQLinear):
        layer.weight.path = path


def load_layers(
    model: torch.nn.Module, layers: Iterable[QuantizedLayer], *, requires_grad: bool = True
) -> list[str]:
    """Put prepared MPQLinears in the places that quantized layers of a checkpoint name; the paths replaced.

    layers   of mlxq.checkpoint.gptq.read_layers or mlxq.checkpoint.gba.read_layers

    Raises ValueError, naming the layer, when its size is not that of the layer it replaces.
    """
    replaced = []
    for found in layers:
        try:
            old = model.get_submodule(found.path)
        except AttributeError:
            raise ValueError(f"load_layers: the model has no module {found.path}") from None
        shape = found.layout.out_channels, found.layout.in_channels
        if (old_shape := (old.out_features, old.in_features)) != shape:
            raise ValueError(f"load_layers: {found.path} is {shape} in the file but {old_shape} in the model")
        layer = from_layer(found, requires_grad=requires_grad)
        device = next((t.device for t in old.parameters()), None)
        put_layer(model, found.path, layer.to(device))
        replaced.append(found.path)
    return replaced


def from_layer(found: QuantizedLayer, *, requires_grad: bool = True) -> MPQLinear:
    """A prepared MPQLinear of one quantized layer of a checkpoint."""
    layout = found.layout
    layer = MPQLinear(
        layout.in_channels,
        layout.out_channels,
        w_bit=layout.w_bit,
        dtype=getattr(torch, found.dtype),
        group_size=layout.group_size,
        use_gba_quant=layout.use_gba_quant,
        dq_group_size=layout.dq_group_size,
        dq_mode=layout.dq_mode,
        disable_bias=found.bias is None,
        asym=layout.asym,
        gptq_version=layout.gptq_version,
        requires_grad=requires_grad,
    )
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in found.tensors.items()}
    if found.bias is not None:
        state["bias"] = torch.from_numpy(np.array(found.bias))
    layer.load_state_dict(state)
    layer.prepare_params()
    return layer
