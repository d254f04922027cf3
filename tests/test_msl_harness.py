"""The harness for Metal shaders catches every defect that it claims to, and gives what the language says."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "msl")]  # tools/ is no installed package

import mlx_kernels  # noqa: E402

from tools.msl import harness  # noqa: E402

PLANTED = ROOT / "tests" / "msl" / "planted.metal"
N, K = 6, 96
SEEDS = range(4)


@pytest.fixture(scope="session")
def planted():
    entries = [("row_sums", str(defect)) for defect in range(13)]
    entries += [("divergent_on_one_line", ""), ("early_return", ""), ("large", "8192"), ("large", "8193")]
    entries += [("turn", "true"), ("turn", "false"), ("count", "true"), ("count", "false")]
    entries += [("arithmetic", str(defect)) for defect in range(5)]
    entries += [("writes_const", ""), ("private_uninitialised", "")]
    return harness.compile(PLANTED, entries)


def row_sums(lib, defect, seed=0, count=False):
    """(output, what it must be) of one run of the planted kernel."""
    x = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
    y = np.full(N, np.nan, np.float32)
    buffers = {0: x, 1: y, 2: np.int32(K), 3: np.int32(N)}
    lib.run(f"row_sums<{defect}>", buffers, (N, 1, 1), (64, 1, 1), seed=seed, count=count)
    return y, x.astype(np.float64).sum(1)


def is_right(y, answer):
    return np.allclose(y, answer, rtol=0, atol=K * 2.0**-24 * 4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [False, True])
def test_a_right_kernel_is_right_in_every_order_of_lanes(planted, seed, count):
    assert is_right(*row_sums(planted, 0, seed, count))


def test_the_wrong_group_index_gives_wrong_numbers(planted):
    y, answer = row_sums(planted, 1)
    assert not is_right(y, answer)
    assert is_right(y[:1], answer[:1]) and np.isnan(y[1:]).all()


@pytest.mark.parametrize("defect, buffer, seeds, count", [
    (2, 0, (0, 2), False), (2, 0, SEEDS, True),    # read past x
    (10, 1, SEEDS, False), (10, 1, SEEDS, True),   # write past y
    (12, 1, (0, 1), False), (12, 1, (0, 1), True),  # write before y
])  # fmt: skip
def test_a_device_access_out_of_bounds_names_its_buffer(planted, defect, buffer, seeds, count):
    for seed in seeds:
        with pytest.raises(harness.OutOfBounds if defect != 12 else harness.Defect) as caught:
            row_sums(planted, defect, seed, count)
        if defect != 12 or isinstance(caught.value, harness.OutOfBounds):
            assert caught.value.buffer == buffer
            assert f"buffer {buffer}" in str(caught.value)


@pytest.mark.parametrize("defect, line", [(3, "lane < 16"), (4, "simdgroup == 0")])
@pytest.mark.parametrize("count", [False, True])
def test_a_divergent_barrier_is_named_with_its_line(planted, defect, line, count):
    number = next(i for i, text in enumerate(PLANTED.read_text().splitlines(), 1) if f"if ({line})" in text)
    for seed in SEEDS:
        with pytest.raises(harness.DivergentBarrier, match=rf"planted\.metal:{number}:"):
            row_sums(planted, defect, seed, count)


def test_two_operations_on_one_line_are_told_apart(planted):
    with pytest.raises(harness.DivergentBarrier, match="simd_sum"):
        planted.run("divergent_on_one_line", {0: np.zeros(32, np.float32)}, (1, 1, 1), (32, 1, 1))


def test_a_lane_that_returned_misses_from_an_operation(planted):
    y = np.zeros(32, np.float32)
    planted.run("early_return", {0: y, 1: np.int32(32)}, (1, 1, 1), (32, 1, 1))
    assert (y == 32).all()
    with pytest.raises(harness.DivergentBarrier, match="returned"):
        planted.run("early_return", {0: y, 1: np.int32(31)}, (1, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("count", [False, True])
def test_threadgroup_memory_over_32_kib_is_refused(planted, count):
    y = np.zeros(32, np.float32)
    assert planted.run("large<8192>", {0: y}, (1, 1, 1), (32, 1, 1), count=count).threadgroup_bytes == 32768
    with pytest.raises(harness.ThreadgroupMemoryTooLarge, match="tile"):
        planted.run("large<8193>", {0: y}, (1, 1, 1), (32, 1, 1), count=count)


def test_an_uninitialised_threadgroup_read_is_a_nan_and_traced_by_name(planted):
    y, _ = row_sums(planted, 5)
    assert np.isnan(y).all()
    with pytest.raises(harness.UninitialisedRead, match="parts byte 4"):
        row_sums(planted, 5, count=True)


@pytest.mark.parametrize("defect", [6, 7, 8])
def test_a_missing_or_weak_barrier_is_a_race_in_every_order(planted, defect):
    for seed in SEEDS:
        with pytest.raises((harness.Race, harness.UninitialisedRead), match="parts"):
            row_sums(planted, defect, seed, count=True)


@pytest.mark.parametrize("defect", [6, 8])
def test_some_order_of_simdgroups_makes_a_missing_barrier_wrong_without_tracing(planted, defect):
    assert not all(is_right(*row_sums(planted, defect, seed)) for seed in SEEDS)


def test_two_lanes_that_write_one_element_race(planted):
    with pytest.raises(harness.Race) as caught:
        row_sums(planted, 11, count=True)
    assert caught.value.buffer == 1
    row_sums(planted, 11)  # unseen where nothing is traced


@pytest.mark.parametrize("count", [False, True])
def test_a_threadgroup_array_has_bounds(planted, count):
    if not count:  # the word behind it is NaN
        assert np.isnan(row_sums(planted, 9)[0]).all()
        return
    with pytest.raises(harness.OutOfBounds) as caught:
        row_sums(planted, 9, count=True)
    assert caught.value.buffer is None


def test_matrix_elements_of_other_lanes_need_a_barrier(planted):
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    y = np.zeros((8, 8), np.float32)
    for seed in SEEDS:
        planted.run("turn<true>", {0: x, 1: y}, (1, 1, 1), (32, 1, 1), seed=seed, count=True)
        np.testing.assert_array_equal(y, x.T)
    with pytest.raises(harness.Race, match="tile"):
        planted.run("turn<false>", {0: x, 1: y}, (1, 1, 1), (32, 1, 1), seed=0, count=True)


def test_threadgroups_race_on_device_memory_unless_they_are_atomic(planted):
    total, plain = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    planted.run("count<true>", {0: total, 1: plain}, (5, 1, 1), (64, 1, 1), count=True)
    assert total[0] == 5 * 64
    with pytest.raises(harness.Race) as caught:
        planted.run("count<false>", {0: total, 1: plain}, (5, 1, 1), (1, 1, 1), count=True)
    assert caught.value.buffer == 1 and "another threadgroup" in str(caught.value)


@pytest.mark.parametrize("defect, n, error", [
    (0, 2, harness.Misaligned), (1, 32, harness.UndefinedBehaviour), (2, 1, harness.UndefinedBehaviour),
    (3, 4, harness.OutOfBounds),
])  # fmt: skip
def test_arithmetic_that_the_language_leaves_open_is_named_with_its_line(planted, defect, n, error):
    buffers = {0: np.zeros(16, np.uint8), 1: np.zeros(1, np.int32), 2: np.int32(n)}
    with pytest.raises(error, match=r"planted\.metal:\d+"):
        planted.run(f"arithmetic<{defect}>", buffers, (1, 1, 1), (1, 1, 1), count=True)
    buffers[2] = np.int32(0)
    planted.run(f"arithmetic<{defect}>", buffers, (1, 1, 1), (1, 1, 1), count=True)


def test_a_kernel_that_never_ends_is_stopped(planted):
    buffers = {0: np.zeros(16, np.uint8), 1: np.zeros(1, np.int32), 2: np.int32(0)}
    with pytest.raises(harness.TimeLimit):
        planted.run("arithmetic<4>", buffers, (1, 1, 1), (1, 1, 1), seconds=0.2)


def test_a_const_buffer_cannot_be_written(planted):
    with pytest.raises(harness.OutOfBounds, match="const") as caught:
        x, y = np.zeros((2, 4), np.float32)
        planted.run("writes_const", {0: x, 1: y}, (1, 1, 1), (1, 1, 1))
    assert caught.value.buffer == 0


def test_an_uninitialised_private_variable_shows(planted):
    y = np.zeros(1, np.float32)
    planted.run("private_uninitialised", {0: y, 1: np.int32(4)}, (1, 1, 1), (1, 1, 1))
    assert y[0] == 4
    planted.run("private_uninitialised", {0: y, 1: np.int32(3)}, (1, 1, 1), (1, 1, 1))
    assert not abs(y[0]) < 1e30


# ---- MLX's own kernels ------------------------------------------------------------------------------------

TYPES = {"float": np.float32, "half": np.float16, "bfloat": np.uint16}
UNIT = {"float": 2.0**-24, "half": 2.0**-11, "bfloat": 2.0**-8}  # relative error of one rounding


def to_bfloat(x):
    """float32 -> bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_type(x, name):
    return to_bfloat(x) if name == "bfloat" else np.ascontiguousarray(x, TYPES[name])


def value(x, name):
    return (x.astype(np.uint32) << 16).view(np.float32) if name == "bfloat" else x


def affine(bits, name, n, k, group_size=64):
    """Random words, scales and biases in a type, and the weights in float64."""
    random = np.random.default_rng(bits)
    words = random.integers(0, 2**32, (n, k * bits // 32), dtype=np.uint32)
    scales = as_type(random.uniform(0.5, 1.5, (n, k // group_size)) / 2**bits, name)
    biases = as_type(random.normal(size=(n, k // group_size)), name)
    codes = (words[..., None] >> (bits * np.arange(32 // bits, dtype=np.uint32))) & (2**bits - 1)
    s, b = (np.repeat(value(a, name).astype(np.float64), group_size, 1) for a in (scales, biases))
    return words, scales, biases, s * codes.reshape(n, k) + b


MLX_ENTRIES = [
    (kernel, f"{name}, 64, {bits}, {flags}")
    for kernel, flags in (("affine_qmv_fast", "false"), ("affine_qmm_t", "false, false"))
    for bits in (2, 4, 8)
    for name in TYPES
]


@pytest.fixture(scope="session")
def mlx():
    if isinstance(mlx_kernels.wheel(), str):
        pytest.skip(mlx_kernels.wheel())
    return mlx_kernels.quantized(MLX_ENTRIES)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_qmv_fast_on_the_harness_multiplies(mlx, bits, name):
    m, n, k = 2, 16, 1024
    words, scales, biases, weights = affine(bits, name, n, k)
    x = as_type(np.random.default_rng(9).normal(size=(m, k)), name)
    y = as_type(np.full((m, n), np.nan), name)
    buffers = {0: words, 1: scales, 2: biases, 3: x, 4: y, 5: np.int32(k), 6: np.int32(n)}
    answer = value(x, name).astype(np.float64) @ weights.T
    # A product of size |x| |w| is rounded a few times in float32, and so is each partial sum; half and bfloat
    # round sums of up to eight x for the bias as well, and the output once.
    bound = 8 * 2.0**-24 * np.sqrt(k) + (0 if name == "float" else 2 * UNIT[name] / np.sqrt(k) * 8)
    size = np.abs(value(x, name).astype(np.float64)) @ np.abs(weights).T
    buffers |= mlx_kernels.no_batch(7)
    entry = f"affine_qmv_fast<{name},64,{bits},false>"
    for seed in range(2):
        mlx.run(entry, buffers, (m, n // 8, 1), (32, 2, 1), seed=seed)
        assert (np.abs(value(y, name) - answer) <= bound * size + UNIT[name] * np.abs(answer)).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_qmm_t_on_the_harness_multiplies_ragged_tiles(mlx, bits, name):
    m, n, k = 40, 70, 128
    words, scales, biases, weights = affine(bits, name, n, k)
    x = as_type(np.random.default_rng(9).normal(size=(m, k)), name)
    y = as_type(np.full((m, n), np.nan), name)
    buffers = {0: words, 1: scales, 2: biases, 3: x, 4: y, 5: np.int32(k), 6: np.int32(n), 7: np.int32(m)}
    answer = value(x, name).astype(np.float64) @ weights.T
    # MLX rounds the weights to the type of x before it multiplies.
    bound = 8 * 2.0**-24 * np.sqrt(k) + (0 if name == "float" else 2 * UNIT[name])
    size = np.abs(value(x, name).astype(np.float64)) @ np.abs(weights).T
    entry = f"affine_qmm_t<{name},64,{bits},false,false>"
    for seed in range(3):
        mlx.run(entry, buffers | mlx_kernels.no_batch(8), (3, 2, 1), (32, 2, 2), seed=seed)
        assert (np.abs(value(y, name) - answer) <= bound * size + UNIT[name] * np.abs(answer)).all()


def test_mlx_kernels_load_what_their_source_says_and_have_no_defect(mlx):
    """affine_qmv_fast, half, 4 bits, one row of x: a lane's 16 codes, scale and bias, x for four outputs."""
    n, k, name = 16, 1024, "half"
    words, scales, biases, _ = affine(4, name, n, k)
    x, y = np.ones((1, k), np.float16), np.zeros((1, n), np.float16)
    buffers = {0: words, 1: scales, 2: biases, 3: x, 4: y, 5: np.int32(k), 6: np.int32(n)}
    buffers |= mlx_kernels.no_batch(7)
    entry = f"affine_qmv_fast<{name},64,4,false>"
    device = mlx.run(entry, buffers, (1, n // 8, 1), (32, 2, 1), count=True).device_bytes
    assert device[0]["read"] == device[0]["read_once"] == n * k // 2
    assert device[1]["read"] == device[2]["read"] == n * k // 16 * 2
    assert device[1]["read_by_simdgroup"] == n * k // 64 * 2
    assert device[3]["read"] == n // 4 * k * 2
    assert device[4]["written"] == n * 2


def test_mlx_quantized_matmul_and_its_kernel_agree(mlx):
    import mlx.core as mx

    m, n, k = 33, 64, 128
    words, scales, biases, _ = affine(4, "float", n, k)
    x = np.random.default_rng(1).normal(size=(m, k)).astype(np.float32)
    y = np.full((m, n), np.nan, np.float32)
    buffers = {0: words, 1: scales, 2: biases, 3: x, 4: y, 5: np.int32(k), 6: np.int32(n), 7: np.int32(m)}
    mlx.run("affine_qmm_t<float,64,4,false,false>", buffers | mlx_kernels.no_batch(8), (2, 2, 1), (32, 2, 2))
    arrays = [mx.array(a) for a in (x, words, scales, biases)]
    answer = np.array(mx.quantized_matmul(*arrays, transpose=True, group_size=64, bits=4))
    np.testing.assert_allclose(y, answer, rtol=0, atol=2e-6 * np.abs(answer).max())
