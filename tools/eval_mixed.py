"""Bits spent by measured KL (--target-bpw) against the same bits for every layer, at equal bytes.

    python tools/eval_mixed.py [--text DOMAIN=FILE ...] [--calibration FILE] [--windows 20] [--jobs 8]

The teacher is eval_quality.py's: SmolLM2-135M with its channels permuted. A uniform contender has one format
for all layers, embedding and head included, or the embedding at 8 bits; its mixed twin gets the uniform
one's size as --target-bpw. Both are solved by the same method on the same text. What an error in each layer
costs is measured once, for all of them (--costs). Commands run --jobs side by side, so that their seconds say
little. One mixed plan is replayed with --rules, and its files are compared byte by byte.

JSON, besides bench_common's:
    measuring   seconds of the command that measured the costs
    rows     [{name, like, bytes, bits_per_weight, kl, kl_error, perplexity, top1, domains, seconds, formats,
             ratio}]    like: the uniform twin; ratio: kl over the twin's, null unless the sizes agree within
             1 %; formats: {"bits/group": share of the weights}; seconds: null with --keep
    replay   whether the replayed plan gave identical files, null when it was not tried
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_common import bar, cores, machine, print_bars, print_machine, result_path, write
from eval_quality import SEED, permuted_teacher

BETTER = 0.80
UNIFORM = {
    "2-bits-g32": ["--bits", "2", "--group-size", "32"],
    "3-bits": ["--bits", "3", "--group-size", "64"],
    "4-bits": ["--bits", "4", "--group-size", "64"],
    "2-bits-embedding-8": ["--bits", "2", "--group-size", "64", "--embedding-bits", "8"],
    "3-bits-embedding-8": ["--bits", "3", "--group-size", "64", "--embedding-bits", "8"],
    "4-bits-embedding-8": ["--bits", "4", "--group-size", "64", "--embedding-bits", "8"],
}


def size_of(teacher: Path, folder: Path, flags: list[str]) -> float:
    """Bits per weight that a uniform contender will have."""
    from mlxq.convert import convert

    options = {
        name.removeprefix("--").replace("-", "_"): int(value)
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    return convert(teacher, folder, dry_run=True, progress=False, **options).bits_per_weight


def formats_of(folder: Path) -> dict[str, float]:
    """Share of the weights by their format."""
    from mlxq.checkpoint.summary import inspect

    found: dict[str, int] = {}
    for layer in inspect(folder).layers:
        found[layer.stored] = found.get(layer.stored, 0) + layer.weights
    total = sum(found.values())
    return {name: round(count / total, 4) for name, count in sorted(found.items())}


def same_files(a: Path, b: Path) -> bool:
    """Whether two model folders hold the same shards, byte by byte."""
    names = sorted(file.name for file in a.glob("*.safetensors"))
    if not names or names != sorted(file.name for file in b.glob("*.safetensors")):
        return False
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", action="append", default=[], metavar="DOMAIN=FILE")
    parser.add_argument("--calibration", metavar="FILE", help="default: the text that comes with mlxq")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=UNIFORM, metavar="NAME", help="uniform twins to take")
    parser.add_argument("--method", default="gptq", help="of every contender")
    parser.add_argument("--jobs", type=int, default=max(1, cores() // 2), help="commands side by side")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="measured earlier, with the same text")
    parser.add_argument("--keep", action="store_true", help="do not make again what lies in --work")
    parser.add_argument("--no-replay", action="store_true", help="do not follow a plan once more")
    parser.add_argument("--seed", type=int, default=SEED, help="of the permutation")
    parser.add_argument("--work", type=Path, help="folder that keeps the teacher and the models")
    parser.add_argument("--out", type=Path, help="the result file (default: in tools/results)")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    texts: dict[str, list[str]] = {}
    for text in args.text:
        domain, _, file = text.partition("=")
        texts.setdefault(domain, []).append(Path(file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="mlxq-mixed-") as temporary:
        work = args.work or Path(temporary)
        result = measured(args, texts, work)
    bars = []
    for row in result["rows"]:
        if row["like"] is not None:
            what = f"KL, mixed / uniform, {row['like']} ({row['bits_per_weight']:.2f} bits a weight)"
            bars.append(bar(what, row["ratio"], BETTER, "<="))
    print_bars(bars)
    result = {"machine": about, "bars": bars, **result, "text": args.text or ["mlxq's own"],
              "calibration": args.calibration or "mlxq's own", "method": args.method}  # fmt: skip
    write(args.out or result_path("mixed", about), result)
    return 0


def measured(args, texts: dict[str, list[str]], work: Path) -> dict:
    """rows, missing and replay of the result."""
    from mlxq.evaluate import evaluate
    from mlxq.progress import progress

    teacher = permuted_teacher(work / f"teacher-{args.seed}", args.seed)
    common = ["--method", args.method] + (["--calibration", args.calibration] if args.calibration else [])
    start = [sys.executable, "-m", "mlxq", "convert", str(teacher)]
    commands: dict[str, tuple[Path, list[str]]] = {}
    like: dict[str, str] = {}
    for name in args.only or UNIFORM:
        folder, twin = work / f"uniform-{name}", f"mixed-like-{name}"
        flags = UNIFORM[name]
        bits = size_of(teacher, work / "none", flags)
        commands[name] = folder, [*start, str(folder), "--overwrite", *flags, *common]
        plan = ["--target-bpw", f"{bits:.5f}", "--plan", str(work / f"{twin}.json")]
        plan += ["--costs", str(args.costs or work / "costs.json")]
        commands[twin] = work / twin, [*start, str(work / twin), "--overwrite", *plan, *common]
        like[twin] = name
    missing: list[str] = []
    failed: set[str] = set()
    costs = args.costs or work / "costs.json"
    if args.costs is None:
        costs.unlink(missing_ok=True)

    def run(name: str) -> float | None:
        if args.keep and (commands[name][0] / "config.json").exists():
            print(f"{name:34} lies in {args.work}", flush=True)
            return None
        begin = time.monotonic()
        threads = cores() // (2 if name == "measuring" else args.jobs)  # all wait for the measuring
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MLXQ_THREADS"), str(max(1, threads)))
        done = subprocess.run(commands[name][1], capture_output=True, text=True, env=environment)
        seconds = time.monotonic() - begin
        if done.returncode:
            failed.add(name)
            missing.append(f"{name}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
            print(missing[-1], flush=True)
            return None
        print(f"{name:34} made in {seconds:.0f} s", flush=True)
        return seconds

    commands["measuring"] = work / "none", [
        *start, str(work / "none"), "--target-bpw", "8", "--costs", str(costs), "--dry-run", *common
    ]  # fmt: skip
    replay, twin = None, next(iter(like))
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {name: pool.submit(run, name) for name in ("measuring", *like.values())}
        measuring = waiting.pop("measuring").result()
        if "measuring" not in failed:
            waiting |= {name: pool.submit(run, name) for name in like}
        seconds = {name: future.result() for name, future in waiting.items()}
        if not args.no_replay and twin in seconds and twin not in failed:
            commands["replayed"] = work / "replayed", [
                *start, str(work / "replayed"), "--overwrite", "--rules", str(work / f"{twin}.json"), *common
            ]  # fmt: skip
            again = pool.submit(run, "replayed")
        names = [name for name in commands if name in seconds and name not in failed]
        folders = [commands[name][0] for name in names]
        with progress("reading the models", unit="tokens", size=1) as shown:
            found = evaluate(
                folders, teacher, texts or None, windows=args.windows, length=args.length, decode=False,
                shown=shown,
            )  # fmt: skip
        if "replayed" in commands:
            again.result()
            replay = same_files(commands[twin][0], commands["replayed"][0])
            print(f"{twin}, replayed: {'identical files' if replay else 'OTHER FILES'}")
    print(f"teacher: perplexity {found[0].total['perplexity']:.3f}, {found[0].total['tokens']} tokens")
    rows: dict[str, dict] = {}
    for name, one in zip(names, found[1:], strict=True):
        uniform = rows.get(like.get(name))
        equal = uniform is not None and abs(one.bytes / uniform["bytes"] - 1) <= 0.01
        rows[name] = {
            "name": name, "like": like.get(name), "bytes": one.bytes,
            "bits_per_weight": one.bits_per_weight, **one.total, "domains": one.domains,
            "seconds": seconds[name], "formats": formats_of(commands[name][0]),
            "ratio": one.total["kl"] / uniform["kl"] if equal else None,
        }  # fmt: skip
        row = rows[name]
        shown = "" if row["ratio"] is None else f"{row['ratio']:.3f}x"
        print(f"{name:34} {row['bytes'] / 1e6:7.2f} MB {row['bits_per_weight']:.3f} bits  KL {row['kl']:.4f} "
              f"+- {row['kl_error']:.4f} {shown:>7}  ppl {row['perplexity']:8.2f}  top-1 {row['top1']:.1%}"
              f"  {row['formats'] if row['like'] else ''}", flush=True)  # fmt: skip
    return {"rows": list(rows.values()), "measuring": measuring, "missing": missing, "replay": replay}


if __name__ == "__main__":
    sys.exit(main())
