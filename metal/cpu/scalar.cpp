// The plain loops: every format, dtype, shape and orientation, compiled for the baseline instruction set. The oracle of
// the other families, and what runs where none of them does.
//
// prepare does nothing (row_bytes 0): run reads x as it is, widens to float32, and sums x * (scale * code + bias) in
// float32. So an Inf or NaN in x gives what float arithmetic on the dequantized weight gives.
#include <algorithm>

#include "kernel.h"
#include "numeric.h"

namespace mlxq {
namespace {

uint32_t code_at(const uint32_t* row, int k, int bits) {
  int per_word = 32 / bits;
  return (row[k / per_word] >> (bits * (k % per_word))) & ((1u << bits) - 1);
}

void row_transposed(const Qmm& q, int64_t x_base, int64_t y_base, int begin, int end) {
  int groups = q.K / q.group_size;
  int64_t words_per_row = int64_t(q.K) * q.bits / 32;
  for (int n = begin; n < end; ++n) {
    const uint32_t* words = q.words + n * words_per_row;
    float sum = 0;
    for (int g = 0; g < groups; ++g) {
      float scale = load(q.scales, q.scale_dtype, int64_t(n) * groups + g);
      float bias = load(q.biases, q.scale_dtype, int64_t(n) * groups + g);
      for (int k = g * q.group_size; k < (g + 1) * q.group_size; ++k) {
        sum += load(q.x, q.x_dtype, x_base + k) * (scale * float(code_at(words, k, q.bits)) + bias);
      }
    }
    store(q.y, q.x_dtype, y_base + n, sum);
  }
}

void row_straight(const Qmm& q, int64_t x_base, int64_t y_base, int begin, int end) {
  int groups = q.K / q.group_size;
  int64_t words_per_row = int64_t(q.K) * q.bits / 32;
  for (int k = begin; k < end; ++k) {
    float sum = 0;
    for (int n = 0; n < q.N; ++n) {
      int64_t at = int64_t(n) * groups + k / q.group_size;
      float code = float(code_at(q.words + n * words_per_row, k, q.bits));
      float w = load(q.scales, q.scale_dtype, at) * code + load(q.biases, q.scale_dtype, at);
      sum += load(q.x, q.x_dtype, x_base + n) * w;
    }
    store(q.y, q.x_dtype, y_base + k, sum);
  }
}

void q8_row(const Qmm& q, int m, int begin, int end) {
  int64_t row = q.x_rows ? q.x_rows[m] : m;
  const int8_t* x = static_cast<const int8_t*>(q.x) + row * q.K;
  int groups = q.K / q.group_size, zero = 1 << (q.bits - 1);
  int64_t words_per_row = int64_t(q.K) * q.bits / 32;
  const float* x_scales = q.x_scales_of(row);
  for (int n = begin; n < end; ++n) {
    const uint32_t* words = q.words + n * words_per_row;
    int32_t whole = 0;
    float sum = 0;
    for (int g = 0; g < groups; ++g) {
      int32_t products = 0, codes = 0;
      for (int k = g * q.group_size; k < (g + 1) * q.group_size; ++k) {
        products += x[k] * (int(code_at(words, k, q.bits)) - zero);
        codes += x[k];
      }
      float scale = load(q.scales, q.scale_dtype, int64_t(n) * groups + g);
      float bias = load(q.biases, q.scale_dtype, int64_t(n) * groups + g);
      whole += products;
      float terms = scale * float(products) + (bias + float(zero) * scale) * float(codes);
      sum += q.tiled ? terms * x_scales[g] : terms;
    }
    float scale = q.tiled ? 1.0f : *x_scales;
    store(q.y, q.x_dtype, int64_t(q.y_rows ? q.y_rows[m] : m) * q.N + n,
          q.per_row ? float(whole) * (scale * load(q.scales, q.scale_dtype, int64_t(n) * groups)) : sum * scale);
  }
}

void codes_of_row(const void* x, DType x_dtype, int64_t at, int64_t K, int8_t* codes, float* scale) {
  constexpr int64_t part = 1024;
  // Added to a float of up to 2^22 and taken off again, it leaves the nearest integer, ties to even.
  constexpr float whole = 12582912.0f;
  float values[part];
  auto widen = [&](int64_t k, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      values[i] = load(x, x_dtype, at + k + i);
    }
  };
  uint32_t largest = 0;  // |x| as its pattern: ordered like the number, and NaN above all
  for (int64_t k = 0; k < K; k += part) {
    int64_t count = std::min(part, K - k);
    widen(k, count);
    for (int64_t i = 0; i < count; ++i) {
      largest = std::max(largest, float_to_bits(values[i]) & 0x7fffffff);
    }
  }
  *scale = largest == 0 ? 1.0f : bits_to_float(largest) / 127.0f;
  for (int64_t k = 0; k < K; k += part) {
    int64_t count = std::min(part, K - k);
    if (K > part) {
      widen(k, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      float value = values[i] / *scale;
      value = value > -127.0f ? value : -127.0f;
      value = value < 127.0f ? value : 127.0f;
      codes[k + i] = int8_t(int32_t((value + whole) - whole));
    }
  }
}

bool serves(const Qmm&) { return true; }
int unit(const Qmm&) { return 1; }
size_t row_bytes(const Qmm&) { return 0; }
void prepare(const Qmm&, char*, int, int) {}

void run(const Qmm& q, const char*, int begin, int end) {
  for (int m = 0; m < q.M; ++m) {
    scalar_row(q, m, begin, end);
  }
}

void run_q8(const Qmm& q, const char*, int begin, int end) {
  for (int m = 0; m < q.M; ++m) {
    q8_row(q, m, begin, end);
  }
}

constexpr Kernel kernels[] = {
    {"scalar:loops", serves, unit, row_bytes, prepare, run},
    {"scalar:q8", serves, unit, row_bytes, prepare, run_q8, true},
};
bool runs_here() { return true; }

}  // namespace

void scalar_row(const Qmm& q, int m, int begin, int end) {
  int64_t x_base = int64_t(q.x_rows ? q.x_rows[m] : m) * q.in_features();
  int64_t y_base = int64_t(q.y_rows ? q.y_rows[m] : m) * q.out_features();
  (q.transpose ? row_transposed : row_straight)(q, x_base, y_base, begin, end);
}

extern const Family scalar_family;
const Family scalar_family{"scalar", runs_here, kernels, 2, codes_of_row};

}  // namespace mlxq
