// Every CPU kernel that runs here, on the cases of standard input, against sums in double over dequantized weights.
//
// A case is a line of
//     bits group_size M N K transpose x_dtype scale_dtype kind        dtypes 0 float32, 1 float16, 2 bfloat16
// kind: "plain"; "gather" (rows of x and y through permutations); "nonfinite" (row 0 of x has an Inf, the last a NaN).
// "q8", "q8_row", "q8_tile": a q8mm with int8 x; the second has one scale for each row of the weight, the third one for
// each group of a row of x.
// Answers are lines of
//     kernel-name error case        relative Frobenius error over the finite rows; inf where a pattern or row disagrees
// Every array ends at a page that must not be touched, columns are computed in shares, rows prepared in two. With an
// argument FAMILY only that family runs; first of all a line "families: ..." names what runs here.
//
// `harness bench KERNEL bits group_size M N K transpose x_dtype scale_dtype` prints microseconds of processor time, the
// best of many runs on one thread: for whoever changes a kernel.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../metal/cpu/kernel.h"
#include "../../metal/cpu/numeric.h"

using namespace mlxq;

namespace {

// Bytes that end where a page without access begins.
struct Guarded {
  explicit Guarded(size_t bytes) {
    size_t page = 4096, body = (bytes + page - 1) / page * page;
    size = body + page;
    base = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + body, page, PROT_NONE)) {
      std::perror("harness: mmap");
      std::exit(1);
    }
    data = base + body - bytes;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base, size); }
  char* base;
  char* data;
  size_t size;
};

size_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Case {
  Qmm q;
  std::string kind;
};

struct Problem {
  Problem(const Case& c, std::mt19937& random)
      : q(c.q),
        in(q.in_features()),
        out(q.out_features()),
        words(size_t(q.N) * q.K * q.bits / 8),
        scales(size_t(q.N) * (q.K / q.group_size) * width(q.scale_dtype)),
        biases(size_t(q.N) * (q.K / q.group_size) * width(q.scale_dtype)),
        x(size_t(q.M) * in * (c.kind[0] == 'q' ? 1 : width(q.x_dtype))),
        x_scales(c.kind[0] == 'q' ? size_t(q.M) * 4 * (c.kind == "q8_tile" ? q.K / q.group_size : 1) : 0),
        y(size_t(q.M) * out * width(q.x_dtype)),
        want(size_t(q.M) * out) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < words.size_of<uint32_t>(); ++i) {
      words.as<uint32_t>()[i] = random();
    }
    float levels = float((1 << q.bits) - 1);
    for (int i = 0; i < q.N * (q.K / q.group_size); ++i) {
      float scale = (0.5f + float(random() % 1024) / 1024) / levels;
      store(scales.data, q.scale_dtype, i, scale);
      store(biases.data, q.scale_dtype, i, -scale * levels * (0.4f + float(random() % 1024) / 5120));
    }
    if (c.kind[0] == 'q') {
      q.tiled = c.kind == "q8_tile";
      codes(c.kind == "q8_row");
    } else {
      for (int i = 0; i < q.M * in; ++i) {
        store(x.data, q.x_dtype, i, normal(random));
      }
    }
    if (c.kind == "nonfinite") {
      store(x.data, q.x_dtype, in / 2, std::numeric_limits<float>::infinity());
      store(x.data, q.x_dtype, int64_t(q.M - 1) * in + in / 3, std::numeric_limits<float>::quiet_NaN());
    }
    q.x = x.data;
    q.y = y.data;
    q.words = words.as<uint32_t>();
    q.scales = scales.data;
    q.biases = biases.data;
    if (c.kind == "gather") {
      for (int m = 0; m < q.M; ++m) {
        x_rows.push_back((m * 7 + 3) % q.M);
        y_rows.push_back(q.M - 1 - m);
      }
      q.x_rows = x_rows.data();
      q.y_rows = y_rows.data();
    }
    answer();
  }

  struct Array : Guarded {
    explicit Array(size_t n) : Guarded(n), bytes(n) {}
    template <class T>
    T* as() {
      return reinterpret_cast<T*>(data);
    }
    template <class T>
    size_t size_of() const {
      return bytes / sizeof(T);
    }
    size_t bytes;
  };

  // Every value from -128 on, and rows of the extremes; with per_row the promise is kept that the caller gives.
  void codes(bool per_row) {
    for (int i = 0; i < q.M * in; ++i) {
      x.as<int8_t>()[i] = i / in % 3 == 2 ? (i / in % 2 ? -128 : 127) : int8_t(i * 37 + 11);
    }
    for (size_t i = 0; i < x_scales.size_of<float>(); ++i) {
      x_scales.as<float>()[i] = 0.0001f * float(i * 7 % 31 + 1);
    }
    q.x_scales = x_scales.as<float>();
    q.per_row = per_row;
    int groups = q.K / q.group_size;
    for (int i = 0; per_row && i < q.N * groups; ++i) {
      float scale = 0.25f / float(1 + i / groups % 8);
      store(scales.data, q.scale_dtype, i, scale);
      store(biases.data, q.scale_dtype, i, -float(1 << (q.bits - 1)) * load(scales.data, q.scale_dtype, i));
    }
  }

  double x_value(int64_t at) const {
    return q.x_scales ? double(q.x_scales[at / (q.tiled ? q.group_size : in)]) * static_cast<const int8_t*>(q.x)[at]
                      : double(load(q.x, q.x_dtype, at));
  }

  void answer() {
    std::vector<double> w(size_t(q.N) * q.K);
    for (int n = 0; n < q.N; ++n) {
      for (int k = 0; k < q.K; ++k) {
        int64_t at = int64_t(n) * q.K + k, bit = at * q.bits;
        uint32_t code = (q.words[bit / 32] >> (bit % 32)) & ((1u << q.bits) - 1);
        w[at] = double(load(q.scales, q.scale_dtype, at / q.group_size)) * code +
                load(q.biases, q.scale_dtype, at / q.group_size);
      }
    }
    for (int m = 0; m < q.M; ++m) {
      int64_t from = int64_t(q.x_rows ? q.x_rows[m] : m) * in, to = int64_t(q.y_rows ? q.y_rows[m] : m) * out;
      for (int o = 0; o < out; ++o) {
        double sum = 0;
        for (int i = 0; i < in; ++i) {
          sum += x_value(from + i) * w[q.transpose ? int64_t(o) * q.K + i : int64_t(i) * q.K + o];
        }
        want[to + o] = sum;
      }
    }
  }

  void run(const Kernel& kernel) {
    std::memset(y.data, 0xff, y.bytes);  // NaN in every dtype
    size_t row_bytes = kernel.row_bytes(q);
    std::vector<char> room(row_bytes * q.M + 64);
    char* prepared = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
    kernel.prepare(q, prepared, 0, q.M / 2);
    kernel.prepare(q, prepared, q.M / 2, q.M);
    int unit = kernel.unit(q), units = (out + unit - 1) / unit, share = (units + 2) / 3 * unit;
    for (int begin = 0; begin < out; begin += share) {
      kernel.run(q, prepared, begin, std::min(begin + share, out));
    }
  }

  double error() const {
    double off = 0, norm = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      double got = load(q.y, q.x_dtype, i);
      if (std::isnan(got) != std::isnan(want[i]) || std::isinf(got) != std::isinf(want[i]) ||
          (std::isinf(got) && got != want[i])) {
        return std::numeric_limits<double>::infinity();
      }
      if (std::isfinite(got)) {
        off += (got - want[i]) * (got - want[i]);
        norm += want[i] * want[i];
      }
    }
    return norm > 0 ? std::sqrt(off / norm) : off;
  }

  Qmm q;
  int in, out;
  Array words, scales, biases, x, x_scales, y;
  std::vector<double> want;
  std::vector<int32_t> x_rows, y_rows;
};

bool parse(const char* line, Case& c) {
  int bits, group_size, M, N, K, transpose, x_dtype, scale_dtype;
  char kind[32] = "plain";
  if (std::sscanf(line, "%d %d %d %d %d %d %d %d %31s", &bits, &group_size, &M, &N, &K, &transpose, &x_dtype,
                  &scale_dtype, kind) < 8) {
    return false;
  }
  c.q = Qmm{};
  c.q.bits = bits;
  c.q.group_size = group_size;
  c.q.M = M;
  c.q.N = N;
  c.q.K = K;
  c.q.transpose = transpose;
  c.q.x_dtype = DType(x_dtype);
  c.q.scale_dtype = DType(scale_dtype);
  c.kind = kind;
  return true;
}

// A kernel must serve any number of rows once it is chosen (gather_qmm chooses for the average expert).
bool may_serve(const Kernel& kernel, Qmm q) {
  if (kernel.q8 != (q.x_scales != nullptr)) {
    return false;
  }
  bool as_is = kernel.serves(q);
  q.M = 1;
  bool one = kernel.serves(q);
  q.M = 1 << 20;
  return as_is || one || kernel.serves(q);
}

int bench(const std::string& name, const std::string& line) {
  std::mt19937 random(1);
  Case c;
  if (!parse(line.c_str(), c)) {
    return 2;
  }
  Problem p(c, random);
  for (int f = 0; f < family_count; ++f) {
    for (int k = 0; k < families[f]->count; ++k) {
      const Kernel& kernel = families[f]->kernels[k];
      if (name != kernel.name) {
        continue;
      }
      std::vector<char> room(kernel.row_bytes(p.q) * p.q.M + 64);
      char* prepared = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
      double best[2] = {1e9, 1e9};
      auto now = [] {  // of this thread: other work on the machine does not count
        timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
      };
      for (double start = now(); now() - start < 0.4;) {
        double a = now();
        kernel.prepare(p.q, prepared, 0, p.q.M);
        double b = now();
        kernel.run(p.q, prepared, 0, p.out);
        double c = now();
        best[0] = std::min(best[0], b - a);
        best[1] = std::min(best[1], c - b);
      }
      std::printf("%-22s %s: prepare %.1f run %.1f us, %.1f GMAC/s, error %.2g\n", kernel.name, line.c_str(),
                  best[0] * 1e6, best[1] * 1e6, double(p.q.M) * p.q.N * p.q.K / best[1] / 1e9, p.error());
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "bench") {
    std::string line;
    for (int i = 3; i < argc; ++i) {
      line += std::string(argv[i]) + " ";
    }
    return bench(argv[2], line);
  }
  std::string only = argc > 1 ? argv[1] : "";
  std::printf("families:");
  for (int f = 0; f < family_count; ++f) {
    if (families[f]->runs_here()) {
      std::printf(" %s", families[f]->name);
    }
  }
  std::printf("\n");
  std::mt19937 random(1);
  char line[256];
  while (std::fgets(line, sizeof line, stdin)) {
    Case c;
    if (!parse(line, c)) {
      std::fprintf(stderr, "harness: cannot read case: %s", line);
      return 2;
    }
    line[std::strcspn(line, "\n")] = 0;
    Problem p(c, random);
    for (int f = 0; f < family_count; ++f) {
      if (!families[f]->runs_here() || (!only.empty() && only != families[f]->name)) {
        continue;
      }
      for (int k = 0; k < families[f]->count; ++k) {
        const Kernel& kernel = families[f]->kernels[k];
        if (may_serve(kernel, p.q)) {
          p.run(kernel);
          std::printf("%s %.3g %s\n", kernel.name, p.error(), line);
        }
      }
    }
  }
}
