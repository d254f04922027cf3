// What every CPU kernel is: one signature, one table (table.cpp), best family first.
//
//   y[m, n] = sum_k x[m, k] * (scales[n, k / group_size] * code[n, k] + biases[n, k / group_size])    transpose
//   y[m, k] = sum_n x[m, n] * (scales[n, k / group_size] * code[n, k] + biases[n, k / group_size])    otherwise
//
//   words   uint32  (N, K * bits / 32)    codes little-endian along K
//   scales, biases  (N, K / group_size)   scale_dtype
//   x               (rows, K) or (rows, N) row-major, x_dtype; y in x_dtype; sums in float32 or exact integers
//
// A q8mm has int8 codes in x's place, one float32 scale for each of their rows, and z = 2^(bits - 1) taken off the codes
// of the weight, so that sums of a group are exact int32:
//
//   s[g] = sum_k x[m, k] * (code[n, k] - z) over group g        e[g] = sum_k x[m, k] over group g
//   y[m, n] = x_scales[m] * sum_g (scales[n, g] * s[g] + (biases[n, g] + z * scales[n, g]) * e[g])       in float32
//   y[m, n] = float32(sum_g s[g]) * (x_scales[m] * scales[n, 0])               per_row, K up to 131071: one int32 sum
//   y[m, n] = sum_g x_scales[m, g] * (scales[n, g] * s[g] + (biases[n, g] + z * scales[n, g]) * e[g])           tiled
//
// A call has two stages. `prepare` rewrites rows of x into what the kernel likes (float32, permuted, split into integer
// planes, with group sums ...), row_bytes(q) bytes a row, each row on its own, so that rows can be shared out over
// threads and a range of prepared rows can be handed on by pointer. `run` computes the output columns
// [begin, end) of every row; columns can be shared out in multiples of `unit`.
// Both are called from any thread, never allocate from MLX, never throw, and leave no upper vector state behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../mlxq/format.h"

namespace mlxq {

struct Qmm {
  DType x_dtype;      // of x and y; of y only in a q8mm
  DType scale_dtype;  // of scales and biases
  bool transpose;
  int bits;
  int group_size;
  int M;                  // rows
  int N;                  // rows of the packed weight
  int K;                  // codes in a row of the packed weight, a multiple of group_size
  const void* x;
  const int32_t* x_rows;  // row m is x's row x_rows[m]; nullptr: row m
  void* y;
  const int32_t* y_rows;  // row m goes to y's row y_rows[m]; nullptr: row m
  const uint32_t* words;
  const void* scales;
  const void* biases;
  const float* x_scales;  // null but in a q8mm, which is transposed
  bool per_row;           // of a q8mm
  bool tiled;             // of a q8mm: x_scales has one for each group of a row

  int in_features() const { return transpose ? K : N; }
  int out_features() const { return transpose ? N : K; }
  const float* x_scales_of(int64_t row) const { return x_scales + row * (tiled ? K / group_size : 1); }
};

struct Kernel {
  const char* name;                       // "family:kernel", what MLXQ_ISA and the tests read back
  bool (*serves)(const Qmm&);             // formats, dtypes and shapes for which it is the family's choice
  int (*unit)(const Qmm&);                // columns are shared out in multiples of this
  size_t (*row_bytes)(const Qmm&);        // prepared bytes per row, a multiple of 64
  void (*prepare)(const Qmm&, char* prepared, int row_begin, int row_end);  // prepared: of row 0
  void (*run)(const Qmm&, const char* prepared, int begin, int end);
  bool q8 = false;                        // for q8mm, and for nothing else
};

struct Family {
  const char* name;
  bool (*runs_here)();
  const Kernel* kernels;  // in order of preference
  int count;
  // A row of codes_of_rows: x's K elements from `at` on. Null: an earlier family's serves.
  void (*codes_of_row)(const void* x, DType x_dtype, int64_t at, int64_t K, int8_t* codes, float* scale) = nullptr;
};

// Every family compiled into this build, worst first; the last that runs here and is allowed serves.
extern const Family* const families[];
extern const int family_count;

// The kernel for a call: from the best family allowed downwards, the first that serves it. Never null (scalar serves all).
const Kernel* pick(const Qmm& q);

// How often a kernel has been picked to run: what tests and `mlxq doctor` read back, so that no fallback is silent.
void count_call(const Kernel* kernel);
uint64_t calls(const Kernel* kernel);

// Index into `families` of the best family allowed; set_level(-1) means the best that runs here.
int level();
void set_level(int index);

// CPU features that the families look for and this machine has.
std::vector<std::string> cpu_features();

// codes = clamp(rint(x / scale), -127, 127) of each row, scale = max |x| / 127, 1 for a row of zeros: the operations of
// shaders/q8.metal's q8_rows, to the bit in every family. A row with NaN or infinity gets a scale that is not finite.
void codes_of_rows(const void* x, DType x_dtype, int64_t rows, int64_t K, int8_t* codes, float* scales);

// The plain loops, for one row: the oracle, and the way out for a row of x that is not finite.
void scalar_row(const Qmm& q, int m, int begin, int end);

}  // namespace mlxq
