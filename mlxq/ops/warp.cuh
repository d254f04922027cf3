// What a warp does together, as functions. F16 is the 16-bit type of both factors (1 float16, else bfloat16).
// tests/cuda/emulated_warp.h has the same names for a CPU.

#include "halves.cuh"

// c += A B^T: c 16 x 8, A 16 x 16, B 8 x 16; lane 4 * g + t has rows g and g + 8, columns 2 * t, + 1 (of A and B + 8, + 9 too).
__device__ __forceinline__ void mma(float* c, unsigned int a0, unsigned int a1, unsigned int a2, unsigned int a3, unsigned int b0,
                                    unsigned int b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." F16_TYPE "." F16_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four times eight rows of 16 bytes: lane 8 * i + r says where row r of the i-th eight is, lane 4 * g + t gets word t of row g
// of each. In the order of the barriers around it.
__device__ __forceinline__ void load_rows(unsigned int* words, unsigned int at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at)
               : "memory");
}

// N words of global memory, or zeros. Not moved behind the next barrier: the compiler else asks late for what is wanted late.
template <int N>
__device__ __forceinline__ void load_if(unsigned int* words, const void* from, bool valid) {
  if (N == 2)
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\n@p ld.global.v2.u32 {%0, %1}, [%2];\n}"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(from), "r"(int(valid))
                 : "memory");
  else
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2 % N]), "=r"(words[3 % N])
        : "l"(from), "r"(int(valid))
        : "memory");
}

// The larger of a and |b| of each two halves, bfloat16; NaN where one is.
__device__ __forceinline__ unsigned int max_abs2(unsigned int a, unsigned int b) {
  unsigned int d;
  asm("{\n.reg .b32 t;\nabs.bf16x2 t, %2;\nmax.NaN.bf16x2 %0, %1, t;\n}" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// A constant that the compiler does not know: an instruction holds one constant, and two of them cost two instructions.
__device__ __forceinline__ unsigned int opaque(unsigned int value) {
  unsigned int d;
  asm volatile("mov.b32 %0, %1;" : "=r"(d) : "r"(value));
  return d;
}
