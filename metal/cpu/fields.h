// The order of codes in a byte: "field" j of byte B is code (8 / bits) * B + j. Static: see avx512_common.h.
#pragma once

#include <immintrin.h>

namespace mlxq {

// 32 bytes in the order of k, regrouped by field: all of field 0, then field 1 ...
template <int BITS>
static inline __m256i by_field(__m256i bytes) {
  if constexpr (BITS == 8) {
    return bytes;
  } else if constexpr (BITS == 4) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, order), 0b11011000);
  } else {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, order),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
}

}  // namespace mlxq
