"""tools/compile_tests.py: what GPU tests will want is known, and compiled, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is no installed package

from tools.msl import nvidia  # noqa: E402


def run(cache, *options) -> subprocess.CompletedProcess:
    pytest.importorskip("torch", reason="needs the package torch")
    command = [sys.executable, str(ROOT / "tools/compile_tests.py"), *options]
    environment = os.environ | {"MLXQ_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def listed(done) -> list[tuple[str, list[str]]]:
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_that_a_test_would_start_is_listed_once(tmp_path):
    found = listed(run(tmp_path, "--list", "-k", "few_rows and bfloat16 and 4-bit/64"))
    assert len(found) == len({json.dumps(one) for one in found}) >= 6  # shapes of other forms
    assert {file for file, _ in found} == {"qmv_stream.cu"}
    assert all("-DBITS=4" in flags and "--gpu-architecture=sm_90a" in flags for _, flags in found)
    parts = listed(run(tmp_path, "--list", "-k", "parts_equal and 8-bit/64 and bfloat16-bfloat16"))
    wanted = {next(f for f in flags if "PARTS" in f) for file, flags in parts if file == "qmm_stream.cu"}
    assert {"-DPARTS=2", "-DPARTS=3", "-DPARTS=4"} <= wanted


def test_those_of_the_sanitizers_have_their_options(tmp_path):
    found = listed(run(tmp_path, "--list", "--sanitized", "-k", "transposed and 4-bit/64-float16"))
    kinds = [("-lineinfo" in flags, "-DARRIVALS=32" in flags) for _, flags in found]
    assert set(kinds) == {(True, False), (True, True)} and len(found) % 2 == 0


def test_they_lie_in_the_cache_afterwards(tmp_path):
    if nvidia.nvrtc_library() is None:
        pytest.skip("needs NVRTC: package nvidia-cuda-nvrtc==13.0.*, which exists for Linux and Windows")
    done = run(tmp_path, "-k", "weights_that_are_not_finite")
    (code,) = (tmp_path / "cuda").iterdir()
    assert not done.returncode and code.name.startswith("quantize-") and code.read_bytes()[:4] == b"\x7fELF"
    assert run(tmp_path, "-k", "no_such_test").returncode == 1
