"""Static ranges: running sums, what is refused, and scales that survive save and load."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from tiny_models import VOCAB, make_hf_model

import mlxq
from mlxq import cli, format
from mlxq.checkpoint import q8 as files
from mlxq.convert import convert, inspect
from mlxq.nn.q8.mlx import Q8Linear
from mlxq.ptq import Statistics, calibrate, plan, quantize_model, quantize_params
from mlxq.ptq import functional as F
from mlxq.ptq.qarray import dequantize, quantize_with, scale_and_zero_point
from mlxq.rules import QuantizationRule

torch = pytest.importorskip("torch", reason="needs the package torch")
STATIC = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
NAME = "layers/0/linear0_lhs"


def linear(kind, K=64, N=32):
    if kind == "mlx":
        mx.random.seed(0)
        return nn.Sequential(nn.Linear(K, N)), mx.array
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(K, N)])
    model.forward = lambda x: model.layers[0](x)
    return model, torch.from_numpy


def batches(count=3, shape=(2, 5, 64), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) * (n + 1) for n in range(count)]


@pytest.mark.parametrize("kind", ["mlx", "torch"])
def test_statistics_are_sums_of_each_batchs_range_averaged_over_the_batch_axes(kind):
    model, to = linear(kind)
    data = batches()
    stats = calibrate(model, plan(model, [STATIC]), [to(x) for x in data])
    want = sum(np.abs(x).max((1, 2)).mean() for x in data) / 3  # axis 0 is the batch
    assert stats.counts == {NAME: 3}
    np.testing.assert_allclose(stats.average(NAME)["absmax"], [want], rtol=1e-6)
    tokens = QuantizationRule(**{"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True},
                              act_batch_axes=(0, 1), act_calibration_method="minmax")  # fmt: skip
    stats = calibrate(model, plan(model, [tokens]), [to(x) for x in data])
    for name, reduce in (("min", np.min), ("max", np.max)):
        want = sum(reduce(x, -1).mean() for x in data) / 3
        np.testing.assert_allclose(stats.average(NAME)[name], [want], rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlx", "torch"])
def test_a_static_layer_rounds_by_the_average_range(kind):
    model, to = linear(kind)
    data, rule = batches(), STATIC
    made = plan(model, [rule])
    stats = calibrate(model, made, [to(x) for x in data])
    weight, bias = (np.array(a.detach() if kind == "torch" else a) for a in (
        model.layers[0].weight, model.layers[0].bias))  # fmt: skip
    scale, _ = scale_and_zero_point(stats.average(NAME), "int8")
    x = data[2]
    codes = quantize_with(x, "int8", scale.reshape(1, 1, 1))
    w = F.store_weight(weight, made["layers/0"])

    want = dequantize(codes).astype(np.float64) @ format.dequantize(w).astype(np.float64).T + bias
    quantize_model(model, made, stats)
    got = model(to(x))
    got = np.array(got.detach() if kind == "torch" else got)
    assert codes.qvalue.max() == 127 and codes.qvalue.min() == -128  # the largest batch exceeds the mean
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["mlx", "torch"])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64)])
def test_a_range_is_of_whole_rows_whatever_axes_are_batch_axes(kind, shape):
    """The summed axis among them changes nothing, as in qwix; an axis that is not there is an error."""
    model, to = linear(kind)
    x = batches(1, shape)[0]
    rule = QuantizationRule(**STATIC.settings() | {"act_batch_axes": tuple(range(len(shape)))})
    stats = calibrate(model, plan(model, [rule]), [to(x)])
    np.testing.assert_allclose(stats.average(NAME)["absmax"], [np.abs(x).max(-1).mean()], rtol=1e-6)
    rule = QuantizationRule(**STATIC.settings() | {"act_batch_axes": (len(shape),)})
    said = f"layers/0: act_batch_axes names axis {len(shape)}, but the input has {len(shape)} axes"
    with pytest.raises(ValueError, match=said):
        calibrate(model, plan(model, [rule]), [to(x)])


def test_ids_of_an_embedding_are_no_inputs_to_quantize():
    model = Ids()
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    made = plan(model, [rule])
    stats = calibrate(model, made, TEXT, tokenizer=encode, windows=2, length=8)
    assert set(stats.counts) == {"up/linear0_lhs"}
    assert (made["table"].stored, made["up"].stored) == ("8-bit/64", "8-bit/64 + int8 static inputs")


def test_asymmetric_and_tiled_static_ranges_reach_the_layer():
    model, to = linear("mlx")
    data = [np.abs(x) + 1 for x in batches()]
    for extra in ({"act_calibration_method": "minmax"}, {"tile_size": 32}):
        model, to = linear("mlx")
        rule = QuantizationRule(**(STATIC.settings() | {"module_path": ".*"} | extra))
        made = plan(model, [rule])
        stats = calibrate(model, made, [to(x) for x in data])
        want = np.array(model(to(data[0])))
        quantize_model(model, made, stats)
        layer = model.layers[0]
        if "tile_size" in extra:  # of the weight's groups: products of integers
            assert layer["scale_a"].shape == (2,) and layer.settings.activation == "static_tile"
        else:
            assert layer["act_scale"].shape == (1,) and "act_zero_point" in layer
        error = np.linalg.norm(np.array(model(to(data[0]))) - want) / np.linalg.norm(want)
        assert error < 0.02


def test_the_model_is_itself_after_calibration_and_nothing_was_quantized():
    model, to = linear("mlx")
    layer = model.layers[0]
    calibrate(model, plan(model, [STATIC]), [to(batches()[0])])
    assert model.layers[0] is layer
    with pytest.raises(RuntimeError, match="an error of the data"):
        calibrate(model, plan(model, [STATIC]), _failing())
    assert model.layers[0] is layer


def _failing():
    yield mx.zeros((1, 64)) + 1
    raise RuntimeError("an error of the data")


def test_what_has_no_range_is_refused():
    model, to = linear("mlx")
    made = plan(model, [STATIC])
    with pytest.raises(ValueError, match="there are no inputs"):
        calibrate(model, made, [])
    with pytest.raises(ValueError, match=f"{NAME} has seen no input"):
        calibrate(model, made, [to(batches()[0])], run=lambda x: x)
    with pytest.raises(ValueError, match="no rule has act_static_scale"):
        calibrate(model, plan(model, [".*=weight_qtype:int8"]), [to(batches()[0])])
    with pytest.raises(
        ValueError, match="layers/0: the rule wants a static scale and there are no statistics"
    ):
        quantize_model(model, made)
    empty = Statistics()
    empty.register(NAME)
    with pytest.raises(ValueError, match="has seen no input"):
        quantize_params({"layers.0.weight": model.layers[0].weight}, made, empty)
    with pytest.raises(ValueError, match="absmax of the inputs is NaN"):
        calibrate(model, made, [mx.full((1, 64), float("nan"))])


def test_ranges_that_change_their_shape_are_refused():
    stats = Statistics()
    stats.update("a", {"absmax": np.ones(2)})
    with pytest.raises(ValueError, match="do not add"):
        stats.update("a", {"absmax": np.ones(3)})
    with pytest.raises(ValueError, match="do not add"):
        stats.update("a", {"min": np.ones(2), "max": np.ones(2)})
    assert stats.counts == {"a": 1}


def test_sums_stay_float32_where_16_bits_would_stop_growing():
    stats = Statistics()
    for _ in range(3000):
        stats.update("a", {"absmax": mx.array([1.0], mx.bfloat16).astype(mx.float32)})
    assert stats.average("a")["absmax"].item() == 1.0 and stats.sums["a"]["absmax"].dtype == np.float32


def test_statistics_go_on_and_survive_the_disk(tmp_path):
    model, to = linear("mlx")
    made, data = plan(model, [STATIC]), [mx.array(x) for x in batches(4)]
    whole = calibrate(model, made, data)
    part = calibrate(model, made, data[:2])
    part.save(tmp_path / "stats.npz")
    both = calibrate(model, made, data[2:], stats=Statistics.load(tmp_path / "stats.npz"))
    assert both.counts == whole.counts
    np.testing.assert_array_equal(both.sums[NAME]["absmax"], whole.sums[NAME]["absmax"])
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="holds no statistics"):
        Statistics.load(tmp_path / "other.npz")


TEXT = "every good boy does fine; all cows eat grass. " * 40


class Ids(nn.Module):
    """A table of 64 numbers for each of 16 tokens, and a layer; notes the shapes that it is called with."""

    def __init__(self):
        super().__init__()
        mx.random.seed(1)
        self.table, self.up, self.shapes = nn.Embedding(16, 64), nn.Linear(64, 32), []

    def __call__(self, ids):
        self.shapes.append(ids.shape)
        return self.up(self.table(ids))


def encode(text):
    return [ord(c) % 16 for c in text]


class Encodes:
    """What tokenizers of other libraries give: an object with ids."""

    def encode(self, text):
        return type("Encoding", (), {"ids": encode(text)})


def test_text_in_any_form_and_its_tokens_give_the_same_statistics(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    halves = (json.dumps({"text": part}) for part in (TEXT[:900], TEXT[900:]))
    (tmp_path / "text.jsonl").write_text("\n".join(halves))
    model = Ids()
    made = plan(model, [QuantizationRule(module_path="up", weight_qtype="int8", act_qtype="int8",
                                         act_static_scale=True)])  # fmt: skip
    starts = np.linspace(0, len(TEXT) - 100, 4).astype(int)
    tokens = np.array([encode(TEXT)[start : start + 100] for start in starts])
    want = calibrate(model, made, [mx.array(window[None]) for window in tokens])
    table = np.array(model.table.weight)
    mean = np.mean([np.abs(table[window]).max() for window in tokens], dtype=np.float64)
    np.testing.assert_allclose(want.average("up/linear0_lhs")["absmax"], [mean], rtol=1e-6)
    for inputs, tokenizer in (
        (TEXT, encode), (str(tmp_path / "text.txt"), Encodes()), (tmp_path / "text.jsonl", encode),
        ([TEXT[:50], TEXT[50:]], encode), ((part for part in (TEXT[:50], TEXT[50:])), encode),
        (tokens, None), (mx.array(tokens), None), (list(tokens), None), (tokens[:, None], None),
    ):  # fmt: skip
        model.shapes.clear()
        got = calibrate(model, made, inputs, tokenizer=tokenizer, windows=4, length=100)
        assert model.shapes == [(1, 100)] * 4
        assert got.sums["up/linear0_lhs"]["absmax"] == want.sums["up/linear0_lhs"]["absmax"]
    assert calibrate(model, made, None, tokenizer=encode, windows=2, length=8).counts == {"up/linear0_lhs": 2}


def test_text_without_a_tokenizer_or_a_file_that_is_not_there_are_errors():
    model = Ids()
    made = plan(model, ["up=weight_qtype:int8,act_qtype:int8,act_static_scale:true"])
    with pytest.raises(TypeError, match="text needs a tokenizer: pass tokenizer=, or arrays of token ids"):
        calibrate(model, made, TEXT)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        calibrate(model, made, "nowhere.txt", tokenizer=encode)
    with pytest.raises(ValueError, match="the calibration text is empty"):
        calibrate(model, made, "x", tokenizer=encode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_hf_model("llama", tmp_path_factory.mktemp("llama") / "hf", "float32", seed=3)


TOKENS = mx.array(np.random.default_rng(2).integers(3, VOCAB, (2, 24)))


def test_static_scales_survive_save_and_load_and_stock_mlx_lm_reads_the_weights(folder, tmp_path):
    from mlx_lm.utils import load_config, load_model, load_tokenizer

    model, _ = load_model(folder)
    rules = ["(.*/)?(q|k|v|o|gate|up|down)_proj=weight_qtype:int8,act_qtype:int8,act_static_scale:true"]
    made = plan(model, rules)
    stats = calibrate(model, made, [TOKENS])
    quantize_model(model, made, stats)
    want = model(TOKENS)
    files.save(model, load_tokenizer(folder), load_config(folder), tmp_path / "mlx")
    loaded, _ = mlxq.load(tmp_path / "mlx")
    scales = [layer.scale_a.item() for layer in _q8(loaded)]
    assert scales == [layer.scale_a.item() for layer in _q8(model)] and len(scales) == len(made) > 0
    assert mx.array_equal(loaded(TOKENS), want)
    stock, _ = mlx_lm.load(str(tmp_path / "mlx"))
    error = mx.linalg.norm(stock(TOKENS) - want) / mx.linalg.norm(want)
    assert 0 < error.item() < 0.05  # the same weights, inputs not rounded


def _q8(model):
    return [layer for _, layer in sorted(model.named_modules()) if isinstance(layer, Q8Linear)]


def test_convert_and_quantize_model_make_the_same_model_of_the_same_rules(folder, tmp_path):
    """The file of rules, through the converter and through a live model: parameters and outputs agree."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    rules = [
        QuantizationRule(module_path="(.*/)?down_proj", weight_qtype="int4", tile_size=32, act_qtype="int8",
                         weight_calibration_method="affine"),
        QuantizationRule(module_path=".*_proj", weight_qtype="int8", act_qtype="int8"),
        QuantizationRule(module_path=".*", weight_qtype="int6", tile_size=32),
    ]  # fmt: skip
    report = convert(folder, tmp_path / "mlx", rules=rules, dtype="float32", progress=False)
    model = quantize_model(load_model(folder)[0], rules)
    loaded, _ = mlxq.load(tmp_path / "mlx")
    have, want = dict(tree_flatten(loaded.parameters())), dict(tree_flatten(model.parameters()))
    assert have.keys() == want.keys()
    for name in want:
        assert mx.array_equal(have[name], want[name]), name
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    stored = {layer.path: layer.stored for layer in report.layers}
    made = plan(load_model(folder)[0], rules)
    for path, site in made.items():
        assert site.stored == stored[path]
    assert {layer.path: layer.stored for layer in inspect(tmp_path / "mlx").layers} == stored
    settings = json.loads((tmp_path / "mlx" / "config.json").read_text())["activation_quantization"]
    assert {path.replace(".", "/") for path in settings} == {p for p, s in made.items() if s.rule.act_qtype}


EVERYTHING = [
    "(.*/)?down_proj=weight_qtype:mxfp4", "(.*/)?up_proj=weight_qtype:mxfp8",
    "(.*/)?gate_proj=weight_qtype:nvfp4", "(.*/)?q_proj=weight_qtype:int3,act_qtype:int8",
    "(.*/)?0/.*k_proj=weight_qtype:int8,tile_size:32,act_qtype:int8",
    "(.*/)?k_proj=weight_qtype:int8,act_qtype:int8,act_static_scale:true",
    "(.*/)?v_proj=weight_qtype:int4,tile_size:32,weight_calibration_method:minmax",
    "(.*/)?o_proj=bits:4,group_size:32,act_qtype:int8", 
    ".*embed_tokens=weight_qtype:mxfp8,act_qtype:int8,act_static_scale:true",
    "lm_head=weight_qtype:int8,act_qtype:int8,act_static_scale:true,act_calibration_method:rms,4",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_that_a_file_holds_is_written_as_a_live_model_has_it(dtype, tmp_path):
    """mx types, int8 inputs, static scales: the converter's file, mlxq.load and quantize_model to the bit."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    source, made = make_hf_model("llama", tmp_path / "hf", dtype, seed=3), tmp_path / "mlx"
    report = convert(source, made, rules=EVERYTHING, progress=False)
    live = load_model(source)[0]
    sites = plan(live, EVERYTHING)
    quantize_model(live, sites, Statistics.load(made / "activation_statistics.npz"))
    loaded, _ = mlxq.load(made)
    have, want = dict(tree_flatten(loaded.parameters())), dict(tree_flatten(live.parameters()))
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == want[name].dtype and mx.array_equal(have[name], want[name]), name
    assert mx.array_equal(loaded(TOKENS), live(TOKENS))
    stored = {layer.path: layer.stored for layer in report.layers}
    assert {layer.path: layer.stored for layer in inspect(made).layers} == stored
    assert {path: site.stored for path, site in sites.items()} == {path: stored[path] for path in sites}
    assert all(layer.error is not None for layer in report.layers)
    stock, _ = mlx_lm.load(str(made))  # the same weights; two layers' inputs are not rounded
    assert mx.linalg.norm(stock(TOKENS) - live(TOKENS)) < 0.06 * mx.linalg.norm(live(TOKENS))
    modes = {name: layer.mode for name, layer in stock.named_modules() if hasattr(layer, "mode")}
    assert modes["model.layers.1.mlp.gate_proj"] == "nvfp4" and modes["model.embed_tokens"] == "mxfp8"


def test_the_converter_measures_static_ranges_on_the_text_it_is_given(folder, tmp_path):
    """Its pass over blocks, one in memory at a time, sees what the whole float model sees."""
    from mlx_lm.utils import load_model, load_tokenizer

    rules = ["(.*/)?(q|down)_proj=weight_qtype:int8,act_qtype:int8,act_static_scale:true"]
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"method": "rtn", "calibration": tmp_path / "text.txt", "progress": False}
    convert(folder, tmp_path / "mlx", rules=rules, **options)
    got = Statistics.load(tmp_path / "mlx" / "activation_statistics.npz")
    model = load_model(folder)[0]
    want = calibrate(model, plan(model, rules), TEXT, tokenizer=load_tokenizer(folder))
    assert got.counts == want.counts and len(want) == 4 and min(want.counts.values()) > 0
    for name in want.counts:
        np.testing.assert_allclose(got.average(name)["absmax"], want.average(name)["absmax"], rtol=1e-5)
    settings = json.loads((tmp_path / "mlx" / "config.json").read_text())["activation_quantization"]
    scale = want.average("model/layers/1/mlp/down_proj/linear0_lhs")["absmax"].item() / 127.5
    assert settings["model.layers.1.mlp.down_proj"]["scale_a"] == pytest.approx(scale, rel=1e-5)
    (tmp_path / "other.txt").write_text("0123456789 " * 300)
    convert(folder, tmp_path / "other", rules=rules, **options | {"calibration": tmp_path / "other.txt"})
    other = Statistics.load(tmp_path / "other" / "activation_statistics.npz")
    assert other.sums.keys() == got.sums.keys() and any(
        other.average(name)["absmax"] != got.average(name)["absmax"] for name in got.counts
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11 for tomllib")
def test_the_rules_of_the_readme_convert_a_model(folder, tmp_path, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rules = readme.split("\n## Rules\n", 1)[1].split("```toml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "rules.toml").write_text(rules)
    line = ["convert", str(folder), str(tmp_path / "mlx"), "--rules", str(tmp_path / "rules.toml")]
    assert cli.main(line) == 0 and cli.main(["inspect", str(tmp_path / "mlx")]) == 0
    stored = {layer.path: layer.stored for layer in inspect(tmp_path / "mlx").layers}
    assert stored["model/layers/0/mlp/down_proj/weight"] == "float32"
    assert stored["model/layers/1/mlp/down_proj"] == "4-bit/32 + int8 inputs"
    assert stored["model/layers/1/self_attn/q_proj"] == "8-bit/128 + int8 inputs"
    assert stored["model/embed_tokens"] == "6-bit/32"
    (tmp_path / "rules.toml").write_text(rules.replace("down_proj", "down_prog"))
    line[2] = str(tmp_path / "other")
    capsys.readouterr()
    assert cli.main(line) == 2 and "down_proj" in capsys.readouterr().err
    assert cli.main([*line, "--allow-unused-rules"]) == 0


def test_convert_refuses_what_a_file_cannot_hold(folder, tmp_path):
    for rule, said in (
        ("(.*/)?up_proj=weight_qtype:nf4,tile_size:32", "nf4/32 has no place .* and mxfp4, mxfp8 and nvfp4"),
        ("(.*/)?up_proj=weight_qtype:float8_e4m3fn", "float8_e4m3fn/row has no .* quantize_model serves"),
        ("(.*/)?up_proj=weight_qtype:int8,tile_size:16", "int8/16 has no place .* groups of 32, 64 or 128"),
        ("(.*/)?up_proj=weight_qtype:int8,act_qtype:float8_e4m3fn", "quantize_model serves them"),
        ("(.*/)?up_proj=weight_qtype:mxfp4,act_qtype:int8", "of linear layers with integer weights"),
        ("upp=bits:4", "matches no layer"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(folder, tmp_path / "x", rules=[rule], progress=False)
        assert not (tmp_path / "x").exists()
    report = convert(folder, tmp_path / "x", rules=["upp=bits:4"], allow_unused_rules=True, progress=False)
    assert any("matches no layer" in notice for notice in report.notices)
