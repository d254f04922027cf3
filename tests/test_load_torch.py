"""Quantized MLX checkpoints as transformers models: the logits of MLX and of float64, refusals, memory."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from test_house import readme_block, readme_output
from tiny_models import make_hf_model

import mlxq
from mlxq import bridge
from mlxq.checkpoint import q8
from mlxq.checkpoint.embedded import embedded_model
from mlxq.nn.q8 import mlx as q8_mlx

torch = pytest.importorskip("torch", reason="needs the package torch")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")
from mlxq.nn.q8.torch import Q8Linear  # noqa: E402
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear, TiedHead  # noqa: E402

TOKENS = [[5, 17, 300, 2, 64, 9, 101, 45]]
# Sums of at most 1536 products in float32, each right to 1e-5 of its size (tests/test_ops.py), in two layers.
TOLERANCE = 2e-5


def quantize(source: Path, folder: Path, **settings) -> Path:
    """A folder as mlx-community's are: written by mlx_lm.convert."""
    mlx_lm.convert(str(source), str(folder), quantize=True, **settings)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """By architecture: a tiny quantized model, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("torch"), {}

    def make(arch: str) -> Path:
        if arch not in made:
            source = make_hf_model(arch, folder / f"{arch}-float", "float32", seed=4)
            made[arch] = quantize(source, folder / arch, q_group_size=32)
        return made[arch]

    return make


@pytest.fixture
def damaged(quantized, tmp_path):
    return Path(shutil.copytree(quantized("llama"), tmp_path / "model"))


def logits(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(torch.tensor(tokens)).logits


def mlx_logits(folder, tokens=TOKENS):
    model, _ = mlxq.load(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens)))


def relative(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"])
def test_logits_equal_those_of_mlxq_load(arch, quantized):
    model, tokenizer = mlxq.load_torch(quantized(arch), dtype=torch.float32)
    assert relative(logits(model), mlx_logits(quantized(arch))) < TOLERANCE
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert not model.training
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is QuantizedLinear and bridge.is_shared(layer.weight)


def test_gemmas_table_keeps_its_factor(quantized):
    """mlx-lm rounds the factor sqrt(128) to bfloat16, 11.3125: transformers is the one to equal here."""
    model, _ = mlxq.load_torch(quantized("gemma3_text"), dtype=torch.float32)
    assert relative(logits(model), float64_logits(quantized("gemma3_text"))) < TOLERANCE
    assert relative(logits(model), mlx_logits(quantized("gemma3_text"))) < 2**-9  # that rounding


def float64_logits(folder):
    """transformers' own layers on weights that stock MLX dequantized, all in float64."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization")
    config.pop("quantization_config")
    config.pop("torch_dtype", None)
    arrays, state = mx.load(str(folder / "model.safetensors")), {}
    for name, array in arrays.items():
        base, _, part = name.rpartition(".")
        if f"{base}.scales" not in arrays or part == "bias":
            state[name] = array
        elif part == "weight":
            bits, group = settings["bits"], settings["group_size"]
            parts = (arrays[f"{base}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
            state[name] = mx.dequantize(array, *parts, group_size=group, bits=bits)
    settings = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(settings).double()
    state = {name: torch.from_numpy(np.array(value.astype(mx.float32))) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return logits(model.eval()).numpy()


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_logits_equal_those_of_transformers_in_float64(arch, quantized):
    """llama has a head of its own, qwen2 a tied one and biases."""
    model, _ = mlxq.load_torch(quantized(arch), dtype=torch.float32)
    assert relative(logits(model), float64_logits(quantized(arch))) < TOLERANCE


def test_a_tied_head_follows_its_table_everywhere(quantized):
    model, _ = mlxq.load_torch(quantized("qwen2"), dtype=torch.float32)
    table = model.get_input_embeddings()
    assert type(table) is QuantizedEmbedding and type(model.lm_head) is TiedHead
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before) and model.lm_head.table is table
    other = copy.deepcopy(model)
    assert other.lm_head.table is other.get_input_embeddings() is not table
    with torch.no_grad():
        table.scales.mul_(2)
        table.biases.mul_(2)
    assert torch.equal(logits(other), before) and not torch.equal(logits(model), before)
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]


def test_tables_and_heads_may_stay_float_and_layers_have_their_own_format(tmp_path):
    source = make_hf_model("qwen2", tmp_path / "float", "float32", seed=4)

    def choose(path, module):
        if "embed" in path:
            return False
        return {"bits": 8, "group_size": 64} if "down" in path else True

    folder = quantize(source, tmp_path / "model", q_group_size=32, quant_predicate=choose)
    model, _ = mlxq.load_torch(folder, dtype=torch.float32)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.model.layers[0].mlp.down_proj.bits == 8
    assert relative(logits(model), mlx_logits(folder)) < TOLERANCE


def test_generate_and_training_work(quantized):
    folder = quantized("llama")
    model, tokenizer = mlxq.load_torch(folder, dtype=torch.float32)
    ids = torch.tensor(TOKENS)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[0].tolist()
    stock, _ = mlx_lm.load(str(folder))
    stock.set_dtype(mx.float32)
    wanted = list(TOKENS[0])
    while len(wanted) < len(out):
        wanted.append(int(mx.argmax(stock(mx.array([wanted]))[0, -1])))
    assert out == wanted
    assert model.generation_config.pad_token_id == 0
    layer = model.model.layers[0].self_attn.q_proj
    layer.scales.requires_grad_()
    model(ids, labels=ids).loss.backward()
    assert layer.scales.grad.abs().sum() > 0 and model.model.norm.weight.grad is not None


@pytest.mark.parametrize("activation", ["token", "tile", "static", "static_tile"])
def test_layers_with_8_bit_activations_are_restored(activation, tmp_path):
    source = make_hf_model("llama", tmp_path / "float", "float32", seed=4)
    folder = quantize(source, tmp_path / "8-bit", q_bits=8)
    model, tokenizer, config = mlxq.load(folder, return_config=True)
    layer = model.model.layers[0].mlp.down_proj
    shift = 0.1 * mx.random.normal((256,), key=mx.random.key(0))
    groups = layer.scales.shape[1]
    scale = {"static": 0.05, "static_tile": [0.04 + 0.01 * (g % 3) for g in range(groups)]}.get(activation)
    settings = {"activation": activation, "bias_a": shift, "scale_a": scale}
    model.model.layers[0].mlp.down_proj = q8_mlx.Q8Linear.from_packed(layer.packed, None, **settings)
    q8.save(model, tokenizer, config, tmp_path / "model")
    restored, _ = mlxq.load_torch(tmp_path / "model", dtype=torch.float32)
    assert type(restored.model.layers[0].mlp.down_proj) is Q8Linear
    assert type(restored.model.layers[0].mlp.up_proj) is QuantizedLinear
    # A code of x rounds the other way where the frameworks differ in the last bit: 1/127 of one term in 256.
    assert relative(logits(restored), mlx_logits(tmp_path / "model")) < 1e-3
    plain, _ = mlxq.load_torch(folder, dtype=torch.float32)
    assert relative(logits(plain), logits(restored).numpy()) > 5e-3  # 8-bit inputs and the shift are there
    change_config(tmp_path / "model", activation_quantization={"model.norm": {"activation": "token"}})
    with pytest.raises(ValueError, match="names model.norm, which is a LlamaRMSNorm"):
        mlxq.load_torch(tmp_path / "model")
    settings = {"model.layers.0.mlp.down_proj": {"activation": "often"}}
    change_config(tmp_path / "model", activation_quantization=settings)
    with pytest.raises(ValueError, match="down_proj: Q8Linear: activation 'often' does not exist"):
        mlxq.load_torch(tmp_path / "model")


def test_stored_dtypes_stay_unless_another_is_asked_for(tmp_path):
    source = make_hf_model("llama", tmp_path / "float", "bfloat16", seed=4)
    folder = quantize(source, tmp_path / "model", q_group_size=32)
    model, _ = mlxq.load_torch(folder)
    assert {a.dtype for a in model.state_dict().values()} == {torch.bfloat16, torch.int32}
    assert model.dtype == model.config.dtype == torch.bfloat16
    stored = mx.load(str(folder / "model.safetensors"))["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(model.model.layers[0].self_attn.q_proj.packed.words.numpy(), np.array(stored))
    wide, _ = mlxq.load_torch(folder, dtype=torch.float32)
    assert {a.dtype for a in wide.state_dict().values()} == {torch.float32, torch.int32}
    assert wide.dtype == wide.config.dtype == torch.float32
    # some 30 roundings to bfloat16, of 2^-9 each, in two layers
    assert relative(logits(model).float(), logits(wide).numpy()) < 0.05


def test_smollm2_gives_the_logits_of_mlx():
    folder = embedded_model()
    model, tokenizer = mlxq.load_torch(folder, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    tokens = ids.input_ids.tolist()
    # 30 layers: their errors, 1e-6 each in float32, add up
    assert relative(logits(model, tokens), mlx_logits(folder, tokens)) < 2e-5


def test_the_readme_example_runs_as_it_stands(tmp_path):
    command = [sys.executable, "-c", readme_block("From torch")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == readme_output("From torch")


MEMORY = """
import os, sys, resource, mlxq, torch, transformers, mlx_lm, mlxq.torch_model
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
before = resident()
peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, _ = mlxq.load_torch(sys.argv[1])
ids = torch.tensor([[1, 2, 3]])
with torch.inference_mode():
    model(ids)
stored = sum(a.nbytes for a in model.state_dict().values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - max(before, peak_before), stored)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_no_float_copy_of_the_model_is_ever_made():
    """SmolLM2 takes 98 MB packed, 269 MB in float16. Loading it and one step took 198 MB at the peak, with
    the tokenizer and transformers' modules; with a float16 copy of the weights 482 MB.
    """
    command = [sys.executable, "-c", MEMORY, str(embedded_model())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    grown, stored = map(int, result.stdout.split()[-2:])
    assert grown < 3 * stored


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_models_whose_tensors_mlx_lm_rearranges_are_refused(arch, quantized):
    with pytest.raises(ValueError, match="load_torch: .*(lacks tensors of transformers' model|otherwise)"):
        mlxq.load_torch(quantized(arch))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    path = str(folder / "model.safetensors")
    weights = {name: mx.array(np.array(value)) for name, value in mx.load(path).items()}
    change(weights)
    mx.save_safetensors(path, weights, {"format": "mlx"})


BAD = {
    "load: .*model does not exist": shutil.rmtree,
    "transformers .* has no model of type 'nonesuch'": lambda f: change_config(f, model_type="nonesuch"),
    "is in mode mxfp4; built for torch: affine": lambda f: change_config(
        f, quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"}
    ),
    "config.json has no 'bits' for": lambda f: change_config(f, quantization={"group_size": 32}),
    "words hold K=": lambda f: change_config(f, quantization={"group_size": 64, "bits": 4}),
    "lacks tensors of transformers' model: model.norm.weight": lambda f: change_weights(
        f, lambda w: w.pop("model.norm.weight")
    ),
    "has tensors that transformers' model lacks: model.layers.7.x": lambda f: change_weights(
        f, lambda w: w.update({"model.layers.7.x": mx.zeros(3)})
    ),
    r"norm.weight has shape \(3,\); transformers wants \(128,\)": lambda f: change_weights(
        f, lambda w: w.update({"model.norm.weight": mx.zeros(3)})
    ),
    r"q_proj of .* holds \(96, 128\); transformers wants \(128, 128\)": lambda f: change_weights(
        f, lambda w: w.update({n: a[:96] for n, a in w.items() if "0.self_attn.q_proj" in n})
    ),
    "the tokenizer in .* does not load": lambda f: (f / "tokenizer.json").write_text("{"),
    "makes no language model of": lambda f: change_config(f, hidden_size="wide"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_loaded_is_refused_in_one_sentence(message, damaged):
    BAD[message](damaged)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mlxq.load_torch(damaged)


def test_a_tensor_with_other_values_under_the_same_name_is_refused(quantized, monkeypatch):
    """As mlx-lm does for some: Qwen3-Next's norms are stored plus one."""
    from mlx_lm.models import llama

    plain = llama.Model.sanitize

    def sanitize(self, weights):
        return {n: a + 1 if n.endswith("model.norm.weight") else a for n, a in plain(self, weights).items()}

    monkeypatch.setattr(llama.Model, "sanitize", sanitize)
    with pytest.raises(ValueError, match="otherwise than transformers: model.norm.weight"):
        mlxq.load_torch(quantized("llama"))


def test_without_torch_one_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import mlxq\n"
        "try: mlxq.load_torch('anywhere')\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("load_torch needs torch (pip install 'mlxq[torch]')"), result.stderr
