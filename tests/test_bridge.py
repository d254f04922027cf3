"""Arrays cross between frameworks exactly, or are refused."""

import mlx.core as mx
import numpy as np
import pytest

from mlxq import bridge, format

torch = pytest.importorskip("torch", reason="needs the package torch")
VALUES = np.array([[0.0, -0.0, 1.5], [-2.0, 65504.0, np.inf]], np.float32)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "uint32", "int32", "uint8"])
def test_every_dtype_arrives_exactly(name):
    values = VALUES if "float" in name else np.array([[0, 1, 255]], np.int64)
    torch_name = {"uint32": "uint32"}.get(name, name)
    tensor = torch.from_numpy(values).to(getattr(torch, torch_name))
    array = mx.array(values).astype(getattr(mx, name))
    assert format.dtype_name(tensor) == format.dtype_name(array) == name
    assert bridge.to_mx(tensor).dtype == array.dtype and mx.array_equal(bridge.to_mx(tensor), array)
    assert bridge.to_mx(array) is array
    wide = array.astype(mx.float32) if name == "bfloat16" else array
    assert np.array_equal(bridge.to_numpy(tensor), np.array(wide))
    assert np.array_equal(bridge.to_numpy(array), np.array(wide))


def test_strided_and_grad_tensors_are_taken_as_they_are():
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    assert mx.array_equal(bridge.to_mx(tensor), mx.arange(12.0).reshape(3, 4).T)


def test_the_copy_does_not_alias_its_source():
    tensor = torch.zeros(4)
    array = bridge.to_mx(tensor)
    tensor += 1
    assert mx.array_equal(array, mx.zeros(4))


@pytest.mark.parametrize(
    "bad", [np.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2).to(torch.float8_e4m3fn)]
)
def test_dtypes_without_an_exact_counterpart_are_refused(bad):
    with pytest.raises(TypeError, match="has no exact MLX counterpart; cast it to float32 first"):
        bridge.to_mx(bad)


def test_anything_else_is_named():
    with pytest.raises(TypeError, match="got list"):
        bridge.kind([1.0])
    with pytest.raises(TypeError, match="got list"):
        bridge.to_mx([1])


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
