// Sums of exponentials for a set of rows, while tiles of columns go by; for *_simd.cpp alone.
//
// With base-2 logits y and the unit row k of a column, a row keeps
//
//     peak      the largest y so far
//     sum       the sum of 2^(y - peak) over the columns
//     du        the sum of 2^(y - peak) k, where it is wanted
//
// Logits are stored transposed, [columns, rows]. A vector then holds several rows, every sum stays
// in its lane, and a tile of columns is used as its rows lie, without panels.
#pragma once

#include "parallel.h"
#include "softmax.h"
#include "tile.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// How many rows a group has. They and their sums stay in the L2 cache while columns go by.
constexpr int64_t kGroup = 4 * kMaxBlock;
// Threads share the work in tasks of one group of rows and one chunk of columns. Every chunk has
// sums of its own, and how many chunks there are does not depend on the number of threads: so
// neither do the results.
constexpr int64_t kTasks = 32;

constexpr int64_t tiles_of(int64_t columns) { return (columns + kMaxBlock - 1) / kMaxBlock; }

template <class T>
struct RowSums {
  int64_t N;       // rows
  int64_t padded;  // rows, in whole blocks
  int64_t groups;  // of rows
  int64_t tiles;   // of columns
  int64_t chunks;  // of tiles
  Packed<T> u;     // [padded, D] the rows
  float* du;       // [chunks, padded, u.width], null where it is not wanted
  double* sum;     // [chunks, padded]
  float* peak;     // [chunks, padded]
};

template <class T>
RowSums<T> carve_sums(Carver& carver, int64_t N, int64_t D, int64_t tiles, bool vectors) {
  RowSums<T> s;
  s.N = N;
  s.padded = round_up(N, kMaxBlock);
  s.groups = (N + kGroup - 1) / kGroup;
  s.tiles = tiles;
  s.chunks = smaller(tiles, (kTasks + s.groups - 1) / s.groups);
  s.u = carve_rows<T>(carver, s.padded, D);
  s.du = vectors ? carver.take<float>(s.chunks * s.padded * s.u.width) : nullptr;
  s.sum = carver.take<double>(s.chunks * s.padded);
  s.peak = carver.take<float>(s.chunks * s.padded);
  return s;
}

// Packs the part of the rows that a thread of the team works on.
template <class T>
Range pack_share(const RowSums<T>& s, const Rows& source, const Team& team, int rank) {
  const Range rows = share(s.padded, team, rank, kMaxBlock);
  pack_rows(s.u, rows.begin, rows.end, source, rows.begin, s.N);
  pack_panels(s.u, rows.begin, rows.end);
  return rows;
}

// Sets a chunk's sums of the rows from `begin` to `end` to those of no columns.
template <class T>
void clear(const RowSums<T>& s, int64_t chunk, int64_t begin, int64_t end) {
  const int64_t first = chunk * s.padded + begin, count = round_up(end - begin, kMaxBlock);
  for (int64_t i = first; i < first + count; ++i) {
    s.sum[i] = 0;
    s.peak[i] = -INFINITY;
  }
  if (s.du) memset(s.du + first * s.u.width, 0, count * s.u.width * sizeof *s.du);
}

// Adds a tile of `keys` columns, `k`, to a chunk's sums of the block of rows from I on. In the
// logits y [keys, kMaxBlock], exclude(y) sets to -inf what must not be added.
template <class T, class Exclude>
void add_tile(const RowSums<T>& s,
              int64_t chunk,
              int64_t I,
              const Packed<T>& k,
              int64_t keys,
              float temperature,
              Exclude exclude) {
  alignas(64) float y[kMaxBlock * kMaxBlock];
  Weights<T> w;
  const int64_t anchors = smaller(s.N - I, kMaxBlock);
  const int64_t rows = round_up(keys, kRows), columns = round_up(anchors, kCols);
  store_similarities(k, 0, keys, s.u, I, anchors, float(kLog2e / temperature), y, kMaxBlock);
  // rows of y that are no column
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

// Adds all tiles to the sums of all rows. Every thread of the team calls this, and they take tasks
// until none is left. pack(t) makes tile t ready; add(chunk, I, t) adds it to the rows from I on.
template <class T, class Pack, class Add>
void add_tiles(const RowSums<T>& s, int* next, Pack pack, Add add) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= s.groups * s.chunks) return;
    const int64_t chunk = task / s.groups, begin = task % s.groups * kGroup;
    const int64_t end = smaller(begin + kGroup, s.N);
    clear(s, chunk, begin, end);
    for (int64_t t = chunk * s.tiles / s.chunks; t < (chunk + 1) * s.tiles / s.chunks; ++t) {
      pack(t);
      for (int64_t I = begin; I < end; I += kMaxBlock) add(chunk, I, t);
    }
  }
}

// The logarithm to base 2 of row i's sum over all columns.
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
