// The innermost loops of products of matrices: a tile of the result is summed in registers.

#ifndef RESFLAX_OPS_KERNELS_TILE_H_
#define RESFLAX_OPS_KERNELS_TILE_H_

#include <utility>

#include "kernels.h"

namespace {

// Rows of a strip: with two vectors of columns they take 28 of 32 registers, or 12 of 16.
constexpr int kRows = kRegisters == 32 ? 14 : 6;

// sums[r][v]: row r of a strip times V vectors of columns. strip: terms / kLanes times, `step`
// floats apart, [kRows][kLanes]; panel: [terms][V * kLanes].
template <int V>
inline void Multiply(const float* strip, int64_t step, const float* panel, int64_t terms,
                     Vector (&sums)[kRows][V]) {
  for (int64_t t = 0; t < terms; t += kLanes, strip += step)
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane, panel += V * kLanes) {
      Vector b[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) b[v] = Load(panel + v * kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[r][v] += strip[r * kLanes + lane] * b[v];
    }
}

// Adds to y, the first `terms` of C rows `row` floats apart by V vectors, the products of the first
// C columns of a strip with a panel, over n rows of both; or puts them there, where it is `fresh`.
// Their rows, and the panel's vectors, are so many floats apart.
template <int C, int V>
inline void Accumulate(const float* strip, int64_t strip_row, const float* panel, int64_t panel_row,
                       int64_t panel_vector, int64_t n, int64_t terms, float* y, int64_t row,
                       bool fresh) {
  Vector sums[C][V] = {};
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) __builtin_prefetch(y + c * row + v * kLanes, 1);
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; ++i, strip += strip_row, panel += panel_row) {
    Vector b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = Load(panel + v * panel_vector);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[c][v] += strip[c] * b[v];
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
    if (c < terms)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = y + c * row + v * kLanes;
        Store(to, fresh ? sums[c][v] : Load(to) + sums[c][v]);
      }
}

// The lanes of two vectors in turn, from the lane `first` on.
template <int first, int... lane>
inline Vector Interleave(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * kLanes)...);
}

// Row i, lane j of a square matrix becomes row j, lane i by shuffling rows together that are half
// the matrix apart, as often as doubling makes the number of lanes.
inline void Transpose(Vector* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int doubled = 1; doubled < kLanes; doubled *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      Vector a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = Interleave<0>(a, b, lanes);
      next[2 * i + 1] = Interleave<kLanes / 2>(a, b, lanes);
    }
    std::copy(next, next + kLanes, rows);
  }
}

}  // namespace

#endif  // RESFLAX_OPS_KERNELS_TILE_H_
