// The sums and the gradient of NT-Xent, in tiles of the symmetric similarity matrix; for *_simd.cpp
// alone. nt_xent, tied_nt_xent and hard_nt_xent run it, and InfoNCE in both directions.
//
// u are the unit rows, n of them with a loss, and p is the row of the positive of row i. Sums run
// over the negatives j of row i, each of which counts c times.
//
// clang-format off
//
//     s_ij   = u_i . u_j / T
//     E_ij   = exp(s_ij - 1/T)
//     neg_i  = c sum_j E_ij
//     pos_i  = E_ip
//     loss_i = softplus(log neg_i - log pos_i)
//
//     q_i = neg_i / (neg_i + pos_i)
//     r_i = 1 / (neg_i + pos_i)
//     q   = q_i + q_p    where p is another row
//     q   = q_i          where p = i
//
//     d loss / d u_i = 1/(n T) (sum_j E_ij (r_i + r_j) u_j - q u_p)
//
// clang-format on
//
// InfoNCE is the same where the rows are anchors and keys, and only pairs of one of each count. A
// row without a loss has r = q = 0.
//
// Hard negatives: each of the m negatives of a row has a weight W, and a share tau of them are
// taken to be positives.
//
// clang-format off
//
//     W_ij   = E_ij^beta
//     mean_i = sum_j W_ij E_ij / sum_j W_ij
//     neg_i  = m max((mean_i - tau pos_i) / (1 - tau), exp(-2/T))
//
//     q_i = (neg_i + m tau / (1 - tau) pos_i) / (neg_i + pos_i)
//     r_i = m (1 + beta) / ((1 - tau) (neg_i + pos_i) sum_j W_ij)
//     v_i = r_i mean_i beta / (1 + beta)
//
// clang-format on
//
// In the gradient W_ij (E_ij (r_i + r_j) - v_i - v_j) takes the place of E_ij (r_i + r_j). Where
// the weights are constants, r has no factor 1 + beta and v is 0. Where the maximum is exp(-2/T), r
// = v = 0 and q_i = neg_i / (neg_i + pos_i).
//
// There are two forms of the sums. The fixed form subtracts 1/T from every logit, as above. For T <
// 0.023, exp(-2/T) is below fp32's range; with weights, sums of W E come near the end of that range
// for T < 0.03 (1 + beta), which leaves room for the factors of r. Then the online form is taken:
// it subtracts each row's largest logit so far.
//
// A tile above the diagonal serves its rows and, transposed, its columns. The loss takes n^2 D
// FLOPs and the gradient 3 n^2 D more.
//
// Two tiles that share no block of rows may be computed at the same time. Tiles are ordered as the
// rounds of a tournament, and a tile waits only for the earlier tiles of its own two blocks. So
// every sum is added in one order, whatever the number of threads.
#pragma once

#include "parallel.h"
#include "softmax.h"
#include "tile.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Temperatures from which the fixed form is taken; the second one is multiplied with 1 + beta.
constexpr double kMinFixed = 0.023, kMinHardFixed = 0.03;

// The rows of a block. Where rows are few, a smaller block gives the threads more tiles to share.
inline int block_rows(int64_t n) {
  return n < 1024 && kMaxBlock / 2 % kCols == 0 && kMaxBlock / 2 % kRows == 0 ? kMaxBlock / 2
                                                                              : kMaxBlock;
}

// Which pairs are negatives, and which rows have a loss.
enum class Pairs {
  all,        // all other rows but the positive are negatives
  twice,      // the same, and each counts twice
  both_ways,  // rows of `first` have those of `second` as negatives, and the other way round
  one_way,    // the same, but rows of `second` have no loss
};

// Negatives are not hard where all of this is 0.
struct Hardness {
  float beta;     // concentration of the weights
  float tau;      // share of positives among the negatives
  bool constant;  // whether the gradient takes the weights for constants
};

// The rows are those of `first` above those of `second`.
struct SymmetricArgs : CpuArgs {
  Rows first;   // [N, D]
  Rows second;  // [n - N, D]
  int64_t N;
  int64_t n;
  int64_t D;
  int64_t positive;  // distance between a row and its positive: N, or 0 for the row itself
  Pairs pairs;
  float temperature;
  float* loss;     // [1], may be null
  float* dfirst;   // [N, D], may be null
  float* dsecond;  // [n - N, D], may be null
  Hardness hardness = {};
};

inline SymmetricArgs two_views(const TwoViewsArgs& args) {
  float* dz1 = args.dz ? args.dz + args.N * args.D : nullptr;
  return {args,       args.z0,          args.z1,   args.N,  2 * args.N, args.D, /*positive=*/args.N,
          Pairs::all, args.temperature, args.loss, args.dz, dz1};
}

template <class T>
struct Scratch {
  int64_t n, D;
  int64_t offset;  // distance between a row and its positive
  int64_t padded;  // rows, in whole blocks
  int64_t blocks;
  int block;     // rows of a block
  bool crossed;  // only pairs of a row above `offset` and one below it are negatives
  float beta;
  // y is a row's base-2 logit, and peak the largest one over its negatives
  Packed<T> u;   // [padded, D]
  float* du;     // [padded, u.width]
  double* neg;   // [padded] sum of W E; in the online form of 2^((1 + beta) (y - peak))
  double* mass;  // [padded] sum of W; in the online form of 2^(beta (y - peak)); with weights only
  double* loss;  // [padded]
  float* peak;   // [padded] in the online form only
  float* r;      // [padded] in the online form its log2
  float* v;      // [padded] likewise, with weights only
  float* q;      // [padded]
  int* next;     // [2] the next tile of each pass
  int* done;     // [2, blocks] how many tiles of a block are finished in each pass
  int64_t bytes;
};

template <class T>
Scratch<T> carve(const SymmetricArgs& args, bool weighted) {
  Scratch<T> s;
  s.n = args.n;
  s.D = args.D;
  s.offset = args.positive;
  s.crossed = args.pairs == Pairs::both_ways || args.pairs == Pairs::one_way;
  s.beta = args.hardness.beta;
  s.block = block_rows(s.n);
  s.blocks = (s.n + s.block - 1) / s.block;
  s.padded = s.blocks * s.block;
  Carver carver{args.workspace};
  s.u = carve_rows<T>(carver, s.padded, s.D);
  s.du = carver.take<float>(args.dfirst || args.dsecond ? s.padded * s.u.width : 0);
  s.neg = carver.take<double>(s.padded);
  s.mass = carver.take<double>(weighted ? s.padded : 0);
  s.loss = carver.take<double>(s.padded);
  s.peak = carver.take<float>(s.padded);
  s.r = carver.take<float>(s.padded);
  s.v = carver.take<float>(weighted ? s.padded : 0);
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

// For the pairs of row i and kWidth columns from j on: all bits set where the pair is a negative
// one inside the matrix.
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

// Whether `rows` rows from i on and `cols` columns from j on are all on the same side of `offset`,
// or, without `same`, the rows all on one side and the columns all on the other.
template <class T>
bool on_sides(const Scratch<T>& s, int64_t i, int64_t rows, int64_t j, int64_t cols, bool same) {
  const bool above = i + rows <= s.offset, below = i >= s.offset;
  const bool left = j + cols <= s.offset, right = j >= s.offset;
  return same ? (above && left) || (below && right) : (above && right) || (below && left);
}

// Whether the register tile at (i, j) has any pair that is not a negative one.
template <class T>
bool is_special(const Scratch<T>& s, int64_t i, int64_t j) {
  auto crosses = [&](int64_t shift) { return j < i + shift + kRows && i + shift < j + kCols; };
  return crosses(0) || crosses(s.offset) || crosses(-s.offset) || i + kRows > s.n ||
         j + kCols > s.n || (s.crossed && !on_sides(s, i, kRows, j, kCols, false));
}

// Sets a register tile to 0 except at negative pairs.
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

// The base-2 logits of a register tile: log2(exp(s - 1/T)), in the online form log2(exp(s)).
template <class T, bool online>
CLAE_FAST_INLINE void logits(const Scratch<T>& s,
                             float scale,
                             int64_t i,
                             int64_t j,
                             Vec (&y)[kRows][kVecs]) {
  similarities(s.u, i, s.u, j, scale, online ? 0.f : -scale, y);
}

// The fixed form: adds a tile's W E, and with weights its W, to the sums of its rows and, off the
// diagonal, to those of its columns.
template <class T, bool weighted>
void sum_tile_fixed(const Scratch<T>& s, float scale, int64_t I, int64_t J) {
  Vec row_sum[kMaxBlock] = {}, row_mass[weighted ? kMaxBlock : 1] = {};
  const int64_t rows = smaller(s.n - I, s.block);
  const int64_t cols = smaller(s.n - J, s.block);
  for (int64_t j = 0; j < cols; j += kCols) {
    Vec col_sum[kVecs] = {}, col_mass[kVecs] = {};
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs], w[kRows][kVecs];
      logits<T, false>(s, scale, I + i, J + j, y);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const Vec e = exp2<false>(y[m][v]);
          if (weighted) w[m][v] = exp2<false>(s.beta * y[m][v]);
          y[m][v] = weighted ? w[m][v] * e : e;
        }
      }
      keep_negatives(s, I + i, J + j, y);
      if (weighted) keep_negatives(s, I + i, J + j, w);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          row_sum[i + m] += y[m][v];
          col_sum[v] += y[m][v];
          if (!weighted) continue;
          row_mass[i + m] += w[m][v];
          col_mass[v] += w[m][v];
        }
      }
    }
    if (I == J) continue;
    for (int v = 0; v < kVecs; ++v) {
      for (int l = 0; l < kWidth; ++l) {
        const int64_t column = J + j + v * kWidth + l;
        s.neg[column] += double(col_sum[v][l]);
        if (weighted) s.mass[column] += double(col_mass[v][l]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    s.neg[I + i] += double(horizontal_sum(row_sum[i]));
    if (weighted) s.mass[I + i] += double(horizontal_sum(row_mass[i]));
  }
}

// The online form of the same, with a running maximum of every row and column.
template <class T, bool weighted>
void sum_tile_online(const Scratch<T>& s, float scale, int64_t I, int64_t J) {
  alignas(64) float tile[kMaxBlock * kMaxBlock];
  const float lowest = -INFINITY;
  const float sharpness = 1 + s.beta;
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
    const float highest = horizontal_maximum(top);
    const float peak = s.peak[I + i] < highest ? highest : s.peak[I + i];
    if (peak == lowest) continue;  // no negative yet, and -inf - -inf would be NaN
    Vec sum = {}, mass = {};
    for (int64_t j = 0; j < cols; j += kWidth) {
      const Vec below = load(row + j) - peak;
      sum += exp2<true>(weighted ? sharpness * below : below);
      if (weighted) mass += exp2<true>(s.beta * below);
    }
    const double risen = double(s.peak[I + i]) - peak;
    s.neg[I + i] = s.neg[I + i] * ::exp2(sharpness * risen) + horizontal_sum(sum);
    if (weighted) s.mass[I + i] = s.mass[I + i] * ::exp2(s.beta * risen) + horizontal_sum(mass);
    s.peak[I + i] = peak;
  }
  if (I == J) return;
  for (int64_t j = 0; j < cols; j += kWidth) {
    Vec top = load(s.peak + J + j);
    for (int64_t i = 0; i < rows; ++i) top = maximum(top, load(tile + i * kMaxBlock + j));
    const Vec from = top == splat(lowest) ? Vec{} : top;
    Vec sum = {}, mass = {};
    for (int64_t i = 0; i < rows; ++i) {
      const Vec below = load(tile + i * kMaxBlock + j) - from;
      sum += exp2<true>(weighted ? sharpness * below : below);
      if (weighted) mass += exp2<true>(s.beta * below);
    }
    for (int l = 0; l < kWidth; ++l) {
      const int64_t column = J + j + l;
      const double risen = double(s.peak[column]) - from[l];
      s.neg[column] = s.neg[column] * ::exp2(sharpness * risen) + double(sum[l]);
      if (weighted) s.mass[column] = s.mass[column] * ::exp2(s.beta * risen) + double(mass[l]);
    }
    store(s.peak + J + j, top);
  }
}

// Whether the gradient of any row of the block at I is wanted.
template <class T>
bool is_wanted(const Scratch<T>& s, const SymmetricArgs& args, int64_t I) {
  return (I < args.N && args.dfirst) || (I + s.block > args.N && args.dsecond);
}

// Makes the tile G of the factors of u_j in the gradient. Adds G U to the gradients of the tile's
// rows and, off the diagonal, G^T U to those of its columns. Where unit rows are rows of U times
// factors f, it takes G_ij f_i f_j for G, and the gradient comes out divided by f_i.
template <class T, bool online, bool weighted>
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
          const Vec log_w = s.beta * y[m][v];
          const Vec log_e = weighted && online ? y[m][v] + log_w : y[m][v];
          if (online) {
            y[m][v] = exp2<true>(log_e + r_row) + exp2<true>(log_e + r_col);
          } else {
            y[m][v] = exp2<false>(log_e) * (r_row + r_col);
          }
          if (weighted) {
            const Vec v_row = splat(s.v[I + i + m]), v_col = load(s.v + J + j + v * kWidth);
            if (online) {
              y[m][v] -= exp2<true>(log_w + v_row) + exp2<true>(log_w + v_col);
            } else {
              y[m][v] = exp2<false>(log_w) * (y[m][v] - (v_row + v_col));
            }
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

// Computes all tiles of a pass. Every thread of the team calls this, and they take tiles until none
// is left: first those on the diagonal, then round after round of a tournament in which every block
// plays every other.
template <class T, class Tile>
void play(const Scratch<T>& s, int pass, Tile tile) {
  const int64_t players = s.blocks + s.blocks % 2;  // an odd number gets a player that is no block
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

// finish_row() of a row with hard negatives. log_sum and log_pos are the base-2 logarithms of
// mean_i mass_i and of pos_i.
template <class T, bool online>
void finish_hard_row(const Scratch<T>& s,
                     const Hardness& hardness,
                     double scale,
                     double log_sum,
                     double log_pos,
                     int64_t i) {
  const double beta = hardness.beta, tau = hardness.tau;
  const double log_count = log2(double(s.n - 2));
  const double log_mass = beta > 0 ? log2(s.mass[i]) + (online ? beta * s.peak[i] : 0.) : log_count;
  // the sum is of 2^((1 + beta) (y - peak)), and log_sum makes up for one peak already
  const double log_mean = log_sum + (online ? beta * s.peak[i] : 0.) - log_mass;
  // the mean of negatives is never below the floor exp(-2/T)
  const double floor = (online ? -1 : -2) * scale;
  const double false_share = tau * ::exp2(log_pos - log_mean);
  const double log_true =
      false_share >= 1 ? -INFINITY : log_mean + log2((1 - false_share) / (1 - tau));
  const bool floored = tau > 0 && log_true <= floor;
  const RowLoss row = row_loss(log_count + (floored ? floor : log_true), log_pos);
  s.loss[i] = row.loss;
  const double share =
      row.q + (floored ? 0. : ::exp2(log_count + log_pos - row.log_den) * tau / (1 - tau));
  s.q[i] = float(share);
  const double factor = floored ? 0. : (hardness.constant ? 1. : 1 + beta) / (1 - tau);
  const double log_r = log_count - log_mass - row.log_den + log2(factor);
  s.r[i] = float(online ? log_r : ::exp2(log_r));
  if (beta == 0) return;
  const double log_v = hardness.constant ? -INFINITY : log_r + log_mean + log2(beta / (1 + beta));
  s.v[i] = float(online ? log_v : ::exp2(log_v));
}

// loss_i, q_i, r_i and v_i of a row from its sums over the negatives.
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
  const double log_neg = log2(neg) + (online && neg > 0 ? double(s.peak[i]) : 0.);
  if (args.hardness.beta > 0 || args.hardness.tau > 0) {
    finish_hard_row<T, online>(s, args.hardness, scale, log_neg, log_pos, i);
    return;
  }
  const RowLoss row = row_loss(log_neg, log_pos);
  s.loss[i] = row.loss;
  s.q[i] = float(row.q);
  s.r[i] = online ? float(-row.log_den) : float(1 / (neg + ::exp2(log_pos)));
}

// How many rows have a loss.
int64_t losses(const SymmetricArgs& args) { return args.pairs == Pairs::one_way ? args.N : args.n; }

// The gradient of raw row i: subtracts the share of its positive from the gradient of its unit row,
// and passes the result back through the normalization.
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

template <class T, bool online, bool weighted>
void run_symmetric(const Scratch<T>& s, const SymmetricArgs& args) {
  const double scale = kLog2e / args.temperature;
  const float scale32 = float(scale);
  const bool grad = args.dfirst || args.dsecond;
  memset(s.next, 0, 2 * sizeof *s.next);
  memset(s.done, 0, 2 * s.blocks * sizeof *s.done);
  parallel(args.threads, [&](Team& team, int rank) {
    const Range packed = share(s.padded, team, rank, s.block), rows = share(s.n, team, rank);
    for (int64_t I = packed.begin; I < packed.end; I += s.block) pack_block(s, args, I);
    for (int64_t i = packed.begin; i < packed.end; ++i) {
      s.neg[i] = 0;
      s.peak[i] = -INFINITY;
      s.r[i] = 0;
      if (weighted) s.mass[i] = s.v[i] = 0;
    }
    if (grad) {
      const int64_t numbers = (packed.end - packed.begin) * s.u.width;
      memset(s.du + packed.begin * s.u.width, 0, numbers * sizeof *s.du);
    }
    team.barrier();
    play(s, 0, [&](int64_t I, int64_t J) {
      online ? sum_tile_online<T, weighted>(s, scale32, I, J)
             : sum_tile_fixed<T, weighted>(s, scale32, I, J);
    });
    team.barrier();
    for (int64_t i = rows.begin; i < rows.end; ++i) finish_row<T, online>(s, args, scale, i);
    if (!grad) return;
    team.barrier();
    play(s, 1,
         [&](int64_t I, int64_t J) { grad_tile<T, online, weighted>(s, args, scale32, I, J); });
    team.barrier();
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      if (i < args.N ? args.dfirst : args.dsecond) finish_grad(s, args, i);
    }
  });
  if (args.loss) args.loss[0] = mean_loss(s.loss, s.n, losses(args));
}

template <class T, bool weighted>
int64_t run_symmetric(const SymmetricArgs& args) {
  const auto s = carve<T>(args, weighted);
  if (!args.workspace) return s.bytes;
  const bool hard = args.hardness.beta > 0 || args.hardness.tau > 0;
  args.temperature < (hard ? kMinHardFixed * (1 + s.beta) : kMinFixed)
      ? run_symmetric<T, true, weighted>(s, args)
      : run_symmetric<T, false, weighted>(s, args);
  return 0;
}

// Negatives have weights only where `weighted`, and beta is not 0.
template <bool weighted = false>
int64_t symmetric(const SymmetricArgs& args) {
  return stays_bf16(args.first.dtype) ? run_symmetric<Bf16, weighted>(args)
                                      : run_symmetric<Fp32, weighted>(args);
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
