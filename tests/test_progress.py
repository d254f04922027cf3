"""Progress of long work: lines where there is no terminal, a bar with rate and rest where there is."""

import re
import time

import mlx.core as mx
import pytest
from tiny_models import make_hf_model

import mlxq.progress
from mlxq.cli import main
from mlxq.evaluate import evaluate
from mlxq.progress import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test may set."""
    now = [100.0]
    monkeypatch.setattr(mlxq.progress, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_every_half_minute_with_rate_and_rest(clock, capsys):
    with progress("calibrating", 100_000_000) as shown:
        for second in range(71):
            clock[0] = 100.0 + second
            shown.advance(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "mlxq: calibrating: 31 %, 1.03 M weights/s, about 67 s left",
        "mlxq: calibrating: 61 %, 1.02 M weights/s, about 38 s left",
    ]


def test_short_work_and_work_of_unknown_size_say_nothing(clock, capsys):
    with progress("reading", unit="tokens", size=1) as shown:
        clock[0] = 200.0
        shown.advance(5)
        assert capsys.readouterr().err == ""
        shown.expect(50)
        shown.describe("measuring a")
        shown.advance(5)
    assert capsys.readouterr().err == "mlxq: measuring a: 20 %, 0.1 tokens/s, about 400 s left\n"


def test_on_a_terminal_there_is_a_bar_with_rate_and_rest(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with progress("reading", unit="tokens", size=1) as shown:
        shown.expect(10)
        shown.describe("measuring [b]")
        for _ in range(4):
            shown.advance(2)
            time.sleep(0.2)  # what is left is told twice a second
            shown.bar.refresh()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "measuring [b]" in said and "80%" in said and re.search(r"[1-9]\S* tokens/s 0:00:0\d", said), said


@pytest.fixture
def sources(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(200)))
    return make_hf_model("llama", tmp_path / "hf", "float32", seed=4), text


def test_convert_tells_while_it_calibrates_and_eval_while_it_measures(sources, tmp_path, monkeypatch, capsys):
    source, text = sources
    monkeypatch.setattr(mlxq.progress, "LINE_SECONDS", 0.0)
    out = str(tmp_path / "q")
    assert main(["convert", str(source), out, "--method", "gptq", "--calibration", str(text)]) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"^mlxq: calibrating: \d+ %, \S+ M weights/s, about \d+ s left$", said, re.M)) == 14
    assert "mlxq: converting: 100 %" in said
    mx.disable_compile()
    try:
        given = ["--text", str(text), "--windows", "2", "--length", "32"]
        assert main(["eval", out, "--against", str(source), *given]) == 0
    finally:
        mx.enable_compile()
    said = re.findall(r"^mlxq: measuring (\w+): (\d+) %, \S+ tokens/s, about", capsys.readouterr().err, re.M)
    assert said == [("hf", "25"), ("hf", "50"), ("q", "75"), ("q", "100")]


def test_evaluate_counts_every_token_that_it_announced(sources):
    source, text = sources
    shown = Progress("", 0)
    evaluate([source], texts={"a": [text.read_text()]}, windows=2, length=32, decode=False, shown=shown)
    assert shown.done == shown.total == 64 and shown.what == "measuring hf"
