"""The quantize shader over 10^7 groups on the CPU harness: the hash that tests/test_quantize.py holds.

    nice -n 15 python tools/msl/golden.py [--jobs 1] [--chunks 100] [--out tools/results]

The 100 chunks of 10^5 groups are those of tests/test_quantize.py: ten kinds of weights in each of the three
storages, plain, tied, subnormal, constant, huge and the like. Words, scales and biases of every chunk are
hashed in order; the hash must be the one that numpy and the C++ quantizer gave. Writes one JSON file. Exits 1
when a bit differs. --chunks 10 holds the hash of the first ten.
"""

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shader_cases as sc  # noqa: E402
from test_quantize import ALL, FMT, GROUPS, HEAD, chunk, storage_of  # noqa: E402

from mlxq.format import Format  # noqa: E402
from tools.msl import harness  # noqa: E402

SHADER = sc.SHADERS / "quantize.metal"
SHORT = {name: short for short, name in sc.STORED.items()}
TYPES = {"float": np.float32, "half": np.float16, "bfloat": np.uint16}


def by_shader(library: harness.Library, w: np.ndarray, fmt: Format, S: str, seconds: float = 3600) -> bytes:
    """words | scales | biases of float32 weights (groups, group_size), as test_quantize.py hashes them."""
    words = np.zeros((len(w), fmt.words_per_row(fmt.group_size)), np.uint32)
    scales, report = np.zeros(len(w), TYPES[S]), np.zeros(2, np.uint32)
    biases = np.zeros_like(scales)
    entry = sc.entry("quantize", "float", S, fmt.bits, fmt.group_size)
    buffers = {0: np.ascontiguousarray(w), 1: words, 2: scales, 3: biases, 4: report, 5: np.int32(len(w))}
    grid, threads = sc.geometry("quantize", ("float", S, fmt.bits, fmt.group_size), {"groups": len(w)})
    library.run(entry, buffers, grid, threads, seconds=seconds)
    if report.any():
        raise AssertionError(f"quantize: {report.tolist()} weights and groups were refused; none should be")
    return words.tobytes() + scales.tobytes() + biases.tobytes()


def compiled() -> harness.Library:
    """The shader for float32 weights in FMT, with every storage of the scales."""
    entries = [sc.entry("quantize", "float", S, FMT.bits, FMT.group_size) for S in TYPES]
    return harness.compile(SHADER, entries)


def run_chunk(index: int) -> tuple[bytes, float]:
    """A chunk's bytes, and the seconds that the shader took."""
    w, library = chunk(index), compiled()
    start = time.monotonic()
    out = by_shader(library, w, FMT, SHORT[storage_of(index)])
    return out, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=100, choices=[10, 100])
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    options = parser.parse_args()
    compiled()  # once, before the processes share it
    start, seconds, total = time.monotonic(), 0.0, hashlib.sha256()
    spawn = multiprocessing.get_context("spawn")
    # The harness keeps the stacks of its lanes: a process runs a few chunks and ends.
    with spawn.Pool(options.jobs, maxtasksperchild=5) as pool:
        for index, (part, took) in enumerate(pool.imap(run_chunk, range(options.chunks))):
            total.update(part)
            seconds += took
            print(f"chunk {index}: {took:.1f} s", flush=True)
    want = ALL if options.chunks == 100 else HEAD
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    log = {
        "date": today,
        "command": f"python tools/msl/golden.py --jobs {options.jobs} --chunks {options.chunks}",
        "what": "metal/shaders/quantize.metal on the CPU harness; nothing was run on Apple hardware",
        "shader_sha256": hashlib.sha256(SHADER.read_bytes()).hexdigest(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "groups": options.chunks * GROUPS,
        "hash": total.hexdigest(),
        "wanted": want,
        "equal": total.hexdigest() == want,
        "seconds_in_the_shader": round(seconds),
        "seconds": round(time.monotonic() - start),
    }
    file = options.out / f"metal-golden-{today}.json"
    file.write_text(json.dumps(log, indent=1) + "\n")
    print(f"{'equal' if log['equal'] else 'DIFFERENT'}: {file}")
    return int(not log["equal"])


if __name__ == "__main__":
    sys.exit(main())
