"""The harness for Metal shaders catches every defect that it claims to, and gives what the language says."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "msl")]  # tools/ is no installed package

import mlx_kernels  # noqa: E402

from tools.msl import harness  # noqa: E402

pytestmark = pytest.mark.skipif(harness.absent() is not None, reason=str(harness.absent()))
PLANTED = ROOT / "tests" / "msl" / "planted.metal"
LANGUAGE = ROOT / "tests" / "msl" / "language.metal"
N, K = 6, 96
SEEDS = range(4)


@pytest.fixture(scope="session")
def planted():
    entries = [("row_sums", str(defect)) for defect in range(13)]
    entries += [("divergent_on_one_line", ""), ("early_return", ""), ("large", "8192"), ("large", "8193")]
    entries += [("turn", "true"), ("turn", "false"), ("count", "true"), ("count", "false")]
    entries += [("arithmetic", str(defect)) for defect in range(5)]
    entries += [("writes_const", ""), ("private_uninitialised", ""), ("order", "")]
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


@pytest.mark.parametrize("what, said", [("Darwin", "for Linux, and this is Darwin"), ("pages", "16384")])
def test_a_machine_that_cannot_run_it_is_told_in_one_sentence(monkeypatch, what, said):
    if what == "pages":
        monkeypatch.setattr(harness.os, "sysconf", lambda name: 16384)
    else:
        monkeypatch.setattr(harness.platform, "system", lambda: what)
    with pytest.raises(harness.CompileError, match=said):
        harness.compile(PLANTED, [("order", "")])


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


def test_seeds_change_the_order_of_lanes_simdgroups_and_threadgroups(planted):
    logs = {}
    for seed in range(6):
        log = np.zeros((2, 4 * 3, 32), np.uint32)  # threadgroup, turn of a simdgroup, lane
        planted.run("order", {0: np.zeros(1, np.uint32), 1: log}, (2, 1, 1), (128, 1, 1), seed=seed)
        assert np.bincount(log.ravel(), minlength=256).tolist() == [3] * 256
        assert (log // 32 == (log // 32)[:, :, :1]).all()  # a simdgroup's lanes run together
        logs[seed] = log
    ascending = np.arange(256, dtype=np.uint32).reshape(2, 4, 1, 32).repeat(3, 2).reshape(2, 12, 32)
    np.testing.assert_array_equal(logs[0], ascending)
    np.testing.assert_array_equal(logs[1], ascending[::-1, ::-1, ::-1])
    random = [logs[seed] for seed in range(2, 6)]
    assert len({log.tobytes() for log in random}) == 4
    assert {int(log[0, 0, 0] // 128) for log in random} == {0, 1}  # threadgroups
    for log in random:
        simdgroup = log[0, :, 0] // 32
        assert (np.diff(simdgroup) != 0).sum() > 3  # they take turns
        assert not (np.diff(log.astype(np.int64)) == 1).all(-1).any()  # nor are lanes in order


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


# ---- MLX's own kernels -----------------------------------------------------------------------------------

TYPES = {"float": np.float32, "half": np.float16, "bfloat": np.uint16}
UNIT = {"float": 2.0**-24, "half": 2.0**-11, "bfloat": 2.0**-8}  # relative error of one rounding


def to_bfloat(x):
    """float32 -> bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_type(x, name):
    with np.errstate(over="ignore"):
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


# ---- the language ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def language():
    entries = [("identifiers", ""), ("constants", ""), ("vectors", "")]
    entries += [(k, t) for k in ("simd_operations", "matrices") for t in TYPES]
    entries += [("conversions", "half"), ("conversions", "bfloat")]
    return harness.compile(LANGUAGE, entries)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_thread_knows_its_place(language, seed):
    groups, threads = (2, 3, 2), (8, 3, 2)
    count = int(np.prod(groups)), int(np.prod(threads))
    out = np.full((*groups[::-1], count[1], 12), 99, np.uint32)
    language.run("identifiers", {0: out}, groups, threads, seed=seed)
    index = np.arange(count[1])
    place = np.stack([index % 8, index // 8 % 3, index // 24], -1)
    for z, y, x in np.ndindex(*groups[::-1]):
        got = out[z, y, x]
        np.testing.assert_array_equal(got[:, :3], place + np.array([x, y, z]) * threads)
        np.testing.assert_array_equal(got[:, 3:6], place)
        np.testing.assert_array_equal(got[:, 6:9], np.stack([index, index % 32, index // 32], -1))
        assert (got[:, 9:] == [2, 3, 2]).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_simdgroup_operations_give_what_metal_says(language, name, seed):
    lane = np.arange(32)
    v = np.random.default_rng(3).integers(-3, 4, 32).astype(np.float32)  # sums are exact in every type
    out = as_type(np.full((15, 32), np.nan), name)
    language.run(f"simd_operations<{name}>", {0: as_type(v, name), 1: out}, (1, 1, 1), (32, 1, 1), seed=seed)
    quads = v.reshape(8, 4)
    wanted = [
        np.full(32, v.sum()), np.full(32, v.max()), np.full(32, v.min()), v.cumsum(), v.cumsum() - v,
        np.full(32, v[5]), v[(lane * 7 + 3) % 32], v[lane ^ 6], v[np.where(lane >= 3, lane - 3, lane)],
        v[np.where(lane < 29, lane + 3, lane)], v[(lane + 3) % 32], quads.sum(1).repeat(4),
        quads[:, 2].repeat(4), np.where(lane >= 2, v[lane - 2], v[31 - (lane - 2) % 32]), np.full(32, v[0]),
    ]  # fmt: skip
    np.testing.assert_array_equal(value(out, name), wanted)


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_small_floats_convert_and_round_after_each_operation(language, name):
    """All 65536 patterns, and floats on and around the middle between two neighbours."""
    patterns = np.arange(65536, dtype=np.uint16)
    x = patterns.view(np.float16) if name == "half" else patterns
    wide = value(x, name).astype(np.float32)
    with np.errstate(all="ignore"):
        middle = (wide.astype(np.float64) + np.roll(wide, -1)) / 2
        f = np.where(np.isfinite(middle), middle, wide).astype(np.float32)
        f[::3] = np.nextafter(f[::3], np.float32(0))
        outs = {2: np.zeros(65536, np.float32), 3: np.zeros_like(x), 4: np.zeros_like(x)}
        bits = np.zeros(65536, np.uint16)
        buffers = {0: x, 1: f, **outs, 5: bits}
        language.run(f"conversions<{name}>", buffers, (256, 1, 1), (256, 1, 1))
        product = value(as_type(wide[::-1] * wide, name), name).astype(np.float32)
        total = value(as_type(wide + product, name), name)
    np.testing.assert_array_equal(outs[2], wide)
    np.testing.assert_array_equal(bits, patterns)
    number = ~np.isnan(f)
    np.testing.assert_array_equal(value(outs[3], name)[number], value(as_type(f, name), name)[number])
    number = ~np.isnan(total)
    np.testing.assert_array_equal(value(outs[4], name)[number], total[number])
    assert np.isnan(value(outs[4], name)[~number]).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_matrices_multiply_and_lie_over_the_lanes_as_in_mlx(language, name, seed):
    random = np.random.default_rng(5)
    a, b = as_type(random.normal(size=(2, 12, 9)), name)
    c = random.normal(size=(8, 8)).astype(np.float32)
    d, elements = np.zeros((8, 8), np.float32), np.zeros((32, 2), np.float32)
    buffers = {0: a, 1: b, 2: c, 3: d, 4: elements}
    language.run(f"matrices<{name}>", buffers, (1, 1, 1), (32, 1, 1), seed=seed)
    wide_a, wide_b = (value(m, name).astype(np.float64) for m in (a, b))
    answer = wide_a[:8, :8] @ wide_b[2:10, 1:9].T + c
    np.testing.assert_allclose(d, answer, rtol=0, atol=9 * 2.0**-24 * 20)
    for lane in range(32):  # MLX's get_coord
        quad = lane // 4
        row, column = (quad & 4) + lane // 2 % 4, (quad & 2) * 2 + lane % 2 * 2
        np.testing.assert_array_equal(elements[lane], c[row, column : column + 2])


def test_function_constants_are_set_for_a_run_and_may_be_missing(language):
    out = np.zeros(2, np.int32)
    language.run("constants", {0: out}, (1, 1, 1), (1, 1, 1), function_constants={0: True, 7: 12})
    assert out.tolist() == [1, 12]
    language.run("constants", {0: out}, (1, 1, 1), (1, 1, 1), function_constants={0: False})
    assert out.tolist() == [2, -5]


def test_vectors_structs_and_functions(language):
    pairs = np.array([[2, 1025], [511, 0]], np.uint32)
    shape = np.array([(3, 0.5, [1, 2, 30])], [("rows", "i4"), ("scale", "f4"), ("strides", "u4", 3)])
    out = np.zeros(9, np.float32)
    language.run("vectors", {0: pairs, 1: shape.tobytes(), 2: out}, (1, 1, 1), (1, 1, 1))
    f = np.array([1, 0, 255, 3]) * 0.5 + 1
    seven = 9 + 100 * 31 + 10000 * 3
    wanted = [*f, f @ [1, 2, 3, 4], 33, 2 + 30 + 300, seven, np.float32(2) + np.float32(0.1)]
    np.testing.assert_array_equal(out, np.array(wanted, np.float32))


# ---- the call --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, error, words", [
    ({"buffers": {3: None}}, ValueError, "has buffers [0, 1, 2, 3], given are [0, 1, 2]"),
    ({"buffers": {2: np.int64(K)}}, TypeError, "buffer 2 (row_sums's K) is int64, wanted int32"),
    ({"buffers": {2: b"12345678"}}, ValueError, "buffer 2 (K) has 8 bytes, wanted 4"),
    ({"buffers": {0: np.zeros((N, K), np.float16)}}, TypeError, "buffer 0 (row_sums's x) is float16, wanted"),
    ({"buffers": {0: np.zeros((K, N), np.float32).T}}, ValueError, "buffer 0 (x) is not contiguous"),
    ({"buffers": {1: b"1234"}}, ValueError, "buffer 1 (y) is written"),
    ({"buffers": {2: K}}, TypeError, "buffer 2 (K) is int"),
    ({"grid": (1, 0, 1)}, ValueError, "grid is (1, 0, 1)"),
    ({"threadgroup": (1024, 2, 1)}, ValueError, "2048 threads"),
    ({"entry": "row_sums<99>"}, ValueError, "row_sums<99> was not compiled"),
    ({"function_constants": {3: 1}}, ValueError, "no function constant 3"),
])  # fmt: skip
def test_a_call_that_does_not_fit_says_why(planted, change, error, words):
    buffers = {0: np.zeros((N, K), np.float32), 1: np.zeros(N, np.float32), 2: np.int32(K), 3: np.int32(N)}
    buffers |= change.pop("buffers", {})
    call = {"entry": "row_sums<0>", "grid": (N, 1, 1), "threadgroup": (64, 1, 1)} | change
    with pytest.raises(error) as caught:
        planted.run(buffers={n: b for n, b in buffers.items() if b is not None}, **call)
    assert words in str(caught.value)


def test_two_bindings_of_one_array_are_one_buffer(planted):
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    wanted = x.T.copy()
    planted.run("turn<true>", {0: x, 1: x}, (1, 1, 1), (32, 1, 1))
    np.testing.assert_array_equal(x, wanted)


def test_a_text_that_does_not_compile_is_said_with_file_and_line(tmp_path):
    text = "[[kernel]] void f(device int* y [[buffer(0)]]) { y[0] = nothing; }"
    (tmp_path / "broken.metal").write_text("\n\n" + text)
    with pytest.raises(harness.CompileError, match=r"broken\.metal:3:.*nothing"):
        harness.compile(tmp_path / "broken.metal", [("f", "")], cache_dir=tmp_path)
    with pytest.raises(ValueError, match="no kernel g; there are f"):
        harness.compile(tmp_path / "broken.metal", [("g", "")], cache_dir=tmp_path)


def test_a_module_is_compiled_once(tmp_path, monkeypatch):
    text = "[[kernel]] void f(device int* y [[buffer(0)]]) { y[0] = 3; }"
    harness.compile(text, [("f", "")], cache_dir=tmp_path)
    monkeypatch.setattr(harness, "call", lambda command: pytest.fail(f"compiles again: {command}"))
    y = np.zeros(1, np.int32)
    harness.compile(text, [("f", "")], cache_dir=tmp_path).run("f", {0: y}, (1, 1, 1), (1, 1, 1))
    assert y[0] == 3


def test_lanes_switch_without_assembly_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQ_MSL_RUNTIME_FLAGS", "-DMSL_UCONTEXT")
    lib = harness.compile(PLANTED, [("row_sums", "0"), ("row_sums", "4")], cache_dir=tmp_path)
    assert is_right(*row_sums(lib, 0, seed=2))
    with pytest.raises(harness.DivergentBarrier):
        row_sums(lib, 4)
