"""Which kernel, in which of its shapes, is fastest for few rows on an NVIDIA GPU: for ops/cuda.py's tables.

    python tools/tune_cuda.py --out FILE [--limit 60] [--prepare]
    python tools/bench_cuda.py --tuning FILE      the benchmark with what was found

For the large shapes of bench_cuda.py and 1, 2, 4 and 8 rows of bfloat16, in groups of 64, qmv.cu as its
table has it (warps, blocks that fit a multiprocessor, bytes of a chunk, log2 of warps a tile) and every
candidate of qmv_stream.cu (as ops.cuda.stream_tunings: warps, bytes of a segment, KiB asked for ahead, blocks
that fit a multiprocessor, blocks started for each, units at a time, rows, ranks) are checked against float64,
twice with the same bits, and timed as bench_cuda.py times. 8 rows and 1 row come first; for 2 and 4 only
what was within 8 % of the best for these. What is within 8 % of a cell's best, and what the tables choose, is
timed again, by turns; the best is one of them. FILE:

    best   [{bits, N, K, M, kernel, tuning, us, now: {kernel, tuning, us}}]   now: what the tables choose
    all    [{bits, N, K, M, kernel, tuning, shape, us, failed}]               us null where it failed;
           and rounds: all times of what was timed by turns, whose median is us
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import bench_cuda as bench

from mlxq.format import Format

ROWS = (8, 1, 4, 2)
CLOSE = 1.08  # one form differs by up to 7 % from one moment to the next, warm as it is
# (warps, segment, blocks that fit, blocks started, units at a time, rows, ranks)
STREAM = [
    (8, 128, 1, 1, 8, 32, 2),
    (8, 64, 1, 1, 4, 32, 2),
    (8, 64, 1, 1, 4, 32, 1),
    (8, 64, 1, 1, 4, 16, 2),
    (8, 64, 1, 1, 4, 16, 1),
    (16, 64, 1, 1, 2, 16, 2),
    (16, 64, 1, 1, 2, 16, 1),
    (8, 64, 2, 1, 2, 32, 2),
    (8, 64, 2, 1, 4, 16, 2),
    (8, 128, 2, 1, 2, 16, 2),
    (8, 128, 2, 2, 2, 16, 2),
    (14, 128, 1, 1, 2, 16, 2),
    (14, 64, 1, 1, 4, 16, 2),
]
AHEAD = {2: (16, 24, 32, 48), 4: (24, 32, 40, 48), 8: (40, 48, 56, 64)}  # KiB
SHAPES = (bench.MAIN_SHAPES[1], bench.MAIN_SHAPES[0], bench.LONG_SHAPE, bench.MAIN_SHAPES[2])
TYPES = "bfloat16", "bfloat16"


@contextlib.contextmanager
def forced(kernel: str, tuning: tuple):
    """ops.cuda with this tuning of this kernel."""
    from mlxq.ops import cuda

    name, found = {"qmv": ("qmv_tuning", tuning), "qmv_stream": ("stream_tunings", [tuning])}[kernel]
    with mock.patch.object(cuda, name, lambda *a: found):
        yield cuda


def shape_of(kernel: str, tuning: tuple, bits: int, M: int, N: int, K: int, gpu: dict):
    """As ops.cuda has it; None where the kernel does not serve."""
    with forced(kernel, tuning) as cuda:
        make = cuda.qmv_shape if kernel == "qmv" else cuda.stream_shape
        return make(M, N, K, Format(bits, bench.GROUP_SIZE), *TYPES, gpu)


def table_of(bits: int, M: int, N: int, K: int, gpu: dict) -> tuple[int, ...]:
    """What ops.cuda chooses of qmv_stream.cu's tunings."""
    from mlxq.ops import cuda

    tunings = cuda.stream_tunings(bits, K * bits // 8, -(-N // 16), gpu["multiprocessors"])
    return next(t for t in tunings if shape_of("qmv_stream", t, bits, M, N, K, gpu))


def candidates(bits: int, M: int, N: int, K: int, gpu: dict):
    """(kernel, tuning, shape), each shape once and what the tables choose first; of qmv only that."""
    from mlxq.ops import cuda

    seen = []
    columns = next(c for c in (1, 2, 4, 8) if c >= M)
    now = table_of(bits, M, N, K, gpu)
    table = cuda.qmv_tuning(bits, columns, -(-N // 16), gpu["multiprocessors"])
    streams = [(*of[:2], ahead, *of[2:]) for of in STREAM for ahead in AHEAD[bits]]
    for kernel, tunings in (("qmv_stream", [now, *streams]), ("qmv", [table])):
        for tuning in tunings:
            if kernel == "qmv_stream" and tuning[0] * tuning[1] * tuning[-1] > K * bits // 8:
                continue  # some warps would have nothing
            if kernel == "qmv_stream" and min(64, tuning[1] * 8 // bits) * bits * tuning[5] < 256:
                continue  # words are brought by twos
            shape = shape_of(kernel, tuning, bits, M, N, K, gpu)
            if shape is not None and (kernel, shape) not in seen:
                seen.append((kernel, shape))
                yield kernel, tuning, shape


def launch_of(cuda, kernel: str, device: int, w, M: int):
    pointers = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
    if kernel == "qmv":
        return cuda._qmv(device, pointers, 1, M, w.N, w.K, w.format, *TYPES, False)
    return cuda._stream(device, pointers, M, w.N, w.K, w.format, *TYPES)


def by_turns(torch, timed: list[tuple[dict, list]], keep: tuple) -> None:
    """Times rows near the best, and those of tuning `keep`, by turns: us is the median, `rounds` all times.

    timed: (row, calls of its launches); a row that failed has no us.
    """
    least = min((row["us"] for row, _ in timed if row["us"] is not None), default=0)
    good = [one for one in timed if one[0]["us"] is not None]
    again = [one for one in good if one[0]["us"] < CLOSE * least or tuple(one[0]["tuning"]) == keep]
    graphs = {n: bench.Replayed(torch, calls) for n, (_, calls) in enumerate(again)}
    for n, rounds in bench.by_turns(graphs).items():
        again[n][0].update(rounds=rounds, us=statistics.median(rounds))


def apply(best: list[dict]) -> None:
    """Make ops.cuda choose what was found, for these shapes and rows."""
    from mlxq.ops import cuda

    chosen = {(b["bits"], b["N"], b["K"], b["M"]): (b["kernel"], tuple(b["tuning"])) for b in best}
    qmv, stream = cuda._qmv, cuda._stream

    def of(fmt, N, K, M):
        return chosen.get((fmt.bits, N, K, M)) if fmt.group_size == bench.GROUP_SIZE else None

    def _qmv(device, pointers, batches, M, N, K, fmt, *rest):
        found = of(fmt, N, K, M)
        with forced(*found) if found and found[0] == "qmv" else contextlib.nullcontext():
            return qmv(device, pointers, batches, M, N, K, fmt, *rest)

    def _stream(device, pointers, M, N, K, fmt, *rest):
        found = of(fmt, N, K, M)
        if found and found[0] == "qmv":
            return None
        with forced(*found) if found else contextlib.nullcontext():
            return stream(device, pointers, M, N, K, fmt, *rest)

    cuda._qmv, cuda._stream = _qmv, _stream


def compile_all(cells, gpu: dict) -> None:
    """Every candidate's machine code, on all cores."""
    from mlxq.ops import cuda

    wanted = []
    for cell in cells:
        for kernel, _, shape in candidates(*cell, gpu):
            wanted.append((f"{kernel}.cu", cuda.options(gpu["arch"], shape["defines"])))
    bench.compile_kernels(list(dict.fromkeys(wanted)), bench.common.cores())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no cell is begun")
    parser.add_argument("--prepare", action="store_true", help="compile on all cores and stop")
    args = parser.parse_args()
    cells = [(bits, M, *shape) for M in ROWS for shape in SHAPES for bits in (8, 2, 4)]
    import torch

    from mlxq.ops import cuda

    on_gpu = torch.cuda.is_available()
    begin = time.monotonic()
    compile_all(cells, cuda._device(torch.cuda.current_device()) if on_gpu else bench.H200)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    if args.prepare:
        return 0
    device, begin = torch.cuda.current_device(), time.monotonic()
    gpu = cuda._device(device)
    rotated = bench.rotated_bytes(torch.cuda.get_device_properties(0).L2_cache_size)
    best, every, weights = [], [], {}
    torch.manual_seed(0)
    for bits, M, N, K in cells:
        if time.monotonic() - begin > args.limit:
            print("the limit is reached", flush=True)
            break
        if (bits, N, K) not in weights:
            fmt = Format(bits, bench.GROUP_SIZE)
            weights[bits, N, K] = bench.rotated_weights(torch, fmt, N, K, rotated)
        ws = weights[bits, N, K]
        x = torch.randn(M, K, device="cuda").bfloat16()
        y = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
        expected = x.double() @ bench.float64_weight(torch, ws[0]).T
        rows, timed, now = [], [], "qmv_stream"
        table = table_of(bits, M, N, K, gpu)
        before = [r for r in every if r["us"] is not None and (r["bits"], r["N"], r["K"]) == (bits, N, K)]
        least = {m: min(r["us"] for r in before if r["M"] == m) for m in {r["M"] for r in before}}
        close = [r["tuning"] for r in before if r["us"] < CLOSE * least[r["M"]]]
        for kernel, tuning, shape in candidates(bits, M, N, K, gpu):
            if len(least) > 1 and kernel == now and tuning not in close and tuple(tuning) != tuple(table):
                continue
            row = {"bits": bits, "N": N, "K": K, "M": M, "kernel": kernel, "tuning": tuning, "us": None}
            row["shape"] = {k: v for k, v in shape.items() if k != "defines"} | shape["defines"]
            rows.append(row)

            def make(how=(kernel, tuning), M=M, ws=ws):
                with forced(*how):
                    return [launch_of(cuda, how[0], device, w, M) for w in ws]

            def call(launch, x=x, y=y):
                stream = torch._C._cuda_getCurrentRawStream(device)
                launch(stream, x.data_ptr(), y.data_ptr(), early=gpu["early"])

            most = bench.ERROR_LIMIT[kernel]
            launches = bench.check_and_time(torch, row, make, call, y, expected, most)
            timed.append((row, [functools.partial(call, one) for one in launches]))
        by_turns(torch, timed, tuple(table))
        every += rows
        same = [r for r in rows if r["kernel"] == now and tuple(r["tuning"]) == tuple(table)]
        for row in rows:
            if "failed" in row:
                what = f"{row['kernel']} {row['tuning']} {row['failed']}"
                print(f"{bits}-bit {N}x{K} M={M}: {what}", flush=True)
        good = [r for r in rows if r["us"] is not None]
        if not good:
            continue
        found = min(good, key=lambda r: ("rounds" not in r, r["us"]))
        best.append(found | {"now": {"kernel": now, "tuning": table, "us": same[0]["us"] if same else None}})
        print(f"{bits}-bit {N}x{K} M={M}: {found['kernel']} {found['tuning']} {found['us']:.2f} us; "
              f"now {now} {table} {best[-1]['now']['us']}", flush=True)  # fmt: skip
        found = {"tool": "tune_cuda", "gpu": torch.cuda.get_device_name(), "best": best, "all": every}
        args.out.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
