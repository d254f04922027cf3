"""`mlxq train`: quantization-aware training and distillation, from a model folder to a new model folder.

    mlxq train MODEL DST --teacher FLOAT      MODEL is quantized: its scales and biases learn, its words stay
    mlxq train MODEL DST --qat --bits 2       MODEL is float: its weights learn what their codes will be

The loss is the KL divergence from the float model, or with --loss text the text's own cross-entropy.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

BACKENDS = ("torch", "mlx")
LOSSES = ("teacher", "text")
RANGES = ("learned", "dynamic")
STATE = "state.npz"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; a run is resumed with the same only.

    bits, group_size, embedding_bits, ranges   of a float model (qat); a quantized one has its own
    start    with qat: a quantized folder of the same model in the same formats, whose codes are begun with
    """

    model: str
    teacher: str | None = None
    qat: bool = False
    bits: int = 4
    group_size: int = 64
    embedding_bits: int | None = None
    ranges: str = "learned"
    start: str | None = None
    train: str | None = None
    loss: str = "teacher"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    length: int = 512
    batch: int = 2
    evaluate: int = 10
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    seed: int = 0
    backend: str = "torch"
    device: str = "cpu"
    dtype: str | None = None

    def check(self) -> None:
        """Raises ValueError for settings that do not exist or do not go together."""
        from mlxq.format import STORAGE, Format
        from mlxq.qat.training import TRAINABLE

        for name, value, built in (
            ("backend", self.backend, BACKENDS),
            ("loss", self.loss, LOSSES),
            ("ranges", self.ranges, RANGES),
            ("train", self.train, (None, *TRAINABLE)),
            ("dtype", self.dtype, (None, *STORAGE)),
        ):
            if value not in built:
                raise ValueError(f"train: {name} {value!r} is not built; wanted {', '.join(map(str, built))}")
        Format(self.bits, self.group_size)
        if self.embedding_bits is not None:
            Format(self.embedding_bits, self.group_size)
        if self.length < 2 or self.batch < 1 or self.evaluate < 1:
            raise ValueError("train: length must be 2 or more, batch and evaluate 1 or more")
        if self.qat and self.train == "scales":
            raise ValueError("train: --qat trains weights; to train scales alone give a quantized MODEL")
        if self.start is not None and not (self.qat and self.ranges == "learned"):
            raise ValueError("train: --start is where --qat with learned ranges begins; give both")
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("train: give --steps or --minutes, one of them")


def train(
    settings: Settings,
    dst: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    save_every: float = 60.0,
    fsdp: bool | None = None,
):
    """Train, write the model with the best held-out loss as the new folder dst, and report what was done.

    The result is a model folder as mlxq convert writes it, and training.json beside its weights: settings,
    losses and held-out losses. While it trains, dst.training/ holds the state, written every save_every
    seconds and when the process gets SIGINT or SIGTERM; with resume the run goes on from there to the
    same losses. mlxq.qat.training.Outcome comes back; its `finished` is False when a signal stopped it.

    In several processes (torchrun, mx.distributed) all of them call this and the first one writes. With fsdp
    torch's fully_shard cuts up the models, float32 copies and moments (mlxq.qat.torch.sharding); what is
    written is whole all the same, and a run that was stopped goes on with or without fsdp. None: where these
    would fill more than three quarters of a GPU (mlxq.train.torch.bytes_to_train).

    Raises FileExistsError, FileNotFoundError, ValueError or ImportError with one sentence.
    """
    from mlxq.checkpoint.partial import check_destination
    from mlxq.qat import training
    from mlxq.train import data
    from mlxq.train.files import write_model

    settings.check()
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, overwrite)
    folder = dst.with_name(dst.name + ".training")
    state = _read_state(folder, settings, resume)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxq-train-")))
        backend = importlib.import_module(f"mlxq.train.{settings.backend}")
        session = stack.enter_context(backend.session(settings.device, fsdp))
        source, float_source = _float_folder(settings.model, scratch / "model"), None
        if settings.loss == "teacher" and settings.teacher:
            float_source = _float_folder(settings.teacher, scratch / "teacher")
        elif settings.loss == "teacher":
            float_source = source
        session.settle(source, float_source, settings)
        model = session.load(source, settings.dtype)
        _check_model(settings, model)
        if settings.qat:
            session.prepare(model, settings)
        teacher = None
        if float_source is not None:
            teacher = session.load(float_source, settings.dtype).module
        rows, held = data.rows(settings, model.tokenizer)
        trainer = training.trainer_for(
            model.module,
            teacher,
            settings.train or ("all" if settings.qat else "scales"),
            **session.options(),
        )
        schedule = training.Schedule(
            settings.steps,
            settings.minutes,
            settings.learning_rate
            or training.LEARNING_RATE["all" if settings.qat else settings.train or "scales"],
            seed=settings.seed,
        )
        first = trainer.rank == 0
        show = stack.enter_context(_progress(progress and first, schedule))
        outcome = training.run(
            trainer,
            data.batches(rows, settings.batch, trainer.ranks),
            data.batches(held, settings.batch, trainer.ranks),
            schedule,
            resume=state,
            on_step=show,
            save=(lambda arrays, facts: _write_state(folder, settings, arrays, facts)) if first else None,
            save_every=save_every,
            stop=stack.enter_context(_asked_to_stop()),
        )
        if outcome.finished:
            trainer.make_whole()
        if outcome.finished and first:
            report = {"settings": asdict(settings), "start": outcome.start, "best": outcome.best}
            report |= {
                "losses": outcome.losses,
                "evaluations": outcome.evaluations,
                "seconds": outcome.seconds,
            }
            write_model(dst, model, session.finished(model, settings), report, overwrite)
            _write_card(dst, settings, outcome)
            _remove(folder)
        outcome.student = model.module
        return outcome


def _write_card(dst: Path, settings: Settings, outcome) -> None:
    """README.md, in the source's place: what was trained, from what, on which text, and what came of it."""
    from mlxq import __version__
    from mlxq.checkpoint.summary import human_bytes, inspect

    stored, source = inspect(dst), Path(settings.model).name
    trained = settings.train or ("all" if settings.qat else "scales")
    what = "scales and biases" if trained == "scales" else "weights, scales and biases"
    if settings.qat:
        what = f"weights for the codes that they now have ({settings.ranges} ranges)"
    text = ", ".join(Path(name).name for name in settings.data) or "the text that comes with mlxq"
    held = ", ".join(Path(name).name for name in settings.eval_data) or "every tenth row of it"
    teacher = Path(settings.teacher or settings.model).name
    loss = "cross-entropy of the text"
    if settings.loss == "teacher":
        loss = f"KL divergence from the predictions of {teacher}"
    steps, tokens = len(outcome.losses), f"{settings.batch} x {settings.length} tokens"
    lines = [
        "---", "library_name: mlx", "tags: [mlx, mlxq]", "---", "", f"# {dst.name}", "",
        f"{source}, trained by mlxq {__version__}: {what}, in {steps} steps of {tokens} and "
        f"{outcome.seconds:.0f} s. It loads in mlx-lm and in mlxq.", "",
        f"{human_bytes(stored.total_bytes)}: {stored.bits_per_weight:.3f} bits per weight, all included.", "",
        f"Loss: {loss}, in nats per token. Text: {text}; held out: {held}.", "",
        f"Held-out loss: {outcome.start:.4f} before, {outcome.best:.4f} after. `training.json` has every "
        "loss and setting.", "",
        f"Nothing else was measured: `mlxq eval {dst.name} --against FLOAT --card` does it.",
    ]  # fmt: skip
    half = dst / "README.md.part"
    half.write_text("\n".join(lines) + "\n", encoding="utf-8")
    half.replace(dst / "README.md")


def _check_model(settings: Settings, model) -> None:
    if settings.qat and model.quantized:
        raise ValueError(
            f"train: {settings.model} is quantized already; leave out --qat, or give the float model"
        )
    if not settings.qat and not model.quantized:
        raise ValueError(f"train: {settings.model} is a float model; add --qat, or convert it first")
    if not settings.qat and settings.loss == "teacher" and settings.teacher is None:
        raise ValueError(
            "train: a quantized model learns from its float model: give --teacher, or --loss text"
        )


def _float_folder(source: str, scratch: Path) -> Path:
    """The folder of a model; a GGUF is unpacked to float first, beside nothing of the user's."""
    from mlxq.checkpoint.huggingface import resolve
    from mlxq.convert import convert

    path = resolve(source)
    if path.is_dir():
        return path
    convert(path, scratch, rules=[".*=bits:none"], progress=False)
    return scratch


def _fingerprint(settings: Settings) -> dict:
    """The settings, and what the data files hold."""
    out = json.loads(json.dumps(asdict(settings)))
    for name in (*settings.data, *settings.eval_data):
        path = Path(name).expanduser()
        out[f"content of {name}"] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return out


def _read_state(folder: Path, settings: Settings, resume: bool):
    """(arrays, facts) of a run that was stopped, or None. Raises ValueError when it is not to be touched."""
    import numpy as np  # here, because `mlxq --help` reads this module's flags

    path = folder / STATE
    if not path.exists():
        return None
    if not resume:
        raise FileExistsError(f"{folder} holds a run that was stopped: add --resume, or remove it")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        facts = json.loads(arrays.pop("facts").tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} to begin anew") from None
    before, now = facts.pop("settings"), _fingerprint(settings)
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if other:
        told = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in other)
        raise ValueError(f"{folder} was begun with other settings: {told}")
    return arrays, facts


def _write_state(folder: Path, settings: Settings, arrays: dict, facts: dict) -> None:
    """One file, replaced whole, so that a kill at any moment leaves the older one or the newer one."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts | {"settings": _fingerprint(settings)}).encode()
    handle, name = tempfile.mkstemp(prefix=".state-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, facts=np.frombuffer(text, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / STATE)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _remove(folder: Path) -> None:
    for path in (folder / STATE, *folder.glob(".state-*")):
        path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def _asked_to_stop():
    """A function that says whether SIGINT or SIGTERM came; a second SIGINT interrupts at once."""
    asked = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals do not arrive
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(shown: bool, schedule):
    """A bar on stderr with losses and remaining time; lines of text where that is no terminal."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
    told = 0

    def text(outcome) -> str:
        step, recent = len(outcome.losses), outcome.losses[-20:]
        loss = f"{sum(recent) / len(recent):.4f}" if recent else "-"
        held = f"{outcome.start:.4f} > {outcome.best:.4f}"
        return f"step {step}  loss {loss}  held-out {held}"

    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring the start", total=1.0)

        def show(outcome, done: float) -> None:
            nonlocal told
            bar.update(task, completed=min(done, 1.0), description=text(outcome))
            if len(outcome.evaluations) > told and not console.is_terminal:
                print(f"{text(outcome)}  {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
            told = len(outcome.evaluations)

        yield show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, hub id or GGUF; quantized, or float with --qat"
    )
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist")
    add = parser.add_argument
    add("--teacher", metavar="FLOAT", help="float model to learn from (default with --qat: MODEL itself)")
    add("--qat", action="store_true", help="train the weights of a float MODEL for the codes they will have")
    add("--bits", type=int, default=4, metavar="B", help="with --qat: bits per weight (default 4)")
    add("--group-size", type=int, default=64, metavar="G", help="with --qat: weights per scale (default 64)")
    add("--embedding-bits", type=int, metavar="B", help="with --qat: bits of embedding and output head")
    add("--ranges", choices=RANGES, default="learned", help="with --qat: scales learn, or follow the weights")
    add("--start", metavar="FOLDER", help="with --qat: quantized form of MODEL whose codes are begun with "
        "(default: MODEL rounded to nearest)")  # fmt: skip
    add(
        "--train",
        choices=("scales", "all"),
        help="scales: scales and biases alone (default of a quantized MODEL)",
    )
    add(
        "--loss",
        choices=LOSSES,
        default="teacher",
        help="KL to the float model (default), or the text itself",
    )
    add("--data", action="append", metavar="FILE", help="text, or JSONL with text, messages, or prompt and "
        "completion; may be repeated (default: a small text that comes with mlxq)")  # fmt: skip
    add(
        "--eval-data",
        action="append",
        metavar="FILE",
        help="held-out text (default: every tenth row of --data)",
    )
    add("--length", type=int, default=512, metavar="T", help="tokens of a row (default 512)")
    add("--batch", type=int, default=2, metavar="N", help="rows of a step (default 2)")
    add("--evaluate", type=int, default=10, metavar="N", help="most held-out rows (default 10)")
    add("--steps", type=int, metavar="N", help="length of the run in steps")
    add("--minutes", type=float, metavar="M", help="length of the run in minutes, evaluation included")
    add("--learning-rate", type=float, metavar="R", help="default 2e-4 for scales, 2e-5 for weights")
    add("--seed", type=int, default=0, metavar="N", help="of the order of rows (default 0)")
    add("--backend", choices=BACKENDS, help="default: mlx on a Mac, torch elsewhere")
    add(
        "--device",
        metavar="D",
        help="cpu, cuda or mps for torch; cpu or gpu for MLX (default: the best here)",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of what is trained and stored (default: MODEL's)",
    )
    add(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        help="with torchrun: cut the models up over the processes (default: where one GPU cannot hold them)",
    )
    add("--resume", action="store_true", help="go on with a run to DST that was stopped or killed")
    add("--overwrite", action="store_true", help="replace DST if it is a model folder")


def run(args: argparse.Namespace) -> int:
    """`mlxq train`: exit code 0, or 130 when a signal stopped the run and its state is kept."""
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    given["data"], given["eval_data"] = tuple(args.data or ()), tuple(args.eval_data or ())
    given["minutes"] = 10.0 if args.steps is None and args.minutes is None else args.minutes
    given["backend"] = args.backend or ("mlx" if sys.platform == "darwin" else "torch")
    given["device"] = args.device or importlib.import_module(f"mlxq.train.{given['backend']}").best_device()
    outcome = train(Settings(**given), args.dst, resume=args.resume, overwrite=args.overwrite, fsdp=args.fsdp)
    if not outcome.finished:
        print(
            f"stopped after {len(outcome.losses)} steps; --resume goes on",
            file=sys.stderr,
        )
        return 130
    if os.environ.get("RANK", "0") == "0" and os.environ.get("MLX_RANK", "0") == "0":
        print(
            f"{args.dst} is written: held-out loss {outcome.start:.4f} before, {outcome.best:.4f} after "
            f"{len(outcome.losses)} steps in {outcome.seconds:.0f} s. Try: mlxq chat {args.dst}"
        )
    return 0
