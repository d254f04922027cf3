"""Every Metal shader on an NVIDIA GPU, once against float64 and under compute-sanitizer; one JSON log.

    python tools/msl/h100_check.py [--jobs 16] [--part 1/1] [--out FOLDER]

 1. compiles every instantiation of metal/shaders/kernels.json with NVRTC, in `jobs` processes;
 2. runs each once (tests/shader_cases.py, every()) and compares with the float64 answer;
 3. runs one case of each kernel and bit width under memcheck, racecheck and synccheck: no error allowed;
 4. runs the planted kernels of tests/msl: the missing barrier must be flagged by racecheck, accesses out of
    bounds by memcheck, and the right kernel by neither.

It says that the shaders' arithmetic, indices and barriers are right on a machine with 32 lanes that are truly
parallel. It says nothing of Apple's compiler or of Apple's speed, so nothing is timed. Needs cupy, NVRTC and
compute-sanitizer. Exits 1 when anything is wrong.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shader_cases  # noqa: E402

from tools.msl import harness, nvidia, source  # noqa: E402

PLANTED = ROOT / "tests" / "msl" / "planted.metal"
# {planted entry: (tool, whether it must complain)}; the defects are described in the file.
PLANTS = {
    "row_sums<0>": {"memcheck": False, "racecheck": False},
    "row_sums<8>": {"racecheck": True},
    "row_sums<2>": {"memcheck": True},
    "row_sums<10>": {"memcheck": True},
}
SANITIZERS = {
    # The padding is there so that an access past an array does not land in the next one.
    "memcheck": ["--padding", "256", "--report-api-errors", "no"],
    "racecheck": [],
    "synccheck": [],
}
ENTRIES_PER_PROGRAM = 12


def one_of_each(cases) -> list[int]:
    """Index of one case for each kernel and bit width, of changing types and group sizes."""
    found: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        names = shader_cases.KERNELS[case.kernel]["template"]
        bits = case.arguments[names.index("bits")] if "bits" in names else None
        found.setdefault((case.kernel, bits), []).append(i)
    return sorted(indices[37 * n % len(indices)] for n, indices in enumerate(found.values()))


def compile_program(job):
    """(name, functions, error) of one program; its machine code is written to a file."""
    number, file, entries, folder, arch = job
    program = nvidia.cuda(Path(file), entries)
    try:
        code = nvidia.cubin(program, arch)
    except harness.CompileError as error:
        return number, {}, f"{Path(file).name} {entries[0]}...: {error}"
    Path(folder, f"{number}.cubin").write_bytes(code)
    return number, program.functions, None


def compile_all(entries_of, folder: Path, arch: str, jobs: int):
    """{entry: (program number, function)} and the errors."""
    work = []
    for file, entries in entries_of.items():
        for start in range(0, len(entries), ENTRIES_PER_PROGRAM):
            some = entries[start : start + ENTRIES_PER_PROGRAM]
            work.append((len(work), str(file), some, str(folder), arch))
    where, errors = {}, []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for number, functions, error in pool.map(compile_program, work):
            where.update({name: (number, function) for name, function in functions.items()})
            errors += [error] if error else []
    return where, errors


class Machine:
    """Compiled programs in a folder, loaded as they are needed."""

    def __init__(self, folder: Path, where):
        self.folder = folder
        self.where = where
        self.modules: dict[int, nvidia.Module] = {}
        self.kernels: dict[Path, dict[str, source.Kernel]] = {}

    def module(self, file: Path, entry) -> nvidia.Module:
        name = harness.entry_name(entry)
        number, _ = self.where[name]
        if file not in self.kernels:
            self.kernels[file] = source.kernels(source.flatten(file))
        if number not in self.modules:
            mine = {e: function for e, (n, function) in self.where.items() if n == number}
            kernels = {e: self.kernels[file][e.split("<")[0]] for e in mine}
            self.modules[number] = nvidia.Module(self.folder / f"{number}.cubin", mine, kernels)
        return self.modules[number]

    def run(self, file: Path, entry, buffers, grid, threads) -> None:
        self.module(file, entry).run(entry, buffers, grid, threads)


def share_of_bound(case, buffers) -> float:
    """The largest error as a share of its bound; 0 where bits are compared."""
    worst = 0.0
    for name, (answer, bound) in case.outputs.items():
        if bound is not None and answer.size:
            error = np.abs(shader_cases.widened(buffers[case.index(name)]) - answer)
            worst = max(worst, float(np.max(error / np.maximum(bound, 1e-300))))
    return worst


def run_cases(machine: Machine, cases, indices) -> dict:
    """Runs cases and compares; {"kernels": per kernel, "failures": [...]}."""
    kernels, failures = {}, []
    for i in indices:
        case = cases[i]
        if harness.entry_name(case.entry) not in machine.where:
            continue  # its program did not compile, which is reported
        names = ("instantiations", "worst_share_of_bound", "registers", "spilled_bytes")
        row = kernels.setdefault(case.kernel, dict.fromkeys(names, 0))
        buffers = case.buffers()
        try:
            machine.run(case.file, case.entry, buffers, case.grid, case.threads)
            case.check(buffers)
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}"[:600])
            if "CUDA" in type(error).__name__:  # the context is lost
                break
            continue
        function = machine.module(case.file, case.entry).function(case.entry)
        row["instantiations"] += 1
        row["worst_share_of_bound"] = max(row["worst_share_of_bound"], share_of_bound(case, buffers))
        row["registers"] = max(row["registers"], int(function.num_regs))
        row["spilled_bytes"] = max(row["spilled_bytes"], int(function.local_size_bytes))
    return {"kernels": kernels, "failures": failures}


def run_planted(machine: Machine, entry: str) -> None:
    rows, columns = 6, 96
    x = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    y = np.zeros(rows, np.float32)
    buffers = {0: x, 1: y, 2: np.int32(columns), 3: np.int32(rows)}
    machine.run(PLANTED, entry, buffers, (rows, 1, 1), (64, 1, 1))


def sanitize(tool: str, folder: Path, arguments: list[str], seconds: float) -> dict:
    """What a sanitizer says of this script run with `arguments`."""
    command = ["compute-sanitizer", "--tool", tool, *SANITIZERS[tool], "--print-limit", "20", sys.executable]
    command += [str(Path(__file__).resolve()), "--child", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"ran": False, "errors": None, "said": f"more than {seconds:.0f} s"}
    said = done.stdout + done.stderr
    hits = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", said)
    lines = [line for line in said.splitlines() if line.startswith("=========") and line.strip("= ")]
    return {
        "ran": "child has run" in said or bool(hits and int(hits[-1])),  # an error may end the child
        "errors": int(hits[-1]) if hits else None,
        "said": "\n".join(lines[:12] + lines[-2:] if len(lines) > 14 else lines) or said[-600:],
    }


def child(folder: Path, which: str) -> None:
    machine = Machine(folder, json.loads((folder / "where.json").read_text()))
    if which == "one-of-each":
        cases = shader_cases.every()
        outcome = run_cases(machine, cases, json.loads((folder / "one_of_each.json").read_text()))
        for failure in outcome["failures"]:
            print("FAILURE", failure)
    else:
        run_planted(machine, which)
    print("child has run")


def versions() -> dict:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    sanitizer = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    return {
        "device": properties["name"].decode(),
        "arch": f"sm_{properties['major']}{properties['minor']}",
        "cupy": cupy.__version__,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": os.path.basename(nvidia.nvrtc_library() or ""),
        "compute-sanitizer": sanitizer.strip().splitlines()[-1] if sanitizer.strip() else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="1/1", help="i/n: every n-th case; the sanitizers in part 1 only")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=570.0, help="sanitizers give up after this")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WHICH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), options.child[1])
        return 0

    started = time.monotonic()
    part, parts = (int(n) for n in options.part.split("/"))
    log = {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv), **versions()}
    log["part"] = options.part
    cases = shader_cases.every()
    sanitized = one_of_each(cases)
    mine = [i for i in range(len(cases)) if i % parts == part - 1 or (part == 1 and i in set(sanitized))]
    entries_of: dict[Path, list] = {}
    for i in mine:
        entries = entries_of.setdefault(cases[i].file, [])
        if cases[i].entry not in entries:
            entries.append(cases[i].entry)
    entries_of[PLANTED] = [tuple(re.fullmatch(r"(\w+)<(\w+)>", entry).groups()) for entry in PLANTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where, errors = compile_all(entries_of, folder, log["arch"], options.jobs)
        (folder / "where.json").write_text(json.dumps(where))
        (folder / "one_of_each.json").write_text(json.dumps(sanitized))
        log["compiled"] = len(where) - len(PLANTS)
        log["compile_errors"] = errors
        log["compile_seconds"] = round(time.monotonic() - started)
        print(f"{log['compiled']} instantiations compiled, {len(errors)} programs failed", flush=True)
        log |= run_cases(Machine(folder, where), cases, mine)
        count = sum(row["instantiations"] for row in log["kernels"].values())
        print(f"{count} of {len(mine)} right, {len(log['failures'])} failures", flush=True)
        log["right"], log["wanted"] = count, len(mine)
        bad = bool(errors or log["failures"] or count != len(mine))
        if part == 1:
            log["sanitized_cases"] = [str(cases[i]) for i in sanitized]
            log["sanitizers"], log["planted"] = {}, {}
            for tool in SANITIZERS:
                left = options.seconds - (time.monotonic() - started)
                said = sanitize(tool, folder, ["one-of-each"], max(10.0, left))
                log["sanitizers"][tool] = said
                bad |= not (said["ran"] and said["errors"] == 0) or "FAILURE" in said["said"]
                print(f"{tool}: {said['errors']} errors", flush=True)
            for entry, tools in PLANTS.items():
                for tool, must_complain in tools.items():
                    said = sanitize(tool, folder, [entry], 120.0)
                    complained = bool(said["errors"])
                    seen = {"complained": complained, "must": must_complain, **said}
                    log["planted"][f"{entry} {tool}"] = seen
                    bad |= not said["ran"] or complained != must_complain
                    print(f"planted {entry} under {tool}: complained {complained}", flush=True)
    log["right_in_all"] = not bad
    log["seconds"] = round(time.monotonic() - started)
    file = options.out / f"metal_shaders_{log['arch']}_{log['date']}_part{part}of{parts}.json"
    file.write_text(json.dumps(log, indent=1) + "\n")
    print(f"{'WRONG' if bad else 'all right'}: {file}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
