"""Conversion of Hugging Face folders: what is written, how much memory it takes, what a crash leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten

from mlxq.convert import convert, inspect
from mlxq.format import Format

TESTS = os.path.dirname(__file__)


@pytest.fixture
def llama(tmp_path):
    return tiny_models.make_hf_model("llama", tmp_path / "src")


def read(folder) -> dict[str, mx.array]:
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def widths(folder) -> dict[str, str]:
    return {layer.path: layer.stored for layer in inspect(folder).layers if "bit" in layer.stored}


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("arch", ("llama", "qwen2", "qwen3_moe", "gemma3_text", "deepseek_v2"))
def test_by_mlxs_rule_the_files_are_those_of_stock_mlx_lm(arch, dtype, tmp_path):
    source = tiny_models.make_hf_model(arch, tmp_path / "src", dtype=dtype)
    mlx_lm.convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
    convert(source, tmp_path / "ours", bits=4, group_size=64, quantization_rule="mlx", progress=False)
    stock, ours = read(tmp_path / "stock"), read(tmp_path / "ours")
    assert ours.keys() == stock.keys()
    for name, array in stock.items():
        assert ours[name].dtype == array.dtype, name
        assert mx.array_equal(ours[name], array), name
    theirs = config_of(tmp_path / "stock")
    modes = {"mode": "affine"}  # mlx-lm leaves the default mode out of what a model's own predicate returns
    for block in ("quantization", "quantization_config"):
        filled = {k: v | modes if isinstance(v, dict) else v for k, v in theirs[block].items()}
        assert config_of(tmp_path / "ours")[block] == filled


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 64), (4, 128), (6, 32), (8, 128)])
def test_stock_mlx_lm_loads_and_runs_what_we_wrote(bits, group_size, llama, tmp_path):
    report = convert(llama, tmp_path / "q", bits=bits, group_size=group_size, progress=False)
    model, tokenizer = mlx_lm.load(str(tmp_path / "q"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert isinstance(mlx_lm.generate(model, tokenizer, prompt, max_tokens=3), str)
    # the model computes with W = scale * code + bias: stock on the packed file against stock on those weights
    dense = mlx_lm.load(str(llama))[0]
    packed = read(tmp_path / "q")
    bases = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    dense.load_weights(
        [
            (
                f"{b}.weight",
                mx.dequantize(
                    packed[f"{b}.weight"], packed[f"{b}.scales"], packed[f"{b}.biases"], group_size, bits
                ),
            )
            for b in bases
        ],
        strict=False,
    )
    ids = mx.array([[1, 17, 200, 3]])
    difference = np.abs(np.array(model(ids) - dense(ids))).max()
    assert difference < 1e-4  # float32 sums of K <= 256 products in another order
    assert report.bits_per_weight == pytest.approx(bits + 64 / group_size, rel=0.05)  # float32 scale and bias


def test_rules_win_over_embedding_bits_over_the_models_wish_over_the_default(tmp_path):
    source = tiny_models.make_hf_model("qwen3_moe", tmp_path / "src")
    convert(
        source,
        tmp_path / "q",
        bits=4,
        group_size=64,
        embedding_bits=6,
        rules=[
            r"model/layers/0/mlp/switch_mlp/.*=bits:2,group_size:32",
            r".*/switch_mlp/down_proj=bits:8",
            r"model/layers/\d+/self_attn/q_proj=bits:none",
            "lm_head=bits:3",
        ],
        progress=False,
    )
    found = widths(tmp_path / "q")
    assert found["model/layers/0/mlp/switch_mlp/down_proj"] == "2-bit/32"  # the first match
    assert found["model/layers/1/mlp/switch_mlp/down_proj"] == "8-bit/64"
    assert found["model/layers/1/mlp/switch_mlp/up_proj"] == "4-bit/64"
    assert found["model/layers/1/mlp/gate"] == "8-bit/64"  # mlx-lm asks for 8 bits in this model's router
    assert found["model/embed_tokens"] == "6-bit/64"
    assert found["lm_head"] == "3-bit/64"
    assert "model/layers/0/self_attn/q_proj" not in found
    block = config_of(tmp_path / "q")["quantization"]
    assert block["model.layers.1.self_attn.q_proj"] is False
    assert block["lm_head"] == {"bits": 3, "group_size": 64, "mode": "affine"}
    assert "model.layers.1.mlp.switch_mlp.up_proj" not in block
    model = mlx_lm.load(str(tmp_path / "q"))[0]
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_a_rule_without_a_layer_is_refused_before_anything_is_written(llama, tmp_path):
    with pytest.raises(ValueError, match=r"rule model/layer/\\d\+/mlp/down_proj=bits:8 matches no layer"):
        convert(llama, tmp_path / "q", rules=[r"model/layer/\d+/mlp/down_proj=bits:8"], progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_layers_that_no_group_size_divides_stay_float_and_are_listed(tmp_path):
    source = tiny_models.make_hf_model("qwen3_moe", tmp_path / "src", overrides={})
    tensors = read(source)
    for name, array in tensors.items():
        if ".mlp.experts." in name:  # 128 -> 100 hidden units in every expert
            tensors[name] = array[:, :100] if "down_proj" in name else array[:100]
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    (source / "config.json").write_text(json.dumps(config_of(source) | {"moe_intermediate_size": 100}))
    report = convert(source, tmp_path / "q", group_size=32, progress=False)
    assert set(report.kept_float) == {f"model/layers/{n}/mlp/switch_mlp/down_proj" for n in (0, 1)}
    assert set(report.kept_float.values()) == {"K=100 is not a multiple of the group size 32"}
    assert config_of(tmp_path / "q")["quantization"]["model.layers.0.mlp.switch_mlp.down_proj"] is False
    assert "K=100 is not a multiple" in " ".join(render(report).split())
    mlx_lm.load(str(tmp_path / "q"))


def test_a_group_size_that_does_not_divide_names_one_that_would(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src")
    tensors = read(source)
    for name, array in tensors.items():
        if ".mlp." in name:  # 256 -> 192 hidden units
            tensors[name] = array[:, :192] if "down_proj" in name else array[:192]
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    (source / "config.json").write_text(json.dumps(config_of(source) | {"intermediate_size": 192}))
    report = convert(source, tmp_path / "q", group_size=128, progress=False)
    assert set(report.kept_float.values()) == {"K=192 is not a multiple of the group size 128; 64 would fit"}


def render(report) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(report.table())
    return console.export_text()


def test_the_table_shows_groups_errors_and_totals(llama, tmp_path):
    text = render(convert(llama, tmp_path / "q", progress=False))
    line = next(line for line in text.splitlines() if "model/layers/*/mlp/down_proj" in line)
    assert line.split()[1:4] == ["2", "4-bit/64", "65.54"]
    assert "bits/weight" in text and "%" in text


def test_the_reported_error_is_that_of_the_file(llama, tmp_path):
    report = convert(llama, tmp_path / "q", bits=4, group_size=32, dtype="float16", progress=False)
    source, packed = read(llama), read(tmp_path / "q")
    base = "model.layers.1.mlp.up_proj"
    scales, biases = (packed[f"{base}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    restored = np.array(mx.dequantize(packed[f"{base}.weight"], scales, biases, 32, 4), np.float64)
    wanted = np.array(source[f"{base}.weight"], np.float64)
    error = np.linalg.norm(restored - wanted) / np.linalg.norm(wanted)
    layer = next(layer for layer in report.layers if layer.path == base.replace(".", "/"))
    assert layer.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_the_dtype_asked_for_is_that_of_scales_and_of_what_stays_float(dtype, llama, tmp_path):
    convert(llama, tmp_path / "q", dtype=dtype, progress=False)
    weights = read(tmp_path / "q")
    assert {str(a.dtype) for a in weights.values()} == {"mlx.core.uint32", f"mlx.core.{dtype}"}
    assert config_of(tmp_path / "q")["torch_dtype"] == dtype


def test_shards_and_index_load_in_stock_mlx_lm(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src", shards=3)
    convert(source, tmp_path / "q", max_shard_bytes=50_000, progress=False)
    whole = tiny_models.make_hf_model("llama", tmp_path / "src1")
    convert(whole, tmp_path / "one", progress=False)
    files = sorted(path.name for path in (tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "q" / name).stat().st_size < 60_000 for name in files)
    one, many = read(tmp_path / "one"), read(tmp_path / "q")
    assert one.keys() == many.keys() and all(mx.array_equal(one[name], many[name]) for name in one)
    mlx_lm.load(str(tmp_path / "q"))


def test_what_belongs_to_the_model_travels_along(llama, tmp_path):
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    (llama / "LICENSE").write_text("free")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (llama / "optimizer.pt").write_bytes(b"no")
    convert(llama, tmp_path / "q", progress=False)
    names = {str(path.relative_to(tmp_path / "q")) for path in (tmp_path / "q").rglob("*") if path.is_file()}
    assert names == {
        "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE",
        "additional_chat_templates/tool.jinja", "README.md",
    }  # fmt: skip


def test_pickled_weights_convert_to_the_same_files(llama, tmp_path):
    torch = pytest.importorskip("torch", reason="pickles of tensors need torch")
    convert(llama, tmp_path / "a", progress=False)
    state = {k: torch.from_numpy(np.array(v)) for k, v in read(llama).items()}
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    convert(llama, tmp_path / "b", progress=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "b" / "workspace").exists()


def test_code_of_the_checkpoint_runs_only_when_asked(llama, tmp_path):
    (llama / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    (llama / "config.json").write_text(json.dumps(config_of(llama) | {"model_file": "mine.py"}))
    with pytest.raises(ValueError, match="mine.py.*only with trust_remote_code"):
        convert(llama, tmp_path / "q", progress=False)
    assert not (tmp_path / "ran").exists()
    convert(llama, tmp_path / "q", trust_remote_code=True, progress=False)
    assert (tmp_path / "ran").exists()


# ---- inspect


def test_inspect_agrees_with_the_report_of_conversion(tmp_path):
    source = tiny_models.make_hf_model("qwen3_moe", tmp_path / "src", dtype="bfloat16")
    report = convert(source, tmp_path / "q", embedding_bits=8, progress=False)
    seen = inspect(tmp_path / "q")
    key = [
        (layer.path, layer.stored, layer.weights, layer.bytes)
        for layer in sorted(seen.layers, key=lambda x: x.path)
    ]
    assert key == [
        (x.path, x.stored, x.weights, x.bytes) for x in sorted(report.layers, key=lambda x: x.path)
    ]
    assert seen.total_bytes == sum(a.nbytes for a in read(tmp_path / "q").values())
    assert seen.parameters == sum(np.prod(shape) for shape in tiny_models.tensor_shapes("qwen3_moe").values())


@pytest.mark.parametrize("mode, stored", [("affine", "3-bit/128"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")])
def test_inspect_reads_models_of_mlx_lm_convert(mode, stored, llama, tmp_path):
    options = {"q_bits": 3, "q_group_size": 128} if mode == "affine" else {}
    mlx_lm.convert(str(llama), str(tmp_path / "stock"), quantize=True, q_mode=mode, **options)
    seen = inspect(tmp_path / "stock")
    assert {layer.stored for layer in seen.layers} == {stored, "float32"}
    assert seen.parameters == sum(np.prod(shape) for shape in tiny_models.tensor_shapes("llama").values())
    model = mlx_lm.load(str(tmp_path / "stock"))[0]
    assert seen.total_bytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def test_inspect_finds_mixed_widths_that_only_the_shapes_tell(llama, tmp_path):
    convert(llama, tmp_path / "q", rules=["lm_head=bits:2,group_size:128"], progress=False)
    config = config_of(tmp_path / "q")
    del config["quantization"]["lm_head"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    found = widths(tmp_path / "q")["lm_head"]
    # 2-bit/128 and 4-bit/64 have the same sizes
    assert Format(2, 128).bits * 128 == int(found[0]) * int(found.partition("/")[2])


# ---- memory

PEAK = """
    import sys, threading, time
    from pathlib import Path
    from mlxq.convert import convert

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    small, large, out, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    convert(small, out / "small", progress=False)  # every import is done
    before, peak, done = anonymous(), 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    report = convert(large, out / "large", max_shard_bytes=shard_bytes, progress=False)
    done = True
    thread.join()
    print(peak - before)
"""


def large_model(folder, arch: str, hidden: int, width: int, layers: int, experts: int = 0):
    """A random float16 model whose values cost nothing to draw: its bytes and its largest tensor's."""
    tiny_models.make_hf_model(arch, folder)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "head_dim": hidden // 8,
    }
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "torch_dtype": "float16"}
    sizes |= {"num_experts": experts, "moe_intermediate_size": width} if experts else {}
    (folder / "config.json").write_text(json.dumps(config_of(folder) | sizes))
    old = {"HIDDEN": hidden, "MLP": width, "HEADS": 8, "KV_HEADS": 8, "HEAD_DIM": hidden // 8}
    old |= {"EXPERTS": experts, "EXPERT_MLP": width} if experts else {}
    saved = {name: getattr(tiny_models, name) for name in old}
    try:
        for name, value in old.items():
            setattr(tiny_models, name, value)
        shapes = tiny_models.tensor_shapes(arch, layers)
    finally:
        for name, value in saved.items():
            setattr(tiny_models, name, value)
    block = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float16)
    tensors = {name: np.resize(block, shape) for name, shape in shapes.items()}
    tiny_models.write_safetensors(folder / "model.safetensors", tensors, "float16")
    stacked = {
        name: array.nbytes * (experts if ".experts." in name else 1) for name, array in tensors.items()
    }
    return sum(array.nbytes for array in tensors.values()), max(stacked.values())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="RssAnon is read from Linux's /proc")
@pytest.mark.parametrize(
    "arch, sizes", [("llama", (1024, 4096, 9)), ("qwen3_moe", (1024, 512, 4, 8))], ids=["llama", "qwen3_moe"]
)
def test_memory_stays_below_two_tensors_and_a_shard_whatever_the_size(arch, sizes, tmp_path):
    small = tiny_models.make_hf_model(arch, tmp_path / "small")
    large = tmp_path / "large"
    total, largest = large_model(large, arch, *sizes)
    shard_bytes = 16_000_000
    assert total > 4 * (2 * largest + shard_bytes)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), small, large, tmp_path / "out", str(shard_bytes)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(run.stdout)
    print(f"{arch}: peak {peak / 1e6:.1f} MB, tensor {largest / 1e6:.1f} MB, model {total / 1e6:.0f} MB")
    assert peak < 2 * largest + shard_bytes


# ---- interrupted half-way

SLOW = """
    import sys, time
    import mlxq.convert
    write = mlxq.convert._write

    def slow(step, *rest):
        layer = write(step, *rest)
        if step.name == "model.layers.0.mlp.up_proj.weight":
            print("half-way", flush=True)
            time.sleep(60)
        return layer

    mlxq.convert._write = slow
    mlxq.convert.convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGKILL), ids=["SIGINT", "SIGKILL"])
def test_a_signal_half_way_leaves_nothing_under_the_final_name(number, llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(llama), str(out / "q")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "half-way\n"
    partial = list(out.iterdir())
    assert len(partial) == 1 and partial[0].name.startswith(".q.partial-")
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert time.monotonic() - begin < 30
    process.stdout.close()
    assert not (out / "q").exists()
    assert [path.name for path in out.iterdir()] == [partial[0].name]
    convert(llama, out / "q", bits=3, progress=False)  # another conversion clears what the dead one left
    assert [path.name for path in out.iterdir()] == ["q"]
