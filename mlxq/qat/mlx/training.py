"""One training step of an MLX model: KL to a teacher or cross-entropy, Adam on float32 copies."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxq.qat.training import Batch, times_of

BETAS, EPS, CLIP = [0.9, 0.98], 1e-8, 1.0


def unfreeze_scales(model: nn.Module) -> None:
    """Freeze everything but scales and biases of packed layers."""
    model.freeze()
    for module in model.modules():
        if "scales" in module and "biases" in module:
            module.unfreeze(keys=["scales", "biases"], recurse=False)


class MlxTrainer:
    """training.Trainer over MLX; see training.distil.

    Where mx.distributed is initialized with several processes, gradients are averaged over them.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, trainable: str):
        self.student, self.teacher = student, teacher
        if trainable == "scales":
            unfreeze_scales(student)
        else:
            student.unfreeze()
        self.masters = {
            name: value.astype(mx.float32)
            for name, value in tree_flatten(student.trainable_parameters())
            if mx.issubdtype(value.dtype, mx.floating)
        }
        if not self.masters:
            raise ValueError("distil: the student has no packed layer; train 'all', or convert it first")
        self.dtypes = {
            name: value.dtype for name, value in tree_flatten(student.parameters()) if name in self.masters
        }
        self.adams = []  # (names, times the learning rate, Adam)
        owners = dict(student.named_modules())
        groups: dict[float, list[str]] = {}
        for name in self.masters:
            times = times_of(name, owners[name.rpartition(".")[0]], trainable)
            groups.setdefault(times, []).append(name)
        for times, names in groups.items():
            adam = optimizers.Adam(1.0, BETAS, EPS, bias_correction=True)
            adam.init({name: self.masters[name] for name in names})
            self.adams.append((names, times, adam))
        self.group = mx.distributed.init()
        self.rank, self.ranks = self.group.rank(), self.group.size()
        self._gradients = mx.value_and_grad(self._total)

    def agree(self, *values: float) -> list[float]:
        """The first process's numbers, in every process."""
        if self.ranks == 1:
            return list(values)
        mine = mx.array([value if self.rank == 0 else 0.0 for value in values])
        return mx.distributed.all_sum(mine, group=self.group, stream=mx.cpu).tolist()

    def _sum(self, *values: float) -> list[float]:
        if self.ranks == 1:
            return list(values)
        return mx.distributed.all_sum(mx.array(values), group=self.group, stream=mx.cpu).tolist()

    def _total(self, parameters: dict, tokens, weights, wanted) -> mx.array:
        """Sum of the loss over scored tokens, of a model with these parameters."""
        self.student.update(tree_unflatten(list(parameters.items())))
        given = nn.log_softmax(_logits(self.student(tokens))[:, :-1].astype(mx.float32), -1)
        if wanted is None:
            loss = -mx.take_along_axis(given, tokens[:, 1:, None], -1)[..., 0]
        else:
            loss = (mx.exp(wanted) * (wanted - given)).sum(-1)
        return (loss * weights).sum()

    def _inputs(self, batch: Batch):
        tokens = mx.array(np.asarray(batch.tokens, np.int32))
        wanted = None
        if self.teacher is not None:
            wanted = nn.log_softmax(_logits(self.teacher(tokens))[:, :-1].astype(mx.float32), -1)
            mx.eval(wanted)
        return tokens, mx.array(batch.targets), wanted

    def _rounded(self) -> dict:
        return {name: value.astype(self.dtypes[name]) for name, value in self.masters.items()}

    def step(self, batch: Batch, rate: float) -> float:
        count = max(float(batch.targets.sum()), 1.0)
        if len(batch.tokens) < self.ranks:
            raise ValueError(
                f"distil: a batch of {len(batch.tokens)} rows is too small for {self.ranks} processes"
            )
        mine = batch.shard(self.rank, self.ranks)
        loss, gradients = self._gradients(self._rounded(), *self._inputs(mine))
        gradients = {name: g.astype(mx.float32) * (self.ranks / count) for name, g in gradients.items()}
        if self.ranks > 1:
            averaged = nn.average_gradients(list(gradients.values()), self.group)
            gradients = dict(zip(gradients, averaged, strict=True))  # names with dots are no trees
        gradients, _ = optimizers.clip_grad_norm(gradients, CLIP)
        for names, times, adam in self.adams:
            adam.learning_rate = rate * times
            mine = ({name: tree[name] for name in names} for tree in (gradients, self.masters))
            self.masters |= adam.apply_gradients(*mine)
        mx.eval(self.masters, [adam.state for *_, adam in self.adams])
        self._publish()
        return self._sum(loss.item())[0] / count

    def _publish(self) -> None:
        """The masters into the parameters, rounded to what will be stored."""
        self.student.update(tree_unflatten(list(self._rounded().items())))

    def evaluate(self, batches) -> float:
        total = count = 0.0
        for batch in batches:
            mine = batch.shard(self.rank, self.ranks)
            if len(mine.tokens):
                total += self._total(self._rounded(), *self._inputs(mine)).item()
                count += float(mine.targets.sum())
        total, count = self._sum(total, count)
        return total / max(count, 1.0)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self.masters.items()}

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        self.masters = {name: mx.array(weights[name]) for name in self.masters}
        self._publish()

    def join(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return weights if self.rank == 0 else {}

    def split(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return weights

    def make_whole(self) -> None:
        """Nothing: MLX keeps the student whole in every process."""

    def state(self) -> dict[str, np.ndarray]:
        out = {f"weight/{name}": value for name, value in self.weights().items()}
        for names, _, adam in self.adams:
            for name in names:
                out |= {f"{part}/{name}": np.array(adam.state[name][part]) for part in ("m", "v")}
                out[f"step/{name}"] = np.array(adam.state["step"])
        return out

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.load_weights({name: state[f"weight/{name}"] for name in self.masters})
        for names, _, adam in self.adams:
            for name in names:
                adam.state[name] = {part: mx.array(state[f"{part}/{name}"]) for part in ("m", "v")}
                adam.state["step"] = mx.array(state[f"step/{name}"])


def _logits(output) -> mx.array:
    return output if isinstance(output, mx.array) else output.logits
