// Calls the AMX kernels without Python or MLX.
//
//   harness check          every format and dtype over ragged shapes against float64; exits 1 at the first bad element
//   harness digest         one line per case with a hash of the outputs' bits: two builds that agree print the same
//   harness quiet          two CPUs, "3,7", on whose cores the least is going on
//   harness time FILE      milliseconds on two threads, of every family that was linked in; JSON lines into FILE
//
// Arrays end at a page that may not be touched; outputs are filled with a pattern that must survive where nothing is
// due.
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../metal/cpu/kernel.h"
#include "../../metal/cpu/numeric.h"

namespace mlxq {
extern const Family amx_family;
}

namespace {

using namespace mlxq;

// `bytes` bytes that end where a page begins that cannot be read or written.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_t whole = (bytes + page - 1) / page * page;
    mapped_ = whole + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + whole, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    data_ = base_ + whole - bytes;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  char* get() const { return data_; }

 private:
  char *base_, *data_;
  size_t mapped_;
};

size_t width(DType t) { return t == DType::f32 ? 4 : 2; }
const char* name(DType t) { return t == DType::f32 ? "f32" : t == DType::f16 ? "f16" : "bf16"; }

struct Case {
  int bits, group;
  DType x, scales;
  int M, N, K;
  bool gathered;  // rows of x and y in another order, x with fewer rows than y
};

std::string describe(const Case& c) {
  return std::to_string(c.bits) + "-bit/" + std::to_string(c.group) + " x " + name(c.x) + " scales " + name(c.scales) +
         " M=" + std::to_string(c.M) + " N=" + std::to_string(c.N) + " K=" + std::to_string(c.K) +
         (c.gathered ? " gathered" : "");
}

class Problem {
 public:
  Problem(const Case& c, unsigned seed)
      : c(c),
        x_count(c.gathered ? (c.M + 1) / 2 : c.M),
        y_count(c.gathered ? c.M + 3 : c.M),
        x(size_t(x_count) * c.K * width(c.x)),
        y(size_t(y_count) * c.N * width(c.x)),
        words(size_t(c.N) * c.K * c.bits / 8),
        scales(size_t(c.N) * (c.K / c.group) * width(c.scales)),
        biases(size_t(c.N) * (c.K / c.group) * width(c.scales)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < int64_t(x_count) * c.K; ++i) {
      store(x.get(), c.x, i, normal(random));
    }
    for (int64_t i = 0; i < int64_t(c.N) * c.K * c.bits / 32; ++i) {
      reinterpret_cast<uint32_t*>(words.get())[i] = uint32_t(random());
    }
    for (int64_t i = 0; i < int64_t(c.N) * (c.K / c.group); ++i) {
      float scale = (0.5f + std::abs(normal(random))) / float(1 << c.bits);
      store(scales.get(), c.scales, i, scale);
      store(biases.get(), c.scales, i, -scale * float(1 << c.bits) * 0.5f + 0.1f * normal(random));
    }
    std::memset(y.get(), 0xa5, size_t(y_count) * c.N * width(c.x));
    q = Qmm{c.x, c.scales, true, c.bits, c.group, c.M, c.N, c.K, x.get(), nullptr, y.get(), nullptr,
            reinterpret_cast<const uint32_t*>(words.get()), scales.get(), biases.get()};
    if (c.gathered) {
      for (int m = 0; m < c.M; ++m) {
        x_rows.push_back(int(random() % unsigned(x_count)));
        y_rows.push_back(m);
      }
      std::shuffle(y_rows.begin(), y_rows.end(), random);
      for (int& row : y_rows) {
        row += row > 0;  // y's row 1 stays as it is, and the last two
      }
      q.x_rows = x_rows.data();
      q.y_rows = y_rows.data();
    }
  }

  float weight(int n, int k) const {
    int per_word = 32 / c.bits;
    uint32_t word = q.words[(int64_t(n) * c.K + k) / per_word];
    uint32_t code = (word >> (c.bits * (k % per_word))) & ((1u << c.bits) - 1);
    int64_t at = int64_t(n) * (c.K / c.group) + k / c.group;
    return std::fma(load(q.scales, c.scales, at), float(code), load(q.biases, c.scales, at));
  }

  // Columns are handed out as eval_cpu.cpp does it, rows prepared in two ranges.
  void run(const Kernel& kernel) {
    Guarded prepared(size_t(c.M) * kernel.row_bytes(q));
    kernel.prepare(q, prepared.get(), c.M / 3, c.M);
    kernel.prepare(q, prepared.get(), 0, c.M / 3);
    int chunk = c.N > 40 ? kernel.unit(q) : c.N;
    for (int begin = 0; begin < c.N; begin += chunk) {
      kernel.run(q, prepared.get(), begin, std::min(c.N, begin + chunk));
    }
  }

  Case c;
  int x_count, y_count;
  Guarded x, y, words, scales, biases;
  std::vector<int32_t> x_rows, y_rows;
  Qmm q;
};

const Kernel& kernel_of(const Case& c) { return amx_family.kernels[c.x == DType::bf16 ? 0 : 1]; }

// False, with a line that says where, if an element of y is off or was written without being due.
bool check(const Case& c, unsigned seed) {
  Problem p(c, seed);
  p.run(kernel_of(c));
  std::vector<float> w(size_t(c.N) * c.K);
  for (int n = 0; n < c.N; ++n) {
    for (int k = 0; k < c.K; ++k) {
      float value = p.weight(n, k);
      w[size_t(n) * c.K + k] = c.x == DType::bf16 ? bf16_to_float(float_to_bf16(value)) : value;
    }
  }
  // bf16: W is rounded above, so only the sums (K roundings of float32) and y's own rounding are left.
  // split: both parts' remainders (2^-17 each), the dropped product (2^-16), and 3 K roundings.
  const double of_terms = c.x == DType::bf16 ? c.K * 0x1p-24 : 0x1p-15 + 3 * c.K * 0x1p-24;
  const double of_y = c.x == DType::bf16 ? 0x1p-8 : c.x == DType::f16 ? 0x1p-11 : 0x1p-24;
  std::vector<char> due(size_t(p.y_count), 0);
  double error_squares = 0, squares = 0;
  for (int m = 0; m < c.M; ++m) {
    int64_t x_row = c.gathered ? p.x_rows[m] : m, y_row = c.gathered ? p.y_rows[m] : m;
    due[size_t(y_row)] = 1;
    for (int n = 0; n < c.N; ++n) {
      double sum = 0, terms = 0;
      for (int k = 0; k < c.K; ++k) {
        double term = double(load(p.q.x, c.x, x_row * c.K + k)) * w[size_t(n) * c.K + k];
        sum += term;
        terms += std::abs(term);
      }
      double y = load(p.q.y, c.x, y_row * c.N + n), error = std::abs(y - sum);
      error_squares += error * error;
      squares += sum * sum;
      if (!(error <= of_terms * terms + of_y * std::abs(sum) + 0x1p-25)) {
        std::printf("%s: y[%d, %d] = %.9g, float64 says %.9g\n", describe(c).c_str(), m, n, y, sum);
        return false;
      }
    }
  }
  for (int64_t row = 0; row < p.y_count; ++row) {
    for (int64_t i = 0; !due[size_t(row)] && i < int64_t(c.N) * int64_t(width(c.x)); ++i) {
      if (p.y.get()[row * c.N * int64_t(width(c.x)) + i] != char(0xa5)) {
        std::printf("%s: row %d of y was written to\n", describe(c).c_str(), int(row));
        return false;
      }
    }
  }
  // Frobenius norm. split: three remainders of about 2.5e-6 each, 4.3e-6 together.
  const double frobenius = c.x == DType::bf16 ? 3e-3 : c.x == DType::f16 ? 4e-4 : 1e-5;
  if (c.M * c.N >= 256 && !(error_squares <= frobenius * frobenius * squares)) {
    std::printf("%s: relative error %.3g\n", describe(c).c_str(), std::sqrt(error_squares / squares));
    return false;
  }
  return true;
}

// Rows that bfloat16 parts cannot hold come out as the plain loops have them, and spoil no other row.
bool check_wild_rows(int bits, DType x) {
  const Case c{bits, 64, x, DType::f32, 21, 37, 192, false};
  Problem calm(c, 5), wild(c, 5);
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> values = {inf, -inf, std::numeric_limits<float>::quiet_NaN(), 3.4e38f, 1e-36f};
  for (size_t i = 0; i < values.size(); ++i) {
    for (int k = 0; k < c.K; ++k) {
      if (k == 70 || values[i] == 1e-36f) {
        store(wild.x.get(), x, int64_t(4 * i + 1) * c.K + k, values[i]);
      }
    }
  }
  calm.run(kernel_of(c));
  wild.run(kernel_of(c));
  Problem loops(c, 5);
  std::memcpy(loops.x.get(), wild.x.get(), size_t(c.M) * c.K * width(x));
  for (int m = 0; m < c.M; ++m) {
    scalar_row(loops.q, m, 0, c.N);
    bool touched = m % 4 == 1 && m / 4 < int(values.size());
    for (int n = 0; n < c.N; ++n) {
      float got = load(wild.q.y, x, int64_t(m) * c.N + n);
      float want = load((touched ? loops : calm).q.y, x, int64_t(m) * c.N + n);
      bool same = float_to_bits(got) == float_to_bits(want) || (std::isnan(got) && std::isnan(want));
      // bf16 has no way out and needs none: what is finite may differ in the sum's order, 1e-36 may be zero.
      bool close = touched && x == DType::bf16 &&
                   (std::isfinite(want) ? std::abs(got - want) <= 0.05f * std::abs(want) + 1e-33f
                                        : !std::isfinite(got));
      if (!same && !close) {
        std::printf("%s with wild rows: y[%d, %d] = %g, wanted %g\n", describe(c).c_str(), m, n, got, want);
        return false;
      }
    }
  }
  return true;
}

std::vector<Case> cases() {
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  std::vector<Case> all;
  std::mt19937 random(1);
  auto any = [&](int low, int high) { return low + int(random() % unsigned(high - low + 1)); };
#define MLXQ_FORMAT_CASES(bits, group)                                                                               \
  for (DType x : dtypes) {                                                                                           \
    for (DType s : dtypes) {                                                                                         \
      all.push_back({bits, group, x, s, 1, 1, group, false});                                                        \
      all.push_back({bits, group, x, s, 33, 70, 2 * 192, true});                                                     \
      all.push_back({bits, group, x, s, any(1, 40), any(1, 70), group * any(1, 640 / group), (random() & 1) != 0});  \
      all.push_back({bits, group, x, s, any(1, 40), any(1, 70), group * any(1, 640 / group), (random() & 1) != 0});  \
    }                                                                                                                \
    all.push_back({bits, group, x, DType::bf16, 3, 5, 4 * group + 128, false});                                      \
    all.push_back({bits, group, x, DType::bf16, 16, 33, 5 * group, true});                                           \
  }
  MLXQ_FOR_EACH_FORMAT(MLXQ_FORMAT_CASES)
#undef MLXQ_FORMAT_CASES
  for (int m = 1; m <= 40; ++m) {
    all.push_back({4, 32, DType::bf16, DType::bf16, m, 19, 96, false});
    all.push_back({2, 32, DType::f32, DType::f32, m, 40, 160, true});
  }
  for (int n = 1; n <= 70; ++n) {
    all.push_back({4, 64, DType::f32, DType::f16, 18, n, 64, false});
    all.push_back({8, 32, DType::bf16, DType::f32, 34, n, 96, false});
  }
  // More rows than one pass takes in the emulated build.
  all.push_back({4, 64, DType::bf16, DType::bf16, 300, 100, 576, false});
  all.push_back({8, 64, DType::f32, DType::f32, 277, 70, 320, true});
  all.push_back({2, 32, DType::f16, DType::f16, 161, 130, 224, false});
  return all;
}

int check_all() {
  unsigned seed = 0;
  for (const Case& c : cases()) {
    if (!check(c, ++seed)) {
      return 1;
    }
  }
  for (int bits : {2, 4, 8}) {
    for (DType x : {DType::f32, DType::f16, DType::bf16}) {
      if (!check_wild_rows(bits, x)) {
        return 1;
      }
    }
  }
  std::printf("%u cases agree with float64\n", seed);
  return 0;
}

int digest_all() {
  unsigned seed = 0;
  for (const Case& c : cases()) {
    Problem p(c, ++seed);
    p.run(kernel_of(c));
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < size_t(p.y_count) * c.N * width(c.x); ++i) {
      hash = (hash ^ uint8_t(p.y.get()[i])) * 1099511628211u;
    }
    std::printf("%016llx %s\n", static_cast<unsigned long long>(hash), describe(c).c_str());
  }
  return 0;
}

// Two threads that spin between jobs, as much like eval_cpu.cpp's pool as timing needs.
class Pair {
 public:
  Pair() : other_([this] { serve(); }) {}
  ~Pair() {
    stop_ = true;
    generation_.fetch_add(1);
    other_.join();
  }
  template <class F>
  void run(int count, const F& task) {
    call_ = [](const void* f, int i) { (*static_cast<const F*>(f))(i); };
    task_ = &task;
    next_ = 0;
    count_ = count;
    done_ = false;
    generation_.fetch_add(1);
    work();
    while (!done_.load(std::memory_order_acquire)) {
      __builtin_ia32_pause();
    }
  }

 private:
  void work() {
    for (int i; (i = next_.fetch_add(1)) < count_;) {
      call_(task_, i);
    }
  }
  void serve() {
    for (uint64_t seen = 0;;) {
      while (generation_.load(std::memory_order_acquire) == seen) {
        __builtin_ia32_pause();
      }
      ++seen;
      if (stop_) {
        return;
      }
      work();
      done_.store(true, std::memory_order_release);
    }
  }
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> next_{0};
  std::atomic<bool> done_{false}, stop_{false};
  int count_ = 0;
  void (*call_)(const void*, int) = nullptr;
  const void* task_ = nullptr;
  std::thread other_;
};

double milliseconds() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A loop of one dependent addition takes a cycle, and up to two while the core's other hardware thread is busy: another
// virtual machine's, for all we know. Such a core's times say little about the kernel.
int print_quiet() {
  std::vector<std::pair<double, int>> found;
  for (int cpu = 0; cpu < int(std::thread::hardware_concurrency()); ++cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) {
      continue;
    }
    std::vector<double> times;
    for (int i = 0; i < 15; ++i) {
      double start = milliseconds();
      for (long n = 0, sum = 0; n < 1'000'000; ++n) {
        asm volatile("add $1, %0" : "+r"(sum));
      }
      times.push_back(milliseconds() - start);
    }
    std::sort(times.begin(), times.end());
    found.push_back({times[times.size() / 2], cpu});
  }
  std::sort(found.begin(), found.end());
  for (auto [ms, cpu] : found) {
    std::fprintf(stderr, "cpu %d: %.3f ns\n", cpu, ms);
  }
  std::printf("%d,%d\n", found[0].second, found[found.size() > 1].second);
  return 0;
}

void product(Pair& threads, const Kernel& kernel, const Qmm& q, char* prepared) {
  const int row_blocks = std::min(q.M, 8), rows = (q.M + row_blocks - 1) / row_blocks;
  threads.run((q.M + rows - 1) / rows,
              [&](int b) { kernel.prepare(q, prepared, b * rows, std::min(q.M, (b + 1) * rows)); });
  const int unit = kernel.unit(q), units = (q.N + unit - 1) / unit, tasks = std::min(units, 8);
  const int chunk = (units + tasks - 1) / tasks * unit;
  threads.run((q.N + chunk - 1) / chunk,
              [&](int t) { kernel.run(q, prepared, t * chunk, std::min(q.N, (t + 1) * chunk)); });
}

int time_all(const char* path, double budget_ms) {
  std::FILE* out = std::fopen(path, "w");
  if (!out) {
    std::perror(path);
    return 2;
  }
  Pair threads;
  struct Timing {
    int bits, group;
    DType x;
    int N, K;
    std::vector<int> rows;
  };
  const std::vector<Timing> timings = {
      {4, 64, DType::bf16, 4096, 4096, {1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512}},
      {4, 64, DType::f32, 4096, 4096, {1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 512}},
      {4, 64, DType::f16, 4096, 4096, {8, 32, 128}},
      {4, 64, DType::bf16, 1536, 576, {4, 8, 16, 32, 128, 512}},
      {4, 64, DType::f32, 1536, 576, {4, 8, 16, 32, 128, 512}},
      {4, 64, DType::bf16, 576, 1536, {4, 8, 16, 32, 128, 512}},
      {4, 64, DType::f32, 576, 1536, {4, 8, 16, 32, 128, 512}},
      {4, 32, DType::bf16, 4096, 4096, {8, 32, 128}},
      {2, 64, DType::bf16, 4096, 4096, {8, 32, 128}},
      {8, 64, DType::bf16, 4096, 4096, {8, 32, 128}},
      {8, 64, DType::f32, 4096, 4096, {8, 32, 128}},
  };
  for (const Timing& t : timings) {
    const DType scale_dtype = t.x == DType::f32 ? DType::f32 : t.x;
    Problem p({t.bits, t.group, t.x, scale_dtype, 512, t.N, t.K, false}, 1);
    // `cold`: the weights come round again after 640 MB, more than any cache; scales too.
    const size_t word_bytes = size_t(t.N) * t.K * t.bits / 8;
    const size_t scale_bytes = size_t(t.N) * (t.K / t.group) * width(scale_dtype);
    const bool big = t.N == 4096 && t.bits == 4 && t.group == 64;
    const int copies = big ? int((640u << 20) / (word_bytes + 2 * scale_bytes)) : 0;
    std::vector<std::unique_ptr<char[]>> cold;
    for (int i = 0; i < copies; ++i) {
      cold.emplace_back(new char[word_bytes + 2 * scale_bytes]);
      std::memcpy(cold.back().get(), p.words.get(), word_bytes);
      std::memcpy(cold.back().get() + word_bytes, p.scales.get(), scale_bytes);
      std::memcpy(cold.back().get() + word_bytes + scale_bytes, p.biases.get(), scale_bytes);
    }
    for (int rows : t.rows) {
      for (int f = 1; f < family_count; ++f) {
        if (!families[f]->runs_here()) {
          continue;
        }
        const bool amx = families[f] == &amx_family;
        if (!amx && rows > 32) {  // slow by then
          continue;
        }
        Qmm q = p.q;
        q.M = rows;
        const Kernel* kernel = nullptr;
        for (int i = 0; i < families[f]->count && !kernel; ++i) {
          Qmm served = q;
          served.M = amx ? 512 : rows;
          kernel = families[f]->kernels[i].serves(served) ? &families[f]->kernels[i] : nullptr;
        }
        if (!kernel) {
          continue;
        }
        std::unique_ptr<char, void (*)(void*)> prepared(
            static_cast<char*>(std::aligned_alloc(4096, (size_t(rows) * kernel->row_bytes(q) + 4095) / 4096 * 4096)),
            std::free);
        for (int is_cold = 0; is_cold <= (copies > 0 && (rows <= 32) ? 1 : 0); ++is_cold) {
          std::vector<double> times;
          double until = milliseconds() + budget_ms;
          for (int i = 0; times.size() < 7 || (milliseconds() < until && times.size() < 2000); ++i) {
            if (is_cold) {
              char* at = cold[size_t(i % copies)].get();
              q.words = reinterpret_cast<const uint32_t*>(at);
              q.scales = at + word_bytes;
              q.biases = at + word_bytes + scale_bytes;
            }
            double start = milliseconds();
            product(threads, *kernel, q, prepared.get());
            times.push_back(milliseconds() - start);
          }
          times.erase(times.begin(), times.begin() + 2);
          std::sort(times.begin(), times.end());
          double median = times[times.size() / 2], flops = 2.0 * rows * t.N * t.K;
          std::fprintf(out,
                       "{\"kernel\": \"%s\", \"bits\": %d, \"group\": %d, \"x\": \"%s\", \"N\": %d, \"K\": %d, "
                       "\"M\": %d, \"weights\": \"%s\", \"median_ms\": %.4f, \"min_ms\": %.4f, \"p90_ms\": %.4f, \"runs\": %zu}\n",
                       kernel->name, t.bits, t.group, name(t.x), t.N, t.K, rows, is_cold ? "cold" : "hot", median,
                       times[0], times[times.size() * 9 / 10], times.size());
          std::printf("%-22s %d-bit/%-3d %-4s %5dx%-5d M=%-4d %-4s  median %8.4f  min %8.4f ms  %6.3f TFLOP/s\n",
                      kernel->name, t.bits, t.group, name(t.x), t.N, t.K, rows, is_cold ? "cold" : "hot", median,
                      times[0], flops / median * 1e-9);
          q.words = p.q.words;
          q.scales = p.q.scales;
          q.biases = p.q.biases;
        }
      }
    }
  }
  std::fclose(out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (!amx_family.runs_here()) {
    std::printf("no hardware for the AMX kernels\n");
    return 77;
  }
  if (mode == "check") {
    return check_all();
  }
  if (mode == "digest") {
    return digest_all();
  }
  if (mode == "quiet") {
    return print_quiet();
  }
  if (mode == "time" && argc > 2) {
    return time_all(argv[2], argc > 3 ? std::atof(argv[3]) : 60);
  }
  std::fprintf(stderr, "harness check | digest | quiet | time FILE [MILLISECONDS]\n");
  return 2;
}
