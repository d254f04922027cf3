"""Configurations of quantization-aware training: what exists is accepted, everything else is refused."""

import math

import pytest

from mlxq import qat
from mlxq.qat import (
    FakeQuantizeConfig,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    QATConfig,
)
from mlxq.qat.config import INT_BOUNDS, BaseConfig, check_activation, check_weight
from mlxq.qat.numerics import group_size_of, stored_format
from mlxq.qat.steps import Int4WeightOnlyQATQuantizer, Int8DynActInt4WeightQATQuantizer

ZEROS = {"group_size": 32, "is_symmetric": False}


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"dtype": "int9", "group_size": 32}, "int9"),
        ({"dtype": "float32", "group_size": 32}, "float32"),
        ({"dtype": "int4"}, "neither granularity nor group_size"),
        ({"dtype": "int4", "granularity": "per_group"}, "no group_size"),
        ({"dtype": "int4", "granularity": "per_token", "group_size": 32}, "conflicts"),
        ({"dtype": "int4", "granularity": PerGroup(32), "group_size": 32}, "conflicts"),
        ({"dtype": "int4", "granularity": "per_block"}, "per_block"),
        ({"dtype": "int4", "granularity": "per_row"}, "per_row"),
        ({"dtype": "int4", "granularity": PerTensor()}, "PerTensor"),
        ({"dtype": "int4", "granularity": PerToken}, "class PerToken"),
        ({"dtype": "int4", "granularity": PerAxis(1)}, "PerAxis(1)"),
        (
            {"dtype": "int4", "group_size": 32, "is_symmetric": True, "mapping_type": "symmetric"},
            "both given",
        ),
        ({"dtype": "int4", "group_size": 32, "mapping_type": "symmetric_no_clipping_err"}, "mapping_type"),
        ({"dtype": "uint4", "group_size": 32}, "have a sign"),
        ({"dtype": "int4", "group_size": 32, "zero_point_domain": "float"}, "asymmetric"),
        (
            {"dtype": "int4", "group_size": 32, "is_symmetric": False, "zero_point_domain": "float"},
            "unsigned",
        ),
        (
            {"dtype": "uint4", "group_size": 32, "is_symmetric": False, "zero_point_domain": "none"},
            "zero point",
        ),
        ({"dtype": "int4", "group_size": 32, "zero_point_domain": None}, "zero_point_domain"),
        ({"dtype": "int4", "group_size": 32, "zero_point_domain": "real"}, "real"),
        (
            {
                "dtype": "uint4",
                "group_size": 32,
                "is_symmetric": False,
                "zero_point_domain": "float",
                "zero_point_precision": "int32",
            },
            "loses its fraction",
        ),
        (
            {
                "dtype": "uint4",
                "granularity": "per_token",
                "is_symmetric": False,
                "zero_point_domain": "float",
            },
            "for weights",
        ),
        ({"dtype": "int4", "group_size": 32, "range_learning": True}, "not dynamic"),
        ({"dtype": "int8", "granularity": "per_token", "is_dynamic": False}, "dynamic"),
        ({"dtype": "int4", "group_size": 32, "scale_precision": "float64"}, "float64"),
        ({"dtype": "int4", "group_size": 32, "eps": 0.0}, "eps"),
        ({"dtype": "int4", "group_size": 32, "eps": math.inf}, "eps=inf; wanted a number above 0"),
        ({"dtype": "int4", "group_size": 32, "eps": math.nan}, "eps=nan"),
        ({"dtype": "int4", "group_size": 32, "eps": "x"}, "eps='x'; wanted a number above 0"),
        ({"dtype": "int4", "group_size": 32, "eps": True}, "eps=True"),
        ({"dtype": "int4", "group_size": 32, "eps": 1e39}, "more than a scale can be"),
        ({"dtype": "int4", "group_size": 32, "eps": 1e5, "scale_precision": "float16"}, "32768 at most"),
        ({"dtype": "int4", "group_size": 32, "is_dynamic": None}, "is_dynamic=None"),
        ({"dtype": "int4", "group_size": 32, "zero_point_precision": "bool"}, "'bool' are not built"),
        ({"dtype": "int4", "group_size": 32, "zero_point_precision": "foo"}, "'foo' are not built"),
        ({"dtype": "uint8", **ZEROS, "zero_point_precision": "bool"}, "wanted int8, uint8, int16"),
        ({"dtype": "uint8", **ZEROS, "zero_point_precision": "int8"}, "hold the codes 0 .. 255 of uint8"),
        ({"dtype": "int8", **ZEROS, "zero_point_precision": "uint8"}, "hold the codes -128 .. 127"),
        ({"dtype": "int4", "group_size": 1}, "2 or more"),
    ],
)
def test_integer_configurations_that_do_not_exist_are_refused(arguments, says):
    with pytest.raises(ValueError) as error:
        IntxFakeQuantizeConfig(**arguments)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Float8FakeQuantizeConfig("int8"), "int8"),
        (lambda: Float8FakeQuantizeConfig(granularity=PerGroup(32)), "PerGroup"),
        (lambda: Float8FakeQuantizeConfig(granularity=PerRow), "class PerRow"),
        (lambda: Float8FakeQuantizeConfig(hp_value_lb=2.0, hp_value_ub=1.0), "above"),
        (lambda: Float8FakeQuantizeConfig(hp_value_ub=math.nan), "hp_value_ub=nan; wanted a number above 0"),
        (lambda: Float8FakeQuantizeConfig(hp_value_ub=-1), "hp_value_ub=-1"),
        (lambda: Float8FakeQuantizeConfig(hp_value_ub=0), "hp_value_ub=0"),
        (lambda: Float8FakeQuantizeConfig(hp_value_ub="x"), "hp_value_ub='x'"),
        (lambda: Float8FakeQuantizeConfig(hp_value_lb=-5), "hp_value_lb=-5"),
        (lambda: Float8FakeQuantizeConfig(hp_value_lb=math.inf), "hp_value_lb=inf"),
        (lambda: IntxWeightOnlyConfig("int9"), "IntxWeightOnlyConfig: dtype 'int9' is not built"),
        (lambda: IntxWeightOnlyConfig("uint4"), "IntxWeightOnlyConfig: symmetric codes have a sign"),
        (lambda: IntxWeightOnlyConfig("int4", PerToken()), "IntxWeightOnlyConfig: weights have no tokens"),
        (lambda: IntxWeightOnlyConfig("int4", PerRow()), "PerRow() is not built"),
        (lambda: IntxWeightOnlyConfig("int4", scale_dtype="int8"), "scales in int8"),
        (
            lambda: qat.Int8DynamicActivationIntxWeightConfig("int4", PerToken()),
            "Int8DynamicActivationIntxWeightConfig: weights have no tokens",
        ),
        (lambda: qat.Int4WeightOnlyConfig(0), "Int4WeightOnlyConfig: groups of 0 do not exist"),
        (lambda: qat.Int4WeightOnlyConfig(64, "int8"), "Int4WeightOnlyConfig: scales in int8"),
        (lambda: qat.Float8DynamicActivationInt4WeightConfig(1), "groups of 1 do not exist"),
        (lambda: qat.Float8DynamicActivationFloat8WeightConfig("int8"), "dtype 'int8' is not built"),
        (
            lambda: qat.Float8DynamicActivationFloat8WeightConfig(activation_value_ub=-1.0),
            "Float8DynamicActivationFloat8WeightConfig: hp_value_ub=-1.0",
        ),
        (lambda: QATConfig(OwnBase()), "OwnBase: weights have no tokens"),
        (lambda: Int8DynActInt4WeightQATQuantizer(precision="foo"), "precision 'foo' is not built"),
        (lambda: Int4WeightOnlyQATQuantizer(precision="int8"), "precision 'int8' is not built"),
        (lambda: Int4WeightFakeQuantizeConfig(activation_dtype="float16"), "float16"),
        (lambda: Int4WeightFakeQuantizeConfig(0), "do not exist"),
        (lambda: Int4WeightFakeQuantizeConfig(scale_precision="int8"), "int8"),
        (lambda: QATConfig(), "nothing to prepare"),
        (lambda: QATConfig(IntxWeightOnlyConfig(), step="quantize"), "quantize"),
        (lambda: QATConfig(IntxWeightOnlyConfig(), weight_config=INT4), "its own"),
        (lambda: QATConfig(IntxWeightOnlyConfig(), INT8_TOKENS), "its own"),
        (lambda: QATConfig(weight_config=INT4, step="convert"), "give none"),
        (lambda: QATConfig(INT4), "no base"),
        (lambda: QATConfig("int4"), "base_config"),
        (lambda: QATConfig(weight_config="int4"), "no fake quantizer"),
        (lambda: QATConfig(weight_config=INT8_TOKENS), "no tokens"),
        (
            lambda: QATConfig(activation_config=IntxFakeQuantizeConfig("int8", "per_channel")),
            "no output channels",
        ),
        (lambda: QATConfig(activation_config=Int4WeightFakeQuantizeConfig()), "for weights"),
    ],
)
def test_other_configurations_that_do_not_exist_are_refused(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


class OwnBase(BaseConfig):
    """Not a dataclass: nothing checks it when it is made."""

    def fake_quantizers(self):
        return None, INT8_TOKENS


INT4 = IntxFakeQuantizeConfig("int4", group_size=32)
INT8_TOKENS = IntxFakeQuantizeConfig("int8", "per_token", is_symmetric=False)


def test_zero_points_fit_in_every_dtype_that_holds_the_codes():
    for precision in ("uint8", "int16", "int32", "int64", "float32", "float16", "bfloat16"):
        config = IntxFakeQuantizeConfig("uint8", **ZEROS, zero_point_precision=precision)
        assert config.zero_point_precision == precision
    assert IntxFakeQuantizeConfig("int8", **ZEROS, zero_point_precision="int8").bounds == (-128, 127)
    assert Float8FakeQuantizeConfig(hp_value_lb=0, hp_value_ub=1).hp_value_ub == 1
    assert Float8FakeQuantizeConfig(hp_value_lb=1e-12).hp_value_lb == 1e-12


def test_every_dtype_has_the_bounds_of_its_width():
    for bits in range(1, 9):
        low, high = INT_BOUNDS[f"int{bits}"]
        assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert INT_BOUNDS[f"uint{bits}"] == (0, 2**bits - 1)
        config = IntxFakeQuantizeConfig(f"uint{bits}", "per_channel", is_symmetric=False)
        assert config.bounds == (0, 2**bits - 1)


def test_granularity_may_be_an_object_a_name_or_a_group_size():
    assert IntxFakeQuantizeConfig("int4", group_size=64).granularity == PerGroup(64)
    assert IntxFakeQuantizeConfig("int4", "per_group", group_size=64).group_size == 64
    assert IntxFakeQuantizeConfig("int4", "per_channel").granularity == PerAxis(0)
    assert IntxFakeQuantizeConfig("int8", "per_token").granularity == PerToken()
    with pytest.raises(ValueError, match="no group_size"):
        _ = IntxFakeQuantizeConfig("int4", "per_channel").group_size


def test_assigning_group_size_and_is_symmetric_sets_what_they_stand_for_or_nothing():
    config = IntxFakeQuantizeConfig("int4", "per_channel")
    config.group_size = 128
    config.is_symmetric = False
    assert config.granularity == PerGroup(128) and config.mapping_type == "asymmetric"
    before = dict(vars(config))
    for name, value in (("dtype", "int12"), ("group_size", 0), ("range_learning", True)):
        with pytest.raises(ValueError):
            setattr(config, name, value)
        assert vars(config) == before


def test_the_old_name_warns_and_is_the_same():
    with pytest.warns(DeprecationWarning, match="IntxFakeQuantizeConfig"):
        old = FakeQuantizeConfig("int4", group_size=32)
    assert vars(old) == vars(INT4)


def test_dtypes_of_torch_and_mlx_are_taken_for_their_names():
    torch = pytest.importorskip("torch", reason="needs the package torch")
    import mlx.core as mx

    config = IntxFakeQuantizeConfig(torch.int4, group_size=32, scale_precision=torch.bfloat16)
    assert config == IntxFakeQuantizeConfig("int4", group_size=32, scale_precision=mx.bfloat16)
    assert Float8FakeQuantizeConfig(torch.float8_e5m2).dtype == "float8_e5m2"
    assert QATConfig(IntxWeightOnlyConfig(), step="CONVERT").step == "convert"


@pytest.mark.parametrize(
    "config, K, bits, group",
    [
        (INT4, 64, 4, 32),
        (IntxFakeQuantizeConfig("int4", group_size=256), 512, 4, 128),
        (IntxFakeQuantizeConfig("int7", group_size=64), 64, 8, 64),
        (IntxFakeQuantizeConfig("int1", group_size=64), 64, 1, 64),
        (IntxFakeQuantizeConfig("int3", "per_channel"), 576, 3, 64),
        (IntxFakeQuantizeConfig("uint5", "per_channel", is_symmetric=False), 96, 5, 32),
        (Int4WeightFakeQuantizeConfig(64), 128, 4, 64),
    ],
)
def test_every_group_is_stored_in_the_largest_group_that_divides_it(config, K, bits, group):
    fmt = stored_format(config, K)
    assert (fmt.bits, fmt.group_size) == (bits, group)


def test_groups_without_a_stored_form_are_refused():
    with pytest.raises(ValueError, match="multiples of one of 32, 64, 128"):
        stored_format(IntxFakeQuantizeConfig("int4", group_size=16), 64)
    with pytest.raises(ValueError, match="no packed integer form"):
        stored_format(Float8FakeQuantizeConfig(), 64)
    with pytest.raises(ValueError, match="64 would fit"):
        group_size_of(IntxFakeQuantizeConfig("int4", group_size=128), 576)


def test_weights_and_activations_have_their_own_granularities():
    check_weight(INT4)
    check_activation(INT8_TOKENS)
    check_activation(Float8FakeQuantizeConfig())
    with pytest.raises(ValueError):
        check_weight(INT8_TOKENS)
    with pytest.raises(ValueError):
        check_activation(IntxFakeQuantizeConfig("int8", group_size=32, is_dynamic=False))
    with pytest.raises(ValueError):
        check_activation(
            IntxFakeQuantizeConfig("uint8", group_size=32, is_symmetric=False, zero_point_domain="float")
        )


def test_every_base_says_how_to_train_for_it():
    for base in (
        qat.IntxWeightOnlyConfig("int2", PerGroup(64)),
        qat.Int8DynamicActivationIntxWeightConfig("int4", PerGroup(32)),
        qat.Int4WeightOnlyConfig(64),
        qat.Float8DynamicActivationInt4WeightConfig(),
        qat.Float8DynamicActivationFloat8WeightConfig(),
    ):
        activation, weight = QATConfig(base).fake_quantizers()
        check_weight(weight)
        if activation is not None:
            check_activation(activation)
