// The only C++ that knows Python. Docstrings live in mlxq/ops, which is what people call.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/kernel.h"
#include "packing.h"
#include "pool.h"
#include "q8.h"
#include "quantize.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlxq {
namespace {

DType dtype_of(const std::string& name) {
  for (auto [text, dtype] : {std::pair{"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}}) {
    if (name == text) {
      return dtype;
    }
  }
  throw std::invalid_argument("dtype is " + name + "; wanted float32, float16 or bfloat16");
}

std::vector<std::string> levels() {
  std::vector<std::string> out;
  for (int i = 0; i < family_count; ++i) {
    if (families[i]->runs_here()) {
      out.push_back(families[i]->name);
    }
  }
  return out;
}

void set_isa(const std::string& name) {
  if (name.empty()) {
    set_level(-1);
    return;
  }
  std::string built, here;
  for (int i = 0; i < family_count; ++i) {
    bool runs = families[i]->runs_here();
    if (name == families[i]->name && runs) {
      set_level(i);
      return;
    }
    built += std::string(i ? ", " : "") + families[i]->name;
    here += runs ? std::string(here.empty() ? "" : ", ") + families[i]->name : "";
  }
  throw std::invalid_argument("MLXQ_ISA=" + name + " cannot be used: this CPU runs " + here + " (built: " + built + ")");
}

std::string kernel_for(int M, int N, int K, int bits, int group_size, const std::string& x_dtype,
                       const std::string& scale_dtype, bool transpose) {
  Qmm q{};
  q.x_dtype = dtype_of(x_dtype);
  q.scale_dtype = dtype_of(scale_dtype);
  q.transpose = transpose;
  q.bits = bits;
  q.group_size = group_size;
  q.M = M;
  q.N = N;
  q.K = K;
  return pick(q)->name;
}

nb::dict kernel_calls() {
  nb::dict out;
  for (int i = 0; i < family_count; ++i) {
    for (int j = 0; j < families[i]->count; ++j) {
      out[families[i]->kernels[j].name] = calls(&families[i]->kernels[j]);
    }
  }
  return out;
}

// Bytes of the array's memory that the kernel now backs with huge pages; 0 where it will not.
size_t advise_huge_pages(const mx::array& a) {
#ifdef __linux__
  constexpr uintptr_t huge = 2 << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE, Linux 6.1
  if (!a.is_available() || a.nbytes() < 2 * huge) {
    return 0;
  }
  auto start = reinterpret_cast<uintptr_t>(a.data<char>());
  uintptr_t begin = (start + huge - 1) / huge * huge, end = (start + a.nbytes()) / huge * huge;
  if (begin >= end) {
    return 0;
  }
  void* address = reinterpret_cast<void*>(begin);
  madvise(address, end - begin, MADV_HUGEPAGE);
  return madvise(address, end - begin, collapse) == 0 ? end - begin : 0;
#else
  return 0;
#endif
}

// A numpy array of shape (rows, columns) that owns its memory, not yet filled.
nb::ndarray<nb::numpy> empty(size_t rows, size_t columns, nb::dlpack::dtype dtype) {
  char* data = new char[rows * columns * (dtype.bits / 8) + 1];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<char*>(p); });
  size_t shape[2] = {rows, columns};
  return nb::ndarray<nb::numpy>(data, 2, shape, owner, nullptr, dtype);
}

// (words, scales, biases) of rule "affine", rows shared out over the pool; None when the weights cannot be quantized:
// mlxq.format says why. bfloat16 comes and goes as uint16.
nb::object quantize(const nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>& w, const std::string& w_dtype,
                    int bits, int group_size, const std::string& storage) {
  size_t rows = w.shape(0), K = w.shape(1), width = w.itemsize();
  DType from = dtype_of(w_dtype), to = dtype_of(storage);
  if (width != (from == DType::f32 ? 4 : 2)) {
    throw std::invalid_argument("quantize: w is said to be " + w_dtype + " but its items have " +
                                std::to_string(width) + " bytes");
  }
  if (K == 0 || group_size <= 0 || K % group_size != 0) {
    return nb::none();
  }
  size_t words_per_row = K * bits / 32, groups = K / group_size, stored = to == DType::f32 ? 4 : 2;
  auto scale_dtype = to == DType::f32   ? nb::dtype<float>()
                     : to == DType::f16 ? nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Float), 16, 1}
                                        : nb::dtype<uint16_t>();
  auto words = empty(rows, words_per_row, nb::dtype<uint32_t>());
  auto scales = empty(rows, groups, scale_dtype), biases = empty(rows, groups, scale_dtype);
  QuantizeReport report;
  {
    nb::gil_scoped_release release;
    constexpr size_t weights_per_task = 1 << 18;
    size_t step = std::max<size_t>(1, weights_per_task / K);
    int tasks = int((rows + step - 1) / step);
    std::vector<QuantizeReport> reports(tasks);
    parallel(tasks, false, [&](int task) {
      size_t row = task * step, here = std::min(step, rows - row);
      reports[task] = quantize_rows(static_cast<const char*>(w.data()) + row * K * width, from, here, K, bits,
                                    group_size, to, static_cast<uint32_t*>(words.data()) + row * words_per_row,
                                    static_cast<char*>(scales.data()) + row * groups * stored,
                                    static_cast<char*>(biases.data()) + row * groups * stored);
    });
    for (int task = 0; task < tasks; ++task) {
      report.merge(reports[task], int64_t(task * step * K));
    }
  }
  if (!report.ok()) {
    return nb::none();
  }
  return nb::make_tuple(words, scales, biases);
}

mx::Dtype mlx_dtype(const std::string& name) {
  DType dtype = dtype_of(name);
  return dtype == DType::f32 ? mx::float32 : dtype == DType::f16 ? mx::float16 : mx::bfloat16;
}

std::optional<std::vector<mx::array>> quantize_on_gpu_named(const mx::array& w, int group_size, int bits,
                                                            const std::string& storage, mx::StreamOrDevice s) {
  return quantize_on_gpu(w, group_size, bits, mlx_dtype(storage), s);
}

std::optional<mx::array> dequantize_on_gpu_named(const mx::array& words, const mx::array& scales,
                                                 const mx::array& biases, int group_size, int bits,
                                                 const std::string& dtype, mx::StreamOrDevice s) {
  return dequantize_on_gpu(words, scales, biases, group_size, bits, mlx_dtype(dtype), s);
}

mx::array q8mm_named(const mx::array& x, const mx::array& x_scales, const mx::array& words, const mx::array& scales,
                     const mx::array& biases, int group_size, int bits, bool per_row, const std::string& dtype,
                     mx::StreamOrDevice s) {
  return q8mm(x, x_scales, words, scales, biases, group_size, bits, per_row, mlx_dtype(dtype), s);
}

mx::array q8_linear_named(const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases,
                          int group_size, int bits, bool per_row, bool tiled, const std::string& dtype,
                          mx::StreamOrDevice s) {
  return q8_linear(x, words, scales, biases, group_size, bits, per_row, tiled, mlx_dtype(dtype), s);
}

std::pair<mx::array, mx::array> q8_rows_of(const mx::array& x, int group_size, mx::StreamOrDevice s) {
  return q8_rows(x, group_size, s);
}

// Says what the Metal host code left to be said.
void warn_once() {
  std::string text = take_metal_warning();
  if (!text.empty() && PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 2) < 0) {
    throw nb::python_error();
  }
}

// A function that returns what `call` returns, and warns.
template <typename Result, typename... Parts>
auto warning(Result (*call)(Parts...)) {
  return [call](Parts... parts) {
    Result out = call(std::forward<Parts>(parts)...);
    warn_once();
    return out;
  };
}

nb::object metal_status_dict() {
  auto status = metal_status();
  if (!status) {
    return nb::none();
  }
  nb::dict kernels, out;
  for (const auto& [name, calls] : status->kernels) {
    kernels[name.c_str()] = calls;
  }
  out["architecture"] = status->architecture;
  out["generation"] = status->generation;
  out["nax"] = status->nax;
  out["error"] = status->error.empty() ? nb::object(nb::none()) : nb::object(nb::str(status->error.c_str()));
  out["kernels"] = kernels;
  return out;
}

#ifdef MLXQ_METAL
nb::object metal_choice_dict(bool transpose, int bits, int group_size, const std::string& x_dtype,
                             const std::string& scale_dtype, int M, int N, int K, bool gather, bool sorted, int blocks,
                             int experts) {
  Choice choice = metal_choice({transpose, bits, group_size, dtype_of(x_dtype), dtype_of(scale_dtype), M, N, K, gather,
                                sorted, blocks, experts});
  if (choice.kernel.empty()) {
    return nb::none();
  }
  nb::dict out;
  out["kernel"] = choice.kernel;
  out["arguments"] = choice.arguments;
  out["grid"] = nb::make_tuple(choice.grid[0], choice.grid[1], choice.grid[2]);
  out["threads"] = nb::make_tuple(choice.threads[0], choice.threads[1], choice.threads[2]);
  out["span"] = choice.span;
  out["tiles"] = choice.tiles;
  return out;
}
#endif

}  // namespace
}  // namespace mlxq

NB_MODULE(_ext, m) {
  using namespace mlxq;
  m.attr("MLX_VERSION") = MLXQ_MLX_VERSION;
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const DtypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  m.def("probe", [](const mx::array& a) { return a; });  // a TypeError here means a foreign mlx or nanobind ABI

  m.def("qmm", warning(&qmm), "x"_a, "words"_a, "scales"_a, "biases"_a, "transpose"_a, "group_size"_a, "bits"_a,
        "stream"_a = nb::none());
  m.def("gather_qmm", warning(&gather_qmm), "x"_a, "words"_a, "scales"_a, "biases"_a, "lhs_indices"_a.none(),
        "rhs_indices"_a.none(), "transpose"_a, "group_size"_a, "bits"_a, "sorted_indices"_a, "stream"_a = nb::none());

  m.def("q8mm", warning(&q8mm_named), "x"_a, "x_scales"_a, "words"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a,
        "per_row"_a, "dtype"_a, "stream"_a = nb::none());
  m.def("q8_linear", &q8_linear_named, "x"_a, "words"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a, "per_row"_a,
        "tiled"_a, "dtype"_a, "stream"_a = nb::none());
  m.def("q8_rows", warning(&q8_rows_of), "x"_a, "group_size"_a = 0, "stream"_a = nb::none());

  m.def("quantize", &quantize, "w"_a, "w_dtype"_a, "bits"_a, "group_size"_a, "storage"_a);

  m.def("quantize_on_gpu", warning(&quantize_on_gpu_named), "w"_a, "group_size"_a, "bits"_a, "storage"_a,
        "stream"_a = nb::none());
  m.def("dequantize_on_gpu", warning(&dequantize_on_gpu_named), "words"_a, "scales"_a, "biases"_a, "group_size"_a,
        "bits"_a, "dtype"_a, "stream"_a = nb::none());

  m.def("metal_status", &metal_status_dict);
#ifdef MLXQ_METAL
  m.def("metal_choice", &metal_choice_dict, "transpose"_a, "bits"_a, "group_size"_a, "x_dtype"_a, "scale_dtype"_a,
        "M"_a, "N"_a, "K"_a, "gather"_a = false, "sorted"_a = false, "blocks"_a = 1, "experts"_a = 1);
#endif

  // Whether MLX is recording the call for a transformation (grad, vmap, compile) of one of its operands.
  m.def("traced", [](const mx::array& x, const mx::array& words, const mx::array& scales, const mx::array& biases) {
    return x.is_tracer() || words.is_tracer() || scales.is_tracer() || biases.is_tracer();
  });
  m.def("isa_levels", &levels);
  m.def("isa", [] { return std::string(level() < 0 ? "" : families[level()]->name); });
  m.def("set_isa", &set_isa, "name"_a);
  m.def("cpu_features", &cpu_features);
  m.def("kernel_for", &kernel_for);
  m.def("kernel_calls", &kernel_calls);
  m.def("threads", &pool_threads);
  m.def("advise_huge_pages", &advise_huge_pages);
}
