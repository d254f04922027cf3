// What the operations and the bindings know of Metal. eval_metal.cpp has all of it; a build without Metal (Linux) has
// the two constants at the end instead.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "mlx/stream.h"

#include "../mlxq/format.h"

namespace mlxq {

namespace mx = mlx::core;

// A product as far as choosing a kernel goes.
struct Product {
  bool transpose;
  int bits;
  int group_size;
  DType x_dtype;
  DType scale_dtype;
  int M;            // rows of x; of one block of x in a gather
  int N;            // rows of (one expert of) the packed weight
  int K;
  bool gather = false;
  bool sorted = false;
  int blocks = 1;   // blocks of y
  int experts = 1;
};

// A product of int8 codes as far as choosing a kernel goes.
struct Q8 {
  DType scale_dtype;
  int bits;
  int group_size;
  int grouped;  // operands that have a scale for each group: none with per_row, the weight, or x too
  int M, N, K;
};

// Quantizing (to codes) or dequantizing, as far as choosing a kernel goes.
struct Conversion {
  DType w;
  DType storage;  // of scales and biases
  int bits;
  int group_size;
  bool to_codes;
};

// The text of one shader file, its includes in place; written by embed_shaders.py.
struct ShaderText {
  const char* name;
  const char* text;
};
extern const ShaderText shader_texts[];
extern const int shader_text_count;

// The kernel that would run, and its dispatch: what tests compare with shaders/kernels.json.
struct Choice {
  std::string kernel;     // "" where the table leaves the product to stock MLX
  std::string arguments;  // of its template
  int grid[3];            // threadgroups
  int threads[3];         // of each
  int span;               // of the inner dimension in a split; 0: whole
  int tiles;              // of schedule_tiles; 0: no schedule
};

struct MetalStatus {
  std::string architecture;  // "applegpu_g15s"
  int generation;            // 13 for M1, 14, 15, 16, 17 for M5
  bool nax;                  // stock MLX has matrix units to prefill with
  std::string error;         // why stock MLX serves from now on; "" while our kernels do
  std::map<std::string, long> kernels;  // compiled so far -> how often dispatched
};

#ifdef MLXQ_METAL
// Whether Metal does this stream's work.
bool on_metal(const mx::Stream& stream);

// Whether our kernels serve this product; compiles them on first use, so that a compiler that refuses is met while the
// graph is built and stock MLX can still take over. After one refusal the answer stays no.
bool metal_serves(const Product& p);
bool metal_serves(const Q8& p);
bool metal_serves(const Conversion& c);
bool metal_serves_q8_rows(DType x);

Choice metal_choice(const Product& p);

std::optional<MetalStatus> metal_status();

// The one sentence to warn with, once, after a kernel did not compile; "" otherwise.
std::string take_metal_warning();
#else
inline bool on_metal(const mx::Stream&) { return false; }
inline bool metal_serves(const Product&) { return false; }
inline bool metal_serves(const Q8&) { return false; }
inline bool metal_serves(const Conversion&) { return false; }
inline bool metal_serves_q8_rows(DType) { return false; }
inline std::optional<MetalStatus> metal_status() { return std::nullopt; }
inline std::string take_metal_warning() { return ""; }
#endif

}  // namespace mlxq
