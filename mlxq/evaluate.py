"""`mlxq eval`: how near quantized models are to a float one, on text, for how many bytes and how fast.

For each token of each window after the first, with p the float model's distribution and q the other's:

    KL      sum p log(p / q), in nats; perplexity exp(mean -log q(the next token)); top-1 argmax p = argmax q
"""

from __future__ import annotations

import argparse
import html
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint, read_json, resolve
from mlxq.checkpoint.plain import dequantize
from mlxq.checkpoint.sources import method_of
from mlxq.checkpoint.summary import human_bytes, inspect
from mlxq.progress import Progress, progress
from mlxq.ptq.host import host, host_products
from mlxq.ptq.text import EVALUATION, LENGTH, token_windows

WINDOWS = 12
DECODED = 32  # tokens of the timed answer
CARD_HEAD = "## Measured with `mlxq eval`"
FLOOR = 1e-30  # below it a probability's logarithm is cut off, so that no KL is infinite


@dataclass
class Domain:
    """Sums over the scored tokens of one domain."""

    tokens: int = 0
    kl: float = 0.0
    kl_squared: float = 0.0
    nll: float = 0.0
    agreed: int = 0

    def add(self, other: Domain) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def means(self, compared: bool) -> dict:
        """Mean KL with its standard error, perplexity and agreement; of the float model the perplexity."""
        n = max(self.tokens, 1)
        out = {"tokens": self.tokens, "perplexity": math.exp(min(self.nll / n, 700.0))}
        if compared:
            spread = max(self.kl_squared / n - (self.kl / n) ** 2, 0.0)
            out |= {"kl": self.kl / n, "kl_error": math.sqrt(spread / n), "top1": self.agreed / n}
        return out


@dataclass
class Measured:
    """One model's row of the report; kl, kl_error and top1 are missing without a float model.

    domains  the same means by domain          bytes  of the weights, with scales and biases
    """

    name: str
    bytes: int
    bits_per_weight: float
    total: dict
    domains: dict[str, dict] = field(default_factory=dict)
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float | None = None


def evaluate(
    models: Iterable[str | Path],
    against: str | Path | None = None,
    texts: dict[str, list[str]] | None = None,
    *,
    windows: int = WINDOWS,
    length: int = LENGTH,
    decode: bool = True,
    shown: Progress | None = None,
) -> list[Measured]:
    """One row for each model, the float one first when there is one.

    models   what convert takes: folders, hub ids, GGUF files; ours and mlx-lm's run as they are, other
             quantized ones as the floats that they stand for, in a temporary folder
    against  the float model, of the same kinds
    texts    documents by domain (default: the set that comes with mlxq)
    windows  of `length` tokens, altogether, split evenly over the domains
    decode   also time an answer of 32 tokens
    shown    is told of each model, and of every window

    The float model's log-probabilities lie in a temporary file meanwhile, two bytes each. Raises ValueError
    and FileNotFoundError with one sentence; also when a model has another vocabulary than the float one.
    """
    if windows < 1 or length < 2:
        raise ValueError("eval: at least one window of two tokens is needed")
    texts = evaluation_texts() if texts is None else texts
    if not texts:
        raise ValueError("eval: there is no text to measure on")
    rows: list[Measured] = []
    models, shown = list(models), shown or Progress("", 0)
    names = _names(models if against is None else [against, *models])
    with tempfile.TemporaryDirectory(prefix="mlxq-eval-") as work:
        places = [_opened(path, Path(work) / f"floats-{n}", shown) for n, path in enumerate(models)]
        first = places[0] if against is None else _opened(against, Path(work) / "floats", shown)
        model, tokenizer = _load(first)
        each = max(1, windows // len(texts))
        cut = {
            domain: token_windows(documents, lambda text: tokenizer.encode(text, verbose=False), each, length)
            for domain, documents in texts.items()
        }
        shown.expect(len(names) * sum(windows.size for windows in cut.values()))
        truth = None
        if against is not None:
            shown.describe(f"measuring {names[0]}")
            truth = _Truth(Path(work), cut)
            size = _size(resolve(against), first)
            rows.append(_measure(size, names.pop(0), model, cut, truth.record, False, None, shown))
        del model
        for path, place, name in zip(models, places, names, strict=True):
            shown.describe(f"measuring {name}")
            model, tokenizer = _load(place)
            score, compared = (truth.compare, True) if truth else (_alone, False)
            talks = tokenizer if decode else None
            size = _size(resolve(path), place)
            rows.append(_measure(size, name, model, cut, score, compared, talks, shown))
    return rows


def _names(paths: list) -> list[str]:
    """The last part of each path, or all of it where two end alike."""
    last = [Path(path).name for path in paths]
    return [str(path) if last.count(name) > 1 else name for path, name in zip(paths, last, strict=True)]


def _opened(path: str | Path, work: Path, shown: Progress) -> Path:
    """The folder to load for a model: itself, or floats written to `work` for what no framework here runs.

    Raises FileNotFoundError and ValueError as convert does.
    """
    src = resolve(path)
    if src.is_dir():
        if not (src / "config.json").exists():
            raise FileNotFoundError(f"eval: {src} is not a model folder: it has no config.json")
        method = method_of(read_json(src / "config.json"))
        if method is None and any(src.glob("model*.safetensors")):
            return src
        if method is not None and method.name in ("MLX", "mxfp4"):  # mlx-lm's own
            return src
    shown.describe(f"writing {path} as floats")
    dequantize(src, work, dtype="float32")  # which they compute in: 16 bits would round some types
    return work


def evaluation_texts() -> dict[str, list[str]]:
    """The documents that come with mlxq, by domain: none of them is in the calibration set."""
    texts: dict[str, list[str]] = {}
    for document in EVALUATION.read_text(encoding="utf-8").split("\n---\n"):
        domain, _, body = document.partition("\n")
        texts.setdefault(domain.removeprefix("# "), []).append(body)
    return texts


class _Truth:
    """The float model's log-probabilities, float16 in a mapped file, and the comparison with them."""

    def __init__(self, folder: Path, cut: dict[str, np.ndarray]):
        self.path, self.array = folder / "truth", None
        self.places, at = {}, 0
        for domain, windows in cut.items():
            for number, window in enumerate(windows):
                self.places[domain, number] = at
                at += len(window) - 1
        self.positions = at

    def record(self, domain: str, number: int, logp: np.ndarray, following: np.ndarray) -> Domain:
        if self.array is None:
            wanted, free = 2 * self.positions * logp.shape[1], shutil.disk_usage(self.path.parent).free
            if wanted > free:
                raise OSError(
                    f"eval: {human_bytes(wanted)} are needed in {self.path.parent} and {human_bytes(free)} "
                    "are free; measure fewer windows"
                )
            self.array = np.memmap(self.path, np.float16, "w+", shape=(self.positions, logp.shape[1]))
        start = self.places[domain, number]
        self.array[start : start + len(logp)] = logp
        return Domain(tokens=len(logp), nll=_nll(logp, following))

    def compare(self, domain: str, number: int, logq: np.ndarray, following: np.ndarray) -> Domain:
        if logq.shape[1] != self.array.shape[1]:
            raise ValueError(
                f"eval: the model has {logq.shape[1]} tokens and the float model {self.array.shape[1]}"
            )
        start = self.places[domain, number]
        logp = self.array[start : start + len(logq)].astype(np.float32)
        kl = np.einsum("tv,tv->t", np.exp(logp), logp - logq).astype(np.float64)
        agreed = int((logp.argmax(-1) == logq.argmax(-1)).sum())
        return Domain(len(logq), float(kl.sum()), float((kl**2).sum()), _nll(logq, following), agreed)


def _alone(domain: str, number: int, logq: np.ndarray, following: np.ndarray) -> Domain:
    return Domain(tokens=len(logq), nll=_nll(logq, following))


def _nll(logp: np.ndarray, following: np.ndarray) -> float:
    return -float(logp[np.arange(len(following)), following].astype(np.float64).sum())


def log_probabilities(model, window: np.ndarray) -> np.ndarray:
    """float32 (len(window) - 1, vocabulary): of the token after each but the last."""
    logits = np.array(host(model(mx.array(window[None])))[0, :-1])
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.maximum(logits, np.float32(math.log(FLOOR)), out=logits)


def _size(src: Path, place: Path) -> tuple[int, float]:
    """(bytes, bits per weight) of a model that was loaded from `place`."""
    method = None if src.is_file() else method_of(read_json(src / "config.json"))
    if src.is_file() or (place == src and (method is None or method.name == "MLX")):
        summary = inspect(src)
        return summary.total_bytes, summary.bits_per_weight
    files = list(src.glob("*.safetensors")) or list(src.glob("*.bin"))
    count = sum(file.stat().st_size for file in files)
    if place == src:
        weights = sum(math.prod(tensor.shape) for tensor in HuggingFaceCheckpoint(src).tensors().values())
    else:
        weights = sum(layer.weights for layer in inspect(place).layers)
    return count, 8 * count / weights


def _measure(
    size: tuple[int, float], name: str, model, cut, score, compared: bool, tokenizer, shown: Progress
) -> Measured:
    seconds, tokens, domains = 0.0, 0, {}
    with host_products():
        for domain, windows in cut.items():
            domains[domain] = Domain()
            for number, window in enumerate(windows):
                begin = time.monotonic()
                logp = log_probabilities(model, window)
                seconds += time.monotonic() - begin
                tokens += len(window)
                domains[domain].add(score(domain, number, logp, window[1:]))
                shown.advance(len(window))
    total = Domain()
    for one in domains.values():
        total.add(one)
    return Measured(
        name,
        *size,
        total.means(compared),
        {domain: one.means(compared) for domain, one in domains.items()},
        tokens / seconds,
        None if tokenizer is None else _decode_rate(model, tokenizer, next(iter(cut.values()))[0]),
    )


def _decode_rate(model, tokenizer, window: np.ndarray) -> float:
    from mlx_lm import stream_generate

    last = None
    for last in stream_generate(model, tokenizer, window[:32].tolist(), max_tokens=DECODED):  # noqa: B007
        pass
    return float(last.generation_tps)


def _load(folder: Path):
    """(model, tokenizer) of a quantized model on our layers, or of a float one in float32."""
    from mlx_lm import utils

    from mlxq.load import load

    config = read_json(folder / "config.json")
    if "quantization" in config or "quantization_config" in config:
        return load(folder)
    try:
        model, config = utils.load_model(folder)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"eval: mlx-lm does not load {folder}: {error}") from error
    model.set_dtype(mx.float32)
    return model, utils.load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))


def report_html(rows: list[Measured]) -> str:
    """A page that needs nothing else: the table, KL by domain, and quality over bytes as a drawing."""
    compared = any("kl" in row.total for row in rows)
    domains = list(rows[0].domains)
    head = ["model", "size", "bits/weight", "perplexity"]
    head += ["KL", "± s.e.", "top-1"] if compared else []
    head += ["prefill tokens/s", "decode tokens/s"] + [f"KL, {d}" for d in domains if compared]
    lines = []
    for row in rows:
        cells = [row.name, human_bytes(row.bytes), f"{row.bits_per_weight:.3f}"]
        cells.append(f"{row.total['perplexity']:.3f}")
        if compared:
            cells += [_or_dash(row.total, "kl", ".4f"), _or_dash(row.total, "kl_error", ".4f")]
            cells += [_or_dash(row.total, "top1", ".1%")]
        rate = row.decode_tokens_per_s
        cells += [f"{row.prefill_tokens_per_s:.0f}", "-" if rate is None else f"{rate:.1f}"]
        cells += [_or_dash(row.domains[d], "kl", ".4f") for d in domains if compared]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    style = (
        "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ccc}"
        "td:first-child,th:first-child{text-align:left}"
    )
    tokens = rows[0].total["tokens"]
    return (
        f"<!doctype html><meta charset='utf-8'><title>mlxq eval</title><style>{style}</style>"
        f"<h1>mlxq eval</h1><p>{tokens:,} scored tokens; KL in nats per token.</p>"
        f"<table><tr>{titles}</tr>{''.join(lines)}</table>{_drawing(rows) if compared else ''}"
    )


def _or_dash(means: dict, key: str, form: str) -> str:
    return format(means[key], form) if key in means else "-"


def _drawing(rows: list[Measured]) -> str:
    """KL (logarithmic) over bytes as SVG."""
    points = [(row.bytes, max(row.total["kl"], 1e-6), row.name) for row in rows if "kl" in row.total]
    width, height, margin = 640, 380, 60
    lo_x, hi_x = 0.0, 1.15 * max(size for size, _, _ in points)
    logs = [math.log10(kl) for _, kl, _ in points]
    lo_y, hi_y = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)

    def place(size, log):
        x = margin + (size - lo_x) / (hi_x - lo_x) * (width - 2 * margin)
        return x, height - margin - (log - lo_y) / (hi_y - lo_y) * (height - 2 * margin)

    parts = [f'<svg width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    for power in range(lo_y, hi_y + 1):
        _, y = place(0, power)
        ends = f'x1="{margin}" x2="{width - margin}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="#ddd"/>')
        parts.append(f'<text x="{margin - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for (size, _, name), log in zip(points, logs, strict=True):
        x, y = place(size, log)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#06c"/>')
        label = html.escape(f"{name} ({human_bytes(size)})")
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{label}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 18}" text-anchor="middle">bytes of weights</text>')
    parts.append(f'<text x="{margin}" y="{margin - 20}">mean KL, nats per token</text></svg>')
    return "".join(parts)


def write_report(rows: list[Measured], path: Path) -> None:
    """.html, .json, or .png, which needs matplotlib. Raises ValueError for other endings."""
    if path.suffix == ".html":
        path.write_text(report_html(rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    elif path.suffix == ".png":
        _write_png(rows, path)
    else:
        raise ValueError(f"eval: a report is .html, .png or .json, not {path.name}")


def _write_png(rows: list[Measured], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "eval: a .png needs matplotlib (pip install matplotlib); an .html needs nothing"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [row for row in rows if "kl" in row.total]
    if not points:
        raise ValueError("eval: a plot needs a float model to compare with (--against)")
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.scatter([row.bytes / 1e6 for row in points], [row.total["kl"] for row in points])
    for row in points:
        axes.annotate(row.name, (row.bytes / 1e6, row.total["kl"]), (5, 5), textcoords="offset points")
    axes.set(xlabel="weights, MB", ylabel="mean KL, nats per token", yscale="log", xlim=(0, None))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def table(rows: list[Measured]):
    """A rich Table of the rows' means."""
    compared, out = any("kl" in row.total for row in rows), _empty_table()
    out.add_column("model", overflow="fold")
    titles = ["size", "bits", "perplexity"] + (["KL", "top-1"] if compared else []) + ["tokens/s"]
    for title in titles:
        out.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.name, human_bytes(row.bytes), f"{row.bits_per_weight:.3f}"]
        cells.append(f"{row.total['perplexity']:.2f}")
        if compared:
            cells += [_or_dash(row.total, "kl", ".4f"), _or_dash(row.total, "top1", ".1%")]
        rate = row.decode_tokens_per_s
        cells.append("-" if rate is None else f"{rate:.1f}")
        out.add_row(*cells)
    return out


def domains_table(rows: list[Measured]):
    """A rich Table of the KL divergence in each domain, a row each; None where nothing is compared."""
    compared, out = [row for row in rows if "kl" in row.total], _empty_table()
    if not compared:
        return None
    out.add_column("KL in", overflow="fold")
    for row in compared:
        out.add_column(row.name, justify="right", overflow="fold")
    for domain in rows[0].domains:
        out.add_row(domain, *(_or_dash(row.domains[domain], "kl", ".3f") for row in compared))
    return out


def _empty_table():
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False)


def run(args: argparse.Namespace) -> int:
    """Exit code of one evaluation. Bad input raises."""
    from rich.console import Console

    reports = [Path(path) for path in args.report]
    for path in reports:
        if path.suffix not in (".html", ".png", ".json"):
            raise ValueError(f"eval: a report is .html, .png or .json, not {path.name}")
    if args.card and not Path(args.model).expanduser().is_dir():
        raise ValueError(f"eval: --card writes into a model's folder, and {args.model} is none")
    texts: dict[str, list[str]] = {}
    for text in args.text:
        domain, equals, file = text.partition("=")
        path = Path(file if equals else text).expanduser()
        texts.setdefault(domain if equals else path.stem, []).append(path.read_text(encoding="utf-8"))
    with progress("reading the models", unit="tokens", size=1) as shown:
        rows = evaluate(
            [args.model, *args.compare],
            args.against,
            texts or None,
            windows=WINDOWS if args.windows is None else args.windows,
            length=LENGTH if args.length is None else args.length,
            shown=shown,
        )
    console = Console(highlight=False)
    console.print(table(rows))
    if (by_domain := domains_table(rows)) is not None:
        console.print(by_domain)
    for path in reports:
        write_report(rows, path)
        print(f"{path} is written")
    if args.card:
        append_to_card(rows, Path(args.model).expanduser(), args.against)
    return 0


def append_to_card(rows: list[Measured], folder: Path, against: str | None) -> None:
    """Put what was measured at the end of a model's README.md, in the place of what stood there before."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {folder.name}\n"
    means = rows[0 if against is None else 1].total  # the others are to compare with
    line = f"{means['tokens']} tokens: perplexity {means['perplexity']:.3f}"
    if "kl" in means:
        float_row = rows[0].total["perplexity"]
        line += (
            f" ({Path(against).name} in float: {float_row:.3f}), KL divergence from it {means['kl']:.4f} "
            f"(standard error {means['kl_error']:.4f}) nats per token, the same first choice for "
            f"{means['top1']:.1%} of the tokens"
        )
    card.write_text(f"{text.split(CARD_HEAD)[0].rstrip()}\n\n{CARD_HEAD}\n\n{line}.\n", encoding="utf-8")
