"""How each module is quantized: the first rule that matches its path and operation decides.

One kind of rule serves the converter, a live model, a streamed checkpoint and calibration. A rule that
matches nothing is an error. Matching and the meaning of each field are those of qwix 0.1.8.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlxq.format import BITS, GROUP_SIZES, RULES

OPERATIONS = (
    "linear",  # x @ W.T of a layer
    "embedding",  # rows of a table
    "conv_general",  # convolutions of any rank
    "switch_linear",  # mixture-of-experts layers
    "multi_linear",  # one matrix per attention head
    "matmul",  # a call of mlxq.ptq.functional
    "einsum",  # likewise
)


@dataclass(frozen=True)
class QType:
    """What codes can hold.

    bound      the magnitude that absmax maps to; integers: largest code + 0.5, so that every bin is used
    low, high  of integer codes
    tile       the one tile size that the type allows; None: any
    mantissa   of float types: mantissa bits and the smallest normal exponent, else None
    """

    name: str
    bits: int
    bound: float
    low: int = 0
    high: int = 0
    tile: int | None = None
    mantissa: tuple[int, int] | None = None

    @property
    def is_integer(self) -> bool:
        return self.high > 0

    def __str__(self) -> str:
        return self.name


def _integer(bits: int) -> QType:
    half = 1 << (bits - 1)
    return QType(f"int{bits}", bits, half - 0.5, -half, half - 1)


_E4M3, _E5M2, _E2M1 = (448.0, (3, -6)), (57344.0, (2, -14)), (6.0, (1, 0))
QTYPES = {
    qtype.name: qtype
    for qtype in (
        *(_integer(bits) for bits in range(2, 9)),
        QType("float8_e4m3fn", 8, _E4M3[0], mantissa=_E4M3[1]),
        QType("float8_e5m2", 8, _E5M2[0], mantissa=_E5M2[1]),
        QType("nf4", 4, 1.0),
        QType("mxfp8", 8, _E4M3[0], tile=32, mantissa=_E4M3[1]),
        QType("mxfp4", 4, _E2M1[0], tile=32, mantissa=_E2M1[1]),
        QType("nvfp4", 4, _E2M1[0], tile=16, mantissa=_E2M1[1]),
    )
}
ASYMMETRIC = ("int4", "int8")  # with minmax, as in qwix
GRIDS = RULES  # quantizers of the packed format: codes from 0, a float bias for each group
_ONE_BIT = QType("int1", 1, 0.5, -1, 1)  # of the packed format only: two levels, by a quantizer of GRIDS


def qtype_of(value: object) -> str:
    """The name in QTYPES that a name or a framework's dtype stands for ("int8", torch.int8, mx.int8, ...).

    Raises ValueError for anything else, with the names that exist.
    """
    name = value if isinstance(value, str) else getattr(value, "__name__", None) or str(value)
    name = name.rpartition(".")[2].lower()
    if name in QTYPES:
        return name
    why = "unsigned codes would clip what is negative; " if name.startswith("uint") else ""
    raise ValueError(f"quantized type {name!r} does not exist: {why}built: {', '.join(QTYPES)}")


def calibration(method: str) -> tuple[str, tuple[float, ...]]:
    """("absmax", ()), ("fixed", (low, high)), ...: a calibration string taken apart.

    absmax[,f]             largest magnitude, times f
    minmax[,f]             smallest and largest, zero between them, times f; asymmetric
    rms,f                  f times the root mean square
    fixed,hi  fixed,lo,hi  this range, which holds zero; one for the whole array
    affine    mlx          the quantizers of the packed format (see mlxq.format), for integer weights

    Raises ValueError for anything else.
    """
    name, *texts = (part.strip() for part in str(method).lower().split(","))
    try:
        numbers = tuple(float(text) for text in texts)
    except ValueError:
        numbers, name = (), f"{name} with {','.join(texts)}"
    wanted = {"absmax": (0, 1), "minmax": (0, 1), "rms": (1,), "fixed": (1, 2), **dict.fromkeys(GRIDS, (0,))}
    if name not in wanted:
        raise ValueError(
            f"calibration {method!r} does not exist; built: absmax[,f], minmax[,f], rms,f, fixed,hi, "
            f"fixed,lo,hi, {', '.join(GRIDS)}"
        )
    if len(numbers) not in wanted[name]:
        counts = " or ".join(map(str, wanted[name]))
        raise ValueError(f"calibration {method!r}: {name} takes {counts} numbers, got {len(numbers)}")
    if name == "fixed":
        low, high = numbers if len(numbers) == 2 else (-numbers[0], numbers[0])
        if not (low <= 0 <= high and low < high and high - low < float("inf")):
            raise ValueError(f"calibration {method!r}: the range must hold 0 and not be empty")
        return name, (low, high)
    if numbers and not 0 < numbers[0] < float("inf"):
        raise ValueError(f"calibration {method!r}: the factor must be positive")
    return name, numbers


@dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """Settings for every operation in op_names of every module whose whole path matches module_path.

    module_path    regular expression over the path, '/' between components (list indices are components)
    op_names       names of OPERATIONS; empty: all
    weight_qtype   a name of QTYPES; None keeps what matches in float, whatever act_qtype says
    act_qtype      quantize the inputs too, to this type
    tile_size      weights (and inputs) that share a scale along the summed axis: a count, or a float 1/count
                   of tiles; None: the whole axis. affine and mlx: a group size, None for the caller's own
    act_static_scale            True: the inputs' scale comes from calibration, not from each input
    weight_calibration_method   see calibration(); default absmax
    act_calibration_method      likewise; None: absmax, but for int8 inputs of layers with one scale a row, or
                   for each group of the weight's (tile_size 32, 64 or 128), which the kernel ops.q8_rows
                   quantizes: max / 127, codes from -127, where absmax, named, has max / 127.5 and codes from
                   -128, qwix's. The layer is Q8Linear, or RuleLinear; both sum integers, in ops.q8mm
    act_batch_axes              axes of the inputs over which static statistics are averaged

    Raises ValueError or TypeError at construction for settings that cannot work.
    """

    module_path: str = ".*"
    op_names: tuple[str, ...] = ()
    weight_qtype: str | None = None
    act_qtype: str | None = None
    tile_size: int | float | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_batch_axes: tuple[int, ...] = (0,)

    def __post_init__(self):
        try:
            self._settle()
        except (ValueError, TypeError) as error:
            raise type(error)(f"rule for {self.module_path!r}: {error}") from None

    def _settle(self) -> None:
        put = object.__setattr__
        try:
            re.compile(self.module_path)
        except re.error as error:
            raise ValueError(f"the pattern is not a regular expression: {error}") from None
        ops = (self.op_names,) if isinstance(self.op_names, str) else tuple(self.op_names)
        put(self, "op_names", ops)
        for name in ops:
            if name not in OPERATIONS:
                theirs = ": qwix's dot_general is linear here, as a layer, or matmul and einsum, as calls"
                hint = theirs if name == "dot_general" else ""
                raise ValueError(f"no operation {name!r}{hint}; built: {', '.join(OPERATIONS)}")
        weight_method = calibration(self.weight_calibration_method)[0]
        if self.weight_qtype is not None and not (weight_method in GRIDS and self.weight_qtype == "int1"):
            put(self, "weight_qtype", qtype_of(self.weight_qtype))
        if self.act_qtype is not None:
            put(self, "act_qtype", qtype_of(self.act_qtype))
        elif self.act_static_scale is not None:
            raise ValueError(
                f"act_static_scale is {self.act_static_scale} but act_qtype is not set: set act_qtype too, "
                "or drop act_static_scale"
            )
        put(self, "act_static_scale", bool(self.act_static_scale))
        act_method = calibration(self.act_calibration_method or "absmax")[0]
        if act_method in GRIDS:
            raise ValueError(f"act_calibration_method {act_method!r} is for weights; use absmax or minmax")
        axes = self.act_batch_axes
        put(self, "act_batch_axes", (axes,) if isinstance(axes, int) else tuple(axes))
        _check_tile(self.tile_size)
        if weight_method in GRIDS and self.weight_qtype is not None:
            self._check_grid()
        for qtype, method in ((self.weight_qtype, weight_method), (self.act_qtype, act_method)):
            _check_asymmetric(qtype, method)

    def _check_grid(self) -> None:
        widths = [f"int{bits}" for bits in BITS]
        if self.weight_qtype not in widths:
            raise ValueError(
                f"{self.weight_qtype} with {self.weight_calibration_method} does not exist; "
                f"built: {', '.join(widths)}"
            )
        if self.tile_size is not None and self.tile_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size:{self.tile_size} does not exist; built: {', '.join(map(str, GROUP_SIZES))}"
            )

    @property
    def bits(self) -> int | None:
        """Bits of a weight's code; None keeps it in float."""
        return None if self.weight_qtype is None else (QTYPES.get(self.weight_qtype) or _ONE_BIT).bits

    @property
    def grid(self) -> str | None:
        """The packed format's own quantizer, "affine" or "mlx", when the rule asks for one."""
        method = calibration(self.weight_calibration_method)[0]
        return method if method in GRIDS else None

    def matches(self, path: str, operation: str | None = None) -> bool:
        """Whether the whole path (components joined by '/') and the operation match."""
        if operation is not None and self.op_names and operation not in self.op_names:
            return False
        return re.fullmatch(self.module_path, path) is not None

    def settings(self) -> dict[str, object]:
        """The fields that differ from their defaults, as plain values: what a rules file holds."""
        plain = QuantizationRule()
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in changed.items()
            if name == "module_path" or value != getattr(plain, name)
        }

    def __str__(self) -> str:
        if self.weight_qtype is None:
            said = {"bits": "none"}
        elif self.grid == "affine":
            said = {"bits": self.bits} | ({"group_size": self.tile_size} if self.tile_size else {})
        else:
            said = {"weight_qtype": self.weight_qtype}
        settings = self.settings()
        for name in ("module_path", "weight_qtype", *(("tile_size",) if "group_size" in said else ())):
            settings.pop(name, None)
        if self.grid == "affine" or self.weight_qtype is None:
            settings.pop("weight_calibration_method", None)
        parts = (said | settings).items()
        return f"{self.module_path}=" + ",".join(
            f"{name}:{','.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in parts
        )


def _check_tile(tile: object) -> None:
    if tile is None:
        return
    if isinstance(tile, bool) or not isinstance(tile, int | float):
        raise TypeError(f"tile_size is {tile!r}; wanted a count of weights, or a float 1/count of tiles")
    if isinstance(tile, float) and not 0 < tile <= 1:
        raise ValueError(f"tile_size {tile} is a float, 1/count of tiles: it must be above 0 and at most 1")
    if isinstance(tile, int) and tile <= 0:
        raise ValueError(f"tile_size {tile} must be positive")


def _check_asymmetric(qtype: str | None, method: str) -> None:
    if method == "minmax" and qtype is not None and qtype not in ASYMMETRIC:
        raise ValueError(
            f"{qtype} has no asymmetric form: minmax serves {' and '.join(ASYMMETRIC)}; use absmax"
        )


FORM = "a rule is written PATTERN=bits:8,group_size:32 or PATTERN=bits:none or PATTERN=weight_qtype:int8,..."


def parse_rule(text: str, grid: str = "affine") -> QuantizationRule:
    """The rule that "PATTERN=NAME:VALUE,NAME:VALUE" writes down, as on the command line.

    Names are the fields of QuantizationRule, and the short ones of rule_of. A value may hold commas:
    "act_calibration_method:absmax,0.8". Raises ValueError for anything else, with the form that is wanted.
    """
    pattern, equals, settings = text.rpartition("=")  # a pattern may hold '=', settings cannot
    if not equals or not pattern:
        raise ValueError(f"rule {text!r}: {FORM}")
    values: dict[str, object] = {"module_path": pattern}
    name = None
    for part in settings.split(","):
        before, colon, value = (p.strip() for p in part.partition(":"))
        if colon:
            if before in values or before == "module_path" or before not in _NAMES:
                raise ValueError(f"rule {text!r}: {FORM}")
            name, values[before] = before, value
        elif name is None or not before:
            raise ValueError(f"rule {text!r}: {FORM}")
        else:
            values[name] = f"{values[name]},{before}"
    for name in values.keys() - {"module_path"}:
        values[name] = _typed(text, name, str(values[name]))
    return rule_of(values, f"rule {text!r}", grid)


_SHORT = ("bits", "group_size")
_NAMES = (*(f.name for f in fields(QuantizationRule)), *_SHORT)


def _typed(text: str, name: str, value: str) -> object:
    """The value of one setting of a rule written as text."""
    if name == "op_names":
        return tuple(part.strip() for part in value.split(","))
    if value.lower() == "none":
        return None
    if name == "act_static_scale":
        if value.lower() not in ("true", "false"):
            raise ValueError(f"rule {text!r}: {name} takes true or false, got {value!r}; {FORM}")
        return value.lower() == "true"
    if name in ("bits", "group_size", "tile_size", "act_batch_axes"):
        try:
            if name == "act_batch_axes":
                return tuple(int(part) for part in value.split(","))
            if name == "tile_size" and "." in value:
                return float(value)
            if value.isascii() and value.isdigit():
                return int(value)
        except ValueError:
            pass
        raise ValueError(f"rule {text!r}: {name} takes a number, got {value!r}; {FORM}")
    return value


def rule_of(values: Mapping[str, object], where: str = "rule", grid: str = "affine") -> QuantizationRule:
    """The rule that a table of fields stands for.

    Besides the fields of QuantizationRule: bits = B is short for weight_qtype = "intB" with
    weight_calibration_method = grid ("affine", or what the command says), bits = none for no weight_qtype;
    group_size is tile_size. Raises ValueError, beginning with where, for unknown names and wrong values.
    """
    values = dict(values)
    unknown = [name for name in values if name not in _NAMES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _NAMES, n=1)
        raise ValueError(
            f"{where}: no setting {unknown[0]!r}"
            + (f", did you mean {near[0]!r}?" if near else "")
            + f"; built: {', '.join(_NAMES)}"
        )
    short = [name for name in _SHORT if name in values]
    if short and any(name in values for name in ("weight_qtype", "tile_size", "weight_calibration_method")):
        raise ValueError(
            f"{where}: {short[0]} is short for weight_qtype, tile_size and the method {grid}: use one form"
        )
    if "bits" in values:
        bits = values.pop("bits")
        if isinstance(bits, str) and bits.lower() == "none":  # TOML has no null
            bits = None
        if bits is not None:
            if bits not in BITS:
                raise ValueError(f"{where}: bits:{bits} does not exist; built: {', '.join(map(str, BITS))}")
            values |= {"weight_qtype": f"int{bits}", "weight_calibration_method": grid}
        if (group := values.pop("group_size", None)) is not None:
            values["tile_size"] = group
    elif "group_size" in values:
        raise ValueError(f"{where}: bits are missing; {FORM}")
    try:
        return QuantizationRule(**values)
    except (ValueError, TypeError) as error:
        said = str(error).removeprefix(f"rule for {values.get('module_path', '.*')!r}: ")
        raise ValueError(f"{where}: {said}") from None


def read_rules(path: str | Path, grid: str = "affine") -> list[QuantizationRule]:
    """The rules of a TOML or JSON file, in order: [[rule]] tables, or a JSON list (or {"rule": list}).

    Raises FileNotFoundError, and ValueError naming the file and the rule's number.
    """
    path = Path(path).expanduser()
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() == ".toml":
            try:
                content = importlib.import_module("tomllib").loads(text)  # by name: Python 3.10 has none
            except ModuleNotFoundError:
                raise ValueError("TOML needs Python 3.11 or later; write the rules as JSON") from None
        else:
            content = json.loads(text)
    except ValueError as error:  # tomllib's and json's errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None
    tables = content.get("rule") if isinstance(content, dict) and set(content) == {"rule"} else content
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: wanted [[rule]] tables (TOML) or a list of objects (JSON)")
    return [rule_of(table, f"{path}, rule {number}", grid) for number, table in enumerate(tables, 1)]


class RuleSet:
    """Rules in order of precedence, and which of them ever matched.

    Give it rules, texts of rules, or both.
    """

    def __init__(self, rules: Iterable[QuantizationRule | str], grid: str = "affine"):
        self.rules = [parse_rule(rule, grid) if isinstance(rule, str) else rule for rule in rules]
        self.seen: list[str] = []
        self._used: set[int] = set()
        self._chosen: set[int] = set()

    def find(self, path: str, operation: str | None = None) -> QuantizationRule | None:
        """The first rule that matches, None where none does; one without weight_qtype means float."""
        self.seen.append(path)
        first = None
        for number, rule in enumerate(self.rules):
            if rule.matches(path, operation):
                self._used.add(number)
                if first is None:
                    first = rule
                    self._chosen.add(number)
        return first

    def unused_rules(self, strict: bool = False) -> list[QuantizationRule]:
        """Rules that matched nothing so far. strict: also those whose every match an earlier rule took."""
        used = self._chosen if strict else self._used
        return [rule for number, rule in enumerate(self.rules) if number not in used]

    def check(self) -> None:
        """Raises ValueError that names every rule which matches nothing, with paths that look like it.

        A rule whose every match went to an earlier rule counts as used: it is redundant, not misspelt.
        """
        if unused := self.unused_rules():
            paths = list(dict.fromkeys(self.seen))
            said = (f"rule {rule} matches no layer{_hint(rule, paths)}" for rule in unused)
            raise ValueError("; ".join(said))


def assign(
    rules: Sequence[QuantizationRule],
    sites: Iterable[str] | Mapping[str, str],
    allow_unused: bool = False,
) -> dict[str, QuantizationRule]:
    """The first matching rule of each path that has one.

    sites   module paths with '/' between components, or {path: operation}

    Raises ValueError for rules that match nothing, as RuleSet.check does, unless allow_unused.
    """
    operations = sites if isinstance(sites, Mapping) else dict.fromkeys(sites)
    found = RuleSet(rules)
    chosen = {path: found.find(path, operation) for path, operation in operations.items()}
    if not allow_unused:
        found.check()
    return {path: rule for path, rule in chosen.items() if rule is not None}


def _hint(rule: QuantizationRule, paths: list[str]) -> str:
    if any(rule.matches(path) for path in paths):
        return f"; its path matches, but no operation {' or '.join(rule.op_names)} is there"
    if "/" not in rule.module_path and any(rule.matches(path.replace("/", ".")) for path in paths):
        return "; module paths are written with '/' between components"
    plain = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", rule.module_path).replace("\\", "")
    near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.5)
    ends: dict[str, str] = {}
    for path in paths:
        ends.setdefault(path.rpartition("/")[2], path)
    end = re.sub(r"[^\w]", "", plain.rpartition("/")[2])
    near = near or [ends[name] for name in difflib.get_close_matches(end, ends, n=3, cutoff=0.6)]
    near = near or [path for path in paths if end and end in path][:3] or paths[:3]
    if not near:
        return "; the model has no layer that can be quantized"
    return "; layers are named like " + ", ".join(near) + " and the pattern must match the whole path"
