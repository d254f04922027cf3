"""`mlxq parity`: right back ends pass, a wrong word in one fails and is named, bounds are near the errors."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from tiny_models import make_hf_model

import mlxq.load
from mlxq import ops, parity
from mlxq.checkpoint.q8 import save
from mlxq.cli import main
from mlxq.format import Format
from mlxq.nn.q8 import mlx as q8
from mlxq.parity import backends, bounds, report

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from tools.msl import harness  # noqa: E402

KINDS = ("2", "4", "8", "w8a8", "w8a8 learned", "w8a8 tile")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder}: a tiny model with biases at each width, and with 8-bit activations."""
    root = tmp_path_factory.mktemp("parity")
    float_model = make_hf_model("qwen2", root / "float", "float32", seed=3)
    found = {"float": float_model}
    for bits in (2, 4, 8):
        found[str(bits)] = root / f"q{bits}"
        mlx_lm.convert(str(float_model), str(root / f"q{bits}"), quantize=True, q_bits=bits, q_group_size=32)
    for kind in KINDS[3:]:
        model, config = mlx_lm.utils.load_model(float_model)
        q8.replace_linears(model, activation=(kind.split() + ["token"])[1], group_size=32)
        if "learned" in kind:
            with q8.observing(model):
                mx.eval(model(mx.array([[3, 50, 100, 150, 200]])))
        nn.quantize(model, 32, 8, class_predicate=lambda path, layer: isinstance(layer, nn.Embedding))
        config["quantization"] = {"group_size": 32, "bits": 8, "mode": "affine"}
        found[kind] = root / kind.replace(" ", "-")
        save(model, mlx_lm.utils.load_tokenizer(float_model), config, found[kind])
    return found


@pytest.fixture(scope="module")
def certificates(folders):
    """{kind: certificate} of all back ends here."""
    return {kind: parity.certify(folders[kind], tokens=4) for kind in KINDS}


IDS = [5, 17, 99, 200, 31, 2, 77, 140]


def reference_of(folder):
    model, _ = mlxq.load(folder)
    parity.set_dtype(model, "float32")
    reference = parity.Reference(model, IDS)
    reference.noise_differences()
    return reference


# ------------------------------------------------------------------------------------------- all is right


@pytest.mark.parametrize("kind", KINDS)
def test_every_back_end_here_passes(certificates, kind):
    found = certificates[kind]
    assert found["verdict"] == "PASS", report.faults(found)
    ran = set(found["backends"])
    assert ran >= set(ops.isa_levels()) and ran | set(found["absent"]) >= {"torch", "cuda", "metal"}
    assert found["layers"] == len(found["backends"]["scalar"]["layers"]) == 16  # 2 x 7, table, table as head
    for name, backend in found["backends"].items():
        assert len(backend["layers"]) == (1 if name == "shaders" else 16)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_passes_on_the_shader_harness(certificates, kind):
    if reason := no_shaders():
        pytest.skip(reason)
    assert "shaders" in certificates[kind]["backends"]


@pytest.mark.parametrize(
    "bits, activation", [(8, "token"), (4, "tile"), (2, "static_tile"), (4, "static"), (8, "static_tile")]
)
def test_groups_of_int8_inputs_pass_on_the_shader_harness(bits, activation):
    if reason := no_shaders():
        pytest.skip(reason)
    model, rng = nn.Module(), np.random.default_rng(bits)
    packed = ops.quantize(mx.array(rng.standard_normal((37, 192)).astype(np.float32)), Format(bits, 64))
    x = rng.standard_normal((3, 192)).astype(np.float32)
    scale = {"static": 0.02, "static_tile": [0.02, 0.01, 0.03]}.get(activation)
    model.proj = q8.Q8Linear.from_packed(packed, activation=activation, scale_a=scale)
    assert not model.proj.per_row
    shaders = backends.shader_backend(model, backends.kinds(model))
    want = backends.answer(model.proj, backends.W8A8, x, "float32")
    found = want.compare(shaders.layer("proj", backends.W8A8, x))
    assert found["ok"], found
    layer = model.proj.packed
    model.proj.scales = layer.scales * (1 + 1e-3 * mx.array(rng.integers(0, 2, layer.scales.shape)))
    assert not want.compare(shaders.layer("proj", backends.W8A8, x))["ok"]


def no_shaders() -> str | None:
    """Why the shader harness cannot run here; None where it can."""
    if mx.metal.is_available():
        return "needs a machine without Metal; here the GPU itself is a back end"
    if reason := harness.absent():
        return reason
    try:
        harness.compiler()
    except FileNotFoundError as error:
        return str(error)
    return None


def test_without_a_compiler_the_shader_harness_is_absent_and_parity_goes_on(folders, monkeypatch):
    model, _ = mlxq.load(folders["4"])
    monkeypatch.setattr(harness, "absent", lambda: None)
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    with pytest.raises(backends.Absent, match="needs g"):
        backends.shader_backend(model, backends.kinds(model))


def test_what_is_absent_says_why(certificates):
    if not mx.metal.is_available():
        assert certificates["4"]["absent"]["metal"] == "MLX has no Metal on this machine"
    if "cuda" in certificates["4"]["absent"]:
        assert "NVIDIA" in certificates["w8a8"]["absent"]["cuda"]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_within_10_times_of_the_errors_seen(certificates, kind):
    found = certificates[kind]
    runs = [backend for backend in found["backends"].values() if "logits" in backend]
    assert max(report.worst(backend) for backend in runs) > 0.1
    for name in ("max", "mean"):
        assert max(backend["logits"][name] for backend in runs) > 0.1 * found["bounds"][name], name
    assert max(backend["logits"]["kl"] for backend in runs) > 0.01 * found["bounds"]["kl"]  # quadratic


@pytest.mark.parametrize("kind", ["2", "4", "8"])
def test_the_references_logits_are_those_of_stock_mlx_on_the_float_weights(folders, kind):
    model, _ = mlx_lm.load(str(folders[kind]))
    for path, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedEmbedding):
            fmt = {"group_size": layer.group_size, "bits": layer.bits}
            table = nn.Embedding(1, 1)
            table.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, **fmt)
            model.model.embed_tokens = table
        elif isinstance(layer, nn.QuantizedLinear):
            fmt = {"group_size": layer.group_size, "bits": layer.bits}
            plain = nn.Linear(1, 1, "bias" in layer)
            plain.weight = mx.dequantize(layer.weight, layer.scales, layer.biases, **fmt)
            if "bias" in layer:
                plain.bias = layer.bias
            owner, _, name = path.rpartition(".")
            setattr(dict(model.named_modules())[owner], name, plain)
    want = np.array(model(mx.array([IDS]))[0])
    got = reference_of(folders[kind]).logits
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_activations_of_other_dtypes_pass(folders):
    for dtype in ("float16", "bfloat16"):
        for kind in ("4", "w8a8"):
            found = parity.certify(folders[kind], tokens=2, names=[*ops.isa_levels(), "torch"], dtype=dtype)
            assert found["verdict"] == "PASS", report.faults(found)
            assert max(report.worst(backend) for backend in found["backends"].values()) > 0.1


def test_experts_run_and_are_said_not_to_be_compared_by_layer(tmp_path):
    float_model = make_hf_model("mixtral", tmp_path / "float", "float32", seed=3)
    mlx_lm.convert(str(float_model), str(tmp_path / "q4"), quantize=True, q_group_size=32)
    found = parity.certify(tmp_path / "q4", tokens=2)
    assert found["verdict"] == "PASS", report.faults(found)
    assert "model.layers.0.block_sparse_moe.switch_mlp.gate_proj" in found["not_compared"]
    assert len(found["not_compared"]) == 6 and found["layers"] >= 9
    assert "load_torch: " in found["absent"]["torch"]


RESULTS = sorted((ROOT / "tools" / "results").glob("parity-2*.json"))


@pytest.mark.skipif(not RESULTS, reason="needs tools/results/parity-*.json, of tools/parity_smollm2.py")
def test_smollm2_passed_with_bounds_near_its_errors_and_a_flipped_bit_was_named():
    found = json.loads(RESULTS[-1].read_text())
    assert set(found["kinds"]) == {"2", "4", "8", "w8a8"}
    for kind, run in found["kinds"].items():
        assert run["verdict"] == "PASS" and {"torch", "shaders", "scalar"} <= set(run["backends"]), kind
        runs = [backend for backend in run["backends"].values() if "logits" in backend]
        worst = [max(b["worst_layer"]["share"], b["worst_layer"]["share_one_row"]) for b in runs]
        assert 0.1 < max(worst) <= 1, kind
        shares = [backend["logits"]["max"] / run["bounds"]["max"] for backend in runs]
        assert 0.1 < max(shares) <= 1, kind
    assert_named(found["flipped"])


ON_CUDA = sorted((ROOT / "tools" / "results").glob("parity-cuda-*.json"))


@pytest.mark.skipif(not ON_CUDA, reason="needs parity-cuda-*.json, of tools/parity_smollm2.py on a GPU")
def test_smollm2_passed_on_a_gpu_and_a_flipped_bit_there_was_named_at_each_width():
    found = json.loads(ON_CUDA[-1].read_text())
    assert set(found["kinds"]) | set(found["refused"]) == {"2", "4", "8", "w8a8"}
    assert {"2", "4", "8"} <= set(found["kinds"]) == set(found["flipped"])
    for kind, run in found["kinds"].items():
        assert run["verdict"] == "PASS" and {"torch", "cuda"} < set(run["backends"]), kind
        runs = [backend for backend in run["backends"].values() if "logits" in backend]
        layers = [backend["worst_layer"] for backend in runs]
        assert 0.1 < max(max(layer["share"], layer["share_one_row"]) for layer in layers) <= 1, kind
        assert 0.1 < max(backend["logits"]["max"] / run["bounds"]["max"] for backend in runs) <= 1, kind
    assert_named(found["flipped"])


def assert_named(flipped):
    """Each flipped bit failed, and no layer but its own was named."""
    assert flipped
    for found in flipped.values():
        layers = {fault.split(": ")[1] for fault in found["faults"]} - {"logits", "other tokens"}
        assert layers == {f"layer {found['layer']}"}


# -------------------------------------------------------------------------------------------- one is wrong


BROKEN = {
    "2": "model.layers.1.mlp.down_proj",
    "4": "model.layers.0.self_attn.k_proj",
    "8": "model.embed_tokens",
    "w8a8": "model.layers.0.self_attn.o_proj",
    "w8a8 learned": "model.layers.1.mlp.up_proj",
    "w8a8 tile": "model.layers.1.mlp.down_proj",
}


def flip_a_bit(model, path, bit=0):
    """The lowest bit of one code, in the row and group of the largest scale."""
    layer = dict(model.named_modules())[path]
    words, scales = np.array(layer.weight), np.abs(np.array(layer.scales.astype(mx.float32)))
    if path.endswith("embed_tokens"):
        row, group = IDS[2], 0
    else:
        row, group = np.unravel_index(scales.argmax(), scales.shape)
    words[row, group * (words.shape[1] // scales.shape[1])] ^= np.uint32(1 << bit)
    layer.weight = mx.array(words)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_in_one_back_end_fails_and_names_the_layer(folders, kind):
    reference = reference_of(folders[kind])
    model, _ = mlxq.load(folders[kind])
    parity.set_dtype(model, "float32")
    family = ops.isa_levels()[-1]
    whole = parity.examine(reference, backends.mlx_backend("whole", model, mx.cpu, "float32", family), 3)
    assert whole["faults"] == []
    flip_a_bit(model, BROKEN[kind])
    broken = parity.examine(reference, backends.mlx_backend("broken", model, mx.cpu, "float32", family), 3)
    named = {fault.split(": ")[1] for fault in broken["faults"]} - {"logits"}
    wanted = {f"layer {BROKEN[kind]}"}
    if kind == "8":  # the table is the head, too
        wanted.add(f"layer {BROKEN[kind]} (head)")
    assert wanted <= named | {f"layer {BROKEN[kind]} (head)"} and named <= wanted | {"other tokens"}


def test_a_kernel_that_is_wrong_for_one_row_only_is_found(folders):
    reference = reference_of(folders["4"])
    model, _ = mlxq.load(folders["4"])
    right = backends.mlx_backend("right", model, mx.cpu, "float32")

    def layer(path, kind, x):
        y = right.layer(path, kind, x)
        return y * np.float32(1.001) if len(x) == 1 and path.endswith("q_proj") else y

    found = parity.examine(reference, backends.Backend("wrong", layer), 0)
    assert [fault.split(": ")[1] for fault in found["faults"]] == [
        f"layer model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_the_command_exits_with_1_and_names_layer_and_back_end(folders, monkeypatch, capsys, tmp_path):
    def spoilt(model, dtype):
        other, _ = mlxq.load(folders["4"])
        parity.set_dtype(other, dtype)
        flip_a_bit(other, BROKEN["4"], bit=3)
        return {
            "whole": lambda: backends.mlx_backend("whole", model, mx.cpu, dtype),
            "spoilt": lambda: backends.mlx_backend("spoilt", other, mx.cpu, dtype),
        }

    monkeypatch.setattr(backends, "cpu_backends", spoilt)
    out = tmp_path / "report.html"
    arguments = [
        "parity",
        str(folders["4"]),
        "--backends",
        "whole,spoilt",
        "--tokens",
        "2",
        "--out",
        str(out),
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert f"FAIL spoilt: layer {BROKEN['4']}:" in said and "FAIL whole" not in said
    page = out.read_text()
    assert (
        page.count("<circle") == 2 * 16 and f"spoilt: layer {BROKEN['4']}" in page and "<h1>FAIL</h1>" in page
    )


# ------------------------------------------------------------------------------------- the other machine's


def test_a_certificate_is_compared_with_another_machines(folders, tmp_path, capsys):
    out, again = str(tmp_path / "here.json"), str(tmp_path / "there.json")
    family = ops.isa_levels()[-1]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat in the hat")
    flags = ["--backends", family, "--tokens", "3", "--prompt", str(prompt), "--dtype", "float16", "--out"]
    assert main(["parity", str(folders["4"]), *flags, out]) == 0
    first = json.loads(Path(out).read_text())
    assert main(["parity", str(folders["4"]), "--backends", family, "--against", out, "--out", again]) == 0
    second = json.loads(Path(again).read_text())
    assert second["tokens"] == first["tokens"] and second["dtype"] == "float16"
    assert second["against"]["backends"][family] == {"max": pytest.approx(0, abs=1), "same_bits": True}
    assert {"mlx", "mlxq", "numpy", "python"} <= set(first["versions"]) and len(first["weights"]) == 64

    first["backends"][family]["top"]["logits"][2][0] += 3 * first["bounds"]["max"]
    Path(out).write_text(json.dumps(first))
    capsys.readouterr()
    assert main(["parity", str(folders["4"]), "--backends", family, "--against", out]) == 1
    assert f"FAIL their {family}: a logit differs by" in capsys.readouterr().out
    assert main(["parity", str(folders["8"]), "--backends", family, "--against", out]) == 2
    assert "the certificate is of other weights" in capsys.readouterr().err


def test_checksums_are_of_the_tensors_not_of_the_files(folders, tmp_path):
    tensors = mx.load(str(folders["4"] / "model.safetensors"))
    names = sorted(tensors)
    for number, part in enumerate((names[5:], names[:5])):
        path = str(tmp_path / f"model-{number}.safetensors")
        mx.save_safetensors(path, {name: tensors[name] for name in part})
    (tmp_path / "config.json").write_text((folders["4"] / "config.json").read_text())
    assert parity.weights_digest(tmp_path) == parity.weights_digest(folders["4"])
    changed = {name: tensors[name] for name in names[:5]}
    changed[names[0]] = changed[names[0]] + 1
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), changed)
    assert parity.weights_digest(tmp_path) != parity.weights_digest(folders["4"])


def test_the_checksum_covers_the_settings_of_activations(folders, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folders["w8a8 learned"] / name).read_bytes())
    assert parity.weights_digest(tmp_path) == parity.weights_digest(folders["w8a8 learned"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["activation_quantization"][BROKEN["w8a8"]]["scale_a"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parity.weights_digest(tmp_path) != parity.weights_digest(folders["w8a8 learned"])


# -------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backends", "abacus"], "no back end abacus; here: .*torch, cuda"),
        (["--tokens", "-1"], "--tokens -1; wanted 0 or more"),
        (["--out", "x.pdf"], "--out x.pdf is neither .json nor .html"),
        (["--prompt", "/nothing"], "/nothing: No such file"),
        (["--against", "/nothing"], "/nothing: No such file"),
        (["--against", str(ROOT / "README.md")], "README.md is not JSON"),
        (
            ["--against", str(ROOT / "metal" / "shaders" / "kernels.json")],
            "is no certificate of this version",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, arguments, words):
    import re

    assert main(["parity", str(folders["4"]), *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1


def test_float_models_and_absent_back_ends_that_were_asked_for_are_refused(folders, capsys):
    assert main(["parity", str(folders["float"])]) == 2
    assert "holds float weights" in capsys.readouterr().err
    if not mx.metal.is_available():
        assert main(["parity", str(folders["4"]), "--tokens", "0", "--backends", "metal"]) == 2
        assert "metal does not run here: MLX has no Metal" in capsys.readouterr().err


def test_outside_of_a_checkout_the_shader_harness_is_absent(folders, monkeypatch, tmp_path):
    model, _ = mlxq.load(folders["4"])
    monkeypatch.setitem(sys.modules, "mlxq", SimpleNamespace(__file__=str(tmp_path / "mlxq" / "__init__.py")))
    with pytest.raises(backends.Absent, match="the shader harness is part of a checkout"):
        backends.shader_backend(model, backends.kinds(model))


# ----------------------------------------------------------------------------------------------- the bounds


def test_an_answer_of_float32_arithmetic_is_right_and_one_of_float16_is_not():
    rng = np.random.default_rng(0)
    packed = mlxq.format.quantize(
        rng.standard_normal((64, 256)).astype(np.float32), mlxq.format.Format(4, 64)
    )
    x = rng.standard_normal((16, 256)).astype(np.float32)
    answer = bounds.product(packed, x, "float32")
    w = mlxq.format.dequantize(packed)
    assert np.allclose(answer.y, x.astype(np.float64) @ w.astype(np.float64).T, rtol=1e-6, atol=1e-5)
    assert answer.compare(x @ w.T)["ok"]
    assert not answer.compare((x.astype(np.float16) @ w.T.astype(np.float16)).astype(np.float32))["ok"]
    for bad in (np.nan, np.inf):
        wrong = x @ w.T
        wrong[3, 5] = bad
        assert answer.compare(wrong)["share"] == math.inf
    noise = answer.noise(rng)
    assert np.std(noise / answer.deviation) == pytest.approx(1 / math.sqrt(32), rel=0.2)


def in_pairs(a):
    """(high, low): what two bfloat16 keep of float32, to the nearest."""
    torch = pytest.importorskip("torch", reason="needs the package torch")
    whole = torch.from_numpy(a)
    high = whole.bfloat16().float()
    return high.numpy().astype(np.float64), (whole - high).bfloat16().float().numpy().astype(np.float64)


def test_pairs_of_bfloat16_are_right_for_amx_alone_and_near_their_bound():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 512)).astype(np.float32)
    packed = mlxq.format.quantize(w, mlxq.format.Format(4, 64))
    x = rng.standard_normal((16, 512)).astype(np.float32)
    answer = bounds.product(packed, x, "float32")
    (w_high, w_low), (x_high, x_low) = in_pairs(mlxq.format.dequantize(packed)), in_pairs(x)
    y = (x_high @ w_high.T + x_low @ w_high.T + x_high @ w_low.T).astype(np.float32)
    assert not answer.compare(y)["ok"]
    assert 0.3 < answer.compare(y, split=True)["share"] <= 1
    assert not answer.compare((x_high @ w_high.T).astype(np.float32), split=True)["ok"]
    assert backends.splits("amx", "float32") and not backends.splits("avx512", "float32")
    assert not backends.splits("amx", "float16") and not backends.splits(None, "float32")


def test_logits_of_amx_have_a_bound_of_their_own(folders):
    reference = reference_of(folders["4"])
    run = backends.mlx_backend("amx", reference.model, mx.cpu, "float32")
    run.split = True
    found = parity.examine(reference, run, len(IDS) - 1)
    assert not found["faults"]
    # K = 64: typically 2^-24 sqrt(64 / 96) s without pairs, with them 6e-6 sqrt(sum (w x)^2), up to 2 s
    assert 3 < found["bounds"]["max"] / reference.bounds["max"] < 260


def test_differences_and_choices_by_hand():
    theirs = np.log(np.array([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1], [0.34, 0.33, 0.33], [0.5, 0.3, 0.2]]))
    ours = theirs.copy()
    ours[1] = np.log([0.3, 0.6, 0.1])
    ours[2] = np.log([0.33, 0.34, 0.33])
    found = bounds.differences(ours, theirs)
    assert found["max"] == pytest.approx(math.log(2))
    kl = 0.6 * math.log(2) - 0.3 * math.log(2) + 0.34 * math.log(34 / 33) - 0.33 * math.log(34 / 33)
    assert found["kl"] == pytest.approx(kl / 4)
    assert found["mean"] == pytest.approx((2 * math.log(2) + 2 * math.log(34 / 33)) / 12)
    near = math.log(34 / 33)
    chosen = bounds.choices(ours, theirs, near / 2 * 1.01, start=2)
    assert chosen == {"agreement": 0.5, "unexplained": [1], "divergence": 0}
    assert bounds.choices(ours, theirs, near / 2 * 0.99, start=3) == {
        "agreement": 0.5,
        "unexplained": [1, 2],
        "divergence": None,
    }
    assert bounds.choices(theirs, theirs, 0.0, start=0)["divergence"] is None
