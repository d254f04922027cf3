"""Which form of qmm_stream.cu is fastest for many rows on a Hopper GPU: for ops/cuda.py's qmm_stream_shape.

    python tools/tune_many.py --out FILE [--limit 60] [--prepare] [--bits 2 4 8] [--rows 16 64] [--op q8mm]
    python tools/bench_cuda.py --tuning FILE ...      the benchmark with what was found

For each cell (rows of bfloat16, shape, bits; groups of 64) every form is first checked against float64 and
for the same bits when repeated, then timed as bench_cuda.py times, with as many ranks as ops.cuda would
choose; the two fastest then with every other number of ranks. A form is what ops.cuda.qmm_stream_shape
takes: tuning (rows of x a block, blocks a multiprocessor) and macros. Up to 16 rows qmv_stream.cu, eight
rows at a time, is timed too. Cells that missed their bar on 2026-11-29 come first. FILE, written after each:

    best       [{bits, N, K, M, transpose, form, ranks, us, now: {form, ranks, us}}]  now: of ops.cuda
    all        [{bits, N, K, M, transpose, form, ranks, us, failed}]                   us null where it failed
    clusters   {blocks a multiprocessor: {ranks: clusters that are resident at once}}

--op q8mm: the forms of q8_stream.cu instead (q8_stream_shape), with a scale a row and with groups, each cell
beside torch._int_mm (int_mm_us in `best`, with group_size, per_row instead of transpose).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import bench_cuda as bench

from mlxq.format import Format

TYPES = "bfloat16", "bfloat16"
SMALL, LONG, LARGE, WIDE = bench.MAIN_SHAPES[2], bench.LONG_SHAPE, bench.MAIN_SHAPES[1], bench.MAIN_SHAPES[0]
FEW_ROWS = "qmv_stream"  # as a form: eight rows at a time


def cells(bits: list[int], rows: list[int] | None) -> list[tuple]:
    """(bits, M, N, K, transpose), the most important first."""
    found = [
        *((16, *SMALL, True), (64, *LONG, True), (128, *SMALL, True), (128, *WIDE, False)),
        *((64, *LARGE, True), (64, *SMALL, True), (16, *LARGE, True), (32, *SMALL, True)),
        *((512, *SMALL, True), (128, *LARGE, True), (32, *LARGE, True)),
        *((M, *WIDE, True) for M in (16, 64, 32, 128, 512)),
        *((M, *LONG, True) for M in (16, 32, 128)),
        *((512, *WIDE, False), (2048, *WIDE, False), (512, *LARGE, True), (512, *LONG, True)),
        *((64, *WIDE, False), (256, *WIDE, False), (256, *LONG, True), (16, *WIDE, False)),
    ]
    return [(b, *cell) for cell in found for b in bits if not rows or cell[0] in rows]


def forms(bits: int, M: int, transpose: bool) -> list[tuple]:
    """((rows, blocks), ((macro, value), ...)), the most promising first."""
    rows = next((n for n in (16, 32, 64, 128) if n >= M), 256)
    turned = int(transpose and bits < 8)
    plain, single = ((("TURNED", turned), ("BUFFERS", buffers), ("HALVES", 1)) for buffers in (2, 1))
    wide = ("TURNED", 0), ("BUFFERS", 1), ("HALVES", 2)
    found = {
        16: [((16, 3), plain), ((16, 2), plain), ((16, 3), single), ((16, 2), single), ((16, 1), plain)],
        32: [((32, 2), plain), ((32, 3), single), ((32, 2), single), ((32, 1), plain)],
        64: [((64, 2), plain), ((64, 2), single), ((64, 1), plain), ((32, 3), single), ((32, 2), plain)],
        128: [
            ((64, 2), plain),
            ((128, 1), plain),
            ((64, 2), single),
            ((64, 1), plain),
            ((128, 1), single),
            ((128, 1), wide),
        ],
        256: [((256, 1), plain), ((128, 1), plain), ((64, 2), plain), ((128, 1), wide)],
    }[rows]
    if transpose and bits < 8:
        unturned = ("TURNED", 0), *plain[1:]
        found += [(tuning, unturned) for tuning, _ in found[: 2 if rows >= 128 else 1]]
        # elsewhere a stage of words lasts two steps
        found.append((found[0][0], (*plain, ("MOST_UNROLLED", 2))))
    # where clusters of more ranks do not lie on the chip; x turned where the table has it so
    kinds = [(("TURNED", int(turned and rows <= 32)), *kind[1:]) for kind in (single, plain)]
    usual = (rows, 2 if rows <= 64 else 1)
    kinds = kinds[:1] if rows <= 32 else kinds[1:] if rows == 256 else kinds
    return found + [(usual, (*kind, ("PARTS", parts))) for kind in kinds for parts in (2, 3, 4)]


def shape_of(form: tuple, bits: int, M: int, N: int, K: int, transpose: bool, gpu: dict):
    from mlxq.ops import cuda

    tuning, changed = form
    fmt = Format(bits, bench.GROUP_SIZE)
    return cuda.qmm_stream_shape(M, N, K, fmt, *TYPES, gpu, transpose, tuning, **dict(changed))


def candidates(bits: int, M: int, N: int, K: int, transpose: bool, gpu: dict):
    """(form, shape), each kernel once."""
    seen = []
    for form in forms(bits, M, transpose):
        shape = shape_of(form, bits, M, N, K, transpose, gpu)
        if shape is None or (shape["defines"]["PARTS"] > 1 and not resident_ranks(shape, M, gpu)):
            continue
        if shape["defines"] not in seen and valid_ranks(shape, M, gpu):
            seen.append(shape["defines"])
            yield form, shape


def few_at_once(cuda, device: int, w, M: int):
    """A product of up to 16 rows as two of qmv_stream.cu, or None."""
    pointers = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
    parts = [(first, min(8, M - first)) for first in range(0, M, 8)]
    launches = [cuda._stream(device, pointers, rows, w.N, w.K, w.format, *TYPES) for _, rows in parts]
    if None in launches:
        return None

    def launch(stream, x, y, early):
        for (first, _), one in zip(parts, launches, strict=True):
            one(stream, x + first * w.K * 2, y + first * w.N * 2, early=early)

    return launch


def launch_of(cuda, device: int, w, M: int, transpose: bool, shape: dict, ranks=None, parts=None):
    """A launch that takes (x, y), if in parts then with a workspace of its own.

    ranks: with the shape's PARTS; None: ops.cuda's choice among `parts`, or with the shape's PARTS.
    """
    import torch

    pointers = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
    about = M, w.N, w.K, w.format, *TYPES, transpose, shape, ranks
    launch = cuda._stream_launch(device, pointers, *about, parts=parts or (shape["defines"]["PARTS"],))
    floats = getattr(launch, "floats", 0)
    workspace = torch.empty(floats, device=bench.DEVICE) if floats else None

    def start(stream, x, y, early):
        launch(stream, x, y, workspace.data_ptr(), early=early)

    if not floats:
        start = functools.partial(launch)
    start.config, start.parts = launch.config, getattr(launch, "parts", 1)
    return start


def valid_ranks(shape: dict, M: int, gpu: dict) -> list[int]:
    """Numbers of ranks that leave none without a share and ask for at most twice the blocks that fit."""
    tiles, units = shape["out_tiles"] * -(-M // shape["rows"]), shape["units"]
    most, parts = 2 * shape["defines"]["BLOCKS"] * gpu["multiprocessors"], shape["defines"].get("PARTS", 1)
    shares = ((r, r * parts) for r in range(1, 9))
    return [r for r, n in shares if -(-units // n) * (n - 1) < units and (n == 1 or tiles * n <= most)]


def resident_ranks(shape: dict, M: int, gpu: dict) -> list[int]:
    """Of these, those with no more blocks than fit: beyond, more parts only cost more sums."""
    tiles, defines = shape["out_tiles"] * -(-M // shape["rows"]), shape["defines"]
    room = defines["BLOCKS"] * gpu["multiprocessors"]
    return [r for r in valid_ranks(shape, M, gpu) if tiles * r * defines["PARTS"] <= room]


def apply(best: list[dict]) -> None:
    """Make ops.cuda choose what was found, for these shapes and rows."""
    from mlxq.ops import cuda

    chosen = {(b["bits"], b["M"], b["N"], b["K"], b["transpose"]): b for b in best if b["form"] != FEW_ROWS}
    usual = cuda._many_streamed

    def _many_streamed(device, pointers, M, N, K, fmt, x_type, s_type, transpose):
        found = chosen.get((fmt.bits, M, N, K, transpose))
        if found is None or fmt.group_size != bench.GROUP_SIZE or (x_type, s_type) != TYPES:
            return usual(device, pointers, M, N, K, fmt, x_type, s_type, transpose)
        tuning, changed = found["form"]
        about = M, N, K, fmt, x_type, s_type
        shape = cuda.qmm_stream_shape(*about, cuda._device(device), transpose, tuple(tuning), **dict(changed))
        return cuda._stream_launch(device, pointers, *about, transpose, shape, found["ranks"])

    cuda._many_streamed = _many_streamed


def int8_cells(bits: list[int], rows: list[int] | None) -> list[tuple]:
    """(bits, group size, per_row, M), the most important first."""
    found = [(64, True, M) for M in (128, 512, 2048, 32)] + [(64, False, M) for M in (512, 128, 2048, 32)]
    found += [(128, False, M) for M in (512, 128, 2048, 32)]
    return [(b, *cell) for cell in found for b in sorted(bits, reverse=True) if not rows or cell[2] in rows]


def int8_shapes(cell: tuple, gpu: dict):
    """(form, shape of q8_stream.cu), each kernel once."""
    from mlxq.ops import cuda

    bits, group_size, per_row, M = cell
    rows = next((n for n in (16, 32, 64, 128) if n >= M), 256)
    tunings = {
        16: [(16, 2), (16, 3), (16, 1)],
        32: [(32, 2), (32, 3), (32, 1)],
        64: [(64, 2), (64, 1), (32, 3)],
        128: [(128, 1), (64, 2), (64, 1)],
        256: [(256, 1), (128, 1), (64, 2)],
    }[rows]
    changes = [{"BUFFERS": n} for n in (1, 2)]
    for tuning in tunings:
        for changed in changes:
            if tuning[0] == 256 and not per_row:
                continue  # more sums than registers
            tight = tuning[1] == 3 or (not per_row and (tuning == (64, 2) or (tuning[1] == 1 and bits == 2)))
            if (tight and changed["BUFFERS"] == 2) or (tuning == (32, 3) and (bits, group_size) == (8, 128)):
                continue  # spills
            about = M, *WIDE, Format(bits, group_size), TYPES[1], TYPES[0], 1, per_row, gpu
            shape = cuda.q8_stream_shape(*about, tuning, **changed)
            if shape is not None:
                yield (tuning, tuple(changed.items())), shape


class Int8Cell:
    """As Cell, of q8mm: int8 rows with a scale each."""

    def __init__(self, torch, cell: tuple, weights: list, others: list):
        from mlxq.ops import cuda

        self.torch, self.cuda, self.weights, self.others, self.cell = torch, cuda, weights, others, cell
        self.bits, self.group_size, self.per_row, self.M = cell
        self.device = torch.cuda.current_device()
        self.gpu = cuda._device(self.device)
        self.x = torch.randint(-127, 128, (self.M, WIDE[1]), device=bench.DEVICE, dtype=torch.int8)
        self.scales = torch.rand(self.M, device=bench.DEVICE) + 0.5
        self.y = torch.empty(self.M, WIDE[0], device=bench.DEVICE, dtype=torch.bfloat16)
        exact = bench.float64_weight(torch, weights[0])
        self.expected = self.x.double() @ exact.T * self.scales.double()[:, None]
        self.rows: list[dict] = []

    def call(self, launch):
        stream = self.torch._C._cuda_getCurrentRawStream(self.device)
        pointers = (a.data_ptr() for a in (self.x, self.scales, self.y))
        launch(stream, *pointers, early=self.gpu["early"])

    def timed(self, form, shape: dict, ranks=None) -> dict:
        names = ("bits", "group_size", "per_row", "M")
        row = dict(zip(names, self.cell, strict=True)) | {
            "N": WIDE[0],
            "K": WIDE[1],
            "form": form,
            "us": None,
        }
        self.rows.append(row)

        def make():
            launches = []
            for w in self.weights:
                pointers = [a.data_ptr() for a in (w.words, w.scales, w.biases)]
                about = self.M, *WIDE, w.format, TYPES[1], TYPES[0], 1, self.per_row
                launches.append(self.cuda._q8_stream_launch(self.device, pointers, *about, shape, ranks))
            row["ranks"] = launches[0].config.grid_x
            return launches

        answer = self.y, self.expected, bench.ERROR_LIMIT["qmv"]
        bench.check_and_time(self.torch, row, make, self.call, *answer)
        if row.get("failed"):
            print(f"{row['form']} ranks {ranks}: {row['failed']}", flush=True)
        return row

    def run(self) -> dict | None:
        shapes = [(self.timed(form, shape), shape) for form, shape in int8_shapes(self.cell, self.gpu)]
        good = sorted((one for one in shapes if one[0]["us"]), key=lambda one: one[0]["us"])
        for row, shape in good[:2]:
            for ranks in valid_ranks(shape, self.M, self.gpu):
                if ranks != row["ranks"]:
                    self.timed(row["form"], shape, ranks)
        good = [row for row in self.rows if row["us"]]
        if not good:
            return None
        calls = [functools.partial(self.torch._int_mm, self.x, other.T) for other in self.others]
        found = min(good, key=lambda row: row["us"]) | {"int_mm_us": bench.microseconds(self.torch, calls)}
        kind = "a scale a row" if self.per_row else f"groups of {self.group_size}"
        what = f"{self.bits}-bit {kind} M={self.M}"
        ratio = found["us"] / found["int_mm_us"]
        print(
            f"{what}: {found['us']:.2f} us, {found['form']}, ranks {found['ranks']}; "
            f"torch._int_mm {found['int_mm_us']:.2f}: {ratio:.2f}; now {shapes[0][0]['us']}",
            flush=True,
        )
        return found


def tune_int8(args) -> int:
    import torch

    from mlxq.ops import cuda

    wanted = int8_cells(args.bits, args.rows)
    on_gpu = torch.cuda.is_available()
    gpu = cuda._device(torch.cuda.current_device()) if on_gpu else bench.H200
    shapes = [shape for cell in wanted for _, shape in int8_shapes(cell, gpu)]
    flags = {("q8_stream.cu", cuda.options(gpu["arch"], shape["defines"])): True for shape in shapes}
    bench.compile_kernels(list(flags), bench.common.cores())
    if args.prepare:
        return 0
    begin = time.monotonic()
    rotated = bench.rotated_bytes(torch.cuda.get_device_properties(0).L2_cache_size)
    N, K = WIDE
    best, every, weights, skipped = [], [], {}, []
    torch.manual_seed(0)
    others = [
        torch.randint(-127, 128, (N, K), device=bench.DEVICE, dtype=torch.int8)
        for _ in range(bench.copies(rotated, N * K))
    ]
    for cell in wanted:
        if time.monotonic() - begin > args.limit:
            skipped.append(cell)
            continue
        about = bits, group_size, per_row = cell[:3]
        if about not in weights:
            count = bench.copies(rotated, N * K * bits // 8)
            fmt = Format(bits, group_size)
            weights[about] = [bench.random_weight(torch, fmt, N, K, per_row=per_row) for _ in range(count)]
        one = Int8Cell(torch, cell, weights[about], others)
        found = one.run()
        every += one.rows
        best += [found] if found else []
        result = {"tool": "tune_many", "op": "q8mm", "gpu": torch.cuda.get_device_name()}
        args.out.write_text(json.dumps(result | {"best": best, "all": every, "skipped": skipped}) + "\n")
    print(f"{len(every)} times in {time.monotonic() - begin:.0f} s, {len(skipped)} cells skipped", flush=True)
    return int(any(row.get("failed") for row in every))


def compile_all(wanted, gpu: dict) -> None:
    """Every candidate's machine code, on all cores."""
    from mlxq.ops import cuda

    flags = {}
    for cell in wanted:
        for _, shape in candidates(*cell, gpu):
            flags["qmm_stream.cu", cuda.options(gpu["arch"], shape["defines"])] = True
        bits, M, N, K, transpose = cell
        few = (
            transpose and M <= 16 and cuda.stream_shape(8, N, K, Format(bits, bench.GROUP_SIZE), *TYPES, gpu)
        )
        if few:
            flags["qmv_stream.cu", cuda.options(gpu["arch"], few["defines"])] = True
    bench.compile_kernels(list(flags), bench.common.cores())


class Cell:
    """A cell on the GPU: its weights, rows, exact answer, and what was found."""

    def __init__(self, torch, cell: tuple, weights: list):
        from mlxq.ops import cuda

        self.torch, self.cuda, self.weights = torch, cuda, weights
        self.bits, self.M, self.N, self.K, self.transpose = cell
        self.device = torch.cuda.current_device()
        self.gpu = cuda._device(self.device)
        exact = bench.float64_weight(torch, weights[0])
        reduced, out = (self.K, self.N) if self.transpose else (self.N, self.K)
        self.x = torch.randn(self.M, reduced, device=bench.DEVICE).bfloat16()
        self.y = torch.empty(self.M, out, device=bench.DEVICE, dtype=torch.bfloat16)
        self.expected = self.x.double() @ (exact.T if self.transpose else exact)
        self.rows: list[dict] = []

    def call(self, launch):
        stream = self.torch._C._cuda_getCurrentRawStream(self.device)
        launch(stream, self.x.data_ptr(), self.y.data_ptr(), early=self.gpu["early"])

    def timed(self, form, ranks, make) -> dict:
        """A row: make(w) gives the launch for a copy of the weight."""
        cell = {"bits": self.bits, "N": self.N, "K": self.K, "M": self.M, "transpose": self.transpose}
        row = cell | {"form": form, "ranks": ranks, "us": None}
        self.rows.append(row)
        answer = self.y, self.expected, bench.ROUNDED_LIMIT
        launches = bench.check_and_time(
            self.torch, row, lambda: [make(w) for w in self.weights], self.call, *answer
        )
        if None in launches:
            self.rows.pop()
            return row
        if row.get("failed"):
            print(f"{row['form']} ranks {ranks}: {row['failed']}", flush=True)
        return row

    def run(self, clusters: dict) -> dict | None:
        about = self.bits, self.M, self.N, self.K, self.transpose
        shapes = []
        for form, shape in candidates(*about, self.gpu):
            launch = self.launch(self.weights[0], shape, None)
            blocks = shape["defines"]["BLOCKS"]
            if str(blocks) not in clusters:
                kernel = self.cuda._kernel(
                    self.device, "qmm_stream.cu", "qmm_stream",
                    self.cuda.options(self.gpu["arch"], shape["defines"]), shape["shared"],
                )  # fmt: skip
                clusters[str(blocks)] = {
                    r: self.cuda._clusters_at_once(kernel, shape["threads"], r) for r in range(2, 9)
                }
            make = functools.partial(self.launch, shape=shape, ranks=launch.config.grid_x)
            row = self.timed(form, launch.config.grid_x, make)
            shapes.append((row, shape))
        good = sorted((one for one in shapes if one[0]["us"]), key=lambda one: one[0]["us"])
        for n, (row, shape) in enumerate(good):
            of_parts = resident_ranks(shape, self.M, self.gpu) if shape["defines"]["PARTS"] > 1 else []
            for ranks in valid_ranks(shape, self.M, self.gpu) if n < 2 else of_parts:
                if ranks != row["ranks"]:
                    self.timed(row["form"], ranks, functools.partial(self.launch, shape=shape, ranks=ranks))
        if self.M <= 16 and self.transpose:
            self.timed(FEW_ROWS, 1, lambda w: few_at_once(self.cuda, self.device, w, self.M))
        good = [row for row in self.rows if row["us"]]
        if not good:
            return None
        fmt = self.weights[0].format
        default = self.cuda.qmm_stream_shape(self.M, self.N, self.K, fmt, *TYPES, self.gpu, self.transpose)
        chosen = self.launch(self.weights[0], default, None, range(1, 5))
        default = default | {"defines": default["defines"] | {"PARTS": chosen.parts}}
        form = next((row["form"] for row, shape in shapes if shape == default), None)
        now = [row for row in self.rows if row["form"] == form and row["ranks"] == chosen.config.grid_x]
        now = now[0] if now else None
        found = min(good, key=lambda row: row["us"])
        now = now and {key: now[key] for key in ("form", "ranks", "us")}
        what = f"{self.bits}-bit {self.N}x{self.K} M={self.M}{'' if self.transpose else ' transpose=False'}"
        said = " ".join(f"{key} {now[key]}" for key in now) if now else "not timed"
        print(
            f"{what}: {found['us']:.2f} us, {found['form']}, ranks {found['ranks']}; now {said}", flush=True
        )
        return found | {"now": now}

    def launch(self, w, shape, ranks, parts=None):
        return launch_of(self.cuda, self.device, w, self.M, self.transpose, shape, ranks, parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no cell is begun")
    parser.add_argument("--prepare", action="store_true", help="compile on all cores and stop")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", help="only cells of so many rows")
    parser.add_argument("--op", choices=("qmm", "q8mm"), default="qmm")
    args = parser.parse_args()
    if args.op == "q8mm":
        return tune_int8(args)
    wanted = cells(args.bits, args.rows)
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
    best, every, weights, clusters, skipped = [], [], {}, {}, []
    torch.manual_seed(0)
    for cell in wanted:
        bits, M, N, K, transpose = cell
        if time.monotonic() - begin > args.limit:
            skipped.append(cell)
            continue
        if (bits, N, K) not in weights:
            fmt = Format(bits, bench.GROUP_SIZE)
            weights[bits, N, K] = bench.rotated_weights(torch, fmt, N, K, rotated)
        one = Cell(torch, cell, weights[bits, N, K])
        found = one.run(clusters)
        every += one.rows
        best += [found] if found else []
        result = {"tool": "tune_many", "gpu": torch.cuda.get_device_name(), "clusters": clusters}
        result |= {"best": best, "all": every, "skipped": skipped}
        args.out.write_text(json.dumps(result) + "\n")
    print(f"{len(every)} times in {time.monotonic() - begin:.0f} s, {len(skipped)} cells skipped", flush=True)
    return int(any(row.get("failed") for row in every))


if __name__ == "__main__":
    sys.exit(main())
