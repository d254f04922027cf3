"""One packed product, x (M, K) times W (N, K), on the CPU: our kernels against the peers and the memory.

    python tools/bench_qmm.py [--shapes 4096x4096,...] [--rows 1,8,...] [--threads 2] [--seconds 0.12]

Contenders. mlxq (2, 4, 8 bits in groups of 64, bfloat16 scales; x in float32, bfloat16, float16); stock MLX's
quantized_matmul on the same words; torch in float32, bfloat16, int4 (_weight_int4pack_mm_for_cpu, the same
codes in groups of 64, bfloat16 x) and dynamic int8; llama.cpp's ggml_mul_mat on Q4_0 (4.5 bits a weight, as
ours) and Q4_1 (5 bits), if llama_cpp is importable; mlxq with a single thread, in a process of its own.

States. hot: the same weight again. cold: as many copies of the weight in rotation as exceed the last-level
cache several times, so that words, scales and biases all come from memory. pages "huge": the copies were
advised as mlxq.load does (mlxq.ops.advise_huge_pages), the peers' likewise; only where the arrays are large
enough to take it. Calls shorter than 2 ms are timed in blocks: MLX evaluates a block as one graph, as a
model's step is; ggml computes it as one graph; torch is called in a loop.

Answers first. Every contender's answer is compared with float64 on its own stored weights. Ours must stay
below LIMITS (relative Frobenius error), also in a separate table at K=4096 and on a real weight; otherwise
exit code 1.

The ceiling: read_stream.c reads the bytes of one call (words, scales, biases, x, y) in the same state and
pages with the same threads, without and with prefetch; the fastest counts. share = its time / ours.

JSON, besides bench_common's:
    accuracy   [{weights, N, K, M, bits, x, scales, kernel, error, limit}]
    rows       [{N, K, M, state, pages, contender, family, bits, x, threads, kernel, copies, bytes, gb_s, ms,
               ms_min, ms_q1, ms_q3, repeats, error, share}]   family: mlxq, mlx, torch, llama.cpp, stream;
               error: null where another row of the same shape and M has it; share: only mlxq at M=1;
               bits: 16 or 32 for float weights, 0 for the stream
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import mmap
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import bench_common as common
import mlx.core as mx
import numpy as np

from mlxq import bridge, ops
from mlxq.checkpoint.embedded import embedded_gguf
from mlxq.checkpoint.gguf import Gguf
from mlxq.format import KERNEL_BITS, Format, Packed, dequantize, unpack

SHAPES = ((4096, 4096), (1536, 576), (576, 1536), (576, 576), (192, 576), (49152, 576))  # N x K
ROWS = (1, 8, 32, 128, 512)
COLD_ROWS = (1, 8, 32)  # beyond, reading the weight is a small part of the time
HEADLINE = (4096, 4096)
GROUP = 64
LIMITS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
PEER_LIMIT = 0.2  # activations rounded to int8, sums in bfloat16: peers err much, but no more than this
BLOCK_SECONDS = 0.002
HUGE = 2 << 20


class Weight:
    """A quantized Gaussian weight in the forms that the contenders want, each made once.

    packed[bits]   numpy Packed with scales that are exactly bfloat16
    values         float32 (N, K): what the 4-bit form stands for
    """

    def __init__(self, N: int, K: int, seed: int = 0):
        w = (np.random.default_rng(seed).standard_normal((N, K), np.float32) * np.float32(0.05)).astype(
            np.float32
        )
        self.N, self.K = N, K
        self.packed = {
            bits: ops.quantize(w, Format(bits, GROUP), scale_dtype="bfloat16") for bits in KERNEL_BITS
        }
        self.values = dequantize(self.packed[4])
        self.sampled = np.unique(np.linspace(0, N - 1, min(N, 512)).astype(int))


def packed_rows(packed: Packed, rows) -> np.ndarray:
    """float64 values of some rows of a numpy Packed, exactly scale * code + bias."""
    codes = unpack(packed.words[rows], packed.format.bits, packed.K).astype(np.float64)
    scales, biases = (
        np.repeat(np.asarray(a[rows], np.float64), packed.format.group_size, -1)
        for a in (packed.scales, packed.biases)
    )
    return scales * codes + biases


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the answer."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def rounded(x: np.ndarray, dtype: str) -> mx.array:
    return mx.array(x).astype(getattr(mx, dtype))


class Contender:
    """One implementation on one weight in one state. Subclasses fill `_weights` and say how to call.

    set_x(x)        float32 (M, K), rounded to the contender's own dtype
    time(calls)     seconds of so many calls, each on the next copy of the weight
    answer()        the last result as numpy (M, N), and the float64 rows that its weight stands for
    """

    threads = 0  # the run's; OneThread differs
    kernel = None

    def __init__(self, name: str, family: str, bits: int, x_dtype: str):
        self.name, self.family, self.bits, self.x_dtype = name, family, bits, x_dtype
        self._at = 0
        self._last = None

    @property
    def copies(self) -> int:
        return len(self._weights)

    def _next(self, calls: int) -> list:
        copies = len(self._weights)
        chosen = [self._weights[(self._at + i) % copies] for i in range(calls)]
        self._at = (self._at + calls) % copies
        return chosen


class Mlx(Contender):
    """Ours, or stock MLX: the same packed words."""

    def __init__(self, weight: Weight, copies: int, huge: bool, bits: int, x_dtype: str, stock: bool = False):
        short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[x_dtype]
        name = f"MLX 4-bit {short}" if stock else f"mlxq {bits}-bit {short}"
        super().__init__(name, "mlx" if stock else "mlxq", bits, x_dtype)
        self._stock, self._weight = stock, weight
        host = weight.packed[bits]
        # Stock MLX would cast the scales to x's dtype in every call: it gets them so.
        scale_dtype = getattr(mx, x_dtype if stock else "bfloat16")
        self._weights = [
            Packed(
                mx.array(host.words),
                mx.array(host.scales).astype(scale_dtype),
                mx.array(host.biases).astype(scale_dtype),
                host.format,
            )
            for _ in range(copies)
        ]
        arrays = [a for w in self._weights for a in (w.words, w.scales, w.biases)]
        mx.eval(arrays)
        self.huge_bytes = ops.advise_huge_pages(arrays) if huge else 0
        self.bytes = self._weights[0].nbytes

    def set_x(self, x: np.ndarray) -> None:
        self._x = rounded(x, self.x_dtype)
        mx.eval(self._x)
        if not self._stock:
            self.kernel = ops.kernel_for(
                len(x), self._weight.N, self._weight.K, self.bits, GROUP, self.x_dtype, "bfloat16"
            )

    def time(self, calls: int) -> float:
        weights, x = self._next(calls), self._x
        start = time.perf_counter()
        if self._stock:
            out = [
                mx.quantized_matmul(x, w.words, w.scales, w.biases, True, GROUP, self.bits) for w in weights
            ]
        else:
            out = [ops.qmm(x, w) for w in weights]
        mx.eval(out)
        seconds = time.perf_counter() - start
        self._last = out[-1]
        return seconds

    def answer(self):
        rows = self._weight.sampled
        return bridge.to_numpy(self._last)[:, rows], packed_rows(self._weight.packed[self.bits], rows)


class Torch(Contender):
    """torch's own: kind is float32, bfloat16, int4 (the same codes) or int8 (dynamic activations)."""

    def __init__(self, weight: Weight, copies: int, huge: bool, kind: str):
        import torch

        names = {
            "float32": "torch fp32",
            "bfloat16": "torch bf16",
            "int4": "torch int4 bf16",
            "int8": "torch int8",
        }
        bits = {"float32": 32, "bfloat16": 16, "int4": 4, "int8": 8}[kind]
        super().__init__(
            names[kind], "torch", bits, "bfloat16" if kind in ("bfloat16", "int4") else "float32"
        )
        self._torch, self._weight, self._kind = torch, weight, kind
        self.huge_bytes = 0
        host = weight.packed[4]
        if kind in ("float32", "bfloat16"):
            parts = [torch.from_numpy(weight.values).to(getattr(torch, kind))]
        elif kind == "int4":
            codes = torch.from_numpy(unpack(host.words, 4, weight.K).astype(np.int32))
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
            scales, biases = (torch.from_numpy(np.asarray(a, np.float32)) for a in (host.scales, host.biases))
            # Its value is scale * (code - 8) + zero; zero is rounded to bfloat16 once more than ours is.
            zeros = (biases + 8 * scales).to(torch.bfloat16)
            parts = [packed, torch.stack([scales.to(torch.bfloat16), zeros], -1).transpose(0, 1).contiguous()]
            self._zeros = zeros.float().numpy()
        else:
            values = torch.from_numpy(weight.values)
            scale = (values.abs().amax(1) / 127).double()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, and still what dynamic int8 is made of
                eights = torch.quantize_per_channel(
                    values, scale, torch.zeros(weight.N, dtype=torch.long), 0, torch.qint8
                )
            self._eights = eights
            self._weights = [torch.ops.quantized.linear_prepack(eights, None) for _ in range(copies)]
            self.bytes = weight.N * weight.K + 4 * weight.N
            return
        place = self._huge_copy if huge else self._torch.clone
        self._weights = [[place(p) for p in parts] for _ in range(copies)]
        self.bytes = sum(p.nbytes for p in parts)

    def _huge_copy(self, tensor):
        """A copy in memory that was advised to be of huge pages."""
        size = -(-tensor.nbytes // HUGE) * HUGE
        region = mmap.mmap(-1, size + HUGE)
        region.madvise(mmap.MADV_HUGEPAGE)
        offset = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % HUGE
        self.huge_bytes += size
        flat = self._torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape).copy_(tensor)

    def set_x(self, x: np.ndarray) -> None:
        self._x = self._torch.from_numpy(x).to(getattr(self._torch, self.x_dtype))

    def time(self, calls: int) -> float:
        torch, x, weights = self._torch, self._x, self._next(calls)
        with torch.inference_mode():
            start = time.perf_counter()
            if self._kind == "int4":
                for packed, scales in weights:
                    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)
            elif self._kind == "int8":
                for packed in weights:
                    out = torch.ops.quantized.linear_dynamic(x, packed)
            else:
                for (values,) in weights:
                    out = torch.nn.functional.linear(x, values)
            seconds = time.perf_counter() - start
        self._last = out
        return seconds

    def answer(self):
        rows, host = self._weight.sampled, self._weight.packed[4]
        if self._kind == "int8":
            want = self._eights.dequantize().numpy()[rows].astype(np.float64)
        elif self._kind == "int4":
            scales = np.repeat(np.asarray(host.scales[rows], np.float64), GROUP, -1)
            codes = unpack(host.words[rows], 4, self._weight.K).astype(np.float64)
            want = scales * (codes - 8) + np.repeat(self._zeros[rows].astype(np.float64), GROUP, -1)
        else:
            want = self._weights[0][0].float().numpy()[rows].astype(np.float64)
        return self._last.float().numpy()[:, rows], want


class _InitParams(ctypes.Structure):  # ggml_init_params
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Plan(ctypes.Structure):  # ggml_cplan; the tail covers fields that newer versions add
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 112),
    ]


class Llama(Contender):
    """llama.cpp's product through the libggml of llama-cpp-python: kind is Q4_0 or Q4_1, x float32."""

    def __init__(self, weight: Weight, copies: int, huge: bool, kind: str, threads: int):
        import gguf

        super().__init__(f"llama.cpp {kind}", "llama.cpp", 4, "float32")
        self._lib, self._weight, self._threads = ggml(), weight, threads
        self._type = gguf.GGMLQuantizationType[kind]
        host = gguf.quants.quantize(weight.values, self._type)
        self._rows = gguf.quants.dequantize(host[weight.sampled], self._type).astype(np.float64)
        self.bytes = host.nbytes
        self._scratch = None
        self._memory, self._context = self._new(copies * (host.nbytes + 1024), huge)
        self.huge_bytes = len(self._memory) if huge else 0
        self._weights = []
        for _ in range(copies):
            tensor = self._lib.ggml_new_tensor_2d(self._context, self._type, weight.K, weight.N)
            ctypes.memmove(self._lib.ggml_get_data(tensor), host.ctypes.data, host.nbytes)
            self._weights.append(tensor)

    def _new(self, size: int, huge: bool = False, memory=None):
        """(memory, ggml context in it)"""
        if memory is None or len(memory) < size + HUGE:
            memory = mmap.mmap(-1, size + HUGE)
            if huge:
                memory.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        base += -base % 64
        return memory, self._lib.ggml_init(_InitParams(len(memory) - 64, base, False))

    def set_x(self, x: np.ndarray) -> None:
        self._x_host = np.ascontiguousarray(x)

    def time(self, calls: int) -> float:
        lib, x = self._lib, self._x_host
        M, K = x.shape
        overhead = lib.ggml_graph_overhead_custom(calls + 8, False) + 4096
        size = overhead + x.nbytes + calls * (4 * M * self._weight.N + 1024)
        self._scratch, context = self._new(size, memory=self._scratch)
        operand = lib.ggml_new_tensor_2d(context, 0, K, M)
        ctypes.memmove(lib.ggml_get_data(operand), x.ctypes.data, x.nbytes)
        graph = lib.ggml_new_graph_custom(context, calls + 8, False)
        for tensor in self._next(calls):
            out = lib.ggml_mul_mat(context, tensor, operand)
            lib.ggml_build_forward_expand(graph, out)
        plan = lib.ggml_graph_plan(graph, self._threads, None)
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work_data = ctypes.addressof(work)
        start = time.perf_counter()
        status = lib.ggml_graph_compute(graph, ctypes.byref(plan))
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute gave {status}")
        y = (ctypes.c_float * (M * self._weight.N)).from_address(lib.ggml_get_data(out))
        self._last = np.frombuffer(y, np.float32).reshape(M, self._weight.N)[:, self._weight.sampled].copy()
        lib.ggml_free(context)
        return seconds

    def answer(self):
        return self._last, self._rows


_ggml = None


def ggml():
    """libggml of the installed llama_cpp. Raises FileNotFoundError with what to install."""
    global _ggml
    if _ggml is not None:
        return _ggml
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.submodule_search_locations[0]) / "lib" if spec else Path()
    found = {n: sorted(folder.glob(f"libggml-{n}.*")) for n in ("base", "cpu")} if spec else {}
    if not spec or not all(found.values()):
        raise FileNotFoundError(common.LLAMA_MISSING)
    base = ctypes.CDLL(str(found["base"][0]), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(found["cpu"][0]))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib = argparse.Namespace()
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, [_InitParams]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_new_graph_custom", pointer, [pointer, size, ctypes.c_bool]),
        (base, "ggml_graph_overhead_custom", size, [size, ctypes.c_bool]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (cpu, "ggml_graph_plan", _Plan, [pointer, ctypes.c_int, pointer]),
        (cpu, "ggml_graph_compute", ctypes.c_int, [pointer, ctypes.POINTER(_Plan)]),
        (cpu, "ggml_cpu_init", None, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        setattr(lib, name, function)
    lib.ggml_cpu_init()
    lib.built_with = [
        f for f in ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "dotprod")
        if hasattr(cpu, f"ggml_cpu_has_{f}") and getattr(cpu, f"ggml_cpu_has_{f}")()
    ]  # fmt: skip
    _ggml = lib
    return lib


class OneThread(Contender):
    """Ours with MLXQ_THREADS=1, in a process of its own: the pool's size is fixed when it starts."""

    threads = 1

    def __init__(self, N: int, K: int, copies: int, huge: bool, bits: int, x_dtype: str):
        short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[x_dtype]
        super().__init__(f"mlxq {bits}-bit {short} 1 thread", "mlxq", bits, x_dtype)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=os.environ | {"MLXQ_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._weights = range(copies)
        self.bytes, self.huge_bytes = self._ask("make", N, K, copies, huge, bits, x_dtype)

    def _ask(self, *command):
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def set_x(self, x: np.ndarray) -> None:
        self.kernel = self._ask("x", len(x))

    def time(self, calls: int) -> float:
        return self._ask("time", calls)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """The process behind OneThread: one JSON command a line."""
    ours = None
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "make":
            N, K, copies, huge, bits, x_dtype = arguments
            ours = Mlx(Weight(N, K), copies, huge, bits, x_dtype)
            said = (ours.bytes, ours.huge_bytes)
        elif command == "x":
            ours.set_x(activations(arguments[0], ours._weight.K))
            said = ours.kernel
        else:
            said = ours.time(arguments[0])
        print(json.dumps(said), flush=True)


class Stream(Contender):
    """The read stream over as many bytes as one call of ours moves."""

    def __init__(self, process, slice_bytes: int, copies: int, huge: bool, ahead: int):
        super().__init__(f"read stream, prefetch {ahead} B" if ahead else "read stream", "stream", 0, "")
        self._process, self._huge, self._ahead, self._weights = process, huge, ahead, range(copies)
        self.bytes = slice_bytes

    def time(self, calls: int) -> float:
        return common.stream_seconds(
            self._process, self._huge, self._ahead, self.bytes, calls, len(self._weights)
        )


def activations(M: int, K: int) -> np.ndarray:
    return np.random.default_rng(M).standard_normal((M, K), np.float32)


def real_weight() -> np.ndarray:
    """SmolLM2's first down projection, float32 (576, 1536), from the embedded GGUF."""
    import gguf

    block = Gguf(embedded_gguf()).tensors["blk.0.ffn_down.weight"]
    kind = gguf.GGMLQuantizationType[block.type]
    return gguf.quants.dequantize(block.rows, kind).astype(np.float32).reshape(block.shape)


def accuracy(K: int = 4096, N: int = 1024, rows=ROWS, real: bool = True) -> list[dict]:
    """Relative errors of our kernels against float64; the head of this file lists the keys."""
    gaussian = np.random.default_rng(7).standard_normal((N, K), np.float32)
    weights = {"Gaussian": gaussian}
    if real:
        weights["SmolLM2 down_proj"] = real_weight()
    out = []
    for label, w in weights.items():
        for bits in KERNEL_BITS:
            for scale_dtype in ("float32", "bfloat16", "float16"):
                host = ops.quantize(w, Format(bits, GROUP), scale_dtype=scale_dtype)
                scales, biases = (
                    mx.array(a).astype(getattr(mx, scale_dtype)) for a in (host.scales, host.biases)
                )
                packed = Packed(mx.array(host.words), scales, biases, host.format)
                exact = packed_rows(host, slice(None))
                for x_dtype, limit in LIMITS.items():
                    for M in rows:
                        x = rounded(activations(M, packed.K), x_dtype)
                        y = bridge.to_numpy(ops.qmm(x, packed))
                        error = relative_error(y, bridge.to_numpy(x).astype(np.float64) @ exact.T)
                        kernel = ops.kernel_for(M, packed.N, packed.K, bits, GROUP, x_dtype, scale_dtype)
                        out.append({
                            "weights": label, "N": packed.N, "K": packed.K, "M": M, "bits": bits,
                            "x": x_dtype, "scales": scale_dtype, "kernel": kernel, "error": error,
                            "limit": limit,
                        })  # fmt: skip
    return out


def make_contenders(weight: Weight, state: str, huge: bool, threads: int, missing: list[str]) -> list:
    """Everyone who runs on this weight in this state, with their copies."""
    rotated = common.cold_bytes()

    def copies(bits_per_weight: float) -> int:
        size = weight.N * weight.K * bits_per_weight / 8
        return 1 if state == "hot" else max(3, math.ceil(rotated / size))

    headline = (weight.N, weight.K) == HEADLINE
    ours = [(4, "float32"), (4, "bfloat16")]
    if headline:
        ours += [(4, "float16"), (2, "float32"), (2, "bfloat16"), (8, "float32"), (8, "bfloat16")]
    out: list = [Mlx(weight, copies(b + 0.5), huge, b, d) for b, d in ours]
    if huge and not out[0].huge_bytes:
        return []
    try:
        out += [
            Torch(weight, copies(b), huge, k) for k, b in (("float32", 32), ("bfloat16", 16), ("int4", 4.5))
        ]
        if not huge:  # its packed weights cannot be placed
            out.append(Torch(weight, copies(8), huge, "int8"))
    except ImportError:
        _once(missing, "torch: not installed; pip install torch==2.13.0")
    try:
        out += [Llama(weight, copies(b), huge, k, threads) for k, b in (("Q4_0", 4.5), ("Q4_1", 5))]
    except FileNotFoundError as error:
        _once(missing, str(error))
    if threads > 1:
        out.append(OneThread(weight.N, weight.K, copies(4.5), huge, 4, "float32"))
    return out


def _once(messages: list[str], text: str) -> None:
    if text not in messages:
        messages.append(text)
        print(f"not timed: {text}", flush=True)


def measure(
    shape, rows, threads: int, seconds: float, stream, with_stock: bool, missing: list[str]
) -> list[dict]:
    """Rows of the table for one shape; the head of this file lists the keys."""
    N, K = shape
    weight = Weight(N, K)
    out, checked = [], set()
    for state, huge in (("hot", False), ("cold", False), ("cold", True)):
        contenders = make_contenders(weight, state, huge, threads, missing)
        if not contenders:
            continue
        stock = []
        if with_stock and shape == HEADLINE and not huge:
            copies = contenders[0].copies
            stock = [Mlx(weight, copies, False, 4, d, stock=True) for d in ("float32", "bfloat16")]
        for M in rows:
            if state == "cold" and M not in COLD_ROWS:
                continue
            x = activations(M, K)
            cell = contenders + (stock if M == 1 or M == 32 and state == "hot" else [])
            for c in cell:
                c.set_x(x)
            streams = []
            if M == 1:
                moved = contenders[0].bytes + x.nbytes + 4 * N
                count = 1 if state == "hot" else max(3, math.ceil(common.cold_bytes() / moved))
                streams = [Stream(stream, moved, count, huge, ahead) for ahead in common.AHEAD]
            times = common.interleaved([*cell, *streams], seconds, BLOCK_SECONDS)
            ceiling = min((common.summary(times[s.name])["ms"] for s in streams), default=None)
            for c in [*cell, *streams]:
                error = None
                if c.family != "stream" and not c.threads and (c.name, M) not in checked:
                    checked.add((c.name, M))
                    error = checked_error(c, x)
                row = common.summary(times[c.name])
                per_call = c.bytes + (
                    0 if c.family == "stream" else (K + N) * M * (2 if c.x_dtype != "float32" else 4)
                )
                share = None
                if ceiling and c.family == "mlxq" and not c.threads:
                    # The stream read the bytes of the 4-bit call: other widths scale by what they read.
                    share = ceiling * per_call / moved / row["ms"]
                out.append({
                    "N": N, "K": K, "M": M, "state": state, "pages": "huge" if huge else "4K",
                    "contender": c.name, "family": c.family, "bits": c.bits, "x": c.x_dtype,
                    "threads": c.threads or threads, "kernel": c.kernel, "copies": c.copies,
                    "bytes": per_call, "gb_s": per_call / row["ms"] / 1e6, **row, "error": error,
                    "share": share,
                })  # fmt: skip
            print_cell(
                [r for r in out if (r["M"], r["state"], r["pages"]) == (M, state, "huge" if huge else "4K")]
            )
        for c in contenders:
            if isinstance(c, OneThread):
                c.close()
    return out


def checked_error(contender: Contender, x: np.ndarray) -> float:
    """Relative error of the contender's last answer. Raises AssertionError when it is not an answer."""
    got, rows = contender.answer()
    exact_x = bridge.to_numpy(rounded(x, contender.x_dtype)).astype(np.float64)
    error = relative_error(got, exact_x @ rows.T)
    limit = LIMITS[contender.x_dtype] if contender.family == "mlxq" else PEER_LIMIT
    assert error <= limit, (
        f"{contender.name}, {x.shape[0]} rows: relative error {error:.2g} exceeds {limit:g}"
    )
    return error


def print_cell(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['N']}x{first['K']}  M={first['M']}  {first['state']}, {first['pages']} pages")
    for r in rows:
        share = "" if r["share"] is None else f"  {100 * r['share']:.0f} % of the stream"
        error = "" if r["error"] is None else f"  error {r['error']:.1e}"
        print(
            f"  {r['contender']:28} {r['ms']:9.4f} ms [{r['ms_q1']:.4f} {r['ms_q3']:.4f}] "
            f"{r['gb_s']:6.1f} GB/s x{r['repeats']:<3} {r['kernel'] or ''}{error}{share}",
            flush=True,
        )


def judge(rows: list[dict], worst: dict[str, float]) -> list[dict]:
    """The bars of issue 2 that these rows can tell."""

    def ms(shape, M, state, name, pages="4K"):
        key = (*shape, M, state, pages, name)
        return times.get(key)

    def ratio(shape, M, state, peers, ours, pages="4K"):
        """The fastest of the peers' times over ours."""
        found = [t for p in peers if (t := ms(shape, M, state, p, pages)) is not None]
        mine = ms(shape, M, state, ours, pages)
        return min(found) / mine if found and mine else None

    times = {(r["N"], r["K"], r["M"], r["state"], r["pages"], r["contender"]): r["ms"] for r in rows}
    shares = {(r["N"], r["K"], r["M"], r["state"], r["pages"], r["contender"]): r["share"] for r in rows}
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in rows))
    batches = sorted({r["M"] for r in rows})
    torch4 = ["torch fp32", "torch bf16", "torch int4 bf16"]
    f32, bf16 = "mlxq 4-bit f32", "mlxq 4-bit bf16"
    out = [common.bar(f"relative error, {d} x", worst.get(d), LIMITS[d], "<=") for d in LIMITS]
    for M, state, dtype, ours, limit in (
        (1, "hot", "f32", f32, 30), (1, "cold", "f32", f32, 15), (1, "hot", "bf16", bf16, 250),
        (32, "hot", "f32", f32, 60), (32, "hot", "bf16", bf16, 2000),
    ):  # fmt: skip
        value = ratio(HEADLINE, M, state, [f"MLX 4-bit {dtype}"], ours)
        out.append(common.bar(f"4096x4096 M={M} {state}, stock MLX {dtype} / ours", value, limit))
    for shape in shapes:
        label = f"{shape[0]}x{shape[1]}"
        value = ratio(shape, 1, "cold", [*torch4, "torch int8"], f32)
        out.append(common.bar(f"{label} M=1 cold, best torch / ours f32", value, 1.2))
        middle = [
            (v, M)
            for M in batches
            if 8 <= M <= 128 and (v := ratio(shape, M, "hot", torch4, bf16)) is not None
        ]
        value, at = min(middle, default=(None, None))
        out.append(
            common.bar(f"{label} M=8..128 hot, best torch / ours bf16", value, 1.3, note=f"worst at M={at}")
        )
        value = ratio(shape, 512, "hot", ["torch bf16"], bf16)
        out.append(common.bar(f"{label} M=512 hot, torch bf16 / ours bf16", value, 1.0))
        for pages in ("4K", "huge"):
            share = shares.get((*shape, 1, "cold", pages, f32))
            if share is not None or shape == HEADLINE:
                out.append(
                    common.bar(f"{label} M=1 cold, {pages} pages, share of the read stream", share, 0.7)
                )
        for M in (1, 32):
            value = ratio(shape, M, "hot", [f"{f32} 1 thread"], f32)
            if value is not None:
                out.append(common.bar(f"{label} M={M} hot, one thread / two", value, 1.0))
    return out


def plot(path: Path, title: str, rows: list[dict]) -> None:
    """A panel a shape, hot: milliseconds over M, a line a contender."""
    pyplot = common.pyplot()
    if pyplot is None:
        return
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in rows))
    columns = min(3, len(shapes))
    height = -(-len(shapes) // columns)
    size = (6 * columns, 4.5 * height)
    figure, axes = pyplot.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, shape in zip(axes.flat, shapes, strict=False):
        lines: dict[str, list] = {}
        for r in rows:
            if (r["N"], r["K"]) == shape and r["state"] == "hot" and r["family"] != "stream":
                lines.setdefault(r["contender"], []).append((r["M"], r["ms"]))
        for i, (label, points) in enumerate(lines.items()):
            ours = label in ("mlxq 4-bit f32", "mlxq 4-bit bf16")
            style = {"linewidth": 2.5 if ours else 1, "color": pyplot.get_cmap("tab20")(i % 20)}
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)
        ax.set(
            xscale="log", yscale="log", title=f"N x K = {shape[0]}x{shape[1]}, hot", xlabel="M", ylabel="ms"
        )
        ticks = sorted({m for points in lines.values() for m, _ in points})
        ax.set_xticks(ticks, [str(m) for m in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax in list(axes.flat)[len(shapes) :]:
        ax.remove()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Time packed products on the CPU against peers and memory.")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="NxK,NxK,...")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of M")
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("MLXQ_THREADS", min(2, common.cores())))
    )
    parser.add_argument(
        "--seconds", type=float, default=0.12, help="per contender in each cell (default: 0.12)"
    )
    parser.add_argument(
        "--no-stock", action="store_true", help="leave stock MLX out: its bfloat16 takes seconds a call"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the JSON and the plot")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve()
        return 0
    os.environ["MLXQ_THREADS"] = str(arguments.threads)
    if not ops.native_available():
        print(f"bench_qmm: {ops.native_error()}", file=sys.stderr)
        return 2
    about = common.machine()
    common.print_machine(about)
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shapes.split(",")]
    rows = sorted({int(m) for m in arguments.rows.split(",")})
    missing: list[str] = []
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(arguments.threads)
    with contextlib.suppress(FileNotFoundError):
        about["llama_cpp_built_with"] = ggml().built_with
    start = time.perf_counter()
    errors = accuracy(rows=[m for m in rows if m <= 128])
    worst = {d: max(e["error"] for e in errors if e["x"] == d) for d in LIMITS}
    print(
        "\nAnswers: worst relative error against float64 "
        + ", ".join(f"{d} {e:.1e}" for d, e in worst.items())
    )
    failed = [e for e in errors if not e["error"] <= e["limit"]]
    for e in failed:
        print(f"  EXCEEDED {e}")
    if failed:
        return 1
    table = []
    with common.read_stream(arguments.threads, common.cold_bytes() + (256 << 20)) as stream:
        for shape in shapes:
            table += measure(
                shape, rows, arguments.threads, arguments.seconds, stream, not arguments.no_stock, missing
            )
    bars = judge(table, worst)
    common.print_bars(bars)
    for sentence in missing:
        print(f"not timed: {sentence}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    settings = {k: str(v) for k, v in vars(arguments).items() if k != "serve"}
    path = common.result_path("qmm", about, arguments.out)
    common.write(path, {
        "tool": "bench_qmm", "machine": about, "settings": settings, "bars": bars, "missing": missing,
        "accuracy": errors, "rows": table,
    })  # fmt: skip
    title = f"{about['cpu']}, {arguments.threads} threads, {about['date'][:10]}, commit {about['commit'][:9]}"
    plot(path.with_suffix(".png"), title, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
