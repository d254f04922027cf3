"""tools/tune_many.py without a GPU: what it would time, and what it says of right and wrong forms."""

import json
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools/ is no installed package

import bench_cuda  # noqa: E402
import tune_many  # noqa: E402

from mlxq.format import Format  # noqa: E402
from mlxq.ops import cuda  # noqa: E402


def test_every_cell_has_several_forms_and_every_form_fits():
    for cell in tune_many.cells([2, 4, 8], None):
        found = list(tune_many.candidates(*cell, bench_cuda.H200))
        assert len(found) >= 3, cell
        for _, shape in found:
            assert tune_many.valid_ranks(shape, cell[1], bench_cuda.H200)
            assert (shape["shared"] + 1024) * shape["defines"]["BLOCKS"] <= bench_cuda.H200["shared"] + 1024
        bits, M, N, K, transpose = cell
        if (N if transpose else K) == 4096 and M in (64, 128, 256):  # clusters of four do not lie on the chip
            parts = {s["defines"]["PARTS"]: tune_many.resident_ranks(s, M, bench_cuda.H200) for _, s in found}
            assert parts[2] and max(parts[2]) * 2 * 32 * (M <= 64 or 2) <= 2 * 132 and parts.get(3, [1])


class Launch:
    """A launch that does nothing but check that it has a workspace if it needs one."""

    def __init__(self, blocks: int, ranks: int, parts: int):
        self.blocks, self.parts = blocks, parts
        self.config = types.SimpleNamespace(grid_x=ranks, blocks=blocks, parts=parts)
        if parts > 1:
            self.floats = 10

    def __call__(self, stream, x, y, *workspace, early):
        assert len(workspace) == (self.parts > 1) and all(workspace)


@pytest.fixture
def on_cpu(monkeypatch):
    """tune_many with float64 products on the CPU: forms of one block a multiprocessor are wrong."""
    torch = pytest.importorskip("torch", reason="needs torch")

    def launch(*about, parts=(1, 2)):
        shape, ranks = about[9], about[10] if len(about) > 10 else None
        given = shape["defines"]["PARTS"]
        assert ranks or given in parts
        return Launch(shape["defines"]["BLOCKS"], ranks or 2, given if ranks or len(parts) == 1 else 2)

    def call(cell, launch):
        launch(0, 1, 2, early=True)
        cell.y[...] = cell.expected * (1 if launch.config.blocks > 1 else 1.1)

    def microseconds(torch, calls):
        config = calls[0].args[0].config
        return 10.0 * config.blocks + config.grid_x + 5 * (config.parts - 1)

    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda, "microseconds", microseconds)
    monkeypatch.setattr(cuda, "_device", lambda index: bench_cuda.H200)
    monkeypatch.setattr(cuda, "_kernel", lambda *a: None)
    monkeypatch.setattr(cuda, "_clusters_at_once", lambda kernel, threads, ranks: 100 // ranks)
    monkeypatch.setattr(cuda, "_stream_launch", launch)
    monkeypatch.setattr(cuda, "_stream", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_many.Cell, "call", call)
    return torch


@pytest.mark.parametrize("transpose", (True, False))
def test_a_cell_keeps_every_time_and_names_what_is_wrong(on_cpu, transpose):
    torch, clusters = on_cpu, {}
    weights = [bench_cuda.random_weight(torch, Format(4, 64), 256, 1024) for _ in range(3)]
    cell = tune_many.Cell(torch, (4, 64, 256, 1024, transpose), weights)
    found = cell.run(clusters)
    assert json.loads(json.dumps(clusters))["2"] == {str(r): 100 // r for r in range(2, 9)}
    wrong = [row for row in cell.rows if row.get("failed")]
    assert wrong and all(row["us"] is None and row["form"][0][1] == 1 for row in wrong)
    assert found["us"] == 21 and found["ranks"] == 1 and found["form"][0] == (64, 2)
    # what ops.cuda would choose is in two parts
    default = (("TURNED", 0), ("BUFFERS", 2 if transpose else 1), ("HALVES", 1), ("PARTS", 2))
    assert found["now"] == {"form": ((64, 2), default), "ranks": 2, "us": 27}
    asked = [(str(row["form"]), row["ranks"]) for row in cell.rows]
    assert len(set(asked)) == len(asked) >= 7
    parts = {(dict(row["form"][1]).get("PARTS"), row["ranks"]) for row in cell.rows if row["us"]}
    assert parts > ({(2, 1), (2, 2), (4, 1)} if transpose else {(2, 1)})


def test_what_was_found_is_what_the_product_then_uses(on_cpu, monkeypatch):
    form = [[32, 2], [["BUFFERS", 1]]]
    about = {"bits": 4, "M": 64, "N": 256, "K": 1024, "transpose": True}
    monkeypatch.setattr(cuda, "_many_streamed", lambda *a: "as usual")
    tune_many.apply([about | {"form": form, "ranks": 3}, about | {"M": 16, "form": "qmv_stream", "ranks": 1}])
    arguments = 0, (0, 0, 0), 64, 256, 1024, Format(4, 64), "bfloat16", "bfloat16"
    launch = cuda._many_streamed(*arguments, True)
    assert launch.config.grid_x == 3 and launch.blocks == 2
    assert cuda._many_streamed(*arguments, False) == "as usual"


def test_every_int8_cell_has_several_forms_and_every_form_fits():
    for cell in tune_many.int8_cells([2, 4, 8], None):
        found = list(tune_many.int8_shapes(cell, bench_cuda.H200))
        assert len(found) > 1, cell
        kernels = [tuple(shape["defines"].items()) for _, shape in found]
        assert len(set(kernels)) == len(kernels)
        for _, shape in found:
            assert tune_many.valid_ranks(shape, cell[3], bench_cuda.H200)
            assert (shape["shared"] + 1024) * shape["defines"]["BLOCKS"] <= bench_cuda.H200["shared"] + 1024


@pytest.mark.parametrize("per_row", (True, False))
def test_an_int8_cell_keeps_every_time_and_names_what_is_wrong(on_cpu, monkeypatch, per_row):
    torch = on_cpu

    def launch(device, pointers, M, N, K, fmt, s_type, y_type, kinds, per_row, shape, ranks=None):
        return Launch(shape["defines"]["BLOCKS"], ranks or 1, 1)

    def microseconds(torch, calls):
        config = calls[0].args[0].config if isinstance(calls[0].func, types.MethodType) else None
        return 10.0 * config.blocks + config.grid_x if config else 40.0

    monkeypatch.setattr(bench_cuda, "microseconds", microseconds)
    monkeypatch.setattr(cuda, "_q8_stream_launch", launch)
    monkeypatch.setattr(tune_many.Int8Cell, "call", tune_many.Cell.call)
    monkeypatch.setattr(tune_many, "WIDE", (256, 1024))
    weights = [bench_cuda.random_weight(torch, Format(4, 64), 256, 1024, per_row=per_row) for _ in range(3)]
    cell = tune_many.Int8Cell(
        torch, (4, 64, per_row, 128), weights, [torch.zeros(256, 1024, dtype=torch.int8)]
    )
    found = cell.run()
    wrong = [row for row in cell.rows if row.get("failed")]
    assert wrong and all(row["us"] is None and row["form"][0][1] == 1 for row in wrong)
    assert (
        found["us"] == 21 and found["ranks"] == 1 and found["form"][0] == (64, 2) and found["int_mm_us"] == 40
    )
    asked = [(str(row["form"]), row["ranks"]) for row in cell.rows]
    assert len(set(asked)) == len(asked) >= 5
    json.dumps(cell.rows)
