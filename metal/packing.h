// Quantizing and dequantizing on a GPU as MLX sees them, by shaders/quantize.metal. On a CPU mlxq/ops/native.py has its
// own ways, and the same bits.
#pragma once

#include <optional>
#include <vector>

#include "qmm.h"

namespace mlxq {

// {words, scales, biases, report} of w (..., K) by rule "affine"; report, uint32 (2,), counts the weights that are NaN or
// infinite and the other groups that `storage` cannot hold, which have zeros. Nothing where no shader of ours serves.
std::optional<std::vector<mx::array>> quantize_on_gpu(const mx::array& w, int group_size, int bits, mx::Dtype storage,
                                                      mx::StreamOrDevice s = {});

// scale * code, rounded, + bias, rounded, to dtype. Nothing where no shader of ours serves. Without a gradient.
std::optional<mx::array> dequantize_on_gpu(const mx::array& words, const mx::array& scales, const mx::array& biases,
                                           int group_size, int bits, mx::Dtype dtype, mx::StreamOrDevice s = {});

// Input: w. Outputs: words, scales, biases, report.
class Quantize : public mx::Primitive {
 public:
  Quantize(mx::Stream stream, int group_size, int bits) : Primitive(stream), group_size_(group_size), bits_(bits) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "mlxq.quantize"; }

 private:
  int group_size_;
  int bits_;
};

// Inputs: words, scales, biases.
class Dequantize : public mx::UnaryPrimitive {
 public:
  Dequantize(mx::Stream stream, int group_size, int bits)
      : UnaryPrimitive(stream), group_size_(group_size), bits_(bits) {}
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  const char* name() const override { return "mlxq.dequantize"; }

 private:
  int group_size_;
  int bits_;
};

}  // namespace mlxq
