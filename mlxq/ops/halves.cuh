// Pairs of 16-bit floats, bits and addresses as functions, for qmv.cu, hopper.cuh and warp.cuh. F16 is the 16-bit type (1 float16,
// else bfloat16). tests/cuda/emulated.h and emulated_warp.h have the same names for a CPU.

#if F16 == 1
#define F16_TYPE "f16"
#else
#define F16_TYPE "bf16"
#endif

#define SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

__device__ __forceinline__ unsigned int and_or(unsigned int a, unsigned int mask, unsigned int c) {
  unsigned int d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(c));  // a & mask | c
  return d;
}

__device__ __forceinline__ unsigned int sub2(unsigned int a, unsigned int b) {
  unsigned int d;
  asm("sub.rn." F16_TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ unsigned int mul2(unsigned int a, unsigned int b) {
  unsigned int d;
  asm("mul.rn." F16_TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ unsigned int fma2(unsigned int a, unsigned int b, unsigned int c) {
  unsigned int d;
  asm("fma.rn." F16_TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ unsigned int round2(float low, float high) {
  unsigned int d;
  asm("cvt.rn." F16_TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ float half_value(unsigned int pattern) {
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(pattern));
  return value;
}

__device__ __forceinline__ unsigned int shared_address(const void* p) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(p));
}
