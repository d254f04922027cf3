// Quantizes one group at a time in arrays of fixed length that the compiler turns into SIMD: no branch depends on a
// weight, reductions have their order written out. Must be compiled with -ffp-contract=off and without -ffast-math.
// Limits: one division per weight and grid; about a third of the time is packing.

#include "../quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "numeric.h"

namespace mlxq {
namespace {

constexpr int kLanes = 16;  // partial minima and maxima; group sizes are multiples of it

inline float stored(float x, DType storage) {
  switch (storage) {
    case DType::f32:
      return x;
    case DType::f16:
      return f16_to_float(float_to_f16(x));
    default:
      return bf16_to_float(float_to_bf16(x));
  }
}

inline bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000) != 0x7f800000; }

struct Grid {
  float scale, bias;
};

// The grids "span", "bins" and "zero", in this order.
inline void make_grids(float lo, float hi, float range, float levels, DType storage, Grid grids[3]) {
  float smallest = storage == DType::f32   ? MLXQ_SMALLEST_SCALE_FLOAT32
                   : storage == DType::f16 ? MLXQ_SMALLEST_SCALE_FLOAT16
                                           : MLXQ_SMALLEST_SCALE_BFLOAT16;
  float bias = stored(lo, storage);
  grids[0] = {std::max(stored((hi - bias) / levels, storage), smallest), bias};

  float half = range * (0.5f / (levels + 1.0f));
  bias = stored(lo + half, storage);
  grids[1] = {std::max(stored(((hi - half) - bias) / levels, storage), smallest), bias};

  bool low = std::fabs(lo) > std::fabs(hi);
  float edge = low ? lo : hi;
  bias = stored(edge, storage);
  float count = std::max(std::rint(std::fabs(edge) / (range / levels)), 1.0f);
  float scale = std::max(stored(std::fabs(bias) / count, storage), smallest);
  grids[2] = {low ? scale : -scale, bias};
}

// Codes of w on the grid, each the low byte of an integer; returns the sum of squared errors in units of range.
template <int G>
inline float encode(const float* w, Grid grid, float levels, float unit, uint32_t* codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer, rounded to even, in the low bits
  float t[G];
  for (int i = 0; i < G; i++) {
    float q = (w[i] - grid.bias) / grid.scale;
    q = q > 0.0f ? q : 0.0f;
    q = q < levels ? q : levels;
    float rounded = q + kRound;
    codes[i] = float_to_bits(rounded);
    float code = rounded - kRound;
    float value = grid.scale * code;
    value = value + grid.bias;
    float error = (w[i] - value) * unit;
    error = error * error;
    t[i] = error < MLXQ_ERROR_BELOW ? 0.0f : error;
  }
  for (int n = G / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) {
      t[i] = t[i] + t[i + n];
    }
  }
  return t[0];
}

// Eight codes fill exactly `bits` bytes, at every width.
template <int G>
inline void pack_group(const uint32_t* codes, int bits, unsigned char* out) {
  for (int i = 0; i < G; i += 8) {
    uint64_t lanes = 0;
    for (int j = 0; j < 8; j++) {
      lanes |= uint64_t(codes[i + j] & 0xff) << (j * bits);
    }
    for (int j = 0; j < bits; j++) {
      *out++ = static_cast<unsigned char>(lanes >> (8 * j));
    }
  }
}

// False if storage can hold none of the grids.
template <int G>
bool quantize_group(float* w, int bits, DType storage, unsigned char* words, Grid* chosen) {
  float levels = float((1 << bits) - 1);
  float low[kLanes], high[kLanes];
  for (int i = 0; i < kLanes; i++) {
    low[i] = std::numeric_limits<float>::max();
    high[i] = -std::numeric_limits<float>::max();
  }
  for (int i = 0; i < G; i += kLanes) {
    for (int j = 0; j < kLanes; j++) {
      float x = std::fabs(w[i + j]) < MLXQ_FLUSH_BELOW ? 0.0f : w[i + j];
      w[i + j] = x;
      low[j] = x < low[j] ? x : low[j];
      high[j] = x > high[j] ? x : high[j];
    }
  }
  float lo = *std::min_element(low, low + kLanes), hi = *std::max_element(high, high + kLanes);
  float range = hi - lo;
  uint32_t codes[2][G];
  if (range < MLXQ_CONSTANT_BELOW) {
    std::memset(codes[0], 0, sizeof codes[0]);
    pack_group<G>(codes[0], bits, words);
    *chosen = {MLXQ_CONSTANT_SCALE, stored(lo, storage)};
    return is_finite(chosen->bias);
  }
  if (!(range < MLXQ_RANGE_LIMIT)) {
    return false;
  }
  float unit = bits_to_float((254u << 23) - (float_to_bits(range) & 0x7f800000));  // 2^-floor(log2(range))
  Grid grids[3];
  make_grids(lo, hi, range, levels, storage, grids);
  float best = std::numeric_limits<float>::infinity();
  int best_codes = 0;
  for (const Grid& grid : grids) {
    if (!is_finite(grid.scale) || !is_finite(grid.bias)) {
      continue;
    }
    float error = encode<G>(w, grid, levels, unit, codes[1 - best_codes]);
    if (error < best) {
      best = error;
      best_codes = 1 - best_codes;
      *chosen = grid;
    }
  }
  if (best == std::numeric_limits<float>::infinity()) {
    return false;
  }
  pack_group<G>(codes[best_codes], bits, words);
  return true;
}

template <int G>
QuantizeReport quantize_groups(const void* w, DType w_dtype, int64_t groups, int bits, DType storage,
                               unsigned char* words, void* scales, void* biases) {
  QuantizeReport report;
  float x[G];
  for (int64_t group = 0; group < groups; group++, words += G * bits / 8) {
    int64_t at = group * G;
    switch (w_dtype) {
      case DType::f32:
        std::memcpy(x, static_cast<const float*>(w) + at, sizeof x);
        break;
      case DType::f16:
        for (int i = 0; i < G; i++) {
          x[i] = f16_to_float(static_cast<const uint16_t*>(w)[at + i]);
        }
        break;
      case DType::bf16:
        for (int i = 0; i < G; i++) {
          x[i] = bf16_to_float(static_cast<const uint16_t*>(w)[at + i]);
        }
        break;
    }
    int bad = 0;
    for (int i = 0; i < G; i++) {
      bad += (float_to_bits(x[i]) & 0x7f800000) == 0x7f800000;
    }
    if (bad) {
      if (report.non_finite == 0) {
        report.first_non_finite = at + (std::find_if_not(x, x + G, is_finite) - x);
      }
      report.non_finite += bad;
      continue;
    }
    Grid grid{};
    if (!quantize_group<G>(x, bits, storage, words, &grid)) {
      report.first_overflow = report.first_overflow < 0 ? at : report.first_overflow;
      continue;
    }
    store(scales, storage, group, grid.scale);
    store(biases, storage, group, grid.bias);
  }
  return report;
}

template <int G>
void dequantize_groups(const unsigned char* words, const void* scales, const void* biases, DType storage,
                       int64_t groups, int bits, float* w) {
  uint64_t mask = (1u << bits) - 1;
  for (int64_t group = 0; group < groups; group++) {
    float scale = load(scales, storage, group), bias = load(biases, storage, group);
    for (int i = 0; i < G; i += 8, words += bits, w += 8) {
      uint64_t lanes = 0;
      for (int j = 0; j < bits; j++) {
        lanes |= uint64_t(words[j]) << (8 * j);
      }
      for (int j = 0; j < 8; j++) {
        float value = scale * float(int32_t(lanes >> (j * bits) & mask));
        w[j] = value + bias;
      }
    }
  }
}

void check(const char* where, int64_t K, int bits, int group_size) {
#define MLXQ_IS_BITS(b) || bits == b
#define MLXQ_IS_GROUP(b, g) || group_size == g
  bool exists = (false MLXQ_FOR_EACH_BITS(MLXQ_IS_BITS)) && (false MLXQ_FOR_EACH_GROUP_SIZE(MLXQ_IS_GROUP, 0));
#undef MLXQ_IS_BITS
#undef MLXQ_IS_GROUP
  std::string format = std::to_string(bits) + "-bit groups of " + std::to_string(group_size);
  if (!exists) {
    throw std::invalid_argument(std::string(where) + ": " + format + " do not exist");
  }
  if (K % group_size) {
    throw std::invalid_argument(std::string(where) + ": " + format + " do not divide K=" + std::to_string(K));
  }
}

}  // namespace

void QuantizeReport::merge(const QuantizeReport& part, int64_t offset) {
  auto earlier = [offset](int64_t mine, int64_t theirs) {
    return theirs < 0 ? mine : mine < 0 ? theirs + offset : std::min(mine, theirs + offset);
  };
  non_finite += part.non_finite;
  first_non_finite = earlier(first_non_finite, part.first_non_finite);
  first_overflow = earlier(first_overflow, part.first_overflow);
}

QuantizeReport quantize_rows(const void* w, DType w_dtype, int64_t rows, int64_t K, int bits, int group_size,
                             DType storage, uint32_t* words, void* scales, void* biases) {
  check("quantize", K, bits, group_size);
  auto* bytes = reinterpret_cast<unsigned char*>(words);
  int64_t groups = rows * (K / group_size);
#define MLXQ_RUN(b, g) \
  if (group_size == g) return quantize_groups<g>(w, w_dtype, groups, bits, storage, bytes, scales, biases);
  MLXQ_FOR_EACH_GROUP_SIZE(MLXQ_RUN, 0)
#undef MLXQ_RUN
  return {};
}

void dequantize_rows(const uint32_t* words, const void* scales, const void* biases, DType storage, int64_t rows,
                     int64_t K, int bits, int group_size, float* w) {
  check("dequantize", K, bits, group_size);
  auto* bytes = reinterpret_cast<const unsigned char*>(words);
  int64_t groups = rows * (K / group_size);
#define MLXQ_RUN(b, g) \
  if (group_size == g) return dequantize_groups<g>(bytes, scales, biases, storage, groups, bits, w);
  MLXQ_FOR_EACH_GROUP_SIZE(MLXQ_RUN, 0)
#undef MLXQ_RUN
}

}  // namespace mlxq
