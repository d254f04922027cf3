"""`mlxq train` in two processes, whole (DDP) and cut up (--fsdp), beside one process: the same losses.

    python tools/train_nccl.py [--device cuda]    two GPUs and NCCL; with --device cpu two processes, gloo

A small random Llama is trained for 2 bits, and its quantized form's scales and biases, on the same batches.
JSON: bench_common's machine, and
    rows   [{what, processes, start, best, losses, worst (largest relative difference to one process)}]
    bars   worst
Exit code 1 where a difference is above TOLERANCE; 0, and a sentence, where there is one GPU only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_common

TOLERANCE = 1e-3  # float32 sums in another order, and TF32 nowhere; losses are about 0.1 to 1
STEPS = 8


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """(float folder, quantized folder, text) of a random Llama of 1.2 million weights."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = "".join(
        f"{n} bottles of beer on the wall, take {n % 7} down and pass it around. " for n in range(900)
    )
    (folder / "text.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    )
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "float")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="a", eos_token="b"
    ).save_pretrained(folder / "float")
    run(
        "-m",
        "mlxq",
        "convert",
        str(folder / "float"),
        str(folder / "w2"),
        "--bits",
        "2",
        "--group-size",
        "64",
    )
    return folder / "float", folder / "w2", folder / "text.txt"


def run(*words: str) -> None:
    """A command of this Python. Raises SystemExit with what it said."""
    done = subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"train_nccl: {' '.join(words)}: exit {done.returncode}\n{done.stdout[-3000:]}")


def beside_one(kind: str, command: list[str], scratch: Path, text: Path, device: str) -> list[dict]:
    """Rows of one kind of training: one process, two whole ones, two that cut the model up."""
    model, *flags = command
    common = [*flags, "--data", str(text), "--steps", str(STEPS), "--length", "64", "--evaluate", "8"]
    common += ["--device", device, "--backend", "torch"]
    rows = []
    for what, processes, more in (("one", 1, []), ("ddp", 2, []), ("fsdp", 2, ["--fsdp"])):
        dst = scratch / f"{kind}-{what}"
        words = ["mlxq", "train", model, str(dst), *common, "--batch", str(8 // processes), *more]
        starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run(*(starter if processes > 1 else []), "-m", *words)
        told = json.loads((dst / "training.json").read_text())
        row = {"what": f"{kind} {what}", "processes": processes}
        row |= {name: told[name] for name in ("start", "best", "losses")}
        rows.append(row)
        alone = rows[0]
        pairs = zip([row["start"], *row["losses"]], [alone["start"], *alone["losses"]], strict=True)
        row["worst"] = max(abs(a / b - 1) for a, b in pairs)
        print(f"{row['what']}: {row['start']:.5f} to {row['best']:.5f}, worst {row['worst']:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=bench_common.RESULTS / "train_nccl.json")
    args = parser.parse_args()
    about = bench_common.machine()
    if args.device == "cuda":
        import torch

        about["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if len(about["gpu"]) < 2:
            print(f"train_nccl: NCCL wants two GPUs, and here are {about['gpu']}: nothing was run")
            return
    rows, bars = [], []
    with tempfile.TemporaryDirectory(prefix="train-nccl-") as scratch:
        scratch = Path(scratch)
        source, quantized, text = make_inputs(scratch)
        kinds = {
            "qat": [str(source), "--qat", "--bits", "2", "--learning-rate", "1e-4"],
            "scales": [str(quantized), "--teacher", str(source)],
        }
        with ThreadPoolExecutor() as pool:  # both kinds at once: most of the time goes to imports
            for found in pool.map(
                lambda kind: beside_one(kind, kinds[kind], scratch, text, args.device), kinds
            ):
                rows += found
    for row in rows:
        if row["processes"] > 1:
            bars.append(
                bench_common.bar(f"{row['what']}: losses beside one process", row["worst"], TOLERANCE, "<=")
            )
    bench_common.print_bars(bars)
    bench_common.write(args.out, {"tool": "train_nccl", "machine": about, "rows": rows, "bars": bars})
    if not all(bar["met"] for bar in bars):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
