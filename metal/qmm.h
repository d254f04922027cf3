// The operations as MLX sees them: lazy, differentiable, vectorisable.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

#include "../mlxq/format.h"
#include "metal_host.h"

namespace mlxq {

namespace mx = mlx::core;

// y = x @ W^T (transpose) or x @ W; shapes, dtypes and errors: mlxq.ops.qmm. CPU streams run our CPU kernels, Metal
// streams our shaders where metal_serves() says so, all others MLX's own quantized_matmul.
mx::array qmm(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
              bool transpose, int group_size, int bits, mx::StreamOrDevice s = {});

// Blocks of x times chosen experts; mlxq.ops.gather_qmm.
mx::array gather_qmm(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                     const std::optional<mx::array>& lhs_indices, const std::optional<mx::array>& rhs_indices,
                     bool transpose, int group_size, int bits, bool sorted_indices, mx::StreamOrDevice s = {});

// A dtype that an operation does not take: Python's TypeError.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// DType of an MLX array's dtype; throws for those that have none. what: of what, for the error.
DType to_dtype(mx::Dtype dtype, const char* what = "dtype");

struct Sizes {
  int N, K;
};

// The one place where packed weights are checked. experts: leading axes are allowed.
Sizes check_packed(const char* op, const mx::array& words, const mx::array& scales, const mx::array& biases,
                   int group_size, int bits, bool experts);

// Arrays as the kernels read them.
mx::array row_contiguous(const mx::array& a, mx::StreamOrDevice s);

// For messages: the parts after each other, and a shape.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
std::string shape_text(const mx::array& a);

// What both primitives share: the format, the orientation, and the rules of differentiation.
class Packed : public mx::UnaryPrimitive {
 public:
  Packed(mx::Stream stream, int group_size, int bits, bool transpose)
      : UnaryPrimitive(stream), group_size_(group_size), bits_(bits), transpose_(transpose) {}

  // In eval_metal.cpp. Without Metal no GPU stream reaches a primitive of ours.
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;

  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;

 protected:
  // The product again, with some inputs replaced.
  virtual mx::array again(const std::vector<mx::array>& inputs) const = 0;
  // Its sizes, for these inputs.
  virtual Product product(const std::vector<mx::array>& inputs) const = 0;

  int group_size_;
  int bits_;
  bool transpose_;
};

// Inputs: x, words, scales, biases.
class QuantizedProduct : public Packed {
 public:
  using Packed::Packed;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "mlxq.qmm"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 protected:
  mx::array again(const std::vector<mx::array>& inputs) const override;
  Product product(const std::vector<mx::array>& inputs) const override;
};

// Inputs: x, words, scales, biases, lhs_indices, rhs_indices (both of the output's leading shape).
class GatherProduct : public Packed {
 public:
  GatherProduct(mx::Stream stream, int group_size, int bits, bool transpose, bool sorted)
      : Packed(stream, group_size, bits, transpose), sorted_(sorted) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "mlxq.gather_qmm"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 protected:
  mx::array again(const std::vector<mx::array>& inputs) const override;
  Product product(const std::vector<mx::array>& inputs) const override;

 private:
  bool sorted_;
};

}  // namespace mlxq
