"""The kernels that GPU tests will want, compiled here, without a GPU, into the cache folder, to be carried.

    MLXQ_CACHE=$PWD/cache python tools/compile_tests.py [-k EXPRESSION] [--sanitized] [--list]

Runs tests/test_cuda.py on tensors without values (torch's device "meta") and with a driver that does nothing:
what it would compile for an H200 is noted and then compiled on all cores, 2,700 kernels in six minutes of two
cores, which cost a lent GPU's minutes otherwise. A test that needs values ends where it needs them, so a few
kernels are missing. --sanitized: the tests of tools/sanitize_cuda.py, with its options.
--list: (file, options) as lines of JSON instead of compiling.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import bench_common as common  # noqa: E402
import bench_cuda as bench  # noqa: E402
import sanitize_cuda  # noqa: E402


class Driver:
    """libcuda of a GPU that does whatever it is told."""

    cuLaunchKernelEx = cuTensorMapEncodeTiled = staticmethod(lambda *a: 0)  # noqa: N815 (the driver's names)
    cuFuncSetAttribute = staticmethod(lambda *a: 0)  # noqa: N815


class Generator:
    """torch's, which is no use for tensors without values."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return None


class Recorder:
    """A plugin of pytest: tests run on meta tensors, and `found` gets (file, options) of kernels."""

    def __init__(self):
        self.found: dict[tuple, None] = {}
        self.patched = contextlib.ExitStack()

    def kernel(self, device, file, function, flags, shared_bytes):
        from mlxq.ops import cuda

        self.found[file, flags] = None
        return cuda.Kernel(Driver, None, shared_bytes, function)

    def patches(self, tests):
        """(object, name, stand-in) of all that wants a GPU or values."""
        import numpy as np
        import torch

        from mlxq import bridge, ops
        from mlxq.ops import cuda

        resident = {1: 132, 2: 66, 3: 39, 4: 30}  # clusters of so many blocks on an H200
        nothing = np.zeros((37, 640), np.float32)
        meta = {"device": "meta"}
        stand_ins = mock.MagicMock  # graphs and streams
        for name in ("qmm", "gather_qmm", "dequantize"):
            yield ops, name, getattr(cuda, name)
        yield ops, "q8_rows", lambda x, g=None: (x, x) if isinstance(x, np.ndarray) else cuda.q8_rows(x, g)
        yield ops, "q8mm", lambda x, s, w, per_row=False, dtype="float32": cuda.q8mm(x, s, w, per_row, dtype)
        yield ops, "quantize", lambda w, f, rule=None, scale_dtype="float32": cuda.quantize(w, f, scale_dtype)
        yield bridge, "to_numpy", lambda array: nothing
        yield np, "array_equal", lambda *a: True
        for name in ("qmm", "gather_qmm", "q8mm", "q8_rows"):
            yield tests.reference, name, lambda *a, **k: nothing
        yield tests, "torch_gpu", lambda: torch
        yield tests, "exact", lambda w: torch.empty(w.N, w.K, dtype=torch.float64, **meta)
        for name in ("relative", "error"):
            yield tests, name, lambda *a: 0.0
        yield tests, "of_experts", lambda *a: None
        yield torch, "Generator", Generator
        yield torch, "equal", lambda *a: True
        yield torch.Tensor, "__bool__", lambda tensor: True
        yield torch.cuda, "current_device", lambda: 0
        for name in ("synchronize", "_sleep"):
            yield torch.cuda, name, lambda *a: None
        for name in ("CUDAGraph", "Stream", "graph", "stream"):
            yield torch.cuda, name, stand_ins
        yield cuda, "_device", lambda index: bench.H200
        yield cuda, "_kernel", self.kernel
        yield cuda, "_driver", lambda: Driver
        yield cuda, "_take_context", lambda device: None
        yield cuda, "_clusters_at_once", lambda kernel, threads, ranks: resident.get(ranks, 17)
        yield cuda._Product, "_quick", lambda *a: cuda._Product._checked
        for name, answer in {
            "on": lambda device: contextlib.nullcontext(),
            "stream": lambda device: 0,
            "current_device": lambda: 0,
            "pointer": lambda tensor: 1024,
            "usable": lambda tensor, device: True,
            "describe": lambda tensor: (1024, tensor.shape, tensor.dtype, 0, True),
            "empty": lambda shape, dtype, device: torch.empty(shape, dtype=getattr(torch, dtype), **meta),
            "indices": lambda given, batch, device: torch.empty(
                batch if given is None else given.shape, dtype=torch.int32, **meta
            ),
            "broadcast": lambda a, b: torch.broadcast_tensors(a, b),
        }.items():
            yield cuda._Torch, name, staticmethod(answer)

    def pytest_collection_modifyitems(self, items):
        from torch.overrides import TorchFunctionMode

        class OnMeta(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                kwargs = dict(kwargs or {})
                if str(kwargs.get("device", "")).startswith("cuda"):
                    kwargs["device"] = "meta"
                return function(*args, **kwargs)

        for tests in {item.module for item in items}:
            for where, name, stand_in in self.patches(tests):
                self.patched.enter_context(mock.patch.object(where, name, stand_in, create=True))
        self.patched.enter_context(OnMeta())


def recorded(expression: str | None) -> list[tuple]:
    """(file, options) of the kernels that the tests of this expression want."""
    import pytest

    plugin = Recorder()
    command = [str(sanitize_cuda.TESTS), "-q", "-p", "no:cacheprovider", "--tb=no", "--no-summary"]
    with plugin.patched, open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        pytest.main([*command, *(["-k", expression] if expression else [])], plugins=[plugin])
    return list(plugin.found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", dest="expression", help="as pytest's")
    parser.add_argument("--sanitized", action="store_true", help="of tools/sanitize_cuda.py")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    found = []
    if args.sanitized:
        os.environ["MLXQ_TEST_REPEATS"] = "1"  # other shapes in some tests
    for options in sanitize_cuda.OPTIONS.values() if args.sanitized else [""]:
        with mock.patch.dict(os.environ, {"MLXQ_NVRTC_OPTIONS": options}):
            found += recorded(args.expression or (sanitize_cuda.EXPRESSION if args.sanitized else None))
    if not found:
        return 1
    if not args.list:
        return int(bench.compile_kernels(found, common.cores()) > 0)
    for one in found:
        print(json.dumps(one))
    return 0


if __name__ == "__main__":
    sys.exit(main())
