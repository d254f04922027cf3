// The AMX int8 kernel of q8mm beside that of AVX-512 VNNI, whose bits it gives.
//
//   q8 check        both kernels over every format and ragged shapes: exits 1 at the first byte that differs
//   q8 time FILE [MILLISECONDS]    both on one thread, every M; JSON lines into FILE, microseconds of prepare and run
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../metal/cpu/kernel.h"
#include "../../metal/cpu/numeric.h"

namespace mlxq {
extern const Family amx_int8_family;
extern const Family avx512_vnni_family;
}  // namespace mlxq

namespace {

using namespace mlxq;

enum class Scaled { row, group, tile };
const char* name(Scaled s) { return s == Scaled::row ? "per row" : s == Scaled::group ? "groups" : "tiles"; }

struct Case {
  int bits, group;
  Scaled scaled;
  DType y, scales;
  int M, N, K;
};

std::string describe(const Case& c) {
  return std::to_string(c.bits) + "-bit/" + std::to_string(c.group) + " " + name(c.scaled) +
         " M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K);
}

const Kernel& kernel_of(const Family& family, int M) {
  Qmm q{};
  q.transpose = true;
  q.M = M;
  for (int i = 0; i < family.count; ++i) {
    if (family.kernels[i].q8 && family.kernels[i].serves(q)) {
      return family.kernels[i];
    }
  }
  std::abort();
}

constexpr int many = 1 << 20;  // rows for which both families have their kernel of many rows
const Kernel& amx() { return kernel_of(amx_int8_family, many); }
const Kernel& vnni(int M) { return kernel_of(avx512_vnni_family, M); }

struct Problem {
  Problem(const Case& c, unsigned seed)
      : x(size_t(c.M) * c.K),
        words(size_t(c.N) * c.K * c.bits / 32),
        scales(size_t(c.N) * (c.K / c.group) * 4),
        biases(scales.size()),
        x_scales(size_t(c.M) * (c.scaled == Scaled::tile ? c.K / c.group : 1)) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    for (int8_t& one : x) {
      one = int8_t(random());
    }
    std::fill(x.begin(), x.begin() + c.K, int8_t(-128));  // extremes in x's first row and W's
    for (uint32_t& word : words) {
      word = uint32_t(random());
    }
    std::fill(words.begin(), words.begin() + c.K * c.bits / 32, 0u);
    for (int i = 0; i < c.N * (c.K / c.group); ++i) {
      float scale = uniform(random) / float(1 << c.bits);
      store(scales.data(), c.scales, i, scale);
      store(biases.data(), c.scales, i, -scale * float(1 << c.bits) * uniform(random) / 2);
    }
    for (float& one : x_scales) {
      one = uniform(random) * 0.01f;
    }
    q = Qmm{c.y, c.scales, true, c.bits, c.group, c.M, c.N, c.K, x.data(), nullptr, nullptr, nullptr,
            words.data(), scales.data(), biases.data(), x_scales.data(), c.scaled == Scaled::row,
            c.scaled == Scaled::tile};
  }

  std::vector<char> run(const Kernel& kernel) {
    std::vector<char> y(size_t(q.M) * q.N * 4, char(0xa5));
    q.y = y.data();
    std::unique_ptr<char, void (*)(void*)> prepared = room(kernel);
    kernel.prepare(q, prepared.get(), q.M / 3, q.M);
    kernel.prepare(q, prepared.get(), 0, q.M / 3);
    const int chunk = q.N > 40 ? kernel.unit(q) : q.N;
    for (int begin = 0; begin < q.N; begin += chunk) {
      kernel.run(q, prepared.get(), begin, std::min(q.N, begin + chunk));
    }
    return y;
  }

  std::unique_ptr<char, void (*)(void*)> room(const Kernel& kernel) const {
    size_t bytes = (size_t(q.M) * kernel.row_bytes(q) + 4095) / 4096 * 4096;
    return {static_cast<char*>(std::aligned_alloc(4096, bytes)), std::free};
  }

  std::vector<int8_t> x;
  std::vector<uint32_t> words;
  std::vector<char> scales, biases;
  std::vector<float> x_scales;
  Qmm q;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  std::mt19937 random(1);
  auto any = [&](int low, int high) { return low + int(random() % unsigned(high - low + 1)); };
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
#define MLXQ_FORMAT_CASES(b, g)                                                       \
  for (Scaled s : {Scaled::row, Scaled::group, Scaled::tile}) {                       \
    for (DType d : dtypes) {                                                          \
      all.push_back({b, g, s, d, dtypes[any(0, 2)], 1, 1, g});                        \
      all.push_back({b, g, s, d, dtypes[any(0, 2)], 70, 70, 3 * g});                  \
      all.push_back({b, g, s, d, d, any(1, 70), any(1, 70), g * any(1, 640 / g)});    \
    }                                                                                 \
  }
  MLXQ_FOR_EACH_FORMAT(MLXQ_FORMAT_CASES)
#undef MLXQ_FORMAT_CASES
  for (int m = 1; m <= 66; ++m) {
    all.push_back({4, 32, Scaled::group, DType::f32, DType::f32, m, 33, 96});
    all.push_back({8, 32, Scaled::row, DType::f32, DType::bf16, m, 40, 160});
  }
  all.push_back({8, 64, Scaled::row, DType::f32, DType::f32, 300, 100, 576});
  all.push_back({4, 64, Scaled::group, DType::f32, DType::f32, 300, 64, 576});
  all.push_back({8, 32, Scaled::row, DType::f32, DType::f32, 40, 3, 131040});  // the longest row, sums near 2^31
  return all;
}

int check_all() {
  unsigned seed = 0;
  for (const Case& c : cases()) {
    Problem p(c, ++seed);
    std::vector<char> ours = p.run(amx()), wanted = p.run(vnni(many));
    for (size_t i = 0; i < ours.size(); ++i) {
      if (ours[i] != wanted[i]) {
        std::printf("%s: byte %zu differs from %s\n", describe(c).c_str(), i, vnni(many).name);
        return 1;
      }
    }
  }
  std::printf("%u cases have the bits of %s\n", seed, vnni(many).name);
  return 0;
}

double microseconds() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int time_all(const char* path, double budget_ms) {
  std::FILE* out = std::fopen(path, "w");
  if (!out) {
    std::perror(path);
    return 2;
  }
  struct Shape {
    int bits;
    Scaled scaled;
    int N, K;
  };
  const Shape shapes[] = {
      {8, Scaled::row, 4096, 4096}, {8, Scaled::group, 4096, 4096}, {8, Scaled::tile, 4096, 4096},
      {4, Scaled::group, 4096, 4096}, {8, Scaled::row, 1536, 576}, {8, Scaled::row, 576, 1536},
      {8, Scaled::tile, 576, 1536},
  };
  for (const Shape& s : shapes) {
    for (int M : {1, 4, 8, 16, 24, 32, 48, 64, 128, 512}) {
      Problem p({s.bits, 64, s.scaled, DType::f32, DType::f32, M, s.N, s.K}, 1);
      std::vector<float> y(size_t(M) * s.N);
      p.q.y = y.data();
      double best[2];
      for (int which = 0; which < 2; ++which) {
        const Kernel& kernel = which ? amx() : vnni(M);
        auto prepared = p.room(kernel);
        std::vector<double> times;
        for (double until = microseconds() + 1000 * budget_ms; times.size() < 3 || microseconds() < until;) {
          double start = microseconds();
          kernel.prepare(p.q, prepared.get(), 0, M);
          kernel.run(p.q, prepared.get(), 0, s.N);
          times.push_back(microseconds() - start);
        }
        std::sort(times.begin(), times.end());
        best[which] = times[times.size() / 2];
        std::fprintf(out,
                     "{\"kernel\": \"%s\", \"bits\": %d, \"group\": 64, \"scales\": \"%s\", \"N\": %d, \"K\": %d, "
                     "\"M\": %d, \"median_us\": %.1f, \"min_us\": %.1f, \"runs\": %zu}\n",
                     kernel.name, s.bits, name(s.scaled), s.N, s.K, M, best[which], times[0], times.size());
      }
      std::printf("%d-bit %-7s %4dx%-4d M=%-3d  %-20s %9.1f us   %s %9.1f us   %.2f times as fast, %.2f TOP/s\n",
                  s.bits, name(s.scaled), s.N, s.K, M, vnni(M).name, best[0], amx().name, best[1], best[0] / best[1],
                  2e-6 * M * s.N * s.K / best[1]);
    }
  }
  std::fclose(out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (!amx_int8_family.runs_here() || !avx512_vnni_family.runs_here()) {
    std::printf("no hardware for the AMX int8 kernel\n");
    return 77;
  }
  if (mode == "check") {
    return check_all();
  }
  if (mode == "time" && argc > 2) {
    return time_all(argv[2], argc > 3 ? std::atof(argv[3]) : 60);
  }
  std::fprintf(stderr, "q8 check | time FILE [MILLISECONDS]\n");
  return 2;
}
