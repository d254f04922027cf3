"""Tiny random models in Hugging Face's layout, one per architecture that the tests convert.

The names and shapes are those that transformers saves; tests/test_checkpoint.py proves it by
loading every folder with transformers and finding no missing and no unexpected tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 128, 2, 4, 2, 32, 256, 320
EXPERTS, EXPERT_MLP = 4, 128

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COMMON = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "max_position_embeddings": 512,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}

MOE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}

CONFIGS = {
    "llama": ("LlamaForCausalLM", {"head_dim": HEAD_DIM, "attention_bias": False, "mlp_bias": False}),
    "mistral": ("MistralForCausalLM", {"head_dim": HEAD_DIM, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"head_dim": HEAD_DIM, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        MOE
        | {
            "head_dim": HEAD_DIM,
            "attention_bias": False,
            "num_experts": EXPERTS,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": EXPERT_MLP,
            "norm_topk_prob": True,
        },
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "head_dim": HEAD_DIM,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": HEAD_DIM,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 64,
            "sliding_window_pattern": 2,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"original_max_position_embeddings": 512, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", MOE | {"num_local_experts": EXPERTS, "sliding_window": None}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        MOE
        | {
            "attention_bias": False,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 128,
            "moe_intermediate_size": EXPERT_MLP,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_key_value_heads": HEADS,
            "q_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
            "v_head_dim": 32,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"attention_bias": False}),
}

ARCHITECTURES = tuple(CONFIGS)

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def tensor_shapes(arch: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that transformers saves for the tiny model of this architecture."""
    config = COMMON | CONFIGS[arch][1]
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, HIDDEN)
        shapes[f"{prefix}.up_proj.weight"] = (width, HIDDEN)
        shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, width)

    for layer in range(layers):
        at = f"model.layers.{layer}"
        attention = f"{at}.self_attn"
        norms = ["post_attention_layernorm"]
        norms += ["post_feedforward_layernorm"] if arch in ("gemma3_text", "olmo2") else []
        norms += ["pre_feedforward_layernorm"] if arch == "gemma3_text" else []
        norms += ["input_layernorm"] if arch != "olmo2" else []
        for norm in norms:
            shapes[f"{at}.{norm}.weight"] = (HIDDEN,)

        shapes[f"{attention}.o_proj.weight"] = (HIDDEN, query)
        if arch == "phi3":
            shapes[f"{attention}.qkv_proj.weight"] = (query + 2 * key, HIDDEN)
        elif arch == "deepseek_v2":
            rank, nope, rope = (config[k] for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
            shapes[f"{attention}.q_a_proj.weight"] = (config["q_lora_rank"], HIDDEN)
            shapes[f"{attention}.q_a_layernorm.weight"] = (config["q_lora_rank"],)
            shapes[f"{attention}.q_b_proj.weight"] = (HEADS * (nope + rope), config["q_lora_rank"])
            shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (rank + rope, HIDDEN)
            shapes[f"{attention}.kv_a_layernorm.weight"] = (rank,)
            shapes[f"{attention}.kv_b_proj.weight"] = (HEADS * (nope + config["v_head_dim"]), rank)
        else:
            for name, width in (("q", query), ("k", key), ("v", key)):
                shapes[f"{attention}.{name}_proj.weight"] = (width, HIDDEN)
                if arch == "qwen2":
                    shapes[f"{attention}.{name}_proj.bias"] = (width,)
        if arch in ("qwen3", "qwen3_moe", "gemma3_text"):
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (HEAD_DIM,)
        if arch == "olmo2":
            shapes[f"{attention}.q_norm.weight"] = (query,)
            shapes[f"{attention}.k_norm.weight"] = (key,)

        if arch == "phi3":
            shapes[f"{at}.mlp.gate_up_proj.weight"] = (2 * MLP, HIDDEN)
            shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        elif arch == "mixtral":
            shapes[f"{at}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                prefix = f"{at}.block_sparse_moe.experts.{expert}"
                shapes[f"{prefix}.w1.weight"] = shapes[f"{prefix}.w3.weight"] = (MLP, HIDDEN)
                shapes[f"{prefix}.w2.weight"] = (HIDDEN, MLP)
        elif arch == "qwen3_moe" or (arch == "deepseek_v2" and layer >= config["first_k_dense_replace"]):
            shapes[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                mlp(f"{at}.mlp.experts.{expert}", EXPERT_MLP)
            if arch == "deepseek_v2":
                mlp(f"{at}.mlp.shared_experts", EXPERT_MLP)
        else:
            mlp(f"{at}.mlp", MLP)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator, arch: str) -> np.ndarray:
    """Float32 weights of a size that keeps activations near 1; norms near their neutral value."""
    if name.endswith("norm.weight"):
        neutral = 0.0 if arch == "gemma3_text" else 1.0  # gemma multiplies by 1 + weight
        return (neutral + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith(".bias"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the bits of `dtype`; bfloat16 (round to nearest even) comes back as uint16."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """A plain safetensors file, written here so that no test reads what our own writer wrote.

    tensors   float32 values, or uint16 bits for bfloat16
    """
    header, offset = {}, 0
    for name, values in tensors.items():
        span = [offset, offset + values.nbytes]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(values.shape), "data_offsets": span}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.tobytes())


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer: 256 bytes, three special tokens, a few merges, a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("t", "h"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t"), ("Ġ", "a")]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_hf_model(
    arch: str,
    folder: Path | str,
    dtype: str = "float32",
    seed: int = 0,
    *,
    shards: int = 1,
    layers: int = LAYERS,
    overrides: dict | None = None,
) -> Path:
    """Folder of a tiny random model in Hugging Face's layout, with a tokenizer that has a chat template.

    arch       one of ARCHITECTURES
    dtype      float32, float16 or bfloat16
    shards     number of safetensors files; more than one adds the index
    overrides  configuration keys that replace the defaults (they do not change the tensors)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    class_name, changes = CONFIGS[arch]
    config = COMMON | changes | {"architectures": [class_name], "model_type": arch, "torch_dtype": dtype}
    config["num_hidden_layers"] = layers
    config |= overrides or {}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": [2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))

    rng = np.random.default_rng(seed)
    tensors = {
        name: to_dtype(random_tensor(name, shape, rng, arch), dtype)
        for name, shape in tensor_shapes(arch, layers).items()
    }
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
    else:
        names, weight_map = list(tensors), {}
        for shard in range(shards):
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            chosen = names[shard::shards]  # one layer's tensors spread over the files, as real shards may do
            write_safetensors(folder / file_name, {name: tensors[name] for name in chosen}, dtype)
            weight_map |= dict.fromkeys(chosen, file_name)
        size = sum(values.nbytes for values in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    return folder
