"""Block-wise training: each decoder block's weights, scales and biases towards the float block's output.

    blocks in order: inputs   what the quantized blocks before it give
                     target   what the float model has after this block
                     loss     mean over tokens of |given - target|^2 / |target|^2

Source: EfficientQAT (Chen et al., 2024), section 3.2, Block-AP. Its loss is not divided by |target|^2; here
it is, because the next norm divides each token by its own size, and first tokens are far larger than others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlxq import qat
from mlxq.format import Format
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear
from mlxq.qat import torch as qt
from mlxq.qat.torch.training import TorchTrainer, divergence, tensors
from mlxq.qat.training import RANGE_RATE as OF_ALL
from mlxq.qat.training import Batch, Schedule, is_range, run, times_of
from mlxq.train import Settings, _float_folder, data
from mlxq.train.files import Loaded, weight_config, write_model
from mlxq.train.torch import Session, start_from_folder

# Of weights, in units of their layer's mean scale, so that it takes as many steps at every width and in every
# model until a code changes; other parameters are in units of their own mean magnitude.
LEARNING_RATE = 1e-3
RANGE_RATE = 5.0  # of that, for scales and biases
ROWS = {"cpu": 48}  # rows of text whose states are held, by kind of device
MOST_ROWS = 256  # on the others
LEAST_MINUTES = 0.01  # of a block, when the time is over


@dataclass(frozen=True)
class States(Batch):
    """A batch that says which rows of the held states it is."""

    rows: tuple[int, ...] = ()

    def shard(self, rank: int, ranks: int) -> States:
        """The whole batch: blocks train in one process."""
        return self


class BlockTrainer(TorchTrainer):
    """TorchTrainer of one block: every float parameter of it, towards targets.

    call             (args, kwargs) of the block beside its state
    inputs, targets  states (rows, T, width)
    """

    def __init__(self, block: nn.Module, call, inputs: torch.Tensor, targets: torch.Tensor):
        super().__init__(block, None, "all", graphed=False)
        self.call, self.inputs, self.targets = call, inputs, targets

    def _times(self, name: str, trainable: str) -> float:
        owner, _, own = name.rpartition(".")
        module = self.student.get_submodule(owner)
        ranges = module if is_range(name) else getattr(module, "weight_fake_quantizer", None)
        if ranges is None or own == "bias":
            return float(module.get_parameter(own).detach().abs().mean()) or 1.0
        scale = float(ranges.scale.detach().abs().mean())
        return scale * times_of(name, module, trainable) * (RANGE_RATE / OF_ALL if is_range(name) else 1.0)

    def _loss(self, model, batch: States) -> torch.Tensor:
        rows = list(batch.rows)
        target = self.targets[rows].to(self.device).float()
        given = _through(model, self.inputs[rows].to(self.device), self.call).float()
        error = (given - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
        return error[:, 1:].mul(torch.as_tensor(batch.targets, device=self.device)).sum()


@dataclass
class Trained:
    """What a run came to: KL from the float model on the held-out rows, and each block's loss.

    start, best   KL before and after            blocks   (loss before, after) of each block
    seconds       with those of earlier runs that this one went on with
    """

    start: float
    best: float
    blocks: list[tuple[float, float]]
    steps: int
    seconds: float


def train_blocks(
    settings: Settings,
    dst: Path,
    *,
    on_block: Callable[[int, int, float, float], None] = lambda number, count, start, best: None,
    keep: Path | None = None,
) -> Trained:
    """Train settings.start block by block towards settings.model, and write the new folder dst.

    settings   model: the float model; start: its quantized folder, whose layers keep their formats; minutes
               for all blocks, or steps of each; data, length, batch, evaluate, device as in mlxq.train
    on_block   called with (number, blocks, loss before, loss after)
    keep       a folder for trained blocks; those that an interrupted run with these settings left are taken
               over, and dst is replaced

    A block that is not better on the held-out rows after training is as it was. Where the whole model is not
    nearer to the float model than its start in the end, nothing is written. Raises ValueError for models
    whose blocks do not run one by one, and as mlxq.train does.
    """
    begin = time.monotonic()
    session = Session(settings.device)
    with tempfile.TemporaryDirectory(prefix="mlxq-blocks-") as scratch:
        source = _float_folder(settings.model, Path(scratch) / "float")
        teacher, student = (session.load(source, settings.dtype) for _ in range(2))
    quantized = session.load(Path(settings.start), settings.dtype)
    _prepare(student.module, quantized.module, Path(settings.start))
    quantized = Loaded(student.module, quantized.tokenizer, quantized.config, quantized.folder, True)
    for model in (teacher.module, student.module):
        model.requires_grad_(False).eval()
    text, held = data.rows(settings, teacher.tokenizer)
    text = [row for row in text if len(row[0]) == settings.length]
    held = [row for row in held if len(row[0]) == settings.length]
    if len(text) < settings.batch or not held:
        raise ValueError(f"train: the text has too few rows of {settings.length} tokens for blocks")
    most = ROWS.get(session.device.type, MOST_ROWS)
    places = np.linspace(0, len(text) - 1, min(most, len(text))).astype(int)
    text = [text[place] for place in dict.fromkeys(places)]
    text = text[: len(text) // settings.batch * settings.batch]
    held = (held * settings.batch)[: -(-len(held) // settings.batch) * settings.batch]
    rows = np.stack([tokens for tokens, _ in text + held])
    batches = [
        States(rows[at : at + settings.batch], None, tuple(range(at, at + settings.batch)))
        for at in range(0, len(rows), settings.batch)
    ]
    training, evaluation = batches[: len(text) // settings.batch], batches[len(text) // settings.batch :]

    def kl() -> float:
        with torch.no_grad():
            held_out = [tensors(b, session.device) for b in evaluation]
            sums = [divergence(student.module, teacher.module, *pair) for pair in held_out]
        return float(sum(sums)) / sum(float(b.targets.sum()) for b in evaluation)

    before = kl()
    float_blocks, blocks = _blocks(teacher.module), _blocks(student.module)
    calls, aims = _enter(teacher.module, float_blocks, batches, session.device)
    _, states = _enter(student.module, blocks, batches, session.device)
    made, taken = [], 0
    for number, (float_block, block) in enumerate(zip(float_blocks, blocks, strict=True)):
        aims = _advance(float_block, aims, calls[number], batches)
        file = None if keep is None else keep / f"{number}.pt"
        if file is not None and file.exists():
            done = torch.load(file, map_location=session.device, weights_only=True)
            block.load_state_dict(done["block"])
            block.requires_grad_(False).eval()
            states = _advance(block, states, calls[number], batches)
            made.append((done["start"], done["best"]))
            taken, begin = taken + done["steps"], begin - done["seconds"]
            continue
        minutes, begun = None, time.monotonic()
        if settings.minutes is not None:
            left = settings.minutes - (time.monotonic() - begin) / 60
            minutes = max(left / (len(blocks) - number), LEAST_MINUTES)
        rate = settings.learning_rate or LEARNING_RATE
        schedule = Schedule(settings.steps, minutes, rate, seed=settings.seed)
        trainer = BlockTrainer(block, calls[number], states, aims)
        outcome = run(trainer, training, evaluation, schedule)
        block.requires_grad_(False).eval()
        states = _advance(block, states, calls[number], batches)
        made.append((outcome.start, outcome.best))
        taken += len(outcome.losses)
        if file is not None:
            _save(file, block, outcome, time.monotonic() - begun)
        on_block(number, len(blocks), outcome.start, outcome.best)
    found = Trained(before, kl(), made, taken, time.monotonic() - begin)
    if found.best < found.start:
        qt.quantize_(student.module, qat.QATConfig(step="convert"))
        written = session.finished(quantized, replace(settings, qat=False))
        write_model(dst, quantized, written, vars(found), keep is not None)
    return found


def _save(file: Path, block: nn.Module, outcome, seconds: float) -> None:
    """A trained block for a later run; the file is whole whenever it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = {"start": outcome.start, "best": outcome.best, "steps": len(outcome.losses), "seconds": seconds}
    torch.save(facts | {"block": block.state_dict()}, half := file.with_suffix(".part"))
    half.replace(file)


def _prepare(module: nn.Module, source: nn.Module, folder: Path) -> None:
    """Fake quantizers where the source has packed layers, of the same formats, beginning with their codes."""
    formats: dict[Format, set[str]] = {}
    for path, layer in source.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            formats.setdefault(layer.packed.format, set()).add(path)
    for fmt, paths in formats.items():
        config = weight_config(fmt.bits, fmt.group_size, "learned")
        qt.quantize_(module, qat.QATConfig(weight_config=config), lambda layer, path, p=paths: path in p)
    qt.hold_in_float32(module)
    start_from_folder(module, folder)


def _blocks(model: nn.Module) -> list[nn.Module]:
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"train: {type(model).__name__} has no list of its {count} blocks; --method tune does")


class _Reached(Exception):  # noqa: N818
    """The first block is called."""


@torch.no_grad()
def _enter(model: nn.Module, blocks: list[nn.Module], batches: list[States], device):
    """([(args, kwargs) of each block beside its state], states (rows, T, width) before the first block)."""
    calls, states = [], []

    def note(block, args, kwargs):
        calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def stop(block, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def tokens(batch):
        return torch.as_tensor(batch.tokens, device=device)

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    model(tokens(batches[0]))
    for hook in hooks:
        hook.remove()
    if len(calls) != len(blocks):
        raise ValueError(f"train: {type(model).__name__}'s blocks do not run once each; --method tune does")
    hook = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    for batch in batches:
        try:
            model(tokens(batch))
        except _Reached:
            continue
    hook.remove()
    return calls, torch.cat(states)


def _through(block: nn.Module, state: torch.Tensor, call) -> torch.Tensor:
    out = block(state, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def _advance(block: nn.Module, states: torch.Tensor, call, batches: list[States]) -> torch.Tensor:
    """The states after a block, batch after batch."""
    return torch.cat([_through(block, states[list(batch.rows)], call) for batch in batches])
