"""Calibration text sampled from the model itself: its template, its seed, its file."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq import sampled
from mlxq.cli import main
from mlxq.load import load
from mlxq.ptq.text import read_text


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Folder of a tiny float model; the cache lies beside it."""
    mx.disable_compile()  # whose calls of the C++ compiler take seconds
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sampled, "PROMPTS", ("Name three colours.", "What is a prime?"))
    yield make_hf_model("llama", tmp_path / "float", "float32", seed=4)
    mx.enable_compile()


def test_answers_stand_in_the_models_own_template_and_follow_from_the_seed(model):
    first = read_text(sampled.sampled_text(model, tokens=40))
    _, tokenizer = load_wide(model)
    assert len(first) == 2
    for prompt, document in zip(sampled.PROMPTS, first, strict=True):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        assert document.startswith(asked) and len(document) > len(asked)
        answer = tokenizer.encode(document.removeprefix(asked), add_special_tokens=False)
        assert 1 <= len(answer) <= 3 * 20  # 20 tokens each, which may be spelled with others
    assert first[0].split("?")[-1] != first[1].split("?")[-1]
    (file,) = (model.parent / "cache").glob("sampled-*.jsonl")
    file.unlink()
    assert read_text(sampled.sampled_text(model, tokens=40)) == first
    assert read_text(sampled.sampled_text(model, tokens=40, seed=1)) != first
    assert not [path for path in (model.parent / "cache").iterdir() if path.is_dir()]


def load_wide(folder):
    import mlx_lm

    return mlx_lm.load(str(folder))


def test_what_is_sampled_is_likely_under_the_model(model):
    """Of a model that says one token with certainty, the answer is that token."""
    wide, tokenizer = load(sampled_model(model))
    token = tokenizer.encode("a", add_special_tokens=False)[0]

    class Certain:
        layers = wide.layers

        def __call__(self, x, cache=None, **options):
            logits = wide(x, cache=cache, **options)
            return mx.where(mx.arange(logits.shape[-1]) == token, 100.0, mx.zeros_like(logits))

    documents = sampled.sample(Certain(), tokenizer, tokens=12)
    assert all(document.endswith("a" * 6) for document in documents)


def sampled_model(folder):
    from mlxq.convert import convert

    convert(folder, folder.parent / "wide", bits=8, group_size=32, progress=False)
    return folder.parent / "wide"


def test_convert_takes_it_and_samples_once(model, monkeypatch, capsys):
    monkeypatch.setattr(sampled, "TOKENS", 60)
    monkeypatch.setattr(
        sampled.sampled_text, "__kwdefaults__", sampled.sampled_text.__kwdefaults__ | {"tokens": 60}
    )
    command = ["convert", str(model), "--calibration", "model", "--bits", "3", "--group-size", "32"]
    assert main([*command, str(model.parent / "a")]) == 0
    (file,) = (model.parent / "cache").glob("sampled-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"text"}, {"text"}]
    monkeypatch.setattr(sampled, "sample", None)  # a second time would raise
    assert main([*command, str(model.parent / "b")]) == 0
    assert "sampled earlier" in capsys.readouterr().err
    weights = [mx.load(str(model.parent / name / "model.safetensors")) for name in ("a", "b")]
    assert all(np.array_equal(weights[0][k].view(mx.uint8), weights[1][k].view(mx.uint8)) for k in weights[0])
    assert main([*command, str(model.parent / "c"), "--method", "rtn"]) == 0
    other = mx.load(str(model.parent / "c" / "model.safetensors"))
    assert any(not mx.array_equal(weights[0][k], other[k]) for k in other)  # the text did its work
    assert "sampled-" in (model.parent / "a" / "README.md").read_text()
