"""The GGUF reader, lossless repacking, and GGUF models against the same models from their folders."""

import json
import re
import sys
import types

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_unflatten

from mlxq import format
from mlxq.checkpoint.embedded import embedded_gguf
from mlxq.checkpoint.gguf import REPACKED, Block, Gguf, GgufCheckpoint, GgufTensor, undo_rope_permutation
from mlxq.convert import convert

GGUF_NAMES = {"llama": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
TINY = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "olmo2")


def relative_error(found, wanted) -> float:
    return float(np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(np.float64(wanted)))


def random_blocks(kind: str, rows: int, K: int, seed: int = 0, exponents=(-18, 8)) -> np.ndarray:
    """Rows of random blocks: every code, and scales whose 128-fold float16 still holds."""
    rng = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = rng.integers(0, 256, (rows * K // weights, size), dtype=np.uint8)
    two = kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K")
    where = (
        slice(-4 if two else -2, None)
        if kind in ("Q2_K", "Q6_K", "TQ1_0", "TQ2_0")
        else slice(4 if two else 2)
    )
    halves = np.ldexp(
        rng.uniform(-1, 1, (len(blocks), 1 + two)), rng.integers(*exponents, (len(blocks), 1 + two))
    )
    blocks[:, where] = halves.astype(np.float16).view(np.uint8)
    if kind == "TQ1_0":  # the bytes that a quantizer writes: ceil(n * 256 / 243) for n in base 3
        digits = np.ceil(rng.integers(0, 243, (len(blocks), 52)) * 256 / 243)
        digits[:, 48:] = np.ceil(rng.integers(0, 81, (len(blocks), 4)) * 3 * 256 / 243)
        blocks[:, :52] = digits.astype(np.uint8)
    return blocks.reshape(rows, -1)


def dequantized(kind: str, rows: np.ndarray) -> np.ndarray:
    """The gguf package's values; it lacks Q1_0, of which each bit tells d from -d, lowest first."""
    if kind != "Q1_0":
        return gguf.dequantize(rows, Type[kind])
    blocks = rows.reshape(-1, 18)
    signs = 2.0 * np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") - 1
    return (blocks[:, :2].copy().view(np.float16) * signs).astype(np.float32).reshape(len(rows), -1)


@pytest.mark.parametrize("kind", REPACKED)
def test_repacked_blocks_hold_exactly_what_gguf_dequantizes(kind):
    tensor = GgufTensor(Block("t", kind, (24, 512), random_blocks(kind, 24, 512)))
    packed = tensor.read_packed(0, 24).validate()
    codes = format.unpack(packed.words, packed.format.bits, 512).reshape(24, -1, packed.format.group_size)
    # float16 holds d, m, -8 d and -128 d exactly; Q4_K's products of d and 6 bits need float32
    storage = np.float32 if kind.endswith("_K") else np.float16
    scales, biases = (a.astype(storage).astype(np.float64)[..., None] for a in (packed.scales, packed.biases))
    exact = (scales * codes + biases).reshape(24, 512)  # float64 has room for every product and sum
    assert np.array_equal(exact.astype(np.float32), dequantized(kind, tensor.block.rows))
    assert len(np.unique(codes)) == (3 if kind == "TQ1_0" else 2**packed.format.bits)


@pytest.mark.parametrize("kind", REPACKED)
def test_rows_are_taken_in_the_order_of_the_model(kind):
    order = undo_rope_permutation(24, heads=3)
    plain = GgufTensor(Block("t", kind, (24, 256), random_blocks(kind, 24, 256)))
    turned = GgufTensor(plain.block, order)
    assert np.array_equal(turned.read(5, 17), plain.read(0, 24)[order][5:17])
    assert np.array_equal(turned.read_packed(5, 17).words, plain.read_packed(0, 24).words[order][5:17])


def test_the_permutation_undone_is_llama_cpps():
    heads, dim = 3, 8
    weight = np.arange(heads * dim * 5).reshape(heads * dim, 5)
    permuted = (
        weight.reshape(heads, 2, dim // 2, 5).swapaxes(1, 2).reshape(weight.shape)
    )  # convert_hf_to_gguf.py
    assert np.array_equal(permuted[undo_rope_permutation(heads * dim, heads)], weight)


def test_the_largest_scale_sees_overflow_and_nan():
    tensor = GgufTensor(Block("t", "Q8_0", (4, 64), random_blocks("Q8_0", 4, 64)))
    assert tensor.largest_scale() == np.abs(tensor.read_packed(0, 4).biases).max()
    rows = tensor.block.rows.copy()
    rows[2, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert np.isnan(GgufTensor(Block("t", "Q8_0", (4, 64), rows)).largest_scale())


def test_our_reader_agrees_with_the_gguf_package(tmp_path):
    path = write_gguf(
        tiny_models.make_hf_model("llama", tmp_path / "src"), tmp_path / "m.gguf", "llama", Type.Q4_1
    )
    ours, theirs = Gguf(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = ours.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), name
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        block = ours.tensors[tensor.name]
        assert block.type == tensor.tensor_type.name
        assert block.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert block.rows.tobytes() == tensor.data.tobytes()


# ---- the embedded model


@pytest.fixture(scope="module")
def smollm2():
    return embedded_gguf()


@pytest.fixture(scope="module")
def converted(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    return folder, convert(smollm2, folder, progress=False)


def smollm2_name(name: str) -> str:
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
    }
    parts |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    name = name.removesuffix(".weight")
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if name in whole:
        return whole[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{parts[part]}"


def test_smollm2_weights_are_the_ggufs_where_requantizing_loses_seven_percent(smollm2, converted):
    weights = mx.load(str(converted[0] / "model.safetensors"))
    seen = 0
    for block in Gguf(smollm2).tensors.values():
        wanted, path = gguf.dequantize(block.rows, Type[block.type]), smollm2_name(block.name)
        if "attn_q." in block.name or "attn_k." in block.name:
            heads = 9 if "attn_q." in block.name else 3
            wanted = wanted.reshape(heads, -1, 2, 576).swapaxes(1, 2).reshape(wanted.shape)
        found = weights[f"{path}.weight"]
        if f"{path}.scales" in weights:
            bits, scales, biases = (
                REPACKED[block.type].bits,
                weights[f"{path}.scales"],
                weights[f"{path}.biases"],
            )
            assert scales.dtype == biases.dtype == mx.float16
            found = mx.dequantize(found, *(a.astype(mx.float32) for a in (scales, biases)), 32, bits)
            if block.type == "Q4_1" and ".1." in block.name:
                again = mx.dequantize(*mx.quantize(mx.array(wanted), 32, 4), 32, 4)
                assert relative_error(again, wanted) > 1e-2
        # the GGUF's scales are float16 themselves: exact but for the rounding of one float32 product and sum
        assert relative_error(found.astype(mx.float32), wanted.reshape(found.shape)) <= 1e-6
        seen += 1
    assert seen == 272
    assert converted[1].relative_error < 1e-6
    assert converted[1].bits_per_weight < 5.9


def test_smollm2_keeps_its_own_widths_and_stock_mlx_lm_answers_with_paris(converted):
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        "model.embed_tokens": {"bits": 8, "group_size": 32, "mode": "affine"},
    }
    model, tokenizer = mlx_lm.load(str(converted[0]))
    in_float32(model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert (
        mlx_lm.generate(model, tokenizer, prompt, max_tokens=8).strip() == "The capital of France is Paris."
    )
    assert tokenizer.eos_token_ids == {0, 2}


def test_the_tokenizer_is_made_where_older_transformers_keep_the_converter(smollm2, tmp_path, monkeypatch):
    from transformers.integrations.gguf import gguf_tokenizer_mapping as now

    GgufCheckpoint(smollm2).write_tokenizer(tmp_path)
    wanted = (tmp_path / "tokenizer.json").read_bytes()
    before = types.ModuleType("transformers.integrations.ggml")
    before.convert_gguf_tokenizer = now.convert_gguf_tokenizer
    monkeypatch.setitem(sys.modules, before.__name__, before)
    monkeypatch.delattr(now, "convert_gguf_tokenizer")
    (tmp_path / "tokenizer.json").unlink()
    GgufCheckpoint(smollm2).write_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == wanted


def test_smollm2_tokenizer_is_the_one_that_transformers_reads_from_the_gguf(smollm2, converted):
    pytest.importorskip("torch", reason="transformers reads a GGUF with torch only")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    ours = AutoTokenizer.from_pretrained(str(converted[0]))
    for text in (
        "Hello world",
        "  two  spaces\n\tand\ttabs",
        "Zürich 12345 3.14 中文 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


# ---- small models of every architecture, written as llama.cpp's converter writes them


def write_gguf(folder, path, arch: str, kind: Type, metadata: dict | None = None):
    """The tiny model in `folder` as a GGUF file, its matrices in the given type."""
    config = json.loads((folder / "config.json").read_text()) | (metadata or {})
    name = GGUF_NAMES.get(arch, arch)
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(tiny_models.HEAD_DIM)
    writer.add_rope_dimension_count(tiny_models.HEAD_DIM)
    if experts := config.get("num_experts", config.get("num_local_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(
            config.get("moe_intermediate_size", config["intermediate_size"])
        )
    if "sliding_window" in config and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"[PAD{n}]" for n in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 5 if t.startswith("[PAD") else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny_models.CHAT_TEMPLATE)

    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name), config["num_hidden_layers"]
    )
    tensors = {
        k: np.array(v.astype(mx.float32)) for k, v in mx.load(str(folder / "model.safetensors")).items()
    }
    for key in [k for k in tensors if ".experts.0." in k]:
        stack = [tensors.pop(key.replace(".experts.0.", f".experts.{e}.")) for e in range(experts)]
        tensors[key.replace(".experts.0.", ".experts.")] = np.stack(stack)
    for key, values in tensors.items():
        base, _, suffix = key.rpartition(".")
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if name == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        chosen = kind if values.ndim > 1 and "gate_inp" not in names.get_name(base) else Type.F32
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
            chosen = Type.Q8_0
        if chosen.name.endswith("_K") or chosen == Type.Q1_0:  # the gguf package cannot quantize to them
            rows = values.reshape(-1, values.shape[-1])
            data = random_blocks(
                chosen.name, *rows.shape, exponents=(-4, -3) if chosen == Type.Q1_0 else (-13, -12)
            )
            data = data.reshape(*values.shape[:-1], -1)
        else:
            data = gguf.quantize(np.ascontiguousarray(values), chosen)
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_float32(model):
    model.apply(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
    return model


def logits(folder) -> np.ndarray:
    model = in_float32(mlx_lm.load(str(folder))[0])
    return np.array(model(mx.array([[1, 17, 200, 3, 44, 90, 2, 150]])))


@pytest.mark.parametrize("arch", TINY)
def test_a_float_gguf_gives_the_logits_of_its_folder(arch, tmp_path):
    # GGUF does not say Gemma's pattern of sliding windows, which is 6, and mlx-lm needs a whole one
    layers = 6 if arch == "gemma3_text" else 2
    pattern = {"sliding_window_pattern": 6}
    source = tiny_models.make_hf_model(arch, tmp_path / "src", layers=layers, overrides=pattern)
    path = write_gguf(source, tmp_path / "m.gguf", arch, Type.F32)
    report = convert(path, tmp_path / "q", dtype="float32", progress=False)
    assert "float in the GGUF" in report.kept_float.values()
    assert "quantization" not in json.loads((tmp_path / "q" / "config.json").read_text())
    found, wanted = logits(tmp_path / "q"), logits(source)
    assert relative_error(found, wanted) < 1e-5  # the same float32 model: sums in the same order


@pytest.mark.parametrize("kind", REPACKED)
@pytest.mark.parametrize("arch", ("llama", "qwen3_moe"))
def test_a_quantized_gguf_gives_the_logits_of_its_dequantized_self(arch, kind, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src")
    path = write_gguf(source, tmp_path / "m.gguf", arch, Type[kind])
    report = convert(path, tmp_path / "q", progress=False)
    assert report.relative_error < 1e-3
    model = mlx_lm.load(str(source))[0]
    checkpoint = GgufCheckpoint(path)
    from mlxq.checkpoint.skeleton import Skeleton

    weights = checkpoint.weights(Skeleton(checkpoint.config, tmp_path))
    exact = {k: mx.array(t.read(0, len(t.block.rows)).reshape(t.shape)) for k, t in weights.items()}
    model.update(tree_unflatten(list(exact.items())))
    wanted = np.array(model(mx.array([[1, 17, 200, 3, 44, 90, 2, 150]])))
    # weights differ by float16 rounding of scales and norms (2^-11), over two layers
    assert relative_error(logits(tmp_path / "q"), wanted) < 5e-3


def test_widths_that_are_asked_for_replace_the_ggufs_own(tmp_path):
    path = write_gguf(
        tiny_models.make_hf_model("llama", tmp_path / "src"), tmp_path / "m.gguf", "llama", Type.Q4_0
    )
    own = convert(path, tmp_path / "own", progress=False)
    same = convert(path, tmp_path / "same", bits=4, progress=False)
    wider = convert(path, tmp_path / "wider", bits=4, group_size=64, progress=False)
    eight = convert(path, tmp_path / "eight", embedding_bits=8, progress=False)
    assert own.relative_error < 1e-3 and same.relative_error < 1e-3  # repacked
    assert wider.relative_error > 1e-2  # quantized again
    assert {layer.stored for layer in eight.layers if "embed" in layer.path} == {"8-bit/32"}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "same")]
    assert files[0] == files[1]


def test_a_type_without_a_format_goes_to_the_next_kernel_width(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    path = write_gguf(source, tmp_path / "m.gguf", "llama", Type.Q6_K)
    report = convert(path, tmp_path / "q", progress=False)
    assert {layer.stored for layer in report.layers} == {"8-bit/32", "float16"}
    assert report.relative_error < 6e-3  # 8-bit rounding: range / 255 / sqrt(12) against the group's spread
    assert [n for n in report.notices if "quantized again" in n and "no MLX format holds Q6_K" in n]


def test_codes_go_into_wider_formats_unchanged(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    path = write_gguf(source, tmp_path / "m.gguf", "llama", Type.Q5_0)
    five = convert(path, tmp_path / "five", progress=False)
    eight = convert(path, tmp_path / "eight", bits=8, progress=False)
    assert {layer.stored for layer in five.layers} == {"5-bit/32", "float16"}
    assert {layer.stored for layer in eight.layers} == {"8-bit/32", "float16"}
    narrow, wide = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("five", "eight"))
    assert narrow.keys() == wide.keys()
    for name in (n.removesuffix(".scales") for n in narrow if n.endswith(".scales")):
        codes = [
            format.unpack(np.array(w[f"{name}.weight"]), bits, 32 * w[f"{name}.scales"].shape[-1])
            for w, bits in ((narrow, 5), (wide, 8))
        ]
        assert np.array_equal(*codes) and codes[0].max() == 31
        assert all(mx.array_equal(narrow[f"{name}.{p}"], wide[f"{name}.{p}"]) for p in ("scales", "biases"))


def test_bfloat16_keeps_the_codes_and_rounds_the_scales(tmp_path):
    path = write_gguf(
        tiny_models.make_hf_model("llama", tmp_path / "src"), tmp_path / "m.gguf", "llama", Type.Q4_1
    )
    convert(path, tmp_path / "half", progress=False)
    report = convert(path, tmp_path / "brain", dtype="bfloat16", progress=False)
    half, brain = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("half", "brain"))
    assert all(mx.array_equal(half[k], brain[k]) for k in half if half[k].dtype == mx.uint32)
    assert {str(a.dtype) for a in brain.values()} == {"mlx.core.uint32", "mlx.core.bfloat16"}
    assert report.relative_error < 8e-3


def test_scales_that_float16_cannot_hold_become_float32(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    tensors = dict(mx.load(str(source / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * (
        600 * 127 / mx.abs(tensors[name]).max()
    )  # d about 600, -128 d beyond 65504
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    path = write_gguf(source, tmp_path / "m.gguf", "llama", Type.Q8_0)
    report = convert(path, tmp_path / "q", progress=False)
    written = mx.load(str(tmp_path / "q" / "model.safetensors"))
    wide = {k.rpartition(".")[0] for k, v in written.items() if v.dtype == mx.float32}
    assert wide == {"model.layers.1.mlp.up_proj"}
    assert [notice for notice in report.notices if "float32" in notice]
    assert report.relative_error < 1e-6


def test_llama3_rope_factors_become_its_scaling(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    path = write_gguf(source, tmp_path / "m.gguf", "llama", Type.F32)
    checkpoint = GgufCheckpoint(path)
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = Llama3RoPE(tiny_models.HEAD_DIM, base=500000.0, scaling_config=scaling)
    plain = 500000.0 ** (np.arange(0, tiny_models.HEAD_DIM, 2) / tiny_models.HEAD_DIM)
    divisors = (np.array(rope._freqs, np.float64) / plain).astype(np.float32)
    rows = divisors.view(np.uint8).reshape(1, -1)
    checkpoint.file.tensors["rope_freqs.weight"] = Block("rope_freqs.weight", "F32", divisors.shape, rows)
    found = checkpoint._llama3_scaling({"rope_theta": 500000.0})
    assert {key: found[key] for key in scaling} == pytest.approx(scaling, rel=1e-5)
    with pytest.raises(ValueError, match="not the scaling of Llama 3"):
        checkpoint._llama3_scaling({"rope_theta": 10000.0})


@pytest.mark.parametrize("change", ["blk.0.attn_norm.weight", "blk.1.ffn_up.weight"])
def test_a_missing_tensor_is_named(change, tmp_path):
    path = write_gguf(
        tiny_models.make_hf_model("llama", tmp_path / "src"), tmp_path / "m.gguf", "llama", Type.Q8_0
    )
    path.write_bytes(path.read_bytes().replace(change.encode(), re.sub(r"\d", "7", change).encode()))
    with pytest.raises(ValueError, match=f"tensors are missing: {change}"):
        convert(path, tmp_path / "q", progress=False)
    assert not (tmp_path / "q").exists()
