"""qmm.cu, qmm_stream.cu, experts.cu and q8mm.cu on a CPU: right in any order of threads and copies, no race.

The instructions of Hopper (hopper.cuh, copies.cuh) are replaced by tests/cuda/emulated*.h; the grid, the
shared memory and the macros are those that ops.cuda gives on an H100.
"""

import contextlib
import ctypes
import faulthandler
import functools
import itertools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mlxq.format import Format, pack
from mlxq.ops import cuda

HERE = Path(__file__).resolve().parent
H100 = {"arch": "sm_90a", "multiprocessors": 132, "early": True, "shared": 227 << 10}
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
# Each weight is rounded to x's type once and so is y: 2^-9 or 2^-12 of each, relative to the largest sums.
BOUND = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on an x86-64 machine")
    folder = tmp_path_factory.mktemp("emulated")

    @functools.cache
    def library(file: str, defines: tuple, replaced: tuple = ()):
        text = (cuda.HERE / file).read_text(encoding="utf-8").replace("hopper.cuh", "emulated.h")
        main = "emulated_main.h"
        if "warp.cuh" in text:
            text = text.replace("warp.cuh", "emulated_warp.h").replace('#include "copies.cuh"', "")
            main = "emulated_warp_main.h"
        text = text.replace(
            '#include "halves.cuh"', '#define BN 8\n#define LEFT_TRANSPOSED 0\n#include "emulated.h"'
        )
        text = text.replace("copies.cuh", "emulated_copies.h")
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        path = folder / f"{len(list(folder.iterdir()))}.cpp"
        path.write_text(f'{text}\n#include "{main}"\n')
        command = [
            compiler,
            "-std=c++20",
            "-O1",
            "-mf16c",
            "-mfma",
            "-w",
            "-fPIC",
            "-fno-gnu-unique",  # each library has its own threads
            "-shared",
            f"-I{HERE / 'cuda'}",
        ]
        command += [f"-D{name}={value}" for name, value in defines]
        subprocess.run([*command, "-o", path.with_suffix(".so"), path], check=True)
        return ctypes.CDLL(str(path.with_suffix(".so")))

    return library


def stored(values: np.ndarray, dtype: str):
    """(bits as stored, aligned as GPU arrays are, and their values in float64)."""
    if dtype == "float32":
        bits = values.astype(np.float32)
        exact = bits.astype(np.float64)
    elif dtype == "float16":
        bits = values.astype(np.float16)
        exact = bits.astype(np.float64)
    else:
        wide = values.astype(np.float32).view(np.uint32)
        bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)
        exact = floats(bits, dtype)
    return aligned(bits), exact


def floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values of what is stored as these bits."""
    if dtype == "bfloat16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(dtype).astype(np.float64)


def packed(rng, fmt: Format, shape: tuple[int, ...], s_type: str):
    """(words, scales, biases, their float64 weights) of random codes (..., N, K)."""
    codes, size = rng.integers(0, fmt.levels, shape, dtype=np.uint8, endpoint=True), fmt.group_size
    groups = (*shape[:-1], shape[-1] // size)
    scales, exact_scales = stored(rng.normal(0, 0.02, groups), s_type)
    biases, exact_biases = stored(rng.normal(0, 0.1, groups), s_type)
    w = np.repeat(exact_scales, size, -1) * codes + np.repeat(exact_biases, size, -1)
    return aligned(pack(codes, fmt.bits)), scales, biases, w


def aligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 16, np.uint8)
    start = -raw.ctypes.data % 16
    view = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def by_expert(x, lhs, rhs, experts: int, tile_rows: int):
    """What experts.cu makes of x (blocks, M, K): (sorted, tiles, rows)."""
    M, order = x.shape[1], np.argsort(rhs, kind="stable")
    rows = (order[:, None] * M + np.arange(M)).reshape(-1).astype(np.int32)
    found, first = [], 0
    for expert, pairs in enumerate(np.bincount(rhs, minlength=experts)):
        last = first + pairs * M
        found += [(expert, at, min(tile_rows, last - at), 0) for at in range(first, last, tile_rows)]
        first = last
    most = cuda.most_tiles(len(rows), tile_rows, min(experts, len(rhs)))
    table = np.zeros((most, 4), np.int32)
    table[: len(found)] = found
    table[:, 3] = len(found)
    return aligned(x[lhs[order]].reshape(len(rows), -1)), aligned(table), aligned(rows)


def run(
    build,
    bits,
    group_size,
    x_type,
    s_type,
    M,
    N,
    K,
    transpose,
    experts=0,
    late=False,
    seed=0,
    replaced=(),
    **more,
):
    """(y, the float64 answer, the shape that was used)."""
    batches, ranks = more.get("batches", 1), more.get("ranks")
    order_seed = more.get("order_seed", seed)
    rng, fmt = np.random.default_rng(seed), Format(bits, group_size)
    words, scales, biases, w = packed(rng, fmt, (max(1, experts), N, K), s_type)
    w = w.swapaxes(-1, -2) if transpose else w  # (experts, reduced, out)
    x, exact_x = stored(rng.normal(0, 1, (batches, M, w.shape[-2])), x_type)
    y = aligned(np.full((batches, M, w.shape[-1]), 0xFFFF, np.uint16))
    each = -(-M * batches // experts) if experts else M
    shape = cuda.qmm_shape(each, N, K, fmt, x_type, s_type, H100, transpose, experts)
    if ranks is not None:
        shape["ranks"] = ranks
    table = rows = y
    tiles, want = -(-M // shape["rows"]), exact_x @ w[0]
    if experts:
        rhs = rng.integers(0, experts, batches)
        lhs = rng.integers(0, batches, batches, dtype=np.int32)
        x, table, rows = by_expert(x, lhs, rhs, experts, shape["rows"])
        tiles, want = len(table), exact_x[lhs] @ w[rhs]
    library = build("qmm.cu", tuple(shape["defines"].items()), replaced)
    arrays = (x, words, scales, biases, y, table, rows, y)
    pointers = (ctypes.c_void_p * 8)(*(a.ctypes.data for a in arrays))
    numbers = (ctypes.c_int * 4)(M, N, K, 0)
    library.run(
        shape["ranks"], shape["out_tiles"], tiles, shape["shared"], int(late), order_seed, pointers, numbers
    )
    return floats(y, x_type), want, shape


def error(values, want) -> float:
    """Largest error over the largest answer; NaN anywhere (nothing was written there) makes it NaN."""
    return float(np.abs(values - want).max() / np.abs(want).max())


CASES = [
    (4, 64, "bfloat16", "bfloat16", 13, 200, 576, True, {}),
    (4, 64, "bfloat16", "bfloat16", 130, 132, 256, True, {}),
    (4, 32, "float16", "float32", 3, 129, 160, False, {}),
    (4, 128, "bfloat16", "float16", 20, 200, 384, False, {}),
    (2, 32, "float16", "float16", 16, 130, 288, True, {}),
    (2, 64, "float16", "float32", 70, 136, 320, True, {"ranks": 2}),
    (2, 128, "bfloat16", "bfloat16", 5, 131, 128, False, {"ranks": 2}),
    (8, 128, "bfloat16", "bfloat16", 9, 129, 384, True, {"ranks": 2}),
    (8, 32, "float16", "bfloat16", 33, 129, 416, False, {"ranks": 2}),
    (8, 64, "bfloat16", "float32", 1, 40, 1216, True, {"ranks": 4}),
    (4, 32, "bfloat16", "bfloat16", 3, 130, 160, True, {"experts": 5, "batches": 17}),
    (4, 64, "float16", "float16", 1, 100, 192, False, {"experts": 3, "batches": 40, "ranks": 2}),
]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:8])))
def test_products_equal_float64(build, case, late):
    bits, group_size, x_type, s_type, M, N, K, transpose, more = case
    values, want, _ = run(build, bits, group_size, x_type, s_type, M, N, K, transpose, late=late, **more)
    assert error(values, want) < BOUND[x_type]


def test_the_same_bits_come_in_any_order_of_the_threads(build):
    case = 4, 64, "bfloat16", "bfloat16", 13, 200, 576, True
    first, other = (run(build, *case, late=True, order_seed=seed)[0] for seed in (1, 2))
    assert np.array_equal(first, other)


DEFECTS = {
    "no barrier before a tile is overwritten": ("if (wait_for >= 0) group_sync(wait_for);", ""),
    "no wait for the products": ("wgmma_wait<1>(sums);", ""),
    "no wait for the copies": ("copy_wait<STAGES - 3>();", "copy_wait<STAGES - 2>();"),
    "no barrier before the products": ("      group_sync(group);\n", ""),
    "rows swizzled wrongly": ("(c ^ m % 8) * 16", "c * 16"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_shows(build, defect):
    errors = [
        error(
            *run(
                build,
                4,
                64,
                "bfloat16",
                "bfloat16",
                13,
                200,
                576,
                True,
                late=late,
                replaced=(DEFECTS[defect],),
            )[:2]
        )
        for late in (False, True)
    ]
    assert not all(e < BOUND["bfloat16"] for e in errors)


def tensor(a: np.ndarray, box: tuple[int, int], swizzle: int, grouped: bool = False) -> np.ndarray:
    """What tests/cuda/emulated_copies.h has to know of rows of whole elements; grouped: of experts."""
    rows, columns = a.shape[-2:]
    about = (a.ctypes.data, columns, rows, a.strides[-2], *box, a.itemsize, swizzle)
    planes = (len(a), a.strides[0]) if grouped else (0, 0)
    return np.array((*about, *planes, *[0] * 6), np.uint64)


def run_q8(
    build,
    bits,
    group_size,
    s_type,
    y_type,
    M,
    N,
    K,
    per_row,
    kind,
    tuning,
    ranks,
    late,
    replaced=(),
    **changed,
):
    """(y, the exact answer from integers and float64) of q8_stream.cu, or of q8mm.cu where tuning is None.

    changed: macros other than q8_stream_shape gives, order_seed and codes ("largest": sums as large as any).
    """
    order_seed, largest = changed.pop("order_seed", 0), changed.pop("largest", False)
    rng, fmt, zero = np.random.default_rng(0), Format(bits, group_size), 2 ** (bits - 1)
    codes = rng.integers(0, fmt.levels, (N, K), dtype=np.uint8, endpoint=True)
    x = rng.integers(-127, 127, (M, K), dtype=np.int8, endpoint=True)
    if largest:
        codes[...], x[...] = 0, 127
        codes[1::2], x[1::2] = fmt.levels, -127
    words, x = aligned(pack(codes, bits)), aligned(x)
    groups = N, K // group_size
    scales, exact_scales = stored(
        np.repeat(rng.normal(0, 1, (N, 1)), groups[1], 1) if per_row else rng.normal(0, 1, groups), s_type
    )
    biases, exact_biases = stored(-zero * exact_scales if per_row else rng.normal(0, 4, groups), s_type)
    x_scales = aligned(rng.uniform(0.001, 0.01, ((1, 1), (M, 1), (M, groups[1]))[kind]).astype(np.float32))
    w = np.repeat(exact_scales, group_size, 1) * codes + np.repeat(exact_biases, group_size, 1)
    want = (x * np.repeat(x_scales.astype(np.float64), K // x_scales.shape[1], 1)) @ w.T
    y = aligned(np.full((M, N), -1, np.int32 if y_type == "float32" else np.int16))
    about = M, N, K, fmt, s_type, y_type, kind, per_row, H100
    if tuning is None:
        shape = cuda.q8mm_shape(*about)
        library = build("q8mm.cu", tuple(shape["defines"].items()), replaced)
        arrays = (x, x_scales, words, scales, biases, y, y, y)
        grid = ranks or shape["ranks"], shape["out_tiles"], -(-M // shape["rows"])
    else:
        shape = cuda.q8_stream_shape(*about, tuning, **changed)
        assert -(-shape["units"] // ranks) * (ranks - 1) < shape["units"], "a rank without a share"
        library = build("q8_stream.cu", (*shape["defines"].items(), ("THREADS", 384)), replaced)
        maps = [
            tensor(x.view(np.uint8), (128, shape["rows"]), 128),
            tensor(words.view(np.uint8), (128, 128), 128),
        ]
        maps += [tensor(a.view(np.uint8), (16, 128), 0) for a in (scales, biases)]
        arrays = (*maps, x_scales, scales, y, y)
        grid = ranks, -(-M // shape["rows"]), shape["out_tiles"]
    pointers = (ctypes.c_void_p * 8)(*(a.ctypes.data for a in arrays))
    library.run(*grid, shape["shared"], int(late), order_seed, pointers, (ctypes.c_int * 4)(M, N, K, 0))
    return floats(y, y_type), want


# Sums of integers are exact; left are the float32 sums over groups, the scales' product and y's rounding.
Q8_BOUND = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(
    "case",
    [
        (8, 64, "bfloat16", "bfloat16", 130, 100, 320, False, 1, 1),
        (8, 128, "float16", "float16", 5, 129, 384, False, 0, 1),
        (4, 32, "float16", "float32", 20, 130, 416, False, 1, 2),
        (2, 32, "bfloat16", "float32", 9, 130, 160, False, 1, 1),
        (4, 64, "bfloat16", "float32", 20, 130, 448, False, 2, 2),
        (2, 32, "float32", "float32", 5, 66, 416, True, 1, 1),
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_products_of_int8_are_exact(build, case, late):
    *about, ranks = case
    values, want = run_q8(build, *about, None, ranks, late)
    assert error(values, want) < Q8_BOUND[about[3]]


Q8_STREAMED = [  # bits, group size, scales, y, M, N, K, per row, x_scales, (rows, blocks), ranks, macros
    (8, 64, "float32", "float32", 13, 200, 576, True, 1, (16, 2), 3, {}),
    (8, 64, "bfloat16", "bfloat16", 40, 129, 1216, True, 0, (32, 2), 2, {"BUFFERS": 2}),
    (8, 128, "float16", "float16", 70, 132, 384, True, 1, (128, 1), 1, {}),
    (4, 64, "bfloat16", "bfloat16", 300, 70, 192, True, 1, (256, 1), 1, {}),
    (4, 32, "float32", "float32", 33, 130, 1312, True, 0, (64, 2), 3, {}),
    (2, 64, "bfloat16", "float32", 20, 130, 1856, True, 1, (32, 2), 2, {"BUFFERS": 2}),
    (8, 64, "bfloat16", "bfloat16", 130, 100, 1024, False, 1, (128, 1), 1, {}),
    (8, 64, "bfloat16", "float32", 20, 100, 1536, False, 0, (32, 2), 4, {}),
    (8, 128, "float16", "float32", 70, 129, 1024, False, 1, (64, 2), 1, {"BUFFERS": 2}),
    (8, 128, "float32", "bfloat16", 17, 129, 1536, False, 2, (64, 1), 3, {}),
    (8, 32, "bfloat16", "float32", 17, 129, 768, False, 1, (64, 1), 3, {}),
    (4, 64, "bfloat16", "float32", 40, 200, 1536, False, 1, (64, 1), 3, {}),
    (4, 64, "bfloat16", "float32", 130, 100, 1024, False, 2, (128, 1), 1, {}),
    (4, 32, "float16", "float32", 20, 130, 1280, False, 1, (32, 2), 5, {}),
    (4, 128, "bfloat16", "float32", 20, 130, 3072, False, 1, (16, 3), 6, {}),
    (2, 32, "bfloat16", "float32", 9, 130, 768, False, 2, (16, 2), 2, {"BUFFERS": 2}),
    (2, 64, "float32", "float16", 33, 129, 1280, False, 1, (64, 2), 2, {}),
    (2, 128, "float32", "float32", 33, 129, 1024, False, 0, (32, 2), 2, {"BUFFERS": 1}),
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("case", Q8_STREAMED, ids=lambda c: "-".join(map(str, c[:11])))
def test_streamed_products_of_int8_are_exact(build, case, late):
    *about, changed = case
    values, want = run_q8(build, *about, late, **changed)
    assert error(values, want) < Q8_BOUND[about[3]]


@pytest.mark.parametrize(
    "bits, group_size, per_row", [(8, 128, False), (4, 128, False), (2, 64, True), (8, 64, True)]
)
def test_the_largest_sums_of_int8_are_exact(build, bits, group_size, per_row):
    K = 131072 - 128 if per_row else 1024
    about = bits, group_size, "float32", "float32", 3, 4, K, per_row, 1, (16, 2), 1
    assert error(*run_q8(build, *about, True, largest=True)) < 1e-6


@pytest.mark.parametrize("case", (Q8_STREAMED[0], Q8_STREAMED[11]), ids=("a scale a row", "groups"))
def test_the_same_bits_come_from_int8_streams_in_any_order_of_the_threads(build, case):
    *about, changed = case
    first, other = (run_q8(build, *about, True, order_seed=seed, **changed)[0] for seed in (1, 2))
    assert np.array_equal(first, other)


def run_stream(
    build,
    bits,
    group_size,
    x_type,
    s_type,
    M,
    N,
    K,
    transpose,
    tuning,
    ranks,
    late,
    replaced=(),
    order_seed=0,
    **changed,
):
    """(y, the float64 answer) of qmm_stream.cu; changed: macros other than qmm_stream_shape gives.

    M: rows, or (blocks of x, rows of a block, experts of the pairs, how many experts there are)
    """
    rng, fmt, grouped = np.random.default_rng(0), Format(bits, group_size), not isinstance(M, int)
    x_blocks, M, rhs, experts = M if grouped else (1, M, [0], 1)
    words, scales, biases, w = packed(rng, fmt, (experts, N, K), s_type)
    w = w.swapaxes(1, 2) if transpose else w  # (experts, reduced, out)
    x, exact_x = stored(rng.normal(0, 1, (x_blocks, M, w.shape[1])), x_type)
    lhs, rhs = rng.integers(0, x_blocks, len(rhs)), np.array(rhs)
    parts = changed.get("PARTS", 1)
    y = sums = aligned(np.full((len(rhs), M, w.shape[2]), 0xFFFF, np.uint16))
    if parts > 1:
        sums = aligned(np.full((parts, M, w.shape[2]), np.nan, np.float32))
    about = N, K, fmt, x_type, s_type, H100, transpose, tuning
    shape = cuda.qmm_stream_shape(M, *about, grouped=grouped, **changed)
    shares = ranks * parts
    assert -(-shape["units"] // shares) * (shares - 1) < shape["units"], "a rank without a share"
    want, table, rows, tiles = exact_x[lhs] @ w[rhs], y, y, -(-M // shape["rows"])
    if grouped:
        x, table, rows = by_expert(x, lhs, rhs, experts, shape["rows"])
        tiles = len(table)
    else:
        x = x[0]
    library = build("qmm_stream.cu", (*shape["defines"].items(), ("THREADS", shape["threads"])), replaced)
    box = 128 if transpose else 16 * bits
    maps = [tensor(x, (64, shape["rows"]), 128), tensor(words.view(np.uint8), (box, 128), box, grouped)]
    maps += [tensor(a.view(np.uint8), (16, 128), 0, grouped) for a in (scales, biases)]
    pointers = (ctypes.c_void_p * 8)(*(a.ctypes.data for a in (*maps, sums, table, rows, y)))
    grid, numbers = (ranks, shape["out_tiles"], tiles * parts), (ctypes.c_int * 4)(M, N, K, y.size // 4)
    library.run(*grid, shape["shared"], int(late), order_seed, pointers, numbers)
    return floats(y, x_type), want


SINGLE, BOTH_HALVES = {"BUFFERS": 1}, {"BUFFERS": 2, "TURNED": 1, "HALVES": 2}
STREAMED = [  # bits, group size, x, scales, M, N, K, transpose, (rows, blocks), ranks, macros
    (2, 64, "bfloat16", "bfloat16", 13, 200, 1536, True, (16, 3), 3, {}),
    (2, 64, "bfloat16", "bfloat16", 40, 131, 1024, True, (32, 2), 2, {"TURNED": 0}),
    (2, 128, "float16", "float16", 20, 130, 2048, True, (16, 2), 1, {"BUFFERS": 1}),
    (2, 32, "bfloat16", "float32", 5, 128, 1280, True, (16, 2), 2, {"MOST_UNROLLED": 2}),
    (4, 64, "bfloat16", "bfloat16", 70, 200, 1536, True, (64, 2), 3, {}),
    (4, 32, "bfloat16", "bfloat16", 33, 129, 2304, True, (64, 2), 5, {"BUFFERS": 1}),
    (4, 128, "float16", "bfloat16", 9, 140, 1024, True, (16, 3), 4, {}),
    (4, 64, "float16", "float16", 130, 100, 512, True, (128, 1), 1, {"TURNED": 0}),
    (4, 64, "bfloat16", "bfloat16", 130, 300, 1024, True, (128, 1), 2, {"TURNED": 1, "HALVES": 2, **SINGLE}),
    (8, 128, "float16", "float16", 50, 270, 1024, True, (64, 1), 1, {"HALVES": 2, **SINGLE}),
    (8, 64, "bfloat16", "bfloat16", 60, 130, 1536, True, (64, 2), 6, {}),
    (8, 32, "float16", "float32", 16, 129, 640, True, (16, 3), 3, {}),
    (2, 64, "bfloat16", "bfloat16", 30, 328, 1024, False, (32, 2), 3, {}),
    (4, 32, "float16", "bfloat16", 16, 200, 512, False, (16, 2), 1, {"BUFFERS": 1}),
    (8, 128, "bfloat16", "bfloat16", 17, 136, 1024, False, (64, 2), 1, {}),
    (2, 64, "bfloat16", "bfloat16", 30, 328, 1024, False, (32, 2), 3, {}),
    (2, 32, "float16", "float16", 9, 200, 512, False, (16, 2), 2, {"TURNED": 1}),
    (2, 128, "float16", "float32", 20, 456, 1024, False, (32, 2), 2, {"TURNED": 1, "BUFFERS": 2}),
    (4, 32, "bfloat16", "bfloat16", 130, 200, 768, False, (128, 1), 2, {"TURNED": 1, "BUFFERS": 2}),
    (4, 64, "float16", "bfloat16", 16, 328, 1024, False, (16, 2), 3, {"TURNED": 1}),
    (4, 64, "bfloat16", "bfloat16", 40, 1160, 512, False, (32, 1), 4, BOTH_HALVES),
    (4, 32, "bfloat16", "float32", 33, 200, 384, False, (64, 2), 1, {"TURNED": 1}),
    (8, 32, "bfloat16", "float16", 40, 136, 512, False, (64, 2), 1, {"TURNED": 1, "BUFFERS": 2}),
    (8, 64, "float16", "float16", 5, 264, 1024, False, (16, 2), 2, {"TURNED": 1}),
    (2, 32, "bfloat16", "bfloat16", 130, 328, 512, False, (128, 1), 2, {"TURNED": 1, "HALVES": 2}),
    (4, 64, "bfloat16", "bfloat16", 40, 200, 512, False, (64, 1), 1, {"TURNED": 1, "HALVES": 2}),
    (8, 32, "bfloat16", "float32", 20, 264, 384, False, (32, 1), 1, {"TURNED": 1, "HALVES": 2}),
    (8, 128, "bfloat16", "bfloat16", 260, 200, 1024, False, (256, 1), 1, {"TURNED": 1}),
    (4, 64, "bfloat16", "bfloat16", 140, 1000, 512, False, (128, 1), 2, {"PARTS": 2}),
    (2, 64, "bfloat16", "float16", 20, 132, 3072, True, (32, 2), 1, {"PARTS": 3}),
    (8, 64, "float16", "float16", 260, 200, 1536, True, (256, 1), 2, {"PARTS": 2}),
    (8, 32, "float16", "float32", 10, 2056, 256, False, (16, 2), 3, {"PARTS": 3}),
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("case", STREAMED, ids=lambda c: "-".join(map(str, c[:10])))
def test_streamed_products_equal_float64(build, case, late):
    *about, changed = case
    assert error(*run_stream(build, *about, late, **changed)) < BOUND[about[2]]


@pytest.mark.parametrize("case", (STREAMED[0], STREAMED[-1]), ids=("a cluster", "parts"))
def test_the_same_bits_come_from_streams_in_any_order_of_the_threads(build, case):
    *about, changed = case
    first, other = (run_stream(build, *about, True, order_seed=seed, **changed)[0] for seed in (1, 2))
    assert np.array_equal(first, other)


ROUTED = 12, 1, [3, 0, 3, 3, 1, 3, 0, 3, 5, 3, 0, 3] * 3, 6  # experts 2 and 4 have no rows
GROUPED = [  # as STREAMED; M: blocks of x, rows of each, experts of the pairs, experts
    (2, 64, "bfloat16", "bfloat16", ROUTED, 200, 512, True, (16, 2), 1, {}),
    (2, 64, "bfloat16", "bfloat16", (3, 7, [2, 0, 2, 2], 3), 131, 1024, True, (32, 2), 2, {"TURNED": 0}),
    (4, 64, "bfloat16", "bfloat16", ROUTED, 136, 1536, True, (16, 2), 3, {}),
    (4, 128, "float16", "bfloat16", (5, 33, [1, 1, 0], 2), 140, 1024, True, (80, 2), 1, {}),
    (4, 32, "bfloat16", "bfloat16", (170, 1, [0] * 170, 1), 129, 256, True, (160, 1), 1, {}),
    (8, 64, "bfloat16", "bfloat16", (2, 100, [4, 4], 7), 130, 512, True, (96, 2), 2, {}),
    (8, 32, "float16", "float32", (200, 1, [1] * 200, 3), 129, 128, True, (192, 1), 1, {}),
    (2, 64, "bfloat16", "bfloat16", ROUTED, 328, 1024, False, (16, 2), 2, {}),
    (4, 32, "float16", "bfloat16", (40, 1, [1] * 40, 2), 200, 512, False, (32, 2), 1, {}),
    (8, 128, "bfloat16", "bfloat16", (9, 10, [0, 2, 1, 2, 2, 2], 3), 136, 1024, False, (64, 2), 1, {}),
]  # fmt: skip


def named(case) -> str:
    M = case[4]
    rows = M if isinstance(M, int) else f"{len(M[2])}x{M[1]}of{M[3]}"
    return "-".join(map(str, (*case[:4], rows, *case[5:10])))


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("case", GROUPED, ids=named)
def test_streamed_products_of_experts_equal_float64(build, case, late):
    *about, changed = case
    assert error(*run_stream(build, *about, late, **changed)) < BOUND[about[2]]


def run_sort(build, pairs, x_blocks, M, K, experts, tile_rows, rhs=None, lhs=None, blocks=0, seed=0, **more):
    """(sorted, tiles, rows) of experts.cu, and what they should be."""
    rng = np.random.default_rng(seed)
    rhs = rng.integers(0, experts, pairs) if rhs is None else np.array(rhs)
    lhs = rng.integers(0, x_blocks, pairs) if lhs is None else np.array(lhs)
    x = aligned(rng.integers(0, 1 << 16, (x_blocks, M, K)).astype(np.uint16))
    inside = [np.where((a < 0) | (a >= n), n - 1, a) for a, n in ((lhs, x_blocks), (rhs, experts))]
    want = by_expert(x, *inside, experts, tile_rows)
    found = [aligned(np.full_like(a, 77)) for a in want]
    shape = cuda.sort_shape(pairs, M, experts, K, H100, blocks)
    defines = (*shape["defines"].items(), ("THREADS", 1024))
    library = build("experts.cu", defines, more.get("replaced", ()))
    given = [aligned(a.astype(np.int32)) for a in (lhs, rhs)]
    pointers = (ctypes.c_void_p * 8)(*(a.ctypes.data for a in (x, *given, *found, x, x)))
    numbers = pairs, M, x_blocks, experts, tile_rows, len(want[1]), shape["pieces"]
    grid = 1, shape["blocks"], 1
    library.run(*grid, shape["shared"], 0, seed, pointers, (ctypes.c_int * 7)(*numbers))
    return found, want


SORTED = [  # pairs, blocks of x, rows of each, K, experts, rows of a tile
    (1, 1, 1, 64, 1, 16),
    (16, 8, 1, 4096, 8, 16),
    (33, 5, 3, 72, 7, 32),
    (1024, 512, 1, 64, 8, 160),
    (1500, 40, 1, 16, 1024, 16),
    (5, 2, 40, 24, 1000, 64),
    (2100, 9, 1, 34, 300, 96),  # rows of no whole 16 bytes
    (9, 3, 5, 20, 3, 8),
]


@pytest.mark.parametrize("case", SORTED, ids=lambda c: "-".join(map(str, c)))
def test_pairs_are_sorted_by_expert_and_rows_lie_in_that_order(build, case):
    for seed in (0, 1):
        found, want = run_sort(build, *case, seed=seed)
        assert all(map(np.array_equal, found, want))


@pytest.mark.parametrize(
    "rhs", [[3] * 700, [0, 7] * 350, [*range(7, -1, -1)] * 88, [-1, 8, 1 << 30, -(1 << 31), 0] * 140]
)
def test_pairs_of_any_experts_are_sorted_and_an_index_out_of_range_is_the_last(build, rhs):
    lhs = [-1, 5, 3, 0, 1 << 30] * (len(rhs) // 5) + [2] * (len(rhs) % 5)
    found, want = run_sort(build, len(rhs), 4, 1, 16, 8, 32, rhs=rhs, lhs=lhs, blocks=3)
    assert all(map(np.array_equal, found, want))


def survives(right) -> bool:
    """Whether right() is true, in a child: a defect may write anywhere, or end the process."""
    child = os.fork()
    if not child:
        code = NOT_PLANTED
        faulthandler.disable()  # dying is what many of them are for: no pages about it in the log
        with contextlib.suppress(BaseException):
            code = int(not right())
        os._exit(code)
    ended = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(ended) or os.WEXITSTATUS(ended) != NOT_PLANTED
    return ended == 0


NOT_PLANTED = 2  # exit status of a child whose text has nothing to replace, or does not compile
SORT_DEFECTS = {
    "added up before all are counted": (
        "    __syncwarp();\n  }\n  __syncthreads();",
        "    __syncwarp();\n  }",
    ),
    "places in the order of lanes' luck": ("__popc(same & ((1u << lane) - 1))", "__popc(same) - 1"),
    "copied before all places are known": ("__syncthreads();\n\n  for (int row = own", "for (int row = own"),
    "a block of x out of range": (
        "min(u32(lhs[pair]), u32(blocks_of_x - 1))",
        "u32(lhs[pair]) % blocks_of_x",
    ),
    "tiles that are too many keep their rows": ("i < most_tiles; i += 1024", "i < 0; i += 1024"),
}


@pytest.mark.parametrize("defect", SORT_DEFECTS)
def test_a_defect_planted_in_the_sort_shows(build, defect):
    def right(seed: int) -> bool:
        lhs = np.random.default_rng(seed).integers(-1, 9, 300)
        more = {"replaced": (SORT_DEFECTS[defect],), "lhs": lhs, "blocks": 2}
        found, want = run_sort(build, 300, 8, 2, 16, 40, 16, seed=seed, **more)
        return all(map(np.array_equal, found, want))

    assert not all(survives(lambda s=seed: right(s)) for seed in range(3))


STREAM_DEFECTS = {
    "x read before it is turned": ("X_TURNED ? s_empty + 8 * S_STAGES : x_full", "x_full"),
    "words given back before they are read": ("if (in_w == W_STEPS - 1) {", "if (in_w == 0) {"),
    "scales given back before they are read": ("if (in_s == S_STEPS - 1) {", "if (in_s == 0) {"),
    "no wait for the scales of a share that begins among them": (
        "in_s == 0 || (W_STEPS % S_STEPS && step == begin)",
        "in_s == 0",
    ),
    "no wait for the product before the last": ("wgmma_wait<1>(sums);", ""),
    "sums written over what others read": ("    workers_sync<WORKERS>();  // all have", "    // all have"),
    "sums read before all are there": ("    if (ranks > 1)\n      cluster_sync();\n    else\n", ""),
}

TURNED_DEFECTS = {  # of transpose=False
    "scales read before they are packed": ("W_TURNED ? s_empty + 8 * S_STAGES : s_full", "s_full"),
    "scales packed before they are there": ("        barrier_wait(s_full + 8 * slot, parity);\n", ""),
    "the codes of another warp": ("pairs[i] >> behind", "pairs[i]"),
    "the words of the other half": ("half * W_HALF + (flat", "(flat"),
    "the sums of the other half": ("(sums_at + place(m) + o) * 4", "(place(m) + o) * 4"),
    "rows of x in each other's place": ("m % 2 * 4 + m % 8 / 2", "m % 2 * 4 + m % 8 / 4"),
}

LATE_DEFECTS = {  # of transpose=False, where a stage is given back behind the product: one set of registers
    "words given back before they are multiplied": ("if (in_w == W_STEPS - 1) {", "if (in_w == 0) {"),
    "scales given back before they are multiplied": ("if (in_s == S_STEPS - 1) {", "if (in_s == 0) {"),
    "never given back": ("if (LATE) give_back(0, in_w, scale_step(step, in_w));", ""),
}

PARTS_DEFECTS = {
    "every part has the same columns": ("(part * ranks + rank) * share", "rank * share"),
    "all parts in one place": ("size_t(part * M + m0 + m) * outs", "size_t(m0 + m) * outs"),
    "rows of another tile": ("blockIdx.z / PARTS * BN", "blockIdx.z / 2 % PARTS * BN / 2"),
    "added up before they are there": (
        "  dependents_may_start();\n  predecessor_done();\n  const int i",
        "  const int i",
    ),
    "a part left out": ("p < PARTS", "p < PARTS - 1"),
    "the last of y left out": ("if (i >= fours)", "if (i + 1 >= fours)"),
}

GROUPED_DEFECTS = {
    "rows of the next expert": ("m0 + m < end_of_rows", "m0 + m < 1 << 20"),
    "rows in another's place": ("GROUPED ? rows[m0 + m]", "GROUPED ? m0 + m"),
    "the first expert's weights": ("row, expert, done)", "row, 0, done)"),
}


Q8_DEFECTS = {  # text, and the form that shows it
    "words given back before they are read": (
        "if (in_w == W_STEPS - 1 && span == SPANS - 1) {",
        "if (in_w == 0 && span == 0) {",
        {},
    ),
    "scales given back before they are read": (
        "if (in_s == S_STEPS - 1 && span == SPANS - 1) {",
        "if (in_s == 0 && span == 0) {",
        {},
    ),
    "no wait for the scales of a share that begins among them": (
        "(in_s == 0 || step == begin)) barrier_wait(s_full",
        "in_s == 0) barrier_wait(s_full",
        {},
    ),
    "sums of x by one warp of two": (
        "barrier_init(x_added + 8 * i, 2 * ARRIVALS)",
        "barrier_init(x_added + 8 * i, 1)",
        {},
    ),
    "x given back before its sums are drained": (
        "if (span == SPANS - 1) given_back(x_slot);",
        "if (span == 0) given_back(x_slot);",
        {},
    ),
    "no wait for the products": ("wgmma_wait<0>(sums);\n            multiplied", "multiplied", {}),
    "sums of groups that go on": ("else wgmma_s8<0>(sums,", "else wgmma_s8<1>(sums,", {}),
    "sums written over what others read": (
        "    workers_sync<8>();  // all have",
        "    // all have",
        {"per_row": True},
    ),
    "sums read before all are there": ("    if (ranks > 1)\n      cluster_sync();\n    else\n", "", {}),
    "half of a word's codes": ("t % 2 ? 0x7362 : 0x5140", "0x5140", {}),
    "sums of x where another thread's are": ("m / 16 * 16 + m / 2 % 4 * 4 + m / 8 % 2 * 2 + m % 2", "m", {}),
}


KINDS_OF_DEFECTS = STREAM_DEFECTS, TURNED_DEFECTS, LATE_DEFECTS, PARTS_DEFECTS, GROUPED_DEFECTS


@pytest.mark.parametrize("defect", list(itertools.chain(*KINDS_OF_DEFECTS)))
def test_a_planted_defect_shows_in_a_stream(build, defect):
    about = 4, 64, "bfloat16", "bfloat16", 40, 200, 4608, True, (32, 2), 4  # the last rank has less to do
    planted = next(kind[defect] for kind in KINDS_OF_DEFECTS if defect in kind)
    changed = {"BUFFERS": 2}
    if defect in TURNED_DEFECTS or defect in LATE_DEFECTS:
        about = *about[:5], 1160, 512, False, (32, 1), 4
        changed = BOTH_HALVES if defect in TURNED_DEFECTS else SINGLE
    if defect in PARTS_DEFECTS:
        about, changed = (*about[:4], 40, 204, 4608, True, (16, 2), 2), {"PARTS": 3}
    if defect in GROUPED_DEFECTS:
        *about, changed = GROUPED[0]

    def right(late: bool) -> bool:
        return error(*run_stream(build, *about, late, (planted,), **changed)) < BOUND["bfloat16"]

    assert not all(survives(lambda n=late: right(n)) for late in (False, True))


@pytest.mark.parametrize("defect", [None, *Q8_DEFECTS])
def test_a_planted_defect_shows_in_a_stream_of_int8(build, defect):
    *planted, form = Q8_DEFECTS[defect] if defect else ({},)
    group_size, per_row = form.get("group_size", 64), form.get("per_row", False)
    # the last rank has less to do; its share begins among scales
    about = 4, group_size, "bfloat16", "float32", 40, 200, 5120, per_row, 1, (32, 2), 3

    def attempt(late):
        replaced = (tuple(planted),) if planted else ()
        orders = range(3) if late else (0,)
        return all(
            error(*run_q8(build, *about, late, replaced, BUFFERS=2, order_seed=n)) < 1e-6 for n in orders
        )

    assert all(survives(lambda n=late: attempt(n)) for late in (False, True)) == (defect is None)
