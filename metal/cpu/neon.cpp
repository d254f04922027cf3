// Advanced SIMD of armv8-a: the float32 kernels of float_kernels.h with 4 lanes. Layout, tiles and limits stand there.
//
// A 4-bit chunk is 32 codes. The conversion divides by a power of two on its way (vcvtq_n), so fields are masked where
// they lie and x keeps its values. Tiles fill 32 registers: dot 1x4, 2x4 and 4x2, strip 4x6 sums with four registers of
// x and one of w, straight 6x4 sums with four of w and one of x.
#include <arm_neon.h>

#include "float_kernels.h"

namespace mlxq {
namespace {

struct Neon {
  using F = float32x4_t;
  using I = uint32x4_t;
  static constexpr int L = 4;
  static constexpr int dot_rows = 6, dot_tile_1 = 4, dot_tile_2 = 4, dot_tile_4 = 2;
  static constexpr int strip_rows = 4, strip_columns = 6, straight_rows = 6;
  static constexpr int ahead = 256;  // words prefetched ahead, 1 KB

  static MLXQ_INLINE F zero() { return vdupq_n_f32(0); }
  static MLXQ_INLINE F set(float f) { return vdupq_n_f32(f); }
  static MLXQ_INLINE F load(const float* p) { return vld1q_f32(p); }
  static MLXQ_INLINE void store(float* p, F f) { vst1q_f32(p, f); }
  static MLXQ_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static MLXQ_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static MLXQ_INLINE void prefetch(const uint32_t* p) { __builtin_prefetch(p); }
  static void leave() {}

  static MLXQ_INLINE I words(const uint32_t* p) { return vld1q_u32(p); }
  static MLXQ_INLINE I words(const uint32_t* p, int count) {  // a multiple of 32 codes is 2 words or whole chunks
    return count == 2 ? vcombine_u32(vld1_u32(p), vdup_n_u32(0)) : vld1q_u32(p);
  }

  template <int B, int J>
  static MLXQ_INLINE F code(I w) {
    uint32x4_t masked = vandq_u32(w, vdupq_n_u32(((1u << B) - 1) << (B * J)));
    if constexpr (J == 0) {
      return vcvtq_f32_u32(masked);
    } else {
      return vcvtq_n_f32_u32(masked, B * J);
    }
  }
  template <int B, int J>
  static MLXQ_INLINE F scaled_code(I w) {
    return code<B, J>(w);
  }
  static float unscale(int, int) { return 1; }

  // Lane i: p[i * R / 4], zero from p[here] on.
  template <int R>
  static MLXQ_INLINE F groups(const float* p, int here) {
    static_assert(R == 1 || R == 2);
    if constexpr (R == 1) {
      return vdupq_n_f32(*p);
    } else {
      return vcombine_f32(vdup_n_f32(p[0]), vdup_n_f32(here > 1 ? p[1] : 0.0f));
    }
  }

  // to[0..4) (+)= the sums over the lanes of a, b, c, d.
  static MLXQ_INLINE void sum4(F a, F b, F c, F d, float* to, bool add) {
    float32x4_t four = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
    vst1q_f32(to, add ? vaddq_f32(vld1q_f32(to), four) : four);
  }

  static void widen(const void* x, DType dtype, int64_t at, float* to, int count) {
    if (dtype == DType::f32) {
      std::memcpy(to, static_cast<const float*>(x) + at, size_t(count) * 4);
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(x) + at;
    int i = 0;
    for (; i + L <= count; i += L) {
      uint16x4_t half = vld1_u16(from + i);
      vst1q_f32(to + i, dtype == DType::f16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                                            : vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16)));
    }
    for (; i < count; ++i) {
      to[i] = mlxq::load(from, dtype, i);
    }
  }

  static void narrow(const float* from, void* y, DType dtype, int64_t at, int count) {
    for (int i = 0; i < count; ++i) {
      mlxq::store(y, dtype, at + i, from[i]);
    }
  }
};

bool runs_here() { return true; }

constexpr Kernel kernels[] = {
    MLXQ_FLOAT_KERNEL(Neon, "neon:dot", dot),
    MLXQ_FLOAT_KERNEL(Neon, "neon:strip", strip),
    MLXQ_FLOAT_KERNEL(Neon, "neon:straight", straight),
};

}  // namespace

extern const Family neon_family;
const Family neon_family{"neon", runs_here, kernels, sizeof(kernels) / sizeof(kernels[0])};

}  // namespace mlxq
