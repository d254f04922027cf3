"""Arrays cross between frameworks exactly, or are refused; shared memory lives as long as anyone needs it."""

import copy
import gc
import io
import itertools
import sys
import threading
import types

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, format, ops

torch = pytest.importorskip("torch", reason="needs the package torch")
VALUES = np.array([[0.0, -0.0, 1.5], [-2.0, 65504.0, np.inf]], np.float32)
FMT = format.Format(4, 64)


def example(name: str) -> np.ndarray:
    """Values of any supported dtype but bfloat16 (float32 then), its extremes among them."""
    if "float" in name:
        return VALUES.astype("float32" if name == "bfloat16" else name)
    if name == "bool":
        return np.array([[True, False, True]])
    if name == "complex64":
        return np.array([[1 + 2j, -0.5j]], np.complex64)
    return np.array([[np.iinfo(name).min, 3, np.iinfo(name).max]], name)


def tensor_of(name: str):
    values = torch.from_numpy(example(name))
    return values.to(torch.bfloat16) if name == "bfloat16" else values


@pytest.mark.parametrize("name", bridge.MX_DTYPES)
def test_every_dtype_arrives_exactly_in_both_directions(name):
    tensor, array = tensor_of(name), mx.array(example(name))
    array = array.astype(mx.bfloat16) if name == "bfloat16" else array
    assert format.dtype_name(tensor) == format.dtype_name(array) == name
    assert bridge.to_mx(tensor).dtype == array.dtype and mx.array_equal(bridge.to_mx(tensor), array)
    back = bridge.to_torch(array)
    assert back.dtype == tensor.dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert bridge.to_mx(array) is array and bridge.to_torch(tensor) is tensor
    wide = array.astype(mx.float32) if name == "bfloat16" else array
    assert np.array_equal(bridge.to_numpy(tensor), np.array(wide))
    assert np.array_equal(bridge.to_numpy(array), np.array(wide))
    if name != "bfloat16":
        assert torch.equal(bridge.to_torch(example(name)), tensor)
        assert mx.array_equal(bridge.to_mx(example(name)), array)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (4, 1, 2)])
def test_every_shape_arrives(shape):
    array = mx.arange(int(np.prod(shape))).reshape(shape).astype(mx.bfloat16)
    tensor = bridge.to_torch(array)
    assert tuple(tensor.shape) == shape and mx.array_equal(bridge.to_mx(tensor), array)
    assert bridge.to_mx(torch.zeros(shape)).shape == shape


def test_strided_grad_conjugated_and_subclassed_tensors_are_taken_as_they_are():
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    assert mx.array_equal(bridge.to_mx(tensor), mx.arange(12.0).reshape(3, 4).T)
    assert mx.array_equal(bridge.to_mx(tensor.bfloat16()[::2, 1:]), mx.arange(12.0).reshape(3, 4).T[::2, 1:])
    conjugated = bridge.to_mx(tensor_of("complex64").conj())
    assert mx.array_equal(conjugated, mx.conj(mx.array(example("complex64"))))
    assert mx.array_equal(bridge.to_mx(torch.nn.Parameter(torch.ones(3))), mx.ones(3))


@pytest.mark.parametrize("index", [np.s_[::-1], np.s_[:, ::-1], np.s_[:, 1:3], np.s_[1:]])
def test_strided_mlx_and_numpy_arrays_arrive(index):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(bridge.to_torch(mx.array(values)[index]).numpy(), values[index])
    assert np.array_equal(bridge.to_torch(mx.array(values).T[index]).numpy(), values.T[index])
    assert np.array_equal(bridge.to_torch(values[index]).numpy(), values[index])


def test_a_write_to_one_row_of_a_broadcast_array_stays_in_that_row():
    tensor = bridge.to_torch(mx.broadcast_to(mx.zeros((3,)), (2, 3)))
    tensor[0] = 1
    assert tensor.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_read_only_numpy_array_is_copied():
    values = np.zeros(3, np.float32)
    values.flags.writeable = False
    bridge.to_torch(values).add_(1)
    assert not values.any()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "uint32"])
def test_mlx_to_torch_is_one_memory_in_both_directions(name):
    array = mx.arange(6).astype(getattr(mx, name)).reshape(2, 3)
    tensor = bridge.to_torch(array)
    back = bridge.to_mx(tensor)
    tensor.view(-1)[1] = 5
    assert array.astype(mx.int32).tolist() == back.astype(mx.int32).tolist() == [[0, 5, 2], [3, 4, 5]]
    assert back.dtype == array.dtype and bridge.is_shared(tensor)
    assert bridge.to_torch(array).data_ptr() == bridge.to_torch(back).data_ptr() == tensor.data_ptr()


def test_sharing_an_array_twice_outlives_the_first_tensor():
    array = mx.arange(6)
    first, second = bridge.to_torch(array), bridge.to_torch(array)
    del first
    gc.collect()
    assert bridge.is_shared(second) and bridge.to_mx(second) is array


def test_a_shared_tensor_under_another_dtype_or_shape_is_still_shared():
    array = mx.array([[1, 2], [3, 0x80000004]], mx.uint32)
    as_int = bridge.to_torch(array).view(torch.int32).view(4)
    assert bridge.is_shared(as_int) and bridge.to_mx(as_int).tolist() == [1, 2, 3, 0x80000004 - 2**32]
    as_half = bridge.to_torch(array).view(torch.uint16)
    assert bridge.is_shared(as_half) and bridge.to_mx(as_half).tolist()[1] == [3, 0, 4, 0x8000]
    for part in (as_int[1:], as_int[:2], as_int[::2], as_int.view(2, 2).T):
        assert not bridge.is_shared(part) and bridge.to_mx(part).tolist() == part.tolist()


def test_torchs_own_memory_is_copied_and_its_copy_does_not_change():
    """If MLX ever shares memory of the CPU, bridge's text and this test have to say so."""
    tensor = torch.zeros(4)
    array = bridge.to_mx(tensor)
    tensor += 1
    assert mx.array_equal(array, mx.zeros(4)) and not bridge.is_shared(tensor)
    with pytest.raises(ValueError, match="without a copy"):
        mx.from_dlpack(tensor, copy=False)


def poison(count=30, size=50_000):
    """Give freed memory back and write over whatever the allocators hand out again."""
    gc.collect()
    mx.clear_cache()
    for i in range(count):
        a = mx.full((size,), -7.0 - i)
        mx.eval(a)
        torch.full((size,), -9.0 - i)


@pytest.mark.parametrize("half", [False, True])
def test_a_tensor_keeps_mlxs_memory_after_the_array_is_gone(half):
    kept = []
    for i in range(8):
        array = mx.full((50_000,), float(i)).astype(mx.bfloat16 if half else mx.float32)
        kept.append(bridge.to_torch(array)[1:])  # a view of it is enough
        del array
        poison(3)
    poison()
    assert all((t == i).all() for i, t in enumerate(kept))


def test_an_array_keeps_the_memory_after_the_tensor_is_gone():
    kept = []
    for i in range(8):
        tensor = bridge.to_torch(mx.full((50_000,), float(i)))
        kept.append(bridge.to_mx(tensor))
        kept.append(bridge.to_mx(torch.full((50_000,), float(i))))
        kept.append(bridge.to_mx(torch.full((50_000,), float(i)).numpy()))
        del tensor
        poison(3)
    poison()
    assert all(mx.all(a == i // 3).item() for i, a in enumerate(kept))


def test_results_keep_their_own_memory():
    """What upstream's binding got wrong: the output aliased an array that was already gone."""
    packed = ops.quantize(torch.ones(700, 64), FMT)
    kept = []
    for i in range(8):
        kept.append(ops.qmm(torch.full((70, 64), float(i)), packed))
        poison(3)
    wanted = ops.qmm(np.ones((1, 64), np.float32), packed)
    assert all(np.allclose(t.numpy(), i * wanted, rtol=1e-5) for i, t in enumerate(kept))


def test_nothing_is_kept_when_everybody_let_go():
    gc.collect()
    before = len(bridge._shared)
    tensors = [bridge.to_torch(mx.zeros((100 + i,))) for i in range(5)]
    assert len(bridge._shared) == before + 5
    mx.eval(mx.zeros((1,)))
    held = mx.get_active_memory()
    tensors.append(bridge.to_torch(mx.zeros((1_000_000,))))
    assert mx.get_active_memory() - held >= 4_000_000
    tensors.clear()
    gc.collect()
    assert len(bridge._shared) == before and mx.get_active_memory() <= held


def parts(packed):
    return packed.words, packed.scales, packed.biases


def own_memory(packed):
    return format.Packed(*(a.clone() for a in parts(packed)), packed.format)


def test_packed_weights_made_for_torch_lie_in_memory_that_mlx_shares():
    weight = torch.randn(24, 128, generator=torch.manual_seed(0))
    for storage in format.STORAGE:
        packed = ops.quantize(weight, FMT, scale_dtype=storage)
        assert all(bridge.is_shared(a) for a in parts(packed))
        assert bridge.packed_on_mx(packed)[0] is bridge.packed_on_mx(packed)[0]


@pytest.mark.parametrize("change", ["in place", "data", "data, in place"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_changed_weight_is_seen_at_the_next_product(shared, change):
    if change == "data, in place" and not shared:
        pytest.skip("torch does not count it: packed_on_mx says so")
    packed = ops.quantize(torch.randn(24, 128, generator=torch.manual_seed(0)), FMT)
    packed = packed if shared else own_memory(packed)
    x = torch.ones(1, 128)
    before = ops.qmm(x, packed).clone()
    for _ in range(3):
        if change == "in place":
            packed.scales.mul_(2)
            packed.biases.mul_(2)
        elif change == "data":
            packed.scales.data, packed.biases.data = packed.scales * 2, packed.biases * 2
        else:
            packed.scales.data.mul_(2)
            packed.biases.data.mul_(2)
        before *= 2
        assert torch.equal(ops.qmm(x, packed), before)


def test_changes_that_torch_does_not_count_are_seen_too():
    packed = ops.quantize(torch.randn(24, 128, generator=torch.manual_seed(0)), FMT)
    with torch.inference_mode():
        uncounted = own_memory(packed)
    between = own_memory(packed)
    for a in parts(between):
        a.share_memory_()
    for w in (uncounted, between):
        before = ops.qmm(torch.ones(1, 128), w).clone()
        for a in (w.scales, w.biases):
            a.numpy()[...] *= 2  # as another process would
        assert torch.equal(ops.qmm(torch.ones(1, 128), w), before * 2)


def test_a_used_packed_can_be_copied_and_saved():
    packed = ops.quantize(torch.randn(24, 128, generator=torch.manual_seed(0)), FMT)
    wanted = ops.qmm(torch.ones(1, 128), packed)
    file = io.BytesIO()  # plain pickle cannot read torch's uint32 back (torch 2.13)
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.copy(packed), copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert torch.equal(ops.qmm(torch.ones(1, 128), other), wanted)


@pytest.mark.parametrize("x_dtype, storage", list(itertools.product(format.STORAGE, format.STORAGE)))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_of_torch_tensors_are_those_of_mlx_to_the_bit(bits, x_dtype, storage):
    rng = torch.manual_seed(bits)
    fmt = format.Format(bits, 32)
    packed = ops.quantize(torch.randn(3, 40, 128, generator=rng), fmt, scale_dtype=storage)
    on_mx = format.Packed(*(mx.array(np.array(bridge.to_mx(a).view(mx.uint8))).view(bridge.to_mx(a).dtype)
                            for a in parts(packed)), fmt)  # fmt: skip
    one, one_mx = (format.Packed(*(a[1] for a in parts(p)), fmt) for p in (packed, on_mx))
    x = torch.randn(5, 2, 128, generator=rng).to(getattr(torch, x_dtype))
    x_mx, back = bridge.to_mx(x.clone()), torch.randn(4, 40, generator=rng).to(x.dtype)
    rhs = torch.tensor([0, 2, 2, 1, 0])
    for got, wanted in (
        (ops.qmm(x, one), ops.qmm(x_mx, one_mx)),
        (ops.qmm(back, one, transpose=False), ops.qmm(bridge.to_mx(back), one_mx, transpose=False)),
        (ops.gather_qmm(x, packed, None, rhs), ops.gather_qmm(x_mx, on_mx, None, mx.array(rhs.numpy()))),
        (ops.dequantize(packed), ops.dequantize(on_mx)),
    ):
        assert isinstance(got, torch.Tensor) and got.device.type == "cpu"
        assert format.dtype_name(got) == format.dtype_name(wanted)
        assert mx.array_equal(bridge.to_mx(got), wanted)


def test_a_product_of_torch_tensors_is_right_against_float64():
    rng = torch.manual_seed(1)
    packed = ops.quantize(torch.randn(40, 128, generator=rng), FMT)
    x = torch.randn(7, 128, generator=rng)
    codes = (packed.words.view(torch.int32)[..., None] >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    grouped = codes.reshape(40, 2, 64).double()
    w = (grouped * packed.scales[..., None].double() + packed.biases[..., None].double()).reshape(40, 128)
    wanted = x.double() @ w.T
    # 128 products and sums in float32: 128 * 2^-24 of the sum of sizes, which is below 12 of the norm here
    assert (ops.qmm(x, packed).double() - wanted).norm() < 1e-5 * wanted.norm()


def test_threads_share_a_packed_weight():
    packed = own_memory(ops.quantize(torch.randn(64, 128, generator=torch.manual_seed(0)), FMT))
    xs = [torch.randn(3, 128, generator=torch.manual_seed(i)) for i in range(4)]
    wanted = [ops.qmm(x, packed).clone() for x in xs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.equal(ops.qmm(xs[i], packed), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(2),
        np.zeros(2, ">f4"),
        np.zeros(2, np.complex128),
        np.array([object()]),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.zeros(2).to(torch.float8_e5m2),
    ],
    ids=lambda a: str(a.dtype),
)
def test_dtypes_without_an_exact_counterpart_are_refused(bad):
    with pytest.raises(TypeError, match="has no exact MLX counterpart; cast it to float32 first"):
        bridge.to_mx(bad)


def test_what_holds_no_values_or_no_counterpart_is_named():
    with pytest.raises(TypeError, match="got list"):
        bridge.kind([1.0])
    with pytest.raises(TypeError, match="got list"):
        bridge.to_mx([1])
    with pytest.raises(TypeError, match="meta device and holds no values"):
        bridge.to_mx(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match=r"torch.sparse_coo; pass tensor.to_dense\(\)"):
        bridge.to_mx(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="numpy's object has no counterpart in torch"):
        bridge.to_torch(np.array([object()]))
    with pytest.raises(TypeError, match="float8_e5m2 has no numpy counterpart"):
        bridge.to_numpy(torch.zeros(2).to(torch.float8_e5m2))
    packed = ops.quantize(torch.ones(24, 128), FMT)
    with pytest.raises(TypeError, match="qmm: x is float64; wanted float32, float16 or bfloat16"):
        ops.qmm(torch.zeros(1, 128, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="qmm: x has K=64 but w holds K=128"):
        ops.qmm(torch.zeros(1, 64), packed)
    elsewhere = format.Packed(*(a.as_subclass(OnMps) for a in parts(packed)), FMT)
    for op, x in ((ops.qmm, torch.zeros(1, 128)), (ops.gather_qmm, torch.zeros(1, 1, 128))):
        with pytest.raises(ValueError, match="qmm: x is on cpu but words on mps:0; move them together"):
            op(x, elsewhere)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_stored_bits_go_out_and_come_back(name):
    array = mx.array(VALUES).astype(getattr(mx, name))
    tensor = torch.from_numpy(VALUES).to(getattr(torch, name))
    bits = bridge.host_bits(array)
    assert bits.dtype.itemsize == (4 if name == "float32" else 2)
    assert np.array_equal(bits.view(np.uint8), bridge.host_bits(tensor).view(np.uint8))
    assert mx.array_equal(bridge.from_host_bits(bits, array, name), array)
    assert torch.equal(bridge.from_host_bits(bits, tensor, name), tensor)
    assert np.array_equal(bridge.from_host_bits(bits, VALUES, name), bridge.to_numpy(array))


class OnMps(torch.Tensor):
    """Stand-in for a tensor on Apple's GPU: nothing of this has run on Apple hardware."""

    device = property(lambda self: torch.device("mps", 0))


@pytest.fixture
def mps(monkeypatch):
    """The order in which the bridge calls both frameworks, with Metal and torch 2.12 pretended."""
    events = []

    def record(where, name, answer):
        def called(*arguments):
            events.append(name)
            return answer(*arguments)

        monkeypatch.setattr(where, name.partition(": ")[2], called)

    record(torch.mps, "torch: synchronize", lambda: None)
    record(mx, "mlx: synchronize", lambda *_: None)
    record(mx, "mlx: from_dlpack", lambda t: mx.array(t.as_subclass(torch.Tensor).numpy()))
    record(torch, "torch: from_dlpack", lambda a: torch.from_numpy(np.array(a)).as_subclass(OnMps))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    return events


def test_on_a_stand_in_mps_is_shared_and_each_side_waits_for_the_other(mps):
    tensor = torch.arange(3.0).as_subclass(OnMps)
    array = bridge.to_mx(tensor)
    assert mps == ["torch: synchronize", "mlx: from_dlpack"] and array.tolist() == [0, 1, 2]
    mps.clear()
    assert bridge.to_torch(array, "mps").tolist() == [0, 1, 2]
    assert mps == ["mlx: synchronize", "torch: from_dlpack"]


def test_on_a_stand_in_mps_products_stay_there_and_take_the_weight_over_once(mps):
    packed = ops.quantize(torch.ones(24, 128), FMT)
    there = format.Packed(*(a.as_subclass(OnMps) for a in parts(packed)), FMT)
    x = torch.ones(2, 128).as_subclass(OnMps)
    wanted = ops.qmm(torch.ones(2, 128), packed)
    for calls in (4, 1, 1):  # x and the three parts; x alone
        mps.clear()
        y = ops.qmm(x, there)
        assert isinstance(y, OnMps) and torch.equal(y.as_subclass(torch.Tensor), wanted)
        assert mps.count("mlx: from_dlpack") == calls and mps.count("torch: synchronize") >= 2
        assert mps[-2:] == ["mlx: synchronize", "torch: from_dlpack"]


def test_an_older_torch_or_a_machine_without_metal_copies_mps_tensors(monkeypatch, mps):
    for metal, version, shares in ((True, "2.12.0", True), (True, "2.11.1", False), (False, "2.13.0", False)):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        monkeypatch.setattr(torch, "__version__", version)
        assert bridge.mps_shares() == shares
    assert bridge.to_mx(torch.arange(3.0).as_subclass(OnMps)).tolist() == [0, 1, 2] and not mps


def test_cupy_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"to_cupy needs cupy \(pip install 'mlxq\[cuda\]'\)"):
        bridge.to_cupy(torch.zeros(3))
    with pytest.raises(TypeError, match="float8_e5m2 has no cupy counterpart"):
        bridge.to_cupy(torch.zeros(3).to(torch.float8_e5m2))


def test_on_a_stand_in_a_cuda_tensor_is_shared_with_cupy_and_others_are_copied(monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    calls = []
    fake = types.ModuleType("cupy")
    fake.from_dlpack = lambda t: calls.append("shared") or np.from_dlpack(t.as_subclass(torch.Tensor))
    fake.asarray = lambda a: calls.append("copied") or np.array(a)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(bridge, "_numpy_bfloat16", lambda: np.uint16)  # ml_dtypes comes with cupy
    assert bridge.to_cupy(torch.arange(3.0).as_subclass(OnCuda)).tolist() == [0, 1, 2]
    assert bridge.to_cupy(torch.ones(2).bfloat16().as_subclass(OnCuda)).tolist() == [0x3F80, 0x3F80]
    assert bridge.to_cupy(mx.arange(3)).tolist() == bridge.to_cupy(np.arange(3)).tolist() == [0, 1, 2]
    assert bridge.to_cupy(mx.ones((2,), mx.bfloat16)).tolist() == [0x3F80, 0x3F80]
    assert calls == ["shared", "shared", "copied", "copied", "copied"]
