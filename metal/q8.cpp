// Argument checks and graphs of q8mm and q8_rows. What runs is in eval_cpu.cpp and eval_metal.cpp.
#include "q8.h"

#include <stdexcept>
#include <tuple>

#include "mlx/ops.h"

namespace mlxq {

using mx::array;
using mx::Shape;
using std::vector;

namespace {

[[noreturn]] void no_gradient(const char* op) {
  throw std::invalid_argument(std::string(op) +
                              ": int8 codes have no gradient; a layer defines its own (mx.custom_function)");
}

Shape leading(const array& a) { return Shape(a.shape().begin(), a.shape().end() - 1); }

Shape tiles_of(const array& x, int group_size) {
  Shape shape = x.shape();
  shape.back() /= group_size;
  return shape;
}

// x_scales with one number for each row of x, or as they are with one for each of its groups.
array scales_of_rows(const array& x_scales, const array& x, int group_size, mx::StreamOrDevice s) {
  if (x_scales.dtype() != mx::float32) {
    throw DtypeError(text("q8mm: x_scales are ", x_scales.dtype(), "; wanted float32"));
  }
  Shape rows = leading(x);
  bool one = x_scales.size() == 1;
  if (x_scales.shape() == rows || (!one && x_scales.shape() == tiles_of(x, group_size))) {
    return x_scales;
  }
  if (!one) {
    throw std::invalid_argument(text("q8mm: x_scales have shape ", shape_text(x_scales), "; wanted one number, or ",
                                     "one for each row of x of shape ", shape_text(x), ", or for each ", group_size,
                                     " codes of a row"));
  }
  return mx::broadcast_to(mx::reshape(x_scales, {}, s), rows, s);
}

// A shader reads words, and a view may begin anywhere. What is not computed yet is met by eval_gpu.
array from_a_word_on(const array& x, mx::StreamOrDevice s) {
  if (x.is_available() && x.offset() % 4 != 0) {
    return mx::astype(mx::astype(x, mx::int16, s), mx::int8, s);
  }
  return x;
}

// For a GPU without our kernels: by qmm, tiled codes times their scales.
array in_floats(const array& x, const array& x_scales, const array& words, const array& scales, const array& biases,
                int group_size, int bits, mx::Dtype dtype, mx::Stream s) {
  bool tiled = x_scales.ndim() == x.ndim();
  array wide = mx::astype(x, mx::float32, s), by = mx::expand_dims(x_scales, -1, s);
  if (tiled) {
    Shape grouped = x_scales.shape();
    grouped.push_back(group_size);
    wide = mx::reshape(mx::multiply(mx::reshape(wide, grouped, s), by, s), x.shape(), s);
  }
  array y = qmm(wide, words, mx::astype(scales, mx::float32, s), mx::astype(biases, mx::float32, s), true, group_size,
                bits, s);
  return mx::astype(tiled ? y : mx::multiply(y, by, s), dtype, s);
}

}  // namespace

std::pair<array, array> q8_rows(const array& x, int group_size, mx::StreamOrDevice s) {
  DType dtype = to_dtype(x.dtype(), "q8_rows: x");
  if (x.ndim() == 0 || x.shape(-1) == 0) {
    throw std::invalid_argument(text("q8_rows: x has shape ", shape_text(x), "; wanted (..., K), K at least 1"));
  }
  auto stream = mx::to_stream(s);
  if (group_size != 0) {
    if (group_size != 32 && group_size != 64 && group_size != 128) {
      throw std::invalid_argument(text("q8_rows: group_size is ", group_size, "; wanted 32, 64 or 128"));
    }
    if (x.shape(-1) % group_size != 0) {
      throw std::invalid_argument(text("q8_rows: x has shape ", shape_text(x), ", whose rows are no multiple of ",
                                       "group_size=", group_size));
    }
    Shape grouped = tiles_of(x, group_size);
    grouped.push_back(group_size);
    auto [codes, scales] = q8_rows(mx::reshape(x, grouped, stream), 0, stream);
    return {mx::reshape(codes, x.shape(), stream), scales};
  }
  bool gpu = on_metal(stream) || stream.device == mx::Device::gpu;
  if (gpu && (x.size() == 0 || x.shape(-1) % 4 != 0 || !on_metal(stream) || !metal_serves_q8_rows(dtype))) {
    array wide = mx::astype(x, mx::float32, stream);
    array peak = mx::max(mx::abs(wide, stream), -1, true, stream);
    array scale = mx::where(mx::equal(peak, array(0.0f), stream), array(1.0f),
                            mx::divide(peak, array(127.0f), stream), stream);
    array codes = mx::clip(mx::round(mx::divide(wide, scale, stream), stream), array(-127.0f), array(127.0f), stream);
    return {mx::astype(codes, mx::int8, stream), mx::squeeze(scale, -1, stream)};
  }
  auto made = array::make_arrays({x.shape(), leading(x)}, {mx::int8, mx::float32}, std::make_shared<Q8Rows>(stream),
                                 {row_contiguous(x, stream)});
  return {made[0], made[1]};
}

array q8mm(const array& x, const array& x_scales, const array& words, const array& scales, const array& biases,
           int group_size, int bits, bool per_row, mx::Dtype dtype, mx::StreamOrDevice s) {
  Sizes sizes = check_packed("q8mm", words, scales, biases, group_size, bits, false);
  if (x.dtype() != mx::int8) {
    throw DtypeError(text("q8mm: x_codes are ", x.dtype(), "; wanted int8, as q8_rows makes them"));
  }
  to_dtype(dtype, "q8mm: the result");
  if (x.ndim() < 1 || x.shape(-1) != sizes.K) {
    throw std::invalid_argument(text("q8mm: x_codes have shape ", shape_text(x), " but w holds K=", sizes.K, " (",
                                     sizes.K / group_size, " groups of ", group_size, ")"));
  }
  if (sizes.K > q8_longest) {
    throw std::invalid_argument(text("q8mm: K=", sizes.K, " int8 products may not fit an int32; at most ", q8_longest));
  }
  auto stream = mx::to_stream(s);
  array rows = scales_of_rows(x_scales, x, group_size, stream);
  if (per_row && rows.ndim() == x.ndim()) {
    throw std::invalid_argument(text("q8mm: x_scales have shape ", shape_text(x_scales), ", one for each group, and ",
                                     "per_row sums whole rows; wanted per_row=False, or one scale for each row"));
  }
  Shape shape = leading(x);
  shape.push_back(sizes.N);
  bool metal = on_metal(stream), gpu = metal || stream.device == mx::Device::gpu;
  if (gpu && (x.size() == 0 || sizes.N == 0)) {
    return mx::zeros(shape, dtype, stream);
  }
  auto stored = mx::promote_types(scales.dtype(), biases.dtype());
  vector<array> inputs{row_contiguous(metal ? from_a_word_on(x, stream) : x, stream), row_contiguous(words, stream),
                       row_contiguous(mx::astype(scales, stored, stream), stream),
                       row_contiguous(mx::astype(biases, stored, stream), stream), row_contiguous(rows, stream)};
  auto made = metal ? mx::float32 : dtype;
  auto product = std::make_shared<Q8Product>(stream, group_size, bits, per_row, made);
  if (gpu && !(metal && metal_serves(product->q8(inputs)))) {
    return in_floats(x, rows, words, scales, biases, group_size, bits, dtype, stream);
  }
  return mx::astype(array(std::move(shape), made, std::move(product), std::move(inputs)), dtype, stream);
}

array q8_linear(const array& x, const array& words, const array& scales, const array& biases, int group_size, int bits,
                bool per_row, bool tiled, mx::Dtype dtype, mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  if (on_metal(stream) || stream.device == mx::Device::gpu) {
    throw std::invalid_argument("q8_linear: wanted a stream of the CPU; on a GPU use q8_rows and q8mm");
  }
  Sizes sizes = check_packed("q8_linear", words, scales, biases, group_size, bits, false);
  to_dtype(x.dtype(), "q8_linear: x");
  to_dtype(dtype, "q8_linear: the result");
  if (x.ndim() < 1 || x.shape(-1) != sizes.K || sizes.K > q8_longest || (per_row && tiled)) {
    throw std::invalid_argument(text("q8_linear: x has shape ", shape_text(x), " and w holds K=", sizes.K,
                                     "; wanted the same of at most ", q8_longest, ", and not per_row with tiles"));
  }
  Shape shape = leading(x);
  shape.push_back(sizes.N);
  auto stored = mx::promote_types(scales.dtype(), biases.dtype());
  return array(std::move(shape), dtype, std::make_shared<Q8Linear>(stream, group_size, bits, per_row, tiled, dtype),
               {row_contiguous(x, stream), row_contiguous(words, stream),
                row_contiguous(mx::astype(scales, stored, stream), stream),
                row_contiguous(mx::astype(biases, stored, stream), stream)});
}

void Q8Linear::eval_gpu(const vector<array>&, array&) {
  throw std::logic_error(text(name(), ": there is no GPU kernel"));
}

vector<array> Q8Linear::jvp(const vector<array>&, const vector<array>&, const vector<int>&) { no_gradient(name()); }

vector<array> Q8Linear::vjp(const vector<array>& primals, const vector<array>& cotangents, const vector<int>& argnums,
                            const vector<array>&) {
  vector<array> out;
  for (int arg : argnums) {
    if (arg != 0) {
      throw std::invalid_argument(text(name(), ": packed weights have no gradient; freeze them"));
    }
    array dx = qmm(mx::astype(cotangents[0], mx::float32, stream()), primals[1],
                   primals[2], primals[3], false, group_size_, bits_, stream());
    out.push_back(mx::astype(dx, primals[0].dtype(), stream()));
  }
  return out;
}

std::pair<vector<array>, vector<int>> Q8Linear::vmap(const vector<array>& inputs, const vector<int>& axes) {
  if (axes[0] < 0 || axes[1] >= 0 || axes[2] >= 0 || axes[3] >= 0) {
    throw std::invalid_argument(text(name(), ": vmap over packed weights does not exist; vmap over x"));
  }
  return {{q8_linear(mx::moveaxis(inputs[0], axes[0], 0, stream()), inputs[1], inputs[2], inputs[3], group_size_, bits_,
                     per_row_, tiled_, dtype_, stream())},
          {0}};
}

bool Q8Linear::is_equivalent(const mx::Primitive& other) const {
  auto* that = dynamic_cast<const Q8Linear*>(&other);
  return that && std::tie(group_size_, bits_, per_row_, tiled_, dtype_) ==
                     std::tie(that->group_size_, that->bits_, that->per_row_, that->tiled_, that->dtype_);
}

vector<Shape> Q8Linear::output_shapes(const vector<array>& inputs) {
  Shape shape = leading(inputs[0]);
  shape.push_back(inputs[1].shape(0));
  return {shape};
}

#ifndef MLXQ_METAL
void Q8Product::eval_gpu(const vector<array>&, array&) {
  throw std::logic_error(text(name(), ": this build has no GPU kernels"));
}
void Q8Rows::eval_gpu(const vector<array>&, vector<array>&) {
  throw std::logic_error(text(name(), ": this build has no GPU kernels"));
}
#endif

vector<array> Q8Product::jvp(const vector<array>&, const vector<array>&, const vector<int>&) { no_gradient(name()); }

vector<array> Q8Product::vjp(const vector<array>&, const vector<array>&, const vector<int>&, const vector<array>&) {
  no_gradient(name());
}

Q8 Q8Product::q8(const vector<array>& inputs) const {
  int K = inputs[0].shape(-1), grouped = per_row_ ? 0 : inputs[4].ndim() == inputs[0].ndim() ? 2 : 1;
  return {to_dtype(inputs[2].dtype()), bits_, group_size_, grouped, int(inputs[0].size() / K), inputs[1].shape(0), K};
}

std::pair<vector<array>, vector<int>> Q8Product::vmap(const vector<array>& inputs, const vector<int>& axes) {
  auto s = stream();
  int last = int(inputs.size()) - 1;
  for (int i = 1; i < last; ++i) {
    if (axes[i] >= 0) {
      throw std::invalid_argument(text(name(), ": vmap over packed weights does not exist; vmap over x"));
    }
  }
  int lanes = axes[0] >= 0 ? inputs[0].shape(axes[0]) : inputs[last].shape(axes[last]);
  vector<array> batched = inputs;
  for (int i : {0, last}) {
    if (axes[i] >= 0) {
      batched[i] = mx::moveaxis(inputs[i], axes[i], 0, s);
    } else {
      Shape shape = inputs[i].shape();
      shape.insert(shape.begin(), lanes);
      batched[i] = mx::broadcast_to(inputs[i], shape, s);
    }
    batched[i] = row_contiguous(batched[i], s);
  }
  Shape shape = leading(batched[0]);
  shape.push_back(inputs[1].shape(0));
  return {{array(shape, dtype_, std::make_shared<Q8Product>(s, group_size_, bits_, per_row_, dtype_),
                 std::move(batched))},
          {0}};
}

bool Q8Product::is_equivalent(const mx::Primitive& other) const {
  auto* that = dynamic_cast<const Q8Product*>(&other);
  return that && std::tie(group_size_, bits_, per_row_, dtype_) ==
                     std::tie(that->group_size_, that->bits_, that->per_row_, that->dtype_);
}

vector<Shape> Q8Product::output_shapes(const vector<array>& inputs) {
  Shape shape = leading(inputs[0]);
  shape.push_back(inputs[1].shape(0));
  return {shape};
}

vector<array> Q8Rows::jvp(const vector<array>&, const vector<array>&, const vector<int>&) { no_gradient(name()); }

vector<array> Q8Rows::vjp(const vector<array>&, const vector<array>&, const vector<int>&, const vector<array>&) {
  no_gradient(name());
}

std::pair<vector<array>, vector<int>> Q8Rows::vmap(const vector<array>& inputs, const vector<int>& axes) {
  auto [codes, scales] = q8_rows(mx::moveaxis(inputs[0], axes[0], 0, stream()), 0, stream());
  return {{codes, scales}, {0, 0}};
}

vector<Shape> Q8Rows::output_shapes(const vector<array>& inputs) { return {inputs[0].shape(), leading(inputs[0])}; }

}  // namespace mlxq
