"""mlx-lm's own model class, built without weights: it knows names, shapes and what can be quantized."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# What a model's constructor raises when config.json lies: mlx-lm checks little of it, and by assertions.
CONFIG_LIES = (
    ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    RuntimeError,  # MLX's own
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def model_classes(config: dict, folder: Path, trust_remote_code: bool) -> tuple[type, type]:
    """(Model, ModelArgs) of mlx-lm for this configuration.

    Raises ValueError for an unknown model_type (with near ones) and, unless trust_remote_code, for a
    configuration that names Python code of its own (`model_file`).
    """
    import mlx_lm.models
    from mlx_lm.utils import _get_classes

    if (model_file := config.get("model_file")) is not None:
        if not trust_remote_code:
            raise ValueError(
                f"{folder}: config.json wants to run {model_file!r}; code runs only with trust_remote_code"
            )
        spec = importlib.util.spec_from_file_location("custom_model", folder / model_file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Model, module.ModelArgs
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{folder}: config.json has no model_type, so the architecture is unknown")
    try:
        return _get_classes(config)
    except ValueError:
        known = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
        near = difflib.get_close_matches(model_type, known, n=4, cutoff=0.5)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(
            f"{folder}: mlx-lm {mlx_lm.__version__} has no model of type {model_type!r} "
            f"({len(known)} files in mlx_lm/models){hint}"
        ) from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: config.json's architectures are no list of names: {error}") from None


class Skeleton:
    """A model whose parameters are lazy and never evaluated, so it costs no memory.

    tensors   how many the checkpoint holds: a model has no more blocks, and is not built with more

    Raises ValueError when config.json does not make a model.
    """

    def __init__(self, config: dict, folder: Path, trust_remote_code: bool = False, tensors: int = 1 << 20):
        self._arguments = config, folder, trust_remote_code, tensors
        text = config.get("text_config")
        for said in (config, text if isinstance(text, dict) else {}):
            for name in _LAYER_COUNTS:
                if isinstance(said.get(name), int | float) and said[name] > tensors:
                    raise ValueError(
                        f"{folder}: config.json says {name}: {said[name]}, but there are {tensors} tensors"
                    )
        model_class, arguments = model_classes(config, folder, trust_remote_code)
        try:
            self.model: nn.Module = model_class(arguments.from_dict(config))
        except CONFIG_LIES as error:
            # MLX's own errors list signatures on further lines
            said = f"{type(error).__name__}: {error}".removesuffix(": ").splitlines()[0]
            raise ValueError(f"{folder}: config.json makes no {config['model_type']}: {said}") from None

    def copy(self) -> Skeleton:
        """Another of the same configuration: sanitize may change one."""
        return Skeleton(*self._arguments)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """mlx-lm's renaming, stacking and dropping of tensors, all lazy; can change the model (tied head)."""
        if not hasattr(self.model, "sanitize"):
            return weights
        try:
            return self.model.sanitize(weights)
        except KeyError as error:
            raise ValueError(f"the checkpoint lacks the tensor {error.args[0]}") from None
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"mlx-lm cannot arrange the checkpoint's tensors: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, in the model's own order."""
        return {name: tuple(array.shape) for name, array in tree_flatten(self.model.parameters())}

    def quantizable(self) -> dict[str, nn.Module]:
        """Modules that mlx-lm can quantize, by path."""
        modules = tree_flatten(self.model.leaf_modules(), is_leaf=nn.Module.is_module)
        return {path: m for path, m in modules if hasattr(m, "to_quantized") and "weight" in m}

    def wanted(self, path: str, module: nn.Module) -> bool | dict:
        """The model's own opinion: whether to quantize this module, or with which settings."""
        predicate = getattr(self.model, "quant_predicate", None)
        return True if predicate is None else predicate(path, module)

    def may_cast(self, name: str) -> bool:
        """Whether the parameter may change its dtype (mlx-lm keeps a few in float32)."""
        predicate = getattr(self.model, "cast_predicate", None)
        return predicate is None or bool(predicate(name))

    def check(self, have: dict[str, tuple[int, ...]], source: Path | str) -> None:
        """Raises ValueError unless the tensors are exactly the model's parameters, shape by shape."""
        shapes = self.shapes()
        empty = [name for name, shape in have.items() if 0 in shape]
        missing = [name for name in shapes if name not in have]
        extra = [name for name in have if name not in shapes]
        wrong = [name for name in shapes if name in have and have[name] != shapes[name]]
        if empty:
            raise ValueError(f"{source}: zero-size tensors: {_some(empty)}")
        if missing:
            raise ValueError(f"{source}: tensors are missing: {_some(missing)}")
        if extra:
            raise ValueError(f"{source}: tensors that the model does not have: {_some(extra)}")
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{source}: {name} has shape {have[name]} but config.json asks for {shapes[name]}"
                + (f" ({len(wrong)} tensors disagree)" if len(wrong) > 1 else "")
            )


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
