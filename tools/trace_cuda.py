"""Clocks of every step inside qmv_stream.cu, on an NVIDIA GPU.

    python tools/trace_cuda.py [--cells 2:8:28672x8192 8:1:14336x4096 ...] [--tuning 8,64,32,1,1,4,32,2]

A cell is bits:rows:NxK, groups of 64, bfloat16; --tuning as ops.cuda.stream_tunings, instead of the table's.
For each: the time with and without marks, as bench_cuda times; how far apart blocks begin and end; then for
each of three warps (multiplies: the first that does; asks; y) the median over blocks of the clock at each
mark, counted from the start of the block's warp that writes y, "name clocks" in the order of the marks:

    multiplies  asked (for x: the kernel before has ended), x (is there, and its sums), made (what it is
                multiplied with), then for each tile wants (its words), has (them), done (multiplied)
    asks        for each stage wants (a place), asked
    y           begins, ready, then for each tile wants (sums), has (them), wrote

The marks are put into the kernel's text (MARKS below), so a change of the kernel may want a change here;
tests/test_trace_cuda.py compiles it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from unittest import mock

import bench_cuda as bench
import tune_cuda

from mlxq.format import Format

CELLS = ("2:8:28672x8192", "2:1:28672x8192", "2:8:14336x4096", "8:8:28672x8192")
WARPS = ("multiplies", "asks", "y")
PLACES = 62  # for clocks, of each warp; then its globaltimer at the start and at the end
BLOCKS = 600
STATE = f"""__device__ u64 trace_[{len(WARPS)}][{BLOCKS}][{PLACES + 2}];
__device__ __forceinline__ void mark(int who, int at) {{
  if (at < {PLACES}) trace_[who][blockIdx.x][at] = clock64();
}}
__device__ __forceinline__ void mark_time(int at) {{
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(trace_[{WARPS.index("y")}][blockIdx.x][{PLACES} + at]));
}}
"""
# what stands in the kernel: what comes before it, and behind it
MARKS = {
    "typedef unsigned long long u64;\n": ("", STATE),
    "      int slot = 0, round = 0, scale_slot = 0, scale_round = 0, row = 0,": ("      int step = 0;\n", ""),
    "          const u32 done = full + 8 * slot;\n": ("          mark(1, 2 * step);\n", ""),
    "          if (++slot == DEPTH) slot = 0, round++;\n          if (s) continue;\n": (
        "          mark(1, 2 * step++ + 1);\n",
        "",
    ),
    "    predecessor_done();  // the kernel before may still read what y is now\n": (
        "    int step = 0;\n    if (lane == 0) mark_time(0), mark(2, 0);\n",
        "    if (lane == 0) mark(2, 1);\n",
    ),
    "        barrier_wait(summed + 8 * buffer, this_round & 1);\n": (
        "        if (lane == 0) mark(2, 2 + 3 * step);\n",
        "        if (lane == 0) mark(2, 3 + 3 * step);\n",
    ),
    "n + 8 < N) to[next + 8] = static_cast<u16>(low >> 16);\n        }\n": (
        "",
        "        if (lane == 0) mark(2, 4 + 3 * step++);\n",
    ),
    "    if (RANKS > 1) cluster_ends(), cluster_wait();  // nobody": (
        "    if (lane == 0) mark_time(1);\n",
        "",
    ),
    "  predecessor_done();\n  dependents_may_start();\n  int slot = 0, round = 0,": (
        "  const bool marks = warp == 0 && lane == 0;\n  int step = 0;\n",
        "",
    ),
    "    __syncwarp();  // all of it is asked for before any is waited for\n": (
        "    if (marks) mark(0, 0);\n",
        "",
    ),
    "    u32 magic = 0;\n": ("    if (marks) mark(0, 1);\n", ""),
    "    const u32 never = u32(M) >> 31;\n": ("    if (marks) mark(0, 2);\n", ""),
    "        barrier_wait(full + 8 * slot, round & 1);\n": (
        "        if (marks && s == 0) mark(0, 3 + 3 * step);\n",
        "        if (marks && s == 0) mark(0, 4 + 3 * step);\n",
    ),
    "      send(place, place_round, rank * WARPS + warp, sums);\n": (
        "      if (marks) mark(0, 5 + 3 * step++);\n",
        "",
    ),
}
NAMES = {
    "multiplies": (("asked", "x", "made"), ("wants", "has", "done")),
    "asks": ((), ("wants", "asked")),
    "y": (("begins", "ready"), ("wants", "has", "wrote")),
}


def marked(source: str) -> str:
    """The kernel's text with the marks; SystemExit where the text is no longer what MARKS expects."""
    for text, (before, behind) in MARKS.items():
        once = "\n" + text if text[0] == " " else text  # the whole line, however much stands in before it
        if source.count(once) < 1:
            raise SystemExit(f"trace_cuda: qmv_stream.cu no longer has {text!r}; MARKS wants it")
        source = source.replace(once, once[: len(once) - len(text)] + before + text + behind)
    return source


def named(warp: str, clocks: list[int | None]) -> str:
    first, each = NAMES[warp]
    names = [*first, *(each * PLACES)]
    return ", ".join(f"{name} {at}" for name, at in zip(names, clocks, strict=False) if at is not None)


def clocks_of(launch, shape: dict) -> list[list[list[int]]]:
    """[warp][block][place], 0 where there was no mark; after a launch has ended."""
    from mlxq.ops import cuda

    driver, module = cuda._driver(), ctypes.c_void_p()
    at, size = ctypes.c_uint64(), ctypes.c_size_t()
    cuda._check(driver.cuFuncGetModule(ctypes.byref(module), launch.function), "the kernel's module")
    found = driver.cuModuleGetGlobal_v2(ctypes.byref(at), ctypes.byref(size), module, b"trace_")
    cuda._check(found, "where the marks are")
    host = (ctypes.c_uint64 * (PLACES + 2) * BLOCKS * len(WARPS))()
    cuda._check(driver.cuMemcpyDtoH_v2(host, at, ctypes.c_size_t(ctypes.sizeof(host))), "reading the marks")
    return [[[*block] for block in blocks[: shape["grid_x"]]] for blocks in host]


def report(cell: str, tuning: tuple | None) -> None:
    import torch

    from mlxq.ops import cuda

    bits, M, shape = cell.split(":")
    (bits, M), (N, K) = (int(bits), int(M)), map(int, shape.split("x"))
    device, source = torch.cuda.current_device(), cuda._source
    gpu = cuda._device(device)
    tuning = tuning or tune_cuda.table_of(bits, M, N, K, gpu)
    made = tune_cuda.shape_of("qmv_stream", tuning, bits, M, N, K, gpu)
    if made is None or made["grid_x"] > BLOCKS:
        raise SystemExit(f"trace_cuda: qmv_stream.cu does not serve {cell} as {tuning}")
    rotated = bench.rotated_bytes(torch.cuda.get_device_properties(device).L2_cache_size)
    ws = bench.rotated_weights(torch, Format(bits, bench.GROUP_SIZE), N, K, rotated)
    x = torch.randn(M, K, device=bench.DEVICE).bfloat16()
    y = torch.empty(M, N, device=bench.DEVICE, dtype=torch.bfloat16)
    expected = x.double() @ bench.float64_weight(torch, ws[0]).T

    def make():
        with tune_cuda.forced("qmv_stream", tuning):
            return [tune_cuda.launch_of(cuda, "qmv_stream", device, w, M) for w in ws]

    def call(launch):
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(stream, x.data_ptr(), y.data_ptr(), early=gpu["early"])

    times = []
    for text in (source, lambda name: marked(source(name)) if name == "qmv_stream.cu" else source(name)):
        row = {"us": None}
        cuda._kernel.cache_clear()
        with mock.patch.object(cuda, "_source", text):
            limit = bench.ERROR_LIMIT["qmv_stream"]
            launches = bench.check_and_time(torch, row, make, call, y, expected, limit)
        cuda._kernel.cache_clear()
        if row["us"] is None:
            raise SystemExit(f"trace_cuda: {cell}: {row['failed']}")
        times.append(row["us"])
    torch.cuda.synchronize()
    found = clocks_of(launches[-1], made)
    begin = [block[0] for block in found[WARPS.index("y")]]
    starts, ends = ([block[at] / 1e3 for block in found[WARPS.index("y")]] for at in (PLACES, PLACES + 1))
    print(f"{cell}: {times[0]:.2f} us, with marks {times[1]:.2f}; {made['grid_x']} blocks, {made['defines']}")
    print(f"  begin {max(starts) - min(starts):.1f} us apart, end {max(ends) - min(ends):.1f} us apart")
    for warp, blocks in zip(WARPS, found, strict=True):
        medians = []
        for place in range(PLACES):
            seen = [c[place] - at for c, at in zip(blocks, begin, strict=True) if c[place]]
            medians.append(round(statistics.median(seen)) if len(seen) > len(blocks) // 8 else None)
        print(f"  {warp}: {named(warp, medians)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--tuning", type=lambda text: tuple(map(int, text.split(","))))
    args = parser.parse_args()
    for cell in args.cells:
        report(cell, args.tuning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
