"""The primitive as MLX users meet it: values, derivatives, transformations, streams, threads, bad input."""

import os
import re
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, format, ops
from mlxq.ops import native, reference

FMT = format.Format(4, 64)
# float32 sums of a few hundred products: 2^-24 * sqrt(K) * a few, K <= 512.
TOLERANCE = 2e-6


def packed(N, K, fmt=FMT, seed=0, lead=(), scale_dtype="float32"):
    w = np.random.default_rng(seed).standard_normal((*lead, N, K)).astype(np.float32)
    return ops.quantize(mx.array(w), fmt, scale_dtype=scale_dtype)


def normal(*shape, seed=1, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def relative(got, wanted):
    got = np.array(got.astype(mx.float32)).astype(np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def weight(p):
    """The dequantized weight as a differentiable graph of plain MLX operations on scales and biases."""
    codes = mx.array(format.unpack(np.array(p.words), p.format.bits, p.K).astype(np.float32))
    return lambda s, b: mx.repeat(s, p.format.group_size, -1) * codes + mx.repeat(b, p.format.group_size, -1)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 1, 4), (0,), (2, 0)])
def test_any_rank_of_x_and_no_rows_at_all(shape, transpose):
    p = packed(96, 128)
    x = normal(*shape, 128 if transpose else 96)
    y = ops.qmm(x, p, transpose)
    assert y.shape == (*shape, 96 if transpose else 128) and y.dtype == mx.float32
    if y.size:
        assert relative(y, reference.qmm(x, p, transpose)) < TOLERANCE


@pytest.mark.parametrize("bits", [1, 3, 5, 6])
def test_widths_without_a_kernel_give_the_answer_too(bits):
    p = packed(40, 128, format.Format(bits, 32))
    experts = packed(40, 128, format.Format(bits, 32), lead=(2,))
    assert ops.qmm(mx.zeros((0, 128)), p).shape == (0, 40)  # stock MLX dies of it
    assert ops.gather_qmm(mx.zeros((3, 0, 128)), experts, None, mx.array([0, 1, 1])).shape == (3, 0, 40)
    x = normal(3, 128, dtype=mx.bfloat16)
    y = ops.qmm(x, p)
    assert y.dtype == mx.bfloat16 and ops.kernel_for(3, 40, 128, bits, 32) == "stock"
    assert relative(y, reference.qmm(x, p)) < 2**-8


def test_the_result_has_the_dtype_of_x_whatever_the_scales_are():
    for x_dtype in (mx.float32, mx.float16, mx.bfloat16):
        for scale_dtype in format.STORAGE:
            p = packed(24, 128, scale_dtype=scale_dtype)
            y = ops.qmm(normal(2, 128, dtype=x_dtype), p)
            assert y.dtype == x_dtype
            # the output's own rounding: half a unit of 24, 11 or 8 bits
            bound = {mx.float32: TOLERANCE, mx.float16: 2**-11, mx.bfloat16: 2**-8}[x_dtype]
            assert relative(y, reference.qmm(normal(2, 128, dtype=x_dtype), p)) < bound


@pytest.mark.parametrize("make", [np.asarray, None])
def test_packed_arrays_may_be_numpy_or_torch(make):
    p = packed(24, 128, scale_dtype="bfloat16" if make is None else "float32")
    x = normal(2, 128)
    wanted = ops.qmm(x, p)
    if make is None:
        torch = pytest.importorskip("torch", reason="needs the package torch")
        words = torch.from_numpy(np.array(p.words))
        scales, biases = (
            torch.from_numpy(np.array(a.astype(mx.float32))).bfloat16() for a in (p.scales, p.biases)
        )
        other = format.Packed(words, scales, biases, FMT)
    else:
        other = format.Packed(*(make(a) for a in (p.words, p.scales, p.biases)), FMT)
    assert mx.array_equal(ops.qmm(x, other), wanted)


def test_a_strided_x_is_read_as_it_lies():
    p = packed(24, 128)
    base = normal(128, 6, 4)
    views = [base[:, :, 1].T, base.transpose(2, 1, 0), base.transpose(1, 2, 0)[::2]]
    for x in (*views, mx.broadcast_to(base[:, 0, 0], (3, 128))):
        assert relative(ops.qmm(x, p), reference.qmm(np.array(x), p)) < TOLERANCE


def test_a_weight_view_is_made_contiguous():
    p = packed(48, 128)
    view = format.Packed(p.words[::2], p.scales[::2], p.biases[::2], FMT)
    assert relative(ops.qmm(normal(3, 128), view), reference.qmm(normal(3, 128), view)) < TOLERANCE


@pytest.mark.parametrize("transpose", [True, False])
def test_gradients_equal_those_of_the_dequantized_product(transpose):
    p = packed(96, 128)
    x, g = normal(2, 3, 128 if transpose else 96), normal(2, 3, 96 if transpose else 128, seed=2)
    w = weight(p)

    def ours(x, s, b):
        return (ops.qmm(x, format.Packed(p.words, s, b, FMT), transpose) * g).sum()

    def plain(x, s, b):
        return (x @ (w(s, b).T if transpose else w(s, b)) * g).sum()

    for got, wanted in zip(
        *(mx.grad(f, (0, 1, 2))(x, p.scales, p.biases) for f in (ours, plain)), strict=True
    ):
        assert got.shape == wanted.shape and relative(got, np.array(wanted)) < TOLERANCE
    tangents = [normal(*a.shape, seed=5 + i) for i, a in enumerate((x, p.scales, p.biases))]
    got, wanted = (mx.jvp(f, (x, p.scales, p.biases), tangents)[1][0] for f in (ours, plain))
    assert abs(got - wanted) < 1e-4 * abs(wanted)


def test_the_second_derivative_is_that_of_the_dequantized_product():
    p = packed(32, 64)
    x, w = normal(3, 64), weight(p)

    def twice(product):
        def inner(x, s):
            return (mx.grad(lambda x: (product(x, s) ** 3).sum())(x) ** 2).sum()

        return mx.grad(inner, (0, 1))(x, p.scales)

    ours = twice(lambda x, s: ops.qmm(x, format.Packed(p.words, s, p.biases, FMT)))
    plain = twice(lambda x, s: x @ w(s, p.biases).T)
    for got, wanted in zip(ours, plain, strict=True):
        assert relative(got, np.array(wanted)) < 1e-5


def test_words_have_no_gradient_and_say_so():
    p = packed(32, 64)
    with pytest.raises(ValueError, match="gradient"):
        mx.vjp(
            lambda q: ops.qmm(normal(2, 64), format.Packed(q, p.scales, p.biases, FMT)),
            [p.words],
            [normal(2, 32)],
        )


@pytest.mark.parametrize("transpose", [True, False])
def test_vmap_over_x_over_the_weight_and_over_both(transpose):
    lanes = 3
    p = packed(32, 64, lead=(lanes,))
    x = normal(5, lanes, 64 if transpose else 32)
    one = [format.Packed(p.words[i], p.scales[i], p.biases[i], FMT) for i in range(lanes)]

    def product(x, q, s, b):
        return ops.qmm(x, format.Packed(q, s, b, FMT), transpose)

    over_x = mx.vmap(product, in_axes=(1, None, None, None))(x, one[0].words, one[0].scales, one[0].biases)
    over_w = mx.vmap(product, in_axes=(None, 0, 0, 0))(x[:, 0], p.words, p.scales, p.biases)
    over_both = mx.vmap(product, in_axes=(1, 0, 0, 0))(x, p.words, p.scales, p.biases)
    for i in range(lanes):
        assert relative(over_x[i], reference.qmm(x[:, i], one[0], transpose)) < TOLERANCE
        assert relative(over_w[i], reference.qmm(x[:, 0], one[i], transpose)) < TOLERANCE
        assert relative(over_both[i], reference.qmm(x[:, i], one[i], transpose)) < TOLERANCE


def test_compile_checkpoint_and_shapeless_compile_change_nothing():
    p = packed(96, 128)
    x = normal(4, 128)

    def f(x):
        return mx.tanh(ops.qmm(x, p)) + ops.qmm(x, p)

    wanted = f(x)
    assert mx.allclose(mx.compile(f)(x), wanted, 1e-6, 1e-6)
    shapeless = mx.compile(f, shapeless=True)
    assert mx.allclose(shapeless(x), wanted, 1e-6, 1e-6)
    # two rows are another kernel's: equal within tolerance, not to the bit
    assert relative(shapeless(x[:2]), np.array(wanted[:2])) < TOLERANCE
    grad = mx.grad(lambda x: f(x).sum())(x)
    assert mx.allclose(mx.grad(lambda x: mx.checkpoint(f)(x).sum())(x), grad, 1e-5, 1e-5)


def test_compile_merges_equal_products_and_only_those():
    """is_equivalent: equal products run once, those that differ in orientation or format both."""
    p, x = packed(64, 64), normal(64, 64)
    q32 = format.Packed(p.words, mx.repeat(p.scales, 2, -1), mx.repeat(p.biases, 2, -1), format.Format(4, 32))
    mx.eval(q32.scales, q32.biases)

    def runs(f):
        before = sum(ops.kernel_calls().values())
        mx.eval(f(x))
        return sum(ops.kernel_calls().values()) - before

    assert runs(mx.compile(lambda x: ops.qmm(x, p) * ops.qmm(x, p))) == 1
    assert runs(mx.compile(lambda x: ops.qmm(x, p) * ops.qmm(x, p, transpose=False))) == 2
    assert runs(mx.compile(lambda x: ops.qmm(x, p) * ops.qmm(x, q32))) == 2


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", format.KERNEL_BITS)
def test_gather_equals_the_reference_for_every_way_of_indexing(bits, transpose):
    p = packed(40, 64, format.Format(bits, 32), lead=(5,))
    inner = 64 if transpose else 40
    x = normal(4, 3, inner)
    cases = [
        (x, mx.array([[0, 1], [3, 3], [2, 0]]), mx.array([[4, 0], [0, 4], [1, 1]])),
        (x, None, mx.array([0, 2, 2, 4])),  # sorted; experts 1 and 3 idle
        (x[:, None], None, mx.array([[3, 1], [0, 0], [1, 4], [2, 2]])),  # as SwitchLinear calls it
        (normal(5, 1, inner), mx.array([4, 3, 0]), mx.array([0, 1, 2], dtype=mx.uint32)),
        (normal(2, 5, 1, inner), None, None),
    ]
    for x, lhs, rhs in cases:
        if rhs is None:
            y = ops.gather_qmm(x, p, None, None, transpose)
            wanted = reference.gather_qmm(x, p, None, None, transpose)
        else:
            y = ops.gather_qmm(x, p, lhs, rhs, transpose, sorted_indices=False)
            wanted = reference.gather_qmm(x, p, lhs, rhs, transpose)
        assert y.shape == wanted.shape and relative(y, wanted) < TOLERANCE


@pytest.mark.parametrize("transpose", [True, False])
def test_gather_gradients_equal_those_of_the_dequantized_product(transpose):
    p = packed(40, 64, lead=(3,))
    x = normal(4, 2, 64 if transpose else 40)
    lhs, rhs = mx.array([0, 1, 3, 3, 0]), mx.array([2, 0, 0, 2, 2])
    g = normal(5, 2, 40 if transpose else 64, seed=2)
    w = weight(p)

    def ours(x, s, b):
        return (ops.gather_qmm(x, format.Packed(p.words, s, b, FMT), lhs, rhs, transpose) * g).sum()

    def plain(x, s, b):
        chosen = w(s, b)[rhs]
        return (x[lhs] @ (mx.swapaxes(chosen, -1, -2) if transpose else chosen) * g).sum()

    for got, wanted in zip(
        *(mx.grad(f, (0, 1, 2))(x, p.scales, p.biases) for f in (ours, plain)), strict=True
    ):
        assert got.shape == wanted.shape and relative(got, np.array(wanted)) < TOLERANCE
    tangents = [normal(*a.shape, seed=5 + i) for i, a in enumerate((x, p.scales, p.biases))]
    got, wanted = (mx.jvp(f, (x, p.scales, p.biases), tangents)[1][0] for f in (ours, plain))
    assert abs(got - wanted) < 1e-4 * abs(wanted)


def test_gather_vmaps_over_x_weights_and_indices():
    lanes = 2
    p = packed(40, 64, lead=(lanes, 3))
    x = normal(lanes, 4, 2, 64)
    lhs, rhs = mx.array([[0, 3], [1, 1]]), mx.array([[2, 0], [1, 2]])

    def product(x, q, s, b, lhs, rhs):
        return ops.gather_qmm(x, format.Packed(q, s, b, FMT), lhs, rhs)

    def lane(i):
        return format.Packed(p.words[i], p.scales[i], p.biases[i], FMT)

    everything = mx.vmap(product)(x, p.words, p.scales, p.biases, lhs, rhs)
    only_rhs = mx.vmap(product, in_axes=(None, None, None, None, None, 0))(
        x[0], p.words[0], p.scales[0], p.biases[0], lhs[0], rhs
    )
    for i in range(lanes):
        assert relative(everything[i], reference.gather_qmm(x[i], lane(i), lhs[i], rhs[i])) < TOLERANCE
        assert relative(only_rhs[i], reference.gather_qmm(x[0], lane(0), lhs[0], rhs[i])) < TOLERANCE


def test_gather_refuses_indices_out_of_range():
    p = packed(40, 64, lead=(3,))
    for lhs, rhs in (([0], [3]), ([0], [-1]), ([4], [0])):
        with pytest.raises(Exception, match="4 blocks and w 3 experts"):
            mx.eval(ops.gather_qmm(normal(4, 1, 64), p, mx.array(lhs), mx.array(rhs)))
    assert ops.qmm(normal(2, 64), packed(8, 64)).sum().item() is not None  # the stream lives on


def test_an_empty_sum_is_zero():
    p = packed(40, 64)
    empty = ops.dequantize(format.Packed(p.words[:0], p.scales[:0], p.biases[:0], FMT), "float16")
    assert empty.shape == (0, 64) and empty.dtype == mx.float16
    nothing = format.Packed(p.words[:0], p.scales[:0], p.biases[:0], FMT)
    assert mx.array_equal(ops.qmm(mx.zeros((3, 0)), nothing, transpose=False), mx.zeros((3, 64)))
    assert ops.qmm(mx.zeros((3, 64)), nothing).shape == (3, 0)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows, outputs", [(0, 40), (3, 0)])
def test_an_empty_product_has_gradients_of_zeros(rows, outputs, transpose):
    """MLX divides by the size of an empty update: without care the process dies."""
    p = ops.quantize(mx.ones((outputs, 64)), FMT)
    e = ops.quantize(mx.ones((2, outputs, 64)), FMT)
    inner = 64 if transpose else outputs

    def one(x, s, b):
        return ops.qmm(x, format.Packed(p.words, s, b, FMT), transpose).sum()

    def experts(x, s, b):
        chosen = format.Packed(e.words, s, b, FMT)
        return ops.gather_qmm(x, chosen, None, mx.array([1, 0, 1]), transpose).sum()

    for f, x, w in ((one, mx.ones((rows, inner)), p), (experts, mx.ones((3, rows, inner)), e)):
        arguments = (x, w.scales, w.biases)
        for got, of in zip(mx.grad(f, (0, 1, 2))(*arguments), arguments, strict=True):
            assert got.shape == of.shape and mx.all(got == 0)


def test_other_streams_and_several_threads_give_the_same_answers():
    p = packed(300, 512)
    xs = [normal(4, 512, seed=i) for i in range(4)]
    wanted = [reference.qmm(x, p) for x in xs]
    with mx.stream(mx.new_stream(mx.cpu)):
        assert relative(ops.qmm(xs[0], p), wanted[0]) < TOLERANCE
    worst = [0.0] * len(xs)

    def work(i):
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(30):
                worst[i] = max(worst[i], relative(ops.qmm(xs[i], p), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(worst) < TOLERANCE


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_the_number_of_threads_changes_nothing_but_the_time():
    code = (
        "import mlx.core as mx, hashlib, numpy as np; from mlxq import ops, format\n"
        "w = np.random.default_rng(0).standard_normal((1000, 512)).astype(np.float32)\n"
        "x = mx.array(np.random.default_rng(1).standard_normal((9, 512)).astype(np.float32))\n"
        "y = ops.qmm(x, ops.quantize(mx.array(w), format.Format(4, 64)))\n"
        "print(ops.threads(), hashlib.sha256(np.array(y)).hexdigest())"
    )
    outputs = {n: run_python(code, MLXQ_THREADS=str(n)).stdout.split() for n in (1, 2, 5)}
    assert {n: int(out[0]) for n, out in outputs.items()} == {1: 1, 2: 2, 5: 5}
    assert len({out[1] for out in outputs.values()}) == 1


@pytest.mark.parametrize("first", ["quantize", "qmm"])
def test_without_the_extension_whatever_comes_first_says_so_and_nothing_after_it(first):
    code = (
        "import sys, warnings; sys.modules['mlxq._ext'] = None\n"
        "import mlx.core as mx; from mlxq import ops, format\n"
        "fmt = format.Format(4, 64)\n"
        "packed = ops.quantize(mx.zeros((8, 64)), fmt, rule='mlx')\n"  # numpy's own, with and without it
        "warnings.simplefilter('always')\n"
        "print('begin', file=sys.stderr)\n"
        f"for name in ('{first}', 'qmm', 'quantize', 'qmm'):\n"
        "    ops.qmm(mx.zeros((1, 64)), packed) if name == 'qmm' else ops.quantize(mx.zeros((8, 64)), fmt)\n"
        "    print('next', file=sys.stderr)"
    )
    parts = run_python(code).stderr.removeprefix("begin\n").split("next\n")
    assert "could not be loaded" in parts[0] and parts[1:] == [""] * 4


def test_an_unknown_isa_is_refused_with_those_that_run_here():
    done = run_python("from mlxq import ops; print(ops.native_available())", MLXQ_ISA="sse9")
    assert done.returncode != 0 and "MLXQ_ISA=sse9 cannot be used: this CPU runs scalar" in done.stderr


@pytest.mark.parametrize("wanted", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_refused(wanted):
    done = run_python("from mlxq import ops; print(ops.threads())", MLXQ_THREADS=wanted)
    assert done.returncode != 0 and f"MLXQ_THREADS={wanted} is not a number of threads" in done.stderr


def test_an_mlx_whose_symbols_are_missing_is_named_with_the_one_that_is_wanted(monkeypatch):
    """With mlx 0.32.2 the loader says "undefined symbol": the sentence must say which mlx to install."""
    declared = ["numpy", "mlx[cpu]==9.8.7; platform_system == 'Linux'"]
    monkeypatch.setattr(native.importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setitem(sys.modules, "mlxq._ext", None)  # importing it raises ImportError
    monkeypatch.delattr("mlxq._ext", raising=False)
    module, error = native._load.__wrapped__()
    assert module is None
    assert error.endswith(f"for mlx 9.8.7 and this is mlx {mx.__version__}; run: pip install mlx==9.8.7")


def test_kernel_calls_tell_which_family_ran():
    p, x = packed(64, 128), normal(2, 128)
    for isa in ops.isa_levels():
        with ops.forced_isa(isa):
            name = ops.kernel_for(2, 64, 128, 4, 64)
            before = ops.kernel_calls()[name]
            mx.eval(ops.qmm(x, p))
            assert ops.kernel_calls()[name] == before + 1
    with pytest.raises(ValueError, match="cannot be used"), ops.forced_isa("nonsense"):
        pass


def with_parts(p, words=None, scales=None, biases=None):
    return format.Packed(
        p.words if words is None else words,
        p.scales if scales is None else scales,
        p.biases if biases is None else biases,
        FMT,
    )


BAD = {
    "x has K=127 but w holds K=128": (ValueError, lambda p: ops.qmm(normal(2, 127), p)),
    "x has N=128 but w holds N=96": (ValueError, lambda p: ops.qmm(normal(2, 128), p, transpose=False)),
    "x is int32; wanted float32": (TypeError, lambda p: ops.qmm(mx.zeros((2, 128), mx.int32), p)),
    "words are int32": (
        TypeError,
        lambda p: ops.qmm(normal(2, 128), with_parts(p, p.words.astype(mx.int32))),
    ),
    "scales have shape": (ValueError, lambda p: ops.qmm(normal(2, 128), with_parts(p, scales=p.scales[:5]))),
    "biases have shape": (
        ValueError,
        lambda p: ops.qmm(normal(2, 128), with_parts(p, biases=p.biases[:, :1])),
    ),
    "must be a positive multiple": (
        ValueError,
        lambda p: ops.qmm(mx.zeros((2, 0)), with_parts(p, p.words[:, :0], p.scales[:, :0], p.biases[:, :0])),
    ),
    "wanted (N, K * bits / 32)": (
        ValueError,
        lambda p: ops.qmm(normal(2, 128), with_parts(p, p.words[None], p.scales[None], p.biases[None])),
    ),
    "x has shape ()": (ValueError, lambda p: ops.qmm(mx.array(1.0), p)),
    "x has shape (128)": (ValueError, lambda p: ops.gather_qmm(normal(128), p)),
    "rhs_indices are float32": (
        TypeError,
        lambda p: ops.gather_qmm(normal(1, 128), p, None, mx.array([0.5])),
    ),
    "expected a numpy array, an mx.array": (TypeError, lambda p: ops.qmm([1.0], p)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_clear_error(message):
    error, call = BAD[message]
    with pytest.raises(error, match=re.escape(message)):
        mx.eval(call(packed(96, 128)))


# The compiled primitive checks 4 bits, Python the widths that stock MLX serves and numpy arrays.
EVERYWHERE = {
    "qmm: x has K=64 but w holds K=128": (ValueError, lambda x, p, i: ops.qmm(x(2, 64), p(40))),
    "qmm: x has N=39 but w holds N=40": (ValueError, lambda x, p, i: ops.qmm(x(2, 39), p(40), False)),
    "qmm: x has shape (": (ValueError, lambda x, p, i: ops.qmm(x(), p(40))),
    "qmm: words have shape (2, 40": (ValueError, lambda x, p, i: ops.qmm(x(2, 128), p(2, 40))),
    "gather_qmm: x has shape (128": (ValueError, lambda x, p, i: ops.gather_qmm(x(128), p(2, 40))),
    "gather_qmm: x has K=64": (ValueError, lambda x, p, i: ops.gather_qmm(x(2, 1, 64), p(2, 40))),
    "lhs_indices are float32; wanted integers": (
        TypeError,
        lambda x, p, i: ops.gather_qmm(x(1, 1, 128), p(2, 40), i([0.0]).astype(x().dtype), i([0])),
    ),
}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("array", [mx.array, np.array], ids=["mlx", "numpy"])
@pytest.mark.parametrize("message", EVERYWHERE)
def test_whatever_serves_a_product_refuses_in_the_same_words(message, array, bits):
    def x(*shape):
        return array(np.zeros(shape, np.float32))

    def weight(*shape):
        return ops.quantize(array(np.zeros((*shape, 128), np.float32)), format.Format(bits, 32))

    error, call = EVERYWHERE[message]
    with pytest.raises(error, match=re.escape(message)):
        call(x, weight, array)


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_other_dtypes_of_x_and_of_weights_are_refused_for_numpy_too(dtype):
    with pytest.raises(TypeError, match="qmm: x is .*; wanted float32, float16 or bfloat16"):
        ops.qmm(np.zeros((2, 128), dtype), packed(24, 128))
    with pytest.raises(TypeError, match="quantize: w is .*; wanted float32"):
        ops.quantize(np.zeros((2, 128), dtype), FMT, scale_dtype="float32")
    with pytest.raises(TypeError, match="got list"):
        ops.quantize([[1.0] * 64], FMT)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64), (0, 0)])
@pytest.mark.parametrize("rule", format.RULES)
def test_a_weight_of_zero_size_is_an_empty_packed(shape, rule):
    torch = pytest.importorskip("torch", reason="needs the package torch")
    for array in (np.zeros(shape, np.float32), mx.zeros(shape), torch.zeros(shape)):
        p = ops.quantize(array, FMT, rule)
        assert p.shape == shape and tuple(p.scales.shape) == (*shape[:-1], shape[-1] // 64)


def test_quantizing_is_the_same_for_numpy_mlx_and_torch():
    torch = pytest.importorskip("torch", reason="needs the package torch")
    w = np.random.default_rng(0).standard_normal((3, 20, 128)).astype(np.float32)
    for scale_dtype in format.STORAGE:
        wanted = format.quantize(w, FMT, "affine", scale_dtype)
        for array in (w, mx.array(w), torch.from_numpy(w)):
            got = ops.quantize(array, FMT, scale_dtype=scale_dtype)
            assert np.array_equal(bridge.to_numpy(got.words), wanted.words)
            assert np.array_equal(bridge.to_numpy(ops.dequantize(got, "float32")), format.dequantize(wanted))
