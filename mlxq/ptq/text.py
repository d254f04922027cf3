"""Text for calibration and measurement, as windows of tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mlxq.format import dtype_name

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


def batches(inputs, tokenizer=None, count: int = WINDOWS, length: int = LENGTH) -> Iterator:
    """What a model is called with, one after the other; text gives numpy arrays, int64 (1, at most length).

    inputs      None: the text that comes with mlxq; a Path, or a str that names a file: see read_text;
                another str, or strings: documents; an array of token ids (count, length) or (length,); or
                batches of any other kind, which come as they are, but for token ids (length,): as (1, length)
    tokenizer   for text: a function from str to token ids, or what has it as its method encode

    Raises FileNotFoundError for a str that reads as the name of a text file and is none, TypeError for text
    without a tokenizer, ValueError for text of fewer than two tokens.
    """
    if inputs is None or isinstance(inputs, Path) or (isinstance(inputs, str) and _names_a_file(inputs)):
        inputs = read_text(inputs)
    elif isinstance(inputs, str):
        inputs = [inputs]
    elif _is_tokens(inputs):
        inputs = [inputs] if inputs.ndim == 1 else (row for row in inputs)
    every = iter(inputs)
    first = next(every, None)
    if isinstance(first, str):
        if tokenizer is None:
            raise TypeError("calibrate: text needs a tokenizer: pass tokenizer=, or arrays of token ids")
        windows = token_windows([first, *every], _encoder(tokenizer), count, length)
        yield from windows[:, None]
    elif first is not None:
        for batch in itertools.chain([first], every):
            yield batch[None] if _is_tokens(batch) and batch.ndim == 1 else batch


def _names_a_file(text: str) -> bool:
    if "\n" in text or len(text) > 1023:
        return False
    return text.endswith((".txt", ".jsonl")) or Path(text).is_file()


def _is_tokens(array) -> bool:
    return hasattr(array, "ndim") and "int" in dtype_name(array)


def _encoder(tokenizer) -> Callable[[str], list[int]]:
    encode = getattr(tokenizer, "encode", tokenizer)

    def ids(text: str) -> list[int]:
        found = encode(text)
        return getattr(found, "ids", found)

    return ids
