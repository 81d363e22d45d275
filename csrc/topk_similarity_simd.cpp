// The top k of every row, in register tiles whose numbers are compared with a threshold of their
// row and then forgotten.
//
// Each thread owns some anchors and meets the keys in their order, a tile at a time. While the
// threads search one tile for candidates, they pack the next one together. A row's candidates
// gather in a buffer. When it is full, the k best of them stay, and the k-th becomes the row's
// threshold. So most vectors of numbers cost one comparison.
//
// A number depends on its row and its column alone, and of equal numbers the one in the lower
// column wins. So the result depends neither on the number of threads nor on the size of the tiles.
#include <math.h>

#include "parallel.h"
#include "tile.h"
#include "topk_similarity.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// About how many numbers a tile of keys has, which has to stay in the L2 cache.
constexpr int64_t kTile = 1 << 17;
// A buffer has room for k candidates and for at least this many more.
constexpr int64_t kMinRoom = 64;

template <class T>
struct Scratch {
  int64_t padded;     // anchors, in whole register tiles
  int64_t tile;       // keys of a tile
  int64_t room;       // candidates that a buffer can hold
  Packed<T> anchors;  // [padded, D]
  Packed<T> keys[2];  // [tile, D] one is packed while the other is searched
  uint64_t* best;     // [N, room] the candidates' ranks
  int64_t* count;     // [N] how many candidates there are
  float* threshold;   // [padded] a candidate has to exceed it
  int64_t bytes;
};

template <class T>
Scratch<T> carve(const TopkSimilarityArgs& args) {
  Scratch<T> s;
  s.padded = round_up(args.N, kRows);
  const int64_t tile = kTile / round_up(args.D, kCols) / kCols * kCols;
  s.tile = smaller(tile > kMaxBlock ? tile : kMaxBlock, round_up(args.M, kCols));
  s.room = args.k + (args.k > kMinRoom ? args.k : kMinRoom);
  Carver carver{args.workspace};
  s.anchors = carve_rows<T>(carver, s.padded, args.D);
  for (Packed<T>& keys : s.keys) keys = carve_rows<T>(carver, s.tile, args.D);
  s.best = carver.take<uint64_t>(args.N * s.room);
  s.count = carver.take<int64_t>(args.N);
  s.threshold = carver.take<float>(s.padded);
  s.bytes = carver.bytes;
  return s;
}

// A candidate as one integer that is larger for a better candidate. Candidates are in the order of
// their values, NaN above all others, and of equal values the lower column is better. No value is
// -0.
uint64_t rank_of(float value, int64_t column) {
  const uint32_t bits = uint32_t(value == value ? to_bits(value) : 0x7fffffff);
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | uint32_t(~column);
}

float value_of(uint64_t rank) {
  const uint32_t ordered = uint32_t(rank >> 32);
  return from_bits(int32_t(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered));
}

int64_t column_of(uint64_t rank) { return uint32_t(~rank); }

// Keeps the k best candidates of a row, and raises its threshold.
template <class T>
void trim(const Scratch<T>& s, int64_t k, int64_t row) {
  uint64_t* best = s.best + row * s.room;
  keep_largest(best, s.count[row], k);
  s.count[row] = k;
  const float last = value_of(best[k - 1]);
  // nothing is better than NaN
  s.threshold[row] = last == last ? last : INFINITY;
}

bool is_excluded(const TopkSimilarityArgs& args, int64_t row, int64_t column) {
  for (int64_t e = 0; e < args.E; ++e) {
    if (args.exclude[row * args.E + e] == column) return true;
  }
  return false;
}

// Takes the candidates among a row's numbers y, whose first column is `column`.
template <class T>
void take(const Scratch<T>& s,
          const TopkSimilarityArgs& args,
          int64_t row,
          int64_t column,
          const Vec (&y)[kVecs]) {
  if (row >= args.N) return;
  float values[kCols];
  for (int v = 0; v < kVecs; ++v) store(values + v * kWidth, y[v]);
  for (int c = 0; c < kCols; ++c, ++column) {
    if (values[c] <= s.threshold[row] || column >= args.M || is_excluded(args, row, column)) {
      continue;
    }
    s.best[row * s.room + s.count[row]++] = rank_of(values[c], column);
    if (s.count[row] == s.room) trim(s, args.k, row);
  }
}

// Searches a tile of keys, the first of which is number `column`, for candidates of the rows from
// `begin` to `end`.
template <class T>
void search(const Scratch<T>& s,
            const TopkSimilarityArgs& args,
            const Packed<T>& keys,
            int64_t column,
            int64_t begin,
            int64_t end) {
  const int64_t cols = smaller(s.tile, args.M - column);
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = begin; i < end; i += kRows) {
      Vec y[kRows][kVecs];
      similarities(s.anchors, i, keys, j, 1.f, 0.f, y);
      // all but those at or below the threshold, so that NaN is a candidate
      auto candidates = [&](int m) {
        IVec found = {};
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) found |= ~(y[m][v] <= splat(s.threshold[i + m]));
        return found;
      };
      IVec found = {};
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) found |= candidates(m);
      if (!any(found)) continue;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        if (any(candidates(m))) take(s, args, i + m, column + j, y[m]);
      }
    }
  }
}

template <class T>
int64_t run(const TopkSimilarityArgs& args) {
  const auto s = carve<T>(args);
  if (!args.workspace) return s.bytes;
  parallel(args.threads, [&](Team& team, int rank) {
    const auto [begin, end] = share(s.padded, team, rank, kRows);
    const int64_t rows_end = smaller(end, args.N);
    pack_rows(s.anchors, begin, end, args.anchor, begin, args.N);
    for (int64_t i = begin; i < end; ++i) s.threshold[i] = i < args.N ? -INFINITY : INFINITY;
    for (int64_t i = begin; i < rows_end; ++i) s.count[i] = 0;

    const Range part = share(s.tile, team, rank, kCols);
    auto pack = [&](int64_t column) {
      const Packed<T>& keys = s.keys[column / s.tile % 2];
      pack_rows(keys, part.begin, part.end, args.keys, column + part.begin, args.M);
      pack_panels(keys, part.begin, part.end);
    };
    pack(0);
    for (int64_t column = 0; column < args.M; column += s.tile) {
      team.barrier();
      if (column + s.tile < args.M) pack(column + s.tile);
      const Packed<T>& keys = s.keys[column / s.tile % 2];
      for (int64_t i = begin; i < end; i += kMaxBlock) {
        search(s, args, keys, column, i, smaller(i + kMaxBlock, end));
      }
    }
    for (int64_t i = begin; i < rows_end; ++i) {
      trim(s, args.k, i);
      uint64_t* best = s.best + i * s.room;
      sort_descending(best, args.k);
      for (int64_t r = 0; r < args.k; ++r) {
        args.values[i * args.k + r] = value_of(best[r]);
        args.indices[i * args.k + r] = column_of(best[r]);
      }
    }
  });
  return 0;
}

}  // namespace

int64_t topk_similarity(const TopkSimilarityArgs& args) {
  return stays_bf16(args.anchor.dtype) ? run<Bf16>(args) : run<Fp32>(args);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
