"""The AMX kernels, compiled without MLX, against float64: with emulated tiles, and with AMX where it is."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16")]
ISA = [*AVX512, "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mamx-tile", "-mamx-bf16"]
COMMON = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says of the first CPU; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX needs an x86-64 CPU"),
    pytest.mark.skipif(
        not {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"} <= cpu_flags(),
        reason="AMX kernels, emulated tiles too, need a CPU with AVX-512 BF16",
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles and links the harness with amx.cpp, emulated or not; returns the program."""
    folder = tmp_path_factory.mktemp("amx")

    def compile_object(name: str, source: str, *flags: str) -> Path:
        out = folder / f"{name}.o"
        command = ["g++", *COMMON, *flags, "-c", str(ROOT / source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return out

    shared = [
        compile_object("harness", "tests/amx/harness.cpp", "-O1", "-mfma"),
        compile_object("scalar", "metal/cpu/scalar.cpp", "-O2"),
        compile_object("table", "metal/cpu/table.cpp", "-O2", "-DMLXQ_HAS_AMX"),
    ]

    def program(emulated: bool) -> Path:
        name = "emulated" if emulated else "real"
        flags = ["-DMLXQ_EMULATE_AMX"] if emulated else []
        kernel = compile_object(name, "metal/cpu/amx.cpp", "-O1", *ISA, *flags)
        out = folder / name
        subprocess.run(["g++", *map(str, [*shared, kernel]), "-o", str(out), "-pthread"], check=True)
        return out

    return program


@pytest.fixture(scope="module")
def emulated(build) -> Path:
    return build(True)


def run(program: Path, mode: str) -> str:
    done = subprocess.run([program, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_format_dtype_and_ragged_shape_agrees_with_float64_on_emulated_tiles(emulated):
    said = run(emulated, "check")
    assert int(said.split()[0]) > 500, said


@pytest.mark.skipif(not {"amx_tile", "amx_bf16"} <= cpu_flags(), reason="no AMX on this CPU")
def test_real_tiles_give_the_bits_of_emulated_ones(build, emulated):
    real = build(False)
    run(real, "check")
    assert run(real, "digest") == run(emulated, "digest")
