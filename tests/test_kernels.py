"""Every CPU kernel forced by name against float64: every format, dtype, orientation and ragged edge."""

import platform
import shutil

import mlx.core as mx
import native
import numpy as np
import pytest
from cases import dtypes, harness_lines, shapes

from mlxq import ops
from mlxq.format import FORMATS, Format, Packed
from mlxq.ops import reference

if not ops.native_available():
    pytest.skip(f"the compiled extension is missing: {ops.native_error()}", allow_module_level=True)

FAMILIES = ops.isa_levels()
SERVE_ALL = ("scalar", "avx2", "avx512", "neon")  # without help from the families below
DTYPE = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Relative Frobenius error of one product. float32: sums of up to 4224 rounded terms. Narrow dtypes: half a
# unit in y's last place at the bottom of a binade, and room for a kernel that rounds x or w.
BOUND = {"float32": 3e-6, "float16": 2**-11 + 4e-5, "bfloat16": 2**-8 + 1e-3}


def packed(fmt, N, K, scale_dtype="float32", seed=0, experts=()):
    """Random codes, all values equally often, scales and biases as a quantizer would give."""
    rng = np.random.default_rng((seed, fmt.bits, fmt.group_size, N, K))
    words = rng.integers(0, 2**32, (*experts, N, fmt.words_per_row(K)), np.uint32)
    scales = (rng.random((*experts, N, K // fmt.group_size), np.float32) + 0.5) / fmt.levels
    biases = -scales * fmt.levels * (0.4 + 0.2 * rng.random(scales.shape, np.float32))
    return Packed(mx.array(words), *(mx.array(a).astype(DTYPE[scale_dtype]) for a in (scales, biases)), fmt)


def normal(*shape, dtype="float32", seed=1):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(DTYPE[dtype])


def error(got, want):
    """||got - want|| / ||want||."""
    got = np.array(got.astype(mx.float32), np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def ran(before):
    """Names of the kernels that have run since, with how often."""
    return {name: n - before[name] for name, n in ops.kernel_calls().items() if n > before[name]}


@pytest.mark.parametrize("transpose", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_family_gives_the_float64_answer_and_its_own_kernel_ran(fmt, transpose):
    for (x_dtype, scale_dtype), (M, N, K) in [(d, s) for d in dtypes() for s in shapes(fmt)]:
        w = packed(fmt, N, K, scale_dtype)
        x = normal(M, K if transpose else N, dtype=x_dtype)
        want = reference.qmm(x, w, transpose)
        for family in FAMILIES:
            if family == "scalar" and M * N * K > 200_000:
                continue
            with ops.forced_isa(family):
                expected = ops.kernel_for(M, N, K, fmt.bits, fmt.group_size, x_dtype, scale_dtype, transpose)
                before = ops.kernel_calls()
                y = ops.qmm(x, w, transpose)
                off = error(y, want)
            case = (family, x_dtype, scale_dtype, M, N, K)
            assert ran(before) == {expected: 1}, case
            assert y.dtype == DTYPE[x_dtype] and off < BOUND[x_dtype], (*case, off)
            if family in SERVE_ALL:
                assert expected.startswith(family + ":"), case


def test_every_kernel_that_runs_here_is_reached_by_the_list():
    reached = set()
    for fmt, transpose in [(f, t) for f in FORMATS for t in (True, False)]:
        for (x_dtype, scale_dtype), (M, N, K) in [(d, s) for d in dtypes() for s in shapes(fmt)]:
            for family in FAMILIES:
                with ops.forced_isa(family):
                    shape = (M, N, K, fmt.bits, fmt.group_size)
                    reached.add(ops.kernel_for(*shape, x_dtype, scale_dtype, transpose))
    here = {name for name in ops.kernel_calls() if name.split(":")[0] in FAMILIES and ":q8" not in name}
    assert reached == here


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPE)
@pytest.mark.parametrize("transpose", [True, False], ids=["forward", "backward"])
def test_rows_with_nan_and_inf_give_what_float_arithmetic_gives(family, dtype, transpose):
    w = packed(Format(4, 64), 45, 192, dtype)
    for M in (3, 14):
        x = np.array(normal(M, 192 if transpose else 45).astype(DTYPE[dtype]).astype(mx.float32))
        x[0, 7], x[1, 30] = np.inf, np.nan
        with np.errstate(invalid="ignore"):
            want = reference.qmm(x, w, transpose)
        with ops.forced_isa(family):
            y = ops.qmm(mx.array(x).astype(DTYPE[dtype]), w, transpose)
            y = np.array(y.astype(mx.float32), np.float64)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(want))
        np.testing.assert_array_equal(y[np.isinf(want)], want[np.isinf(want)])
        np.testing.assert_array_equal(np.isinf(y), np.isinf(want))
        rest = np.linalg.norm(y[2:] - want[2:]) / np.linalg.norm(want[2:])
        assert rest < BOUND[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e25, 1e34])
def test_rows_far_from_one_keep_their_accuracy(family, size):
    for bits in (2, 4, 8):
        w = packed(Format(bits, 32), 9, 192)
        x = normal(2, 192) * size
        want = reference.qmm(x, w)
        with ops.forced_isa(family):
            assert error(ops.qmm(x, w) / size, want / size) < BOUND["float32"], bits


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_zeros_give_zeros(family):
    for transpose in (True, False):
        w = packed(Format(4, 64), 64, 64)
        with ops.forced_isa(family):
            assert not np.array(ops.qmm(mx.zeros((3, 64)), w, transpose)).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transpose", [True, False], ids=["forward", "backward"])
def test_experts_sorted_unsorted_and_empty_give_the_float64_answer(family, transpose):
    fmt = Format(4, 32)
    w = packed(fmt, 21, 96, experts=(5,))
    inner = 96 if transpose else 21
    for dtype, rows in (("float32", 1), ("bfloat16", 3), ("float16", 1), ("float32", 7)):
        x = normal(6, rows, inner, dtype=dtype)
        for experts in ([4, 0, 4, 2, 0, 4, 4, 2], [0, 0, 2, 2, 2, 4, 4, 4]):  # experts 1 and 3 get nothing
            blocks = [5, 1, 0, 0, 2, 3, 4, 1]
            want = reference.gather_qmm(x, w, np.array(blocks), np.array(experts), transpose)
            with ops.forced_isa(family):
                before = ops.kernel_calls()
                y = ops.gather_qmm(
                    x, w, mx.array(blocks), mx.array(experts), transpose, experts == sorted(experts)
                )
                assert error(y, want) < BOUND[dtype]
                assert len(ran(before)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_views_of_x_and_no_rows_at_all_are_served(family):
    w = packed(Format(4, 64), 24, 128)
    base = normal(2, 260, 14)
    views = [base[0, :128].T, base[:, 1:257:2, 3][::-1], base[:, 130:258].swapaxes(1, 2)[:, ::3]]
    with ops.forced_isa(family):
        for x in views:
            assert error(ops.qmm(x, w), reference.qmm(np.array(x), w)) < BOUND["float32"]
        assert ops.qmm(mx.zeros((0, 128)), w).shape == (0, 24)
        assert ops.qmm(mx.zeros((3, 0, 24)), w, transpose=False).shape == (3, 0, 128)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.system() != "Linux", reason="the harness was written for Linux")
def test_kernels_stay_inside_their_arrays_and_serve_any_number_of_rows():
    processor = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
    here, found = native.run([native.build("g++", processor)])
    assert set(here) == set(FAMILIES)
    assert {name.split(":")[0] for name in found} == set(here)
    assert len(found["scalar:loops"]) + len(found["scalar:q8"]) == len(harness_lines())
    assert not native.too_far(found)
