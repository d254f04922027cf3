"""Quality and speed of 8-bit weights times 8-bit inputs on SmolLM2-135M, beside weights alone.

    python tools/eval_w8a8.py --data DIR --teacher DIR [--windows 8] [--length 512] [--only NAME ...]
        [--no-speed | --speed-first] [--out FILE]

Quality: mean KL(float || quantized) in nats a token on windows of the held-out texts, by torch in float32;
the teacher is that of tools/eval_quality.py. Every linear layer is quantized, embedding and head stay float.
Speed: SmolLM2 in MLX, W8A8 beside W8A16 of the same groups, turn by turn: tokens a second of a prompt and of
the tokens after it, with a cache, in float32 and bfloat16; and the products of one layer alone. The result,
with the rules that made each row, goes to tools/results or FILE.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_common as common
from eval_quality import permuted_teacher

from mlxq.rules import QuantizationRule

LINEAR = ".*_proj"
W8 = {"module_path": LINEAR, "weight_qtype": "int8"}
A8 = {"act_qtype": "int8"}
DOWN = ".*/down_proj"
STATIC = A8 | {"act_static_scale": True}
CONFIGS: dict[str, list[dict]] = {
    "W8A16": [W8],
    "W8A8 per token": [W8 | A8],
    "W8A8 per token, tiles of 64": [W8 | A8 | {"tile_size": 64}],
    "W4A8 per token, groups of 64": [
        {
            "module_path": LINEAR,
            "weight_qtype": "int4",
            "tile_size": 64,
            "weight_calibration_method": "affine",
        }
        | A8
    ],
    "W8A8 static per tensor": [W8 | STATIC],
    "W8A8 static, down_proj 8-bit weights only": [W8 | {"module_path": DOWN}, W8 | STATIC],
    "W8A8 static, down_proj per token": [W8 | A8 | {"module_path": DOWN}, W8 | STATIC],
    "W8A8 static, tiles of 64": [W8 | STATIC | {"tile_size": 64}],
}
BARS = (
    ("KL, per token", "W8A8 per token", 0.035),
    ("KL, per token with tiles of 64", "W8A8 per token, tiles of 64", 0.010),
    ("KL, best static", None, 0.15),
)


def windows_of(files: list[Path], tokenizer, count: int, length: int) -> np.ndarray:
    from mlxq.ptq.text import token_windows

    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    per_file = -(-count // len(files))
    cut = [token_windows([file.read_text(encoding="utf-8")], encode, per_file, length) for file in files]
    return np.stack([w for group in zip(*cut, strict=True) for w in group])[:count]


def quality(folder: Path, data: Path, count: int, length: int, calibration: list[int], names: list[str]):
    """(name, KL, its standard error, top-1 agreement and perplexity) for each configuration, as measured."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mlxq.ptq.calibrate import calibrate, quantize_model
    from mlxq.ptq.plan import plan

    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = windows_of(sorted(data.glob("heldout_dev.*.txt")), tokenizer, count, length)
    calib = windows_of(sorted(data.glob("calib.*.txt")), tokenizer, *calibration)

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def log_probabilities(model, window):
        return model(torch.from_numpy(window[None])).logits[0, :-1].float().log_softmax(-1)

    teacher = load()
    truth = [log_probabilities(teacher, w).half() for w in held]
    del teacher
    for name in names:
        model = load()
        rules = [QuantizationRule(**rule) for rule in CONFIGS[name]]
        made = plan(model, rules)
        stats = None
        if any(site.rule.act_static_scale for site in made.values()):
            stats = calibrate(model, made, (torch.from_numpy(w[None]) for w in calib))
        quantize_model(model, made, stats)
        kls, agreed, nll = [], 0, 0.0
        for window, logp in zip(held, truth, strict=True):
            logq = log_probabilities(model, window)
            logp = logp.float()
            kls.append((logp.exp() * (logp - logq)).sum(-1).double().numpy())
            agreed += int((logp.argmax(-1) == logq.argmax(-1)).sum())
            nll -= float(logq.gather(1, torch.from_numpy(window[1:, None])).sum())
        kl = np.concatenate(kls)
        row = {
            "rules": [rule.settings() for rule in rules],
            "kl": float(kl.mean()),
            "kl_standard_error": float(kl.std() / len(kl) ** 0.5),
            "top1": agreed / len(kl),
            "perplexity": float(np.exp(nll / len(kl))),
            "tokens": len(kl),
        }
        print(f"{name}: KL {row['kl']:.4f} +- {row['kl_standard_error']:.4f}", flush=True)
        yield name, row
        del model
        gc.collect()


def speed(folder: Path, prompt: int, tokens: int, repeats: int):
    """Rows of seconds in MLX, W8A16 and W8A8 in turn, medians; of a model also its tokens a second."""
    import time

    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    from mlxq.ptq.calibrate import quantize_model

    rules = {"W8A16": [W8], "W8A8": [W8 | A8]}
    # The head is packed for both: in float it would be most of the time on a CPU.
    head = {"op_names": ("embedding",), "weight_qtype": "int8"}
    ids = mx.array(np.random.default_rng(0).integers(10, 40000, (1, prompt)))

    def row(what: str, models: dict, job, count: int | None) -> dict:
        """job(model) runs once and returns its seconds; count: tokens that it served."""
        times: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            job(model)
        for _ in range(repeats):
            for name, model in models.items():
                times[name].append(job(model))
        found = {"what": what} | {name: float(np.median(t)) for name, t in times.items()}
        if count:
            found |= {f"{name} tokens/s": count / found[name] for name in models}
        found["ratio"] = found["W8A16"] / found["W8A8"]
        rates = "".join(f", {name} {found[f'{name} tokens/s']:.1f} tokens/s" for name in models if count)
        print(f"{what}: W8A8 is {found['ratio']:.2f} times as fast as W8A16{rates}", flush=True)
        return found

    def timed(x) -> float:
        begin = time.perf_counter()
        mx.eval(x())
        return time.perf_counter() - begin

    def prefill(model) -> float:
        cache = make_prompt_cache(model)
        return timed(lambda: model(ids, cache=cache)[:, -1])

    def decode(model) -> float:
        cache = make_prompt_cache(model)
        token = mx.argmax(model(ids[:, :16], cache=cache)[:, -1:], -1)
        mx.eval(token)
        begin = time.perf_counter()
        for _ in range(tokens):
            token = mx.argmax(model(token, cache=cache)[:, -1:], -1)
            mx.eval(token)
        return time.perf_counter() - begin

    for dtype in ("float32", "bfloat16"):
        models = {}
        for name, some in rules.items():
            model, _ = load_model(folder)
            model.set_dtype(getattr(mx, dtype))
            models[name] = quantize_model(model, [QuantizationRule(**rule) for rule in (*some, head)])
            mx.eval(models[name].parameters())
        yield row(f"prompt of {prompt}, {dtype}", models, prefill, prompt)
        yield row(f"{tokens} tokens one by one, {dtype}", models, decode, tokens)
        rng = np.random.default_rng(1)
        for M in (1, 16, 128):
            x = mx.array(rng.standard_normal((M, 1536), dtype=np.float32)).astype(getattr(mx, dtype))
            for layer in models.values():
                mx.eval(layer.layers[0].mlp.down_proj(x))
            job = lambda model, x=x: timed(lambda: model.layers[0].mlp.down_proj(x))  # noqa: E731
            yield row(f"down_proj, {M} rows, {dtype}", models, job, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of heldout_dev.*.txt and calib.*.txt"
    )
    parser.add_argument(
        "--teacher", type=Path, required=True, help="folder of the float model; made if absent"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--calibration", type=int, nargs=2, default=[8, 512], metavar=("WINDOWS", "LENGTH"))
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--speed-first", action="store_true", help="before the quality: for a limited time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt that is timed")
    parser.add_argument("--tokens", type=int, default=32, help="tokens one by one that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the result's file; default in tools/results")
    parser.add_argument("--dry", action="store_true", help="write no result")
    args = parser.parse_args()
    folder = permuted_teacher(args.teacher, seed=0)
    about = common.machine()
    result = {
        "tool": "w8a8",
        "machine": about,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "quality": {},
        "speed": [],
        "bars": [],
        "missing": [],
    }
    path = args.out or common.result_path("w8a8", about)

    def keep() -> None:  # after each row, so that a run cut short keeps what it has
        if not args.dry:
            common.write(path, result)

    def take_speed() -> None:
        for row in speed(folder, args.prompt, args.tokens, args.repeats):
            result["speed"].append(row)
            keep()

    if args.speed_first:
        take_speed()
    for name, row in quality(folder, args.data, args.windows, args.length, args.calibration, args.only):
        result["quality"][name] = row
        result["bars"] = bars(result["quality"])
        keep()
    if not args.no_speed and not args.speed_first:
        take_speed()
    common.print_bars(result["bars"])


def bars(rows: dict) -> list[dict]:
    static = {name: row for name, row in rows.items() if "static" in name}
    best = min(static, key=lambda name: static[name]["kl"], default=None)
    found = []
    for what, name, limit in BARS:
        row = rows.get(name or best)
        found.append(common.bar(what, row and row["kl"], limit, "<=", name or best or ""))
    return found


if __name__ == "__main__":
    main()
