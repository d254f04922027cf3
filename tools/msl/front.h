// What Metal's library declares, with real address spaces, for clang's eyes only: nothing here has a body.
//
// plain C++   device, constant and threadgroup are clang's address_space(1), (2), (3); thread is the default one.
// MSL_OPENCL  C++ for OpenCL: __global, __constant, __local, __private; no bfloat16 type, so a class stands for it.
//
// checks.py also takes this file as its list of Metal's words: a word that shaders use and that stands here must
// stand in MLX's own kernels as well.
#pragma once

#ifdef MSL_OPENCL
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define MSL_CONSTANT __constant
#else
#define device __attribute__((address_space(1)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define MSL_CONSTANT __attribute__((address_space(2)))
typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef long ptrdiff_t;
#endif
#define constant MSL_CONSTANT const
#define METAL_FUNC inline

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;

#ifdef MSL_OPENCL
struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float);
  operator float() const;
};
#endif

namespace metal {

#ifdef MSL_OPENCL
#define MSL_VECTOR(T)                                                                                          \
  T##2 make_##T##2(T);                                                                                         \
  T##2 make_##T##2(T, T);                                                                                      \
  T##3 make_##T##3(T, T, T);                                                                                   \
  T##4 make_##T##4(T);                                                                                         \
  T##4 make_##T##4(T, T, T, T);
#else
#define MSL_VECTOR(T)                                                                                          \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                                          \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                                          \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                                          \
  T##2 make_##T##2(T);                                                                                         \
  T##2 make_##T##2(T, T);                                                                                      \
  T##3 make_##T##3(T, T, T);                                                                                   \
  T##4 make_##T##4(T);                                                                                         \
  T##4 make_##T##4(T, T, T, T);
#endif
MSL_VECTOR(uchar) MSL_VECTOR(ushort) MSL_VECTOR(uint) MSL_VECTOR(ulong)
MSL_VECTOR(char) MSL_VECTOR(short) MSL_VECTOR(int) MSL_VECTOR(long) MSL_VECTOR(float) MSL_VECTOR(half)

template <class A, class B> struct is_same { static constexpr constant bool value = false; };
template <class A> struct is_same<A, A> { static constexpr constant bool value = true; };
template <class A, class B> constexpr constant bool is_same_v = is_same<A, B>::value;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct numeric_limits {
  static constexpr T max();
  static constexpr T min();
  static constexpr T lowest();
  static constexpr T epsilon();
  static constexpr T infinity();
};

#define MSL_1(name)                                                                                            \
  float name(float);                                                                                           \
  half name(half);
#define MSL_2(name)                                                                                            \
  float name(float, float);                                                                                    \
  half name(half, half);
MSL_1(sqrt) MSL_1(rsqrt) MSL_1(exp) MSL_1(exp2) MSL_1(log) MSL_1(log2) MSL_1(sin) MSL_1(cos) MSL_1(tanh)
MSL_1(floor) MSL_1(ceil) MSL_1(trunc) MSL_1(round) MSL_1(rint) MSL_1(fabs) MSL_1(saturate) MSL_1(sign)
MSL_2(pow) MSL_2(fmin) MSL_2(fmax) MSL_2(fmod) MSL_2(copysign)
float fma(float, float, float);
half fma(half, half, half);
float ldexp(float, int);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool signbit(float);
template <class T> T min(T, T);
template <class T> T max(T, T);
template <class T> T abs(T);
template <class T> T clamp(T, T, T);
template <class T> T select(T, T, bool);
template <class T> T popcount(T);
template <class T> T clz(T);
template <class T> T ctz(T);
template <class T> T extract_bits(T, uint, uint);
template <class T> T rotate(T, T);
template <class T> T mulhi(T, T);
template <class T> T divide(T, T);
namespace precise {
using metal::divide;
using metal::exp;
using metal::fma;
using metal::sqrt;
}  // namespace precise
namespace fast {
using metal::divide;
using metal::exp;
using metal::sqrt;
}  // namespace fast

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define MSL_SIMD(name) template <class T> T name(T);
#define MSL_SIMD_FROM(name) template <class T> T name(T, ushort);
MSL_SIMD(simd_sum) MSL_SIMD(simd_product) MSL_SIMD(simd_min) MSL_SIMD(simd_max) MSL_SIMD(simd_and) MSL_SIMD(simd_or)
MSL_SIMD(simd_xor) MSL_SIMD(simd_prefix_inclusive_sum) MSL_SIMD(simd_prefix_exclusive_sum)
MSL_SIMD(simd_broadcast_first) MSL_SIMD(quad_sum) MSL_SIMD(quad_min) MSL_SIMD(quad_max)
MSL_SIMD_FROM(simd_broadcast) MSL_SIMD_FROM(simd_shuffle) MSL_SIMD_FROM(simd_shuffle_xor)
MSL_SIMD_FROM(simd_shuffle_up) MSL_SIMD_FROM(simd_shuffle_down) MSL_SIMD_FROM(simd_shuffle_rotate_up)
MSL_SIMD_FROM(simd_shuffle_rotate_down) MSL_SIMD_FROM(quad_broadcast) MSL_SIMD_FROM(quad_shuffle)
MSL_SIMD_FROM(quad_shuffle_xor) MSL_SIMD_FROM(quad_shuffle_up) MSL_SIMD_FROM(quad_shuffle_down)
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();

struct msl_pair_of {
  template <class T> struct elements {
    T msl_first, msl_second;
    thread T& operator[](int);
  };
};
template <class T, int Rows, int Columns> struct simdgroup_matrix {
  msl_pair_of::elements<T> msl_held;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread msl_pair_of::elements<T>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int Rows, int Columns> simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);
#define MSL_MATRIX_MEMORY(space)                                                                               \
  template <class T> void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8,         \
                                         ulong2 = make_ulong2(0), bool = false);                               \
  template <class T> void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8,                      \
                                          ulong2 = make_ulong2(0), bool = false);
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>, simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);

#ifdef MSL_OPENCL  // which has these names itself, and means the same
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define memory_order msl_memory_order
#define memory_order_relaxed msl_memory_order_relaxed
#endif
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#define MSL_ATOMICS(space)                                                                                     \
  template <class T> T atomic_load_explicit(const space atomic<T>*, memory_order);                             \
  template <class T, class V> void atomic_store_explicit(space atomic<T>*, V, memory_order);                   \
  template <class T, class V> T atomic_fetch_add_explicit(space atomic<T>*, V, memory_order);                  \
  template <class T, class V> T atomic_fetch_max_explicit(space atomic<T>*, V, memory_order);                  \
  template <class T, class V> T atomic_fetch_min_explicit(space atomic<T>*, V, memory_order);
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)

}  // namespace metal

template <class To, class From> To as_type(From);
