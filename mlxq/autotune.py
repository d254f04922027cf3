"""`mlxq autotune`: times our kernels against stock MLX on this machine, and keeps what is faster.

For every class of products (mlxq.ops.tuning) one product is made, both answers are compared with float64, and
then both are timed in turn: medians of interleaved rounds. Stock MLX is called as its own users call it, with
x and scales in one dtype, and wins only what it wins twice: a machine is seldom quiet. The tuning file is
replaced at the end, in one step; classes that this run did not time keep their decision.

What is left out is ours: on the CPU every dtype but float32 (see mlxq.ops.tuning), and classes in which one
stock call would take more than LONGEST seconds and which it lost clearly with fewer rows.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mlxq.format import GROUP_SIZES, KERNEL_BITS, STORAGE, Format, Packed, dtype_name
from mlxq.ops import native, reference, tuning

# One weight for each size of class, (N, K); both sides are multiples of every group.
SHAPES = {"small": (768, 768), "medium": (2048, 2048), "large": (4096, 4096)}
EXPERTS = 8
LONGEST = 0.5
CLEARLY = 2.0  # stock MLX being this much slower, a round that was long enough needs no second one
ROUND = 0.001  # seconds that one contender is timed for in a round, at least
SAMPLED = 256  # outputs of a product that are compared with float64, in at most 4 of its rows
WRONG = 3600.0  # seconds that stock MLX is said to take where its answer is wrong


@dataclass(frozen=True)
class Effort:
    """What is timed when no model says it, and for how many seconds at most."""

    rows: tuple[int, ...]
    sizes: tuple[str, ...]
    group_sizes: tuple[int, ...]
    seconds_per_product: float
    seconds: float


FULL = Effort((1, 2, 4, 8, 16, 32, 128, 512), ("small", "medium", "large"), GROUP_SIZES, 0.25, 3600)
QUICK = Effort((1, 8, 64), ("small", "medium"), (64,), 0.06, 12)


@dataclass(frozen=True)
class Product:
    """One product to be timed; experts is 0 but for gather_qmm."""

    device: str
    op: str
    fmt: Format
    dtype: str
    M: int
    N: int
    K: int
    experts: int = 0

    @property
    def kind(self) -> tuning.Class:
        """Its class."""
        return tuning.class_of(self.device, self.op, self.fmt, self.dtype, self.M, self.N, self.K)

    @property
    def weight(self) -> tuple:
        """What two products on the same weight share."""
        return self.device, self.fmt, self.dtype, self.N, self.K, self.experts

    @property
    def work(self) -> float:
        """Roughly proportional to the time that measuring it takes, for the progress bar."""
        return 1 + self.M * self.N * self.K / 2**24

    def __str__(self) -> str:
        return f"{self.op} {self.fmt} {self.M} x {self.N} x {self.K}"


@dataclass
class Outcome:
    """What a run found: times of each class, in the product in which we compare worst."""

    times: dict[tuning.Class, tuning.Times] = field(default_factory=dict)
    timed: int = 0
    skipped: int = 0
    out_of_time: int = 0
    seconds: float = 0.0


class WrongAnswer(Exception):
    """A kernel of ours is further from float64 than it may be."""


def autotune(quick: bool = False, model: str | None = None) -> Outcome:
    """Times of both on this machine, stored in the tuning file and followed from then on.

    model is a folder whose layers are timed instead of the fixed list. Raises ValueError when there is
    nothing to time, WrongAnswer when a kernel of ours is wrong (then nothing is stored), and what mlxq.load
    raises.
    """
    if not native.native_available():
        raise ValueError(f"autotune: there is nothing to compare: {native.native_error()}")
    effort = QUICK if quick else FULL
    outcome = measure_all(list(of_model(model, effort) if model else of_list(effort)), effort)
    try:
        before = tuning.read(native.machine(), always=True)
    except ValueError:
        before = None  # damaged, or of another machine: replaced
    tuning.write(native.machine(), {**(before.classes if before else {}), **outcome.times})
    native.retune()
    return outcome


# ----------------------------------------------------------------------------------------------- what to time


def devices() -> tuple[str, ...]:
    """The devices of this machine that have kernels of ours."""
    return ("cpu", "gpu") if mx.metal.is_available() else ("cpu",)


def dtypes(device: str) -> tuple[str, ...]:
    """The dtypes in which stock MLX may win there."""
    return ("float32",) if device == "cpu" else STORAGE


def of_list(effort: Effort) -> Iterator[Product]:
    """Every kind of product in the rows and sizes of `effort`: what matters most comes first."""
    for device in devices():
        for size in effort.sizes:
            for bits in (4, 8, 2):
                for group_size in sorted(effort.group_sizes, key=lambda g: g != 64):
                    for dtype in dtypes(device):
                        for op in tuning.OPS:
                            experts = EXPERTS if op == "gather_qmm" else 0
                            for M in effort.rows:
                                fmt = Format(bits, group_size)
                                yield Product(device, op, fmt, dtype, M, *SHAPES[size], experts)


def of_model(folder: str, effort: Effort) -> Iterator[Product]:
    """The products of a model's packed layers, each shape once, the most frequent first.

    Raises what mlxq.load raises, and ValueError for a model in which there is nothing to decide.
    """
    # mlx-lm takes seconds to import, and the fixed list does not need it.
    from mlxq.load import load
    from mlxq.nn.mlx import QuantizedEmbedding, QuantizedLinear, QuantizedSwitchLinear

    found: Counter = Counter()
    for _, layer in load(folder, lazy=True)[0].named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding, QuantizedSwitchLinear)):
            w = layer.packed
            experts = w.shape[0] if isinstance(layer, QuantizedSwitchLinear) else 0
            if w.format.bits in KERNEL_BITS:
                found[w.format, dtype_name(w.scales), w.N, w.K, experts] += 1
    if not found:
        raise ValueError(f"autotune: {folder} has no layer that a kernel of ours serves")
    products = [
        Product(device, op, fmt, dtype, M, N, K, experts)
        for device in devices()
        for (fmt, dtype, N, K, experts), _ in found.most_common()
        if dtype in dtypes(device)
        for op in (("gather_qmm",) if experts else ("qmm", "qmm_n"))
        for M in effort.rows
    ]
    if not products:
        stored = ", ".join(sorted({shape[1] for shape in found}))
        raise ValueError(
            f"autotune: there is nothing to decide for {folder}: its scales are {stored}, and on the CPU "
            "stock MLX serves float32 only, because it sums the others in their own type"
        )
    yield from products


# ----------------------------------------------------------------------------------------------------- timing


def measure_all(products: list[Product], effort: Effort) -> Outcome:
    """Times of every class that the products reach, with a progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcome, begin = Outcome(), time.perf_counter()
    lost: dict[tuple, tuple[int, float]] = {}  # op and weight -> rows and seconds with which stock lost
    key, w = None, None
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(p.work for p in products))
        for product in products:
            progress.update(task, description=str(product))
            rows, seconds = lost.get((product.op, product.weight), (1, 0.0))
            if time.perf_counter() - begin > effort.seconds:
                outcome.out_of_time += 1
            elif seconds * product.M / rows > LONGEST:
                outcome.skipped += 1
            else:
                if product.weight != key:
                    key, w = product.weight, random_weight(product)
                mlxq_s, stock_s = measure(product, w, effort.seconds_per_product)
                outcome.timed += 1
                if mlxq_s > tuning.MARGIN * stock_s:
                    again = measure(product, w, 3 * effort.seconds_per_product)
                    mlxq_s, stock_s = min((mlxq_s, stock_s), again, key=lambda both: both[0] / both[1])
                if stock_s > CLEARLY * mlxq_s:
                    lost[product.op, product.weight] = product.M, stock_s
                _keep_worst(outcome.times, product.kind, mlxq_s, stock_s)
            progress.advance(task, product.work)
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _keep_worst(times: dict, kind: tuning.Class, mlxq_s: float, stock_s: float) -> None:
    """Stock MLX gets a class only if it wins with every shape in it."""
    new, old = tuning.Times(1e3 * mlxq_s, 1e3 * stock_s), times.get(kind)
    if old is None or new.mlxq_ms / new.stock_ms < old.mlxq_ms / old.stock_ms:
        times[kind] = new


def measure(product: Product, w: Packed, seconds: float) -> tuple[float, float]:
    """Median seconds of one call, ours and stock MLX's, found in about so many seconds.

    Raises WrongAnswer for ours; where stock MLX's answer is wrong it is said to take WRONG seconds.
    """
    with mx.stream(getattr(mx, product.device)), native.untuned():
        ours, stock, wrong = _contenders(product, w)
        calls = {}
        for name, call in (("mlxq", ours), ("stock", stock)):
            calls[name], y = _calls(call, product.device)
            if error := wrong(y):
                if name == "mlxq":
                    raise WrongAnswer(f"autotune: {product.kind}: {error}")
                return _seconds(name, ours, calls["mlxq"]), WRONG
        times: dict[str, list[float]] = {"mlxq": [], "stock": []}
        begin = time.perf_counter()
        while True:
            turn = (("mlxq", ours), ("stock", stock))
            for name, call in turn if len(times["mlxq"]) % 2 else turn[::-1]:
                times[name].append(_seconds(name, call, calls[name]))
            medians = [statistics.median(times[name]) for name in ("mlxq", "stock")]
            clear, spent = medians[1] > CLEARLY * medians[0], time.perf_counter() - begin
            rounds = len(times["mlxq"])
            if rounds >= 15 or (rounds >= 3 and spent > seconds) or (clear and spent > seconds / 3):
                return tuple(medians)


def _calls(call: Callable, device: str) -> tuple[int, mx.array]:
    """(How many calls fill a round, an answer.) On a GPU our first call compiles: the second one counts."""
    if device == "gpu":
        mx.eval(call())
    begin = time.perf_counter()
    mx.eval(y := call())
    return max(1, round(ROUND / max(time.perf_counter() - begin, 1e-6))), y


def _seconds(contender: str, call: Callable, calls: int) -> float:
    """Seconds of one call of a contender, in a graph of so many: a model's step is one graph, too."""
    begin = time.perf_counter()
    mx.eval([call() for _ in range(calls)])
    return (time.perf_counter() - begin) / calls


def random_weight(product: Product) -> Packed:
    """Random codes with scales that make the weights about N(0, 1 / K): (N, K), or (experts, N, K)."""
    rng, fmt = np.random.default_rng(0), product.fmt
    lead = (product.experts,) if product.experts else ()
    words = rng.integers(0, 2**32, (*lead, product.N, fmt.words_per_row(product.K)), dtype=np.uint32)
    scales = rng.uniform(2, 4, (*lead, product.N, fmt.groups(product.K))) / fmt.levels / product.K**0.5
    dtype = getattr(mx, product.dtype)
    parts = (scales, scales * (-fmt.levels / 2))
    return Packed(mx.array(words), *(mx.array(a.astype(np.float32)).astype(dtype) for a in parts), fmt)


def _contenders(product: Product, w: Packed) -> tuple[Callable, Callable, Callable]:
    """(our call, stock MLX's call, what is wrong with an answer: a sentence or None)."""
    rng, fmt = np.random.default_rng(1), product.fmt
    transpose = product.op != "qmm_n"
    rows = (product.M, 1) if product.experts else (product.M,)
    x = rng.standard_normal((*rows, product.K if transpose else product.N)).astype(np.float32)
    x = mx.array(x).astype(getattr(mx, product.dtype))
    # As mlx-lm's layers do: experts in ascending order from 64 rows on.
    chosen, ordered = rng.integers(0, max(product.experts, 1), product.M), product.M >= 64
    experts = mx.array((np.sort(chosen) if ordered else chosen).astype(np.uint32))
    mx.eval(x, experts, w.words, w.scales, w.biases)
    arrays, stored = (x, w.words, w.scales, w.biases), {"group_size": fmt.group_size, "bits": fmt.bits}
    if product.experts:
        choice = {"rhs_indices": experts, "sorted_indices": ordered}
        calls = (
            lambda: native.gather_qmm(x, w, **choice),
            lambda: mx.gather_qmm(*arrays, transpose=True, **choice, **stored),
        )
    else:
        calls = (
            lambda: native.qmm(x, w, transpose),
            lambda: mx.quantized_matmul(*arrays, transpose=transpose, **stored),
        )
    want = _float64(x, w, transpose, experts if product.experts else None)
    limit = reference.TOLERANCE[product.dtype]
    if product.device == "gpu":
        limit = max(limit, 2e-3)  # MLX may multiply float32 there in TF32, which has 11 bits

    def wrong(y) -> str | None:
        got = np.array(y[:4, ..., : want.shape[-1]].astype(mx.float32)).astype(np.float64)
        error = float(np.sqrt(((got - want) ** 2).sum() / (want**2).sum()))
        return None if error <= limit else f"the answer is off by {error:.1e}, and {limit:.0e} is allowed"

    return *calls, wrong


def _float64(x, w: Packed, transpose: bool, experts) -> np.ndarray:
    """The first 4 rows and SAMPLED outputs: of W some rows, or with transpose=False the first groups."""
    if transpose:
        parts = (a[..., :SAMPLED, :] for a in (w.words, w.scales, w.biases))
    else:
        groups = SAMPLED // w.format.group_size
        words = w.format.words_per_row(groups * w.format.group_size)
        parts = (w.words[..., :words], w.scales[..., :groups], w.biases[..., :groups])
    part = Packed(*parts, w.format)
    if experts is None:
        return reference.qmm(x[:4], part, transpose)
    few = Packed(*(a[experts[:4]] for a in (part.words, part.scales, part.biases)), w.format)
    return reference.gather_qmm(x[:4], few)


# ----------------------------------------------------------------------------------------------------- output


def show(outcome: Outcome, console: Console) -> None:
    """A line for each kind of product, a column for each number of rows: stock's time over ours."""
    columns = sorted({kind.rows for kind in outcome.times})
    title = "Stock MLX's time / mlxq's, by rows of x"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_style="", title_justify="left")
    lines: dict[tuple, dict[int, tuning.Times]] = {}
    for kind, times in outcome.times.items():
        line = kind.device, kind.op, f"{kind.bits}-bit/{kind.group_size}", kind.size, kind.dtype
        lines.setdefault(line, {})[kind.rows] = times
    # A device or a dtype that is the same everywhere gives its room to the others: 80 columns are few.
    names = ("device", "product", "weights", "size", "x")
    shown = [i for i, name in enumerate(names) if i in (1, 2, 3) or len({line[i] for line in lines}) > 1]
    for i in shown:
        table.add_column(names[i])
    for rows in columns:
        label = f">{rows // 2}" if rows == tuning.ROWS[-1] else str(rows)
        table.add_column(label, justify="right", no_wrap=True)
    for line, cells in lines.items():
        table.add_row(*(line[i] for i in shown), *(_cell(cells.get(rows)) for rows in columns))
    console.print(table)
    lost = [kind for kind, times in outcome.times.items() if times.winner == "stock"]
    said = [f"stock MLX serves {kind}" for kind in lost]
    said += [f"{outcome.timed} products in {outcome.seconds:.0f} s"]
    if outcome.skipped:
        said += [f"{outcome.skipped} left out: stock MLX takes long, and lost with fewer rows"]
    if outcome.out_of_time:
        said += [f"{outcome.out_of_time} not reached in time"]
    said += [f"mlxq serves {len(outcome.times) - len(lost)} classes, stock MLX {len(lost)}"]
    for text in said:
        console.print(text, markup=False, soft_wrap=True)


def _cell(times: tuning.Times | None) -> str:
    if times is None:
        return "-"
    ratio = times.stock_ms / times.mlxq_ms
    text = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"
    text = "wrong" if times.stock_ms >= 1e3 * WRONG else text
    return f"[bold]{text}[/bold]" if times.winner == "stock" else text
