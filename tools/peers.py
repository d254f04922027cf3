"""mlx-lm's own GPTQ and DWQ as they are, on a text file and at the speed that a CPU has for float32.

    python tools/peers.py gptq TEACHER DST TEXT --bits B
    python tools/peers.py dwq TEACHER DST TEXT --start QUANTIZED --minutes M [--learning-rate 1e-6]

The commands `mlx_lm.gptq` and `mlx_lm.dwq` compute in the model's dtype, and MLX multiplies bfloat16 without
a BLAS; here the functions they call get float32 models, and what is stored is bfloat16 as theirs. gptq takes
the whole text in windows of 512 tokens (ours takes 16 of them). dwq takes its text and its number of steps
from a Hugging Face data set; here it goes around rows of 512 tokens of TEXT until the minutes are over, and
validates on a few of them; its student has our layers. Loss, optimiser and what is trained are its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import mlx_lm
import numpy as np
from mlx_lm.quant import dwq, gptq

from mlxq import load
from mlxq.ptq.host import host_products
from mlxq.ptq.text import read_text, token_windows

LENGTH, BATCH = 513, 2  # one more than is predicted
GPTQ_WINDOWS = 4096  # at most: the whole text, which our tune and train see all of


def gptq_model(args, teacher, tokenizer, config):
    """(model, config) by mlx-lm's gptq."""
    windows = token_windows(read_text(args.text), lambda text: tokenizer.encode(text), GPTQ_WINDOWS)
    model, quantization = gptq.gptq_quantize(teacher, mx.array(windows), args.bits, 64, 8, 64)
    return model, config | {"quantization": quantization}


def dwq_model(args, teacher, tokenizer):
    """(model, config) of args.start after mlx-lm's dwq."""
    deadline = time.monotonic() + 60 * args.minutes
    student, _, config = load(args.start, return_config=True)
    ids = [i for part in read_text(args.text) for i in tokenizer.encode(part, add_special_tokens=False)]
    rows = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    np.random.default_rng(0).shuffle(rows)
    held = max(BATCH, min(4, len(rows) // 10))
    train, valid = ([(row.tolist(), 0) for row in some] for some in (rows[held:], rows[:held]))
    stock, turns = dwq.iterate_batches, []

    def batches(data, batch_size, max_seq_length, seed):
        if data is valid:
            yield from stock(data, batch_size, max_seq_length, seed=seed)
            return
        for batch in stock(data, batch_size, max_seq_length, loop=True, seed=seed):
            if turns and time.monotonic() >= deadline:
                return
            turns.append(time.monotonic())
            yield batch

    def targets(batch, step, split):
        with host_products():
            logits = teacher(batch)
            mx.eval(logits)
        return logits

    dwq.iterate_batches = batches
    dwq.dwq_quantize(
        student, targets,
        optimizers.Adam(learning_rate=args.learning_rate, bias_correction=True),
        train, valid, batch_size=BATCH, max_seq_length=LENGTH, seed=0, dtype=mx.float32,
    )  # fmt: skip
    print(f"{len(turns)} steps of {BATCH} x {LENGTH - 1} tokens")
    return student, config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("method", choices=("gptq", "dwq"))
    for name in ("teacher", "dst", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()
    teacher, tokenizer, config = mlx_lm.load(str(args.teacher), return_config=True)
    teacher.set_dtype(mx.float32)
    if args.method == "gptq":
        model, config = gptq_model(args, teacher, tokenizer, config)
    else:
        model, config = dwq_model(args, teacher, tokenizer)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    mlx_lm.utils.save(str(args.dst), str(args.teacher), model, tokenizer, config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
