"""Texts and chats as rows of tokens: what is trained on, what is held out, and which tokens count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxq.ptq.text import read_text
from mlxq.qat.training import Batch

HELD_OUT = 10  # every tenth row, unless there is text for it

Row = tuple[np.ndarray, np.ndarray]  # tokens int64 (T,), scored bool (T,)


def rows(settings, tokenizer) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out). Raises ValueError for files of another form, or too short.

    Text is cut into rows of settings.length tokens, what is left over is dropped. A JSONL line is a row, cut
    at that length: {"text"}, or a chat {"messages"} or {"prompt", "completion"}, of which the answers count.
    """
    made = [_rows(name, tokenizer, settings.length) for name in settings.data or (None,)]
    kept = [row for part in made for row in part]
    if settings.eval_data:
        held = [row for name in settings.eval_data for row in _rows(name, tokenizer, settings.length)]
    else:
        held, kept = kept[::HELD_OUT], [row for i, row in enumerate(kept) if i % HELD_OUT]
    if not kept or not held:
        raise ValueError(
            f"train: {len(kept)} rows to train on and {len(held)} to measure with are too few; "
            "give more text or a smaller --length"
        )
    if len(held) > settings.evaluate:  # spread evenly
        places = np.linspace(0, len(held) - 1, settings.evaluate).astype(int)
        held = [held[place] for place in places]
    return kept, held


def _rows(name: str | None, tokenizer, length: int) -> list[Row]:
    if name is None or Path(name).suffix != ".jsonl":
        tokens = [token for text in read_text(name) for token in _encode(tokenizer, text)]
        cut = len(tokens) // length * length
        every = np.ones(length, bool)
        return [(row, every) for row in np.array(tokens[:cut], np.int64).reshape(-1, length)]
    out = []
    for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            tokens, scored = _line(f"{name}, line {number}", line, tokenizer)
            if any(scored[1:length]):
                out.append((np.array(tokens[:length], np.int64), np.array(scored[:length], bool)))
    return out


def _line(where: str, line: str, tokenizer) -> tuple[list[int], list[bool]]:
    try:
        entry = json.loads(line)
        if "text" in entry:
            tokens = _encode(tokenizer, entry["text"])
            return tokens, [True] * len(tokens)
        messages = entry.get("messages") or [
            {"role": "user", "content": entry["prompt"]},
            {"role": "assistant", "content": entry["completion"]},
        ]
        return _chat(messages, tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where}: no JSON object with "text", "messages" or "prompt" and "completion" ({error})'
        ) from None


def _chat(messages: Sequence[dict], tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a chat in the model's template, and which of them an assistant says."""

    def rendered(upto: int, ask: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(list(messages[:upto]), tokenize=False, add_generation_prompt=ask)
        return list(tokenizer.encode(text, add_special_tokens=False))

    tokens = rendered(len(messages))
    scored = [False] * len(tokens)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            for place in range(len(rendered(i, ask=True)), min(len(rendered(i + 1)), len(tokens))):
                scored[place] = True
    return tokens, scored


def _encode(tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def batches(rows: Sequence[Row], size: int, ranks: int = 1) -> list[Batch]:
    """Rows side by side, padded with tokens that do not count; size rows for each of `ranks` processes.

    Rows of about the same length share a batch, and the last batch is filled up with rows that do not count.
    """
    ordered = sorted(rows, key=lambda row: -len(row[0]))
    out = []
    for start in range(0, len(ordered), size * ranks):
        part = ordered[start : start + size * ranks]
        length = max(len(part[0][0]), 2)
        tokens = np.zeros((max(len(part), ranks), length), np.int64)
        scored = np.zeros(tokens.shape, bool)
        for i, (row, counts) in enumerate(part):
            tokens[i, : len(row)], scored[i, : len(row)] = row, counts
        out.append(Batch(tokens, scored))
    return out
