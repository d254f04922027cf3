"""convert --method tune: what it writes is nearer to the float model than its start, and says so."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq.cli import main
from mlxq.tune import convert_and_tune


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
