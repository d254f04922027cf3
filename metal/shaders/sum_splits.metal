// y[i] = sum_s partials[s, i]: what qmm_split, qmm_n_split and qvm_split left, added in the order of s.
//
//   buffer 0  partials  float  (splits, count)
//   buffer 1  y         T      (count,)
//   buffer 2  count     int
//   buffer 3  splits    int
//
// One thread an element, 256 a threadgroup; grid: ceil(count / 256) threadgroups. float32 sums. Limited by memory: it
// reads splits * 4 bytes an element. Not measured on Apple hardware.
#pragma once

#include "tile.h"

template <typename T>
[[kernel]] void sum_splits(const device float* partials [[buffer(0)]], device T* y [[buffer(1)]],
                           constant int& count [[buffer(2)]], constant int& splits [[buffer(3)]],
                           uint3 position [[thread_position_in_grid]]) {
  const int i = static_cast<int>(position.x);
  if (i >= count) {
    return;
  }
  float sum = 0.0f;
  for (int s = 0; s < splits; s++) {
    sum += partials[static_cast<size_t>(s) * count + i];
  }
  put(y, static_cast<size_t>(i), sum);
}
