// Argument checks, shapes, and the rules of differentiation and vectorisation. What runs is in eval_cpu.cpp and
// eval_metal.cpp.
//
// Words, scales and biases are made row-contiguous when the graph is built (free when they already are); a strided x is
// read as it lies by eval_cpu, and made row-contiguous for Metal. The result has x's dtype whatever the scales are
// stored in.
#include "qmm.h"

#include <stdexcept>
#include <string>
#include <tuple>

#include "mlx/ops.h"

namespace mlxq {

using mx::array;
using mx::Shape;
using std::vector;

namespace {

std::string built_formats() {
  std::string out;
#define MLXQ_NAME(bits, group) out += std::string(out.empty() ? "" : ", ") + #bits "-bit/" #group;
  MLXQ_FOR_EACH_FORMAT(MLXQ_NAME)
#undef MLXQ_NAME
  return out;
}

bool built(int bits, int group_size) {
#define MLXQ_IS(b, g) \
  if (bits == b && group_size == g) return true;
  MLXQ_FOR_EACH_FORMAT(MLXQ_IS)
#undef MLXQ_IS
  return false;
}

bool is_float(mx::Dtype dtype) { return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16; }

// x against the weight that check_packed has passed.
Sizes check(const char* op, const array& x, const array& words, const array& scales, const array& biases,
            bool transpose, int group_size, int bits, bool experts) {
  if (!is_float(x.dtype())) {
    throw DtypeError(text(op, ": x is ", x.dtype(), "; wanted float32, float16 or bfloat16"));
  }
  auto [N, K] = check_packed(op, words, scales, biases, group_size, bits, experts);
  const char* inner_name = transpose ? "K" : "N";
  int inner = transpose ? K : N;
  if (x.ndim() < (experts ? 2 : 1)) {
    throw std::invalid_argument(text(op, ": x has shape ", shape_text(x), "; wanted (..., ", experts ? "M, " : "",
                                     inner_name, "=", inner, ")"));
  }
  if (x.shape(-1) != inner) {
    throw std::invalid_argument(text(op, ": x has ", inner_name, "=", x.shape(-1), " but w holds ", inner_name, "=",
                                     inner, transpose ? text(" (", K / group_size, " groups of ", group_size, ")") : ""));
  }
  return {N, K};
}

mx::Dtype common(const array& scales, const array& biases) { return mx::promote_types(scales.dtype(), biases.dtype()); }

array codes_as_float(const array& words, int group_size, int bits, mx::StreamOrDevice s) {
  Shape shape = words.shape();
  shape.back() = words.shape(-1) * 32 / bits / group_size;
  return mx::dequantize(words, mx::ones(shape, mx::float32, s), mx::zeros(shape, mx::float32, s), group_size, bits,
                        "affine", std::nullopt, mx::float32, s);
}

// (..., K) -> (..., K / group_size): sums over groups.
array group_sum(const array& a, int group_size, mx::StreamOrDevice s) {
  Shape shape = a.shape();
  shape.back() /= group_size;
  shape.push_back(group_size);
  return mx::sum(mx::reshape(a, shape, s), -1, false, s);
}

array rows_of(const array& a, mx::StreamOrDevice s) {
  return mx::astype(mx::reshape(a, {-1, a.shape(-1)}, s), mx::float32, s);
}

// Whether a product, or its gradient, is an empty sum. MLX's reshape cannot infer the shape of an empty array, and its
// scatter divides by the size of an update.
bool empty_sum(const array& x, const array& g) { return x.size() == 0 || g.size() == 0; }

[[noreturn]] void no_word_gradient(const char* op) {
  throw std::invalid_argument(text(
      op, ": packed words are integers and have no gradient; differentiate with respect to x, scales or biases"));
}

}  // namespace

std::string shape_text(const array& a) {
  std::string out = "(";
  for (int i = 0; i < a.ndim(); ++i) {
    out += (i ? ", " : "") + std::to_string(a.shape(i));
  }
  return out + ")";
}

Sizes check_packed(const char* op, const array& words, const array& scales, const array& biases, int group_size,
                   int bits, bool experts) {
  if (!built(bits, group_size)) {
    throw std::invalid_argument(
        text(op, ": ", bits, "-bit groups of ", group_size, " do not exist; built: ", built_formats()));
  }
  if (words.dtype() != mx::uint32) {
    throw DtypeError(text(op, ": words are ", words.dtype(), "; wanted uint32"));
  }
  if (!is_float(scales.dtype()) || !is_float(biases.dtype())) {
    throw DtypeError(text(op, ": scales are ", scales.dtype(), " and biases ", biases.dtype(),
                                     "; wanted float32, float16 or bfloat16"));
  }
  if (experts ? words.ndim() < 2 : words.ndim() != 2) {
    throw std::invalid_argument(text(op, ": words have shape ", shape_text(words), "; wanted ",
                                     experts ? "(..., N, K * bits / 32)" : "(N, K * bits / 32)"));
  }
  int N = words.shape(-2);
  int64_t K = int64_t(words.shape(-1)) * 32 / bits;
  if (K == 0 || K % group_size != 0) {
    throw std::invalid_argument(text(op, ": words of shape ", shape_text(words), " hold K=", K, " codes of ", bits,
                                     " bits a row; K must be a positive multiple of the group of ", group_size));
  }
  Shape wanted = words.shape();
  wanted.back() = int(K / group_size);
  for (const array* a : {&scales, &biases}) {
    if (a->shape() != wanted) {
      throw std::invalid_argument(text(op, ": ", a == &scales ? "scales" : "biases", " have shape ", shape_text(*a),
                                       "; wanted one for each of the ", K / group_size, " groups of ", group_size,
                                       " in each row of words of shape ", shape_text(words)));
    }
  }
  return {N, int(K)};
}

array row_contiguous(const array& a, mx::StreamOrDevice s) {
  return a.is_available() && a.flags().row_contiguous ? a : mx::contiguous(a, false, s);
}

DType to_dtype(mx::Dtype dtype, const char* what) {
  if (dtype == mx::float32) {
    return DType::f32;
  }
  if (dtype == mx::float16) {
    return DType::f16;
  }
  if (dtype == mx::bfloat16) {
    return DType::bf16;
  }
  throw DtypeError(text(what, " is ", dtype, "; wanted float32, float16 or bfloat16"));
}

array qmm(const array& x, const array& words, const array& scales, const array& biases, bool transpose, int group_size,
          int bits, mx::StreamOrDevice s) {
  auto [N, K] = check("qmm", x, words, scales, biases, transpose, group_size, bits, false);
  auto stream = mx::to_stream(s);
  Shape shape = x.shape();
  shape.back() = transpose ? N : K;
  auto dtype = common(scales, biases);
  bool metal = on_metal(stream);
  if (metal || stream.device == mx::Device::gpu) {
    if (x.size() == 0 || N == 0) {
      return mx::zeros(shape, x.dtype(), stream);
    }
    int rows = int(x.size() / x.shape(-1));
    if (!metal || !metal_serves({transpose, bits, group_size, to_dtype(x.dtype()), to_dtype(dtype), rows, N, K})) {
      return mx::astype(mx::quantized_matmul(x, words, scales, biases, transpose, group_size, bits, "affine", stream),
                        x.dtype(), stream);
    }
  }
  return array(std::move(shape), x.dtype(), std::make_shared<QuantizedProduct>(stream, group_size, bits, transpose),
               {metal ? row_contiguous(x, stream) : x, row_contiguous(words, stream),
                row_contiguous(mx::astype(scales, dtype, stream), stream),
                row_contiguous(mx::astype(biases, dtype, stream), stream)});
}

array gather_qmm(const array& x, const array& words, const array& scales, const array& biases,
                 const std::optional<array>& lhs_indices, const std::optional<array>& rhs_indices, bool transpose,
                 int group_size, int bits, bool sorted_indices, mx::StreamOrDevice s) {
  auto [N, K] = check("gather_qmm", x, words, scales, biases, transpose, group_size, bits, true);
  auto stream = mx::to_stream(s);
  auto indices = [&](const std::optional<array>& given, const array& of, const char* what) {
    if (given) {
      if (!mx::issubdtype(given->dtype(), mx::integer)) {
        throw DtypeError(text("gather_qmm: ", what, " are ", given->dtype(), "; wanted integers"));
      }
      return mx::astype(*given, mx::int32, stream);
    }
    Shape batch(of.shape().begin(), of.shape().end() - 2);
    int count = 1;
    for (auto n : batch) {
      count *= n;
    }
    return mx::reshape(mx::arange(count, mx::int32, stream), batch, stream);
  };
  auto broadcast = mx::broadcast_arrays(
      {indices(lhs_indices, x, "lhs_indices"), indices(rhs_indices, words, "rhs_indices")}, stream);
  Shape shape = broadcast[0].shape();
  shape.push_back(x.shape(-2));
  shape.push_back(transpose ? N : K);
  auto dtype = common(scales, biases);
  bool metal = on_metal(stream);
  if (metal || stream.device == mx::Device::gpu) {
    if (x.size() == 0 || words.size() == 0 || broadcast[0].size() == 0) {
      return mx::zeros(shape, x.dtype(), stream);
    }
    // A GPU cannot raise, and an index may not reach outside: as unsigned numbers, negative ones are too large as well.
    auto inside = [&](const array& a, int64_t count) {
      array last(uint32_t(count - 1), mx::uint32);
      return mx::view(mx::minimum(mx::view(a, mx::uint32, stream), last, stream), mx::int32, stream);
    };
    if (lhs_indices) {
      broadcast[0] = inside(broadcast[0], x.size() / (int64_t(x.shape(-2)) * x.shape(-1)));
    }
    if (rhs_indices) {
      broadcast[1] = inside(broadcast[1], words.size() / (int64_t(N) * words.shape(-1)));
    }
    Product p{transpose, bits, group_size, to_dtype(x.dtype()), to_dtype(dtype), x.shape(-2), N, K, true};
    p.sorted = sorted_indices;
    p.blocks = int(broadcast[0].size());
    p.experts = int(words.size() / (int64_t(N) * words.shape(-1)));
    if (!metal || !metal_serves(p)) {
      auto as_index = [&](const array& a) { return mx::astype(a, mx::uint32, stream); };
      return mx::astype(
          mx::gather_qmm(x, words, scales, biases, as_index(broadcast[0]), as_index(broadcast[1]), transpose,
                         group_size, bits, "affine", std::nullopt, sorted_indices, stream),
          x.dtype(), stream);
    }
  }
  return array(std::move(shape), x.dtype(),
               std::make_shared<GatherProduct>(stream, group_size, bits, transpose, sorted_indices),
               {row_contiguous(x, stream), row_contiguous(words, stream),
                row_contiguous(mx::astype(scales, dtype, stream), stream),
                row_contiguous(mx::astype(biases, dtype, stream), stream), row_contiguous(broadcast[0], stream),
                row_contiguous(broadcast[1], stream)});
}

#ifndef MLXQ_METAL
void Packed::eval_gpu(const vector<array>&, array&) {
  throw std::logic_error(text(name(), ": this build has no GPU kernels; qmm() gives GPU streams to MLX's own operation"));
}
#endif

vector<array> Packed::jvp(const vector<array>& primals, const vector<array>& tangents, const vector<int>& argnums) {
  auto s = stream();
  std::optional<array> sum;
  for (size_t i = 0; i < argnums.size(); ++i) {
    vector<array> inputs = primals;
    switch (argnums[i]) {
      case 0:
        inputs[0] = tangents[i];
        break;
      case 2:  // linear in (scales, biases) together: the other one's share is zero
        inputs[2] = tangents[i];
        inputs[3] = mx::zeros_like(primals[3], s);
        break;
      case 3:
        inputs[2] = mx::zeros_like(primals[2], s);
        inputs[3] = tangents[i];
        break;
      default:
        no_word_gradient(name());
    }
    array term = again(inputs);
    sum = sum ? mx::add(*sum, term, s) : term;
  }
  return {*sum};
}

array QuantizedProduct::again(const vector<array>& in) const {
  return qmm(in[0], in[1], in[2], in[3], transpose_, group_size_, bits_,
             const_cast<QuantizedProduct*>(this)->stream());
}

Product QuantizedProduct::product(const vector<array>& in) const {
  const array &x = in[0], &words = in[1];
  return {transpose_, bits_, group_size_, to_dtype(x.dtype()), to_dtype(in[2].dtype()), int(x.size() / x.shape(-1)),
          words.shape(-2), words.shape(-1) * 32 / bits_};
}

vector<array> QuantizedProduct::vjp(const vector<array>& primals, const vector<array>& cotangents,
                                    const vector<int>& argnums, const vector<array>&) {
  auto s = stream();
  const array &x = primals[0], &words = primals[1], &scales = primals[2], &biases = primals[3], &g = cotangents[0];
  vector<array> out;
  for (int arg : argnums) {
    if (arg != 1 && empty_sum(x, g)) {
      out.push_back(mx::zeros_like(primals[arg], s));
      continue;
    }
    if (arg == 0) {
      out.push_back(qmm(g, words, scales, biases, !transpose_, group_size_, bits_, s));
      continue;
    }
    if (arg == 1) {
      no_word_gradient(name());
    }
    // dW = over_n^T @ over_k, (N, K); dscales and dbiases are its group sums, weighted by the codes or not.
    array over_n = mx::transpose(rows_of(transpose_ ? g : x, s), s);
    array over_k = rows_of(transpose_ ? x : g, s);
    array grad = arg == 3 ? mx::matmul(over_n, group_sum(over_k, group_size_, s), s)
                          : group_sum(mx::multiply(mx::matmul(over_n, over_k, s),
                                                   codes_as_float(words, group_size_, bits_, s), s),
                                      group_size_, s);
    out.push_back(mx::astype(grad, primals[arg].dtype(), s));
  }
  return out;
}

std::pair<vector<array>, vector<int>> QuantizedProduct::vmap(const vector<array>& inputs, const vector<int>& axes) {
  auto s = stream();
  bool weight = axes[1] >= 0 || axes[2] >= 0 || axes[3] >= 0;
  array x = axes[0] >= 0 ? mx::moveaxis(inputs[0], axes[0], 0, s) : inputs[0];
  if (!weight) {
    return {{qmm(x, inputs[1], inputs[2], inputs[3], transpose_, group_size_, bits_, s)}, {0}};
  }
  // One weight per lane: lanes are experts.
  int lanes = 0;
  for (int i = 0; i < 4; ++i) {
    lanes = axes[i] >= 0 ? inputs[i].shape(axes[i]) : lanes;
  }
  auto stacked = [&](int i) {
    if (axes[i] >= 0) {
      return mx::moveaxis(inputs[i], axes[i], 0, s);
    }
    Shape shape = inputs[i].shape();
    shape.insert(shape.begin(), lanes);
    return mx::broadcast_to(inputs[i], shape, s);
  };
  Shape lane_shape = axes[0] >= 0 ? Shape(x.shape().begin() + 1, x.shape().end()) : x.shape();
  Shape block = {axes[0] >= 0 ? lanes : 1, -1, x.shape(-1)};
  array lane = mx::arange(lanes, mx::int32, s);
  array out = gather_qmm(mx::reshape(x, block, s), stacked(1), stacked(2), stacked(3),
                         axes[0] >= 0 ? lane : mx::zeros({lanes}, mx::int32, s), lane, transpose_, group_size_, bits_,
                         true, s);
  lane_shape.back() = out.shape(-1);
  lane_shape.insert(lane_shape.begin(), lanes);
  return {{mx::reshape(out, lane_shape, s)}, {0}};
}

bool QuantizedProduct::is_equivalent(const mx::Primitive& other) const {
  auto* that = dynamic_cast<const QuantizedProduct*>(&other);
  return that && std::tie(group_size_, bits_, transpose_) ==
                     std::tie(that->group_size_, that->bits_, that->transpose_);
}

vector<Shape> QuantizedProduct::output_shapes(const vector<array>& inputs) {
  Shape shape = inputs[0].shape();
  shape.back() = transpose_ ? inputs[1].shape(-2) : inputs[1].shape(-1) * 32 / bits_;
  return {shape};
}

array GatherProduct::again(const vector<array>& in) const {
  return gather_qmm(in[0], in[1], in[2], in[3], in[4], in[5], transpose_, group_size_, bits_, sorted_,
                    const_cast<GatherProduct*>(this)->stream());
}

Product GatherProduct::product(const vector<array>& in) const {
  const array &x = in[0], &words = in[1];
  Product p{transpose_, bits_, group_size_, to_dtype(x.dtype()), to_dtype(in[2].dtype()), x.shape(-2),
            words.shape(-2), words.shape(-1) * 32 / bits_, true};
  p.sorted = sorted_;
  p.blocks = int(in[4].size());
  p.experts = int(words.size() / (int64_t(words.shape(-2)) * words.shape(-1)));
  return p;
}

vector<array> GatherProduct::vjp(const vector<array>& primals, const vector<array>& cotangents,
                                 const vector<int>& argnums, const vector<array>&) {
  auto s = stream();
  const array &x = primals[0], &words = primals[1], &scales = primals[2], &g = cotangents[0];
  array lhs = mx::flatten(primals[4], s), rhs = mx::flatten(primals[5], s);
  int blocks = lhs.shape(0);
  array g3 = mx::reshape(g, {blocks, g.shape(-2), g.shape(-1)}, s);
  auto scatter_blocks = [&](const array& like, const array& indices, const array& updates, mx::Dtype dtype) {
    // updates (blocks, A, B) summed in float32 into the flattened leading axes of `like`
    int batch = 1;
    for (int i = 0; i + 2 < like.ndim(); ++i) {
      batch *= like.shape(i);
    }
    array zero = mx::zeros({batch, updates.shape(-2), updates.shape(-1)}, mx::float32, s);
    array full = mx::expand_dims(mx::astype(updates, mx::float32, s), 1, s);
    return mx::astype(mx::reshape(mx::scatter_add(zero, indices, full, 0, s), like.shape(), s), dtype, s);
  };
  vector<array> out;
  for (int arg : argnums) {
    if ((arg == 0 || arg == 2 || arg == 3) && empty_sum(x, g)) {
      out.push_back(mx::zeros_like(primals[arg], s));
      continue;
    }
    if (arg == 0) {
      array dx = gather_qmm(g3, words, scales, primals[3], mx::arange(blocks, mx::int32, s), rhs, !transpose_,
                            group_size_, bits_, sorted_, s);
      out.push_back(scatter_blocks(x, lhs, dx, x.dtype()));
      continue;
    }
    if (arg != 2 && arg != 3) {
      if (arg == 1) {
        no_word_gradient(name());
      }
      throw std::invalid_argument("mlxq.gather_qmm: indices have no gradient");
    }
    array x3 = mx::take(mx::reshape(x, {-1, x.shape(-2), x.shape(-1)}, s), lhs, 0, s);
    array over_n = mx::astype(mx::swapaxes(transpose_ ? g3 : x3, -1, -2, s), mx::float32, s);
    array over_k = mx::astype(transpose_ ? x3 : g3, mx::float32, s);
    array grad = over_k;
    if (arg == 3) {
      grad = mx::matmul(over_n, group_sum(over_k, group_size_, s), s);
    } else {
      array flat = mx::reshape(words, {-1, words.shape(-2), words.shape(-1)}, s);
      array codes = mx::take(codes_as_float(flat, group_size_, bits_, s), rhs, 0, s);
      grad = group_sum(mx::multiply(mx::matmul(over_n, over_k, s), codes, s), group_size_, s);
    }
    out.push_back(scatter_blocks(primals[arg], rhs, grad, primals[arg].dtype()));
  }
  return out;
}

std::pair<vector<array>, vector<int>> GatherProduct::vmap(const vector<array>& inputs, const vector<int>& axes) {
  auto s = stream();
  int lanes = 0;
  for (int i = 0; i < 6; ++i) {
    lanes = axes[i] >= 0 ? inputs[i].shape(axes[i]) : lanes;
  }
  auto front = [&](int i) { return axes[i] >= 0 ? mx::moveaxis(inputs[i], axes[i], 0, s) : inputs[i]; };
  bool weight = axes[1] >= 0 || axes[2] >= 0 || axes[3] >= 0;
  auto stacked = [&](int i) {
    array a = front(i);
    if (!weight || axes[i] >= 0) {
      return a;
    }
    Shape shape = a.shape();
    shape.insert(shape.begin(), lanes);
    return mx::broadcast_to(a, shape, s);
  };
  // Lanes join the leading axes; each lane's indices move past the blocks (experts) of the lanes before it.
  auto shifted = [&](int i, bool batched, const array& of, int leading_axis) {
    array index = front(i);
    Shape shape(index.shape());
    if (axes[i] < 0) {
      shape.insert(shape.begin(), lanes);
      index = mx::broadcast_to(index, shape, s);
    }
    if (!batched) {
      return index;
    }
    int per_lane = 1;
    for (int d = leading_axis; d + 2 < of.ndim(); ++d) {
      per_lane *= of.shape(d);
    }
    Shape column(index.ndim(), 1);
    column[0] = lanes;
    array offset = mx::reshape(mx::multiply(mx::arange(lanes, mx::int32, s), array(per_lane, mx::int32), s), column, s);
    return mx::add(index, offset, s);
  };
  array x = front(0), words = stacked(1);
  array out = gather_qmm(x, words, stacked(2), stacked(3), shifted(4, axes[0] >= 0, x, 1),
                         shifted(5, weight, words, 1), transpose_, group_size_, bits_, false, s);
  return {{out}, {0}};
}

bool GatherProduct::is_equivalent(const mx::Primitive& other) const {
  auto* that = dynamic_cast<const GatherProduct*>(&other);
  return that && std::tie(group_size_, bits_, transpose_, sorted_) ==
                     std::tie(that->group_size_, that->bits_, that->transpose_, that->sorted_);
}

vector<Shape> GatherProduct::output_shapes(const vector<array>& inputs) {
  Shape shape = inputs[4].shape();
  shape.push_back(inputs[0].shape(-2));
  shape.push_back(transpose_ ? inputs[1].shape(-2) : inputs[1].shape(-1) * 32 / bits_);
  return {shape};
}

}  // namespace mlxq
