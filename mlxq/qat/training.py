"""Distillation and quantization-aware training: one loop, whatever framework computes the step.

    outcome = distil(student, teacher, batches, trainable="scales", minutes=5)

The student comes back as good as it was or better on the evaluation batches: it is measured before, on the
way and at the end, and the best of what was measured is what it holds afterwards.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

TRAINABLE = ("scales", "all")
LEARNING_RATE = {"scales": 2e-4, "all": 2e-5}
WARMUP = 0.05  # of the run, linearly; then the rate falls as a cosine
LAST_RATE = 0.1  # of the first
RANGE_RATE = 10.0  # of the weights' learning rate, for scales and biases that train with weights
EVALUATIONS = 8  # on the way, unless told how often
MEASURING = 0.2  # of a run of so many minutes that evaluations on the way may take


@dataclass(frozen=True)
class Batch:
    """Token ids of a few texts, and which of them are scored.

    tokens   integers (B, T)
    scored   bool (B, T), whether each token is one that the model is to predict; None: all but the first
    """

    tokens: np.ndarray
    scored: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        """Weights (B, T - 1), float32, of predicting tokens[:, 1:]."""
        shape = self.tokens[:, 1:].shape
        if self.scored is None:
            return np.ones(shape, np.float32)
        return np.ascontiguousarray(self.scored[:, 1:], np.float32)

    def shard(self, rank: int, ranks: int) -> Batch:
        """The rows of one of several processes: every ranks-th, from its own number."""
        scored = None if self.scored is None else self.scored[rank::ranks]
        return Batch(self.tokens[rank::ranks], scored)


def as_batches(batches) -> list[Batch]:
    """Batches from arrays of token ids. Raises ValueError for none, and for one without a pair of tokens."""
    made = [b if isinstance(b, Batch) else Batch(np.asarray(b)) for b in batches]
    if not made:
        raise ValueError("distil: there are no batches")
    for batch in made:
        if batch.tokens.ndim != 2 or batch.tokens.shape[1] < 2 or batch.tokens.dtype.kind not in "iu":
            raise ValueError(
                f"distil: a batch is {batch.tokens.dtype} {batch.tokens.shape}; "
                "wanted integers (B, T), T >= 2"
            )
    return made


class Trainer(Protocol):
    """What the loop asks of a framework. rank and ranks: this process, and how many train together."""

    rank: int
    ranks: int

    def step(self, batch: Batch, rate: float) -> float:
        """Loss of this batch, all processes together, before one optimiser step at this learning rate."""

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss of every scored token, all processes together; changes nothing."""

    def agree(self, *values: float) -> list[float]:
        """The first process's numbers, in every process."""

    def weights(self) -> dict[str, np.ndarray]:
        """The trained weights, float32; of a sharded student this process's part of each."""

    def load_weights(self, weights: dict[str, np.ndarray]) -> None: ...
    def join(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What weights() gives, made whole, in the first process; nothing in the others. All call this."""

    def split(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whole weights, which every process has, as load_weights takes them. All call this."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything that training changes: float32 weights, moments, counts; whole, as join gives them."""

    def load_state(self, state: dict[str, np.ndarray]) -> None: ...


@dataclass
class Outcome:
    """What a run did.

    student         the model, with the best weights that were measured
    start, best     mean loss on the evaluation batches, before and of what the student holds now
    losses          of each step, on its own batch        evaluations   (step, loss)
    seconds         of training and evaluation, earlier parts of a resumed run included
    finished        False when the run was stopped by `stop`
    """

    start: float = math.nan
    best: float = math.inf
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    student: Any = None


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which order.

    steps, minutes  one of them; minutes count training and evaluation alike
    rate            highest learning rate
    evaluate_every  steps; None: EVALUATIONS times a run, of so many minutes fewer where they would take long
    seed            of the order of the batches, which is another one in each epoch
    """

    steps: int | None = None
    minutes: float | None = None
    rate: float = 2e-4
    evaluate_every: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("distil: give steps or minutes, one of them")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"distil: steps={self.steps}; wanted 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"distil: minutes={self.minutes}; wanted more than 0")
        if not self.rate > 0:
            raise ValueError(f"distil: a learning rate of {self.rate}; wanted more than 0")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"distil: evaluate_every={self.evaluate_every}; wanted 1 or more")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0 to 1."""
        return step / self.steps if self.steps is not None else min(seconds / (60 * self.minutes), 1.0)

    def until_next(self, seconds: float) -> float:
        """How much of the run passes from one evaluation, which took so long, to the next."""
        least = 1 / EVALUATIONS
        return least if self.minutes is None else max(least, seconds / (60 * self.minutes * MEASURING))

    def rate_at(self, progress: float) -> float:
        if progress < WARMUP:
            return self.rate * (progress / WARMUP * 0.9 + 0.1)
        turn = (progress - WARMUP) / (1 - WARMUP)
        return self.rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * turn)))

    def batch_at(self, step: int, count: int) -> int:
        """Which of count batches this step takes: a new shuffle for each epoch, the same in every process."""
        epoch, place = divmod(step, count)
        order = list(range(count))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order[place]


def run(
    trainer: Trainer,
    batches: Sequence[Batch],
    evaluation: Sequence[Batch],
    schedule: Schedule,
    *,
    keep_best: bool = True,
    resume: tuple[dict[str, np.ndarray], dict] | None = None,
    on_step: Callable[[Outcome, float], None] | None = None,
    save: Callable[[dict[str, np.ndarray], dict], None] | None = None,
    save_every: float = 60.0,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Train to the end of the schedule, and leave the best weights in the trainer.

    resume       (arrays, facts) that `save` was given: the run goes on from there to the same losses
    on_step      called with the outcome so far and the progress, after each step and evaluation
    save         called with the state about every save_every seconds and when `stop` says so
    stop         asked before each step

    In several processes the first one's clock, `save` and `stop` decide for all of them.
    """
    outcome, best = Outcome(), None
    if trainer.agree(float(resume is not None)) != [float(resume is not None)]:
        raise ValueError("distil: the first process resumes a run, or begins one, and this one does not")
    if resume is not None:
        arrays, facts = resume
        trainer.load_state({k[len("now/") :]: v for k, v in arrays.items() if k.startswith("now/")})
        best = trainer.split({k[len("best/") :]: v for k, v in arrays.items() if k.startswith("best/")})
        outcome = Outcome(**{**facts, "evaluations": [tuple(e) for e in facts["evaluations"]]})
    begin, saved = time.monotonic() - outcome.seconds, time.monotonic()
    until_next = schedule.until_next(0.0)

    def measure(step: int) -> None:
        nonlocal best, until_next
        asked = time.monotonic()
        loss = trainer.evaluate(evaluation)
        until_next = schedule.until_next(*trainer.agree(time.monotonic() - asked))
        outcome.evaluations.append((step, loss))
        if best is None:
            outcome.start = loss
        if best is None or loss < outcome.best:
            best, outcome.best = trainer.weights(), loss
        outcome.seconds = time.monotonic() - begin
        if on_step is not None:
            on_step(outcome, schedule.progress(len(outcome.losses), outcome.seconds))

    def store() -> None:
        outcome.seconds = time.monotonic() - begin
        arrays = {f"now/{k}": v for k, v in trainer.state().items()}
        arrays |= {f"best/{k}": v for k, v in trainer.join(best).items()}
        if save is not None:
            save(arrays, {k: v for k, v in vars(outcome).items() if k not in ("student", "finished")})
        trainer.agree(0.0)  # no process goes on before it is written

    if best is None:
        measure(0)
    measured_at = schedule.progress(outcome.evaluations[-1][0], outcome.seconds)
    while True:
        step = len(outcome.losses)
        now = time.monotonic()
        stopped = stop is not None and stop()
        due = save is not None and (stopped or now - saved > save_every)
        progress, stopped, due = trainer.agree(schedule.progress(step, now - begin), stopped, due)
        if progress >= 1:
            break
        if due:
            store()
            saved = time.monotonic()
        if stopped:
            return outcome
        batch = batches[schedule.batch_at(step, len(batches))]
        outcome.losses.append(trainer.step(batch, schedule.rate_at(progress)))
        outcome.seconds = time.monotonic() - begin
        if on_step is not None:
            on_step(outcome, schedule.progress(step + 1, outcome.seconds))
        every = schedule.evaluate_every
        due = (step + 1) % every == 0 if every else progress - measured_at >= until_next
        if due:
            measure(step + 1)
            measured_at = progress
    if outcome.evaluations[-1][0] != len(outcome.losses):
        measure(len(outcome.losses))
    if keep_best:
        trainer.load_weights(best)
    else:
        outcome.best = outcome.evaluations[-1][1]
    outcome.finished = True
    outcome.seconds = time.monotonic() - begin
    return outcome


def is_range(name: str) -> bool:
    """Whether a parameter is a scale, bias or zero point of a quantized weight."""
    return name.rpartition(".")[2] in ("scales", "biases", "scale", "zero_point")


def times_of(name: str, owner, trainable: str) -> float:
    """What the learning rate is multiplied by for a parameter of this module.

    Ranges that train with weights have RANGE_RATE, alone 1. A step of a scale moves the weight of the largest
    code that many times as far, so its rate falls with the codes: 3 / (codes - 1), which is 1 at 2 bits.
    """
    if not is_range(name):
        return 1.0
    times = RANGE_RATE if trainable == "all" else 1.0
    if name.rpartition(".")[2] not in ("scales", "scale"):
        return times
    if hasattr(owner, "bits"):
        return times * 3 / (2**owner.bits - 1)
    low, high = owner.config.bounds
    return times * 3 / (high - low)


def distil(
    student,
    teacher,
    batches,
    *,
    trainable: str = "scales",
    steps: int | None = None,
    minutes: float | None = None,
    learning_rate: float | None = None,
    eval_batches=None,
    evaluate_every: int | None = None,
    keep_best: bool = True,
    seed: int = 0,
    on_step: Callable[[Outcome, float], None] | None = None,
    sharded: bool = False,
) -> Outcome:
    """Train a student towards its teacher's next-token distributions; the student is changed in place.

    student, teacher   models of torch (transformers', or any that gives logits or has .logits) or of MLX
                       (mlx-lm's); a teacher of None trains on the text itself
    batches            integer arrays (B, T), or Batch, of which only scored tokens count
    trainable          "scales": scales and biases of packed layers, through ops.qmm's own gradients, no float
                       copy of a weight. "all": besides them every float parameter; of a model that quantize_
                       prepared, the weights behind the fake quantizers
    eval_batches       what keep_best judges by; None: the last tenth of batches, at least one, which then is
                       not trained on
    learning_rate      of Adam; None: 2e-4 for scales, 2e-5 for all (ten times that for their ranges)

    Loss: mean over scored tokens of KL(teacher || student) in nats; without a teacher cross-entropy.
    16-bit parameters are trained through float32 copies of themselves, so that small steps count.

    In several processes (torchrun, mx.distributed) each takes its share of every batch and gradients are
    averaged. With `sharded` torch's fully_shard also cuts up the models, and they stay cut. Raises ValueError
    for settings that do not exist and for a student without such parameters.
    """
    schedule = Schedule(
        steps, minutes, learning_rate or LEARNING_RATE.get(trainable, 1.0), evaluate_every, seed
    )
    batches = as_batches(batches)
    if eval_batches is None:
        held = max(1, len(batches) // 10)
        if held == len(batches):
            raise ValueError("distil: one batch cannot be trained on and measured with; give eval_batches")
        batches, eval_batches = batches[:-held], batches[-held:]
    trainer = trainer_for(student, teacher, trainable, **({"sharded": True} if sharded else {}))
    outcome = run(trainer, batches, as_batches(eval_batches), schedule, keep_best=keep_best, on_step=on_step)
    outcome.student = student
    return outcome


def trainer_for(student, teacher, trainable: str = "scales", **options) -> Trainer:
    """The trainer of the student's framework; options are those of TorchTrainer.

    Raises ValueError for a mix of two frameworks, for other `trainable`, and for options with MLX.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"distil: trainable={trainable!r}; wanted {', '.join(TRAINABLE)}")
    kinds = {framework_of(model) for model in (student, teacher) if model is not None}
    if len(kinds) > 1:
        raise ValueError("distil: student and teacher are of two frameworks; load both in one")
    if kinds == {"torch"}:
        from mlxq.qat.torch.training import TorchTrainer

        return TorchTrainer(student, teacher, trainable, **options)
    if options:
        raise ValueError(f"distil: {', '.join(options)} is for models of torch; these are MLX's")
    from mlxq.qat.mlx.training import MlxTrainer

    return MlxTrainer(student, teacher, trainable)


def framework_of(model) -> str:
    """ "torch" or "mlx". Raises ValueError for a model of neither."""
    for base in type(model).__mro__:
        name = base.__module__.split(".")[0]
        if name in ("torch", "mlx"):
            return name
    raise ValueError(f"a {type(model).__name__} is neither a torch nor an MLX model")
