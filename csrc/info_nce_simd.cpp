// InfoNCE in one of three ways, by what is wanted of it.
//
// Where keys have no gradient, as in a queue, one pass over them keeps, for every anchor, its
// largest logit so far, m, the sum of 2^(y - m) over the negatives and the sum of 2^(y - m) k, with
// k the unit row of a key: 4 N M D FLOPs for loss and gradient, and no key is stored but a tile's.
// Where they have one, the softmax of as many anchors as fit a panel serves both gradients: 6 N M
// D. In both directions, a tile of the symmetric matrix over anchors and keys serves all: 8 N M D.
#include "info_nce.h"
#include "softmax.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Anchors and their sums that stay in the L2 cache while keys go by.
constexpr int64_t kGroup = 4 * kMaxBlock;
// Chunks of keys are for threads to share. Their number does not depend on that of the threads, and
// so neither does a result.
constexpr int64_t kTasks = 32;

template <class T>
struct Pass {
  int64_t padded, groups, tiles, chunks;
  Packed<T> u;    // [padded, D] of the anchors
  float* du;      // [chunks, padded, u.width] sum of 2^(y - peak) k, where it is wanted
  double* sum;    // [chunks, padded] sum of 2^(y - peak)
  float* peak;    // [chunks, padded]
  double* loss;   // [N]
  int* next;      // [1] the next task
  Carver carver;  // of what follows: a tile of keys for every thread
};

template <class T>
Pass<T> carve_pass(const InfoNceArgs& args) {
  Pass<T> p;
  p.padded = round_up(args.N, kMaxBlock);
  p.groups = (args.N + kGroup - 1) / kGroup;
  p.tiles = (args.M + kMaxBlock - 1) / kMaxBlock;
  p.chunks = smaller(p.tiles, (kTasks + p.groups - 1) / p.groups);
  p.carver = {args.workspace};
  p.u = carve_rows<T>(p.carver, p.padded, args.D);
  p.du = p.carver.template take<float>(args.danchor ? p.chunks * p.padded * p.u.width : 0);
  p.sum = p.carver.template take<double>(p.chunks * p.padded);
  p.peak = p.carver.template take<float>(p.chunks * p.padded);
  p.loss = p.carver.template take<double>(args.N);
  p.next = p.carver.template take<int>(1);
  return p;
}

template <class T>
void pack_keys(const Packed<T>& k, const InfoNceArgs& args, int64_t J) {
  pack_rows(k, 0, kMaxBlock, args.keys, J, args.M);
  if (args.danchor) pack_pairs(k, 0, kMaxBlock);
}

// Adds a tile of keys, its rows, to the sums of a block of anchors, its columns: what is summed
// over keys is summed down the lanes, and a tile of keys needs no other form than its rows.
template <class T>
void add_tile(const Pass<T>& p,
              const InfoNceArgs& args,
              int64_t chunk,
              int64_t I,
              const Packed<T>& k,
              int64_t J) {
  alignas(64) float y[kMaxBlock * kMaxBlock];
  Weights<T> w;
  const float scale = float(kLog2e / args.temperature);
  const int64_t keys = smaller(args.M - J, kMaxBlock), anchors = smaller(args.N - I, kMaxBlock);
  const int64_t rows = round_up(keys, kRows), columns = round_up(anchors, kCols);
  for (int64_t i = 0; i < columns; i += kCols) {
    for (int64_t j = 0; j < rows; j += kRows) {
      Vec tile[kRows][kVecs];
      similarities(k, j, p.u, I + i, scale, 0.f, tile);
      store_tile(tile, y + j * kMaxBlock + i, kMaxBlock);
    }
  }
  // no negatives: what lies behind the last key, and the positives
  for (int64_t at = keys * kMaxBlock; at < rows * kMaxBlock; ++at) y[at] = -INFINITY;
  for (int64_t i = 0; i < anchors; ++i) {
    if (J <= I + i && I + i < J + keys) y[(I + i - J) * kMaxBlock + i] = -INFINITY;
  }
  const Vec lowest = splat(-INFINITY);
  for (int64_t i = 0; i < columns; i += kWidth) {
    const int64_t first = chunk * p.padded + I + i;
    const Vec before = load(p.peak + first);
    Vec peak = before;
    for (int64_t j = 0; j < rows; ++j) peak = maximum(peak, load(y + j * kMaxBlock + i));
    if (any(peak != before)) {
      store(p.peak + first, peak);
      for (int l = 0; l < kWidth; ++l) {
        if (peak[l] == before[l]) continue;
        const double shrink = ::exp2(double(before[l]) - peak[l]);
        p.sum[first + l] *= shrink;
        float* du = p.du + (first + l) * p.u.width;
        for (int64_t d = 0; d < p.u.width && args.danchor; ++d) du[d] *= float(shrink);
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
    for (int l = 0; l < kWidth; ++l) p.sum[first + l] += double(sum[l]);
  }
  if (!args.danchor) return;
  accumulate<T, true>(w.over_rows(), kMaxBlock, k.pairs, k.width, cells<T>(keys),
                      p.du + (chunk * p.padded + I) * p.u.width, p.u.width, anchors,
                      round_up(args.D, kCols));
}

// Loss and gradient of one anchor from the sums of all chunks; `k` has room for a row.
template <class T>
void finish_anchor(const Pass<T>& p, const InfoNceArgs& args, const Packed<T>& k, int64_t i) {
  float peak = -INFINITY;
  for (int64_t c = 0; c < p.chunks; ++c) {
    const float other = p.peak[c * p.padded + i];
    peak = peak < other ? other : peak;
  }
  const double from = peak == -INFINITY ? 0. : peak;
  double neg = 0;
  for (int64_t c = 0; c < p.chunks; ++c) {
    const double weight = ::exp2(p.peak[c * p.padded + i] - from);
    neg += p.sum[c * p.padded + i] * weight;
  }
  pack_row(k, 0, args.keys, i);
  const double log_pos = cosine(p.u, i, k, 0) * (kLog2e / args.temperature);
  const RowLoss row = row_loss(log2(neg) + from, log_pos);
  p.loss[i] = row.loss;
  if (!args.danchor) return;
  float* du = p.du + i * p.u.width;
  for (int64_t c = 0; c < p.chunks; ++c) {
    const float* part = p.du + (c * p.padded + i) * p.u.width;
    const float weight = float(::exp2(p.peak[c * p.padded + i] - row.log_den));
    for (int64_t d = 0; d < args.D; ++d) du[d] = (c ? du[d] : 0.f) + weight * part[d];
  }
  for (int64_t d = 0; d < args.D; ++d) du[d] -= float(row.q) * unit(k, 0, d);
  const double scale = 1 / (double(args.N) * double(args.temperature));
  store_raw_grad(p.u, i, du, scale, args.danchor + i * args.D);
}

void mean_loss(const InfoNceArgs& args, const double* loss) {
  double total = 0;
  for (int64_t i = 0; i < args.N; ++i) total += loss[i];
  args.loss[0] = float(total / double(args.N));
}

template <class T>
void run_pass(const InfoNceArgs& args) {
  Pass<T> p = carve_pass<T>(args);
  *p.next = 0;
  const int64_t tile_bytes = [&] {
    Carver counted{nullptr};
    carve_rows<T>(counted, kMaxBlock, args.D);
    return counted.bytes;
  }();
  parallel(args.threads, [&](Team& team, int rank) {
    Carver carver{args.workspace, p.carver.bytes + rank * tile_bytes};
    const Packed<T> k = carve_rows<T>(carver, kMaxBlock, args.D);
    const Range blocks = share(p.padded / kMaxBlock, team, rank);
    const int64_t begin_row = blocks.begin * kMaxBlock, end_row = blocks.end * kMaxBlock;
    pack_rows(p.u, begin_row, end_row, args.anchor, begin_row, args.N);
    pack_panels(p.u, begin_row, end_row);
    team.barrier();
    for (;;) {
      const int64_t task = __atomic_fetch_add(p.next, 1, __ATOMIC_RELAXED);
      if (task >= p.groups * p.chunks) break;
      const int64_t chunk = task / p.groups, begin = task % p.groups * kGroup;
      const int64_t end = smaller(begin + kGroup, args.N);
      const int64_t first = chunk * p.padded + begin, count = round_up(end - begin, kMaxBlock);
      for (int64_t i = first; i < first + count; ++i) {
        p.sum[i] = 0;
        p.peak[i] = -INFINITY;
      }
      if (args.danchor) {
        memset(p.du + first * p.u.width, 0, count * p.u.width * sizeof(float));
      }
      for (int64_t t = chunk * p.tiles / p.chunks; t < (chunk + 1) * p.tiles / p.chunks; ++t) {
        pack_keys(k, args, t * kMaxBlock);
        for (int64_t I = begin; I < end; I += kMaxBlock) {
          add_tile(p, args, chunk, I, k, t * kMaxBlock);
        }
      }
    }
    team.barrier();
    const Range rows = share(args.N, team, rank);
    for (int64_t i = rows.begin; i < rows.end; ++i) finish_anchor(p, args, k, i);
  });
  mean_loss(args, p.loss);
}

template <class T>
int64_t pass_workspace(const InfoNceArgs& args) {
  Carver carver = carve_pass<T>(args).carver;
  for (int rank = 0; rank < args.threads; ++rank) carve_rows<T>(carver, kMaxBlock, args.D);
  return carver.bytes;
}

// The most numbers of a panel.
constexpr int64_t kPanel = int64_t(1) << 21;

struct Panel {
  int block;  // rows and columns of a task
  int64_t padded_n, padded_m, rows;
  Packed<Fp32> u;  // [padded_n, D] of the anchors
  Packed<Fp32> v;  // [padded_m, D] of the keys
  float* p;        // [rows, padded_m] softmax of some anchors, 0 at the positives
  float* q;        // [padded_n] sum of a row of p
  double* loss;    // [N]
  float* du;       // [rows, u.width]
  float* dv;       // [padded_m, v.width]
  int* next;       // [2 N / rows] the next task of every loop over tasks
  int64_t bytes;
};

Panel carve_panel(const InfoNceArgs& args) {
  Panel s;
  s.block = block_rows(args.N + args.M);
  s.padded_n = round_up(args.N, s.block);
  s.padded_m = round_up(args.M, s.block);
  s.rows = smaller(kPanel / s.padded_m / s.block * s.block, s.padded_n);
  if (s.rows == 0) s.rows = s.block;
  Carver carver{args.workspace};
  s.u = carve_rows<Fp32>(carver, s.padded_n, args.D);
  s.v = carve_rows<Fp32>(carver, s.padded_m, args.D);
  s.p = carver.take<float>(s.rows * s.padded_m);
  s.q = carver.take<float>(s.padded_n);
  s.loss = carver.take<double>(args.N);
  s.du = carver.take<float>(s.rows * s.u.width);
  s.dv = carver.take<float>(s.padded_m * s.v.width);
  s.next = carver.take<int>(2 * (s.padded_n / s.rows + 1));
  s.bytes = carver.bytes;
  return s;
}

// The softmax, the loss and the gradient of a block of anchors, whose panel begins at `first`.
void softmax_block(const Panel& s, const InfoNceArgs& args, int64_t first, int64_t I) {
  const float scale = float(kLog2e / args.temperature);
  const int64_t rows = smaller(args.N - I, s.block);
  float* panel = s.p + (I - first) * s.padded_m;
  for (int64_t j = 0; j < args.M; j += kCols) {
    for (int64_t i = 0; i < s.block; i += kRows) {
      Vec y[kRows][kVecs];
      similarities(s.u, I + i, s.v, j, scale, 0.f, y);
      store_tile(y, panel + i * s.padded_m + j, s.padded_m);
    }
  }
  const int64_t width = round_up(args.M, kCols);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = panel + i * s.padded_m;
    for (int64_t j = args.M; j < width; ++j) row[j] = -INFINITY;
    row[I + i] = -INFINITY;
    Vec top = splat(-INFINITY);
    for (int64_t j = 0; j < width; j += kWidth) top = maximum(top, load(row + j));
    float peak = top[0];
    for (int l = 1; l < kWidth; ++l) peak = peak < top[l] ? top[l] : peak;
    const Vec from = splat(peak == -INFINITY ? 0.f : peak);  // -inf - -inf would be NaN
    double neg = 0;
    for (int64_t j = 0; j < width; j += s.block) {
      Vec sum = {};
      for (int64_t k = j; k < smaller(j + s.block, width); k += kWidth) {
        const Vec e = exp2<true>(load(row + k) - from);
        store(row + k, e);
        sum += e;
      }
      neg += double(horizontal_sum(sum));
    }
    const double log_pos = cosine(s.u, I + i, s.v, I + i) * (kLog2e / args.temperature);
    const RowLoss result = row_loss(log2(neg) + from[0], log_pos);
    s.loss[I + i] = result.loss;
    s.q[I + i] = float(result.q);
    const Vec weight = splat(float(::exp2(from[0] - result.log_den)));
    for (int64_t j = 0; j < width; j += kWidth) store(row + j, load(row + j) * weight);
  }
  memset(panel + rows * s.padded_m, 0, (s.block - rows) * s.padded_m * sizeof *panel);
  if (!args.danchor) return;
  float* du = s.du + (I - first) * s.u.width;
  memset(du, 0, s.block * s.u.width * sizeof *du);
  accumulate<Fp32, false>(panel, s.padded_m, s.v.rows, s.v.width, args.M, du, s.u.width, rows,
                          round_up(args.D, kCols));
  const double share_of_mean = 1 / (double(args.N) * double(args.temperature));
  for (int64_t i = 0; i < rows; ++i) {
    float* row = du + i * s.u.width;
    for (int64_t d = 0; d < args.D; ++d) row[d] -= s.q[I + i] * unit(s.v, I + i, d);
    store_raw_grad(s.u, I + i, row, share_of_mean, args.danchor + (I + i) * args.D);
  }
}

void run_panels(const InfoNceArgs& args) {
  const Panel s = carve_panel(args);
  memset(s.next, 0, 2 * (s.padded_n / s.rows + 1) * sizeof *s.next);
  parallel(args.threads, [&](Team& team, int rank) {
    const Range n = share(s.padded_n / s.block, team, rank);
    pack_rows(s.u, n.begin * s.block, n.end * s.block, args.anchor, n.begin * s.block, args.N);
    const Range m = share(s.padded_m / s.block, team, rank);
    const int64_t begin = m.begin * s.block, end = m.end * s.block;
    pack_rows(s.v, begin, end, args.keys, begin, args.M);
    pack_panels(s.v, begin, end);
    memset(s.dv + begin * s.v.width, 0, (end - begin) * s.v.width * sizeof *s.dv);
    team.barrier();
    int* next = s.next;
    for (int64_t first = 0; first < args.N; first += s.rows, next += 2) {
      const int64_t last = smaller(first + s.rows, args.N);
      auto take = [&](int* counter) {
        return int64_t(__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)) * s.block;
      };
      for (int64_t I = first + take(next); I < last; I = first + take(next)) {
        softmax_block(s, args, first, I);
      }
      team.barrier();
      for (int64_t J = take(next + 1); J < args.M; J = take(next + 1)) {
        accumulate<Fp32, true>(s.p + J, s.padded_m, s.u.rows + first * s.u.width, s.u.width,
                               last - first, s.dv + J * s.v.width, s.v.width,
                               smaller(args.M - J, s.block), round_up(args.D, kCols));
      }
      team.barrier();
    }
    const double share_of_mean = 1 / (double(args.N) * double(args.temperature));
    const Range rows = share(args.M, team, rank);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      float* dv = s.dv + j * s.v.width;
      for (int64_t d = 0; d < args.D && j < args.N; ++d) dv[d] -= s.q[j] * unit(s.u, j, d);
      store_raw_grad(s.v, j, dv, share_of_mean, args.dkeys + j * args.D);
    }
  });
  mean_loss(args, s.loss);
}

bool in_tiles(const InfoNceArgs& args) {
  return args.symmetric || (args.dkeys && stays_bf16(args.anchor.dtype));
}

}  // namespace

int64_t info_nce_workspace(const InfoNceArgs& args) {
  if (in_tiles(args)) {
    return symmetric_workspace(args.anchor.dtype, args.N + args.M, args.D,
                               args.danchor || args.dkeys);
  }
  if (args.dkeys) return carve_panel(args).bytes;
  return stays_bf16(args.anchor.dtype) ? pass_workspace<Bf16>(args) : pass_workspace<Fp32>(args);
}

void info_nce(const InfoNceArgs& args) {
  if (in_tiles(args)) {
    symmetric({args.anchor, args.keys, args.N, args.N + args.M, args.D, /*positive=*/args.N,
               args.symmetric ? Pairs::both_ways : Pairs::one_way, args.temperature, args.threads,
               args.loss, args.danchor, args.dkeys, args.workspace});
  } else if (args.dkeys) {
    run_panels(args);
  } else {
    stays_bf16(args.anchor.dtype) ? run_pass<Bf16>(args) : run_pass<Fp32>(args);
  }
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
