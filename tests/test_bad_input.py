"""Files and arguments that cannot be converted: one clear error each, and nothing under the final name."""

import errno
import json
import os
import struct
import subprocess
import sys
import textwrap

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxq.checkpoint.gguf import Gguf
from mlxq.convert import convert, inspect


@pytest.fixture
def source(tmp_path):
    return tiny_models.make_hf_model("llama", tmp_path / "src")


def refuse(source, tmp_path, error, said, **options):
    """Convert must raise this error, say this, and leave nothing beside the source."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "q", progress=False, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(list(tensors.values()))
    edit(tensors)
    mx.save_safetensors(str(file), tensors)


# ---- arguments


@pytest.mark.parametrize(
    "options, said",
    [
        ({"bits": 7}, "7-bit groups of 64 do not exist"),
        ({"bits": 0}, "0-bit groups of 64 do not exist"),
        ({"group_size": 48}, "4-bit groups of 48 do not exist"),
        ({"embedding_bits": 9}, "9-bit groups of 64 do not exist"),
        ({"dtype": "float64"}, "dtype 'float64' does not exist; built: float32, float16, bfloat16"),
        ({"quantization_rule": "best"}, "no quantization rule 'best'; built: affine, mlx"),
        ({"rules": ["lm_head"]}, "a rule is written PATTERN=bits:8"),
        ({"max_shard_bytes": 0}, "shards of 0 bytes"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(options, said, tmp_path):
    refuse(tmp_path / "is not looked at", tmp_path, ValueError, said, **options)


def test_a_destination_that_exists_is_kept(source, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text("precious")
    refuse(source, tmp_path, FileExistsError, "choose another name, remove it, or use --overwrite")
    assert (tmp_path / "q" / "config.json").read_text() == "precious"
    convert(source, tmp_path / "q", overwrite=True, progress=False)
    assert inspect(tmp_path / "q").parameters


def test_the_source_is_not_overwritten_by_itself(source):
    with pytest.raises(ValueError, match="is or holds the source"):
        convert(source, source, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="is or holds the source"):
        edit_config(source)
        (source.parent / "config.json").write_text("{}")
        convert(source, source.parent, overwrite=True, progress=False)
    assert (source / "model.safetensors").exists()


# ---- a path instead of a hub id and the reverse


@pytest.mark.parametrize(
    "name",
    [
        "./no/such/folder",
        "/no/such/folder",
        "a/b/c",
        "no such model",
        "model.gguf",
        "x/model.safetensors",
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would raise
    refuse(name, tmp_path, FileNotFoundError, "no such file or folder, and not a hub id")


def test_a_hub_id_without_a_network_is_one_sentence(tmp_path):
    code = "from mlxq.convert import convert; convert('someone/some-model', 'q', progress=False)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "FileNotFoundError: someone/some-model: no such folder, and the Hugging Face hub is out of reach"
    )


def test_one_file_of_a_model_names_the_folder_to_give(source, tmp_path):
    refuse(source / "model.safetensors", tmp_path, ValueError, f"give its folder, {source}")
    refuse(source / "config.json", tmp_path, ValueError, f"give its folder, {source}")


def test_a_folder_that_is_no_model_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path, FileNotFoundError, "not a model folder: it has no config.json")
    (tmp_path / "empty" / "tiny.Q4_0.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "empty", tmp_path, FileNotFoundError, "it holds tiny.Q4_0.gguf: give that file")


# ---- config.json


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": "llama"', "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_broken_json_is_named(name, content, source, tmp_path):
    (source / name).write_text(content)
    refuse(source, tmp_path, ValueError, name)


def test_an_unknown_architecture_names_near_ones(source, tmp_path):
    edit_config(source, model_type="qwen3_mo")
    refuse(source, tmp_path, ValueError, "has no model of type 'qwen3_mo' (")
    refuse(source, tmp_path, ValueError, "near names: qwen3_moe")
    edit_config(source, model_type=None)
    refuse(source, tmp_path, ValueError, "has no model_type")
    edit_config(source, model_type=["llama"])
    refuse(source, tmp_path, ValueError, "has no model_type")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "2"},
        {"vocab_size": 0},  # mlx-lm asserts
    ],
)
def test_a_configuration_that_makes_no_model_says_so(changes, source, tmp_path):
    edit_config(source, **changes)
    refuse(source, tmp_path, ValueError, "config.json makes no llama")


@pytest.mark.parametrize(
    "block", [{"quant_method": "hqq"}, {"bits": 4}, "gptq", [4], {"quant_method": ["awq"]}]
)
def test_a_source_quantized_in_an_unknown_way_is_refused(block, source, tmp_path):
    edit_config(source, quantization_config=block)
    refuse(source, tmp_path, ValueError, "config.json")


# ---- tensors


@pytest.mark.parametrize("keep", [0, 7, 100, -1000, -1])
def test_a_truncated_safetensors_file_is_named(keep, source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(source, tmp_path, ValueError, "model.safetensors: ")


def test_a_missing_tensor_is_named(source, tmp_path):
    edit_tensors(source, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(source, tmp_path, ValueError, "tensors are missing: model.layers.1.mlp.up_proj.weight")


def test_a_missing_expert_is_named(tmp_path):
    source = tiny_models.make_hf_model("mixtral", tmp_path / "src")
    edit_tensors(source, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    refuse(source, tmp_path, ValueError, "model.layers.1.block_sparse_moe.experts.2.w1.weight")


def test_an_expert_of_another_shape_is_refused(tmp_path):
    source = tiny_models.make_hf_model("qwen3_moe", tmp_path / "src")
    edit_tensors(
        source, lambda t: t.update({"model.layers.1.mlp.experts.2.up_proj.weight": mx.zeros((64, 128))})
    )
    refuse(source, tmp_path, ValueError, "mlx-lm cannot arrange the checkpoint's tensors")


def test_a_tensor_too_many_is_named(source, tmp_path):
    edit_tensors(source, lambda t: t.update({"model.layers.2.extra.weight": mx.zeros((2, 2))}))
    refuse(source, tmp_path, ValueError, "tensors that the model does not have: model.layers.2.extra.weight")


def test_a_tensor_of_another_shape_is_named(source, tmp_path):
    edit_tensors(source, lambda t: t.update({"model.norm.weight": mx.zeros((64,))}))
    refuse(source, tmp_path, ValueError, "model.norm.weight has shape (64,) but config.json asks for (128,)")


def test_a_zero_size_tensor_is_named(source, tmp_path):
    edit_tensors(source, lambda t: t.pop("model.norm.weight"))
    tensors = {k: np.array(v) for k, v in mx.load(str(source / "model.safetensors")).items()}
    tensors["model.norm.weight"] = np.zeros((0,), np.float32)
    tiny_models.write_safetensors(source / "model.safetensors", tensors, "float32")
    refuse(source, tmp_path, ValueError, "zero-size tensors: model.norm.weight")


def test_shards_and_index_must_agree(tmp_path):
    source = tiny_models.make_hf_model("llama", tmp_path / "src", shards=2)
    index, first = source / "model.safetensors.index.json", source / "model-00001-of-00002.safetensors"
    good, bytes_of_first = index.read_text(), first.read_bytes()
    first.unlink()
    refuse(
        source, tmp_path, FileNotFoundError, "names model-00001-of-00002.safetensors, which does not exist"
    )
    index.unlink()
    refuse(source, tmp_path, FileNotFoundError, "holds 1 of 2 shards")
    first.write_bytes(bytes_of_first)
    content = json.loads(good)
    content["weight_map"]["model.norm.weight"] = "../model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refuse(source, tmp_path, ValueError, "which is not a file name")
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    other -= {json.loads(good)["weight_map"]["model.norm.weight"]}
    content["weight_map"]["model.norm.weight"] = other.pop()
    index.write_text(json.dumps(content))
    refuse(source, tmp_path, ValueError, "the index says that model.norm.weight is in")
    index.write_text(json.dumps({"weight_map": {"a": 1}}))
    refuse(source, tmp_path, ValueError, "has no weight_map")
    index.write_text(json.dumps({"weight_map": {}}))
    refuse(source, tmp_path, ValueError, "names no tensor")
    index.write_text(good)
    (source / "model-00002-of-00002.safetensors").write_bytes(bytes_of_first)
    refuse(source, tmp_path, ValueError, "in another shard too")


def test_a_folder_without_weights_says_which_files_are_wanted(source, tmp_path):
    (source / "model.safetensors").unlink()
    refuse(source, tmp_path, FileNotFoundError, "no model*.safetensors and no pytorch_model*.bin")


# ---- values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_and_inf_are_refused_by_layer_unless_asked_for(name, value, source, tmp_path):
    def spoil(tensors):
        flat = tensors[name].reshape(-1)
        flat[77] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    edit_tensors(source, spoil)
    layer = name if name == "model.norm.weight" else name.removesuffix(".weight")
    refuse(source, tmp_path, ValueError, f"{layer}: NaN or Inf in the weights (rows 0 to ")
    refuse(source, tmp_path, ValueError, "--allow-nonfinite keeps such layers in float")
    report = convert(source, tmp_path / "q", allow_nonfinite=True, progress=False)
    assert report.kept_float == {layer.replace(".", "/"): "it holds NaN or Inf"}
    assert np.isfinite(report.relative_error)
    kept = np.array(mx.load(str(tmp_path / "q" / "model.safetensors"))[name])
    assert np.array_equal(kept.reshape(-1)[77], value, equal_nan=True) and not np.isfinite(kept).all()


def test_values_that_the_dtype_cannot_hold_are_refused(source, tmp_path):
    edit_tensors(source, lambda t: t.update({"model.norm.weight": mx.full((128,), 1e5)}))
    refuse(source, tmp_path, ValueError, "model.norm.weight: 100000 is too much for float16", dtype="float16")


def test_scales_that_the_dtype_cannot_hold_are_refused(source, tmp_path):
    edit_tensors(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 1e6}))
    refuse(source, tmp_path, ValueError, "lm_head: ", dtype="float16")
    convert(source, tmp_path / "q", dtype="bfloat16", progress=False)


# ---- the disk


def test_a_disk_too_small_is_refused_before_writing(source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuse(source, tmp_path, OSError, "are needed and 10 kB are free")


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, monkeypatch):
    written = []

    def full(descriptor, data, at, pwrite=os.pwrite):
        if sum(written) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(pwrite(descriptor, data, at))
        return written[-1]

    monkeypatch.setattr(os, "pwrite", full)
    refuse(
        source, tmp_path, OSError, "no space left on the device (No space left on device); nothing was kept"
    )
    assert written


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk_is_refused_and_stays_empty_when_it_fills_all_the_same(source, small_disk, monkeypatch):
    import shutil

    refuse(source, small_disk, OSError, "are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    refuse(
        source, small_disk, OSError, "no space left on the device (No space left on device); nothing was kept"
    )


def test_a_file_size_limit_leaves_nothing(source, tmp_path):
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        from mlxq.convert import convert
        try:
            convert(sys.argv[1], sys.argv[2], progress=False)
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(source), str(tmp_path / "q")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no space left on the device (File too large)" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# ---- GGUF


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def small_gguf(
    tensors: bytes = b"", count: int = 0, keys: bytes = b"", key_count: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors


def tensor_info(name=b"token_embd.weight", shape=(32, 2), kind=0, offset=0) -> bytes:
    dims = b"".join(struct.pack("<Q", n) for n in shape)
    return gguf_string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


ARRAY = gguf_string(b"k") + struct.pack("<IIQ", 9, 4, 2**60)
STRINGS = gguf_string(b"k") + struct.pack("<IIQ", 9, 8, 2**60)
ARCH = gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(b"llama")
ALIGN = gguf_string(b"general.alignment") + struct.pack("<II", 4, 0)

BAD_GGUF = {
    "empty": (b"", "too few for a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(40), "is not a GGUF file: it starts with"),
    "version 1": (small_gguf(version=1) + bytes(8), "GGUF version 1"),
    "big-endian": (small_gguf(version=3 << 24) + bytes(8), "little-endian"),
    "2^60 numbers": (small_gguf(keys=ARRAY, key_count=1) + bytes(64), "truncated"),
    "2^60 strings": (small_gguf(keys=STRINGS, key_count=1) + bytes(64), "truncated"),
    "2^60 keys": (small_gguf(key_count=2**60) + bytes(64), "metadata of unknown type|truncated|two"),
    "2^60 tensors": (small_gguf(count=2**60) + bytes(64), "axes"),
    "a name that is not UTF-8": (small_gguf(tensor_info(b"\xff\xfe"), 1) + bytes(512), "not UTF-8"),
    "a type that does not exist": (small_gguf(tensor_info(kind=999), 1) + bytes(512), "unknown type 999"),
    "outside the file": (small_gguf(tensor_info(offset=4096), 1) + bytes(512), "truncated"),
    "2^62 rows": (small_gguf(tensor_info(shape=(32, 2**62)), 1) + bytes(512), "truncated"),
    "seven axes": (small_gguf(tensor_info(shape=(1,) * 7), 1) + bytes(512), "7 axes"),
    "zero rows": (
        small_gguf(tensor_info(shape=(32, 0)), 1) + bytes(512),
        "zero-size tensors: token_embd.weight",
    ),
    "half a block": (small_gguf(tensor_info(shape=(48, 2), kind=2), 1) + bytes(512), "blocks of 32"),
    "a name twice": (small_gguf(tensor_info() * 2, 2) + bytes(512), "two tensors are named"),
    "alignment 0": (small_gguf(keys=ALIGN, key_count=1) + bytes(512), "not a power of two"),
    "no architecture": (
        small_gguf(tensor_info(), 1) + bytes(512),
        "GGUF architecture None is not built; built: llama",
    ),
    "no embedding": (
        small_gguf(keys=ARCH, key_count=1) + bytes(64),
        "tensors are missing: token_embd.weight",
    ),
    "no head count": (small_gguf(tensor_info(), 1, ARCH, 1) + bytes(512), "lacks llama.attention.head_count"),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_a_lying_gguf_is_refused_at_once(name, tmp_path):
    content, said = BAD_GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="|".join(said.split("|"))) as caught:
        convert(path, tmp_path / "q", progress=False)
    assert "model.gguf" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_is_refused_or_read(data, tmp_path):
    keys = ARCH + gguf_string(b"n") + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
    good = bytearray(small_gguf(tensor_info() + tensor_info(b"b", (32, 4), 8), 2, keys, 2) + bytes(700))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 700))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    try:
        file = Gguf(path)
    except ValueError:
        return
    assert all(block.rows.nbytes <= len(good) for block in file.tensors.values())


# ---- inspect


def test_inspect_refuses_what_convert_refuses(source, tmp_path):
    for path, error, said in (
        (tmp_path / "nothing", FileNotFoundError, "does not exist"),
        (tmp_path, FileNotFoundError, "config.json"),
        (source / "tokenizer.json", ValueError, "is not a GGUF file"),
    ):
        with pytest.raises(error) as caught:
            inspect(path)
        assert said in str(caught.value)
    convert(source, tmp_path / "q", max_shard_bytes=50_000, progress=False)
    next((tmp_path / "q").glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match="which is not there"):
        inspect(tmp_path / "q")


@pytest.mark.parametrize("lie", [[1], "affine", 4])
def test_inspect_refuses_a_quantization_block_that_is_none(lie, source, tmp_path):
    convert(source, tmp_path / "q", progress=False)
    edit_config(tmp_path / "q", quantization=lie)
    with pytest.raises(ValueError, match="q/config.json: quantization is .*, not a JSON object"):
        inspect(tmp_path / "q")


@pytest.mark.parametrize("lie", ["4", [], {}, 0, 2.5, None])
def test_inspect_believes_the_arrays_where_the_configuration_lies(lie, source, tmp_path):
    convert(source, tmp_path / "q", bits=3, group_size=32, progress=False)  # no other format has these shapes
    true = inspect(tmp_path / "q").groups()
    edit_config(tmp_path / "q", quantization={"bits": lie, "group_size": lie})
    assert inspect(tmp_path / "q").groups() == true


def test_inspect_refuses_scales_that_fit_no_format(source, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    convert(source, tmp_path / "q", progress=False)
    edit_tensors(tmp_path / "q", lambda t: t.update({f"{name}.scales": t[f"{name}.scales"][:, :3]}))
    with pytest.raises(ValueError, match="down_proj: .* fit no format"):
        inspect(tmp_path / "q")
