// InfoNCE in one of three ways, by what is wanted of it.
//
// Where keys have no gradient, as in a queue, one pass over them keeps, for every anchor, its
// largest logit so far, m, the sum of 2^(y - m) over the negatives and the sum of 2^(y - m) k, with
// k the unit row of a key: 4 N M D FLOPs for loss and gradient, and no key is stored but a tile's.
// Where they have one, the softmax of as many anchors as fit a panel serves both gradients: 6 N M
// D. In both directions, a tile of the symmetric matrix over anchors and keys serves all: 8 N M D.
#include "info_nce.h"
#include "row_sums.h"
#include "softmax.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

int64_t positive_of(const InfoNceArgs& args, int64_t i) {
  return args.positive ? args.positive[i] : i;
}

double weight_of(const InfoNceArgs& args, int64_t i) { return args.weight ? args.weight[i] : 1.; }

// What takes the gradient by cosines of a row that counts 1 to that of the loss.
double share_of_row(const InfoNceArgs& args) {
  return 1 / ((args.mean ? double(args.N) : 1.) * double(args.temperature));
}

template <class T>
struct Pass {
  int64_t groups, tiles;
  RowSums<T> sums;  // of the anchors, over the negatives
  double* loss;     // [N]
  int* next;        // [1] the next task
  Carver carver;    // of what follows: a tile of keys for every thread
};

template <class T>
Pass<T> carve_pass(const InfoNceArgs& args) {
  Pass<T> p;
  p.groups = (args.N + kGroup - 1) / kGroup;
  p.tiles = (args.M + kMaxBlock - 1) / kMaxBlock;
  const int64_t chunks = smaller(p.tiles, (kTasks + p.groups - 1) / p.groups);
  p.carver = {args.workspace};
  p.sums = carve_sums<T>(p.carver, args.N, args.D, chunks, args.danchor);
  p.loss = p.carver.template take<double>(args.N);
  p.next = p.carver.template take<int>(1);
  return p;
}

template <class T>
void pack_keys(const Packed<T>& k, const InfoNceArgs& args, int64_t J) {
  pack_rows(k, 0, kMaxBlock, args.keys, J, args.M);
  if (args.danchor) pack_pairs(k, 0, kMaxBlock);
}

// Adds a tile of keys to the sums of a block of anchors.
template <class T>
void add_keys(const Pass<T>& p,
              const InfoNceArgs& args,
              int64_t chunk,
              int64_t I,
              const Packed<T>& k,
              int64_t J) {
  const int64_t keys = smaller(args.M - J, kMaxBlock), anchors = smaller(args.N - I, kMaxBlock);
  add_tile(p.sums, chunk, I, anchors, k, keys, args.temperature, [&](float* y) {
    for (int64_t i = 0; i < anchors; ++i) {
      const int64_t positive = positive_of(args, I + i);
      if (J <= positive && positive < J + keys) y[(positive - J) * kMaxBlock + i] = -INFINITY;
    }
  });
}

// Loss and gradient of one anchor from the sums of all chunks; `k` has room for a row.
template <class T>
void finish_anchor(const Pass<T>& p, const InfoNceArgs& args, const Packed<T>& k, int64_t i) {
  const RowSums<T>& s = p.sums;
  pack_row(k, 0, args.keys, positive_of(args, i));
  const double log_pos = cosine(s.u, i, k, 0) * (kLog2e / args.temperature);
  const RowLoss row = row_loss(log_sum(s, i), log_pos);
  p.loss[i] = row.loss;
  if (!args.danchor) return;
  float* du = s.du + i * s.u.width;
  for (int64_t c = 0; c < s.chunks; ++c) {
    const float* part = s.du + (c * s.padded + i) * s.u.width;
    const float weight = float(::exp2(s.peak[c * s.padded + i] - row.log_den));
    for (int64_t d = 0; d < args.D; ++d) du[d] = (c ? du[d] : 0.f) + weight * part[d];
  }
  for (int64_t d = 0; d < args.D; ++d) du[d] -= float(row.q) * unit(k, 0, d);
  const double scale = share_of_row(args) * weight_of(args, i);
  store_raw_grad(s.u, i, du, scale, args.danchor + i * args.D);
}

void store_loss(const InfoNceArgs& args, const double* loss) {
  if (!args.mean) {
    for (int64_t i = 0; i < args.N; ++i) args.loss[i] = float(loss[i]);
    return;
  }
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
    const Range blocks = share(p.sums.padded / kMaxBlock, team, rank);
    const int64_t begin_row = blocks.begin * kMaxBlock, end_row = blocks.end * kMaxBlock;
    pack_rows(p.sums.u, begin_row, end_row, args.anchor, begin_row, args.N);
    pack_panels(p.sums.u, begin_row, end_row);
    team.barrier();
    for (;;) {
      const int64_t task = __atomic_fetch_add(p.next, 1, __ATOMIC_RELAXED);
      if (task >= p.groups * p.sums.chunks) break;
      const int64_t chunk = task / p.groups, begin = task % p.groups * kGroup;
      const int64_t end = smaller(begin + kGroup, args.N);
      clear(p.sums, chunk, begin, end);
      const Range tiles = chunk_of(p.tiles, p.sums, chunk);
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        pack_keys(k, args, t * kMaxBlock);
        for (int64_t I = begin; I < end; I += kMaxBlock) {
          add_keys(p, args, chunk, I, k, t * kMaxBlock);
        }
      }
    }
    team.barrier();
    const Range rows = share(args.N, team, rank);
    for (int64_t i = rows.begin; i < rows.end; ++i) finish_anchor(p, args, k, i);
  });
  store_loss(args, p.loss);
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
    const int64_t positive = positive_of(args, I + i);
    row[positive] = -INFINITY;
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
    const double log_pos = cosine(s.u, I + i, s.v, positive) * (kLog2e / args.temperature);
    const RowLoss result = row_loss(log2(neg) + from[0], log_pos);
    s.loss[I + i] = result.loss;
    s.q[I + i] = float(weight_of(args, I + i) * result.q);
    const double weight_of_row = weight_of(args, I + i) * ::exp2(from[0] - result.log_den);
    const Vec weight = splat(float(weight_of_row));
    for (int64_t j = 0; j < width; j += kWidth) store(row + j, load(row + j) * weight);
  }
  memset(panel + rows * s.padded_m, 0, (s.block - rows) * s.padded_m * sizeof *panel);
  if (!args.danchor) return;
  float* du = s.du + (I - first) * s.u.width;
  memset(du, 0, s.block * s.u.width * sizeof *du);
  accumulate<Fp32, false>(panel, s.padded_m, s.v.rows, s.v.width, args.M, du, s.u.width, rows,
                          round_up(args.D, kCols));
  for (int64_t i = 0; i < rows; ++i) {
    float* row = du + i * s.u.width;
    const int64_t positive = positive_of(args, I + i);
    for (int64_t d = 0; d < args.D; ++d) row[d] -= s.q[I + i] * unit(s.v, positive, d);
    store_raw_grad(s.u, I + i, row, share_of_row(args), args.danchor + (I + i) * args.D);
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
    const Range rows = share(args.M, team, rank);
    // in the order of the anchors, whichever thread has their key
    for (int64_t i = 0; i < args.N; ++i) {
      const int64_t j = positive_of(args, i);
      if (j < rows.begin || j >= rows.end) continue;
      float* dv = s.dv + j * s.v.width;
      for (int64_t d = 0; d < args.D; ++d) dv[d] -= s.q[i] * unit(s.u, i, d);
    }
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      store_raw_grad(s.v, j, s.dv + j * s.v.width, share_of_row(args), args.dkeys + j * args.D);
    }
  });
  store_loss(args, s.loss);
}

bool in_tiles(const InfoNceArgs& args) {
  const bool plain = args.mean && !args.positive && !args.weight;
  return args.symmetric || (args.dkeys && plain && stays_bf16(args.anchor.dtype));
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
