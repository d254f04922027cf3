"""The benchmark tools' parts on tiny sizes: answers, layout of the results, the bars. Nothing about time."""

import contextlib
import importlib.util
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mlxq import ops

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import bench_common as common  # noqa: E402
import bench_cuda  # noqa: E402
import bench_decode  # noqa: E402
import bench_qmm  # noqa: E402
import readme_tables  # noqa: E402
import tune_cuda  # noqa: E402

pytestmark = pytest.mark.skipif(
    not ops.native_available(), reason=f"needs the extension: {ops.native_error()}"
)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
N, K = 192, 576


@pytest.fixture(scope="module")
def weight():
    return bench_qmm.Weight(N, K)


# Roundings of x and y: none, 2^-9, 2^-9 (and of the zeros), 8 bits.
TORCH_LIMITS = {"float32": 1e-6, "bfloat16": 5e-3, "int4": 5e-3, "int8": 2e-2}


def product_error(contender) -> float:
    x = bench_qmm.activations(5, K)
    contender.set_x(x)
    contender.time(1)
    contender.time(3)
    return bench_qmm.checked_error(contender, x)


class Counter:
    """A contender whose calls take no time but are counted."""

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.turns = name, seconds, []

    def time(self, calls: int) -> float:
        self.turns.append(calls)
        return self.seconds * calls


def test_the_machine_is_described_in_plain_json():
    about = common.machine()
    assert json.loads(json.dumps(about)) == about
    assert about["cores"] >= 1 and about["l3_bytes"] >= 1 << 18
    assert about["versions"]["mlx"]


def test_summary_is_the_median_with_its_quartiles():
    said = common.summary([0.005, 0.001, 0.003, 0.002, 0.004])
    assert said == pytest.approx({"ms": 3, "ms_min": 1, "ms_q1": 2, "ms_q3": 4, "repeats": 5})
    assert common.summary([0.001, 0.003])["ms"] == pytest.approx(2)


def test_contenders_are_timed_in_blocks_in_turn():
    fast, medium, slow = Counter("fast", 1e-6), Counter("medium", 0.01), Counter("slow", 9.0)
    times = common.interleaved([fast, medium, slow], 0.1, 0.002)
    assert max(fast.turns) == 64, "a short call is timed many at once"
    assert max(medium.turns) == 1
    assert len(slow.turns) == 2, "one call to warm up and one that counts: it takes too long for more"
    assert times["slow"] == [9.0] and times["fast"][0] == pytest.approx(1e-6)
    assert len(times["fast"]) == 15 and 3 <= len(times["medium"]) <= 11


@pytest.mark.parametrize("bits", bench_qmm.KERNEL_BITS)
@pytest.mark.parametrize("dtype", bench_qmm.LIMITS)
def test_our_answers_are_checked_against_float64(weight, bits, dtype):
    ours = bench_qmm.Mlx(weight, 2, False, bits, dtype)
    x = bench_qmm.activations(5, K)
    ours.set_x(x)
    ours.time(3)
    assert 0 < bench_qmm.checked_error(ours, x) <= bench_qmm.LIMITS[dtype]
    assert ":" in ours.kernel


def test_a_wrong_answer_is_not_timed(weight):
    ours = bench_qmm.Mlx(weight, 1, False, 4, "float32")
    x = bench_qmm.activations(2, K)
    ours.set_x(x)
    ours.time(1)
    ours._last = ours._last * 1.001
    with pytest.raises(AssertionError, match="relative error 0.001 exceeds"):
        bench_qmm.checked_error(ours, x)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4", "int8"])
def test_torch_computes_the_same_product(weight, kind):
    pytest.importorskip("torch", reason="needs torch")
    assert product_error(bench_qmm.Torch(weight, 2, False, kind)) <= TORCH_LIMITS[kind]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: huge pages")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
def test_torch_in_huge_pages_computes_the_same_product(weight, kind):
    pytest.importorskip("torch", reason="needs torch")
    peer = bench_qmm.Torch(weight, 2, True, kind)
    assert peer.huge_bytes
    assert product_error(peer) <= TORCH_LIMITS[kind]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_llama_cpp_computes_the_same_product(weight, kind):
    pytest.importorskip("llama_cpp", reason="needs llama_cpp")
    assert product_error(bench_qmm.Llama(weight, 2, False, kind, 2)) <= 2e-2  # it rounds x to 8 bits


def test_without_llama_cpp_the_tool_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bench_qmm, "_ggml", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install llama-cpp-python"):
        bench_qmm.ggml()


def test_copies_are_used_in_rotation(weight):
    ours = bench_qmm.Mlx(weight, 3, False, 4, "float32")
    index = {id(w): i for i, w in enumerate(ours._weights)}
    order = [index[id(w)] for calls in (2, 2, 3) for w in ours._next(calls)]
    assert order == [0, 1, 2, 0, 1, 2, 0]


def test_one_thread_runs_in_a_process_of_its_own(weight):
    ours = bench_qmm.OneThread(N, K, 2, False, 4, "float32")
    try:
        ours.set_x(bench_qmm.activations(2, K))
        assert ours.time(2) > 0
        assert ours.bytes == bench_qmm.Mlx(weight, 1, False, 4, "float32").bytes
    finally:
        ours.close()
    assert ours._process.returncode == 0


@needs_compiler
def test_the_read_stream_reads_the_slices_that_it_is_told():
    """Memory holds ones, so the sum of two of a vector's eight lanes counts the vectors that were read."""
    ones, vector = 0x0101010101010101, 64
    with common.read_stream(2, 8 << 20) as stream:
        for huge, ahead, count in itertools.product((0, 1), common.AHEAD, (1, 4, 64)):
            print(huge, ahead, 1 << 20, count, 8, file=stream.stdin, flush=True)
            seconds, total = stream.stdout.readline().split()
            assert float(seconds) > 0
            assert int(total) == 2 * ones * count * (1 << 20) // vector % 2**64


@needs_compiler
def test_a_run_writes_its_rows_and_its_bars(monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setattr(bench_qmm, "accuracy", lambda rows: [
        {"x": d, "error": 0.0, "limit": limit} for d, limit in bench_qmm.LIMITS.items()
    ])  # fmt: skip
    monkeypatch.setattr(common, "cold_bytes", lambda: 1 << 19)
    monkeypatch.setenv("MLXQ_THREADS", "2")  # main sets it: this takes it back afterwards
    command = ["--shapes", f"{N}x{K}", "--rows", "1", "--threads", "2", "--seconds", "0.001", "--no-stock"]
    assert bench_qmm.main([*command, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("qmm-*.json")
    result = json.loads(path.read_text())
    documented = (
        "N K M state pages contender family bits x threads kernel copies bytes gb_s ms ms_min ms_q1 ms_q3"
    )
    assert all(set(r) == {*documented.split(), "repeats", "error", "share"} for r in result["rows"])
    assert {r["state"] for r in result["rows"]} == {"hot", "cold"}
    assert {r["family"] for r in result["rows"]} >= {"mlxq", "torch", "stream"}
    assert all(r["copies"] > 1 for r in result["rows"] if r["state"] == "cold")
    assert [r for r in result["rows"] if r["contender"] == "mlxq 4-bit f32" and r["share"]]
    names = {b["what"]: b for b in result["bars"]}
    assert names[f"{N}x{K} M=1 cold, best torch / ours f32"]["measured"] > 0
    assert names["4096x4096 M=1 hot, stock MLX f32 / ours"]["met"] is None


def test_an_inaccurate_kernel_fails_the_run(monkeypatch, tmp_path):
    worse = {"x": "float16", "error": 2e-3, "limit": 1e-3}
    good = [{"x": d, "error": 0.0, "limit": limit} for d, limit in bench_qmm.LIMITS.items()]
    monkeypatch.setattr(bench_qmm, "accuracy", lambda rows: [*good, worse])
    monkeypatch.setenv("MLXQ_THREADS", "2")
    command = ["--shapes", f"{N}x{K}", "--threads", "2", "--out", str(tmp_path)]
    assert bench_qmm.main(command) == 1
    assert not list(tmp_path.iterdir())


def test_accuracy_covers_every_width_storage_and_dtype():
    table = bench_qmm.accuracy(K=256, N=64, rows=(1, 8), real=False)
    assert len({(r["bits"], r["scales"], r["x"], r["M"]) for r in table}) == len(table) == 3 * 3 * 3 * 2
    assert all(0 < r["error"] <= r["limit"] for r in table)


def test_bars_compare_with_the_fastest_peer_in_the_same_state():
    def row(contender, state, M, ms, share=None):
        return {"N": 64, "K": 64, "M": M, "state": state, "pages": "4K", "contender": contender,
                "ms": ms, "share": share}  # fmt: skip

    rows = [
        row("mlxq 4-bit f32", "cold", 1, 2.0, 0.75), row("torch fp32", "cold", 1, 9.0),
        row("torch int8", "cold", 1, 3.0), row("torch bf16", "hot", 1, 0.1),
        row("mlxq 4-bit bf16", "hot", 8, 1.0), row("torch bf16", "hot", 8, 5.0),
        row("mlxq 4-bit bf16", "hot", 32, 1.0), row("torch int4 bf16", "hot", 32, 1.1),
        row("torch int8", "hot", 32, 0.5),
    ]  # fmt: skip
    bars = {b["what"]: b for b in bench_qmm.judge(rows, {"float32": 1e-6})}
    assert bars["64x64 M=1 cold, best torch / ours f32"]["measured"] == pytest.approx(1.5)
    middle = bars["64x64 M=8..128 hot, best torch / ours bf16"]
    assert (middle["measured"], middle["met"], middle["note"]) == (pytest.approx(1.1), False, "worst at M=32")
    assert bars["64x64 M=1 cold, 4K pages, share of the read stream"]["met"] is True
    assert bars["relative error, float32 x"]["met"] is True
    assert bars["relative error, bfloat16 x"]["met"] is None


def test_decode_bars_are_ratios_of_speeds():
    def row(contender, what, speed):
        return {"contender": contender, "what": what, "tokens_per_s": speed}

    rows = [
        row("mlxq g64 f32", "decode", 30.0), row("mlx-lm g64 f32", "decode", 5.0),
        row("mlxq g64 f32 1 thread", "decode", 31.0), row("mlxq g64 f32", "prefill 128", 90.0),
    ]  # fmt: skip
    checks = [{"what": "logits", "error": 1e-5, "limit": 2e-4, "met": True}]
    bars = {b["what"]: b for b in bench_decode.judge(rows, checks)}
    assert bars["decode, ours / stock mlx-lm, both f32"]["measured"] == 6.0
    assert bars["decode, mlxq g64 f32, two threads / one"]["met"] is False
    assert bars["prefill 128, ours / stock mlx-lm, both f32"]["met"] is None
    assert bars["logits"]["met"] is True


def test_logits_are_compared_on_the_rows_that_both_have():
    want = np.arange(12.0).reshape(3, 4)
    assert bench_decode.relative_error(want[-1:], want) == 0
    assert bench_decode.relative_error(want * 1.01, want) == pytest.approx(0.01)


def test_results_are_json_with_a_row_a_line(tmp_path):
    path = tmp_path / "deep" / "result.json"
    result = {"tool": "t", "rows": [{"a": 1}, {"a": 2}], "missing": [], "machine": {"b": None}}
    common.write(path, result)
    assert json.loads(path.read_text()) == result
    assert '\n  {"a": 2}\n' in path.read_text()


H200 = {
    "arch": "sm_90a",
    "multiprocessors": 132,
    "shared": 232448,
    "early": True,
}  # what ops.cuda asks of one


def test_the_kernels_of_a_cuda_run_are_known_before_it():
    torch = pytest.importorskip("torch", reason="needs torch")

    def files(op, rows, bits=4, N=14336, K=4096):
        cell = bench_cuda.Cell(op, bits, N, K, rows, ())
        return [file for file, _ in bench_cuda.instances(torch, [cell], bench_cuda.H200)]

    assert files("qmm", (1,)) == ["qmv_stream.cu"] == files("qmm", (8,))
    assert files("qmm", (1,), N=4096) == ["qmv_stream.cu"] == files("qmm", (4,), bits=2, N=4096)
    assert files("qmm", (64,)) == ["qmm_stream.cu"] == files("qmm", (2048,))
    assert len(files("qmm", (1, 2, 4, 8))) == 1  # one serves up to eight rows
    assert set(files("qmm_n", (128,))) == {"qmm_stream.cu"}
    assert set(files("q8mm", (128,))) == {"q8_stream.cu"}
    assert files("gather_qmm", (8,), N=4096) == ["qmv_stream.cu", "experts.cu"]
    assert files("gather_qmm", (512,), N=4096) == ["qmm_stream.cu", "experts.cu"]
    everything = bench_cuda.cells([2, 4, 8], True)
    assert len(set(bench_cuda.instances(torch, everything, bench_cuda.H200))) > 40
    first = [(c.op, c.rows) for c in everything[:9]]
    assert first == [("qmm", (1, 2, 4, 8))] * 9, "what closes the issue comes first"
    assert all(c.rows == (8192,) for c in everything[-9:])
    assert {c.op for c in everything} == {"qmm", "qmm_n", "q8mm", "gather_qmm", "host"}


class Graph:
    """A bench_cuda.Replayed that takes these times, the last one for ever; `order` gets its name."""

    def __init__(self, times: list, name="", order=None):
        self.times, self.name, self.order = times, name, [] if order is None else order

    def microseconds(self) -> float:
        self.order.append(self.name)
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


@pytest.fixture
def cuda_run(monkeypatch, tmp_path):
    """bench_cuda.Run on the CPU: our operations in float64 (qmm wrong for four rows), constant times."""
    torch = pytest.importorskip("torch", reason="needs torch")
    from mlxq.ops import cuda

    def launch(name):
        started = {"start": lambda *arguments: None, "config_at": 1, "function": 2, "pointers": 3}
        return types.SimpleNamespace(name=name, **started)

    def qmm(x, w, transpose=True):
        plans = w.__dict__.setdefault("_cuda_plans", {})
        plans[x.shape, x.dtype, transpose] = types.SimpleNamespace(launch=launch("qmv"))
        weights = bench_cuda.float64_weight(torch, w)
        y = x.double() @ (weights.T if transpose else weights)
        return (y * (1.01 if len(x) == 4 else 1)).bfloat16()

    def gather_qmm(x, w, lhs, rhs):
        cuda._plans["gather", len(lhs)] = launch("qmm")
        weights = bench_cuda.float64_weight(torch, w)[rhs.long()]
        return (x[lhs.long()].double() @ weights.transpose(1, 2)).bfloat16()

    def q8mm(x, scales, w, per_row, dtype):
        weights = bench_cuda.float64_weight(torch, w)
        return (x.double() @ weights.T * scales.double()[:, None]).to(getattr(torch, dtype))

    def ceilings(run):
        run.rates = {"bfloat16": 1e6}
        run.result["machine"] = {"gpu": "none", "date": "2026-11-29", "bf16_tflops": 1.0, "command": "-"}

    for name, stand_in in (("qmm", qmm), ("gather_qmm", gather_qmm), ("q8mm", q8mm)):
        monkeypatch.setattr(cuda, name, stand_in)
    monkeypatch.setattr(ops, "qmm", qmm)
    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda, "Replayed", lambda torch, calls: (calls[0](), Graph([2.0]))[1])
    monkeypatch.setattr(bench_cuda, "WARM_SECONDS", 0)
    monkeypatch.setattr(bench_cuda, "host_microseconds", lambda torch, call: (call(), 3.0)[1])
    monkeypatch.setattr(bench_cuda, "reading", lambda *a: {"read 1": Graph([1.5]), "read 2": Graph([1.0])})
    monkeypatch.setattr(bench_cuda.Run, "ceilings", ceilings)
    monkeypatch.setattr(bench_cuda.Run, "alive", lambda run, what: None)

    def make(limit=100.0):
        args = types.SimpleNamespace(out=tmp_path / "cuda-x.json", limit=limit)
        run = bench_cuda.Run(torch, args, bench_cuda.H200, 0)
        run.rotated = 0
        return run

    return make


CUDA_CELLS = [
    bench_cuda.Cell("qmm", 4, 64, 128, (1, 4, 8), ("humming",)),
    bench_cuda.Cell("qmm_n", 2, 64, 128, (8,), ()),
    bench_cuda.Cell("q8mm", 8, 64, 128, (32,), ()),
    bench_cuda.Cell("gather_qmm", 4, 64, 128, (8,), ()),
    bench_cuda.Cell("host", 4, 64, 128, (1,), ()),
]


def test_a_wrong_answer_or_a_failing_peer_of_a_cuda_run_costs_only_itself(cuda_run):
    run = cuda_run()
    assert run.all(CUDA_CELLS) == 1
    result = json.loads(run.args.out.read_text())
    rows = {bench_cuda.row_key(row): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 + 1 + 1 + 2 + 1
    wrong = rows["qmm", "", 4, 4, 64, 128]
    assert wrong["us"] is None and "error 1.0" in wrong["failed"] and wrong["peers"]["cublas_fp16"] == 2
    assert [row for row in rows.values() if row["failed"]] == [wrong]
    right = rows["qmm", "", 4, 1, 64, 128]
    assert (right["us"], right["us_alone"], right["kernel"], right["limit_us"]) == (2.0, 2.0, "qmv", 1.0)
    assert set(right["missing"]) == {"humming", "tinygemm"} and len(result["failures"]) >= 3
    assert rows["qmm_n", "", 2, 8, 64, 128]["peers"]["forward"] == 2.0
    assert rows["gather_qmm", "decode, sorted", 4, 8, 64, 128]["kernel"] == "qmm"
    host = rows["host", "a call of ops.qmm", 4, 1, 64, 128]
    assert host["peers"] == {"driver_start": 3.0, "torch_mm": 3.0}
    assert {b["what"]: b["measured"] for b in result["bars"]}["rows with a wrong answer"] == 1


def test_a_cuda_run_ends_at_its_limit_and_goes_on_where_it_was(cuda_run):
    late = cuda_run(limit=-1)
    assert late.all(CUDA_CELLS) == 0
    assert (
        len(late.result["skipped"]) == len(CUDA_CELLS) and json.loads(late.args.out.read_text())["rows"] == []
    )
    run = cuda_run()
    run.all(CUDA_CELLS[:1])
    torch, args = run.torch, run.args
    again = bench_cuda.Run(torch, args, bench_cuda.H200, 0, json.loads(args.out.read_text()))
    again.rotated = 0
    again.all(CUDA_CELLS[:2])
    assert [row["M"] for row in again.result["rows"]] == [1, 4, 8, 8]


def test_what_breaks_the_gpu_is_named_in_its_row_and_the_run_starts_anew(cuda_run, monkeypatch):
    started = []
    monkeypatch.setattr(bench_cuda.os, "execv", lambda program, arguments: started.append(arguments))
    run, rows = cuda_run(), []
    for name in ("humming", "ours"):
        run.pending = run.row(CUDA_CELLS[0], 8)
        run.restart(f"{name} {bench_cuda.label(run.pending)}", "hung")
        rows.append(json.loads(run.args.out.read_text())["rows"])
    assert not rows[0] and [row["failed"] for row in rows[1]] == ["hung"]
    assert all("--resume" in arguments for arguments in started) and len(started) == 2

    def calls(name, bits, N, K, x, weights):
        exact = run.torch.ones(N, K).double()
        return [lambda: x.double() @ exact.T], exact

    again = bench_cuda.Run(run.torch, run.args, bench_cuda.H200, 0, run.result | {"rows": []})
    again.rotated, again.peer = 0, types.SimpleNamespace(weights=print, calls=calls)
    again.all(CUDA_CELLS[:1])
    one, _, broke = again.result["rows"]
    assert one["peers"]["humming"] == broke["us"] == 2.0 and broke["missing"]["humming"] == "hung"


def test_a_break_in_a_turn_is_of_the_graph_whose_turn_it_is(cuda_run):
    run, asked = cuda_run(), []
    run.alive, row = asked.append, run.row(CUDA_CELLS[0], 8)
    for name, said in (("humming", "humming"), ("forward", "ours"), ("us_alone", "ours"), ("read", "read")):
        run.graphs = {"us": Graph([2.0]), name: Graph([])}  # which has no time to give
        with pytest.raises(IndexError):
            run.take_turns(row, {"read 1": Graph([1.0])}, 0.5)
        assert asked == [f"{said} {bench_cuda.label(row)}"] and not asked.clear()


def test_a_row_of_ours_that_failed_has_no_time(cuda_run, monkeypatch):
    made = []

    def replayed(torch, calls):
        made.append(calls)
        if len(made) == 2:  # ours has its graph; this is the one without an early start
            raise RuntimeError("capture failed")
        return Graph([2.0])

    run = cuda_run()
    monkeypatch.setattr(bench_cuda, "Replayed", replayed)
    run.all(CUDA_CELLS[:1])
    first = run.result["rows"][0]
    assert first["us"] is None and first["failed"] == "RuntimeError: capture failed"
    assert first["peers"]["cublas_fp16"] == 2.0 and run.result["rows"][2]["us"] == 2.0


def cuda_rows():
    """Times of a made-up GPU: ours 10 us, humming 18, tinygemm 12, cuBLAS 9."""
    shapes = [(s, M) for s in bench_cuda.MAIN_SHAPES for M in (1, 2, 4, 8, 16, 128, 512, 2048)]
    for bits, ((N, K), M) in itertools.product((2, 4, 8), shapes):
        peers = {"humming": 18.0, "cublas_fp16": 9.0} | ({"tinygemm": 12.0} if bits == 4 and M <= 16 else {})
        yield {"op": "qmm", "what": "", "bits": bits, "M": M, "N": N, "K": K, "us": 10.0, "us_alone": 11.0,
               "limit_us": 8.0, "peers": peers, "failed": None, "kernel": "qmv"}  # fmt: skip
    for op, us, peers in (("qmm_n", 13.0, {"forward": 10.0}), ("host", 11.0, {"torch_mm": 9.0})):
        yield {"op": op, "what": "", "bits": 4, "M": 128, "N": 64, "K": 64, "us": us, "limit_us": 5.0,
               "peers": peers, "failed": None}  # fmt: skip


def launches_of_a_tuner(*answers):
    """What check_and_time wrote where one launch after the other gives these answers."""
    torch = pytest.importorskip("torch", reason="needs torch")
    y, row, answers = torch.zeros(4), {"us": None}, list(answers)

    def call(launch):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        y[...] = answer

    bench_cuda.check_and_time(torch, row, lambda: ["launch"] * 3, call, y, torch.ones(4).double(), 1e-3)
    return row


def test_what_is_timed_by_turns_counts_neither_while_it_warms_nor_at_the_first_replay_of_a_turn(monkeypatch):
    for name, value in (("REPLAYS", 2), ("ROUNDS", 3), ("WARM_SECONDS", 0.02)):
        monkeypatch.setattr(bench_cuda, name, value)
    clock = iter([0.0, 0.01, 0.015, 0.03, 0.04, 0.05])  # two rounds to warm
    monkeypatch.setattr(bench_cuda.time, "monotonic", lambda: next(clock))
    order, entered = [], []

    @contextlib.contextmanager
    def at(name):
        entered.append(name)
        yield

    cold = [9.0] * 6  # of the rounds that warm
    graphs = {
        "a": Graph(cold + [7.0, 1.0, 1.1, 7.0, 1.2, 1.3, 7.0, 1.4, 1.5], "a", order),
        "b": Graph(cold + [7.0, 2.0, 2.1, 7.0, 2.2, 2.3, 7.0, 2.4, 2.5], "b", order),
    }
    found = bench_cuda.by_turns(graphs, at)
    assert found == {"a": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "b": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]}
    assert entered == [*"baba", *"abbaab"] and order == [name for name in entered for _ in range(3)]


def test_forms_near_the_best_and_the_tables_own_are_timed_again_by_turns(monkeypatch):
    times = {1: 10.3, 2: 11.0, 4: 14.2}
    monkeypatch.setattr(bench_cuda, "WARM_SECONDS", 0)
    monkeypatch.setattr(bench_cuda, "Replayed", lambda torch, calls: Graph([times.pop(calls[0])]))
    first = {1: 10.1, 2: 10.0, 3: 10.9, 4: 14.0, 5: None}
    rows = {n: {"us": us, "tuning": [n, 64]} for n, us in first.items()}
    tune_cuda.by_turns(None, [(row, [n]) for n, row in rows.items()], (4, 64))
    assert not times  # 3 is 9 % slower, 4 the table's, 5 failed
    assert {n: row["us"] for n, row in rows.items()} == {1: 10.3, 2: 11.0, 3: 10.9, 4: 14.2, 5: None}
    assert rows[2]["rounds"] == [11.0] * 15 and "rounds" not in rows[3]


def test_a_tuner_times_only_what_is_right_and_the_same_when_repeated(monkeypatch):
    timed = []
    monkeypatch.setattr(bench_cuda, "microseconds", lambda torch, calls: timed.append(len(calls)) or 5.0)
    assert launches_of_a_tuner(1, 1) == {"us": 5.0} and timed == [3]
    assert launches_of_a_tuner(1.1, 1.1) == {"us": None, "failed": "error 1.0e-01"}
    assert launches_of_a_tuner(float("nan"), 1)["us"] is None
    assert launches_of_a_tuner(1, 1.0001)["failed"] == "not the same bits when repeated"
    assert launches_of_a_tuner(RuntimeError("too much\nshared"))["failed"] == "RuntimeError: too much"
    with pytest.raises(RuntimeError, match="illegal"):
        launches_of_a_tuner(RuntimeError("an illegal address"))
    row = {"us": None}
    bench_cuda.check_and_time(None, row, lambda: ["launch", None], None, None, None, 1)
    assert row == {"us": None} and timed == [3]


def test_cuda_bars_are_ratios_to_the_best_peer_of_the_same_information():
    rows = list(cuda_rows())
    bars = {b["what"]: b for b in bench_cuda.judge(rows, {"gpu": "NVIDIA H200"})}
    decode = bars["2-bit 14336x4096 M=1..8, humming / ours"]
    assert (decode["measured"], decode["bar"], decode["met"]) == (pytest.approx(1.8), 1.7, True)
    both = bars["4-bit 4096x4096 M=1..2, humming and tinygemm / ours"]
    assert both["measured"] == pytest.approx(1.2) and both["note"].startswith(bench_cuda.CLOSES)
    assert bars["8-bit M=16..128, ours / humming"]["measured"] == pytest.approx(10 / 18)
    assert bars["8-bit M>=512, ours / cuBLAS fp16"]["met"] is True
    assert bars["4-bit M=2048, cuBLAS fp16 and humming / ours"]["met"] is False
    assert bars["4-bit transpose=False / forward"]["met"] is False
    assert bars["host us of a call of ops.qmm"]["met"] is True
    share = "2-bit 4096x4096 M=1..2, limit with x and y / ours"  # 8 us and 8192 values at 2 TB/s, of 10 us
    with_rate = {b["what"]: b for b in bench_cuda.judge(rows, {"gpu": "NVIDIA H200", "read_tb_s": 2.0})}
    assert with_rate[share]["measured"] == pytest.approx(0.8 + 8192 * 2 / 2e6 / 10)
    assert with_rate[share]["met"] is True and bars[share]["met"] is None
    assert not [what for what in bars if what.endswith(", us")], "microseconds count on an H100 only"
    on_h100 = {b["what"]: b for b in bench_cuda.judge(rows, {"gpu": "NVIDIA H100 80GB HBM3"})}
    assert on_h100["4-bit 14336x4096 M=1..8, us"]["met"] is True
    closing = [b for b in bars.values() if b["note"].startswith(bench_cuda.CLOSES)]
    assert len(closing) == 9 + 3 + 3
    for row in rows:
        row["peers"].pop("humming", None)
    without = {b["what"]: b for b in bench_cuda.judge(rows, {"gpu": "NVIDIA H200"})}
    assert without["2-bit 14336x4096 M=1..8, humming / ours"]["met"] is None
    assert all(b["met"] is None for b in bench_cuda.judge([], {}))


def test_the_readme_shows_cuda_times_with_their_share_and_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.section("bench_cuda") == "No run of `tools/bench_cuda.py` is on file."
    machine = {"gpu": "NVIDIA H200", "date": "2026-11-29T10:00:00", "bf16_tflops": 790.0, "read_tb_s": 4.4}
    machine |= {
        "command": "python tools/bench_cuda.py",
        "commit": "0123456789ab",
        "versions": {"torch": "2.11"},
    }
    rows = list(cuda_rows())
    bars = bench_cuda.judge(rows, machine)
    result = {"machine": machine, "bars": bars, "rows": rows, "missing": ["a peer: why"]}
    (tmp_path / "cuda-2026-11-29.json").write_text(json.dumps(result))
    said = readme_tables.section("bench_cuda")
    assert "NVIDIA H200, reads 4.40 TB/s" in said and "commit 012345678;" in said
    assert "| 14336x4096, 4-bit | 10, 80%, 1.2t |" in said and "1.8h" in said
    assert "| qmm_n, 4-bit 64x64, M=128 | 13 | 38% | forward 0.769 |" in said
    assert "| 2-bit 14336x4096 M=1..8, humming / ours | 1.8 | >= 1.7 | yes |" in said
    assert "Not timed: a peer: why" in said
