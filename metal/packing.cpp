// The graphs of quantizing and dequantizing on a GPU. What runs is in eval_metal.cpp.
#include "packing.h"

#include <climits>
#include <stdexcept>

#include "mlx/ops.h"

namespace mlxq {

using mx::array;
using mx::Shape;
using std::vector;

namespace {

// The last axis by another one.
Shape ending(const array& a, int64_t last) {
  Shape shape = a.shape();
  shape.back() = int(last);
  return shape;
}

bool too_many(int64_t groups) { return groups == 0 || groups > INT_MAX; }  // the shaders count groups in int

}  // namespace

std::optional<vector<array>> quantize_on_gpu(const array& w, int group_size, int bits, mx::Dtype storage,
                                             mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  if (!on_metal(stream) || w.ndim() == 0 || w.shape(-1) % group_size != 0 || too_many(w.size() / group_size) ||
      !metal_serves(Conversion{to_dtype(w.dtype(), "quantize: w"), to_dtype(storage), bits, group_size, true})) {
    return std::nullopt;
  }
  Shape groups = ending(w, w.shape(-1) / group_size);
  return array::make_arrays({ending(w, int64_t(w.shape(-1)) * bits / 32), groups, groups, {2}},
                            {mx::uint32, storage, storage, mx::uint32},
                            std::make_shared<Quantize>(stream, group_size, bits), {row_contiguous(w, stream)});
}

std::optional<array> dequantize_on_gpu(const array& words, const array& scales, const array& biases, int group_size,
                                       int bits, mx::Dtype dtype, mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  auto stored = mx::promote_types(scales.dtype(), biases.dtype());
  if (!on_metal(stream) || too_many(scales.size()) ||
      !metal_serves(Conversion{to_dtype(dtype), to_dtype(stored), bits, group_size, false})) {
    return std::nullopt;
  }
  check_packed("dequantize", words, scales, biases, group_size, bits, true);
  return array(ending(words, int64_t(words.shape(-1)) * 32 / bits), dtype,
               std::make_shared<Dequantize>(stream, group_size, bits),
               {row_contiguous(words, stream), row_contiguous(mx::astype(scales, stored, stream), stream),
                row_contiguous(mx::astype(biases, stored, stream), stream)});
}

// CPU streams come here only as those of the fake device of tests/metal.
void Quantize::eval_cpu(const vector<array>& inputs, vector<array>& outputs) { eval_gpu(inputs, outputs); }
void Dequantize::eval_cpu(const vector<array>& inputs, array& out) { eval_gpu(inputs, out); }

#ifndef MLXQ_METAL
void Quantize::eval_gpu(const vector<array>&, vector<array>&) {
  throw std::logic_error(text(name(), ": this build has no GPU kernels"));
}
void Dequantize::eval_gpu(const vector<array>&, array&) {
  throw std::logic_error(text(name(), ": this build has no GPU kernels"));
}
#endif

}  // namespace mlxq
