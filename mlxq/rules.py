"""Which format for which module: the first rule that matches wins; one that matches nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlxq.format import BITS, GROUP_SIZES


@dataclass(frozen=True)
class Rule:
    """Quantization settings for every module whose whole path, '/' between components, matches `pattern`.

    bits        stored bits; None keeps the module in float
    group_size  None takes the group size of the command
    """

    pattern: str
    bits: int | None
    group_size: int | None = None

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule {self}: the pattern is not a regular expression: {error}") from None
        for name, value, allowed in (("bits", self.bits, BITS), ("group_size", self.group_size, GROUP_SIZES)):
            if value is not None and value not in allowed:
                raise ValueError(
                    f"rule {self}: {name}:{value} does not exist; built: {', '.join(map(str, allowed))}"
                )

    def matches(self, path: str) -> bool:
        """Whether the whole path (components joined by '/') matches."""
        return re.fullmatch(self.pattern, path) is not None

    def __str__(self) -> str:
        settings = f"bits:{'none' if self.bits is None else self.bits}"
        return f"{self.pattern}={settings}" + (f",group_size:{self.group_size}" if self.group_size else "")


def parse_rule(text: str) -> Rule:
    """The rule that "PATTERN=bits:8,group_size:32" writes down; `bits:none` keeps the layer in float.

    Raises ValueError for anything else, with the form that is wanted.
    """
    form = "a rule is written PATTERN=bits:8,group_size:32 or PATTERN=bits:none"
    pattern, equals, settings = text.rpartition("=")  # a pattern may hold '=', settings cannot
    if not equals or not pattern:
        raise ValueError(f"rule {text!r}: {form}")
    values: dict[str, int | None] = {}
    for setting in settings.split(","):
        name, _, value = (part.strip() for part in setting.partition(":"))
        if name not in ("bits", "group_size") or name in values:
            raise ValueError(f"rule {text!r}: {form}")
        if name == "bits" and value.lower() == "none":
            values[name] = None
        elif value.isascii() and value.isdigit():
            values[name] = int(value)
        else:
            raise ValueError(f"rule {text!r}: {name} takes a number, got {value!r}; {form}")
    if "bits" not in values:
        raise ValueError(f"rule {text!r}: bits are missing; {form}")
    return Rule(pattern, values["bits"], values.get("group_size"))


def assign(rules: Sequence[Rule], paths: Iterable[str]) -> dict[str, Rule]:
    """The first matching rule of each path that has one.

    paths   module paths with '/' between components

    Raises ValueError naming every rule that matches no path, with paths that look like it. A rule whose every
    match went to an earlier rule counts as used: it is redundant, not misspelt.
    """
    paths = list(paths)
    chosen: dict[str, Rule] = {}
    used: set[int] = set()
    for path in paths:
        for number, rule in enumerate(rules):
            if rule.matches(path):
                used.add(number)
                chosen.setdefault(path, rule)
    unused = [rule for number, rule in enumerate(rules) if number not in used]
    if unused:
        raise ValueError("; ".join(f"rule {rule} matches no layer{_hint(rule, paths)}" for rule in unused))
    return chosen


def _hint(rule: Rule, paths: list[str]) -> str:
    if "/" not in rule.pattern and any(rule.matches(path.replace("/", ".")) for path in paths):
        return "; module paths are written with '/' between components"
    plain = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", rule.pattern).replace("\\", "")
    near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.5)
    near = near or [path for path in paths if plain.rpartition("/")[2] in path][:3] or paths[:3]
    if not near:
        return "; the model has no layer that can be quantized"
    return "; layers are named like " + ", ".join(near) + " and the pattern must match the whole path"
