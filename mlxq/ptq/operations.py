"""Operations that a model calls directly, quantized by rules: each call is a site of its own.

    operations = Operations(rules)
    here = operations.module("layers/0/attention")          # in the module's forward pass
    scores = here.einsum("bqd,bkd->bqk", q, k, rhs_is_weight=False)

A site is named by its module's path, the operation and its running number there: layers/0/attention/einsum0.
Its statistics end in _lhs, and in _rhs where the right operand is an input too, as in qwix.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

from mlxq import bridge
from mlxq.format import dtype_name
from mlxq.ptq import functional
from mlxq.ptq.arrays import namespace
from mlxq.ptq.calibrate import observe
from mlxq.ptq.functional import input_range
from mlxq.ptq.plan import ranged, site_of
from mlxq.ptq.qarray import HowToQuantize, QArray, calibrate, scale_and_zero_point
from mlxq.ptq.statistics import Statistics
from mlxq.rules import QuantizationRule, RuleSet


class Operations:
    """Rules for the operations of one model, and the statistics of those with a static scale.

    rules   as plan takes them; a RuleSet that plan has too knows what neither of them used
    stats   of an earlier calibration; None: none
    """

    def __init__(
        self, rules: Iterable[QuantizationRule | str] | RuleSet, stats: Statistics | None = None
    ) -> None:
        self.rules = rules if isinstance(rules, RuleSet) else RuleSet(rules)
        self.stats = Statistics() if stats is None else stats
        self.is_calibrating = False
        self._found: dict[tuple[str, str], QuantizationRule | None] = {}

    def rule(self, path: str, operation: str) -> QuantizationRule | None:
        """The rule that quantizes an operation in a module, None where it stays in float."""
        if (path, operation) not in self._found:
            rule = self.rules.find(path, operation)
            self._found[path, operation] = None if rule is None or rule.weight_qtype is None else rule
        return self._found[path, operation]

    def module(self, path: str) -> Module:
        """The operations of one pass through a module: its path, '/' between components; numbers from 0."""
        return Module(self, path)

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[Statistics]:
        """Inside the block nothing is quantized, and inputs of static sites are added to the statistics."""
        self.is_calibrating = True
        try:
            yield self.stats
        finally:
            self.is_calibrating = False


class Module:
    """One pass through a module: the operations of mlxq.ptq.functional by its name and under its rules.

    Where a rule has act_static_scale, inputs are rounded by the average range of the calibration; ValueError,
    naming the site, where there was none.
    """

    def __init__(self, operations: Operations, path: str):
        self.operations, self.path = operations, path
        self.counts: Counter[str] = Counter()

    def _enter(self, operation: str) -> tuple[str, QuantizationRule | None, bool]:
        """(name of the site, the rule that quantizes it, whether its inputs have a static scale)."""
        number = self.counts[operation]
        self.counts[operation] += 1
        rule = self.operations.rule(self.path, operation)
        name = f"{self.path}/{operation}{number}"
        return name, rule, rule is not None and rule.act_static_scale

    def linear(self, x, weight, bias=None):
        """functional.linear: x (..., K), weight float (N, K)."""
        name, rule, static = self._enter("linear")
        if not static:
            return functional.linear(x, weight, bias, None if self.operations.is_calibrating else rule)
        name, stats = f"{name}_lhs", self.operations.stats
        site = site_of(self.path, "linear", tuple(weight.shape), dtype_name(weight), rule)
        if self.operations.is_calibrating:
            observe(x, site, stats, name)
            return functional.linear(x, weight, bias)
        averages = {key: bridge.like(value, x) for key, value in stats.average(name).items()}
        return functional.linear(x, weight, bias, rule, input_range(averages, site))

    def embedding(self, ids, table):
        """functional.embedding."""
        _, rule, _ = self._enter("embedding")
        return functional.embedding(ids, table, None if self.operations.is_calibrating else rule)

    def einsum(self, subscripts: str, lhs, rhs, *, rhs_is_weight: bool = True):
        """functional.einsum."""
        name, rule, static = self._enter("einsum")
        parts = functional.Subscripts(subscripts, lhs.ndim, rhs.ndim)
        ranges = self._ranges(name, rule, parts, lhs, rhs, rhs_is_weight) if static else (None, None)
        rule = None if self.operations.is_calibrating else rule
        return functional.einsum(subscripts, lhs, rhs, rule, rhs_is_weight=rhs_is_weight, static=ranges)

    def matmul(self, lhs, rhs, *, rhs_is_weight: bool = True):
        """functional.matmul."""
        name, rule, static = self._enter("matmul")
        parts = functional.Subscripts(functional.matmul_subscripts(lhs, rhs), lhs.ndim, rhs.ndim)
        ranges = self._ranges(name, rule, parts, lhs, rhs, rhs_is_weight) if static else (None, None)
        rule = None if self.operations.is_calibrating else rule
        return functional.matmul(lhs, rhs, rule, rhs_is_weight=rhs_is_weight, static=ranges)

    def conv_general(self, x, weight, **options):
        """functional.conv_general."""
        name, rule, static = self._enter("conv_general")
        found = None
        if static:
            how = site_of(name, "conv_general", tuple(weight.shape), "float32", rule).act(x.ndim)
            found = self._range(f"{name}_lhs", x, how, rule)
        rule = None if self.operations.is_calibrating else rule
        return functional.conv_general(x, weight, rule, static=found, **options)

    def _ranges(self, name, rule, parts, lhs, rhs, rhs_is_weight: bool):
        """The static ranges of both operands."""
        method = rule.act_calibration_method or "absmax"
        hows = [parts.how(left, rule.act_qtype, rule.tile_size, method) for left in (True, False)]
        return (
            self._range(f"{name}_lhs", lhs, hows[0], rule),
            None if rhs_is_weight else self._range(f"{name}_rhs", rhs, hows[1], rule),
        )

    def _range(self, name: str, x, how: HowToQuantize, rule: QuantizationRule):
        """(scale, zero point or None) of an input; None, and its range is noted, while calibrating."""
        if isinstance(x, QArray):
            return None
        xp, stats = namespace(x), self.operations.stats
        if self.operations.is_calibrating:
            how = ranged(how, rule.act_batch_axes, x.ndim, name)
            ranges = calibrate(xp.cast(x, "float32"), how)
            axes = how.channelwise_axes
            means = {key: bridge.to_numpy(xp.reduce("mean", r, axes)) for key, r in ranges.items()}
            stats.update(name, means)
            return None
        averages = {key: bridge.like(value, x) for key, value in stats.average(name).items()}
        return scale_and_zero_point(averages, how.qtype)
