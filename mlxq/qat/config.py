"""What fake quantization rounds to, and where: configurations without any framework in them.

Names and meanings are those of torchao 0.18 (docs of torchao.quantization.qat). A dtype is given as a name
("int4", "float32") or as the dtype of torch or MLX, which has that name. Whatever cannot be trained or
converted right is refused here, when the configuration is made.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mlxq.format import STORAGE

INT_BOUNDS = {f"int{b}": (-(1 << (b - 1)), (1 << (b - 1)) - 1) for b in range(1, 9)} | {
    f"uint{b}": (0, (1 << b) - 1) for b in range(1, 9)
}
# Mantissa bits, least exponent and largest value.
FLOAT8 = {"float8_e4m3fn": (3, -6, 448.0), "float8_e5m2": (2, -14, 57344.0)}
# The codes that each dtype of a zero point holds exactly.
ZEROS = {"int8": (-128, 127), "uint8": (0, 255)} | {
    name: (-256, 256) for name in ("int16", "int32", "int64", *STORAGE)
}
LARGEST_EPS = {None: 2.0**15, "float16": 2.0**15, "bfloat16": 2.0**127, "float32": 2.0**127}
SYMMETRIC, ASYMMETRIC = "symmetric", "asymmetric"
DOMAINS = ("int", "float", "none")
STEPS = ("prepare", "convert")


def dtype_name(dtype: Any) -> str:
    """The bare name of a dtype of torch, MLX or numpy, or of one given by name: "int4", "float32"."""
    if isinstance(dtype, type):
        return dtype.__name__
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2].lower()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _listed(values) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of activations."""


@dataclass(frozen=True)
class PerAxis:
    """One scale for each output channel of a weight."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of group_size values along K."""

    group_size: int

    def __post_init__(self):
        if type(self.group_size) is not int or self.group_size < 2:
            raise ValueError(f"PerGroup: groups of {self.group_size!r} do not exist; wanted 2 or more")


@dataclass(frozen=True)
class PerRow:
    """One float8 scale for each row along the last axis."""


@dataclass(frozen=True)
class PerTensor:
    """One float8 scale for everything."""


Granularity = PerToken | PerAxis | PerGroup | PerRow | PerTensor
_BY_NAME = {
    "per_token": PerToken(),
    "per_channel": PerAxis(0),
    "per_row": PerRow(),
    "per_tensor": PerTensor(),
}


def _granularity(what: str, given: Granularity | str | None, group_size: int | None, built: tuple) -> Any:
    """The granularity that was meant. Raises ValueError when two were, or none, or one that is not built."""
    names = tuple(name for name, value in _BY_NAME.items() if isinstance(value, built))
    names += ("per_group",) if PerGroup in built else ()
    if isinstance(given, type):
        raise ValueError(f"{what}: granularity is the class {given.__name__}; wanted {given.__name__}(...)")
    if group_size is not None and given not in (None, "per_group"):
        raise ValueError(f"{what}: group_size={group_size} conflicts with granularity {given!r}; give one")
    if given == "per_group" and group_size is None:
        raise ValueError(f"{what}: granularity 'per_group' has no group_size; give one")
    if given is None and group_size is None:
        raise ValueError(f"{what}: neither granularity nor group_size is given; give one")
    if given in (None, "per_group"):
        chosen = PerGroup(group_size)
    else:
        chosen = _BY_NAME.get(given, given) if isinstance(given, str) else given
    if not isinstance(chosen, built):
        raise ValueError(f"{what}: granularity {given!r} is not built; wanted {_listed(names)}")
    if isinstance(chosen, PerAxis) and chosen.axis != 0:
        raise ValueError(f"{what}: PerAxis({chosen.axis}) is not built; wanted PerAxis(0), output channels")
    return chosen


class FakeQuantizeConfigBase:
    """Any configuration of one fake quantizer."""


@dataclass(init=False)
class IntxFakeQuantizeConfig(FakeQuantizeConfigBase):
    """Integer codes with a scale, and maybe a zero point, for each token, channel or group.

    dtype                 "int1" .. "int8", "uint1" .. "uint8"
    granularity           PerToken(), PerAxis(0), PerGroup(n), their names "per_token", "per_channel",
                          "per_group" (with group_size), or None with group_size
    mapping_type          "symmetric" (default), "asymmetric"; or is_symmetric
    scale_precision       dtype in which scales are stored: float32, float16, bfloat16; None: the weight's own
    zero_point_precision  None: int32 in domain "int", scale_precision in domain "float"; else a dtype that
                          holds every code, and in domain "float" a float one
    zero_point_domain     "int": the zero point is a code. "float": it is a weight, as in tinygemm
    is_dynamic            False: scales are chosen once and stay
    range_learning        scales (and zero points) are parameters: LSQ (Esser et al. 2020), no 1/sqrt(n)
    eps                   the least scale; None: the smallest normal number of the weight's dtype (1e-6 in
                          domain "float"), never machine epsilon, which in bfloat16 is 2^-7

    Raises ValueError for combinations that do not exist: two sources of granularity or symmetry, symmetric
    codes without a sign, asymmetric float zero points on signed codes or in an integer dtype, integer zero
    points in a dtype that cannot hold them, learned ranges that are dynamic or per token, an eps that is no
    number above 0 or that the scales' dtype cannot hold.
    """

    dtype: str
    granularity: Any
    mapping_type: str
    scale_precision: str | None
    zero_point_precision: str | None
    zero_point_domain: str
    is_dynamic: bool
    range_learning: bool
    eps: float | None

    def __init__(
        self,
        dtype: Any,
        granularity: Granularity | str | None = None,
        mapping_type: Any = None,
        scale_precision: Any = "float32",
        zero_point_precision: Any = None,
        zero_point_domain: Any = "int",
        is_dynamic: bool = True,
        range_learning: bool = False,
        eps: float | None = None,
        *,
        group_size: int | None = None,
        is_symmetric: bool | None = None,
    ):
        what = type(self).__name__
        if mapping_type is not None and is_symmetric is not None:
            raise ValueError(f"{what}: mapping_type and is_symmetric are both given; give one")
        if mapping_type is None:
            mapping_type = ASYMMETRIC if is_symmetric is False else SYMMETRIC
        if zero_point_domain is None:
            raise ValueError(f"{what}: zero_point_domain is None; wanted {_listed(DOMAINS)}")
        fields = {
            "dtype": dtype_name(dtype),
            "granularity": _granularity(what, granularity, group_size, (PerToken, PerAxis, PerGroup)),
            "mapping_type": dtype_name(mapping_type),
            "scale_precision": None if scale_precision is None else dtype_name(scale_precision),
            "zero_point_precision": None
            if zero_point_precision is None
            else dtype_name(zero_point_precision),
            "zero_point_domain": dtype_name(zero_point_domain),
            "is_dynamic": is_dynamic,
            "range_learning": range_learning,
            "eps": eps,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        what, domain = type(self).__name__, self.zero_point_domain
        if self.dtype not in INT_BOUNDS:
            raise ValueError(f"{what}: dtype {self.dtype!r} is not built; wanted {_listed(INT_BOUNDS)}")
        if self.mapping_type not in (SYMMETRIC, ASYMMETRIC):
            raise ValueError(f"{what}: mapping_type {self.mapping_type!r}; wanted {SYMMETRIC}, {ASYMMETRIC}")
        if self.scale_precision not in (None, *STORAGE):
            raise ValueError(
                f"{what}: scales in {self.scale_precision} are not built; wanted {_listed(STORAGE)}"
            )
        if domain not in DOMAINS:
            raise ValueError(f"{what}: zero_point_domain {domain!r}; wanted {_listed(DOMAINS)}")
        signed = not self.dtype.startswith("u")
        if self.is_symmetric and not signed:
            raise ValueError(
                f"{what}: symmetric codes have a sign; wanted {self.dtype[1:]}, not {self.dtype}"
            )
        if self.is_symmetric and domain == "float":
            raise ValueError(f"{what}: a float zero point is asymmetric; give is_symmetric=False")
        if not self.is_symmetric and domain == "none":
            raise ValueError(f"{what}: asymmetric codes need a zero point; wanted domain 'int' or 'float'")
        if domain == "float" and signed:
            raise ValueError(f"{what}: a float zero point goes with unsigned codes; wanted u{self.dtype}")
        for name in ("is_dynamic", "range_learning"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{what}: {name}={getattr(self, name)!r}; wanted True or False")
        self._check_zeros(what, domain)
        if domain == "float" and self.zero_point_precision not in (None, *STORAGE):
            raise ValueError(
                f"{what}: a float zero point in {self.zero_point_precision} loses its fraction; "
                f"wanted {_listed(STORAGE)}"
            )
        if domain == "float" and isinstance(self.granularity, PerToken):
            raise ValueError(f"{what}: float zero points are for weights, per_group or per_channel")
        if self.is_dynamic and self.range_learning:
            raise ValueError(f"{what}: learned ranges are not dynamic; give is_dynamic=False")
        if not self.is_dynamic and isinstance(self.granularity, PerToken):
            raise ValueError(f"{what}: scales per token are dynamic: other tokens have other scales")
        if self.eps is not None and not (_is_number(self.eps) and self.eps > 0):
            raise ValueError(f"{what}: eps={self.eps!r}; wanted a number above 0")
        largest = LARGEST_EPS[self.scale_precision]
        if self.eps is not None and self.eps > largest:
            raise ValueError(
                f"{what}: eps={self.eps!r} is more than a scale can be; wanted {largest:g} at most"
            )

    def _check_zeros(self, what: str, domain: str) -> None:
        low, high = ZEROS.get(self.zero_point_precision or "int32", (1, 0))
        if low > high:
            raise ValueError(
                f"{what}: zero points in {self.zero_point_precision!r} are not built; wanted {_listed(ZEROS)}"
            )
        least, most = self.bounds
        if domain == "int" and not self.is_symmetric and not low <= least <= most <= high:
            fits = [name for name, (a, b) in ZEROS.items() if a <= least and most <= b]
            raise ValueError(
                f"{what}: {self.zero_point_precision} does not hold the codes {least} .. {most} of "
                f"{self.dtype}; wanted {_listed(fits)}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning group_size or is_symmetric sets the granularity or the mapping type."""
        if name == "group_size":
            name, value = "granularity", PerGroup(value)
        elif name == "is_symmetric":
            name, value = "mapping_type", SYMMETRIC if value else ASYMMETRIC
        before = getattr(self, name)
        object.__setattr__(self, name, value)
        try:
            self._check()
        except ValueError:
            object.__setattr__(self, name, before)
            raise

    @property
    def group_size(self) -> int:
        if isinstance(self.granularity, PerGroup):
            return self.granularity.group_size
        raise ValueError(f"{type(self).__name__}: {self.granularity} has no group_size")

    @property
    def is_symmetric(self) -> bool:
        return self.mapping_type == SYMMETRIC

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest code."""
        return INT_BOUNDS[self.dtype]


class FakeQuantizeConfig(IntxFakeQuantizeConfig):
    """The old name of IntxFakeQuantizeConfig; warns."""

    def __init__(self, *args, **kwargs):
        warnings.warn(
            "FakeQuantizeConfig is now called IntxFakeQuantizeConfig", DeprecationWarning, stacklevel=2
        )
        super().__init__(*args, **kwargs)


@dataclass(frozen=True)
class Float8FakeQuantizeConfig(FakeQuantizeConfigBase):
    """Float8 values under one float32 scale for each row, or for everything.

    hp_value_lb, hp_value_ub   bounds of the largest magnitude before it becomes the scale

    Raises ValueError for other dtypes and granularities, and for bounds that are no magnitudes.
    """

    dtype: Any = "float8_e4m3fn"
    granularity: Any = PerRow()
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None

    def __post_init__(self):
        what = type(self).__name__
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype not in FLOAT8:
            raise ValueError(f"{what}: dtype {self.dtype!r} is not built; wanted {_listed(FLOAT8)}")
        object.__setattr__(
            self, "granularity", _granularity(what, self.granularity, None, (PerRow, PerTensor))
        )
        low, high = self.hp_value_lb, self.hp_value_ub
        if low is not None and not (_is_number(low) and low >= 0):
            raise ValueError(f"{what}: hp_value_lb={low!r}; wanted a number, 0 or more")
        if high is not None and not (_is_number(high) and high > 0):
            raise ValueError(f"{what}: hp_value_ub={high!r}; wanted a number above 0")
        if low is not None and high is not None and low > high:
            raise ValueError(f"{what}: hp_value_lb={low} is above hp_value_ub={high}")


@dataclass(frozen=True)
class Int4WeightFakeQuantizeConfig(FakeQuantizeConfigBase):
    """4-bit weights as torchao's kernels for float8 or bfloat16 activations choose them.

    activation_dtype  "float8_e4m3fn": the weight goes through float8 rows first, then -8..7 with scale max/8
                      "bfloat16": 0..15 between each group's least and largest weight
    scale_precision   dtype in which scales are stored; None: as torchao computes them, the weight's dtype for
                      float8 and float32 for bfloat16
    """

    group_size: int = 128
    activation_dtype: Any = "float8_e4m3fn"
    scale_precision: Any = None

    def __post_init__(self):
        what = type(self).__name__
        PerGroup(self.group_size)
        object.__setattr__(self, "activation_dtype", dtype_name(self.activation_dtype))
        if self.activation_dtype not in ("float8_e4m3fn", "bfloat16"):
            raise ValueError(
                f"{what}: activations in {self.activation_dtype} are not built; "
                "wanted float8_e4m3fn, bfloat16"
            )
        if self.scale_precision is not None:
            object.__setattr__(self, "scale_precision", dtype_name(self.scale_precision))
            if self.scale_precision not in STORAGE:
                raise ValueError(
                    f"{what}: scales in {self.scale_precision} are not built; wanted {_listed(STORAGE)}"
                )

    @property
    def granularity(self) -> PerGroup:
        return PerGroup(self.group_size)


class BaseConfig:
    """What a model is to become; says how to train for it.

    fake_quantizers()   configurations of (activations or None, weights)

    Raises ValueError, under its own name, for what its fake quantizers refuse.
    """

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        try:
            activation, weight = self.fake_quantizers()
            if activation is not None:
                check_activation(activation)
            check_weight(weight)
        except ValueError as error:
            said = re.sub(r"^\w+: ", "", str(error))
            raise ValueError(f"{type(self).__name__}: {said}") from None

    def fake_quantizers(self) -> tuple[FakeQuantizeConfigBase | None, FakeQuantizeConfigBase]:
        raise NotImplementedError


@dataclass(frozen=True)
class IntxWeightOnlyConfig(BaseConfig):
    """Symmetric integer weights of 1 to 8 bits; activations stay in float."""

    weight_dtype: Any = "int8"
    granularity: Any = PerAxis(0)
    scale_dtype: Any = None

    def fake_quantizers(self):
        return None, IntxFakeQuantizeConfig(
            self.weight_dtype, self.granularity, scale_precision=self.scale_dtype
        )


@dataclass(frozen=True)
class Int8DynamicActivationIntxWeightConfig(BaseConfig):
    """Int8 activations, asymmetric per token, times symmetric integer weights (8da4w and its kin)."""

    weight_dtype: Any = "int8"
    weight_granularity: Any = PerGroup(32)
    weight_scale_dtype: Any = None

    def fake_quantizers(self):
        activation = IntxFakeQuantizeConfig("int8", "per_token", is_symmetric=False, scale_precision=None)
        return activation, IntxFakeQuantizeConfig(
            self.weight_dtype, self.weight_granularity, scale_precision=self.weight_scale_dtype
        )


@dataclass(frozen=True)
class Int4WeightOnlyConfig(BaseConfig):
    """4-bit weights between each group's least and largest, for bfloat16 activations."""

    group_size: int = 128
    scale_dtype: Any = None

    def fake_quantizers(self):
        return None, Int4WeightFakeQuantizeConfig(self.group_size, "bfloat16", self.scale_dtype)


@dataclass(frozen=True)
class Float8DynamicActivationInt4WeightConfig(BaseConfig):
    """Float8 rows times 4-bit weights in groups of 128."""

    group_size: int = 128
    scale_dtype: Any = None

    def fake_quantizers(self):
        return Float8FakeQuantizeConfig(), Int4WeightFakeQuantizeConfig(
            self.group_size, "float8_e4m3fn", self.scale_dtype
        )


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig(BaseConfig):
    """Float8 rows (or tensors) on both sides. Prepare only: integer words cannot hold float8 weights."""

    activation_dtype: Any = "float8_e4m3fn"
    weight_dtype: Any = "float8_e4m3fn"
    granularity: Any = PerRow()
    activation_value_lb: float | None = None
    activation_value_ub: float | None = None

    def fake_quantizers(self):
        bounds = self.activation_value_lb, self.activation_value_ub
        return (
            Float8FakeQuantizeConfig(self.activation_dtype, self.granularity, *bounds),
            Float8FakeQuantizeConfig(self.weight_dtype, self.granularity),
        )


@dataclass(frozen=True)
class QATConfig:
    """One of the two steps: "prepare" puts fake quantizers in, "convert" makes packed layers of them.

    base_config                        what the model is to become, or
    activation_config, weight_config   the fake quantizers themselves (prepare only)

    Raises ValueError when both are given, or neither in prepare, when convert gets fake quantizers, for
    another step, and for a fake quantizer in place of the base.
    """

    base_config: BaseConfig | None = None
    activation_config: FakeQuantizeConfigBase | None = None
    weight_config: FakeQuantizeConfigBase | None = None
    step: str = "prepare"

    def __post_init__(self):
        step = str(getattr(self.step, "value", self.step)).lower()
        object.__setattr__(self, "step", step)
        if step not in STEPS:
            raise ValueError(f"QATConfig: step {self.step!r}; wanted {_listed(STEPS)}")
        if isinstance(self.base_config, FakeQuantizeConfigBase):
            raise ValueError(
                f"QATConfig: {type(self.base_config).__name__} is no base; pass it as activation_config "
                "or weight_config"
            )
        if self.base_config is not None and not isinstance(self.base_config, BaseConfig):
            raise ValueError(f"QATConfig: base_config is {self.base_config!r}; wanted one of mlxq.qat's")
        explicit = self.activation_config is not None or self.weight_config is not None
        if self.base_config is not None and explicit:
            raise ValueError(
                "QATConfig: base_config comes with its own fake quantizers; give one or the other"
            )
        if step == "prepare" and self.base_config is None and not explicit:
            raise ValueError("QATConfig: nothing to prepare for; give base_config or weight_config")
        if step == "convert" and explicit:
            raise ValueError("QATConfig: convert takes the fake quantizers that prepare put in; give none")
        if self.base_config is not None:
            self.base_config.check()
        for config in (self.activation_config, self.weight_config):
            if config is not None and not isinstance(config, FakeQuantizeConfigBase):
                raise ValueError(f"QATConfig: {config!r} is no fake quantizer's configuration")
        if self.activation_config is not None:
            check_activation(self.activation_config)
        if self.weight_config is not None:
            check_weight(self.weight_config)

    def fake_quantizers(self) -> tuple[FakeQuantizeConfigBase | None, FakeQuantizeConfigBase | None]:
        """Configurations of (activations or None, weights or None). Raises ValueError as they do."""
        if self.base_config is not None:
            return self.base_config.fake_quantizers()
        return self.activation_config, self.weight_config


def check_activation(config: FakeQuantizeConfigBase) -> None:
    """Raises ValueError for a configuration that activations cannot have."""
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        raise ValueError("Int4WeightFakeQuantizeConfig is for weights, not for activations")
    if isinstance(config, IntxFakeQuantizeConfig):
        if isinstance(config.granularity, PerAxis):
            raise ValueError("activations have no output channels; wanted per_token or per_group")
        if not config.is_dynamic:
            raise ValueError("activations have dynamic scales here: is_dynamic=False is for weights")
        if config.zero_point_domain == "float":
            raise ValueError("float zero points are for weights; activations take domain 'int'")


def activation_to_json(config: FakeQuantizeConfigBase) -> dict[str, Any]:
    """How activations are rounded as a JSON object, for activation_from_json."""
    names = {value: name for name, value in _BY_NAME.items()}
    if isinstance(config, Float8FakeQuantizeConfig):
        said = {name: getattr(config, name) for name in ("dtype", "hp_value_lb", "hp_value_ub")}
        return said | {"granularity": names[config.granularity]}
    own = ("dtype", "mapping_type", "scale_precision", "zero_point_precision", "zero_point_domain", "eps")
    said = {name: getattr(config, name) for name in own}
    if isinstance(config.granularity, PerGroup):
        return said | {"group_size": config.group_size}
    return said | {"granularity": names[config.granularity]}


def activation_from_json(said: Any) -> FakeQuantizeConfigBase:
    """The configuration that activation_to_json wrote. Raises ValueError for anything else."""
    if not isinstance(said, dict):
        raise ValueError(f"{said!r} says no rounding; wanted an object")
    kind = Float8FakeQuantizeConfig if said.get("dtype") in FLOAT8 else IntxFakeQuantizeConfig
    try:
        config = kind(**said)
    except TypeError as error:
        raise ValueError(f"{said} says no rounding: {error}") from None
    check_activation(config)
    return config


def check_weight(config: FakeQuantizeConfigBase) -> None:
    """Raises ValueError for a configuration that weights cannot have."""
    if isinstance(config, IntxFakeQuantizeConfig) and isinstance(config.granularity, PerToken):
        raise ValueError("weights have no tokens; wanted per_channel or per_group")
