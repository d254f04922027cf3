"""tools/eval_quality.py: commands that exist, bars that compare like with like, cores that come back."""

import argparse
import json
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import make_hf_model

from mlxq import cli
from mlxq.convert import convert
from mlxq.evaluate import evaluate

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import eval_quality  # noqa: E402


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose teacher is a name."""
    monkeypatch.setattr(eval_quality, "permuted_teacher", lambda folder, seed: folder)
    text = tmp_path / "text.txt"
    text.write_text("text")
    settings = argparse.Namespace(
        calibration=[text], seed=1, text=[], cores=2, limit=None, blas=None, have=[]
    )
    return eval_quality.Run(tmp_path, settings)


def contenders(run):
    return eval_quality.contenders(run.calibration, peers=True, minutes=2.0, gpu=True)


def test_every_command_is_one_that_there_is(run, monkeypatch):
    found = contenders(run)
    monkeypatch.setattr(
        "mlxq.checkpoint.summary.inspect", lambda folder: argparse.Namespace(bits_per_weight=5.3)
    )
    for name, one in found.items():
        words = run.command(name, one)
        assert words[0] == sys.executable
        if words[1] == "-m":
            assert words[2] == "mlxq"
            assert cli._parser().parse_args(words[3:]).dst == str(run.folder(name))
        else:
            assert Path(words[1]).is_file() and words[4] == str(run.folder(name))
        after = one.get("after")
        assert after is None or list(found).index(after) < list(found).index(name)


def test_a_ratio_is_void_where_sizes_differ():
    rows = {
        "mlxq 4": {"kl": 0.1, "bytes": 1000, "perplexity": 21.0},
        "rtn 4": {"kl": 0.5, "bytes": 1009},
        "mlx_lm.gptq 4": {"kl": 0.4, "bytes": 1011},
        "teacher": {"perplexity": 20.0},
    }
    bars = {bar["what"]: bar["measured"] for bar in eval_quality.bars_of(rows, 10.0)}
    assert bars["4 bits, KL / rounding"] == pytest.approx(0.2)
    assert bars["4 bits, KL / mlx_lm.gptq"] is None
    assert bars["4 bits, perplexity / teacher's"] == pytest.approx(1.05)


def test_the_peer_is_the_best_of_its_learning_rates_and_all_must_be_there():
    rows = {"mlxq tune 2": {"kl": 0.5, "bytes": 1000}, "mlx_lm.dwq 2": {"kl": 7.0, "bytes": 1000}}

    def measured():
        bars = {bar["what"]: bar["measured"] for bar in eval_quality.bars_of(rows, 10.0)}
        return bars["2 bits, KL / mlx_lm.dwq"]

    assert measured() is None
    rows[f"mlx_lm.dwq {eval_quality.FASTER} 2"] = {"kl": 2.0, "bytes": 1000}
    assert measured() == pytest.approx(0.25)


def test_cores_belong_to_one_contender_at_a_time(run):
    assert run.cores <= 2
    taken = run.take(8)  # more than there are: all of them
    assert len(taken) == run.cores and not run.free
    waiting = threading.Thread(target=lambda: run.give_back(run.take(1)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    run.give_back(taken)
    waiting.join(5)
    assert not waiting.is_alive() and sorted(run.free) == sorted(taken)


def test_what_fails_or_takes_too_long_is_missing_with_its_last_line(run, monkeypatch):
    commands = {
        "fails": [sys.executable, "-c", "print('first'); raise SystemExit('the reason')"],
        "slow": [sys.executable, "-c", "import time; time.sleep(60)"],
    }
    monkeypatch.setattr(run, "command", lambda name, one: commands[name])
    monkeypatch.setattr(run, "score", lambda folder, cores, free=True: run.give_back(cores) or {})
    run.args.limit = eval_quality.SCORING + 1.5
    run.all({name: {"method": "rtn", "cores": 1} for name in commands})
    assert "fails: the reason" in run.missing
    assert any(line.startswith("slow: not ready after") for line in run.missing)
    assert sorted(run.rows) == ["teacher"] and len(run.free) == run.cores


def test_scores_are_those_of_mlxq_eval(tmp_path):
    text = tmp_path / "squares.txt"
    text.write_text(" ".join(str(n * n) for n in range(3000)))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([f"squares={text}"]))
    teacher = str(make_hf_model("llama", tmp_path / "float", "float32", seed=4))
    convert(teacher, tmp_path / "q3", bits=3, group_size=32, progress=False)
    wanted = evaluate([tmp_path / "q3"], teacher, {"squares": [text.read_text()]}, windows=2, decode=False)
    for model, row in zip((teacher, str(tmp_path / "q3")), wanted, strict=True):
        eval_quality.score(model, teacher, str(tmp_path), str(texts), "2", str(tmp_path / "out"))
        got = json.loads((tmp_path / "out").read_text())
        assert got["bytes"] == row.bytes
        for name in ("perplexity", "tokens", *(["kl", "top1"] if model != teacher else [])):
            assert got[name] == pytest.approx(row.total[name], rel=1e-6)


@pytest.fixture
def llama_teacher(tmp_path, monkeypatch):
    """A function that makes the permuted teacher from a tiny Llama, and the folder of that Llama."""
    plain = make_hf_model("llama", tmp_path / "plain", "bfloat16")
    monkeypatch.setattr("mlxq.checkpoint.embedded.embedded_gguf", lambda: plain)
    return lambda: eval_quality.permuted_teacher(tmp_path / "cache" / "teacher", 3), plain


def test_a_permuted_teacher_is_the_same_function_of_other_weights(llama_teacher):
    made = llama_teacher[0]()
    ids, logits, weights = mx.array([[5, 9, 300, 17, 2, 80]]), [], []
    for folder in (llama_teacher[1], made):
        model, _ = mlx_lm.load(str(folder))
        model.set_dtype(mx.float32)
        logits.append(np.array(model(ids)))
        weights.append(dict(tree_flatten(model.parameters())))
    # the same sums in another order
    assert np.abs(logits[1] - logits[0]).max() < 1e-4 * np.abs(logits[0]).max()
    same = [name for name in weights[0] if mx.array_equal(weights[0][name], weights[1][name])]
    assert weights[0].keys() == weights[1].keys() and same == []


def test_a_permuted_teacher_that_was_interrupted_is_made_anew(llama_teacher, monkeypatch):
    make, plain = llama_teacher

    def killed(folder, seed):
        assert (folder / "config.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(eval_quality, "permute_channels", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (plain, make()))
    assert not mx.array_equal(before["model.norm.weight"], after["model.norm.weight"])
    assert [path.name for path in make().parent.iterdir()] == ["teacher"]


def test_what_was_made_elsewhere_is_scored_and_not_made(run, tmp_path, monkeypatch):
    def score(folder, cores, free=True):
        if free:
            run.give_back(cores)
        return {"kl": 0.5, "bytes": 7, "from": folder}

    run.have = {"mlxq qat 2": tmp_path / "there"}
    chosen = eval_quality.contenders(run.calibration, peers=False, minutes=2.0, gpu=False, have=run.have)
    monkeypatch.setattr(run, "score", score)
    monkeypatch.setattr(run, "made", lambda *a: pytest.fail("it was made again"))
    run.all({"mlxq qat 2": chosen["mlxq qat 2"]})
    row = run.rows["mlxq qat 2"]
    assert (row["from"], row["seconds"], row["peak_mb"]) == (tmp_path / "there", None, None)
    assert run.missing == [] and sorted(run.free) == sorted(set(run.free))
