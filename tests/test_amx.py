"""The AMX kernels, compiled without MLX, against float64: with emulated tiles, and with AMX where it is."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import native
import pytest
from cases import harness_lines

ROOT = Path(__file__).resolve().parent.parent
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16")]
ISA = [*AVX512, "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
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
def compile_object(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amx")

    def compiled(name: str, source: str, *flags: str) -> Path:
        out = folder / f"{name}.o"
        if not out.exists():
            command = ["g++", *COMMON, *flags, "-c", str(ROOT / source), "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return out

    return compiled


def link(objects: list[Path], name: str) -> Path:
    out = objects[0].with_name(name)
    subprocess.run(["g++", *map(str, objects), "-o", str(out), "-pthread"], check=True)
    return out


@pytest.fixture(scope="module")
def scalar(compile_object) -> Path:
    return compile_object("scalar", "metal/cpu/scalar.cpp", "-O2")


@pytest.fixture(scope="module")
def build(compile_object, scalar):
    """Compiles and links the harness with amx.cpp, emulated or not; returns the program."""
    shared = [
        compile_object("harness", "tests/amx/harness.cpp", "-O1", "-mfma"),
        scalar,
        compile_object("table", "metal/cpu/table.cpp", "-O2", "-DMLXQ_HAS_AMX"),
    ]

    def program(emulated: bool) -> Path:
        name = "emulated" if emulated else "real"
        flags = ["-DMLXQ_EMULATE_AMX"] if emulated else []
        kernel = compile_object(f"{name}_amx", "metal/cpu/amx.cpp", "-O1", *ISA, *flags)
        return link([*shared, kernel], name)

    return program


@pytest.fixture(scope="module")
def int8(compile_object):
    """amx_int8.cpp, emulated or not."""

    def kernel(emulated: bool) -> Path:
        flags = ["-DMLXQ_EMULATE_AMX"] if emulated else []
        name = "emulated_int8" if emulated else "real_int8"
        return compile_object(name, "metal/cpu/amx_int8.cpp", "-O1", *ISA, *flags)

    return kernel


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


no_int8 = pytest.mark.skipif(not {"amx_tile", "amx_int8"} <= cpu_flags(), reason="no AMX int8 on this CPU")


@pytest.mark.parametrize("emulated", [True, pytest.param(False, marks=no_int8)])
def test_int8_tiles_give_q8mm_the_bits_of_avx512_vnni(compile_object, scalar, int8, emulated):
    vnni = compile_object("vnni", "metal/cpu/avx512_vnni.cpp", "-O1", *ISA)
    q8 = compile_object("q8", "tests/amx/q8.cpp", "-O1")
    said = run(link([q8, int8(emulated), vnni, scalar], f"q8_{emulated}"), "check")
    assert int(said.split()[0]) > 300, said


def test_int8_tiles_read_and_write_what_is_theirs_and_agree_with_float64(compile_object, scalar, int8):
    harness = compile_object("guarded", "tests/native/harness.cpp", "-O1")
    table = compile_object("int8_table", "metal/cpu/table.cpp", "-O2", "-DMLXQ_HAS_AMX_INT8")
    program = link([harness, int8(True), table, scalar], "guarded")
    lines = [line for line in harness_lines() if " q8" in line]
    families, found = native.run([program, "amx_int8"], lines)
    assert families == ["scalar", "amx_int8"] and len(found["amx_int8:q8"]) == len(lines) > 20
    assert not native.too_far(found)
