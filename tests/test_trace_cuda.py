"""tools/trace_cuda.py and rates_cuda.py without a GPU: the marks still fit qmv_stream.cu, all compiles."""

import re
import sys
from pathlib import Path

import pypi_nvrtc
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools/ is no installed package

import bench_cuda as bench  # noqa: E402
import rates_cuda  # noqa: E402
import trace_cuda  # noqa: E402

from mlxq.format import Format  # noqa: E402
from mlxq.ops import cuda  # noqa: E402


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_marked_kernel_compiles(bits, monkeypatch, tmp_path):
    source = cuda._source
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: pypi_nvrtc)
    monkeypatch.setattr(cuda, "_source", lambda name: trace_cuda.marked(source(name)))
    shape = cuda.stream_shape(8, 28672, 8192, Format(bits, 64), *trace_cuda.TYPES, bench.H200)
    assert b"trace_" in cuda.cubin("qmv_stream.cu", cuda.options("sm_90a", shape["defines"]))
    assert shape["grid_x"] <= trace_cuda.BLOCKS


def test_a_kernel_without_the_marks_places_is_named():
    with pytest.raises(SystemExit, match="no longer has 'typedef unsigned"):
        trace_cuda.marked("another kernel")


def test_clocks_have_the_names_of_their_steps():
    said = trace_cuda.named("multiplies", [1, 2, 3, 10, 11, 20, 21, None, 30])
    assert said == "asked 1, x 2, made 3, wants 10, has 11, done 20, wants 21, done 30"


@pytest.mark.parametrize("name", rates_cuda.MIXES)
def test_every_mix_of_rates_cuda_has_the_instructions_of_its_name(name):
    program = pypi_nvrtc.createProgram(rates_cuda.source(name), "rounds.cu", (), ())
    pypi_nvrtc.compileProgram(program, ("-arch=sm_90a",))
    text = pypi_nvrtc.getPTX(program)
    counts = {
        "HMMA": "mma.sync",
        "HFMA2": "fma.rn.bf16x2",
        "FFMA": "fma.rn.f32 %",
        "LOP3": r"and\.b32|lop3\.b32",
    }
    for number, what in re.findall(r"(\d+) (HMMA|HFMA2|FFMA)", name):
        assert text.count(counts[what]) == int(number)
