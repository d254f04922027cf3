// The constants of the format for C++, Metal and CUDA: mlxq/format.py has the same, and tests/test_format.py
// compares the two. Preprocessor and enum only, no includes: it must compile as text pasted before a shader.
#pragma once

// Widths that the format can store: X(bits).
#define MLXQ_FOR_EACH_BITS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(8)

// Group sizes, the weights that share one scale and one bias: X(bits, group_size), bits passed through.
#define MLXQ_FOR_EACH_GROUP_SIZE(X, bits) X(bits, 32) X(bits, 64) X(bits, 128)

// Formats that kernels are built for: shader instantiation, CPU dispatch, bindings and error texts expand this list.
#define MLXQ_FOR_EACH_FORMAT(X) \
  MLXQ_FOR_EACH_GROUP_SIZE(X, 2) MLXQ_FOR_EACH_GROUP_SIZE(X, 4) MLXQ_FOR_EACH_GROUP_SIZE(X, 8)

// Rule "affine" of quantize (formula in mlxq/format.py, affine_groups). Decimal, because C++14 (Metal) has no
// hexadecimal floats; each is the exact power of two named beside it.
#define MLXQ_FLUSH_BELOW 1.17549435e-38f             // 2^-126: smaller weights count as zero
#define MLXQ_CONSTANT_BELOW 8.27180613e-25f          // 2^-80: a smaller range makes a constant group
#define MLXQ_ERROR_BELOW 8.27180613e-25f             // 2^-80: a smaller squared error counts as zero
#define MLXQ_RANGE_LIMIT 1.70141183e+38f             // 2^127: this range and more is refused
#define MLXQ_CONSTANT_SCALE 6.10351562e-05f          // 2^-14: scale of a constant group
#define MLXQ_SMALLEST_SCALE_FLOAT32 8.07793567e-28f  // 2^-90
#define MLXQ_SMALLEST_SCALE_FLOAT16 5.96046448e-08f  // 2^-24
#define MLXQ_SMALLEST_SCALE_BFLOAT16 8.07793567e-28f // 2^-90

namespace mlxq {

// What scales, biases and activations may be stored as; float16 and bfloat16 are 16-bit patterns.
enum class DType : unsigned char { f32, f16, bf16 };

}  // namespace mlxq
