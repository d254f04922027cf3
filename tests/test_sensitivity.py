"""Bits by measured KL: the measurement against plain forward passes, the spending against brute force."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from test_gptq import WINDOWS, tiny
from tiny_models import make_hf_model

from mlxq import format
from mlxq.cli import main
from mlxq.format import Format
from mlxq.ptq.rtn import rtn
from mlxq.ptq.sensitivity import Cost, allocate, error, pieces, sensitivities, step, stored_bits


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Without mx.compile, whose calls of the C++ compiler take seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def log_probabilities(model, window):
    logits = np.array(model(mx.array(window[None])), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_layers_kl_is_that_of_the_whole_model_with_only_it_quantized(tmp_path, monkeypatch):
    model, read, whole = tiny("llama", tmp_path)
    paths = ["model.embed_tokens", "lm_head"]
    paths += ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    seen = []

    def rounded(w, statistics, fmt, scale_dtype, rounds):
        seen.append(statistics)
        return rtn(w, None, fmt, scale_dtype=scale_dtype)

    monkeypatch.setattr("mlxq.ptq.sensitivity.gptq", rounded)
    fit = (WINDOWS[:, ::-1] + 1) % 200
    costs = sensitivities(model, read, WINDOWS, dict.fromkeys(paths, "float16"), fit)
    assert set(costs) == set(paths) and [cost.solved for cost in costs.values()].count(True) == len(seen) == 2
    # what layers are solved on is the other text: the inputs of block 0's attention, in the whole model
    block = whole.model.layers[0]
    rows = [block.input_layernorm(whole.model.embed_tokens(mx.array(window))) for window in fit]
    rows = np.concatenate([np.array(r, np.float64) for r in rows])
    np.testing.assert_allclose(seen[0].hessian, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    assert seen[0].rows == fit.size
    truth = [log_probabilities(whole, window) for window in WINDOWS]
    for path in paths:
        weight = np.array(read(f"{path}.weight"))
        moved = format.dequantize(format.quantize(weight, Format(3, 64), scale_dtype="float16"))
        whole.update(tree_unflatten([(f"{path}.weight", mx.array(moved))]))
        other = [log_probabilities(whole, window) for window in WINDOWS]
        whole.update(tree_unflatten([(f"{path}.weight", mx.array(weight))]))
        want = np.mean([(np.exp(p) * (p - q)).sum(-1) for p, q in zip(truth, other, strict=True)])
        np.testing.assert_allclose(costs[path].kl, want, rtol=2e-3)
        assert (costs[path].weights, costs[path].K) == (weight.size, weight.shape[-1])


@pytest.mark.parametrize("count, length", [(16, 512), (1, 512), (3, 200), (1, 60), (2, 60)])
def test_layers_are_measured_and_solved_on_different_tokens(count, length):
    windows = np.arange(count * length).reshape(count, length)
    probe, fit = pieces(windows)
    assert probe.shape[1] == fit.shape[1] == min(128, length) and len(probe) <= 4 and len(fit) <= 48
    shared = np.intersect1d(probe, fit)
    assert shared.size == (60 if (count, length) == (1, 60) else 0)
    assert set(probe.ravel()) | set(fit.ravel()) <= set(windows.ravel())


def random_costs(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"layer{n}": Cost(float(rng.lognormal(-3, 2)), int(rng.integers(1, 9)) * 4096, 64, Format(3, 64))
        for n in range(count)
    }


def test_spending_is_within_the_budget_and_near_the_best_of_all_plans():
    costs = random_costs(5)
    formats = [Format(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64)]
    weights = sum(c.weights for c in costs.values())

    def size(plan):
        return sum(cost.weights * stored_bits(fmt) for cost, fmt in zip(costs.values(), plan, strict=True))

    def loss(plan):
        pairs = zip(costs.values(), plan, strict=True)
        return sum(cost.kl * (step(fmt) / step(cost.probe)) ** 2 for cost, fmt in pairs)

    for bits_per_weight in (3.0, 4.5, 6.0):
        budget = weights * bits_per_weight
        plan = allocate(costs, budget)
        found = [plan[path] for path in costs]
        best = min(loss(p) for p in itertools.product(formats, repeat=5) if size(p) <= budget)
        assert size(found) <= budget and loss(found) <= 1.4 * best  # five lumps; many layers come nearer


def test_what_gptq_makes_of_the_errors_of_fewer_bits_is_near_the_square_of_the_step():
    for bits in (2, 3, 4, 5, 6, 8):
        errors = [error(Format(bits, group), True) for group in (32, 64, 128)]
        assert errors == sorted(errors)  # longer groups lose more
        for group, found in zip((32, 64, 128), errors, strict=True):
            rounding = error(Format(bits, group), False) / error(Format(3, 64), False)
            assert 0.65 < found / rounding < 1.25
    assert all(error(Format(b, 64), True) > 3 * error(Format(b + 1, 64), True) for b in (2, 3, 4, 5))


def test_more_budget_never_costs_kl_and_equal_layers_get_equal_bits():
    costs = random_costs(40)
    weights = sum(c.weights for c in costs.values())
    previous = np.inf
    for bits_per_weight in np.linspace(2.6, 9.0, 12):
        plan = allocate(costs, weights * bits_per_weight)
        loss = sum(costs[p].kl * (step(f) / step(costs[p].probe)) ** 2 for p, f in plan.items())
        assert loss <= previous * (1 + 1e-9)
        previous = loss
    same = {f"l{n}": Cost(0.1, 4096, 128, Format(3, 64)) for n in range(8)}
    assert len(set(allocate(same, 8 * 4096 * 4.5).values())) <= 2
    with pytest.raises(ValueError, match="raise the target"):
        allocate(same, 8 * 4096 * 2.0)


def test_a_plan_is_saved_and_replayed_to_identical_files(tmp_path, capsys):
    source = make_hf_model("llama", tmp_path / "hf", "float32", seed=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(500)))
    common = ["--calibration", str(text), "--dtype", "bfloat16"]
    plan = tmp_path / "plan.json"
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["convert", str(source), str(first), "--target-bpw", "5", "--plan", str(plan), *common]) == 0
    assert main(["convert", str(source), str(second), "--rules", str(plan), *common]) == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    rules = json.loads(plan.read_text())
    assert len(rules) == 16 and len({(r["bits"], r["group_size"]) for r in rules}) > 1
    capsys.readouterr()
    assert main(["inspect", str(first)]) == 0
    bits = float(next(line for line in capsys.readouterr().out.split("\n") if "total" in line).split()[2])
    assert 4.8 < bits <= 5.0
    rules[0]["bits"] = 6
    plan.write_text(json.dumps(rules))
    assert main(["convert", str(source), str(tmp_path / "third"), "--rules", str(plan), *common]) == 0
    config = json.loads((tmp_path / "third" / "config.json").read_text())["quantization"]
    edited = config.get(rules[0]["module_path"].replace("/", "."), config)
    assert edited["bits"] == 6
    assert main(["convert", str(source), str(tmp_path / "x"), "--target-bpw", "2.1", *common]) == 2
    assert "raise the target" in capsys.readouterr().err


def test_costs_are_measured_once_for_several_targets(tmp_path, monkeypatch, capsys):
    source = make_hf_model("llama", tmp_path / "hf", "float32", seed=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(300)))
    costs = tmp_path / "costs.json"
    common = ["--calibration", str(text), "--method", "rtn"]
    start = ["convert", str(source)]
    assert main([*start, str(tmp_path / "a"), "--target-bpw", "5", *common]) == 0
    dry = [*start, str(tmp_path / "b"), "--target-bpw", "5", *common, "--costs", str(costs)]
    assert main([*dry, "--dry-run"]) == 0 and not (tmp_path / "b").exists()

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("mlxq.convert.sensitivities", never)
    assert main(dry) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    small = [*start, str(tmp_path / "c"), "--target-bpw", "4", *common, "--costs", str(costs)]
    assert main(small) == 0
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 0.9 * len(files[0])
    lines = json.loads(costs.read_text())
    capsys.readouterr()
    for damage, said in (
        ("{", "holds no costs"), ("[]", "holds no costs"), ('{"a": {"kl": 1}}', "holds no costs"),
        (json.dumps(dict(list(lines.items())[1:])), "of another model"),
        (json.dumps({k: v | {"K": 32} for k, v in lines.items()}), "of another model"),
        (json.dumps({k: v | {"kl": "nan"} for k, v in lines.items()}), "of another model"),
    ):  # fmt: skip
        costs.write_text(damage)
        target = [*start, str(tmp_path / "d"), "--target-bpw", "4", *common, "--costs", str(costs)]
        assert main(target) == 2
        error = capsys.readouterr().err
        assert said in error and "costs.json" in error and error.count("\n") == 1
    assert main([*start, str(tmp_path / "d"), *common, "--costs", str(costs)]) == 2
    assert "give both" in capsys.readouterr().err
