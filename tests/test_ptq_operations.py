"""Operations that a model calls directly: numbered sites, averaged ranges, and the codes these give."""

import mlx.core as mx
import numpy as np
import pytest

from mlxq.ptq import Operations, Statistics, calibrate, plan, quantize_model
from mlxq.ptq import functional as F
from mlxq.ptq.qarray import HowToQuantize, dequantize, quantize
from mlxq.rules import QuantizationRule, RuleSet

torch = pytest.importorskip("torch", reason="needs the package torch")
FROM = {"numpy": lambda a: a, "mlx": mx.array, "torch": torch.from_numpy}
STATIC = QuantizationRule(
    module_path="net/.*", weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_batch_axes=(0, 1)
)


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def by_range(x, bound):
    """x rounded as int8 is by a range: qwix's scale, bound / 127.5, in float64."""
    scale = np.float64(np.float32(bound) * np.float32(1 / 127.5))
    return np.clip(np.rint(x.astype(np.float32) * np.float32(1 / scale)), -128, 127) * scale


@pytest.mark.parametrize("kind", FROM)
def test_each_call_has_its_own_averaged_range_and_is_rounded_by_it(kind):
    to = FROM[kind]
    operations = Operations([STATIC])
    w = data(64, 8, seed=5)

    def forward(x):
        here = operations.module("net/attention")
        first = here.einsum("btk,kn->btn", to(x), to(w))
        second = here.einsum("btk,kn->btn", to(3 * x), to(w))
        scores = here.einsum("bqd,bkd->bqk", to(x), to(2 * x), rhs_is_weight=False)
        return first, second, scores, here.matmul(to(x), to(w))

    inputs = [data(2, 3, 64, seed=n) * (n + 1) for n in range(3)]
    with operations.calibrating() as stats:
        for x in inputs:
            got = forward(x)
            np.testing.assert_allclose(np.asarray(got[0]), x @ w, atol=1e-4)  # float while it calibrates
    mean = float(np.mean([np.abs(x).max(-1).mean() for x in inputs]))
    names = ("einsum0_lhs", "einsum1_lhs", "einsum2_lhs", "einsum2_rhs", "matmul0_lhs")
    assert stats.counts == {f"net/attention/{name}": 3 for name in names}
    for name, factor in (("einsum0_lhs", 1), ("einsum1_lhs", 3), ("einsum2_rhs", 2), ("matmul0_lhs", 1)):
        average = stats.average(f"net/attention/{name}")["absmax"]
        assert average.shape == (1, 1, 1)
        np.testing.assert_allclose(average, factor * mean, rtol=1e-6)
    x = inputs[2]
    bounds = {name: stats.average(f"net/attention/{name}")["absmax"].item() for name in names}
    columns = HowToQuantize(qtype="int8", channelwise_axes=(1,))
    weight = dequantize(quantize(w, columns)).astype(np.float64)
    first, second, scores, product = (np.asarray(y) for y in forward(x))
    np.testing.assert_allclose(first, by_range(x, bounds["einsum0_lhs"]) @ weight, atol=1e-4)
    np.testing.assert_allclose(second, by_range(3 * x, bounds["einsum1_lhs"]) @ weight, atol=4e-4)
    np.testing.assert_array_equal(product, first)
    want = by_range(x, bounds["einsum2_lhs"]) @ by_range(2 * x, bounds["einsum2_rhs"]).swapaxes(1, 2)
    np.testing.assert_allclose(scores, want, atol=1e-3)
    assert np.abs(first - x @ w).max() > 1e-2  # the third batch exceeds the mean, and is clipped


@pytest.mark.parametrize("kind", ["mlx", "torch"])
def test_a_linear_call_equals_the_layer_of_quantize_model(kind):
    """The same statistics under the same name, and the same output to the bit."""
    x = data(2, 5, 64)
    if kind == "mlx":
        import mlx.nn as nn

        model, to = nn.Module(), mx.array
        model.net = [nn.Linear(64, 32)]
        run = lambda x: model.net[0](x)  # noqa: E731
        weight, bias = model.net[0].weight, model.net[0].bias
    else:
        model, to = torch.nn.Module(), torch.from_numpy
        model.net = torch.nn.ModuleList([torch.nn.Linear(64, 32)])
        run = lambda x: model.net[0](x)  # noqa: E731
        weight, bias = (p.detach() for p in model.net[0].parameters())
    operations = Operations([STATIC])
    with operations.calibrating() as stats:
        operations.module("net/0").linear(to(x), weight, bias)
    made = plan(model, [STATIC])
    want = calibrate(model, made, [to(x)], run=run)
    assert stats.counts == want.counts
    for found in (stats, want):
        average = found.average("net/0/linear0_lhs")["absmax"]
        np.testing.assert_allclose(average, [np.abs(x).max(-1).mean()], rtol=1e-6)
    quantize_model(model, made, stats)
    got = operations.module("net/0").linear(to(x), weight, bias)
    assert bool((got == run(to(x))).all())


def test_convolutions_asymmetric_inputs_and_tiles_keep_static_ranges():
    x, w = data(2, 6, 7, 8), data(5, 3, 3, 8, seed=1)
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True,
                            act_calibration_method="minmax")  # fmt: skip
    operations = Operations([rule])
    with operations.calibrating() as stats:
        operations.module("conv").conv_general(mx.array(x + 1), mx.array(w), padding=1)
    average = stats.average("conv/conv_general0_lhs")
    np.testing.assert_allclose(average["max"].ravel(), (x + 1).max((1, 2, 3)).mean(), rtol=1e-6)
    got = np.array(operations.module("conv").conv_general(mx.array(x + 1), mx.array(w), padding=1))
    want = np.array(F.conv_general(mx.array(x + 1), mx.array(w), padding=1))
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03
    tiled = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True, tile_size=128)
    operations = Operations([tiled])
    a, b = data(4, 256), data(256, 3, seed=2)
    with operations.calibrating() as stats:
        operations.module("m").matmul(a, b)
    want = np.abs(a).reshape(4, 2, 128).max(-1).mean(0)[None]
    np.testing.assert_allclose(stats.average("m/matmul0_lhs")["absmax"], want, rtol=1e-6)
    assert np.linalg.norm(operations.module("m").matmul(a, b) - a @ b) / np.linalg.norm(a @ b) < 0.05


def test_a_site_that_no_calibration_reached_is_refused_by_its_name():
    operations = Operations([STATIC])
    with pytest.raises(ValueError, match="net/x/matmul0_lhs has seen no input"):
        operations.module("net/x").matmul(data(2, 3, 64), data(64, 4))
    with operations.calibrating():
        operations.module("net/x").matmul(data(2, 3, 64), data(64, 4))
        with pytest.raises(ValueError, match="do not add"):
            operations.module("net/x").matmul(data(3, 64), data(64, 4))
    here = operations.module("net/x")
    here.matmul(data(2, 3, 64), data(64, 4))
    with pytest.raises(ValueError, match="net/x/matmul1_lhs has seen no input"):
        here.matmul(data(2, 3, 64), data(64, 4))


def test_statistics_of_operations_survive_the_disk(tmp_path):
    operations = Operations([STATIC])
    x, w = data(2, 3, 64), data(64, 4)
    with operations.calibrating() as stats:
        operations.module("net/x").matmul(x, w)
    stats.save(tmp_path / "stats.npz")
    again = Operations([STATIC], Statistics.load(tmp_path / "stats.npz"))
    np.testing.assert_array_equal(again.module("net/x").matmul(x, w), operations.module("net/x").matmul(x, w))


def test_rules_choose_operations_and_one_set_serves_the_plan_too():
    import mlx.nn as nn

    rules = RuleSet([
        QuantizationRule(module_path="layers/0", weight_qtype="int8"),
        QuantizationRule(module_path="attention", op_names=("matmul",)),
        QuantizationRule(module_path="attention", weight_qtype="int4", act_qtype="int8"),
        QuantizationRule(module_path="nowhere", weight_qtype="int4"),
    ])  # fmt: skip
    made = plan(nn.Sequential(nn.Linear(64, 32)), rules, allow_unused_rules=True)
    operations = Operations(rules)
    a, b = data(3, 64), data(64, 4)
    here = operations.module("attention")
    # A first match without a type keeps it in float.
    np.testing.assert_allclose(here.matmul(a, b), a @ b, atol=1e-5)
    assert np.abs(here.einsum("mk,kn->mn", a, b) - a @ b).max() > 1e-2
    np.testing.assert_allclose(operations.module("elsewhere").einsum("mk,kn->mn", a, b), a @ b, atol=1e-5)
    table = data(10, 64)
    np.testing.assert_array_equal(
        here.embedding(np.array([1, 2]), table), F.embedding(np.array([1, 2]), table, rules.rules[2])
    )
    assert list(made) == ["layers/0"] and rules.unused_rules() == rules.rules[3:]
    with pytest.raises(ValueError, match="rule nowhere=.* matches no layer"):
        rules.check()
