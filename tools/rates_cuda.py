"""Clocks of a scheduler for matrix products and for what feeds them, alone and together. Wants a Hopper GPU.

    python tools/rates_cuda.py

For each mix of instructions, in a loop, with 1, 2 and 4 warps a scheduler: the median clocks of a warp's
round, divided by the warps that share its scheduler. docs/kernels-cuda.md uses it for qmv_stream.cu: HMMA is
m16n8k16 in bfloat16, "fed" products multiply what the LOP3 before them gave. Each round's words come from
shared memory (4 loads of 16 bytes where a mix has words): the first line is what these take alone.
"""

from __future__ import annotations

import statistics
import sys

SOURCE = r"""
typedef unsigned int u32;
#define MMA(c, a0, a1, a2, a3, b0, b1) asm volatile( \
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#define AND(d, a, m) asm volatile("and.b32 %0, %1, %2;" : "=r"(d) : "r"(a), "n"(m))
#define AND_XOR(d, a, m) asm volatile("lop3.b32 %0, %1, %2, %0, 0x6a;" : "+r"(d) : "r"(a), "n"(m))
#define FMA2(d, a, b) asm volatile("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(b))
#define FMA(d, a) asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(d) : "f"(a))
extern "C" __global__ void __launch_bounds__(512, 1) rounds(const u32* in, float* out, long long* clocks) {
  __shared__ uint4 shared[1024];
  float sums[4][4] = {}, floats[9], all = 0;
  u32 w[16], x[16], ints[8] = {}, halves[8] = {}, k = in[threadIdx.x % 32];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x)
    shared[i] = make_uint4(in[i], in[i + 1], in[i + 2], in[i + 3]);
  for (int i = 0; i < 16; i++) w[i] = in[threadIdx.x + i], x[i] = in[4096 + threadIdx.x * 16 + i];
  for (int i = 0; i < 9; i++) floats[i] = x[i];
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round++) {
    WORDS
    BODY
  }
  const long long end = clock64();
  for (int i = 0; i < 16; i++) all += sums[i / 4][i % 4] + w[i];
  for (int i = 0; i < 8; i++) all += floats[i] + (ints[i] ^ halves[i]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = all;
  if (threadIdx.x % 32 == 0) clocks[blockIdx.x * 16 + threadIdx.x / 32] = end - begin;
}
"""
ROUNDS = 64
WORDS = (
    "for (int i = 0; i < 4; i++) { const uint4 v = shared[(round * 8 + i + threadIdx.x) % 1024];"
    " w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w; }"
)
FIELDS = (0x30003, 0xC000C, 0x300030, 0xC000C0)


def mma(n: int, a: str = "w") -> str:
    left = ", ".join(f"{a}[{i}]" for i in range(4))
    return f"MMA(sums[{n % 4}], {left}, x[{2 * n % 16}], x[{(2 * n + 1) % 16}]);"


def fed(n: int) -> str:
    """A product of what four LOP3 give: two fields of two words each."""
    low, high = 2 * (n % 4) + 8 * (n // 8), n // 4 % 2 * 2
    masks = "".join(f"AND(a[{i}], w[{low + i % 2}], {FIELDS[high + i // 2]:#x});" for i in range(4))
    return f"{{ u32 a[4]; {masks} {mma(n, 'a')} }}"


def lop(n: int) -> str:
    return f"AND_XOR(ints[{n % 8}], w[{n % 16}], {FIELDS[n // 16 % 4]:#x});"


def fma2(n: int) -> str:
    return f"FMA2(halves[{n % 8}], w[{n % 16}], k);"


def fma(n: int) -> str:
    return f"FMA(floats[{n % 8}], floats[8]);"


def with_products(what) -> str:
    return "".join("".join(what(4 * n + i) for i in range(4)) + mma(n) for n in range(16))


MIXES = {  # name: (body, whether it needs new words)
    "4 loads of words": ("".join(map(lop, (0, 5, 10, 15))), True),
    "16 HMMA": ("".join(map(mma, range(16))), False),
    "64 LOP3": ("".join(map(lop, range(64))), True),
    "64 LOP3, 16 HMMA fed by them": ("".join(map(fed, range(16))), True),
    "64 LOP3, 16 HMMA": (with_products(lop), True),
    "64 HFMA2": ("".join(map(fma2, range(64))), True),
    "64 HFMA2, 16 HMMA": (with_products(fma2), True),
    "64 FFMA, 16 HMMA": (with_products(fma), False),
}


def source(name: str) -> str:
    body, words = MIXES[name]
    text = SOURCE.replace("ROUNDS", str(ROUNDS)).replace("BODY", body)
    return text.replace("WORDS", WORDS if words else "")


def main() -> int:
    import cupy

    multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    given = cupy.random.randint(0, 2**31, 20000).astype(cupy.uint32) & cupy.uint32(0x3FFF3FFF)
    print(f"{'clocks of a scheduler for a round of':40} 1 warp  2 warps  4 warps")
    for name in MIXES:
        kernel = cupy.RawKernel(source(name), "rounds", options=("-arch=sm_90a",), backend="nvrtc")
        line = []
        for warps in (4, 8, 16):
            out = cupy.zeros(multiprocessors * 512, cupy.float32)
            clocks = cupy.zeros((multiprocessors, 16), cupy.int64)
            for _ in range(2):
                kernel((multiprocessors,), (32 * warps,), (given, out, clocks))
            seen = clocks.get()[:, :warps].ravel().tolist()
            line.append(statistics.median(seen) / ROUNDS / (warps / 4))
        print(f"{name:40} {line[0]:6.0f} {line[1]:8.0f} {line[2]:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
