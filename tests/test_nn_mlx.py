import copy
import functools
import itertools
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import afm7, mla, switch_layers

from mlxq import bridge, ops
from mlxq.format import BITS, GROUP_SIZES, Format, Packed
from mlxq.nn import mlx as layers
from mlxq.ops import reference

# The bars: relative Frobenius error of one product against float64, by x's dtype.
BAR = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
STOCK = (
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    switch_layers.QuantizedSwitchLinear,
    mla.QuantizedMultiLinear,
)


def normal(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def difference(got, want):
    """||got - want|| / ||want||, in float64."""
    got, want = (
        np.asarray(a if isinstance(a, np.ndarray) else bridge.to_numpy(a), np.float64) for a in (got, want)
    )
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def stock_linear(bits=4, group_size=64, bias=True, K=256, N=96, dtype=mx.float32):
    layer = nn.QuantizedLinear(K, N, bias, group_size, bits)
    if bias:
        layer.bias = normal(N, seed=5)
    layer.set_dtype(dtype)
    return layer


def stock_embedding(bits=4, group_size=64, dtype=mx.float32):
    layer = nn.QuantizedEmbedding(50, 128, group_size, bits)
    layer.set_dtype(dtype)
    return layer


def stock_switch(bits=4, group_size=64, bias=True, dtype=mx.float32):
    layer = switch_layers.QuantizedSwitchLinear(128, 72, 5, bias, group_size, bits)
    if bias:
        layer.bias = normal(5, 72, seed=6)
    layer.set_dtype(dtype)
    return layer


def stock_heads(bits=4, group_size=32):
    return mla.QuantizedMultiLinear(128, 96, 3, group_size, bits, "affine")


def ours(stock):
    return layers.adopt(copy.deepcopy(stock))


FORMATS = list(itertools.product(BITS, GROUP_SIZES))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_linear_equals_stock_in_float32(bits, group_size):
    stock, x = stock_linear(bits, group_size), normal(2, 3, 256)
    assert difference(ours(stock)(x), stock(x)) < 2 * BAR[mx.float32]  # each is within one bar of the truth


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (8, 128), (3, 64)])
def test_linear_in_half_precision_is_near_float64(bits, group_size, dtype):
    layer = ours(stock_linear(bits, group_size, bias=False, K=1024, dtype=dtype))
    x = normal(5, 1024, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert difference(y, reference.qmm(x, layer.packed)) < BAR[dtype]


def test_linear_answers_in_the_dtype_of_x():
    layer = ours(stock_linear(bias=False, dtype=mx.float16))
    assert [layer(normal(2, 256, dtype=d)).dtype for d in BAR] == list(BAR)


@pytest.mark.parametrize("shape", [(256,), (1, 256), (0, 256), (2, 0, 256), (2, 1, 3, 256)])
def test_linear_takes_x_of_any_rank(shape):
    layer = ours(stock_linear())
    y = layer(mx.zeros(shape))
    assert y.shape == (*shape[:-1], 96)
    assert mx.array_equal(y, mx.broadcast_to(layer.bias, y.shape))


@pytest.mark.parametrize("ids", [7, [3, 3, 49], [[0, 1], [2, 49]]], ids=str)
@pytest.mark.parametrize("index_dtype", [mx.int32, mx.uint32, mx.int64])
def test_embedding_returns_the_rows_asked_for(ids, index_dtype):
    layer = ours(stock_embedding())
    want = reference.dequantize(layer.packed)[np.array(ids, dtype=int)]
    got = layer(mx.array(ids, dtype=index_dtype))
    assert got.shape == want.shape and got.dtype == mx.float32
    assert difference(got, want) < 1e-6  # one product and one sum in float32


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_embedding_equals_stock_in_float32(bits, group_size):
    stock, ids = stock_embedding(bits, group_size), mx.arange(50)
    assert difference(ours(stock)(ids), stock(ids)) < 1e-6


@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_embedding_rounds_each_weight_once(dtype, rounding):
    layer = ours(stock_embedding(dtype=dtype))
    got, want = layer(mx.arange(50)), reference.dequantize(layer.packed)
    assert got.dtype == dtype
    slack = 2**-22 * np.abs(want).max()  # the float32 arithmetic before the rounding
    tiny = 2**-25  # half of float16's smallest step
    assert np.all(np.abs(bridge.to_numpy(got) - want) <= rounding * np.abs(want) + slack + tiny)


def test_embedding_unpacks_no_row_that_was_not_asked_for():
    words, scales = mx.ones((2**16, 64), dtype=mx.uint32), mx.ones((2**16, 8))  # 128 MiB as float32
    layer = layers.QuantizedEmbedding.from_packed(Packed(words, scales, scales, Format(4, 64)))
    mx.eval(layer.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(layer(mx.array([1, 2, 65535])))
    assert mx.get_peak_memory() - before < 2**20


def test_tied_projection_equals_stock():
    stock, x = stock_embedding(), normal(2, 3, 128)
    assert difference(ours(stock).as_linear(x), stock.as_linear(x)) < 2 * BAR[mx.float32]


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_switch_linear_equals_stock_in_float32(bits, group_size):
    stock = stock_switch(bits, group_size)
    x, experts = normal(2, 7, 1, 1, 128), mx.random.randint(0, 5, (2, 7, 2))
    assert difference(ours(stock)(x, experts), stock(x, experts)) < 2 * BAR[mx.float32]


def test_switch_linear_equals_stock_on_sorted_rows():
    stock = stock_switch()
    x, experts = normal(90, 1, 128), mx.sort(mx.random.randint(0, 5, (90,)))
    got = ours(stock)(x, experts, sorted_indices=True)
    assert difference(got, stock(x, experts, sorted_indices=True)) < 2 * BAR[mx.float32]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_switch_linear_in_half_precision_is_near_float64(dtype):
    layer = ours(stock_switch(bias=False, dtype=dtype))
    x, experts = normal(40, 1, 128, dtype=dtype), mx.random.randint(0, 5, (40,))
    y = layer(x, experts)
    assert y.dtype == dtype
    assert difference(y, reference.gather_qmm(x, layer.packed, rhs_indices=experts)) < BAR[dtype]


@pytest.mark.parametrize("tokens", [3, 40])  # mlx-lm sorts from 64 chosen experts on
def test_expert_block_of_mlx_lm_runs_on_ours(tokens):
    block = switch_layers.SwitchGLU(128, 64, 8)
    nn.quantize(block, 32, 4)
    x, experts = normal(1, tokens, 128), mx.random.randint(0, 8, (1, tokens, 2))
    want = block(x, experts)
    assert type(layers.adopt(block).down_proj) is layers.QuantizedSwitchLinear
    assert difference(block(x, experts), want) < 4 * BAR[mx.float32]  # two products in sequence, twice


@pytest.mark.parametrize("head_axis", [1, 3])
@pytest.mark.parametrize("transpose", [True, False])
def test_per_head_linear_equals_stock(transpose, head_axis):
    stock = stock_heads()
    x = normal(2, head_axis, 4, 128 if transpose else 96)
    assert difference(ours(stock)(x, transpose), stock(x, transpose)) < 2 * BAR[mx.float32]


MAKERS = [stock_linear, stock_embedding, stock_switch, stock_heads]
INPUTS = {
    stock_linear: (normal(3, 256),),
    stock_embedding: (mx.array([4, 1]),),
    stock_switch: (normal(6, 1, 128), mx.array([0, 4, 2, 2, 1, 3])),
    stock_heads: (normal(3, 2, 128),),
}


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_have_stock_names_and_are_frozen_alike(make):
    stock = make()
    layer = ours(stock)
    assert [name for name, _ in tree_flatten(layer.parameters())] == [
        n for n, _ in tree_flatten(stock.parameters())
    ]
    assert layer.trainable_parameters() == stock.trainable_parameters() == {}
    for module in (stock, layer):
        module.unfreeze(keys=["scales", "biases"])
    assert set(layer.trainable_parameters()) == set(stock.trainable_parameters()) == {"scales", "biases"}
    layer.freeze()
    assert layer.trainable_parameters() == {}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layers_survive_copy_and_pickle(make, copied):
    layer = ours(make())
    again = copied(layer)
    assert type(again) is type(layer) and vars(again) == vars(layer)
    assert mx.array_equal(again(*INPUTS[make]), layer(*INPUTS[make]))


@pytest.mark.parametrize("make", MAKERS)
def test_set_dtype_changes_scales_and_not_codes(make):
    layer = ours(make())
    words = layer.weight
    layer.set_dtype(mx.bfloat16)
    assert (layer.weight.dtype, layer.scales.dtype, layer.biases.dtype) == (
        mx.uint32,
        mx.bfloat16,
        mx.bfloat16,
    )
    assert mx.array_equal(layer.weight, words)


@pytest.mark.parametrize("make", MAKERS)
def test_compiled_layers_give_the_same_answer(make):
    layer = ours(make())
    assert difference(mx.compile(layer)(*INPUTS[make]), layer(*INPUTS[make])) < 1e-6


def loss(model, *inputs):
    y = model(*inputs)
    return (y * mx.sin(mx.arange(y.size).reshape(y.shape))).sum()  # every output weighs differently


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_of_parameters_equal_stock(make):
    stock = make()
    layer = ours(stock)
    for module in (stock, layer):
        module.unfreeze(keys=["scales", "biases", "bias"])
    _, want = nn.value_and_grad(stock, loss)(stock, *INPUTS[make])
    _, got = nn.value_and_grad(layer, loss)(layer, *INPUTS[make])
    assert set(got) == set(want) >= {"scales", "biases"}
    for name in want:
        assert difference(got[name], want[name]) < 2 * BAR[mx.float32], name


@pytest.mark.parametrize("make", [stock_linear, stock_switch, stock_heads])
def test_gradient_of_x_equals_stock(make):
    stock, (x, *rest) = make(), INPUTS[make]
    got, want = (mx.grad(lambda x, m=m: loss(m, x, *rest))(x) for m in (ours(stock), stock))
    assert difference(got, want) < 2 * BAR[mx.float32]


def test_gradient_in_bfloat16_is_near_float64():
    layer = ours(stock_linear(bias=False, dtype=mx.bfloat16))
    x, g = normal(8, 256, dtype=mx.bfloat16), normal(8, 96, seed=2, dtype=mx.bfloat16)
    _, (dx,) = mx.vjp(layer, [x], [g])
    assert dx.dtype == mx.bfloat16
    assert difference(dx, reference.qmm(g, layer.packed, transpose=False)) < BAR[mx.bfloat16]


def test_checkpointed_and_compiled_training_step_equals_stock():
    def network(adopted):
        mx.random.seed(3)
        model = nn.Sequential(*(stock_linear(K=96, N=96, group_size=32) for _ in range(3)))
        model.layers[1].unfreeze(keys=["scales", "biases", "bias"])
        return layers.adopt(model) if adopted else model

    def gradients(model, wrap):
        x = normal(4, 96)
        value_and_grad = nn.value_and_grad(model, lambda x: (wrap(model)(x) ** 2).mean())
        return value_and_grad(x)

    model = network(True)
    for wrap in (nn.utils.checkpoint, lambda m: m):
        stock_value, stock_gradients = gradients(network(False), wrap)
        value, got = gradients(model, wrap)
        assert difference(value, stock_value) < 6 * BAR[mx.float32]  # three products in sequence, twice
        assert [name for name, _ in tree_flatten(got)] == [
            f"layers.1.{n}" for n in ("scales", "biases", "bias")
        ]
        for (name, a), (_, b) in zip(tree_flatten(got), tree_flatten(stock_gradients), strict=True):
            assert difference(a, b) < 12 * BAR[mx.float32], name  # forward and back

    x = normal(4, 96)
    got, want = (mx.grad(lambda x, m=m: loss(mx.checkpoint(m), x))(x) for m in (model, network(False)))
    assert difference(got, want) < 12 * BAR[mx.float32]

    @functools.partial(mx.compile, inputs=model.state, outputs=model.state)
    def step(x):
        value, _ = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
        return value

    assert difference(step(normal(4, 96)), stock_value) < 6 * BAR[mx.float32]


CONSTRUCTORS = [
    (nn.Linear(128, 24), layers.QuantizedLinear.from_linear),
    (nn.Embedding(24, 128), layers.QuantizedEmbedding.from_embedding),
    (switch_layers.SwitchLinear(128, 24, 3), layers.QuantizedSwitchLinear.from_float),
    (mla.MultiLinear(128, 24, 3), layers.QuantizedMultiLinear.from_float),
]


@pytest.mark.parametrize(("layer", "build"), CONSTRUCTORS)
def test_rule_mlx_gives_the_bits_of_stock(layer, build):
    stock, got = layer.to_quantized(32, 4), build(layer, 32, 4, rule="mlx")
    assert vars(got) == {name: value for name, value in vars(stock).items() if value is not None}
    assert [n for n, _ in tree_flatten(got)] == [n for n, _ in tree_flatten(stock)]
    for name, value in stock.items():
        assert mx.array_equal(got[name], value), name


@pytest.mark.parametrize(("layer", "build"), CONSTRUCTORS)
def test_default_rule_is_affine_and_4_bits_in_groups_of_64(layer, build):
    got, want = build(layer).packed, ops.quantize(layer.weight, Format(4, 64), "affine")
    for name in ("words", "scales", "biases"):
        assert mx.array_equal(getattr(got, name), getattr(want, name)), name


def test_rule_of_a_class_can_be_changed():
    class Stocklike(layers.QuantizedLinear):
        rule = "mlx"

    linear = nn.Linear(64, 8)
    assert mx.array_equal(Stocklike.from_linear(linear).scales, linear.to_quantized().scales)


def test_scales_take_the_dtype_of_the_weights():
    linear = nn.Linear(64, 8)
    linear.set_dtype(mx.bfloat16)
    layer = layers.QuantizedLinear.from_linear(linear)
    assert (layer.scales.dtype, layer.biases.dtype) == (mx.bfloat16, mx.bfloat16)


def test_stock_constructors_work():
    assert layers.QuantizedLinear(128, 8)(mx.zeros((1, 128))).shape == (1, 8)
    assert layers.QuantizedEmbedding(8, 128)(mx.array([1])).shape == (1, 128)
    assert layers.QuantizedSwitchLinear(128, 8, 2)(mx.zeros((1, 1, 128)), mx.array([1])).shape == (1, 1, 8)
    assert layers.QuantizedMultiLinear(128, 8, 2, 64, 4, "affine")(mx.zeros((2, 1, 128))).shape == (2, 1, 8)


def test_modes_other_than_affine_are_refused():
    with pytest.raises(ValueError, match="QuantizedLinear: mode 'mxfp4' belongs to the stock layer"):
        layers.QuantizedLinear(64, 64, mode="mxfp4")
    with pytest.raises(ValueError, match="mode 'nvfp4' belongs"):
        layers.QuantizedEmbedding.from_embedding(nn.Embedding(4, 64), 16, 4, "nvfp4")


def test_weights_that_are_not_finite_are_refused():
    linear = nn.Linear(64, 8)
    linear.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="(?i)nan"):
        layers.QuantizedLinear.from_linear(linear)


def test_packed_arrays_that_disagree_are_refused():
    packed = layers.QuantizedLinear(128, 8).packed
    with pytest.raises(ValueError):
        layers.QuantizedLinear.from_packed(
            Packed(packed.words, packed.scales[:4], packed.biases, packed.format)
        )


def test_adopt_shares_arrays_and_keeps_every_reference():
    linear, embedding = stock_linear(), stock_embedding()
    model = nn.Module()
    model.first, model.again, model.list = linear, linear, [{"table": embedding}]
    arrays = dict(tree_flatten(model))
    assert layers.adopt(model) is model
    assert model.first is model.again is linear and model.list[0]["table"] is embedding
    assert type(linear) is layers.QuantizedLinear and type(embedding) is layers.QuantizedEmbedding
    assert all(value is arrays[name] for name, value in tree_flatten(model))
    assert layers.adopt(model) is model


def test_adopt_takes_exactly_the_stock_affine_layers():
    model = nn.Module()
    model.affine = [make() for make in MAKERS]
    model.floats = [nn.Linear(64, 64), nn.Embedding(4, 64)]
    model.others = [nn.QuantizedLinear(64, 64, mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
    want = [layer(normal(2, 64)) for layer in model.others]
    types = [type(m) for m in model.floats + model.others]
    layers.adopt(model)
    assert [type(m).__mro__[2] for m in model.affine] == list(STOCK)
    assert [type(m) for m in model.floats + model.others] == types
    assert all(mx.array_equal(m(normal(2, 64)), y) for m, y in zip(model.others, want, strict=True))


def test_a_subclass_of_a_stock_layer_keeps_its_methods_and_runs_ours(monkeypatch):
    stock, x = afm7.FusedQuantizedLinear(64, (32, 32, 64), 32, 4), normal(2, 64)
    layer, calls = ours(stock), []
    monkeypatch.setattr(layers.ops, "qmm", lambda *args: calls.append(args) or ops.native.qmm(*args))
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(copied, afm7.FusedQuantizedLinear) and isinstance(copied, layers.QuantizedLinear)
        assert type(copied) is type(layer) and copied.output_dims == stock.output_dims
        for part, want in zip(copied(x), stock(x), strict=True):
            assert difference(part, want) < 2 * BAR[mx.float32]
    assert len(calls) == 3


def test_every_layer_runs_on_mlxq_ops(monkeypatch):
    calls = []
    for name in ("qmm", "gather_qmm", "dequantize"):
        real = getattr(ops, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            calls.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    for make in MAKERS:
        ours(make())(*INPUTS[make])
    assert calls == ["qmm", "dequantize", "gather_qmm", "gather_qmm"]


def test_a_layer_that_lies_about_its_format_is_named():
    model = nn.Sequential(stock_linear(), stock_linear())
    model.layers[1].group_size = 32
    with pytest.raises(ValueError, match=r"adopt: layer layers\.1: .*group"):
        layers.adopt(model)
