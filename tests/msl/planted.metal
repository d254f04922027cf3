// One kernel that is right, and one for each kind of defect that the harness claims to catch.
#include <metal_simdgroup>
#include <metal_stdlib>

using namespace metal;

// y[n] = sum_k x[k] over the threadgroup's row n; two simdgroups add up halves through threadgroup memory.
// defect 0: none. The others each break one thing.
template <int defect>
[[kernel]] void row_sums(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant int& K [[buffer(2)]],
    constant int& N [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float parts[2];
  int row = int(group.x);
  if (defect == 1) row = int(group.y);                        // the wrong group index
  float sum = 0.0f;
  int end = K;
  if (defect == 2 && row == N - 1) end = K + 1;               // reads past the last row
  for (int k = int(simdgroup) * 32 + int(lane); k < end; k += 64) sum += x[row * K + k];
  sum = simd_sum(sum);
  if (defect == 3) {
    if (lane < 16) simdgroup_barrier(mem_flags::mem_none);    // half of the lanes
  }
  if (defect == 4) {
    if (simdgroup == 0) threadgroup_barrier(mem_flags::mem_none);  // one simdgroup of two
  }
  if (lane == 0 && !(defect == 5 && simdgroup == 1)) parts[simdgroup] = sum;  // 5: parts[1] is never written
  if (defect == 6) {
    simdgroup_barrier(mem_flags::mem_threadgroup);            // too weak
  } else if (defect == 7) {
    threadgroup_barrier(mem_flags::mem_device);               // orders the wrong memory
  } else if (defect != 8) {                                   // 8: missing
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  int last = defect == 9 ? 2 : 1;                             // 9: past a threadgroup array
  if (simdgroup == 0 && lane == 0) y[defect == 10 ? row + 1 : row] = parts[0] + parts[last];  // 10: writes past y
  if (defect == 11) y[0] = sum;                               // every lane writes one element
  if (defect == 12 && lane == 31) y[row - 1] = sum;           // writes before y, and other groups' rows
}

[[kernel]] void divergent_on_one_line(
    device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  float v = float(lane);
  if (lane < 16) { v = simd_sum(v); } else { v = simd_sum(2.0f * v); }
  y[lane] = v;
}

[[kernel]] void early_return(
    device float* y [[buffer(0)]], constant int& N [[buffer(1)]], uint lane [[thread_index_in_simdgroup]]) {
  if (int(lane) >= N) return;
  y[lane] = simd_sum(1.0f);
}

template <int floats>
[[kernel]] void large(device float* y [[buffer(0)]], uint lane [[thread_index_in_threadgroup]]) {
  threadgroup float tile[floats];
  tile[lane] = float(lane);
  y[lane] = tile[lane];
}

// A simdgroup stores a matrix and loads it turned: other lanes' elements, so a barrier is needed.
template <bool barrier>
[[kernel]] void turn(
    const device float* x [[buffer(0)]], device float* y [[buffer(1)]]) {
  threadgroup float tile[64];
  simdgroup_matrix<float, 8, 8> m;
  simdgroup_load(m, x, 8);
  simdgroup_store(m, tile, 8);
  if (barrier) simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(m, tile, 8, ulong2(0, 0), true);
  simdgroup_store(m, y, 8);
}

// Threadgroups hand on through device memory what only atomics may.
template <bool atomically>
[[kernel]] void count(device atomic_uint* total [[buffer(0)]], device uint* plain [[buffer(1)]]) {
  if (atomically) {
    atomic_fetch_add_explicit(total, 1u, memory_order_relaxed);
  } else {
    plain[0] += 1u;
  }
}

template <int defect>
[[kernel]] void arithmetic(
    const device uchar* bytes [[buffer(0)]],
    device int* y [[buffer(1)]],
    constant int& n [[buffer(2)]]) {
  if (defect == 0) y[0] = *(const device int*)(bytes + n);
  if (defect == 1) y[0] = 1 << n;
  if (defect == 2) y[0] = 2147483647 + n;
  if (defect == 3) {
    float sums[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    y[0] = int(sums[n]);
  }
  while (defect == 4 && y[0] == 0) {}
}

[[kernel]] void writes_const(const device float* x [[buffer(0)]], device float* y [[buffer(1)]]) {
  *(device float*)x = 1.0f;
  y[0] = 2.0f;
}

[[kernel]] void private_uninitialised(device float* y [[buffer(0)]], constant int& n [[buffer(1)]]) {
  float values[4];
  for (int i = 0; i < n; i++) values[i] = 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < 4; i++) sum += values[i];
  y[0] = sum;
}

// Writes down in which order the threads run: three times each, with a simdgroup's barrier in between.
[[kernel]] void order(
    device atomic_uint* next [[buffer(0)]],
    device uint* log [[buffer(1)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]]) {
  for (int i = 0; i < 3; i++) {
    uint at = atomic_fetch_add_explicit(next, 1u, memory_order_relaxed);
    log[at] = group.x * 128u + index;
    simdgroup_barrier(mem_flags::mem_none);
  }
}
