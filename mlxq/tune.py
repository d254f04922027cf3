"""`mlxq convert --method tune` and `train`: solve the codes on calibration text, then train.

tune    scales and biases end to end, towards the float model's distributions
train   first each block's weights, scales and biases towards the float block's output, then as tune
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mlxq.checkpoint.partial import check_destination
from mlxq.convert import Report, convert
from mlxq.train import Settings, train

LEAST_MINUTES = 1.0  # below it auto does not train, and tune trains for it
WIDE_BITS = 6  # from here on auto does not train: codes round too finely for it to matter
BATCH, LENGTH = 2, 512
TRAIN_MINUTES = 5.0  # from here on auto trains blocks too, if it is for a GPU and 3 bits or fewer
FEW_BITS = 3
BLOCK_SHARE = 0.6  # of the time for training goes to blocks, with train
BLOCK_BATCH = 4


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
    **options,
) -> Report:
    """Convert src by gptq, train what it made towards src, and write dst.

    minutes   for everything; training gets what is left, of 10 when it is None
    method    "tune": scales and biases end to end; "train": blocks before, with torch. "auto": neither from 6
              bits on or where less than a minute is left; train where 5 are, bits are 3 or fewer and torch
              has a GPU; else tune
    steps     of training, and of each block, in the place of minutes
    learning_rate   of Adam, end to end (None: mlxq.train's)
    device    of torch, or cpu or gpu of MLX where torch is missing (None: the best here)
    options   of mlxq.convert.convert; its dry_run reports on what comes before the training

    The loss is the KL divergence from the float model on the calibration text; the best state on a tenth of
    it, which is not trained on, is what is written, the start if nothing was better. A block that is not
    better on that tenth stays as it was, and so does the model if it is not nearer after all its blocks.

    Raises as convert and mlxq.train do, and for max_memory, which does not bound training; nothing is left
    under dst then.
    """
    if options.get("max_memory") is not None and method != "auto":
        raise ValueError(f"convert: --max-memory does not bound --method {method}; gptq keeps to it")
    if method == "train" and importlib.util.find_spec("torch") is None:
        raise ImportError("convert: --method train needs torch and transformers: pip install 'mlxq[torch]'")
    if options.get("dry_run"):
        return convert(src, dst, method="gptq", calibration=calibration, overwrite=overwrite, **options)
    begin = time.monotonic()
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, overwrite)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.tune-") as work:
        solved = Path(work) / dst.name
        report = convert(src, solved, method="gptq", calibration=calibration, progress=progress, **options)
        spent = (time.monotonic() - begin) / 60
        left = (10.0 if minutes is None else minutes) - spent
        backend = "torch" if importlib.util.find_spec("torch") else "mlx"
        device = device or importlib.import_module(f"mlxq.train.{backend}").best_device()
        wants_blocks, why_not = method == "train", None
        if method == "auto":
            bits = options.get("bits") or 4
            if bits >= WIDE_BITS:
                why_not = f"not tuned: it does not matter from {WIDE_BITS} bits on"
            elif steps is None and left < LEAST_MINUTES:
                why_not = f"not tuned: after {spent:.1f} minutes less than a minute is left"
            elif options.get("max_memory") is not None:
                why_not = "not tuned: --max-memory does not bound training"
            in_time = steps is None and left >= TRAIN_MINUTES
            wants_blocks = bits <= FEW_BITS and in_time and backend == "torch" and device != "cpu"
        said = []
        if why_not is None:
            settings = Settings(
                str(solved),
                teacher=str(src),
                data=() if calibration is None else (str(calibration),),
                length=length,
                batch=BATCH,
                steps=steps,
                minutes=None if steps else max(left, LEAST_MINUTES),
                learning_rate=learning_rate,
                backend=backend,
                device=device,
            )
            if wants_blocks:
                minutes_before = (time.monotonic() - begin) / 60
                settings, words = _blocks(settings, str(src), Path(work) / "blocks", progress)
                said.append(words)
                if steps is None:
                    left -= (time.monotonic() - begin) / 60 - minutes_before
                    settings = replace(settings, minutes=max(left, LEAST_MINUTES))
            outcome = train(settings, dst, overwrite=overwrite, progress=progress)
            said.append(
                f"scales and biases trained for {len(outcome.losses)} steps of {BATCH} x {length} tokens "
                f"towards the float model: KL {outcome.start:.4f} before, {outcome.best:.4f} after, on text "
                "of the calibration set that was not trained on"
            )
        else:
            from mlxq.checkpoint.partial import partial_folder

            with partial_folder(dst, overwrite) as folder:
                for path in list(solved.iterdir()):
                    path.rename(folder / path.name)
            said = [why_not]
    card = dst / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + f"\nThen: {'; '.join(said)}.\n", encoding="utf-8")
    report.notices += said
    report.path, report.seconds = dst, time.monotonic() - begin
    return report


def _blocks(settings: Settings, src: str, folder: Path, progress: bool) -> tuple[Settings, str]:
    """(the settings of what follows, words) after settings.model was trained block by block towards src."""
    from mlxq.train.blocks import train_blocks

    def show(number: int, count: int, start: float, best: float) -> None:
        if progress:
            print(f"block {number + 1} of {count}: {start:.5f} before, {best:.5f} after", file=sys.stderr)

    wanted = replace(
        settings, model=src, teacher=None, qat=True, start=settings.model, batch=BLOCK_BATCH,
        minutes=None if settings.minutes is None else BLOCK_SHARE * settings.minutes,
        learning_rate=None,
    )  # fmt: skip
    found = train_blocks(wanted, folder, on_block=show)
    better = sum(best < start for start, best in found.blocks)
    words = (
        f"weights, scales and biases of {better} of {len(found.blocks)} blocks trained, {found.steps} steps "
        f"of {BLOCK_BATCH} x {settings.length} tokens: KL {found.start:.4f} before, {found.best:.4f} after"
    )
    if found.best < found.start:
        return replace(settings, model=str(folder)), words
    return settings, f"{words}, so they are as they were"
