// Stands before MLX's header of this name when eval_metal.cpp is compiled for Linux (MLXQ_FAKE_METAL): the part of
// metal::Device and metal::CommandEncoder that it uses, with the signatures of mlx 0.32.4. See fake_device.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/device.h"
#include "mlx/stream.h"

namespace MTL {

struct Size {
  unsigned long width, height, depth;
  Size(unsigned long width, unsigned long height, unsigned long depth) : width(width), height(height), depth(depth) {}
};

struct Library {
  std::string name, text;
};

struct ComputePipelineState {
  std::string name;
  unsigned long maxTotalThreadsPerThreadgroup() const;
};

}  // namespace MTL

namespace mlx::core::metal {

class CommandEncoder {
 public:
  explicit CommandEncoder(Stream stream) : stream_(stream) {}
  CommandEncoder(const CommandEncoder&) = delete;

  void set_input_array(const array& a, int idx, int64_t offset = 0);
  void set_output_array(array& a, int idx, int64_t offset = 0);
  void add_temporary(array arr);
  void dispatch_threadgroups(MTL::Size grid_dims, MTL::Size group_dims);
  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel) { kernel_ = kernel; }

  template <typename T>
  void set_bytes(const T& v, int idx) {
    set_constant(&v, sizeof(T), idx);
  }

 private:
  struct Binding {
    int index;
    char* data;                   // of an array
    uint64_t bytes;
    bool writable;
    std::vector<char> constant;   // of set_bytes
  };

  void bind(Binding binding);
  void set_constant(const void* data, size_t bytes, int idx);

  Stream stream_;
  MTL::ComputePipelineState* kernel_{nullptr};
  std::vector<Binding> bindings_;
};

class Device {
 public:
  const std::string& get_architecture() const { return architecture; }
  int get_architecture_gen() const { return generation; }
  MTL::Library* get_library(const std::string& name, const std::function<std::string(void)>& builder);
  MTL::ComputePipelineState* get_kernel(const std::string& base_name, MTL::Library* mtl_lib);

  std::string architecture{"applegpu_g15s"};
  int generation{15};
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream s);

// Whether CPU streams are taken for the fake device's.
bool fake_device_is_on();

// {26, 2} for macOS 26.2.
std::pair<int, int> fake_os_version();

}  // namespace mlx::core::metal
