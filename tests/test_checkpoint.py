"""Files on disk: the header check, the streaming writer, folders that appear whole, and the tiny models."""

import contextlib
import fcntl
import json
import os
import pickle
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint, read_config, unpickle
from mlxq.checkpoint.partial import partial_folder
from mlxq.checkpoint.safetensors import Planned, Writer, as_stored, read_header


def write_header(path, header: dict | bytes, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


GOOD = {"a": entry(), "b": entry("F16", (2, 2), (8, 16)), "__metadata__": {"format": "mlx"}}

LIES = {
    "no header": (b"", None, "too few"),
    "header longer than the file": (dict(GOOD), 10**6, "claims 1000000 bytes"),
    "header of 2^63": (dict(GOOD), 2**63, "truncated, or not safetensors"),
    "not JSON": (b"{'a': 1}", None, "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', None, "is not JSON"),
    "a list": (b"[]", None, "not a JSON object"),
    "a string entry": ({"a": "F32"}, None, "tensor a has dtype 'F32'"),
    "unknown dtype": ({"a": entry("F7")}, None, "tensor a has dtype 'F7'"),
    "negative shape": ({"a": entry(shape=(-2,))}, None, "not lists of counts"),
    "fractional shape": ({"a": entry(shape=(2.0,))}, None, "not lists of counts"),
    "boolean shape": ({"a": entry(shape=(True, True))}, None, "not lists of counts"),
    "three offsets": ({"a": entry(span=(0, 8, 16))}, None, "not lists of counts"),
    "outside the file": ({"a": entry(shape=(400,), span=(0, 1600))}, None, "truncated"),
    "backwards": ({"a": entry(span=(8, 0))}, None, "truncated"),
    "wrong size for the dtype": ({"a": entry("F64", span=(0, 8))}, None, "needs 16 bytes, has 8"),
    "shape beyond 2^63": ({"a": entry(shape=(2**62, 2**62))}, None, "needs"),
    "overlap": ({"a": entry(), "b": entry(span=(4, 12))}, None, "b overlaps a"),
    "gap": ({"a": entry(), "b": entry(span=(12, 20))}, None, "b leaves a gap after a"),
    "bytes after the last": ({"a": entry()}, None, "8 bytes follow the last tensor"),
    "metadata that is a list": (dict(GOOD) | {"__metadata__": [1]}, None, "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_safetensors_header_is_refused(lie, tmp_path):
    header, length, said = LIES[lie]
    path = tmp_path / "model.safetensors"
    write_header(path, header, bytes(20 if lie == "gap" else 16), length)
    if lie == "no header":
        path.write_bytes(b"1234")
    with pytest.raises(ValueError, match="model.safetensors") as caught:
        read_header(path)
    assert said in str(caught.value)


def test_a_true_header_is_read_without_reading_tensors(tmp_path):
    entries, metadata = read_header(write_header(tmp_path / "m.safetensors", GOOD, bytes(16)))
    assert metadata == {"format": "mlx"}
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in entries.items()} == {
        "a": ("F32", (2,), 8),
        "b": ("F16", (2, 2), 8),
    }


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_as_what_it_says(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    good = bytearray(write_header(path, GOOD, bytes(range(16))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 17))] = data.draw(st.integers(0, 255))
    path.write_bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    with contextlib.suppress(ValueError):
        for e in read_header(path)[0].values():
            assert e.end <= path.stat().st_size


def test_bytes_are_stored_as_mlx_rounds_them():
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    for dtype in ("float32", "float16", "bfloat16"):
        theirs = mx.array(values).astype(getattr(mx, dtype))
        raw = np.array(theirs.view(mx.uint32 if dtype == "float32" else mx.uint16))
        assert as_stored(values, dtype).tobytes() == raw.tobytes()


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (3000, 3), (1, 5)])
def test_mlx_reads_what_was_written_piece_by_piece(shard_bytes, files, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"layer.{n}.weight": rng.integers(0, 2**32, (n + 1, 100), dtype=np.uint32) for n in range(5)}
    plan = [Planned(name, "U32", array.shape) for name, array in tensors.items()]
    with Writer(tmp_path, plan, shard_bytes, parameters=1500) as writer:
        for name, array in tensors.items():
            for row in array:
                writer.write(name, row)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    wanted = (
        ["model.safetensors"]
        if files == 1
        else [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)]
    )
    assert names == wanted
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 6000, "total_parameters": 1500}
    for name, array in tensors.items():
        shard, metadata = mx.load(str(tmp_path / index["weight_map"][name]), return_metadata=True)
        assert metadata == {"format": "mlx"}
        assert np.array_equal(np.array(shard[name]), array)


def test_a_tensor_that_was_not_finished_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="not written"):
        with Writer(tmp_path, [Planned("a", "F32", (4,))], 100, parameters=4) as writer:
            writer.write("a", np.zeros(3, np.float32))


# ---- folders


def test_a_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    with partial_folder(tmp_path / "dst") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "dst").exists()
        assert folder.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    assert (tmp_path / "dst" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_when_the_block_raises(error, tmp_path):
    with pytest.raises(error):
        with partial_folder(tmp_path / "dst") as folder:
            (folder / "file").write_text("x")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_name_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError, match="choose another name, remove it, or use --overwrite"):
        with partial_folder(tmp_path / "dst"):
            pass
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        with partial_folder(tmp_path / "dangling"):
            pass


def test_overwriting_replaces_a_model_only_at_the_end_and_nothing_else(tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "config.json").write_text("old")
    with contextlib.suppress(RuntimeError), partial_folder(dst, overwrite=True):
        raise RuntimeError
    assert (dst / "config.json").read_text() == "old"
    with partial_folder(dst, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (dst / "config.json").read_text() == "old"
    assert (dst / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not a model folder"):
        with partial_folder(home, overwrite=True):
            pass


def test_a_name_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="appeared while"):
        with partial_folder(tmp_path / "dst"):
            (tmp_path / "dst").mkdir()
            (tmp_path / "dst" / "theirs").write_text("x")
    assert (tmp_path / "dst" / "theirs").exists()


def test_leavings_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    dead, living, other = (
        tmp_path / name for name in (".dst.partial-1", ".dst.partial-2", ".dst2.partial-1")
    )
    for folder in (dead, living, other):
        folder.mkdir()
        (folder / "file").write_text("x")
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with partial_folder(tmp_path / "dst"):
        assert not dead.exists() and living.exists() and other.exists()
    os.close(lock)


# ---- Hugging Face folders


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_tiny_models_are_what_transformers_saves(arch, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers loads models with torch only")
    import mlx_lm
    from transformers import AutoModelForCausalLM

    folder = tiny_models.make_hf_model(arch, tmp_path / "src")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    ids = [[1, 5, 9, 30, 2, 77, 100]]
    ours = np.array(mlx_lm.load(str(folder))[0](mx.array(ids)))
    theirs = model(torch.tensor(ids)).logits.detach().numpy()
    # float32 in both; Gemma's embedding factor is a bfloat16 constant in mlx-lm (2^-9 of the activations)
    assert np.abs(ours - theirs).max() < (2e-3 if arch == "gemma3_text" else 2e-5)


def test_the_nested_rope_settings_of_transformers_5_reach_mlx_lm(tmp_path):
    folder = tiny_models.make_hf_model("llama", tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    read = read_config(folder)
    assert read["rope_theta"] == 500000.0
    assert read["rope_scaling"]["type"] == "linear" and read["rope_scaling"]["factor"] == 4.0


def test_the_dtype_is_that_of_most_weights(tmp_path):
    folder = tiny_models.make_hf_model("llama", tmp_path / "src", dtype="bfloat16")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {k: v.astype(mx.float32) if v.ndim == 1 else v for k, v in tensors.items()},
    )
    assert HuggingFaceCheckpoint(folder).float_dtype() == "bfloat16"


def test_pickled_tensors_become_safetensors(tmp_path):
    torch = pytest.importorskip("torch", reason="pickles of tensors need torch")
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 8, generator=generator)
    state = {
        "a": whole.to(torch.bfloat16),
        "b": whole[:, ::2],
        "c": whole[2:3].half(),
        "n": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    for old in (False, True):
        torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=not old)
        loaded = mx.load(str(unpickle(tmp_path / "m.bin", tmp_path / "m.safetensors")))
        assert loaded.keys() == state.keys()
        assert read_header(tmp_path / "m.safetensors")[0]["empty"].shape == (0, 4)
        for name, tensor in state.items():
            assert loaded[name].shape == tuple(tensor.shape)
            assert np.array_equal(np.array(loaded[name].astype(mx.float32)), tensor.float().numpy())


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    pytest.importorskip("torch", reason="pickles of tensors need torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for number, content in enumerate((pickle.dumps({"a": Evil()}, protocol=2), b"not a pickle", b"")):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{number}.bin does not load as a pickle of plain tensors"):
            unpickle(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_without_torch_says_how_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from mlxq.checkpoint.huggingface import unpickle\n"
        "unpickle(Path('x.bin'), Path('y'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr.strip().endswith("x.bin is a pickle, which only torch reads: pip install 'mlxq[torch]'")
