"""The shared list of shapes for every format: the ragged and the tiny, then the real model shapes."""

from __future__ import annotations

import itertools

from mlxq.format import FORMATS, STORAGE, Format

# (M, N, K in groups). Every tile has an edge here: rows 1 to 70, columns that no tile divides, odd groups.
RAGGED = ((1, 3, 1), (1, 5, 7), (2, 4, 3), (3, 17, 2), (4, 9, 5), (6, 3, 11), (11, 21, 4), (37, 13, 3))
RAGGED += ((70, 11, 2),)  # enough rows for the kernels that want many
# (M, N, K): a decoder's projections, and a row longer than any block a kernel works in.
REAL = ((1, 192, 576), (1, 576, 1536), (5, 192, 576), (16, 96, 1536), (1, 24, 4224), (9, 8, 4224))


def shapes(fmt: Format) -> list[tuple[int, int, int]]:
    """(M, N, K) that the format can hold, ragged and tiny ones first."""
    ragged = [(M, N, groups * fmt.group_size) for M, N, groups in RAGGED]
    return ragged + [shape for shape in REAL if shape[2] % fmt.group_size == 0]


def dtypes() -> list[tuple[str, str]]:
    """(dtype of x, dtype of scales and biases), all of them."""
    return list(itertools.product(STORAGE, STORAGE))


def harness_lines() -> list[str]:
    """The same list in the words of tests/native/harness.cpp, with gathered and with non-finite rows.

    Shapes and pairs of dtypes are walked in step: each format meets all of both, not all combinations.
    """
    lines = []
    for fmt, transpose in itertools.product(FORMATS, (1, 0)):
        pairs = itertools.cycle(itertools.product(range(3), range(3)))
        for shape, (x_dtype, scale_dtype) in zip(shapes(fmt) + shapes(fmt)[1:6], pairs, strict=False):
            M, N, K = shape
            numbers = (fmt.bits, fmt.group_size, M, N, K, transpose, x_dtype, scale_dtype)
            case = " ".join(str(number) for number in numbers)
            lines.append(f"{case} plain")
            if M in (3, 11):
                lines.append(f"{case} gather")
            if M in (4, 6):
                lines.append(f"{case} nonfinite")
            if transpose:
                lines += [f"{case} q8", f"{case} q8_row", f"{case} q8_tile"]
    return lines
