"""gpt-oss checkpoints (experts in mxfp4) against mlx-lm's own reading and transformers' dequantization."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from foreign_models import IDS, read_mlx, write_parts
from mlx.utils import tree_flatten

from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint
from mlxq.checkpoint.plain import dequantize
from mlxq.convert import convert
from mlxq.evaluate import evaluate
from mlxq.load import load

HIDDEN, INNER, EXPERTS, LAYERS, VOCABULARY = 64, 96, 3, 2, tiny_models.VOCAB
BASE = "model.layers.0.mlp.experts"
CONFIG = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5, "hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 128, "rope_theta": 150000,
    "rope_scaling": None, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip


def gpt_oss(folder, change=lambda parts: parts):
    """A tiny model in the layout of the published ones: bfloat16, experts as *_blocks and *_scales."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    parts = {}

    def put(name, *shape, center=0.0):
        values = (rng.standard_normal(shape) * 0.1 + center).astype(np.float32)
        parts[name] = ("BF16", (values.view(np.uint32) >> 16).astype(np.uint16))

    def experts(name, N, K):
        parts[f"{name}_blocks"] = ("U8", rng.integers(0, 256, (EXPERTS, N, K // 32, 16), np.uint8))
        parts[f"{name}_scales"] = ("U8", rng.integers(121, 125, (EXPERTS, N, K // 32), np.uint8))
        put(f"{name}_bias", EXPERTS, N)

    put("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    put("lm_head.weight", VOCABULARY, HIDDEN)
    put("model.norm.weight", HIDDEN, center=1)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, N, K in (("q", 64, HIDDEN), ("k", 32, HIDDEN), ("v", 32, HIDDEN), ("o", HIDDEN, 64)):
            put(f"{at}.self_attn.{name}_proj.weight", N, K)
            put(f"{at}.self_attn.{name}_proj.bias", N)
        put(f"{at}.self_attn.sinks", 2)
        put(f"{at}.mlp.router.weight", EXPERTS, HIDDEN)
        put(f"{at}.mlp.router.bias", EXPERTS)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            put(f"{at}.{norm}.weight", HIDDEN, center=1)
        experts(f"{at}.mlp.experts.gate_up_proj", 2 * INNER, HIDDEN)
        experts(f"{at}.mlp.experts.down_proj", HIDDEN, INNER)
    write_parts(folder / "model.safetensors", change(parts))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny_models.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    mx.disable_compile()  # whose calls of the C++ compiler take seconds
    yield gpt_oss(tmp_path_factory.mktemp("gpt-oss") / "source")
    mx.enable_compile()


def test_codes_and_answers_are_those_that_mlx_lm_makes_of_the_source(source, tmp_path):
    report = convert(source, tmp_path / "q", progress=False)
    assert not report.notices
    stock, ours = (mlx_lm.load(str(folder))[0] for folder in (source, tmp_path / "q"))
    wanted, found = flat(stock), flat(ours)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array), name
    block = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert block["mode"] == "mxfp4" and block["model.layers.0.self_attn.q_proj"] is False
    answers = [np.array(model(mx.array(IDS)).astype(mx.float32)) for model in (stock, ours)]
    np.testing.assert_array_equal(*answers)
    model, _ = load(tmp_path / "q")
    np.testing.assert_allclose(np.array(model(mx.array(IDS)).astype(mx.float32)), answers[0], atol=0.05)


def flat(model):
    return dict(tree_flatten(model.parameters()))


def test_values_are_those_of_transformers(source):
    torch = pytest.importorskip("torch", reason="transformers' dequantization needs torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs transformers")
    tensors = HuggingFaceCheckpoint(source).tensors()
    raw = {k: torch.from_numpy(np.array(v)) for k, v in mx.load(str(source / "model.safetensors")).items()
           if "_blocks" in k or "_scales" in k}  # fmt: skip
    at = "model.layers.1.mlp.experts."
    for layer, rows in (("gate_proj", np.s_[::2]), ("up_proj", np.s_[1::2]), ("down_proj", np.s_[:])):
        base = at + ("down_proj" if layer == "down_proj" else "gate_up_proj")
        # (experts, K, N), because transformers multiplies from the other side
        wanted = mxfp4.convert_moe_packed_tensors(
            raw[f"{base}_blocks"], raw[f"{base}_scales"], dtype=torch.float32
        )
        wanted = wanted.transpose(1, 2)[:, rows].numpy()
        tensor = tensors[f"{at}{layer}.weight"]
        assert tensor.shape == wanted.shape
        np.testing.assert_array_equal(tensor.read(0, tensor.rows).reshape(wanted.shape), wanted)
        middle = tensor.read(wanted.shape[1] - 3, wanted.shape[1] + 2)  # over the seam of two experts
        np.testing.assert_array_equal(middle, wanted.reshape(-1, wanted.shape[-1])[wanted.shape[1] - 3 :][:5])


def test_other_bits_quantize_the_experts_again_and_say_so(source, tmp_path):
    report = convert(source, tmp_path / "q", bits=8, group_size=32, progress=False)
    assert any("quantized again" in notice and "4-bit floats" in notice for notice in report.notices)
    tensors, found = HuggingFaceCheckpoint(source).tensors(), read_mlx(tmp_path / "q")
    for layer in ("gate_proj", "up_proj", "down_proj"):
        name = f"{BASE}.{layer}.weight"
        wanted = tensors[name].read(0, tensors[name].rows).reshape(*found[name].shape[:-1], -1, 32)
        reach = wanted.max(-1, keepdims=True) - wanted.min(-1, keepdims=True)
        # half a step of 255, and scale and bias rounded to bfloat16: 2^-9 of at most the whole range each
        error = np.abs(found[name].reshape(wanted.shape) - wanted)
        assert (error <= reach * (0.5 / 255 + 2 * 2.0**-9)).all()


def test_eval_measures_the_source_as_mlx_lm_runs_it(source, tmp_path):
    convert(source, tmp_path / "q", progress=False)
    texts = {"text": ["the ant in the inn, then " * 20]}
    rows = evaluate([tmp_path / "q"], source, texts, windows=1, length=24, decode=False)
    # float16 log-probabilities of the float model: 2^-11 of |log p| <= 20
    assert abs(rows[1].total["kl"]) < 1e-3 and rows[1].total["top1"] > 0.9
    assert abs(rows[0].bits_per_weight - rows[1].bits_per_weight) < 0.4  # headers of small files


def change(name, value):
    return lambda parts: {k: v for k, v in parts.items() if k != name} | ({name: value} if value else {})


@pytest.mark.parametrize(
    "damage, said",
    [
        (change(f"{BASE}.down_proj_scales", None), "tensors are missing: .*down_proj_scales"),
        (change(f"{BASE}.gate_up_proj_blocks", None), "tensors are missing: .*gate_up_proj_blocks"),
        (
            change(f"{BASE}.down_proj_scales", ("U8", np.zeros((EXPERTS, HIDDEN, 2), np.uint8))),
            r"down_proj_scales is uint8 \(3, 64, 2\); wanted uint8 \(3, 64, 3\)",
        ),
        (
            change(f"{BASE}.down_proj_scales", ("U8", np.full((EXPERTS, HIDDEN, 3), 255, np.uint8))),
            "down_proj: NaN or Inf in the scales of the source",
        ),
        (
            lambda parts: {k: v for k, v in parts.items() if "_blocks" not in k and "_scales" not in k},
            "no tensor's name ends in _blocks",
        ),
    ],
)
def test_damage_is_named(damage, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        convert(gpt_oss(tmp_path / "source", damage), tmp_path / "q", progress=False)
    assert not (tmp_path / "q").exists()


def test_floats_for_transformers_are_left_to_transformers(source, tmp_path):
    with pytest.raises(ValueError, match=r"Mxfp4Config\(dequantize=True\)"):
        dequantize(source, tmp_path / "floats")
