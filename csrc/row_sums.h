// Sums of exponentials over columns that go by, for rows that stay; for *_simd.cpp alone.
//
// For every row its largest logit so far, m, the sum of 2^(y - m) over the columns, and where it is
// wanted the sum of 2^(y - m) k, with k the unit row of a column. What is summed over columns is
// summed down the lanes, and a tile of columns needs no other form than its rows.
#pragma once

#include "parallel.h"
#include "softmax.h"
#include "tile.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Rows and their sums that stay in the L2 cache while columns go by.
constexpr int64_t kGroup = 4 * kMaxBlock;
// Chunks of columns are for threads to share. Their number does not depend on that of the threads,
// and so neither does a result.
constexpr int64_t kTasks = 32;

template <class T>
struct RowSums {
  int64_t padded, chunks;
  Packed<T> u;  // [padded, D] of the rows
  float* du;    // [chunks, padded, u.width] sum of 2^(y - peak) k, null where it is not wanted
  double* sum;  // [chunks, padded] sum of 2^(y - peak)
  float* peak;  // [chunks, padded]
};

template <class T>
RowSums<T> carve_sums(Carver& carver, int64_t N, int64_t D, int64_t chunks, bool vectors) {
  RowSums<T> s;
  s.padded = round_up(N, kMaxBlock);
  s.chunks = chunks;
  s.u = carve_rows<T>(carver, s.padded, D);
  s.du = vectors ? carver.take<float>(chunks * s.padded * s.u.width) : nullptr;
  s.sum = carver.take<double>(chunks * s.padded);
  s.peak = carver.take<float>(chunks * s.padded);
  return s;
}

// The tiles of a chunk, of all.
template <class T>
Range chunk_of(int64_t tiles, const RowSums<T>& s, int64_t chunk) {
  return {chunk * tiles / s.chunks, (chunk + 1) * tiles / s.chunks};
}

// Begins a chunk's sums of the rows from `begin` to `end`.
template <class T>
void clear(const RowSums<T>& s, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t first = chunk * s.padded + begin, count = round_up(end - begin, kMaxBlock);
  for (int64_t i = first; i < first + count; ++i) {
    s.sum[i] = 0;
    s.peak[i] = -INFINITY;
  }
  if (s.du) memset(s.du + first * s.u.width, 0, count * s.u.width * sizeof *s.du);
}

// Base-2 logits of a tile of columns, the rows of `y`, against a block of rows from I on.
template <class T>
void logits(const Packed<T>& k,
            int64_t keys,
            const Packed<T>& u,
            int64_t I,
            int64_t anchors,
            float temperature,
            float* y) {
  const float scale = float(kLog2e / temperature);
  for (int64_t i = 0; i < round_up(anchors, kCols); i += kCols) {
    for (int64_t j = 0; j < round_up(keys, kRows); j += kRows) {
      Vec tile[kRows][kVecs];
      similarities(k, j, u, I + i, scale, 0.f, tile);
      store_tile(tile, y + j * kMaxBlock + i, kMaxBlock);
    }
  }
}

// Adds a tile of columns to the sums of a block of rows from I on, but for what `exclude` sets to
// -inf in their logits, [columns, kMaxBlock].
template <class T, class Exclude>
void add_tile(const RowSums<T>& s,
              int64_t chunk,
              int64_t I,
              int64_t anchors,
              const Packed<T>& k,
              int64_t keys,
              float temperature,
              Exclude exclude) {
  alignas(64) float y[kMaxBlock * kMaxBlock];
  Weights<T> w;
  const int64_t rows = round_up(keys, kRows), columns = round_up(anchors, kCols);
  logits(k, keys, s.u, I, anchors, temperature, y);
  // what lies behind the last column
  for (int64_t at = keys * kMaxBlock; at < rows * kMaxBlock; ++at) y[at] = -INFINITY;
  exclude(y);
  const Vec lowest = splat(-INFINITY);
  for (int64_t i = 0; i < columns; i += kWidth) {
    const int64_t first = chunk * s.padded + I + i;
    const Vec before = load(s.peak + first);
    Vec peak = before;
    for (int64_t j = 0; j < rows; ++j) peak = maximum(peak, load(y + j * kMaxBlock + i));
    if (any(peak != before)) {
      store(s.peak + first, peak);
      for (int l = 0; l < kWidth; ++l) {
        if (peak[l] == before[l]) continue;
        const double shrink = ::exp2(double(before[l]) - peak[l]);
        s.sum[first + l] *= shrink;
        float* du = s.du + (first + l) * s.u.width;
        for (int64_t d = 0; d < s.u.width && s.du; ++d) du[d] *= float(shrink);
      }
    }
    const Vec from = peak == lowest ? Vec{} : peak;  // -inf - -inf would be NaN
    Vec sum = {};
    for (int64_t j = 0; j < rows; j += 2) {
      Vec upper = exp2<true>(load(y + j * kMaxBlock + i) - from);
      Vec lower = exp2<true>(load(y + (j + 1) * kMaxBlock + i) - from);
      sum += upper + lower;
      if (T::kPack > 1) {
        upper *= k.factor[j];
        lower *= k.factor[j + 1];
      }
      w.put_rows(j, i, upper, lower);
    }
    for (int l = 0; l < kWidth; ++l) s.sum[first + l] += double(sum[l]);
  }
  if (!s.du) return;
  accumulate<T, true>(w.over_rows(), kMaxBlock, k.pairs, k.width, cells<T>(keys),
                      s.du + (chunk * s.padded + I) * s.u.width, s.u.width, anchors,
                      round_up(s.u.D, kCols));
}

// Of row i over all columns, the logarithm to base 2.
template <class T>
double log_sum(const RowSums<T>& s, int64_t i) {
  float peak = -INFINITY;
  for (int64_t c = 0; c < s.chunks; ++c) {
    const float other = s.peak[c * s.padded + i];
    peak = peak < other ? other : peak;
  }
  const double from = peak == -INFINITY ? 0. : peak;
  double sum = 0;
  for (int64_t c = 0; c < s.chunks; ++c) {
    sum += s.sum[c * s.padded + i] * ::exp2(s.peak[c * s.padded + i] - from);
  }
  return log2(sum) + from;
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
