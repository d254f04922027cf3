"""One training step of a torch model: KL to a teacher or cross-entropy, Adam on float32 copies.

On an NVIDIA GPU loss and gradients are one CUDA graph, captured from the first batch: a fake-quantized layer
starts some fifty small kernels, and starting them one by one takes longer than all that they compute.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mlxq.qat.torch import sharding
from mlxq.qat.training import Batch, times_of

BETAS, EPS, CLIP = (0.9, 0.98), 1e-8, 1.0


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and biases of every packed layer, tied ones once."""
    found = {}
    for module in model.modules():
        scales, biases = (getattr(module, name, None) for name in ("scales", "biases"))
        if isinstance(scales, nn.Parameter) and isinstance(biases, nn.Parameter):
            found[id(scales)], found[id(biases)] = scales, biases
    return list(found.values())


class TorchTrainer:
    """training.Trainer over torch; see training.distil.

    autocast   a 16-bit torch.dtype for the products, or None
    sharded    see below
    graphed    whether batches of the first one's shape are CUDA graphs; None: on a GPU, in one process

    With torch.distributed initialized the student is trained by DistributedDataParallel, which keeps it whole
    in every process. With `sharded` student and teacher, the float32 copies and Adam's moments are cut up by
    fully_shard (mlxq.qat.torch.sharding) and stay so: make_whole() ends the training.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        trainable: str,
        autocast=None,
        sharded=False,
        graphed=None,
    ):
        self.student, self.teacher, self.autocast, self.sharded = student, teacher, autocast, sharded
        scales = scale_parameters(student)
        if trainable == "scales" and not scales:
            raise ValueError("distil: the student has no packed layer; train 'all', or convert it first")
        chosen = {id(p) for p in scales}
        for parameter in student.parameters():
            parameter.requires_grad_(
                parameter.is_floating_point() and (trainable == "all" or id(parameter) in chosen)
            )
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()
        if sharded:
            for model in (student, teacher) if teacher is not None else (student,):
                sharding.shard(model)
        self.device = next(student.parameters()).device
        self.names = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for _, p in self.names]
        groups: dict[float, list] = {}
        for (name, _), master in zip(self.names, self.masters, strict=True):
            groups.setdefault(self._times(name, trainable), []).append(master)
        self.optimizer = torch.optim.Adam(
            [{"params": params, "times": times} for times, params in groups.items()], 1.0, BETAS, EPS
        )
        self.rank, self.ranks, self.model = 0, 1, student
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            if not sharded:
                self.model = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
            self._publish()
        self.graphed = self.device.type == "cuda" and self.ranks == 1 if graphed is None else graphed
        self.graph = None

    def _times(self, name: str, trainable: str) -> float:
        """What the learning rate is multiplied by for one of the student's parameters."""
        return times_of(name, self.student.get_submodule(name.rpartition(".")[0]), trainable)

    def agree(self, *values: float) -> list[float]:
        """The first process's numbers, in every process."""
        if self.ranks == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def _sum(self, *values: float) -> list[float]:
        if self.ranks == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return shared.tolist()

    def _cast(self):
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _loss(self, model, batch: Batch) -> torch.Tensor:
        """Sum of the loss over the scored tokens of a batch."""
        return divergence(model, self.teacher, *tensors(batch, self.device), self._cast)

    def _backward(self, batch: Batch, factor: float) -> torch.Tensor:
        """The loss of a batch; gradients of `factor` times it are in the parameters afterwards."""
        if self.graphed and self.graph is None:
            try:
                self.graph = _Graph(self, batch, factor)
            except RuntimeError as error:
                self.graphed = False
                for _, parameter in self.names:
                    parameter.grad = None
                first = str(error).splitlines()[0]
                print(f"train: no CUDA graph of this model ({first}); its steps take longer", file=sys.stderr)
        if self.graphed and self.graph.serves(batch):
            return self.graph.replay(batch, factor)
        loss = self._loss(self.model, batch)
        (loss * factor).backward()
        return loss

    def step(self, batch: Batch, rate: float) -> float:
        self.model.train()
        count = float(batch.targets.sum())
        if len(batch.tokens) < self.ranks:
            raise ValueError(
                f"distil: a batch of {len(batch.tokens)} rows is too small for {self.ranks} processes"
            )
        mine = batch.shard(self.rank, self.ranks)
        loss = self._backward(mine, self.ranks / max(count, 1.0))
        for master, (_, parameter) in zip(self.masters, self.names, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        return self._sum(loss.item())[0] / max(count, 1.0)

    @torch.no_grad()
    def _publish(self) -> None:
        """The masters into the parameters, rounded to what will be stored."""
        parameters = [parameter for _, parameter in self.names]
        if not self.sharded:
            torch._foreach_copy_(parameters, self.masters)
            return
        for master, parameter in zip(self.masters, parameters, strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def evaluate(self, batches) -> float:
        self.student.eval()
        total = count = 0.0
        for batch in batches:
            mine = batch.shard(self.rank, self.ranks)
            if self.sharded and not len(mine.tokens):  # a layer is gathered by all of them or by none
                mine = Batch(batch.tokens[:1], np.zeros_like(batch.tokens[:1], bool))
            if len(mine.tokens):
                total += self._loss(self.student, mine).item()
                count += float(mine.targets.sum())
        if self.sharded:
            self.student.reshard()  # else what lies outside its layers stays gathered, and then stale
        total, count = self._sum(total, count)
        return total / max(count, 1.0)

    def weights(self) -> dict[str, np.ndarray]:
        return {
            name: sharding.local(master).detach().cpu().numpy().copy()
            for (name, _), master in zip(self.names, self.masters, strict=True)
        }

    @torch.no_grad()
    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        for (name, _), master in zip(self.names, self.masters, strict=True):
            sharding.local(master).copy_(torch.as_tensor(weights[name]))
        self._publish()

    def join(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        masters = {name: master for (name, _), master in zip(self.names, self.masters, strict=True)}
        whole = {name: sharding.joined(value, masters[name]) for name, value in weights.items()}
        return {name: value for name, value in whole.items() if value is not None}

    def split(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        masters = {name: master for (name, _), master in zip(self.names, self.masters, strict=True)}
        return {name: sharding.part_of(weights[name], master) for name, master in masters.items()}

    def make_whole(self) -> None:
        """Whole parameters in a sharded student, on the CPU of the first process, which ends the training."""
        if self.sharded:
            sharding.make_whole(self.student)

    def state(self) -> dict[str, np.ndarray]:
        out = {f"weight/{name}": value for name, value in self.join(self.weights()).items()}
        for (name, _), master in zip(self.names, self.masters, strict=True):
            for what, value in self.optimizer.state.get(master, {}).items():
                whole = sharding.joined(sharding.local(value).detach().cpu().numpy().copy(), value)
                out |= {} if whole is None else {f"{what}/{name}": whole}
        return out

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.load_weights(self.split({name: state[f"weight/{name}"] for name, _ in self.names}))
        for (name, _), master in zip(self.names, self.masters, strict=True):
            if f"step/{name}" in state:
                moments = {what: torch.zeros_like(master) for what in ("exp_avg", "exp_avg_sq")}
                for what, moment in moments.items():
                    mine = sharding.part_of(state[f"{what}/{name}"], master)
                    sharding.local(moment).copy_(torch.as_tensor(mine))
                self.optimizer.state[master] = {"step": torch.tensor(state[f"step/{name}"]), **moments}


class _Graph:
    """Loss and gradients of the trainer's model for one shape of batch, captured once and replayed.

    Raises RuntimeError when something in the model cannot be captured.
    """

    def __init__(self, trainer: TorchTrainer, batch: Batch, factor: float):
        device = trainer.device
        self.parameters = [parameter for _, parameter in trainer.names]
        self.tokens, self.weights = tensors(batch, device)
        self.factor = torch.tensor(factor, device=device)

        def compute() -> torch.Tensor:
            for parameter in self.parameters:
                parameter.grad = None
            loss = divergence(trainer.model, trainer.teacher, self.tokens, self.weights, trainer._cast)
            (loss * self.factor).backward()
            return loss.detach()

        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):  # on the model's GPU; left when a capture fails, too
            for _ in range(2):  # what is compiled or allocated on first use has no place in a capture
                compute()
            with torch.cuda.graph(self.captured, stream=side):
                self.loss = compute()
        torch.cuda.current_stream(device).wait_stream(side)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def serves(self, batch: Batch) -> bool:
        return batch.tokens.shape == self.tokens.shape

    def replay(self, batch: Batch, factor: float) -> torch.Tensor:
        for held, given in zip((self.tokens, self.weights), tensors(batch, "cpu"), strict=True):
            held.copy_(given)
        self.factor.fill_(factor)
        self.captured.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss


def tensors(batch: Batch, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 (B, T) of a batch, and the weights of its targets, float32 (B, T - 1)."""
    tokens = torch.as_tensor(np.asarray(batch.tokens, np.int64), device=device)
    return tokens, torch.as_tensor(batch.targets, device=device)


def divergence(
    model, teacher, tokens: torch.Tensor, weights: torch.Tensor, cast=contextlib.nullcontext
) -> torch.Tensor:
    """Sum over tokens (B, T) of KL(teacher || model), or of cross-entropy without a teacher.

    weights   (B, T - 1), of predicting tokens[:, 1:]      cast   gives the context of the models' calls
    """
    wanted = None
    if teacher is not None:
        with torch.no_grad(), cast():
            wanted = F.log_softmax(_logits(teacher(tokens))[:, :-1].float(), -1)
    with cast():
        logits = _logits(model(tokens))
    given = F.log_softmax(logits[:, :-1].float(), -1)
    if wanted is None:
        loss = -given.gather(-1, tokens[:, 1:, None])[..., 0]
    else:
        loss = (wanted.exp() * (wanted - given)).sum(-1)
    return (loss * weights).sum()


def _logits(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits
