// Metal evaluation: picks the shader by shape and GPU, binds its buffers, dispatches it. All our Metal calls are here.
//
// Which kernel serves what is in the two tables below and in choose(), which has no other input than the product and
// the GPU. What a kernel computes, its buffers and its grid are written at the head of its file in shaders/.
//
// A kernel is compiled by MLX at run time (Device::get_library) from the text of its file and one instantiation line,
// under a name that says all of (function, types, bits, group size, tile). That happens while the graph is built:
// metal_serves() answers no if Metal's compiler refuses, and the graph gets MLX's own operation instead.
//
// None of this was run on Apple hardware. On Linux, tests/metal gives this file a device that runs the shaders on the
// CPU; what else was checked, and how, is in the README under "What has run where".
#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "mlx/backend/metal/metal.h"

#include "metal_host.h"
#include "packing.h"
#include "q8.h"

namespace mlxq {

using mx::array;

namespace {

// ---- the tables -------------------------------------------------------------------------------------------------

// Rows of x up to which a product is many products with a vector, by the GPU's generation (13 is M1, 17 is M5) and the
// weight's larger side. The vector kernels are built for 1 to 8 rows. Where MLX measured that its own vector kernels
// lose before that (generations 13 and 14 on large weights, get_qmv_batch_limit), so do we until someone measures ours.
struct VectorLimit {
  int from_generation;
  int up_to_side;
  int rows;
};
constexpr VectorLimit vector_limits[] = {
    {15, INT_MAX, 8},
    {0, 4096, 8},
    {0, INT_MAX, 5},
};

// Tiles that the matrix kernels are built for: rows, columns and simdgroups of each, by rows of x.
struct Tile {
  int up_to_rows;
  int rows, columns, simdgroups_down, simdgroups_across;
};
constexpr Tile tiles[] = {
    {16, 16, 64, 1, 4},
    {32, 32, 64, 2, 2},
    {INT_MAX, 64, 64, 2, 2},
};

// Threadgroups of 128 threads that keep a GPU busy, four for each of the most cores that it comes with, by the last
// letter of its name: phone, base, Pro, Max, Ultra. A product with fewer is split along its inner dimension.
struct Size {
  char letter;
  int threadgroups;
};
constexpr Size sizes[] = {{'p', 24}, {'g', 40}, {'s', 80}, {'c', 160}, {'d', 320}};

// A split has at least this many of the inner dimension, or summing the parts costs more than it saves.
constexpr int least_span = 512;

// Sorted blocks of experts are cut into tiles of their own from this many rows for each expert on.
constexpr int rows_for_schedule = 4;

// ---- the GPU ----------------------------------------------------------------------------------------------------

struct Gpu {
  std::string architecture;
  int generation;
  char size;
  bool nax;
};

// Whether the system has MLX's matrix-unit kernels. Asked as MLX asks: sysctl and the like give 16.x for macOS 26 to a
// Python that was linked for an older one.
bool system_has_matrix_kernels() {
#ifdef MLXQ_FAKE_METAL
  return mx::metal::fake_os_version() >= std::pair(26, 2);
#else
  if (__builtin_available(macOS 26.2, *)) {
    return true;
  }
  return false;
#endif
}

// MLX's own test for its matrix-unit kernels (is_nax_available), which libmlx does not export.
Gpu describe_gpu() {
  auto& device = mx::metal::device(mx::Device::gpu);
  Gpu gpu{device.get_architecture(), device.get_architecture_gen(), 'g', false};
  if (!gpu.architecture.empty()) {
    gpu.size = gpu.architecture.back();
  }
  gpu.nax = gpu.generation >= (gpu.size == 'p' ? 18 : 17) && system_has_matrix_kernels();
  return gpu;
}

#ifdef MLXQ_FAKE_METAL
Gpu gpu() { return describe_gpu(); }  // tests change it
#else
const Gpu& gpu() {
  static const Gpu found = describe_gpu();
  return found;
}
#endif

// ---- kernels and their names ------------------------------------------------------------------------------------

enum class Fn {
  qmv, qvm, qvm_split, qmm, qmm_split, qmm_n, qmm_n_split,
  gather_qmv, gather_qvm, gather_qmm, gather_qmm_n, gather_qmm_sorted, gather_qmm_n_sorted,
  sum_splits, schedule_tiles,
  q8_mv, q8_mm, q8_rows, quantize, dequantize
};

// Of the template: <>, <T>, <T, S, bits, group_size>, the same and M, the same and a tile, <S, bits, group_size,
// grouped>, the same and M.
enum class Arguments { none, type, format, vector, tile, grouped, grouped_vector };

struct Shader {
  const char* name;
  const char* file;
  Arguments arguments;
};
constexpr Shader shaders[] = {
    {"qmv", "qmv", Arguments::vector},
    {"qvm", "qmm_n", Arguments::vector},
    {"qvm_split", "qmm_n", Arguments::vector},
    {"qmm", "qmm", Arguments::tile},
    {"qmm_split", "qmm", Arguments::tile},
    {"qmm_n", "qmm_n", Arguments::tile},
    {"qmm_n_split", "qmm_n", Arguments::tile},
    {"gather_qmv", "gather_qmm", Arguments::vector},
    {"gather_qvm", "gather_qmm", Arguments::vector},
    {"gather_qmm", "gather_qmm", Arguments::tile},
    {"gather_qmm_n", "gather_qmm", Arguments::tile},
    {"gather_qmm_sorted", "gather_qmm", Arguments::tile},
    {"gather_qmm_n_sorted", "gather_qmm", Arguments::tile},
    {"sum_splits", "sum_splits", Arguments::type},
    {"schedule_tiles", "gather_qmm", Arguments::none},
    {"q8_mv", "q8", Arguments::grouped_vector},
    {"q8_mm", "q8", Arguments::grouped},
    {"q8_rows", "q8", Arguments::type},
    {"quantize", "quantize", Arguments::format},
    {"dequantize", "quantize", Arguments::format},
};

const Shader& shader(Fn fn) { return shaders[int(fn)]; }

const char* msl_type(DType dtype) {
  return dtype == DType::f32 ? "float" : dtype == DType::f16 ? "half" : "bfloat";
}

// One instantiation. Every field that its template does not take is zero, so that equal kernels are equal.
struct Kernel {
  Fn fn;
  DType x = DType::f32, scale = DType::f32;
  int bits = 0, group_size = 0;
  int variant = 0;  // M of a vector kernel, index into tiles of a matrix kernel
  int grouped = 0;  // of Q8

  uint64_t key() const {
    return uint64_t(fn) | uint64_t(x) << 8 | uint64_t(scale) << 16 | uint64_t(bits) << 24 | uint64_t(group_size) << 32 |
           uint64_t(grouped) << 40 | uint64_t(variant) << 48;
  }

  // Threads of a threadgroup: {32, 4, 1} are four simdgroups.
  std::array<int, 3> shape() const {
    switch (fn) {
      case Fn::qmv:
      case Fn::gather_qmv:
      case Fn::q8_mv:
        return {32, 2, 1};
      case Fn::q8_mm:
        return {32, 2, 2};
      case Fn::qvm:
      case Fn::qvm_split:
      case Fn::gather_qvm:
        return {32, 4, 1};
      case Fn::sum_splits:
      case Fn::schedule_tiles:
        return {256, 1, 1};
      case Fn::q8_rows:
      case Fn::quantize:
      case Fn::dequantize:
        return {32, 8, 1};
      default:
        return {32, tiles[variant].simdgroups_across, tiles[variant].simdgroups_down};
    }
  }

  int threads() const { return shape()[0] * shape()[1] * shape()[2]; }

  // "float, half, 4, 64, 1" and the like.
  std::string arguments() const {
    std::string out;
    auto add = [&](const std::string& text) { out += (out.empty() ? "" : ", ") + text; };
    Arguments kind = shader(fn).arguments;
    bool of_codes = kind == Arguments::grouped || kind == Arguments::grouped_vector;
    if (kind != Arguments::none && !of_codes) {
      add(msl_type(x));
    }
    if (kind != Arguments::none && kind != Arguments::type) {
      add(msl_type(scale));
      add(std::to_string(bits));
      add(std::to_string(group_size));
    }
    if (of_codes) {
      add(std::to_string(grouped));
    }
    if (kind == Arguments::vector || kind == Arguments::grouped_vector) {
      add(std::to_string(variant));
    }
    if (kind == Arguments::tile) {
      const Tile& t = tiles[variant];
      for (int n : {t.rows, t.columns, t.simdgroups_down, t.simdgroups_across}) {
        add(std::to_string(n));
      }
    }
    return out;
  }

  std::string name() const {
    std::string out = std::string("mlxq_") + shader(fn).name + "_" + arguments();
    std::erase(out, ' ');
    std::replace(out.begin(), out.end(), ',', '_');
    return shader(fn).arguments == Arguments::none ? shader(fn).name : out;
  }

  std::string source() const {
    for (int i = 0; i < shader_text_count; ++i) {
      if (std::strcmp(shader_texts[i].name, shader(fn).file) == 0) {
        if (shader(fn).arguments == Arguments::none) {
          return shader_texts[i].text;
        }
        std::string instance = std::string(shader(fn).name) + "<" + arguments() + ">";
        return std::string(shader_texts[i].text) + "\ntemplate [[host_name(\"" + name() + "\")]] [[kernel]] decltype(" +
               instance + ") " + instance + ";\n";
      }
    }
    throw std::logic_error(std::string("no shader file ") + shader(fn).file + " in this build");
  }
};

// ---- the choice -------------------------------------------------------------------------------------------------

// How one product is computed: a kernel, and for some one before (schedule_tiles) or behind it (sum_splits).
struct Plan {
  Kernel kernel;
  std::array<int, 3> grid;
  int span = 0;            // of the inner dimension in a split; 0: not split
  int splits = 1;
  int scheduled_tiles = 0;  // of schedule_tiles; 0: none
};

int ceil_div(int64_t n, int64_t by) { return int((n + by - 1) / by); }

int vector_rows(const Gpu& g, int N, int K) {
  for (const VectorLimit& limit : vector_limits) {
    if (g.generation >= limit.from_generation && std::max(N, K) <= limit.up_to_side) {
      return limit.rows;
    }
  }
  return 1;
}

int tile_for(int64_t rows) {
  int at = 0;
  while (rows > tiles[at].up_to_rows) {
    ++at;
  }
  return at;
}

// Splits the inner dimension so that the threadgroups of all parts fill the GPU.
void split(Plan& plan, const Gpu& g, int64_t threadgroups, int inner, int unit, int64_t outputs, Fn split_kernel,
           int grid_axis) {
  int wanted = sizes[1].threadgroups;
  for (const Size& size : sizes) {
    wanted = size.letter == g.size ? size.threadgroups : wanted;
  }
  int64_t parts = std::min<int64_t>(wanted / std::max<int64_t>(1, threadgroups), inner / least_span);
  if (parts < 2 || outputs * parts > INT_MAX) {  // sum_splits counts in int
    return;
  }
  plan.span = ceil_div(ceil_div(inner, parts), unit) * unit;
  plan.splits = ceil_div(inner, plan.span);
  if (plan.splits < 2) {
    plan.span = 0;
    plan.splits = 1;
    return;
  }
  plan.kernel.fn = split_kernel;
  plan.grid[grid_axis] = plan.splits;
}

// Nothing where MLX's own operation is the better choice.
std::optional<Plan> choose(const Product& p, const Gpu& g) {
  int outputs = p.transpose ? p.N : p.K;
  Plan plan{{Fn::qmv, p.x_dtype, p.scale_dtype, p.bits, p.group_size, 0}, {1, 1, 1}};
  int64_t rows = int64_t(p.M) * p.blocks;
  if (rows > INT_MAX) {
    return std::nullopt;
  }
  bool scheduled = p.gather && p.sorted && p.blocks > 1 && rows / p.experts >= rows_for_schedule;
  if (p.M <= vector_rows(g, p.N, p.K) && !scheduled) {
    plan.kernel.variant = p.M;
    int across = ceil_div(outputs, p.transpose ? 8 : 128);
    plan.grid[0] = across;
    if (p.gather) {
      plan.kernel.fn = p.transpose ? Fn::gather_qmv : Fn::gather_qvm;
      plan.grid[1] = p.blocks;
    } else if (!p.transpose) {
      plan.kernel.fn = Fn::qvm;
      split(plan, g, across, p.N, p.group_size, rows * outputs, Fn::qvm_split, 1);
    }
    return plan;
  }
  if (g.nax) {
    return std::nullopt;  // MLX prefills on the matrix units, which our kernels do not use
  }
  int tile = tile_for(scheduled ? rows / p.experts : p.M);
  const Tile& t = tiles[tile];
  plan.kernel.variant = tile;
  plan.grid[0] = ceil_div(outputs, t.columns);
  if (scheduled) {
    plan.kernel.fn = p.transpose ? Fn::gather_qmm_sorted : Fn::gather_qmm_n_sorted;
    plan.scheduled_tiles = ceil_div(rows, t.rows) + std::min(p.experts, p.blocks);
    plan.grid[1] = plan.scheduled_tiles;
    return plan;
  }
  plan.grid[1] = ceil_div(p.M, t.rows);
  if (p.gather) {
    plan.kernel.fn = p.transpose ? Fn::gather_qmm : Fn::gather_qmm_n;
    plan.grid[2] = p.blocks;
    return plan;
  }
  plan.kernel.fn = p.transpose ? Fn::qmm : Fn::qmm_n;
  split(plan, g, int64_t(plan.grid[0]) * plan.grid[1], p.transpose ? p.K : p.N, p.transpose ? p.group_size : 32,
        rows * outputs, p.transpose ? Fn::qmm_split : Fn::qmm_n_split, 2);
  return plan;
}

// Of int8 codes: the vector kernel for as many rows as in choose(), else the one tile that there is. GPUs with matrix
// units too: MLX has no product of int8.
Plan choose(const Q8& p, const Gpu& g) {
  Plan plan{{Fn::q8_mv, DType::f32, p.scale_dtype, p.bits, p.group_size, p.M, p.grouped}, {ceil_div(p.N, 8), 1, 1}};
  if (p.M > vector_rows(g, p.N, p.K)) {
    plan.kernel.fn = Fn::q8_mm;
    plan.kernel.variant = 0;
    plan.grid = {ceil_div(p.N, 64), ceil_div(p.M, 64), 1};
  }
  return plan;
}

Kernel kernel_of(const Conversion& c) {
  return {c.to_codes ? Fn::quantize : Fn::dequantize, c.w, c.storage, c.bits, c.group_size, 0};
}

// ---- compiled kernels -------------------------------------------------------------------------------------------

struct Compiled {
  MTL::ComputePipelineState* pipeline;
  std::string name;
  std::atomic<long> calls{0};

  Compiled(MTL::ComputePipelineState* pipeline, std::string name) : pipeline(pipeline), name(std::move(name)) {}
};

struct State {
  std::mutex mutex;
  std::unordered_map<uint64_t, Compiled> compiled;
  std::string error;    // of the first kernel that did not compile
  std::string warning;  // not yet said
};

State& state() {
  static State* all = new State;  // never destroyed: streams may outlive static objects
  return *all;
}

// Throws what MLX throws when Metal refuses the text or the kernel, and when it gives the kernel fewer threads than a
// dispatch asks for (its registers decide that): such a dispatch would do nothing.
Compiled& compile(const Kernel& kernel) {
  State& all = state();
  std::lock_guard lock(all.mutex);
  auto at = all.compiled.find(kernel.key());
  if (at == all.compiled.end()) {
    auto& device = mx::metal::device(mx::Device::gpu);
    std::string name = kernel.name();
    std::string library = shader(kernel.fn).arguments == Arguments::none ? "mlxq_" + name : name;
    auto* text = device.get_library(library, [&] { return kernel.source(); });
    auto* pipeline = device.get_kernel(name, text);
    if (int most = int(pipeline->maxTotalThreadsPerThreadgroup()); most < kernel.threads()) {
      throw std::runtime_error("it needs threadgroups of " + std::to_string(kernel.threads()) +
                               " threads and this GPU runs it with at most " + std::to_string(most));
    }
    at = all.compiled.try_emplace(kernel.key(), pipeline, name).first;
  }
  return at->second;
}

std::vector<Kernel> kernels_of(const Plan& plan) {
  std::vector<Kernel> out{plan.kernel};
  if (plan.splits > 1) {
    out.push_back({Fn::sum_splits, plan.kernel.x});
  }
  if (plan.scheduled_tiles > 0) {
    out.push_back({Fn::schedule_tiles});
  }
  return out;
}

// The line that says what is wrong, out of what MLX and the compiler say.
std::string compilers_line(const std::string& what) {
  size_t error = what.find("error:");
  size_t at = error == std::string::npos ? 0 : what.rfind('\n', error);
  at = at == std::string::npos || error == std::string::npos ? 0 : at + 1;
  return what.substr(at, what.find('\n', at) - at);
}

// ---- dispatching ------------------------------------------------------------------------------------------------

array temporary(mx::Shape shape, mx::Dtype dtype, mx::metal::CommandEncoder& encoder) {
  array out(std::move(shape), dtype, nullptr, {});
  out.set_data(mx::allocator::malloc(out.nbytes()));
  encoder.add_temporary(out);
  return out;
}

void start(mx::metal::CommandEncoder& encoder, const Kernel& kernel) {
  Compiled& compiled = compile(kernel);
  compiled.calls.fetch_add(1, std::memory_order_relaxed);
  encoder.set_compute_pipeline_state(compiled.pipeline);
}

void finish(mx::metal::CommandEncoder& encoder, const Kernel& kernel, const std::array<int, 3>& grid) {
  auto [x, y, z] = kernel.shape();
  encoder.dispatch_threadgroups(MTL::Size(grid[0], grid[1], grid[2]), MTL::Size(x, y, z));
}

void expect_no_strides(const std::vector<array>& inputs) {
  for (const array& in : inputs) {
    if (!in.flags().row_contiguous) {
      throw std::logic_error("mlxq: an array reached a Metal kernel with strides");
    }
  }
}

void dispatch(const Product& p, const mx::Stream& stream, const std::vector<array>& inputs, array& out) {
  std::optional<Plan> chosen = choose(p, gpu());
  if (!chosen) {  // a graph compiled without shapes for decoding that now prefills on a GPU with matrix units
    Gpu plain = gpu();
    plain.nax = false;
    chosen = choose(p, plain);
  }
  const Plan& plan = chosen.value();
  expect_no_strides(inputs);
  auto& encoder = mx::metal::get_command_encoder(stream);
  std::optional<array> schedule, partials;
  if (plan.scheduled_tiles > 0) {
    schedule = temporary({plan.scheduled_tiles, 3}, mx::int32, encoder);
    start(encoder, {Fn::schedule_tiles});
    encoder.set_input_array(inputs[5], 0);
    encoder.set_output_array(*schedule, 1);
    int at = 2;
    for (int constant : {p.blocks, p.M, p.experts, tiles[plan.kernel.variant].rows, plan.scheduled_tiles}) {
      encoder.set_bytes(constant, at++);
    }
    finish(encoder, {Fn::schedule_tiles}, {1, 1, 1});
  }
  if (plan.splits > 1) {
    partials = temporary({plan.splits, int(out.size())}, mx::float32, encoder);
  }
  start(encoder, plan.kernel);
  for (int i = 0; i < 4; ++i) {
    encoder.set_input_array(inputs[i], i);
  }
  encoder.set_output_array(partials ? *partials : out, 4);
  int at = 5;
  if (p.gather) {
    encoder.set_input_array(inputs[4], at++);
    encoder.set_input_array(schedule ? *schedule : inputs[5], at++);
  }
  if (shader(plan.kernel.fn).arguments == Arguments::tile) {
    encoder.set_bytes(p.M, at++);
  }
  encoder.set_bytes(p.N, at++);
  encoder.set_bytes(p.K, at++);
  if (plan.splits > 1) {
    encoder.set_bytes(plan.span, at++);
  }
  finish(encoder, plan.kernel, plan.grid);
  if (plan.splits > 1) {
    int count = int(out.size());
    start(encoder, {Fn::sum_splits, p.x_dtype});
    encoder.set_input_array(*partials, 0);
    encoder.set_output_array(out, 1);
    encoder.set_bytes(count, 2);
    encoder.set_bytes(plan.splits, 3);
    finish(encoder, {Fn::sum_splits}, {ceil_div(count, 256), 1, 1});
  }
}

}  // namespace

bool on_metal(const mx::Stream& stream) {
#ifdef MLXQ_FAKE_METAL
  return mx::metal::fake_device_is_on();
#else
  return stream.device == mx::Device::gpu;
#endif
}

namespace {

// Whether these are compiled, now if not before.
bool served(const std::vector<Kernel>& kernels) {
  {
    std::lock_guard lock(state().mutex);
    if (!state().error.empty()) {
      return false;
    }
  }
  for (const Kernel& kernel : kernels) {
    try {
      compile(kernel);
    } catch (const std::exception& error) {
      std::lock_guard lock(state().mutex);
      state().error = kernel.name() + ": " + compilers_line(error.what());
      state().warning = "Metal did not compile mlxq's kernel " + state().error +
                        ". Stock MLX operations are used from now on; mlxq doctor says more.";
      return false;
    }
  }
  return true;
}

}  // namespace

bool metal_serves(const Product& p) {
  std::optional<Plan> plan = choose(p, gpu());
  return plan && served(kernels_of(*plan));
}

bool metal_serves(const Q8& p) { return served({choose(p, gpu()).kernel}); }

bool metal_serves(const Conversion& c) { return served({kernel_of(c)}); }

bool metal_serves_q8_rows(DType x) { return served({{Fn::q8_rows, x}}); }

Choice metal_choice(const Product& p) {
  std::optional<Plan> plan = choose(p, gpu());
  if (!plan) {
    return {};
  }
  Choice out{shader(plan->kernel.fn).name, plan->kernel.arguments(), {}, {}, plan->span, plan->scheduled_tiles};
  std::ranges::copy(plan->grid, out.grid);
  std::ranges::copy(plan->kernel.shape(), out.threads);
  return out;
}

std::optional<MetalStatus> metal_status() {
  if (!mx::metal::is_available()) {
    return std::nullopt;
  }
  Gpu g = gpu();
  MetalStatus out{g.architecture, g.generation, g.nax, "", {}};
  std::lock_guard lock(state().mutex);
  out.error = state().error;
  for (const auto& [key, compiled] : state().compiled) {
    out.kernels[compiled.name] = compiled.calls.load(std::memory_order_relaxed);
  }
  return out;
}

std::string take_metal_warning() {
  std::lock_guard lock(state().mutex);
  return std::exchange(state().warning, "");
}

void Packed::eval_gpu(const std::vector<array>& inputs, array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() > 0) {
    dispatch(product(inputs), stream(), inputs, out);
  }
}

void Q8Product::eval_gpu(const std::vector<array>& inputs, array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.size() == 0) {
    return;
  }
  expect_no_strides(inputs);
  const array& x = inputs[0];
  if (x.offset() % 4 != 0) {
    throw std::runtime_error("q8mm: x_codes begin at byte " + std::to_string(x.offset()) + " of their buffer, and " +
                             "the kernel reads words; wanted a multiple of 4: mx.eval them first");
  }
  int K = x.shape(-1), N = inputs[1].shape(0), M = int(x.size() / K);
  Plan plan = choose(q8(inputs), gpu());
  auto& encoder = mx::metal::get_command_encoder(stream());
  start(encoder, plan.kernel);
  encoder.set_input_array(x, 0);
  encoder.set_input_array(inputs[4], 1);
  for (int i = 1; i < 4; ++i) {
    encoder.set_input_array(inputs[i], i + 1);
  }
  encoder.set_output_array(out, 5);
  int at = 6;
  if (plan.kernel.fn == Fn::q8_mm) {
    encoder.set_bytes(M, at++);
  }
  encoder.set_bytes(N, at++);
  encoder.set_bytes(K, at);
  finish(encoder, plan.kernel, plan.grid);
}

void Q8Rows::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  for (array& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  const array& x = inputs[0];
  if (x.size() == 0) {
    return;
  }
  expect_no_strides(inputs);
  int K = x.shape(-1);
  Kernel kernel{Fn::q8_rows, to_dtype(x.dtype())};
  auto& encoder = mx::metal::get_command_encoder(stream());
  start(encoder, kernel);
  encoder.set_input_array(x, 0);
  encoder.set_output_array(outputs[0], 1);
  encoder.set_output_array(outputs[1], 2);
  encoder.set_bytes(K, 3);
  finish(encoder, kernel, {int(x.size() / K), 1, 1});
}

void Quantize::eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs) {
  for (array& out : outputs) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
  }
  expect_no_strides(inputs);
  std::memset(outputs[3].data<char>(), 0, outputs[3].nbytes());  // the kernel adds to it
  Kernel kernel = kernel_of({to_dtype(inputs[0].dtype()), to_dtype(outputs[1].dtype()), bits_, group_size_, true});
  int groups = int(outputs[1].size());
  auto& encoder = mx::metal::get_command_encoder(stream());
  start(encoder, kernel);
  encoder.set_input_array(inputs[0], 0);
  for (int i = 0; i < 4; ++i) {
    encoder.set_output_array(outputs[i], i + 1);
  }
  encoder.set_bytes(groups, 5);
  finish(encoder, kernel, {ceil_div(groups, 8), 1, 1});
}

void Dequantize::eval_gpu(const std::vector<array>& inputs, array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  expect_no_strides(inputs);
  Kernel kernel = kernel_of({to_dtype(out.dtype()), to_dtype(inputs[1].dtype()), bits_, group_size_, false});
  int groups = int(inputs[1].size());
  auto& encoder = mx::metal::get_command_encoder(stream());
  start(encoder, kernel);
  for (int i = 0; i < 3; ++i) {
    encoder.set_input_array(inputs[i], i);
  }
  encoder.set_output_array(out, 3);
  encoder.set_bytes(groups, 4);
  finish(encoder, kernel, {ceil_div(groups, 8), 1, 1});
}

}  // namespace mlxq
