"""`mlxq parity` on SmolLM2-135M at 2, 4 and 8 bits and with 8-bit activations; then with one bit flipped.

    python tools/parity_smollm2.py [--kinds 2,4,8,w8a8] [--tokens 16]

Writes tools/results/parity-<date>.json: of each certificate all but the layers, of which the worst stay.
The weights are those of the GGUF that comes with mlxq, decoded and quantized again; w8a8 is per row, with
per-token activations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

import mlxq
from mlxq import ops, parity
from mlxq.checkpoint.embedded import embedded_gguf
from mlxq.checkpoint.q8 import save
from mlxq.convert import convert
from mlxq.nn.q8 import mlx as q8
from mlxq.parity import backends, report

RESULTS = Path(__file__).resolve().parent / "results"
FLIPPED = "model.layers.17.mlp.down_proj"


def make(kind: str, root: Path) -> Path:
    """A model folder of this kind."""
    folder = root / kind
    convert(embedded_gguf(), root / "made" / kind, bits=8 if kind == "w8a8" else int(kind), group_size=64)
    if kind != "w8a8":
        return root / "made" / kind
    model, tokenizer, config = mlxq.load(root / "made" / kind, return_config=True)
    floats = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            floats[path] = nn.Linear(1, 1, "bias" in layer)
            floats[path].weight = ops.dequantize(layer.packed)
    model.update_modules(tree_unflatten(list(floats.items())))
    q8.replace_linears(model, activation="token", weight_scales="row")
    save(model, tokenizer, config, folder)
    return folder


def summary(found: dict) -> dict:
    """A certificate without its layers and top logits."""
    kept = {key: value for key, value in found.items() if key not in ("reference", "backends", "model")}
    kept["backends"] = {}
    for name, backend in found["backends"].items():
        short = {key: value for key, value in backend.items() if key not in ("layers", "top")}
        label = max(backend["layers"], key=lambda k: report.worst({"layers": {k: backend["layers"][k]}}))
        short["worst_layer"] = {"layer": label} | backend["layers"][label]
        kept["backends"][name] = short
    return kept


def flip_one_bit(folder: Path, ids: list[int]) -> dict:
    """What parity says of a back end with the lowest bit of one code of one layer flipped."""
    model, _ = mlxq.load(folder)
    parity.set_dtype(model, "float32")
    reference = parity.Reference(model, ids)
    reference.noise_differences()
    layer = dict(model.named_modules())[FLIPPED]
    words = np.array(layer.weight)
    words[100, 50] ^= np.uint32(1)
    layer.weight = mx.array(words)
    spoilt = backends.mlx_backend("spoilt", model, mx.cpu, "float32", ops.isa_levels()[-1])
    found = parity.examine(reference, spoilt, len(ids) - 1)
    return {"layer": FLIPPED, "logits": found["logits"], "faults": found["faults"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default="2,4,8,w8a8")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    date = datetime.date.today().isoformat()
    result = {"tool": "parity_smollm2", "date": date, "commit": commit, "kinds": {}}
    root = Path(tempfile.mkdtemp())
    try:
        for kind in args.kinds.split(","):
            folder = make(kind, root)
            found = parity.certify(folder, tokens=args.tokens, say=lambda text: None)
            print(kind, found["verdict"], found["seconds"], report.faults(found)[:5], flush=True)
            result["kinds"][kind] = summary(found)
            if kind == "4":
                result["flipped"] = flip_one_bit(folder, found["tokens"]["ids"])
                print(result["flipped"]["faults"], flush=True)
    finally:
        shutil.rmtree(root)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"parity-{date}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
