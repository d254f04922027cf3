"""The NEON kernels on the shared cases, cross-compiled and run under qemu."""

import platform
import shutil

import native
import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
WANTED = {"neon:dot", "neon:strip", "neon:straight"}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="on Arm test_kernels.py runs these kernels"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs the package g++-aarch64-linux-gnu"),
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason="needs the package qemu-user-static"),
]


@pytest.fixture(scope="module")
def harness():
    return native.build(COMPILER, "aarch64", ("-static",))


def test_neon_and_dotprod_give_the_double_answer_inside_their_arrays(harness):
    families, found = native.run([EMULATOR, harness])
    assert families == ["scalar", "neon", "neon_dotprod"]
    assert set(found) == WANTED | {"neon_dotprod:planes", "neon_dotprod:q8", "scalar:loops", "scalar:q8"}
    assert not native.too_far(found)


def test_a_processor_without_dotprod_gets_neon(harness):
    lines = ["4 64 3 9 192 1 0 0", "8 32 2 7 96 0 1 2", "4 64 3 9 192 1 0 0 q8"]
    families, found = native.run([EMULATOR, "-cpu", "cortex-a72", harness], lines)
    assert families == ["scalar", "neon"]
    assert set(found) == WANTED | {"scalar:loops", "scalar:q8"}
    assert not native.too_far(found)
