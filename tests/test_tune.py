"""convert --method tune: what it writes is nearer to the float model than its start, and says so."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq.cli import main
from mlxq.convert import convert
from mlxq.tune import Plan, _bytes_to_train, _plan, convert_and_tune


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Without mx.compile, whose calls of the C++ compiler take seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def sources(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(700)))
    return make_hf_model("llama", tmp_path / "hf", "float32", seed=4), text


COMMON = {"bits": 2, "group_size": 32, "embedding_bits": 8, "progress": False}
TRAINED = COMMON | {"steps": 4, "length": 64, "learning_rate": 1e-5, "device": "cpu"}

KILLED = """
    import os, signal, sys
    sys.path.insert(0, TESTS)
    import mlx.core as mx
    mx.disable_compile()
    import test_tune, mlxq.tune
    test_tune.watch(setattr, [], "step 1", signal.SIGKILL)
    mlxq.tune.convert_and_tune(
        sys.argv[1], sys.argv[2], calibration=sys.argv[3], method="train", **test_tune.TRAINED
    )
"""


def watch(setattr, told: list[str], place: str = "", number: int = 0) -> None:
    """Note solves, the trainer of each run and the steps of the last; a signal comes at a place."""
    import mlxq.tune
    from mlxq.qat import training

    convert, run = mlxq.tune.convert, training.run

    def tell(what: str) -> None:
        told.append(what)
        if what == place and told.count(place) == 1:  # evaluations tell it again
            os.kill(os.getpid(), number)

    def converted(*args, **options):
        tell("solve")
        return convert(*args, **options)

    def ran(trainer, *args, on_step=None, **options):
        tell(type(trainer).__name__)
        if options.get("stop"):  # not a block's

            def on_step(outcome, done):
                tell(f"step {len(outcome.losses)}")

        return run(trainer, *args, on_step=on_step, **options)

    setattr(mlxq.tune, "convert", converted)
    setattr(training, "run", ran)
    if importlib.util.find_spec("torch"):
        import mlxq.train.blocks

        setattr(mlxq.train.blocks, "run", ran)


def contents(folder):
    """The weights and the losses."""
    training = json.loads((folder / "training.json").read_text())
    return (folder / "model.safetensors").read_bytes(), training["losses"], training["best"]


def packed(folder):
    return mx.load(str(folder / "model.safetensors"))


def test_training_moves_scales_and_biases_only_and_ends_nearer(sources, tmp_path):
    source, text = sources
    common = {"bits": 2, "group_size": 32, "embedding_bits": 8, "calibration": text, "progress": False}
    convert_and_tune(source, tmp_path / "auto", method="auto", minutes=0.001, **common)
    report = convert_and_tune(source, tmp_path / "tuned", steps=12, length=64, learning_rate=1e-5, **common)
    before, after = packed(tmp_path / "auto"), packed(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {"scales", "biases"}
    training = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert training["best"] < training["start"]
    for folder, words in (("tuned", "trained for 12 steps"), ("auto", "less than a minute is left")):
        assert words in (tmp_path / folder / "README.md").read_text()
    assert report.path == tmp_path / "tuned" and "KL" in report.notices[-1]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("auto", "tuned")]
    assert "Nothing else was measured" in cards[0] and "Nothing else was measured" not in cards[1]
    assert "Beside that KL nothing was measured" in cards[1] and cards[1].count("trained for 12 steps") == 1
    assert f"in {report.seconds:.0f} s" in cards[1] and cards[1].index("trained for") < cards[1].index(
        "| --- |"
    )
    name, errors = "model.layers.1.mlp.up_proj", []
    wanted = np.array(mx.load(str(source / "model.safetensors"))[f"{name}.weight"], np.float64)
    for weights in (before, after):
        w = mx.dequantize(*(weights[f"{name}.{part}"] for part in ("weight", "scales", "biases")), 32, 2)
        errors.append(np.linalg.norm(np.array(w, np.float64) - wanted) / np.linalg.norm(wanted))
    told = next(layer.error for layer in report.layers if layer.path == name.replace(".", "/"))
    assert abs(told - errors[1]) < 0.3 * abs(told - errors[0])  # of the trained scales, not of gptq's
    assert f"{report.groups()[1][5]:.4f}" in cards[1]
    whole, _ = mlx_lm.utils.load_model(source)
    _, tokenizer = mlx_lm.load(str(tmp_path / "auto"))
    tokens = mx.array(tokenizer.encode(" ".join(str(n * n) for n in range(800, 840))))[None]

    def log_probabilities(model):
        logits = np.array(model(tokens).astype(mx.float32), np.float64)[0]
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, kl = log_probabilities(whole), {}
    for name in ("auto", "tuned"):
        model, _ = mlx_lm.load(str(tmp_path / name))  # stock
        kl[name] = float((np.exp(p) * (p - log_probabilities(model))).sum(-1).mean())
    assert kl["tuned"] < kl["auto"]


def test_auto_leaves_wide_codes_untrained_from_the_command_line(sources, tmp_path, capsys):
    source, text = sources
    args = ["convert", str(source), str(tmp_path / "q"), "--bits", "8", "--minutes", "5"]
    assert main([*args, "--calibration", str(text)]) == 0
    assert "not tuned" in " ".join(capsys.readouterr().out.split())
    assert main([*args, "--method", "rtn"]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "q", "text.txt"]


@pytest.fixture(scope="module")
def source_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(700)))
    return make_hf_model("llama", folder / "hf", "float32", seed=4), text


def test_ctrl_c_while_training_says_so_and_the_same_command_goes_on(
    source_and_text, tmp_path, monkeypatch, capsys
):
    source, text = source_and_text
    command = ["convert", str(source), str(tmp_path / "q"), "--method", "tune", "--calibration", str(text)]
    command += ["--bits", "2", "--group-size", "32", "--embedding-bits", "8", "--device", "cpu"]
    told = []
    import mlxq.tune

    made = partial(convert_and_tune, **{name: TRAINED[name] for name in ("steps", "length", "learning_rate")})
    monkeypatch.setattr(mlxq.tune, "convert_and_tune", made)
    with monkeypatch.context() as patched:
        watch(patched.setattr, told, "step 2", signal.SIGINT)
        assert main(command) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlxq:")]
    said = [line for line in lines if " s left" not in line]  # on a slow machine there is progress
    assert len(said) == 1 and said[0].startswith("mlxq: interrupted; the same command goes on"), said
    assert told[0] == "solve" and told[-1] == "step 2"
    assert [path.name for path in tmp_path.iterdir()] == [".q.tune"]
    told.clear()
    watch(monkeypatch.setattr, told)
    assert main(command) == 0
    assert told[:2] == ["TorchTrainer", "step 3"] and told[-1] == "step 4", told
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    convert_and_tune(source, tmp_path / "whole", calibration=text, **TRAINED)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_a_kill_costs_no_solving_and_no_trained_block(source_and_text, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="blocks train with torch")
    source, text = source_and_text
    code = textwrap.dedent(KILLED).replace("TESTS", repr(os.path.dirname(__file__)))
    command = [sys.executable, "-c", code, *map(str, (source, tmp_path / "q", text))]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    work = tmp_path / ".q.tune"
    assert list(tmp_path.iterdir()) == [work]
    for file in ("blocks/1.pt", "blocks.json"):  # as if it had come sooner
        (work / file).unlink()
    told, common = [], TRAINED | {"calibration": text, "method": "train"}
    watch(monkeypatch.setattr, told)
    convert_and_tune(source, tmp_path / "q", **common)
    assert told.count("BlockTrainer") == 1 and "solve" not in told, told
    assert list(tmp_path.iterdir()) == [tmp_path / "q"]
    convert_and_tune(source, tmp_path / "whole", **common)
    assert told.count("BlockTrainer") == 3 and "solve" in told
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_auto_goes_by_the_bits_that_the_blocks_have(source_and_text, tmp_path):
    source, text = source_and_text

    def plan(device="cpu", **options) -> Plan:
        common = {"group_size": 32, "calibration": text, "dry_run": True, "progress": False}
        report = convert(source, tmp_path / "q", method="gptq", **common | options)
        return _plan(report, 0.0, 10.0, "auto", None, device, options)

    assert "not tuned" in plan(target_bpw=8.5).why_not
    assert "blocks have 8" in plan(rules=["model/layers/.*=bits:8"], bits=2).why_not
    assert plan(bits=8, rules=["model/layers/.*=bits:4"]).why_not is None
    torch = importlib.util.find_spec("torch") is not None
    assert plan("cuda", bits=2, embedding_bits=8).blocks == torch
    assert not plan("cuda", bits=4).blocks and plan("cuda", bits=4).why_not is None
    assert plan("cuda", target_bpw=3.2).blocks == torch


@pytest.mark.parametrize("method", ["tune", "train"])
def test_a_dry_run_counts_the_minutes_and_what_training_holds(method, source_and_text, tmp_path):
    pytest.importorskip("torch", reason="blocks train with torch")
    source, text = source_and_text
    common = {"bits": 4, "group_size": 32, "calibration": text, "dry_run": True, "progress": False}
    report = convert_and_tune(source, tmp_path / "q", method=method, minutes=7, **common)
    assert 7 * 60 <= report.planned.seconds < 7 * 60 + 5
    late = convert_and_tune(source, tmp_path / "q", method=method, minutes=1e-3, **common).planned
    assert late.seconds > 60  # LEAST_MINUTES
    weights = report.parameters
    packed = weights / 2 + 8 * weights / 32
    # tune: gradients twice, and float32 copies, gradients and moments, of float32 scales and biases alone
    expected = packed + 24 * 2 * weights / 32 if method == "tune" else 28 * weights
    assert expected < _bytes_to_train(report, Plan(None, method == "train", 1, "torch", "cpu")) < 2 * expected
    wide = convert_and_tune(source, tmp_path / "q", method="auto", **common | {"bits": 8})
    assert "not tuned" in wide.notices[-1] and wide.planned.seconds < 600
    assert list(tmp_path.iterdir()) == []
