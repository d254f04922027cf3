// Products of int8 codes as MLX sees them: q8mm, and q8_rows, which makes the codes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "qmm.h"

namespace mlxq {

// The sums of a whole row stay in int32 up to here: 131071 * 128 * 128 < 2^31.
constexpr int q8_longest = 131071;

// (codes int8, scales float32 without the last axis) of x's rows, or with group_size not 0 (codes, scales (..., K /
// group_size)) of the groups of these; mlxq.ops.q8_rows. Lazy, without a gradient.
std::pair<mx::array, mx::array> q8_rows(const mx::array& x, int group_size, mx::StreamOrDevice s = {});

// Shapes, formula and errors: mlxq.ops.q8mm. A GPU on which our kernels do not run gives a product of floats by qmm.
mx::array q8mm(const mx::array& x, const mx::array& x_scales, const mx::array& words, const mx::array& scales,
               const mx::array& biases, int group_size, int bits, bool per_row, mx::Dtype dtype,
               mx::StreamOrDevice s = {});

// q8mm of the codes and scales that q8_rows gives float x, on a CPU in one step; group_size codes a scale if tiled. Its
// gradient for x is that of the unrounded x.
mx::array q8_linear(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                    int group_size, int bits, bool per_row, bool tiled, mx::Dtype dtype, mx::StreamOrDevice s = {});

// Inputs: x, words, scales, biases, x_scales: one for each row of x, or for each of its groups. On Metal dtype is float32.
class Q8Product : public mx::UnaryPrimitive {
 public:
  Q8Product(mx::Stream stream, int group_size, int bits, bool per_row, mx::Dtype dtype)
      : UnaryPrimitive(stream), group_size_(group_size), bits_(bits), per_row_(per_row), dtype_(dtype) {}
  // What Metal's kernel is chosen by.
  Q8 q8(const std::vector<mx::array>& inputs) const;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "mlxq.q8mm"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  int group_size_;
  int bits_;
  bool per_row_;
  mx::Dtype dtype_;
};

// Inputs: float x, words, scales, biases. On a CPU.
class Q8Linear : public mx::UnaryPrimitive {
 public:
  Q8Linear(mx::Stream stream, int group_size, int bits, bool per_row, bool tiled, mx::Dtype dtype)
      : UnaryPrimitive(stream), group_size_(group_size), bits_(bits), per_row_(per_row), tiled_(tiled), dtype_(dtype) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "mlxq.q8_linear"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  int group_size_;
  int bits_;
  bool per_row_;
  bool tiled_;
  mx::Dtype dtype_;
};

// Input: x. Outputs: codes, scales.
class Q8Rows : public mx::Primitive {
 public:
  using Primitive::Primitive;
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override;
  const char* name() const override { return "mlxq.q8_rows"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;
};

}  // namespace mlxq
