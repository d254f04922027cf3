// float16 and bfloat16 as bit patterns, in portable C++. Static: every instruction-set file needs its own copy, or the
// linker keeps one that was compiled for a CPU that is not there.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../mlxq/format.h"

namespace mlxq {

static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) {
    return uint16_t((u >> 16) | 0x40);
  }
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Subnormals by way of an integer: as a float32 subnormal on the way they would be zero on a CPU set to flush those.
static inline float f16_to_float(uint16_t h) {
  uint32_t rest = h & 0x7fff;
  float subnormal = float(int32_t(rest)) * 0x1p-24f;
  uint32_t normal = (rest << 13) + (112u << 23) + (rest >= 0x7c00 ? 112u << 23 : 0);
  return bits_to_float((rest < 0x400 ? float_to_bits(subnormal) : normal) | uint32_t(h & 0x8000) << 16);
}

// Round to nearest even, overflow to infinity; NaN stays NaN.
static inline uint16_t float_to_f16(float f) {
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    return uint16_t(sign | 0x7e00);
  }
  if (u >= 0x477ff000) {  // 65520 and above rounds to infinity
    return uint16_t(sign | 0x7c00);
  }
  if (u < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's integer in the low bits, rounded to even
    return uint16_t(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000));
  }
  u += 0xfff + ((u >> 13) & 1);
  return uint16_t(sign | ((u - 0x38000000) >> 13));
}

static inline float load(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::f16:
      return f16_to_float(static_cast<const uint16_t*>(p)[i]);
    default:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
  }
}

static inline void store(void* p, DType dtype, int64_t i, float f) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(p)[i] = f;
      break;
    case DType::f16:
      static_cast<uint16_t*>(p)[i] = float_to_f16(f);
      break;
    default:
      static_cast<uint16_t*>(p)[i] = float_to_bf16(f);
  }
}

}  // namespace mlxq
