"""SmolLM2 quantized as a live model and shard by shard: the same bits, and memory that stays flat."""

import hashlib
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxq.checkpoint.embedded import embedded_gguf
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.convert import convert
from mlxq.ptq import plan, quantize_model

RULES = [".*_proj=weight_qtype:int8,act_qtype:int8", ".*embed_tokens=weight_qtype:int4,tile_size:32"]
SHARD_BYTES = 40_000_000

# Quantizes a checkpoint one tensor at a time and prints what memory that took, beyond what was there before.
STREAM = """
import hashlib, json, sys, threading, time
from pathlib import Path
import mlx.core as mx, numpy as np
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.ptq import plan, quantize_params

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

folder, rules = Path(sys.argv[1]), json.loads(sys.argv[2])
made = plan(Skeleton(json.loads((folder / "config.json").read_text()), folder).model, rules)
before, peak, done, digests, largest = anonymous(), 0, False, {}, 0

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
for shard in sorted(folder.glob("model*.safetensors")):
    arrays = mx.load(str(shard))
    for name in list(arrays):
        array = arrays.pop(name)
        largest = max(largest, array.nbytes)
        for out, value in quantize_params({name: array}, made).items():
            mx.eval(value)
            digests[out] = hashlib.sha256(np.array(value.reshape(-1).view(mx.uint8))).hexdigest()
    del arrays, array, value
    mx.clear_cache()
done = True
thread.join()
print(json.dumps({"peak": peak - before, "largest": largest, "digests": digests}))
"""


def test_smollm2_streamed_shard_by_shard_is_the_quantized_model_to_the_bit(tmp_path):
    try:
        gguf = embedded_gguf()
    except ImportError as error:
        pytest.skip(str(error))
    folder = tmp_path / "smollm2"
    convert(
        gguf, folder, dtype="bfloat16", rules=[".*=bits:none"], max_shard_bytes=SHARD_BYTES, progress=False
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    run = [sys.executable, "-c", STREAM, str(folder), json.dumps(RULES)]
    out = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    from mlx_lm.utils import load_model

    model = quantize_model(load_model(folder)[0], RULES)
    want = {
        name: hashlib.sha256(np.array(a.reshape(-1).view(mx.uint8))).hexdigest()
        for name, a in tree_flatten(model.parameters())
    }
    assert out["digests"] == want and len(plan(_skeleton(folder), RULES)) == 211
    # One tensor, its codes and scales, a copy of these, slabs of 1 M weights in float32: not the model.
    assert (
        out["peak"]
        < 2.5 * out["largest"] + 64e6
        < sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    )
    print(f"peak {out['peak'] / 1e6:.0f} MB for a largest tensor of {out['largest'] / 1e6:.0f} MB")


def _skeleton(folder):
    return Skeleton(json.loads((folder / "config.json").read_text()), folder).model
