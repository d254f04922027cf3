"""Text for calibration and measurement, as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

WINDOWS, LENGTH = 16, 512
SHIPPED = Path(__file__).with_name("calibration.txt")
EVALUATION = Path(__file__).with_name("evaluation.txt")  # none of it is in the other


def read_text(source: str | Path | None) -> list[str]:
    """Documents of a calibration set: None is the one that comes with mlxq.

    A .jsonl file has one document per line under "text"; any other file is one document, except ours, whose
    documents are separated by lines of three dashes. Raises FileNotFoundError and ValueError naming the file.
    """
    path = SHIPPED if source is None else Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    if path == SHIPPED:
        return text.split("\n---\n")
    if path.suffix != ".jsonl":
        return [text]
    try:
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'{path}: a line is not a JSON object with "text"') from None


def token_windows(
    documents: list[str], encode: Callable[[str], list[int]], count: int = WINDOWS, length: int = LENGTH
) -> np.ndarray:
    """Token ids, int64 (at most count, length), spread evenly over all documents.

    Documents are joined; a text of fewer tokens gives fewer windows, or one that is shorter. Raises
    ValueError when it holds fewer than two tokens.
    """
    tokens = np.array([token for document in documents for token in encode(document)], np.int64)
    if len(tokens) < 2:
        raise ValueError("the calibration text is empty")
    length = min(length, len(tokens))
    count = min(count, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])
