"""Packed torch layers: products, gradients and torch's own machinery, against float64 autograd and MLX."""

import copy
import gc
import io
import pickle
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, format, ops

torch = pytest.importorskip("torch", reason="needs the package torch")
from mlxq.nn import mlx as nn_mlx  # noqa: E402
from mlxq.nn import torch as nn_torch  # noqa: E402
from mlxq.nn.torch import QuantizedEmbedding, QuantizedLinear  # noqa: E402

# 256 products and sums in float32 with errors of 2^-24 each, which add up like a random walk; the size of the
# answer is that of its terms times the square root of their number.
TOLERANCE = 1e-5
HALF = {torch.float32: TOLERANCE, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(N=40, K=128, bits=4, group=32, bias=True, scale_dtype=None, learn=True, seed=1):
    """A packed layer with random weights; learn: scales and biases have gradients."""
    float_layer = torch.nn.Linear(K, N, bias)
    with torch.no_grad():
        float_layer.weight.copy_(normal(N, K, seed=seed))
        if bias:
            float_layer.bias.copy_(normal(N, seed=2))
    layer = QuantizedLinear.from_linear(float_layer, bits, group, scale_dtype=scale_dtype)
    layer.scales.requires_grad_(learn)
    layer.biases.requires_grad_(learn)
    return layer


def codes(words, bits: int):
    """Codes as float64, by the definition: code k is bits k * bits ... of the row's little-endian stream."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))).double()


def float64_weight(words, scales, biases, bits: int):
    """(N, K) in float64, differentiable by scales and biases, which are float64."""
    c = codes(words, bits)
    c = c.reshape(*scales.shape, c.shape[-1] // scales.shape[-1])
    return (scales[..., None] * c + biases[..., None]).flatten(-2)


def close(got, wanted, bound=TOLERANCE):
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).norm() <= bound * wanted.double().norm()


def leaves(layer):
    return [a.detach().double().requires_grad_() for a in (layer.scales, layer.biases)]


@pytest.mark.parametrize("bits, group", [(2, 32), (3, 64), (4, 64), (4, 128), (8, 32), (5, 32)])
@pytest.mark.parametrize("N", [40, 128])
def test_outputs_and_all_gradients_equal_float64_autograd_through_the_dequantized_weight(N, bits, group):
    """N = K = 128 would hide a swapped orientation from shapes alone, not from values."""
    layer, x, g = linear(N, 128, bits, group), normal(2, 7, 128).requires_grad_(), normal(2, 7, N, seed=3)
    y = layer(x)
    y.backward(g)
    scales, biases = leaves(layer)
    x64, bias64 = x.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    y64 = x64 @ float64_weight(layer.weight, scales, biases, bits).T + bias64
    y64.backward(g.double())
    close(y, y64)
    for got, wanted in ((x, x64), (layer.scales, scales), (layer.biases, biases), (layer.bias, bias64)):
        assert got.grad.dtype == got.dtype
        close(got.grad, wanted.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("transpose", [True, False])
def test_gradients_equal_those_of_the_mlx_primitive(transpose):
    layer = linear(40, 128)
    inner, outer = (128, 40) if transpose else (40, 128)
    x, g = normal(5, inner).requires_grad_(), normal(5, outer, seed=4)
    nn_torch.qmm(x, layer.packed, transpose).backward(g)
    packed = layer.packed

    def product(x, s, b):
        on_mx = format.Packed(bridge.to_mx(packed.words), s, b, packed.format)
        return (ops.qmm(x, on_mx, transpose) * bridge.to_mx(g)).sum()

    wanted = mx.grad(product, (0, 1, 2))(*(bridge.to_mx(a) for a in (x, packed.scales, packed.biases)))
    for got, expected in zip((x, layer.scales, layer.biases), wanted, strict=True):
        close(got.grad, bridge.to_torch(expected))


@pytest.mark.parametrize("scale_dtype", format.STORAGE)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_results_once(x_dtype, scale_dtype):
    layer, x = linear(scale_dtype=scale_dtype), normal(6, 128, dtype=x_dtype).requires_grad_()
    g = normal(6, 40, seed=3, dtype=x_dtype)
    y = layer(x)
    assert y.dtype == x_dtype
    y.backward(g)
    scales, biases = leaves(layer)
    x64 = x.detach().double().requires_grad_()
    y64 = x64 @ float64_weight(layer.weight, scales, biases, 4).T + layer.bias.double()
    y64.backward(g.double())
    close(y, y64, 2 * HALF[x_dtype])  # the product and the sum with the bias
    close(x.grad, x64.grad, HALF[x_dtype])
    close(layer.scales.grad, scales.grad, HALF[layer.scales.dtype])
    close(layer.biases.grad, biases.grad, HALF[layer.biases.dtype])


def test_second_derivatives_equal_float64_autograd():
    layer = linear(24, 64, bias=False)
    x, g = normal(3, 64).requires_grad_(), normal(3, 24, seed=3).requires_grad_()
    scales, biases = leaves(layer)
    x64, g64 = (a.detach().double().requires_grad_() for a in (x, g))

    def penalty(y, x, g, s, b):
        first = torch.autograd.grad(y, (x, s, b), g, create_graph=True)
        return sum((d**2).sum() for d in first)

    penalty(layer(x), x, g, layer.scales, layer.biases).backward()
    y64 = x64 @ float64_weight(layer.weight, scales, biases, 4).T
    penalty(y64, x64, g64, scales, biases).backward()
    for got, wanted in ((x, x64), (g, g64), (layer.scales, scales), (layer.biases, biases)):
        close(got.grad, wanted.grad)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 1, 3), (0,), (2, 0), (1, 0, 4)])
def test_inputs_of_any_rank_and_without_rows(shape):
    layer, x = linear(), normal(*shape, 128).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, 40)
    y.sum().backward()
    wanted = x.detach().double() @ float64_weight(layer.weight, *leaves(layer), 4).T + layer.bias.double()
    close(y, wanted)
    assert x.grad.shape == x.shape and layer.scales.grad.shape == layer.scales.shape
    if not y.numel():
        assert not layer.scales.grad.any() and not layer.biases.grad.any()


def test_strided_inputs_and_gradients():
    layer, wide = linear(), normal(128, 3, 2, seed=5)
    x = wide.permute(1, 2, 0)[:, ::2].requires_grad_()
    assert not x.is_contiguous()
    y = layer(x)
    y.backward(torch.ones(()).expand_as(y))  # strides of 0
    dense = x.detach().contiguous().requires_grad_()
    assert torch.equal(layer(dense), y)
    layer(dense).sum().backward()
    assert torch.equal(x.grad, dense.grad)


def test_gradients_of_scales_do_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch):
    x, found = normal(6, 128), []
    for limit in (1, 128 * 7, 1 << 22):
        monkeypatch.setattr(nn_torch, "_ROWS_AT_ONCE", limit)
        layer = linear()
        layer(x).square().sum().backward()
        found.append(layer.scales.grad)
    close(found[0], found[2])
    close(found[1], found[2])


def test_a_frozen_layer_gives_dx_and_holds_no_activation_back():
    layer, x = linear(learn=False, bias=False), normal(6, 128).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = layer(x)
    assert (6, 128) not in saved and (6, 40) not in saved
    y.sum().backward()
    assert x.grad is not None and layer.scales.grad is None and layer.biases.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_arrive_in_their_own(dtype):
    layer, x = linear(), normal(6, 128).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        again = nn_torch.qmm(x, layer.packed)
    assert y.dtype == again.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == layer.scales.grad.dtype == layer.bias.grad.dtype == torch.float32
    close(y, layer(x.to(dtype)), 0)


# From here on: torch's own machinery.


def sample():
    layer = linear()
    return layer, (normal(3, 128).requires_grad_(), layer.weight, layer.scales, layer.biases, 4, 32)


@pytest.mark.parametrize("transpose", [True, False])
def test_torch_finds_no_fault_in_the_product_operator(transpose):
    """Schema, gradient registration, fake kernel and tracing, by torch's own checker."""
    _, arguments = sample()
    if not transpose:
        arguments = (normal(3, 40).requires_grad_(), *arguments[1:])
    torch.library.opcheck(torch.ops.mlxq.qmm.default, (*arguments, transpose))


def test_torch_finds_no_fault_in_the_dequantizing_operator():
    _, (_, *arguments) = sample()
    for dtype in HALF:
        torch.library.opcheck(torch.ops.mlxq.dequantize.default, (*arguments, dtype))


def test_a_compiled_layer_is_one_graph_with_the_same_answers_and_gradients():
    torch._dynamo.reset()
    layer = linear()
    model = torch.nn.Sequential(layer, torch.nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        grads = []
        for run in (model, compiled):
            x = normal(rows, 128).requires_grad_()
            layer.zero_grad()
            y = run(x)
            y.sum().backward()
            grads.append((y, x.grad, layer.scales.grad, layer.biases.grad, layer.bias.grad))
        for got, wanted in zip(*grads, strict=True):
            close(got, wanted, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(normal(3, 128)).dtype == torch.bfloat16


def test_a_compiled_layer_refuses_a_wrong_input_in_the_same_words():
    _, arguments = sample()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for x, error, text in (
            (torch.zeros(3, 64), ValueError, r"qmm: x has shape \(3, 64\); wanted \(..., 128\)"),
            (torch.zeros(3, 128).double(), TypeError, "qmm: x is torch.float64; wanted float32"),
        ):
            with pytest.raises(error, match=text):
                torch.ops.mlxq.qmm(fake.from_tensor(x), *arguments[1:])


def test_an_exported_layer_can_be_saved_and_takes_other_numbers_of_rows():
    layer = linear(learn=False)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (normal(3, 128),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    back = torch.export.load(file).module()
    x = normal(9, 128)
    assert torch.equal(back(x), layer(x))


def test_vmap_over_inputs_and_over_weights():
    layers, xs = [linear(seed=seed) for seed in (1, 7, 9)], normal(3, 2, 5, 128)
    vmapped = torch.vmap(layers[0], in_dims=1)(xs)
    assert torch.equal(vmapped, torch.stack([layers[0](x) for x in xs.unbind(1)]))
    stacked = [torch.stack([getattr(a, name) for a in layers]) for name in ("weight", "scales", "biases")]

    def product(x, words, scales, biases):
        return torch.ops.mlxq.qmm(x, words, scales, biases, 4, 32)

    def weight(words, scales, biases):
        return torch.ops.mlxq.dequantize(words, scales, biases, 4, 32, torch.float32)

    for x, dim in ((xs, 0), (xs[0], None)):
        got = torch.vmap(product, in_dims=(dim, 0, 0, 0))(x, *stacked)
        wanted = [product(xs[i if dim == 0 else 0], *(a[i] for a in stacked)) for i in range(3)]
        assert torch.equal(got, torch.stack(wanted))
    words, *others = stacked
    got = torch.vmap(weight, in_dims=(None, 0, 0))(words[0], *others)
    assert torch.equal(got, torch.stack([weight(words[0], *(a[i] for a in others)) for i in range(3)]))


@pytest.mark.parametrize("name", ["weight", "scales", "biases"])
def test_a_tensor_swapped_under_a_layer_is_seen(name):
    """tensor.data = other keeps the object and its count of changes."""
    layer, x = linear(bias=False), normal(3, 128)
    other = linear(bias=False, seed=7)
    layer(x)
    getattr(layer, name).data = getattr(other, name).data
    wanted = x.double() @ float64_weight(layer.weight, *leaves(layer), 4).T
    close(layer(x), wanted)


def test_state_dict_goes_round_and_has_the_bytes_of_the_mlx_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, x = linear(scale_dtype="bfloat16").to(torch.bfloat16), normal(3, 128)
    state = layer.state_dict()
    assert {name: str(a.dtype) for name, a in state.items()} == {
        "weight": "torch.int32",
        "scales": "torch.bfloat16",
        "biases": "torch.bfloat16",
        "bias": "torch.bfloat16",
    }
    save_file(state, tmp_path / "layer.safetensors")
    for strict_assign in (False, True):
        fresh = QuantizedLinear(128, 40, bits=4, group_size=32, dtype=torch.bfloat16)
        fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=strict_assign)
        assert torch.equal(fresh(x), layer(x)) and bridge.is_shared(fresh.weight)
    stock = nn_mlx.QuantizedLinear.from_packed(
        ops.quantize(bridge.to_mx(normal(40, 128, seed=1)), format.Format(4, 32), scale_dtype="bfloat16")
    )
    assert np.array_equal(np.array(stock.weight), layer.packed.words.numpy())
    theirs = QuantizedLinear.from_packed(stock.packed, layer.bias)
    assert torch.equal(theirs(x), layer(x))
    mx.save_safetensors(str(tmp_path / "mlx.safetensors"), dict(stock.parameters()))
    file = load_file(tmp_path / "mlx.safetensors")
    assert file["weight"].dtype == torch.uint32 and file["weight"].view(torch.int32).min() < 0
    for assign in (False, True):
        fresh = QuantizedLinear(128, 40, bias=False, bits=4, group_size=32, dtype=torch.bfloat16)
        fresh.load_state_dict(file, assign=assign)
        assert fresh.weight.dtype == torch.int32 and torch.equal(fresh(x) + layer.bias, layer(x))


def copies(layer):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("which", range(3), ids=["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_answers_and_share_nothing_with_the_original(which):
    layer, x = linear(), normal(3, 128)
    layer(x)
    before = layer(x).clone()
    other = list(copies(layer))[which]
    assert torch.equal(other(x), before) and other.scales.requires_grad and bridge.is_shared(other.weight)
    with torch.no_grad():
        other.scales.mul_(2)
        other.weight.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


def test_casts_leave_the_words_alone_and_the_bytes_in_mlxs_memory():
    layer, x = linear(), normal(3, 128)
    words, wanted = layer.weight.clone(), layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert torch.equal(layer.weight, words) and layer.weight.dtype == torch.int32
        assert layer.scales.dtype == layer.biases.dtype == layer.bias.dtype == dtype
        assert all(bridge.is_shared(a) for a in (layer.weight, layer.scales, layer.biases))
        close(layer(x), wanted, 2**-6)  # scales and biases of 8 bits: half of 2^-8 each, cancelling in part
    layer.cpu().requires_grad_(True).requires_grad_(False)
    with pytest.raises(ValueError, match="scales are float64 and biases float64"):
        layer.double()(x)


def test_meta_layers_take_no_memory_until_they_are_loaded():
    layer, x = linear(), normal(3, 128)
    empty = QuantizedLinear(128, 40, bits=4, group_size=32, device="meta")
    assert {a.device.type for a in empty.state_dict().values()} == {"meta"}
    assert empty(x.to("meta")).shape == (3, 40)
    with pytest.raises(NotImplementedError, match="meta"):
        copy.deepcopy(empty).to("cpu")
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(filled(x), layer(x)) and torch.equal(empty(x), layer(x))
    assert bridge.is_shared(filled.weight) and bridge.is_shared(empty.weight)


def test_layers_made_or_run_in_inference_mode():
    outside, x = linear(), normal(3, 128)
    wanted = outside(x).detach()
    with torch.inference_mode():
        inside = linear(learn=False)
        assert torch.equal(outside(x), wanted) and torch.equal(inside(x), wanted)
    with torch.no_grad():
        assert torch.equal(outside(x), wanted)
    assert torch.equal(inside(x), wanted)
    outside(x).sum().backward()
    assert outside.scales.grad is not None


def test_threads_run_and_differentiate_one_layer():
    layer = linear()
    wanted, wrong = [], []

    def run(seed):
        x = normal(5, 128, seed=seed).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        return y.detach(), dx

    wanted = [run(seed) for seed in range(4)]

    def work(seed):
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(run(seed), wanted[seed], strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("memory", ["MLX's", "between processes"])
def test_training_scales_and_biases_lowers_the_loss(memory):
    """Each step changes the arrays in place: a product on a stale copy would stop the fall."""
    layer, x = linear(bias=False), normal(64, 128)
    with torch.no_grad():
        layer.scales.mul_(1.2)
    if memory != "MLX's":
        layer.share_memory()
        assert layer.scales.is_shared()
    target = x @ normal(40, 128, seed=1).T
    optimizer = torch.optim.SGD(layer.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        wanted = x.double() @ float64_weight(layer.weight, *leaves(layer), 4).T
        close(layer(x), wanted)


def test_a_layer_is_held_once_and_let_go():
    mx.eval(mx.zeros((1,)))
    gc.collect()
    held, known = mx.get_active_memory(), len(nn_torch._known)
    layer = linear(2048, 1024, 8, 64, bias=False, learn=False)
    size = layer.packed.nbytes
    for made in (layer, copy.deepcopy(layer)):
        made(normal(1, 1024))
    gc.collect()
    assert 2 * size <= mx.get_active_memory() - held < 2.2 * size
    del layer, made
    gc.collect()
    assert mx.get_active_memory() - held < 0.1 * size and len(nn_torch._known) <= known


@pytest.mark.parametrize("ids", [[[1, 2, 2], [49, 0, 7]], 3, [], [[]]], ids=str)
def test_an_embedding_gives_the_rows_asked_for_and_their_gradients(ids):
    table = torch.nn.Embedding(50, 64)
    layer = QuantizedEmbedding.from_embedding(table, 8, 32, scale_dtype="float16")
    layer.scales.requires_grad_()
    layer.biases.requires_grad_()
    ids = torch.tensor(ids, dtype=torch.int64)
    rows = layer(ids)
    scales, biases = leaves(layer)
    wanted = float64_weight(layer.weight, scales, biases, 8)[ids]
    assert rows.dtype == torch.float16 and rows.shape == (*ids.shape, 64)
    close(rows, wanted, 2**-11)
    g = normal(*rows.shape, seed=6, dtype=torch.float16)
    rows.backward(g)
    wanted.backward(g.double())
    close(layer.scales.grad, scales.grad, 2**-10)  # rounded in each row and in the sum of equal rows
    close(layer.biases.grad, biases.grad, 2**-10)


def test_an_embedding_compiles_copies_and_serves_as_the_output_projection():
    torch._dynamo.reset()
    layer = QuantizedEmbedding.from_embedding(torch.nn.Embedding(50, 64), 4, 64)
    ids, x = torch.tensor([[4, 9]]), normal(3, 64).requires_grad_()
    wanted = float64_weight(layer.weight, *leaves(layer), 4)
    head = nn_torch.TiedHead(layer)
    for run in (layer.as_linear, head, nn_torch.TiedHead(copy.deepcopy(layer))):
        close(run(x), x.double() @ wanted.T)
    assert not head.state_dict()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), layer(ids))
    model = torch.nn.ModuleDict({"table": layer, "head": head})
    for other in copies(model):
        assert other["head"].table is other["table"]
        assert torch.equal(other["head"](x), head(x))


def test_on_a_stand_in_cuda_tensors_reach_ops_cuda_with_one_packed_for_all_calls(monkeypatch):
    """ops.cuda keeps what it worked out on the Packed: a new one each call would compile and check anew."""

    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    calls = []

    class Cuda:
        @staticmethod
        def qmm(x, w, transpose=True):
            calls.append((w, transpose))
            return torch.zeros(*x.shape[:-1], w.N if transpose else w.K)

    monkeypatch.setattr(ops.dispatch, "_cuda", lambda: Cuda)
    layer, x = linear(learn=False, bias=False), normal(2, 128).as_subclass(OnCuda).requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    assert [transpose for _, transpose in calls] == [True, False, True, False] or len(calls) >= 2
    assert all(w is calls[0][0] for w, _ in calls)
    pointers = [a.data_ptr() for a in (layer.weight, layer.scales, layer.biases)]
    assert [a.data_ptr() for a in (calls[0][0].words, calls[0][0].scales, calls[0][0].biases)] == pointers


BAD = {
    "Format: 7-bit groups of 64 do not exist": lambda: QuantizedLinear(128, 40, bits=7),
    "K=100 is not a multiple of the group size 64": lambda: QuantizedLinear(100, 40),
    "QuantizedLinear: scales cannot be torch.float64": lambda: QuantizedLinear(128, 40, dtype=torch.float64),
    "w has K=100, not a multiple": lambda: QuantizedLinear.from_linear(torch.nn.Linear(100, 8)),
    "quantize: w is float64": lambda: QuantizedLinear.from_linear(torch.nn.Linear(64, 8).double()),
    "weights are NaN or infinite": lambda: QuantizedLinear.from_linear(with_nan()),
    "wanted (N, K * bits / 32)": lambda: QuantizedLinear.from_packed(
        ops.quantize(torch.zeros(2, 8, 64), format.Format(4, 64))
    ),
    "qmm: x has K=64 but w holds K=128": lambda: linear()(normal(3, 64)),
    "qmm: x is float64; wanted float32, float16 or bfloat16": lambda: linear()(normal(3, 128).double()),
    "qmm: x is int64": lambda: linear()(torch.zeros(3, 128, dtype=torch.int64)),
}


def with_nan():
    layer = torch.nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight[3, 4] = torch.nan
    return layer


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_clear_error(message):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[message]()
    assert message in str(caught.value)
