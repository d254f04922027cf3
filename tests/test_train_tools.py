"""tools/train_small.py and tools/train_smollm2.py: they run, say what is missing, and the README shows it."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq.convert import convert

torch = pytest.importorskip("torch", reason="needs the package torch")

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import readme_tables  # noqa: E402
import train_small  # noqa: E402
import train_smollm2  # noqa: E402

from mlxq.qat.training import Outcome  # noqa: E402

WORDS = "The cat sat on the mat and the rat sat in the hat, which was new. "


@pytest.fixture
def texts(tmp_path):
    """A folder of short training and held-out texts."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("calib.a.txt", 60), ("heldout_dev.b.txt", 50)):
        (folder / name).write_text("".join(f"{i * i} {WORDS}" for i in range(count)))
    return folder


def run(tool, monkeypatch, out, *words) -> dict:
    """The result file of the tool's main."""
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *map(str, words), "--out", str(out)])
    tool.main()
    return written(out)


def written(out) -> dict:
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_a_tiny_model_is_trained_rounded_and_trained_again(start, texts, tmp_path, monkeypatch):
    words = ["--size", "tiny", "--start", start, "--steps", "2", "--bits", "2", "--device", "cpu"]
    words += ["--data", texts, "--length", "32", "--batch", "8"]
    result = run(train_small, monkeypatch, tmp_path / "out", *words)
    assert result["missing"] == [] and result["model"]["size"] == "tiny"
    rows = {row["what"]: row for row in result["rows"]}
    assert list(rows) == ["float", "rtn 2", *(["gptq 2"] if start == "gptq" else []), "qat 2"]
    if start == "gptq":  # its codes are what training begins with
        begun = next(point["loss"] for point in result["curves"] if point["what"] == "qat 2")
        assert begun < rows["rtn 2"]["kl"] / 2 > rows["gptq 2"]["kl"]
    assert (rows["rtn 2"]["measured"], rows["qat 2"]["measured"]) == ("packed", "packed")
    assert rows["float"]["kl"] == 0 and rows["rtn 2"]["kl"] > 0
    assert rows["qat 2"]["steps"] == 2 and [p["steps"] for p in rows["qat 2"]["probes"]] == [1, 1, 1]


def test_seconds_of_a_width_hold_its_probes(monkeypatch):
    monkeypatch.setattr(train_small, "prepared", lambda model, bits, start: None)
    monkeypatch.setattr(train_small, "converted", lambda student: None)
    monkeypatch.setattr(train_small, "measure", lambda *a: {"cross_entropy": 2.0, "kl": 1.0})
    outcomes = iter([Outcome(best=b, losses=[1.0], seconds=1.0) for b in (3.0, 2.0, 4.0)])
    long = Outcome(best=1.0, losses=[1.0] * 10, seconds=7.0)
    monkeypatch.setattr(train_small, "fit", lambda *a, **k: next(outcomes, long))
    rows = [types.SimpleNamespace(tokens=np.zeros((2, 7)))]
    row, _, _ = train_small.trained(None, 2, None, rows, rows, rows, 1.0, (1e-3, 1e-2, 1e-1), None, None)
    assert (row["seconds"], row["steps"], row["rate"]) == (10.0, 10, 1e-2)
    assert row["tokens_per_second"] == pytest.approx(10 * 14 / 7)


@pytest.fixture
def smollm2(texts, tmp_path, monkeypatch):
    """Arguments of train_smollm2 with a tiny Llama for its teacher, which is converted already."""
    teacher = make_hf_model("llama", tmp_path / "teacher")
    convert(teacher, tmp_path / "start", bits=2, group_size=64, embedding_bits=8, progress=False)
    monkeypatch.setattr(train_smollm2, "permuted_teacher", lambda folder, seed: teacher)
    words = ["--start", tmp_path / "start", "--data", texts, "--length", "24", "--windows", "4"]
    return [*words, "--steps", "2", "--batch", "2"]


def test_a_start_is_measured_trained_and_measured_again(smollm2, tmp_path, monkeypatch):
    result = run(train_smollm2, monkeypatch, tmp_path / "out", *smollm2)
    assert [row["what"] for row in result["rows"]] == ["start", "trained"] and result["missing"] == []
    assert result["rows"][1]["kl"] > 0 and len(result["losses"]) == 2 and result["data"]["trains"] == "scales"


def test_a_training_that_a_signal_stops_leaves_its_start_and_its_curve(smollm2, tmp_path, monkeypatch):
    stopped = Outcome(start=2.0, best=1.5, losses=[1.0, 0.9], evaluations=[(0, 2.0), (1, 1.5)], seconds=1.0)
    monkeypatch.setattr(train_smollm2, "train", lambda settings, dst: stopped)
    with pytest.raises(SystemExit, match="stopped after 2 steps"):
        run(train_smollm2, monkeypatch, tmp_path / "out", *smollm2)
    result = written(tmp_path / "out")
    assert [row["what"] for row in result["rows"]] == ["start"] and result["losses"] == [1.0, 0.9]
    assert result["curve"][1] == {"step": 1, "loss": 1.5}
    assert "2.0000 > 1.5000" in result["missing"][0]


MACHINE = {
    "cpu": "NVIDIA H200", "family": "", "gpu": "NVIDIA H200", "cores": 16, "features": [], "noisy": False,
    "date": "2026-11-29T10:00:00", "commit": "0123456789ab", "command": "python tools/x.py",
    "versions": {"torch": "2.11"},
}  # fmt: skip


def bar(what, measured, limit, sense):
    return {"what": what, "measured": measured, "bar": limit, "sense": sense, "met": True, "note": ""}


def test_the_readme_shows_what_training_recovers(monkeypatch, tmp_path):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.section("train_small") == "No run of `tools/train_small.py` is on file."
    rows = [
        {"what": "float", "bits": 32, "cross_entropy": 3.0, "kl": 0.0, "steps": 100, "tokens_per_second": 5e4,
         "measured": "float"},
        {"what": "rtn 2", "bits": 2, "cross_entropy": 5.0, "kl": 2.0, "steps": 0, "measured": "packed"},
        {"what": "qat 2", "bits": 2, "cross_entropy": 3.2, "kl": 0.25, "steps": 300, "tokens_per_second": 4e4,
         "measured": "fake quantized"},
    ]  # fmt: skip
    model = {"size": "small", "parameters": 16.2e6, "vocabulary": 4096, "tokens": 1000, "seconds": 9.0}
    result = {"machine": MACHINE, "model": model, "rows": rows, "missing": ["packed layers: why"]}
    result["bars"] = [bar("share of rtn's KL removed at 2 bits", 0.875, 0.8, ">=")]
    (tmp_path / "train_small-nvidia-h200-2026-11-29.json").write_text(json.dumps(result))
    toy = result | {"model": model | {"size": "tiny"}, "machine": MACHINE | {"date": "2026-11-30"}}
    (tmp_path / "train_small-tiny-nvidia-h200-2026-11-30.json").write_text(json.dumps(toy))
    said = readme_tables.section("train_small")
    assert said.count("**train_small**") == 1 and "NVIDIA H200" in said and "commit 012345678;" in said
    assert "| float | 3.0000 | 0.0000 | - | 100 | 50000 | float |" in said
    assert "| rtn 2 | 5.0000 | 2.0000 | - | - | - | packed |" in said
    assert "| qat 2 | 3.2000 | 0.2500 | 88% | 300 | 40000 | fake quantized |" in said
    assert "| share of rtn's KL removed at 2 bits | 0.875 | >= 0.8 | yes |" in said
    assert "16.2 M parameters" in said and "Missing: packed layers: why" in said and "busy" not in said


def test_the_readme_shows_where_smollm2_began_and_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.section("train_smollm2") == "No run of `tools/train_smollm2.py` is on file."
    rows = [{"what": w, "bits": 2, "kl": kl, "tokens": 999} for w, kl in (("start", 1.5), ("trained", 0.45))]
    data = {"sampled_tokens": 0, "tokens_per_second": 1000.0, "trains": "all"}
    result = {"machine": MACHINE, "rows": rows, "data": data, "seconds": 120.0, "missing": []}
    result["bars"] = [bar("KL, 2 bits in groups of 64", 0.45, 0.5, "<=")]
    path = tmp_path / "train_smollm2-nvidia-h200-2026-11-29.json"
    path.write_text(json.dumps(result))
    said = readme_tables.section("train_smollm2")
    assert "| 2 | 1.5000 | 0.4500 | all | 120000 | 2.0 | NVIDIA H200 |" in said
    assert "| KL, 2 bits in groups of 64 | 0.45 | <= 0.5 | yes |" in said
    killed = {key: result[key] for key in ("machine",)} | {
        "rows": rows[:1],
        "bars": [],
        "missing": ["stopped"],
    }
    path.write_text(json.dumps(killed))
    said = readme_tables.section("train_smollm2")
    assert "| 2 | 1.5000 | - | - | 0 | 0.0 | NVIDIA H200 |" in said and "Missing: stopped" in said
