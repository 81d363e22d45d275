// UEL in panels, each of which holds a few whole rows of the similarity matrix.
//
// Columns are constants, so the gradient of a row comes from its own logits alone. A panel begins
// as the similarities of its rows, becomes their coefficients in the gradient in place, and is
// multiplied with the columns once. Loss and gradient of n = 2N rows take 4 n^2 D FLOPs.
//
// p is the softmax of a row over its negatives and its positive, and the loss of the row is
//
//     -log p_pos - sum of log(1 - p_k) over the negatives k
//
// `top` is the most similar negative of the row, q the softmax without top, and t the sum of
// w_k = p_k / (1 - p_k) over the other negatives. The gradient by the logits is
//
// clang-format off
//
//     of top           p_top (2 - t)
//     of the positive  -(1 - p_pos) - p_pos t - p_top q_pos
//     of a negative k  p_k (2 - t + w_k) - p_top q_k
//
// clang-format on
//
// Only p_top can be near 1, where 1 - p_top would cancel. So p_top is the logistic function of the
// difference between its logit and that of the sum of the others, whose p are at most 1/2.
#include <math.h>

#include "parallel.h"
#include "softmax.h"
#include "tile.h"
#include "uel.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// How many numbers a panel has at most, to stay in the cache: 32 rows of 8192 columns.
constexpr int64_t kPanel = 1 << 18;
constexpr int64_t kMaxRows = kMaxBlock / 2;
static_assert(kMaxRows % kRows == 0, "a panel holds whole tiles");
// How many columns are added up in fp32, and how many rows of columns are multiplied at once.
constexpr int64_t kSpan = 256;

template <class T>
struct Scratch {
  int64_t N, n, D, padded, cols;
  int64_t block;  // rows of a panel
  int64_t ld;     // numbers from row to row of a panel
  Packed<T> u;    // [padded, D]
  double* loss;   // [n]
  float* panels;  // [threads, block, ld]
  float* du;      // [threads, block, u.width]
  int64_t bytes;
};

template <class T>
Scratch<T> carve(const TwoViewsArgs& args) {
  Scratch<T> s;
  s.N = args.N;
  s.n = 2 * args.N;
  s.D = args.D;
  s.cols = round_up(s.n, kCols);
  // the extra vector keeps rows from competing for the same cache sets
  s.ld = s.cols + kWidth;
  const int64_t rows = smaller(kPanel / s.ld / kRows * kRows, kMaxRows);
  s.block = rows > 0 ? rows : kRows;
  s.padded = round_up(s.n, kMaxBlock);
  Carver carver{args.workspace};
  s.u = carve_rows<T>(carver, s.padded, s.D);
  s.loss = carver.take<double>(s.n);
  s.panels = carver.take<float>(args.threads * s.block * s.ld);
  s.du = carver.take<float>(args.dz ? args.threads * s.block * s.u.width : 0);
  s.bytes = carver.bytes;
  return s;
}

// -log(1 - p) for p from 0 to 1/2, with a relative error of 2e-7 however small p is.
CLAE_FAST_INLINE Vec neg_log1m(Vec p) {
  Vec series = 1.4411062f * p - 1.6958085f;
  series = series * p + 1.2576671f;
  series = series * p - 0.20353779f;
  series = series * p + 0.2696125f;
  series = series * p + 0.24280511f;
  series = series * p + 0.33370063f;
  series = series * p + 0.49999285f;
  return p + p * p * series;
}

CLAE_FAST_INLINE Vec odds(Vec p) { return p / (1.f - p); }

// The sum of term(j) over the columns, where term(j) is a vector for the columns from j on.
template <class Term>
CLAE_FAST_INLINE double sum_columns(int64_t cols, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < cols; begin += kSpan) {
    const int64_t end = smaller(begin + kSpan, cols);
    Vec sum = {};
    for (int64_t j = begin; j < end; j += kWidth) sum += term(j);
    total += horizontal_sum(sum);
  }
  return total;
}

// The largest number of a row.
struct Top {
  int64_t column;
  float value;
  float next;  // the largest of the others
};

Top find_top(const float* y, int64_t cols) {
  const Vec lowest = splat(-INFINITY);
  Vec first = lowest, second = lowest;
  IVec column, at = {};
  for (int l = 0; l < kWidth; ++l) column[l] = l;
  for (int64_t j = 0; j < cols; j += kWidth) {
    const Vec x = load(y + j);
    const IVec better = x > first;
    second = maximum(second, better ? first : x);
    first = better ? x : first;
    at = better ? column : at;
    column += kWidth;
  }
  Top top{0, -INFINITY, -INFINITY};
  for (int l = 0; l < kWidth; ++l) {
    const bool better = first[l] > top.value;
    const float less = better ? top.value : first[l];
    if (better) top = {at[l], first[l], top.next};
    if (less > top.next) top.next = less;
    if (second[l] > top.next) top.next = second[l];
  }
  return top;
}

// Coefficients of a row's gradient that are not in its panel.
struct Coefficients {
  int64_t top;
  float d_top, d_positive;
};

// Stores the loss of row i, whose logits are y. Where the gradient is wanted, y becomes the
// coefficients of the negatives; those of top and of the positive are returned.
template <class T>
Coefficients finish_row(const Scratch<T>& s, double scale, bool grad, int64_t i, float* y) {
  const int64_t positive = i < s.N ? i + s.N : i - s.N;
  y[i] = y[positive] = -INFINITY;
  for (int64_t j = s.n; j < s.cols; ++j) y[j] = -INFINITY;
  const Top top = find_top(y, s.cols);
  y[top.column] = -INFINITY;

  const double log_pos = cosine(s.u, i, s.u, positive) * scale;
  const float shift = top.next > log_pos ? top.next : float(log_pos);
  const double others = sum_columns(s.cols, [&](int64_t j) {
    const Vec e = exp2<true>(load(y + j) - shift);
    store(y + j, e);
    return e;
  });
  const double pos = ::exp2(log_pos - shift), rest = others + pos;
  // sets top apart from the rest of its row, and the negatives from the positive
  const RowLoss apart = row_loss(top.value, log2(rest) + shift);
  const double p_top = apart.q, p_rest = ::exp2(log2(rest) + shift - apart.log_den);
  const double log_neg =
      others == 0 ? top.value : row_loss(log2(others) + shift, top.value).log_den;
  const RowLoss softmax = row_loss(log_neg, log_pos);

  const float to_p = float(p_rest / rest);
  const double spread =
      sum_columns(s.cols, [&](int64_t j) { return neg_log1m(load(y + j) * to_p); });
  s.loss[i] = softmax.loss + apart.loss + spread;
  if (!grad) return {};

  const double t = sum_columns(s.cols, [&](int64_t j) { return odds(load(y + j) * to_p); });
  auto* coefficients = reinterpret_cast<typename T::Cell*>(y);
  const float base = float((p_rest * (2 - t) - p_top) / rest);
  for (int64_t j = 0; j < s.cols; j += kWidth) {
    const Vec e = load(y + j);
    Vec d = e * (base + to_p * odds(e * to_p));
    if (T::kPack > 1) d *= load(s.u.factor + j);
    T::put(coefficients, j, d);
  }
  const double d_positive = softmax.q + pos / rest * (p_rest * t + p_top);
  return {top.column, float(p_top * (2 - t)), float(d_positive)};
}

// Computes loss and gradient of the rows from I on, as many as a panel holds.
template <class T>
void run_block(const Scratch<T>& s, const TwoViewsArgs& args, int64_t I, float* panel, float* du) {
  const double scale = kLog2e / args.temperature;
  const Packed<T>& u = s.u;
  const int64_t rows = smaller(s.n - I, s.block);
  store_similarities(u, I, rows, u, 0, s.cols, float(scale), panel, s.ld);
  Coefficients d[kMaxRows];
  for (int64_t i = 0; i < rows; ++i) {
    d[i] = finish_row(s, scale, args.dz != nullptr, I + i, panel + i * s.ld);
  }
  if (!args.dz) return;
  memset(du, 0, s.block * u.width * sizeof *du);
  const auto* coefficients = reinterpret_cast<typename T::Cell*>(panel);
  for (int64_t j = 0; j < s.cols; j += kSpan) {
    accumulate<T, false>(coefficients + j / T::kPack, s.ld, u.pairs + j / T::kPack * u.width,
                         u.width, cells<T>(smaller(kSpan, s.cols - j)), du, u.width, rows,
                         round_up(s.D, kCols));
  }
  for (int64_t i = 0; i < rows; ++i, du += u.width) {
    const int64_t row = I + i, positive = row < s.N ? row + s.N : row - s.N;
    for (int64_t k = 0; k < s.D; ++k) {
      du[k] += d[i].d_top * unit(u, d[i].top, k) - d[i].d_positive * unit(u, positive, k);
    }
    const double mean = 1 / (double(s.n) * double(args.temperature));
    store_raw_grad(u, row, du, mean, args.dz + row * s.D);
  }
}

template <class T>
int64_t run(const TwoViewsArgs& args) {
  const auto s = carve<T>(args);
  if (!args.workspace) return s.bytes;
  parallel(args.threads, [&](Team& team, int rank) {
    const Range packed = share(s.padded, team, rank, kMaxBlock);
    for (int64_t I = packed.begin; I < packed.end; I += kMaxBlock) {
      pack_rows(s.u, I, I + kMaxBlock, args.z0, s.N, args.z1, s.n);
      pack_panels(s.u, I, I + kMaxBlock);
      if (args.dz) pack_pairs(s.u, I, I + kMaxBlock);
    }
    team.barrier();
    float* panel = s.panels + rank * s.block * s.ld;
    float* du = s.du + rank * s.block * s.u.width;
    const Range blocks = share((s.n + s.block - 1) / s.block, team, rank);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      run_block(s, args, b * s.block, panel, du);
    }
  });
  args.loss[0] = mean_loss(s.loss, s.n, s.n);
  return 0;
}

}  // namespace

int64_t uel(const TwoViewsArgs& args) {
  return stays_bf16(args.z0.dtype) ? run<Bf16>(args) : run<Fp32>(args);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
