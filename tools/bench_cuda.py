"""Times of quantized products on an NVIDIA GPU, in JSON and a plot. Needs torch and cupy.

    python tools/bench_cuda.py [--bits 2 4 8] [--rows 1 2 4 8 16 64 512] [--out tools/results/cuda-DATE.json]
    python tools/bench_cuda.py --plot tools/results/cuda-DATE.json      (needs matplotlib, no GPU)

Each answer is checked against float64 first. A time is the median over replays of a CUDA graph of one product
after the other, each with another copy of the weight, together more than four times the L2 cache, divided by
their number. Peers run in the same way in the same run: cuBLAS in float16 (torch), torch's tinygemm (4-bit).
humming, which must be set up by hand, is named as missing. Limit: the best of three grids of a kernel that
only reads as many bytes, timed likewise; for many rows the operations at the rate of a bfloat16 product
of 8192^3.

Rows of the JSON: bits, group_size, M, N, K, dtype, us, us_alone (each product begun only when the one before
has ended; null for the dequantizing path), kernel (qmv, or dequantize+cuBLAS), limit_us, rel_err, peers.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
GROUP_SIZE = 64
ROTATED_BYTES = 230_000_000
ERROR_LIMIT = {"qmv": 2.0**-8, "dequantize+cuBLAS": 2.0**-7}  # of bfloat16; the second rounds the weights too
READ = r"""
extern "C" __global__ void read_stream(const uint4* p, long long n, unsigned* out) {
  uint4 a = make_uint4(0, 0, 0, 0);
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = __ldg(p + i + k * step);
#pragma unroll
    for (int k = 0; k < 4; k++) a.x ^= v[k].x, a.y ^= v[k].y, a.z ^= v[k].z, a.w ^= v[k].w;
  }
  for (; i < n; i += step) a.x ^= p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
  if ((a.x ^ a.y ^ a.z ^ a.w) == 0x12345678u) *out = 1;
}"""


def microseconds(torch, calls, replays: int = 15) -> float:
    """Median time of one of the calls in replays of a CUDA graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def random_weight(torch, fmt, N: int, K: int):
    from mlxq import format

    words = torch.randint(-(2**31), 2**31, (N, K * fmt.bits // 32), device="cuda", dtype=torch.int32)
    scales = (torch.rand(N, K // fmt.group_size, device="cuda") / fmt.levels).bfloat16()
    biases = torch.rand(N, K // fmt.group_size, device="cuda").bfloat16() - 0.5
    return format.Packed(words.view(torch.uint32), scales, biases, fmt)


def float64_weight(torch, w):
    shifts = torch.arange(0, 32, w.format.bits, device="cuda", dtype=torch.int32)
    codes = (w.words.view(torch.int32)[..., None] >> shifts) & w.format.levels
    codes = codes.reshape(*w.scales.shape, w.format.group_size).double()
    return (codes * w.scales.double()[..., None] + w.biases.double()[..., None]).reshape(w.N, w.K)


def read_us(torch, nbytes: int, copies: int) -> float:
    """Time to read as many bytes, other ones each time, with the best of three grids."""
    import cupy

    kernel = cupy.RawKernel(READ, "read_stream")
    buffers = [torch.empty(nbytes // 16 * 4, dtype=torch.int32, device="cuda") for _ in range(copies)]
    found = torch.zeros(1, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count

    def call(buffer, blocks):
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            kernel((blocks,), (512,), (buffer.data_ptr(), nbytes // 16, found.data_ptr()))

    grids = (processors * each for each in (1, 2, 4))
    return min(microseconds(torch, [functools.partial(call, b, grid) for b in buffers]) for grid in grids)


def run(args) -> dict:
    import torch

    from mlxq.format import Format
    from mlxq.ops import cuda

    torch.manual_seed(0)
    gpu = cuda._device(torch.cuda.current_device())
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    flops = 2 * 8192**3 / microseconds(torch, [lambda: a @ a] * 4)  # a microsecond
    rows = []
    for bits in args.bits:
        fmt = Format(bits, GROUP_SIZE)
        for N, K in SHAPES:
            nbytes = N * K * bits // 8 + N * K // GROUP_SIZE * 4
            copies = max(4, min(64, -(-ROTATED_BYTES // nbytes)))
            weights = [random_weight(torch, fmt, N, K) for _ in range(copies)]
            exact = float64_weight(torch, weights[0])
            reading = read_us(torch, nbytes, copies)
            floats = [
                torch.randn(N, K, device="cuda").half() for _ in range(max(3, ROTATED_BYTES // (2 * N * K)))
            ]
            tiny = []
            if bits == 4:
                codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
                packed = torch._convert_weight_to_int4pack(codes, 8)
                tiny = [
                    (packed.clone(), torch.rand(K // 64, N, 2, device="cuda").bfloat16())
                    for _ in range(copies)
                ]
            for M in args.rows:
                x = torch.randn(M, K, device="cuda").bfloat16()
                gpu["early"] = True
                y = cuda.qmm(x, weights[0])
                expected = x.double() @ exact.T
                error = float((y.double() - expected).norm() / expected.norm())
                kernel = "qmv" if M <= cuda.ROWS_OF_QMV else "dequantize+cuBLAS"
                if not error < ERROR_LIMIT[kernel]:
                    raise SystemExit(f"wrong answer: {fmt} M={M} N={N} K={K}: {error}")
                calls = [functools.partial(cuda.qmm, x, w) for w in weights]
                us = microseconds(torch, calls)
                alone = None
                if kernel == "qmv":
                    gpu["early"] = False
                    for w in weights:
                        w.__dict__.pop("_cuda_plans")
                    alone = microseconds(torch, calls)
                    for w in weights:
                        w.__dict__.pop("_cuda_plans")
                half = x.half()
                peers = {
                    "cublas_fp16": microseconds(
                        torch, [functools.partial(torch.mm, half, f.T) for f in floats]
                    )
                }
                if tiny and M <= 16:
                    mm = torch._weight_int4pack_mm
                    peers["tinygemm"] = microseconds(
                        torch, [functools.partial(mm, x, p, 64, s) for p, s in tiny]
                    )
                row = {"bits": bits, "group_size": GROUP_SIZE, "M": M, "N": N, "K": K, "dtype": "bfloat16"}
                row |= {"us": us, "us_alone": alone, "kernel": kernel, "rel_err": error, "peers": peers}
                row["limit_us"] = max(reading, 2 * M * N * K / flops)
                rows.append(row)
                said = ", ".join(f"{name} {t:.1f}" for name, t in peers.items())
                limit = row["limit_us"]
                print(
                    f"{bits}-bit {N}x{K} M={M}: {us:.2f} us ({alone or 0:.2f} alone), limit {limit:.2f} "
                    f"({limit / us:.0%}), error {error:.1e}; {said}",
                    flush=True,
                )
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "arch": gpu["arch"],
        "bf16_tflops": flops / 1e6,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }
    missing = [
        "humming-kernels (the peer with the same information): not set up here; ../shared has its times"
    ]
    return {"tool": "bench_cuda", "machine": machine, "missing": missing, "rows": rows}


def plot(path: Path) -> None:
    from tools.bench_common import pyplot

    plt = pyplot()
    if plt is None:
        return
    result = json.loads(path.read_text())
    rows = result["rows"]
    bits, shapes = sorted({r["bits"] for r in rows}), sorted({(r["N"], r["K"]) for r in rows})
    figure, axes = plt.subplots(
        len(bits), len(shapes), figsize=(4.5 * len(shapes), 3.5 * len(bits)), squeeze=False
    )
    for i, j in ((i, j) for i in range(len(bits)) for j in range(len(shapes))):
        here = sorted(
            (r for r in rows if (r["bits"], (r["N"], r["K"])) == (bits[i], shapes[j])), key=lambda r: r["M"]
        )
        axis, M = axes[i][j], [r["M"] for r in here]
        axis.loglog(M, [r["us"] for r in here], "o-", label="mlxq")
        axis.loglog(M, [r["limit_us"] for r in here], "k--", label="limit")
        for name in sorted({n for r in here for n in r["peers"]}):
            points = [(r["M"], r["peers"][name]) for r in here if name in r["peers"]]
            axis.loglog(*zip(*points, strict=True), ".-", label=name)
        axis.set(title=f"{bits[i]}-bit, {shapes[j][0]} x {shapes[j][1]}", xlabel="rows of x", ylabel="us")
        axis.legend(fontsize=7)
    figure.suptitle(f"{result['machine']['gpu']}, {result['machine']['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=80)
    print(f"wrote {path.with_suffix('.png')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="draw this result file and stop")
    args = parser.parse_args()
    if args.plot:
        return plot(args.plot)
    result = run(args)
    path = args.out or ROOT / "tools" / "results" / f"cuda-{result['machine']['date'][:10]}.json"
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + lines + "\n]}\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
