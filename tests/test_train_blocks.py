"""convert --method train: blocks end nearer to the float model's, as stock transformers computes them."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

from mlxq.cli import main
from mlxq.convert import convert
from mlxq.train import Settings, data
from mlxq.tune import convert_and_tune

torch = pytest.importorskip("torch", reason="needs the package torch")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

from mlxq.train.blocks import train_blocks  # noqa: E402

LENGTH = 48


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(float folder, text file, its rounded form at 2 bits with one layer at 4)."""
    folder = tmp_path_factory.mktemp("blocks")
    text = folder / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(700)))
    float_folder = make_hf_model("llama", folder / "hf", "float32", seed=4)
    rules = ["model/layers/0/mlp/up_proj=bits:4,group_size:64"]
    convert(
        float_folder, folder / "w2", bits=2, group_size=32, embedding_bits=8,
        rules=rules, progress=False,
    )  # fmt: skip
    return float_folder, text, folder / "w2"


def settings(sources, **changes):
    source, text, start = sources
    basis = {"start": str(start), "qat": True, "data": (str(text),), "length": LENGTH, "batch": 2,
             "steps": 30, "learning_rate": 3e-3, "evaluate": 8}  # fmt: skip
    return Settings(str(source), **(basis | changes))


def restored(folder: Path, source: Path):
    """transformers' own float model with the values of a quantized folder, unpacked by mx.dequantize."""
    stored = mx.load(str(folder / "model.safetensors"))
    block = json.loads((folder / "config.json").read_text())["quantization"]
    values = {}
    for name, array in stored.items():
        path, _, part = name.rpartition(".")
        if f"{path}.scales" not in stored:
            values[name] = array
        elif part == "weight":
            own = block.get(path, block)
            scales, biases = stored[f"{path}.scales"], stored[f"{path}.biases"]
            values[name] = mx.dequantize(array, scales, biases, own["group_size"], own["bits"])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = {name: torch.tensor(np.array(value.astype(mx.float32))) for name, value in values.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def codes(stored, path: str, bits: int) -> np.ndarray:
    """A layer's codes, counted from the low end of each group's range, where scales are positive."""
    scales = stored[f"{path}.scales"]
    ones, group = mx.ones(scales.shape), stored[f"{path}.weight"].shape[-1] * 32 // bits // scales.shape[-1]
    raw = np.array(mx.dequantize(stored[f"{path}.weight"], ones, 0 * ones, group, bits))
    return np.where(np.repeat(np.array(scales) < 0, group, -1), 2**bits - 1 - raw, raw)


def after_blocks(model, tokens) -> list[np.ndarray]:
    """Each block's output, float64."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    return [state.numpy().astype(np.float64) for state in seen]


def distances(model, whole, tokens) -> list[float]:
    """Of each block: mean over tokens after the first of |given - wanted|^2 / |wanted|^2."""
    pairs = zip(after_blocks(model, tokens), after_blocks(whole, tokens), strict=True)
    return [float((((a - b) ** 2).sum(-1) / (b**2).sum(-1))[:, 1:].mean()) for a, b in pairs]


def held_rows(given, source):
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return np.stack([tokens for tokens, _ in data.rows(given, tokenizer)[1]])


def test_each_block_ends_nearer_to_the_float_block_and_keeps_its_formats(sources, tmp_path):
    source, _, start = sources
    given = settings(sources)
    found = train_blocks(given, tmp_path / "out")
    tokens = held_rows(given, source)
    whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    begun, ended = (distances(restored(f, source), whole, tokens) for f in (start, tmp_path / "out"))
    assert found.blocks[0][0] == pytest.approx(begun[0], rel=1e-3)
    assert [best for _, best in found.blocks] == pytest.approx(ended, rel=1e-3)
    assert all(after < before for after, before in zip(ended, begun, strict=True))
    assert found.best < found.start
    before, after = (mx.load(str(f / "model.safetensors")) for f in (start, tmp_path / "out"))
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {
        n: (a.shape, a.dtype) for n, a in after.items()
    }
    values = [dict(restored(f, source).named_parameters()) for f in (start, tmp_path / "out")]
    for name in (n for n in values[0] if "layers" not in n):
        assert torch.allclose(values[0][name], values[1][name], rtol=1e-6, atol=1e-7), name
    path = "model.layers.1.mlp.down_proj"
    assert not np.array_equal(codes(before, path, 2), codes(after, path, 2))  # not scales alone
    mlx_lm.load(str(tmp_path / "out"))  # stock


def test_a_block_that_training_makes_worse_stays_as_it_was(sources, tmp_path):
    found = train_blocks(settings(sources, learning_rate=10.0, steps=3), tmp_path / "out")
    assert all(best == start for start, best in found.blocks)
    assert found.best == found.start and not (tmp_path / "out").exists()


def test_train_ends_nearer_than_gptq_and_says_what_it_did(sources, tmp_path, capsys):
    source, text, _ = sources
    common = {"bits": 2, "group_size": 32, "embedding_bits": 8, "calibration": text, "progress": False}
    report = convert_and_tune(
        source,
        tmp_path / "q",
        method="train",
        steps=12,
        length=LENGTH,
        learning_rate=1e-5,
        device="cpu",
        **common,
    )
    convert(source, tmp_path / "gptq", method="gptq", **common)
    card = (tmp_path / "q" / "README.md").read_text()
    assert "blocks trained" in card and "scales and biases trained for 12 steps" in card
    assert any("blocks trained" in notice for notice in report.notices)
    whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.tensor(held_rows(settings(sources), source))

    def kl(folder):
        with torch.no_grad():
            p = whole(tokens).logits.double().log_softmax(-1)
            q = restored(folder, source)(tokens).logits.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(tmp_path / "q") < kl(tmp_path / "gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gptq", "q"]


def test_memory_that_training_cannot_keep_to_is_refused(sources, tmp_path, capsys):
    source, _, _ = sources
    args = ["convert", str(source), str(tmp_path / "q"), "--max-memory", "2GB", "--method"]
    for method in ("train", "tune"):
        assert main([*args, method]) == 2
        assert f"--max-memory does not bound --method {method}" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "q"), "--method", "gptq", "--device", "cpu"]) == 2
    assert "--device are for --method auto, tune and train" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
