"""A Metal device for the host code in metal/eval_metal.cpp, on a machine that has none.

    device = Device()                     # builds the extension with MLXQ_FAKE_METAL into build/fake_metal
    with device.on():                     # CPU streams are Metal streams now
        y = device.module.qmm(...)        # primitive -> host code -> shader text on tools/msl -> answer
    device.dispatches                     # what ran: kernel, arguments, grid, threads, constants

Every dispatch is held against metal/shaders/kernels.json: the buffers and their sizes, the constants, the
grid. What is wrong there, and what the harness finds (accesses out of bounds, diverging barriers), is in
device.defects; on() raises it when the block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shader_cases import KERNELS, geometry

from tools.msl import harness, source

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fake_metal"
INSTANCE = re.compile(
    r'\ntemplate \[\[host_name\("(\w+)"\)\]\] \[\[kernel\]\] decltype\((\w+)<(.*)>\) \2<\3>;\n\Z'
)
NUMPY = {"float": np.float32, "half": np.float16, "bfloat": np.uint16, "int": np.int32, "uint": np.uint32}
NUMPY["atomic_uint"] = np.uint32

COMPILE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)
FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
RUN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_int),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
)


def tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def build() -> Path:
    """The extension with the fake device, compiled when its sources changed. Raises CalledProcessError."""
    cmake = tool("cmake")
    if not (BUILD / "build.ninja").exists():
        flags = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DMLXQ_FAKE_METAL=ON"]
        flags += [f"-DPython_EXECUTABLE={sys.executable}"]
        subprocess.run([cmake, "-S", ROOT / "metal", "-B", BUILD, *flags], check=True, capture_output=True)
    subprocess.run([cmake, "--build", BUILD], check=True, capture_output=True)
    return next(BUILD.glob("_ext.*"))


@dataclass(frozen=True)
class Dispatch:
    kernel: str
    arguments: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    constants: dict[str, int]


class Device:
    def __init__(self):
        path = build()
        loader = importlib.machinery.ExtensionFileLoader("mlxq_on_fake_metal._ext", str(path))
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))
        self.compiled = {}  # library -> (harness library, {host name: (kernel, template arguments)})
        self.dispatches: list[Dispatch] = []
        self.defects: list[str] = []
        self.refusal: str | None = None  # what the compiler says to every text
        self.callbacks = COMPILE(self._compile), FIND(self._find), RUN(self._run)
        self.library.mlxq_fake_callbacks(*self.callbacks)

    @contextlib.contextmanager
    def on(self, architecture: str = "applegpu_g15s", generation: int = 15, macos: str = "15.0"):
        """CPU streams are this GPU's inside the block. Raises AssertionError for any defect."""
        self.dispatches.clear()
        self.defects.clear()
        self.library.mlxq_fake_temporaries()
        self.library.mlxq_fake_device(1, architecture.encode(), generation, macos.encode())
        try:
            yield self
        finally:
            self.library.mlxq_fake_device(0, architecture.encode(), generation, macos.encode())
        assert not self.defects, "\n".join(self.defects)

    def ran(self) -> list[str]:
        return [d.kernel for d in self.dispatches]

    def temporaries(self) -> int:
        """Arrays handed to add_temporary since the last question."""
        return self.library.mlxq_fake_temporaries()

    def _compile(self, library, text, message, room) -> int:
        try:
            if self.refusal:
                raise harness.CompileError(self.refusal)
            text = text.decode("ascii")
            found = INSTANCE.search(text)
            if found:
                names = {found[1]: (found[2], found[3])}
                text = text[: found.start() + 1]
            else:
                plain = [k for k in source.kernels(text).values() if not k.template]
                names = {k.name: (k.name, "") for k in plain}
            self.compiled[library] = harness.compile(text, list(names.values())), names
            return 0
        except Exception as error:
            said = str(error).encode()[: room - 1] + b"\0"
            ctypes.memmove(message, said, len(said))
            return 1

    def _find(self, library, kernel) -> int:
        return 0 if kernel.decode() in self.compiled[library][1] else 1

    def _run(self, kernel, count, index, data, sizes, writable, grid, threads) -> None:
        try:
            name = kernel.decode()
            compiled, names = next(c for c in self.compiled.values() if name in c[1])
            function, arguments = names[name]
            bound = {index[i]: (data[i], sizes[i], bool(writable[i])) for i in range(count)}
            self._dispatch(compiled, function, arguments, bound, tuple(grid[:3]), tuple(threads[:3]))
        except Exception:
            self.defects.append(traceback.format_exc())

    def _dispatch(self, compiled, function, arguments, bound, grid, threads) -> None:
        row = KERNELS[function]
        given = arguments.split(", ") if arguments else []
        values = {n: int(a) if a.isdigit() else a for n, a in zip(row["template"], given, strict=True)}
        assert sorted(bound) == list(range(len(row["buffers"]))), f"{function}: bound are {sorted(bound)}"
        buffers = {}
        for i, (what, type_, _) in enumerate(row["buffers"]):
            address, size, writable = bound[i]
            element = re.sub(r"constant|const|device|[*&\s]", "", type_)
            dtype = NUMPY[values.get(element, element)]
            array = np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
            is_output = "device" in type_ and "const" not in type_.split()
            assert writable == is_output, f"{function}: {what} is bound as {'in' if is_output else 'out'}put"
            buffers[i] = array[0] if "&" in type_ else array
            if "&" in type_:
                assert array.size == 1
                values[what] = int(array[0])
        numbers = {n: v for n, v in values.items() if isinstance(v, int)}
        if "partials" in (what for what, _, _ in row["buffers"]):  # the grid's last axis has the splits
            numbers.setdefault("splits", grid[2] if "BM" in numbers else grid[1])
        named = {what: buffers[i] for i, (what, _, _) in enumerate(row["buffers"])}
        if function == "q8_rows":
            numbers["M"] = named["scales"].size
        if "lhs" in named:
            numbers["B"] = named["lhs"].size
            numbers["E"] = named["scales"].size * numbers["group_size"] // (numbers["N"] * numbers["K"])
            numbers["tiles"] = named.get("tiles", np.empty(0)).size // 3
        for what, (_, type_, shape) in zip(named, row["buffers"], strict=True):
            wanted = shape_of(shape, numbers)
            if "&" not in type_ and wanted is not None:
                got = named[what].size
                assert got == wanted, f"{function}: {what} has {got} elements; the table: {shape} = {wanted}"
        wanted = geometry(function, tuple(values[n] for n in row["template"]), numbers)
        assert (grid, threads) == wanted, f"{function}: grid {grid} of {threads}, the table says {wanted}"
        constants = {n: numbers[n] for n, type_, _ in row["buffers"] if "&" in type_}
        self.dispatches.append(Dispatch(function, arguments, grid, threads, constants))
        compiled.run((function, arguments), buffers, grid=grid, threadgroup=threads)


def shape_of(shape: str, numbers: dict[str, int]) -> int | None:
    """Elements of "(N, K * bits / 32)"; None where a name is not known."""
    try:
        parts = eval(shape, {"__builtins__": {}}, numbers)
    except (NameError, SyntaxError):
        return None
    return int(np.prod([int(p) for p in (parts if isinstance(parts, tuple) else (parts,))]))
