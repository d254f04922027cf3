"""What the benchmarks share: the machine, interleaved timing, the result file and the plot.

A result file is JSON with

    tool       name of the tool
    machine    cpu, family, features, cores, l3_bytes, system, kernel, huge_pages, python, commit,
               command, date, versions {package: version}, busy_cores_at_start, noisy (that was above
               BUSY_LIMIT: do not publish)
    settings   the tool's arguments
    bars       [{what, measured, bar, sense (">=" or "<="), met, note}]   measured: null when not taken
    missing    [sentence]    contenders that were not timed and how to get them
    ...        the tool's own tables, described at its head

Times are wall clock. Contenders are timed in turn, block after block, in one run, so that all of them meet
the same machine; only ratios within one run mean anything.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"
BUSY_LIMIT = 0.25  # cores that others use, above which times are not published
PACKAGES = ("mlxq", "mlx", "mlx-lm", "torch", "transformers", "llama_cpp_python", "numpy")
# libgomp's workers (torch, llama.cpp) spin for milliseconds after a job: they sleep before another is timed.
SETTLE_SECONDS = 0.02
WARM_BELOW_SECONDS = 0.1
LLAMA_MISSING = (
    "llama.cpp: llama_cpp with its libraries is not importable; CMAKE_ARGS=-DGGML_NATIVE=ON "
    "pip install llama-cpp-python (compiles for half an hour)"
)
AHEAD = (0, 1024, 4096)  # bytes that the read stream prefetches; the best of them is the ceiling


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores others, and the host of a virtual machine, used during the next seconds of our sleep."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return os.getloadavg()[0]

    def idle() -> int:
        fields = stat.read_text().split("\n", 1)[0].split()[1:]
        return int(fields[3]) + int(fields[4])  # idle, waiting for a disk

    before, begin = idle(), time.monotonic()
    time.sleep(seconds)
    ticks = (time.monotonic() - begin) * os.sysconf("SC_CLK_TCK")
    return max(0.0, os.cpu_count() - (idle() - before) / ticks)


def l3_bytes() -> int:
    """Size of the last-level cache; 32 MB where the system does not say."""
    sizes = []
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", level.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


def cpu() -> dict:
    """model, family and the features that decide which kernels run."""
    if platform.system() == "Darwin":
        model = _said("sysctl", "-n", "machdep.cpu.brand_string")
        return {"model": model, "family": "", "features": []}
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    matter = r"avx2|avx512(f|bw|vl|_vnni|vbmi|_bf16|_fp16)|avx_vnni|amx_\w+|f16c|fma|asimd\w*|i8mm|bf16|sve2?"
    family = "".join(f"{k[0]}{fields[k]}" for k in ("cpu family", "model") if k in fields)
    return {
        "model": fields.get("model name", platform.machine()),
        "family": family.replace("c", "f", 1),
        "features": [f for f in flags if re.fullmatch(matter, f)],
    }


def machine() -> dict:
    """Where, with what and by which command this run happens; the head of this file lists the keys."""
    about = cpu()
    busy = busy_cores()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    changed = bool(_said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))
    return {
        "cpu": about["model"],
        "family": about["family"],
        "features": about["features"],
        "cores": cores(),
        "l3_bytes": l3_bytes(),
        "system": platform.system(),
        "kernel": platform.release(),
        "huge_pages": re.search(r"\[(\w+)\]", huge.read_text())[1] if huge.exists() else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD") + (" (changed)" if changed else ""),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "busy_cores_at_start": round(busy, 2),
        "noisy": busy > BUSY_LIMIT,
    }


def print_machine(about: dict) -> None:
    """The machine in a few lines, with a warning when others are using it."""
    print(f"{about['cpu']} ({about['family']}), {about['cores']} cores, L3 {about['l3_bytes'] >> 20} MB, "
          f"{about['system']} {about['kernel']}, huge pages: {about['huge_pages']}")  # fmt: skip
    print("  " + " ".join(about["features"]))
    print("  " + ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v))
    print(f"  commit {about['commit']}, {about['date']}, {about['busy_cores_at_start']} cores busy")
    print(f"  {about['command']}")
    if about["noisy"]:
        print(f"WARNING: others keep {about['busy_cores_at_start']} cores busy: do not publish these times")


def summary(seconds: list[float]) -> dict:
    """ms (the median), ms_min, ms_q1, ms_q3 and repeats."""
    s = sorted(seconds)
    at = [1e3 * s[min(len(s) - 1, round(q * (len(s) - 1)))] for q in (0, 0.25, 0.75)]
    middle = 1e3 * (s[len(s) // 2] + s[(len(s) - 1) // 2]) / 2
    return {"ms": middle, "ms_min": at[0], "ms_q1": at[1], "ms_q3": at[2], "repeats": len(s)}


def interleaved(
    contenders, seconds_each: float, block_seconds: float, max_calls: int = 64
) -> dict[str, list[float]]:
    """Seconds of one call, one value a block, by the contenders' names.

    contenders     objects with `name` and `time(calls)`, which returns the seconds that so many calls took
    seconds_each   how long each of them may take: 3 to 15 blocks, and a single call of one that exceeds it
    block_seconds  the length of a block: as many calls, at most max_calls, as fit in it
    """
    plan, warm = [], {}
    for c in contenders:
        warm[c.name] = False
        once = c.time(1)  # with whatever the first call allocates
        if once > seconds_each:  # as slow as stock MLX in bfloat16: it cannot be warmed up for long
            plan.append((c, 1, 1))
            continue
        once = c.time(1)
        warm[c.name] = once < WARM_BELOW_SECONDS
        calls = max(1, min(max_calls, int(block_seconds / max(once, 1e-9))))
        plan.append((c, calls, max(3, min(15, int(seconds_each / max(once * calls, 1e-9))))))
        time.sleep(SETTLE_SECONDS)
    out: dict[str, list[float]] = {c.name: [] for c, _, _ in plan}
    turns = max(repeats for _, _, repeats in plan)
    for turn in range(turns):
        for c, calls, repeats in plan:
            # One with fewer repeats than the rest sits some turns out, spread over the whole run.
            if turn * repeats // turns == (turn + 1) * repeats // turns:
                continue
            if warm[c.name]:
                c.time(1)  # wakes its threads, and brings back what the others pushed out of the cache
            out[c.name].append(c.time(calls) / calls)
            time.sleep(SETTLE_SECONDS)
    return out


def bar(what: str, measured: float | None, limit: float, sense: str = ">=", note: str = "") -> dict:
    """A row of the table of bars."""
    met = None if measured is None else bool(measured >= limit if sense == ">=" else measured <= limit)
    return {"what": what, "measured": measured, "bar": limit, "sense": sense, "met": met, "note": note}


def print_bars(bars: list[dict]) -> None:
    print("\nBars")
    for b in bars:
        word = {True: "met", False: "MISSED", None: "not taken"}[b["met"]]
        value = "-" if b["measured"] is None else f"{b['measured']:.4g}"
        print(
            f"  {word:9} {value:>10} {b['sense']} {b['bar']:<8g} {b['what']}"
            + (f"   ({b['note']})" if b["note"] else "")
        )


def result_path(tool: str, about: dict, folder: Path = RESULTS) -> Path:
    """tools/results/<tool>-<cpu>-<date>.json; a run on a busy machine says so in its name."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['family']}".lower()).strip("-")
    noisy = "-noisy" if about["noisy"] else ""
    return folder / f"{tool}-{slug}-{about['date'][:10]}{noisy}.json"


def write(path: Path, result: dict) -> None:
    """The result as JSON, one row of a table a line, so that two runs can be compared with diff."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"\nwrote {path}")


def pyplot():
    """matplotlib's pyplot for files, or None, said, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def cold_bytes() -> int:
    """Memory that each contender rotates over: four times the last-level cache, less where that is huge."""
    l3 = l3_bytes()
    return min(4 * l3, max(1200 << 20, 3 * l3 // 2))


@contextlib.contextmanager
def read_stream(threads: int, region_bytes: int):
    """The running read_stream program, compiled with the system's compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "read_stream"
        compiler = os.environ.get("CC", "cc")
        source = Path(__file__).with_name("read_stream.c")
        native = "-mcpu=native" if sys.platform == "darwin" else "-march=native"
        subprocess.run([compiler, "-O3", native, "-pthread", "-o", program, source], check=True)
        process = subprocess.Popen(
            [program, str(threads), str(region_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()


def stream_seconds(process, huge: bool, ahead: int, slice_bytes: int, count: int, distinct: int) -> float:
    """Seconds in which read_stream reads `count` slices in turn out of `distinct` ones; see read_stream.c."""
    print(f"{int(huge)} {ahead} {slice_bytes} {count} {distinct}", file=process.stdin, flush=True)
    return float(process.stdout.readline().split()[0])


def _said(*command: str) -> str:
    """Standard output of a command, or "" where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
