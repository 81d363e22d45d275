// Top-k in register tiles whose numbers are compared with a threshold of their row and forgotten.
//
// All threads pack the keys together, a tile at a time, while they look for candidates in the tile
// before: each owns some anchors and meets the columns in their order. A row's threshold is the
// k-th largest number so far, or was: candidates gather in a buffer, and when it is full the k best
// stay and the threshold rises. Most vectors then cost one comparison.
//
// A number depends on its row and its column alone, and of equal numbers the one in the lower
// column wins: neither threads nor tiles show in the result.
#include <math.h>

#include "parallel.h"
#include "tile.h"
#include "topk_similarity.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Numbers of a tile of keys, which stays in the L2 cache.
constexpr int64_t kTile = 1 << 17;
// The least room beyond k.
constexpr int64_t kMinRoom = 64;

template <class T>
struct Scratch {
  int64_t padded;
  int64_t tile;       // keys of a tile
  int64_t room;       // of a buffer
  Packed<T> anchors;  // [padded, D]
  Packed<T> keys[2];  // [tile, D] one that is packed and one that is searched
  uint64_t* best;     // [N, room] ranks of the candidates
  int64_t* count;     // [N] how many there are
  float* threshold;   // [padded] what a candidate has to exceed
  int64_t bytes;
};

template <class T>
Scratch<T> carve(const TopkSimilarityArgs& args, unsigned char* base) {
  Scratch<T> s;
  s.padded = round_up(args.N, kRows);
  const int64_t tile = kTile / round_up(args.D, kCols) / kCols * kCols;
  s.tile = smaller(tile > kMaxBlock ? tile : kMaxBlock, round_up(args.M, kCols));
  s.room = args.k + (args.k > kMinRoom ? args.k : kMinRoom);
  Carver carver{base};
  s.anchors = carve_rows<T>(carver, s.padded, args.D);
  for (Packed<T>& keys : s.keys) keys = carve_rows<T>(carver, s.tile, args.D);
  s.best = carver.take<uint64_t>(args.N * s.room);
  s.count = carver.take<int64_t>(args.N);
  s.threshold = carver.take<float>(s.padded);
  s.bytes = carver.bytes;
  return s;
}

// A number that is larger for a better candidate: in the order of the values, with NaN above all,
// and then of the lower column. No value is -0.
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

// Keeps the k best candidates of a row.
template <class T>
void trim(const Scratch<T>& s, int64_t k, int64_t row) {
  uint64_t* best = s.best + row * s.room;
  keep_largest(best, s.count[row], k);
  s.count[row] = k;
  const float last = value_of(best[k - 1]);
  // NaN is below nothing
  s.threshold[row] = last == last ? last : INFINITY;
}

bool is_excluded(const TopkSimilarityArgs& args, int64_t row, int64_t column) {
  for (int64_t e = 0; e < args.E; ++e) {
    if (args.exclude[row * args.E + e] == column) return true;
  }
  return false;
}

// Takes the candidates among a row's numbers in the columns of a register tile.
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

// Searches a tile of keys, whose first is number `column`, for candidates of some rows.
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
      // not what is above it, so that NaN is among them
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
void run(const TopkSimilarityArgs& args) {
  const auto s = carve<T>(args, args.workspace);
  parallel(args.threads, [&](Team& team, int rank) {
    const Range tiles = share(s.padded / kRows, team, rank);
    const int64_t begin = tiles.begin * kRows, end = tiles.end * kRows;
    const int64_t rows_end = smaller(end, args.N);
    pack_rows(s.anchors, begin, end, args.anchor, begin, args.N);
    for (int64_t i = begin; i < end; ++i) s.threshold[i] = i < args.N ? -INFINITY : INFINITY;
    for (int64_t i = begin; i < rows_end; ++i) s.count[i] = 0;

    const Range panels = share(s.tile / kCols, team, rank);
    auto pack = [&](int64_t column) {
      const Packed<T>& keys = s.keys[column / s.tile % 2];
      const int64_t first = panels.begin * kCols, last = panels.end * kCols;
      pack_rows(keys, first, last, args.keys, column + first, args.M);
      pack_panels(keys, first, last);
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
}

}  // namespace

int64_t topk_similarity_workspace(const TopkSimilarityArgs& args) {
  return stays_bf16(args.anchor.dtype) ? carve<Bf16>(args, nullptr).bytes
                                       : carve<Fp32>(args, nullptr).bytes;
}

void topk_similarity(const TopkSimilarityArgs& args) {
  stays_bf16(args.anchor.dtype) ? run<Bf16>(args) : run<Fp32>(args);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
