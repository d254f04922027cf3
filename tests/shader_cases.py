"""Every shader, on any machine that runs them: how it is dispatched (metal/shaders/kernels.json), what it is
given, and the float64 answer with the bound of its error.

    for case in core():
        buffers = case.buffers()
        machine.run(case.entry, buffers, case.grid, case.threads)
        case.check(buffers)

The CPU harness runs them in test_shaders.py; scripts for other devices run the same list.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cases import RAGGED

from mlxq import format as fm
from mlxq.format import FORMATS, Format

SHADERS = Path(__file__).resolve().parent.parent / "metal" / "shaders"
KERNELS = json.loads((SHADERS / "kernels.json").read_text())["kernels"]
STORED = {"float": "float32", "half": "float16", "bfloat": "bfloat16"}
PAIRS = tuple(itertools.product(STORED, STORED))  # (type of activations, type of scales)
TILES = tuple(tuple(tile) for tile in KERNELS["qmm"]["values"]["BM, BN, WM, WN"])
UNIT = 2.0**-24  # of float32: an operation's relative error
ROUNDING = {"float": 2.0**-24, "half": 2.0**-11, "bfloat": 2.0**-8}  # of a result to its type


def entry(kernel: str, *arguments) -> tuple[str, str]:
    """(kernel, "template arguments") as tools.msl.harness takes them.

    Raises ValueError for what is not built.
    """
    row = KERNELS[kernel]
    if len(arguments) != len(row["template"]):
        raise ValueError(f"{kernel}: template arguments are {row['template']}, given {arguments}")
    given = dict(zip(row["template"], arguments, strict=True))
    for names, values in row["values"].items():
        chosen = [given[name] for name in names.split(", ")]
        if (chosen if len(chosen) > 1 else chosen[0]) not in values:
            raise ValueError(f"{kernel}: {names} cannot be {chosen}; built: {values}")
    return kernel, ", ".join(str(a) for a in arguments)


def all_entries(kernel: str) -> list[tuple[str, str]]:
    """Every instantiation that the table names."""
    row = KERNELS[kernel]
    choices = []
    for names, values in row["values"].items():
        choices.append([v if "," in names else [v] for v in values])
    return [entry(kernel, *itertools.chain(*pick)) for pick in itertools.product(*choices)]


def geometry(name: str, arguments: tuple, scalars: dict[str, int]) -> tuple[tuple, tuple]:
    """(threadgroups, threads of each) of a dispatch, by the table."""
    row = KERNELS[name]
    values = dict(zip(row["template"], arguments, strict=True)) | scalars

    def number(of) -> int:
        if isinstance(of, list):
            return -(-number(of[0]) // number(of[1]))
        return int(values[of]) if isinstance(of, str) else of

    return tuple(map(number, row["grid"])), tuple(map(number, row["threads"]))


def stored(values: np.ndarray, type_: str) -> np.ndarray:
    """Values rounded to a type of the shaders, as arrays hold it: bfloat as uint16 patterns."""
    values = fm.store(np.asarray(values, np.float32), STORED[type_])
    if type_ == "bfloat":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if type_ == "half" else np.ascontiguousarray(values)


def widened(array: np.ndarray) -> np.ndarray:
    """float64 values of an array of the shaders."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def empty(shape, type_: str) -> np.ndarray:
    """An output array that holds NaN, or -1 in integers: what a kernel leaves unwritten shows."""
    if type_ == "int":
        return np.full(shape, -1, np.int32)
    return stored(np.full(shape, np.nan, np.float32), type_)


def rounding(answer: np.ndarray, type_: str) -> np.ndarray:
    """The largest error of rounding to a type, float16's subnormals included."""
    return ROUNDING[type_] * np.abs(answer) + (2.0**-25 if type_ == "half" else 0)


@dataclass
class Case:
    """One dispatch.

    inputs    {name: array or number} of the table's buffers; outputs too, as they are before the dispatch
    outputs   {name: (float64 answer, bound of the error)}, bound None for equality of bits
    """

    kernel: str
    arguments: tuple
    inputs: dict[str, np.ndarray | int]
    outputs: dict[str, tuple[np.ndarray, np.ndarray | None]]
    scalars: dict[str, int] = field(default_factory=dict)
    label: str = ""

    @property
    def entry(self) -> tuple[str, str]:
        return entry(self.kernel, *self.arguments)

    @property
    def file(self) -> Path:
        return SHADERS / KERNELS[self.kernel]["file"]

    def index(self, name: str) -> int:
        """n of [[buffer(n)]]."""
        return [b[0] for b in KERNELS[self.kernel]["buffers"]].index(name)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.geometry[0]

    @property
    def threads(self) -> tuple[int, int, int]:
        return self.geometry[1]

    @property
    def geometry(self):
        numbers = {k: v for k, v in self.inputs.items() if isinstance(v, int)}
        return geometry(self.kernel, self.arguments, numbers | self.scalars)

    def buffers(self) -> dict[int, np.ndarray]:
        """{n of [[buffer(n)]]: array}, outputs fresh, numbers as numpy scalars."""
        out = {}
        for n, (name, type_, _) in enumerate(KERNELS[self.kernel]["buffers"]):
            value = self.inputs[name]
            if isinstance(value, int):
                value = np.uint32(value) if "uint" in type_ else np.int32(value)
            out[n] = value.copy() if name in self.outputs else value
        return out

    def check(self, buffers: dict[int, np.ndarray]) -> None:
        """Raises AssertionError that says where an output is wrong, and by how much."""
        for name, (answer, bound) in self.outputs.items():
            got = buffers[self.index(name)]
            if bound is None:
                wrong = got.view(answer.dtype) != answer
                worst = "bits differ"
            else:
                error = np.abs(widened(got) - answer)
                wrong = ~(error <= bound)
                share = np.nan_to_num(error / np.maximum(bound, 1e-300), posinf=np.inf).max(initial=0)
                worst = f"worst error {share:.3g} of its bound"
            if wrong.any():
                where = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise AssertionError(
                    f"{self}: {name} is wrong in {np.count_nonzero(wrong)} of {wrong.size} places, "
                    f"first {where}: {got[where]}, not {answer[where]}; {worst}"
                )

    def __str__(self) -> str:
        shape = {k: v for k, v in self.inputs.items() if isinstance(v, int)}
        return f"{self.kernel}<{', '.join(map(str, self.arguments))}> {self.label or shape}"


def run_on_harness(cases: list[Case], seeds, **options) -> list:
    """The Result of each case's last seed on the CPU harness. Raises what the harness or the check says."""
    sys.path.insert(0, str(SHADERS.parent.parent))  # tools/ is no installed package
    from tools.msl import harness

    entries: dict[Path, dict] = {}
    for case in cases:
        entries.setdefault(case.file, {})[case.entry] = None
    libs = {file: harness.compile(file, list(wanted)) for file, wanted in entries.items()}
    results = []
    for case in cases:
        for seed in seeds:
            buffers = case.buffers()
            result = libs[case.file].run(case.entry, buffers, case.grid, case.threads, seed=seed, **options)
            case.check(buffers)
        results.append(result)
    return results


# -------------------------------------------------------------------------------- products


@dataclass(frozen=True)
class Weight:
    """A packed weight as the shaders take it, and in float64; (E, N, K) if experts are asked for.

    size   |scale * code| + |bias|, what an error of the products is relative to
    """

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    value: np.ndarray
    size: np.ndarray


def weight(rng, fmt: Format, N: int, K: int, type_: str, experts: tuple = ()) -> Weight:
    codes = rng.integers(0, fmt.levels + 1, (*experts, N, K), dtype=np.uint8)
    groups = (*experts, N, K // fmt.group_size)
    scales = rng.uniform(0.5, 1.5, groups) * rng.choice([-1, 1], groups) / fmt.levels
    biases = rng.normal(size=groups) - scales * fmt.levels / 2
    # Subnormal in float16, in some of the groups: they must not be flushed to zero.
    tiny = rng.random(groups) < 0.1
    scales = stored(np.where(tiny, scales * 2.0**-16, scales), type_)
    biases = stored(np.where(tiny, 0, biases), type_)
    s, b = (np.repeat(widened(a), fmt.group_size, -1) for a in (scales, biases))
    return Weight(fm.pack(codes, fmt.bits), scales, biases, s * codes + b, np.abs(s) * codes + np.abs(b))


def activations(rng, shape, type_: str) -> np.ndarray:
    return stored(rng.normal(size=shape), type_)


def product(rng, kernel: str, arguments: tuple, M: int, N: int, K: int, span: int = 0) -> Case:
    """qmv, qmm, qmm_n, qvm and their split forms."""
    T, S, bits, group_size = arguments[:4]
    w = weight(rng, Format(bits, group_size), N, K, S)
    forward = kernel in ("qmv", "qmm", "qmm_split")
    inner, outer = (K, N) if forward else (N, K)
    x = activations(rng, (M, inner), T)
    value, size = (w.value.T, w.size.T) if forward else (w.value, w.size)
    inputs = {"x" if forward else "g": x, "words": w.words, "scales": w.scales, "biases": w.biases}
    inputs |= {"M": M, "N": N, "K": K}
    xf = widened(x)
    ranges = [(at, min(at + span, inner)) for at in range(0, inner, span)] if span else [(0, inner)]
    answer = np.stack([xf[:, a:b] @ value[a:b] for a, b in ranges])
    # A weight is rounded once, then at most so many additions follow each other.
    bound = np.stack([(b - a + 8) * UNIT * (np.abs(xf[:, a:b]) @ size[a:b]) for a, b in ranges])
    if span:
        inputs |= {"span": span, "partials": empty(answer.shape, "float")}
        return Case(kernel, arguments, inputs, {"partials": (answer, bound)})
    inputs["y"] = empty((M, outer), T)
    return Case(kernel, arguments, inputs, {"y": (answer[0], bound[0] + rounding(answer[0], T))})


def sum_splits(rng, T: str, count: int, splits: int) -> Case:
    partials = rng.normal(size=(splits, count)).astype(np.float32)
    answer = partials.astype(np.float64).sum(0)
    bound = splits * UNIT * np.abs(partials).sum(0) + rounding(answer, T)
    inputs = {"partials": partials, "y": empty(count, T), "count": count, "splits": splits}
    return Case("sum_splits", (T,), inputs, {"y": (answer, bound)})


def tile_list(rhs: np.ndarray, M: int, E: int, BM: int) -> np.ndarray:
    """int32 (tiles, 3): what schedule_tiles must make of sorted expert indices."""
    tiles = []
    for expert in range(E):
        rows = np.flatnonzero(rhs == expert)
        if len(rows):
            begin, end = int(rows[0]) * M, (int(rows[-1]) + 1) * M
            tiles += [(expert, at, min(at + BM, end)) for at in range(begin, end, BM)]
    count = -(-len(rhs) * M // BM) + min(E, len(rhs))
    out = np.zeros((count, 3), np.int32)
    out[: len(tiles)] = tiles
    return out


def schedule(rhs: np.ndarray, M: int, E: int, BM: int) -> Case:
    answer = tile_list(rhs, M, E, BM)
    inputs = {
        "rhs": rhs,
        "tiles": empty(answer.shape, "int"),
        "B": len(rhs),
        "M": M,
        "E": E,
        "BM": BM,
        "count": len(answer),
    }
    return Case(
        "schedule_tiles", (), inputs, {"tiles": (answer, None)}, label=f"B={len(rhs)} M={M} E={E} BM={BM}"
    )


def gathered(rng, kernel: str, arguments: tuple, M: int, N: int, K: int, E: int, B: int) -> Case:
    T, S, bits, group_size = arguments[:4]
    w = weight(rng, Format(bits, group_size), N, K, S, (E,))
    forward = kernel in ("gather_qmv", "gather_qmm", "gather_qmm_sorted")
    inner, outer = (K, N) if forward else (N, K)
    blocks = B + 2
    x = activations(rng, (blocks, M, inner), T)
    lhs = rng.integers(0, blocks, B, dtype=np.int32)
    rhs = rng.integers(0, E, B, dtype=np.int32)
    scalars = {"B": B}
    inputs = {
        "x": x,
        "words": w.words,
        "scales": w.scales,
        "biases": w.biases,
        "lhs": lhs,
        "M": M,
        "N": N,
        "K": K,
    }
    if kernel.endswith("_sorted"):
        rhs.sort()
        inputs["tiles"] = tile_list(rhs, M, E, arguments[4])
        scalars["tiles"] = len(inputs["tiles"])
    else:
        inputs["rhs"] = rhs
    xf = widened(x)[lhs]
    turn = (0, 2, 1) if forward else (0, 1, 2)
    answer = xf @ w.value[rhs].transpose(turn)
    bound = (inner + 8) * UNIT * (np.abs(xf) @ w.size[rhs].transpose(turn)) + rounding(answer, T)
    inputs["y"] = empty((B, M, outer), T)
    return Case(kernel, arguments, inputs, {"y": (answer, bound)}, scalars, f"M={M} N={N} K={K} E={E} B={B}")


# -------------------------------------------------------------------------------- quantizing


def quantized(w: np.ndarray, fmt: Format, W: str, S: str) -> Case:
    """Rule "affine" on w, float32 (G, group_size) of values that W holds exactly; the bits of mlxq.format."""
    p = fm.quantize(w, fmt, "affine", STORED[S])
    answers = {"words": p.words, "scales": stored(p.scales, S)[:, 0], "biases": stored(p.biases, S)[:, 0]}
    inputs = {"w": stored(w, W), "groups": len(w), "report": np.zeros(2, np.uint32)}
    outputs = {"report": (np.zeros(2, np.uint32), None)}
    for name, answer in answers.items():
        inputs[name] = (
            np.full_like(answer, np.nan) if answer.dtype.kind == "f" else np.full_like(answer, 0xAAAA)
        )
        bits = np.dtype(f"uint{8 * answer.dtype.itemsize}")
        outputs[name] = (answer.view(bits), None)
    return Case("quantize", (W, S, fmt.bits, fmt.group_size), inputs, outputs)


def dequantized(rng, fmt: Format, W: str, S: str, groups: int) -> Case:
    w = weight(rng, fmt, groups, fmt.group_size, S)
    scales, biases = (widened(a).astype(np.float32) for a in (w.scales, w.biases))
    answer = stored(fm.dequantize(fm.Packed(w.words, scales, biases, fmt)), W)
    bits = np.dtype(f"uint{8 * answer.dtype.itemsize}")
    inputs = {
        "words": w.words,
        "scales": w.scales[:, 0].copy(),
        "biases": w.biases[:, 0].copy(),
        "groups": groups,
    }
    inputs["w"] = empty(answer.shape, W)
    return Case("dequantize", (W, S, fmt.bits, fmt.group_size), inputs, {"w": (answer.view(bits), None)})


# -------------------------------------------------------------------------------- int8 activations


def q8(rng, kernel: str, arguments: tuple, M: int, N: int, K: int, extreme: bool = False) -> Case:
    """int8 times packed codes, x_scales of tiles over four orders of magnitude, biases away from -z * scale.

    extreme: all codes the largest, odd sums beyond 2^24.
    """
    S, bits, group_size, grouped = arguments[:4]
    zero, groups = 2 ** (bits - 1), K // group_size
    x = np.full((M, K), 127, np.int8) if extreme else rng.integers(-128, 128, (M, K), dtype=np.int8)
    codes = np.full((N, K), 2 * zero - 1) if extreme else rng.integers(0, 2 * zero, (N, K))
    x_scales = (10 ** rng.uniform(-4, 0, (M, groups if grouped == 2 else 1))).astype(np.float32)
    scales = stored(rng.uniform(0.5, 1.5, (N, groups)) * rng.choice([-1, 1], (N, groups)) / zero, S)
    biases = stored(rng.normal(size=(N, groups)) - zero * widened(scales), S)
    inputs = {
        "x": x.view(np.uint32), "x_scales": x_scales, "words": fm.pack(codes.astype(np.uint8), bits),
        "scales": scales, "biases": biases, "y": empty((M, N), "float"), "M": M, "N": N, "K": K,
    }  # fmt: skip
    parts = (a.reshape(len(a), groups, -1).astype(np.float64) for a in (x, codes - zero))
    sums = np.einsum("mgk,ngk->mng", *parts)
    scales, biases = widened(scales), widened(biases)
    if grouped == 0:  # two roundings and the sum's: any order of these and the answer differs
        by = x_scales * scales[:, 0].astype(np.float32)
        answer = sums.sum(-1).astype(np.float32) * by
        return Case(kernel, arguments, inputs, {"y": (answer.view(np.uint32), None)})
    by, x_sums = x_scales.astype(np.float64)[:, None], x.reshape(M, 1, groups, -1).sum(-1, dtype=np.float64)
    terms = np.concatenate([sums * scales * by, x_sums * (biases + zero * scales) * by], -1)
    # Three roundings in a term, then the groups; bias + z * scale is a difference, rounded.
    lost = np.abs(x_sums * zero * scales * by).sum(-1)
    bound = (groups + 8) * UNIT * (np.abs(terms).sum(-1) + lost)
    return Case(kernel, arguments, inputs, {"y": (terms.sum(-1), bound)})


def q8_rows(rng, T: str, M: int, K: int) -> Case:
    """Rows of zeros, of random numbers and of numbers next to the middle between two codes."""
    x = activations(rng, (M, K), T)
    x[0] = 0
    largest = np.abs(widened(x[2::2])).max(-1, keepdims=True)
    x[2::2] = stored(largest * np.where(np.arange(K) == 0, 127, np.arange(K) % 127 + 0.5) / 127, T)
    values = widened(x).astype(np.float32)
    peak = np.abs(values).max(-1)
    scales = np.where(peak == 0, np.float32(1), peak / np.float32(127))
    codes = np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8).view(np.uint32)
    inputs = {"x": x, "codes": np.full_like(codes, 0xAAAA), "scales": empty(M, "float"), "M": M, "K": K}
    outputs = {"codes": (codes, None), "scales": (scales.view(np.uint32), None)}
    return Case("q8_rows", (T,), inputs, outputs)


# -------------------------------------------------------------------------------- the list


def shapes(fmt: Format, rows: int | None = None) -> list[tuple[int, int, int]]:
    """(M, N, K): the ragged ones of cases.py, and a row that is longer than a step of qmv."""
    ragged = [(rows or M, N, groups * fmt.group_size) for M, N, groups in RAGGED]
    return [*ragged, (rows or 19, 70, 1152)]


def one_by_one(make: Callable[[Format, tuple[str, str], int], list[Case]]) -> list[Case]:
    """A kernel's cases for all formats, the pairs of types walked in step."""
    found = []
    for i, fmt in enumerate(FORMATS):
        found += make(fmt, PAIRS[(4 * i + i // 9) % 9], i)
    return found


def core(seed: int = 0) -> list[Case]:
    """All kernels, formats, types, tiles, numbers of rows and ragged shapes, but not all pairs of choices."""
    rng = np.random.default_rng(seed)
    found: list[Case] = []

    def vector(kernel, span_of=None):
        def make(fmt, pair, i):
            cases = []
            for M, (T, S) in ((1, pair), (2 + i % 7, PAIRS[(PAIRS.index(pair) + 4) % 9])):
                if span_of and M != 1 + i % 8:
                    continue
                chosen = shapes(fmt, M)[i % 3 :: 3] + shapes(fmt, M)[-1:]
                for M_, N, K in chosen:
                    arguments = (T, S, fmt.bits, fmt.group_size, M)
                    cases.append(
                        product(rng, kernel, arguments, M_, N, K, span_of(N, K, fmt) if span_of else 0)
                    )
            return cases

        return make

    def matrix(kernel, span_of=None, every=1):
        def make(fmt, pair, i):
            if i % every:
                return []
            arguments = (
                *pair,
                fmt.bits,
                fmt.group_size,
                *TILES[(i // every) % 3 if every > 1 else (i + i // 3) % 3],
            )
            chosen = shapes(fmt)[i % 3 :: 3] + [(65, 67, 2 * fmt.group_size), (128, 64, 256)]
            return [
                product(rng, kernel, arguments, *s, span_of(s[1], s[2], fmt) if span_of else 0)
                for s in chosen
            ]

        return make

    def columns(N, K, fmt):
        return max(fmt.group_size, K // 3 // fmt.group_size * fmt.group_size)

    def rows(N, K, fmt):
        return 32 if N < 65 else 64

    def any_rows(N, K, fmt):
        return 5 + N // 3

    found += one_by_one(vector("qmv")) + one_by_one(vector("qvm")) + one_by_one(vector("qvm_split", any_rows))
    found += one_by_one(matrix("qmm")) + one_by_one(matrix("qmm_split", columns, 4))
    found += one_by_one(matrix("qmm_n")) + one_by_one(matrix("qmm_n_split", rows, 4))
    found += [sum_splits(rng, T, count, splits) for T in STORED for count, splits in ((1, 1), (700, 5))]

    for i, (kernel, M) in enumerate((k, m) for k in ("gather_qmv", "gather_qvm") for m in (1, 3, 8)):
        fmt = FORMATS[(4 * i) % 9]
        arguments = (*PAIRS[(i * 2 + 1) % 9], fmt.bits, fmt.group_size, M)
        found += [
            gathered(rng, kernel, arguments, M, N, g * fmt.group_size, E, B)
            for N, g, E, B in ((5, 3, 4, 7), (17, 2, 1, 1))
        ]
    for i, kernel in enumerate(
        ("gather_qmm", "gather_qmm_n", "gather_qmm_sorted", "gather_qmm_n_sorted") * 2
    ):
        fmt = FORMATS[(2 * i + 1) % 9]
        arguments = (*PAIRS[(i * 4 + 2) % 9], fmt.bits, fmt.group_size, *TILES[(i + i // 4) % 3])
        found.append(gathered(rng, kernel, arguments, 1, 40, fmt.group_size, 3, 50))
        found.append(gathered(rng, kernel, arguments, 21, 70, 2 * fmt.group_size, 5, 4))
    for B, E, M, BM in ((1, 1, 1, 16), (50, 7, 1, 16), (9, 600, 3, 32), (3000, 257, 1, 64)):
        found.append(schedule(np.sort(rng.integers(0, E, B, dtype=np.int32)), M, E, BM))

    for i, fmt in enumerate(FORMATS):
        W, S = PAIRS[(4 * i + 1) % 9]
        w = widened(stored(rng.normal(size=(37, fmt.group_size)) * 2.0 ** rng.integers(-6, 4, (37, 1)), W))
        w[3], w[4], w[5, 1:] = 0, w[4, 0], 0
        found.append(quantized(w.astype(np.float32), fmt, W, S))
        found.append(dequantized(rng, fmt, *PAIRS[(4 * i + 2) % 9], 37))

    for i, (fmt, grouped) in enumerate(itertools.product(FORMATS, (0, 1, 2))):
        arguments = (tuple(STORED)[(i + i // 3) % 3], fmt.bits, fmt.group_size, grouped)
        groups = 128 // fmt.group_size  # the last step of q8_mv and of q8_mm is a part of one
        for M, N, K in ((5, 9, 3 * fmt.group_size), (65, 70, 384)):
            found.append(q8(rng, "q8_mm", arguments, M, N, K))
        for M, N, K in ((1 + i % 8, 9, (2 * groups + 1) * fmt.group_size), (1 + (i + 3) % 8, 3, 640)):
            found.append(q8(rng, "q8_mv", (*arguments, M), M, N, K))
    for kernel, M in (("q8_mm", ()), ("q8_mv", (8,))):
        found.append(q8(rng, kernel, ("float", 8, 32, 0, *M), 8, 5, 2592))
        found.append(q8(rng, kernel, ("float", 8, 128, 0, *M), 8, 5, 4096, extreme=True))
        found += [q8(rng, kernel, ("float", 8, 128, n, *M), 8, 5, 512, extreme=True) for n in (1, 2)]
    # A product with 1 / 127 instead of the division differs in one scale of 22.
    found += [q8_rows(rng, T, M, K) for T in STORED for M, K in ((120, 96), (3, 1060))]
    return found


def every(seed: int = 0) -> list[Case]:
    """Every instantiation of the table once, on a ragged shape that has all kinds of edges."""
    rng = np.random.default_rng(seed)
    found: list[Case] = []
    for kernel, row in KERNELS.items():
        for _, text in all_entries(kernel):
            arguments = tuple(a if a.isalpha() else int(a) for a in text.split(", ")) if text else ()
            given = dict(zip(row["template"], arguments, strict=True))
            group_size = given.get("group_size", 0)
            M = given.get("M", given.get("BM", 3) + 5)
            N, K = 37, 3 * (group_size or 32)
            if kernel == "schedule_tiles":
                found.append(schedule(np.sort(rng.integers(0, 7, 50, dtype=np.int32)), 3, 7, 16))
            elif kernel == "sum_splits":
                found.append(sum_splits(rng, *arguments, 700, 5))
            elif kernel == "q8_rows":
                found.append(q8_rows(rng, *arguments, 3, 1060))
            elif kernel.startswith("q8"):
                found.append(q8(rng, kernel, arguments, given.get("M", 67), N, K))
            elif kernel in ("quantize", "dequantize"):
                fmt = Format(given["bits"], group_size)
                w = widened(stored(rng.normal(size=(11, group_size)), given["W"])).astype(np.float32)
                W, S = arguments[:2]
                found.append(
                    quantized(w, fmt, W, S) if kernel == "quantize" else dequantized(rng, fmt, W, S, 11)
                )
            elif kernel.startswith("gather"):
                found.append(gathered(rng, kernel, arguments, given.get("M", 11), N, K, 3, 5))
            else:
                span = {"qmm_split": 2 * group_size, "qmm_n_split": 32, "qvm_split": 16}.get(kernel, 0)
                found.append(product(rng, kernel, arguments, M, N, K, span))
    return found
