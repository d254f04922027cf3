"""tools/trace_cuda.py and rates_cuda.py without a GPU: the marks still fit qmv_stream.cu, all compiles."""

import re
import sys
import types
from pathlib import Path

import pypi_nvrtc
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools/ is no installed package

import bench_cuda as bench  # noqa: E402
import rates_cuda  # noqa: E402
import trace_cuda  # noqa: E402
import tune_cuda  # noqa: E402

from mlxq.format import Format  # noqa: E402
from mlxq.ops import cuda  # noqa: E402


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_marked_kernel_compiles(bits, monkeypatch, tmp_path):
    source = cuda._source
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "_nvrtc", lambda: pypi_nvrtc)
    monkeypatch.setattr(cuda, "_source", lambda name: trace_cuda.marked(source(name)))
    shape = cuda.stream_shape(8, 28672, 8192, Format(bits, 64), *tune_cuda.TYPES, bench.H200)
    assert b"trace_" in cuda.cubin("qmv_stream.cu", cuda.options("sm_90a", shape["defines"]))
    assert shape["grid_x"] <= trace_cuda.BLOCKS


def test_a_kernel_without_the_marks_places_is_named():
    with pytest.raises(SystemExit, match="no longer has 'typedef unsigned"):
        trace_cuda.marked("another kernel")


def test_clocks_have_the_names_of_their_steps():
    said = trace_cuda.named("multiplies", [1, 2, 3, 10, 11, 20, 21, None, 30])
    assert said == "asked 1, x 2, made 3, wants 10, has 11, done 20, wants 21, done 30"


def test_a_report_has_the_medians_of_blocks_from_the_start_of_each(monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    blocks = 132

    class Driver:
        cuFuncGetModule = cuModuleGetGlobal_v2 = staticmethod(lambda *a: 0)  # noqa: N815

        @staticmethod
        def cuMemcpyDtoH_v2(host, at, size):  # noqa: N802 (the driver's name)
            for block in range(blocks):
                begin = 1000 * (block + 1)
                host[2][block][0], host[2][block][1] = begin, begin + 70
                host[2][block][trace_cuda.PLACES] = 5000 + 10 * block
                host[2][block][trace_cuda.PLACES + 1] = 9000
                host[0][block][0] = begin + 40 + block % 3
                host[1][block][1] = begin + 9 if block < 5 else 0  # too few of them
            return 0

    class Launch:
        function = None

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    small = types.SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    monkeypatch.setattr(cuda, "_device", lambda device: bench.H200)
    monkeypatch.setattr(cuda, "_driver", lambda: Driver)
    monkeypatch.setattr(tune_cuda, "launch_of", lambda *about: Launch())

    def check_and_time(torch, row, make, call, y, expected, most):
        row["us"] = 12.5 if "trace_" in cuda._source("qmv_stream.cu") else 12.0
        assert y.shape == expected.shape == (3, 4096)
        return make()

    monkeypatch.setattr(bench, "check_and_time", check_and_time)
    trace_cuda.report("4:3:4096x1024", None)
    head, apart, *warps = capsys.readouterr().out.splitlines()
    assert head.startswith("4:3:4096x1024: 12.00 us, with marks 12.50; 132 blocks")
    assert apart == "  begin 1.3 us apart, end 0.0 us apart"
    assert warps == ["  multiplies: asked 41", "  asks: ", "  y: begins 0, ready 70"]


@pytest.mark.parametrize("name", rates_cuda.MIXES)
def test_every_mix_of_rates_cuda_has_the_instructions_of_its_name(name):
    program = pypi_nvrtc.createProgram(rates_cuda.source(name), "rounds.cu", (), ())
    pypi_nvrtc.compileProgram(program, ("-arch=sm_90a",))
    text = pypi_nvrtc.getPTX(program)
    counts = {"HMMA": r"mma\.sync", "HFMA2": r"fma\.rn\.bf16x2", "FFMA": r"fma\.rn\.f32 %"}
    counts["LOP3"] = r"and\.b32 %r\d+, %r\d+, (?:196611|786444|3145776|12583104);|lop3\.b32 .*0x6a;"
    for number, what in re.findall(r"(\d+) (HMMA|HFMA2|FFMA|LOP3)", name):
        assert len(re.findall(counts[what], text)) == int(number), what
