// CPU evaluation: lays out the rows, picks the kernel, shares the columns out over the pool.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

#include "cpu/kernel.h"
#include "pool.h"
#include "q8.h"
#include "quantize.h"

namespace mlxq {

using mx::array;

namespace {

// One product whose weight is one matrix: all of a qmm, or one expert's rows of a gather_qmm.
struct Job {
  Qmm q;
  const Kernel* kernel;
  const char* prepared;
  int chunk;   // columns in a task
  int tasks;
};

// Multiply-adds below which a product is not worth sharing, and below which no sleeping thread is woken for it.
constexpr int64_t parallel_from = 200'000;
constexpr int64_t wake_from = 4'000'000;
// Tasks per thread: enough to even out a thread that loses its core for a while.
constexpr int tasks_per_thread = 4;

// Scratch that a stream thread keeps: a decoder step allocates nothing. Of a `use`, one at a time.
enum class Use { prepared, codes };

template <Use use = Use::prepared>
char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local size_t held = 0;
  if (bytes > held) {
    buffer.reset();
    held = (bytes + 4095) / 4096 * 4096;
    buffer.reset(static_cast<char*>(std::aligned_alloc(4096, held)));
    if (!buffer) {
      held = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

void plan(Job& job, int threads) {
  int columns = job.q.out_features(), unit = job.kernel->unit(job.q);
  int units = (columns + unit - 1) / unit;
  int tasks = threads == 1 ? 1 : std::min(units, threads * tasks_per_thread);
  job.chunk = (units + tasks - 1) / tasks * unit;
  job.tasks = (columns + job.chunk - 1) / job.chunk;
}

void run_jobs(const std::vector<Job>& jobs, int64_t work) {
  std::vector<int> ends;
  int total = 0;
  for (const Job& job : jobs) {
    total += job.tasks;
    ends.push_back(total);
  }
  parallel(total, work < wake_from, [&](int task) {
    size_t at = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const Job& job = jobs[at];
    int begin = (task - (at ? ends[at - 1] : 0)) * job.chunk;
    job.kernel->run(job.q, job.prepared, begin, std::min(begin + job.chunk, job.q.out_features()));
  });
}

int64_t work(const Qmm& q) { return int64_t(q.M) * q.N * q.K; }

void prepare_rows(const Kernel* kernel, const Qmm& q, char* prepared) {
  int blocks = int64_t(q.M) * q.in_features() < 65536 ? 1 : std::min(q.M, pool_threads() * tasks_per_thread);
  int rows = (q.M + blocks - 1) / blocks;
  parallel((q.M + rows - 1) / rows, false,
           [&](int block) { kernel->prepare(q, prepared, block * rows, std::min(q.M, (block + 1) * rows)); });
}

void run_one(const Qmm& q) {
  const Kernel* kernel = pick(q);
  count_call(kernel);
  char* prepared = scratch(size_t(q.M) * kernel->row_bytes(q));
  prepare_rows(kernel, q, prepared);
  std::vector<Job> jobs{{q, kernel, prepared, 0, 0}};
  plan(jobs[0], work(q) < parallel_from ? 1 : pool_threads());
  run_jobs(jobs, work(q));
}

// Rows of all experts are prepared once, in expert order; then every expert's columns are tasks of one parallel job.
void run_experts(Qmm q, int rows_per_block, const int32_t* lhs, const int32_t* rhs, int blocks, int x_blocks,
                 int experts, int64_t words_stride, int64_t groups_stride) {
  std::vector<int> first(experts + 1, 0);
  for (int b = 0; b < blocks; ++b) {
    if (rhs[b] < 0 || rhs[b] >= experts || lhs[b] < 0 || lhs[b] >= x_blocks) {
      throw std::out_of_range("gather_qmm: indices (" + std::to_string(lhs[b]) + ", " + std::to_string(rhs[b]) +
                              ") at position " + std::to_string(b) + " but x has " + std::to_string(x_blocks) +
                              " blocks and w " + std::to_string(experts) + " experts");
    }
    ++first[rhs[b] + 1];
  }
  for (int e = 0; e < experts; ++e) {
    first[e + 1] += first[e];
  }
  std::vector<int32_t> x_rows(size_t(blocks) * rows_per_block), y_rows(x_rows.size());
  std::vector<int> next(first.begin(), first.end() - 1);
  for (int b = 0; b < blocks; ++b) {
    int64_t at = int64_t(next[rhs[b]]++) * rows_per_block;
    for (int i = 0; i < rows_per_block; ++i) {
      x_rows[at + i] = lhs[b] * rows_per_block + i;
      y_rows[at + i] = b * rows_per_block + i;
    }
  }
  int used = 0;
  for (int e = 0; e < experts; ++e) {
    used += first[e + 1] > first[e];
  }
  q.x_rows = x_rows.data();
  q.y_rows = y_rows.data();
  q.M = blocks * rows_per_block;
  // One kernel for all, chosen for the average expert: its prepared rows serve every M.
  Qmm typical = q;
  typical.M = (q.M + used - 1) / used;
  const Kernel* kernel = pick(typical);
  count_call(kernel);
  size_t row_bytes = kernel->row_bytes(q);
  char* prepared = scratch(size_t(q.M) * row_bytes);
  prepare_rows(kernel, q, prepared);
  int threads = work(q) < parallel_from ? 1 : pool_threads();
  std::vector<Job> jobs;
  for (int e = 0; e < experts; ++e) {
    if (first[e + 1] == first[e]) {
      continue;
    }
    int64_t at = int64_t(first[e]) * rows_per_block;
    Job job{q, kernel, prepared + at * row_bytes, 0, 0};
    job.q.M = (first[e + 1] - first[e]) * rows_per_block;
    job.q.x_rows += at;
    job.q.y_rows += at;
    job.q.words += e * words_stride;
    size_t width = q.scale_dtype == DType::f32 ? 4 : 2;
    job.q.scales = static_cast<const char*>(q.scales) + e * groups_stride * width;
    job.q.biases = static_cast<const char*>(q.biases) + e * groups_stride * width;
    plan(job, std::max(1, (threads + used - 1) / used));
    jobs.push_back(job);
  }
  run_jobs(jobs, work(q));
}

Qmm describe(const array& x, const array& words, const array& scales, const array& biases, array& out, bool transpose,
             int group_size, int bits) {
  Qmm q{};
  q.x_dtype = to_dtype(x.dtype());
  q.scale_dtype = to_dtype(scales.dtype());
  q.transpose = transpose;
  q.bits = bits;
  q.group_size = group_size;
  q.N = words.shape(-2);
  q.K = words.shape(-1) * 32 / bits;
  q.x = x.data<char>();
  q.y = out.data<char>();
  q.words = words.data<uint32_t>();
  q.scales = scales.data<char>();
  q.biases = biases.data<char>();
  return q;
}

// x's elements in row-major order, whatever its strides.
array packed_copy(const array& x) {
  array copy(x.shape(), x.dtype(), nullptr, {});
  copy.set_data(mx::allocator::malloc(x.nbytes()));
  return copy;
}

void copy_strided(const char* from, char* to, const mx::Shape& shape, const mx::Strides& strides, int item) {
  int last = int(shape.size()) - 1;
  std::vector<int> index(shape.size(), 0);
  int64_t rows = 1;
  for (int d = 0; d < last; ++d) {
    rows *= shape[d];
  }
  for (int64_t row = 0; row < rows; ++row) {
    int64_t offset = 0;
    for (int d = 0; d < last; ++d) {
      offset += index[d] * strides[d];
    }
    if (strides[last] == 1) {
      std::memcpy(to, from + offset * item, size_t(shape[last]) * item);
    } else {
      for (int i = 0; i < shape[last]; ++i) {
        std::memcpy(to + int64_t(i) * item, from + (offset + i * strides[last]) * item, item);
      }
    }
    to += int64_t(shape[last]) * item;
    for (int d = last - 1; d >= 0 && ++index[d] == shape[d]; --d) {
      index[d] = 0;
    }
  }
}

void rows_to_codes(const char* x, DType dtype, int64_t rows, int64_t K, int8_t* codes, float* scales) {
  constexpr int64_t values_per_task = 1 << 15;
  const int64_t step = std::max<int64_t>(1, values_per_task / K), item = dtype == DType::f32 ? 4 : 2;
  parallel(int((rows + step - 1) / step), rows * K < wake_from, [&](int task) {
    int64_t row = task * step;
    codes_of_rows(x + row * K * item, dtype, std::min(step, rows - row), K, codes + row * K, scales + row);
  });
}

}  // namespace

void QuantizedProduct::eval_cpu(const std::vector<array>& inputs, array& out) {
  if (on_metal(stream())) {  // the fake device of tests/metal, which runs on CPU streams
    return eval_gpu(inputs, out);
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const array& x = inputs[0];
  bool strided = !x.flags().row_contiguous;
  array rows = strided ? packed_copy(x) : x;
  if (strided) {
    encoder.add_temporary(rows);
  }
  Qmm q = describe(rows, inputs[1], inputs[2], inputs[3], out, transpose_, group_size_, bits_);
  q.M = int(out.size() / out.shape(-1));
  encoder.dispatch([q, strided, from = x.data<char>(), to = rows.data<char>(), shape = x.shape(),
                    strides = x.strides(), item = int(x.itemsize()), bytes = out.nbytes()]() {
    if (strided) {
      copy_strided(from, to, shape, strides, item);
    }
    if (q.in_features() == 0) {  // an empty sum: transpose=False with N=0
      std::memset(q.y, 0, bytes);
      return;
    }
    run_one(q);
  });
}

void GatherProduct::eval_cpu(const std::vector<array>& inputs, array& out) {
  if (on_metal(stream())) {  // the fake device of tests/metal, which runs on CPU streams
    return eval_gpu(inputs, out);
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  const array &x = inputs[0], &words = inputs[1], &scales = inputs[2];
  Qmm q = describe(x, words, scales, inputs[3], out, transpose_, group_size_, bits_);
  int rows = x.shape(-2);
  int blocks = int(inputs[4].size());
  int x_blocks = int(x.size() / (int64_t(rows) * x.shape(-1)));
  int64_t words_stride = int64_t(words.shape(-2)) * words.shape(-1);
  int64_t groups_stride = int64_t(scales.shape(-2)) * scales.shape(-1);
  int experts = int(words.size() / std::max<int64_t>(1, words_stride));
  encoder.dispatch([=, lhs = inputs[4].data<int32_t>(), rhs = inputs[5].data<int32_t>(), bytes = out.nbytes()]() {
    if (q.in_features() == 0) {
      std::memset(q.y, 0, bytes);
      return;
    }
    run_experts(q, rows, lhs, rhs, blocks, x_blocks, experts, words_stride, groups_stride);
  });
}

void Q8Product::eval_cpu(const std::vector<array>& inputs, array& out) {
  if (on_metal(stream())) {  // the fake device of tests/metal, which runs on CPU streams
    return eval_gpu(inputs, out);
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  Qmm q{};
  q.x_dtype = to_dtype(dtype_);
  q.scale_dtype = to_dtype(inputs[2].dtype());
  q.transpose = true;
  q.bits = bits_;
  q.group_size = group_size_;
  q.M = int(out.size() / out.shape(-1));
  q.N = inputs[1].shape(0);
  q.K = inputs[0].shape(-1);
  q.x = inputs[0].data<char>();
  q.y = out.data<char>();
  q.words = inputs[1].data<uint32_t>();
  q.scales = inputs[2].data<char>();
  q.biases = inputs[3].data<char>();
  q.x_scales = inputs[4].data<float>();
  q.per_row = per_row_;
  q.tiled = inputs[4].ndim() == inputs[0].ndim();
  mx::cpu::get_command_encoder(stream()).dispatch([q] { run_one(q); });
}

void Q8Rows::eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  if (on_metal(stream())) {
    return eval_gpu(inputs, outputs);
  }
  const array& x = inputs[0];
  for (array& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  if (x.size() == 0) {
    return;
  }
  int64_t K = x.shape(-1), rows = x.size() / K;
  mx::cpu::get_command_encoder(stream()).dispatch(
      [=, from = x.data<char>(), dtype = to_dtype(x.dtype()), codes = outputs[0].data<int8_t>(),
       scales = outputs[1].data<float>()] { rows_to_codes(from, dtype, rows, K, codes, scales); });
}

void Q8Linear::eval_cpu(const std::vector<array>& inputs, array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  const array& x = inputs[0];
  Qmm q = describe(x, inputs[1], inputs[2], inputs[3], out, true, group_size_, bits_);
  q.x_dtype = to_dtype(dtype_);
  q.M = int(out.size() / out.shape(-1));
  q.per_row = per_row_;
  q.tiled = tiled_;
  mx::cpu::get_command_encoder(stream()).dispatch([q, dtype = to_dtype(x.dtype())]() mutable {
    int64_t size = int64_t(q.M) * q.K, row = q.tiled ? q.group_size : q.K, rows = size / row;
    char* room = scratch<Use::codes>(size_t(size + 63) / 64 * 64 + size_t(rows) * sizeof(float));
    auto* codes = reinterpret_cast<int8_t*>(room);
    auto* scales = reinterpret_cast<float*>(room + (size + 63) / 64 * 64);
    rows_to_codes(static_cast<const char*>(q.x), dtype, rows, row, codes, scales);
    q.x = codes;
    q.x_scales = scales;
    run_one(q);
  });
}

}  // namespace mlxq
