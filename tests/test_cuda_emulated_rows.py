"""The text of qmv_stream.cu on a CPU: right in any order of warps and copies, no race.

The instructions of warp.cuh and copies.cuh are replaced by tests/cuda/emulated_warp*.h; the grid, the shared
memory and the macros are those that ops.cuda gives.
"""

# ruff: noqa: F401, F811  the fixture build is an argument
import ctypes
import itertools
import math

import numpy as np
import pytest
from test_cuda_emulated import H100, aligned, build, by_expert, error, floats, packed, stored

from mlxq.format import Format
from mlxq.ops import cuda


def run_stream(
    build, tuning, bits, group_size, x_type, s_type, M, N, K, order=0, seed=0, factor=1.0, changed=(), **more
):
    """(y, the float64 answer); changed: of the macros; more: replaced, of the text.

    M: rows, or (blocks of x, rows of a block, experts of the pairs, how many experts there are).
    Raises RuntimeError saying what the emulation met: a deadlock, an address outside of shared memory, ..
    """
    rng, fmt, grouped = np.random.default_rng(seed), Format(bits, group_size), not isinstance(M, int)
    x_blocks, M, rhs, experts = M if grouped else (1, M, [0], 1)
    words, scales, biases, w = packed(rng, fmt, (experts, N, K), s_type)
    x, exact_x = stored(rng.normal(0, 1, (x_blocks, M, K)) * factor, x_type)
    lhs, rhs = rng.integers(0, x_blocks, len(rhs)), np.array(rhs)
    y = aligned(np.full((len(rhs), M, N), 0xFFFF, np.uint16))
    want, table, rows = exact_x[lhs] @ w[rhs].swapaxes(1, 2), y, y
    if grouped:
        x, table, rows = by_expert(x, lhs, rhs, experts, 8)
    with pytest.MonkeyPatch.context() as patch:
        warps, segment, most, *rest = tuning
        patch.setattr(cuda, "stream_tunings", lambda *a: [(warps, segment, *rest)])
        patch.setattr(cuda, "STREAM_STAGES", most)
        groups = len(table) if grouped else 0
        shape = cuda.stream_shape(min(M, 8), N, K, fmt, x_type, s_type, more.get("gpu", SMALL_H100), groups)
    defines = shape["defines"] | dict(changed)
    tensors = [
        [len(sizes), *(*sizes, 0)[:3], *(*strides, 0)[:2], *(*box, 0)[:3], swizzle]
        for sizes, strides, box, swizzle in cuda.stream_tensors(N * experts, K, fmt, s_type, defines)
    ]
    library = build("qmv_stream.cu", tuple(defines.items()), more.get("replaced", ()))
    arrays = x, words, scales, biases, y, table, rows
    pointers = (ctypes.c_void_p * 7)(*(a.ctypes.data for a in arrays))
    described = (ctypes.c_int * 30)(*sum(tensors, []))
    sizes = (ctypes.c_int * 3)(M, N, K)
    library.run.restype = ctypes.c_char_p
    failed = library.run(shape["grid_x"], shape["shared"], order, seed, pointers, described, sizes)
    if failed:
        raise RuntimeError(failed.decode())
    return floats(y, x_type), want


SMALL_H100 = H100 | {"multiprocessors": 1}  # every block has many tiles
ROUNDED_ONCE = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # only y is rounded: half an ulp of the largest
# (warps, segment, stages at most, KiB ahead, blocks that fit, blocks started, units together, rows, ranks),
# product
STREAM_CASES = [
    ((8, 128, 4, 32, 2, 2, 2, 16, 1), 2, 64, "bfloat16", "bfloat16", 8, 150, 4096),
    ((8, 128, 3, 192, 2, 1, 4, 16, 1), 2, 64, "bfloat16", "bfloat16", 3, 100, 2560),
    ((8, 64, 3, 1, 2, 2, 2, 16, 1), 2, 64, "bfloat16", "bfloat16", 5, 70, 4096),
    ((16, 64, 4, 32, 1, 1, 2, 16, 1), 2, 64, "bfloat16", "bfloat16", 1, 41, 4096),
    ((8, 128, 4, 192, 2, 2, 2, 16, 1), 2, 128, "bfloat16", "float16", 8, 70, 3072),
    ((8, 64, 4, 1, 2, 1, 2, 16, 1), 4, 32, "bfloat16", "bfloat16", 7, 90, 2048),
    ((8, 128, 5, 32, 2, 2, 2, 16, 1), 4, 64, "bfloat16", "bfloat16", 8, 70, 4096),
    ((16, 64, 6, 192, 1, 1, 2, 16, 1), 4, 128, "float16", "float16", 4, 33, 2048),
    ((8, 128, 5, 1, 2, 2, 2, 16, 1), 8, 64, "bfloat16", "bfloat16", 8, 70, 2048),
    ((8, 128, 2, 32, 2, 2, 2, 16, 1), 8, 64, "bfloat16", "bfloat16", 8, 70, 4096),
    ((8, 64, 3, 192, 2, 1, 2, 16, 1), 4, 64, "bfloat16", "bfloat16", 4, 50, 4096),
    ((8, 64, 6, 1, 2, 1, 2, 16, 1), 8, 128, "bfloat16", "bfloat16", 6, 50, 3072),
    ((16, 64, 6, 32, 1, 1, 2, 16, 1), 8, 32, "float16", "float32", 2, 40, 1280),
    ((8, 64, 4, 192, 2, 2, 4, 16, 2), 2, 64, "bfloat16", "bfloat16", 8, 150, 4096),
    ((8, 128, 3, 1, 2, 4, 2, 16, 4), 2, 64, "bfloat16", "bfloat16", 5, 200, 14336),
    ((7, 128, 4, 28, 2, 4, 2, 16, 4), 2, 64, "bfloat16", "bfloat16", 8, 100, 14336),
    ((7, 128, 5, 192, 2, 4, 2, 16, 4), 4, 64, "bfloat16", "bfloat16", 8, 70, 14336),
    ((12, 128, 4, 1, 1, 1, 2, 16, 3), 2, 64, "bfloat16", "bfloat16", 8, 70, 18432),
    ((8, 64, 3, 32, 2, 1, 2, 32, 1), 2, 64, "bfloat16", "bfloat16", 8, 150, 4096),
    ((8, 128, 2, 192, 2, 1, 2, 32, 2), 2, 64, "bfloat16", "bfloat16", 7, 150, 8192),
    ((8, 64, 3, 1, 2, 1, 2, 32, 2), 4, 64, "bfloat16", "bfloat16", 8, 100, 8192),
    ((8, 128, 3, 64, 2, 1, 2, 32, 1), 4, 32, "bfloat16", "float16", 8, 90, 4096),
    ((8, 128, 2, 192, 1, 1, 1, 32, 2), 8, 64, "bfloat16", "bfloat16", 8, 70, 4096),
    ((8, 64, 3, 1, 2, 1, 2, 32, 1), 8, 128, "float16", "float32", 5, 70, 2048),
    ((8, 64, 4, 32, 1, 1, 2, 64, 2), 2, 64, "bfloat16", "bfloat16", 8, 150, 8192),
    ((4, 128, 3, 16, 2, 2, 2, 16, 2), 4, 32, "float16", "float16", 3, 100, 3072),
    ((8, 128, 3, 192, 2, 2, 2, 16, 2), 8, 64, "bfloat16", "float32", 8, 70, 3072),
]


@pytest.mark.parametrize("order", [0, 1, 2], ids=["at once", "late", "some time"])
@pytest.mark.parametrize("case", STREAM_CASES, ids=lambda c: "-".join(map(str, (*c[0], *c[1:]))))
def test_streamed_products_equal_float64(build, case, order):
    values, want = run_stream(build, *case, order=order, seed=order)
    assert error(values, want) < ROUNDED_ONCE[case[3]]


@pytest.mark.parametrize("factor", [2.0**-75, 2.0**33, 2.0**38, 2.0**100])
def test_streamed_products_equal_float64_however_large_x(build, factor):
    values, want = run_stream(build, *STREAM_CASES[0], factor=factor)
    assert error(values, want) < ROUNDED_ONCE["bfloat16"]


@pytest.mark.parametrize("case", [0, 8, 18, 19])
def test_a_row_of_huge_values_takes_no_digits_from_a_row_of_tiny_ones(build, case):
    tuning, bits, group_size, x_type, s_type, M, N, K = STREAM_CASES[case]
    sizes = 2.0 ** np.array([100, -20, 0, 38, -60, 3, -9, 36])[:M, None]
    values, want = run_stream(build, tuning, bits, group_size, x_type, s_type, M, N, K, factor=sizes)
    for m in range(M):
        assert error(values[:, m], want[:, m]) < ROUNDED_ONCE["bfloat16"], m


def test_streamed_products_have_the_same_bits_in_any_order(build):
    first, *others = (run_stream(build, *STREAM_CASES[1], order=o, seed=7)[0] for o in (0, 1, 2, 2))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_no_wait_is_for_more_than_a_copy_brings(bits):
    """For every K: K = 3584 at 2 and 4 bits once had 7 warps of half a column, and never ended."""
    seen = set()
    for group_size in (32, 64, 128):
        fmt = Format(bits, group_size)
        for K, N, groups in itertools.product(range(group_size, 32769, group_size), (512, 14336), (0, 8)):
            shape = cuda.stream_shape(8, N, K, fmt, "bfloat16", "bfloat16", H100, groups)
            if shape is None:
                continue
            defines = shape["defines"]
            (*_, box, _), *_ = cuda.stream_tensors(N, K, fmt, "bfloat16", defines)
            assert math.prod(box) == defines["ROWS"] * defines["WARPS"] * defines["SEGMENT"], (K, defines)
            assert defines["AHEAD"] <= defines["DEPTH"]
            seen.add(K)
    assert {3584, 4096, 14336} <= seen


ROUTED = (
    12,
    1,
    [3, 0, 3, 3, 1, 3, 0, 3, 5, 3, 0, 3] * 2,
    6,
)  # experts 2 and 4 have no rows, 3 two groups of eight
GROUPED_CASES = [  # M: blocks of x, rows of each, experts of the pairs, experts
    ((8, 64, 3, 1, 2, 2, 2, 16, 1), 2, 64, "bfloat16", "bfloat16", ROUTED, 70, 4096),
    ((8, 128, 4, 32, 2, 1, 2, 16, 2), 4, 64, "bfloat16", "bfloat16", ROUTED, 40, 4096),
    ((16, 64, 6, 192, 1, 1, 2, 16, 1), 4, 128, "float16", "float16", (4, 3, [1, 0, 1, 1], 2), 33, 2048),
    ((8, 128, 2, 1, 2, 2, 2, 16, 1), 8, 64, "bfloat16", "bfloat16", (3, 1, [2], 3), 50, 2048),
    ((8, 128, 3, 32, 2, 2, 2, 16, 2), 8, 64, "bfloat16", "float32", ROUTED, 20, 3072),
    ((8, 64, 4, 192, 2, 1, 2, 32, 1), 4, 32, "bfloat16", "bfloat16", (40, 1, [*range(40)], 40), 16, 2048),
]


@pytest.mark.parametrize("order", [0, 1, 2], ids=["at once", "late", "some time"])
@pytest.mark.parametrize("case", GROUPED_CASES, ids=lambda c: "-".join(map(str, (*c[0], *c[1:5], *c[6:]))))
def test_streamed_products_of_experts_equal_float64(build, case, order):
    for multiprocessors in (1, 7):  # most groups end amid a block's tiles; the last blocks may have no tile
        gpu = H100 | {"multiprocessors": multiprocessors}
        values, want = run_stream(build, *case, order=order, seed=order, gpu=gpu)
        assert error(values, want) < ROUNDED_ONCE[case[3]]


ALONE, RANKED = STREAM_CASES[1], STREAM_CASES[13]
STREAM_DEFECTS = {  # (case, what stands there, what then does) or (case, other macros)
    "places asked for before they are free": (ALONE, "barrier_wait(empty + 8 * slot, (round - 1) & 1);", ""),
    "no wait for the words": (ALONE, "barrier_wait(full + 8 * slot, round & 1);", ""),
    "no wait for the biases": (ALONE, "barrier_wait(biased + 8 * scale_at, times & 1);", ""),
    "no wait for the warps' sums": (ALONE, "barrier_wait(summed + 8 * buffer, this_round & 1);", ""),
    "biases' places asked for before they are read": (
        ALONE,
        "barrier_wait(used + 8 * scale_slot, (scale_round - 1) & 1), ",
        "",
    ),
    "sums written before they were taken": (ALONE, "barrier_wait(taken + 8 * place, (round - 1) & 1);", ""),
    "y before the biases' product": (ALONE, "(WARPS + MATRIX_BIASES) * ARRIVALS", "WARPS * ARRIVALS"),
    "x of a line before all lanes have it": (
        STREAM_CASES[8],
        "        __syncwarp();\n#pragma unroll\n        for (int w = 0; w < 4; w++) {",
        "#pragma unroll\n        for (int w = 0; w < 4; w++) {",
    ),
    "a line written over before it is read": (
        STREAM_CASES[8],
        "        }\n        __syncwarp();\n      }\n#else",
        "        }\n      }\n#else",
    ),
    "no wait for the sums of x": (ALONE, "barrier_wait(summed_up, before & 1);", ""),
    "swizzled wrongly": (ALONE, "lane / 16) ^ lane % 8) * 16;", "lane / 16)) * 16;"),
    "scales' ring too short": (STREAM_CASES[4], {"SCALE_DEPTH": 1}),
    "no wait for the ranks' sums": (RANKED, "barrier_wait(summed + 8 * buffer, this_round & 1);", ""),
    "sums sent before they were taken": (RANKED, "barrier_wait(taken + 8 * place, (round - 1) & 1);", ""),
    "a rank ends before the others": (RANKED, "cluster_ends(), cluster_wait();  // nobody", ";  // nobody"),
    "a rank begins before the others": (RANKED, "if (RANKS > 1 && !GROUPED) cluster_wait();", ""),
    "sums of x written anew before they are read": (
        GROUPED_CASES[5],
        "barrier_wait(taken_up, (before - 1) & 1);",
        ";",
    ),
    "rows of the next expert": (GROUPED_CASES[0], "m < rows_of_x && n < N", "n < N"),
    "an expert for all": (
        GROUPED_CASES[0],
        "tile == first_tile || tile % tiles == 0 ?",
        "tile == first_tile ?",
    ),
    "a rank has another's x": (RANKED, "x += rank * PART * 2;", ""),
}


@pytest.mark.parametrize("defect", STREAM_DEFECTS)
def test_a_defect_planted_in_the_stream_shows(build, defect):
    case, *planted = STREAM_DEFECTS[defect]
    how = {"changed": planted[0]} if len(planted) == 1 else {"replaced": (tuple(planted),)}
    text = (cuda.HERE / "qmv_stream.cu").read_text(encoding="utf-8")
    assert len(planted) == 1 or planted[0] in text, "an error below would be taken for the defect's"
    orders = [(0, 0), *((order, seed) for order in (1, 2) for seed in range(6))]
    with pytest.raises((AssertionError, RuntimeError)):
        for order, seed in orders:
            found = run_stream(build, *case, order=order, seed=seed, **how)
            assert error(*found) < ROUNDED_ONCE["bfloat16"]
