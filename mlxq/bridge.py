"""Arrays of one framework as arrays of another: numpy, mx.array, torch.Tensor, cupy.ndarray."""

from __future__ import annotations

import sys

import numpy as np

from mlxq.format import dtype_name


def kind(array) -> str:
    """"numpy", "mlx", "torch" or "cupy": who made the array. Raises TypeError for anything else."""
    if isinstance(array, np.ndarray):
        return "numpy"
    module = type(array).__module__.split(".")[0]
    if module in ("mlx", "torch", "cupy"):
        return module
    raise TypeError(
        f"expected a numpy array, an mx.array, a torch.Tensor or a cupy array, got {type(array).__name__}"
    )


def to_mx(array):
    """The same values as an mx.array; mx.array is returned as it is, the others are copied.

    Raises TypeError for float64 (MLX would round it silently: cast first) and for float8.
    """
    import mlx.core as mx

    if isinstance(array, mx.array):
        return array
    which, name = kind(array), dtype_name(array)
    if name == "float64" or name.startswith("float8"):
        raise TypeError(f"to_mx: {name} has no exact MLX counterpart; cast it to float32 first")
    if which == "numpy":
        return mx.array(array)
    torch = sys.modules["torch"]
    host = array.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return mx.array(host.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(host.numpy())


def to_numpy(array) -> np.ndarray:
    """The same values as a numpy array; bfloat16, which numpy lacks, becomes float32 (exact)."""
    which = kind(array)
    if which == "numpy":
        return array
    if which == "torch":
        torch = sys.modules["torch"]
        host = array.detach().cpu()
        return (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    if which == "cupy":
        host = array.get()
        return host.astype(np.float32) if dtype_name(array) == "bfloat16" else host
    import mlx.core as mx

    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


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
    out = torch.from_numpy(np.ascontiguousarray(array)).to(template.device)
    return out if dtype is None else out.to(getattr(torch, dtype))


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
    return torch.from_numpy(bits).view(torch.bfloat16).to(template.device)
