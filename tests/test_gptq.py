"""GPTQ with fitted scales, and the stream of blocks that feeds it, against float64 and the textbook."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from tiny_models import ARCHITECTURES, VOCAB, make_hf_model

from mlxq import format
from mlxq.checkpoint.huggingface import HuggingFaceCheckpoint
from mlxq.checkpoint.skeleton import Skeleton
from mlxq.cli import main
from mlxq.format import Format
from mlxq.ptq.calibrated import Spool, quantize_blocks
from mlxq.ptq.gptq import Statistics, _Solver, damped, factor, follow_drift, gptq
from mlxq.ptq.host import host_products
from mlxq.ptq.stream import Stream
from mlxq.ptq.text import read_text, token_windows

WINDOWS = np.random.default_rng(5).integers(3, VOCAB, (3, 40))


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    """Without mx.compile, whose calls of the C++ compiler for mlx-lm's own functions take seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def inputs(rows, K, seed=0):
    """Rows whose channels differ in size and depend on each other, as in a language model."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) * np.exp(-np.arange(K) / (K / 4))[:, None]
    return (rng.standard_normal((rows, K)) @ mixing + 0.1 * rng.standard_normal((rows, K))).astype(np.float32)


def problem(N=24, K=128, seed=0):
    x = inputs(4 * K, K, seed).astype(np.float64)
    w = np.random.default_rng(seed + 1).standard_normal((N, K)).astype(np.float32)
    return w, (x.T @ x / len(x)).astype(np.float32), x


def loss(w, packed, h):
    """tr((w - q) h (w - q)^T) of each row in float64."""
    e = w.astype(np.float64) - format.dequantize(packed)
    return np.einsum("nk,kl,nl->n", e, h.astype(np.float64), e)


def textbook(w, h, scale, bias, levels, group_size):
    """Codes of GPTQ's algorithm 1 with act-order and static groups, float64, literally."""
    order = np.argsort(-np.diag(h), kind="stable")
    w, upper = w.astype(np.float64)[:, order], np.linalg.inv(h.astype(np.float64)[np.ix_(order, order)])
    upper = np.linalg.cholesky(upper).T
    codes = np.empty(w.shape)
    for j, column in enumerate(order):
        s, b = scale[:, column // group_size], bias[:, column // group_size]
        code = np.rint(np.clip((w[:, j] - b) / s, 0, levels))
        error = (w[:, j] - (s * code + b)) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        codes[:, column] = code
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_on_a_fixed_grid_are_those_of_the_textbook(bits):
    w, h, _ = problem(N=40, K=192)
    h = damped(h, 0.01)
    fmt = Format(bits, 64)
    grid = format.quantize(w, fmt)
    solver = _Solver(w, h, fmt, "float32")
    codes = solver.feedback(grid.scales, grid.biases)[solver.inverse].T
    want = textbook(w, h, grid.scales.astype(float), grid.biases.astype(float), 2**bits - 1, 64)
    # float32 against float64 may choose the other neighbour at a tie, and every later column follows it.
    assert np.mean(codes != want) < (0.002 if bits < 8 else 0.02)


def test_the_damped_matrix_is_the_formula_in_float64():
    _, h, _ = problem()
    d = np.diag(h).astype(np.float64)
    want = h.astype(np.float64) + np.diag(0.5 * d + 0.01 * d.mean())
    np.testing.assert_allclose(damped(h, 0.01, 0.5), want, rtol=1e-6)
    assert np.array_equal(damped(np.zeros_like(h), 0.01, 0.5), np.eye(len(h)))


def test_the_factor_is_unit_upper_triangular_and_gives_the_matrix_back():
    _, h, _ = problem()
    h = damped(h, 0.01)
    upper, diagonal = factor(h)
    assert np.array_equal(np.tril(upper, -1), np.zeros_like(upper)) and np.all(np.diag(upper) == 1)
    back = upper.astype(np.float64) * diagonal @ upper.T.astype(np.float64)
    np.testing.assert_allclose(back, h, atol=1e-5 * np.abs(h).max())


@pytest.mark.parametrize("bits, share", [(2, 0.2), (3, 0.2), (4, 0.2), (8, 0.5)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_error_of_the_outputs_is_a_fraction_of_rounding(bits, share, group_size):
    w, h, x = problem()
    fmt = Format(bits, group_size)
    rounded = format.quantize(w, fmt, scale_dtype="bfloat16")
    packed = gptq(w, Statistics(h), fmt, scale_dtype="bfloat16", shrinkage=0)
    packed.validate()
    assert np.array_equal(format.store(packed.scales, "bfloat16"), packed.scales)
    assert np.array_equal(format.store(packed.biases, "bfloat16"), packed.biases)
    outputs = [((x @ (w - format.dequantize(p)).T) ** 2).mean() for p in (packed, rounded)]
    assert outputs[0] < share * outputs[1]


def test_every_step_lowers_the_error_of_every_row_or_is_not_kept():
    w, h, _ = problem()
    h = damped(h, 0.01)
    losses = [
        loss(w, gptq(w, Statistics(h), Format(2, 64), damping=0, shrinkage=0, rounds=rounds), h)
        for rounds in range(4)
    ]
    for before, after in zip(losses, losses[1:], strict=False):
        assert np.all(after <= before * (1 + 1e-4))
    assert losses[3].sum() < 0.8 * losses[0].sum()


def test_refitted_scales_and_biases_are_the_least_squares_of_float64():
    w, h, _ = problem(N=6)
    h = damped(h, 0.01)
    solver = _Solver(w, h, Format(3, 32), "float32")
    grid = format.quantize(w, Format(3, 32))
    codes = solver.feedback(grid.scales, grid.biases)
    scale, bias = solver.refit(codes, grid.scales, grid.biases)
    natural = codes[solver.inverse].T.astype(np.float64)
    root = np.linalg.cholesky(h.astype(np.float64)).T
    for n in range(6):
        design = np.zeros((128, 8))
        for g in range(4):
            design[32 * g : 32 * g + 32, g] = natural[n, 32 * g : 32 * g + 32]
            design[32 * g : 32 * g + 32, 4 + g] = 1
        best = np.linalg.lstsq(root @ design, root @ w[n].astype(np.float64), rcond=None)[0]
        found = np.concatenate([scale[n], bias[n]])
        residual = [np.sum((root @ (w[n] - design @ theta)) ** 2) for theta in (best, found)]
        assert residual[1] <= residual[0] * 1.001  # the pull towards the old values costs this little


def test_descent_ends_where_no_single_code_can_be_bettered():
    w, h, _ = problem(N=5, K=64)
    h = damped(h, 0.01)
    fmt = Format(2, 32)
    grid = format.quantize(w, fmt)
    solver = _Solver(w, h, fmt, "float32")
    codes = solver.feedback(grid.scales, grid.biases)
    for _ in range(30):
        solver.descend(codes, grid.scales, grid.biases)
    natural, h = codes[solver.inverse].T, h.astype(np.float64)
    s, b = np.repeat(grid.scales, 32, 1), np.repeat(grid.biases, 32, 1)

    def row_loss(n, row):
        e = w[n] - (s[n] * row + b[n])
        return e @ h @ e

    for n in range(5):
        base = row_loss(n, natural[n])
        for k in range(64):
            for code in range(4):
                other = natural[n].copy()
                other[k] = code
                assert row_loss(n, other) >= base * (1 - 1e-5)


def test_weights_that_follow_the_drift_give_the_float_outputs_on_drifted_inputs():
    w, _, x0 = problem()
    x = x0 @ (np.eye(128) + 0.05 * np.random.default_rng(9).standard_normal((128, 128)))
    h, cross = (x.T @ x / len(x)).astype(np.float32), (x0.T @ x / len(x)).astype(np.float32)
    moved = follow_drift(w, h, Statistics(h, cross), 1.0)
    want = np.linalg.lstsq(x, x0 @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(moved, want, atol=2e-3 * np.abs(want).max())
    half = follow_drift(w, h, Statistics(h, cross), 0.5)
    np.testing.assert_allclose(half, (w + moved) / 2, atol=1e-5)


def test_channels_that_never_fire_are_rounded_plainly():
    w, h, _ = problem()
    dead = np.zeros_like(h)
    q = format.dequantize(gptq(w, Statistics(dead), Format(4, 64)))
    rounded = format.dequantize(format.quantize(w, Format(4, 64)))
    assert np.linalg.norm(q - w) <= 1.1 * np.linalg.norm(rounded - w)


def test_bad_input_is_refused_in_one_sentence():
    w, h, _ = problem()
    with pytest.raises(ValueError, match=r"a Hessian of \(128, 128\), got \(64, 64\)"):
        gptq(w, Statistics(h[:64, :64]), Format(4, 64))
    with pytest.raises(ValueError, match="1 of 3072 weights are NaN"):
        gptq(np.where(np.arange(w.size).reshape(w.shape) == 5, np.nan, w), Statistics(h), Format(4, 64))
    with pytest.raises(ValueError, match="Hessian holds NaN"):
        gptq(w, Statistics(np.full_like(h, np.nan)), Format(4, 64))


def tiny(arch, folder):
    """(skeleton's model, reader of its parameters, the same model with its weights) in float32."""
    checkpoint = HuggingFaceCheckpoint(make_hf_model(arch, folder, "float32", seed=4))
    skeleton, whole = (Skeleton(checkpoint.config, folder) for _ in range(2))
    weights = checkpoint.weights(skeleton)
    arrays = {}
    for name, tensor in weights.items():
        rows = int(np.prod(tensor.shape[:-1]))
        arrays[name] = np.array(tensor.read(0, rows)).reshape(tensor.shape)
    checkpoint.weights(whole)
    whole.model.update(tree_unflatten([(name, mx.array(a)) for name, a in arrays.items()]))
    return skeleton.model, arrays.__getitem__, whole.model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_on_the_host_are_those_of_mlx(arch, tmp_path):
    _, _, model = tiny(arch, tmp_path / arch)
    tokens = mx.array(WINDOWS[:2])
    want = np.array(model(tokens))
    with host_products():
        got = np.array(model(tokens))
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    assert np.array_equal(np.array(model(tokens)), want)  # and MLX's own are back


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_block_after_block_gives_the_states_of_the_whole_model(arch, tmp_path):
    model, read, whole = tiny(arch, tmp_path / arch)
    stream = Stream(model, read, WINDOWS)
    for _ in stream.stages():
        pass
    states = []
    last = whole.layers[-1]
    stock = type(last)

    class Noting(stock):
        def __call__(self, *args, **kwargs):
            states.append(stock.__call__(self, *args, **kwargs))
            return states[-1]

    last.__class__ = Noting
    for window, mine, theirs in zip(WINDOWS, stream.float_states, stream.states, strict=True):
        whole(mx.array(window[None]))
        want = np.array(states[-1])
        np.testing.assert_allclose(np.array(mine), want, atol=2e-4 * np.abs(want).max())
        assert np.array_equal(np.array(mine), np.array(theirs))  # nothing was put, so nothing drifted


def test_statistics_are_the_mean_products_of_the_inputs_in_float64(tmp_path):
    model, read, whole = tiny("llama", tmp_path)
    stream = Stream(model, read, WINDOWS)
    rng = np.random.default_rng(0)
    seen, moved, order = {}, {}, []
    for stage in stream.stages():
        order.append({path.rpartition(".")[2] for path in stage.weights})
        for path, weight in stage.weights.items():
            seen[path] = stage
            moved[path] = weight + 0.05 * rng.standard_normal(weight.shape).astype(np.float32)
            stream.put_weight(path, moved[path])
    assert order == 2 * [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]

    def rows_of(path):
        """Inputs of one layer in the model as it is, from mlx-lm's own forward pass."""
        layer = whole
        for name in path.split("."):
            layer = layer[int(name)] if isinstance(layer, list) else layer[name]
        stock, found = type(layer), []

        class Noting(stock):
            def __call__(self, x):
                found.append(np.array(x, np.float64)[0])
                return stock.__call__(self, x)

        layer.__class__ = Noting
        for window in WINDOWS:
            whole(mx.array(window[None]))
        layer.__class__ = stock
        return np.concatenate(found)

    path = "model.layers.1.mlp.down_proj"
    x0 = rows_of(path)
    whole.update(tree_unflatten([(f"{p}.weight", mx.array(w)) for p, w in moved.items() if p != path]))
    x = rows_of(path)
    statistics = seen[path].statistics
    assert statistics.rows == WINDOWS.size
    for got, want in ((statistics.hessian, x.T @ x), (statistics.cross, x0.T @ x)):
        want = want / len(x)
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_each_expert_has_the_inputs_that_were_sent_to_it(tmp_path):
    model, read, _ = tiny("qwen3_moe", tmp_path)
    stream = Stream(model, read, WINDOWS)
    stage = next(s for s in stream.stages() if isinstance(s.statistics, list))
    assert all(path.split(".")[-2] == "switch_mlp" for path in stage.weights)
    assert sum(s.rows for s in stage.statistics) == 2 * WINDOWS.size  # two experts a token
    assert all(s.hessian.shape == (128, 128) and s.cross is None for s in stage.statistics)


def test_a_whole_model_is_solved_and_comes_back_from_its_files(tmp_path):
    model, read, whole = tiny("qwen3_moe", tmp_path / "hf")
    fmt = Format(3, 32)
    wanted = {
        path: (fmt, "bfloat16")
        for path, layer in whole.named_modules()
        if path.endswith("_proj") or path.endswith("embed_tokens")
    }
    spool = Spool(tmp_path / "spool")
    solved, _ = quantize_blocks(model, read, WINDOWS, wanted, spool, options={"rounds": 1})
    assert sorted(solved) == sorted(path for path in wanted if "embed" not in path)
    for path in solved:
        packed = spool.load(path)
        packed.validate()
        assert packed.format == fmt and packed.words.shape[:-1] == read(f"{path}.weight").shape[:-1]
    assert spool.load("model.embed_tokens") is None


def test_models_whose_blocks_share_more_than_a_state_are_refused(tmp_path):
    model, read, _ = tiny("llama", tmp_path)
    inner = model.model
    stock = type(inner)

    class Sharing(stock):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            h = self.embed_tokens(inputs)
            first = self.layers[0](h, None)
            return self.norm(self.layers[1](h, first))

    inner.__class__ = Sharing
    with pytest.raises(ValueError, match="more to each other than one hidden state"):
        Stream(model, read, WINDOWS)


def test_windows_are_spread_over_the_text(tmp_path):
    def encode(text):
        return [ord(c) for c in text]

    windows = token_windows(["abcdefgh", "ijkl"], encode, count=3, length=4)
    assert ["".join(map(chr, w)) for w in windows] == ["abcd", "efgh", "ijkl"]
    assert token_windows(["abc"], encode, count=3, length=4).shape == (1, 3)
    with pytest.raises(ValueError, match="empty"):
        token_windows([""], encode)
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(lines) == ["one", "two"]
    lines.write_text('{"txt": 1}\n')
    with pytest.raises(ValueError, match='"text"'):
        read_text(lines)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_convert_with_calibration_is_nearer_to_the_float_model_and_loads_in_stock_mlx_lm(arch, tmp_path):
    source = make_hf_model(arch, tmp_path / "hf", "float32", seed=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n * n) for n in range(900)))
    base = ["convert", str(source), "--bits", "2", "--group-size", "32", "--embedding-bits", "8"]
    assert main([*base[:2], str(tmp_path / "rtn"), *base[2:]]) == 0
    calibrated = [*base[:2], str(tmp_path / "gptq"), *base[2:], "--calibration", str(text)]
    assert main(calibrated) == 0
    _, _, whole = tiny(arch, tmp_path / "float")
    _, tokenizer = mlx_lm.load(str(tmp_path / "rtn"))
    tokens = mx.array(tokenizer.encode(" ".join(str(n**3) for n in range(40, 60))))[None]
    want = np.array(whole(tokens))
    errors = {}
    for name in ("rtn", "gptq"):
        model, _ = mlx_lm.load(str(tmp_path / name))  # stock
        model.set_dtype(mx.float32)
        errors[name] = np.linalg.norm(np.array(model(tokens)) - want)
    assert errors["gptq"] < 0.8 * errors["rtn"]
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert "keep each layer's outputs" in card and "tokens of text.txt" in card and "2-bit/32" in card
    assert "rounded to the nearest code" in (tmp_path / "rtn" / "README.md").read_text()
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in errors}
    assert sizes["rtn"] == sizes["gptq"]


def test_convert_names_methods_and_models_that_do_not_go_together(tmp_path, capsys):
    source = make_hf_model("llama", tmp_path / "hf", "float32")
    missing = ["convert", str(source), str(tmp_path / "out"), "--calibration", str(tmp_path / "none.txt")]
    assert main(missing) == 2
    assert "none.txt: No such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_is_not_read_when_no_layer_would_be_searched():
    wanted = {"model.layers.0.a": (Format(8, 64), "float32")}
    solved, remarks = quantize_blocks(None, None, None, wanted, None)  # no model, no text: nothing is touched
    assert solved == [] and "more than 6 bits" in remarks[0]
