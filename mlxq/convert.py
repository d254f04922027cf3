"""From a checkpoint to MLX format, one tensor at a time, into a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mlxq import __version__, bridge, format
from mlxq.checkpoint import journal
from mlxq.checkpoint.gguf import GgufCheckpoint
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint, resolve
from mlxq.checkpoint.journal import Journal, identity
from mlxq.checkpoint.memory import MemoryExceededError, Watch, anonymous_bytes, parse_bytes
from mlxq.checkpoint.partial import check_destination
from mlxq.checkpoint.ranks import OtherRankError, Ranks, check_others, from_environment, share, shared_folder
from mlxq.checkpoint.safetensors import SHARD_BYTES, STORED, Planned, Writer, as_stored
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.checkpoint.summary import ACTIVATIONS, Estimate, Layer, Summary, human_bytes, inputs_shown, inspect
from mlxq.checkpoint.tensors import ArrayTensor
from mlxq.format import Format, Packed
from mlxq.progress import progress as telling
from mlxq.ptq import METHODS, Statistics, qarray
from mlxq.ptq.calibrate import calibrate_blocks
from mlxq.ptq.calibrated import Changed, Solved, Spool, quantize_blocks
from mlxq.ptq.estimate import Task, peak_bytes, seconds
from mlxq.ptq.pack import pack
from mlxq.ptq.plan import Site, operation, site_of
from mlxq.ptq.qarray import HowToQuantize
from mlxq.ptq.sensitivity import allocate, pieces, plan_rules, read_costs, sensitivities, write_costs
from mlxq.ptq.tensors import MxFormat, input_tensors, mx_format, mx_tensors
from mlxq.ptq.text import read_text, token_windows
from mlxq.rules import QuantizationRule, RuleSet

__all__ = ["Report", "convert", "inspect"]

DEFAULT = Format(4, 64)
GGUF_DEFAULT = Format(4, 32)
STATISTICS = "activation_statistics.npz"  # beside a model with static scales: what Statistics.save writes
RANGING = "measuring ranges"
SLAB_WEIGHTS = 1 << 18  # weights in float32 at once: 1 MB, and about five times that with every temporary
SLAB_BYTES = 48  # of memory for a weight of a slab, at most: float32 and float64 copies, codes as bits
MEMORY_MARGIN = 96 << 20  # for imports, headers and the report
# Arguments that change how a conversion goes and not what it writes.
_NOT_THE_RESULT = ("src", "dst", "overwrite", "max_memory", "resume", "dry_run", "progress")

Report = Summary


@dataclass
class Step:
    """What happens to one tensor.

    format        None keeps it in float (or whatever it is)
    repack        codes are taken over as they are
    grid          the quantizer that chooses codes, scales and biases: a name of rules.GRIDS
    site          of a rule with another quantizer than those of rules.GRIDS
    dtype         of scales and biases, or of the tensor itself
    inputs        "" or " + int8 inputs": what mlxq.load shall do with them
    """

    name: str
    tensor: object
    dtype: str
    format: Format | MxFormat | None = None
    repack: bool = False
    grid: str = "affine"
    site: Site | None = None
    inputs: str = ""

    @property
    def stored(self) -> str:
        """The format, as `inspect` shows it."""
        return str(self.format or self.dtype) + self.inputs

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight") if self.format else self.name

    @property
    def rows(self) -> int:
        return int(np.prod(self.tensor.shape[:-1], dtype=np.int64))

    def planned(self) -> list[Planned]:
        """The tensors that this one becomes."""
        shape = self.tensor.shape
        if self.format is None:
            return [Planned(self.name, STORED.get(self.dtype, self.dtype), shape)]
        *leading, K = shape
        groups = (*leading, self.format.groups(K))
        words = Planned(self.name, "U32", (*leading, self.format.words_per_row(K)))
        if isinstance(self.format, MxFormat):
            return [words, Planned(f"{self.path}.scales", "U8", groups)]
        scale = STORED[self.dtype]
        return [words, *(Planned(f"{self.path}.{part}", scale, groups) for part in ("scales", "biases"))]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    rules: Iterable[str | QuantizationRule] = (),
    allow_unused_rules: bool = False,
    embedding_bits: int | None = None,
    quantization_rule: str = "affine",
    method: str | None = None,
    calibration: str | Path | None = None,
    target_bpw: float | None = None,
    plan: str | Path | None = None,
    costs: str | Path | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    max_memory: int | str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Write the model src in MLX format, quantized, as the new folder dst, and report what was done.

    src               a Hugging Face folder (floats, GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8, MLX), a
                      hub id, or a GGUF file
    bits, group_size  default 4 and 64. A quantized source keeps its own widths and groups when both are None;
                      when one is given, the other defaults to the source's (for a GGUF, to 4 or 32)
    dtype             of what stays in float and of scales and biases; default: the one that most of the
                      source's weights have, float16 for a GGUF
    rules             "PATTERN=bits:8,group_size:32" or QuantizationRule; they win over embedding_bits, that
                      over the model's own preferences, those over bits and group_size
    allow_unused_rules   a rule that matches nothing is a remark in the report, not an error
    embedding_bits    width of the token embedding and of the output head
    quantization_rule "affine" (ours) or "mlx" (the codes of mx.quantize)
    method            "rtn" rounds each weight to the nearest code; "gptq" chooses codes, scales and biases
                      that keep the layers' outputs on calibration text; "awq" scales input channels by how
                      much they matter and rounds; "awq+gptq" does both; "auto" is gptq where it helps.
                      Default: auto with a calibration text or target_bpw, else rtn
    calibration       a text or .jsonl file for gptq and for the static input scales that rules ask for
                      (default: a small set that comes with mlxq)
    target_bpw        bits per weight of the whole model: bits and groups of the layers that no rule names are
                      chosen by the KL divergence that each layer's error causes on the calibration text
    plan              a .json file for the formats so chosen; given as rules it makes the same files again
    costs             a .json file with the KL divergences measured for target_bpw: read where it exists,
                      written where not, so that several targets need one measurement
    allow_nonfinite   keep layers that hold NaN or Inf in float and list them, instead of refusing
    overwrite         replace dst if it is a model folder; it stays until the new one is complete
    max_memory        bytes of anonymous memory, or "3GB": less is held at once, or the conversion is refused
    resume            go on with what an interrupted conversion with these arguments left beside dst
    dry_run           write nothing; the report has sizes and estimates of time and memory

    A layer whose K its group size does not divide stays in float and is listed, as in mlx-lm. Integer codes
    of the source are repacked, not quantized again, where the wanted format holds them: as many bits or more,
    and groups that divide the source's. Peak memory is a few MB, whatever the model's size; a tensor that
    mlx-lm computes from others is held whole.

    Raises FileExistsError, FileNotFoundError, ValueError, ImportError or OSError with one sentence;
    nothing is left under dst then.
    """
    arguments = {name: value for name, value in locals().items() if name not in _NOT_THE_RESULT}
    begin = time.monotonic()
    _check_arguments(bits, group_size, dtype, embedding_bits, quantization_rule, max_shard_bytes)
    if plan is not None and target_bpw is None:
        raise ValueError("convert: a plan is what target_bpw makes; to follow one, give it as rules")
    if costs is not None and target_bpw is None:
        raise ValueError("convert: costs are what target_bpw measures; give both")
    method = method or ("rtn" if calibration is None and target_bpw is None else "auto")
    if method not in _METHOD_WORDS:
        raise ValueError(f"convert: no method {method!r}; built: {', '.join(_METHOD_WORDS)}")
    rules = RuleSet(rules, quantization_rule).rules
    with_text = method != "rtn" or target_bpw is not None or any(rule.act_static_scale for rule in rules)
    documents = read_text(calibration) if with_text else []
    dst = Path(dst).expanduser().absolute()
    check_destination(dst, overwrite)
    src = resolve(src)
    if dst.resolve() in (src.resolve(), *src.resolve().parents):
        raise ValueError(f"{dst} is or holds the source {src}: choose another folder")
    limit = parse_bytes(max_memory) if max_memory is not None else None
    if limit is not None and anonymous_bytes() is None:
        raise ValueError("convert: this system does not tell how much memory is anonymous; omit max_memory")
    digest = identity(src, arguments | {"text": documents})
    checkpoint = _open(src)
    group = Ranks() if dry_run else from_environment()
    wanted = digest if resume else None
    place = TemporaryDirectory() if dry_run else shared_folder(group, dst, overwrite, wanted)
    with place as folder, Watch(limit) as memory, ExitStack() as stack:
        folder = Path(folder)
        done = journal.read(folder, digest) or {}
        group.gather("")  # nobody writes a journal before everybody has read them
        log = stack.enter_context(closing(Journal(folder, digest, group.rank)))
        found = folder / journal.FOUND
        workspace = folder / f"workspace-{group.rank}"
        shutil.rmtree(workspace, ignore_errors=True)
        checkpoint.prepare(workspace, values=not dry_run)
        dtype = dtype or checkpoint.float_dtype()
        planner = _Planner(checkpoint, bits, group_size, dtype, rules, embedding_bits, trust_remote_code)
        planner.grid, planner.allow_unused_rules = quantization_rule, allow_unused_rules
        report = Summary(dst, f"{dst.name}: {checkpoint.config.get('model_type')}")
        broken = planner.nonfinite_layers() if allow_nonfinite else {}
        steps = planner.steps(report, broken)
        windows = _calibration_windows(checkpoint, documents, workspace) if documents else None
        slab = _slab_weights(steps, limit)
        how = "gptq" if method == "auto" else method
        if (method != "rtn" or target_bpw is not None) and not dry_run:
            _check_calibration(_Calibrated.of(planner, steps, broken, windows, how), limit)
        measuring = time.monotonic()
        if target_bpw is not None:
            given = (windows, broken, costs, found, group, memory, progress)
            formats = _spend(planner, steps, target_bpw, *given)
            if plan is not None and group.rank == 0:
                text = json.dumps(plan_rules(formats), indent=1)
                Path(plan).expanduser().write_text(text + "\n", encoding="utf-8")
        measuring = time.monotonic() - measuring
        calibrated = _Calibrated.of(planner, steps, broken, windows, how) if method != "rtn" else None
        if calibrated is not None and not dry_run:
            spool = Spool(found / f"solved-{group.rank}")
            _calibrate(planner, steps, windows, spool, how, report, broken, memory, progress)
        if planner.static and not dry_run:
            stats = _static_ranges(planner, steps, windows, report, memory, progress)
        stored = [planned for step in steps for planned in step.planned()]
        writer = Writer(folder, stored, max_shard_bytes, parameters=sum(_size(step) for step in steps))
        if dry_run:
            return _estimated(report, steps, writer, slab, calibrated, measuring)
        _check_space(folder, writer.file_bytes)
        bar = telling("converting", writer.parameters) if progress and group.rank == 0 else nullcontext()
        # nullcontext gives None
        with writer, bar as bar:
            mine = share(group, {s.name: _size(s) for s in steps}, writer.weight_map)
            lines = _write_steps(steps, done, mine, writer, log, slab, memory, broken, bar)
        for text in group.gather(json.dumps(lines)):
            lines |= json.loads(text)
        report.layers = [Layer(**lines[step.name]) for step in steps]
        shutil.rmtree(workspace, ignore_errors=True)
        report.seconds, report.peak_memory = time.monotonic() - begin, memory.peak
        if limit is not None:
            used, allowed = human_bytes(memory.peak), human_bytes(limit)
            report.notices.append(f"at most {used} of anonymous memory were in use; {allowed} were allowed")
        if group.rank == 0:
            _write_config(checkpoint.config, planner, steps, dtype, folder)
            if planner.static:
                stats.save(folder / STATISTICS)
            report.notices += checkpoint.write_tokenizer(folder)
            if windows is not None:
                text = "the set that comes with mlxq" if calibration is None else Path(calibration).name
                report.text = f"{windows.size} tokens of {text}"
            write_card(report, src, method, folder)
    return report


def _solvable(steps: list[Step], broken: Container[str]) -> list[Step]:
    """Steps that quantize float weights to a plain format."""
    return [s for s in steps if s.format and not s.repack and s.site is None and s.name not in broken]


def _calibration_windows(checkpoint, documents: list[str], workspace: Path) -> np.ndarray:
    """Token ids (count, length) of the documents under the model's own tokenizer."""
    from mlx_lm.utils import load_tokenizer, save_config

    folder = workspace / "tokenizer"
    folder.mkdir(parents=True)
    checkpoint.write_tokenizer(folder)
    save_config(dict(checkpoint.config), folder / "config.json")
    tokenizer = load_tokenizer(folder)
    # verbose: transformers else warns that a document is longer than the model's context
    return token_windows(documents, lambda text: tokenizer.encode(text, verbose=False))


@contextmanager
def _streaming(
    planner: _Planner, steps: list[Step], wanted, what: str, memory: Watch, progress: bool, changes=None
):
    """(model without weights, reader of its float32 parameters, progress function) for a pass over blocks.

    changes   what to do to parameters that are read, by name
    """
    skeleton, weights = planner._load()

    def read(name: str) -> np.ndarray:
        tensor = weights.pop(name)
        if changes and name in changes:
            tensor = Changed(tensor, changes[name])
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        values = tensor.read(0, rows) if _is_float(tensor.dtype) else tensor.read_raw(0, rows)
        values = np.array(values).reshape(tensor.shape)
        tensor.release()
        return values

    sizes = {step.path: _size(step) for step in steps}
    bar = telling(what, sum(sizes[path] for path in wanted)) if progress else nullcontext()
    with bar as bar:

        def advance(count: int) -> None:
            memory.check()
            if bar is not None:
                bar.advance(count)

        try:
            yield skeleton.model, read, advance
        except (MemoryExceededError, OtherRankError):
            raise
        except ValueError as error:
            kind = planner.checkpoint.config.get("model_type")
            way_out = "dynamic scales do" if what == RANGING else "--method rtn does"
            raise ValueError(f"calibration does not work on {kind}: {error}; {way_out}") from error


def _spend(
    planner: _Planner, steps: list[Step], target_bpw: float, windows: np.ndarray, broken, file, found: Path,
    group: Ranks, memory: Watch, progress,
) -> dict[str, Format]:  # fmt: skip
    """Give the layers that no rule names formats that fit the target, by measured KL; all formats by path.

    file    of the costs, or None; it is written where there is none
    found   folder that keeps them for a run that goes on with this one; each process measures some layers
    """
    named = planner.named_by_rules
    free = {s.path: s for s in _solvable(steps, broken) if s.path not in named and _size(s)}
    fixed = sum(p.nbytes for s in steps if s.path not in free for p in s.planned())
    budget = target_bpw * sum(_size(step) for step in steps) - 8 * fixed
    sizes = {path: _size(step) for path, step in free.items()}
    shapes = {path: (sizes[path], step.tensor.K) for path, step in free.items()}
    kept, file = found / "costs.json", None if file is None else Path(file).expanduser()
    first = group.rank == 0
    if first:
        found.mkdir(exist_ok=True)
        if file is not None and file.exists():
            write_costs(read_costs(file, shapes), kept)
    group.gather("")
    if not kept.exists():
        chosen, fit = pieces(windows)
        mine = share(group, sizes, {path: path for path in sizes})
        dtypes = {path: step.dtype for path, step in free.items() if path in mine}
        with _streaming(planner, steps, dtypes, "measuring", memory, progress and first) as streaming:
            model, read, advance = streaming
            costs = sensitivities(model, read, chosen, dtypes, fit, advance=advance)
        half = found / f"costs-{group.rank}.part"
        write_costs(costs, half)
        group.gather("")
        if first:
            measured = [path for path in found.glob("costs-*.part")]
            lines = [json.loads(path.read_text(encoding="utf-8")) for path in measured]
            merged = {name: line for some in lines for name, line in some.items()}
            text = json.dumps({path: merged[path] for path in free}, indent=1) + "\n"
            half.write_text(text, encoding="utf-8")
            half.replace(kept)
        group.gather("")
    costs = read_costs(kept, shapes)
    if file is not None and first and not file.exists():
        write_costs(costs, file)
    try:
        formats = allocate(costs, budget)
    except ValueError as error:
        raise ValueError(f"convert: {target_bpw:g} bits per weight cannot be met: {error}") from None
    for path, fmt in formats.items():
        free[path].format = fmt
    return {step.path: step.format for step in steps if step.format}


def _calibrate(
    planner: _Planner, steps: list[Step], windows: np.ndarray, spool: Spool, method: str, report, broken,
    memory: Watch, progress,
) -> None:  # fmt: skip
    """Solve the layers of the blocks on calibration text, and make their steps take over what was found.

    What the spool's folder holds of an earlier run is not solved again.
    """
    wanted = {step.path: (step.format, step.dtype) for step in _solvable(steps, broken)}
    with _streaming(planner, steps, wanted, "calibrating", memory, progress) as (model, read, advance):
        solved, remarks = quantize_blocks(
            model, read, windows, wanted, spool, method=method, rule=planner.grid, storage=planner.dtype,
            advance=advance,
        )  # fmt: skip
    for step in steps:
        if step.name in spool.changes:
            step.tensor = Changed(step.tensor, spool.changes[step.name])
        if step.path in solved:
            step.tensor, step.repack = Solved(step.tensor, spool.load(step.path)), True
    rounded = [path for path in wanted if path not in solved]
    report.notices += remarks
    report.notices.append(
        f"{method} on {windows.size} tokens: {len(solved)} layers"
        + (f"; rounded to nearest: {', '.join(rounded[:3])}" if rounded else "")
        + (f" and {len(rounded) - 3} more" if len(rounded) > 3 else "")
    )


def _static_ranges(
    planner: _Planner, steps: list[Step], windows: np.ndarray, report, memory: Watch, progress
) -> Statistics:
    """Ranges of inputs with a static scale in the float model, with what awq did to it; notes the scales."""
    changes = {step.name: change for step in steps if (change := getattr(step.tensor, "change", None))}
    sites = planner.static
    wanted = [site.path.replace("/", ".") for site in sites.values()]
    with _streaming(planner, steps, wanted, RANGING, memory, progress, changes) as (model, read, advance):
        stats = calibrate_blocks(model, read, windows, sites, advance)
    for path, site in sites.items():
        scale = input_tensors(site, stats, windows.astype(np.float32))["scale_a"]
        planner.activations[path.replace("/", ".")]["scale_a"] = scale.tolist()
    report.notices.append(
        f"{len(sites)} static scales of inputs from {windows.size} tokens; {STATISTICS} has their ranges"
    )
    return stats


def _slab_weights(steps: list[Step], limit: int | None) -> int:
    """How many weights to hold in float32 at once. Raises ValueError when the limit allows too few."""
    if limit is None:
        return SLAB_WEIGHTS
    used = anonymous_bytes() or 0
    held = {step.path: _held(step) for step in steps}
    largest = max(held, key=held.get)
    row = max(step.tensor.K for step in steps)
    room = limit - used - held[largest] - MEMORY_MARGIN
    if room < SLAB_BYTES * max(row, 1 << 12):
        needed = used + held[largest] + MEMORY_MARGIN + SLAB_BYTES * max(row, 1 << 12)
        what = f"{largest} is computed whole" if held[largest] else f"rows have {row} weights"
        short = f"{human_bytes(limit)} of memory are too little, {human_bytes(needed)} are needed"
        raise ValueError(f"convert: {short}: {what}")
    return min(SLAB_WEIGHTS, room // SLAB_BYTES)


def _check_calibration(calibrated: _Calibrated, limit: int | None) -> None:
    """Raises ValueError when the limit is below what calibration is expected to hold."""
    if limit is None:
        return
    needed = (anonymous_bytes() or 0) + MEMORY_MARGIN + calibrated.bytes
    if needed > limit:
        short = f"{human_bytes(limit)} of memory are too little, about {human_bytes(needed)} are needed"
        raise ValueError(
            f"convert: {short}: the largest block and what stands outside of the blocks in float32, states "
            f"of {calibrated.tokens} tokens, and the Hessian of an input; --method rtn needs less"
        )


def _held(step: Step) -> int:
    """Bytes that reading a tensor holds whatever the slab: itself and what mlx-lm computes it from."""
    return 3 * 4 * _size(step) if isinstance(step.tensor, ArrayTensor) else 0


@dataclass
class _Calibrated:
    """What calibration works on: tasks of each block, weights of the largest block and of each parameter
    outside, tokens, the width of a state, experts that a token goes through.
    """

    blocks: list[list[Task]]
    block_weights: int
    outer: list[int]
    tokens: int
    width: int
    experts_used: int
    method: str

    @classmethod
    def of(cls, planner: _Planner, steps: list[Step], broken, windows: np.ndarray, method: str):
        """From the plan alone; blocks are what stands under a number."""
        blocks: dict[str, list[Task]] = {}
        sizes: dict[str, int] = {}
        outer = []
        solvable = {step.name for step in _solvable(steps, broken)}
        for step in steps:
            number = next((part for part in step.path.split(".") if part.isdigit()), None)
            if number is None:
                outer.append(_size(step))
                continue
            sizes[number] = sizes.get(number, 0) + _size(step)
            if step.name in solvable:
                blocks.setdefault(number, []).append(Task(tuple(step.tensor.shape), step.format))
        config = planner.checkpoint.config
        used = config.get("num_experts_per_tok") or 1
        width = config.get("hidden_size") or 0
        return cls(
            list(blocks.values()), max(sizes.values(), default=0), outer, windows.size, width, used, method
        )

    @property
    def seconds(self) -> float:
        tasks = [task for block in self.blocks for task in block]
        return seconds(tasks, self.tokens, self.method, self.experts_used)

    @property
    def bytes(self) -> int:
        """Beside what the process has."""
        return peak_bytes(self.blocks, self.block_weights, self.outer, self.tokens, self.width, self.method)


def _estimated(
    report: Report, steps: list[Step], writer: Writer, slab: int, calibrated: _Calibrated | None, measuring
) -> Report:
    """The report with planned sizes and memory, and with the time that samples let expect.

    measuring   seconds that choosing the formats took; a conversion will do it again
    """
    for step in steps:
        size = sum(planned.nbytes for planned in step.planned())
        report.layers.append(Layer(step.path.replace(".", "/"), step.stored, _size(step), size))
    step = max(steps, key=_size)
    begin, sampled = time.monotonic(), 0
    for start, stop in _bounds(step.tensor, slab):
        if isinstance(step.tensor, ArrayTensor) or time.monotonic() - begin > 0.5:
            break
        values = step.tensor.read(start, stop)
        if step.format is not None and np.isfinite(values).all():
            _quantized(step, values, start, stop)
        sampled += values.size
    rate = sampled / (time.monotonic() - begin) if sampled else 2e7
    taken, memory = writer.parameters / rate + measuring, SLAB_BYTES * slab + max(map(_held, steps))
    if calibrated is not None:
        taken, memory = taken + calibrated.seconds, max(memory, calibrated.bytes)
    memory += (anonymous_bytes() or 0) + MEMORY_MARGIN
    report.planned = Estimate(taken, memory, writer.file_bytes)
    return report


def _write_steps(steps, done, mine, writer: Writer, log: Journal, slab, memory, broken, bar) -> dict:
    """Write the tensors of this process that no earlier run has written; lines of the report by name."""
    lines = {}
    try:
        for step in steps:
            check_others(writer.folder)
            names = [planned.name for planned in step.planned()]
            line = done.get(step.name, {})
            same = line.get("stored") == step.stored
            if same and all(writer.holds(name) for name in names):
                lines[step.name] = line
            elif step.name in mine:
                lines[step.name] = asdict(_write(step, writer, broken, bar, slab, memory))
                log.add(step.name, lines[step.name], lines[step.name]["bytes"], writer.files.values())
                continue
            for name in names:
                writer.skip(name)
            if bar is not None:
                bar.advance(_size(step))
    except KeyboardInterrupt:
        log.flush(writer.files.values())
        raise
    log.flush(writer.files.values())
    return lines


def _check_arguments(bits, group_size, dtype, embedding_bits, quantization_rule, max_shard_bytes) -> None:
    chosen = _with_defaults(bits, group_size, DEFAULT)
    if embedding_bits is not None:
        Format(embedding_bits, chosen.group_size)
    if dtype is not None and dtype not in format.STORAGE:
        raise ValueError(f"convert: dtype {dtype!r} does not exist; built: {', '.join(format.STORAGE)}")
    if quantization_rule not in format.RULES:
        raise ValueError(
            f"convert: no quantization rule {quantization_rule!r}; built: {', '.join(format.RULES)}"
        )
    if max_shard_bytes <= 0:
        raise ValueError(f"convert: shards of {max_shard_bytes} bytes cannot hold a tensor")


def _with_defaults(bits: int | None, group_size: int | None, default: Format) -> Format:
    return Format(
        default.bits if bits is None else bits, default.group_size if group_size is None else group_size
    )


def _open(src: Path) -> GgufCheckpoint | HuggingFaceCheckpoint:
    if src.is_dir():
        return HuggingFaceCheckpoint(src)
    if src.suffix in (".safetensors", ".bin", ".json"):
        raise ValueError(f"{src} is one file of a model: give its folder, {src.parent}")
    return GgufCheckpoint(src)


class _Planner:
    """Decides, before anything is written, what every tensor becomes."""

    def __init__(self, checkpoint, bits, group_size, dtype, rules, embedding_bits, trust_remote_code):
        self.checkpoint, self.dtype, self.rules = checkpoint, dtype, rules
        self.embedding_bits, self.trust_remote_code = embedding_bits, trust_remote_code
        self.is_gguf = isinstance(checkpoint, GgufCheckpoint)
        self.keeps_own_widths = checkpoint.is_quantized and bits is None and group_size is None
        self.bits, self.group_size = bits, group_size
        self.default = _with_defaults(bits, group_size, GGUF_DEFAULT if self.is_gguf else DEFAULT)
        self.requantized: dict[str, list[str]] = {}
        self.kept_float: dict[str, str] = {}
        self.grid, self.allow_unused_rules = "affine", False
        self.sites: dict[str, Site] = {}
        self.activations: dict[str, dict] = {}
        self.static: dict[str, Site] = {}

    def _load(self):
        checkpoint = self.checkpoint
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        skeleton = Skeleton(checkpoint.config, folder, self.trust_remote_code, checkpoint.tensor_count)
        weights = checkpoint.weights(skeleton)
        skeleton.check({name: tensor.shape for name, tensor in weights.items()}, checkpoint.path)
        return skeleton, weights

    def nonfinite_layers(self) -> dict[str, str]:
        """Names of tensors that hold NaN or Inf, with a reason. Reads the whole checkpoint once."""
        _, weights = self._load()
        broken = {}
        for name, tensor in weights.items():
            if _is_float(tensor.dtype):
                if not all(np.isfinite(values).all() for values in _slabs(tensor)):
                    broken[name] = "it holds NaN or Inf"
            tensor.release()
        return broken

    def steps(self, report: Summary, broken: dict[str, str]) -> list[Step]:
        """One step for each parameter of the model, in the model's order."""
        skeleton, weights = self._load()
        self.modules = skeleton.quantizable()
        self._take_the_sources_format(weights)
        self.keeps_vision = any("vision_tower" in name for name in weights)
        slashed = {path: path.replace(".", "/") for path in self.modules}
        chosen = self._chosen(slashed, skeleton.model, report)
        self.named_by_rules = {path for path, slash in slashed.items() if slash in chosen}
        steps = []
        for name in skeleton.shapes():
            tensor, path = weights.pop(name), name.removesuffix(".weight")
            keeps_dtype = not _is_float(tensor.dtype) or not skeleton.may_cast(name)
            step = Step(name, tensor, _own_dtype(tensor) if keeps_dtype else self.dtype)
            if path in self.modules and name.endswith(".weight"):
                opinion = skeleton.wanted(path, self.modules[path])
                wanted = self._wanted(path, tensor, chosen.get(slashed[path]), opinion)
                if name in broken:
                    wanted = broken[name]
                if not isinstance(wanted, str) and tensor.shape[-1] % wanted.group_size:
                    fits = [g for g in format.GROUP_SIZES if tensor.shape[-1] % g == 0]
                    hint = f"; {fits[-1]} would fit" if fits else ""
                    wanted = (
                        f"K={tensor.shape[-1]} is not a multiple of the group size {wanted.group_size}{hint}"
                    )
                if not isinstance(wanted, str):
                    rule = chosen.get(slashed[path])
                    step.grid = rule.grid or "" if rule else self.grid
                    step.site = self.sites.get(path)
                    step = self._quantizing(step, wanted, report)
                else:
                    self.kept_float[path] = report.kept_float[slashed[path]] = wanted
                    self.activations.pop(path, None)
                    self.static.pop(slashed[path], None)
            elif name in broken:
                report.kept_float[name.replace(".", "/")] = broken[name]
            steps.append(step)
        for reason, paths in self.requantized.items():
            report.notices.append(
                f"quantized again, {len(paths)} layers ({paths[0]}, ...): {reason}; more bits lose less"
            )
        return steps

    def _take_the_sources_format(self, weights) -> None:
        """Where the command names no bits or no group size, the default is what most of the codes have."""
        if self.is_gguf or not self.checkpoint.is_quantized:
            return
        sizes: dict[Format, int] = {}
        for tensor in weights.values():
            if fmt := tensor.repacks_to:
                sizes[fmt] = sizes.get(fmt, 0) + int(np.prod(tensor.shape, dtype=np.int64))
        if sizes:
            self.default = _with_defaults(self.bits, self.group_size, max(sizes, key=sizes.get))

    def _chosen(self, slashed: dict[str, str], model, report: Summary) -> dict[str, QuantizationRule]:
        """The rule of each layer that has one, by the path with '/'; convolutions are listed as float."""
        found = RuleSet(self.rules)
        chosen = {slash: found.find(slash, operation(self.modules[path])) for path, slash in slashed.items()}
        for path, module in model.named_modules():
            if path not in self.modules and operation(module) == "conv_general":
                rule = found.find(slash := path.replace(".", "/"), "conv_general")
                if rule is not None and rule.weight_qtype is not None:
                    report.kept_float[slash] = "files of MLX's format hold no convolutions"
        if self.allow_unused_rules:
            report.notices += [f"rule {rule} matches no layer" for rule in found.unused_rules()]
        else:
            found.check()
        return {path: rule for path, rule in chosen.items() if rule is not None}

    def _format_of(self, rule: QuantizationRule, path: str, shape: tuple[int, ...]) -> Format | MxFormat:
        """The format that a rule asks for; what else it says goes to self.sites and self.activations.

        Raises ValueError, naming the path, the rule and what a file holds, for what no file does.
        """
        if rule.grid:
            wanted = Format(rule.bits, rule.tile_size or self.default.group_size)
            if rule.act_qtype is None or shape[-1] % wanted.group_size:
                return wanted  # without a fitting group the layer stays in float
            rule = replace(rule, tile_size=wanted.group_size)
        kind = operation(self.modules[path])
        try:
            site = site_of(path.replace(".", "/"), kind, shape, self.dtype, rule)
        except ValueError as error:
            raise ValueError(f"{error} (rule {rule})") from None
        rule = site.rule
        if rule.act_qtype is not None:
            if not site.integer:
                raise ValueError(
                    f"{site.path}: a file holds int8 inputs of linear layers with integer weights, with one "
                    f"scale a row, one for all, or one for each of the weight's groups; rule {rule} asks for "
                    "others: quantize_model serves them"
                )
            self.activations[path] = {"activation": site.activation}
            if rule.act_static_scale:
                self.static[site.path] = site
        if rule.grid:
            return site.packed
        wanted = site.packed or mx_format(site)
        if wanted is None:
            raise ValueError(
                f"{site.path}: {site.stored} has no place in a file of MLX's format, which holds int2 to "
                "int8 in groups of 32, 64 or 128, and mxfp4, mxfp8 and nvfp4 in rows of a multiple of 32; "
                f"quantize_model serves rule {rule}"
            )
        self.sites[path] = site
        return wanted

    def _wanted(
        self, path: str, tensor, rule: QuantizationRule | None, opinion: bool | dict
    ) -> Format | MxFormat | str:
        """The format of one layer, or the reason why it stays in float."""
        import mlx.nn as nn

        group_size = self.default.group_size
        if rule is not None:
            return self._format_of(rule, path, tensor.shape) if rule.weight_qtype else "a rule says so"
        is_vocabulary = isinstance(self.modules[path], nn.Embedding) or path.split(".")[-1] == "lm_head"
        if self.embedding_bits is not None and is_vocabulary:
            return Format(self.embedding_bits, group_size)
        if not opinion:
            return "mlx-lm keeps it in float"
        if self.keeps_own_widths:
            return self._own_format(tensor)
        if isinstance(opinion, dict):
            return Format(opinion.get("bits", self.default.bits), opinion.get("group_size", group_size))
        return self.default

    def _own_format(self, tensor) -> Format | MxFormat | str:
        """The format nearest to how a quantized source stores the tensor."""
        if tensor.repacks_to:
            return tensor.repacks_to
        if tensor.mx_mode:
            return MxFormat(tensor.mx_mode)
        if not tensor.is_quantized:
            return f"float in the {'GGUF' if self.is_gguf else 'source'}"
        fitting = [bits for bits in format.KERNEL_BITS if bits >= (tensor.source_bits or 0)]
        group_size = GGUF_DEFAULT.group_size if self.is_gguf else self.default.group_size
        return Format(fitting[0] if fitting else format.KERNEL_BITS[-1], group_size)

    def _quantizing(self, step: Step, wanted: Format | MxFormat, report: Summary) -> Step:
        repack = step.site is None and step.tensor.packs_into(wanted)
        inputs = inputs_shown(self.activations.get(step.name.removesuffix(".weight")))
        step = Step(step.name, step.tensor, self.dtype, wanted, repack, step.grid, step.site, inputs)
        if step.site is not None and step.site.weight.calibration_method.startswith("minmax"):
            step.dtype = "float32"  # a bias with a zero point is a product that 16 bits round
        if not step.repack:
            if step.tensor.is_quantized:
                reason = step.tensor.requantized or f"{step.tensor.repacks_to} codes do not fit {wanted}"
                self.requantized.setdefault(reason, []).append(step.path)
            return step
        largest = step.tensor.largest_scale()
        if not np.isfinite(largest):
            raise ValueError(f"{step.path}: NaN or Inf in the scales of the source")
        if isinstance(wanted, Format) and not _fits(largest, self.dtype):
            step.dtype = "float32"
            report.notices.append(
                f"{step.path}: scales and biases are float32; {largest:.6g} is too much for {self.dtype}"
            )
        return step


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _own_dtype(tensor) -> str:
    if _is_float(tensor.dtype):
        return tensor.dtype if tensor.dtype in format.STORAGE else "float32"
    return {"bool": "BOOL", "int": "I", "uint": "U"}[tensor.dtype.rstrip("0123456789")] + tensor.dtype.lstrip(
        "boluint"
    )


def _fits(value: float, dtype: str) -> bool:
    return bool(np.isfinite(format.store(np.array([value], np.float32), dtype)[0]))


def _size(step: Step) -> int:
    return int(np.prod(step.tensor.shape, dtype=np.int64))


def _bounds(tensor, slab: int) -> Iterator[tuple[int, int]]:
    K = tensor.shape[-1] if tensor.shape else 1
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    height = max(1, slab // K)
    for start in range(0, rows, height):
        yield start, min(rows, start + height)


def _slabs(tensor) -> Iterator[np.ndarray]:
    for start, stop in _bounds(tensor, SLAB_WEIGHTS):
        yield tensor.read(start, stop)


def _write(step: Step, writer: Writer, broken: Container[str], bar, slab: int, memory: Watch) -> Layer:
    """Read, quantize and write one tensor slab by slab; its line of the report."""
    tensor, stored = step.tensor, step.planned()
    layer = Layer(
        step.path.replace(".", "/"),
        step.stored,
        _size(step),
        sum(p.nbytes for p in stored),
    )
    error = norm = 0.0
    for start, stop in _bounds(tensor, slab):
        memory.check()
        if not _is_float(tensor.dtype):
            writer.write(step.name, tensor.read_raw(start, stop))
            continue
        values = tensor.read(start, stop)
        if not np.isfinite(values).all() and step.name not in broken:
            raise ValueError(
                f"{step.path}: NaN or Inf in the weights (rows {start} to {stop - 1}); "
                "--allow-nonfinite keeps such layers in float"
            )
        if step.format is None:
            kept = _cast(step, values)
            writer.write(step.name, kept)
            restored = format.store(values, step.dtype)
        else:
            arrays, restored = _quantized(step, values, start, stop)
            for planned, array in zip(stored, arrays, strict=True):
                writer.write(
                    planned.name, as_stored(array, step.dtype) if array.dtype == np.float32 else array
                )
        if step.name not in broken:
            difference = (restored - values).reshape(-1)
            error += float(np.dot(difference, difference))
            norm += float(np.dot(values.reshape(-1), values.reshape(-1)))
        if bar is not None:
            bar.advance(values.size)
    tensor.release()
    if step.name not in broken:
        layer.error, layer.norm = (error / norm) ** 0.5 if norm else 0.0, norm**0.5
    return layer


def _quantized(step: Step, values: np.ndarray, start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(the arrays of step.planned(), the values that they stand for) of rows."""
    if not isinstance(step.format, MxFormat):
        packed = _pack(step, values, start, stop)
        return [packed.words, packed.scales, packed.biases], format.dequantize(packed)
    if step.repack:
        return list(step.tensor.read_mx(start, stop)), values
    array = qarray.quantize(_live(step, values), _of_rows(step.site))
    tensors = mx_tensors(array)
    arrays = [bridge.to_numpy(tensors[name]) for name in ("weight", "scales")]
    return arrays, bridge.to_numpy(qarray.dequantize(array.astype("float32")))


def _live(step: Step, values: np.ndarray):
    """Rows as an mx.array of the dtype that they have in a live model, so that it gets the same codes."""
    import mlx.core as mx

    return mx.array(values).astype(getattr(mx, step.site.dtype))


def _of_rows(site: Site) -> HowToQuantize:
    """How rows (n, K) of a weight are quantized; experts are read as one matrix."""
    tile = site.weight.tiles(site.shape).get(len(site.shape) - 1)
    return replace(site.weight, channelwise_axes=(0,), tiled_axes={1: tile} if tile else {})


def _pack(step: Step, values: np.ndarray, start: int, stop: int) -> Packed:
    if step.repack:
        packed = step.tensor.read_packed(start, stop, step.format)
        scales, biases = (format.store(array, step.dtype) for array in (packed.scales, packed.biases))
        return Packed(packed.words, scales, biases, packed.format)
    try:
        if step.site is not None:
            packed = pack(_live(step, values), _of_rows(step.site), (step.format.bits,), step.dtype)
            scales, biases = (bridge.to_numpy(a).astype(np.float32) for a in (packed.scales, packed.biases))
            return Packed(bridge.to_numpy(packed.words), scales, biases, packed.format)
        return METHODS["rtn"](values, None, step.format, rule=step.grid, scale_dtype=step.dtype)
    except ValueError as error:
        raise ValueError(f"{step.path}: {error}") from None


def _cast(step: Step, values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if not _fits(largest, step.dtype):
        raise ValueError(f"{step.path}: {largest:.6g} is too much for {step.dtype}; choose another --dtype")
    return as_stored(values, step.dtype)


def _write_config(config: dict, planner: _Planner, steps: list[Step], dtype: str, folder: Path) -> None:
    """config.json with the same block twice, as mlx-lm writes it: the common format, then what differs."""
    from mlx_lm.utils import save_config

    config = {
        key: value for key, value in config.items() if key not in ("quantization", "quantization_config")
    }
    quantized = [step for step in steps if step.format]
    if quantized:
        sizes: dict[Format | MxFormat, int] = {}
        for step in quantized:
            sizes[step.format] = sizes.get(step.format, 0) + _size(step)
        common = planner.default if planner.default in sizes else max(sizes, key=sizes.get)
        if planner.keeps_own_widths:
            common = max(sizes, key=sizes.get)
        block: dict[str, object] = dict(_settings(common))
        for step in quantized:
            if step.format != common:
                block[step.path] = _settings(step.format)
        block |= dict.fromkeys(planner.kept_float, False)
        config["quantization"] = block
        if planner.activations:
            config[ACTIVATIONS] = planner.activations
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    save_config(config, folder / "config.json", keep_vision_config=planner.keeps_vision)


def _settings(fmt: Format | MxFormat) -> dict[str, object]:
    """A format as config.json writes it."""
    mode = fmt.mode if isinstance(fmt, MxFormat) else "affine"
    return {"group_size": fmt.group_size, "bits": fmt.bits, "mode": mode}


def stored_errors(src: Path, folder: Path, trust_remote_code: bool = False) -> dict[str, tuple[float, float]]:
    """(relative Frobenius error of what a model folder stores, norm) of src's float parameters, by name."""
    with TemporaryDirectory() as work:
        weights = []
        for path in (src, folder):
            checkpoint = _open(path)
            checkpoint.prepare(Path(work) / f"{len(weights)}", values=True)
            planner = _Planner(checkpoint, None, None, "float32", (), None, trust_remote_code)
            weights.append(planner._load()[1])
        found = {}
        for name, tensor in weights[0].items():
            if not _is_float(tensor.dtype):
                continue
            error = norm = 0.0
            for start, stop in _bounds(tensor, SLAB_WEIGHTS):
                wanted = tensor.read(start, stop).reshape(-1)
                difference = weights[1][name].read(start, stop).reshape(-1) - wanted
                error += float(np.dot(difference, difference))
                norm += float(np.dot(wanted, wanted))
            found[name] = ((error / norm) ** 0.5 if norm else 0.0, norm**0.5)
            tensor.release()
            weights[1][name].release()
        return found


def write_card(report: Summary, src: Path, method: str, folder: Path, trained: Iterable[str] = ()) -> None:
    """README.md: what was done, how, and what is known of the result.

    trained   what came after the codes, in words that tell the KL it came to
    """
    calibration, trained = report.text, list(trained)
    lines = [
        "---", "library_name: mlx", "tags: [mlx, mlxq]", "---", "", f"# {report.path.name}", "",
        f"{src.name}, quantized to MLX format by mlxq {__version__} in {report.seconds:.0f} s. It loads in "
        "mlx-lm and in mlxq.", "",
        f"Method: {_METHOD_WORDS[method]}" + (f", on {calibration}." if calibration else "."),
        *(f"Then: {words}." for words in trained), "",
        f"{human_bytes(report.total_bytes)}: {report.bits_per_weight:.3f} bits per weight, all included.", "",
        "| layers | count | stored | weights | relative weight error |",
        "| --- | ---: | --- | ---: | ---: |",
    ]  # fmt: skip
    for pattern, count, stored, weights, _, error in report.groups():
        shown = "-" if error is None else f"{error:.4f}"
        lines.append(f"| `{pattern}` | {count} | {stored} | {weights} | {shown} |")
    lines += ["", *(f"- {notice}" for notice in report.notices if notice not in trained)]
    if calibration:
        lines += ["", "A method that keeps outputs may well change weights more than rounding does."]
    measure = f"mlxq eval {report.path.name} --against FLOAT --card"
    known = "Nothing else was measured" if not trained else "Beside that KL nothing was measured"
    lines += ["", f"{known}: `{measure}` does it."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_METHOD_WORDS = {
    "rtn": "every weight rounded to the nearest code of its group",
    "gptq": "codes, scales and biases that keep each layer's outputs (GPTQ, grids fitted under the Hessian)",
    "awq": "input channels scaled by how much they matter (AWQ), then weights rounded to the nearest code",
}
_METHOD_WORDS["awq+gptq"] = f"input channels scaled by how much they matter (AWQ); {_METHOD_WORDS['gptq']}"
_METHOD_WORDS["auto"] = _METHOD_WORDS["gptq"]


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    # what an earlier run has written already
    wanted -= sum(512 * file.stat().st_blocks for file in folder.glob("model*.safetensors"))
    if wanted > free:
        raise OSError(f"{folder.parent}: {human_bytes(wanted)} are needed and {human_bytes(free)} are free")
