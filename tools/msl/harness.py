"""Metal shaders on this CPU: compile their text with g++, run a dispatch lane by lane, say what is wrong.

    from tools.msl import harness
    lib = harness.compile(Path("metal/shaders/qmv.metal"), [("qmv", "float, 4, 64")])
    result = lib.run("qmv<float, 4, 64>", {0: words, 1: scales, 2: biases, 3: x, 4: y, 5: np.int32(K)},
                     grid=(N // 8, 1, 1), threadgroup=(32, 2, 1), seed=0)

What the machine does is in metal.h (the language) and runtime.cpp (lanes, memory, checks). Nothing of this is
installed with mlxq, so a test puts the checkout on sys.path before it imports tools.msl.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.msl import source

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MAX_BUFFERS = 31
ENTRIES_PER_MODULE = 8


class CompileError(Exception):
    """The shader's text does not compile; the message is the compiler's."""


class Defect(Exception):
    """Something that a shader may not do.

    buffer   index of the buffer it happened to, None when it did not happen to one
    place    "file.metal:line" where known
    """

    def __init__(self, message: str, buffer: int | None = None, place: str | None = None):
        super().__init__(message)
        self.buffer = buffer
        self.place = place


class OutOfBounds(Defect):
    """An access outside of a buffer or a threadgroup array, or a write to a const buffer."""


class DivergentBarrier(Defect):
    """Lanes that must come to a barrier or a simdgroup operation together did not."""


class ThreadgroupMemoryTooLarge(Defect):
    """More than 32 KiB of threadgroup memory."""


class UninitialisedRead(Defect):
    """Threadgroup memory that nothing has written was read. Seen in traced runs."""


class Race(Defect):
    """Two lanes touch a byte, one of them writing, without a barrier in between. Seen in traced runs."""


class Misaligned(Defect):
    """A load or store of 2, 4, 8 or 16 bytes at no multiple of that. Seen in traced runs."""


class UndefinedBehaviour(Defect):
    """Shift too far, signed overflow, division by zero. Seen in traced runs."""


class StackOverflow(Defect):
    """A lane needs more private memory than the harness gives it."""


class TimeLimit(Defect):
    """The dispatch did not end."""


# In the order of runtime.cpp's enum Kind.
KINDS = (None, OutOfBounds, DivergentBarrier, ThreadgroupMemoryTooLarge, UninitialisedRead, Race, Misaligned,
         UndefinedBehaviour, StackOverflow, TimeLimit, OutOfBounds, OutOfBounds)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a dispatch did.

    simdgroup_ops      {operation: times}, once per simdgroup
    barriers           threadgroup barriers, once per threadgroup
    threadgroup_bytes  declared by a threadgroup
    device_bytes       count=True: {buffer: {"read": ..., "written": ..., ...}}
                         read                  bytes loaded, summed over lanes
                         read_by_simdgroup     the same without what this simdgroup had loaded before
                         read_by_threadgroup   the same without what this threadgroup had loaded before
                         read_once             bytes of the buffer that were read at all
                         written, written_once
    """

    simdgroup_ops: dict[str, int]
    barriers: int
    threadgroup_bytes: int
    device_bytes: dict[int, dict[str, int]] | None


class Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("alignment", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("same_as", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        *[(name, ctypes.c_uint64) for name in
          ("read", "read_by_simdgroup", "read_by_threadgroup", "read_once", "written", "written_once")],
    ]  # fmt: skip


COUNTS = [name for name, _ in Buffer._fields_[6:]]


class Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("buffer", Buffer * MAX_BUFFERS),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("ignore", ctypes.c_uint32),
        ("traced", ctypes.c_uint32),
        ("operations", ctypes.c_uint64 * 64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("defect_buffer", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("place", ctypes.c_uint64),
        ("other_place", ctypes.c_uint64),
        ("message", ctypes.c_char * 512),
    ]


class Type(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("size", ctypes.c_uint32)]


def entry_name(entry) -> str:
    """ "qmv<float,4,64>" for ("qmv", "float, 4, 64"), for the same in one string, and for any spacing."""
    text = entry if isinstance(entry, str) else f"{entry[0]}<{entry[1]}>" if entry[1].strip() else entry[0]
    return re.sub(r"\s+", "", text)


def absent() -> str | None:
    """Why no shader can run on this machine, in one sentence; None where they can."""
    if platform.system() != "Linux":
        return f"the shader harness is written for Linux, and this is {platform.system()}"
    if os.sysconf("SC_PAGE_SIZE") != 4096:
        return f"the shader harness guards pages of 4096 bytes, and here are {os.sysconf('SC_PAGE_SIZE')}"
    return None


def compiler() -> str:
    """g++, else clang++, or what MLXQ_MSL_CXX names."""
    for name in filter(None, (os.environ.get("MLXQ_MSL_CXX"), "g++", "clang++")):
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError("msl harness: needs g++ 12 or clang++ 15, or newer")


@functools.cache
def compiler_version(cxx: str) -> str:
    done = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


@functools.cache
def machine_flags() -> tuple[str, ...]:
    # x86-64-v3 has the conversions between half and float as instructions.
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if flags and {"avx2", "fma", "f16c", "bmi2", "movbe", "abm"} <= set(flags[1].split()):
            return ("-march=x86-64-v3",)
    return ()


COMMON_FLAGS = ("-std=gnu++20", "-fPIC", "-g1", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w")
# No contraction, since MLX compiles in safe math mode; pointers may be cast to pointers of other types, as in
# Metal; a loop without effect stays. A private variable that is read before it is written holds -1.7e38.
SHADER_FLAGS = (
    "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-finite-loops", "-ftrivial-auto-var-init=pattern"
)
TRACE_FLAGS = (
    "-fsanitize=thread,bounds,shift-exponent,signed-integer-overflow,integer-divide-by-zero",
    "-fno-tree-loop-distribute-patterns",  # would make memset and memcpy of loops, which nothing traces
    # Metal's compiler knows that thread and device memory are apart. Here types tell most of it; without them
    # a store to a private array would make the shader load x again. -fsanitize=alignment would do the same.
    "-fstrict-aliasing",
)


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(clean(done.stderr) or f"{command[0]} exits {done.returncode}")


def clean(stderr: str) -> str:
    """The compiler's first errors, each with the notes that follow it, without the rest."""
    lines = [line for line in stderr.splitlines() if not line.startswith("In file included")]
    first = next((i for i, line in enumerate(lines) if ": error:" in line or ": fatal error:" in line), 0)
    return "\n".join(lines[max(0, first - 3) : first + 25])


def cached(folder: Path, key: str, suffix: str, make) -> Path:
    """The file for a key, made once; make(path) writes it. Safe beside other processes that make the same."""
    path = folder / (hashlib.sha256(key.encode()).hexdigest()[:24] + suffix)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / ("made" + suffix)
            make(made)
            os.replace(made, path)
    return path


def runtime_object(folder: Path, cxx: str) -> Path:
    text = (HERE / "runtime.cpp").read_text()
    command = [cxx, *COMMON_FLAGS, *machine_flags(), "-O3", "-U_FORTIFY_SOURCE", "-fno-stack-protector"]
    extra = os.environ.get("MLXQ_MSL_RUNTIME_FLAGS", "").split()
    key = "\0".join([text, compiler_version(cxx), *command, *extra])
    command += [*extra, "-c", str(HERE / "runtime.cpp"), "-o"]
    return cached(folder, key, ".o", lambda out: call([*command, str(out)]))


def wrapper(kernel: source.Kernel, arguments: str, number: int) -> str:
    """C++ that calls one instantiation with bound buffers, and tells the types of its parameters."""
    instance = f"{kernel.name}<{arguments}>" if kernel.template else kernel.name
    values = []
    for p in kernel.parameters:
        if p.buffer >= 0:
            values.append(f"msl::{p.kind.capitalize()}{{b[{p.buffer}]}}")
        else:
            values.append(source.BUILTINS[p.kind])
    return (
        f"MSL_EXPORT void msl_entry_{number}(void* const* b) {{ {instance}({', '.join(values)}); }}\n"
        f"MSL_EXPORT void msl_types_{number}(msl::Type* out) {{ msl::describe(&{instance}, out); }}\n"
    )


def module_text(text: str, kernels: dict[str, source.Kernel], entries, defines: dict) -> str:
    def array(type_, name, size):
        return (
            f"typedef {type_} {name}_msl_t{size}; {name}_msl_t& {name} = *({name}_msl_t*)"
            f'msl_threadgroup_array("{name}", sizeof({name}_msl_t), __LINE__);'
        )

    constants = source.function_constants(text)
    body = source.without_address_spaces(text, array)
    parts = [f'#define {name} {value}' for name, value in defines.items()]
    parts += ["#define __METAL__ 1", "#define __METAL_VERSION__ 310", f'#include "{HERE / "metal.h"}"', body]
    parts += ['#line 1 "entries"']
    parts += [wrapper(kernels[name], arguments, i) for i, (name, arguments) in enumerate(entries)]
    for c in constants:
        parts.append(
            f"MSL_EXPORT void* msl_constant_{c.index}(bool defined) {{"
            f" {c.name}_is_defined = defined; return &{c.name}; }}\n"
            f"MSL_EXPORT unsigned msl_constant_size_{c.index}() {{ return sizeof({c.name}); }}"
        )
    return "\n".join(parts) + "\n"


class Module:
    """One shared object with some of a library's entries."""

    def __init__(self, path: Path):
        self.path = path
        self.handle = ctypes.CDLL(str(path))
        self.dispatch = self.handle.msl_dispatch
        self.dispatch.argtypes = [ctypes.POINTER(Dispatch)]

    def operations(self) -> list[str]:
        names = self.handle.msl_operation_list
        names.restype = ctypes.c_char_p
        return names().decode().split()

    def place(self, address: int) -> str | None:
        """ "file:line" of the shader for a return address, through what was inlined."""
        if not address or not shutil.which("addr2line"):
            return None
        command = ["addr2line", "-i", "-e", str(self.path), hex(address - 1)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        for line in lines:
            line = re.sub(r" \(discriminator \d+\)$", "", line)
            if not line.startswith("?") and not re.search(r"/(metal\.h|runtime\.cpp):", line):
                return os.path.basename(line)
        return None


class Library:
    """Compiled kernels; made by compile()."""

    def __init__(self, text, entries, defines, folder, flags, cxx):
        self.text = text
        self.kernels = source.kernels(text)
        self.entries = entries
        self.defines = defines
        self.folder = folder
        self.flags = flags
        self.cxx = cxx
        for name, arguments in entries:
            if name not in self.kernels:
                raise ValueError(f"compile: no kernel {name}; there are {', '.join(self.kernels) or 'none'}")
            if bool(arguments.strip()) != self.kernels[name].template:
                wanted = "needs" if self.kernels[name].template else "has no"
                raise ValueError(f"compile: kernel {name} {wanted} template arguments")
        self.where = {entry_name(e): divmod(i, ENTRIES_PER_MODULE) for i, e in enumerate(entries)}
        self.constants = {c.index: c for c in source.function_constants(text)}
        self.modules: dict[tuple[int, bool], Module] = {}

    def build(self, number: int, traced: bool) -> Path:
        """The shared object with the number-th run of entries, from the cache or from the compiler."""
        entries = self.entries[number * ENTRIES_PER_MODULE : (number + 1) * ENTRIES_PER_MODULE]
        text = module_text(self.text, self.kernels, entries, self.defines)
        single = () if "clang" in os.path.basename(self.cxx) else ("-fsingle-precision-constant",)
        command = [self.cxx, *COMMON_FLAGS, *machine_flags(), *SHADER_FLAGS, *single, *self.flags]
        command += TRACE_FLAGS if traced else ()
        runtime = runtime_object(self.folder, self.cxx)
        header = (HERE / "metal.h").read_text()
        key = "\0".join([text, header, runtime.name, compiler_version(self.cxx), *command])

        def make(out: Path) -> None:
            shader, compiled = out.with_suffix(".cpp"), out.with_suffix(".o")
            shader.write_text(text)
            call([*command, "-c", str(shader), "-o", str(compiled)])
            link = [self.cxx, "-shared", str(compiled), str(runtime), "-o", str(out)]
            call([*link, "-Wl,-Bsymbolic", "-lm", "-ldl"])

        return cached(self.folder, key, ".so", make)

    def build_all(self, traced: bool = False) -> None:
        count = -(-len(self.entries) // ENTRIES_PER_MODULE)
        runtime_object(self.folder, self.cxx)
        with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda number: self.build(number, traced), range(count)))

    def module(self, number: int, traced: bool) -> Module:
        if (number, traced) not in self.modules:
            self.modules[number, traced] = Module(self.build(number, traced))
        return self.modules[number, traced]

    def run(
        self,
        entry,
        buffers: dict,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        seed: int = 0,
        function_constants: dict | None = None,
        count: bool = False,
        alignment: int = 16,
        ignore: tuple[type[Defect], ...] = (),
        seconds: float = 120.0,
    ) -> Result:
        """Run one dispatch; arrays bound to writable buffers hold its output afterwards.

        entry        "qmv<float,4,64>" or ("qmv", "float, 4, 64")
        buffers      {n of [[buffer(n)]]: contiguous ndarray, numpy scalar, or bytes}; bfloat arrays are
                     uint16. One array bound twice is one buffer.
        grid         threadgroups; threadgroup: threads of each, 1024 at most
        seed         order of lanes, simdgroups and threadgroups (0 ascending, 1 descending, else random);
                     even seeds put the guard right behind each buffer, odd ones right before
        count        run the traced build, some 4 times slower: byte counts, races, uninitialised
                     threadgroup memory, bounds of threadgroup arrays, misaligned accesses, undefined
                     arithmetic
        alignment    in bytes of every buffer's first byte; MLX passes views of arrays, so a buffer may start
                     at any multiple of its element's size
        ignore       Defect classes that traced runs shall not report

        Raises Defect, or ValueError and TypeError for a call that does not fit the kernel.
        """
        name = entry_name(entry)
        if name not in self.where:
            raise ValueError(f"run: {name} was not compiled; there are {', '.join(self.where)}")
        number, index = self.where[name]
        kernel = self.kernels[name.split("<")[0]]
        module = self.module(number, count)
        for what, size in (("grid", grid), ("threadgroup", threadgroup)):
            if len(size) != 3 or any(int(n) < 1 for n in size):
                raise ValueError(f"run: {what} is {size}, wanted three positive numbers")
        if np.prod(threadgroup) > 1024:
            raise ValueError(f"run: {np.prod(threadgroup)} threads in a threadgroup, 1024 are the most")

        job = Dispatch(grid=tuple(grid), threads=tuple(threadgroup), seed=seed, seconds=seconds, traced=count)
        job.kernel = ctypes.cast(getattr(module.handle, f"msl_entry_{index}"), ctypes.c_void_p)
        job.ignore = sum(1 << i for i, kind in enumerate(KINDS) if kind in ignore)
        job.defect_buffer = -1
        kept = self.bind(job, module, index, kernel, buffers, alignment)
        self.set_constants(module, function_constants or {})
        kind = module.dispatch(ctypes.byref(job))
        del kept
        if kind:
            self.raise_defect(kind, job, module, name)

        operations = {n: int(c) for n, c in zip(module.operations(), job.operations, strict=False) if c}
        barriers = operations.pop("threadgroup_barrier", 0)
        counts = None
        if count:
            counts = {n: {c: getattr(job.buffer[n], c) for c in COUNTS} for n in buffers}
        return Result(operations, barriers, int(job.threadgroup_bytes), counts)

    def bind(self, job, module, index, kernel, buffers, alignment):
        parameters = {p.buffer: (i, p) for i, p in enumerate(kernel.parameters) if p.buffer >= 0}
        if set(parameters) != set(buffers):
            has, given = sorted(parameters), sorted(buffers)
            raise ValueError(f"run: {kernel.name} has buffers {has}, given are {given}")
        types = (Type * len(kernel.parameters))()
        getattr(module.handle, f"msl_types_{index}")(types)
        kept, seen = [], {}
        for n, value in buffers.items():
            position, p = parameters[n]
            if isinstance(value, (bytes, bytearray)):
                array = np.frombuffer(bytes(value), dtype=np.uint8)
            elif isinstance(value, (np.ndarray, np.generic)):
                array = np.asarray(value)
                check_type(kernel.name, p, types[position], array)
            else:
                came = type(value).__name__
                raise TypeError(f"run: buffer {n} ({p.name}) is {came}, wanted numpy or bytes")
            if not array.flags.c_contiguous:
                raise ValueError(f"run: buffer {n} ({p.name}) is not contiguous")
            if p.writable and not (isinstance(value, np.ndarray) and array.flags.writeable):
                raise ValueError(f"run: buffer {n} ({p.name}) is written, wanted a writable ndarray")
            if p.kind == "reference" and array.nbytes != types[position].size:
                wanted = types[position].size
                raise ValueError(f"run: buffer {n} ({p.name}) has {array.nbytes} bytes, wanted {wanted}")
            kept.append(array)
            address = array.ctypes.data
            # An empty array has an address that another may have too.
            same = seen.setdefault((address, array.nbytes) if array.nbytes else n, n)
            if array.dtype.itemsize > 0 and alignment % array.dtype.itemsize and array.dtype.itemsize <= 8:
                raise ValueError(f"run: alignment {alignment} splits the elements of buffer {n} ({p.name})")
            slot = job.buffer[n]
            slot.host, slot.size, slot.alignment, slot.same_as = address or 1, array.nbytes, alignment, same
            if p.writable:
                slot.writable = 1
                job.buffer[same].writable = 1
        return kept

    def set_constants(self, module, values) -> None:
        for index in values:
            if index not in self.constants:
                raise ValueError(f"run: no function constant {index}; there are {sorted(self.constants)}")
        for index in self.constants:
            address = getattr(module.handle, f"msl_constant_{index}")
            address.restype = ctypes.c_void_p
            size = getattr(module.handle, f"msl_constant_size_{index}")()
            at = address(ctypes.c_bool(index in values))
            if index in values:
                value = np.asarray(values[index])
                data = value.astype(np.uint8).tobytes() if value.dtype == bool else value.tobytes()
                if value.dtype == np.int64 and size < 8:
                    data = int(value).to_bytes(size, "little", signed=int(value) < 0)
                if len(data) != size:
                    raise ValueError(f"run: function constant {index} has {len(data)} bytes, wanted {size}")
                ctypes.memmove(at, data, size)
            else:
                ctypes.memset(at, 0xFF, size)

    def raise_defect(self, kind: int, job: Dispatch, module: Module, name: str):
        place, other = module.place(job.place), module.place(job.other_place)
        message = f"{name}: {job.message.decode(errors='replace')}"
        message += f", at {place}" if place else ""
        message += f", the other at {other}" if other else ""
        raise KINDS[kind](message, None if job.defect_buffer < 0 else job.defect_buffer, place)


# What a numpy array may be bound to; other pointers (vectors, structs) take any.
NUMPY_OF = {b"f": ("float32",), b"e": ("float16",), b"b": ("uint16",), b"?": ("bool", "uint8")}


def check_type(kernel: str, p: source.Parameter, type_: Type, array: np.ndarray) -> None:
    wanted = NUMPY_OF.get(type_.kind)
    if wanted is None and type_.kind in b"iu":
        kinds = ("int", "uint") if type_.kind == b"i" else ("uint", "int")
        wanted = tuple(f"{k}{8 * type_.size}" for k in kinds)
    if wanted and array.dtype.name not in wanted:
        came = array.dtype.name
        raise TypeError(f"run: buffer {p.buffer} ({kernel}'s {p.name}) is {came}, wanted {wanted[0]}")


def compile(
    sources, instantiate, defines=None, cache_dir=None, include=(), replace=None, contract=False
) -> Library:
    """Compile Metal shaders for this CPU.

    sources      text, Path, or a list of both; #include "..." is followed (see source.flatten)
    instantiate  [(kernel, "template arguments")], "" for a kernel that is no template
    defines      {macro: value}, before everything else
    cache_dir    for compiled modules; default MLXQ_MSL_CACHE, else build/msl of this checkout
    contract     let the compiler fuse a * b + c, as Metal may in fast mode

    Raises CompileError with the compiler's words or those of absent(), ValueError for kernels that the
    harness cannot call.
    """
    if reason := absent():
        raise CompileError(reason)
    folder = Path(cache_dir or os.environ.get("MLXQ_MSL_CACHE") or ROOT / "build" / "msl")
    text = source.flatten(sources, include, replace)
    entries = [(name.strip(), arguments.strip()) for name, arguments in instantiate]
    flags = ("-ffp-contract=fast",) if contract else ()
    library = Library(text, entries, dict(defines or {}), folder, flags, compiler())
    library.build_all()
    return library
