// NT-Xent in tiles of the symmetric similarity matrix; compiled once per instruction set.
//
// With unit rows u, s_ij = u_i.u_j / T, E_ij = exp(s_ij - 1/T) over the negatives of row i, p the
// positive's row, neg_i = sum_j E_ij, pos_i = E_ip:
//   loss_i = softplus(log neg_i - log pos_i),  q_i = neg_i / (neg_i + pos_i)
//   d loss / d u_i = 1/(nT) [ sum_j E_ij (r_i + r_j) u_j - (q_i + q_p) u_p ],  r = 1/(neg + pos)
// A tile above the diagonal serves its rows and its columns: n^2 D FLOPs for the loss, 3 n^2 D more
// for the gradient. Below T = 0.023 exp(-2/T) leaves fp32's range: row maxima instead of the shift.
//
// Two tiles that share no block of rows may run side by side. Tiles are ordered as the rounds of a
// tournament and each waits only for the earlier ones of its own two blocks, so every sum has one
// order, whatever the number of threads.
#include <math.h>
#include <sched.h>
#include <string.h>

#include "nt_xent.h"
#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// The register tile: kRows x kCols accumulators, with room for one row of vectors and a broadcast.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kVecs = 2;
constexpr int kCols = kVecs * kWidth;

constexpr int kMaxBlock = 96;  // rows of a block; W and the block's rows stay in the L2 cache
constexpr double kMinShift = 0.023;
constexpr double kLog2e = 1.4426950408889634;
constexpr double kEps = 1e-12;  // of F.normalize

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A smaller block gives the threads more tiles to share where rows are few.
int block_rows(int64_t n) {
  return n < 1024 && kMaxBlock / 2 % kCols == 0 && kMaxBlock / 2 % kRows == 0 ? kMaxBlock / 2
                                                                              : kMaxBlock;
}

struct Scratch {
  int64_t n, D, ld, padded, blocks;
  int block;
  float* u;          // [padded, ld] unit rows, 0 in the padding
  float* ut;         // [padded / kCols, D, kCols] the same, transposed in panels
  float* du;         // [padded, ld]
  double* neg;       // [padded] sum of E, or of 2^(y - peak)
  double* loss;      // [padded]
  double* positive;  // [padded] log2 of pos, with the shift in the fixed-shift form
  double* inv_norm;  // [padded] 1 / |z|, negative where eps replaced the norm
  float* peak;       // [padded] row maximum of y over the negatives, online form
  float* r;          // [padded] 1 / (neg + pos); online form: its log2
  float* q;          // [padded]
  int* next;         // [2] the next tile of a pass
  int* done;         // [2, blocks] tiles finished of a block, in each pass
  int64_t bytes;
};

Scratch carve(int64_t N, int64_t D, bool grad, unsigned char* base) {
  Scratch s;
  s.n = 2 * N;
  s.D = D;
  s.block = block_rows(s.n);
  s.blocks = (s.n + s.block - 1) / s.block;
  s.padded = s.blocks * s.block;
  // the extra vector keeps rows off each other's cache sets
  s.ld = round_up(D, kCols) + kWidth;
  s.bytes = 0;
  auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<decltype(pointer + 0)>(base + s.bytes);
    s.bytes += round_up(count * int64_t(sizeof *pointer), 64);
  };
  take(s.u, s.padded * s.ld);
  take(s.ut, s.padded * D);
  take(s.du, grad ? s.padded * s.ld : 0);
  take(s.neg, s.padded);
  take(s.loss, s.padded);
  take(s.positive, s.padded);
  take(s.inv_norm, s.padded);
  take(s.peak, s.padded);
  take(s.r, s.padded);
  take(s.q, s.padded);
  take(s.next, 2);
  take(s.done, 2 * s.blocks);
  return s;
}

// acc += A B over `depth`: A's rows are `lda` apart (its columns where transposed), B's `ldb`.
template <bool transposed>
CLAE_FAST_INLINE void multiply(const float* a,
                               int64_t lda,
                               const float* b,
                               int64_t ldb,
                               int64_t depth,
                               Vec (&acc)[kRows][kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float x = transposed ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] += x * row[v];
    }
  }
}

// C += A B for `rows` x `cols` of C, rounded up to register tiles.
template <bool transposed>
void accumulate(const float* a,
                int64_t lda,
                const float* b,
                int64_t ldb,
                int64_t depth,
                float* c,
                int64_t ldc,
                int64_t rows,
                int64_t cols) {
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec acc[kRows][kVecs];
      float* tile = c + i * ldc + j;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[m][v] = load(tile + m * ldc + v * kWidth);
      }
      multiply<transposed>(a + (transposed ? i : i * lda), lda, b + j, ldb, depth, acc);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store(tile + m * ldc + v * kWidth, acc[m][v]);
      }
    }
  }
}

// All ones where (row, column) is a negative pair inside the matrix.
CLAE_FAST_INLINE IVec negatives(const Scratch& s, int64_t i, int64_t j) {
  IVec column;
  for (int l = 0; l < kWidth; ++l) column[l] = int32_t(j + l);
  const int32_t N = int32_t(s.n / 2), n = int32_t(s.n), row = int32_t(i);
  const int32_t positive = row < N ? row + N : row - N;
  const IVec inside = (column < n) & (row < n ? ~IVec{} : IVec{});
  return inside & (column != row) & (column != positive);
}

// Does the register tile at (i, j) hold anything but negatives?
bool is_special(const Scratch& s, int64_t i, int64_t j) {
  const int64_t N = s.n / 2;
  auto crosses = [&](int64_t shift) { return j < i + shift + kRows && i + shift < j + kCols; };
  return crosses(0) || crosses(N) || crosses(-N) || i + kRows > s.n || j + kCols > s.n;
}

// Sets a register tile to 0 at all but negative pairs.
CLAE_FAST_INLINE void keep_negatives(const Scratch& s,
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
template <bool online>
CLAE_FAST_INLINE void logits(const Scratch& s,
                             float scale,
                             int64_t i,
                             int64_t j,
                             Vec (&y)[kRows][kVecs]) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) y[m][v] = Vec{};
  }
  multiply<false>(s.u + i * s.ld, s.ld, s.ut + j * s.D, kCols, s.D, y);
  const Vec factor = splat(scale), shift = splat(online ? 0.f : -scale);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) y[m][v] = y[m][v] * factor + shift;
  }
}

// Adds a tile's E to its rows' sums and, off the diagonal, to its columns'.
void sum_tile_fixed(const Scratch& s, float scale, int64_t I, int64_t J) {
  Vec row_sum[kMaxBlock] = {};
  const int64_t rows = s.n - I < s.block ? s.n - I : s.block;
  const int64_t cols = s.n - J < s.block ? s.n - J : s.block;
  for (int64_t j = 0; j < cols; j += kCols) {
    Vec col_sum[kVecs] = {};
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<false>(s, scale, I + i, J + j, y);
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

CLAE_FAST_INLINE Vec maximum(Vec a, Vec b) { return a < b ? b : a; }

// The same with a running maximum of every row and column.
void sum_tile_online(const Scratch& s, float scale, int64_t I, int64_t J) {
  alignas(64) float tile[kMaxBlock * kMaxBlock];
  const float lowest = -INFINITY;
  const int64_t rows = s.n - I < s.block ? s.n - I : s.block;
  const int64_t cols = round_up(s.n - J < s.block ? s.n - J : s.block, kCols);
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<true>(s, scale, I + i, J + j, y);
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

// Adds W U to the tile's rows of dU and, off the diagonal, W^T U to its columns' rows.
template <bool online>
void grad_tile(const Scratch& s, float scale, int64_t I, int64_t J) {
  alignas(64) float w[kMaxBlock * kMaxBlock];
  const int64_t rows = s.n - I < s.block ? s.n - I : s.block;
  const int64_t cols = s.n - J < s.block ? s.n - J : s.block;
  for (int64_t j = 0; j < cols; j += kCols) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Vec y[kRows][kVecs];
      logits<online>(s, scale, I + i, J + j, y);
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
        }
      }
      keep_negatives(s, I + i, J + j, y);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          store(w + (i + m) * kMaxBlock + j + v * kWidth, y[m][v]);
        }
      }
    }
  }
  const int64_t width = s.ld - kWidth;
  accumulate<false>(w, kMaxBlock, s.u + J * s.ld, s.ld, cols, s.du + I * s.ld, s.ld, rows, width);
  if (I == J) return;
  accumulate<true>(w, kMaxBlock, s.u + I * s.ld, s.ld, rows, s.du + J * s.ld, s.ld, cols, width);
}

// Takes tiles in the tournament's order until none is left.
template <class Tile>
void play(const Scratch& s, int pass, Tile tile) {
  const int64_t players = s.blocks + s.blocks % 2;  // an odd one out plays nobody
  const int64_t matches = players / 2;
  const int64_t total = s.blocks + (players - 1) * matches;
  int* done = s.done + pass * s.blocks;
  auto wait = [&](int64_t block, int64_t count) {
    for (int spins = 0; __atomic_load_n(done + block, __ATOMIC_ACQUIRE) < count; ++spins) {
      if (spins > 1000) sched_yield();
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
      tile(I * s.block, J * s.block);
      finish(J);
    }
    finish(I);
  }
}

// u = z / max(|z|, eps) of one block, as rows and as transposed panels.
void normalize_block(const Scratch& s, const NtXentArgs& args, int64_t I) {
  for (int64_t i = I; i < I + s.block; ++i) {
    float* u = s.u + i * s.ld;
    memset(u, 0, s.ld * sizeof *u);
    if (i >= s.n) continue;
    const float* z =
        i < args.N ? args.z0 + i * args.stride0 : args.z1 + (i - args.N) * args.stride1;
    double square = 0;
    for (int64_t d = 0; d < s.D; ++d) square += double(z[d]) * double(z[d]);
    const double norm = sqrt(square);
    const bool clamped = norm < kEps;
    const double inv = 1 / (clamped ? kEps : norm);
    s.inv_norm[i] = clamped ? -inv : inv;
    for (int64_t d = 0; d < s.D; ++d) u[d] = float(z[d] * inv);
  }
  for (int64_t j = I; j < I + s.block; j += kCols) {
    float* panel = s.ut + j * s.D;
    for (int64_t d = 0; d < s.D; ++d) {
      for (int c = 0; c < kCols; ++c) panel[d * kCols + c] = s.u[(j + c) * s.ld + d];
    }
  }
}

double dot(const float* a, const float* b, int64_t D) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += double(a[d]) * double(b[d]);
  return sum;
}

// loss_i, q_i and r_i of one row from its sum over the negatives.
template <bool online>
void finish_row(const Scratch& s, int64_t i) {
  const double log_neg = log2(s.neg[i]) + (online && s.neg[i] > 0 ? double(s.peak[i]) : 0.);
  const double log_pos = s.positive[i];
  const double x = (log_neg - log_pos) / kLog2e;
  const double decay = exp(-fabs(x));
  const double high = x > 0 ? 1. : decay, low = x > 0 ? decay : 1.;
  s.loss[i] = (x > 0 ? x : 0.) + log1p(decay);
  s.q[i] = float(high / (high + low));
  const double log_den = log_pos + s.loss[i] * kLog2e;
  s.r[i] = online ? float(-log_den) : float(1 / (s.neg[i] + ::exp2(log_pos)));
}

// dz_i from dU_i: the positive's share, then back through the normalisation.
void finish_grad(const Scratch& s, const NtXentArgs& args, int64_t i) {
  const int64_t p = i < args.N ? i + args.N : i - args.N;
  const float* u = s.u + i * s.ld;
  const float* up = s.u + p * s.ld;
  float* du = s.du + i * s.ld;
  float* dz = args.dz + i * s.D;
  const float weight = s.q[i] + s.q[p];
  for (int64_t d = 0; d < s.D; ++d) du[d] -= weight * up[d];
  const bool clamped = s.inv_norm[i] < 0;
  const double scale = fabs(s.inv_norm[i]) / (double(s.n) * double(args.temperature));
  const float radial = clamped ? 0.f : float(dot(u, du, s.D));
  for (int64_t d = 0; d < s.D; ++d) dz[d] = float((du[d] - radial * u[d]) * scale);
}

template <bool online>
void run(const Scratch& s, const NtXentArgs& args) {
  const double scale = kLog2e / args.temperature;
  const float scale32 = float(scale);
  const bool grad = args.dz != nullptr;
  memset(s.next, 0, 2 * sizeof *s.next);
  memset(s.done, 0, 2 * s.blocks * sizeof *s.done);
#pragma omp parallel num_threads(args.threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.blocks; ++b) {
      normalize_block(s, args, b * s.block);
      for (int64_t i = b * s.block; i < (b + 1) * s.block; ++i) {
        s.neg[i] = 0;
        s.peak[i] = -INFINITY;
        s.r[i] = 0;
      }
      if (grad) memset(s.du + b * s.block * s.ld, 0, s.block * s.ld * sizeof(float));
    }
    play(s, 0, [&](int64_t I, int64_t J) {
      online ? sum_tile_online(s, scale32, I, J) : sum_tile_fixed(s, scale32, I, J);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.N; ++i) {
      const double cosine = dot(s.u + i * s.ld, s.u + (i + args.N) * s.ld, s.D);
      const double positive = (online ? cosine : cosine - 1) * scale;
      s.positive[i] = s.positive[i + args.N] = positive;
      finish_row<online>(s, i);
      finish_row<online>(s, i + args.N);
    }
    if (grad) {
      play(s, 1, [&](int64_t I, int64_t J) { grad_tile<online>(s, scale32, I, J); });
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t i = 0; i < s.n; ++i) finish_grad(s, args, i);
    }
  }
  double total = 0;
  for (int64_t i = 0; i < s.n; ++i) total += s.loss[i];
  args.loss[0] = float(total / double(s.n));
}

}  // namespace

int64_t nt_xent_workspace(int64_t N, int64_t D, bool grad) {
  return carve(N, D, grad, nullptr).bytes;
}

void nt_xent(const NtXentArgs& args) {
  const Scratch s = carve(args.N, args.D, args.dz != nullptr, args.workspace);
  args.temperature < kMinShift ? run<true>(s, args) : run<false>(s, args);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
