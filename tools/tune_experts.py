"""Which product is fastest for rows that choose experts on a Hopper GPU: for ops.cuda.grouped_shape.

    python tools/tune_experts.py --out FILE [--limit 60] [--prepare] [--bits 2 4 8] [--tokens 8 512]

For each cell (tokens with two of eight experts each, as bench_cuda.py has them; bfloat16, groups of 64) every
form is first checked against float64 and for the same bits when repeated, then timed as bench_cuda.py times.
A form is a kernel and how it is compiled:

    qmv                                            a pair at a time
    qmv_stream  as ops.cuda.stream_tunings
    qmm_stream  (rows of a tile, blocks a multiprocessor), macros, ranks (0: as ops.cuda chooses)

FILE, written after each cell:

    best       [{bits, tokens, N, K, transpose, form, us, now}]   now: {form, us} of ops.cuda
    all        [{bits, tokens, N, K, transpose, form, us, sort_us, failed}]   sort_us: of experts.cu alone
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from unittest import mock

import bench_cuda as bench
import tune_cuda

from mlxq.format import Format

TYPES = "bfloat16", "bfloat16"
SIZE = 4096, 4096


def cells(bits: list[int], tokens: list[int] | None) -> list[tuple]:
    """(bits, tokens, N, K, transpose), the most important first."""
    found = [*((n, True) for n in (512, 8, 1, 32, 128, 2048)), (512, False), (32, False)]
    return [(b, n, *SIZE, transpose) for n, transpose in found for b in bits if not tokens or n in tokens]


def forms(bits: int, tokens: int, transpose: bool) -> list[tuple]:
    """(kernel, how), the most promising first."""
    found = []
    if transpose and tokens <= 32:
        shapes = [(8, 128, 1, 1, 2, 16, 1), (16, 64, 1, 1, 2, 16, 1), (8, 64, 1, 1, 4, 16, 1)]
        shapes += [(8, 64, 1, 1, 4, 32, 1), (8, 64, 1, 1, 4, 16, 2), (8, 128, 2, 2, 2, 16, 2)]
        tunings = [(*of[:2], ahead, *of[2:]) for of in shapes for ahead in tune_cuda.AHEAD[bits]]
        found += [("qmv_stream", tuning) for tuning in tunings]
        found += [("qmv", None)] if tokens <= 8 else []
    plain, single, halves = {}, {"BUFFERS": 1}, {"BUFFERS": 1, "HALVES": 2}
    if tokens <= 32:
        tiles = [(16, 2, plain, 0), (16, 2, plain, 1), (16, 2, plain, 2), (16, 3, single, 0)]
        tiles += [(32, 2, plain, 0), (16, 1, halves, 0)]
    elif tokens <= 128:
        tiles = [(32, 2, plain, 0), (64, 2, plain, 0), (64, 2, single, 0), (80, 2, single, 0)]
        tiles += [(96, 1, plain, 0), (64, 1, halves, 0)]
    else:
        tiles = [(160, 1, plain, 0), (192, 1, plain, 0), (128, 1, plain, 0), (256, 1, plain, 0)]
        tiles += [(80, 2, single, 0), (80, 2, {"BUFFERS": 2}, 0), (64, 2, plain, 0), (160, 1, single, 0)]
        tiles += [(128, 1, halves, 0), (96, 1, halves, 0), (80, 1, halves, 0), (160, 1, plain, 2)]
        tiles += [(160, 1, {"MOST_UNROLLED": 2}, 0)]
    return found + [("qmm_stream", ((rows, blocks), how, ranks)) for rows, blocks, how, ranks in tiles]


def shape_of(form: tuple, bits: int, tokens: int, N: int, K: int, transpose: bool, gpu: dict):
    """(kernel, shape), as ops.cuda.grouped_shape; None where the form does not serve."""
    from mlxq.ops import cuda

    kernel, how = form
    about = N, K, Format(bits, bench.GROUP_SIZE), *TYPES, gpu
    if kernel == "qmv":
        shape = cuda.qmv_shape(1, *about)
    elif kernel == "qmv_stream":
        with mock.patch.object(cuda, "stream_tunings", lambda *a: [how]):
            shape = cuda.stream_shape(8, *about, cuda.tiles_expected(2 * tokens, bench.EXPERTS, 8))
    else:
        shape = cuda.qmm_stream_shape(2 * tokens, *about, transpose, how[0], grouped=True, **how[1])
    return shape and (kernel, shape)


def candidates(bits: int, tokens: int, N: int, K: int, transpose: bool, gpu: dict):
    """(form, (kernel, shape)), each once."""
    seen = []
    for form in forms(bits, tokens, transpose):
        found = shape_of(form, bits, tokens, N, K, transpose, gpu)
        ranks = form[1][2] if form[0] == "qmm_stream" else 0
        if found is not None and (*found, ranks) not in seen:
            seen.append((*found, ranks))
            yield form, found


def compile_all(wanted, gpu: dict) -> None:
    """Every candidate's machine code, on all cores."""
    from mlxq.ops import cuda

    flags = {("experts.cu", cuda.options(gpu["arch"], {"PIECE": 16})): True}
    for cell in wanted:
        for _, (kernel, shape) in candidates(*cell, gpu):
            flags[f"{kernel}.cu", cuda.options(gpu["arch"], shape["defines"])] = True
    bench.compile_kernels(list(flags), bench.common.cores())


class Cell:
    """A cell on the GPU: its weights, rows, exact answer, and what was found."""

    def __init__(self, torch, cell: tuple, weights: list):
        from mlxq.ops import cuda

        self.torch, self.cuda, self.weights = torch, cuda, weights
        self.bits, self.tokens, self.N, self.K, self.transpose = cell
        self.device = torch.cuda.current_device()
        self.gpu = cuda._device(self.device)
        _, self.lhs, self.rhs = next(iter(bench.chosen_experts(torch, self.tokens, bench.DEVICE)))
        reduced, out = (self.K, self.N) if self.transpose else (self.N, self.K)
        self.x = torch.randn(self.tokens, 1, reduced, device=bench.DEVICE).bfloat16()
        self.y = torch.empty(len(self.rhs), out, device=bench.DEVICE, dtype=torch.bfloat16)
        self.expected = torch.empty(len(self.rhs), out, device=bench.DEVICE, dtype=torch.float64)
        exact = bench.float64_weight(torch, weights[0])
        for e in set(self.rhs.tolist()):
            at = (self.rhs == e).nonzero()[:, 0]
            self.expected[at] = self.x[self.lhs[at], 0].double() @ (
                exact[e].T if self.transpose else exact[e]
            )
        self.rows: list[dict] = []

    def call(self, launch):
        side = self.cuda._Torch
        if isinstance(launch, self.cuda._Grouped):
            launch(side, self.x.data_ptr(), "bfloat16", self.y, self.lhs, self.rhs)
        else:
            pointers = (a.data_ptr() for a in (self.x, self.y, self.lhs, self.rhs))
            launch(side.stream(self.device), *pointers)

    def sort(self, launch):
        """experts.cu alone."""
        torch, tiles = self.torch, launch.most_tiles
        x_sorted = torch.empty(launch.rows, launch.reduced, device=bench.DEVICE, dtype=torch.bfloat16)
        table = torch.empty(4 * tiles + launch.rows, device=bench.DEVICE, dtype=torch.int32)
        pointers = [a.data_ptr() for a in (self.x, self.lhs, self.rhs, x_sorted, table)]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        launch.sort(stream, *pointers, pointers[-1] + 16 * tiles, early=True)

    def launch(self, w, form, found):
        pointers = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
        pairs, about = len(self.rhs), (1, self.N, self.K, w.format, *TYPES)
        if form[0] == "qmv":
            sizes = self.tokens, bench.EXPERTS
            return self.cuda._qmv(self.device, pointers, pairs, *about, sizes)
        ranks = (form[1][2] or None) if form[0] == "qmm_stream" else None
        about = pointers, pairs, self.tokens, *about, self.transpose, bench.EXPERTS
        return self.cuda._grouped(self.device, *about, found, ranks)

    def timed(self, form, found) -> dict:
        row = {
            "bits": self.bits,
            "tokens": self.tokens,
            "N": self.N,
            "K": self.K,
            "transpose": self.transpose,
        }
        row |= {"form": form, "us": None}
        self.rows.append(row)

        def make():
            return [self.launch(w, form, found) for w in self.weights]

        answer = self.y, self.expected, bench.ROUNDED_LIMIT
        launches = bench.check_and_time(self.torch, row, make, self.call, *answer, again=2)
        if row["us"] and isinstance(launches[0], self.cuda._Grouped):
            row["sort_us"] = bench.microseconds(self.torch, [functools.partial(self.sort, launches[0])])
        if row.get("failed"):
            print(f"{form}: {row['failed']}", flush=True)
        return row

    def run(self) -> dict | None:
        fmt = self.weights[0].format
        about = 2 * self.tokens, 1, self.N, self.K, fmt, *TYPES, self.gpu, self.transpose, bench.EXPERTS
        default, now = self.cuda.grouped_shape(*about), None
        for form, found in candidates(self.bits, self.tokens, self.N, self.K, self.transpose, self.gpu):
            row = self.timed(form, found)
            if found == default and now is None:
                now = {key: row[key] for key in ("form", "us")}
        good = [row for row in self.rows if row["us"]]
        if not good:
            return None
        found = min(good, key=lambda row: row["us"])
        what = f"{self.bits}-bit, {self.tokens} tokens{'' if self.transpose else ', transpose=False'}"
        for row in sorted(good, key=lambda row: row["us"]):
            print(
                f"{what}: {row['us']:.2f} us (sorting {row.get('sort_us', 0):.2f}) {row['form']}", flush=True
            )
        print(f"{what}: now {now}", flush=True)
        return found | {"now": now}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no cell is begun")
    parser.add_argument("--prepare", action="store_true", help="compile on all cores and stop")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", help="only cells of so many tokens")
    args = parser.parse_args()
    wanted = cells(args.bits, args.tokens)
    import torch

    from mlxq.ops import cuda

    on_gpu = torch.cuda.is_available()
    begin = time.monotonic()
    compile_all(wanted, cuda._device(torch.cuda.current_device()) if on_gpu else bench.H200)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    if args.prepare:
        return 0
    begin = time.monotonic()
    rotated = bench.rotated_bytes(torch.cuda.get_device_properties(0).L2_cache_size)
    best, every, weights, skipped = [], [], {}, []
    torch.manual_seed(0)
    for cell in wanted:
        bits, _, N, K, _ = cell
        if time.monotonic() - begin > args.limit:
            skipped.append(cell)
            continue
        if bits not in weights:
            fmt = Format(bits, bench.GROUP_SIZE)
            weights[bits] = bench.rotated_weights(torch, fmt, N, K, rotated, (bench.EXPERTS,))
        one = Cell(torch, cell, weights[bits])
        found = one.run()
        every += one.rows
        best += [found] if found else []
        result = {"tool": "tune_experts", "gpu": torch.cuda.get_device_name(), "best": best, "all": every}
        args.out.write_text(json.dumps(result | {"skipped": skipped}) + "\n")
    print(f"{len(every)} times in {time.monotonic() - begin:.0f} s, {len(skipped)} cells skipped", flush=True)
    return int(any(row.get("failed") for row in every))


if __name__ == "__main__":
    sys.exit(main())
