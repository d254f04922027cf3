"""What rules make of a model, before anything is quantized: one Site for each module that they change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mlxq.format import GROUP_SIZES, KERNEL_BITS, Format, dtype_name
from mlxq.ptq.pack import DEFAULT_GROUP, packed_format
from mlxq.ptq.qarray import HowToQuantize
from mlxq.rules import QTYPES, QuantizationRule, RuleSet, calibration

# Layers of mlx.nn, mlx-lm and torch.nn, by the name of their class or of one above it.
_OPERATIONS = {
    "Linear": "linear",
    "Embedding": "embedding",
    "Conv1d": "conv_general",
    "Conv2d": "conv_general",
    "Conv3d": "conv_general",
    "SwitchLinear": "switch_linear",
    "MultiLinear": "multi_linear",
}
# torch's attention reads this layer's weight without calling it.
_LEFT_ALONE = ("NonDynamicallyQuantizableLinear",)


def operation(module) -> str | None:
    """What a float layer of mlx.nn, mlx-lm or torch.nn does, as rules name it; None for all others."""
    for cls in type(module).__mro__:
        if cls.__name__ in _LEFT_ALONE:
            return None
        if cls.__name__ in _OPERATIONS and cls.__module__.split(".")[0] in ("mlx", "mlx_lm", "torch"):
            return _OPERATIONS[cls.__name__]
    return None


@dataclass(frozen=True)
class Site:
    """One module that a rule quantizes; of embeddings, whose inputs are ids, the table only.

    path     components joined by '/'
    shape    of the weight as it is computed with: (N, K), (experts, N, K), (O, ...) of a convolution
    weight   how the weight is quantized; `packed` its format, None where codes are stored one by one
    """

    path: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    rule: QuantizationRule
    weight: HowToQuantize

    def __post_init__(self):
        if self.operation == "embedding" and self.rule.act_qtype is not None:
            rule = replace(self.rule, act_qtype=None, act_static_scale=None, act_calibration_method=None)
            object.__setattr__(self, "rule", rule)

    @property
    def packed(self) -> Format | None:
        return packed_format(self.weight, self.shape, *((KERNEL_BITS,) if self.integer else ()))

    @property
    def integer(self) -> bool:
        """Whether inputs become int8 for products of integers.

        Their scales are of rows, one for all, or of tiles where these are the groups of the packed weight.
        """
        rule = self.rule
        return (
            rule.act_qtype == "int8"
            and self.operation == "linear"
            and (rule.tile_size is None or rule.grid is not None or self._tiles_are_groups)
            and (rule.act_calibration_method is None or (rule.act_static_scale and self._symmetric))
            and self.weight.qtype in ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
            and packed_format(self.weight, self.shape, KERNEL_BITS) is not None
        )

    @property
    def sums_codes(self) -> bool:
        """Whether int8 inputs meet a packed weight as integers, in ops.q8mm.

        All that are `integer`; and where the rule names a symmetric calibration, weights of KERNEL_BITS.
        """
        rule, fmt = self.rule, self.packed
        return self.integer or (
            rule.act_qtype == "int8"
            and self.operation == "linear"
            and self._symmetric
            and fmt is not None
            and fmt.bits in KERNEL_BITS
            and (rule.tile_size is None or rule.grid is not None or self._tiles_are_groups)
        )

    @property
    def act_tile(self) -> int | None:
        """Neighbours of an int8 input's row that share a scale, where `integer`; None: the whole row."""
        rule = self.rule
        if not self.integer or rule.tile_size is None or rule.grid is not None:
            return None
        return self.packed.group_size

    @property
    def activation(self) -> str:
        """Q8Linear's name for the scales of int8 inputs, where `integer`."""
        if self.rule.act_static_scale:
            return "static_tile" if self.act_tile else "static"
        return "tile" if self.act_tile else "token"

    @property
    def _tiles_are_groups(self) -> bool:
        fmt = packed_format(self.weight, self.shape, KERNEL_BITS)
        tile = self.weight.tiles(self.shape).get(len(self.shape) - 1)
        return fmt is not None and fmt.group_size == tile

    @property
    def _symmetric(self) -> bool:
        """Whether the inputs' static range has no zero point."""
        name, numbers = calibration(self.rule.act_calibration_method or "absmax")
        return name in ("absmax", "rms") or (name == "fixed" and sum(numbers) == 0)

    def act(self, ndim: int) -> HowToQuantize | None:
        """How an input of so many axes is quantized, the last one summed; None keeps it in float."""
        rule = self.rule
        if rule.act_qtype is None:
            return None
        tile = QTYPES[rule.act_qtype].tile or (None if rule.grid else rule.tile_size)
        convolution = self.operation == "conv_general"
        return HowToQuantize(
            qtype=rule.act_qtype,
            channelwise_axes=(0,) if convolution else tuple(range(ndim - 1)),
            tiled_axes={ndim - 1: tile} if tile and not convolution else {},
            calibration_method=rule.act_calibration_method or "absmax",
        )

    @property
    def stored(self) -> str:
        """ "8-bit/64", "nf4/32", "mxfp4", ... with the inputs' type behind a plus."""
        tile = self.weight.tiled_axes.get(len(self.shape) - 1)
        fixed = QTYPES[self.weight.qtype].tile if self.packed is None else None
        weight = self.packed or (self.weight.qtype if fixed else f"{self.weight.qtype}/{tile or 'row'}")
        kind = (" static" if self.rule.act_static_scale else "") + (" tile" if self.act_tile else "")
        return str(weight) + (f" + {self.rule.act_qtype}{kind} inputs" if self.rule.act_qtype else "")

    @property
    def input_name(self) -> str:
        """Name of the input's statistics: the module, its operation and that operation's number, the side."""
        return f"{self.path}/{self.operation}0_lhs"

    def ranges(self, ndim: int) -> HowToQuantize:
        """How a static input's range is taken: one for each index of act_batch_axes, and of its tiles.

        Raises ValueError, naming the path, for an axis that the input does not have.
        """
        return ranged(self.act(ndim), self.rule.act_batch_axes, ndim, self.path)

    @property
    def tensor(self) -> str:
        """Name of the weight among the model's parameters."""
        return self.path.replace("/", ".") + ".weight"


def ranged(how: HowToQuantize, axes: tuple[int, ...], ndim: int, path: str) -> HowToQuantize:
    """how with a range for each index of these axes, but for summed ones: a range is of whole rows or tiles.

    Raises ValueError, naming the path, for an axis that an input of ndim axes does not have.
    """
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{path}: act_batch_axes names axis {axis}, but the input has {ndim} axes")
    batch = {axis % ndim for axis in axes}
    return replace(how, channelwise_axes=tuple(a for a in how.channelwise_axes if a in batch))


class Plan(Mapping):
    """{path: Site} of the modules that rules quantize.

    shapes   of every parameter of the model, by its name with dots: what quantize_params checks against
    rules    the RuleSet, which knows its unused_rules()
    kept     {path: rule} of modules that a rule without weight_qtype keeps in float
    """

    def __init__(self, sites: dict[str, Site], shapes: dict[str, tuple[int, ...]], rules: RuleSet, kept):
        self.sites, self.shapes, self.rules, self.kept = sites, shapes, rules, kept

    def __getitem__(self, path: str) -> Site:
        return self.sites[path]

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        return "\n".join(f"{site.path}: {site.stored}" for site in self.values())


def how_for(rule: QuantizationRule, operation: str, shape: tuple[int, ...]) -> HowToQuantize:
    """How a rule quantizes the weight of an operation: a scale for each output, tiles along the summed axis.

    Raises ValueError for shapes that the tiles do not divide, and for tiles of convolutions.
    """
    qtype, tile, last = rule.weight_qtype, rule.tile_size, len(shape) - 1
    if rule.grid:
        tile = tile or DEFAULT_GROUP
    elif QTYPES[qtype].tile and tile is None:
        tile = QTYPES[qtype].tile
    if operation == "conv_general":
        if tile:
            raise ValueError(
                "convolutions have one scale for each output, no tiles: exclude it by an earlier rule, or "
                "give it one without tile_size and of a type that has no tiles"
            )
        return HowToQuantize(
            qtype=qtype, channelwise_axes=(0,), calibration_method=rule.weight_calibration_method
        )
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=tuple(range(last)),
        tiled_axes={last: tile} if tile else {},
        calibration_method=rule.weight_calibration_method,
    )
    try:
        how.tiles(shape)
    except ValueError as error:
        fits = [g for g in GROUP_SIZES if shape[last] % g == 0]
        hint = f"; {fits[-1]} would fit" if fits else "; keep it in float by an earlier rule"
        raise ValueError(f"{error}{hint}") from None
    return how


def site_of(path: str, operation: str, shape: tuple[int, ...], dtype: str, rule: QuantizationRule) -> Site:
    """The site of one weight. Raises ValueError, naming the path, where the rule cannot quantize it."""
    try:
        return Site(path, operation, shape, dtype, rule, how_for(rule, operation, shape))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plan(
    model, rules: Iterable[QuantizationRule | str] | RuleSet, *, allow_unused_rules: bool = False
) -> Plan:
    """What the rules do to a model of MLX or torch, lazy or on the meta device too: no array is read.

    Raises ValueError for rules that match nothing (unless allow_unused_rules) and says where it is because a
    layer is quantized already; and, with the path, for shapes that a rule cannot quantize.
    """
    found = rules if isinstance(rules, RuleSet) else RuleSet(rules)
    sites: dict[str, Site] = {}
    kept: dict[str, QuantizationRule] = {}
    quantized: dict[str, str] = {}
    for dotted, module in model.named_modules():
        kind, path = operation(module), dotted.replace(".", "/")
        if kind is None:
            if getattr(module, "scales", None) is not None:
                quantized[path] = type(module).__name__
            continue
        rule = found.find(path, kind)
        if rule is None or rule.weight_qtype is None:
            if rule is not None:
                kept[path] = rule
            continue
        weight = module.weight
        shape = tuple(weight.shape)
        try:
            sites[path] = Site(path, kind, shape, dtype_name(weight), rule, how_for(rule, kind, shape))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not allow_unused_rules:
        try:
            found.check()
        except ValueError as error:
            raise ValueError(f"{error}{_already(quantized, found)}") from None
    return Plan(dict(sorted(sites.items())), parameter_shapes(model), found, kept)


def _already(quantized: dict[str, str], rules: RuleSet) -> str:
    """What an error adds where unused rules match layers that are quantized."""
    unused = rules.unused_rules()
    paths = sorted(path for path in quantized if any(rule.matches(path) for rule in unused))
    if not paths:
        return ""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"; {paths[0]} ({quantized[paths[0]]}){more}: quantized already, and rules are for float layers; "
        "start from the float model"
    )


def parameter_shapes(model) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer of a model of MLX or torch, by its name."""
    if hasattr(model, "state_dict"):
        return {name: tuple(a.shape) for name, a in model.state_dict().items()}
    from mlx.utils import tree_flatten

    return {name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}
