"""AWQ: folding leaves the float function alone, is found by trial, and lowers the error of the outputs."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from test_gptq import WINDOWS, inputs, tiny
from tiny_models import ARCHITECTURES, make_hf_model

from mlxq import format
from mlxq.cli import main
from mlxq.format import Format
from mlxq.ptq.awq import Change, Fold, channel_scales, fold_block, scale_error
from mlxq.ptq.host import host_products
from mlxq.ptq.stream import Stream

# Layers whose input comes from a norm, or from one linear layer times something, in each architecture.
SCALED = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    "gemma3_text": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj"},
    "phi3": {"qkv_proj", "gate_up_proj"},
    "olmo2": {"down_proj"},
}


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Without mx.compile, whose calls of the C++ compiler take seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folding_leaves_every_block_s_output_as_it_was(arch, tmp_path):
    model, read, _ = tiny(arch, tmp_path)
    stream = Stream(model, read, WINDOWS, drift=False)
    layers = stream.enter(0)
    wanted = dict.fromkeys(layers, (Format(2, 32), "float32"))
    with host_products():
        before = [np.array(state) for state in stream.advance(0, stream.states)]
        originals = {name: np.array(stream.parameter(name)) for name in stream.names[0]}
        changes, skipped = fold_block(stream, 0, layers, wanted, "bfloat16")
        after = [np.array(state) for state in stream.advance(0, stream.states)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())
    for name, original in originals.items():
        now = changes[name].apply(original) if name in changes else original
        np.testing.assert_allclose(np.array(stream.parameter(name)), now, rtol=1e-6, atol=1e-7)
        if name in changes and original.ndim == 1 and not name.endswith("bias"):
            # What is stored is what the matrices made up for; of 1 + weight float32 keeps 2^-23.
            np.testing.assert_allclose(format.store(now, "bfloat16"), now, atol=3e-7)
    if arch in SCALED:
        scaled = {path.rpartition(".")[2] for path in layers if path not in skipped}
        assert scaled == SCALED[arch]


def test_the_best_ratio_lowers_the_error_of_the_outputs_in_float64():
    x = inputs(512, 128) * np.exp(1.5 * np.random.default_rng(2).standard_normal(128))  # outlier channels
    w = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    hessian, fmt = (x.T @ x / len(x)).astype(np.float32), Format(3, 64)
    s, share = channel_scales([w], hessian, np.abs(x).mean(0).astype(np.float32), [fmt], ["float32"])
    errors = []
    for factor in (np.ones(128, np.float32), s):
        q = format.dequantize(format.quantize(w * factor, fmt)) / factor.astype(np.float64)
        errors.append(((x @ (w - q).T) ** 2).sum(1).mean())
    assert errors[1] < 0.9 * errors[0]
    np.testing.assert_allclose(errors[1] / errors[0], share, rtol=1e-3)
    ones = np.ones(128, np.float32)
    np.testing.assert_allclose(scale_error([w], hessian, ones, [fmt], ["float32"]), errors[0], rtol=1e-3)


def test_changes_of_rows_and_columns_come_in_turn_and_in_slabs():
    rng = np.random.default_rng(0)
    value, columns, rows = rng.random((6, 4)), rng.random(4), rng.random(6)
    both = Change(columns=columns).then(Change(rows=rows))
    want = value * columns * rows[:, None]
    np.testing.assert_allclose(both.apply(value), want, rtol=1e-6)
    np.testing.assert_allclose(both.cut(2, 5).apply(value[2:5]), want[2:5], rtol=1e-6)
    s = rng.random(4) + 0.5
    np.testing.assert_allclose((1 + Fold("a", "offset").apply(columns, s)) * s, 1 + columns, rtol=1e-6)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_convert_by_awq_is_nearer_than_rounding_and_loads_in_stock_mlx_lm(method, tmp_path):
    source = make_hf_model("llama", tmp_path / "hf", "float32", seed=4)
    weights, rng = mx.load(str(source / "model.safetensors")), np.random.default_rng(3)
    for name in weights:
        if "layernorm" in name:  # outlier channels, as trained models have
            weights[name] *= mx.array(np.exp(1.2 * rng.standard_normal(128)).astype(np.float32))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(500)))
    base = [str(source), "--bits", "3", "--group-size", "32", "--embedding-bits", "8", "--dtype", "bfloat16"]
    assert main(["convert", base[0], str(tmp_path / "rtn"), *base[1:]]) == 0
    calibrated = ["--method", method, "--calibration", str(text)]
    assert main(["convert", base[0], str(tmp_path / "awq"), *base[1:], *calibrated]) == 0
    whole, _ = mlx_lm.utils.load_model(source)
    _, tokenizer = mlx_lm.load(str(tmp_path / "rtn"))
    tokens = mx.array(tokenizer.encode(" ".join(str(n**3) for n in range(40, 60))))[None]
    want, errors = np.array(whole(tokens)), {}
    for name in ("rtn", "awq"):
        model, _ = mlx_lm.load(str(tmp_path / name))  # stock
        model.set_dtype(mx.float32)
        errors[name] = np.linalg.norm(np.array(model(tokens)) - want)
    assert errors["awq"] < errors["rtn"] * (1 if method == "awq" else 0.8)
    card = (tmp_path / "awq" / "README.md").read_text()
    assert "AWQ" in card and "not scaled" in card  # o_proj: two query heads share a value head
