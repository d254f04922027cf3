"""Rules, whole models and static ranges beside qwix 0.1.8 itself, where it is installed."""

import numpy as np
import pytest

from mlxq.ptq import Operations, Statistics
from mlxq.ptq.tensors import quantize_params
from mlxq.rules import QuantizationRule, RuleSet

qwix = pytest.importorskip("qwix", reason="needs the package qwix: pip install 'mlxq[qwix]'")
import jax  # noqa: E402
from flax import linen  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from qwix._src.providers import ptq as qwix_ptq  # noqa: E402

K, N = 256, 32


class Net(linen.Module):
    """Two dense layers, and a product of two inputs between them."""

    @linen.compact
    def __call__(self, x):
        h = linen.Dense(K, use_bias=False, name="up")(x)
        scores = jnp.einsum("btk,bsk->bts", h, x)
        h = jnp.einsum("bts,bsk->btk", scores, x) / K
        return linen.Dense(N, use_bias=False, name="down")(h)


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


X = data(2, 128, K)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, Net().init(jax.random.key(0), X)["params"])


def jaxed(params):
    return jax.tree.map(jnp.asarray, params)


def theirs(rules):
    """qwix's rules of ours: named types are its own, operations have jax's names."""
    found = []
    for rule in rules:
        settings = rule.settings() | {"act_batch_axes": rule.act_batch_axes}
        native = ("int4", "int8", "float8_e4m3fn", "float8_e5m2")
        for name in ("weight_qtype", "act_qtype"):
            if settings.get(name) in native:
                settings[name] = getattr(jnp, settings[name])
        if not rule.act_static_scale:
            settings.pop("act_static_scale", None)
        settings["op_names"] = tuple({"linear": "dot_general"}.get(n, n) for n in rule.op_names)
        found.append(settings)
    return found


def run_theirs(rules, params, stats=None):
    """(output of qwix's PTQ model, its provider)."""
    provider = qwix.PtqProvider([qwix.QuantizationRule(**settings) for settings in theirs(rules)])
    model = qwix.quantize_model(Net(), provider)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(X))["params"]
    quantized = qwix.quantize_params(jaxed(params), template, stats or {})
    return np.asarray(model.apply({"params": quantized}, jnp.asarray(X))), provider


def run_ours(operations, params, x=X):
    """The same model through Operations: its einsums are those of the whole model, whose path is empty."""
    h = operations.module("up").linear(x, params["up"]["kernel"].T)
    here = operations.module("")
    scores = here.einsum("btk,bsk->bts", h, x, rhs_is_weight=False)
    h = here.einsum("bts,bsk->btk", scores, x, rhs_is_weight=False) / K
    return operations.module("down").linear(h, params["down"]["kernel"].T)


W8A8 = {"weight_qtype": "int8", "act_qtype": "int8", "act_calibration_method": "absmax"}


@pytest.mark.parametrize(
    "settings",
    [
        W8A8,
        W8A8 | {"weight_qtype": "int4", "tile_size": 128},
        W8A8 | {"act_calibration_method": "minmax", "op_names": ("linear",)},
        {"weight_qtype": "int4", "tile_size": 32},
        {"weight_qtype": "nf4", "tile_size": 64},
        {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
        {"weight_qtype": "mxfp4", "tile_size": 32, "op_names": ("linear",)},
        {"weight_qtype": "int8", "weight_calibration_method": "absmax,0.8"},
    ],
    ids=str,
)
def test_a_model_by_rules_computes_what_qwix_computes(settings, params):
    rules = [QuantizationRule(module_path="down", op_names="linear"), QuantizationRule(**settings)]
    want, _ = run_theirs(rules, params)
    got = run_ours(Operations(rules), params)
    # float32 sums in another order may move an input's code by one at a tie: seen as noise, not as a shift.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 2e-5 if "act_qtype" not in settings else error < 2e-3
    exact, _ = run_theirs([QuantizationRule(module_path=".*")], params)
    assert np.linalg.norm(want - exact) / np.linalg.norm(exact) > 10 * error


def test_rules_that_qwix_calls_unused_are_ours(params):
    rules = [
        QuantizationRule(module_path="down"),
        QuantizationRule(module_path="d.*", **W8A8),
        QuantizationRule(module_path="u", **W8A8),
        QuantizationRule(module_path="up", op_names="conv_general", **W8A8),
        QuantizationRule(module_path=".*", op_names="einsum", **W8A8),
        QuantizationRule(module_path="u.*", **W8A8),
    ]
    want, provider = run_theirs(rules, params)
    unused = [rule.module_path for rule in provider.get_unused_rules()]
    operations = Operations(RuleSet(rules))
    got = run_ours(operations, params)
    strictly = [rule.module_path for rule in operations.rules.unused_rules(strict=True)]
    assert strictly == unused == ["d.*", "u", "up"]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-3


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_static_ranges_and_what_follows_from_them_are_those_of_qwix(method, params):
    """All axes but the last are batch axes, where qwix and we mean the same."""
    rule = QuantizationRule(module_path="up|down", **W8A8 | {"act_calibration_method": method},
                            act_static_scale=True, act_batch_axes=(0, 1))  # fmt: skip
    provider = qwix.QtProvider([qwix.QtRule(**settings) for settings in theirs([rule])])
    model = qwix.quantize_model(Net(), provider)
    variables = {"params": jaxed(params)}
    operations = Operations([rule])
    for n in range(3):
        x = jnp.asarray(data(*X.shape, seed=n) * (n + 1))
        _, changed = model.apply(variables, x, mutable="quant_stats")
        variables["quant_stats"] = changed["quant_stats"]
    stats = changed["quant_stats"]
    up = stats["up"]["dot_general0_lhs"]
    with operations.calibrating() as ours:
        for n in range(3):
            run_ours(operations, params, data(*X.shape, seed=n) * (n + 1))
    assert ours.counts == {"up/linear0_lhs": 3, "down/linear0_lhs": 3} and int(up["count"]) == 3
    for key, total in ours.sums["up/linear0_lhs"].items():
        np.testing.assert_allclose(np.asarray(up[f"sum_of_{key}"]).ravel(), total, rtol=1e-5)
    assert set(up) == {"count", *(f"sum_of_{key}" for key in ours.sums["up/linear0_lhs"])}
    want, _ = run_theirs([rule], params, stats)
    # Later layers of qwix saw rounded inputs, as it calibrates while it trains: both go on from its own sums.
    same = Statistics()
    for layer in ("up", "down"):
        sums = {key: np.asarray(value).ravel() for key, value in stats[layer]["dot_general0_lhs"].items()}
        same.counts[f"{layer}/linear0_lhs"] = int(sums.pop("count")[0])
        same.sums[f"{layer}/linear0_lhs"] = {k.removeprefix("sum_of_"): v for k, v in sums.items()}
    got = run_ours(Operations([rule], same), params)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-3
    empty = jax.tree.map(lambda a: a, stats)
    empty["up"]["dot_general0_lhs"]["count"] = jnp.zeros((), jnp.int32)
    with pytest.raises(ValueError, match="not initialized"):
        run_theirs([rule], params, empty)
    ours.counts["up/linear0_lhs"] = 0
    with pytest.raises(ValueError, match="up/linear0_lhs has seen no input"):
        run_ours(operations, params)


def test_extra_and_wrong_parameters_are_refused_as_qwix_refuses_them(params):
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype=jnp.int8)])
    model = qwix.quantize_model(Net(), provider)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(X))["params"]
    extra = params | {"loss": {"kernel": data(4, 4)}}
    with pytest.raises(ValueError, match="loss"):
        qwix.quantize_params(jaxed(extra), template)
    assert "loss" not in qwix.quantize_params(jaxed(extra), template, allow_extra_params=True)
    part = qwix.quantize_params(jaxed({"up": params["up"]}), template)
    array = part["up"]["kernel"].array
    assert isinstance(part["up"]["kernel"], qwix_ptq.WithAux) and "down" not in part

    import mlx.nn as nn

    from mlxq.ptq import plan

    mine = nn.Module()
    mine.up = nn.Linear(K, K, bias=False)
    made = plan(mine, [QuantizationRule(weight_qtype="int8")])
    flat = {"up.weight": params["up"]["kernel"].T, "loss.weight": data(4, 4)}
    with pytest.raises(ValueError, match="loss"):
        quantize_params(flat, made)
    got = quantize_params(flat, made, allow_extra_params=True)
    assert set(got) == {"up.weight", "up.scales", "up.biases"}
    codes = np.ascontiguousarray(got["up.weight"]).view(np.uint8).reshape(K, K).astype(np.int16) - 128
    np.testing.assert_array_equal(codes, np.asarray(array.qvalue).T)
    np.testing.assert_array_equal(got["up.scales"][:, :1], np.asarray(array.scale).T)
