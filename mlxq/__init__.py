"""A quantized language model that runs the same, and fast, wherever its owner puts it."""

__version__ = "0.1.0"


def __getattr__(name):
    # Lazily, so that `import mlxq` and `mlxq --help` load neither MLX nor mlx-lm.
    if name == "load":
        from mlxq.load import load

        return load
    if name == "load_torch":
        from mlxq.torch_model import load_torch

        return load_torch
    if name == "save":
        from mlxq.checkpoint.trained import save

        return save
    raise AttributeError(f"module 'mlxq' has no attribute {name!r}")
