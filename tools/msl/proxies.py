"""Proxies for speed on Apple GPUs, counted without one: our kernels beside stock MLX's.

    python tools/msl/proxies.py [--out tools/results]

 1. Runs our kernels and those of MLX's public wheel (tests/msl/mlx_kernels.py) on the CPU harness, on the
    same arrays, in half with groups of 64, and counts what they read from device memory, the threadgroup
    memory that they take, their barriers and their simdgroup operations.
 2. Compiles the same kernels with NVRTC and reads their registers on sm_90 from the machine code: a hint at
    the pressure on registers, no more. Left out where there is no NVRTC (see tools/msl/nvidia.py).
 3. Divides the bytes of a 4096 x 4096 product with one row of x by the memory bandwidth that is commonly
    published for each chip: the least time that it can take there, and the most tokens a second of
    8 * 10^9 weights.

Nothing was measured on Apple hardware and nothing here is a time. Which kernel stock MLX takes: mlx 0.32.4,
get_qmv_batch_limit and dispatch_qmv; with 2 to 8 rows that is qmv_wide from generation 15 (M3) on, which
reads the weights ceil(M / 5) times, and qmv before, which reads them M times.
"""

import argparse
import datetime
import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "msl")]

import mlx_kernels  # noqa: E402
import shader_cases as sc  # noqa: E402

from tools.msl import harness, nvidia  # noqa: E402

GROUP = 64
# GB/s of unified memory; where a chip comes in two, the faster one.
BANDWIDTH = {
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
}  # fmt: skip
BANDWIDTH_SOURCE = (
    "commonly published figures; about half were checked only against secondary pages, or recalled"
)
SIDE, MODEL = 4096, 8e9
COUNTED = ("qmm.metal", "qmm_n.metal", "qmv.metal", "tile.h")  # the texts that the numbers are of


def ours(rng, kernel: str, bits: int, M: int, N: int, K: int) -> sc.Case:
    last = (M,) if kernel == "qmv" else sc.TILES[0]
    return sc.product(rng, kernel, ("half", "half", bits, GROUP, *last), M, N, K)


def stock_launch(name: str, bits: int, M: int, N: int, K: int):
    """(template arguments, threadgroups, threads of each, numbers in order) as MLX dispatches its kernel."""
    if name == "affine_qmv_fast":
        return f"half, {GROUP}, {bits}, false", (M, N // 8, 1), (32, 2, 1), (K, N)
    if name == "affine_qmv_wide":
        vectors = -(-M // -(-M // 5))
        grid = (-(-M // vectors), N // 8, 1)
        return f"half, {GROUP}, {bits}, {vectors}, 8, false", grid, (32, 2, 1), (K, N, M)
    if name == "affine_qmm_t":
        return f"half, {GROUP}, {bits}, false, false", (-(-N // 32), -(-M // 32), 1), (32, 2, 2), (K, N, M)
    return f"half, {GROUP}, {bits}, false", (-(-K // 32), -(-M // 32), 1), (32, 2, 2), (N, K, M)


def stock_sources():
    """Sources, folders and replacements of MLX's kernels, with numbers for the buffers of qmv_wide."""
    sources, include, replace = mlx_kernels.sources()
    text = sources[-1].read_text()
    head = text.index("[[kernel]] void affine_qmv_wide(")
    end = text.index("uint3 tid", head)
    numbers = iter(range(16))
    numbered = re.sub(r"(\w+),", lambda m: f"{m[1]} [[buffer({next(numbers)})]],", text[head:end])
    return [*sources[:-1], text[:head] + numbered + text[end:]], include, replace


def summary(case: sc.Case, reads: dict[str, int], result) -> dict:
    """What the report says of one run: everything per multiply-add or as a multiple of the least."""
    M, N, K = (case.inputs[d] for d in "MNK")
    least = sum(case.inputs[b].nbytes for b in ("words", "scales", "biases"))
    weight = sum(reads[b] for b in ("words", "scales", "biases"))
    return {
        "weight_bytes_over_least": weight / least,
        "read_bytes_per_multiply_add": sum(reads.values()) / (M * N * K),
        "x_bytes_per_multiply_add": reads["x"] / (M * N * K),
        "threadgroup_bytes": result.threadgroup_bytes,
        "barriers": result.barriers,
        "simdgroup_operations": result.simdgroup_ops,
        "matrix_products_per_512_multiply_adds": result.simdgroup_ops.get("simdgroup_multiply_accumulate", 0)
        * 512
        / (M * N * K),
    }


def count_ours(case: sc.Case) -> dict:
    library = harness.compile(case.file, [case.entry])
    buffers = case.buffers()
    result = library.run(case.entry, buffers, case.grid, case.threads, count=True)
    case.check(buffers)
    x = "g" if case.kernel == "qmm_n" else "x"
    names = {"words": "words", "scales": "scales", "biases": "biases", "x": x}
    reads = {what: result.device_bytes[case.index(name)]["read"] for what, name in names.items()}
    return summary(case, reads, result)


def count_stock(library, name: str, case: sc.Case, bits: int) -> dict:
    M, N, K = (case.inputs[d] for d in "MNK")
    arguments, grid, threads, numbers = stock_launch(name, bits, M, N, K)
    given = case.inputs
    y = given["y"].copy()
    arrays = [given["words"], given["scales"], given["biases"], given["g" if "g" in given else "x"], y]
    buffers = dict(enumerate([*arrays, *(np.int32(n) for n in numbers)]))
    buffers |= mlx_kernels.no_batch(len(buffers))
    result = library.run((name, arguments), buffers, grid, threads, count=True)
    answer, _ = case.outputs["y"]
    error = np.linalg.norm(sc.widened(y) - answer) / np.linalg.norm(answer)
    if not error < 5e-3:
        raise AssertionError(f"{name}<{arguments}> is wrong by {error:.2g}: it was not run as MLX runs it")
    names = ("words", "scales", "biases", "x")
    reads = {what: result.device_bytes[n]["read"] for n, what in enumerate(names)}
    return summary(case, reads, result)


def registers(program: nvidia.Program) -> dict[str, int]:
    """Registers of each entry on sm_90, out of the section .nv.info of the ELF file."""
    code = nvidia.cubin(program)
    table, size, count, names = struct.unpack_from("<Q10xHHH", code, 40)
    heads = [struct.unpack_from("<IIQQQQII", code, table + i * size) for i in range(count)]

    def text(strings: int, at: int) -> str:
        start = heads[strings][4] + at
        return code[start : code.index(b"\0", start)].decode()

    sections = {text(names, head[0]): head for head in heads}
    info, symbols = sections[".nv.info"], sections[".symtab"]
    found, at, end = {}, info[4], info[4] + info[5]
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", code, at)
        if (form, attribute) == (4, 0x2F):  # a value with a size, the count of registers
            symbol, registers = struct.unpack_from("<II", code, at + 4)
            name = struct.unpack_from("<I", code, symbols[4] + 24 * symbol)[0]
            found[text(symbols[6], name)] = registers
        at += 4 + (length if form == 4 else 0)
    return {entry: found[function] for entry, function in program.functions.items()}


def products():
    """(what, our kernel, stock's kernel, bits, M, N, K)."""
    for bits in (2, 4, 8):
        yield "decode", "qmv", "affine_qmv_fast", bits, 1, 16, 1024
        for M in (2, 4, 8):
            yield "decode, up to M2", "qmv", "affine_qmv_fast", bits, M, 16, 1024
            yield "decode, from M3 on", "qmv", "affine_qmv_wide", bits, M, 16, 1024
        yield "prefill", "qmm", "affine_qmm_t", bits, 512, 128, 128
        yield "prefill backward", "qmm_n", "affine_qmm_n", bits, 512, 128, 128


def rooflines() -> list[dict]:
    rows = []
    for chip, bandwidth in BANDWIDTH.items():
        row = {"chip": chip, "GB_per_s": bandwidth}
        for bits in (2, 4, 8):
            per_weight = (bits + 32 / GROUP) / 8  # scales and biases in half
            row[f"least_us_{SIDE}x{SIDE}_{bits}bit"] = SIDE * SIDE * per_weight / bandwidth / 1e3
            row[f"most_tokens_per_s_8e9_weights_{bits}bit"] = bandwidth * 1e9 / (MODEL * per_weight)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    options = parser.parse_args()
    if isinstance(mlx_kernels.wheel(), str):
        print(mlx_kernels.wheel())
        return 2
    rng = np.random.default_rng(0)
    sources, include, replace = stock_sources()
    entries = list(dict.fromkeys((name, stock_launch(name, *shape)[0]) for _, _, name, *shape in products()))
    library = harness.compile(sources, entries, include=include, replace=replace)
    theirs_registers, ours_registers = {}, {}
    if nvidia.nvrtc_library():
        # NVRTC has no such builtin; the kernels that are counted do not use the number.
        defines = {"__builtin_huge_valf()": "3.0e38f"}
        program = nvidia.cuda(sources, entries, defines, include=include, replace=replace)
        theirs_registers = registers(program)
    rows = []
    for what, kernel, name, *shape in products():
        case = ours(rng, kernel, *shape)
        entry = harness.entry_name(case.entry)
        if nvidia.nvrtc_library() and entry not in ours_registers:
            ours_registers |= registers(nvidia.cuda(case.file, [case.entry]))
        mine, stock = count_ours(case), count_stock(library, name, case, shape[0])
        mine["registers_sm_90"] = ours_registers.get(entry)
        of_stock = harness.entry_name((name, stock_launch(name, *shape)[0]))
        stock["registers_sm_90"] = theirs_registers.get(of_stock)
        row = dict(zip(("bits", "M", "N", "K"), shape, strict=True))
        kernels = {"kernel": kernel, "stock_kernel": name}
        rows.append({"what": what, **row, **kernels, "ours": mine, "stock": stock})
        ratio = mine["read_bytes_per_multiply_add"] / stock["read_bytes_per_multiply_add"]
        weights = mine["weight_bytes_over_least"], stock["weight_bytes_over_least"]
        said = f"weight bytes {weights[0]:.2f}x and {weights[1]:.2f}x of the least, reads {ratio:.2f}x"
        print(f"{what} {row}: {said}", flush=True)
    shaders = {name: hashlib.sha256((sc.SHADERS / name).read_bytes()).hexdigest() for name in COUNTED}
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    log = {
        "date": today,
        "command": "python tools/msl/proxies.py",
        "what": "counts on the CPU harness, quotients of commonly published bandwidths; nothing ran on Apple "
        "hardware",
        "commit": commit.stdout.strip(),
        "mlx": mlx_kernels.VERSION,
        "group_size": GROUP,
        "types": "half",
        "shader_sha256": shaders,
        "products": rows,
        "bandwidth_source": BANDWIDTH_SOURCE,
        "rooflines": rooflines(),
    }
    file = options.out / f"metal-proxies-{today}.json"
    file.write_text(json.dumps(log, indent=1) + "\n")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
