"""The harness for Metal shaders catches every defect that it claims to, and gives what the language says."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

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
        planted.run("writes_const", {0: np.zeros(4, np.float32), 1: np.zeros(4, np.float32)}, (1, 1, 1), (1, 1, 1))
    assert caught.value.buffer == 0


def test_an_uninitialised_private_variable_shows(planted):
    y = np.zeros(1, np.float32)
    planted.run("private_uninitialised", {0: y, 1: np.int32(4)}, (1, 1, 1), (1, 1, 1))
    assert y[0] == 4
    planted.run("private_uninitialised", {0: y, 1: np.int32(3)}, (1, 1, 1), (1, 1, 1))
    assert not abs(y[0]) < 1e30
