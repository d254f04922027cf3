// What a Metal shader sees instead of <metal_stdlib>, on a CPU and on an NVIDIA GPU.
//
// harness.py takes the address spaces out of the shader's text (both machines have one), turns threadgroup
// arrays into calls, and puts this header in front. No other header is included: NVRTC has none, and names such
// as ::abs would be ambiguous beside metal::abs.
//
//   CPU    a lane is a fiber (runtime.cpp). Every operation of a simdgroup hands its operands to msl_exchange,
//          which returns when all lanes of the simdgroup have come to the same place of the source.
//   CUDA   a simdgroup is a warp; operations are shuffles; 8x8 matrices multiply by shuffles, in the CPU's order.
//
// Both back ends give the same bits: sums over a simdgroup add lane i and lane i + 16, then + 8, 4, 2, 1;
// a matrix product is a chain of fused multiply-adds, k ascending, that starts at the accumulator. What Apple's
// hardware does inside these two is not documented, so tests compare with tolerances. half and bfloat round after
// every operation. A simdgroup_matrix lies over the lanes as MLX's kernels expect:
//
//   lane bits b4 b3 b2 b1 b0:  row = b4 b2 b1,  columns = b3 b0 0 and b3 b0 1
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MSL_CUDA 1
#define MSL_SITE
#define MSL_PASS
// CUDA declares these names globally; inside namespace metal they must be our own.
#define char2 msl_char2
#define char3 msl_char3
#define char4 msl_char4
#define uchar2 msl_uchar2
#define uchar3 msl_uchar3
#define uchar4 msl_uchar4
#define short2 msl_short2
#define short3 msl_short3
#define short4 msl_short4
#define ushort2 msl_ushort2
#define ushort3 msl_ushort3
#define ushort4 msl_ushort4
#define int2 msl_int2
#define int3 msl_int3
#define int4 msl_int4
#define uint2 msl_uint2
#define uint3 msl_uint3
#define uint4 msl_uint4
#define long2 msl_long2
#define long3 msl_long3
#define long4 msl_long4
#define ulong2 msl_ulong2
#define ulong3 msl_ulong3
#define ulong4 msl_ulong4
#define float2 msl_float2
#define float3 msl_float3
#define float4 msl_float4
#define MSL_INFINITY __int_as_float(0x7f800000)
#define MSL_NAN __int_as_float(0x7fc00000)
#define MSL_CONSTEXPR
#else
#define MSL_CUDA 0
#define MSL_INFINITY __builtin_huge_valf()
#define MSL_NAN __builtin_nanf("")
#define MSL_CONSTEXPR constexpr
namespace std {  // the shape that __builtin_source_location() asks for
class source_location {
 public:
  struct __impl {
    const char* _M_file_name;
    const char* _M_function_name;
    unsigned _M_line;
    unsigned _M_column;
  };
};
}  // namespace std
// Where in the shader's text an operation stands: line and column, so that two on one line differ.
typedef const void* msl_site;
#define MSL_SITE , msl_site site = __builtin_source_location()
#define MSL_PASS , site
#endif

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef long intptr_t;
typedef unsigned long uintptr_t;

#define METAL_FUNC inline
#define MLXQ_MSL_HARNESS 1

namespace msl {

template <class T> struct identity { typedef T type; };
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <class T> struct is_integral { static constexpr bool value = false; };
#define MSL_INTEGRAL(T) \
  template <> struct is_integral<T> { static constexpr bool value = true; };
MSL_INTEGRAL(bool) MSL_INTEGRAL(char) MSL_INTEGRAL(signed char) MSL_INTEGRAL(unsigned char)
MSL_INTEGRAL(short) MSL_INTEGRAL(unsigned short) MSL_INTEGRAL(int) MSL_INTEGRAL(unsigned int)
MSL_INTEGRAL(long) MSL_INTEGRAL(unsigned long) MSL_INTEGRAL(long long) MSL_INTEGRAL(unsigned long long)
template <class T> using if_integral = typename enable_if<is_integral<T>::value, int>::type;

template <class To, class From> inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
#if MSL_CUDA
  memcpy(&to, &from, sizeof(To));
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

// float -> half and back, to nearest even.
#if MSL_CUDA
inline ushort half_bits(float value) {
  ushort bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
inline float half_value(ushort bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#else
inline ushort half_bits(float value) { return bits_as<ushort>(static_cast<_Float16>(value)); }
inline float half_value(ushort bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
#endif

inline ushort bfloat_bits(float value) {
  uint bits = bits_as<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<ushort>((bits >> 16) | 0x40u);
  return static_cast<ushort>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float bfloat_value(ushort bits) { return bits_as<float>(static_cast<uint>(bits) << 16); }

}  // namespace msl

struct half {
  ushort bits;
  half() = default;
  half(float value) : bits(msl::half_bits(value)) {}
  template <class I, msl::if_integral<I> = 0> half(I value) : bits(msl::half_bits(static_cast<float>(value))) {}
  operator float() const { return msl::half_value(bits); }
};

// Metal converts float to bfloat only when asked to, and so does this.
struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float value) : bits(msl::bfloat_bits(value)) {}
  explicit bfloat(half value) : bits(msl::bfloat_bits(static_cast<float>(value))) {}
  template <class I, msl::if_integral<I> = 0>
  explicit bfloat(I value) : bits(msl::bfloat_bits(static_cast<float>(value))) {}
  operator float() const { return msl::bfloat_value(bits); }
};

#define MSL_SHORT_FLOAT_OPERATOR(X, op)                                                                        \
  inline X operator op(X a, X b) { return X(static_cast<float>(a) op static_cast<float>(b)); }                 \
  inline float operator op(X a, float b) { return static_cast<float>(a) op b; }                                \
  inline float operator op(float a, X b) { return a op static_cast<float>(b); }                                \
  template <class I, msl::if_integral<I> = 0> inline X operator op(X a, I b) { return a op X(b); }             \
  template <class I, msl::if_integral<I> = 0> inline X operator op(I a, X b) { return X(a) op b; }             \
  inline X& operator op##=(X& a, X b) { return a = a op b; }                                                   \
  template <class I, msl::if_integral<I> = 0> inline X& operator op##=(X& a, I b) { return a = a op X(b); }
#define MSL_SHORT_FLOAT_COMPARISON(X, op)                                                                      \
  inline bool operator op(X a, X b) { return static_cast<float>(a) op static_cast<float>(b); }                 \
  inline bool operator op(X a, float b) { return static_cast<float>(a) op b; }                                 \
  inline bool operator op(float a, X b) { return a op static_cast<float>(b); }                                 \
  template <class I, msl::if_integral<I> = 0> inline bool operator op(X a, I b) { return a op X(b); }          \
  template <class I, msl::if_integral<I> = 0> inline bool operator op(I a, X b) { return X(a) op b; }
#define MSL_SHORT_FLOAT(X)                                                                                     \
  MSL_SHORT_FLOAT_OPERATOR(X, +) MSL_SHORT_FLOAT_OPERATOR(X, -)                                                \
  MSL_SHORT_FLOAT_OPERATOR(X, *) MSL_SHORT_FLOAT_OPERATOR(X, /)                                                \
  MSL_SHORT_FLOAT_COMPARISON(X, ==) MSL_SHORT_FLOAT_COMPARISON(X, !=)                                          \
  MSL_SHORT_FLOAT_COMPARISON(X, <) MSL_SHORT_FLOAT_COMPARISON(X, <=)                                           \
  MSL_SHORT_FLOAT_COMPARISON(X, >) MSL_SHORT_FLOAT_COMPARISON(X, >=)                                           \
  inline X operator-(X a) { return X(-static_cast<float>(a)); }                                                \
  inline X operator+(X a) { return a; }
MSL_SHORT_FLOAT(half)
MSL_SHORT_FLOAT(bfloat)
inline half& operator+=(half& a, float b) { return a = half(static_cast<float>(a) + b); }
inline half& operator-=(half& a, float b) { return a = half(static_cast<float>(a) - b); }
inline half& operator*=(half& a, float b) { return a = half(static_cast<float>(a) * b); }
inline half& operator/=(half& a, float b) { return a = half(static_cast<float>(a) / b); }
inline float& operator+=(float& a, half b) { return a += static_cast<float>(b); }
inline float& operator*=(float& a, half b) { return a *= static_cast<float>(b); }
inline float& operator+=(float& a, bfloat b) { return a += static_cast<float>(b); }
inline float& operator*=(float& a, bfloat b) { return a *= static_cast<float>(b); }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wliteral-suffix"
inline half operator""h(long double value) { return half(static_cast<float>(value)); }
inline bfloat operator""bf(long double value) { return bfloat(static_cast<float>(value)); }
#pragma GCC diagnostic pop

namespace metal {

using ::size_t;
using ::ptrdiff_t;
using ::int8_t;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::uint8_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;

// ---- types ---------------------------------------------------------------------------------------------------

template <class T, T v> struct integral_constant {
  typedef T value_type;
  static constexpr T value = v;
  constexpr operator T() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> using enable_if = msl::enable_if<B, T>;
template <bool B, class T = void> using enable_if_t = typename msl::enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> struct remove_reference { typedef T type; };
template <class T> struct remove_reference<T&> { typedef T type; };
template <class T> struct remove_reference<T&&> { typedef T type; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_cv_t = typename remove_const<T>::type;
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct is_integral : integral_constant<bool, msl::is_integral<T>::value> {};
template <class T> constexpr bool is_integral_v = is_integral<T>::value;
template <class T>
struct is_floating_point
    : integral_constant<bool, is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T> struct is_arithmetic : integral_constant<bool, is_integral_v<T> || is_floating_point_v<T>> {};
template <class T> constexpr bool is_arithmetic_v = is_arithmetic<T>::value;

template <class T, int N> struct vec;

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T s) : x(s), y(s) {}
  vec(T a, T b) : x(a), y(b) {}
  template <class U> explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  vec(T s) : x(s), y(s), z(s) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  vec(vec<T, 2> v, T c) : x(v.x), y(v.y), z(c) {}
  vec(T a, vec<T, 2> v) : x(a), y(v.x), z(v.y) {}
  template <class U> explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T s) : x(s), y(s), z(s), w(s) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  vec(vec<T, 2> u, vec<T, 2> v) : x(u.x), y(u.y), z(v.x), w(v.y) {}
  vec(vec<T, 2> v, T c, T d) : x(v.x), y(v.y), z(c), w(d) {}
  vec(vec<T, 3> v, T d) : x(v.x), y(v.y), z(v.z), w(d) {}
  vec(T a, vec<T, 3> v) : x(a), y(v.x), z(v.y), w(v.z) {}
  template <class U> explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  T& operator[](int i) { return (&x)[i]; }
  const T& operator[](int i) const { return (&x)[i]; }
};

// The same numbers with the alignment of one.
template <class T, int N> struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N> from) {
    for (int i = 0; i < N; i++) v[i] = from[i];
  }
  operator vec<T, N>() const {
    vec<T, N> to;
    for (int i = 0; i < N; i++) to[i] = v[i];
    return to;
  }
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
};

#define MSL_VECTORS(T)                                                                                         \
  typedef vec<T, 2> T##2;                                                                                      \
  typedef vec<T, 3> T##3;                                                                                      \
  typedef vec<T, 4> T##4;                                                                                      \
  typedef packed_vec<T, 2> packed_##T##2;                                                                      \
  typedef packed_vec<T, 3> packed_##T##3;                                                                      \
  typedef packed_vec<T, 4> packed_##T##4;
MSL_VECTORS(uchar) MSL_VECTORS(ushort) MSL_VECTORS(uint) MSL_VECTORS(ulong) MSL_VECTORS(bool) MSL_VECTORS(char)
MSL_VECTORS(short) MSL_VECTORS(int) MSL_VECTORS(long) MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat)

#define MSL_VECTOR_OPERATOR(op)                                                                                \
  template <class T, int N> inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                           \
    for (int i = 0; i < N; i++) a[i] = T(a[i] op b[i]);                                                        \
    return a;                                                                                                  \
  }                                                                                                            \
  template <class T, int N>                                                                                    \
  inline vec<T, N> operator op(vec<T, N> a, typename msl::identity<T>::type b) { return a op vec<T, N>(b); }   \
  template <class T, int N>                                                                                    \
  inline vec<T, N> operator op(typename msl::identity<T>::type a, vec<T, N> b) { return vec<T, N>(a) op b; }   \
  template <class T, int N>                                                                                    \
  inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) { return a = a op b; }                           \
  template <class T, int N>                                                                                    \
  inline vec<T, N>& operator op##=(vec<T, N>& a, typename msl::identity<T>::type b) { return a = a op b; }
MSL_VECTOR_OPERATOR(+) MSL_VECTOR_OPERATOR(-) MSL_VECTOR_OPERATOR(*) MSL_VECTOR_OPERATOR(/)
MSL_VECTOR_OPERATOR(%) MSL_VECTOR_OPERATOR(&) MSL_VECTOR_OPERATOR(|) MSL_VECTOR_OPERATOR(^)
MSL_VECTOR_OPERATOR(<<) MSL_VECTOR_OPERATOR(>>)

#define MSL_VECTOR_COMPARISON(op)                                                                              \
  template <class T, int N> inline vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {                        \
    vec<bool, N> r;                                                                                            \
    for (int i = 0; i < N; i++) r[i] = a[i] op b[i];                                                           \
    return r;                                                                                                  \
  }                                                                                                            \
  template <class T, int N>                                                                                    \
  inline vec<bool, N> operator op(vec<T, N> a, typename msl::identity<T>::type b) { return a op vec<T, N>(b); }
MSL_VECTOR_COMPARISON(==) MSL_VECTOR_COMPARISON(!=) MSL_VECTOR_COMPARISON(<) MSL_VECTOR_COMPARISON(<=)
MSL_VECTOR_COMPARISON(>) MSL_VECTOR_COMPARISON(>=)
template <class T, int N> inline vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = T(-a[i]);
  return a;
}
template <class T, int N> inline vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = T(~a[i]);
  return a;
}
template <int N> inline bool all(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (!v[i]) return false;
  return true;
}
template <int N> inline bool any(vec<bool, N> v) {
  for (int i = 0; i < N; i++)
    if (v[i]) return true;
  return false;
}

template <class T, size_t N> struct array {
  T elements[N];
  T& operator[](size_t i) { return elements[i]; }
  const T& operator[](size_t i) const { return elements[i]; }
  constexpr size_t size() const { return N; }
};

template <class T> struct numeric_limits;
template <> struct numeric_limits<float> {
  static constexpr float max() { return 3.40282347e+38f; }
  static constexpr float lowest() { return -3.40282347e+38f; }
  static constexpr float min() { return 1.17549435e-38f; }
  static constexpr float epsilon() { return 1.19209290e-07f; }
  static MSL_CONSTEXPR float infinity() { return MSL_INFINITY; }
  static MSL_CONSTEXPR float quiet_NaN() { return MSL_NAN; }
};
template <> struct numeric_limits<half> {
  static half max() { return half(65504.0f); }
  static half lowest() { return half(-65504.0f); }
  static half min() { return half(6.10351562e-05f); }
  static half epsilon() { return half(9.765625e-04f); }
  static half infinity() { return half(MSL_INFINITY); }
};
template <> struct numeric_limits<bfloat> {
  static bfloat max() { return msl::bits_as<bfloat>(ushort(0x7f7f)); }
  static bfloat lowest() { return msl::bits_as<bfloat>(ushort(0xff7f)); }
  static bfloat min() { return bfloat(1.17549435e-38f); }
  static bfloat epsilon() { return bfloat(7.8125e-03f); }
  static bfloat infinity() { return bfloat(MSL_INFINITY); }
};
#define MSL_LIMITS(T, low, high)                                                                               \
  template <> struct numeric_limits<T> {                                                                       \
    static constexpr T max() { return high; }                                                                  \
    static constexpr T min() { return low; }                                                                   \
    static constexpr T lowest() { return low; }                                                                \
  };
MSL_LIMITS(char, -128, 127) MSL_LIMITS(int8_t, -128, 127) MSL_LIMITS(uchar, 0, 255)
MSL_LIMITS(short, -32768, 32767) MSL_LIMITS(ushort, 0, 65535)
MSL_LIMITS(int, -2147483647 - 1, 2147483647) MSL_LIMITS(uint, 0, 4294967295u)
MSL_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l) MSL_LIMITS(ulong, 0, 18446744073709551615ul)

// ---- arithmetic ----------------------------------------------------------------------------------------------

#if MSL_CUDA
#define MSL_MATH(name) ::name
#else
#define MSL_MATH(name) __builtin_##name
#endif
#define MSL_FUNCTION_OF_1(name, expression)                                                                    \
  inline float name(float a) { return expression; }                                                            \
  inline half name(half a) { return half(name(static_cast<float>(a))); }                                       \
  inline bfloat name(bfloat a) { return bfloat(name(static_cast<float>(a))); }                                 \
  template <class T, int N> inline vec<T, N> name(vec<T, N> a) {                                               \
    for (int i = 0; i < N; i++) a[i] = name(a[i]);                                                             \
    return a;                                                                                                  \
  }
#define MSL_FUNCTION_OF_2(name, expression)                                                                    \
  inline float name(float a, float b) { return expression; }                                                   \
  inline half name(half a, half b) { return half(name(static_cast<float>(a), static_cast<float>(b))); }        \
  inline bfloat name(bfloat a, bfloat b) { return bfloat(name(static_cast<float>(a), static_cast<float>(b))); } \
  template <class T, int N> inline vec<T, N> name(vec<T, N> a, vec<T, N> b) {                                  \
    for (int i = 0; i < N; i++) a[i] = name(a[i], b[i]);                                                       \
    return a;                                                                                                  \
  }
MSL_FUNCTION_OF_1(sqrt, MSL_MATH(sqrtf)(a))
MSL_FUNCTION_OF_1(rsqrt, 1.0f / MSL_MATH(sqrtf)(a))
MSL_FUNCTION_OF_1(exp, MSL_MATH(expf)(a))
MSL_FUNCTION_OF_1(exp2, MSL_MATH(exp2f)(a))
MSL_FUNCTION_OF_1(exp10, MSL_MATH(powf)(10.0f, a))
MSL_FUNCTION_OF_1(log, MSL_MATH(logf)(a))
MSL_FUNCTION_OF_1(log2, MSL_MATH(log2f)(a))
MSL_FUNCTION_OF_1(log10, MSL_MATH(log10f)(a))
MSL_FUNCTION_OF_1(sin, MSL_MATH(sinf)(a))
MSL_FUNCTION_OF_1(cos, MSL_MATH(cosf)(a))
MSL_FUNCTION_OF_1(tanh, MSL_MATH(tanhf)(a))
MSL_FUNCTION_OF_1(floor, MSL_MATH(floorf)(a))
MSL_FUNCTION_OF_1(ceil, MSL_MATH(ceilf)(a))
MSL_FUNCTION_OF_1(trunc, MSL_MATH(truncf)(a))
MSL_FUNCTION_OF_1(round, MSL_MATH(roundf)(a))  // half away from zero
MSL_FUNCTION_OF_1(rint, MSL_MATH(rintf)(a))    // half to even
MSL_FUNCTION_OF_1(fabs, MSL_MATH(fabsf)(a))
MSL_FUNCTION_OF_1(fract, a - MSL_MATH(floorf)(a))
MSL_FUNCTION_OF_1(saturate, MSL_MATH(fminf)(MSL_MATH(fmaxf)(a, 0.0f), 1.0f))
MSL_FUNCTION_OF_1(sign, a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a == 0.0f ? a : 0.0f)
MSL_FUNCTION_OF_2(pow, MSL_MATH(powf)(a, b))
MSL_FUNCTION_OF_2(powr, MSL_MATH(powf)(a, b))
MSL_FUNCTION_OF_2(fmin, MSL_MATH(fminf)(a, b))
MSL_FUNCTION_OF_2(fmax, MSL_MATH(fmaxf)(a, b))
MSL_FUNCTION_OF_2(fmod, MSL_MATH(fmodf)(a, b))
MSL_FUNCTION_OF_2(copysign, MSL_MATH(copysignf)(a, b))
inline float fma(float a, float b, float c) { return MSL_MATH(fmaf)(a, b, c); }
inline half fma(half a, half b, half c) { return half(fma(float(a), float(b), float(c))); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(fma(float(a), float(b), float(c))); }
template <class T, int N> inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
inline float ldexp(float a, int e) { return MSL_MATH(ldexpf)(a, e); }
inline bool isnan(float a) { return a != a; }
inline bool isinf(float a) { return MSL_MATH(fabsf)(a) == MSL_INFINITY; }
inline bool isfinite(float a) { return MSL_MATH(fabsf)(a) < MSL_INFINITY; }
inline bool signbit(float a) { return msl::bits_as<uint>(a) >> 31; }

// For numbers of one type; NaN loses against a number, as in Metal.
template <class T> inline T min(T a, T b) { return b < a || a != a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b || a != a ? b : a; }
template <class T> inline T abs(T a) { return a < T(0) ? T(-a) : T(a); }
inline float abs(float a) { return MSL_MATH(fabsf)(a); }
inline half abs(half a) { return half(MSL_MATH(fabsf)(a)); }
inline bfloat abs(bfloat a) { return bfloat(MSL_MATH(fabsf)(a)); }
template <class T, int N> inline vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]);
  return a;
}
template <class T, int N> inline vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}
template <class T, int N> inline vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = abs(a[i]);
  return a;
}
template <class T> inline T clamp(T a, T low, T high) { return min(max(a, low), high); }
template <class T, int N>
inline vec<T, N> clamp(vec<T, N> a, typename msl::identity<T>::type low, typename msl::identity<T>::type high) {
  return min(max(a, vec<T, N>(low)), vec<T, N>(high));
}
template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a[i] = c[i] ? b[i] : a[i];
  return a;
}
template <class T> inline T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T, int N> inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}

template <class T> inline T popcount(T a) {
  T n = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); i++) n = T(n + ((a >> i) & 1));
  return n;
}
template <class T> inline T clz(T a) {
  T n = 0;
  for (int i = 8 * int(sizeof(T)) - 1; i >= 0 && !((a >> i) & 1); i--) n = T(n + 1);
  return n;
}
template <class T> inline T ctz(T a) {
  T n = 0;
  for (unsigned i = 0; i < 8 * sizeof(T) && !((a >> i) & 1); i++) n = T(n + 1);
  return n;
}
template <class T> inline T extract_bits(T a, uint offset, uint bits) {
  return bits == 0 ? T(0) : T(T(a << (8 * sizeof(T) - offset - bits)) >> (8 * sizeof(T) - bits));
}
inline uint rotate(uint a, uint n) { return (a << (n & 31)) | (a >> (-n & 31)); }
inline uint mulhi(uint a, uint b) { return uint((ulong(a) * b) >> 32); }
inline int mulhi(int a, int b) { return int((long(a) * b) >> 32); }
inline int mul24(int a, int b) { return a * b; }
inline int mad24(int a, int b, int c) { return a * b + c; }
template <class T> inline T divide(T a, T b) { return a / b; }

#define MSL_SAME_AS_METAL                                                                                      \
  using metal::sqrt; using metal::rsqrt; using metal::exp; using metal::exp2; using metal::log;                \
  using metal::log2; using metal::pow; using metal::sin; using metal::cos; using metal::tanh;                  \
  using metal::min; using metal::max; using metal::clamp; using metal::fma; using metal::divide;               \
  using metal::floor; using metal::ceil; using metal::rint; using metal::round; using metal::abs;
namespace precise { MSL_SAME_AS_METAL }
namespace fast { MSL_SAME_AS_METAL }

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
enum memory_order { memory_order_relaxed };

}  // namespace metal

template <class To, class From> inline To as_type(From from) { return msl::bits_as<To>(from); }

// ---- what the machine does -----------------------------------------------------------------------------------

// Every operation that all lanes of a simdgroup take part in; the runtime counts them by this number.
#define MSL_OPERATIONS(X)                                                                                      \
  X(simdgroup_barrier) X(threadgroup_barrier) X(simdgroup_load) X(simdgroup_store)                             \
  X(simdgroup_multiply_accumulate) X(simdgroup_multiply) X(simd_sum) X(simd_product) X(simd_min) X(simd_max)   \
  X(simd_and) X(simd_or) X(simd_xor) X(simd_prefix_inclusive_sum) X(simd_prefix_exclusive_sum)                 \
  X(simd_broadcast) X(simd_broadcast_first) X(simd_shuffle) X(simd_shuffle_xor) X(simd_shuffle_up)             \
  X(simd_shuffle_down) X(simd_shuffle_and_fill_up) X(simd_shuffle_and_fill_down) X(simd_shuffle_rotate_up)     \
  X(simd_shuffle_rotate_down) X(simd_all) X(simd_any) X(simd_ballot) X(quad_sum) X(quad_min) X(quad_max)       \
  X(quad_broadcast) X(quad_shuffle) X(quad_shuffle_xor) X(quad_shuffle_up) X(quad_shuffle_down)

namespace msl {

constexpr uint row_of(uint lane) { return ((lane >> 2) & 4) | ((lane >> 1) & 3); }
constexpr uint column_of(uint lane) { return ((lane >> 1) & 4) | ((lane & 1) << 1); }
// The lane that holds element (row, column), as its element column & 1.
constexpr uint lane_of(uint row, uint column) {
  return ((row & 4) << 2) | ((column & 4) << 1) | ((row & 3) << 1) | ((column >> 1) & 1);
}

// One threadgroup or grid builtin: the parameter's type decides which of its numbers are wanted.
struct Id {
  uint x, y, z;
  operator uint() const { return x; }
  operator ushort() const { return static_cast<ushort>(x); }
  operator metal::uint2() const { return metal::uint2(x, y); }
  operator metal::uint3() const { return metal::uint3(x, y, z); }
  operator metal::ushort2() const { return metal::ushort2(ushort(x), ushort(y)); }
  operator metal::ushort3() const { return metal::ushort3(ushort(x), ushort(y), ushort(z)); }
};

// A bound buffer, given to a parameter of any pointer or reference type.
struct Pointer {
  void* address;
  template <class T> operator T*() const { return static_cast<T*>(address); }
};
struct Reference {
  void* address;
  template <class T> operator T&() const { return *static_cast<T*>(address); }
};

#if !MSL_CUDA

#define MSL_ENUM(name) op_##name,
enum Operation { MSL_OPERATIONS(MSL_ENUM) operations };

// What the lanes of a simdgroup hand to each other at one operation.
struct Exchange {
  alignas(16) unsigned char slot[32][32];  // by lane
  alignas(16) unsigned char result[256];   // filled by the first lane that goes on
  uint lanes;                              // lanes in this simdgroup
  uint ready;                              // whether result is filled
};

struct Lane {
  uint index, lane, simdgroup;
  Id position;
};
struct Threadgroup {
  Id position, threads, groups;
  uint simdgroups;
};

#endif
}  // namespace msl

#if !MSL_CUDA

extern "C" {
extern msl::Lane* msl_self;
extern msl::Threadgroup msl_group;
msl::Exchange* msl_exchange(uint operation, const void* value, uint bytes, msl_site site);
void msl_barrier(uint operation, uint flags, msl_site site);
void* msl_threadgroup_array(const char* name, ulong bytes, uint line);
void msl_multiply_accumulate(msl::Exchange*);
void msl_atomic(const void* address, uint bytes);
}

#define MSL_NAME(name) #name,
#define MSL_NAME_AND_BLANK(name) #name " "
#define MSL_EXPORT extern "C" __attribute__((visibility("default"), used))
extern "C" {
extern const char* const msl_operation_names[];
const char* const msl_operation_names[] = {MSL_OPERATIONS(MSL_NAME)};
}
MSL_EXPORT const char* msl_operation_list() { return MSL_OPERATIONS(MSL_NAME_AND_BLANK); }

namespace msl {
inline uint lane() { return msl_self->lane; }
inline uint thread_index() { return msl_self->index; }
inline uint threads() { return msl_group.threads.x * msl_group.threads.y * msl_group.threads.z; }
inline Id position_in_threadgroup() { return msl_self->position; }
inline Id group_position() { return msl_group.position; }
inline Id group_threads() { return msl_group.threads; }
inline Id groups() { return msl_group.groups; }

// What the harness compares a bound array with: f float, e half, b bfloat, ? bool, i and u integers, x others.
struct Type {
  char kind;
  uint size;
};
template <class T, bool Integral = is_integral<T>::value> struct type_kind { static constexpr char value = 'x'; };
template <class T> struct type_kind<T, true> { static constexpr char value = T(-1) < T(0) ? 'i' : 'u'; };
template <> struct type_kind<float> { static constexpr char value = 'f'; };
template <> struct type_kind<half> { static constexpr char value = 'e'; };
template <> struct type_kind<bfloat> { static constexpr char value = 'b'; };
template <> struct type_kind<bool, true> { static constexpr char value = '?'; };
template <class T> struct bare { typedef T type; };
template <class T> struct bare<const T> { typedef T type; };
template <class T> struct bare<T*> : bare<T> {};
template <class T> struct bare<T&> : bare<T> {};
template <class... P> inline void describe(void (*)(P...), Type* out) {
  ((*out++ = Type{type_kind<typename bare<P>::type>::value, uint(sizeof(typename bare<P>::type))}), ...);
}

template <class T> inline Exchange* exchange(Operation op, const T& value, msl_site site) {
  static_assert(sizeof(T) <= 32, "a simdgroup operation takes at most 32 bytes of a lane");
  return msl_exchange(op, &value, sizeof(T), site);
}
template <class T> inline T get(const Exchange* e, uint lane) {
  T value;
  __builtin_memcpy(&value, e->slot[lane], sizeof(T));
  return value;
}
// The value of another lane; a lane that is not there leaves one's own value as it is.
template <class T> inline T take(Operation op, T value, long from, msl_site site) {
  const Exchange* e = exchange(op, value, site);
  return from >= 0 && from < long(e->lanes) ? get<T>(e, uint(from)) : value;
}
template <class T, class F> inline T reduce(Operation op, T value, F f, msl_site site) {
  Exchange* e = exchange(op, value, site);
  if (!e->ready) {
    T v[32];
    for (uint i = 0; i < e->lanes; i++) v[i] = get<T>(e, i);
    if (e->lanes == 32) {
      for (uint half_way = 16; half_way; half_way >>= 1)
        for (uint i = 0; i < half_way; i++) v[i] = f(v[i], v[i + half_way]);
    } else {
      for (uint i = 1; i < e->lanes; i++) v[0] = f(v[0], v[i]);
    }
    __builtin_memcpy(e->result, &v[0], sizeof(T));
    e->ready = 1;
  }
  T r;
  __builtin_memcpy(&r, e->result, sizeof(T));
  return r;
}
template <class T, class F> inline T quad_reduce(Operation op, T value, F f, msl_site site) {
  const Exchange* e = exchange(op, value, site);
  const uint first = lane() & ~3u;
  return f(f(get<T>(e, first), get<T>(e, first + 2)), f(get<T>(e, first + 1), get<T>(e, first + 3)));
}
template <class T> inline T prefix(Operation op, T value, bool inclusive, msl_site site) {
  const Exchange* e = exchange(op, value, site);
  const uint end = lane() + (inclusive ? 1 : 0);
  T sum = T(0);
  for (uint i = 0; i < end; i++) sum = i == 0 ? get<T>(e, 0) : T(sum + get<T>(e, i));
  return sum;
}
}  // namespace msl

#define MSL_TAKE(op, value, from) msl::take(msl::op_##op, value, from, site)
#define MSL_REDUCE(op, value, f) msl::reduce(msl::op_##op, value, f, site)
#define MSL_QUAD_REDUCE(op, value, f) msl::quad_reduce(msl::op_##op, value, f, site)
#define MSL_PREFIX(op, value, inclusive) msl::prefix(msl::op_##op, value, inclusive, site)
#define MSL_SITE_ONLY msl_site site = __builtin_source_location()

#else

namespace msl {
inline uint thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline uint threads() { return blockDim.x * blockDim.y * blockDim.z; }
inline uint lane() { return thread_index() & 31; }
inline Id position_in_threadgroup() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
inline Id group_position() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
inline Id group_threads() { return {blockDim.x, blockDim.y, blockDim.z}; }
inline Id groups() { return {gridDim.x, gridDim.y, gridDim.z}; }
// Any type of up to 32 bytes through 32-bit shuffles.
template <class T> inline T shuffle(T value, uint from) {
  constexpr uint words = (sizeof(T) + 3) / 4;
  uint w[words] = {};
  memcpy(w, &value, sizeof(T));
  for (uint i = 0; i < words; i++) w[i] = __shfl_sync(0xffffffffu, w[i], from);
  memcpy(&value, w, sizeof(T));
  return value;
}
template <class T> inline T take(T value, long from) {
  const bool there = from >= 0 && from < 32;
  const T got = shuffle(value, there ? uint(from) : lane());
  return there ? got : value;
}
template <class T, class F> inline T reduce(T value, F f) {
  for (uint half_way = 16; half_way; half_way >>= 1) value = f(value, shuffle(value, lane() ^ half_way));
  return value;
}
template <class T, class F> inline T quad_reduce(T value, F f) {
  value = f(value, shuffle(value, lane() ^ 2));
  return f(value, shuffle(value, lane() ^ 1));
}
template <class T> inline T prefix(T value, bool inclusive) {
  const uint end = lane() + (inclusive ? 1 : 0);
  T sum = T(0);
  for (uint i = 0; i < 32; i++) {
    const T v = shuffle(value, i);
    if (i < end) sum = i == 0 ? v : T(sum + v);
  }
  return sum;
}
}  // namespace msl

#define MSL_TAKE(op, value, from) msl::take(value, from)
#define MSL_REDUCE(op, value, f) msl::reduce(value, f)
#define MSL_QUAD_REDUCE(op, value, f) msl::quad_reduce(value, f)
#define MSL_PREFIX(op, value, inclusive) msl::prefix(value, inclusive)
#define MSL_SITE_ONLY

#endif

namespace msl {
inline Id threads_in_grid() {
  const Id g = groups(), t = group_threads();
  return {g.x * t.x, g.y * t.y, g.z * t.z};
}
inline Id position_in_grid() {
  const Id g = group_position(), t = group_threads(), p = position_in_threadgroup();
  return {g.x * t.x + p.x, g.y * t.y + p.y, g.z * t.z + p.z};
}
}  // namespace msl

namespace metal {

// ---- barriers and simdgroup operations -----------------------------------------------------------------------

#if MSL_CUDA
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
#else
inline void threadgroup_barrier(mem_flags flags MSL_SITE) {
  msl_barrier(msl::op_threadgroup_barrier, uint(flags), site);
}
inline void simdgroup_barrier(mem_flags flags MSL_SITE) { msl_barrier(msl::op_simdgroup_barrier, uint(flags), site); }
#endif

#define MSL_REDUCTION(simd_name, op, expression)                                                               \
  template <class T> inline T simd_name(T value MSL_SITE) {                                                    \
    return op(simd_name, value, [](T a, T b) { return T(expression); });                                       \
  }
MSL_REDUCTION(simd_sum, MSL_REDUCE, a + b)
MSL_REDUCTION(simd_product, MSL_REDUCE, a * b)
MSL_REDUCTION(simd_min, MSL_REDUCE, metal::min(a, b))
MSL_REDUCTION(simd_max, MSL_REDUCE, metal::max(a, b))
MSL_REDUCTION(simd_and, MSL_REDUCE, a & b)
MSL_REDUCTION(simd_or, MSL_REDUCE, a | b)
MSL_REDUCTION(simd_xor, MSL_REDUCE, a ^ b)
MSL_REDUCTION(quad_sum, MSL_QUAD_REDUCE, a + b)
MSL_REDUCTION(quad_min, MSL_QUAD_REDUCE, metal::min(a, b))
MSL_REDUCTION(quad_max, MSL_QUAD_REDUCE, metal::max(a, b))
template <class T> inline T simd_prefix_inclusive_sum(T value MSL_SITE) {
  return MSL_PREFIX(simd_prefix_inclusive_sum, value, true);
}
template <class T> inline T simd_prefix_exclusive_sum(T value MSL_SITE) {
  return MSL_PREFIX(simd_prefix_exclusive_sum, value, false);
}
template <class T> inline T simd_broadcast(T value, ushort from MSL_SITE) {
  return MSL_TAKE(simd_broadcast, value, from);
}
template <class T> inline T simd_broadcast_first(T value MSL_SITE) { return MSL_TAKE(simd_broadcast_first, value, 0); }
template <class T> inline T simd_shuffle(T value, ushort from MSL_SITE) { return MSL_TAKE(simd_shuffle, value, from); }
template <class T> inline T simd_shuffle_xor(T value, ushort mask MSL_SITE) {
  return MSL_TAKE(simd_shuffle_xor, value, long(msl::lane() ^ mask));
}
template <class T> inline T simd_shuffle_up(T value, ushort delta MSL_SITE) {
  return MSL_TAKE(simd_shuffle_up, value, long(msl::lane()) - delta);
}
template <class T> inline T simd_shuffle_down(T value, ushort delta MSL_SITE) {
  return MSL_TAKE(simd_shuffle_down, value, long(msl::lane()) + delta);
}
template <class T> inline T simd_shuffle_rotate_up(T value, ushort delta MSL_SITE) {
  return MSL_TAKE(simd_shuffle_rotate_up, value, long((msl::lane() - delta) & 31));
}
template <class T> inline T simd_shuffle_rotate_down(T value, ushort delta MSL_SITE) {
  return MSL_TAKE(simd_shuffle_rotate_down, value, long((msl::lane() + delta) & 31));
}
template <class T> inline T simd_shuffle_and_fill_up(T value, T fill, ushort delta MSL_SITE) {
  const T got = MSL_TAKE(simd_shuffle_and_fill_up, value, long(msl::lane()) - delta);
  const T other = MSL_TAKE(simd_shuffle_and_fill_up, fill, long((msl::lane() - delta) & 31));
  return msl::lane() >= delta ? got : other;
}
template <class T> inline T simd_shuffle_and_fill_down(T value, T fill, ushort delta MSL_SITE) {
  const T got = MSL_TAKE(simd_shuffle_and_fill_down, value, long(msl::lane()) + delta);
  const T other = MSL_TAKE(simd_shuffle_and_fill_down, fill, long((msl::lane() + delta) & 31));
  return msl::lane() + delta < 32 ? got : other;
}
inline bool simd_all(bool value MSL_SITE) {
  return MSL_REDUCE(simd_all, uint(value), [](uint a, uint b) { return a & b; });
}
inline bool simd_any(bool value MSL_SITE) {
  return MSL_REDUCE(simd_any, uint(value), [](uint a, uint b) { return a | b; });
}
struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  explicit operator ulong() const { return bits; }
};
inline simd_vote simd_ballot(bool value MSL_SITE) {
  return {MSL_REDUCE(simd_ballot, ulong(value) << msl::lane(), [](ulong a, ulong b) { return a | b; })};
}
inline bool simd_is_first() { return msl::lane() == 0; }
template <class T> inline T quad_broadcast(T value, ushort from MSL_SITE) {
  return MSL_TAKE(quad_broadcast, value, long((msl::lane() & ~3u) | (from & 3u)));
}
template <class T> inline T quad_shuffle(T value, ushort from MSL_SITE) {
  return MSL_TAKE(quad_shuffle, value, long((msl::lane() & ~3u) | (from & 3u)));
}
template <class T> inline T quad_shuffle_xor(T value, ushort mask MSL_SITE) {
  return MSL_TAKE(quad_shuffle_xor, value, long(msl::lane() ^ (mask & 3u)));
}
template <class T> inline T quad_shuffle_up(T value, ushort delta MSL_SITE) {
  const uint lane = msl::lane();
  return MSL_TAKE(quad_shuffle_up, value, long((lane & 3u) >= delta ? lane - delta : lane));
}
template <class T> inline T quad_shuffle_down(T value, ushort delta MSL_SITE) {
  const uint lane = msl::lane();
  return MSL_TAKE(quad_shuffle_down, value, long((lane & 3u) + delta < 4 ? lane + delta : lane));
}

// ---- 8x8 matrices over a simdgroup ---------------------------------------------------------------------------

template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup_matrix is 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T value) {  // value on the diagonal
    for (uint i = 0; i < 2; i++)
      elements[i] = msl::row_of(msl::lane()) == msl::column_of(msl::lane()) + i ? value : T(0);
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C> inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(value);
  return m;
}

#if MSL_CUDA
#define MSL_TOGETHER(op) __syncwarp()
#else
#define MSL_TOGETHER(op) msl_exchange(msl::op_##op, &msl_self->lane, 0, site)
#endif
// A lane touches its own two elements only: a store and a load of them by other lanes need a barrier in between.
template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong stride, ulong2 origin,
                           bool transpose MSL_SITE) {
  MSL_TOGETHER(simdgroup_load);
  const ulong row = msl::row_of(msl::lane()), column = msl::column_of(msl::lane());
  for (ulong i = 0; i < 2; i++) {
    const ulong x = transpose ? row : column + i, y = transpose ? column + i : row;
    m.elements[int(i)] = from[(origin.y + y) * stride + origin.x + x];
  }
}
template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong stride, ulong2 origin,
                            bool transpose MSL_SITE) {
  MSL_TOGETHER(simdgroup_store);
  const ulong row = msl::row_of(msl::lane()), column = msl::column_of(msl::lane());
  for (ulong i = 0; i < 2; i++) {
    const ulong x = transpose ? row : column + i, y = transpose ? column + i : row;
    to[(origin.y + y) * stride + origin.x + x] = m.elements[int(i)];
  }
}
template <class T> inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong stride = 8 MSL_SITE) {
  simdgroup_load(m, from, stride, ulong2(0, 0), false MSL_PASS);
}
template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong stride, ulong2 origin MSL_SITE) {
  simdgroup_load(m, from, stride, origin, false MSL_PASS);
}
template <class T> inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong stride = 8 MSL_SITE) {
  simdgroup_store(m, to, stride, ulong2(0, 0), false MSL_PASS);
}
template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong stride, ulong2 origin MSL_SITE) {
  simdgroup_store(m, to, stride, origin, false MSL_PASS);
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c MSL_SITE) {
#if MSL_CUDA
  const uint row = msl::row_of(msl::lane()), column = msl::column_of(msl::lane());
  float sum[2] = {float(c.elements.x), float(c.elements.y)};
  for (uint k = 0; k < 8; k++) {
    const uint from_a = msl::lane_of(row, k), from_b = msl::lane_of(k, column);
    const float a0 = msl::shuffle(float(a.elements.x), from_a), a1 = msl::shuffle(float(a.elements.y), from_a);
    const float b0 = msl::shuffle(float(b.elements.x), from_b), b1 = msl::shuffle(float(b.elements.y), from_b);
    sum[0] = ::fmaf(k & 1 ? a1 : a0, b0, sum[0]);
    sum[1] = ::fmaf(k & 1 ? a1 : a0, b1, sum[1]);
  }
  d.elements = vec<D, 2>(D(sum[0]), D(sum[1]));
#else
  const float operands[6] = {float(a.elements.x), float(a.elements.y), float(b.elements.x),
                             float(b.elements.y), float(c.elements.x), float(c.elements.y)};
  msl::Exchange* e = msl_exchange(msl::op_simdgroup_multiply_accumulate, operands, sizeof operands, site);
  if (!e->ready) msl_multiply_accumulate(e);
  float sum[2];
  __builtin_memcpy(sum, e->result + 8 * msl::lane(), 8);
  d.elements = vec<D, 2>(D(sum[0]), D(sum[1]));
#endif
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f) MSL_PASS);
}

// ---- atomics -------------------------------------------------------------------------------------------------

template <class T> struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
#if MSL_CUDA
#define MSL_ATOMIC(name, function)                                                                             \
  template <class T>                                                                                           \
  inline T name(atomic<T>* a, typename msl::identity<T>::type value, memory_order) {                           \
    return function(&a->value, value);                                                                         \
  }
MSL_ATOMIC(atomic_exchange_explicit, ::atomicExch)
MSL_ATOMIC(atomic_fetch_add_explicit, ::atomicAdd)
MSL_ATOMIC(atomic_fetch_min_explicit, ::atomicMin)
MSL_ATOMIC(atomic_fetch_max_explicit, ::atomicMax)
MSL_ATOMIC(atomic_fetch_or_explicit, ::atomicOr)
MSL_ATOMIC(atomic_fetch_and_explicit, ::atomicAnd)
template <class T> inline T atomic_load_explicit(const atomic<T>* a, memory_order) {
  return *static_cast<const volatile T*>(&a->value);
}
#else
// One lane runs at a time, so plain code is atomic. It stands outside of what the tracer sees, since an atomic
// access is no race; the tracer is told the bytes instead.
#define MSL_ATOMIC(name, expression)                                                                           \
  template <class T>                                                                                           \
  __attribute__((no_sanitize("thread"), noinline)) T name(                                                     \
      atomic<T>* a, typename msl::identity<T>::type value, memory_order) {                                     \
    msl_atomic(&a->value, sizeof(T));                                                                          \
    const T old = a->value;                                                                                    \
    a->value = expression;                                                                                     \
    return old;                                                                                                \
  }
MSL_ATOMIC(atomic_exchange_explicit, value)
MSL_ATOMIC(atomic_fetch_add_explicit, T(old + value))
MSL_ATOMIC(atomic_fetch_min_explicit, value < old ? value : old)
MSL_ATOMIC(atomic_fetch_max_explicit, old < value ? value : old)
MSL_ATOMIC(atomic_fetch_or_explicit, T(old | value))
MSL_ATOMIC(atomic_fetch_and_explicit, T(old & value))
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T atomic_load_explicit(const atomic<T>* a, memory_order) {
  msl_atomic(&a->value, sizeof(T));
  return a->value;
}
#endif
template <class T>
inline void atomic_store_explicit(atomic<T>* a, typename msl::identity<T>::type value, memory_order order) {
  atomic_exchange_explicit(a, value, order);
}

}  // namespace metal
