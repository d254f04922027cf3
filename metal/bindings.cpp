// The only C++ that knows Python. Docstrings live in mlxq/ops, which is what people call.
#include <stdexcept>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/kernel.h"
#include "pool.h"
#include "qmm.h"

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

template <typename T>
nb::object owned(std::vector<T>* data, size_t rows) {
  nb::capsule owner(data, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  size_t columns = rows ? data->size() / rows : 0;
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<2>>(data->data(), {rows, columns}, owner));
}

}  // namespace
}  // namespace mlxq

NB_MODULE(_ext, m) {
  using namespace mlxq;
  m.attr("MLX_VERSION") = MLXQ_MLX_VERSION;
  m.def("probe", [](const mx::array& a) { return a; });  // a TypeError here means a foreign mlx or nanobind ABI

  m.def("qmm", &qmm, "x"_a, "words"_a, "scales"_a, "biases"_a, "transpose"_a, "group_size"_a, "bits"_a,
        "stream"_a = nb::none());
  m.def("gather_qmm", &gather_qmm, "x"_a, "words"_a, "scales"_a, "biases"_a, "lhs_indices"_a.none(),
        "rhs_indices"_a.none(), "transpose"_a, "group_size"_a, "bits"_a, "sorted_indices"_a, "stream"_a = nb::none());

  m.def("isa_levels", &levels);
  m.def("isa", [] { return std::string(level() < 0 ? "" : families[level()]->name); });
  m.def("set_isa", &set_isa, "name"_a);
  m.def("cpu_features", &cpu_features);
  m.def("kernel_for", &kernel_for);
  m.def("kernel_calls", &kernel_calls);
  m.def("threads", &pool_threads);
  m.def("advise_huge_pages", &advise_huge_pages);
}
