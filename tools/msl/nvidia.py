"""Metal shaders as CUDA text for NVRTC, compiled, and run with cupy.

The text is metal.h's CUDA half, the shader without address spaces, and one `extern "C" __global__` function for each
instantiation. NVRTC alone compiles it: its option -default-device makes every function of the shader a device
function, which nvcc has no option for.
"""

import ctypes
import functools
import importlib.util
import os
import re
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
    """CUDA text of shaders; the arguments are harness.compile's, and the function constants {index: value}."""
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


def nvrtc_library() -> str | None:
    """Path of libnvrtc: of the PyPI package nvidia-cuda-nvrtc, of MLXQ_NVRTC, or of the toolkit."""
    candidates = [os.environ.get("MLXQ_NVRTC", "")]
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        for folder in spec.submodule_search_locations if spec else ():
            candidates += [str(p) for p in sorted(Path(folder, "lib").glob("libnvrtc.so*"))]
    candidates += [str(p) for p in sorted(Path("/usr/local/cuda/lib64").glob("libnvrtc.so*"))]
    return next((c for c in candidates if c and Path(c).exists()), None)


@functools.cache
def nvrtc():
    path = nvrtc_library()
    if path is None:
        raise FileNotFoundError("no NVRTC: pip install 'nvidia-cuda-nvrtc==13.0.*', or set MLXQ_NVRTC")
    # It loads its builtins by name, so they are loaded first from beside it.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def ptx(program: Program, arch: str = "sm_90") -> str:
    """The PTX or cubin text of a program. Raises harness.CompileError with NVRTC's words."""
    library = nvrtc()
    handle = ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise harness.CompileError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")

    check(library.nvrtcCreateProgram(ctypes.byref(handle), program.text.encode(), b"shader.cu", 0, None, None))
    try:
        options = [f"-arch={arch.replace('sm', 'compute')}".encode(), *(o.encode() for o in OPTIONS)]
        failed = library.nvrtcCompileProgram(handle, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            size = ctypes.c_size_t()
            check(library.nvrtcGetProgramLogSize(handle, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(library.nvrtcGetProgramLog(handle, log))
            raise harness.CompileError(log.value.decode(errors="replace")[:4000])
        size = ctypes.c_size_t()
        check(library.nvrtcGetPTXSize(handle, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetPTX(handle, text))
        return text.value.decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))


class Library:
    """A program on the first GPU, through cupy; run() takes what the CPU harness' run() takes."""

    def __init__(self, program: Program):
        import cupy

        self.cupy = cupy
        self.program = program
        self.module = cupy.RawModule(code=program.text, backend="nvrtc", options=OPTIONS)

    def run(self, entry, buffers: dict, grid, threadgroup) -> None:
        """Run one dispatch; arrays bound to writable buffers hold its output afterwards.

        Each array is an allocation of its own, so that memcheck sees an access past its end.
        """
        name = harness.entry_name(entry)
        kernel = self.program.kernels[name]
        parameters = {p.buffer: p for p in kernel.parameters if p.buffer >= 0}
        if set(parameters) != set(buffers):
            raise ValueError(f"run: {name} has buffers {sorted(parameters)}, given are {sorted(buffers)}")
        on_device = {}
        for n, value in buffers.items():
            host = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.atleast_1d(value)
            memory = self.cupy.cuda.Memory(max(1, host.nbytes))
            pointer = self.cupy.cuda.MemoryPointer(memory, 0)
            on_device[n] = self.cupy.ndarray(host.shape, host.dtype, pointer)
            on_device[n].set(np.ascontiguousarray(host))
        function = self.module.get_function(self.program.functions[name])
        function(tuple(grid), tuple(threadgroup), tuple(on_device[n] for n in sorted(on_device)))
        self.cupy.cuda.runtime.deviceSynchronize()
        for n, p in parameters.items():
            if p.writable:
                buffers[n][...] = on_device[n].get().reshape(buffers[n].shape)

    def registers(self, entry) -> int:
        function = self.module.get_function(self.program.functions[harness.entry_name(entry)])
        return function.num_regs


def compile(sources, instantiate, defines=None, include=(), replace=None, function_constants=None) -> Library:
    """Compile Metal shaders for the GPU of this machine; needs cupy."""
    return Library(cuda(sources, instantiate, defines, include, replace, function_constants))
