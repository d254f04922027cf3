"""Quantized products on NVIDIA GPUs for torch tensors and cupy arrays: kernels compiled when first needed.

The arrays are used where they lie, on their own device and on the caller's current stream; results come from
the caller's own allocator. Nothing synchronizes except quantize, which has to know whether the weights were
finite. What a call needs (the compiled kernel, the grid, the packed arguments) is worked out once for each
weight and shape and remembered, so that a call costs a lookup, an allocation and a launch.

Few rows go to qmv.cu, which never rounds a weight, or on Hopper to qmv_stream.cu, which does not either. On
Hopper more rows of 16-bit x and transpose=False go to qmm_stream.cu, and where rows do not begin at 16
bytes to qmm.cu; these two round each weight to x's type, as a dequantized copy would be. All but qmv.cu
serve rows that choose experts once experts.cu has sorted them; qmv.cu takes them as they come. int8 x goes
to q8_stream.cu, and to q8mm.cu where rows of scales are no whole 16 bytes. What none serves goes through
such a copy and the framework's own product (cuBLAS). cupy brings NVRTC, the compiler, and the code is
cached on disk; kernels are started through the driver. Times, floors and what was tried:
docs/kernels-cuda.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import itertools
import math
import os
import sys
import tempfile
import threading
from pathlib import Path

from mlxq import bridge, cache, format

HERE = Path(__file__).resolve().parent
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # X_TYPE, S_TYPE and W_TYPE of the kernels
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
PLANS_KEPT = 4096
# CUdevice_attribute and CUfunction_attribute
_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED_OPTIN = 16, 75, 76, 97
_FUNCTION_SHARED, _FUNCTION_CARVEOUT = 8, 9
_CLUSTER, _CLUSTER_POLICY, _PROGRAMMATIC_SERIALIZATION = 4, 5, 6  # CUlaunchAttributeID


class Kernel:
    """A compiled function, ready to be started on one device."""

    def __init__(self, driver, function, shared_bytes, name: str = "", device: int = 0):
        self.driver, self.function, self.shared_bytes, self.name = driver, function, shared_bytes, name
        self.device = device


@functools.cache
def _driver():
    """libcuda. Raises RuntimeError where there is no NVIDIA driver or no GPU."""
    try:
        driver = ctypes.PyDLL("libcuda.so.1")  # a launch never waits: the GIL stays held
    except OSError:
        raise RuntimeError("no GPU: the NVIDIA driver (libcuda.so.1) is not on this machine") from None
    code = driver.cuInit(0)
    if code:
        raise RuntimeError(f"no GPU: the NVIDIA driver answers {_error_text(driver, code)}")
    return driver


def _error_text(driver, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"error {code}: {text.value.decode() if text.value else 'unknown'}"


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what}: {_error_text(_driver(), code)}")


class _Thread(threading.local):
    """Whether this thread is known to have a context: a new one has none, autograd's own among them."""

    ready = False


_thread = _Thread()


def _take_context(device: int) -> None:
    """Gives a thread that has no context this device's, the one that torch and cupy use.

    Without one the driver refuses whatever it is asked.
    """
    driver, context, number = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "the thread's context")
    if not context.value:
        _check(driver.cuDeviceGet(ctypes.byref(number), device), f"GPU {device}")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number), f"GPU {device}: its context")
        _check(driver.cuCtxSetCurrent(context), f"GPU {device}: its context")
    _thread.ready = True


def _on(there, device: int):
    """`there`, which puts a thread on a device; it has a context then."""
    return there if _thread.ready else _with_context(there, device)


@contextlib.contextmanager
def _with_context(there, device: int):
    with there:
        _take_context(device)
        yield


@functools.cache
def _device(index: int) -> dict[str, int]:
    """Of a GPU: arch ("sm_90a"), multiprocessors, shared (bytes that a block may have)."""
    driver, device, value = _driver(), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), index), f"GPU {index}")

    def attribute(number: int) -> int:
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), number, device), f"GPU {index}")
        return value.value

    major, minor = attribute(_MAJOR), attribute(_MINOR)
    if major < 8:
        raise RuntimeError(
            f"GPU {index} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later"
        )
    return {
        "arch": f"sm_{major}{minor}" + ("a" if major == 9 else ""),
        "multiprocessors": attribute(_MULTIPROCESSORS),
        "early": major >= 9,  # programmatic dependent launch
        "shared": attribute(_SHARED_OPTIN),
    }


@functools.cache
def _source(name: str) -> str:
    """A kernel file as text, the constants of format.h before it and our headers where it includes them."""
    text = (HERE / name).read_text(encoding="utf-8")
    constants = (HERE.parent / "format.h").read_text(encoding="utf-8").replace("#pragma once", "")
    for header in ("hopper.cuh", "warp.cuh", "halves.cuh", "copies.cuh"):  # the first two include the third
        text = text.replace(f'#include "{header}"\n', (HERE / header).read_text(encoding="utf-8"))
    return f'{constants}\n#line 1 "{name}"\n{text}'


def options(arch: str, defines: dict, exact: bool = False) -> tuple[str, ...]:
    """NVRTC's options for one instance of a kernel file; exact: no contraction to fused multiply-add."""
    head = (f"--gpu-architecture={arch}", "--std=c++17", *(("--fmad=false",) if exact else ()))
    head += tuple(os.environ.get("MLXQ_NVRTC_OPTIONS", "").split())  # -lineinfo for compute-sanitizer
    return (*head, *(f"-D{name}={value}" for name, value in defines.items()))


def _nvrtc():
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise RuntimeError(
            f"the CUDA kernels need cupy, which compiles them (pip install 'mlxq[cuda]'): {error}"
        ) from None
    return nvrtc


def cubin(name: str, flags: tuple[str, ...]) -> bytes:
    """Machine code of a kernel file, from the cache on disk or compiled now.

    Cached under the hash of source, options (the architecture among them) and compiler version. Raises
    RuntimeError with the compiler's first error.
    """
    source, nvrtc = _source(name), _nvrtc()
    version = ".".join(map(str, nvrtc.getVersion()))
    key = hashlib.sha256("\0".join((source, version, *flags)).encode()).hexdigest()
    path = cache.cache_folder() / "cuda" / f"{name.removesuffix('.cu')}-{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, flags)
        code = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        errors = [line for line in log.splitlines() if "error" in line.lower()]
        first = errors[0] if errors else log.strip() or str(error)
        raise RuntimeError(f"NVRTC {version} cannot compile {name} for {flags[0]}: {first}") from None
    finally:
        nvrtc.destroyProgram(program)
    try:  # a folder that cannot be written costs the next process the compilation, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(code)
        os.replace(part.name, path)
    except OSError:
        pass
    return code


@functools.cache
def _kernel(device: int, file: str, function: str, flags: tuple[str, ...], shared_bytes: int) -> Kernel:
    """A function of a kernel file, loaded on the current device, which is `device`."""
    driver, code = _driver(), cubin(file, flags)
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), code), f"loading {file}")
    _check(driver.cuModuleGetFunction(ctypes.byref(found), module, function.encode()), f"{file}: {function}")
    if shared_bytes > 48 << 10:
        _check(driver.cuFuncSetAttribute(found, _FUNCTION_SHARED, shared_bytes), f"{file}: shared memory")
    return Kernel(driver, found, shared_bytes, function, device)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class _Launch:
    """A kernel with its grid and arguments; call it with the stream and the arguments that change.

    early=True: the kernel may begin while the one before it in the stream still runs (Hopper and later; the
    kernel itself waits for it before it touches anything but the weights).
    """

    def __init__(
        self, kernel: Kernel, grid, threads: int, arguments, changing, cluster: int = 1, spread: bool = False
    ):
        """arguments: ctypes values in the kernel's order; changing: positions that __call__ sets.

        cluster: how many blocks along the grid's x share a cluster; spread: on as many multiprocessors
        """
        self.slots = [arguments[i] for i in changing]
        self.keep = arguments
        self.pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(getattr(a, "buffer", a)) for a in arguments)
        )
        self.always = int(cluster > 1) + spread  # attributes of every start
        attributes = (_Attribute * 3)()
        attributes[0].id, attributes[0].value[:3] = _CLUSTER, (cluster, 1, 1)
        attributes[1].id, attributes[1].value[0] = _CLUSTER_POLICY, 1  # spread
        attributes[self.always].id = _PROGRAMMATIC_SERIALIZATION
        attributes[self.always].value[0] = 1
        first = ctypes.cast(attributes, ctypes.POINTER(_Attribute))
        self.attributes = attributes
        self.config = _Config(*grid, threads, 1, 1, kernel.shared_bytes, None, first, self.always)
        self.function, self.name, self.device = kernel.function, kernel.name, kernel.device
        self.config_at = ctypes.byref(self.config)
        self.start = kernel.driver.cuLaunchKernelEx
        self.lock = threading.Lock()

    def __call__(self, stream: int, *values, early: bool = False) -> None:
        if not _thread.ready:
            _take_context(self.device)
        with self.lock:  # threads share the arguments, and may change hands between setting and starting
            for slot, value in zip(self.slots, values):  # noqa: B905 (a keyword costs time here)
                slot.value = value
            config = self.config
            config.stream, config.count = stream, self.always + early
            code = self.start(self.config_at, self.function, self.pointers, None)
            if code:
                _check(code, "starting a kernel")


class _Torch:
    """What the operations need of torch tensors."""

    @staticmethod
    def describe(a):
        """(pointer, shape, dtype, device, contiguous); device -1 is the CPU."""
        return a.data_ptr(), a.shape, a.dtype, a.get_device(), a.is_contiguous()

    @staticmethod
    def empty(shape, dtype: str, device: int):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device("cuda", device))

    @staticmethod
    def usable(x, device: int) -> bool:
        return x.is_contiguous() and x.get_device() == device and not x.data_ptr() % 16

    @staticmethod
    def like(shape, x):
        return x.new_empty(shape)

    @staticmethod
    def zeros(shape, x):
        return x.new_zeros(shape)

    @staticmethod
    def pointer(a) -> int:
        return a.data_ptr()

    @staticmethod
    def stream(device: int) -> int:
        return sys.modules["torch"]._C._cuda_getCurrentRawStream(device)

    @staticmethod
    def current_device() -> int:
        return sys.modules["torch"]._C._cuda_getDevice()

    @staticmethod
    def on(device: int):
        return _on(sys.modules["torch"].cuda.device(device), device)

    @staticmethod
    def product(x, w):
        return sys.modules["torch"].matmul(x, w)

    @staticmethod
    def indices(given, batch, device: int):
        torch = sys.modules["torch"]
        if given is None:
            where = torch.device("cuda", device)
            return torch.arange(math.prod(batch), dtype=torch.int32, device=where).reshape(batch)
        if given.get_device() != device:
            raise ValueError(f"gather_qmm: x is on GPU {device} but indices are on {given.device}")
        return given.to(torch.int32)

    @staticmethod
    def broadcast(a, b):
        a, b = sys.modules["torch"].broadcast_tensors(a, b)
        return a.contiguous(), b.contiguous()

    @staticmethod
    def inside(indices, size: int):
        """The last for what is out of range."""
        return indices.masked_fill((indices < 0) | (indices >= size), size - 1)

    @staticmethod
    def double(a):
        return a.double()

    @staticmethod
    def einsum(text: str, a, b):
        return sys.modules["torch"].einsum(text, a, b)


class _Cupy:
    """What the operations need of cupy arrays."""

    @staticmethod
    def describe(a):
        return a.data.ptr, a.shape, a.dtype, a.device.id, a.flags.c_contiguous

    @staticmethod
    def empty(shape, dtype: str, device: int):
        return sys.modules["cupy"].empty(shape, _cupy_dtype(dtype))

    @staticmethod
    def usable(x, device: int) -> bool:
        return x.flags.c_contiguous and x.device.id == device and not x.data.ptr % 16

    @staticmethod
    def like(shape, x):
        return sys.modules["cupy"].empty(shape, x.dtype)

    @staticmethod
    def zeros(shape, x):
        return sys.modules["cupy"].zeros(shape, x.dtype)

    @staticmethod
    def pointer(a) -> int:
        return a.data.ptr

    @staticmethod
    def stream(device: int) -> int:
        return sys.modules["cupy"].cuda.get_current_stream().ptr

    @staticmethod
    def current_device() -> int:
        return sys.modules["cupy"].cuda.runtime.getDevice()

    @staticmethod
    def on(device: int):
        return _on(sys.modules["cupy"].cuda.Device(device), device)

    @staticmethod
    def product(x, w):
        cupy = sys.modules["cupy"]
        if str(x.dtype) == "bfloat16":  # cupy has no bfloat16 product
            return (x.astype(cupy.float32) @ w.astype(cupy.float32)).astype(x.dtype)
        return x @ w

    @staticmethod
    def indices(given, batch, device: int):
        cupy = sys.modules["cupy"]
        if given is None:
            return cupy.arange(math.prod(batch), dtype=cupy.int32).reshape(batch)
        if given.device.id != device:
            raise ValueError(f"gather_qmm: x is on GPU {device} but indices are on GPU {given.device.id}")
        return given.astype(cupy.int32)

    @staticmethod
    def broadcast(a, b):
        cupy = sys.modules["cupy"]
        return tuple(cupy.ascontiguousarray(part) for part in cupy.broadcast_arrays(a, b))

    @staticmethod
    def inside(indices, size: int):
        cupy = sys.modules["cupy"]
        return cupy.where((indices < 0) | (indices >= size), size - 1, indices)

    @staticmethod
    def double(a):
        return a.astype("float64")

    @staticmethod
    def einsum(text: str, a, b):
        return sys.modules["cupy"].einsum(text, a, b)


@functools.cache
def _cupy_dtype(name: str):
    if name != "bfloat16":
        return name
    return importlib.import_module("ml_dtypes").bfloat16  # comes with cupy's own bfloat16


_SIDES = {"torch": _Torch, "cupy": _Cupy}
_plans: dict[tuple, object] = {}


def _side(op: str, *arrays):
    kinds = {bridge.kind(a) for a in arrays}
    if len(kinds) > 1:
        raise TypeError(f"{op}: arrays of {' and '.join(sorted(kinds))}; all must come from one of them")
    return _SIDES[kinds.pop()]


def _remember(key, plan):
    if len(_plans) >= PLANS_KEPT:
        _plans.clear()
    _plans[key] = plan
    return plan


def _check_arrays(op: str, named, device: int) -> None:
    """named: {name: description}. Raises ValueError for another device, gaps and odd addresses."""
    for name, (pointer, shape, _, where, contiguous) in named.items():
        if where != device:
            place = "the CPU" if where < 0 else f"GPU {where}"
            raise ValueError(f"{op}: x is on GPU {device} but {name} on {place}; move them together first")
        if not contiguous:
            raise ValueError(f"{op}: {name} {tuple(shape)} is not contiguous; pass a contiguous copy")
        if pointer % 16:
            raise ValueError(
                f"{op}: {name} begins at an address that is not a multiple of 16 bytes; pass a copy"
            )


def _check_product(op: str, x_shape, x_type: str, w: format.Packed, transpose: bool) -> None:
    if w.format.bits not in format.KERNEL_BITS:
        built = ", ".join(str(f) for f in format.FORMATS)
        raise ValueError(f"{op}: {w.format} has no CUDA kernel; built: {built}")
    if x_type not in TYPES:
        raise TypeError(f"{op}: x is {x_type}; wanted float32, float16 or bfloat16")
    w.validate()
    inner, name = (w.K, "K") if transpose else (w.N, "N")
    if not x_shape or x_shape[-1] != inner:
        got = x_shape[-1] if x_shape else "no axis"
        raise ValueError(f"{op}: x has {name}={got} but w holds {name}={inner}")


def qmv_tuning(bits: int, columns: int, tiles: int, multiprocessors: int) -> tuple[int, int, int, int]:
    """(warps, blocks that fit a multiprocessor, chunk bytes, log2 of warps a tile) that were best on an H200.

    Two blocks that fit let the next product's block begin, and load its weights, beside the last one's.
    """
    small, large = tiles <= 2 * multiprocessors, tiles > 8 * multiprocessors
    if columns >= 8:
        return (8, 1, 256, 2) if bits == 2 else (16, 1, 128, 2)
    if bits == 8:
        return 16, 1, 256, 2
    if small:
        return 8, 2, 256 if columns == 1 else 128, 2
    if columns == 4 and large:
        return 16, 1, 128, 2
    if bits == 2 and columns < 4 and not large:
        return 8, 2, 256, 2
    return 16, 1, 256, 2


def qmv_shape(M: int, N: int, K: int, fmt: format.Format, x_type: str, s_type: str, gpu: dict) -> dict | None:
    """How qmv.cu is compiled and started for a product; None if its x does not fit in shared memory.

    defines, grid_x, rows (of x a block), wk_bits, threads, shared (bytes).
    """
    parts = 3 if x_type == "float32" else 1
    row_bytes, s_bytes = K * fmt.bits // 8, SIZES[s_type]
    columns = next(c for c in (1, 2, 4, 8) if c >= min(M * parts, 8))
    tiles = -(-N // 16)
    while columns >= parts:
        tuning = qmv_tuning(fmt.bits, columns, tiles, gpu["multiprocessors"])
        warps, blocks, chunk_bytes, most_wk_bits = tuning
        if fmt.bits == 8 and fmt.group_size == 128 and s_bytes == 2:  # cp.async moves no less than four bytes
            chunk_bytes = 256
        smaller = ((8, 1, chunk) for chunk in (chunk_bytes, 128, 64) if chunk <= chunk_bytes)
        for tried in ((warps, blocks, chunk_bytes), (warps, 1, chunk_bytes), *smaller):
            found = _qmv_depth(K, fmt, s_bytes, columns, *tried, gpu["shared"])
            if found:
                break
        else:
            columns //= 2
            continue
        break
    else:
        return None
    (warps, blocks, chunk_bytes), (depth, shared) = tried, found
    chunks = -(-row_bytes // chunk_bytes)
    wk_bits = min(warps.bit_length() - 1, (chunks - 1).bit_length())
    if tiles > gpu["multiprocessors"]:  # else more warps a tile, so that all have work
        wk_bits = min(wk_bits, most_wk_bits)
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "X_TYPE": TYPES[x_type],
        "S_TYPE": TYPES[s_type],
        "MP": columns,
        "CB": chunk_bytes,
        "WARPS": warps,
        "DEPTH": depth,
        "BLOCKS": blocks,
        "COPY": 16 if row_bytes % 16 == 0 else 8,
        "S_VECTOR": math.gcd(K // fmt.group_size * s_bytes, 16),
    }
    return {
        "defines": defines,
        "grid_x": min(gpu["multiprocessors"], tiles),
        "rows": columns // parts,
        "wk_bits": wk_bits,
        "threads": 32 * warps,
        "shared": shared,
    }


def _qmv_depth(K, fmt, s_bytes, columns, warps, blocks, chunk_bytes, limit) -> tuple[int, int] | None:
    """(stages of a warp's ring, bytes of shared memory) if `blocks` blocks fit on a multiprocessor."""
    limit = limit if blocks == 1 else limit // blocks - 1024  # the system takes 1 KiB a block
    for depth in (6, 5, 4, 3, 2):
        shared = qmv_shared(K, fmt, s_bytes, columns, chunk_bytes, warps, depth)
        if shared <= limit:
            return depth, shared
    return None


def qmv_shared(K: int, fmt: format.Format, s_bytes: int, columns, chunk_bytes, warps, depth) -> int:
    """Bytes of shared memory of a block of qmv.cu: x, its sums, the warps' sums, the rings."""
    chunk = chunk_bytes * 8 // fmt.bits
    chunks = -(-K // chunk)
    units = chunk // min(chunk, fmt.group_size)
    floats = -(-chunks * units * columns // 32) * 32 + 8 * warps * 20
    stage = 16 * (chunk_bytes + 16) + 2 * 16 * max(4, units * s_bytes)
    return chunks * chunk * columns * 2 + floats * 4 + warps * depth * stage


STREAM_REGISTERS = 64  # of qmv_stream.cu, that a thread may fill with x
STREAM_STAGES = 64  # of its ring, at most
AHEAD = {2: 32, 4: 48, 8: 48}  # KiB that a block of it asks for before they come


def stream_tunings(
    bits: int, row_bytes: int, tiles: int, multiprocessors: int, grouped: bool = False
) -> list[tuple]:
    """Ways to run qmv_stream.cu, of which the first that serves is taken: what was best on an H200 first.

    (warps, bytes of a row in a warp's part of a stage, KiB of words asked for before they come (whole stages,
    one at least), blocks that fit a multiprocessor, blocks that are started for each, units whose products
    are interleaved, rows of a tile, ranks). Fewer warps than were best come first where more would leave more
    of the last stage without columns. Grouped: x is loaded anew for each group of rows.
    """
    wide = 8 * STREAM_REGISTERS * bits  # bytes whose x fills the registers of 8 warps
    small = tiles <= 2 * multiprocessors
    if row_bytes > 2 * wide:
        ranks = -(-row_bytes // (2 * wide))
        best = (*((14, 64) if bits == 8 else (16, 128)), AHEAD[bits], 1, 1, 2, 16, ranks)
    elif row_bytes > wide:
        best = {
            2: (8, 64, 32, 1, 1, 4, 32, 2),
            4: (8, 64, 40, 1, 1, 4, 16, 2),
            8: (8, 64, 40, 1, 1, 4, 16, 2),
        }[bits]
    elif grouped:
        best = 8, 128, AHEAD[bits], 1, 1, 2, 16, 1
    elif bits == 8:
        best = 8, 64, 56, 1, 1, 4, 16, 1
    elif small:
        best = (8, 64, 16, 2, 1, 2, 32, 2) if bits == 2 else (8, 128, 32, 2, 1, 2, 16, 2)
    else:
        best = (8, 64, 24, 1, 1, 4, 16, 1) if bits == 2 else (8, 64, 32, 1, 1, 4, 32, 1)
    found = []
    for warps, segment, *rest, ranks in (best, (8, 64, 48, 2, 1, 2, 16, 1), (16, 128, 48, 1, 1, 2, 16, 1)):

        def padded(w: int, stage=segment * ranks) -> int:
            return -(-row_bytes // (w * stage)) * w

        fewer = sorted(range(warps, warps * 3 // 4 - 1, -1), key=padded)
        found += [(w, segment, *rest, ranks) for w in fewer]
    return found


def stream_shape(M, N, K, fmt, x_type: str, s_type: str, gpu: dict, groups: float = 0) -> dict | None:
    """How qmv_stream.cu is compiled and started for a product; None where it does not serve.

    groups: how many there are expected of up to M rows of x with an expert each; 0: all rows have one weight.

    defines, grid_x, threads, shared (bytes).
    """
    row_bytes = K * fmt.bits // 8
    if (
        not gpu["early"]
        or x_type == "float32"
        or M > 8
        or row_bytes % 128
        or K // fmt.group_size * SIZES[s_type] % 16
    ):
        return None
    tiles = -(-N // 16) * max(1, math.ceil(groups))
    tunings = stream_tunings(fmt.bits, row_bytes, tiles, gpu["multiprocessors"], groups > 0)
    shapes = (_stream_shape(t, N, K, fmt, x_type, s_type, gpu, groups) for t in tunings)
    return next(filter(None, shapes), None)


def _stream_shape(tuning: tuple, N, K, fmt, x_type: str, s_type: str, gpu: dict, groups=0) -> dict | None:
    warps, segment, ahead, fit, started, together, rows, ranks = tuning
    row_bytes, s_bytes = K * fmt.bits // 8, SIZES[s_type]
    tiles = -(-N // rows) * max(1, math.ceil(groups))
    unit = min(fmt.group_size, segment * 8 // fmt.bits)  # codes of one scale
    stages = -(-row_bytes // (ranks * warps * segment))
    part_bytes = stages * warps * segment  # of a row in a block
    part_scales = part_bytes * 8 // fmt.bits // fmt.group_size * s_bytes
    if (
        ranks > 8
        or warps * segment % 128
        or segment not in (64, 128)
        or unit * fmt.bits < 128
        or stages * segment // fmt.bits > STREAM_REGISTERS
        or part_bytes * 8 // fmt.bits % fmt.group_size
        or (ranks > 1 and part_scales % 16)
        or (ranks - 1) * part_bytes >= row_bytes
    ):
        return None
    units, buffers = part_bytes * 8 // fmt.bits // unit, 2 if ranks == 1 else 1
    scale_columns = -(-part_scales // 128)
    clusters = max(1, min(started * gpu["multiprocessors"] // ranks, tiles))
    matrix_biases = x_type == s_type == "bfloat16"
    fixed = buffers * 32 * rows * ranks * (warps + matrix_biases) + units * 32
    fixed += 8 * (buffers + ranks * buffers + 2)
    fixed += warps * 8 * 160 if fmt.bits == 8 else 0  # x, turned
    if matrix_biases:
        fixed += -(-units * unit // fmt.group_size // 16) * 768
    most = min(STREAM_STAGES, max(2, -(-tiles // clusters) * stages))
    for blocks, depth in itertools.product((fit, 1), range(most, 1, -1)):
        scale_depth = -(-(depth - 1) // stages) + 1  # a tile's stay until its last stage is through
        shared = fixed + depth * (rows * part_bytes // stages + 16)
        shared += scale_depth * (scale_columns * 256 * rows + 16)
        if shared <= (gpu["shared"] if blocks == 1 else gpu["shared"] // blocks - 1024):  # 1 KiB a block
            break
    else:
        return None
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "X_TYPE": TYPES[x_type],
        "S_TYPE": TYPES[s_type],
        "WARPS": warps,
        "SEGMENT": segment,
        "STAGES": stages,
        "DEPTH": depth,
        "AHEAD": min(depth, max(1, ahead * 1024 // (rows * part_bytes // stages))),
        "SCALE_DEPTH": scale_depth,
        "SCALE_COLUMNS": scale_columns,
        "BUFFERS": buffers,
        "BLOCKS": blocks,
        "TOGETHER": together,
        "ROWS": rows,
        "RANKS": ranks,
        "GROUPED": int(groups > 0),
    }
    threads = 32 * (warps + 2 + matrix_biases)
    return {"defines": defines, "grid_x": clusters * ranks, "threads": threads, "shared": shared}


def _tensor_map(pointer: int, sizes, strides, box, swizzle: int):
    """What the copy engine has to know of a tensor: sizes, innermost first, and strides in bytes of the rest.

    box: elements of a copy; swizzle: 0, 32, 64 or 128, the bytes within which 16-byte pieces change places.
    """
    about = _TensorMap(sizes, strides, box, swizzle, "bytes")
    about.value = pointer
    return about.buffer


class _TensorMap:
    """_tensor_map for a tensor that moves: a kernel's argument (buffer) that takes the pointer as value."""

    def __init__(self, sizes, strides, box, swizzle: int, kind: str):
        rank, memory = len(sizes), (ctypes.c_char * 192)()
        self.buffer = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
        self.encode = _driver().cuTensorMapEncodeTiled
        self.before = self.buffer, {"bytes": 0, "float16": 6, "bfloat16": 9}[kind], rank
        self.after = (
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            {0: 0, 32: 1, 64: 2, 128: 3}[swizzle],
            3,  # 256 bytes at a time into L2
            0,
        )
        self.pointer = None

    @property
    def value(self) -> int | None:
        return self.pointer

    @value.setter
    def value(self, pointer: int) -> None:
        if pointer != self.pointer:
            _check(
                self.encode(*self.before, ctypes.c_void_p(pointer), *self.after),
                "describing a tensor to the copy engine",
            )
            self.pointer = pointer


def stream_tensors(N: int, K: int, fmt: format.Format, s_type: str, defines: dict) -> list[tuple]:
    """(sizes, strides, box, swizzle) of words, scales and biases, as qmv_stream.cu copies them."""
    row, scales = K * fmt.bits // 8, K // fmt.group_size * SIZES[s_type]
    columns = defines["WARPS"] * defines["SEGMENT"] // 128
    words = (128, N, row // 128), (row, 128), (128, defines["ROWS"], columns), 128
    return [words, *[((scales, N), (scales,), (128, defines["ROWS"]), 128)] * 2]


def _stream(device: int, pointers, M: int, N: int, K: int, fmt, x_type, s_type):
    """A launch of qmv_stream.cu that takes (x, y), or None where it does not serve."""
    shape = stream_shape(M, N, K, fmt, x_type, s_type, _device(device))
    return shape and _few_launch(device, pointers, M, N, K, fmt, s_type, shape)


def _few_launch(device: int, pointers, M: int, N: int, K: int, fmt, s_type, shape: dict, experts: int = 1):
    """A launch of qmv_stream.cu that takes (x, y), or (x, y, tiles, rows) if it is grouped."""
    gpu = _device(device)
    flags = options(gpu["arch"], shape["defines"])
    kernel = _kernel(device, "qmv_stream.cu", "qmv_stream", flags, shape["shared"])
    tensors = stream_tensors(N * experts, K, fmt, s_type, shape["defines"])
    maps = [_tensor_map(p, *of) for p, of in zip(pointers, tensors, strict=True)]
    arguments = [ctypes.c_void_p(), *maps, ctypes.c_void_p(), *(ctypes.c_int(v) for v in (M, N, K))]
    arguments += [ctypes.c_void_p(), ctypes.c_void_p()]
    grid, ranks = (shape["grid_x"], 1, 1), shape["defines"]["RANKS"]
    changing = (0, 4, 8, 9) if shape["defines"]["GROUPED"] else (0, 4)
    return _Launch(kernel, grid, shape["threads"], arguments, changing, ranks, spread=ranks > 1)


def _qmv(device: int, pointers, batches: int, M: int, N: int, K: int, fmt, x_type, s_type, indices):
    """A launch of qmv.cu that takes (x, y[, lhs, rhs]) or None where it does not fit.

    indices: None, or how many there are for lhs and for rhs to choose from.
    """
    gpu = _device(device)
    shape = qmv_shape(M, N, K, fmt, x_type, s_type, gpu)
    if shape is None:
        return None
    flags = options(gpu["arch"], shape["defines"])
    kernel = _kernel(device, "qmv.cu", "qmv", flags, shape["shared"])
    row_blocks = -(-M // shape["rows"])
    pointers = [ctypes.c_void_p(p) for p in (0, *pointers, 0, 0, 0)]
    numbers = [ctypes.c_int(v) for v in (M, N, K, row_blocks, shape["wk_bits"], *(indices or (1, 1)))]
    grid = (shape["grid_x"], batches * row_blocks, 1)
    changing = (0, 4, 5, 6) if indices else (0, 4)
    return _Launch(kernel, grid, shape["threads"], pointers + numbers, changing)


MAX_EXPERTS = 1024  # threads of a block of experts.cu
QMM_TILES = {
    8: (2, 2),
    16: (2, 2),
    32: (2, 2),
    64: (2, 2),
    128: (1, 1),
    256: (1, 1),
}  # rows: (panels, blocks)


def qmm_shape(M, N, K, fmt, x_type: str, s_type: str, gpu: dict, transpose=True, experts=0) -> dict | None:
    """How qmm.cu is compiled and started for a product; None where it does not serve.

    M is the rows of x; with experts, the expected rows of one. defines, out_tiles, rows (of x a block), ranks
    (blocks that share the reduced columns), shared (bytes).
    """
    if gpu["arch"] != "sm_90a" or x_type == "float32":
        return None
    out, reduced = (N, K) if transpose else (K, N)
    rows = next((n for n in QMM_TILES if n >= M), max(QMM_TILES))
    panels, blocks = QMM_TILES[rows]
    depth, s_bytes = 64 * panels, SIZES[s_type]
    groups = max(1, (depth if transpose else 128) // fmt.group_size)  # of a row in a stage
    aligned = groups * s_bytes % 4 == 0 and K // fmt.group_size * s_bytes % 4 == 0
    s_words = groups if s_bytes == 4 else groups // 2 + (not aligned)
    stage = panels * (rows * 128 + 1024 * fmt.bits) + (128 if transpose else depth) * 2 * s_words * 4
    fixed, sums = 4 * 8192 + 8 * rows, rows * (132 * 4 + 4)
    budget = gpu["shared"] if blocks == 1 else gpu["shared"] // 2 - 1024
    stages = min(8, (budget - fixed) // stage)
    if stages < 4:
        blocks, stages = 1, min(8, (gpu["shared"] - fixed) // stage)
    if stages < 4:
        return None
    out_tiles, stages_in_all = -(-out // 128), -(-reduced // depth)
    tiles, ranks = out_tiles * max(1, experts) * -(-M // rows), 1
    while ranks < 8 and 2 * ranks * tiles <= blocks * gpu["multiprocessors"] and stages_in_all >= 8 * ranks:
        ranks *= 2
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "X_TYPE": TYPES[x_type],
        "S_TYPE": TYPES[s_type],
        "FORWARD": int(transpose),
        "BN": rows,
        "PANELS": panels,
        "STAGES": stages,
        "MIN_BLOCKS": blocks,
        "COPY": 16 if K * fmt.bits // 8 % 16 == 0 else 8,
        "X_COPY": math.gcd(reduced * 2, 16),
        "S_ALIGNED": int(aligned),
        "GROUPED": int(experts > 0),
    }
    shared = max(fixed + stages * stage, sums)
    return {"defines": defines, "out_tiles": out_tiles, "rows": rows, "ranks": ranks, "shared": shared}


def qmm_stream_tuning(M: int) -> tuple[int, int]:
    """(rows of x a block, blocks that share a multiprocessor) of qmm_stream.cu that were best on an H200.

    Several small blocks: one waits for its words, barriers and products while others issue.
    """
    rows = next((n for n in (16, 32, 64, 128) if n >= M), 256)
    return rows, 2 if rows <= 64 else 1


def grouped_tuning(rows: int, experts: int) -> tuple[int, int]:
    """(rows of x a tile, blocks that share a multiprocessor) of qmm_stream.cu for rows of chosen experts.

    The cheapest if all experts are as likely: a tile of so many rows takes about as long as 64 rows more
    (for its weights are unpacked however many rows there are).
    """
    found = min(GROUPED_ROWS, key=lambda tile: tiles_expected(rows, experts, tile) * (64 + tile))
    return found, 2 if found <= 80 else 1


def shared_of(blocks: int, gpu: dict) -> int:
    """Bytes of shared memory for each of so many blocks of a multiprocessor; the GPU takes 1 KiB a block."""
    return gpu["shared"] if blocks == 1 else (gpu["shared"] + 1024) // blocks - 1024


GROUPED_ROWS = 16, 32, 64, 80, 96, 128, 160, 192, 256


def tiles_expected(rows: int, experts: int, tile: int) -> float:
    """How many tiles of one expert's rows there are on average, if all experts are as likely for each row."""
    mean = rows / experts
    spread = math.sqrt(2 * mean)  # of the normal distribution nearest to the number of one's rows
    ends = range(int((mean + 4 * spread) / tile) + 1)
    return experts * sum(0.5 * math.erfc((k * tile + 0.5 - mean) / spread) for k in ends)


def qmm_stream_shape(
    M, N, K, fmt, x_type: str, s_type: str, gpu: dict, transpose=True, tuning=None, grouped=False, **changed
) -> dict | None:
    """How qmm_stream.cu is compiled and started; None where it does not serve.

    tuning: instead of qmm_stream_tuning's; grouped: x is sorted by experts; changed: TURNED, BUFFERS,
    MOST_UNROLLED, HALVES, PARTS other than they would be. defines, out_tiles, rows (of x a block), units
    (that ranks share, `steps` each), threads, shared (bytes).
    """
    out, reduced = (N, K) if transpose else (K, N)
    s_bytes = SIZES[s_type]
    row_bytes, scale_bytes = K * fmt.bits // 8, K // fmt.group_size * s_bytes
    if gpu["arch"] != "sm_90a" or x_type == "float32" or row_bytes % 16 or scale_bytes % 16 or reduced % 8:
        return None
    rows, blocks = tuning or qmm_stream_tuning(M)
    many_tiles = out > 128 * gpu["multiprocessors"] // 4  # with fewer, ranks of whole blocks fill the chip
    twice = transpose and rows == 128 and many_tiles and x_type == s_type and not grouped
    halves = changed.get("HALVES", 2 if twice else 1)
    out_tiles = -(-out // (128 * halves))
    if transpose:
        single = halves == 2 or rows <= (128 if fmt.bits == 8 else 32) or rows == 160
    else:
        single = rows <= 128 or (rows <= 160 and fmt.bits < 8)
    w_steps, s_steps = (16 // fmt.bits, 16 // s_bytes * fmt.group_size // 64) if transpose else (2, 2)
    w_stage = 128 * (128 if transpose else 16 * fmt.bits) * halves
    x_stages = (
        {256: 4, 192: 4, 160: 5, 128: 6}.get(rows, 8)
        if blocks == 1
        else min(8, max(4, 32768 // (rows * 128)))
    )
    limit = shared_of(blocks, gpu)
    for w_stages in range(12, 1, -1):
        s_stages = -(-w_stages * w_steps // s_steps) + 1
        shared = x_stages * rows * 128 + w_stages * w_stage + s_stages * 4096 * halves
        shared += 16 * (x_stages + w_stages + s_stages) + 8 * (x_stages if transpose else s_stages)
        if shared <= limit:
            break
    else:
        return None
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "X_TYPE": TYPES[x_type],
        "S_TYPE": TYPES[s_type],
        "FORWARD": int(transpose),
        "GROUPED": int(grouped),
        "BN": rows,
        "BLOCKS": blocks,
        "HALVES": halves,
        "TURNED": int(transpose and fmt.bits < 8 and rows <= 32),  # turning x costs more with more of it
        "BUFFERS": 1 if single else 2,
        "MOST_UNROLLED": 8,
        "PARTS": 1,
        "X_STAGES": x_stages,
        "W_STAGES": w_stages,
        "S_STAGES": s_stages,
    } | changed
    shared = max(shared, rows * 132 * 4 * halves)
    steps = -(-reduced // 64)
    return {
        "defines": defines,
        "out_tiles": out_tiles,
        "rows": rows,
        "units": -(-steps // w_steps),
        "steps": w_steps,
        "threads": 128 + 256 * halves,
        "shared": shared,
    }


def qmm_stream_ranks(
    tiles: int, units: int, steps: int, blocks: int, multiprocessors: int, at_once, parts=(1,), sums=0
) -> tuple[int, int]:
    """(ranks, parts): blocks of a cluster, and clusters, that share the reduced columns of a tile.

    All are resident at once; (1, 1) where no more are. units: of so many steps, that they share; blocks: that
    fit a multiprocessor; at_once(ranks): how many clusters of so many blocks are resident at once, less than
    all blocks where a part of the chip has an odd number of multiprocessors left; parts: to choose from;
    sums: bytes of a part's.
    """

    def cost(found: tuple[int, int]) -> float:
        """In steps of a block that has all issue slots (0.21 us); alone it can use half of them."""
        ranks, of = found
        shares = ranks * of
        each = -(-units // shares)
        room = at_once(ranks) if ranks > 1 else blocks * multiprocessors
        # each has to have a share
        if shares > 1 and (each * (shares - 1) >= units or tiles * of > room):
            return math.inf
        beside = min(blocks, -(-tiles * shares // multiprocessors))
        adding = 12 + 2 * of * sums / 1e6 if of > 1 else 0
        return each * steps * max(2, beside) + 20 + ranks + adding

    return min(((ranks, of) for of in parts for ranks in range(1, 9)), key=cost)


class _Parts:
    """qmm_stream.cu's sums in parts, and what adds them up; with a workspace of so many floats."""

    def __init__(self, product: _Launch, add: _Launch, parts: int, floats: int):
        self.product, self.add, self.parts, self.floats = product, add, parts, floats
        self.name, self.config = product.name, product.config

    def __call__(self, stream: int, x: int, y: int, workspace: int, early: bool = False) -> None:
        self.product(stream, x, workspace, early=early)
        self.add(stream, workspace, y, early=True)  # it waits for the sums itself


def q8_stream_tuning(M: int, fmt: format.Format, per_row: bool) -> tuple[int, int]:
    """(rows of x a block, blocks that share a multiprocessor) of q8_stream.cu that were best on an H200."""
    rows = next((n for n in (16, 32, 64, 128) if n >= M), 256 if per_row else 128)
    if rows == 128 and (fmt.bits == 8 if per_row else fmt.group_size == 128 or 128 < M <= 1024):
        rows = 64
    return rows, 2 if rows <= 64 else 1


def q8_stream_shape(
    M, N, K, fmt, s_type: str, y_type: str, x_scales: int, per_row: bool, gpu: dict, tuning=None, **changed
) -> dict | None:
    """How q8_stream.cu is compiled and started; None where it does not serve.

    x_scales: 0 one for all, 1 one a row, 2 one for as many columns as a group has; tuning: instead of
    q8_stream_tuning's; changed: BUFFERS other than it would be.
    defines, out_tiles, rows (of x a block), units (that ranks share, `steps` of 64 columns each), shared.
    """
    s_bytes = SIZES[s_type]
    row_bytes, scale_bytes = K * fmt.bits // 8, K // fmt.group_size * s_bytes
    if gpu["arch"] != "sm_90a" or row_bytes % 16 or not (per_row or scale_bytes % 16 == 0):
        return None
    rows, blocks = tuning or q8_stream_tuning(M, fmt, per_row)
    w_steps, s_steps = 8 // fmt.bits, 16 // s_bytes * fmt.group_size // 128
    spans = 128 // fmt.group_size
    x_stage = rows * 128 + (0 if per_row else (1 + (x_scales == 2)) * spans * rows * 4)
    limit = shared_of(blocks, gpu)
    for x_stages, w_stages in ((8, 8), (6, 6), (6, 4), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2)):
        s_stages = 1 if per_row else -(-w_stages * w_steps // s_steps) + 1
        shared = x_stages * x_stage + w_stages * 16384 + s_stages * 4096
        shared += 8 * (3 * x_stages + 2 * w_stages + 2 * s_stages)
        if shared <= limit:
            break
    else:
        return None
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "S_TYPE": TYPES[s_type],
        "Y_TYPE": TYPES[y_type],
        "X_SCALES": x_scales,
        "PER_ROW": int(per_row),
        "BN": rows,
        "BLOCKS": blocks,
        "BUFFERS": 2 if (rows == 256 if per_row else rows <= 32) else 1,
        "X_STAGES": x_stages,
        "W_STAGES": w_stages,
        "S_STAGES": s_stages,
    } | changed
    steps = -(-K // 128)
    return {
        "defines": defines,
        "out_tiles": -(-N // 128),
        "rows": rows,
        "units": -(-steps // w_steps),
        "steps": 2 * w_steps,
        "shared": max(shared, rows * 132 * 4),
    }


def q8mm_shape(
    M, N, K, fmt, s_type: str, y_type: str, x_scales: int, per_row: bool, gpu: dict
) -> dict | None:
    """How q8mm.cu is compiled and started; None where it does not serve. As qmm_shape.

    x_scales: 0 one for all, 1 one a row, 2 one for as many columns as a group has.
    """
    if gpu["arch"] != "sm_90a":
        return None
    most = 256 if per_row and fmt.bits < 8 else 128  # registers for two sums an element; shared memory
    rows = next((n for n in (8, 16, 32, 64, 128) if n >= M), most)
    panels, s_bytes = 2 if rows <= 64 and fmt.bits < 8 else 1, SIZES[s_type]
    groups = max(1, 128 * panels // fmt.group_size)  # of a row in a stage
    aligned = groups * s_bytes % 4 == 0 and K // fmt.group_size * s_bytes % 4 == 0
    s_words = groups if s_bytes == 4 else groups // 2 + (not aligned)
    stage = panels * (rows * 128 + 2048 * fmt.bits) + 128 * 2 * s_words * 4
    fixed = 4 * 8192 + 8 * rows * panels * 128 // min(128, fmt.group_size)
    blocks = 2 if rows <= 32 else 1
    budget = gpu["shared"] // blocks - 1024
    stages = min(8, (budget - fixed) // stage)
    if stages < 4:
        blocks, stages = 1, min(8, (gpu["shared"] - fixed) // stage)
    if stages < 4:
        return None
    out_tiles, stages_in_all, ranks = -(-N // 128), -(-K // (128 * panels)), 1
    tiles = out_tiles * -(-M // rows)
    while ranks < 8 and 2 * ranks * tiles <= blocks * gpu["multiprocessors"] and stages_in_all >= 8 * ranks:
        ranks *= 2
    defines = {
        "BITS": fmt.bits,
        "GROUP": fmt.group_size,
        "S_TYPE": TYPES[s_type],
        "Y_TYPE": TYPES[y_type],
        "X_SCALES": x_scales,
        "PER_ROW": int(per_row),
        "BN": rows,
        "PANELS": panels,
        "STAGES": stages,
        "MIN_BLOCKS": blocks,
        "COPY": 16 if K * fmt.bits // 8 % 16 == 0 else 8,
        "S_ALIGNED": int(aligned),
    }
    shared = max(fixed + stages * stage, rows * 132 * 4)
    return {"defines": defines, "out_tiles": out_tiles, "rows": rows, "ranks": ranks, "shared": shared}


@functools.cache
def _clusters_at_once(kernel: Kernel, threads: int, ranks: int) -> int:
    """How many clusters of so many of the kernel's blocks its device holds at once; 0: none fits."""
    launch = _Launch(kernel, (ranks, 1, 1), threads, (), (), ranks)
    found = ctypes.c_int()
    code = kernel.driver.cuOccupancyMaxActiveClusters(ctypes.byref(found), kernel.function, launch.config_at)
    _check(code, "counting clusters")
    return found.value


def _many_streamed(device: int, pointers, M: int, N: int, K: int, fmt, x_type, s_type, transpose):
    """A launch of qmm_stream.cu that takes (x, y), or None where it does not serve."""
    gpu = _device(device)
    shape = qmm_stream_shape(M, N, K, fmt, x_type, s_type, gpu, transpose)
    return shape and _stream_launch(device, pointers, M, N, K, fmt, x_type, s_type, transpose, shape)


def _stream_launch(
    device,
    pointers,
    M,
    N,
    K,
    fmt,
    x_type,
    s_type,
    transpose,
    shape: dict,
    ranks=None,
    groups=None,
    parts=None,
):
    """A launch that takes (x, y), or _Parts.

    ranks, with the shape's PARTS: instead of qmm_stream_ranks's, which has `parts` to choose from. groups:
    None, or (experts, tiles expected, tiles at most); then it takes (x, y, tiles, rows).
    """
    gpu, out = _device(device), N if transpose else K

    def compiled(function: str = "qmm_stream") -> Kernel:
        shared = shape["shared"] if function == "qmm_stream" else 0
        return _roomy_kernel(device, "qmm_stream.cu", function, shape["defines"], shared)

    kernel, given = compiled(), shape["defines"]["PARTS"]
    experts, tiles, most_tiles = groups or (0, *[-(-M // shape["rows"])] * 2)
    free = given == 1 and shape["rows"] == 128 and not groups and out % 4 == 0  # with fewer rows not measured
    ranks, parts = (
        (ranks, given)
        if ranks
        else qmm_stream_ranks(
            shape["out_tiles"] * math.ceil(tiles),
            shape["units"],
            shape["steps"],
            shape["defines"]["BLOCKS"],
            gpu["multiprocessors"],
            functools.partial(_clusters_at_once, kernel, shape["threads"]),
            parts or (range(1, 5) if free else (given,)),
            4 * M * out,
        )
    )
    if parts != given:
        shape = shape | {"defines": shape["defines"] | {"PARTS": parts}}
        kernel = compiled()
    row, scales = K * fmt.bits // 8, K // fmt.group_size * SIZES[s_type]
    box = 128 if transpose else 16 * fmt.bits
    reduced = K if transpose else N
    x = _TensorMap((reduced, M), (2 * reduced,), (64, shape["rows"]), 128, x_type)
    maps = [
        _tensor_map(p, (size, N, experts), (size, N * size), (*of, 1), swizzle)
        if experts
        else _tensor_map(p, (size, N), (size,), of, swizzle)
        for p, size, of, swizzle in zip(
            pointers, (row, scales, scales), ((box, 128), *[(16, 128)] * 2), (box, 0, 0), strict=True
        )
    ]
    arguments = [x, *maps, ctypes.c_void_p(), *(ctypes.c_int(v) for v in (M, N, K))]
    arguments += [ctypes.c_void_p(), ctypes.c_void_p()]
    grid = (ranks, shape["out_tiles"], most_tiles * parts)
    changing = (0, 4, 8, 9) if experts else (0, 4)
    product = _Launch(kernel, grid, shape["threads"], arguments, changing, ranks)
    if parts == 1:
        return product
    fours = M * out // 4
    arguments = [ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(fours)]
    add = _Launch(compiled("add_parts"), (-(-fours // 256), 1, 1), 256, arguments, (0, 1))
    return _Parts(product, add, parts, parts * M * out)


def _many(device: int, pointers, M: int, N: int, K: int, fmt, x_type, s_type, transpose):
    """A launch of qmm.cu that takes (x, y) or None where it does not serve."""
    shape = qmm_shape(M, N, K, fmt, x_type, s_type, _device(device), transpose)
    return shape and _many_launch(device, pointers, M, N, K, shape, -(-M // shape["rows"]))


def _many_launch(device: int, pointers, M: int, N: int, K: int, shape: dict, tiles: int):
    """A launch of qmm.cu that takes (x, y), or (x, y, tiles, rows) if it is grouped."""
    flags = options(_device(device)["arch"], shape["defines"])
    kernel = _kernel(device, "qmm.cu", "qmm", flags, shape["shared"])
    arguments = [ctypes.c_void_p(p) for p in (0, *pointers, 0)]
    arguments += [*(ctypes.c_int(v) for v in (M, N, K)), ctypes.c_void_p(), ctypes.c_void_p()]
    changing = (0, 4, 8, 9) if shape["defines"]["GROUPED"] else (0, 4)
    grid = (shape["ranks"], shape["out_tiles"], tiles)
    return _Launch(kernel, grid, 256, arguments, changing, shape["ranks"])


def _roomy_kernel(device: int, file: str, function: str, defines: dict, shared: int) -> Kernel:
    """A kernel with as much shared memory as there is: else fewer blocks may fit than are meant to."""
    found = _kernel(device, file, function, options(_device(device)["arch"], defines), shared)
    _check(found.driver.cuFuncSetAttribute(found.function, _FUNCTION_CARVEOUT, 100), "room for blocks")
    return found


class _Grouped:
    """gather_qmm by experts.cu, which sorts rows by expert, and a product of tiles of one expert's rows.

    x_blocks: of M rows each. The product may begin while rows are sorted, and the sorting while the kernel
    before still runs: each waits for the one before it, first of all.
    """

    def __init__(
        self, device: int, product, pairs: int, x_blocks: int, M: int, experts, reduced, tile_rows, tiles: int
    ):
        self.device, self.product, self.name = device, product, product.name
        self.rows, self.reduced, self.most_tiles = pairs * M, reduced, tiles
        self.sort = _sort(device, pairs, x_blocks, M, experts, reduced, tile_rows, tiles)

    def __call__(self, side, x_at: int, x_type: str, y, lhs, rhs) -> None:
        pointer, stream = side.pointer, side.stream(self.device)
        x_sorted = side.empty((self.rows, self.reduced), x_type, self.device)
        table = side.empty((4 * self.most_tiles + self.rows,), "int32", self.device)
        tiles = pointer(table)
        rows = tiles + 16 * self.most_tiles
        self.sort(stream, x_at, pointer(lhs), pointer(rhs), pointer(x_sorted), tiles, rows, early=True)
        self.product(stream, pointer(x_sorted), pointer(y), tiles, rows, early=True)


def most_tiles(rows: int, tile: int, experts: int) -> int:
    """Tiles of one expert's rows that there are at most, if so many experts have a row at most."""
    return max(1, (rows + experts * (tile - 1)) // tile)


def _sort(
    device: int, pairs: int, x_blocks: int, M: int, experts: int, reduced: int, tile_rows, tiles
) -> _Launch:
    """A launch of experts.cu that takes (x, lhs, rhs, sorted, tiles, rows)."""
    gpu = _device(device)
    shape = sort_shape(pairs, M, experts, reduced, gpu)
    kernel = _kernel(
        device, "experts.cu", "by_expert", options(gpu["arch"], shape["defines"]), shape["shared"]
    )
    numbers = pairs, M, x_blocks, experts, tile_rows, tiles, shape["pieces"]
    arguments = [*(ctypes.c_void_p() for _ in range(6)), *(ctypes.c_int(v) for v in numbers)]
    return _Launch(kernel, (1, shape["blocks"], 1), 1024, arguments, range(6))


def sort_shape(pairs: int, M: int, experts: int, reduced: int, gpu: dict, blocks: int = 0) -> dict:
    """How experts.cu is compiled and started: defines, blocks, pieces (of a row of x), shared (bytes)."""
    piece = 2 if reduced % 8 else 16
    rows = pairs * M
    few = max(1, min(gpu["multiprocessors"], rows, rows * reduced * 2 >> 12))
    blocks = blocks or max(few, -(-pairs // 8192))
    most_pairs = min(pairs, -(-rows // blocks) // M + 2)
    shared = 4 * (experts * 34 + 64 + most_pairs)
    return {"defines": {"PIECE": piece}, "blocks": blocks, "pieces": reduced * 2 // piece, "shared": shared}


def grouped_shape(pairs, M, N, K, fmt, x_type, s_type, gpu: dict, transpose, experts) -> tuple | None:
    """(kernel file's name, how it is compiled and started) for pairs of M rows and an expert, or None."""
    rows, about = pairs * M, (N, K, fmt, x_type, s_type)
    fits = experts <= MAX_EXPERTS and rows * -(-N // 16) < 1 << 30 and N * experts < 1 << 31
    if gpu["arch"] != "sm_90a" or x_type == "float32" or not fits:
        return None
    groups = tiles_expected(rows, experts, 8)
    if transpose and groups <= GROUPS_BEST_IN_QMV_STREAM[fmt.bits] * experts:
        shape = stream_shape(8, *about, gpu, groups)
        if shape:
            return "qmv_stream", shape
    shape = qmm_stream_shape(rows, *about, gpu, transpose, grouped_tuning(rows, experts), grouped=True)
    if shape:
        return "qmm_stream", shape
    shape = qmm_shape(-(-rows // experts), *about, gpu, transpose, experts)
    return shape and ("qmm", shape)


def _grouped(
    device,
    pointers,
    pairs,
    x_blocks,
    M,
    N,
    K,
    fmt,
    x_type,
    s_type,
    transpose,
    experts,
    found=None,
    ranks=None,
):
    """A _Grouped, or None where none serves. found: instead of grouped_shape's; ranks: of qmm_stream.cu."""
    reduced, rows, about = K if transpose else N, pairs * M, (N, K, fmt, x_type, s_type)
    found = found or grouped_shape(pairs, M, *about, _device(device), transpose, experts)
    if found is None:
        return None
    kernel, shape = found
    tile_rows = 8 if kernel == "qmv_stream" else shape["rows"]
    most = most_tiles(rows, tile_rows, min(experts, pairs))
    if kernel == "qmv_stream":
        product = _few_launch(device, pointers, rows, N, K, fmt, s_type, shape, experts)
    elif kernel == "qmm_stream":
        groups = experts, tiles_expected(rows, experts, tile_rows), most
        product = _stream_launch(device, pointers, rows, *about, transpose, shape, ranks, groups)
    else:
        product = _many_launch(device, pointers, rows, N, K, shape, most)
    return _Grouped(device, product, pairs, x_blocks, M, experts, reduced, tile_rows, most)


def qmm(x, w: format.Packed, transpose: bool = True):
    """x times packed weights; see mlxq.ops.qmm. All arrays of one framework, on one GPU."""
    plans = w.__dict__.get("_cuda_plans")
    if plans is None:
        plans = w.__dict__["_cuda_plans"] = {}  # the weight carries what was worked out for it
    key = x.shape, x.dtype, transpose
    plan = plans.get(key)
    if plan is not None:
        y = plan.call(plan, x, w)
        if y is not None:
            return y
    plan = plans[key] = _Product(x, w, transpose)
    return plan.run(x, w)


def counts_versions(*tensors) -> bool:
    """Whether torch counts the changes of all of them; it does not for tensors made in inference mode."""
    return not any(t.is_inference() for t in tensors)


class _Product:
    """qmm for one weight, one shape of x and one type. The first call checks everything."""

    def __init__(self, x, w: format.Packed, transpose: bool):
        self.side = side = _side("qmm", x, w.words, w.scales, w.biases)
        named = {"x": side.describe(x)}
        for name in ("words", "scales", "biases"):
            named[name] = side.describe(getattr(w, name))
        self.device = device = named["x"][3]
        self.pointers = tuple(named[name][0] for name in ("words", "scales", "biases"))
        self.transpose, self.x_type = transpose, format.dtype_name(x)
        x_shape = tuple(x.shape)
        _check_product("qmm", x_shape, self.x_type, w, transpose)
        _check_arrays("qmm", named, device)
        if len(w.words.shape) != 2:
            raise ValueError(f"qmm: words have shape {tuple(w.words.shape)}; wanted (N, K * bits / 32)")
        self.shape = (*x_shape[:-1], w.N if transpose else w.K)
        M, N, K = math.prod(x_shape[:-1]), w.N, w.K
        self.empty = M * N * K == 0
        self.launch = None
        if not self.empty:
            about = N, K, w.format, self.x_type, format.dtype_name(w.scales)
            with side.on(device):
                if transpose and M <= ROWS_BEST_IN_QMV:
                    self.launch = _stream(device, self.pointers, M, *about)
                if not transpose or M > ROWS_BEST_IN_QMV:
                    many = device, self.pointers, M, *about, transpose
                    self.launch = _many_streamed(*many) or _many(*many)
                if self.launch is None and transpose and M <= ROWS_OF_QMV:
                    self.launch = _qmv(device, self.pointers, 1, M, *about, None)
        self.floats = getattr(self.launch, "floats", 0)  # of a workspace
        quick = self.launch is not None and side is _Torch
        # a function of (plan, x, w), no method: a plan that holds itself would keep the weights
        self.call = self._quick(w.words, w.scales, w.biases) if quick else _Product._checked

    def fits(self, x, w) -> bool:
        """Whether what the first call checked still holds, in as few looks as possible."""
        side = self.side
        return side.usable(x, self.device) and self.pointers == (
            side.pointer(w.words), side.pointer(w.scales), side.pointer(w.biases)
        )  # fmt: skip

    def _checked(self, x, w):
        """The product, or None if what the first call checked no longer holds."""
        return self.run(x, w) if self.fits(x, w) else None

    def _quick(self, words, scales, biases):
        """_checked for torch with a kernel, all looked up beforehand: this is host time of each call."""
        torch = sys.modules["torch"]
        device, launch, pointers = self.device, self.launch, self.pointers
        current_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
        early_at_all = _device(device)["early"] and counts_versions(words, scales, biases)
        where, floats, versions = torch.device("cuda", device), self.floats, None
        # any element in y's shape: another like it is made faster than by naming shape, dtype and device
        like = words.view(-1).view(getattr(torch, self.x_type))[:1].expand(self.shape)
        another = torch.empty_like

        def quick(plan, x, w):
            nonlocal versions
            at = x.data_ptr()
            if (
                at & 15
                or not x.is_contiguous()
                or x.get_device() != device
                or (words.data_ptr(), scales.data_ptr(), biases.data_ptr()) != pointers
            ):
                return None
            if current_device() != device:
                return plan.run(x, w)
            now = (words._version, scales._version, biases._version) if early_at_all else None
            y = another(like)
            # Early, before the kernel before it has ended, only if that one cannot have written the weights:
            # if they are what they were at the last call, whose kernel waited for all that came before it.
            early = early_at_all and now == versions
            if floats:
                workspace = torch.empty((floats,), dtype=torch.float32, device=where)
                launch(current_stream(device), at, y.data_ptr(), workspace.data_ptr(), early=early)
            else:
                launch(current_stream(device), at, y.data_ptr(), early=early)
            versions = now
            return y

        return quick

    def run(self, x, w):
        side, device = self.side, self.device
        if side.current_device() != device:
            with side.on(device):
                return self.run(x, w)
        if self.empty:
            return side.zeros(self.shape, x)
        if self.launch is None:
            weights = dequantize(w, self.x_type)
            return side.product(x, weights.T if self.transpose else weights)
        y = side.like(self.shape, x)
        places = [side.pointer(x), side.pointer(y)]
        if self.floats:
            workspace = side.empty((self.floats,), "float32", device)
            places.append(side.pointer(workspace))
        self.launch(side.stream(device), *places)
        return y


def gather_qmm(x, w: format.Packed, lhs_indices=None, rhs_indices=None, transpose: bool = True):
    """Blocks of x times chosen experts; see mlxq.ops.gather_qmm. Indices: x's framework and GPU."""
    side = _side("gather_qmm", x, w.words, w.scales, w.biases)
    x_at = side.describe(x)
    parts = side.describe(w.words), side.describe(w.scales), side.describe(w.biases)
    _, x_shape, _, device, _ = x_at
    if len(x_shape) < 2:
        raise ValueError(f"gather_qmm: x has shape {tuple(x_shape)}; wanted (..., M, K)")
    x_type, s_type = format.dtype_name(x), format.dtype_name(w.scales)
    names = ("x", "words", "scales", "biases")
    _check_arrays("gather_qmm", dict(zip(names, (x_at, *parts), strict=True)), device)
    _check_product("gather_qmm", x_shape, x_type, w, transpose)
    with side.on(device):
        lhs = side.indices(lhs_indices, x_shape[:-2], device)
        rhs = side.indices(rhs_indices, w.shape[:-2], device)
        lhs, rhs = side.broadcast(lhs, rhs)
        M, N, K, batches = x_shape[-2], w.N, w.K, math.prod(lhs.shape)
        y = side.empty((*lhs.shape, M, N if transpose else K), x_type, device)
        if not math.prod(y.shape):
            return y
        if M * N * K == 0:
            y[...] = 0
            return y
        x_blocks, experts = math.prod(x_shape[:-2]), math.prod(w.shape[:-2])
        key = ("gather", batches, x_blocks, M, x_type, parts, w.format, transpose)
        launch = _plans.get(key)
        if launch is None:
            pointers = [p[0] for p in parts]
            about = M, N, K, w.format, x_type, s_type
            if not transpose or batches * M > ROWS_BEST_IN_QMV_OF_EXPERTS:
                launch = _grouped(device, pointers, batches, x_blocks, *about, transpose, experts)
            if launch is None and transpose:
                launch = _qmv(device, pointers, batches, *about, (x_blocks, experts))
            if launch is not None:
                _remember(key, launch)
        if isinstance(launch, _Grouped):
            launch(side, x_at[0], x_type, y, lhs, rhs)
            return y
        if launch is not None:
            arrays = (x_at[0], side.pointer(y), side.pointer(lhs), side.pointer(rhs))
            launch(side.stream(device), *arrays)
            return y
        weights = dequantize(w, x_type).reshape(-1, N, K)
        blocks = x.reshape(-1, *x_shape[-2:])[side.inside(lhs.reshape(-1), x_blocks)]
        chosen = weights[side.inside(rhs.reshape(-1), experts)]
        product = side.product(blocks, chosen.swapaxes(-1, -2) if transpose else chosen)
        y[...] = product.reshape(y.shape)
    return y


ROWS_BEST_IN_QMV = 8
ROWS_BEST_IN_QMV_OF_EXPERTS = 2
GROUPS_BEST_IN_QMV_STREAM = {2: 1.75, 4: 1.75, 8: 1.25}  # of up to eight rows, an expert
# Where qmm.cu does not serve: qmv reads the weights once for every eight rows; beyond, a copy is faster.
ROWS_OF_QMV = 32


def dequantize(packed: format.Packed, dtype: str | None = None):
    """scale * code + bias as (..., N, K) in float32, rounded to dtype; see mlxq.ops.dequantize."""
    side = _side("dequantize", packed.words, packed.scales, packed.biases)
    s_type = format.dtype_name(packed.scales)
    dtype = dtype or s_type
    parts = [side.describe(a) for a in (packed.words, packed.scales, packed.biases)]
    device = parts[0][3]
    key = ("dequantize", *parts, packed.format, dtype)
    plan = _plans.get(key)
    if plan is None:
        _check_arrays("dequantize", dict(zip(("words", "scales", "biases"), parts, strict=True)), device)
        packed.validate()
        if dtype not in TYPES:
            raise TypeError(f"dequantize: {dtype} is not a storage; wanted one of {', '.join(TYPES)}")
        if packed.format.bits not in format.KERNEL_BITS:
            raise ValueError(f"dequantize: {packed.format} has no CUDA kernel")
        groups = math.prod(packed.scales.shape)
        plan = None, packed.shape
        if groups:
            with side.on(device):
                kernel = _exact_kernel(device, "dequantize", packed.format, dtype, s_type)
            words = groups * packed.format.group_size * packed.format.bits // 32
            arguments = [*(ctypes.c_void_p(p[0]) for p in parts), ctypes.c_void_p()]
            arguments.append(ctypes.c_longlong(groups))
            plan = _Launch(kernel, (-(-words // 256), 1, 1), 256, arguments, (3,)), packed.shape
        _remember(key, plan)
    launch, shape = plan
    with side.on(device):
        w = side.empty(shape, dtype, device)
        if launch:
            launch(side.stream(device), side.pointer(w))
    return w


def q8_rows(x, group_size: int | None = None):
    """int8 codes and float32 scales of x's rows, or of so many neighbours; see mlxq.ops.q8_rows."""
    side = _side("q8_rows", x)
    at = side.describe(x)
    _, shape, _, device, _ = at
    _check_arrays("q8_rows", {"x": at}, device)
    K = group_size or shape[-1]
    rows = math.prod(shape) // K
    with side.on(device):
        codes = side.empty(shape, "int8", device)
        scales = side.empty((*shape[:-1], *([shape[-1] // K] if group_size else [])), "float32", device)
        if rows:
            warps = 1 if K <= 256 else 8  # a row
            defines = {"X_TYPE": TYPES[format.dtype_name(x)], "ROW_WARPS": warps}
            flags = options(_device(device)["arch"], defines, exact=True)
            kernel = _kernel(device, "q8_rows.cu", "q8_rows", flags, 0)
            arrays = [ctypes.c_void_p(side.pointer(a)) for a in (x, codes, scales)]
            grid = (-(-rows * warps // 8), 1, 1)
            _Launch(kernel, grid, 256, [*arrays, ctypes.c_longlong(rows), ctypes.c_int(K)], ())(
                side.stream(device)
            )
    return codes, scales


def q8mm(x_codes, x_scales, w: format.Packed, per_row: bool, dtype: str):
    """int8 codes times packed weights; see mlxq.ops.q8mm. Before Hopper a product in float64."""
    side = _side("q8mm", x_codes, x_scales, w.words, w.scales, w.biases)
    named = {"x": side.describe(x_codes), "x_scales": side.describe(x_scales)}
    for name in ("words", "scales", "biases"):
        named[name] = side.describe(getattr(w, name))
    device, s_type = named["x"][3], format.dtype_name(w.scales)
    M, N, K = math.prod(x_codes.shape[:-1]), w.N, w.K
    one_scale = math.prod(x_scales.shape) == 1 and M != 1
    tiled = len(x_scales.shape) == len(x_codes.shape) and math.prod(x_scales.shape) != 1
    kinds = 0 if one_scale else 2 if tiled else 1
    weights = tuple(named[name] for name in ("words", "scales", "biases"))
    key = ("q8mm", device, x_codes.shape, kinds, *weights, w.format, per_row, dtype)
    found = _plans.get(key)
    _check_arrays("q8mm", named, device)
    with side.on(device):
        y = side.empty((*x_codes.shape[:-1], N), dtype, device)
        if M * N == 0:
            return y
        if found is None:
            about = M, N, K, w.format, s_type, dtype, kinds, per_row
            launch = _q8_streamed(device, [at[0] for at in weights], *about)
            found = _remember(key, (launch or _q8(device, [at[0] for at in weights], *about),))
        (launch,) = found
        if launch is None:
            y[...] = _q8mm_in_float64(side, x_codes, x_scales, w, per_row, tiled).reshape(y.shape)
            return y
        arrays = w.words, w.scales, w.biases
        counted = side is _Torch and _device(device)["early"] and counts_versions(*arrays)
        versions = tuple(a._version for a in arrays) if counted else None
        # early as in _Product: only if the kernel before cannot have written the weights. Their versions stay
        # with the weight: a plan may outlast it and serve another one at the same addresses
        early = counted and w.__dict__.get("_cuda_versions") == versions
        w.__dict__["_cuda_versions"] = versions
        launch(side.stream(device), named["x"][0], named["x_scales"][0], side.pointer(y), early=early)
    return y


def _q8_streamed(device, pointers, M, N, K, fmt, s_type, y_type, kinds, per_row):
    """A launch of q8_stream.cu that takes (x, x_scales, y), or None where it does not serve."""
    about = M, N, K, fmt, s_type, y_type, kinds, per_row
    shape = q8_stream_shape(*about, _device(device))
    return shape and _q8_stream_launch(device, pointers, *about, shape)


def _q8_stream_launch(
    device, pointers, M, N, K, fmt, s_type, y_type, kinds, per_row, shape: dict, ranks=None
):
    gpu, defines = _device(device), shape["defines"]
    kernel = _roomy_kernel(device, "q8_stream.cu", "q8_stream", defines, shape["shared"])
    row_tiles = -(-M // shape["rows"])
    ranks = (
        ranks
        or qmm_stream_ranks(
            shape["out_tiles"] * row_tiles,
            shape["units"],
            shape["steps"],
            defines["BLOCKS"],
            gpu["multiprocessors"],
            functools.partial(_clusters_at_once, kernel, 384),
        )[0]
    )
    row, scales = K * fmt.bits // 8, K // fmt.group_size * SIZES[s_type]
    x = _TensorMap((K, M), (K,), (128, shape["rows"]), 128, "bytes")
    words = _tensor_map(pointers[0], (row, N), (row,), (128, 128), 128)
    groups = [words] * 2  # with a scale a row nobody asks for them
    if not per_row:
        groups = [_tensor_map(p, (scales, N), (scales,), (16, 128), 0) for p in pointers[1:]]
    arrays = ctypes.c_void_p(), ctypes.c_void_p(pointers[1]), ctypes.c_void_p()  # x_scales, scales, y
    arguments = [x, words, *groups, *arrays, *(ctypes.c_int(v) for v in (M, N, K))]
    return _Launch(kernel, (ranks, row_tiles, shape["out_tiles"]), 384, arguments, (0, 4, 6), ranks)


def _q8(device, pointers, M, N, K, fmt, s_type, y_type, kinds, per_row):
    """A launch of q8mm.cu that takes (x, x_scales, y), or None where it does not serve."""
    gpu = _device(device)
    shape = q8mm_shape(M, N, K, fmt, s_type, y_type, kinds, per_row, gpu)
    if shape is None:
        return None
    kernel = _kernel(device, "q8mm.cu", "q8mm", options(gpu["arch"], shape["defines"]), shape["shared"])
    arrays = [ctypes.c_void_p(p) for p in (0, 0, *pointers, 0)]
    sizes = [ctypes.c_int(v) for v in (M, N, K)]
    grid = shape["ranks"], shape["out_tiles"], -(-M // shape["rows"])
    return _Launch(kernel, grid, 256, arrays + sizes, (0, 1, 5), shape["ranks"])


def _q8mm_in_float64(side, x_codes, x_scales, w: format.Packed, per_row: bool, tiled: bool):
    """(M, N) float64: sums of integers are exact in it."""
    double, zero = side.double, 2 ** (w.format.bits - 1)
    scales, biases = double(w.scales), double(w.biases)
    groups, size = scales.shape[1], w.format.group_size
    x = double(x_codes).reshape(-1, groups, size)
    codes = double(dequantize(format.Packed(w.words, w.scales * 0 + 1, w.biases * 0, w.format), "float32"))
    codes = codes.reshape(w.N, groups, size) - zero
    if tiled:
        x = x * double(x_scales).reshape(-1, groups, 1)
    factors = 1 if tiled else double(x_scales).reshape(-1, 1)
    sums = side.einsum("mgk,ngk->mng", x, codes)
    if per_row:
        return sums.sum(-1) * (factors * scales[:, 0])
    return factors * ((sums * scales).sum(-1) + x.sum(-1) @ (biases + zero * scales).T)


def _exact_kernel(device: int, function: str, fmt: format.Format, w_type: str, s_type: str) -> Kernel:
    defines = {"BITS": fmt.bits, "GROUP": fmt.group_size, "W_TYPE": TYPES[w_type], "S_TYPE": TYPES[s_type]}
    flags = options(_device(device)["arch"], defines, exact=True)
    return _kernel(device, "quantize.cu", function, flags, 0)


def quantize(w, fmt: format.Format, scale_dtype: str) -> format.Packed | None:
    """Packed weights by rule "affine", the bits of format.quantize; None when refused (it says why)."""
    side = _side("quantize", w)
    at = side.describe(w)
    _, shape, dtype, device, _ = at
    w_type = str(dtype).rpartition(".")[2]
    served = w_type in TYPES and fmt.bits in format.KERNEL_BITS and len(shape) >= 2
    if not served or shape[-1] % fmt.group_size or not math.prod(shape):
        return None
    _check_arrays("quantize", {"w": at}, device)
    groups = math.prod(shape) // fmt.group_size
    with side.on(device):
        words = side.empty((*shape[:-1], fmt.words_per_row(shape[-1])), "uint32", device)
        scales = side.empty((*shape[:-1], fmt.groups(shape[-1])), scale_dtype, device)
        biases = side.empty(scales.shape, scale_dtype, device)
        report = side.empty((2,), "int32", device)
        report[...] = 0
        arrays = [ctypes.c_void_p(side.pointer(a)) for a in (w, words, scales, biases, report)]
        kernel = _exact_kernel(device, "quantize", fmt, w_type, scale_dtype)
        grid = (-(-groups // 8), 1, 1)
        _Launch(kernel, grid, 256, [*arrays, ctypes.c_longlong(groups)], ())(side.stream(device))
        refused = bool(report.any())
    return None if refused else format.Packed(words, scales, biases, fmt)
