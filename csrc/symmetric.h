// NT-Xent's sums and gradient in tiles of the symmetric similarity matrix; for *_simd.cpp alone.
//
// With unit rows u, s_ij = u_i.u_j / T, E_ij = exp(s_ij - 1/T) over the negatives of row i, p the
// positive's row, c how often a negative counts, neg_i = c sum_j E_ij, pos_i = E_ip:
//   loss_i = softplus(log neg_i - log pos_i),  q_i = neg_i / (neg_i + pos_i)
//   d loss / d u_i = 1/(nT) [ sum_j E_ij (r_i + r_j) u_j - q u_p ],  r = 1/(neg + pos)
// with q = q_i + q_p where p is another row. InfoNCE is the same with anchors and keys for rows and
// pairs of one of each alone; a row without a loss has r = q = 0. A tile above the diagonal serves
// its rows and its columns: n^2 D FLOPs for the loss, 3 n^2 D more for the gradient. Below T =
// 0.023 exp(-2/T) leaves fp32's range: row maxima instead of the shift.
//
// Two tiles that share no block of rows may run side by side. Tiles are ordered as the rounds of a
// tournament and each waits only for the earlier ones of its own two blocks, so every sum has one
// order, whatever the number of threads.
#pragma once

#include "parallel.h"
#include "softmax.h"
#include "tile.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

constexpr double kMinShift = 0.023;

// A smaller block gives the threads more tiles to share where rows are few.
inline int block_rows(int64_t n) {
  return n < 1024 && kMaxBlock / 2 % kCols == 0 && kMaxBlock / 2 % kRows == 0 ? kMaxBlock / 2
                                                                              : kMaxBlock;
}

// Which pairs are negatives, and which rows have a loss.
enum class Pairs {
  all,        // every other row but the positive
  twice,      // the same, each counted twice
  both_ways,  // rows of `first` with rows of `second`
  one_way,    // the same, but rows of `second` have no loss
};

// The rows of `first` above those of `second`, if there are two views.
struct SymmetricArgs {
  Rows first;   // [N, D]
  Rows second;  // [n - N, D]
  int64_t N;
  int64_t n;
  int64_t D;
  int64_t positive;  // distance of a row's positive: N, or 0 for itself
  Pairs pairs;
  float temperature;
  int threads;
  float* loss;     // [1], null where it is not wanted
  float* dfirst;   // [N, D], null where it is not wanted
  float* dsecond;  // [n - N, D], null where it is not wanted
  unsigned char* workspace;
};

template <class T>
struct Scratch {
  int64_t n, D, offset, padded, blocks;
  int block;
  bool crossed;  // an anchor's negatives are keys alone, and the other way round
  Packed<T> u;   // [padded, D]
  float* du;     // [padded, u.width]
  double* neg;   // [padded] sum of E, or of 2^(y - peak)
  double* loss;  // [padded]
  float* peak;   // [padded] row maximum of y over the negatives, online form
  float* r;      // [padded] 1 / (neg + pos); online form: its log2
  float* q;      // [padded]
  int* next;     // [2] the next tile of a pass
  int* done;     // [2, blocks] tiles finished of a block, in each pass
  int64_t bytes;
};

template <class T>
Scratch<T> carve(int64_t n, int64_t D, bool grad, unsigned char* base) {
  Scratch<T> s;
  s.n = n;
  s.D = D;
  s.block = block_rows(n);
  s.blocks = (n + s.block - 1) / s.block;
  s.padded = s.blocks * s.block;
  Carver carver{base};
  s.u = carve_rows<T>(carver, s.padded, D);
  s.du = carver.take<float>(grad ? s.padded * s.u.width : 0);
  s.neg = carver.take<double>(s.padded);
  s.loss = carver.take<double>(s.padded);
  s.peak = carver.take<float>(s.padded);
  s.r = carver.take<float>(s.padded);
  s.q = carver.take<float>(s.padded);
  s.next = carver.take<int>(2);
  s.done = carver.take<int>(2 * s.blocks);
  s.bytes = carver.bytes;
  return s;
}

template <class T>
int64_t positive_of(const Scratch<T>& s, int64_t row) {
  return row < s.offset ? row + s.offset : row - s.offset;
}

// All ones where (row, column) is a negative pair inside the matrix.
template <class T>
CLAE_FAST_INLINE IVec negatives(const Scratch<T>& s, int64_t i, int64_t j) {
  IVec column = {};
  for (int l = 0; l < kWidth; ++l) column[l] = int32_t(j + l);
  const int32_t n = int32_t(s.n), row = int32_t(i), positive = int32_t(positive_of(s, i));
  const IVec inside = (column < n) & (row < n ? ~IVec{} : IVec{});
  const IVec others = inside & (column != row) & (column != positive);
  if (!s.crossed) return others;
  const IVec is_key = column >= int32_t(s.offset);
  return others & (row < s.offset ? is_key : ~is_key);
}

// Are all of the rows from i and all of the columns from j on the same side of `offset`, or all on
// different sides?
template <class T>
bool on_sides(const Scratch<T>& s, int64_t i, int64_t rows, int64_t j, int64_t cols, bool same) {
  const bool above = i + rows <= s.offset, below = i >= s.offset;
  const bool left = j + cols <= s.offset, right = j >= s.offset;
  return same ? (above && left) || (below && right) : (above && right) || (below && left);
}

// Does the register tile at (i, j) hold anything but negatives?
template <class T>
bool is_special(const Scratch<T>& s, int64_t i, int64_t j) {
  auto crosses = [&](int64_t shift) { return j < i + shift + kRows && i + shift < j + kCols; };
  return crosses(0) || crosses(s.offset) || crosses(-s.offset) || i + kRows > s.n ||
         j + kCols > s.n || (s.crossed && !on_sides(s, i, kRows, j, kCols, false));
}

// Sets a register tile to 0 at all but negative pairs.
template <class T>
CLAE_FAST_INLINE void keep_negatives(const Scratch<T>& s,
                                     int64_t i,
                                     int64_t j,
                                     Vec (&y)[kRows][kVecs]) {
  if (!is_special(s, i, j)) return;
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) {
      y[m][v] = (Vec)((IVec)y[m][v] & negatives(s, i + m, j + v * kWidth));
    }
  }
}

// log2(e^(s - 1/T)) of a register tile; the online form leaves out the shift.
template <class T, bool online>
CLAE_FAST_INLINE void logits(const Scratch<T>& s,
                             float scale,
                             int64_t i,
                             int64_t j,
                             Vec (&y)[kRows][kVecs]) {
  similarities(s.u, i, s.u, j, scale, online ? 0.f : -scale, y);
}

// Adds a tile's E to its rows' sums and, off the diagonal, to its columns'.
template <class T>
void sum_tile_fixed(const Scratch<T>& s, float scale, int64_t I, int64_t J) {
  Vec row_sum[kMaxBlock] = {};
  const int64_t rows = smaller(s.n - I, s.block);
  const int64_t cols = smaller(s.n - J, s.block);
  for (int64_t j = 0; j < cols; j += kCols) {
    Vec col_sum[kVecs] = {};
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<T, false>(s, scale, I + i, J + j, y);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) y[m][v] = exp2<false>(y[m][v]);
      }
      keep_negatives(s, I + i, J + j, y);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          row_sum[i + m] += y[m][v];
          col_sum[v] += y[m][v];
        }
      }
    }
    if (I != J) {
      for (int v = 0; v < kVecs; ++v) {
        for (int l = 0; l < kWidth; ++l) s.neg[J + j + v * kWidth + l] += double(col_sum[v][l]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) s.neg[I + i] += double(horizontal_sum(row_sum[i]));
}

// The same with a running maximum of every row and column.
template <class T>
void sum_tile_online(const Scratch<T>& s, float scale, int64_t I, int64_t J) {
  alignas(64) float tile[kMaxBlock * kMaxBlock];
  const float lowest = -INFINITY;
  const int64_t rows = smaller(s.n - I, s.block);
  const int64_t cols = round_up(smaller(s.n - J, s.block), kCols);
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<T, true>(s, scale, I + i, J + j, y);
      for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kVecs; ++v) {
          const IVec keep = negatives(s, I + i + m, J + j + v * kWidth);
          store(tile + (i + m) * kMaxBlock + j + v * kWidth, keep ? y[m][v] : splat(lowest));
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = tile + i * kMaxBlock;
    Vec top = splat(lowest);
    for (int64_t j = 0; j < cols; j += kWidth) top = maximum(top, load(row + j));
    float peak = s.peak[I + i];
    for (int l = 0; l < kWidth; ++l) peak = peak < top[l] ? top[l] : peak;
    if (peak == lowest) continue;  // no negative yet: -inf - -inf would be NaN
    Vec sum = {};
    for (int64_t j = 0; j < cols; j += kWidth) sum += exp2<true>(load(row + j) - peak);
    s.neg[I + i] = s.neg[I + i] * ::exp2(double(s.peak[I + i]) - peak) + horizontal_sum(sum);
    s.peak[I + i] = peak;
  }
  if (I == J) return;
  for (int64_t j = 0; j < cols; j += kWidth) {
    Vec top = load(s.peak + J + j);
    for (int64_t i = 0; i < rows; ++i) top = maximum(top, load(tile + i * kMaxBlock + j));
    const Vec from = top == splat(lowest) ? Vec{} : top;
    Vec sum = {};
    for (int64_t i = 0; i < rows; ++i) sum += exp2<true>(load(tile + i * kMaxBlock + j) - from);
    for (int l = 0; l < kWidth; ++l) {
      double& neg = s.neg[J + j + l];
      neg = neg * ::exp2(double(s.peak[J + j + l]) - from[l]) + double(sum[l]);
    }
    store(s.peak + J + j, top);
  }
}

// Does any row of the block at I have a gradient that is wanted?
template <class T>
bool is_wanted(const Scratch<T>& s, const SymmetricArgs& args, int64_t I) {
  return (I < args.N && args.dfirst) || (I + s.block > args.N && args.dsecond);
}

// Adds W U to the tile's rows of dU and, off the diagonal, W^T U to its columns' rows. Where rows
// have factors f, W_ij f_i f_j takes W's place and dU_i / f_i comes out.
template <class T, bool online>
void grad_tile(const Scratch<T>& s, const SymmetricArgs& args, float scale, int64_t I, int64_t J) {
  Weights<T> w;
  const int64_t rows = smaller(s.n - I, s.block);
  const int64_t cols = smaller(s.n - J, s.block);
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<T, online>(s, scale, I + i, J + j, y);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vec r_row = splat(s.r[I + i + m]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const Vec r_col = load(s.r + J + j + v * kWidth);
          if (online) {
            y[m][v] = exp2<true>(y[m][v] + r_row) + exp2<true>(y[m][v] + r_col);
          } else {
            y[m][v] = exp2<false>(y[m][v]) * (r_row + r_col);
          }
          if (T::kPack > 1) {
            y[m][v] *= s.u.factor[I + i + m] * load(s.u.factor + J + j + v * kWidth);
          }
        }
      }
      keep_negatives(s, I + i, J + j, y);
      w.put(i, j, y);
    }
  }
  const Packed<T>& u = s.u;
  const int64_t width = round_up(s.D, kCols);
  if (is_wanted(s, args, I)) {
    accumulate<T, false>(w.over_columns, w.kLd, u.pairs + J / T::kPack * u.width, u.width,
                         cells<T>(cols), s.du + I * u.width, u.width, rows, width);
  }
  if (I == J || !is_wanted(s, args, J)) return;
  accumulate<T, true>(w.over_rows(), kMaxBlock, u.pairs + I / T::kPack * u.width, u.width,
                      cells<T>(rows), s.du + J * u.width, u.width, cols, width);
}

// Takes tiles in the tournament's order until none is left.
template <class T, class Tile>
void play(const Scratch<T>& s, int pass, Tile tile) {
  const int64_t players = s.blocks + s.blocks % 2;  // an odd one out plays nobody
  const int64_t matches = players / 2;
  const int64_t total = s.blocks + (players - 1) * matches;
  int* done = s.done + pass * s.blocks;
  auto wait = [&](int64_t block, int64_t count) {
    for (int spins = 0; __atomic_load_n(done + block, __ATOMIC_ACQUIRE) < count; ++spins) {
      relax(spins);
    }
  };
  auto finish = [&](int64_t block) { __atomic_fetch_add(done + block, 1, __ATOMIC_RELEASE); };
  for (;;) {
    const int64_t t = __atomic_fetch_add(s.next + pass, 1, __ATOMIC_RELAXED);
    if (t >= total) return;
    if (t < s.blocks) {
      tile(t * s.block, t * s.block);
      finish(t);
      continue;
    }
    const int64_t round = (t - s.blocks) / matches, k = (t - s.blocks) % matches;
    int64_t I = (round + k) % (players - 1);
    int64_t J = k == 0 ? players - 1 : (round - k + players - 1) % (players - 1);
    if (J < I) {
      const int64_t swap = I;
      I = J;
      J = swap;
    }
    wait(I, round + 1);
    if (J < s.blocks) {
      wait(J, round + 1);
      const bool empty = s.crossed && on_sides(s, I * s.block, s.block, J * s.block, s.block, true);
      if (!empty) tile(I * s.block, J * s.block);
      finish(J);
    }
    finish(I);
  }
}

template <class T>
void pack_block(const Scratch<T>& s, const SymmetricArgs& args, int64_t I) {
  pack_rows(s.u, I, I + s.block, args.first, args.N, args.second, s.n);
  pack_panels(s.u, I, I + s.block);
  pack_pairs(s.u, I, I + s.block);
}

// loss_i, q_i and r_i of one row from its sum over the negatives.
template <class T, bool online>
void finish_row(const Scratch<T>& s, const SymmetricArgs& args, double scale, int64_t i) {
  if (args.pairs == Pairs::one_way && i >= args.N) {
    s.loss[i] = 0;
    s.q[i] = 0;
    s.r[i] = online ? -INFINITY : 0;
    return;
  }
  const double similarity = cosine(s.u, i, s.u, positive_of(s, i));
  const double log_pos = (online ? similarity : similarity - 1) * scale;
  const double neg = (args.pairs == Pairs::twice ? 2 : 1) * s.neg[i];
  const RowLoss row = row_loss(log2(neg) + (online && neg > 0 ? double(s.peak[i]) : 0.), log_pos);
  s.loss[i] = row.loss;
  s.q[i] = float(row.q);
  s.r[i] = online ? float(-row.log_den) : float(1 / (neg + ::exp2(log_pos)));
}

// How many rows have a loss.
int64_t losses(const SymmetricArgs& args) { return args.pairs == Pairs::one_way ? args.N : args.n; }

// dz_i from dU_i: the positive's share, then back through the normalisation.
template <class T>
void finish_grad(const Scratch<T>& s, const SymmetricArgs& args, int64_t i) {
  const int64_t p = positive_of(s, i);
  float* du = s.du + i * s.u.width;
  const float weight = p == i ? s.q[i] : s.q[i] + s.q[p];
  const float factor = T::kPack == 1 ? 1.f : 1.f / s.u.factor[i];
  for (int64_t d = 0; d < s.D; ++d) du[d] = du[d] * factor - weight * unit(s.u, p, d);
  const double scale = 1 / (double(losses(args)) * double(args.temperature));
  float* dz = i < args.N ? args.dfirst + i * s.D : args.dsecond + (i - args.N) * s.D;
  store_raw_grad(s.u, i, du, scale, dz);
}

template <class T, bool online>
void run_symmetric(const Scratch<T>& s, const SymmetricArgs& args) {
  const double scale = kLog2e / args.temperature;
  const float scale32 = float(scale);
  const bool grad = args.dfirst || args.dsecond;
  memset(s.next, 0, 2 * sizeof *s.next);
  memset(s.done, 0, 2 * s.blocks * sizeof *s.done);
  parallel(args.threads, [&](Team& team, int rank) {
    const Range blocks = share(s.blocks, team, rank), rows = share(s.n, team, rank);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      pack_block(s, args, b * s.block);
      for (int64_t i = b * s.block; i < (b + 1) * s.block; ++i) {
        s.neg[i] = 0;
        s.peak[i] = -INFINITY;
        s.r[i] = 0;
      }
      if (!grad) continue;
      memset(s.du + b * s.block * s.u.width, 0, s.block * s.u.width * sizeof(float));
    }
    team.barrier();
    play(s, 0, [&](int64_t I, int64_t J) {
      online ? sum_tile_online(s, scale32, I, J) : sum_tile_fixed(s, scale32, I, J);
    });
    team.barrier();
    for (int64_t i = rows.begin; i < rows.end; ++i) finish_row<T, online>(s, args, scale, i);
    if (!grad) return;
    team.barrier();
    play(s, 1, [&](int64_t I, int64_t J) { grad_tile<T, online>(s, args, scale32, I, J); });
    team.barrier();
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      if (i < args.N ? args.dfirst : args.dsecond) finish_grad(s, args, i);
    }
  });
  if (!args.loss) return;
  double total = 0;
  for (int64_t i = 0; i < s.n; ++i) total += s.loss[i];
  args.loss[0] = float(total / double(losses(args)));
}

template <class T>
void run_symmetric(const SymmetricArgs& args) {
  auto s = carve<T>(args.n, args.D, args.dfirst || args.dsecond, args.workspace);
  s.offset = args.positive;
  s.crossed = args.pairs == Pairs::both_ways || args.pairs == Pairs::one_way;
  args.temperature < kMinShift ? run_symmetric<T, true>(s, args) : run_symmetric<T, false>(s, args);
}

// Bytes of scratch: O(n D), never O(n^2).
int64_t symmetric_workspace(DType dtype, int64_t n, int64_t D, bool grad) {
  return stays_bf16(dtype) ? carve<Bf16>(n, D, grad, nullptr).bytes
                           : carve<Fp32>(n, D, grad, nullptr).bytes;
}

void symmetric(const SymmetricArgs& args) {
  stays_bf16(args.first.dtype) ? run_symmetric<Bf16>(args) : run_symmetric<Fp32>(args);
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
