"""Metal shaders as CUDA text for NVRTC, compiled, and run with cupy.

The text is metal.h's CUDA half, the shader without address spaces, and an `extern "C" __global__` function
for each instantiation. Only NVRTC compiles it: its option -default-device makes every function of the shader
a device function; nvcc has no such option.
"""

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.msl import harness, source

# No contraction and no flushing, as the CPU harness; line numbers for compute-sanitizer.
OPTIONS = ("-default-device", "-std=c++17", "-fmad=false", "-lineinfo", "-w")


@dataclass(frozen=True)
class Program:
    """CUDA text and, for each entry as harness.entry_name writes it, its function and kernel."""

    text: str
    functions: dict[str, str]
    kernels: dict[str, source.Kernel]


def cuda(sources, instantiate, defines=None, include=(), replace=None, function_constants=None) -> Program:
    """CUDA text of shaders; arguments as harness.compile's, and the function constants {index: value}."""
    text = source.flatten(sources, include, replace)
    kernels = source.kernels(text)
    constants = function_constants or {}

    def constant(match: re.Match) -> str:
        type_, name, index = match[1], match[2], int(match[3])
        given = constants.get(index, 0)
        value = str(bool(given)).lower() if type_ == "bool" else str(given)
        known = str(index in constants).lower()
        return f"constexpr {type_} {name} = {value}; constexpr bool {name}_is_defined = {known};"

    text = source.FUNCTION_CONSTANT.sub(constant, text)
    body = source.without_address_spaces(text, lambda type_, name, size: f"__shared__ {type_} {name}{size};")
    header = (harness.HERE / "metal.h").read_text().replace("#pragma once", "")
    parts = [f"#define {name} {value}" for name, value in (defines or {}).items()]
    parts += ["#define __METAL__ 1", "#define __METAL_VERSION__ 310", '#line 1 "metal.h"', header, body]
    parts += ['#line 1 "entries"']
    functions, found = {}, {}
    for number, (name, arguments) in enumerate(instantiate):
        kernel = kernels[name]
        instance = f"{name}<{arguments}>" if kernel.template else name
        buffers = sorted(p.buffer for p in kernel.parameters if p.buffer >= 0)
        values = [
            f"msl::{p.kind.capitalize()}{{b{p.buffer}}}" if p.buffer >= 0 else source.BUILTINS[p.kind]
            for p in kernel.parameters
        ]
        declared = ", ".join(f"void* b{n}" for n in buffers)
        function = f"msl_entry_{number}"
        parts.append(
            f'extern "C" __global__ void {function}({declared}) {{ {instance}({", ".join(values)}); }}'
        )
        entry = harness.entry_name((name, arguments))
        functions[entry], found[entry] = function, kernel
    return Program("\n".join(parts) + "\n", functions, found)


@functools.cache
def nvrtc_library() -> str | None:
    """Path of libnvrtc: what MLXQ_NVRTC names, else of package nvidia-cuda-nvrtc, else the toolkit's."""
    if "MLXQ_NVRTC" in os.environ:
        return os.environ["MLXQ_NVRTC"]
    places = [Path(folder or ".", "nvidia") for folder in sys.path] + [Path("/usr/local")]
    patterns = ("*/lib/libnvrtc.so.*", "cuda*/lib64/libnvrtc.so.*", "cuda*/targets/*/lib/libnvrtc.so.*")
    found = [p for place in places for pattern in patterns for p in sorted(place.glob(pattern))]
    return next((str(p) for p in found if "alt" not in p.name), None)


@functools.cache
def nvrtc() -> ctypes.CDLL:
    path = nvrtc_library()
    if path is None:
        raise FileNotFoundError("no NVRTC: pip install 'nvidia-cuda-nvrtc==13.0.*', or set MLXQ_NVRTC")
    # It loads its builtins by name, so they are loaded first from beside it.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
        if "alt" not in builtins.name:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def cubin(program: Program, arch: str = "sm_90") -> bytes:
    """Machine code of a program. Raises harness.CompileError with NVRTC's words."""
    library = nvrtc()
    handle = ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            raise harness.CompileError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")

    def result(what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(library, f"nvrtcGet{what}Size")(handle, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        check(getattr(library, f"nvrtcGet{what}")(handle, data))
        return data.raw

    text = program.text.encode()
    check(library.nvrtcCreateProgram(ctypes.byref(handle), text, b"shader.cu", 0, None, None))
    try:
        options = [f"-arch={arch}".encode(), *(option.encode() for option in OPTIONS)]
        if library.nvrtcCompileProgram(handle, len(options), (ctypes.c_char_p * len(options))(*options)):
            raise harness.CompileError(result("ProgramLog").decode(errors="replace")[:4000])
        return result("CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))


class Module:
    """Compiled entries on the first GPU, through cupy; run() takes what the CPU harness' run() takes."""

    def __init__(self, path: Path, functions: dict[str, str], kernels: dict[str, source.Kernel]):
        import cupy

        self.cupy = cupy
        self.functions = functions
        self.kernels = kernels
        self.module = cupy.RawModule(path=str(path))

    def run(self, entry, buffers: dict, grid, threadgroup) -> None:
        """Run one dispatch; arrays bound to writable buffers hold its output afterwards.

        Every array is an allocation of its own, so that memcheck sees an access past its end.
        """
        name = harness.entry_name(entry)
        parameters = {p.buffer: p for p in self.kernels[name].parameters if p.buffer >= 0}
        if set(parameters) != set(buffers):
            raise ValueError(f"run: {name} has buffers {sorted(parameters)}, given are {sorted(buffers)}")
        on_device = {}
        for n, value in buffers.items():
            host = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.atleast_1d(value)
            memory = self.cupy.cuda.Memory(max(1, host.nbytes))
            pointer = self.cupy.cuda.MemoryPointer(memory, 0)
            on_device[n] = self.cupy.ndarray(host.shape, host.dtype, pointer)
            if host.nbytes:
                on_device[n].set(np.ascontiguousarray(host))
        arguments = tuple(on_device[n] for n in sorted(on_device))
        self.function(name)(tuple(grid), tuple(threadgroup), arguments)
        self.cupy.cuda.runtime.deviceSynchronize()
        for n, p in parameters.items():
            if p.writable:
                buffers[n][...] = on_device[n].get().reshape(buffers[n].shape)

    def function(self, entry):
        return self.module.get_function(self.functions[harness.entry_name(entry)])
