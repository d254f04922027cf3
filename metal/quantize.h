// Rule "affine" of mlxq/format.py (formula: affine_groups there) in portable C++, bit for bit what numpy gives.
// Rows do not depend on each other: split them over threads as you like and merge the reports. No Python, no MLX.
#pragma once

#include <cstdint>

#include "../mlxq/format.h"

namespace mlxq {

// What was wrong with the weights; element indices count from the first row handed in, -1 if there is none.
// When ok() is false the outputs hold nothing of use.
struct QuantizeReport {
  int64_t non_finite = 0;         // NaN or infinite weights, all of them counted
  int64_t first_non_finite = -1;  // element
  int64_t first_overflow = -1;    // first element of the first group whose scale or bias storage cannot hold

  bool ok() const { return non_finite == 0 && first_overflow < 0; }

  // Adds the report of rows that begin at element `offset` of the whole; parts may be merged in any order.
  void merge(const QuantizeReport& part, int64_t offset);
};

// w        w_dtype  (rows, K)               contiguous; K a multiple of group_size
// words    uint32   (rows, K * bits / 32)   lowest bits first
// scales   storage  (rows, K / group_size)  float, or 16-bit patterns; likewise biases
// Throws std::invalid_argument for a width or group size that does not exist or does not divide K.
QuantizeReport quantize_rows(const void* w, DType w_dtype, int64_t rows, int64_t K, int bits, int group_size,
                             DType storage, uint32_t* words, void* scales, void* biases);

// The weights as float32 (rows, K): scale * code, rounded, then + bias, rounded. Arguments and throws as above.
void dequantize_rows(const uint32_t* words, const void* scales, const void* biases, DType storage, int64_t rows,
                     int64_t K, int bits, int group_size, float* w);

}  // namespace mlxq
