"""A tuning file appears whole or not at all, and products go where it sends them. No test asserts a time."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxq import autotune, cli, format, ops
from mlxq.ops import native, reference, tuning

ROOT = Path(__file__).resolve().parent.parent
FMT = format.Format(4, 64)
N, K = 96, 128
HERE = tuning.Class("cpu", "qmm", 4, 64, "float32", 4, "small")
STOCK, OURS = tuning.Times(2.0, 1.0), tuning.Times(1.0, 2.0)

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and tuning files that are followed."""
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXQ_AUTOTUNE", raising=False)
    native.retune()
    yield tmp_path / "cache"
    native.retune()


def store(*stock, **changes):
    """A tuning file in which stock MLX wins these classes, followed from now on."""
    path = tuning.write(native.machine() | changes, {c: STOCK for c in stock})
    native.retune()
    return path


def packed(dtype="float32", lead=(), scale_dtype=None, N=N, K=K):
    w = np.random.default_rng(0).standard_normal((*lead, N, K)).astype(np.float32)
    return ops.quantize(mx.array(w), FMT, scale_dtype=scale_dtype or dtype)


def rows(*shape, dtype="float32", seed=1):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(getattr(mx, dtype))


def served_by(call):
    """ "mlxq" or "stock", by whether a kernel of ours ran; and the answer."""
    before = ops.kernel_calls()
    y = call()
    mx.eval(y)
    return ("stock" if ops.kernel_calls() == before else "mlxq"), y


def error(y, want):
    got = np.array(y.astype(mx.float32)).astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# ------------------------------------------------------------------------------------------------ dispatch


def test_without_a_file_every_product_is_ours():
    for M in (1, 3, 40):
        assert served_by(lambda M=M: ops.qmm(rows(M, K), packed()))[0] == "mlxq"
    for device in tuning.DEVICES:
        assert ops.choice(device, "qmm", FMT, "float32", 3, N, K) == "mlxq"
    assert ops.choice("cpu", "qmm", format.Format(3, 64), "float32", 3, N, K) == "stock"  # there is no kernel


def test_a_product_goes_where_the_file_sends_it_and_its_neighbours_do_not():
    store(HERE)
    w, w_half = packed(), packed("float16")
    assert [served_by(lambda M=M: ops.qmm(rows(M, K), w))[0] for M in (1, 2, 3, 4, 5, 8)] == [
        "mlxq", "mlxq", "stock", "stock", "mlxq", "mlxq"
    ]  # fmt: skip
    assert served_by(lambda: ops.qmm(rows(2, 2, K), w))[0] == "stock"  # four rows
    assert served_by(lambda: ops.qmm(rows(3, N), w, transpose=False))[0] == "mlxq"
    assert served_by(lambda: ops.qmm(rows(3, K, dtype="float16"), w_half))[0] == "mlxq"
    assert served_by(lambda: ops.qmm(rows(3, K), w_half))[0] == "mlxq"  # stock would cast the scales
    assert served_by(lambda: ops.qmm(rows(3, 1024), packed(N=1025, K=1024)))[0] == "mlxq"  # medium
    side, y = served_by(lambda: ops.qmm(rows(3, K), w))
    assert side == "stock" and error(y, reference.qmm(rows(3, K), w)) < 1e-5


def test_each_operation_has_its_own_decision():
    experts, chosen, x = packed(lead=(3,)), mx.array([2, 0, 1]), rows(3, 1, K)
    for op in tuning.OPS:
        store(replace(HERE, op=op))
        sides = {
            "qmm": served_by(lambda: ops.qmm(rows(3, K), packed()))[0],
            "qmm_n": served_by(lambda: ops.qmm(rows(3, N), packed(), transpose=False))[0],
        }
        sides["gather_qmm"], y = served_by(lambda: ops.gather_qmm(x, experts, rhs_indices=chosen))
        assert error(y, reference.gather_qmm(x, experts, rhs_indices=chosen)) < 1e-5
        assert sides == {name: "stock" if name == op else "mlxq" for name in tuning.OPS}
        other = ops.gather_qmm(rows(3, 1, N), experts, rhs_indices=chosen, transpose=False)
        assert other.shape == (3, 1, K)


def test_choice_and_kernel_for_say_what_happens():
    store(HERE, replace(HERE, device="gpu", dtype="bfloat16"))
    assert ops.choice("cpu", "qmm", FMT, "float32", 3, N, K) == "stock"
    assert ops.choice("cpu", "qmm", FMT, "float32", 5, N, K) == "mlxq"
    assert ops.choice("gpu", "qmm", FMT, "bfloat16", 3, N, K) == "stock"
    assert ops.choice("gpu", "qmm", FMT, "float32", 3, N, K) == "mlxq"
    assert ops.kernel_for(3, N, K, 4, 64) == "stock" != ops.kernel_for(5, N, K, 4, 64)
    assert ops.kernel_for(3, N, K, 4, 64, "float32", "float16") != "stock"


def test_stock_serves_float32_only_on_the_cpu_whatever_the_file_says():
    store(*(replace(HERE, dtype=dtype) for dtype in format.STORAGE))
    for dtype in format.STORAGE:
        side, y = served_by(lambda dtype=dtype: ops.qmm(rows(3, K, dtype=dtype), packed(dtype)))
        assert side == ("stock" if dtype == "float32" else "mlxq")
        assert side == ops.choice("cpu", "qmm", FMT, dtype, 3, N, K)
        assert y.dtype == getattr(mx, dtype)


def test_a_gpu_lets_stock_compute_in_the_type_of_x(monkeypatch):
    parts = {dtype: mx.zeros(1, getattr(mx, dtype)) for dtype in format.STORAGE}
    half, single = parts["float16"], parts["float32"]
    assert native._stock_dtype(half, half, half) == mx.float32
    monkeypatch.setattr(native.mx, "default_device", lambda: mx.gpu)
    assert native._stock_dtype(half, half, half) == mx.float16
    assert native._stock_dtype(half, single, single) == mx.float32  # scales are not rounded


def test_a_decision_holds_on_its_own_device(monkeypatch):
    w, on_gpu = packed(), replace(HERE, device="gpu")
    for cpu, gpu in (("stock", "mlxq"), ("mlxq", "stock"), ("stock", "stock")):
        store(*[HERE] * (cpu == "stock"), *[on_gpu] * (gpu == "stock"))
        assert served_by(lambda: ops.qmm(rows(3, K), w))[0] == cpu
        with monkeypatch.context() as patch:
            patch.setattr(native.mx, "default_device", lambda: mx.gpu)
            assert served_by(lambda: ops.qmm(rows(3, K), w))[0] == gpu


def test_the_last_class_of_rows_is_open():
    store(replace(HERE, rows=tuning.ROWS[-1]))
    w = packed()
    sides = [served_by(lambda M=M: ops.qmm(rows(M, K), w))[0] for M in (256, 257, 513, 2000)]
    assert sides == ["mlxq", "stock", "stock", "stock"]


def test_every_product_has_one_class():
    for M in range(1, 1100):
        found = tuning.class_of("cpu", "qmm", FMT, "float32", M, 64, 64).rows
        assert found == min([bound for bound in tuning.ROWS if bound >= M] or [tuning.ROWS[-1]])
    for n, size in ((2**14 - 1, "small"), (2**14, "medium"), (2**17 - 1, "medium"), (2**17, "large")):
        assert tuning.class_of("cpu", "qmm", FMT, "float32", 1, n, 64).size == size


def test_bad_input_is_refused_in_the_same_words_where_stock_serves():
    w, experts, chosen = packed(), packed(lead=(3,)), mx.array([2, 0, 1])

    def said(call):
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        return str(raised.value).partition(": ")[2].split(" (")[0]  # without the op, and what may be counted

    calls = (
        lambda: ops.qmm(rows(3, K - 1), w),
        lambda: ops.qmm(rows(3, K).astype(mx.int32), w),
        lambda: ops.qmm(mx.array(1.0), w),
        lambda: ops.qmm(rows(3, K), format.Packed(w.words, w.scales[:, :1], w.biases, FMT)),
        lambda: ops.qmm(rows(3, K), format.Packed(w.words[None], w.scales[None], w.biases[None], FMT)),
        lambda: ops.gather_qmm(rows(K), experts, rhs_indices=chosen),
        lambda: ops.gather_qmm(rows(3, 1, K - 1), experts, rhs_indices=chosen),
    )
    ours = [said(call) for call in calls]
    assert all(ours)
    store(*(replace(HERE, op=op) for op in tuning.OPS))
    assert [said(call) for call in calls] == ours
    assert ops.qmm(mx.zeros((0, K)), w).shape == (0, N)
    nobody = mx.zeros((0,), mx.uint32)
    assert ops.gather_qmm(mx.zeros((0, 1, K)), experts, rhs_indices=nobody).shape == (0, 1, N)


def test_indices_out_of_range_read_nothing_outside_where_stock_serves():
    experts = packed(lead=(3,))
    store(replace(HERE, op="gather_qmm", rows=4))
    x, chosen, inside = rows(4, 1, K), mx.array([1, -1, 3, 2**31 - 1]), mx.array([1, 2, 2, 2])
    side, y = served_by(lambda: ops.gather_qmm(x, experts, mx.array([0, 9, -5, 2]), chosen))
    assert side == "stock"
    assert error(y, reference.gather_qmm(x, experts, mx.array([0, 3, 3, 2]), inside)) < 1e-5


def test_transformations_work_where_stock_serves():
    """Stock products have no vmap, no jvp of scales and no jvp of experts: a traced call stays ours."""
    w, experts, chosen = packed(), packed(lead=(3,)), mx.array([2, 0, 1])

    def product(x, scales, biases):
        return ops.qmm(x, format.Packed(w.words, scales, biases, FMT))

    def moe(x, scales):
        scaled = format.Packed(experts.words, scales, experts.biases, FMT)
        return ops.gather_qmm(x, scaled, rhs_indices=chosen)

    x, three = rows(3, K), rows(3, 1, K)
    primals, tangents = [x, w.scales, w.biases], [rows(3, K, seed=2), w.scales * 0.1, w.biases * 0.2]

    def everything():
        yield product(*primals)
        yield mx.vmap(product, (0, None, None))(mx.stack([x, x + 1]), w.scales, w.biases)
        yield mx.vmap(product, (None, 0, None))(x, mx.stack([w.scales, w.scales * 2]), w.biases)
        yield mx.jvp(product, primals, tangents)[1][0]
        yield from mx.grad(lambda *parts: product(*parts).square().sum(), (0, 1, 2))(*primals)
        yield mx.compile(product)(*primals)
        yield mx.compile(product, shapeless=True)(*primals)
        yield moe(three, experts.scales)
        yield mx.jvp(moe, [three, experts.scales], [three, experts.scales * 0.1])[1][0]
        yield mx.vmap(moe, (0, None))(mx.stack([three, three + 1]), experts.scales)
        yield mx.grad(lambda *parts: moe(*parts).square().sum(), 1)(three, experts.scales)

    ours = list(everything())
    store(*(replace(HERE, op=op) for op in tuning.OPS))
    assert served_by(lambda: product(*primals))[0] == "stock"
    for got, wanted in zip(everything(), ours, strict=True):
        assert error(got, np.array(wanted).astype(np.float64)) < 1e-5


def test_a_forced_family_serves_whatever_the_file_says():
    store(HERE)
    with ops.forced_isa("scalar"):
        assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "mlxq"
        assert ops.kernel_for(3, N, K, 4, 64).startswith("scalar:")
    assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "stock"


def test_the_file_is_read_at_the_first_call_and_never_again(monkeypatch):
    path, reads, read = store(HERE), [], tuning.read
    monkeypatch.setattr(tuning, "read", lambda *a, **k: reads.append(1) or read(*a, **k))
    w = packed()
    for _ in range(20):
        assert served_by(lambda: ops.qmm(rows(3, K), w))[0] == "stock"
    path.unlink()
    assert served_by(lambda: ops.qmm(rows(3, K), w))[0] == "stock" and len(reads) == 1


def test_the_variable_switches_the_file_off(monkeypatch):
    store(HERE)
    monkeypatch.setenv("MLXQ_AUTOTUNE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "mlxq"
    assert "switched off" in ops.tuning_status()["state"]


# ---------------------------------------------------------------------------------------- files not to follow


def ignored(said):
    """The file is ignored, with one notice that says this and what to do."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "mlxq"
            assert ops.kernel_for(3, N, K, 4, 64) != "stock"
    assert len(caught) == 1, [str(w.message) for w in caught]
    text = str(caught[0].message)
    assert caught[0].category is RuntimeWarning and said in text and "Run: mlxq autotune" in text
    assert said in ops.tuning_status()["state"]


@pytest.mark.parametrize("key", ["cpu", "isa", "threads", "mlx", "mlxq", "gpu"])
def test_a_file_of_another_machine_or_version_is_ignored(key):
    assert key in native.machine() or key == "gpu"
    store(HERE, **{key: "another"})
    ignored(f"{key} another")


def damage(name, path):
    whole = path.read_text()
    content = json.loads(whole)
    if name == "cut":
        path.write_text(whole[: len(whole) // 2])
    elif name == "empty":
        path.write_text("")
    elif name == "binary":
        path.write_bytes(bytes(range(256)))
    elif name == "deep":
        path.write_text("[" * 100000)
    elif name == "folder":
        path.unlink()
        path.mkdir()
    else:
        entry = content["classes"][0]
        changed = {
            "list": [],
            "null": None,
            "format": content | {"format": 2},
            "no machine": {k: v for k, v in content.items() if k != "machine"},
            "no classes": content | {"classes": None},
            "unknown op": content | {"classes": [entry | {"op": "qmv"}]},
            "unknown rows": content | {"classes": [entry | {"rows": 3}]},
            "unknown bits": content | {"classes": [entry | {"bits": 7}]},
            "unhashable": content | {"classes": [entry | {"bits": []}]},
            "text as time": content | {"classes": [entry | {"mlxq_ms": "fast"}]},
            "negative": content | {"classes": [entry | {"stock_ms": -1}]},
            "nan": content | {"classes": [entry | {"stock_ms": float("nan")}]},
            "other winner": content | {"classes": [entry | {"winner": "mlxq"}]},
        }[name]
        path.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    "name",
    ["cut", "empty", "binary", "deep", "folder", "list", "null", "format", "no machine", "no classes",
     "unknown op", "unknown rows", "unknown bits", "unhashable", "text as time", "negative", "nan",
     "other winner"],
)  # fmt: skip
def test_a_damaged_file_is_ignored(name):
    damage(name, store(HERE))
    native.retune()
    ignored("cannot be read" if name == "folder" else "is damaged")


# ------------------------------------------------------------------------------------------------- measuring

FEW = autotune.Effort((1, 4), ("small",), (64,), 0.0, 60)


@pytest.fixture
def clock(monkeypatch):
    """A timer that gives the seconds of one call by contender; `asked` is what was timed."""

    class Clock:
        asked = []
        mlxq, stock = 1e-3, 1e-3

        def __call__(self, contender, call, calls):
            self.asked.append(contender)
            return getattr(self, contender)

    clock = Clock()
    clock.asked = []
    monkeypatch.setattr(autotune, "_seconds", clock)
    monkeypatch.setattr(autotune, "QUICK", FEW)
    return clock


def stored():
    return tuning.read(native.machine()).classes


def test_the_faster_is_stored_and_followed_at_once(clock):
    assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "mlxq"
    clock.mlxq = 1.5e-3
    outcome = autotune.autotune(quick=True)
    assert outcome.timed == len(stored()) == 2 * 3 * 3 and outcome.times == stored()
    assert {times.winner for times in stored().values()} == {"stock"}
    assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "stock"
    assert served_by(lambda: ops.qmm(rows(2, K), packed()))[0] == "mlxq"  # a class that nobody timed
    clock.mlxq = 0.5e-3
    autotune.autotune(quick=True)
    assert served_by(lambda: ops.qmm(rows(3, K), packed()))[0] == "mlxq"


def test_stock_has_to_win_clearly(clock):
    for ratio, winner in ((1.04, "mlxq"), (1.06, "stock")):
        clock.mlxq = ratio * clock.stock
        autotune.autotune(quick=True)
        assert {times.winner for times in stored().values()} == {winner}


def test_contenders_take_turns_and_the_medians_are_compared(clock, monkeypatch):
    product = next(autotune.of_list(FEW))
    clock.stock = 1.2e-3
    autotune.measure(product, autotune.random_weight(product), 0.0)
    assert clock.asked == ["stock", "mlxq", "mlxq", "stock", "stock", "mlxq"]
    series = {"mlxq": iter((9.0, 2.0, 1.9)), "stock": iter((2.2, 2.1, 0.1))}
    monkeypatch.setattr(autotune, "_seconds", lambda name, *_: next(series[name]))
    monkeypatch.setattr(autotune, "CLEARLY", 100)
    assert autotune.measure(product, autotune.random_weight(product), 0.0) == (2.0, 2.1)


def test_a_round_on_a_gpu_is_not_measured_by_the_call_that_compiles(monkeypatch):
    """Else our kernel would be timed with a wait for each call, and stock MLX's with one for many."""
    monkeypatch.setattr(autotune, "ROUND", 0.05)
    for device, fewest, most in (("gpu", 2, 10**6), ("cpu", 1, 1)):
        pauses = iter((0.06,))

        def call(pauses=pauses):
            time.sleep(next(pauses, 0))
            return mx.zeros((1,))

        calls, y = autotune._calls(call, device)
        assert fewest <= calls <= most and y.shape == (1,), device


def test_stock_has_to_win_twice(monkeypatch):
    """One disturbance of the machine decides nothing."""
    products = [p for p in autotune.of_list(FEW) if p.op == "qmm" and p.fmt == FMT and p.M == 1]
    for second, winner in (((2.0, 2.1), "mlxq"), ((2.0, 1.0), "stock")):
        measured = iter(((9.0, 2.0), second))
        monkeypatch.setattr(autotune, "measure", lambda *_, measured=measured: next(measured))
        (times,) = autotune.measure_all(products, FEW).times.values()
        assert times.winner == winner


def test_stock_gets_a_class_only_if_it_wins_with_every_shape_in_it():
    for order in ((1.0, 2.0), (2.0, 1.0)):
        times = {}
        for stock_s in order:
            autotune._keep_worst(times, HERE, 1.5, stock_s)
        assert times[HERE].winner == "mlxq" and times[HERE].stock_ms == 2000


def test_what_would_take_long_and_has_lost_is_left_out(clock):
    clock.mlxq, clock.stock = 1e-3, 0.3
    effort = replace(FEW, rows=(1, 2, 64))
    products = [p for p in autotune.of_list(effort) if p.op == "qmm" and p.fmt == FMT]
    outcome = autotune.measure_all(products, effort)
    assert (outcome.timed, outcome.skipped) == (1, 2)  # 0.6 s and 19 s
    clock.mlxq = 0.29
    assert autotune.measure_all(products, effort).skipped == 0  # it might win


def test_when_the_time_is_up_the_rest_keeps_its_decision(clock, monkeypatch):
    clock.mlxq = 2e-3
    autotune.autotune(quick=True)
    before = stored()
    monkeypatch.setattr(autotune, "QUICK", replace(FEW, seconds=-1.0))
    outcome = autotune.autotune(quick=True)
    assert (outcome.timed, outcome.out_of_time) == (0, 18) and stored() == before


def test_a_wrong_answer_of_ours_stores_nothing(clock, monkeypatch, capsys):
    path = store(HERE)
    before, right = path.read_bytes(), native.qmm
    monkeypatch.setattr(native, "qmm", lambda *a: right(*a) * 1.01)
    assert cli.main(["autotune", "--quick"]) == 1
    assert "4-bit/64" in (said := capsys.readouterr().err) and "mlxq doctor" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_stock_cannot_win_with_a_wrong_answer(clock, monkeypatch, factor):
    right = mx.quantized_matmul
    monkeypatch.setattr(autotune.mx, "quantized_matmul", lambda *a, **k: right(*a, **k) * factor)
    clock.mlxq = 2e-3
    autotune.autotune(quick=True)
    winners = {kind.op: times.winner for kind, times in stored().items()}
    assert winners == {"qmm": "mlxq", "qmm_n": "mlxq", "gather_qmm": "stock"}


def test_what_the_kernels_do_is_timed_and_not_what_an_old_file_says(monkeypatch):
    store(*(replace(HERE, op=op, rows=rows) for op in tuning.OPS for rows in tuning.ROWS))
    served = set()

    def seconds(contender, call, calls):
        served.add((contender, served_by(call)[0]))
        return 1e-3

    monkeypatch.setattr(autotune, "_seconds", seconds)
    monkeypatch.setattr(autotune, "QUICK", FEW)
    autotune.autotune(quick=True)
    assert served == {("mlxq", "mlxq"), ("stock", "stock")}


@pytest.mark.parametrize("bits", format.KERNEL_BITS)
def test_the_random_weights_are_about_normal(bits):
    product = autotune.Product("cpu", "qmm", format.Format(bits, 32), "float16", 1, 64, 256)
    values = reference.dequantize(autotune.random_weight(product).validate())
    assert 0.5 < values.std() * 256**0.5 < 2 and abs(values.mean()) < 0.01


# --------------------------------------------------------------------------------------------------- the file


def test_a_killed_run_leaves_the_old_file(cache):
    path = store(HERE)
    before = path.read_bytes()
    code = (
        "import os, signal\nfrom mlxq import autotune, cli\n"
        "right, done = autotune.measure, []\n"
        "def measure(*a):\n"
        "    done.append(right(*a))\n"
        "    if len(done) == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done[-1]\n"
        "autotune.measure = measure\n"
        "cli.main(['autotune', '--quick'])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before and os.listdir(cache) == ["autotune.json"]


def test_a_run_that_is_interrupted_or_cannot_write_leaves_the_old_file(clock, cache, monkeypatch, capsys):
    path = store(HERE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "/disk")

    for where, name, raises, code in (
        (tuning.os, "fsync", full, 2),
        (autotune, "random_weight", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), 130),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, raises)
            assert cli.main(["autotune", "--quick"]) == code
        assert path.read_bytes() == before and os.listdir(cache) == ["autotune.json"]
    assert "mlxq: /disk: No space left" in capsys.readouterr().err


def test_a_file_that_cannot_be_followed_is_replaced(clock):
    for spoil in (lambda: store(HERE, mlx="0.1"), lambda: damage("cut", store(HERE))):
        spoil()
        autotune.autotune(quick=True)
        assert replace(HERE, rows=1) in stored() and tuning.status(native.machine())["state"] == "in use"


def test_classes_that_a_run_does_not_time_keep_their_decision(clock, monkeypatch):
    elsewhere = replace(HERE, group_size=128)
    store(elsewhere, HERE)
    monkeypatch.setenv("MLXQ_AUTOTUNE", "0")  # which is about following it
    autotune.autotune(quick=True)
    monkeypatch.delenv("MLXQ_AUTOTUNE")
    assert stored()[elsewhere] == STOCK and stored()[HERE].winner == "mlxq"


def test_clear_removes_the_file(cache, capsys):
    path = store(HERE)
    assert cli.main(["autotune", "--clear"]) == 0 and not path.exists()
    assert cli.main(["autotune", "--clear"]) == 0
    assert [line.partition(str(path))[2] for line in capsys.readouterr().out.splitlines()] == [
        " is removed", " does not exist"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the command


def test_a_quick_run_on_this_cpu_ends_with_a_table_and_a_file_that_doctor_shows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["autotune", "--quick"]) == 0
    said = capsys.readouterr()
    assert "4-bit/64" in said.out and str(tuning.path()) in said.out and "\x1b" not in said.out
    assert f"mlxq serves {sum(t.winner == 'mlxq' for t in stored().values())} classes" in said.out
    content = json.loads(tuning.path().read_text())
    assert content["machine"] == native.machine() and content["classes"]
    assert ops.tuning_status()["state"] == "in use"


def test_doctor_shows_the_file_its_age_and_the_exceptions(monkeypatch, tmp_path, capsys):
    from mlxq import doctor

    for part in ("_table", "_quantizer", "_self_test"):
        monkeypatch.setattr(doctor, part, lambda ops: ({}, []))
    monkeypatch.setenv("COLUMNS", "200")
    tuning.write(native.machine(), {HERE: STOCK, replace(HERE, rows=1): OURS, replace(HERE, rows=8): OURS})
    content = json.loads(tuning.path().read_text())
    tuning.path().write_text(json.dumps(content | {"written": content["written"] - 3 * 86400 - 5}))
    cli.main(["doctor", "--report", str(tmp_path / "report.txt")])
    for text in (capsys.readouterr().out, (tmp_path / "report.txt").read_text()):
        parts = (str(tuning.path()), "in use", "3 days", "mlxq 2 classes, stock MLX 1")
        assert all(part in text for part in parts)
        assert f"{HERE}: mlxq takes 2.00 times as long" in text
    tuning.clear()
    cli.main(["doctor"])
    assert "none; to make one: mlxq autotune" in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in float32, 4-bit/64 with an 8-bit head."""
    folder = tmp_path_factory.mktemp("model")
    source = tiny_models.make_hf_model("llama", folder / "hf")
    flags = ["--bits", "4", "--dtype", "float32", "--rule", "lm_head=bits:8"]
    assert cli.main(["convert", str(source), str(folder / "mlx"), *flags]) == 0
    return folder


def test_a_model_is_timed_by_its_own_layers(clock, model):
    products = list(autotune.of_model(str(model / "mlx"), FEW))
    assert {p.fmt for p in products} == {FMT, format.Format(8, 64)}
    assert {p.op for p in products} == {"qmm", "qmm_n"} and {p.M for p in products} == {1, 4}
    assert len(set(products)) == len(products)
    assert cli.main(["autotune", "--quick", "--model", str(model / "mlx")]) == 0
    assert set(stored()) == {p.kind for p in products}


def test_a_model_with_nothing_to_decide_is_one_sentence(clock, model, tmp_path, capsys):
    for flags, said in (
        (["--dtype", "bfloat16"], "its scales are bfloat16"),
        (["--bits", "3"], "no layer that a kernel of ours serves"),
    ):
        target = str(tmp_path / "-".join(flags))
        assert cli.main(["convert", str(model / "hf"), target, *flags]) == 0
        capsys.readouterr()
        assert cli.main(["autotune", "--model", target]) == 2
        assert said in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert cli.main(["autotune", "--model", "/no/such/model"]) == 2 and not tuning.path().exists()


def test_without_kernels_there_is_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setattr(native, "_load", lambda: (None, "no kernels here"))
    assert cli.main(["autotune"]) == 2
    assert "no kernels here" in capsys.readouterr().err
