"""A whole model, SmolLM2-135M-Instruct: ours, stock mlx-lm and llama.cpp on the same weights and threads.

    python tools/bench_decode.py [--threads 2] [--rounds 5] [--tokens 24]

Models. g64: the embedded GGUF converted to 4 bits in groups of 64, bfloat16; "f32" runs the same folder with
every float cast to float32 after loading. g32: the same GGUF repacked without loss (what `mlxq chat` runs),
float16. llama.cpp reads the GGUF itself (Q4_1). Each contender is a process of its own, told in turn what to
do; the others sleep meanwhile. Weights are what mlxq.load, mlx_lm.load and llama_cpp.Llama make of them.

Answers first. Logits of a prompt: ours against stock, both float32 (LOGITS_LIMIT); ours in bfloat16 and
float16 against ours in float32 on the same folder; llama.cpp against ours on the GGUF's weights. The greedy
tokens of ours and stock, both float32, must be equal. Otherwise exit code 1. Stock in 16 bits is timed but
not checked: it is itself far off.

Decode. One token after the other through mlx_lm's generate_step (ours and stock) or Llama.eval, greedy; the
median time of a token over all rounds after a warm-up. A round is --tokens long, but 2 for whoever needs over
half a second a token. Prefill N: from N token ids to the first new token, cache empty. Not timed for stock in
16 bits (minutes).

The ceiling: read_stream.c reads as many bytes as the model has, from huge pages, at its best prefetch.

JSON, besides bench_common's:
    checks   [{what, error, limit, met}]   error: relative Frobenius error of logits, or tokens that differ
    rows     [{contender, family, model, dtype, threads, what, tokens_per_s, ms, ms_min, ms_q1, ms_q3,
             repeats, bytes, gb_s, share}]   what: "decode", "prefill 128" or "prefill 512"; ms: of a token
             (decode) or of the prompt; gb_s and share (of the read stream): decode only
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_common as common
import numpy as np

# 210 products, each within 1e-6 of the truth in relative norm; at worst the errors add.
LOGITS_LIMIT = 2e-4
# Activations are rounded to 16 bits some thousand times on the way (unit roundoff 2^-9 and 2^-12), in
# llama.cpp to 8 bits.
LOWER_LIMITS = {"bfloat16": 0.1, "float16": 0.02, "llama.cpp": 0.2}
CHECKED_TOKENS = 16
WARM_TOKENS = 3
SLOW_SECONDS = 0.5
START_TOKENS = 8
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class MlxModel:
    """The model in a process of its own, on mlx_lm: ours or stock."""

    def __init__(self, family: str, path: str, cast: str | None, threads: int):
        import mlx.core as mx
        from mlx.utils import tree_flatten

        if family == "mlxq":
            import mlxq

            model, _ = mlxq.load(path)
        else:
            import mlx_lm

            model, _ = mlx_lm.load(path)
        if cast:
            model.set_dtype(getattr(mx, cast))
            mx.eval(model.parameters())
        self._mx, self._model, self._steps = mx, model, None
        self.bytes = sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    def logits(self, tokens: list[int]) -> np.ndarray:
        mx = self._mx
        return np.array(self._model(mx.array(tokens)[None])[0].astype(mx.float32))

    def _generate(self, tokens: list[int], count: int):
        from mlx_lm.generate import generate_step

        return generate_step(self._mx.array(tokens), self._model, max_tokens=count)

    def _drain(self) -> None:
        """generate_step has the next token under way: finish it, or it would run while another is timed."""
        from mlx_lm.generate import generation_stream

        self._mx.synchronize(generation_stream)

    def prefill(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        next(self._generate(tokens, 1))
        seconds = time.perf_counter() - start
        self._drain()
        return seconds

    def start(self, tokens: list[int]) -> None:
        self._steps = self._generate(tokens, 1 << 20)
        next(self._steps)
        self._drain()

    def decode(self, count: int) -> tuple[list[int], list[float]]:
        """The next tokens and the seconds of each but the first, which _drain had already computed."""
        tokens, times = [], []
        for i in range(count + 1):
            start = time.perf_counter()
            tokens.append(int(next(self._steps)[0]))
            if i:
                times.append(time.perf_counter() - start)
        self._drain()
        return tokens, times


class LlamaModel:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, family: str, path: str, cast: None, threads: int):
        import llama_cpp

        self._llm = llama_cpp.Llama(
            path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._get = llama_cpp.llama_get_logits_ith
        self.bytes = llama_cpp.llama_model_size(self._llm.model)

    def _last(self) -> np.ndarray:
        logits = self._get(self._llm.ctx, -1)
        return np.ctypeslib.as_array(logits, shape=(self._llm.n_vocab(),))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Those of the last token only."""
        self.start(tokens)
        return self._last()[None].copy()

    def prefill(self, tokens: list[int]) -> float:
        self._llm.reset()
        start = time.perf_counter()
        self._llm.eval(tokens)
        self._last().argmax()
        return time.perf_counter() - start

    def start(self, tokens: list[int]) -> None:
        self._llm.reset()
        self._llm.eval(tokens)

    def decode(self, count: int) -> tuple[list[int], list[float]]:
        tokens, times = [int(self._last().argmax())], []
        for _ in range(count):
            start = time.perf_counter()
            self._llm.eval(tokens[-1:])
            tokens.append(int(self._last().argmax()))
            times.append(time.perf_counter() - start)
        self._llm.eval(tokens[-1:])
        return tokens, times


def serve() -> None:
    """The process of one contender: one JSON command a line, one JSON answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    model = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "load":
            model = (LlamaModel if arguments[0] == "llama.cpp" else MlxModel)(*arguments)
            said = model.bytes
        elif command == "logits":
            np.save(arguments[1], model.logits(arguments[0]))
            said = arguments[1]
        else:
            said = getattr(model, command)(*arguments)
        print(json.dumps(said), file=answers, flush=True)


class Contender:
    """A contender's process and what is known about it."""

    def __init__(self, family: str, path: Path, model: str, dtype: str, threads: int, cast: bool = False):
        self.family, self.path, self.model, self.dtype, self.threads = family, path, model, dtype, threads
        self.cast = dtype if cast else None
        self.name = f"{family} {model}" + (f" {SHORT[dtype]}" if dtype in SHORT else "")
        self.name += "" if threads > 1 else " 1 thread"
        self.slow = family == "mlx-lm" and dtype != "float32"
        self.tokens: list[int] = []

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=os.environ | {"MLXQ_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send("load", self.family, str(self.path), self.cast, self.threads)
        return self

    def ready(self) -> None:
        """Waits until the model is loaded; all processes load at once."""
        self.bytes = self._answer("load")

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def ask(self, *command):
        self._send(*command)
        return self._answer(command[0])

    def _send(self, *command) -> None:
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def _answer(self, command: str):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended ({self._process.wait()}) at {command}")
        return json.loads(line)

    def logits(self, tokens: list[int], folder: Path) -> np.ndarray:
        return np.load(self.ask("logits", tokens, str(folder / "logits.npy"))).astype(np.float64)


def prompt_ids(folder: Path, count: int) -> list[int]:
    """Token ids of English text: the licence, as often as it takes."""
    from tokenizers import Tokenizer

    ids = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode((common.ROOT / "LICENSE").read_text()).ids
    )
    return (ids * -(-count // len(ids)))[:count]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    want = want[-len(got) :]  # llama.cpp gives the last row only
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(by_name: dict[str, Contender], ids: list[int], folder: Path, threads: int) -> list[dict]:
    """Rows of the table "checks"."""
    ids = ids[:CHECKED_TOKENS]
    out = []

    def add(what: str, error: float, limit: float) -> None:
        out.append({"what": what, "error": error, "limit": limit, "met": bool(error <= limit)})
        print(
            f"  {'ok' if error <= limit else 'EXCEEDED':8} {error:.2g} (limit {limit:g})  {what}", flush=True
        )

    print("\nAnswers")
    exact = by_name["mlxq g64 f32"].logits(ids, folder)
    if stock := by_name.get("mlx-lm g64 f32"):
        add(
            "logits, ours against stock, both float32",
            relative_error(exact, stock.logits(ids, folder)),
            LOGITS_LIMIT,
        )
        said = []
        for c in (by_name["mlxq g64 f32"], stock):
            c.ask("start", ids)
            said.append(c.ask("decode", 7)[0])
        differ = sum(a != b for a, b in zip(*said, strict=True))
        add("greedy tokens that differ, ours against stock, both float32", differ, 0)
    ours = by_name["mlxq g64 bf16"].logits(ids, folder)
    add("logits, ours bfloat16 against ours float32", relative_error(ours, exact), LOWER_LIMITS["bfloat16"])
    with Contender("mlxq", by_name["mlxq g32 f16"].path, "g32", "float32", threads, cast=True) as reference:
        reference.ready()
        exact = reference.logits(ids, folder)
    ours = by_name["mlxq g32 f16"].logits(ids, folder)
    add(
        "logits, ours float16 against ours float32, repacked GGUF",
        relative_error(ours, exact),
        LOWER_LIMITS["float16"],
    )
    if llama := next((c for c in by_name.values() if c.family == "llama.cpp"), None):
        error = relative_error(llama.logits(ids, folder), exact)
        add(
            "logits, llama.cpp on the GGUF against ours float32 on its repacked weights",
            error,
            LOWER_LIMITS["llama.cpp"],
        )
    return out


def decode(contenders: list[Contender], ids: list[int], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of each token by the contenders' names, round after round."""
    out: dict[str, list[float]] = {}
    for c in contenders:
        c.ask("start", ids[:START_TOKENS])
        _, times = c.ask("decode", 1 if c.slow else WARM_TOKENS)
        c.slow = min(times) > SLOW_SECONDS
        out[c.name] = []
    for turn in range(rounds):
        for c in contenders:
            if c.slow and turn >= 3:
                continue
            said, times = c.ask("decode", 2 if c.slow else tokens)
            c.tokens += said
            out[c.name] += times
            time.sleep(common.SETTLE_SECONDS)
    return out


def prefill(contenders: list[Contender], ids: list[int], rounds: int) -> dict[str, list[float]]:
    """Seconds to the first new token by the contenders' names."""
    out: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(rounds):
        for c in contenders:
            if turn == 0 and c.family != "mlx-lm":
                c.ask("prefill", ids)  # a warm-up that stock, with its half a minute, does not need
            if turn == 0 or c.family != "mlx-lm":
                out[c.name].append(c.ask("prefill", ids))
                time.sleep(common.SETTLE_SECONDS)
    return out


def ceiling(threads: int, bytes_read: int) -> float:
    """Seconds in which the read stream reads so many bytes, from huge pages, at its best prefetch."""
    with common.read_stream(threads, max(common.cold_bytes(), bytes_read + (1 << 20))) as stream:
        distinct = max(1, common.cold_bytes() // bytes_read)
        return min(
            float(
                np.median(
                    [
                        common.stream_seconds(stream, True, ahead, bytes_read, 2, distinct) / 2
                        for _ in range(5)
                    ]
                )
            )
            for ahead in common.AHEAD
        )


def judge(rows: list[dict], checks: list[dict]) -> list[dict]:
    """The bars of issue 2 that these rows can tell."""
    speed = {(r["contender"], r["what"]): r["tokens_per_s"] for r in rows}

    def ratio(what: str, over: str, under: str) -> float | None:
        a, b = speed.get((over, what)), speed.get((under, what))
        return a / b if a and b else None

    out = [common.bar(c["what"], c["error"], c["limit"], "<=") for c in checks]
    for dtype, limit in (("f32", 5), ("bf16", 25)):
        value = ratio("decode", f"mlxq g64 {dtype}", f"mlx-lm g64 {dtype}")
        out.append(common.bar(f"decode, ours / stock mlx-lm, both {dtype}", value, limit))
    out.append(
        common.bar(
            "prefill 128, ours / stock mlx-lm, both f32",
            ratio("prefill 128", "mlxq g64 f32", "mlx-lm g64 f32"),
            15,
        )
    )
    for what in ("decode", "prefill 128"):
        for name in ("mlxq g64 f32", "mlxq g64 bf16", "mlxq g32 f16"):
            value = ratio(what, name, f"{name} 1 thread")
            if value is not None:
                out.append(common.bar(f"{what}, {name}, two threads / one", value, 1.0))
    return out


def plot(path: Path, title: str, rows: list[dict]) -> None:
    """A panel a measurement: tokens a second, a bar a contender."""
    pyplot = common.pyplot()
    if pyplot is None:
        return
    kinds = list(dict.fromkeys(r["what"] for r in rows))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False, layout="constrained"
    )
    for ax, kind in zip(axes.flat, kinds, strict=True):
        chosen = [r for r in rows if r["what"] == kind][::-1]
        colours = ["tab:blue" if r["family"] == "mlxq" else "tab:gray" for r in chosen]
        bars = ax.barh([r["contender"] for r in chosen], [r["tokens_per_s"] for r in chosen], color=colours)
        ax.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        ax.set(title=kind, xlabel="tokens/s")
        ax.tick_params(axis="y", labelsize=8)
        ax.margins(x=0.15)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Time SmolLM2 against mlx-lm and llama.cpp on the CPU.")
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("MLXQ_THREADS", min(2, common.cores())))
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="of a round (default: 24)")
    parser.add_argument("--no-stock", action="store_true", help="leave stock mlx-lm out: it takes minutes")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve()
        return 0
    from mlxq import ops
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    if not ops.native_available():
        print(f"bench_decode: {ops.native_error()}", file=sys.stderr)
        return 2
    about = common.machine()
    common.print_machine(about)
    missing = []
    start = time.perf_counter()
    gguf = embedded_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        g64, g32 = folder / "g64", folder / "g32"
        convert(gguf, g64, bits=4, group_size=64, dtype="bfloat16", progress=False)
        convert(gguf, g32, progress=False)
        ids = prompt_ids(g64, 512)
        threads = arguments.threads
        contenders = [
            Contender("mlxq", g64, "g64", "float32", threads, cast=True),
            Contender("mlxq", g64, "g64", "bfloat16", threads),
            Contender("mlxq", g32, "g32", "float16", threads),
        ]
        if threads > 1:
            contenders += [Contender(c.family, c.path, c.model, c.dtype, 1, bool(c.cast)) for c in contenders]
        if arguments.no_stock:
            missing.append("stock mlx-lm: --no-stock")
        else:
            contenders += [
                Contender("mlx-lm", g64, "g64", "float32", threads, cast=True),
                Contender("mlx-lm", g64, "g64", "bfloat16", threads),
                Contender("mlx-lm", g32, "g32", "float16", threads),
            ]
            missing.append("prefill of stock mlx-lm in bfloat16 and float16: minutes each")
        if importlib.util.find_spec("llama_cpp"):
            contenders += [
                Contender("llama.cpp", gguf, "GGUF", "Q4_1", t) for t in sorted({threads, 1}, reverse=True)
            ]
        else:
            missing.append(common.LLAMA_MISSING)
        with contextlib.ExitStack() as stack:
            by_name = {c.name: stack.enter_context(c) for c in contenders}
            for c in contenders:
                c.ready()
            print(f"\n{len(contenders)} models loaded, {time.perf_counter() - start:.0f} s", flush=True)
            checks = check(by_name, ids, folder, threads)
            if not all(c["met"] for c in checks):
                return 1
            times = {"decode": decode(contenders, ids, arguments.rounds, arguments.tokens)}
            print(f"\ndecoded, {time.perf_counter() - start:.0f} s", flush=True)
            quick = [c for c in contenders if not (c.family == "mlx-lm" and c.dtype != "float32")]
            times["prefill 128"] = prefill(quick, ids[:128], arguments.rounds)
            long = [c for c in quick if c.family != "mlx-lm" and c.threads > 1]
            times["prefill 512"] = prefill(long, ids, max(1, arguments.rounds // 2))
        streams = {t: ceiling(t, contenders[1].bytes) / contenders[1].bytes for t in {1, threads}}
    rows = []
    for what, by_contender in times.items():
        per = 1 if what == "decode" else int(what.split()[1])
        print(f"\n{what}, tokens/s")
        for c in contenders:
            if c.name not in by_contender:
                continue
            row = common.summary(by_contender[c.name])
            share = gb_s = None
            if what == "decode":
                gb_s = c.bytes / row["ms"] / 1e6
                share = 1e3 * streams[c.threads] * c.bytes / row["ms"]
            speed = 1e3 * per / row["ms"]
            rows.append({
                "contender": c.name, "family": c.family, "model": c.model, "dtype": c.dtype,
                "threads": c.threads,
                "what": what, "tokens_per_s": speed, **row, "bytes": c.bytes, "gb_s": gb_s, "share": share,
            })  # fmt: skip
            tail = "" if share is None else f"  {gb_s:5.2f} GB/s, {100 * share:.1f} % of the stream"
            print(f"  {c.name:28} {speed:9.3f}   {row['ms']:.2f} ms [{row['ms_q1']:.2f} {row['ms_q3']:.2f}] "
                  f"x{row['repeats']}{tail}")  # fmt: skip
    bars = judge(rows, checks)
    common.print_bars(bars)
    for sentence in missing:
        print(f"not timed: {sentence}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "serve"}
    path = common.result_path("decode", about, arguments.out)
    common.write(path, {
        "tool": "bench_decode", "machine": about, "settings": settings, "bars": bars, "missing": missing,
        "checks": checks, "rows": rows,
    })  # fmt: skip
    title = f"{about['cpu']}, {arguments.threads} threads, {about['date'][:10]}, commit {about['commit'][:9]}"
    plot(path.with_suffix(".png"), title, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
