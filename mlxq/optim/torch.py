"""MPQAdamW and MPQSign for torch: loss.backward(); optimizer.step(). The formulas: mlxq.optim.

A packed parameter is an MPQWeight (mlxq.nn.mpq.torch): it has a gradient, words, scales and biases, and is
decoded in blocks of rows. Every other parameter gets the same step as a float: one optimiser serves a model.

Packed words have no float master to go back to, so a step with a gradient that is not finite is refused.
torch.amp.GradScaler unscales packed gradients and skips such steps; clip_grad_norm_, torch's or ours, clips.

In several processes (torch.distributed) the gradients of packed parameters are averaged over the ranks at the
end of each backward pass, so that clipping and scaling see what DistributedDataParallel gives for the others.
All ranks then hold the same words: pass forward_sync_buffers=False to DistributedDataParallel.
"""

from __future__ import annotations

import math
import weakref

import torch
import torch.distributed as dist
from torch.autograd import Variable

from mlxq.optim import (
    BLOCK_ELEMENTS,
    MOMENTS,
    RESIDUAL_UNITS,
    STATE_BLOCK,
    Options,
    seed_of,
)

_CODES = {"momentum": torch.int8, "variance": torch.uint8}


class _MPQOptimizer(torch.optim.Optimizer):
    """process_group   of torch.distributed whose ranks train this model; None: all; False: each its own."""

    moments: tuple[str, ...] = ()
    moves_packed_words = True  # mlxq.nn.mpq.torch refuses the steps of other optimisers
    process_group = None

    def __init__(self, params, seed: int = 0, **options):
        Options(**options)
        self.seed, self._in_backward = seed, False
        self._not_averaged: set[int] = set()
        super().__init__(params, options)

    def add_param_group(self, param_group):
        """As torch's. Raises ValueError for options of the group that cannot be."""
        Options(**{k: v for k, v in (self.defaults | param_group).items() if k in Options.__annotations__})
        super().add_param_group(param_group)
        me = weakref.ref(self)  # a model does not keep the state of an optimiser that is gone
        for index, _, p in self._numbered():
            if is_packed(p):

                def on_grad(weight, index=index):
                    if (optimizer := me()) is not None:
                        optimizer._on_grad(index, weight)

                p.on_grad = on_grad

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; the closure's loss.

        Raises FloatingPointError, with nothing changed, for a gradient that is not finite. A GPU is waited
        for once, not for each layer.
        """
        if self._in_backward and hasattr(self, "found_inf"):
            raise RuntimeError(
                f"{type(self).__name__}: step_in_backward has used gradients before GradScaler could unscale "
                "them; train in bfloat16 or float32 without a scaler"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(index, group, p) for index, group, p in self._numbered() if p.grad is not None]
        self._refuse_what_is_not_finite([(index, p, p.grad) for index, _, p in given])
        for index, group, p in given:
            if is_packed(p):
                self._step_packed(index, group, p, p.grad.float())
            else:
                self._step_float(group, p)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True lets GradScaler call step in any case: to be told that it comes too late."""
        return self._in_backward

    def step_in_backward(self) -> None:
        """From now on update each packed parameter inside backward() and free its gradient at once.

        No two gradients of packed layers then exist at a time. Gradients can be neither accumulated over
        micro-batches nor clipped nor scaled. step() still updates the other parameters.

        Each layer is averaged over the ranks of torch.distributed by itself, so backward passes of all ranks
        must meet the same layers. Each is checked by itself, too: backward() raises FloatingPointError for
        a gradient that is not finite before that layer changes, but after those that came before it.
        """
        self._in_backward = True

    @torch.no_grad()
    def _on_grad(self, index: int, p) -> None:
        """A backward pass has added to the gradient of a packed parameter."""
        if not self._in_backward:
            if self._ranks() > 1:
                self._not_averaged.add(index)
                Variable._execution_engine.queue_callback(self._average)
            return
        gradient, p.grad = p.grad, None
        if self._ranks() > 1:
            self._all_reduce(gradient.div_(self._ranks()))
        self._refuse_what_is_not_finite([(index, p, gradient)])
        group = next(group for number, group, _ in self._numbered() if number == index)
        self._step_packed(index, group, p, gradient)

    def _ranks(self) -> int:
        """How many processes train this model."""
        if self.process_group is False or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _all_reduce(self, tensor: torch.Tensor, **options) -> None:
        dist.all_reduce(tensor, group=self.process_group, **options)

    @torch.no_grad()
    def _average(self) -> None:
        """The mean over the ranks in each packed gradient that any rank's backward pass has added to.

        What earlier passes left is the same on all ranks, and so stays as it is.
        """
        if not self._not_averaged:  # an earlier callback of the same backward pass has done it
            return
        packed = [(i, p) for i, _, p in self._numbered() if is_packed(p) and p.requires_grad]
        added = torch.tensor([int(i in self._not_averaged) for i, _ in packed], device=packed[0][1].device)
        self._not_averaged.clear()
        self._all_reduce(added, op=dist.ReduceOp.MAX)
        for (_, p), somewhere in zip(packed, added.tolist(), strict=True):
            if not somewhere:
                continue
            if p.grad is None:
                N, K = len(p.scales), p.scales.shape[1] * p.format.group_size
                p.grad = torch.zeros(N, K, device=p.scales.device)
            self._all_reduce(p.grad.div_(self._ranks()))  # divided first: a sum of finite ones is finite

    def _refuse_what_is_not_finite(self, given: list[tuple]) -> None:
        """Raises FloatingPointError, naming the layers, for (index, parameter, gradient) of NaN or infinity.

        One answer for all of them: a GPU is waited for once.
        """
        given = [(index, p, gradient) for index, p, gradient in given if gradient.numel()]
        if not given:
            return
        # The largest magnitude needs no array of the gradient's size, and NaN survives it.
        largest = [torch.linalg.vector_norm(gradient, math.inf) for _, _, gradient in given]
        device = largest[0].device
        finite = torch.stack([value.to(device, torch.float32) for value in largest]).isfinite().tolist()
        bad = [self._name(index, p) for (index, p, _), fine in zip(given, finite, strict=True) if not fine]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise FloatingPointError(
                f"{type(self).__name__}: the gradient of {', '.join(bad[:3])}{more} holds NaN or infinity; "
                "it was not applied. Call zero_grad() and go on with another batch, or lower the learning "
                "rate or the scale of the loss (torch.amp.GradScaler skips such steps)"
            )

    def _name(self, index: int, p) -> str:
        """The layer's path, where somebody has told it, else the parameter's number and what it is."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if names:  # of optimisers made from named_parameters()
            return names[index].removesuffix(".weight")
        if getattr(p, "path", None):
            return p.path
        if is_packed(p):
            shape = len(p.scales), p.scales.shape[1] * p.format.group_size
            return f"parameter {index} ({shape[0]} x {shape[1]} packed weights)"
        return f"parameter {index} ({' x '.join(map(str, p.shape))})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; those of packed parameters are freed whatever set_to_none says."""
        for _, _, p in self._numbered():
            if is_packed(p):
                p.grad = None
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict) -> None:
        """As torch's, except that integer state stays integer: a saved run continues bit for bit."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for (_, _, p), i in zip(self._numbered(), ids, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _numbered(self):
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                yield index, group, p
                index += 1

    def _rate(self, group: dict, step: int) -> float:
        raise NotImplementedError

    def _direction(self, group: dict, gradient: torch.Tensor, moments: list[torch.Tensor]) -> torch.Tensor:
        """The step of one block, float32 like its gradient; updates the float32 moments in place."""
        raise NotImplementedError

    def _step_float(self, group: dict, p: torch.nn.Parameter) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state |= {name: torch.zeros_like(p, dtype=torch.float32) for name in self.moments}
        state["step"] += 1
        step = self._direction(group, p.grad.float(), [state[name] for name in self.moments])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(step.to(p.dtype), alpha=-self._rate(group, state["step"]))

    def _step_packed(self, index: int, group: dict, p, gradient: torch.Tensor) -> None:
        state, (N, K) = self.state[p], gradient.shape
        state.setdefault("step", 0)
        state["step"] += 1
        rate = self._rate(group, state["step"])
        random = torch.Generator(gradient.device).manual_seed(seed_of(self.seed, index, state["step"]))
        first = _first_of(p)
        if group["rounding"] == "error feedback" and "residual" not in state:
            state["residual"] = torch.zeros(N, K, dtype=torch.int8, device=gradient.device)
            if group["dithered"]:
                half = RESIDUAL_UNITS // 2
                state["residual"].random_(-half, half + 1, generator=random)
        if group["zeros_every"] and "biases" not in state:
            state["biases"] = p.biases[:, first].clone()

        low = None
        if group["rank"] is not None and group["rank"] < min(N, K):
            low = self._projected(group, state, gradient, random)
        rows_at_once = max(1, BLOCK_ELEMENTS // K)
        for start in range(0, N, rows_at_once):
            rows = slice(start, min(start + rows_at_once, N))
            if low is None:
                moments = _Moments(state, self.moments, gradient.shape, rows, group["state_bits"], random)
                step = self._direction(group, gradient[rows], moments.values)
                moments.store()
            elif low.shape[0] == N:
                step = low[rows] @ state["projection"].T
            else:
                step = state["projection"][rows] @ low
            self._repack(group, state, p, rows, step, rate, random, first)

    def _projected(self, group, state, gradient, random) -> torch.Tensor:
        """The step in the space of the leading singular vectors, (N, rank) or (rank, K)."""
        N, K = gradient.shape
        if "projection" not in state or (state["step"] - 1) % group["projection_every"] == 0:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            rank = group["rank"]
            state["projection"] = (right[:rank].T if N >= K else left[:, :rank]).contiguous()
        projection = state["projection"]
        low = gradient @ projection if N >= K else projection.T @ gradient
        moments = _Moments(state, self.moments, low.shape, slice(0, len(low)), group["state_bits"], random)
        step = self._direction(group, low, moments.values)
        moments.store()
        return step

    def _repack(self, group, state, p, rows, step, rate, random, first) -> None:
        """Move one block of rows: its codes, residuals and, when it is their turn, zeros."""
        bits, size, levels = p.format.bits, p.format.group_size, p.format.levels
        scales, biases = p.scales[rows], p.biases[rows]
        grouped = (*scales.shape, size)
        u = _unpack(p.words[rows], bits).view(grouped).float()
        if "residual" in state:
            u += state["residual"][rows].view(grouped).float() / RESIDUAL_UNITS
        change = step.reshape(grouped) * -rate
        if group["in_steps"]:
            change *= scales.abs()[..., None]
        if group["zeros_every"]:
            biases = self._moved_zeros(group, state, p, rows, change, first)
        decay = group["lr"] * group["weight_decay"]
        if decay:
            change -= (u * scales[..., None] + p.biases[rows][..., None]) * decay
        change += (p.biases[rows] - biases)[..., None]
        dead = scales == 0  # every code of such a group decodes to its bias
        change /= torch.where(dead, 1, scales)[..., None]
        u += torch.where(dead[..., None], 0, change)
        u.clamp_(-0.5, levels + 0.5)
        if "residual" in state:
            codes = u.clamp(0, levels).round_()
            u -= codes
            u *= RESIDUAL_UNITS
            u += torch.rand(u.shape, generator=random, device=u.device)
            half = RESIDUAL_UNITS // 2
            state["residual"][rows] = u.floor_().clamp_(-half, half).to(torch.int8).view(len(scales), -1)
        else:
            codes = (u + torch.rand(u.shape, generator=random, device=u.device)).floor_().clamp_(0, levels)
        p.words[rows] = _pack(codes.to(torch.int32).view(len(scales), -1), bits)
        if group["zeros_every"]:
            p.biases[rows] = biases

    def _moved_zeros(self, group, state, p, rows, change, first) -> torch.Tensor:
        """The biases that will decode the block after this step, float32 (rows, groups)."""
        mean = change.mean(-1)
        masters = state["biases"]
        if len(first) == mean.shape[1]:
            masters[rows] += mean
        else:  # groups wider than MLX's lie in several of them
            counts = torch.bincount(p.owner).to(mean.dtype)
            masters[rows] += torch.zeros_like(masters[rows]).index_add_(1, p.owner, mean) / counts
        if state["step"] % group["zeros_every"]:
            return p.biases[rows]
        master, scales = masters[rows], p.scales[rows][:, first]
        if p.zero_dtype is not None:
            moved = master.to(p.zero_dtype).float()
        else:
            least, most = p.smallest_zero, p.smallest_zero + p.format.levels
            steps = (-master / torch.where(scales == 0, 1, scales)).round_().clamp_(least, most)
            moved = torch.where(scales == 0, p.biases[rows][:, first], -(steps * scales))
        p.zeros_moved = True
        return moved[:, p.owner]


class MPQAdamW(_MPQOptimizer):
    """AdamW over packed and other parameters, with decoupled weight decay and bias correction.

    params   model.parameters(), or groups, as for torch.optim; the other arguments: mlxq.optim.Options
    seed     of the random rounding of residuals and of 8-bit state
    """

    moments = ("momentum", "variance")

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.99, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        rounding: str = "error feedback",
        zeros_every: int = 0,
        rank: int | None = None,
        projection_every: int = 200,
        state_bits: int = 32,
        in_steps: bool = False,
        dithered: bool = False,
        seed: int = 0,
    ):
        self.correct_bias = correct_bias
        super().__init__(
            params,
            seed,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding,
            zeros_every=zeros_every,
            rank=rank,
            projection_every=projection_every,
            state_bits=state_bits,
            in_steps=in_steps,
            dithered=dithered,
        )

    def _rate(self, group, step):
        if not self.correct_bias:
            return group["lr"]
        beta1, beta2 = group["betas"]
        return group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)

    def _direction(self, group, gradient, moments):
        momentum, variance = moments
        beta1, beta2 = group["betas"]
        momentum.lerp_(gradient, 1 - beta1)
        variance.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return momentum / (variance.sqrt() + group["eps"])


class MPQSign(_MPQOptimizer):
    """Sign of momentum over packed and other parameters: half of MPQAdamW's state, every step of one size.

    For very low bits. The arguments are those of MPQAdamW; betas are those of the momentum that is kept and
    of the one whose sign counts.
    """

    moments = ("momentum",)

    def __init__(
        self,
        params,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.99, 0.9),
        weight_decay: float = 0.0,
        *,
        rounding: str = "error feedback",
        zeros_every: int = 0,
        rank: int | None = None,
        projection_every: int = 200,
        state_bits: int = 32,
        in_steps: bool = False,
        dithered: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            params,
            seed,
            lr=lr,
            betas=betas,
            eps=0.0,
            weight_decay=weight_decay,
            rounding=rounding,
            zeros_every=zeros_every,
            rank=rank,
            projection_every=projection_every,
            state_bits=state_bits,
            in_steps=in_steps,
            dithered=dithered,
        )

    def _rate(self, group, step):
        return group["lr"]

    def _direction(self, group, gradient, moments):
        (momentum,) = moments
        beta1, beta3 = group["betas"]
        step = torch.lerp(gradient, momentum, beta3).sign_()
        momentum.lerp_(gradient, 1 - beta1)
        return step


def is_packed(p: torch.Tensor) -> bool:
    """Whether a parameter stands for packed words."""
    return hasattr(p, "zeros_moved")


def clip_grad_norm_(parameters, max_norm: float) -> torch.Tensor:
    """Scale all gradients to a joint 2-norm of at most max_norm; the norm before.

    torch.nn.utils.clip_grad_norm_ does so, too, but a norm that is not finite leaves these gradients as they
    are: then step() names the layers that it comes from.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.stack([g.norm(dtype=torch.float32).to(grads[0].device) for g in grads]).norm()
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for g in grads:
        g.mul_(factor.to(g.device))
    return norm


class _Moments:
    """float32 values of a block of rows of the moments; store() puts them back in the state's precision."""

    def __init__(self, state, names, shape, rows, bits, random):
        self.state, self.names, self.rows, self.random = state, names, rows, random
        K, device = shape[1], random.device
        self.eight, self.block = bits == 8, STATE_BLOCK if K % STATE_BLOCK == 0 else K
        for name in names:
            if name in state:
                continue
            if self.eight:
                state[name] = torch.zeros(shape, dtype=_CODES[name], device=device)
                state[name + "_max"] = torch.zeros(shape[0], K // self.block, device=device)
            else:
                state[name] = torch.zeros(shape, device=device)
        self.values = [self._load(name) for name in names]

    def _load(self, name: str) -> torch.Tensor:
        stored = self.state[name][self.rows]
        if not self.eight:
            return stored
        levels, power = MOMENTS[name]
        codes = stored.float().view(len(stored), -1, self.block) / levels
        values = codes * codes.abs() if power == 2 else codes.square().square_()
        return (values * self.state[name + "_max"][self.rows][..., None]).view(stored.shape)

    def store(self) -> None:
        if not self.eight:
            return
        for name, values in zip(self.names, self.values, strict=True):
            (levels, power), dtype = MOMENTS[name], _CODES[name]
            values = values.view(len(values), -1, self.block)
            largest = values.abs().amax(-1)
            share = (values.abs() / torch.where(largest == 0, 1, largest)[..., None]).clamp_(max=1)
            root = share.sqrt() if power == 2 else share.sqrt().sqrt_()
            code = root.mul_(levels).floor_().clamp_(max=levels - 1)
            below, above = (c.square() if power == 2 else c.square().square_() for c in (code, code + 1))
            chance = share.mul_(float(levels) ** power).sub_(below).div_(above.sub_(below))
            code += torch.rand(code.shape, generator=self.random, device=code.device) < chance
            if dtype == torch.uint8:
                code.clamp_(min=1)  # a variance of 0 would let eps alone divide
            self.state[name][self.rows] = (
                (code * values.sign() if dtype == torch.int8 else code)
                .to(dtype)
                .view(self.state[name][self.rows].shape)
            )
            self.state[name + "_max"][self.rows] = largest


def _first_of(p) -> torch.Tensor:
    """Index of the first of MLX's groups in each of the checkpoint's; owner ascends.

    Found once for each owner: on a GPU the question waits for all that was started before it.
    """
    known = getattr(p, "first_of_owner", None)
    if known is None or known[0] is not p.owner:
        owner = p.owner
        known = owner, torch.searchsorted(owner, torch.arange(int(owner[-1]) + 1, device=owner.device))
        p.first_of_owner = known
    return known[1]


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int32 (rows, K) of int32 words (rows, K * bits / 32)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).view(len(words), -1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words (rows, K * bits / 32) of int32 codes (rows, K)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return (codes.view(len(codes), -1, 32 // bits) << shifts).sum(-1, dtype=torch.int32)
