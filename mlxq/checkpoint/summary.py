"""What a model folder or a GGUF file holds, read from headers alone, and the table that shows it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlxq.checkpoint.gguf import Gguf
from mlxq.checkpoint.huggingface import read_json, read_weight_map
from mlxq.checkpoint.safetensors import read_header
from mlxq.format import BITS, GROUP_SIZES

# Keys of config.json: layers whose inputs are rounded; see checkpoint.q8 and checkpoint.trained.
ACTIVATIONS, TRAINED = "activation_quantization", "activation_fake_quantization"


@dataclass
class Layer:
    """One module, or one tensor that stands alone.

    path     components joined by '/'
    stored   how it is stored: "4-bit/64", "bfloat16", "mxfp4", a GGUF type, ...
    weights  logical weights; bytes with scales and biases
    error    relative Frobenius error of what is stored, when it is known
    """

    path: str
    stored: str
    weights: int
    bytes: int
    error: float | None = None
    norm: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take: seconds, bytes of anonymous memory, bytes of files."""

    seconds: float
    memory: int
    disk: int


@dataclass
class Summary:
    """Layers of a model, their sizes, and remarks for the user.

    kept_float   layers that could be quantized and are not, with the reason
    text         what calibration read, in words
    peak_memory  anonymous bytes that the conversion had in use at most, None where nobody knows
    planned      what is still to be done: estimated seconds, bytes of memory and of files; None when it is
                 done
    """

    path: Path
    title: str
    layers: list[Layer] = field(default_factory=list)
    kept_float: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    text: str = ""
    seconds: float | None = None
    peak_memory: int | None = None
    planned: Estimate | None = None

    @property
    def total_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total_bytes / self.parameters if self.parameters else 0.0

    @property
    def relative_error(self) -> float | None:
        """Relative Frobenius error over all layers whose error is known."""
        return _joint_error(self.layers)

    def groups(self) -> list[tuple[str, int, str, int, int, float | None]]:
        """Rows of the table: (pattern, layers, stored, weights, bytes, relative error); numbers become *."""
        grouped: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.layers:
            pattern = re.sub(r"\d+(?=/|$)", "*", layer.path.removesuffix("/weight"))
            grouped.setdefault((pattern, layer.stored), []).append(layer)
        return [
            (
                pattern,
                len(many),
                stored,
                sum(m.weights for m in many),
                sum(m.bytes for m in many),
                _joint_error(many),
            )
            for (pattern, stored), many in grouped.items()
        ]

    def table(self):
        """A rich Table of the groups, with totals."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=self.title,
            title_justify="left",
            caption="\n".join(self._caption()),
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        with_error = any(layer.error is not None for layer in self.layers)
        table.add_column("layers", overflow="fold")
        for name in ("count", "stored", "weights", "bytes") + (("error",) if with_error else ()):
            table.add_column(name, justify="right", no_wrap=True)

        def row(*cells: str) -> list[str]:
            return list(cells if with_error else cells[:-1])

        for pattern, count, stored, weights, size, error in self.groups():
            table.add_row(
                *row(pattern, str(count), stored, short_count(weights), human_bytes(size), _percent(error))
            )
        table.add_section()
        bits = f"{self.bits_per_weight:.3f} bits"
        size, error = human_bytes(self.total_bytes), _percent(self.relative_error)
        table.add_row(*row("total", str(len(self.layers)), bits, short_count(self.parameters), size, error))
        return table

    def _caption(self) -> Iterable[str]:
        yield "bytes and the total's bits/weight include scales and biases" + (
            "; error is relative, Frobenius" if self.relative_error is not None else ""
        )
        reasons: dict[str, list[str]] = {}
        for path, reason in self.kept_float.items():
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            yield f"float: {shown} ({reason})"
        yield from self.notices


def _joint_error(layers: list[Layer]) -> float | None:
    known = [layer for layer in layers if layer.error is not None]
    if not known:
        return None
    norm = math.sqrt(sum(layer.norm**2 for layer in known))
    return math.sqrt(sum((layer.error * layer.norm) ** 2 for layer in known)) / norm if norm else 0.0


def _percent(error: float | None) -> str:
    return "" if error is None else "0" if error == 0 else f"{100 * error:.3g} %"


def human_bytes(count: int) -> str:
    """1,234,567 as "1.23 MB" (decimal units, as disks are sold)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def short_count(count: int) -> str:
    """1,234,567 as "1.235 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def inspect(path: str | Path) -> Summary:
    """Layers, widths and sizes of a model folder (ours, mlx-lm's or Hugging Face's) or of a GGUF file.

    Reads config.json and headers, no tensor. Raises FileNotFoundError or ValueError that name the file at
    fault.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _inspect_gguf(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: inspect wants a model folder or a GGUF file")
    config = read_json(path / "config.json")
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no model*.safetensors")
    entries = {}
    for file in files:
        entries |= read_header(file)[0]
    index = path / "model.safetensors.index.json"
    if index.exists():
        for name, where in read_weight_map(index).items():
            if name not in entries:
                raise ValueError(f"{index} names {name} in {where}, which is not there")
    settings = config.get("quantization") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}/config.json: quantization is {settings!r}, not a JSON object")
    activations = {}
    for key in (ACTIVATIONS, TRAINED):
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{path}/config.json: {key} is {given!r}, not a JSON object")
        activations |= given
    summary = Summary(path, f"{path}: {config.get('model_type', 'unknown architecture')}")
    parts: dict[str, dict] = {}
    for name, entry in entries.items():
        base, _, kind = name.rpartition(".")
        quantized = kind in ("weight", "scales", "biases", "global_scale") and f"{base}.scales" in entries
        parts.setdefault(base if quantized else name, {})[kind if quantized else "alone"] = entry
    for name, tensors in sorted(parts.items(), key=lambda item: _natural(item[0])):
        size = sum(entry.nbytes for entry in tensors.values())
        slashed = name.replace(".", "/")
        if "alone" in tensors:
            entry = tensors["alone"]
            summary.layers.append(
                Layer(slashed, _FLOAT_NAMES.get(entry.dtype, entry.dtype), entry.size, size)
            )
            continue
        if "weight" not in tensors:
            raise ValueError(f"{path}: {name} has scales but no weight")
        stored, weights = _packed(name, tensors, settings)
        summary.layers.append(Layer(slashed, stored + inputs_shown(activations.get(name)), weights, size))
    return summary


def inputs_shown(settings: object) -> str:
    """What a layer's entry under ACTIVATIONS or TRAINED says, behind its format: "", " + int8 inputs", ..."""
    if not isinstance(settings, dict):
        return ""
    if "dtype" in settings:  # of TRAINED
        return f" + {settings['dtype']} inputs"
    kind = settings.get("activation")
    return " + int8 inputs" if kind == "token" else f" + int8 {str(kind).replace('_', ' ')} inputs"


_FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _packed(name: str, tensors: dict, settings: dict) -> tuple[str, int]:
    """(how it is stored, logical weights) of one quantized module."""
    words, scales = tensors["weight"], tensors["scales"]
    own = settings.get(name)
    chosen = own if isinstance(own, dict) else settings
    mode = chosen.get("mode", "affine")
    rows = math.prod(words.shape[:-1])
    if not words.shape or not scales.shape or words.shape[:-1] != scales.shape[:-1]:
        raise ValueError(f"{name}: weight is {words.shape} but scales are {scales.shape}")
    bits, group = chosen.get("bits"), chosen.get("group_size")
    if mode != "affine" or "biases" not in tensors:
        width = bits if type(bits) is int and bits > 0 else 4
        return str(mode) if mode != "affine" else "unknown", rows * words.shape[-1] * 32 // width
    product = words.shape[-1] * 32 / scales.shape[-1]  # bits * group_size, whatever K is
    if type(bits) is not int or type(group) is not int or bits * group != product:
        groups = (group, *GROUP_SIZES) if type(group) is int else GROUP_SIZES
        fitting = [(b, g) for g in groups for b in BITS if b * g == product]
        if not fitting:
            raise ValueError(
                f"{name}: {words.shape[-1]} words and {scales.shape[-1]} scales a row fit no format"
            )
        bits, group = fitting[0]
    return f"{bits}-bit/{group}", rows * scales.shape[-1] * group


def _inspect_gguf(path: Path) -> Summary:
    file = Gguf(path)
    summary = Summary(
        path, f"{path}: GGUF {file.metadata.get('general.architecture', 'of unknown architecture')}"
    )
    for name, block in sorted(file.tensors.items(), key=lambda item: _natural(item[0])):
        slashed = name.removesuffix(".weight").replace(".", "/")
        summary.layers.append(Layer(slashed, block.type, math.prod(block.shape), block.rows.nbytes))
    return summary
