"""`mlxq eval`: its numbers against float64 by hand, its report, its errors."""

import json
import re
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq.checkpoint.plain import dequantize
from mlxq.cli import main
from mlxq.convert import convert
from mlxq.evaluate import evaluate, evaluation_texts
from mlxq.ptq.text import read_text

TEXT = {"squares": [" ".join(str(n * n) for n in range(90))], "words": ["the ant in the inn, then " * 20]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny float model and of its 3-bit and 8-bit forms."""
    mx.disable_compile()  # whose calls of the C++ compiler take seconds
    folder = tmp_path_factory.mktemp("eval")
    source = make_hf_model("llama", folder / "float", "float32", seed=4)
    for bits in (3, 8):
        convert(source, folder / f"q{bits}", bits=bits, group_size=32, embedding_bits=8, progress=False)
    yield folder
    mx.enable_compile()


def by_hand(folder, window):
    """Log-probabilities in float64 from mlx-lm's own model in float32."""
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(window)[None]), np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_numbers_are_those_of_float64_by_hand(models):
    rows = evaluate([models / "q3"], models / "float", TEXT, windows=4, length=32, decode=False)
    _, tokenizer = mlx_lm.load(str(models / "q3"))
    reference, measured = rows
    sums = {}
    for domain, documents in TEXT.items():
        tokens = np.array(tokenizer.encode(documents[0]))
        kl, nll, agreed = [], [], []
        for start in (0, len(tokens) - 32):  # two windows a domain, at its ends
            window = tokens[start : start + 32]
            p, q = by_hand(models / "float", window), by_hand(models / "q3", window)
            kl += list((np.exp(p) * (p - q)).sum(-1))
            nll += list(-q[np.arange(31), window[1:]])
            agreed += list(p.argmax(-1) == q.argmax(-1))
        got = measured.domains[domain]
        assert got["tokens"] == 62
        # float16 log-probabilities of the float model: 2^-11 of |log p| <= 20 at each token
        np.testing.assert_allclose(got["kl"], np.mean(kl), rtol=0.01, atol=1e-4)
        np.testing.assert_allclose(got["kl_error"], np.std(kl) / np.sqrt(62), rtol=0.02)
        np.testing.assert_allclose(got["perplexity"], np.exp(np.mean(nll)), rtol=1e-3)
        np.testing.assert_allclose(got["top1"], np.mean(agreed), atol=1.01 / 62)
        sums[domain] = np.mean(kl)
    np.testing.assert_allclose(measured.total["kl"], np.mean(list(sums.values())), rtol=0.01)
    assert "kl" not in reference.total and reference.name == "float"
    assert measured.decode_tokens_per_s is None and measured.prefill_tokens_per_s > 0


def test_more_bits_are_nearer_and_the_float_model_is_nearest(models):
    folders = [models / "q3", models / "q8", models / "float"]
    rows = evaluate(folders, models / "float", TEXT, windows=2, length=32, decode=False)[1:]
    kl = [row.total["kl"] for row in rows]
    assert kl[0] > 10 * kl[1] > 0 and abs(kl[2]) < 1e-4
    assert rows[2].total["top1"] >= 0.97 and rows[0].bytes < rows[1].bytes < rows[2].bytes


def test_the_command_prints_a_table_and_writes_reports_and_the_card(models, capsys, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(TEXT["squares"][0])
    args = ["eval", str(models / "q8"), "--against", str(models / "float"), "--compare", str(models / "q3")]
    domain = "digits_of_squares_in_a_long_row"  # four of them would not fit a terminal beside the rest
    args += ["--text", f"{domain}={text}", "--windows", "1", "--length", "24", "--card"]
    args += ["--report", str(tmp_path / "r.html"), "--report", str(tmp_path / "r.json")]
    for _ in range(2):  # the second time the card's numbers are replaced
        assert main(args) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in rows] == ["float", "q8", "q3"]
    assert "…" not in printed and re.search(rf"KL in +q8 +q3 *\n[^\n]*\n *{domain} +\d", printed)
    for row in rows[1:]:
        assert f"{row['total']['kl']:.4f}" in printed and f"{row['domains'][domain]['kl']:.3f}" in printed
    page = (tmp_path / "r.html").read_text()
    assert page.count("<circle") == 2 and "q3" in page and page.count("<tr>") == 4
    card = (models / "q8" / "README.md").read_text()
    assert card.count("## Measured") == 1 and f"{rows[1]['total']['kl']:.4f}" in card


def test_a_gguf_and_other_quantized_sources_are_measured_as_the_floats_they_stand_for(models, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    from foreign_models import quantized_model
    from test_gguf import write_gguf
    from test_sources_gptq import gptq_layer, settings

    file = write_gguf(models / "float", tmp_path / "m.gguf", "llama", gguf.GGMLQuantizationType.Q4_0)
    gptq, _ = quantized_model(tmp_path / "gptq", settings(4, 64, 1, False), gptq_layer(4, 64, 1, False))
    options = {"texts": TEXT, "windows": 2, "length": 32, "decode": False}
    for source in (file, gptq):
        dequantize(source, tmp_path / "floats", dtype="float32", overwrite=True)
        wanted = evaluate([models / "q3", models / "q8"], tmp_path / "floats", **options)
        found = evaluate([models / "q3", models / "q8"], source, **options)
        assert [row.name for row in found] == [source.name, "q3", "q8"]
        for a, b in zip(found, wanted, strict=True):
            assert a.total == b.total and a.domains == b.domains
        assert found[0].bytes < wanted[0].bytes / 4  # its own size, not that of the floats
        (itself,) = evaluate([source], source, **options)[1:]
        assert abs(itself.total["kl"]) < 1e-4 and itself.total["top1"] >= 0.97


def test_models_of_the_same_name_are_told_apart(models, tmp_path):
    twin = tmp_path / "q8"
    shutil.copytree(models / "q3", twin)
    options = {"texts": TEXT, "windows": 2, "length": 24, "decode": False}
    rows = evaluate([models / "q8", twin, models / "q3"], models / "float", **options)
    assert [row.name for row in rows] == ["float", str(models / "q8"), str(twin), "q3"]
    assert rows[2].total == rows[3].total != rows[1].total
    card = tmp_path / "card" / "float"  # the float model's own name
    shutil.copytree(models / "q3", card)
    args = ["eval", str(card), "--against", str(models / "float"), "--compare", str(models / "q8"), "--card"]
    text = tmp_path / "a.txt"
    text.write_text(TEXT["squares"][0])
    assert main([*args, "--text", str(text), "--windows", "1", "--length", "24"]) == 0
    alone = evaluate([models / "q3"], models / "float", {"a": [text.read_text()]}, windows=1, length=24)[1]
    assert f"KL divergence from it {alone.total['kl']:.4f}" in (card / "README.md").read_text()


def test_bad_input_gets_one_line(models, capsys, tmp_path):
    (tmp_path / "text.gguf").write_text("this is no GGUF file at all, but text")
    for args, words in (
        ([str(tmp_path / "none")], "none: no such file or folder, and not a hub id"),
        ([str(models / "q3"), "--against", "some-owner/some-model"], "the Hugging Face hub"),
        ([str(models / "q3"), "--against", str(tmp_path)], "is not a model folder: it has no config.json"),
        ([str(models / "q3"), "--against", str(tmp_path / "text.gguf")], "text.gguf is not a GGUF file"),
        ([str(tmp_path / "text.gguf"), "--card"], "--card writes into a model's folder"),
        ([str(models / "q3"), "--report", "x.pdf"], "a report is .html, .png or .json, not x.pdf"),
        ([str(models / "q3"), "--windows", "0"], "at least one window"),
        ([str(models / "q3"), "--text", str(tmp_path / "gone.txt")], "No such file"),
    ):
        assert main(["eval", *args]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_text_to_measure_on_is_not_the_text_to_quantize_by():
    measured = "\n".join(body for bodies in evaluation_texts().values() for body in bodies)
    calibration = "\n".join(read_text(None))
    lines = {line.strip() for line in calibration.split("\n") if len(line.strip()) > 40}
    assert len(lines) > 100 and not lines & {line.strip() for line in measured.split("\n")}
    assert set(evaluation_texts()) == {"prose", "reference", "code"}
