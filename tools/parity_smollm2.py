"""`mlxq parity` on SmolLM2-135M at 2, 4 and 8 bits and with 8-bit activations; then with one bit flipped.

    python tools/parity_smollm2.py [--kinds 2,4,8,w8a8] [--tokens 16] [--backends avx512,torch,cuda]

Writes tools/results/parity-<date>.json, or parity-cuda-<date>.json with cuda among --backends: of each
certificate all but the layers, of which the worst stay. "best" among them is the best family of CPU kernels.
The bit is flipped in the weights of the last of --backends that torch has, else of the best family; with cuda
at each width. What does not run is in "refused", with the sentence that says why.
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


def flip_one_bit(folder: Path, ids: list[int], device: str | None) -> dict:
    """What parity says of a back end with the lowest bit of one code of one layer flipped.

    device   torch's; None: MLX on the CPU
    """
    model, _ = mlxq.load(folder)
    parity.set_dtype(model, "float32")
    with mx.stream(mx.cpu):
        reference = parity.Reference(model, ids)
        reference.noise_differences()
    if device is None:
        layer = dict(model.named_modules())[FLIPPED]
        words = np.array(layer.weight)
        words[100, 50] ^= np.uint32(1)
        layer.weight = mx.array(words)
        spoilt = backends.mlx_backend("spoilt", model, mx.cpu, "float32", ops.isa_levels()[-1])
    else:
        from mlxq.parity.torch import TorchModel

        other = TorchModel(folder, device, "float32")
        other.modules[FLIPPED].weight[100, 50] ^= 1
        spoilt = backends.Backend(f"spoilt {device}", other.layer, other.forward)
    found = parity.examine(reference, spoilt, len(ids) - 1)
    return {"layer": FLIPPED, "backend": spoilt.name, "logits": found["logits"], "faults": found["faults"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default="2,4,8,w8a8")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--backends", help="only these; default: all that run here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = args.backends and [ops.isa_levels()[-1] if n == "best" else n for n in args.backends.split(",")]
    device = next((d for n, d in (("cuda", "cuda"), ("torch", "cpu")) if n in (names or ())), None)
    flipped_kinds = args.kinds.split(",") if device == "cuda" else ["4"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    date = datetime.date.today().isoformat()
    result = {"tool": "parity_smollm2", "date": date, "commit": commit, "kinds": {}}
    result |= {"flipped": {}, "refused": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"parity-{'cuda-' if device == 'cuda' else ''}{date}.json"
    root = Path(tempfile.mkdtemp())
    try:
        for kind in args.kinds.split(","):
            folder = make(kind, root)
            try:
                found = parity.certify(folder, tokens=args.tokens, names=names, say=lambda text: None)
            except ValueError as error:
                result["refused"][kind] = str(error)
                print(kind, error, flush=True)
                continue
            print(kind, found["verdict"], found["seconds"], report.faults(found)[:5], flush=True)
            result["kinds"][kind] = summary(found)
            if kind in flipped_kinds:
                result["flipped"][kind] = flip_one_bit(folder, found["tokens"]["ids"], device)
                print(result["flipped"][kind]["faults"], flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # a run cut off keeps it
    finally:
        shutil.rmtree(root)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = [found["verdict"] == "PASS" for found in result["kinds"].values()]
    if result["refused"] or not all(shown):
        raise SystemExit("parity_smollm2: not every kind passed")


if __name__ == "__main__":
    main()
