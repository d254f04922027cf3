"""Calibration text in the model's own words: answers that it samples to a fixed set of prompts.

`mlxq convert SRC DST --calibration model`. The answers come from SRC at 8 bits, converted for this into a
folder that goes away; prompts and answers stand in the model's own chat template, special tokens and all.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlxq.cache import cache_folder
from mlxq.checkpoint.huggingface import resolve
from mlxq.checkpoint.journal import identity
from mlxq.convert import convert
from mlxq.load import load
from mlxq.ptq.text import LENGTH, WINDOWS

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
TOKENS = WINDOWS * LENGTH  # what a calibration takes
TEMPERATURE, TOP_P = 0.8, 0.95


def sampled_text(
    src: str | Path,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """A .jsonl file in the cache folder, one answer a line, for `calibration`; sampled once for a model.

    src     what convert takes
    tokens  altogether, spread over the prompts; an answer may end earlier
    seed    of the first prompt's answer, the next ones follow: the same text each time on one machine

    Raises what convert raises.
    """
    from rich.console import Console

    src = resolve(src)
    key = identity(src, {"tokens": tokens, "seed": seed, "prompts": PROMPTS})[:16]
    file = cache_folder() / f"sampled-{key}.jsonl"
    console = Console(stderr=True, highlight=False)
    if file.exists():
        if progress:
            console.print(f"calibration text: {file}, sampled earlier", markup=False)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="sampling-") as folder:
        wide = Path(folder) / "model"
        convert(src, wide, bits=8, group_size=32, trust_remote_code=trust_remote_code, progress=progress)
        with _bar(console, tokens, progress) as advance:
            documents = sample(*load(wide), tokens=tokens, seed=seed, advance=advance)
        half = Path(folder) / file.name
        half.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
        half.replace(file)
    if progress:
        console.print(f"calibration text: {file}", markup=False)
    return file


def sample(
    model,
    tokenizer,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Documents: prompt and sampled answer as the chat template writes them, or as plain text without one.

    advance   called with the number of tokens whenever one is sampled, at last with what was not needed
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    sampler = make_sampler(temp=TEMPERATURE, top_p=TOP_P)
    each, documents = -(-tokens // len(PROMPTS)), []
    for number, prompt in enumerate(PROMPTS):
        mx.random.seed(seed + number)
        asked = f"{prompt}\n\n"
        if tokenizer.has_chat_template:
            messages = [{"role": "user", "content": prompt}]
            asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(asked, add_special_tokens=not tokenizer.has_chat_template)
        answer: list[int] = []
        for step in stream_generate(model, tokenizer, ids, max_tokens=each, sampler=sampler):
            answer.append(step.token)
            advance(1)
        advance(each - len(answer))
        documents.append(asked + tokenizer.decode(answer))
    return documents


@contextlib.contextmanager
def _bar(console, total: int, progress: bool):
    """A function that moves a bar on stderr; silent when that is not a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("sampling text"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=console, disable=not (progress and console.is_terminal), transient=True,
    )  # fmt: skip
    task = bar.add_task("", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)
