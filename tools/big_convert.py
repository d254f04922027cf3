"""A checkpoint larger than the memory it may use: killed twice and resumed, it equals the whole run.

    python tools/big_convert.py --gigabytes 6 --max-memory 3GB

The model is a llama of random float16 blocks repeated to size, in shards of 1 GB. Every process of a
conversion is watched from outside: RssAnon of /proc, a hundred times a second. Writes
tools/results/big-convert-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny_models  # noqa: E402

HIDDEN, WIDTH, VOCABULARY = 2048, 8192, 32768
SHARD_BYTES = 1 << 30


def shapes(layers: int, hidden: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a llama with as many key heads as heads."""
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    found["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = (hidden,)
        for name in "qkvo":
            found[f"{at}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            found[f"{at}.mlp.{name}_proj.weight"] = (width, hidden)
        found[f"{at}.mlp.down_proj.weight"] = (hidden, width)
    return found


def make(
    folder: Path, size: int, hidden=HIDDEN, width=WIDTH, vocabulary=VOCABULARY, shard=SHARD_BYTES
) -> int:
    """Write the model, about `size` bytes of float16; the bytes written."""
    tiny_models.make_hf_model("llama", folder)
    (folder / "model.safetensors").unlink()
    layer = 2 * (4 * hidden * hidden + 3 * hidden * width)
    layers = max(1, round((size - 4 * vocabulary * hidden) / layer))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "head_dim": hidden // 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": vocabulary, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    block = (np.random.default_rng(0).standard_normal((1 << 20) + 7919) / 45).astype(np.float16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers, hidden, width, vocabulary).items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) + 2 * int(np.prod(shape)) > shard:
            shards.append({})
        shards[-1][name] = shape
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file_name)
        header, offset = {}, 0
        for name, shape in tensors.items():
            span = [offset, offset + 2 * int(np.prod(shape))]
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": span}
            offset = span[1]
        text = json.dumps(header).encode()
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor, shape in enumerate(tensors.values()):
                left, at = int(np.prod(shape)), 101 * (tensor + 1009 * number) % 7919
                while left:
                    piece = block[at : at + left]  # another start each time, so that few rows are equal
                    file.write(piece.data)
                    left, at = left - len(piece), (at + 13) % 7919
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


WORKING_BYTES = 100e6  # a conversion that holds as much has begun to work


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 when it has gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def convert(source: Path, target: Path, max_memory: str, kill_at: float | None = None) -> dict:
    """What was seen of `mlxq convert`, killed when its journal names this share of the tensors left."""
    command = [sys.executable, "-m", "mlxq", "convert", str(source), str(target), "--max-memory", max_memory]
    total = len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    begin, peak, before = time.monotonic(), 0, finished(target)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        at_work = peak > WORKING_BYTES and kill_at is not None
        if at_work and finished(target) >= before + kill_at * (total - before):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    said = process.stdout.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(said)
    killed = process.returncode == -signal.SIGKILL
    return {
        "killed": killed, "seconds": round(time.monotonic() - begin, 1), "peak_anonymous_bytes": peak,
        "tensors_in_journal": finished(target) if killed else total, "exists": target.exists(),
    }  # fmt: skip


def finished(target: Path) -> int:
    """Tensors that the journal beside target names."""
    logs = target.parent.glob(f".{target.name}.partial-*/journal-*.jsonl")
    return sum(max(0, log.read_text().count("\n") - 1) for log in logs)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model folder but its card, which tells its name and the time it took."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        with open(path, "rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def experiment(folder: Path, size: int, max_memory: str, kills=(0.3, 0.3), **dimensions) -> dict:
    """The whole experiment in an empty folder; raises SystemExit when something differs."""
    source_bytes = make(folder / "src", size, **dimensions)
    runs = [convert(folder / "src", folder / "killed", max_memory, kill_at) for kill_at in (*kills, None)]
    if [run["killed"] for run in runs] != [True, True, False] or runs[0]["exists"] or runs[1]["exists"]:
        raise SystemExit(f"the kills did not come when they should: {runs}")
    resumed = digests(folder / "killed")
    shutil.rmtree(folder / "killed")
    runs.append(convert(folder / "src", folder / "whole", max_memory))
    if digests(folder / "whole") != resumed:
        raise SystemExit("the resumed conversion differs from the uninterrupted one")
    written = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    sizes = {"source_bytes": source_bytes, "written_bytes": written}
    return sizes | {"runs": runs, "equal": True, "sha256": resumed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--max-memory", default="3GB")
    parser.add_argument("--folder", type=Path, help="where there is room for two and a half of it")
    args = parser.parse_args()
    from mlxq.checkpoint.memory import parse_bytes

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = experiment(Path(folder), int(args.gigabytes * 1e9), args.max_memory)
    revision = ["git", "rev-parse", "--short=9", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    result = {
        "tool": "big_convert", "date": today, "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "max_memory_bytes": parse_bytes(args.max_memory),
    } | result  # fmt: skip
    path = ROOT / "tools" / "results" / f"big-convert-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    peaks = ", ".join(f"{run['peak_anonymous_bytes'] / 1e6:.0f} MB" for run in result["runs"])
    print(f"{result['source_bytes'] / 1e9:.2f} GB: peaks {peaks}, equal; {path}")


if __name__ == "__main__":
    main()
