// int8 codes of rows of x: scale = max |x| / 127 (1 for a row of zeros), code = clamp(rint(x / scale), -127, 127).
//
//   x  X (rows, K), X_TYPE 0 float32, 1 float16, 2 bfloat16      codes  s8 (M, K)      scales  float (rows,)
//
// ROW_WARPS warps a row, 1 or 8, which is read twice (the second time from cache). IEEE float32 operations without
// contraction: the bits of every other device. A row with NaN or infinity gets a scale that is not finite.

typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ float value(const void* x, size_t i) {
#if X_TYPE == 0
  return static_cast<const float*>(x)[i];
#elif X_TYPE == 2
  return __uint_as_float(static_cast<u32>(static_cast<const u16*>(x)[i]) << 16);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(static_cast<const u16*>(x)[i]));
  return v;
#endif
}

extern "C" __global__ void q8_rows(const void* __restrict__ x, signed char* __restrict__ codes, float* __restrict__ scales,
                                   long long rows, int K) {
  constexpr int THREADS = 32 * ROW_WARPS;
  const long long row = blockIdx.x * static_cast<long long>(8 / ROW_WARPS) + threadIdx.x / THREADS;
  if (row >= rows) return;  // with a block to a row never: all of them meet at the barrier
  const int first = threadIdx.x % THREADS;
  const size_t at = static_cast<size_t>(row) * K;
  u32 most = 0;  // bits of |x| compare like the values, and NaN is above infinity
  for (int k = first; k < K; k += THREADS) most = max(most, __float_as_uint(value(x, at + k)) & 0x7fffffffu);
  most = __reduce_max_sync(0xffffffffu, most);
#if ROW_WARPS == 8
  __shared__ u32 largest[8];
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < 8; i++) most = max(most, largest[i]);
#endif
  const float scale = most ? __fdiv_rn(__uint_as_float(most), 127.0f) : 1.0f;
  if (first == 0) scales[row] = scale;
  for (int k = first; k < K; k += THREADS) {
    const float code = rintf(__fdiv_rn(value(x, at + k), scale));
    codes[at + k] = static_cast<signed char>(fminf(fmaxf(code, -127.0f), 127.0f));
  }
}
