"""Arrays of one framework as arrays of another: numpy, mx.array, torch.Tensor, cupy.ndarray.

    from \\ to    mlx                       torch                         numpy         cupy
    mlx           itself                    shared; on mps through DLPack copy          copy
    torch cpu     copy, or shared again     itself                        shared        copy
    torch mps     shared through DLPack     itself                        copy          copy
    torch cuda    copy                      itself                        copy          shared
    numpy         copy                      shared                        itself        copy
    cupy          copy                      shared                        copy          itself

Shared arrays are one memory: a write to the tensor is seen in the mx.array. Each keeps the memory alive.
MLX 0.32.4 cannot take over memory of the CPU ("Cannot import a CPU array without a copy"), so a tensor that
torch allocated is copied. One that to_torch made of an mx.array is that array again. bfloat16, which numpy
lacks, is copied into float32 (exact). Nothing is rounded: a dtype without an exact counterpart is refused.

The mps column and row need a Mac with torch 2.12 or later. They have run against stand-ins only.
"""

from __future__ import annotations

import functools
import sys
import weakref

import mlx.core as mx
import numpy as np

from mlxq import format
from mlxq.format import dtype_name

# By name; float64 exists in MLX, on the CPU only, and complex128 and float8 do not.
MX_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
MX_DTYPES += ("float16", "bfloat16", "float32", "complex64")
TORCH_FOR_MPS = (2, 12)  # MPS tensors of older versions may lie in memory that only the GPU sees

# (address, bytes) of MLX's memory that a torch tensor shares -> the numpy array between the two. The tensor's
# storage holds the numpy array, which holds the mx.array: an entry lives exactly as long as the memory.
_shared: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def kind(array) -> str:
    """"numpy", "mlx", "torch" or "cupy": who made the array. Raises TypeError for anything else."""
    return _kind_of(type(array))


@functools.cache
def _kind_of(made: type) -> str:
    for base in made.__mro__:  # subclasses of arrays are defined anywhere
        module = base.__module__.split(".")[0]
        if module in ("numpy", "mlx", "torch", "cupy") and base.__name__ in ("ndarray", "array", "Tensor"):
            return module
    raise TypeError(
        f"expected a numpy array, an mx.array, a torch.Tensor or a cupy array, got {made.__name__}"
    )


def to_mx(array):
    """The same values as an mx.array of the same dtype; the module's text says which pairs share memory.

    Raises TypeError for dtypes without an exact counterpart: float64 (MLX would round it silently), float8,
    complex128 and numpy's rarer ones.
    """
    if isinstance(array, mx.array):
        return array
    which, name = kind(array), dtype_name(array)
    if name not in MX_DTYPES:
        raise TypeError(f"to_mx: {name} has no exact MLX counterpart; cast it to float32 first")
    if which == "torch":
        return _torch_to_mx(array, name)
    host = array.get() if which == "cupy" else array
    return mx.array(host.view(np.uint16)).view(mx.bfloat16) if name == "bfloat16" else mx.array(host)


def _torch_to_mx(tensor, name: str):
    torch = sys.modules["torch"]
    where = _device_type("to_mx", tensor)
    tensor = tensor.detach()
    if where == "mps" and mps_shares():
        torch.mps.synchronize()  # MLX has its own queue: what torch still computes would be read too early
        return mx.from_dlpack(tensor)
    if where == "cpu":
        shared = _shared_array(tensor, name)
        if shared is not None:
            return shared
    host = tensor if where == "cpu" else tensor.cpu()
    if name == "complex64":
        host = host.resolve_conj()
    if name == "bfloat16":
        return mx.array(host.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(host.numpy())


def _device_type(what: str, tensor) -> str:
    """"cpu", "mps", "cuda" ... Raises TypeError for tensors that hold no values, or not in strides."""
    if tensor.device.type == "meta":
        raise TypeError(f"{what}: the tensor is on torch's meta device and holds no values; load it first")
    if tensor.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{what}: the tensor is {tensor.layout}; pass tensor.to_dense()")
    return tensor.device.type


def _shared_array(tensor, name: str):
    """The mx.array whose memory a whole, contiguous CPU tensor is; None where it is not MLX's."""
    host = _shared.get((tensor.data_ptr(), tensor.nbytes))
    if host is None or not tensor.is_contiguous():
        return None
    array, dtype = host.base.obj, mx.bool_ if name == "bool" else getattr(mx, name)
    if array.dtype != dtype:
        array = array.reshape(-1).view(dtype)
    return array if array.shape == tuple(tensor.shape) else array.reshape(tensor.shape)


def is_shared(tensor) -> bool:
    """Whether to_mx gives a torch tensor's own memory, so that no later write to it can be missed."""
    where = tensor.device.type
    if where == "cpu":
        return (tensor.data_ptr(), tensor.nbytes) in _shared and tensor.is_contiguous()
    return where == "mps" and mps_shares()


def mps_shares() -> bool:
    """Whether MLX and torch's MPS tensors can share memory here: Metal on both sides, torch 2.12 or later."""
    version = sys.modules["torch"].__version__.split(".")
    return mx.metal.is_available() and (int(version[0]), int(version[1])) >= TORCH_FOR_MPS


def to_torch(array, device=None):
    """The same values as a torch.Tensor; the module's text says which pairs share memory.

    device   what torch.device takes; None: where the values lie, for MLX and numpy the CPU

    An mx.array is evaluated first, and a write to its tensor is a write to the array. Raises TypeError for
    dtypes that torch lacks, ImportError without torch.
    """
    import torch

    device = None if device is None else torch.device(device)
    which = kind(array)
    if which == "mlx":
        if device is not None and device.type == "mps" and mps_shares():
            return _mx_to_mps(array)
        tensor = _mx_to_cpu(array)
    elif which == "numpy":
        tensor = _numpy_to_torch(array)
    elif which == "cupy":
        tensor = _cupy_to_torch(array)
    else:
        tensor = array
    return tensor if device is None or tensor.device == device else tensor.to(device)


def _mx_to_cpu(array):
    torch = sys.modules["torch"]
    bits, dtype = array, None  # of another dtype where torch.from_numpy does not take the array's own
    if array.dtype == mx.bfloat16:
        bits, dtype = array.view(mx.int16), torch.bfloat16
    elif array.dtype == mx.uint64:
        bits, dtype = array.view(mx.int64), torch.uint64
    host = np.array(bits, copy=False)
    if array.size > 1 and not host.flags.c_contiguous and min(host.strides) <= 0:
        # Reversed rows are not for torch, and a write to a broadcast row would be a write to every row.
        host = np.array(mx.contiguous(bits), copy=False)
    tensor = torch.from_numpy(host)
    if host.flags.c_contiguous and host.nbytes:
        known = _shared.setdefault((tensor.data_ptr(), host.nbytes), host)
        if known is not host and known.dtype == host.dtype and known.shape == host.shape:
            tensor = torch.from_numpy(known)  # the entry lives as long as any tensor that needs it
    return tensor if dtype is None else tensor.view(dtype)


def _mx_to_mps(array):
    mx.eval(array)
    mx.synchronize()  # torch has its own queue and would not wait for MLX's
    return sys.modules["torch"].from_dlpack(array)


def _numpy_to_torch(array: np.ndarray):
    torch = sys.modules["torch"]
    if dtype_name(array) == "bfloat16":
        return _numpy_to_torch(array.view(np.uint16)).view(torch.bfloat16)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        text = f"to_torch: numpy's {array.dtype} has no counterpart in torch; cast it first"
        raise TypeError(text) from None


def _cupy_to_torch(array):
    torch, name = sys.modules["torch"], dtype_name(array)
    if name == "bfloat16":  # DLPack of cupy has no bfloat16
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def to_cupy(array):
    """The same values as a cupy array: a torch tensor on an NVIDIA GPU is shared, others are copied there.

    Raises TypeError for dtypes that numpy lacks (float8), RuntimeError without cupy.
    """
    which, name = kind(array), dtype_name(array)
    if which == "cupy":
        return array
    if name.startswith("float8"):
        raise TypeError(f"to_cupy: {name} has no cupy counterpart; cast it to float32 first")
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"to_cupy needs cupy (pip install 'mlxq[cuda]'): {error}") from None
    if which == "torch":
        _device_type("to_cupy", array)
        array = array.detach()
    if which == "torch" and array.is_cuda:
        if name != "bfloat16":
            return cupy.from_dlpack(array)
        return cupy.from_dlpack(array.view(sys.modules["torch"].int16)).view(_numpy_bfloat16())
    if name != "bfloat16":
        return cupy.asarray(to_numpy(array))
    return cupy.asarray(array if which == "numpy" else host_bits(array).view(_numpy_bfloat16()))


def _numpy_bfloat16():
    import importlib

    return importlib.import_module("ml_dtypes").bfloat16  # comes with cupy's own bfloat16


def to_numpy(array) -> np.ndarray:
    """The same values as a numpy array; bfloat16, which numpy lacks, becomes float32 (exact).

    A CPU tensor is shared. Raises TypeError for dtypes that numpy lacks (float8).
    """
    which = kind(array)
    if which == "numpy":
        return array
    if which == "torch":
        torch, name = sys.modules["torch"], dtype_name(array)
        _device_type("to_numpy", array)
        if name.startswith("float8"):
            raise TypeError(f"to_numpy: {name} has no numpy counterpart; cast it to float32 first")
        host = array.detach().cpu()
        return (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    if which == "cupy":
        host = array.get()
        return host.astype(np.float32) if dtype_name(array) == "bfloat16" else host
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def packed_on_mx(w: format.Packed):
    """(words, scales, biases) as mx.arrays. Of torch tensors they are remembered on w.

    What cannot be shared is copied once, and again after torch has counted a change of it (a write through
    tensor.data is not counted). Tensors whose changes are never counted, those made in inference mode or
    shared between processes, are copied at every call.
    """
    remembered = w.__dict__.get("_on_mx")
    if remembered is None:
        if any(kind(a) != "torch" for a in (w.words, w.scales, w.biases)):
            return to_mx(w.words), to_mx(w.scales), to_mx(w.biases)
        remembered = w.__dict__["_on_mx"] = _OnMx(w)  # Packed is frozen, its __dict__ is not
    return remembered.arrays(w)


class _OnMx:
    """What packed_on_mx remembers. It keeps the memory, so that an address alone tells which memory it is."""

    def __init__(self, w: format.Packed):
        parts = w.words, w.scales, w.biases
        self.addresses = tuple(a.data_ptr() for a in parts)
        self.shared = all(is_shared(a) for a in parts)
        self.counted = self.shared or not any(a.is_inference() or a.is_shared() for a in parts)
        self.versions = None if self.shared or not self.counted else tuple(a._version for a in parts)
        self.kept = None if self.shared else tuple(a.detach() for a in parts)
        self.on_mps = parts[0].device.type == "mps"
        self.mx = tuple(to_mx(a) for a in parts)

    def __reduce__(self):
        return type(None), ()  # copies and pickles of a Packed begin without

    def arrays(self, w: format.Packed):
        words, scales, biases = w.words, w.scales, w.biases
        same = self.counted and self.addresses == (words.data_ptr(), scales.data_ptr(), biases.data_ptr())
        if same and not self.shared:
            same = self.versions == (words._version, scales._version, biases._version)
        if not same:
            fresh = w.__dict__["_on_mx"] = _OnMx(w)
            return fresh.mx
        if self.on_mps:
            sys.modules["torch"].mps.synchronize()  # an optimizer may still be writing
        return self.mx


def like(array: np.ndarray, template, dtype: str | None = None):
    """A numpy array in the framework of `template`, cast to `dtype` (a bare name) when it is given."""
    which = kind(template)
    if which == "numpy":
        return array if dtype in (None, "bfloat16") else array.astype(dtype)
    if which == "mlx":
        import mlx.core as mx

        out = mx.array(array)
        return out if dtype is None else out.astype(getattr(mx, dtype))
    if which == "cupy":
        out = sys.modules["cupy"].asarray(array)
        return out if dtype is None else out.astype(dtype)  # ml_dtypes, cupy's need, registers "bfloat16"
    torch = sys.modules["torch"]
    out = torch.from_numpy(np.ascontiguousarray(array))
    return in_mx_memory(out if dtype is None else out.to(getattr(torch, dtype)), template.device)


def host_bits(array) -> np.ndarray:
    """A C-contiguous numpy view (copied only when it must be) of the stored bits; bfloat16: uint16."""
    which, name = kind(array), dtype_name(array)
    if which == "numpy":
        return np.ascontiguousarray(array)
    if which == "mlx":
        import mlx.core as mx

        array = mx.contiguous(array)
        return np.array(array.view(mx.uint16) if name == "bfloat16" else array, copy=False)
    torch = sys.modules["torch"]
    host = array.detach().cpu().contiguous()
    return (host.view(torch.uint16) if name == "bfloat16" else host).numpy()


def from_host_bits(bits: np.ndarray, template, dtype: str):
    """The reverse of host_bits, in the framework of `template`; numpy gets bfloat16 as float32 (exact)."""
    if dtype != "bfloat16":
        return like(bits, template)
    which = kind(template)
    if which == "numpy":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if which == "mlx":
        import mlx.core as mx

        return mx.array(bits).view(mx.bfloat16)
    torch = sys.modules["torch"]
    return in_mx_memory(torch.from_numpy(bits).view(torch.bfloat16), template.device)


def in_mx_memory(tensor, device=None):
    """A CPU tensor's values in memory that MLX can share; for another device, the tensor moved there."""
    if device is None or device.type == "cpu":
        return tensor if is_shared(tensor) else _mx_to_cpu(to_mx(tensor))
    return tensor.to(device)
