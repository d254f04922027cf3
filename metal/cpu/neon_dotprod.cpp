// NEON with SDOT: products of integers for transpose, one row of words at a time for up to four rows of x.
//
// prepare splits x, a group of weights at a time, into planes of signed bytes and one float per (row, group):
//
//     x = step * (p0 + p1 * 2^8 + p2 * 2^16)        two planes for float16 and bfloat16 x, three for float32
//
// the integer being x / step rounded, its bytes made signed by carrying, and step the largest |x| of the group over the
// largest such integer, 0x7f7f (0x7f7f7f). Codes are bytes as they are for 2 and 4 bits, and 8-bit codes less 128.
// SDOT adds four products of bytes to each int32 lane: sums over a group are exact (128 * 128 * 128 < 2^31). Then, in
// float32 and still by lanes,
//
//     y += (scale * step) * (s0 + 256 s1 + 65536 s2) and y += bias' * sum(x)       bias' = bias, + 128 scale for 8 bits
//
// where sum(x) of the group is in float32, before the rounding to planes. Error: half a step a term, 2^-16 (2^-24) of
// the largest |x| of the group: 2e-5 (1e-7) relative.
//
// A group is 32, 64 or 128 codes: `blocks` of 32 codes. For each, registers of codes r hold 16 codes each and the
// planes of x are stored in the same order:
//
//     block   4 bits: 16 bytes w          r0 = w & 15, r1 = w >> 4                     x even | x odd
//             2 bits:  8 bytes w twice    r0 = (w | w >> 2) & 3, r1 = (w >> 4 | w >> 6) & 3   x 4i, 4i+1 | 4i+2, 4i+3
//             8 bits: 32 bytes            r0 = w[0..16) ^ 128, r1 = w[16..32) ^ 128    x in order
//
// A q8mm brings x as codes of one byte: one plane, no step. Its z is off already in 8-bit codes, and for the others where a
// group's sum starts; with per_row the sum goes on over all groups.
//
// Rows of x with NaN, Inf, or a group whose largest |x| is near the ends of the exponent range go through scalar_row.
// transpose=False and many rows are neon.cpp's (this family has no kernel for them). Limit: SDOT, planes * rows for
// every 16 codes.
#include <arm_neon.h>

#include "kernel.h"
#include "numeric.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace mlxq {
namespace {

constexpr int block = 32;      // codes unpacked at a time
constexpr int most_rows = 4;   // rows of x that a block of codes serves
constexpr int few_rows = 8;    // beyond, neon:strip dequantizes once for all rows

int planes(const Qmm& q) { return q.x_dtype == DType::f32 ? 3 : 2; }

// A prepared row: planes of K bytes in block order (plane 0's block, plane 1's block ...), then a float per group:
// step, then a float per group: sum(x), then the mark.
size_t floats_at(const Qmm& q) { return size_t(q.K) * planes(q); }
size_t row_bytes(const Qmm& q) {
  return (floats_at(q) + size_t(q.K / q.group_size) * 8 + 4 + 63) / 64 * 64;
}
float* group_steps(const Qmm& q, const char* row) {
  return reinterpret_cast<float*>(const_cast<char*>(row) + floats_at(q));
}
float* group_sums(const Qmm& q, const char* row) { return group_steps(q, row) + q.K / q.group_size; }
uint32_t& is_marked(const Qmm& q, const char* row) {
  return *reinterpret_cast<uint32_t*>(group_sums(q, row) + q.K / q.group_size);
}

// Where code i of a block lies in its registers.
int place(int bits, int i) {
  switch (bits) {
    case 2:
      return i % 4 * 8 + i / 4;
    case 4:
      return i % 2 * 16 + i / 2;
    default:
      return i;
  }
}

void prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
  int count = planes(q), groups = q.K / q.group_size;
  float largest = count == 3 ? 0x7f7f7e : 0x7f7f;  // one below: two roundings on the way can add one
  for (int m = row_begin; m < row_end; ++m) {
    char* row = prepared + m * row_bytes(q);
    int64_t base = int64_t(q.x_rows ? q.x_rows[m] : m) * q.K;
    is_marked(q, row) = 0;
    for (int g = 0; g < groups; ++g) {
      float x[128], sum = 0;
      uint32_t most = 0;
      for (int i = 0; i < q.group_size; ++i) {
        x[i] = load(q.x, q.x_dtype, base + g * q.group_size + i);
        uint32_t size = float_to_bits(x[i]) & 0x7fffffff;
        most = size > most ? size : most;
        sum += x[i];
      }
      float top = bits_to_float(most), inverse = 0;
      if (!(top < 0x1p100f) || (most != 0 && top < 0x1p-80f)) {
        is_marked(q, row) = 1;
      } else if (most != 0) {
        inverse = largest / top;
      }
      group_steps(q, row)[g] = inverse == 0 ? 0 : top / largest;
      group_sums(q, row)[g] = sum;
      int8_t* to = reinterpret_cast<int8_t*>(row) + size_t(g) * q.group_size * count;
      for (int i = 0; i < q.group_size; ++i) {
        int32_t whole = inverse == 0 ? 0 : int32_t(__builtin_rintf(x[i] * inverse));
        for (int p = 0; p < count; ++p) {
          int8_t low = int8_t(whole);
          to[i / block * block * count + p * block + place(q.bits, i % block)] = low;
          whole = (whole - low) >> 8;
        }
      }
    }
  }
}

template <int B>
inline __attribute__((always_inline)) void codes_of(const uint8_t* words, int8x16_t* codes) {
  if constexpr (B == 8) {
    uint8x16_t sign = vdupq_n_u8(128);
    codes[0] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(words), sign));
    codes[1] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(words + 16), sign));
  } else if constexpr (B == 4) {
    uint8x16_t w = vld1q_u8(words);
    codes[0] = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
    codes[1] = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
  } else {
    uint8x8_t w = vld1_u8(words);
    uint8x16_t three = vdupq_n_u8(3);
    codes[0] = vreinterpretq_s8_u8(vandq_u8(vcombine_u8(w, vshr_n_u8(w, 2)), three));
    codes[1] = vreinterpretq_s8_u8(vandq_u8(vcombine_u8(vshr_n_u8(w, 4), vshr_n_u8(w, 6)), three));
  }
}

template <int B, int Planes, int Rows>
void run_rows(const Qmm& q, const char* const* rows, const int* m_of, int begin, int end) {
  int groups = q.K / q.group_size, blocks = q.group_size / block;
  for (int n = begin; n < end; ++n) {
    const uint8_t* words = reinterpret_cast<const uint8_t*>(q.words) + int64_t(n) * q.K * B / 8;
    const int8_t* x[Rows];
    float32x4_t y[Rows];
    float rest[Rows];
    for (int m = 0; m < Rows; ++m) {
      x[m] = reinterpret_cast<const int8_t*>(rows[m]);
      y[m] = vdupq_n_f32(0);
      rest[m] = 0;
    }
    for (int g = 0; g < groups; ++g) {
      int32x4_t sums[Rows * Planes];
      for (int i = 0; i < Rows * Planes; ++i) {
        sums[i] = vdupq_n_s32(0);
      }
      for (int b = 0; b < blocks; ++b, words += block * B / 8) {
        int8x16_t codes[2];
        codes_of<B>(words, codes);
        for (int m = 0; m < Rows; ++m) {
          for (int p = 0; p < Planes; ++p, x[m] += block) {
            sums[m * Planes + p] = vdotq_s32(sums[m * Planes + p], vld1q_s8(x[m]), codes[0]);
            sums[m * Planes + p] = vdotq_s32(sums[m * Planes + p], vld1q_s8(x[m] + 16), codes[1]);
          }
        }
      }
      float scale = load(q.scales, q.scale_dtype, int64_t(n) * groups + g);
      float bias = load(q.biases, q.scale_dtype, int64_t(n) * groups + g);
      if (B == 8) {
        bias += 128 * scale;
      }
      for (int m = 0; m < Rows; ++m) {
        float32x4_t dot = vcvtq_f32_s32(sums[m * Planes]);
        dot = vfmaq_n_f32(dot, vcvtq_f32_s32(sums[m * Planes + 1]), 256.0f);
        if constexpr (Planes == 3) {
          dot = vfmaq_n_f32(dot, vcvtq_f32_s32(sums[m * Planes + 2]), 65536.0f);
        }
        y[m] = vfmaq_n_f32(y[m], dot, scale * group_steps(q, rows[m])[g]);
        rest[m] += bias * group_sums(q, rows[m])[g];
      }
    }
    for (int m = 0; m < Rows; ++m) {
      store(q.y, q.x_dtype, int64_t(q.y_rows ? q.y_rows[m_of[m]] : m_of[m]) * q.N + n,
            vaddvq_f32(y[m]) + rest[m]);
    }
  }
}

template <int B, int Planes>
void run_format(const Qmm& q, const char* prepared, int begin, int end) {
  size_t bytes = row_bytes(q);
  for (int m = 0; m < q.M; m += most_rows) {
    const char* rows[most_rows];
    int m_of[most_rows];
    for (int i = 0; i < most_rows; ++i) {
      m_of[i] = m + i < q.M ? m + i : q.M - 1;
      rows[i] = prepared + m_of[i] * bytes;
    }
    switch (q.M - m) {
      case 1:
        run_rows<B, Planes, 1>(q, rows, m_of, begin, end);
        break;
      case 2:
        run_rows<B, Planes, 2>(q, rows, m_of, begin, end);
        break;
      default:
        run_rows<B, Planes, most_rows>(q, rows, m_of, begin, end);
    }
  }
  for (int m = 0; m < q.M; ++m) {
    if (is_marked(q, prepared + m * bytes)) {
      scalar_row(q, m, begin, end);
    }
  }
}

void run(const Qmm& q, const char* prepared, int begin, int end) {
  bool wide = planes(q) == 3;
  switch (q.bits) {
    case 2:
      return (wide ? run_format<2, 3> : run_format<2, 2>)(q, prepared, begin, end);
    case 4:
      return (wide ? run_format<4, 3> : run_format<4, 2>)(q, prepared, begin, end);
    default:
      return (wide ? run_format<8, 3> : run_format<8, 2>)(q, prepared, begin, end);
  }
}

// ---- q8mm ----

// A prepared row: K codes in block order, per group where the int32 sum starts, per group the sum of codes as float, and
// x_scale. Tiled: x_scale is 1, the sums are scaled, and the scales of the groups come last.
size_t q8_row_bytes(const Qmm& q) {
  return (size_t(q.K) + size_t(q.K / q.group_size) * (q.tiled ? 12 : 8) + 4 + 63) / 64 * 64;
}
int32_t* q8_starts(const Qmm& q, const char* row) {
  return reinterpret_cast<int32_t*>(const_cast<char*>(row) + q.K);
}
float* q8_sums(const Qmm& q, const char* row) {
  return reinterpret_cast<float*>(q8_starts(q, row) + q.K / q.group_size);
}
float& q8_scale(const Qmm& q, const char* row) { return q8_sums(q, row)[q.K / q.group_size]; }
float* q8_tile_scales(const Qmm& q, const char* row) { return &q8_scale(q, row) + 1; }

void q8_prepare(const Qmm& q, char* prepared, int row_begin, int row_end) {
  for (int m = row_begin; m < row_end; ++m) {
    int64_t from = q.x_rows ? q.x_rows[m] : m;
    const int8_t* x = static_cast<const int8_t*>(q.x) + from * q.K;
    const float* x_scales = q.x_scales_of(from);
    char* row = prepared + m * q8_row_bytes(q);
    for (int g = 0; g < q.K / q.group_size; ++g) {
      int sum = 0;
      for (int k = g * q.group_size; k < (g + 1) * q.group_size; ++k) {
        sum += x[k];
        row[k / block * block + place(q.bits, k % block)] = char(x[k]);
      }
      q8_starts(q, row)[g] = q.bits == 8 ? 0 : -sum * (1 << (q.bits - 1));
      q8_sums(q, row)[g] = q.tiled ? float(sum) * x_scales[g] : float(sum);
      if (q.tiled) {
        q8_tile_scales(q, row)[g] = x_scales[g];
      }
    }
    q8_scale(q, row) = q.tiled ? 1.0f : *x_scales;
  }
}

template <int B, int Rows>
void q8_rows(const Qmm& q, const char* prepared, int first, int begin, int end) {
  int groups = q.K / q.group_size, blocks = q.group_size / block;
  const char* rows[Rows];
  for (int m = 0; m < Rows; ++m) {
    rows[m] = prepared + (first + m) * q8_row_bytes(q);
  }
  for (int n = begin; n < end; ++n) {
    const uint8_t* words = reinterpret_cast<const uint8_t*>(q.words) + int64_t(n) * q.K * B / 8;
    int32x4_t sums[Rows];
    float32x4_t y[Rows];
    float rest[Rows];
    for (int m = 0; m < Rows; ++m) {
      sums[m] = vdupq_n_s32(0);
      y[m] = vdupq_n_f32(0);
      rest[m] = 0;
    }
    for (int g = 0; g < groups; ++g) {
      for (int m = 0; m < Rows; ++m) {
        int32x4_t start = vsetq_lane_s32(q8_starts(q, rows[m])[g], vdupq_n_s32(0), 0);
        sums[m] = q.per_row ? vaddq_s32(sums[m], start) : start;
      }
      for (int b = 0; b < blocks; ++b, words += block * B / 8) {
        int8x16_t codes[2];
        codes_of<B>(words, codes);
        for (int m = 0; m < Rows; ++m) {
          const int8_t* x = reinterpret_cast<const int8_t*>(rows[m]) + (g * blocks + b) * block;
          sums[m] = vdotq_s32(sums[m], vld1q_s8(x), codes[0]);
          sums[m] = vdotq_s32(sums[m], vld1q_s8(x + 16), codes[1]);
        }
      }
      if (!q.per_row) {
        float scale = load(q.scales, q.scale_dtype, int64_t(n) * groups + g);
        float bias = load(q.biases, q.scale_dtype, int64_t(n) * groups + g) + float(1 << (B - 1)) * scale;
        for (int m = 0; m < Rows; ++m) {
          float by = q.tiled ? scale * q8_tile_scales(q, rows[m])[g] : scale;
          y[m] = vfmaq_n_f32(y[m], vcvtq_f32_s32(sums[m]), by);
          rest[m] += bias * q8_sums(q, rows[m])[g];
        }
      }
    }
    float row_scale = load(q.scales, q.scale_dtype, int64_t(n) * groups);
    for (int m = 0; m < Rows; ++m) {
      float x_scale = q8_scale(q, rows[m]);
      float value = q.per_row ? float(vaddvq_s32(sums[m])) * (x_scale * row_scale)
                              : (vaddvq_f32(y[m]) + rest[m]) * x_scale;
      store(q.y, q.x_dtype, int64_t(q.y_rows ? q.y_rows[first + m] : first + m) * q.N + n, value);
    }
  }
}

template <int B>
void q8_format(const Qmm& q, const char* prepared, int begin, int end) {
  int m = 0;
  for (; m + most_rows <= q.M; m += most_rows) {
    q8_rows<B, most_rows>(q, prepared, m, begin, end);
  }
  for (; m < q.M; ++m) {
    q8_rows<B, 1>(q, prepared, m, begin, end);
  }
}

void q8_run(const Qmm& q, const char* prepared, int begin, int end) {
  (q.bits == 2 ? q8_format<2> : q.bits == 4 ? q8_format<4> : q8_format<8>)(q, prepared, begin, end);
}

bool q8_serves(const Qmm& q) { return q.transpose; }

bool serves(const Qmm& q) { return q.transpose && q.M <= few_rows; }
int unit(const Qmm&) { return 1; }

bool runs_here() {
#if defined(__APPLE__)
  int yes = 0;
  size_t size = sizeof(yes);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &yes, &size, nullptr, 0) == 0 && yes;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}

constexpr Kernel kernels[] = {
    {"neon_dotprod:planes", serves, unit, row_bytes, prepare, run},
    {"neon_dotprod:q8", q8_serves, unit, q8_row_bytes, q8_prepare, q8_run, true},
};

}  // namespace

extern const Family neon_dotprod_family;
const Family neon_dotprod_family{"neon_dotprod", runs_here, kernels, 2};

}  // namespace mlxq
