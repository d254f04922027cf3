"""The Metal host code on a device that executes the shaders on the CPU (tests/metal).

Nothing here ran on Apple hardware. What it shows: the host code binds the right buffers and constants, asks
for the right grids, picks the kernels that its table names, and its answers are those of the CPU primitive
and of float64.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

from shader_cases import KERNELS, SHADERS, TILES, geometry  # noqa: E402

import metal  # noqa: E402
from mlxq import format as fm  # noqa: E402
from mlxq.ops import native  # noqa: E402
from tools.msl import harness, source  # noqa: E402

# What a float32 sum of up to 1,100 terms loses, as a share of the sum of |x * W|: their roundings, 2^-24 at
# most each and of either sign, add up to sqrt(1100) / 2 = 16 of them. And rounding to the result's type.
SUM_ERROR = 2.0**-20
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(scope="module")
def device():
    if reason := harness.absent():
        pytest.skip(f"the fake Metal device runs shaders: {reason}")
    if not (metal.tool("cmake") and metal.tool("ninja")):
        pytest.skip("needs cmake and ninja to build the fake Metal device")
    return metal.Device()


def weight(seed, shape, fmt, scale_dtype="float32"):
    """(words, scales, biases) as mx arrays, and the float64 weights that they stand for."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    packed = fm.quantize(values.reshape(-1, shape[-1]), fmt, scale_dtype=scale_dtype)
    dense = fm.dequantize(packed).astype(np.float64).reshape(shape)
    parts = [np.asarray(a).reshape(*shape[:-1], -1) for a in (packed.words, packed.scales, packed.biases)]
    kinds = (mx.uint32, getattr(mx, scale_dtype), getattr(mx, scale_dtype))
    return [mx.array(a).astype(kind) for a, kind in zip(parts, kinds, strict=True)], dense


def rows(seed, shape, dtype="float32"):
    """An mx array, and its float64 values."""
    values = mx.array(np.random.default_rng(seed).standard_normal(shape), mx.float32).astype(
        getattr(mx, dtype)
    )
    return values, np.array(values.astype(mx.float32)).astype(np.float64)


def close(y, exact, magnitude, dtype="float32"):
    """Within the error of a float32 sum of this magnitude, rounded to dtype."""
    got = np.array(y.astype(mx.float32)).astype(np.float64)
    assert got.shape == exact.shape
    bound = SUM_ERROR * magnitude + ROUNDING[dtype] * np.abs(exact)
    worst = np.max(np.abs(got - exact) / bound)
    assert worst <= 1, f"{worst:.2f} times the bound"


# (transpose, M, N, K, format, dtype of x, of scales, kernels that run)
PRODUCTS = [
    (True, 1, 70, 192, (4, 64), "float32", "float32", ["qmv"]),
    (True, 8, 33, 128, (2, 32), "bfloat16", "float16", ["qmv"]),
    (True, 9, 65, 128, (8, 128), "float16", "bfloat16", ["qmm"]),
    (True, 40, 65, 160, (4, 32), "float32", "float32", ["qmm"]),
    (True, 12, 40, 1088, (4, 64), "float32", "float16", ["qmm_split", "sum_splits"]),
    (False, 1, 70, 192, (4, 64), "float32", "float32", ["qvm"]),
    (False, 2, 1100, 64, (2, 32), "float16", "float16", ["qvm_split", "sum_splits"]),
    (False, 9, 65, 128, (8, 128), "bfloat16", "bfloat16", ["qmm_n"]),
    (False, 17, 1030, 96, (4, 32), "float32", "float32", ["qmm_n_split", "sum_splits"]),
]


@pytest.mark.parametrize("transpose, M, N, K, fmt, dtype, scales, kernels", PRODUCTS)
def test_products_run_the_kernels_of_the_table_and_equal_float64(
    device, transpose, M, N, K, fmt, dtype, scales, kernels
):
    parts, dense = weight(1, (N, K), fm.Format(*fmt), scales)
    x, x_exact = rows(2, (M, K if transpose else N), dtype)
    matrix = dense.T if transpose else dense
    with device.on():
        y = device.module.qmm(x, *parts, transpose, fmt[1], fmt[0])
        mx.eval(y)
    assert device.ran() == kernels
    assert device.temporaries() == len(kernels) - 1  # the partial sums outlive the call only by add_temporary
    assert y.dtype == x.dtype
    close(y, x_exact @ matrix, np.abs(x_exact) @ np.abs(matrix), dtype)


# (transpose, blocks of x, M, experts, N, K, chosen experts, sorted, kernels that run)
GATHERS = [
    (True, 5, 1, 3, 40, 64, [2, 0, 1, 2, 2], False, ["gather_qmv"]),
    (False, 5, 2, 3, 40, 64, [2, 0, 1, 2, 2], False, ["gather_qvm"]),
    (True, 2, 18, 3, 40, 64, [1, 0], False, ["gather_qmm"]),
    (False, 2, 18, 3, 40, 64, [1, 0], False, ["gather_qmm_n"]),
    (True, 4, 1, 3, 40, 64, [0] * 5 + [2] * 20, True, ["schedule_tiles", "gather_qmm_sorted"]),
    (False, 4, 1, 3, 40, 64, [0] * 5 + [2] * 20, True, ["schedule_tiles", "gather_qmm_n_sorted"]),
]


@pytest.mark.parametrize("transpose, x_blocks, M, experts, N, K, chosen, sorted_, kernels", GATHERS)
def test_chosen_experts_run_the_kernels_of_the_table_and_equal_float64(
    device, transpose, x_blocks, M, experts, N, K, chosen, sorted_, kernels
):
    parts, dense = weight(3, (experts, N, K), fm.Format(4, 32))
    x, x_exact = rows(4, (x_blocks, M, K if transpose else N))
    lhs = np.arange(len(chosen)) * 3 % x_blocks
    matrix = np.swapaxes(dense, -1, -2) if transpose else dense
    with device.on():
        y = device.module.gather_qmm(x, *parts, mx.array(lhs), mx.array(chosen), transpose, 32, 4, sorted_)
        mx.eval(y)
    assert device.ran() == kernels
    assert device.temporaries() == len(kernels) - 1
    close(y, x_exact[lhs] @ matrix[chosen], np.abs(x_exact[lhs]) @ np.abs(matrix[chosen]))


@pytest.mark.parametrize("sorted_", [False, True])
def test_indices_out_of_range_read_nothing_outside(device, sorted_):
    """Every buffer ends at a guard page; the last block or expert stands for what is not there."""
    parts, dense = weight(3, (3, 40, 64), fm.Format(4, 32))
    x, x_exact = rows(4, (4, 1, 64))
    chosen = np.repeat([0, 1, 2, 3, 2**31 - 1], 5) if sorted_ else np.array([-1, 0, 7, 2, -(2**31)])
    lhs = np.resize([0, -3, 9, 2], len(chosen))
    with device.on():
        y = device.module.gather_qmm(x, *parts, mx.array(lhs), mx.array(chosen), True, 32, 4, sorted_)
        mx.eval(y)
    assert device.ran() == (["schedule_tiles", "gather_qmm_sorted"] if sorted_ else ["gather_qmv"])
    inside = np.where((chosen < 0) | (chosen > 2), 2, chosen)
    blocks = np.where((lhs < 0) | (lhs > 3), 3, lhs)
    matrix = np.swapaxes(dense, -1, -2)[inside]
    close(y, x_exact[blocks] @ matrix, np.abs(x_exact[blocks]) @ np.abs(matrix))


@pytest.mark.parametrize("M", [3, 20])
def test_a_network_forward_and_backward_equals_the_cpu(device, monkeypatch, M):
    """Two layers, the loss and the gradients of x (through the packed bytes), scales and biases."""
    from mlxq.nn.mlx import QuantizedLinear

    shapes = [(96, 64, fm.Format(4, 64)), (40, 96, fm.Format(8, 32))]
    layers = []
    for i, (N, K, fmt) in enumerate(shapes):
        (words, scales, biases), _ = weight(10 + i, (N, K), fmt)
        layer = QuantizedLinear(K, N, bias=True, group_size=fmt.group_size, bits=fmt.bits)
        layer.weight, layer.scales, layer.biases, layer.bias = words, scales, biases, mx.arange(N) / N
        layers.append(layer)
    x, _ = rows(12, (M, 64))
    target, _ = rows(13, (M, 40))

    def loss(x, *of_layers):
        for i, layer in enumerate(layers):
            layer.scales, layer.biases = of_layers[2 * i : 2 * i + 2]
        hidden = layers[0](x)
        return mx.mean(mx.square(layers[1](hidden * mx.sigmoid(hidden)) - target))

    arguments = [x, layers[0].scales, layers[0].biases, layers[1].scales, layers[1].biases]
    step = mx.value_and_grad(loss, argnums=list(range(5)))
    value, gradients = step(*arguments)
    mx.eval(value, gradients)
    monkeypatch.setattr(native, "_ext", lambda: device.module)
    with device.on():
        value_there, gradients_there = step(*arguments)
        mx.eval(value_there, gradients_there)
    forward, backward = ("qmv", "qvm") if M <= 8 else ("qmm", "qmm_n")
    assert sorted(device.ran()) == sorted([forward] * 2 + [backward] * 2)
    assert abs(value_there.item() - value.item()) <= 1e-5 * abs(value.item())
    for ours, theirs in zip(gradients_there, gradients, strict=True):
        ours, theirs = np.array(ours), np.array(theirs)
        assert np.max(np.abs(theirs)) > 0
        assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))


def test_arrays_that_are_not_contiguous_are_read_right(device):
    fmt = fm.Format(4, 32)
    parts, dense = weight(5, (80, 64), fmt)
    x, exact = rows(6, (64, 30))
    x, exact = x.T, exact.T
    plain = mx.contiguous(x)
    odd = plain.reshape(-1)[65:193].reshape(2, 64)
    wide = [mx.concatenate([a, a], axis=1) for a in parts]
    mx.eval(plain, odd, wide)
    views = {
        "x transposed": (x, parts, exact),
        "x of every other row": (plain[::2], parts, exact[::2]),
        "x backwards": (plain[::-1], parts, exact[::-1]),
        "x from an odd element on": (odd, parts, exact.reshape(-1)[65:193].reshape(2, 64)),
        "x broadcast": (mx.broadcast_to(plain[3], (5, 64)), parts, np.broadcast_to(exact[3], (5, 64))),
        "weights as columns of a wider array": (x, [a[:, : a.shape[1] // 2] for a in wide], exact),
    }
    for name, (view, chosen, values) in views.items():
        with device.on():
            y = device.module.qmm(view, *chosen, True, 32, 4)
            mx.eval(y)
        assert len(device.ran()) == 1, name
        close(y, values @ dense.T, np.abs(values) @ np.abs(dense.T))


def test_a_slice_of_experts_starts_inside_its_buffer(device):
    parts, dense = weight(7, (3, 24, 64), fm.Format(8, 64), "float16")
    x, exact = rows(8, (2, 64), "float16")
    mx.eval(parts)
    with device.on():
        y = device.module.qmm(x, *(a[2] for a in parts), True, 64, 8)
        mx.eval(y)
    close(y, exact @ dense[2].T, np.abs(exact) @ np.abs(dense[2].T), "float16")


def test_empty_arrays_run_nothing(device):
    parts, _ = weight(9, (24, 64), fm.Format(4, 64))
    none = [a[:0] for a in parts]
    with device.on():
        y = device.module.qmm(mx.zeros((0, 64)), *parts, True, 64, 4)
        z = device.module.qmm(mx.zeros((3, 0)), *none, False, 64, 4)
        mx.eval(y, z)
    assert device.ran() == []
    assert y.shape == (0, 24) and z.shape == (3, 64) and not np.array(z).any()


def test_one_traced_graph_serves_other_shapes(device):
    """mx.compile(shapeless=True) keeps the primitive and changes M: the kernel is chosen for what comes."""
    parts, dense = weight(14, (40, 64), fm.Format(4, 64))
    with device.on():
        call = mx.compile(lambda x: device.module.qmm(x, *parts, True, 64, 4), shapeless=True)
        for M in (1, 20, 3):
            x, exact = rows(M, (M, 64))
            y = call(x)
            mx.eval(y)
            close(y, exact @ dense.T, np.abs(exact) @ np.abs(dense.T))
    assert device.ran() == ["qmv", "qmm", "qmv"]


def test_vectorised_products_run_as_experts(device):
    parts, dense = weight(15, (3, 24, 64), fm.Format(4, 64))
    x, exact = rows(16, (3, 2, 64))
    with device.on():
        call = mx.vmap(lambda x, w, s, b: device.module.qmm(x, w, s, b, True, 64, 4))
        y = call(x, *parts)
        mx.eval(y)
    assert device.ran() == ["gather_qmv"]
    matrix = np.swapaxes(dense, -1, -2)
    close(y, exact @ matrix, np.abs(exact) @ np.abs(matrix))


@pytest.mark.parametrize(
    "words, message",
    [
        ({"bits": 5}, "5-bit groups of 64 do not exist"),
        ({"group_size": 16}, "4-bit groups of 16 do not exist"),
        ({"x": mx.zeros((2, 32))}, "x has K=32 but w holds K=64"),
        ({"x": mx.zeros((2, 64), mx.int32)}, "x is int32; wanted float32, float16 or bfloat16"),
    ],
)
def test_bad_input_gives_the_errors_of_the_cpu(device, words, message):
    (w, s, b), _ = weight(17, (24, 64), fm.Format(4, 64))
    given = {"x": mx.zeros((2, 64)), "group_size": 64, "bits": 4} | words
    cpu = native._load()[0]
    for module, block in ((device.module, device.on()), (cpu, device.on())):
        with block, pytest.raises((ValueError, TypeError), match=message):
            module.qmm(given["x"], w, s, b, True, given["group_size"], given["bits"])


# ---- products of int8 codes -------------------------------------------------------------------------------


def codes_and_scales(seed, M, K):
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (M, K), dtype=np.int8), rng.uniform(1e-3, 2e-2, M).astype(np.float32)


def symmetric(seed, N, K, bits, group_size, per_row):
    """(words, scales, biases) of signed codes, and the signed codes."""
    rng = np.random.default_rng(seed)
    zero = 2 ** (bits - 1)
    signed = rng.integers(-zero, zero, (N, K))
    scales = rng.uniform(1e-3, 2e-2, (N, K // group_size)).astype(np.float32)
    scales = np.repeat(scales[:, :1], scales.shape[1], 1) if per_row else scales
    words = fm.pack((signed + zero).astype(np.uint8), bits)
    return [mx.array(words), mx.array(scales), mx.array(-zero * scales)], signed


@pytest.mark.parametrize(
    "bits, M, dtype, kernel",
    [
        (8, 1, "float32", "q8_mv"),
        (8, 70, "float16", "q8_mm"),
        (4, 8, "bfloat16", "q8_mv"),
        (2, 9, "float32", "q8_mm"),
    ],
)
def test_int8_rows_times_rows_of_one_scale_are_the_bits_of_the_cpu(device, bits, M, dtype, kernel):
    N, K = 67, 192
    parts, signed = symmetric(30, N, K, bits, 64, True)
    x, x_scales = codes_and_scales(31, M, K)
    exact = x.astype(np.int64) @ signed.T
    want = exact.astype(np.float32) * (x_scales[:, None] * np.array(parts[1])[:, 0])
    with device.on():
        y = device.module.q8mm(mx.array(x), mx.array(x_scales), *parts, 64, bits, True, dtype)
        mx.eval(y)
    assert device.ran() == [kernel]
    assert mx.array_equal(y, mx.array(want).astype(getattr(mx, dtype)))
    there = native._load()[0].q8mm(mx.array(x), mx.array(x_scales), *parts, 64, bits, True, dtype)
    assert mx.array_equal(y, there)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    "bits, group_size, M, scale_dtype, dtype, kernel",
    [
        (8, 32, 2, "float32", "float32", "q8_mv"),
        (8, 128, 12, "bfloat16", "float32", "q8_mm"),
        (8, 64, 1, "float16", "bfloat16", "q8_mv"),
        (4, 64, 2, "float16", "float32", "q8_mv"),
        (4, 32, 70, "float32", "float16", "q8_mm"),
        (2, 32, 12, "bfloat16", "float32", "q8_mm"),
        (2, 128, 8, "float32", "float32", "q8_mv"),
    ],
)
def test_int8_rows_and_tiles_times_groups_equal_float64_and_the_cpu(
    device, bits, group_size, M, scale_dtype, dtype, kernel, tiled
):
    """With biases that are no multiple of scales. No product of floats serves."""
    N, K = 40, 384
    (words, scales, biases), signed = symmetric(32, N, K, bits, group_size, False)
    biases = biases + 0.01 * mx.random.normal(biases.shape, key=mx.random.key(3))
    scales, biases = (a.astype(getattr(mx, scale_dtype)) for a in (scales, biases))
    x, x_scales = codes_and_scales(33, M, K)
    if tiled:
        x_scales = np.random.default_rng(1).uniform(0.01, 1, (M, K // group_size)).astype(np.float32)
    zero = 2 ** (bits - 1)
    wide = [np.array(a.astype(mx.float32)).astype(np.float64) for a in (scales, biases)]
    s, b = (np.repeat(a, group_size, 1) for a in wide)
    value, size = s * (signed + zero) + b, s * (np.abs(signed) + zero) + np.abs(b)
    by = np.repeat(x_scales, group_size, 1) if tiled else x_scales[:, None]
    rows_ = x.astype(np.float64) * by
    arguments = (mx.array(x), mx.array(x_scales), words, scales, biases, group_size, bits, False, dtype)
    with device.on():
        y = device.module.q8mm(*arguments)
        mx.eval(y)
    assert device.ran() == [kernel]
    assert device.dispatches[0].arguments.split(", ")[3] == ("2" if tiled else "1")
    close(y, rows_ @ value.T, np.abs(rows_) @ size.T, dtype)
    there = native._load()[0].q8mm(*arguments)
    assert y.dtype == there.dtype
    close(y, np.array(there.astype(mx.float32)).astype(np.float64), np.abs(rows_) @ size.T, dtype)


def test_a_group_of_int8_products_is_summed_before_it_is_scaled(device):
    """Two products of 16129 and -16129 cancel in integers; scaled one by one they would leave a rounding."""
    K, group_size = 256, 64
    x = np.zeros((9, K), np.int8)
    x[:, ::2], x[:, 1::2] = 127, -127
    words = mx.array(fm.pack(np.full((3, K), 255, np.uint8), 8))
    scales = mx.full((3, 4), 1 / 3)
    x_scales = mx.array(np.random.default_rng(2).uniform(0.1, 1, (9, 4)).astype(np.float32))
    for M in (1, 9):
        for by in (x_scales[:M, 0], x_scales[:M]):
            with device.on():
                y = device.module.q8mm(
                    mx.array(x[:M]), by, words, scales, -128 * scales, group_size, 8, False, "float32"
                )
                mx.eval(y)
            assert not np.array(y).any()


def test_int8_tiles_of_cubes_views_and_lanes_are_those_of_the_rows(device):
    parts, _ = symmetric(38, 21, 96, 8, 32, False)
    x, _ = codes_and_scales(39, 12, 96)
    x_scales = np.random.default_rng(4).uniform(0.01, 1, (12, 3)).astype(np.float32)

    def product(x, x_scales):
        return device.module.q8mm(x, x_scales, *parts, 32, 8, False, "float32")

    cube = [mx.array(a.reshape(3, 4, -1)) for a in (x, x_scales)]
    with device.on():
        flat = np.array(product(mx.array(x), mx.array(x_scales)))
        whole = np.array(product(*cube))
        lanes = np.array(mx.vmap(product, in_axes=(1, 1))(*cube))
        strided = np.array(product(mx.array(x)[::2], mx.array(x_scales.T.copy()).T[::2]))
        none = product(mx.zeros((0, 96), mx.int8), mx.zeros((0, 3)))
        mx.eval(none)
    assert device.ran() == ["q8_mm"] * 3 + ["q8_mv"]
    np.testing.assert_array_equal(whole.reshape(12, 21), flat)
    np.testing.assert_array_equal(lanes, flat.reshape(3, 4, 21).swapaxes(0, 1))
    np.testing.assert_allclose(strided, flat[::2], rtol=1e-5, atol=1e-4)
    assert none.shape == (0, 21)


def test_tiles_of_a_row_become_int8_codes_with_the_bits_of_the_cpu(device):
    floats = rows(37, (5, 384), "float32")[0]
    for group_size in (32, 64, 128):
        with device.on():
            made = device.module.q8_rows(floats, group_size)
            mx.eval(*made)
        assert device.ran() == ["q8_rows"]
        for ours, theirs in zip(made, native._load()[0].q8_rows(floats, group_size), strict=True):
            np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_rows_become_int8_codes_with_the_bits_of_the_cpu(device):
    cpu = native._load()[0]
    for dtype in ("float32", "float16", "bfloat16"):
        x = rows(34, (5, 132), dtype)[0]
        x[2] = 0
        with device.on():
            codes, scales = device.module.q8_rows(x)
            odd, odd_scales = device.module.q8_rows(x[:, :131])
            mx.eval(codes, scales, odd, odd_scales)
        assert device.ran() == ["q8_rows"]  # 131 is no multiple of 4: MLX's own operations
        for got, view in (((codes, scales), x), ((odd, odd_scales), x[:, :131])):
            for ours, theirs in zip(got, cpu.q8_rows(view), strict=True):
                np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_int8_codes_that_begin_inside_a_word_are_moved_or_refused(device):
    parts, _ = symmetric(35, 9, 64, 8, 64, True)
    x, x_scales = codes_and_scales(36, 4, 64)
    flat = mx.array(np.concatenate([np.zeros(1, np.int8), x.reshape(-1)]))
    mx.eval(flat)
    call = (mx.array(x_scales), *parts, 64, 8, True, "float32")
    want = native._load()[0].q8mm(mx.array(x), *call)
    view = flat[1:].reshape(4, 64)
    mx.eval(view, want)
    with device.on():
        y = device.module.q8mm(view, *call)
        mx.eval(y)
    assert mx.array_equal(y, want)
    with pytest.raises(RuntimeError, match="x_codes begin at byte 1 of their buffer"), device.on():
        mx.eval(device.module.q8mm(flat[1:].reshape(4, 64), *call))


# ---- quantizing --------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_device(device, monkeypatch):
    """mlxq.ops through the fake device."""
    monkeypatch.setattr(native, "_ext", lambda: device.module)
    return device


@pytest.mark.parametrize(
    "bits, group_size, dtype, storage",
    [(4, 64, "float32", "float16"), (2, 32, "bfloat16", "bfloat16"), (8, 128, "float16", "float32")],
)
def test_quantizing_and_back_on_the_gpu_gives_the_bits_of_the_format(
    on_the_device, bits, group_size, dtype, storage
):
    from mlxq import ops

    fmt = fm.Format(bits, group_size)
    w, _ = rows(40, (2, 9, 2 * group_size), dtype)
    w[1, 3] = 0
    host = np.array(w.astype(mx.float32))
    want = fm.quantize(host, fmt, scale_dtype=storage)
    with on_the_device.on() as device:
        packed = ops.quantize(w, fmt, scale_dtype=storage)
        back = ops.dequantize(packed, dtype)
        strided = ops.quantize(w.swapaxes(0, 1), fmt, scale_dtype=storage)
        mx.eval(packed.words, packed.scales, packed.biases, back, strided.words)
    assert sorted(device.ran()) == ["dequantize", "quantize", "quantize"]
    np.testing.assert_array_equal(np.array(packed.words), want.words)
    np.testing.assert_array_equal(np.array(strided.words), want.words.swapaxes(0, 1))
    for got, wanted in ((packed.scales, want.scales), (packed.biases, want.biases)):
        assert got.dtype == getattr(mx, storage)
        np.testing.assert_array_equal(np.array(got.astype(mx.float32)), wanted.astype(np.float32))
    stored = mx.array(fm.dequantize(want).astype(np.float32)).astype(getattr(mx, dtype))
    assert back.dtype == stored.dtype and mx.array_equal(back, stored)


def test_the_gpu_refuses_the_weights_that_the_cpu_refuses(on_the_device):
    from mlxq import ops

    bad, far = mx.ones((4, 64)), mx.ones((4, 64))
    bad[2, 5], far[1, 0] = float("nan"), 1e9
    with on_the_device.on() as device:
        with pytest.raises(ValueError, match="NaN"):
            ops.quantize(bad, fm.Format(4, 64))
        with pytest.raises(ValueError, match="float16"):
            ops.quantize(far, fm.Format(4, 64), scale_dtype="float16")
        with pytest.raises(ValueError, match="K=64"):
            ops.quantize(bad, fm.Format(4, 128))
    assert device.ran() == ["quantize", "quantize"]


def test_what_the_shaders_do_not_serve_is_quantized_as_on_the_cpu(on_the_device):
    """Widths without kernels, the rule of MLX, and the gradient of a dequantized weight."""
    from mlxq import ops

    w, _ = rows(41, (5, 64))
    with on_the_device.on() as device:
        for fmt, rule in ((fm.Format(3, 64), "affine"), (fm.Format(4, 64), "mlx")):
            packed, want = ops.quantize(w, fmt, rule), fm.quantize(np.array(w), fmt, rule)
            np.testing.assert_array_equal(np.array(packed.words), want.words)
        gradient = mx.grad(lambda s: ops.dequantize(fm.Packed(packed.words, s, packed.biases, fmt)).sum())(
            packed.scales
        )
        mx.eval(gradient)
    assert device.ran() == []
    codes = fm.unpack(np.array(packed.words), 4, 64)
    np.testing.assert_array_equal(np.array(gradient)[:, 0], codes.sum(-1))


# ---- the table ---------------------------------------------------------------------------------------------

SHAPES = [(1, 4096, 4096), (5, 14336, 4096), (6, 4096, 14336), (8, 100, 64), (12, 512, 4096), (33, 96, 8192),
          (512, 4096, 4096), (2048, 32, 128), (1, 8, 32768), (7, 65536, 1024)]  # fmt: skip
EXPERTS = [
    {},
    {"gather": True, "blocks": 6, "experts": 4},
    {"gather": True, "sorted": True, "blocks": 64, "experts": 4},
]
GPUS = [("applegpu_g13g", 13), ("applegpu_g14d", 14), ("applegpu_g15s", 15), ("applegpu_g16p", 16),
        ("applegpu_g16c", 16), ("applegpu_g18g", 18), ("", 0)]  # fmt: skip


def test_every_choice_is_an_instantiation_of_the_shaders_table(device):
    """The grid, the threads and the template arguments are those that shaders/kernels.json names."""
    seen = set()
    for architecture, generation in GPUS:
        with device.on(architecture, generation):
            for M, N, K in SHAPES:
                for transpose in (True, False):
                    for experts in EXPERTS:
                        if experts and M * experts["blocks"] > 2**20:
                            continue
                        choice = device.module.metal_choice(
                            transpose, 4, 64, "bfloat16", "float16", M, N, K, **experts
                        )
                        seen.add(choice["kernel"])
                        check_choice(choice, M, N, K, experts)
    assert seen == {name for name in KERNELS if not name.startswith(("quantize", "dequantize", "q8"))} - {
        "sum_splits",
        "schedule_tiles",
    }


def check_choice(choice, M, N, K, experts):
    row = KERNELS[choice["kernel"]]
    arguments = [int(a) if a.isdigit() else a for a in choice["arguments"].split(", ")]
    given = dict(zip(row["template"], arguments, strict=True))
    assert (given["T"], given["S"], given["bits"], given["group_size"]) == ("bfloat", "half", 4, 64)
    if "M" in given:
        assert given["M"] == M and M in row["values"]["M"]
    else:
        assert tuple(given[n] for n in ("BM", "BN", "WM", "WN")) in TILES
    blocks = experts.get("blocks", 1)
    scalars = {"M": M, "N": N, "K": K, "span": choice["span"], "B": blocks, "tiles": choice["tiles"]}
    if choice["span"]:
        inner, unit = (K, 64) if choice["kernel"] == "qmm_split" else (N, 32)
        assert choice["span"] % unit == 0 and 512 <= choice["span"] < inner
    if choice["tiles"]:
        assert choice["tiles"] == -(-M * blocks // given["BM"]) + min(experts["experts"], blocks)
    assert (choice["grid"], choice["threads"]) == geometry(choice["kernel"], tuple(arguments), scalars)


@pytest.mark.parametrize(
    "architecture, generation, macos, ours",
    [
        ("applegpu_g17g", 17, "26.2", False),
        ("applegpu_g17s", 17, "27.0", False),
        ("applegpu_g17g", 17, "26.1", True),  # the system that has no matrix-unit kernels
        ("applegpu_g17p", 17, "26.2", True),  # a phone of that generation has no matrix units
        ("applegpu_g18p", 18, "26.2", False),
        ("applegpu_g16s", 16, "26.2", True),
    ],
)
def test_gpus_with_matrix_units_prefill_on_stock_mlx(device, architecture, generation, macos, ours):
    parts, dense = weight(18, (40, 64), fm.Format(4, 64))
    for M, kernels in ((1, ["qmv"]), (20, ["qmm"] if ours else [])):
        x, exact = rows(19, (M, 64))
        with device.on(architecture, generation, macos):
            assert device.module.metal_status()["nax"] is not ours
            y = device.module.qmm(x, *parts, True, 64, 4)
            mx.eval(y)
        assert device.ran() == kernels
        close(y, exact @ dense.T, np.abs(exact) @ np.abs(dense.T))


def test_the_status_counts_what_ran(device):
    parts, _ = weight(20, (40, 64), fm.Format(4, 64))
    with device.on():
        before = device.module.metal_status()["kernels"].get("mlxq_qmv_float_float_4_64_2", 0)
        for _ in range(3):
            mx.eval(device.module.qmm(mx.ones((2, 64)), *parts, True, 64, 4))
        status = device.module.metal_status()
    assert status["kernels"]["mlxq_qmv_float_float_4_64_2"] == before + 3
    assert (status["architecture"], status["generation"], status["error"]) == ("applegpu_g15s", 15, None)
    assert device.module.metal_status() is None  # no Metal, no status


# ---- when Metal's compiler refuses -------------------------------------------------------------------------


def run_alone(program: str) -> dict:
    """The answer of a program that runs in its own process: a refusal lasts as long as the process."""
    head = "import json, warnings\nimport mlx.core as mx\nfrom metal import Device\ndevice = Device()\n"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_refused_kernel_gives_one_warning_and_stock_mlx_from_then_on(device):
    answer = run_alone("""
        device.refusal = "program_source:7:12: error: unknown type name 'bfloat'\\nprogram_source:9: note: x"
        w = mx.quantize(mx.random.normal((40, 64)), 64, 4)
        x = mx.random.normal((3, 64))
        said = []
        with device.on(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = device.module.qmm(x, *w, True, 64, 4)
            second = device.module.qmm(mx.random.normal((30, 64)), *w, True, 64, 4)
            gradient = mx.grad(lambda x: device.module.qmm(x, *w, True, 64, 4).sum())(x)
            experts = [a[None] for a in w]
            third = device.module.gather_qmm(x[None], *experts, None, None, True, 64, 4, False)
            mx.eval(first, second, gradient, third)
            status = device.module.metal_status()
        exact = mx.quantized_matmul(x, *w, True, 64, 4)
        print(json.dumps({
            "warnings": [str(w.message) for w in caught], "category": caught[0].category.__name__,
            "ran": device.ran(), "error": status["error"], "kernels": status["kernels"],
            "equal": [bool(mx.all(first == exact)), bool(mx.all(third[0] == exact))],
        }))
    """)
    name = "mlxq_qmv_float_float_4_64_3"
    line = f"{name}: program_source:7:12: error: unknown type name 'bfloat'"
    assert answer["warnings"] == [
        f"Metal did not compile mlxq's kernel {line}. "
        "Stock MLX operations are used from now on; mlxq doctor says more."
    ]
    assert answer["category"] == "RuntimeWarning"
    assert answer["error"] == line
    assert answer["ran"] == [] and answer["kernels"] == {}
    assert answer["equal"] == [True, True]


def test_kernels_compiled_before_a_refusal_finish_their_graphs(device):
    answer = run_alone("""
        w = mx.quantize(mx.random.normal((40, 64)), 64, 4)
        x = mx.random.normal((3, 64))
        with device.on():
            early = device.module.qmm(x, *w, True, 64, 4)
            device.refusal = "program_source:1:1: error: no"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                late = device.module.qmm(mx.random.normal((30, 64)), *w, True, 64, 4)
            mx.eval(early, late)
        exact = mx.quantized_matmul(x, *w, True, 64, 4)
        print(json.dumps({"ran": device.ran(), "error": float(mx.max(mx.abs(early - exact)))}))
    """)
    assert answer["ran"] == ["qmv"]
    assert answer["error"] < 1e-4


def test_a_kernel_that_gets_too_few_threads_is_refused(device):
    answer = run_alone("""
        w = mx.quantize(mx.random.normal((40, 64)), 64, 4)
        device.library.mlxq_fake_most_threads(64)
        with device.on(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mx.eval(device.module.qmm(mx.random.normal((1, 64)), *w, True, 64, 4))
            mx.eval(device.module.qmm(mx.random.normal((9, 64)), *w, True, 64, 4))
            print(json.dumps({"ran": device.ran(), "error": device.module.metal_status()["error"]}))
    """)
    assert answer["ran"] == ["qmv"]
    assert "needs threadgroups of 128 threads and this GPU runs it with at most 64" in answer["error"]


def test_doctor_runs_the_metal_kernels_and_is_1_when_they_were_refused(device):
    answer = run_alone("""
        from mlxq import doctor, format, ops
        from mlxq.ops import native
        native._load = lambda: (device.module, None)
        native._ext = lambda: device.module
        format.GROUP_SIZES, format.KERNEL_BITS = (64,), (4,)
        with device.on("applegpu_g17s", 17, "26.2"):
            units = doctor._metal(ops)[1]
        prefill = sorted(set(device.ran()))
        with device.on():
            cases, doctor._metal_cases = doctor._metal_cases, lambda: []
            bare = doctor._metal(ops)[1]
            doctor._metal_cases = cases
            fine = doctor._metal(ops)[1] + [doctor._devices(mx, ops)["GPU streams of MLX"]]
            ran = set(device.ran())
            fine.append(doctor._differing_bits(ops))
            right, format.quantize = format.quantize, lambda w, *how: right(w + 1e-3, *how)
            fine.append(doctor._differing_bits(ops))
            format.quantize = right
        device.refusal = "program_source:3:5: error: no such thing"
        with device.on(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ops.qmm(mx.ones((5, 64)), ops.quantize(mx.ones((8, 64)), format.Format(4, 64)))
            bad = doctor._metal(ops)[1] + [doctor._devices(mx, ops)["GPU streams of MLX"]]
        print(json.dumps([fine, bad, sorted(ran), units, prefill, bare]))
    """)
    fine, bad, ran, units, prefill, bare = answer
    assert ran == sorted(KERNELS), "a Mac owner's one command runs every kernel that there is"
    # Here stock MLX is its CPU operation, which sums float16 in float16: only what was reached counts.
    assert [check["name"] for check in units] == ["Metal kernels", "Metal bits"]
    assert not {"qmm", "qmm_n", "gather_qmm"} & set(prefill)
    idle = "qvm_split, sum_splits, qmm_split, qmm_n_split, gather_qmm, gather_qmm_n, gather_qmm_sorted, "
    detail = f"no case reached {idle}gather_qmm_n_sorted, schedule_tiles"
    assert bare[2] == {"name": "Metal coverage", "ok": False, "detail": detail}
    assert fine[0]["ok"] and fine[0]["name"] == "Metal kernels" and len(fine) == 2 + 3
    assert " kernels on applegpu_g15s" in fine[0]["detail"]
    assert fine[1]["ok"] and fine[1]["name"] == "Metal bits"
    assert fine[2] == "mlxq's Metal shaders"
    assert fine[3:] == [[], ["quantize 4-bit/64", "dequantize 4-bit/64"]]
    reason = "mlxq_qmv_float_float_4_64_5: program_source:3:5: error: no such thing"
    assert bad == [{"name": "Metal kernels", "ok": False, "detail": reason}, f"stock MLX: {reason}"]


# ---- the embedded text -------------------------------------------------------------------------------------


def test_the_embedded_text_is_the_shader_with_its_includes(tmp_path):
    sys.path.insert(0, str(ROOT / "metal"))
    import embed_shaders

    for path in sorted(SHADERS.glob("*.metal")):
        text = embed_shaders.flatten(path)
        assert '#include "' not in text and "#pragma once" not in text
        assert set(source.kernels(text)) == set(source.kernels(source.flatten(path))) != set()
    (tmp_path / "bad.metal").write_text("// caf\u00e9\n")
    with pytest.raises(ValueError, match=r"bad.metal:1: a shader must be ASCII"):
        embed_shaders.flatten(tmp_path / "bad.metal")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about the build for Linux")
def test_the_linux_build_has_no_metal():
    assert native._load()[0].metal_status() is None
    assert not hasattr(native._load()[0], "metal_choice")


# ---- on a Mac ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Metal GPU")
@pytest.mark.parametrize("transpose, M, N, K, fmt, dtype, scales, kernels", PRODUCTS)
def test_a_metal_gpu_equals_float64(transpose, M, N, K, fmt, dtype, scales, kernels):
    parts, dense = weight(1, (N, K), fm.Format(*fmt), scales)
    x, x_exact = rows(2, (M, K if transpose else N), dtype)
    matrix = dense.T if transpose else dense
    module = native._load()[0]
    with mx.stream(mx.gpu):
        y = module.qmm(x, *parts, transpose, fmt[1], fmt[0])
        mx.eval(y)
    status = module.metal_status()
    assert status["error"] is None
    size = np.abs(x_exact) @ np.abs(matrix)
    if status["nax"] and M > 8 and dtype == "float32":  # stock MLX, whose matrix units round float32 to TF32
        size = size * (2.0**-10 / SUM_ERROR)
    close(y, x_exact @ matrix, size, dtype)
