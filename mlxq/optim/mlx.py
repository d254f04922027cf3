"""MPQAdamW and MPQSign for MLX: optimizer.update(model, gradients). The formulas: mlxq.optim.

A packed layer is an MPQLinear (mlxq.nn.mpq.mlx): the gradient of its handle is that of the weight, (K, N).
Every other parameter gets the same step as a float, so one optimiser serves a model. Call update outside
mx.compile (loss and gradients may be compiled): it evaluates one layer after the other, so that no two are
decoded at a time. Save optimizer.state with mlx.utils.tree_flatten; set it, and a run continues bit for bit.

Packed words have no float master to go back to: update refuses gradients that are not finite, and looks at
all of them before it changes anything, so they exist at once. clip_grad_norm of mlx.optimizers takes packed
gradients like others. In several processes (mx.distributed) call average_gradients of mlx.nn before update.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlxq.optim import (
    MOMENTS,
    RESIDUAL_UNITS,
    STATE_BLOCK,
    Options,
    seed_of,
)


class _MPQOptimizer(Optimizer):
    moments: tuple[str, ...] = ()

    def __init__(self, learning_rate, seed: int = 0, **options):
        super().__init__()
        lr = learning_rate if isinstance(learning_rate, (int, float)) else 0.0
        self.options, self.seed = Options(lr=lr, **options), seed
        self._maybe_schedule("learning_rate", learning_rate)

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Change the model by a tree of gradients, packed layers in place one by one.

        Raises FloatingPointError, with nothing changed, for gradients that are not finite.
        """
        flat = dict(tree_flatten(gradients))
        self._refuse_what_is_not_finite(flat)
        layers = {
            path: layer
            for path, layer in model.named_modules()
            if hasattr(layer, "zeros_moved") and _below(path, "handle") in flat
        }
        found = {path: flat.pop(_below(path, "handle")) for path in layers}
        # An empty tree, too, counts a step and follows the schedule of the learning rate.
        model.update(self.apply_gradients(tree_unflatten(list(flat.items())) if flat else {}, model))
        step, lr = int(self.step.item()), float(self.learning_rate.item())
        states = self.state.setdefault("mpq", {})
        for index, (path, layer) in enumerate(layers.items()):
            state = states.setdefault(path.replace(".", "/"), {})
            self._step_packed(index, step, lr, layer, found.pop(path), state)

    def _refuse_what_is_not_finite(self, flat: dict[str, mx.array]) -> None:
        """Raises FloatingPointError, naming the layers, for gradients of NaN or infinity."""
        if not flat:
            return
        finite = mx.stack([mx.isfinite(gradient).all() for gradient in flat.values()]).tolist()
        bad = [path.removesuffix(".handle") for path, fine in zip(flat, finite, strict=True) if not fine]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise FloatingPointError(
                f"{type(self).__name__}: the gradient of {', '.join(bad[:3])}{more} holds NaN or infinity; "
                "it was not applied. Go on with another batch, or lower the learning rate"
            )

    def init_single(self, parameter: mx.array, state: dict) -> None:
        for name in self.moments:
            state[name] = mx.zeros(parameter.shape)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        lr, step = self.learning_rate, self.step
        direction = self._direction(gradient.astype(mx.float32), state)
        moved = parameter * (1 - lr * self.options.weight_decay) - self._rate(lr, step) * direction
        return moved.astype(parameter.dtype)

    def _rate(self, lr, step):
        raise NotImplementedError

    def _direction(self, gradient: mx.array, moments: dict[str, mx.array]) -> mx.array:
        """The step, float32 like its gradient; replaces the float32 moments."""
        raise NotImplementedError

    def _step_packed(
        self, index: int, step: int, lr: float, layer: Any, gradient: mx.array, state: dict
    ) -> None:
        options, gradient = self.options, gradient.astype(mx.float32).T
        if "_order" in layer:
            gradient = mx.take(gradient, layer._order, axis=1)
        random = _Random(seed_of(self.seed, index, step))
        packed = layer.packed
        bits, size, levels = packed.format.bits, packed.format.group_size, packed.format.levels
        scales, biases, grouped = packed.scales, packed.biases, (*packed.scales.shape, size)
        rate = float(self._rate(lr, step))

        direction = self._move(gradient, state, step, random)
        change = direction.reshape(grouped) * -rate
        if options.in_steps:
            change = change * mx.abs(scales)[..., None]
        u = _unpack(packed.words, bits).reshape(grouped).astype(mx.float32)
        if options.dithered and "residual" not in state:
            half = RESIDUAL_UNITS // 2
            state["residual"] = mx.floor(random.uniform(gradient.shape) * (2 * half + 1)) - half
        if "residual" in state:
            u = u + state["residual"].reshape(grouped).astype(mx.float32) / RESIDUAL_UNITS
        if options.zeros_every:
            biases = self._moved_zeros(layer, state, step, change)
        if options.weight_decay:
            decay = lr * options.weight_decay
            change = change - (u * scales[..., None] + packed.biases[..., None]) * decay
        change = change + (packed.biases - biases)[..., None]
        dead = scales == 0  # every code of such a group decodes to its bias
        change = mx.where(dead[..., None], 0, change / mx.where(dead, 1, scales)[..., None])
        u = mx.clip(u + change, -0.5, levels + 0.5)
        if options.rounding == "error feedback":
            codes = mx.round(mx.clip(u, 0, levels))
            units = mx.floor((u - codes) * RESIDUAL_UNITS + random.uniform(u.shape))
            half = RESIDUAL_UNITS // 2
            state["residual"] = mx.clip(units, -half, half).astype(mx.int8).reshape(gradient.shape)
        else:
            codes = mx.clip(mx.floor(u + random.uniform(u.shape)), 0, levels)
        layer.weight = _pack(codes.astype(mx.uint32).reshape(gradient.shape), bits)
        layer.biases = biases
        mx.eval(layer.weight, layer.biases, state)

    def _move(self, gradient: mx.array, state: dict, step: int, random: _Random) -> mx.array:
        """The step for a gradient (N, K), through the projection where there is one."""
        options, (N, K) = self.options, gradient.shape
        if options.rank is None or options.rank >= min(N, K):
            return self._with_state(gradient, state, random)
        if "projection" not in state or (step - 1) % options.projection_every == 0:
            left, _, right = mx.linalg.svd(gradient, stream=mx.cpu)
            chosen = right[: options.rank].T if N >= K else left[:, : options.rank]
            state["projection"] = mx.contiguous(chosen)
        projection = state["projection"]
        if N >= K:
            return self._with_state(gradient @ projection, state, random) @ projection.T
        return projection @ self._with_state(projection.T @ gradient, state, random)

    def _with_state(self, gradient: mx.array, state: dict, random: _Random) -> mx.array:
        """The step for a gradient whose moments are in state, in 32 or 8 bits."""
        eight = self.options.state_bits == 8
        moments = {}
        for name in self.moments:
            if name not in state:
                moments[name] = mx.zeros(gradient.shape)
            else:
                moments[name] = _decode(name, state[name], state[name + "_max"]) if eight else state[name]
        direction = self._direction(gradient, moments)
        for name, values in moments.items():
            if eight:
                state[name], state[name + "_max"] = _encode(name, values, random)
            else:
                state[name] = values
        return direction

    def _moved_zeros(self, layer: Any, state: dict, step: int, change: mx.array) -> mx.array:
        """The biases that will decode after this step, float32 (N, groups)."""
        scales, biases, owner = layer.scales, layer.biases, layer._owner
        groups = int(owner[-1].item()) + 1
        belongs = (owner[:, None] == mx.arange(groups)[None]).astype(mx.float32)
        first = mx.argmax(belongs, axis=0)
        if "biases" not in state:
            state["biases"] = biases[:, first]
        # Groups wider than MLX's lie in several of them.
        state["biases"] = state["biases"] + (change.mean(-1) @ belongs) / belongs.sum(0)
        if step % self.options.zeros_every:
            return biases
        master, of_group = state["biases"], scales[:, first]
        if layer.zero_dtype is not None:
            moved = master.astype(layer.zero_dtype).astype(mx.float32)
        else:
            least, dead = layer.smallest_zero, of_group == 0
            steps = mx.round(-master / mx.where(dead, 1, of_group))
            steps = mx.clip(steps, least, least + (1 << layer.w_bit) - 1)
            moved = mx.where(dead, biases[:, first], -(steps * of_group))
        layer.zeros_moved = True
        return moved[:, owner]


class MPQAdamW(_MPQOptimizer):
    """AdamW over packed and other parameters, with decoupled weight decay and bias correction.

    learning_rate is a number or a schedule; the other arguments: mlxq.optim.Options. seed is that of the
    random rounding of residuals and of 8-bit state.
    """

    moments = ("momentum", "variance")

    def __init__(
        self,
        learning_rate=1e-4,
        betas: tuple[float, float] = (0.99, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        seed: int = 0,
        **options,
    ):
        super().__init__(
            learning_rate, seed, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **options
        )
        self.correct_bias = correct_bias

    def _rate(self, lr, step):
        if not self.correct_bias:
            return lr
        beta1, beta2 = self.options.betas
        return lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)

    def _direction(self, gradient, moments):
        beta1, beta2 = self.options.betas
        m = beta1 * moments["momentum"] + (1 - beta1) * gradient
        v = beta2 * moments["variance"] + (1 - beta2) * gradient * gradient
        moments["momentum"], moments["variance"] = m, v
        return m / (mx.sqrt(v) + self.options.eps)


class MPQSign(_MPQOptimizer):
    """Sign of momentum over packed and other parameters: half of MPQAdamW's state, every step of one size.

    For very low bits. betas are those of the momentum that is kept and of the one whose sign counts.
    """

    moments = ("momentum",)

    def __init__(
        self,
        learning_rate=1e-5,
        betas: tuple[float, float] = (0.99, 0.9),
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        **options,
    ):
        super().__init__(
            learning_rate, seed, betas=tuple(betas), eps=0.0, weight_decay=weight_decay, **options
        )

    def _rate(self, lr, step):
        return lr

    def _direction(self, gradient, moments):
        beta1, beta3 = self.options.betas
        before = moments["momentum"]
        moments["momentum"] = beta1 * before + (1 - beta1) * gradient
        return mx.sign(beta3 * before + (1 - beta3) * gradient)


class _Random:
    """Uniform numbers in [0, 1), one array after the other, from one seed."""

    def __init__(self, seed: int):
        self.key = mx.random.key(seed)

    def uniform(self, shape) -> mx.array:
        self.key, key = mx.random.split(self.key)
        return mx.random.uniform(shape=shape, key=key)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _decode(name: str, codes: mx.array, largest: mx.array) -> mx.array:
    levels, power = MOMENTS[name]
    codes = codes.astype(mx.float32).reshape(*largest.shape, -1) / levels
    return (mx.sign(codes) * mx.abs(codes) ** power * largest[..., None]).reshape(codes.shape[0], -1)


def _encode(name: str, values: mx.array, random: _Random) -> tuple[mx.array, mx.array]:
    """(codes int8 or uint8, largest of each block), rounded at random to the right mean."""
    levels, power = MOMENTS[name]
    K = values.shape[1]
    blocks = values.reshape(len(values), -1, STATE_BLOCK if K % STATE_BLOCK == 0 else K)
    largest = mx.abs(blocks).max(-1)
    share = mx.minimum(mx.abs(blocks) / mx.where(largest == 0, 1, largest)[..., None], 1)
    code = mx.minimum(mx.floor(share ** (1 / power) * levels), levels - 1)
    below, above = (code / levels) ** power, ((code + 1) / levels) ** power
    code = code + (random.uniform(code.shape) < (share - below) / (above - below))
    if name == "momentum":
        return (code * mx.sign(blocks)).astype(mx.int8).reshape(values.shape), largest
    # A variance of 0 would let eps alone divide.
    return mx.maximum(code, 1).astype(mx.uint8).reshape(values.shape), largest


def _unpack(words: mx.array, bits: int) -> mx.array:
    """Codes uint32 (N, K) of words uint32 (N, K * bits / 32)."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Words uint32 (N, K * bits / 32) of codes uint32 (N, K)."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return (codes.reshape(codes.shape[0], -1, 32 // bits) << shifts).sum(-1).astype(mx.uint32)
