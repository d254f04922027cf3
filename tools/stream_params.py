"""What memory quantize_params takes: SmolLM2's shards, one tensor at a time, in a process that is watched.

    python tools/stream_params.py

Writes tools/results/stream-params-<date>.json: the most anonymous memory (RssAnon of /proc) beyond what the
process had before, the largest tensor, and a digest of every array that came out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RULES = [".*_proj=weight_qtype:int8,act_qtype:int8", ".*embed_tokens=weight_qtype:int4,tile_size:32"]
SHARD_BYTES = 40_000_000


def make(folder: Path) -> None:
    """Write the SmolLM2 that comes with mlxq as shards of bfloat16; FileNotFoundError where there is none."""
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    settings = {"dtype": "bfloat16", "rules": [".*=bits:none"], "max_shard_bytes": SHARD_BYTES}
    convert(embedded_gguf(), folder, progress=False, **settings)


def digest(array: mx.array) -> str:
    return hashlib.sha256(np.array(array.reshape(-1).view(mx.uint8))).hexdigest()


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def stream(folder: Path) -> dict:
    """Quantize the folder's shards tensor by tensor, in this process: peak_bytes, largest_bytes, digests."""
    from mlxq.checkpoint.skeleton import Skeleton
    from mlxq.ptq import plan, quantize_params

    made = plan(Skeleton(json.loads((folder / "config.json").read_text()), folder).model, RULES)
    before, peak, done, digests, largest = anonymous(), 0, threading.Event(), {}, 0

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    for shard in sorted(folder.glob("model*.safetensors")):
        arrays = mx.load(str(shard))
        for name in list(arrays):
            array = arrays.pop(name)
            largest = max(largest, array.nbytes)
            for out, value in quantize_params({name: array}, made).items():
                mx.eval(value)
                digests[out] = digest(value)
        del arrays, array, value
        mx.clear_cache()
    seconds = time.monotonic() - begin
    done.set()
    thread.join()
    source = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    found = {"peak_bytes": peak - before, "largest_bytes": largest, "source_bytes": source}
    return found | {"seconds": round(seconds, 1), "digests": digests}


def measured(folder: Path) -> dict:
    """What stream gives in a fresh process."""
    run = [sys.executable, __file__, str(folder)]
    return json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(stream(Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "smollm2"
        make(folder)
        found = measured(folder)
    digests = found.pop("digests")
    together = hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
    revision = ["git", "rev-parse", "--short=9", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    today = datetime.date.today().isoformat()
    result = {"tool": "stream_params", "date": today, "commit": commit, "rules": RULES}
    result |= found | {"arrays": len(digests), "sha256": together}
    path = ROOT / "tools" / "results" / f"stream-params-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"peak {found['peak_bytes'] / 1e6:.0f} MB of {found['source_bytes'] / 1e6:.0f} MB; {path}")


if __name__ == "__main__":
    main()
