"""`mlxq convert --method tune` and `train`: solve the codes on calibration text, then train.

tune    scales and biases end to end, towards the float model's distributions
train   first each block's weights, scales and biases towards the float block's output, then as tune

What is done lies in .<DST's name>.tune beside DST until all of it is:

    identity      of the source and the arguments              solve/DST     what gptq made
    solve.json    the report on it                             plan.json     what is trained, how long, where
    blocks/       states of blocks, then blocks/DST            blocks.json   what training them came to
    train/DST     the trained model; train/DST.training while it trains
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlxq.checkpoint.huggingface import resolve
from mlxq.checkpoint.journal import identity
from mlxq.checkpoint.partial import check_destination, kept_folder, partial_folder
from mlxq.checkpoint.safetensors import Planned, header_of
from mlxq.checkpoint.summary import Layer, Summary
from mlxq.convert import Report, convert, stored_errors, write_card
from mlxq.train import Settings, train

LEAST_MINUTES = 1.0  # below it auto does not train, and tune trains for it
MINUTES = 10.0
WIDE_BITS = 6  # from here on auto does not train: codes round too finely for it to matter
BATCH, LENGTH = 2, 512
TRAIN_MINUTES = 5.0  # from here on auto trains blocks too, if it is for a GPU and 3 bits or fewer
FEW_BITS = 3
BLOCK_SHARE = 0.6  # of the time for training goes to blocks, with train
BLOCK_BATCH = 4


@dataclass(frozen=True)
class Plan:
    """What follows the codes: why nothing does, or whether blocks train first, how long, and where."""

    why_not: str | None
    blocks: bool
    minutes: float
    backend: str
    device: str


def convert_and_tune(
    src: str | Path,
    dst: str | Path,
    *,
    minutes: float | None = None,
    method: str = "tune",
    calibration: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    steps: int | None = None,
    length: int = LENGTH,
    learning_rate: float | None = None,
    device: str | None = None,
    resume: bool = True,
    **options,
) -> Report:
    """Convert src by gptq, train what it made towards src, and write dst.

    minutes   for everything; training gets what is left, of 10 when it is None
    method    "tune": scales and biases end to end; "train": blocks before, with torch. "auto": neither where
              the blocks' codes have 6 bits or more on average or less than a minute is left; train where 5
              are, bits are 3 or fewer and torch has a GPU; else tune
    steps     of training, and of each block, in the place of minutes
    learning_rate   of Adam, end to end (None: mlxq.train's)
    device    of torch, or cpu or gpu of MLX where torch is missing (None: the best here)
    resume    go on with what an interrupted run with these arguments left beside dst
    options   of mlxq.convert.convert; dry_run estimates the time for `minutes`, not for steps, and memory
              but for activations

    The loss is the KL divergence from the float model on the calibration text; the best state on a tenth of
    it, which is not trained on, is what is written, the start if nothing was better. A block that is not
    better on that tenth stays as it was, and so does the model if it is not nearer after all its blocks.

    Raises as convert and mlxq.train do, and for max_memory, which does not bound training; nothing is left
    under dst then. KeyboardInterrupt when a signal stopped the training.
    """
    if options.get("max_memory") is not None and method != "auto":
        raise ValueError(f"convert: --max-memory does not bound --method {method}; gptq keeps to it")
    if method == "train" and importlib.util.find_spec("torch") is None:
        raise ImportError("convert: --method train needs torch and transformers: pip install 'mlxq[torch]'")
    if options.get("dry_run"):
        report = convert(src, dst, method="gptq", calibration=calibration, overwrite=overwrite, **options)
        return _estimated(report, minutes, method, steps, device, options)
    if "MLX_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"convert: --method {method} runs in one process; for several convert with --method gptq, and "
            "then mlxq train"
        )
    begin = time.monotonic()
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, overwrite)
    src = resolve(src)
    arguments = {
        "minutes": minutes, "method": method, "steps": steps, "length": length, "rate": learning_rate,
        "device": device, "calibration": calibration, "text": _digest_of(calibration), **options,
    }  # fmt: skip
    with kept_folder(dst, "tune", identity(src, arguments), resume) as work:
        report = _solve(src, work, dst.name, calibration=calibration, progress=progress, **options)
        given = (report.seconds, minutes, method, steps, device, options)
        plan = Plan(**_kept(work / "plan.json", lambda: asdict(_plan(report, *given))))
        made, said, seconds = work / "solve" / dst.name, [], report.seconds
        if plan.why_not is None:
            settings = Settings(
                str(made),
                teacher=str(src),
                data=() if calibration is None else (str(calibration),),
                length=length,
                batch=BATCH,
                steps=steps,
                minutes=None if steps else max(plan.minutes, LEAST_MINUTES),
                learning_rate=learning_rate,
                backend=plan.backend,
                device=plan.device,
            )
            if plan.blocks:
                blocks = _kept(
                    work / "blocks.json", lambda: _blocks(settings, src, work / "blocks", progress)
                )
                said.append(blocks["words"])
                seconds += blocks["seconds"]
                if blocks["better"]:
                    settings = replace(settings, model=str(work / "blocks" / "model"))
                if steps is None:
                    left = plan.minutes - blocks["seconds"] / 60
                    settings = replace(settings, minutes=max(left, LEAST_MINUTES))
            made = work / "train" / dst.name
            if not made.exists():
                outcome = train(settings, made, resume=True, progress=progress)
                if not outcome.finished:
                    raise KeyboardInterrupt
            trained = json.loads((made / "training.json").read_text(encoding="utf-8"))
            seconds += trained["seconds"]
            said.append(
                f"scales and biases trained for {len(trained['losses'])} steps of {BATCH} x {length} tokens "
                f"towards the float model: KL {trained['start']:.4f} before, {trained['best']:.4f} after, on "
                "text of the calibration set that was not trained on"
            )
            _measure(report, stored_errors(src, made, options.get("trust_remote_code", False)))
        report.notices += [plan.why_not] if plan.why_not else said
        report.path, report.seconds = dst, max(seconds, time.monotonic() - begin)
        write_card(report, src, "gptq", made, said)
        with partial_folder(dst, overwrite) as folder:
            # as links: a kill leaves what was made where the next run finds it
            shutil.copytree(made, folder, copy_function=os.link, dirs_exist_ok=True)
    return report


def _measure(report: Report, errors: dict[str, tuple[float, float]]) -> None:
    """Give the report's layers the errors that they have now."""
    for layer in report.layers:
        name = layer.path.replace("/", ".")
        found = errors.get(f"{name}.weight") or errors.get(name)
        if layer.error is not None and found is not None:
            layer.error, layer.norm = found


def _digest_of(calibration: str | Path | None) -> str | None:
    """Of what a calibration file holds now."""
    path = None if calibration is None else Path(calibration).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else None


def _kept(file: Path, make) -> dict:
    """What make() gives, from the file if an earlier run wrote it."""
    if not file.exists():
        made = make()
        half = file.with_name(f"{file.name}.part")
        half.write_text(json.dumps(made), encoding="utf-8")
        half.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _solve(src: Path, work: Path, name: str, **options) -> Report:
    """The report on work/solve/name, which is made by gptq unless it is there with its report."""

    def make() -> dict:
        # a folder without its report is of a run that was killed between the two
        report = convert(src, work / "solve" / name, method="gptq", overwrite=True, **options)
        return vars(report) | {"path": name, "layers": list(map(asdict, report.layers))}

    found = _kept(work / "solve.json", make)
    return Summary(**found | {"layers": [Layer(**layer) for layer in found["layers"]]})


def _estimated(report: Report, minutes, method: str, steps, device: str | None, options: dict) -> Report:
    """The report of a dry run, with the training in its estimates."""
    from mlxq.checkpoint.memory import anonymous_bytes

    plan = _plan(report, report.planned.seconds, minutes, method, steps, device, options)
    if plan.why_not is not None:
        report.notices.append(plan.why_not)
        return report
    seconds = report.planned.seconds
    if steps is None:
        seconds = max(60 * (MINUTES if minutes is None else minutes), seconds + 60 * LEAST_MINUTES)
    memory = (anonymous_bytes() or 0) + _bytes_to_train(report, plan)
    report.planned = replace(report.planned, seconds=seconds, memory=max(report.planned.memory, memory))
    return report


def _bytes_to_train(report: Report, plan: Plan) -> int:
    """What training holds, but for activations: of the report's layers, or with blocks of all weights."""
    teacher = 2 * report.parameters
    if plan.backend != "torch":
        return report.total_bytes + teacher
    from mlxq.train.torch import bytes_to_train

    planned = []
    for layer in report.layers:
        packed = None if plan.blocks else re.match(r"(\d+)-bit/(\d+)", layer.stored)
        if packed is None:
            planned.append(
                Planned(layer.path, "F32" if layer.stored == "float32" else "F16", (1, layer.weights))
            )
            continue
        bits, group = map(int, packed.groups())
        groups = layer.weights // group
        scale = "F32" if layer.bytes - layer.weights * bits // 8 > 4 * groups else "F16"
        planned.append(Planned(f"{layer.path}.weight", "U32", (layer.weights * bits // 32,)))
        planned += [Planned(f"{layer.path}.{part}", scale, (groups,)) for part in ("scales", "biases")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        header = header_of(planned)
        file.write_bytes(header)
        os.truncate(file, len(header) + sum(tensor.nbytes for tensor in planned))  # sparse
        settings = Settings(str(folder), steps=1, qat=plan.blocks)
        return teacher + bytes_to_train(Path(folder), None, settings)


def _plan(
    report: Report, seconds: float, minutes, method: str, steps, device: str | None, options: dict
) -> Plan:
    """What follows codes that took these seconds."""
    spent = seconds / 60
    left = (MINUTES if minutes is None else minutes) - spent
    backend = "torch" if importlib.util.find_spec("torch") else "mlx"
    device = device or importlib.import_module(f"mlxq.train.{backend}").best_device()
    if method != "auto":
        return Plan(None, method == "train", left, backend, device)
    why_not = None
    bits = mean_bits(report)
    if bits >= WIDE_BITS:
        why_not = f"not tuned: it does not matter from {WIDE_BITS} bits on, and the blocks have {bits:.3g}"
    elif steps is None and left < LEAST_MINUTES:
        why_not = f"not tuned: after {spent:.1f} minutes less than a minute is left"
    elif options.get("max_memory") is not None:
        why_not = "not tuned: --max-memory does not bound training"
    in_time = steps is None and left >= TRAIN_MINUTES
    blocks = bits <= FEW_BITS and in_time and backend == "torch" and device != "cpu"
    return Plan(why_not, blocks, left, backend, device)


def mean_bits(report: Report) -> float:
    """Bits of a code in the blocks, averaged over weights; outside of them too where these have none."""
    coded = [(layer, re.match(r"(\d+)-bit", layer.stored)) for layer in report.layers]
    coded = [(layer, int(found[1])) for layer, found in coded if found]
    inside = [(layer, bits) for layer, bits in coded if re.search(r"/\d+/", layer.path)] or coded
    weights = sum(layer.weights for layer, _ in inside)
    return sum(bits * layer.weights for layer, bits in inside) / weights if weights else float(WIDE_BITS)


def _blocks(settings: Settings, src: Path, folder: Path, progress: bool) -> dict:
    """What came of training settings.model block by block towards src; better: folder/model is nearer."""
    from mlxq.train.blocks import train_blocks

    def show(number: int, count: int, start: float, best: float) -> None:
        if progress:
            print(f"block {number + 1} of {count}: {start:.5f} before, {best:.5f} after", file=sys.stderr)

    wanted = replace(
        settings, model=str(src), teacher=None, qat=True, start=settings.model, batch=BLOCK_BATCH,
        minutes=None if settings.minutes is None else BLOCK_SHARE * settings.minutes,
        learning_rate=None,
    )  # fmt: skip
    found = train_blocks(wanted, folder / "model", on_block=show, keep=folder)
    better = sum(best < start for start, best in found.blocks)
    words = (
        f"weights, scales and biases of {better} of {len(found.blocks)} blocks trained, {found.steps} steps "
        f"of {BLOCK_BATCH} x {settings.length} tokens: KL {found.start:.4f} before, {found.best:.4f} after"
    )
    if not (nearer := found.best < found.start):
        words += ", so they are as they were"
    return {"words": words, "better": nearer, "seconds": found.seconds}
