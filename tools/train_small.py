"""A small Llama trained from scratch, then rounded and trained quantized: how much of the loss QAT recovers.

    python tools/train_small.py [--device cuda] [--minutes 6] [--bits 4 2] [--plot]
    python tools/train_small.py --size mini     0.4 M parameters, for minutes on a CPU
    python tools/train_small.py --size tiny     a minute on a CPU: shows that it runs, says nothing of quality

The texts are ../shared/data: calib.* is trained on, heldout_dev.* is measured, the tokenizer (byte-level BPE)
is made from the first. For each width: every linear layer in groups of 64, embedding and head at 8 bits,
scales in bfloat16.

    rtn   rounded to nearest by rule "affine"
    gptq  what mlxq convert --method gptq makes of it with the training text, unless --start rtn
    qat   from there, weights and ranges trained with fake quantization towards the float model's
          distributions (self-distillation), then converted; measured as packed layers on mlxq.ops. The
          learning rate is the best of three short runs, and the long run goes on from there; with
          --qat-rates 4=3e-5 2=1e-4 nothing is tried

The float model and the widths share --minutes (SHARES). Each keeps the best held-out loss of a tenth of the
held-out text, which is not what is measured. The result file is written anew after each of them: a run
that is killed leaves what was done. It has, besides the keys of bench_common:
    model    {size, parameters, vocabulary, tokens trained on, seconds}
    rows     [{what, bits, cross_entropy, kl, perplexity, seconds, steps, tokens_per_second, measured}]
             seconds: of the whole training, its probes included; steps and tokens_per_second: of the long run
             measured: "float", "packed", or "fake quantized" where packed layers failed, which `missing` says
    curves   [{what, step, loss}]   losses on the judging text while training
    bars     the share of rtn's KL that qat removes
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_common
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlxq import load_torch, ops, qat
from mlxq.format import Format
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear, TiedHead
from mlxq.qat import torch as qt
from mlxq.qat import training
from mlxq.train.files import weight_config
from mlxq.train.torch import start_from_affine, start_from_folder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GROUP, EMBEDDING_BITS = 64, 8
SHARE = {4: 0.65, 2: 0.80}  # of rtn's KL that is to be removed
SHARES = {"float": 1.0, 4: 1.5, 2: 2.5}  # of --minutes, to scale; other widths 2
RATES = {4: (3e-5, 1e-4, 3e-4), 2: (1e-4, 3e-4, 1e-3)}  # of weights; ranges: ten times (qat.training)
FAILURES = (RuntimeError, ValueError, TypeError, ImportError)  # of packed layers, which are said
PIECES = 8  # of 512 tokens of the training text, that GPTQ calibrates with
PROBE = 0.1  # of a width's minutes, for each rate that is tried
SIZES = {"tiny": (128, 2, 256, 512), "mini": (128, 2, 384, 768), "small": (384, 8, 1024, 4096)}


def texts(pattern: str, data: Path) -> list[str]:
    files = sorted(data.glob(pattern))
    if not files:
        raise SystemExit(f"train_small: {data} holds no {pattern}; pass --data")
    return [file.read_text(encoding="utf-8") for file in files]


def make_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made_by = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, made_by)
    return tokenizer


def windows(documents: list[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Token ids int64 (count, length) of every document, each cut on its own."""
    parts = []
    for text in documents:
        ids = np.array(tokenizer.encode(text).ids, np.int64)
        parts.append(ids[: len(ids) // length * length].reshape(-1, length))
    return np.concatenate(parts)


def batched(rows: np.ndarray, size: int) -> list[training.Batch]:
    return [training.Batch(rows[i : i + size]) for i in range(0, len(rows), size)]


def small_model(size: str, vocabulary: int) -> LlamaForCausalLM:
    hidden, layers, mlp, _ = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128 or 1,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def fit(student, teacher, rows, judge, minutes, rate, autocast, trainable="all", steps=None):
    trainer = training.trainer_for(student, teacher, trainable, autocast=autocast)
    schedule = training.Schedule(steps, None if steps else minutes, rate)
    told = []

    def show(outcome, done):
        if len(outcome.evaluations) > len(told):
            told.append(outcome.evaluations[-1])
            print(f"  step {told[-1][0]}: {told[-1][1]:.4f}  ({outcome.seconds:.0f} s)", flush=True)

    return training.run(trainer, rows, judge, schedule, on_step=show)


def spent(outcome, rows, before: float = 0.0) -> dict:
    """Steps and their rate, and the seconds of the whole: `before` are those of probes."""
    steps = len(outcome.losses)
    tokens = steps * rows[0].tokens.size
    return {
        "seconds": before + outcome.seconds,
        "steps": steps,
        "tokens_per_second": tokens / max(outcome.seconds, 1e-9),
    }


def measure(model, teacher, rows) -> dict:
    """Means over every token: cross-entropy and KL from the float model, in float32."""
    with torch.no_grad():
        given = {
            "cross_entropy": training.trainer_for(model, None, "all").evaluate(rows),
            "kl": 0.0 if model is teacher else training.trainer_for(model, teacher, "all").evaluate(rows),
        }
    return given | {"perplexity": math.exp(given["cross_entropy"])}


def rounded(model, bits: int):
    """A copy with packed layers, each rounded to nearest."""
    student = copy.deepcopy(model)
    table, head = student.get_input_embeddings(), student.get_output_embeddings()
    for path, layer in list(student.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            packed = ops.quantize(layer.weight.detach(), Format(bits, GROUP), scale_dtype="bfloat16")
            student.set_submodule(path, QuantizedLinear.from_packed(packed, layer.bias))
    packed = ops.quantize(table.weight.detach(), Format(EMBEDDING_BITS, GROUP), scale_dtype="bfloat16")
    return with_table(student, packed)


def with_table(student, packed):
    table = FloatTable.from_packed(packed)
    student.set_input_embeddings(table)
    student.set_output_embeddings(TiedHead(table))
    return student


class FloatTable(QuantizedEmbedding):
    """Rows in float32 for a model that computes in it, though its scales are bfloat16."""

    def forward(self, ids):
        return super().forward(ids).float()


def solved(model, tokenizer: Tokenizer, documents: list[str], widths: list[int], folder: Path) -> dict:
    """{bits: folder} of what mlxq convert makes of the model by GPTQ with the training text."""
    model.save_pretrained(folder / "float")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "float")
    text, ids = folder / "text.txt", tokenizer.encode("\n\n".join(documents)).ids
    starts = np.linspace(0, max(0, len(ids) - 512), PIECES).astype(int)
    text.write_text("".join(tokenizer.decode(ids[at : at + 512]) for at in starts), encoding="utf-8")
    made, running = {}, []
    for bits in widths:
        made[bits] = folder / f"gptq-{bits}"
        words = [sys.executable, "-m", "mlxq", "convert", str(folder / "float"), str(made[bits])]
        words += ["--bits", str(bits), "--group-size", str(GROUP), "--embedding-bits", str(EMBEDDING_BITS)]
        words += ["--method", "gptq", "--calibration", str(text), "--dtype", "bfloat16"]
        running.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
    if any([child.wait() for child in running]):
        raise SystemExit("train_small: mlxq convert fails")
    return made


def prepared(model, bits: int, start: Path | None):
    """A copy with fake quantizers whose codes start as a folder's, or where rounding to nearest has them."""
    student = copy.deepcopy(model)
    ends = {id(student.get_input_embeddings()), id(student.get_output_embeddings())}
    for width, of_ends in ((bits, False), (EMBEDDING_BITS, True)):
        config = weight_config(width, GROUP, "learned")
        config.scale_precision = "bfloat16"

        def chosen(layer, path, of_ends=of_ends):
            kind = isinstance(layer, (torch.nn.Linear, torch.nn.Embedding))
            return kind and (id(layer) in ends) == of_ends

        qt.quantize_(student, qat.QATConfig(weight_config=config), chosen)
    if start is None:
        start_from_affine(student)
    else:
        start_from_folder(student, start)
    return student


def converted(student):
    table = student.get_input_embeddings()
    packed = qt.packed_weight(table)
    qt.quantize_(student, qat.QATConfig(step="convert"))
    return with_table(student, packed)


def plot(path: Path, result: dict) -> None:
    pyplot = bench_common.pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for what in dict.fromkeys(row["what"] for row in result["curves"]):
        rows = [row for row in result["curves"] if row["what"] == what and what != "float"]
        axes[0].plot([r["step"] for r in rows], [r["loss"] for r in rows], marker="o", label=what)
    axes[0].set(xlabel="step", ylabel="KL on the judging text", yscale="log", title="training")
    axes[0].legend()
    rows = sorted(result["rows"][1:], key=lambda row: -row["bits"])
    axes[1].bar([r["what"] for r in rows], [r["kl"] for r in rows])
    axes[1].set(ylabel="held-out KL (nats)", yscale="log", title="measured")
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def share_bar(rows: list[dict], bits: int) -> dict:
    kl = {row["what"]: row["kl"] for row in rows}
    share = 1 - kl[f"qat {bits}"] / kl[f"rtn {bits}"]
    return bench_common.bar(f"share of rtn's KL removed at {bits} bits", share, SHARE.get(bits, 0.65))


def rate_of(text: str) -> tuple[int | None, float]:
    """(bits or None, rate) of an option."""
    bits, _, rate = text.rpartition("=")
    return int(bits) if bits else None, float(rate)


def trained(
    model, bits: int, start: Path | None, rows, judge, scored, minutes, rates, autocast, steps
) -> tuple[dict, list, str]:
    """(row, curve, what failed or "") of one width: trained, converted, measured.

    Of several rates each is tried first, and the run goes on from where the best one came to.
    """
    student, probes, probing = prepared(model, bits, start), [], 0.0
    if len(rates) > 1:
        tried = []
        for rate in rates:
            other = prepared(model, bits, start)
            short = None if steps is None else max(1, int(PROBE * steps))
            told = fit(other, model, rows, judge, PROBE * minutes, rate, autocast, steps=short)
            tried.append((told.best, rate, other))
            probing += told.seconds
            probes.append({"rate": rate, "loss": told.best, "steps": len(told.losses)})
            print(f"  rate {rate:g}: {told.best:.4f}", flush=True)
        _, rate, student = min(tried, key=lambda one: one[0])
        rates = (rate,)
        minutes *= 1 - PROBE * len(probes)
    outcome = fit(student, model, rows, judge, minutes, rates[0], autocast, steps=steps)
    curve = [{"what": f"qat {bits}", "step": s, "loss": v} for s, v in outcome.evaluations]
    row = {"what": f"qat {bits}", "bits": bits} | measure(student, model, scored)
    row |= spent(outcome, rows, probing)
    row |= {"rate": rates[0], "probes": probes, "measured": "fake quantized"}
    try:
        packed = measure(converted(student), model, scored)
    except FAILURES as error:  # minutes of training are not lost
        return row, curve, f"packed layers of {bits} bits: {type(error).__name__}: {error}"
    if abs(packed["kl"] - row["kl"]) > 1e-3 + 1e-2 * row["kl"]:
        return row, curve, f"packed layers of {bits} bits have another KL, {packed['kl']:.4f}"
    return row | packed | {"measured": "packed"}, curve, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="of all trainings together")
    parser.add_argument("--float-minutes", type=float, help="of the float model, beside --minutes")
    parser.add_argument("--steps", type=int, help="of each training, instead of minutes")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16 on a CPU too")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--float-rate", type=float, default=1e-3)
    parser.add_argument(
        "--qat-rates", type=rate_of, nargs="+", default=[], metavar="[BITS=]RATE", help="a width tries all"
    )
    parser.add_argument("--start", choices=("gptq", "rtn"), default="gptq", help="of QAT (default gptq)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny also takes little text")
    parser.add_argument("--float", type=Path, help="weights of the float model: read, or written if missing")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=bench_common.RESULTS)
    args = parser.parse_args()
    about = bench_common.machine()
    if args.device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name(args.device)
        about |= {"cpu": about["gpu"], "family": ""}
    torch.manual_seed(args.seed)
    autocast = torch.bfloat16 if args.autocast or args.device.startswith("cuda") else None
    learned, held = texts("calib.*", args.data), texts("heldout_dev.*", args.data)
    if args.size == "tiny":
        learned, held = [t[:30000] for t in learned], [t[:6000] for t in held]
    tokenizer = make_tokenizer(learned, SIZES[args.size][3])
    rows = windows(learned, tokenizer, args.length)
    rows = batched(np.random.default_rng(args.seed).permutation(rows), args.batch)
    rows = rows[:-1] or rows  # the last one may be short
    every = windows(held, tokenizer, args.length)
    judge, scored = every[::10], np.delete(every, np.s_[::10], 0)
    judge = batched(judge[:: max(1, len(judge) // 32)], args.batch)
    scored = batched(scored[:: max(1, len(scored) // 160)], args.batch)
    sharing = args.bits if args.float_minutes else ("float", *args.bits)
    whole = sum(SHARES.get(what, 2.0) for what in sharing)
    minutes = {what: args.minutes * SHARES.get(what, 2.0) / whole for what in sharing}
    minutes.setdefault("float", args.float_minutes)
    told = [size for size in (args.size,) if size != "small"] + ["rtn"] * (args.start == "rtn")
    path = bench_common.result_path("-".join(["train_small", *told]), about, args.out)

    print("float model", flush=True)
    model = small_model(args.size, tokenizer.get_vocab_size()).to(args.device)
    if args.float is not None and args.float.exists():
        model.load_state_dict(torch.load(args.float, args.device))
        outcome = training.Outcome(seconds=1e-9)
    else:
        outcome = fit(model, None, rows, judge, minutes["float"], args.float_rate, autocast, steps=args.steps)
        if args.float is not None:
            torch.save(model.state_dict(), args.float)
    summary = {
        "size": args.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": tokenizer.get_vocab_size(),
        "tokens": sum(b.tokens.size for b in rows),
        "seconds": outcome.seconds,
    }
    curves = [{"what": "float", "step": s, "loss": v} for s, v in outcome.evaluations]
    table = [{"what": "float", "bits": 32, **measure(model, model, scored), **spent(outcome, rows)}]
    table[0]["measured"] = "float"
    print(table[-1], flush=True)
    bars, missing = [], []
    result = {"tool": "train_small", "machine": about, "model": summary}
    result |= {"rows": table, "curves": curves, "bars": bars, "missing": missing}
    for bits in args.bits:  # first, because they take seconds
        row = {"what": f"rtn {bits}", "bits": bits, "seconds": 0.0, "steps": 0, "measured": "packed"}
        try:
            row |= measure(rounded(model, bits), model, scored)
        except FAILURES as error:  # fake quantizers begin at the same codes
            missing.append(f"packed layers rounded to {bits} bits: {type(error).__name__}: {error}")
            row |= measure(prepared(model, bits, None), model, scored) | {"measured": "fake quantized"}
        table.append(row)
        print(table[-1], flush=True)
    bench_common.write(path, result)
    with tempfile.TemporaryDirectory(prefix="train-small-") as scratch:
        starts = {}
        if args.start == "gptq":
            starts = solved(model, tokenizer, learned, args.bits, Path(scratch))
        for bits, folder in starts.items():
            row = {"what": f"gptq {bits}", "bits": bits, "seconds": 0.0, "steps": 0, "measured": "packed"}
            packed = load_torch(folder, args.device, torch.float32)[0]
            table.append(row | measure(packed, model, scored))
            print(table[-1], flush=True)
        for bits in args.bits:
            rates = [rate for width, rate in args.qat_rates if width in (None, bits)] or RATES.get(
                bits, (1e-4,)
            )
            print(f"{bits} bits", flush=True)
            row, curve, failed = trained(
                model, bits, starts.get(bits), rows, judge, scored, minutes[bits], rates, autocast, args.steps
            )
            table.append(row)
            curves += curve
            missing += [failed] if failed else []
            bars.append(share_bar(table, bits))
            print(row, flush=True)
            bench_common.write(path, result)
            if args.plot:
                plot(path.with_suffix(".png"), result)
    bench_common.print_bars(bars)
    if missing:
        raise SystemExit("train_small: " + "; ".join(missing))


if __name__ == "__main__":
    main()
