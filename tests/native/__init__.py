"""Builds and runs harness.cpp: the CPU kernels without MLX, every array up against a forbidden page."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

from cases import harness_lines

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "metal/cpu"
SHARED = ("harness", "scalar", "table")


def families(processor: str) -> dict[str, list[str]]:
    """Compiler flags of each kernel family that has a source file, as metal/CMakeLists.txt sets them."""
    cmake = (ROOT / "metal/CMakeLists.txt").read_text()
    variables = dict(re.findall(r'set\((\w+) "?([^")]*)"?\)', cmake))
    lists = [names.split() for names in re.findall(r"set\(families ([^)]*)\)", cmake)]
    names = next(names for names in lists if ("neon" in names) == (processor == "aarch64"))

    def expand(text: str) -> list[str]:
        return re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], text).split()

    flags = {name: expand(variables["kernel_flags"]) + expand(variables[f"{name}_flags"]) for name in names}
    return {name: flags[name] for name in names if (CPU / f"{name}.cpp").exists()}


def _object(name: str, command: list[str], source: Path, keep: Path) -> Path:
    """The source compiled, kept under a name that changes with the command and with every source file."""
    texts = sorted([*CPU.iterdir(), ROOT / "mlxq/format.h", Path(__file__).with_name("harness.cpp")])
    wanted = [t for t in texts if t.suffix == ".h" or t == source]
    content = b"".join(t.read_bytes() for t in wanted)
    digest = hashlib.sha256(repr(command).encode() + content).hexdigest()[:16]
    out = keep / f"{name}-{digest}.o"
    if not out.exists():
        temporary = keep / f"{name}-{digest}.tmp"
        subprocess.run([*command, "-c", source, "-o", temporary], check=True)
        temporary.rename(out)
    return out


def build(compiler: str, processor: str, link: tuple[str, ...] = ()) -> Path:
    """The harness with every family of the processor; objects stay in build/harness until sources change."""
    keep = ROOT / "build/harness" / processor
    keep.mkdir(parents=True, exist_ok=True)
    flags = families(processor)
    # -O1: compiling is most of what this costs, and the loads and stores are the same.
    base = [compiler, "-std=c++20", "-Wall", "-Wextra"]
    objects = []
    for name in SHARED:
        source = Path(__file__).with_name("harness.cpp") if name == "harness" else CPU / f"{name}.cpp"
        defines = [f"-DMLXQ_HAS_{family.upper()}" for family in flags] if name == "table" else []
        objects.append(_object(name, [*base, "-O1", *defines], source, keep))
    for name, extra in flags.items():
        objects.append(_object(name, [*base, *extra, "-O1"], CPU / f"{name}.cpp", keep))
    program = keep / "harness"
    subprocess.run([compiler, *link, *objects, "-o", program], check=True)
    return program


Answers = dict[str, list[tuple[float, str]]]  # by kernel name: (error, case)


def run(command: list, lines: list[str] | None = None) -> tuple[list[str], Answers]:
    """Families that ran, and (error, case) of every kernel on every case that it serves."""
    lines = harness_lines() if lines is None else lines
    done = subprocess.run(command, input="\n".join(lines) + "\n", text=True, capture_output=True)
    head, *answers = done.stdout.splitlines()
    assert done.returncode == 0, f"harness: {done.returncode} {done.stderr} after: {answers[-1:]}"
    found: Answers = {}
    for answer in answers:
        kernel, error, case = answer.split(" ", 2)
        found.setdefault(kernel, []).append((float(error), case))
    return head.removeprefix("families:").split(), found


# Relative Frobenius error that a kernel may have, by the dtype of x as the harness numbers it: float32 sums
# of up to 4224 terms; else half a unit in y's last place and room for a kernel that rounds x.
BOUND = (3e-6, 2**-11 + 4e-5, 2**-8 + 1e-3)


def too_far(found: Answers) -> list[str]:
    """Answers outside the bound, as lines to print."""
    return [
        f"{kernel}: error {error:.2g} on {case}"
        for kernel, answers in found.items()
        for error, case in answers
        if not error <= BOUND[int(case.split()[6])]
    ]
