"""NVIDIA GPUs: every kernel equals float64, and what needs no GPU is checked without one."""

import contextlib
import functools
import gc
import itertools
import os
import re
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest

from mlxq import bridge, format, ops
from mlxq.format import FORMATS, STORAGE, Format
from mlxq.ops import cuda, reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

from tools.msl import nvidia  # noqa: E402

# Largest ‖y - float64‖ / ‖float64‖: half an ulp of y's type; float32: x in three bfloat16 parts (2^-24 of it)
# and sums of up to 2^13 products in float32 on tensor cores, which truncate.
ROUNDING = {"float32": 2.0**-18, "float16": 2.0**-11, "bfloat16": 2.0**-8}


# under tools/sanitize_cuda.py, where a kernel takes a hundred times as long; otherwise 0
REPEATS = int(os.environ.get("MLXQ_TEST_REPEATS", 0))


def repeated(times: int) -> range:
    return range(times)[-(REPEATS or times) :]


@functools.cache
def torch_gpu():
    """torch with an NVIDIA GPU, or a skip that names what is missing."""
    torch = pytest.importorskip("torch", reason="needs the package torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("cupy", reason="needs the package cupy, which compiles the kernels")
    return torch


def problem(fmt, M, N, K, x_type, s_type, experts=(), seed=0):
    """x (M, K) and a packed weight on the GPU, random."""
    torch = torch_gpu()
    maker = torch.Generator("cuda").manual_seed(seed + 1000 * M + N)
    shape = (*experts, N, K * fmt.bits // 32)
    words = torch.randint(-(2**31), 2**31, shape, generator=maker, device="cuda", dtype=torch.int64)
    words = words.to(torch.int32).view(torch.uint32)

    def uniform(*shape):
        return torch.rand(shape, generator=maker, device="cuda") * 2 - 1

    scales = (uniform(*experts, N, K // fmt.group_size) / fmt.levels).to(getattr(torch, s_type))
    biases = uniform(*experts, N, K // fmt.group_size).to(getattr(torch, s_type))
    x = torch.randn((M, K), generator=maker, device="cuda").to(getattr(torch, x_type))
    return x, format.Packed(words, scales, biases, fmt)


def error(y, expected) -> float:
    y = bridge.to_numpy(y).astype(np.float64)
    assert y.shape == expected.shape
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def exact(w):
    """The weights (N, K) in float64, by torch on the GPU."""
    torch, fmt = torch_gpu(), w.format
    shifts = torch.arange(0, 32, fmt.bits, device="cuda", dtype=torch.int32)
    codes = ((w.words.view(torch.int32)[..., None] >> shifts) & fmt.levels).reshape(
        *w.scales.shape, fmt.group_size
    )
    return (codes * w.scales.double()[..., None] + w.biases.double()[..., None]).reshape(w.N, w.K)


def relative(y, expected) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("x_type, s_type", list(itertools.product(STORAGE, STORAGE)))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_equal_float64_for_every_format_and_type(fmt, x_type, s_type):
    g = fmt.group_size
    shapes = [(1, 17, g), (2, 3, 5 * g), (3, 130, 11 * g), (5, 48, 16 * g), (8, 70, 37 * g), (8, 5, 64 * g)]
    shapes += [(11, 33, 4 * g), (70, 40, 3 * g)]
    for M, N, K in shapes:
        x, w = problem(fmt, M, N, K, x_type, s_type)
        y = ops.qmm(x, w)
        assert y.dtype == x.dtype
        found = error(y, reference.qmm(x, w))
        assert found < ROUNDING[x_type], (M, N, K, found)
        assert bool((y == ops.qmm(x, w)).all()), "not the same bits when repeated"


@pytest.mark.parametrize("x_type", ("float16", "bfloat16"))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_few_rows_equal_float64_however_long_and_large(fmt, x_type):
    gpu = cuda._device(torch_gpu().cuda.current_device())
    shapes = [
        (1, 4096, 4096),
        (2, 2100, 8192),
        (3, 18, 1024),
        (4, 2125, 3072),
        (7, 30, 5120),
        (6, 200, 3584),
        (8, 14336, 4096),
    ]
    for M, N, K in shapes:
        x, w = problem(fmt, M, N, K, x_type, "bfloat16")
        streamed = fmt != Format(2, 32) and K // fmt.group_size * 2 % 16 == 0
        assert (cuda.stream_shape(M, N, K, fmt, x_type, "bfloat16", gpu) is not None) == (
            gpu["early"] and streamed
        )
        expected = x.double() @ exact(w).T
        factors = (1, 2.0**-3) if x_type == "float16" else (1, 2.0**-75, 2.0**33, 2.0**38, 2.0**100)
        for factor in factors:  # beyond 2^36 bfloat16 x takes another way
            assert relative(ops.qmm(x * factor, w), expected * factor) < ROUNDING[x_type], (M, N, K, factor)
        assert bool((ops.qmm(x, w) == ops.qmm(x, w)).all()), "not the same bits when repeated"


@pytest.mark.parametrize(
    "M, N, K", [(8, 4096, 14336), (5, 70, 14336), (7, 1000, 24576), (1, 4096, 8192), (3, 14336, 4096)]
)
@pytest.mark.parametrize("ranks", (0, 2, 4))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_shared_by_the_blocks_of_a_cluster_equal_float64(fmt, ranks, M, N, K, monkeypatch):
    """ranks: 0 as the table has it, else as many, on any shape that they serve."""
    gpu = cuda._device(torch_gpu().cuda.current_device())
    if not gpu["early"]:
        pytest.skip("needs a Hopper GPU: clusters")
    if REPEATS:  # fewer rows of W, by as few blocks that each has several tiles
        N = min(N, 264)
        monkeypatch.setattr(cuda, "_device", lambda index: gpu | {"multiprocessors": 6})
    if ranks:
        monkeypatch.setattr(cuda, "stream_tunings", lambda *a: [(8, 64, 16, 2, 1, 2, 16, ranks)])
    x, w = problem(fmt, M, N, K, "bfloat16", "bfloat16")
    y = ops.qmm(x, w)
    assert relative(y, x.double() @ exact(w).T) < ROUNDING["bfloat16"]
    for _ in repeated(20):  # the ranks' order is another each time
        assert bool((ops.qmm(x, w) == y).all()), "not the same bits when repeated"


@pytest.mark.parametrize("x_type", STORAGE)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_transposed_products_equal_float64(fmt, x_type):
    for M, N, K in [(1, 17, 128), (5, 64, 256), (40, 33, 384)]:
        _, w = problem(fmt, M, N, K, x_type, x_type)
        x = problem(fmt, M, 3, 128, x_type, x_type)[0].repeat(1, 2)[:, :N].contiguous()
        # weights rounded to x's type once more
        assert error(ops.qmm(x, w, transpose=False), reference.qmm(x, w, False)) < 2 * ROUNDING[x_type]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("transpose", (True, False))
def test_gathered_products_equal_float64(fmt, transpose):
    torch = torch_gpu()
    for M, blocks, experts in [(1, 6, 4), (3, 2, 5), (9, 3, 2)]:
        K, N = 256, 40
        _, w = problem(fmt, 1, N, K, "bfloat16", "bfloat16", experts=(experts,))
        x = torch.randn((blocks, M, K if transpose else N), device="cuda").bfloat16()
        lhs = torch.randint(0, blocks, (3, 4), device="cuda")
        rhs = torch.randint(0, experts, (3, 4), device="cuda", dtype=torch.int32)
        y = ops.gather_qmm(x, w, lhs, rhs, transpose)
        expected = reference.gather_qmm(x, w, lhs, rhs, transpose)
        assert error(y, expected) < ROUNDING["bfloat16"] * (1 if transpose else 2)


@pytest.mark.parametrize("x_type, s_type", list(itertools.product(("float16", "bfloat16"), STORAGE)))
@pytest.mark.parametrize("transpose", (True, False))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_many_rows_equal_float64(fmt, transpose, x_type, s_type):
    torch = torch_gpu()
    g = fmt.group_size
    shapes = [
        (9, 200, 9 * g),
        (17, 129, 5 * g),
        (33, 1000, 128),
        (64, 2048, 16 * g),
        (100, 256, 2048),
        (300, 333, 640),
    ]
    shapes += [(12, 1000, 4096), (130, 264, 3072), (513, 1032, 1024)]
    for M, N, K in shapes:
        _, w = problem(fmt, M, N, K, x_type, s_type)
        x = torch.randn((M, K if transpose else N), device="cuda").to(getattr(torch, x_type))
        y = ops.qmm(x, w, transpose)
        found = relative(y, x.double() @ (exact(w).T if transpose else exact(w)))
        assert found < 2 * ROUNDING[x_type], (M, N, K, found)  # weights rounded to x's type, then y
        assert bool((y == ops.qmm(x, w, transpose)).all()), "not the same bits when repeated"


@pytest.mark.parametrize("transpose", (True, False))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_experts_with_many_rows_equal_float64(fmt, transpose):
    torch = torch_gpu()
    for M, batches, experts in [(1, 500, 7), (3, 70, 40), (40, 4, 3), (1, 64, 300)]:
        K, N = 256, 72
        _, w = problem(fmt, 1, N, K, "bfloat16", "bfloat16", experts=(experts,))
        x = torch.randn((batches, M, K if transpose else N), device="cuda").bfloat16()
        lhs = torch.randint(0, batches, (batches,), device="cuda")
        rhs = torch.randint(0, experts, (batches,), device="cuda")
        for indices in (rhs, rhs.sort().values):
            y = ops.gather_qmm(x, w, lhs, indices, transpose)
            expected = reference.gather_qmm(x, w, lhs, indices, transpose)
            assert error(y, expected) < 2 * ROUNDING["bfloat16"]
            assert bool((y == ops.gather_qmm(x, w, lhs, indices, transpose)).all())


def of_experts(x, w, lhs, rhs, transpose):
    """gather_qmm in float64, by torch on the GPU."""
    torch = torch_gpu()
    lhs, rhs = lhs.clamp(0, len(x) - 1).long(), rhs.clamp(0, len(w.words) - 1).long()
    y = torch.empty((len(rhs), x.shape[1], w.N if transpose else w.K), device="cuda", dtype=torch.float64)
    for e in rhs.unique().tolist():
        at = (rhs == e).nonzero()[:, 0]
        one = exact(format.Packed(w.words[e], w.scales[e], w.biases[e], w.format))
        y[at] = x[lhs[at]].double() @ (one.T if transpose else one)
    return y


ROUTES = {  # blocks of x, rows of each, pairs, experts, how many are chosen (None: all; -1: the last alone)
    "decode": (8, 1, 16, 8, None),
    "one pair": (1, 1, 1, 5, None),
    "1024 experts, most without rows": (40, 1, 300, 1024, None),
    "all rows have one of many experts": (50, 1, 300, 20, -1),
    "one expert": (30, 2, 100, 1, None),
    "two of many": (64, 1, 200, 64, 2),
    "prefill": (300, 1, 600, 5, None),
    "blocks of rows": (7, 33, 11, 4, None),
    "more rows than a tile": (4, 300, 5, 2, None),
}


def product_of(kernel: str, monkeypatch) -> None:
    """Makes gather_qmm use this kernel for any number of rows, if it serves."""
    cuda._plans.clear()
    monkeypatch.setattr(cuda, "ROWS_BEST_IN_QMV_OF_EXPERTS", 1 << 30 if kernel == "qmv" else 0)
    most = 1 << 30 if kernel == "qmv_stream" else 0
    monkeypatch.setattr(cuda, "GROUPS_BEST_IN_QMV_STREAM", dict.fromkeys((2, 4, 8), most))
    if kernel == "qmm":
        monkeypatch.setattr(cuda, "qmm_stream_shape", lambda *a, **k: None)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kernel", ("qmv_stream", "qmm_stream", "qmm"))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_of_experts_equal_float64_by_every_kernel(fmt, kernel, route, monkeypatch):
    torch = torch_gpu()
    if cuda._device(torch.cuda.current_device())["arch"] != "sm_90a":
        pytest.skip("needs a Hopper GPU")
    product_of(kernel, monkeypatch)
    blocks, M, pairs, experts, chosen = ROUTES[route]
    for x_type, s_type, N in (("bfloat16", "bfloat16", 200), ("float16", "float32", 136)):
        K = 16 * fmt.group_size if kernel != "qmm" else 5 * fmt.group_size
        _, w = problem(fmt, 1, N, K, x_type, s_type, experts=(experts,))
        lhs = torch.randint(0, blocks, (pairs,), device="cuda")
        rhs = torch.randint(0, chosen if chosen and chosen > 0 else experts, (pairs,), device="cuda")
        if chosen == -1:
            rhs[:] = experts - 1
        for transpose in (True, False) if kernel != "qmv_stream" else (True,):
            x = torch.randn((blocks, M, K if transpose else N), device="cuda").to(getattr(torch, x_type))
            for order in (torch.arange(pairs, device="cuda"), rhs.argsort(stable=True)):
                y = ops.gather_qmm(x, w, lhs[order], rhs[order], transpose)
                found = relative(y, of_experts(x, w, lhs[order], rhs[order], transpose))
                assert found < 2 * ROUNDING[x_type], (x_type, transpose, found)
                for _ in repeated(3):
                    again = ops.gather_qmm(x, w, lhs[order], rhs[order], transpose)
                    assert bool((again == y).all()), "not the same bits when repeated"
    names = {plan.name for key, plan in cuda._plans.items() if key[0] == "gather"}
    assert names == {kernel} or (kernel == "qmv_stream" and fmt == Format(2, 32) and names == {"qmm_stream"})
    cuda._plans.clear()


@pytest.mark.parametrize("kernel", ("qmv", "qmv_stream", "qmm_stream", "qmm"))
def test_an_index_out_of_range_is_the_last_and_no_expert_spoils_another(kernel, monkeypatch):
    torch = torch_gpu()
    product_of(kernel, monkeypatch)
    fmt, K, N = Format(4, 64), 1024, 200
    _, w = problem(fmt, 1, N, K, "bfloat16", "bfloat16", experts=(6,))
    x = torch.randn((9, 1, K), device="cuda").bfloat16()
    rhs = torch.tensor([0, 7, -1, 2, 1 << 30, -(1 << 31), 5, 2, 0, 4] * 9, device="cuda", dtype=torch.int32)
    lhs = torch.tensor([0, 9, 1 << 30, -1, 3, 8, 8, 2, 1, -(1 << 31)] * 9, device="cuda", dtype=torch.int32)
    inside = [torch.where((a < 0) | (a >= n), n - 1, a) for a, n in ((lhs, 9), (rhs, 6))]
    y = ops.gather_qmm(x, w, lhs, rhs)
    assert relative(y, of_experts(x, w, *inside, True)) < 2 * ROUNDING["bfloat16"]
    assert bool((y == ops.gather_qmm(x, w, *inside)).all())
    w.scales[1], w.biases[1], w.scales[3] = float("nan"), float("nan"), float("inf")  # nobody's
    assert bool((y == ops.gather_qmm(x, w, lhs, rhs)).all())
    w.scales[4] = float("nan")
    y = ops.gather_qmm(x, w, lhs, rhs)
    assert torch.equal(torch.isnan(y).all(-1).reshape(-1), inside[1] == 4)
    if kernel in ("qmm_stream", "qmm"):
        x = torch.randn((9, 1, N), device="cuda").bfloat16()
        y = ops.gather_qmm(x, w, lhs, rhs, transpose=False)
        assert torch.equal(torch.isnan(y).any(-1).reshape(-1), inside[1] == 4)
    cuda._plans.clear()


@pytest.mark.parametrize("kernel", ("qmv_stream", "qmm_stream", "qmm"))
def test_rows_of_experts_are_captured_by_a_cuda_graph_with_indices_that_change(kernel, monkeypatch):
    torch = torch_gpu()
    product_of(kernel, monkeypatch)
    _, w = problem(Format(4, 64), 1, 264, 1024, "bfloat16", "bfloat16", experts=(12,))
    x = torch.randn((30, 1, 1024), device="cuda").bfloat16()
    lhs = torch.arange(30, device="cuda", dtype=torch.int32).repeat_interleave(2)
    rhs = torch.randint(0, 12, (60,), device="cuda", dtype=torch.int32)
    ops.gather_qmm(x, w, lhs, rhs)  # compiled and loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = x * 2  # written just before: rows may not be sorted before it is there
        y = ops.gather_qmm(hidden, w, lhs, rhs)
        z = ops.gather_qmm(hidden, w, lhs, 11 - rhs)  # sorts anew while the product before still runs
    for seed in repeated(20):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        rhs.copy_(torch.randint(0, 12 if seed % 3 else 1, (60,), device="cuda", dtype=torch.int32))
        graph.replay()
        for found, chosen in ((y, rhs), (z, 11 - rhs)):
            assert relative(found, of_experts(x * 2, w, lhs, chosen, True)) < 2 * ROUNDING["bfloat16"]
    cuda._plans.clear()


@pytest.mark.parametrize("per_row", (True, False))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_of_int8_have_exact_sums(fmt, per_row):
    torch = torch_gpu()
    for (M, N, K), (s_type, dtype) in zip(
        [(1, 130, 384), (9, 200, 640), (64, 1000, 1152), (200, 129, 2048), (30, 520, 3072), (130, 260, 4096)],
        itertools.product(STORAGE, STORAGE),
        strict=False,
    ):
        x, w = problem(fmt, M, N, K, "float32", s_type)
        if per_row:
            scales = w.scales[:, :1].expand_as(w.scales).contiguous()
            w = format.Packed(w.words, scales, -(2 ** (fmt.bits - 1)) * scales, fmt)
        codes, factors = ops.q8_rows(x)
        host_codes, host_factors = ops.q8_rows(bridge.to_numpy(x))
        assert np.array_equal(bridge.to_numpy(codes), host_codes) and np.array_equal(
            bridge.to_numpy(factors), host_factors
        )
        for scale in (factors, factors[:1].reshape(())):
            y = ops.q8mm(codes, scale, w, per_row=per_row, dtype=dtype)
            host = format.Packed(*(bridge.to_numpy(a) for a in (w.words, w.scales, w.biases)), fmt)
            expected = reference.q8mm(host_codes, bridge.to_numpy(scale), host, per_row).astype(np.float64)
            assert error(y, expected) < {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
            assert bool((y == ops.q8mm(codes, scale, w, per_row=per_row, dtype=dtype)).all())
        if not per_row:
            tiled_codes, tile_scales = ops.q8_rows(x, fmt.group_size)
            host_tiled = [bridge.to_numpy(a) for a in (tiled_codes, tile_scales)]
            for ours, theirs in zip(host_tiled, ops.q8_rows(bridge.to_numpy(x), fmt.group_size), strict=True):
                assert np.array_equal(ours, theirs)
            tiled = reference.q8mm(*host_tiled, host)
            assert error(ops.q8mm(tiled_codes, tile_scales, w), tiled) < 1e-6
        with pytest.MonkeyPatch.context() as patch:  # as on a GPU before Hopper
            patch.setattr(cuda, "q8mm_shape", lambda *a: None)
            patch.setattr(cuda, "q8_stream_shape", lambda *a: None)
            cuda._plans.clear()
            one = reference.q8mm(host_codes, host_factors, host, per_row)
            assert error(ops.q8mm(codes, factors, w, per_row=per_row), one) < 1e-6
            if not per_row:
                assert error(ops.q8mm(tiled_codes, tile_scales, w), tiled) < 1e-6
        cuda._plans.clear()
    torch.cuda.synchronize()


Q8_FORMS = [(16, 2), (16, 3), (32, 1), (32, 2), (32, 3), (64, 1), (64, 2), (128, 1), (256, 1)]


@pytest.mark.parametrize("tuning", Q8_FORMS, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_form_of_an_int8_product_is_exact(fmt, tuning, monkeypatch):
    torch = torch_gpu()
    gpu = cuda._device(torch.cuda.current_device())
    if gpu["arch"] != "sm_90a":
        pytest.skip("needs a Hopper GPU: q8_stream.cu")
    usual, launched = cuda.q8_stream_shape, cuda._q8_stream_launch
    for per_row, changed in itertools.product((True, False), ({}, {"BUFFERS": 1})):
        if not per_row and tuning[0] == 256:
            continue  # sums of groups for 256 rows take more registers than there are
        monkeypatch.setattr(cuda, "q8_stream_shape", functools.partial(usual, tuning=tuning, **changed))
        for (M, N, K), ranks in (((70, 260, 4096), None), ((19, 516, 3072), 2), ((300, 129, 2048), 1)):
            monkeypatch.setattr(cuda, "_q8_stream_launch", functools.partial(launched, ranks=ranks))
            cuda._plans.clear()
            _, w = problem(fmt, 1, N, K, "float32", "bfloat16")
            if per_row:
                scales = w.scales[:, :1].expand_as(w.scales).contiguous()
                w = format.Packed(w.words, scales, -(2 ** (fmt.bits - 1)) * scales, fmt)
            x = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8)
            scale = torch.rand(M, device="cuda") + 0.5
            y = ops.q8mm(x, scale, w, per_row=per_row)
            expected = x.double() @ exact(w).T * scale.double()[:, None]
            assert relative(y, expected) < 1e-6, (M, N, K, per_row, changed)
            for _ in repeated(5):
                assert bool((y == ops.q8mm(x, scale, w, per_row=per_row)).all()), (
                    "not the same bits when repeated"
                )
    cuda._plans.clear()


@pytest.mark.parametrize("bits", (4, 8))
def test_an_int8_product_sees_x_and_weights_that_were_changed_just_before(bits):
    """Its kernel may begin while the one before still runs."""
    torch = torch_gpu()
    fmt = Format(bits, 64)
    _, w = problem(fmt, 1, 1024, 4096, "float32", "bfloat16")
    x = torch.randint(-127, 128, (16, 4096), device="cuda", dtype=torch.int8)
    scale = torch.rand(16, device="cuda") + 0.5
    for n in range(6):
        y = ops.q8mm(x, scale, w)
        expected = x.double() @ exact(w).T * scale.double()[:, None]
        assert relative(y, expected) < 1e-6, n
        torch.cuda._sleep(1_000_000)
        if n % 2:
            w.scales.mul_(-1.5)
        x.copy_(x.roll(1, 0)), scale.mul_(0.5)


@pytest.mark.parametrize("w_type, s_type", list(itertools.product(STORAGE, STORAGE)))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_and_dequantize_give_the_bits_of_format(fmt, w_type, s_type):
    torch = torch_gpu()
    w = (torch.randn((37, 5 * fmt.group_size), device="cuda") * 3).to(getattr(torch, w_type))
    packed = ops.quantize(w, fmt, scale_dtype=s_type)
    expected = format.quantize(bridge.to_numpy(w), fmt, "affine", s_type)
    for name in ("words", "scales", "biases"):
        found = bridge.to_numpy(getattr(packed, name))
        assert np.array_equal(found, getattr(expected, name)), name
    back = ops.dequantize(packed, "float32")
    assert np.array_equal(bridge.to_numpy(back), format.dequantize(expected))
    rounded = ops.dequantize(packed, w_type)
    assert bool((rounded == back.to(rounded.dtype)).all())


def test_quantize_gives_the_bits_of_numpy_for_every_kind_of_group():
    torch = torch_gpu()
    from tests import test_quantize as kinds

    digest = kinds.hashlib.sha256()
    for index in range(kinds.CHUNKS):
        w = torch.from_numpy(kinds.chunk(index)).cuda()
        packed = ops.quantize(w, kinds.FMT, scale_dtype=kinds.storage_of(index))
        for part in (packed.words, packed.scales, packed.biases):
            digest.update(bridge.host_bits(part).tobytes())
    assert digest.hexdigest() == kinds.ALL


def test_weights_that_are_not_finite_are_refused():
    torch = torch_gpu()
    w = torch.ones((4, 64), device="cuda")
    w[1, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 256 weights are NaN"):
        ops.quantize(w, Format(4, 64))


def test_bad_calls_are_refused_and_leave_no_error_behind():
    torch = torch_gpu()
    x, w = problem(Format(4, 64), 2, 32, 128, "float16", "float16")
    with pytest.raises(ValueError, match="x has K=64 but w holds K=128"):
        ops.qmm(x[:, :64].contiguous(), w)
    with pytest.raises(ValueError, match="not contiguous"):
        ops.qmm(x.repeat(1, 2)[:, ::2], w)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ops.qmm(torch.empty(2 * 128 + 1, dtype=x.dtype, device="cuda")[1:].reshape(2, 128), w)
    with pytest.raises(TypeError, match="x is float64"):
        ops.qmm(x.double(), w)
    with pytest.raises(ValueError, match="x is on GPU 0 but scales on the CPU"):
        ops.qmm(x, format.Packed(w.words, w.scales.cpu(), w.biases, w.format))
    with pytest.raises(ValueError, match="3-bit/64 has no CUDA kernel"):
        ops.qmm(x, format.Packed(w.words, w.scales, w.biases, Format(3, 64)))
    assert ops.qmm(x[:0], w).shape == (0, 32)
    torch.cuda.synchronize()


def test_nan_and_infinity_spoil_their_row_and_no_other():
    torch = torch_gpu()
    for x_type in STORAGE:
        x, w = problem(Format(4, 64), 4, 48, 512, x_type, "float16")
        clean = ops.qmm(x, w)
        x[1, 7], x[2, 300] = float("nan"), float("inf")
        y = ops.qmm(x, w)
        assert not bool(torch.isfinite(y[1:3]).any())
        assert bool((y[0] == clean[0]).all() and (y[3] == clean[3]).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_row_of_huge_values_takes_no_digits_from_a_row_of_tiny_ones(fmt):
    torch, g = torch_gpu(), fmt.group_size
    sizes = torch.tensor([100, -20, 0, 38, -60, 3, -9, 36], device="cuda").double().exp2()
    for M, N, K in [(8, 300, 4096), (2, 40, 5 * g), (40, 300, 2048), (200, 264, 1024)]:
        x, w = problem(fmt, M, N, K, "bfloat16", "bfloat16")
        x *= sizes.repeat(M // 8 + 1)[:M, None].bfloat16()
        expected = x.double() @ exact(w).T
        y = ops.qmm(x, w).double()
        bound = ROUNDING["bfloat16"] * (1 if M <= 8 else 2)  # of each row; weights rounded to x's type
        assert float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()) < bound, (M, N, K)
        x[1, 7] = float("inf")
        y = ops.qmm(x, w).double()
        others = torch.arange(M, device="cuda") != 1
        assert not bool(torch.isfinite(y[1]).any())
        assert float(((y - expected).norm(dim=1) / expected.norm(dim=1))[others].max()) < bound, (M, N, K)


def test_calls_are_captured_by_a_cuda_graph_and_run_on_the_callers_stream():
    torch = torch_gpu()
    x, w = problem(Format(4, 64), 1, 256, 512, "bfloat16", "bfloat16")
    expected = ops.qmm(x, w).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.qmm(x, w)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((y == expected).all())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the product must wait for it
        late = x + 0
        y = ops.qmm(late, w)
    stream.synchronize()
    assert bool((y == expected).all())


def in_parts(monkeypatch, ranks: int, parts: int) -> None:
    """Makes qmm_stream.cu share the columns of a tile so, whatever is resident at once."""
    if cuda._device(torch_gpu().cuda.current_device())["arch"] != "sm_90a":
        pytest.skip("needs a Hopper GPU: qmm_stream.cu")

    def chosen(tiles, units, *rest):
        shares = ranks * parts
        assert -(-units // shares) * (shares - 1) < units, "a rank without a share would wait forever"
        return ranks, parts

    monkeypatch.setattr(cuda, "qmm_stream_ranks", chosen)


PARTS = [  # ranks, parts, M, N, K, transpose
    (1, 2, 20, 260, 3072, True),
    (2, 3, 130, 132, 6144, True),
    (2, 4, 300, 520, 8192, True),
    (2, 2, 70, 1160, 1024, False),
    (2, 2, 128, 4096, 1024, False),
    (1, 3, 260, 1544, 1024, False),
]


@pytest.mark.parametrize("ranks, parts, M, N, K, transpose", PARTS)
@pytest.mark.parametrize("x_type, s_type", [("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_in_parts_equal_float64(fmt, x_type, s_type, ranks, parts, M, N, K, transpose, monkeypatch):
    torch = torch_gpu()
    in_parts(monkeypatch, ranks, parts)
    _, w = problem(fmt, 1, N, K, x_type, s_type)
    x = torch.randn((M, K if transpose else N), device="cuda").to(getattr(torch, x_type))
    y = ops.qmm(x, w, transpose)
    launch = w.__dict__["_cuda_plans"][x.shape, x.dtype, transpose].launch
    assert isinstance(launch, cuda._Parts) and launch.config.grid_x == ranks
    assert relative(y, x.double() @ (exact(w).T if transpose else exact(w))) < 2 * ROUNDING[x_type]
    for _ in repeated(20):
        assert bool((ops.qmm(x, w, transpose) == y).all()), "not the same bits when repeated"


@pytest.mark.parametrize("M", (16, 128))  # few sums: the next product may begin while they are being made
def test_products_in_parts_that_follow_each_other_keep_their_sums_apart(M, monkeypatch):
    """Two weights in turn, whose workspaces are the same memory; as a graph; in threads with streams."""
    torch = torch_gpu()
    in_parts(monkeypatch, 2, 2)
    N, K, products = (512, 256, 3) if REPEATS else (4096, 512, 8)
    weights = [problem(Format(4, 64), 1, N, K, "bfloat16", "bfloat16", seed=n)[1] for n in range(2)]
    xs = [torch.randn((M, N), device="cuda").bfloat16() for _ in range(products)]
    expected = []
    for i, x in enumerate(xs):
        expected.append(ops.qmm(x, weights[i % 2], transpose=False).clone())
        torch.cuda.synchronize()
        assert relative(expected[-1], x.double() @ exact(weights[i % 2])) < 2 * ROUNDING["bfloat16"]

    def chain():
        return [ops.qmm(x, weights[i % 2], transpose=False) for i, x in enumerate(xs)]

    for _ in repeated(50):
        assert all(map(torch.equal, chain(), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
        sums = [y + y for y in found]  # read just behind
    for _ in repeated(20):
        for y in (*found, *sums):
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
        assert all(torch.equal(s, y + y) for s, y in zip(sums, expected, strict=True))
    if "ARRIVALS" in os.environ.get("MLXQ_NVRTC_OPTIONS", ""):
        return  # racecheck loses track of kernels that threads start, and then waits for ever
    wrong = []

    def work(stream):
        with torch.cuda.stream(stream):
            for _ in repeated(50):
                wrong.extend(i for i, y in enumerate(chain()) if not torch.equal(y, expected[i]))

    torch.cuda.synchronize()
    shared = torch.cuda.Stream()  # two threads have one stream
    threads = [threading.Thread(target=work, args=(s,)) for s in (shared, shared, torch.cuda.Stream())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_have_not_used_the_gpu_yet_make_every_product():
    """Such as autograd's own: neither a plan nor a moved x may want a context that the thread has not got."""
    torch = torch_gpu()
    fmt = Format(4, 64)
    x, w = problem(fmt, 128, 1024, 4096, "bfloat16", "bfloat16")
    _, experts = problem(fmt, 1, 256, 1024, "bfloat16", "bfloat16", experts=(6,))
    back, rows = (torch.randn(shape, device="cuda").bfloat16() for shape in ((128, 1024), (8, 1, 1024)))
    lhs, rhs = (torch.arange(40, device="cuda", dtype=torch.int32) % n for n in (8, 6))
    codes = torch.randint(-9, 9, (30, 4096), device="cuda", dtype=torch.int8)
    factors = torch.ones(30, device="cuda")
    calls = {  # what is multiplied, and by what
        "decode": (x[:3], ops.qmm),
        "many rows": (x, ops.qmm),
        "transpose=False": (back, lambda x, w: ops.qmm(x, w, transpose=False)),
        "experts": (rows, lambda x, w: ops.gather_qmm(x, experts, lhs, rhs)),
        "int8": (codes, lambda x, w: ops.q8mm(x, factors, w)),
        "dequantize": (x, lambda x, w: ops.dequantize(w, "bfloat16")),
    }

    def anew() -> format.Packed:
        return format.Packed(w.words, w.scales, w.biases, fmt)  # no plans yet

    for name, (left, call) in calls.items():
        found: list = []
        moved, planned = [left.clone() for _ in range(3)], anew()
        expected = call(left, planned)
        torch.cuda.synchronize()
        for at, weight in zip(moved, (anew(), planned, planned), strict=True):
            thread = threading.Thread(
                target=lambda x, w, call=call, found=found: found.append(call(x, w)), args=(at, weight)
            )
            thread.start()
            thread.join()
        assert len(found) == 3 and all(bool((y == expected).all()) for y in found), name


def test_cupy_arrays_give_the_bits_of_torch_tensors():
    torch = torch_gpu()
    import cupy

    for x_type in STORAGE:
        x, w = problem(Format(4, 64), 3, 40, 256, x_type, x_type)
        parts = [cupy.from_dlpack(a.view(torch.int32)).view(cupy.uint32) if a.dtype == torch.uint32
                 else cupy.from_dlpack(a) for a in (w.words, w.scales, w.biases)]  # fmt: skip
        torch.cuda.synchronize()
        packed = format.Packed(*parts, w.format)
        for rows in (3, 1):
            y = ops.qmm(cupy.from_dlpack(x[:rows]), packed)
            assert isinstance(y, cupy.ndarray) and str(y.dtype) == x_type
            assert np.array_equal(bridge.to_numpy(y), bridge.to_numpy(ops.qmm(x[:rows], w)))
        back = ops.dequantize(packed, x_type)
        assert np.array_equal(bridge.to_numpy(back), bridge.to_numpy(ops.dequantize(w, x_type)))


# What needs no GPU

GPUS = {  # what _device says of an A100, an H100 and an RTX 5090
    "sm_80": {"arch": "sm_80", "multiprocessors": 108, "shared": 166912, "early": False},
    "sm_90a": {"arch": "sm_90a", "multiprocessors": 132, "shared": 232448, "early": True},
    "sm_120": {"arch": "sm_120", "multiprocessors": 170, "shared": 101376, "early": True},
}


def instances(gpu):
    """(kernel file, NVRTC's options): every format with each type of x and of scales once."""
    pairs = itertools.cycle(itertools.product(STORAGE, STORAGE))
    for fmt, M in itertools.product(FORMATS, (1, 8)):
        x_type, s_type = next(pairs)
        shape = cuda.qmv_shape(M, 512, 1024, fmt, x_type, s_type, gpu)
        yield "qmv.cu", cuda.options(gpu["arch"], shape["defines"])
        types_ = {"W_TYPE": cuda.TYPES[x_type], "S_TYPE": cuda.TYPES[s_type]}
        defines = {"BITS": fmt.bits, "GROUP": fmt.group_size, **types_}
        yield "quantize.cu", cuda.options(gpu["arch"], defines, exact=True)
        rows = 16 if M == 1 else 264
        streamed = cuda.qmm_stream_shape(rows, 512, 2048, fmt, x_type, s_type, gpu, M == 1)
        if streamed:
            yield "qmm_stream.cu", cuda.options(gpu["arch"], streamed["defines"])
            grouped = cuda.qmm_stream_shape(
                rows, 512, 2048, fmt, x_type, s_type, gpu, M == 1, cuda.grouped_tuning(rows, M), grouped=True
            )
            yield "qmm_stream.cu", cuda.options(gpu["arch"], grouped["defines"])
            sort = cuda.sort_shape(rows, 1, M, 2048 if M == 1 else 2050, gpu)
            yield "experts.cu", cuda.options(gpu["arch"], sort["defines"])
        many = cuda.qmm_shape(33 * M, 512, 1024, fmt, x_type, s_type, gpu, M == 1, 3 * (M == 8))
        if many:
            yield "qmm.cu", cuda.options(gpu["arch"], many["defines"])
        about = 33 * M, 512, 1024, fmt, s_type, x_type, 1 + (M == 8), M == 1, gpu
        for file, int8 in (
            ("q8_stream.cu", cuda.q8_stream_shape(*about)),
            ("q8mm.cu", cuda.q8mm_shape(*about)),
        ):
            if int8:
                yield file, cuda.options(gpu["arch"], int8["defines"])
        rows = {"X_TYPE": cuda.TYPES[x_type], "ROW_WARPS": M}
        yield "q8_rows.cu", cuda.options(gpu["arch"], rows, exact=True)
        stream = cuda.stream_shape(M, 512, 2048, fmt, x_type, s_type, gpu)
        if stream:
            yield "qmv_stream.cu", cuda.options(gpu["arch"], stream["defines"])
            stream = cuda.stream_shape(8, 512, 2048, fmt, x_type, s_type, gpu, groups=3 * (M == 8))
            yield "qmv_stream.cu", cuda.options(gpu["arch"], stream["defines"])


@pytest.fixture
def nvrtc(tmp_path, monkeypatch):
    """NVRTC of the package from PyPI where mlxq.ops.cuda looks for cupy's, and an empty cache."""
    if nvidia.nvrtc_library() is None:
        pytest.skip("needs NVRTC: package nvidia-cuda-nvrtc==13.0.*, which exists for Linux and Windows")
    import pypi_nvrtc as compiler

    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: compiler)
    compiler.logs.clear()
    return compiler


@pytest.mark.parametrize("arch", GPUS)
def test_the_kernels_compile_without_a_warning(arch, nvrtc):
    every = list(dict.fromkeys(instances(GPUS[arch])))
    files = sorted({name for name, _ in every})
    each = 2 if arch == "sm_90a" else 1  # about a second each
    chosen = [one for file in files for one in [i for i in every if i[0] == file][-each:]]
    turned = [one for one in every if "-DTURNED=1" in one[1]][-1:]  # another text than where x is not turned
    assert len(turned) == (arch == "sm_90a") and not set(turned) & set(chosen)
    chosen += turned
    if arch == "sm_90a":  # as racecheck has it (tools/sanitize_cuda.py)
        shared = cuda.stream_shape(8, 512, 8192, Format(2, 64), "bfloat16", "bfloat16", GPUS[arch])["defines"]
        assert shared["RANKS"] == 2
        chosen.append(("qmv_stream.cu", (*cuda.options(arch, shared), "-DARRIVALS=32")))
    for name, flags in chosen:
        assert cuda.cubin(name, flags)[:4] == b"\x7fELF"
    warned = re.findall(r"warning #(\S+?): (.*)", "\n".join(nvrtc.logs))
    # 177: a constant that this format has no use for
    assert len(nvrtc.logs) == len(chosen) and not [w for w in warned if w[0] != "177-D"]
    hopper = {"qmm.cu", "qmm_stream.cu", "q8_stream.cu", "q8mm.cu", "experts.cu"}
    hopper = hopper if arch == "sm_90a" else set()
    streams = {"qmv_stream.cu"} if GPUS[arch]["early"] else set()
    assert set(files) == {"qmv.cu", "quantize.cu", "q8_rows.cu"} | hopper | streams


def test_what_nvrtc_refuses_is_said_in_its_words(nvrtc, monkeypatch):
    monkeypatch.setattr(cuda, "_source", lambda name: "__device__ int f() {\n  return no_such_thing;\n}")
    said = r"NVRTC 13\.\d+ cannot compile qmv.cu .*\(2\): error.*no_such_thing"
    with pytest.raises(RuntimeError, match=said):
        cuda.cubin("qmv.cu", cuda.options("sm_80", {}))


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_blocks_fit_in_shared_memory_and_in_the_register_file(arch, fmt):
    gpu = GPUS[arch]
    for M, K, x_type in itertools.product((1, 2, 3, 5, 8, 32), (fmt.group_size, 4096, 14336), STORAGE):
        for N in (1, 40, 4096, 14336, 128256):
            shape = cuda.qmv_shape(M, N, K, fmt, x_type, "bfloat16", gpu)
            if shape is None:
                assert K == 14336 and x_type == "float32" and arch == "sm_120"
                continue
            defines = shape["defines"]
            assert shape["shared"] * defines["BLOCKS"] <= gpu["shared"]
            assert shape["threads"] * defines["BLOCKS"] <= 1024
            assert 1 <= shape["grid_x"] <= gpu["multiprocessors"]
            assert (1 << shape["wk_bits"]) <= defines["WARPS"] and defines["MP"] <= defines["WARPS"]
            parts = 3 if x_type == "float32" else 1
            assert shape["rows"] * parts <= defines["MP"]
            for s_type, transpose in itertools.product(("bfloat16", "float32"), (True, False)):
                for rows in (16 * M, 128 * M):
                    many = cuda.qmm_stream_shape(rows, N, K, fmt, x_type, s_type, gpu, transpose)
                    if many:
                        room = gpu["shared"] + 1024  # of a multiprocessor; the system takes 1 KiB a block
                        assert (many["shared"] + 1024) * many["defines"][
                            "BLOCKS"
                        ] <= room and arch == "sm_90a"
            stream = cuda.stream_shape(M, N, K, fmt, x_type, "bfloat16", gpu)
            if stream:
                blocks = stream["defines"]["BLOCKS"]
                assert arch != "sm_80" and blocks * stream["threads"] <= 1024
                assert blocks * (stream["shared"] + 1024 * (blocks > 1)) <= gpu["shared"]
                assert stream["defines"]["DEPTH"] >= 2 and M <= 8


def test_many_rows_have_the_form_that_was_fastest():
    """Of bfloat16 on an H200, 2026-11-29 (docs/kernels-cuda.md)."""

    def form(bits, M, N, K, transpose=True, s_type="bfloat16"):
        about = Format(bits, 64), "bfloat16", s_type, GPUS["sm_90a"], transpose
        defines = cuda.qmm_stream_shape(M, N, K, *about)["defines"]
        return tuple(defines[name] for name in ("BN", "HALVES", "BUFFERS"))

    assert {form(bits, 128, 14336, 4096, False) for bits in (2, 4, 8)} == {(128, 1, 1)}
    assert {form(bits, M, 14336, 4096, False) for bits in (2, 4, 8) for M in (256, 2048)} == {(256, 1, 2)}
    for N, K in ((14336, 4096), (28672, 8192)):
        assert {form(bits, M, N, K) for bits in (2, 4, 8) for M in (65, 128)} == {(128, 2, 1)}
        assert form(4, 128, N, K, s_type="float32") == (128, 1, 2) and form(4, 129, N, K) == (256, 1, 2)
    assert form(4, 128, 4096, 4096) == form(4, 128, 4096, 14336) == (128, 1, 2)


def test_ranks_of_a_stream_are_resident_at_once_and_have_a_share_each():
    parts = (18, 18, 18, 16, 16, 16, 16, 14)  # multiprocessors of a chip

    def at_once(ranks, blocks):
        return sum(part * blocks // ranks for part in parts)

    assert sum(parts) == 132 and at_once(4, 1) == 31
    for tiles, units, blocks in itertools.product(
        (1, 5, 32, 64, 100, 112, 224, 1000), (1, 3, 8, 28, 61), (1, 2, 3)
    ):
        for choice in ((1,), (1, 2, 3, 4)):
            about = tiles, units, 4, blocks, 132, lambda r, b=blocks: at_once(r, b), choice, 1 << 18
            ranks, of = cuda.qmm_stream_ranks(*about)
            assert ranks * of == 1 or tiles * of <= at_once(ranks, blocks)
            assert -(-units // (ranks * of)) * (ranks * of - 1) < units
    chosen = [
        cuda.qmm_stream_ranks(32, 8, 8, blocks, 132, lambda r, b=blocks: at_once(r, b))
        for blocks in (1, 2, 3)
    ]
    assert chosen == [(3, 1), (4, 1), (8, 1)]
    # 30 clusters of 4 lie there, and 32 are wanted: two parts of clusters of two
    long = 32, 112, 2, 1, 132, lambda r: {2: 66, 3: 39, 4: 30}.get(r, 17), (1, 2, 3, 4), 1 << 21
    assert cuda.qmm_stream_ranks(*long) == (2, 2)
    # one tile on a part of a chip where only pairs fit: a cluster that does not fit is never started
    assert cuda.qmm_stream_ranks(1, 61, 4, 1, 4, lambda ranks: 2 // ranks) == (2, 1)


def fake_nvrtc(log="", fails=False):
    class NVRTCError(RuntimeError):
        pass

    def compile_program(program, flags):
        calls.append(flags)
        if fails:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    calls = []
    return types.SimpleNamespace(
        NVRTCError=NVRTCError,
        calls=calls,
        getVersion=lambda: (13, 0),
        createProgram=lambda *a: a,
        compileProgram=compile_program,
        getCUBIN=lambda program: b"machine code",
        getProgramLog=lambda program: log,
        destroyProgram=lambda program: None,
    )


def test_machine_code_is_compiled_once_for_each_source_architecture_and_option(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    nvrtc = fake_nvrtc()
    monkeypatch.setattr(cuda, "_nvrtc", lambda: nvrtc)
    flags = cuda.options("sm_90a", {"BITS": 4})
    for _ in range(2):
        assert cuda.cubin("qmv.cu", flags) == b"machine code"
    assert len(nvrtc.calls) == 1
    for other in (cuda.options("sm_80", {"BITS": 4}), cuda.options("sm_90a", {"BITS": 2})):
        cuda.cubin("qmv.cu", other)
    cuda.cubin("quantize.cu", flags)
    monkeypatch.setattr(cuda, "_source", lambda name: "changed")
    cuda.cubin("qmv.cu", flags)
    assert len(nvrtc.calls) == 5 and len(list((tmp_path / "cuda").iterdir())) == 5


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cuda, "_nvrtc", fake_nvrtc)
    assert cuda.cubin("qmv.cu", ()) == b"machine code"


def test_a_failed_compilation_shows_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    log = "qmv.cu(3): warning: x\nqmv.cu(7): error: y is undefined\nqmv.cu(9): error: z"
    monkeypatch.setattr(cuda, "_nvrtc", lambda: fake_nvrtc(log, fails=True))
    said = re.escape("NVRTC 13.0 cannot compile qmv.cu for --gpu-architecture=sm_80: qmv.cu(7): error: y is")
    with pytest.raises(RuntimeError, match=said):
        cuda.cubin("qmv.cu", cuda.options("sm_80", {}))


def test_a_machine_without_cupy_or_a_driver_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(RuntimeError, match="need cupy, which compiles them"):
        cuda._nvrtc()
    cuda._driver.cache_clear()

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cuda.ctypes, "PyDLL", missing)
    with pytest.raises(RuntimeError, match="no GPU: the NVIDIA driver"):
        cuda._driver()


def test_a_gpu_before_ampere_is_refused(monkeypatch):
    def attribute(value, number, device):
        value._obj.value = {cuda._MAJOR: 7, cuda._MINOR: 5}.get(number, 0)
        return 0

    driver = types.SimpleNamespace(cuDeviceGet=lambda *a: 0, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    with pytest.raises(RuntimeError, match="compute capability 7.5; the kernels need 8.0"):
        cuda._device.__wrapped__(0)


def test_arrays_of_two_frameworks_are_refused():
    torch = pytest.importorskip("torch", reason="needs the package torch")
    with pytest.raises(TypeError, match="arrays of numpy and torch"):
        cuda._side("qmm", torch.ones(1), np.ones(1))


def test_a_weight_made_in_inference_mode_is_never_read_early():
    torch = pytest.importorskip("torch", reason="needs the package torch")
    with torch.inference_mode():
        made = torch.ones(1)
    assert cuda.counts_versions(torch.ones(1)) and not cuda.counts_versions(torch.ones(1), made)
    with pytest.raises(RuntimeError):
        _ = made._version  # what qmm would have met


def test_threads_that_share_a_launch_start_it_with_their_own_arguments(monkeypatch):
    started = []

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config, function, pointers, extra):  # noqa: N802 (the driver's name)
            values = [cuda.ctypes.c_void_p.from_address(at).value for at in pointers]
            time.sleep(1e-4)  # lets another thread in
            assert values == [cuda.ctypes.c_void_p.from_address(at).value for at in pointers]
            started.append(tuple(values))
            return 0

    arguments = [cuda.ctypes.c_void_p(), cuda.ctypes.c_void_p()]
    launch = cuda._Launch(cuda.Kernel(Driver, 1, 0), (1, 1, 1), 32, arguments, (0, 1))
    monkeypatch.setattr(cuda, "_take_context", lambda device: None)
    threads = [
        threading.Thread(target=lambda n=n: [launch(0, n, n + 100) for _ in range(20)]) for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started) == sorted((n, n + 100) for n in range(1, 5) for _ in range(20))


def on_driver(monkeypatch, driver, kernel, at_once, empty) -> None:
    """ops.cuda takes tensors of the CPU for those of an H200 and asks this driver."""
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_take_context", lambda device: None)
    monkeypatch.setattr(cuda, "_device", lambda index: GPUS["sm_90a"])
    monkeypatch.setattr(cuda, "_kernel", kernel)
    monkeypatch.setattr(cuda, "_clusters_at_once", at_once)
    monkeypatch.setattr(cuda._Torch, "on", staticmethod(lambda device: contextlib.nullcontext()))
    monkeypatch.setattr(cuda._Torch, "stream", staticmethod(lambda device: 0))
    monkeypatch.setattr(cuda._Torch, "empty", staticmethod(empty))


@pytest.mark.parametrize("has_one", (False, True))
def test_a_new_thread_takes_a_context_before_the_driver_is_asked_anything(monkeypatch, has_one):
    """Where kernels are loaded and counted, which is on a device; and where a plan's kernel is started."""
    did = []

    class Driver:  # with the driver's names
        @staticmethod
        def cuCtxGetCurrent(context):  # noqa: N802
            context._obj.value = 1234 if has_one else None
            return 0

        @staticmethod
        def cuDeviceGet(number, device):  # noqa: N802
            number._obj.value = device + 10
            return 0

        @staticmethod
        def cuDevicePrimaryCtxRetain(context, number):  # noqa: N802
            context._obj.value = number.value
            return 0

        @staticmethod
        def cuCtxSetCurrent(context):  # noqa: N802
            did.append(f"context {context.value}")
            return 0

        @staticmethod
        def cuLaunchKernelEx(*a):  # noqa: N802
            did.append("start")
            return 0

    class Moved:
        value = property(lambda self: None, lambda self, pointer: did.append("described"))

    device = types.SimpleNamespace(device=lambda n: contextlib.nullcontext(did.append(f"on {n}")))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=device))
    monkeypatch.setattr(cuda, "_driver", lambda: Driver)
    launch = cuda._Launch(cuda.Kernel(Driver, 1, 0, device=2), (1, 1, 1), 32, [cuda.ctypes.c_void_p()], (0,))
    launch.slots = [Moved()]

    def plans():
        for _ in range(2):
            with cuda._Torch.on(1):
                did.append("loaded")
        launch(0, 5)

    def starts():
        launch(0, 5)
        launch(0, 6)

    for work, expected in (
        (plans, ["on 1", "context 11", "loaded", "on 1", "loaded", "described", "start"]),
        (starts, ["context 12", "described", "start", "described", "start"]),
    ):
        did.clear()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert did == [done for done in expected if not (has_one and done.startswith("context"))]


@pytest.mark.parametrize("index", (0, 1))
def test_a_new_thread_multiplies_on_the_gpu_of_its_tensors(index):
    torch = torch_gpu()
    if torch.cuda.device_count() <= index:
        pytest.skip("needs two GPUs")
    x, w = problem(Format(4, 64), 3, 264, 1024, "bfloat16", "bfloat16")
    expected, found = ops.qmm(x, w), []
    there = torch.device("cuda", index)
    x, w = x.to(there), format.Packed(*(a.to(there) for a in (w.words, w.scales, w.biases)), w.format)
    torch.cuda.synchronize(there)
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append((ops.qmm(x, w), torch.cuda.current_device())))
        thread.start()
        thread.join()
    assert len(found) == 2
    for y, current in found:
        assert y.device == there and current == 0 and bool((y.cpu() == expected.cpu()).all())


def test_weights_do_not_outlive_their_plans(monkeypatch):
    """Whoever drops a model has its memory back at once, not when Python next looks for cycles."""
    torch = pytest.importorskip("torch", reason="needs the package torch")

    class Driver:
        cuLaunchKernelEx = cuTensorMapEncodeTiled = staticmethod(lambda *a: 0)  # noqa: N815

    def kernel(device, file, function, flags, shared):
        return cuda.Kernel(Driver, None, shared, function)

    on_driver(monkeypatch, Driver, kernel, lambda *a: 66, lambda *a: None)
    here = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: here(*a, **k))
    monkeypatch.setattr(torch, "device", lambda *a: None)
    for name, answer in (("_cuda_getCurrentRawStream", 0), ("_cuda_getDevice", -1)):
        monkeypatch.setattr(torch._C, name, lambda *a, answer=answer: answer, raising=False)
    groups = torch.ones((64, 16), dtype=torch.bfloat16)
    words = torch.zeros((64, 128), dtype=torch.int32).view(torch.uint32)
    w = format.Packed(words, groups, groups, Format(4, 64))
    x = torch.ones((2, 1024), dtype=torch.bfloat16)
    plans = []
    for _ in range(3):
        y = cuda.qmm(x, w)
        assert y.shape == (2, 64) and y.dtype == torch.bfloat16 and y.is_contiguous()
        assert y.data_ptr() != words.data_ptr() and y.numel() * 2 == y.untyped_storage().nbytes()
        plans += map(id, w.__dict__["_cuda_plans"].values())
    assert len(set(plans)) == 1  # what the first call worked out served the others
    gone = weakref.ref(words)
    gc.disable()
    try:
        del w, words, groups
        assert gone() is None
    finally:
        gc.enable()


def test_a_product_in_parts_has_a_workspace_and_what_adds_up_begins_early_behind_it(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    started, workspaces = [], []

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config, function, pointers, extra):  # noqa: N802 (the driver's name)
            c = config._obj
            kinds = [cuda.ctypes.c_void_p, cuda.ctypes.c_void_p, cuda.ctypes.c_int]
            if function == "qmm_stream":
                pointers, kinds = [pointers[i] for i in range(4, 8)], [kinds[0], *[kinds[2]] * 3]
            values = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=False)]
            early = c.count > (c.grid_x > 1 and function == "qmm_stream")  # a cluster is an attribute too
            started.append((function, (c.grid_x, c.grid_y, c.grid_z), values, early))
            return 0

        @staticmethod
        def cuTensorMapEncodeTiled(*a):  # noqa: N802
            return 0

        @staticmethod
        def cuFuncSetAttribute(*a):  # noqa: N802
            return 0

    def kernel(device, file, function, flags, shared):
        assert file == "qmm_stream.cu" and (shared == 0) == (function == "add_parts")
        return cuda.Kernel(Driver, function, shared, function)

    def empty(shape, dtype, device):
        workspaces.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        return workspaces[-1]

    at_once = {2: 66, 3: 39, 4: 30}  # of an H200
    on_driver(monkeypatch, Driver, kernel, lambda kernel, threads, ranks: at_once.get(ranks, 17), empty)
    monkeypatch.setattr(cuda._Torch, "current_device", staticmethod(lambda: -1))
    monkeypatch.setattr(cuda._Product, "_quick", lambda *a: None)
    N, K, M, fmt = 14336, 4096, 128, Format(2, 64)
    groups = torch.ones((N, K // 64), dtype=torch.bfloat16)
    w = format.Packed(torch.zeros((N, K // 16), dtype=torch.int32).view(torch.uint32), groups, groups, fmt)
    y = cuda.qmm(torch.ones((M, N), dtype=torch.bfloat16), w, transpose=False)
    (workspace,) = workspaces
    assert workspace.shape == (2 * M * K,) and workspace.dtype == torch.float32
    assert started == [
        ("qmm_stream", (2, 32, 2), [workspace.data_ptr(), M, N, K], False),
        ("add_parts", (M * K // 1024, 1, 1), [workspace.data_ptr(), y.data_ptr(), M * K // 4], True),
    ]
    started.clear()
    cuda.qmm(torch.ones((2048, N), dtype=torch.bfloat16), w, transpose=False)
    assert [one[0] for one in started] == ["qmm_stream"] and len(workspaces) == 1  # the tiles are enough


def test_rows_of_experts_are_sorted_into_as_many_tiles_as_the_product_is_started_for(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    started, sizes = [], {}

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config, function, pointers, extra):  # noqa: N802 (the driver's name)
            c = config._obj
            at = range(6, 13) if function == "by_expert" else range(5, 8)
            numbers = [cuda.ctypes.c_int.from_address(pointers[i]).value for i in at]
            started.append((function, (c.grid_x, c.grid_y, c.grid_z), numbers))
            return 0

        cuTensorMapEncodeTiled = cuFuncSetAttribute = staticmethod(lambda *a: 0)  # noqa: N815

    def kernel(device, file, function, flags, shared):
        return cuda.Kernel(Driver, function, shared, function)

    def empty(shape, dtype, device):
        sizes.setdefault(dtype, []).append(shape)
        return torch.empty(shape, dtype=getattr(torch, dtype))

    on_driver(monkeypatch, Driver, kernel, lambda kernel, threads, ranks: 132 // ranks, empty)
    monkeypatch.setattr(cuda, "_plans", {})
    E, N, K, pairs, x_blocks, M, fmt = 6, 256, 512, 500, 250, 2, Format(4, 64)
    groups = torch.ones((E, N, K // 64), dtype=torch.bfloat16)
    words = torch.zeros((E, N, K // 8), dtype=torch.int32).view(torch.uint32)
    w = format.Packed(words, groups, groups, fmt)
    lhs, rhs = torch.arange(pairs) // 2, torch.arange(pairs) % E
    y = cuda.gather_qmm(torch.ones((x_blocks, M, K), dtype=torch.bfloat16), w, lhs, rhs)
    assert y.shape == (pairs, M, N)
    (sort, _, numbers), (product, grid, about) = started
    grouped = cuda.grouped_shape(pairs, M, N, K, fmt, "bfloat16", "bfloat16", GPUS["sm_90a"], True, E)
    assert (sort, product) == ("by_expert", "qmm_stream") and grouped[0] == "qmm_stream"
    rows = grouped[1]["rows"]
    tiles = (pairs * M + E * (rows - 1)) // rows
    assert numbers == [pairs, M, x_blocks, E, rows, tiles, K // 8] and grid[2] == tiles
    assert about == [pairs * M, N, K]
    assert (pairs * M, K) in sizes["bfloat16"] and (4 * tiles + pairs * M,) in sizes["int32"]


def test_an_int8_product_starts_early_only_behind_what_cannot_have_written_its_weights(monkeypatch):
    """Its plan lasts when x moves; the grid and the arguments are what the kernel expects."""
    torch = pytest.importorskip("torch", reason="needs the package torch")
    started, described = [], []

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config, function, pointers, extra):  # noqa: N802 (the driver's name)
            c = config._obj
            words = [cuda.ctypes.c_void_p.from_address(pointers[i]).value for i in (4, 5, 6)]
            numbers = [cuda.ctypes.c_int.from_address(pointers[i]).value for i in (7, 8, 9)]
            early = c.count > (c.grid_x > 1)  # a cluster is an attribute too
            started.append(((c.grid_x, c.grid_y, c.grid_z), words, numbers, early))
            return 0

        @staticmethod
        def cuTensorMapEncodeTiled(memory, kind, rank, pointer, *rest):  # noqa: N802
            described.append(pointer.value)
            return 0

        @staticmethod
        def cuFuncSetAttribute(*a):  # noqa: N802
            return 0

    def kernel(*about):
        return cuda.Kernel(Driver, 1, about[-1])

    def empty(shape, dtype, device):
        return torch.empty(shape, dtype=getattr(torch, dtype))

    on_driver(monkeypatch, Driver, kernel, lambda kernel, threads, ranks: 132 // ranks, empty)
    monkeypatch.setattr(cuda, "_plans", {})
    N, K, fmt = 300, 1024, Format(4, 64)
    groups = torch.ones((N, K // 64), dtype=torch.bfloat16)
    w = format.Packed(torch.zeros((N, K // 8), dtype=torch.int32).view(torch.uint32), groups, groups * 2, fmt)
    xs = [torch.ones((520, K), dtype=torch.int8) for _ in range(2)]
    scales = [torch.ones(520) for _ in range(2)]
    results = [cuda.q8mm(x, s, w, False, "bfloat16") for x, s in zip(xs, scales, strict=True)]
    w.scales.mul_(2)
    w = format.Packed(w.words, w.scales, w.biases, fmt)  # as another weight where one was
    results += [cuda.q8mm(xs[0], scales[0], w, False, "bfloat16") for _ in range(2)]
    assert [one[3] for one in started] == [False, True, False, True]
    assert len(cuda._plans) == 1 and {one[0][1:] for one in started} == {(9, 3)}
    which = (0, 1, 0, 0)
    for (_, words, numbers, _), i, y in zip(started, which, results, strict=True):
        assert words == [scales[i].data_ptr(), w.scales.data_ptr(), y.data_ptr()] and numbers == [520, N, K]
    weights = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
    assert described == [*weights, *(xs[i].data_ptr() for i in (0, 1, 0))]
