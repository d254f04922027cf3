"""`mlxq convert --method tune`: solve the codes on calibration text, then train scales and biases."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from pathlib import Path

from mlxq.checkpoint.partial import check_destination
from mlxq.convert import Report, convert
from mlxq.train import Settings, train

LEAST_MINUTES = 1.0  # below it auto does not train, and tune trains for it
WIDE_BITS = 6  # from here on auto does not train: codes round too finely for it to matter
BATCH, LENGTH = 2, 512


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
    **options,
) -> Report:
    """Convert src by gptq, train the packed layers' scales and biases towards src, and write dst.

    minutes   for both together; training gets what is left, of 10 when it is None
    method    "tune", or "auto": trains only where a minute is left and bits are under 6
    steps     of training, in the place of minutes; learning_rate: of Adam (None: mlxq.train's)
    options   of mlxq.convert.convert; its dry_run reports on what comes before the training

    The loss is the KL divergence from the float model on the calibration text; the best state on a tenth of
    it, which is not trained on, is what is written, the start if nothing was better. Raises as convert and
    mlxq.train do; nothing is left under dst then.
    """
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
        why_not = None
        if method == "auto" and (options.get("bits") or 4) >= WIDE_BITS:
            why_not = f"not tuned: it does not matter from {WIDE_BITS} bits on"
        elif method == "auto" and steps is None and left < LEAST_MINUTES:
            why_not = f"not tuned: after {spent:.1f} minutes less than a minute is left"
        if why_not is None:
            backend = "torch" if importlib.util.find_spec("torch") else "mlx"
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
                device=importlib.import_module(f"mlxq.train.{backend}").best_device(),
            )
            outcome = train(settings, dst, overwrite=overwrite, progress=progress)
            words = (
                f"scales and biases trained for {len(outcome.losses)} steps of {BATCH} x {length} tokens "
                f"towards the float model: KL {outcome.start:.4f} before, {outcome.best:.4f} after, on text "
                "of the calibration set that was not trained on"
            )
        else:
            from mlxq.checkpoint.partial import partial_folder

            with partial_folder(dst, overwrite) as folder:
                for path in list(solved.iterdir()):
                    path.rename(folder / path.name)
            words = why_not
    card = dst / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + f"\nThen: {words}.\n", encoding="utf-8")
    report.notices.append(words)
    report.path, report.seconds = dst, time.monotonic() - begin
    return report
