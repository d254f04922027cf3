// What the harness must give as Metal does: identifiers, simdgroup operations, small floats, vectors, constants.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

constant bool flag [[function_constant(0)]];
constant int offset [[function_constant(7)]];

[[kernel]] void identifiers(
    device uint* out [[buffer(0)]],
    uint3 in_grid [[thread_position_in_grid]],
    uint3 in_group [[thread_position_in_threadgroup]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 threads [[threads_per_threadgroup]],
    uint3 groups [[threadgroups_per_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  uint total = threads.x * threads.y * threads.z;
  uint place = (group.x + groups.x * (group.y + groups.y * group.z)) * total + index;
  device uint* o = out + place * 12;
  o[0] = in_grid.x;
  o[1] = in_grid.y;
  o[2] = in_grid.z;
  o[3] = in_group.x;
  o[4] = in_group.y;
  o[5] = in_group.z;
  o[6] = index;
  o[7] = lane;
  o[8] = simdgroup;
  o[9] = simdgroups;
  o[10] = groups.y;
  o[11] = threads.z;
}

template <typename T>
[[kernel]] void simd_operations(
    const device T* x [[buffer(0)]], device T* out [[buffer(1)]], ushort lane [[thread_index_in_simdgroup]]) {
  T v = x[lane];
  out[0 * 32 + lane] = simd_sum(v);
  out[1 * 32 + lane] = simd_max(v);
  out[2 * 32 + lane] = simd_min(v);
  out[3 * 32 + lane] = simd_prefix_inclusive_sum(v);
  out[4 * 32 + lane] = simd_prefix_exclusive_sum(v);
  out[5 * 32 + lane] = simd_broadcast(v, 5);
  out[6 * 32 + lane] = simd_shuffle(v, ushort((lane * 7 + 3) % 32));
  out[7 * 32 + lane] = simd_shuffle_xor(v, 6);
  out[8 * 32 + lane] = simd_shuffle_up(v, 3);
  out[9 * 32 + lane] = simd_shuffle_down(v, 3);
  out[10 * 32 + lane] = simd_shuffle_rotate_down(v, 3);
  out[11 * 32 + lane] = quad_sum(v);
  out[12 * 32 + lane] = quad_broadcast(v, 2);
  out[13 * 32 + lane] = simd_shuffle_and_fill_up(v, x[31 - lane], ushort(2));
  out[14 * 32 + lane] = simd_broadcast_first(v);
}

template <typename T>
[[kernel]] void conversions(
    const device T* x [[buffer(0)]],
    const device float* f [[buffer(1)]],
    device float* wide [[buffer(2)]],
    device T* narrow [[buffer(3)]],
    device T* sum [[buffer(4)]],
    device ushort* bits [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
  uint i = position.x;
  wide[i] = static_cast<float>(x[i]);
  narrow[i] = static_cast<T>(f[i]);
  sum[i] = x[i] + x[65535 - i] * x[i];
  bits[i] = as_type<ushort>(x[i]);
}

// d = a b + c, each matrix loaded from memory; b turned.
template <typename T>
[[kernel]] void matrices(
    const device T* a [[buffer(0)]],
    const device T* b [[buffer(1)]],
    const device float* c [[buffer(2)]],
    device float* d [[buffer(3)]],
    device float* elements [[buffer(4)]],
    ushort lane [[thread_index_in_simdgroup]]) {
  simdgroup_matrix<T, 8, 8> ma, mb;
  simdgroup_float8x8 mc, md;
  simdgroup_load(ma, a, 9);
  simdgroup_load(mb, b, 9, ulong2(1, 2), true);
  simdgroup_load(mc, c);
  simdgroup_multiply_accumulate(md, ma, mb, mc);
  simdgroup_store(md, d);
  elements[2 * lane] = mc.thread_elements()[0];
  elements[2 * lane + 1] = mc.thread_elements()[1];
}

[[kernel]] void constants(device int* out [[buffer(0)]]) {
  out[0] = flag ? 1 : 2;
  out[1] = is_function_constant_defined(offset) ? offset : -5;
}

struct Shape {
  int rows;
  float scale;
  uint strides[3];
};

[[kernel]] void vectors(
    const device uint2* pairs [[buffer(0)]],
    constant Shape& shape [[buffer(1)]],
    device float* out [[buffer(2)]]) {
  uint4 v = uint4(pairs[0].x, pairs[0].y, pairs[1].x, 7u);
  v = (v >> 1u) & uint4(0xffu);
  float4 f = float4(v) * shape.scale + float4(1.0f);
  for (int i = 0; i < 4; i++) out[i] = f[i];
  out[4] = metal::dot(f, float4(1.0f, 2.0f, 3.0f, 4.0f));
  out[5] = float(shape.rows) + float(shape.strides[2]);
  out[6] = metal::rint(2.5f) + 10.0f * metal::round(2.5f) + 100.0f * metal::clamp(7.0f, 0.0f, 3.0f);
  out[7] = float(metal::popcount(0xf0f1u)) + 100.0f * float(metal::clz(1u)) + 10000.0f * float(metal::ctz(8u));
  out[8] = metal::select(1.0f, 2.0f, true) + 0.1;
}
