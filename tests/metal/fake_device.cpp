// A Metal device for eval_metal.cpp on Linux. It keeps what the host binds and hands every dispatch to tests/metal
// (Python), which runs the shader's text on the CPU harness. MLX on Linux has no GPU streams, so CPU streams serve:
// a dispatch takes its turn in the stream's queue, behind what computes its inputs, as on a GPU.
//
// Stricter than Metal: a binding lasts for one dispatch, so that no kernel can lean on what the one before it bound.
#include "mlx/backend/metal/device.h"

#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"

namespace {

// What Python does; each returns 0, or writes a message.
using Compile = int (*)(const char* library, const char* text, char* message, size_t room);
using Find = int (*)(const char* library, const char* kernel);
using Run = void (*)(const char* kernel, int count, const int* index, char* const* data, const uint64_t* bytes,
                     const int* writable, const unsigned* grid, const unsigned* threads);

Compile compile_callback;
Find find_callback;
Run run_callback;
std::atomic<bool> on{false};
std::atomic<long> temporaries{0};
std::pair<int, int> os_version{15, 0};
unsigned long most_threads = 1024;
std::mutex mutex;

struct Dispatch {
  std::string kernel;
  std::vector<int> index, writable;
  std::vector<char*> data;
  std::vector<uint64_t> bytes;
  std::vector<std::vector<char>> constants;
  unsigned grid[3], threads[3];
};

}  // namespace

#define MLXQ_EXPORT extern "C" __attribute__((visibility("default")))

MLXQ_EXPORT void mlxq_fake_callbacks(Compile compile, Find find, Run run) {
  compile_callback = compile;
  find_callback = find;
  run_callback = run;
}

MLXQ_EXPORT void mlxq_fake_device(int is_on, const char* architecture, int generation, const char* version) {
  auto& device = mlx::core::metal::device(mlx::core::Device::cpu);
  device.architecture = architecture;
  device.generation = generation;
  std::sscanf(version, "%d.%d", &os_version.first, &os_version.second);
  on = is_on != 0;
}

MLXQ_EXPORT void mlxq_fake_most_threads(int most) { most_threads = most; }

MLXQ_EXPORT long mlxq_fake_temporaries() { return temporaries.exchange(0); }

unsigned long MTL::ComputePipelineState::maxTotalThreadsPerThreadgroup() const { return most_threads; }

namespace mlx::core::metal {

bool is_available() { return on; }
bool fake_device_is_on() { return on; }
std::pair<int, int> fake_os_version() { return os_version; }

Device& device(mlx::core::Device) {
  static Device the_device;
  return the_device;
}

CommandEncoder& get_command_encoder(Stream s) {
  static std::map<int, std::unique_ptr<CommandEncoder>> encoders;
  std::lock_guard lock(mutex);
  auto& encoder = encoders[s.index];
  if (!encoder) {
    encoder = std::make_unique<CommandEncoder>(s);
  }
  return *encoder;
}

MTL::Library* Device::get_library(const std::string& name, const std::function<std::string(void)>& builder) {
  static std::map<std::string, std::unique_ptr<MTL::Library>> libraries;
  std::lock_guard lock(mutex);
  auto& library = libraries[name];
  if (!library) {
    std::string text = builder();
    std::vector<char> message(1 << 16);
    if (compile_callback(name.c_str(), text.c_str(), message.data(), message.size()) != 0) {
      libraries.erase(name);
      throw std::runtime_error("[metal::Device] Unable to build metal library from source\n" +
                               std::string(message.data()) + "\n");
    }
    library = std::make_unique<MTL::Library>(MTL::Library{name, text});
  }
  return library.get();
}

MTL::ComputePipelineState* Device::get_kernel(const std::string& base_name, MTL::Library* mtl_lib) {
  static std::map<std::string, std::unique_ptr<MTL::ComputePipelineState>> kernels;
  std::lock_guard lock(mutex);
  if (find_callback(mtl_lib->name.c_str(), base_name.c_str()) != 0) {
    throw std::runtime_error("[metal::Device] Unable to load kernel " + base_name + "\n");
  }
  auto& kernel = kernels[base_name];
  if (!kernel) {
    kernel = std::make_unique<MTL::ComputePipelineState>(MTL::ComputePipelineState{base_name});
  }
  return kernel.get();
}

void CommandEncoder::bind(Binding binding) {
  std::erase_if(bindings_, [&](const Binding& b) { return b.index == binding.index; });
  bindings_.push_back(std::move(binding));
}

void CommandEncoder::set_input_array(const array& a, int idx, int64_t offset) {
  bind({idx, const_cast<char*>(a.data<char>()) + offset, a.nbytes() - offset, false, {}});
}

void CommandEncoder::set_output_array(array& a, int idx, int64_t offset) {
  bind({idx, a.data<char>() + offset, a.nbytes() - offset, true, {}});
}

void CommandEncoder::set_constant(const void* data, size_t bytes, int idx) {
  auto* begin = static_cast<const char*>(data);
  bind({idx, nullptr, bytes, false, std::vector<char>(begin, begin + bytes)});
}

void CommandEncoder::add_temporary(array arr) {
  ++temporaries;
  cpu::get_command_encoder(stream_).add_temporary(std::move(arr));
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size threads) {
  auto job = std::make_shared<Dispatch>();
  job->kernel = kernel_->name;
  for (Binding& b : bindings_) {
    job->index.push_back(b.index);
    job->writable.push_back(b.writable);
    job->bytes.push_back(b.bytes);
    job->constants.push_back(std::move(b.constant));
    job->data.push_back(b.data ? b.data : job->constants.back().data());
  }
  bindings_.clear();
  unsigned sizes[6] = {unsigned(grid.width),    unsigned(grid.height),    unsigned(grid.depth),
                       unsigned(threads.width), unsigned(threads.height), unsigned(threads.depth)};
  std::copy(sizes, sizes + 3, job->grid);
  std::copy(sizes + 3, sizes + 6, job->threads);
  cpu::get_command_encoder(stream_).dispatch([job] {
    run_callback(job->kernel.c_str(), int(job->index.size()), job->index.data(), job->data.data(), job->bytes.data(),
                 job->writable.data(), job->grid, job->threads);
  });
}

}  // namespace mlx::core::metal
