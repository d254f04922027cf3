// The table of kernel families and what this CPU can run.
#include <atomic>
#include <utility>

#include "kernel.h"

namespace mlxq {

extern const Family scalar_family;
#ifdef MLXQ_HAS_AVX2
extern const Family avx2_family;
#endif
#ifdef MLXQ_HAS_AVX512
extern const Family avx512_family;
#endif
#ifdef MLXQ_HAS_AVX512_VNNI
extern const Family avx512_vnni_family;
#endif
#ifdef MLXQ_HAS_AVX512_BF16
extern const Family avx512_bf16_family;
#endif
#ifdef MLXQ_HAS_AMX
extern const Family amx_family;
#endif
#ifdef MLXQ_HAS_AMX_INT8
extern const Family amx_int8_family;
#endif
#ifdef MLXQ_HAS_NEON
extern const Family neon_family;
#endif
#ifdef MLXQ_HAS_NEON_DOTPROD
extern const Family neon_dotprod_family;
#endif

const Family* const families[] = {
    &scalar_family,
#ifdef MLXQ_HAS_AVX2
    &avx2_family,
#endif
#ifdef MLXQ_HAS_AVX512
    &avx512_family,
#endif
#ifdef MLXQ_HAS_AVX512_VNNI
    &avx512_vnni_family,
#endif
#ifdef MLXQ_HAS_AVX512_BF16
    &avx512_bf16_family,
#endif
#ifdef MLXQ_HAS_AMX
    &amx_family,
#endif
#ifdef MLXQ_HAS_AMX_INT8
    &amx_int8_family,
#endif
#ifdef MLXQ_HAS_NEON
    &neon_family,
#endif
#ifdef MLXQ_HAS_NEON_DOTPROD
    &neon_dotprod_family,
#endif
};
const int family_count = sizeof(families) / sizeof(families[0]);

namespace {

int best_here() {
  static const int best = [] {
    int index = 0;
    for (int i = 0; i < family_count; ++i) {
      if (families[i]->runs_here()) {
        index = i;
      }
    }
    return index;
  }();
  return best;
}

std::atomic<int> forced{-1};

constexpr int most_kernels = 8;
std::atomic<uint64_t> counts[16][most_kernels];

std::atomic<uint64_t>& count_of(const Kernel* kernel) {
  int family = 0;
  while (kernel < families[family]->kernels || kernel >= families[family]->kernels + families[family]->count) {
    ++family;
  }
  return counts[family][kernel - families[family]->kernels];
}

}  // namespace

void count_call(const Kernel* kernel) { count_of(kernel).fetch_add(1, std::memory_order_relaxed); }

uint64_t calls(const Kernel* kernel) { return count_of(kernel).load(std::memory_order_relaxed); }

int level() {
  int index = forced.load(std::memory_order_relaxed);
  return index < 0 ? best_here() : index;
}

void set_level(int index) { forced.store(index, std::memory_order_relaxed); }

const Kernel* pick(const Qmm& q) {
  for (int i = level(); i >= 0; --i) {
    if (!families[i]->runs_here()) {
      continue;
    }
    for (int j = 0; j < families[i]->count; ++j) {
      const Kernel& kernel = families[i]->kernels[j];
      if (kernel.q8 == (q.x_scales != nullptr) && kernel.serves(q)) {
        return &kernel;
      }
    }
  }
  return &scalar_family.kernels[q.x_scales ? 1 : 0];
}

void codes_of_rows(const void* x, DType x_dtype, int64_t rows, int64_t K, int8_t* codes, float* scales) {
  int best = level();
  while (!families[best]->codes_of_row || !families[best]->runs_here()) {
    --best;
  }
  for (int64_t row = 0; row < rows; ++row) {
    families[best]->codes_of_row(x, x_dtype, row * K, K, codes + row * K, scales + row);
  }
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> out;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MLXQ_FEATURE(name) \
  if (__builtin_cpu_supports(name)) out.push_back(name);
  MLXQ_FEATURE("avx2")
  MLXQ_FEATURE("fma")
  MLXQ_FEATURE("avx512f")
  MLXQ_FEATURE("avx512bw")
  MLXQ_FEATURE("avx512vnni")
  MLXQ_FEATURE("avx512bf16")
#undef MLXQ_FEATURE
#endif
  // What no compiler builtin tells, the family that needs it has asked the system for.
  for (auto [family, feature] : {std::pair{"amx", "amx_bf16"}, {"amx_int8", "amx_int8"}, {"neon", "asimd"},
                                 {"neon_dotprod", "asimddp"}}) {
    for (int i = 0; i < family_count; ++i) {
      if (std::string(families[i]->name) == family && families[i]->runs_here()) {
        out.push_back(feature);
      }
    }
  }
  return out;
}

}  // namespace mlxq
