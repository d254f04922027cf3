"""The GPU tests under compute-sanitizer, a few in each process and many processes at once. Wants a GPU.

    python tools/sanitize_cuda.py --out FILE [--limit 500] [--tools memcheck racecheck] [-k EXPRESSION]

Only our kernels are looked at: torch's float64 products, which answers are compared with, take racecheck most
of its time. First each tool must find what is planted for it in a kernel with the name of one of ours (an
access out of bounds, a race in shared memory); a tool that does not is of no use here, and the run stops.
Then the tests that EXPRESSION (below) selects run by turns: one of each function, then the next of each. A
test is `clean` only if pytest passed it in a process whose tool counted nothing and that ended well; where a
process has a finding or runs out of time, its tests run again, each alone. Several GPUs take turns. FILE,
written after each process, is read again if it is there: what is clean in it does not run again unless a
kernel, the tests or this tool have changed, so several calls add up.

    sources   SHA-256 of what was looked at         gpu, sanitizer, planted: {tool: findings}
    tests     {tool: {test: {said, seconds}}}       said: clean, or what is wrong, or "more than N s"
    left      {tool: [test]}                        for which there was no time

racecheck knows barriers and cp.async but not that one lane arrives at an mbarrier for its warp, nor that a
warp may arrive at a cluster's barrier long before it waits there: the kernels are compiled with -DARRIVALS=32
for it (copies.cuh says why). "Internal Sanitizer Error" counts as a finding: it lost track of kernels. Exit
code 1 unless all selected are clean.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench_common as common

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests/test_cuda.py"
OPTIONS = {"memcheck": "-lineinfo", "racecheck": "-lineinfo -DARRIVALS=32"}
FORMATS = "(4-bit/64 or 2-bit/128 or 8-bit/32)"
EXPRESSION = (
    f"{FORMATS} and (gathered or transposed or experts_with_many or (int8 and True))"
    f" or {FORMATS} and by_every_kernel and (decode or prefill or blocks)"
    f" or {FORMATS} and bfloat16-bfloat16 and (every_format or in_parts)"
    " or 4-bit/64 and (many_rows and bfloat16-bfloat16 or cluster or quantize_and_dequantize)"
    " or captured or keep_their_sums_apart"
)
TOGETHER = {"memcheck": 4, "racecheck": 2}  # tests of a process: half of it is Python's start
PLANTED = {
    "memcheck": "x[1 << 20] = 1;",
    "racecheck": "__shared__ int s[64]; s[threadIdx.x] = threadIdx.x; x[threadIdx.x] = s[63 - threadIdx.x];",
}
PLANT = """
import cupy
x = cupy.zeros(64, cupy.int32)
cupy.RawKernel('extern "C" __global__ void NAME(int* x) { BODY }', "NAME")((1,), (64,), (x,))
cupy.cuda.runtime.deviceSynchronize()
"""


def kernels() -> list[str]:
    """Names of ours: what torch multiplies to compare with is not looked at."""
    started = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(')
    return sorted(
        name for path in (ROOT / "mlxq/ops").glob("*.cu") for name in started.findall(path.read_text())
    )


def sources(tests: Path) -> str:
    """SHA-256 of everything whose change makes earlier findings void."""
    kernels = sorted(p for p in (ROOT / "mlxq/ops").iterdir() if p.suffix in (".cu", ".cuh"))
    found = hashlib.sha256()
    for path in [*kernels, ROOT / "mlxq/ops/cuda.py", tests, Path(__file__)]:
        found.update(path.read_bytes())
    return found.hexdigest()


def selected(tests: Path, expression: str) -> list[str]:
    """Node IDs, one of each function, then the next of each."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run([*command, "-k", expression], capture_output=True, text=True)
    found = re.findall(r"^\S*(::test_.*)$", done.stdout, re.M)
    if not found:
        raise SystemExit(f"no tests are selected by {expression!r}:\n{(done.stdout + done.stderr)[-800:]}")
    functions: dict[str, list[str]] = {}
    for name in found:
        functions.setdefault(name.split("[")[0], []).append(name)
    turns = [(n, at, name) for at, names in enumerate(functions.values()) for n, name in enumerate(names)]
    return [name for *_, name in sorted(turns)]


def gpus() -> dict[str, str]:
    """{number: "GPU 0: NVIDIA H200"} of those that may be used."""
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    lines = [line.split(" (UUID")[0].strip() for line in said.splitlines() if line.startswith("GPU ")]
    found = {line.split(":")[0].removeprefix("GPU "): line for line in lines}
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(found)).split(",")
    return {number: found.get(number, f"GPU {number}") for number in chosen if number}


def sanitized(
    tool: str, command: list[str], seconds: float, gpu: str | None = None
) -> tuple[int | None, int | None, str]:
    """(exit code, or None after so many seconds; what the tool counted, or None; all that was said).

    gpu: the one that the command sees; None: as this process does.
    """
    options = ["--kernel-name", f"regex=^({'|'.join(kernels())})$"]
    options += ["--print-limit", "20", "--error-exitcode", "9"]
    if tool == "racecheck":
        options += ["--racecheck-num-workers", "1"]  # threads of the CPU that look for hazards
    command = ["compute-sanitizer", "--tool", tool, *options, *command]
    # a thread each: numpy's and torch's of 28 processes were a load of 130 on 32 cores, and none was through
    environment = os.environ | {"MLXQ_NVRTC_OPTIONS": OPTIONS[tool], "OMP_NUM_THREADS": "1"}
    environment["MLXQ_TEST_REPEATS"] = "1"  # of tests that look for other bits many times
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **heard, env=environment, start_new_session=True) as running:
        try:
            said, code = running.communicate(timeout=seconds)[0], running.returncode
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            said, code = running.communicate()[0], None
    counted = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", said)
    return code, int(counted[-1]) if counted else None, said


def look(tool: str, tests: Path, names: list[str], seconds: float, gpu: str | None) -> dict[str, dict]:
    """{test: {said, seconds}}; said is None where several tests are not all clean: each has to run alone."""
    # -s: an error of racecheck's own, told from within the process, never came through pytest's capture
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    begin = time.monotonic()
    command += [f"{tests}{name}" for name in names]
    code, counted, output = sanitized(tool, command, seconds, gpu)
    took = round((time.monotonic() - begin) / len(names), 1)
    passed = set(re.findall(r"^PASSED \S*?(::test_.*)$", output, re.M))
    skipped = set(re.findall(r"^SKIPPED .*$", output, re.M))
    lines = re.findall(r"(?<!=)={9} [^=\s].*", output)  # behind a dot of pytest's, too
    findings = "\n".join([*lines[:12], *lines[12:][-1:]] or [output[-600:]])
    if code == 0 and counted == 0 and not skipped:
        said = {name: "clean" if name in passed else "not run" for name in names}
    elif len(names) > 1:
        said = dict.fromkeys(names)
    else:
        why = " ".join(sorted(skipped)) or (f"more than {seconds:.0f} s" if code is None else findings)
        said = dict.fromkeys(names, why)
    return {name: {"said": said[name], "seconds": took} for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tools", nargs="+", choices=tuple(OPTIONS), default=["racecheck", "memcheck"])
    parser.add_argument(
        "--limit", type=float, default=500, help="seconds after which no process is begun or left"
    )
    parser.add_argument("--each", type=float, default=120, help="seconds of a process at most")
    parser.add_argument("--jobs", type=int, default=max(1, common.cores() - 2), help="processes at once")
    parser.add_argument("--tests", type=Path, default=TESTS)
    parser.add_argument("-k", dest="expression", default=EXPRESSION, help="as pytest's")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    names, about = selected(args.tests, args.expression), sources(args.tests)
    result = {"tool": "sanitize_cuda", "sources": about, "planted": {}, "tests": {}, "left": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["sources"] == about:
            result["tests"] = before["tests"]
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("no compute-sanitizer in PATH; it comes with the CUDA toolkit")
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    devices = gpus()
    result["sanitizer"], result["gpu"] = version.strip().splitlines()[-1], ", ".join(devices.values())
    turns = itertools.cycle(devices if len(devices) > 1 else [None])
    for tool in args.tools:
        planted = PLANT.replace("NAME", kernels()[0]).replace("BODY", PLANTED[tool])
        _, counted, said = sanitized(tool, [sys.executable, "-c", planted], args.each)
        result["planted"][tool] = counted
        if not counted:
            print(f"{tool} does not find what is planted for it:\n{said[-1500:]}", file=sys.stderr)
            return 1

    wanted = []
    for tool in args.tools:
        found = result["tests"].setdefault(tool, {})
        todo = [name for name in names if found.get(name, {}).get("said") != "clean"]
        step = TOGETHER[tool]
        wanted += [(n, tool, todo[n : n + step]) for n in range(0, len(todo), step)]
    wanted = [
        part for _, *part in sorted(wanted, key=lambda w: w[0])
    ]  # the tools by turns, as they are given

    def process(tool: str, part: list[str]):
        left = min(args.each, end - time.monotonic())
        return look(tool, args.tests, part, left, next(turns)) if left > 5 else {}

    done, total = 0, sum(len(part) for _, part in wanted)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(process, *part): part for part in wanted}
        while running:
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                tool, part = running.pop(future)
                found = future.result()
                again = [name for name, row in found.items() if row["said"] is None]
                for name in again:
                    running[pool.submit(process, tool, [name])] = (tool, [name])
                told = {name: row for name, row in found.items() if row["said"] is not None}
                result["tests"][tool].update(told)
                done += len(told)
                for name in (name for name, row in told.items() if row["said"] != "clean"):
                    print(f"{tool} {name}: {told[name]['said']}", flush=True)
                print(f"{done} of {total}, {end - time.monotonic():.0f} s left", flush=True)
                result["left"] = {t: [n for n in names if n not in result["tests"][t]] for t in args.tools}
                new = args.out.with_name(args.out.name + ".new")
                new.write_text(json.dumps(result, indent=1) + "\n")
                new.rename(args.out)
    said = [
        result["tests"][tool].get(name, {"said": "no time"})["said"] for tool in args.tools for name in names
    ]
    print(f"{said.count('clean')} of {len(said)} clean, no time for {said.count('no time')}")
    return int(said.count("clean") < len(said))


if __name__ == "__main__":
    sys.exit(main())
