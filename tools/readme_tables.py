"""Writes the README's measured tables from tools/results/: of each machine the newest run on a quiet machine.

    python tools/readme_tables.py            rewrite what stands between <!-- table: TOOL --> and <!-- end -->
    python tools/readme_tables.py --check    exit code 1 if that would change the README

The keys of the result files are described at the heads of bench_common.py, bench_qmm.py, bench_decode.py,
bench_cuda.py, train_small.py and train_smollm2.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "tools" / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns after the first are numbers, on the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def where(result: dict) -> str:
    """Machine, versions and command in one paragraph."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    features = ", ".join(f for f in about["features"] if re.search("avx2|avx512f|vnni|bf16|asimd", f))
    return (
        f"{about['cpu']} {about['family']} ({features}), {about['cores']} cores, {about['date'][:10]}, "
        f"commit {about['commit'][:9]}; {versions}. `{about['command']}`"
    )


def bars(result: dict) -> str:
    """The bars of the issue, met or not."""
    word = {True: "yes", False: "**no**", None: "not taken"}
    rows = []
    for b in result["bars"]:
        rows.append([b["what"], number(b["measured"]), f"{b['sense']} {b['bar']:g}", word[b["met"]]])
    return table(["what", "measured", "bar", "met"], rows)


def qmm_times(result: dict) -> str:
    """Milliseconds of one 4096 x 4096 product ours at 4 bits, on the faster pages, all threads."""
    rows = [r for r in result["rows"] if r["N"] == r["K"] == 4096 and r["family"] != "stream"]
    rows = [r for r in rows if r["family"] != "mlxq" or r["bits"] == 4]
    if not rows:
        return ""
    most = max(r["threads"] for r in rows)
    best: dict[tuple, float] = {}
    for r in rows:
        if r["threads"] == most:
            key = r["contender"], r["M"], r["state"]
            best[key] = min(r["ms"], best.get(key, r["ms"]))
    columns = sorted({key[1:] for key in best}, key=lambda c: (c[1] != "hot", c[0]))
    names = list(dict.fromkeys(name for name, _, _ in best))
    body = [[name, *(number(best.get((name, *column))) for column in columns)] for name in names]
    return "Milliseconds, 4096 x 4096:\n\n" + table(["contender", *(f"M={m} {s}" for m, s in columns)], body)


def decode_rates(result: dict) -> str:
    """Tokens per second of a whole model."""
    rows = result["rows"]
    whats = list(dict.fromkeys(r["what"] for r in rows))
    rates: dict[tuple, dict] = {}
    for r in rows:
        rates.setdefault((r["contender"], r["threads"]), {})[r["what"]] = number(r["tokens_per_s"])
    body = [[name, str(n), *(r.get(what, "-") for what in whats)] for (name, n), r in rates.items()]
    return "Tokens per second:\n\n" + table(["contender", "threads", *whats], body)


def quality(result: dict) -> str:
    """KL divergence, perplexity, agreement, size and cost of each contender."""
    head = ["contender", "MB", "bits/weight", "KL", "/ rounding", "perplexity", "top-1", "seconds", "peak MB"]
    rows = []
    for r in result["rows"]:
        numbers = [r["bytes"] / 1e6, r["bits_per_weight"], r["kl"], r["ratio"], r["perplexity"]]
        shown = [number(value) for value in numbers]
        rows.append([r["name"], *shown, f"{r['top1']:.1%}", number(r["seconds"]), number(r["peak_mb"])])
    about = f"KL in nats per token; text: {', '.join(result['text'])}; calibration: {result['calibration']}."
    if teacher := result.get("teacher"):
        about += f" The float model: perplexity {teacher['perplexity']:.2f}, {teacher['tokens']} tokens."
    if result["machine"]["noisy"]:
        about += " The machine was busy: an idle one needs fewer seconds."
    return f"{about}\n\n{table(head, rows)}"


def mixed(result: dict) -> str:
    """Each mixed model after the uniform one of its size."""
    head = ["contender", "MB", "bits/weight", "KL", "/ uniform", "perplexity", "top-1", "formats by weights"]
    rows = {r["name"]: r for r in result["rows"]}
    ordered = [row for r in rows.values() if r["like"] for row in (rows[r["like"]], r)]
    body = []
    for r in ordered:
        numbers = [r["bytes"] / 1e6, r["bits_per_weight"], r["kl"], r["ratio"], r["perplexity"]]
        formats = [(n, f) for n, f in r["formats"].items() if f >= 0.005]
        shown = ", ".join(f"{n} {f:.0%}" for n, f in sorted(formats, key=lambda pair: -pair[1]))
        body.append([r["name"], *(number(value) for value in numbers), f"{r['top1']:.1%}", shown])
    about = (
        f"KL in nats per token over {ordered[0]['tokens']} tokens; text: {', '.join(result['text'])}; every "
        f"contender by {result['method']}; calibration: {result['calibration']}."
    )
    return f"{about}\n\n{table(head, body)}"


def chat(result: dict) -> str:
    """What was asked how often, and how far answers are those of the float model."""
    answers, names = result["answers"], [v["name"] for v in result["variants"]]
    rows = []
    for name in ["float", *names]:
        same = [a["same_tokens"][name] for a in answers] if name != "float" else []
        cells = [sum(name in a["repeats"] for a in answers), sum(same) / len(same) if same else None]
        rows.append([name, *(number(c) for c in cells)])
    most = result["settings"]["tokens"]
    head = [f"{len(answers)} answers of at most {most} tokens", "run in circles", "tokens as in float, mean"]
    return table(head, rows)


DETAILS = {
    "bench_qmm": qmm_times, "bench_decode": decode_rates, "eval_quality": quality, "eval_mixed": mixed,
    "eval_chat": chat,
}  # fmt: skip


# Tools whose tables stand on a busy machine too, without times.
COUNTS = ("eval_quality", "eval_mixed", "eval_chat", "eval_w8a8", "train_mpq")


def newest(tool: str) -> list[dict]:
    """The newest result of a tool on each machine; of a tool that measures times the newest quiet one.

    Of eval_quality the newest of each calibration text.
    """
    files = RESULTS.glob(f"{re.sub('^(bench|eval|train)_', '', tool)}-*.json")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    kept = [result for result in results if tool in COUNTS or not result["machine"]["noisy"]]
    by_cpu = {}
    for result in sorted(kept, key=lambda result: result["machine"]["date"]):
        by_cpu[result["machine"]["cpu"], result["machine"]["family"], result.get("calibration", "")] = result
    return [by_cpu[cpu] for cpu in sorted(by_cpu)]


def metal_proxies() -> str:
    """Counts of our Metal kernels beside stock MLX's, and what the bandwidth of each chip allows."""
    log = json.loads(max(RESULTS.glob("metal-proxies-*.json")).read_text(encoding="utf-8"))
    head = ["ours / stock MLX", "bits", "M", "weight bytes / least", "bytes / multiply-add"]
    head += ["threadgroup bytes", "registers on sm_90"]
    body = []
    for row in (row for row in log["products"] if row["M"] in (1, 8, 512)):
        pairs = [(row["ours"][key], row["stock"][key]) for key in PROXIES]
        shown = [f"{number(a)} / {number(b)}" for a, b in pairs]
        name = f"{row['what']}: {row['kernel']} / {row['stock_kernel']}"
        body.append([name, str(row["bits"]), str(row["M"]), *shown])
    chips = []
    for row in log["rooflines"]:
        us = [f"{row[f'least_us_4096x4096_{bits}bit']:.1f}" for bits in (2, 4, 8)]
        tokens = [number(row[f"most_tokens_per_s_8e9_weights_{bits}bit"]) for bits in (2, 4, 8)]
        chips.append([row["chip"], f"{row['GB_per_s']:g}", " / ".join(us), " / ".join(tokens)])
    names = ["chip", "GB/s", "least us, 4096 x 4096, M=1, 2 / 4 / 8 bits"]
    names += ["most tokens/s, 8 * 10^9 weights, 2 / 4 / 8 bits"]
    return "\n\n".join(
        [
            f"**Proxies, not times**:\n{log['what']}.\n{log['date']}, mlx {log['mlx']}, commit "
            f"{log['commit'][:9]}, {log['types']}, groups of {log['group_size']}. `{log['command']}`",
            "Bytes are those that lanes ask for; a cache may serve what is asked for twice.",
            table(head, body),
            "Ceilings by memory bandwidth alone, which no kernel passes. The bandwidths:\n"
            f"{log['bandwidth_source']}.",
            table(names, chips),
        ]
    )


PROXIES = (
    "weight_bytes_over_least",
    "read_bytes_per_multiply_add",
    "threadgroup_bytes",
    "registers_sm_90",
)


def measure(found: dict, key: str) -> str:
    """A number with its standard error, where a result has one."""
    error = found.get(f"{key}_standard_error")
    return number(found[key]) + (f" +- {number(error)}" if error is not None else "")


def training() -> str:
    """Held-out quality before and after packed training: of each machine the newest run, busy or quiet."""
    parts = []
    for result in newest("train_mpq"):
        rows = []
        for run in result["runs"]:
            counts = [str(run["bits"]), f"{run['lr']:g}", str(run["steps"]), str(run["tokens"])]
            moved = f"{100 * run['codes_changed']:.1f} %"
            measured = [
                " -> ".join(measure(run[when], key) for when in ("before", "after"))
                for key in ("kl", "perplexity", "agreement")
            ]
            peak = [number(run["peak_bytes"] / 2**20)] if "peak_bytes" in run else []
            rows.append([*counts, moved, *measured, *peak])
        head = ["bits", "lr", "steps", "tokens", "codes that moved", "held-out KL", "perplexity", "agreement"]
        head += ["peak MiB, teacher included"] * any("peak_bytes" in run for run in result["runs"])
        parts += [f"**train_mpq**: {where(result)}", table(head, rows)]
        if result["memory"]:
            full = next(row for row in result["memory"] if row["what"] == "float32 AdamW")["peak_bytes"]
            rows = [
                [row["what"], str(row["bits"]) if row["what"] != "float32 AdamW" else "32"]
                + [number(row["peak_bytes"] / 2**20), number(row["peak_bytes"] / full)]
                for row in result["memory"]
            ]
            parts.append(table(["peak memory of two steps", "bits", "MiB", "/ float32 AdamW"], rows))
    return "\n\n".join(parts) or "No run of `tools/train_mpq.py` is on file."


def trainings(tool: str) -> list[dict]:
    """Of each machine, size of model and start, the newest result, busy or quiet; toys are left out."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob(f"{tool}-*.json")]
    found = {}
    for result in sorted(files, key=lambda result: result["machine"]["date"]):
        about, size = result["machine"], result.get("model", {}).get("size", "")
        if size != "tiny":
            solved = any(row["what"].startswith("gptq") for row in result["rows"])
            found[about["cpu"], about["family"], size, not solved] = result
    return [found[key] for key in sorted(found)]


def train_small() -> str:
    """What rounding costs a model trained from scratch, and how much of it training recovers."""
    parts = []
    for result in trainings("train_small"):
        rows = {row["what"]: row for row in result["rows"]}
        body = []
        for name, row in rows.items():
            rounding = rows.get(f"rtn {row['bits']}") if name.startswith(("qat", "gptq")) else None
            share = f"{1 - row['kl'] / rounding['kl']:.0%}" if rounding else "-"
            done = [str(row["steps"]), number(row.get("tokens_per_second"))] if row["steps"] else ["-", "-"]
            body.append(
                [name, f"{row['cross_entropy']:.4f}", f"{row['kl']:.4f}", share, *done, row["measured"]]
            )
        about, busy = result["model"], result["machine"]["noisy"]
        head = ["bits", "cross-entropy", "KL", "share of rtn's KL removed", "steps", "tokens/s", "measured"]
        parts += [
            f"**train_small**: {where(result)}",
            f"{about['parameters'] / 1e6:.1f} M parameters, {about['tokens']} tokens of text; QAT begins "
            + ("with GPTQ's codes." if any(name.startswith("gptq") for name in rows) else "as rounded.")
            + " The machine was busy: tokens/s are too low." * busy,
            bars(result),
            table(head, body),
            *(f"Missing: {sentence}" for sentence in result["missing"]),
        ]
    return "\n\n".join(parts) or "No run of `tools/train_small.py` is on file."


def train_smollm2() -> str:
    """KL of SmolLM2 as converted and as trained from there."""
    parts = []
    for result in trainings("train_smollm2"):
        kl = {row["what"]: f"{row['kl']:.4f}" for row in result["rows"]}
        data, seconds = result.get("data", {}), result.get("seconds", 0.0)
        body = [
            str(result["rows"][0]["bits"]), kl["start"], kl.get("trained", "-"), data.get("trains", "-"),
            f"{data.get('tokens_per_second', 0.0) * seconds:.0f}", f"{seconds / 60:.1f}",
            result["machine"].get("gpu") or "CPU",
        ]  # fmt: skip
        head = ["bits", "start KL", "trained KL", "trained", "tokens", "minutes", "device"]
        parts += [f"**train_smollm2**: {where(result)}", bars(result), table(head, [body])]
        parts += [f"Missing: {sentence}" for sentence in result["missing"]]
    return "\n\n".join(parts) or "No run of `tools/train_smollm2.py` is on file."


def w8a8() -> str:
    """Quality of 8-bit inputs by their rules; of each machine the newest run, and speed if it was quiet."""
    parts = []
    for result in newest("eval_w8a8"):
        rows = [
            [name, f"{row['kl']:.4f} +- {row['kl_standard_error']:.4f}", f"{100 * row['top1']:.1f} %",
             number(row["perplexity"]), str(row["tokens"])]
            for name, row in result["quality"].items()
        ]  # fmt: skip
        head = ["SmolLM2-135M, all linear layers", "KL", "same first choice", "perplexity", "tokens"]
        parts += [f"**eval_w8a8**: {where(result)}", bars(result), table(head, rows)]
        if result["speed"] and not result["machine"]["noisy"]:
            head = ["what", "W8A16 ms", "W8A8 ms", "W8A16 / W8A8"]
            rows = [
                [row["what"], *(number(1e3 * row[name]) for name in ("W8A16", "W8A8")), number(row["ratio"])]
                for row in result["speed"]
            ]
            parts.append(table(head, rows))
    return "\n\n".join(parts) or "No run of `tools/eval_w8a8.py` is on file."


def cuda_times() -> str:
    """Of each GPU the newest run of bench_cuda: the bars, and times beside limit and peers."""
    newest_of = {}
    files = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("cuda-*.json")]
    for result in sorted(files, key=lambda result: result["machine"]["date"]):
        newest_of[result["machine"]["gpu"]] = result
    parts = []
    for gpu, result in sorted(newest_of.items()):
        about = result["machine"]
        versions = {"torch": about.get("torch")} | about.get("versions", {})
        said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        read = f", reads {about['read_tb_s']:.2f} TB/s" if "read_tb_s" in about else ""
        parts.append(
            f"**bench_cuda**: {gpu}{read}, bfloat16 8192^3 at {about['bf16_tflops']:.0f} TFLOP/s, "
            f"{about['date'][:10]}, commit {about.get('commit', '-')[:9]}; {said}. `{about['command']}`"
        )
        if result.get("bars"):
            parts.append(bars({"bars": [b for b in result["bars"] if b["note"].startswith("closes")]}))
            parts.append("The further bars of the issue, and host time:")
            parts.append(bars({"bars": [b for b in result["bars"] if not b["note"].startswith("closes")]}))
        parts += [cuda_products(result["rows"]), cuda_others(result["rows"])]
        parts += [f"Not timed: {sentence}" for sentence in result.get("missing", ())]
    return "\n\n".join(part for part in parts if part) or "No run of `tools/bench_cuda.py` is on file."


def cuda_cell(row: dict) -> str:
    """Time, share of the limit, and the fastest peer of the same information, else of all, over ours."""
    if not row["us"]:
        return "**wrong**" if row.get("failed") else "-"
    same = {name: row["peers"][name] for name in ("humming", "tinygemm") if name in row["peers"]}
    name, peer = min((same or row["peers"] or {"": 0.0}).items(), key=lambda pair: pair[1])
    mark = {"humming": "h", "tinygemm": "t", "cublas_fp16": "c"}.get(name, name)
    ratio = f", {number(peer / row['us'])}{mark}" if peer else ""
    return f"{number(row['us'])}, {row['limit_us'] / row['us']:.0%}{ratio}"


def cuda_products(rows: list[dict]) -> str:
    """One row a shape and format, one column for each number of rows of x."""
    rows = [row for row in rows if row.get("op", "qmm") == "qmm"]
    if not rows:
        return ""
    Ms = sorted({row["M"] for row in rows})
    found = {}
    for row in rows:
        found.setdefault((row["N"], row["K"], row["bits"]), {})[row["M"]] = cuda_cell(row)
    body = [
        [f"{N}x{K}, {bits}-bit", *(found[N, K, bits].get(M, "-") for M in Ms)] for N, K, bits in sorted(found)
    ]
    about = (
        "Microseconds, share of the limit (reading the weight, without x and y, or the operations at the\n"
        "rate of a large bfloat16 product), and the fastest peer over ours: h humming, t tinygemm, c cuBLAS\n"
        "in float16 where neither was timed."
    )
    return about + "\n\n" + table(["groups of 64", *(f"M={M}" for M in Ms)], body)


def cuda_others(rows: list[dict]) -> str:
    """The other operations: each with its peers' times over ours."""
    body = []
    for row in (row for row in rows if row.get("op", "qmm") not in ("qmm", "host")):
        share = f"{row['limit_us'] / row['us']:.0%}" if row["us"] and row["limit_us"] else "-"
        peers = ", ".join(
            f"{name} {number(us / row['us'])}" for name, us in row["peers"].items() if row["us"]
        )
        name = f"{row['op']} {row['what']}".strip()
        body.append(
            [
                f"{name}, {row['bits']}-bit {row['N']}x{row['K']}, M={row['M']}",
                number(row["us"]),
                share,
                peers or "-",
            ]
        )
    return table(["product", "us", "of the limit", "peer / ours"], body) if body else ""


def section(tool: str) -> str:
    """All that stands between a tool's markers."""
    if tool in WHOLE:
        return WHOLE[tool]()
    results = newest(tool)
    if not results:
        quiet = "" if tool in COUNTS else " on a quiet machine"
        return f"No run of `tools/{tool}.py`{quiet} is on file."
    parts = []
    for result in results:
        word = "Missing" if tool in COUNTS else "Not timed"
        missing = [f"{word}: {sentence}" for sentence in result.get("missing", ())]
        parts += [f"**{tool}**: {where(result)}", bars(result), DETAILS[tool](result), *missing]
    return "\n\n".join(part for part in parts if part)


# each writes its section
WHOLE = {
    "metal_proxies": metal_proxies, "train_mpq": training, "w8a8": w8a8, "bench_cuda": cuda_times,
    "train_small": train_small, "train_smollm2": train_smollm2,
}  # fmt: skip


def rewritten(text: str) -> str:
    """The README with its tables made anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{section(found[2])}\n{found[3]}",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = rewritten(before)
    if sys.argv[1:] == ["--check"]:
        sys.exit(before != after)
    README.write_text(after, encoding="utf-8")
