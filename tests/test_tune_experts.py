"""tools/tune_experts.py without a GPU: what it would time, and what it says of right and wrong forms."""

import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # tools/ is no installed package

import bench_cuda  # noqa: E402
import tune_experts  # noqa: E402

from mlxq.format import Format  # noqa: E402
from mlxq.ops import cuda  # noqa: E402


def test_every_cell_has_several_forms_that_fit_and_the_one_in_use_is_among_them():
    for bits, tokens, N, K, transpose in tune_experts.cells([2, 4, 8], None):
        found = list(tune_experts.candidates(bits, tokens, N, K, transpose, bench_cuda.H200))
        assert len(found) >= 4, (bits, tokens)
        for _, (_, shape) in found:
            blocks = shape["defines"]["BLOCKS"]
            assert (shape["shared"] + 1024) * blocks <= bench_cuda.H200["shared"] + 1024
        about = 1, N, K, Format(bits, 64), *tune_experts.TYPES, bench_cuda.H200, transpose, bench_cuda.EXPERTS
        now = cuda.grouped_shape(2 * tokens, *about)
        assert any(shape == now for _, shape in found), (bits, tokens, transpose, now)


def test_a_wrong_form_is_named_and_not_timed(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch")

    class Grouped(types.SimpleNamespace):
        pass

    def call(cell, launch):
        cell.y[...] = cell.expected * (1.1 if launch.kernel == "qmv_stream" else 1)

    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda, "microseconds", lambda torch, calls: 5.0)
    monkeypatch.setattr(cuda, "_device", lambda index: bench_cuda.H200)
    monkeypatch.setattr(cuda, "_Grouped", Grouped)
    monkeypatch.setattr(cuda, "_grouped", lambda *a: Grouped(kernel=a[-2][0]))
    monkeypatch.setattr(cuda, "_qmv", lambda *a: Grouped(kernel="qmv"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_experts.Cell, "call", call)
    weights = [bench_cuda.random_weight(torch, Format(4, 64), 64, 4096, experts=(8,)) for _ in range(2)]
    cell = tune_experts.Cell(torch, (4, 8, 64, 4096, True), weights)
    found = cell.run()
    wrong = [row for row in cell.rows if row.get("failed")]
    assert wrong and all(row["form"][0] == "qmv_stream" and row["us"] is None for row in wrong)
    assert found["us"] == 5.0 and found["now"]["us"] is None and found["now"]["form"][0] == "qmv_stream"
