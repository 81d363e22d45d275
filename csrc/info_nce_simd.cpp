// InfoNCE in one of three ways, depending on which gradients are wanted.
//
//  1. Keys have no gradient, as in a queue. One pass over the keys keeps the sums of row_sums.h for
//     every anchor. Loss and gradient take 4 N M D FLOPs, and of the keys only a tile is stored.
//  2. Keys have a gradient. A panel holds the softmax of as many anchors as fit into it, and serves
//     both gradients. They take 6 N M D FLOPs.
//  3. Both directions are wanted. The tiles of symmetric.h over anchors and keys serve them all, in
//     8 N M D FLOPs.
#include "info_nce.h"
#include "row_sums.h"
#include "symmetric.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

int64_t positive_of(const InfoNceArgs& args, int64_t i) {
  return args.positive ? args.positive[i] : i;
}

double weight_of(const InfoNceArgs& args, int64_t i) { return args.weight ? args.weight[i] : 1.; }

// The gradient by the logits of a row's own loss is multiplied with this to become the gradient by
// the cosines of the whole loss, for a row that counts 1.
double share_of_row(const InfoNceArgs& args) {
  return 1 / ((args.mean ? double(args.N) : 1.) * double(args.temperature));
}

template <class T>
void pack_keys(const Packed<T>& k, const InfoNceArgs& args, int64_t J) {
  pack_rows(k, 0, kMaxBlock, args.keys, J, args.M);
  if (args.danchor) pack_pairs(k, 0, kMaxBlock);
}

// Adds the tile of keys from J on, `k`, to the sums of the anchors from I on.
template <class T>
void add_keys(const RowSums<T>& s,
              const InfoNceArgs& args,
              int64_t chunk,
              int64_t I,
              const Packed<T>& k,
              int64_t J) {
  const int64_t keys = smaller(args.M - J, kMaxBlock), anchors = smaller(args.N - I, kMaxBlock);
  add_tile(s, chunk, I, k, keys, args.temperature, [&](float* y) {
    for (int64_t i = 0; i < anchors; ++i) {
      const int64_t positive = positive_of(args, I + i);
      if (J <= positive && positive < J + keys) y[(positive - J) * kMaxBlock + i] = -INFINITY;
    }
  });
}

// Stores the gradient of one anchor and returns its loss, from the sums of all chunks. The positive
// is packed into row 0 of `k`.
template <class T>
double finish_anchor(const RowSums<T>& s, const InfoNceArgs& args, const Packed<T>& k, int64_t i) {
  pack_row(k, 0, args.keys, positive_of(args, i));
  const double log_pos = cosine(s.u, i, k, 0) * (kLog2e / args.temperature);
  const RowLoss row = row_loss(log_sum(s, i), log_pos);
  if (!args.danchor) return row.loss;
  float* du = s.du + i * s.u.width;
  for (int64_t c = 0; c < s.chunks; ++c) {
    const float* part = s.du + (c * s.padded + i) * s.u.width;
    const float weight = float(::exp2(s.peak[c * s.padded + i] - row.log_den));
    for (int64_t d = 0; d < args.D; ++d) du[d] = (c ? du[d] : 0.f) + weight * part[d];
  }
  for (int64_t d = 0; d < args.D; ++d) du[d] -= float(row.q) * unit(k, 0, d);
  const double scale = share_of_row(args) * weight_of(args, i);
  store_raw_grad(s.u, i, du, scale, args.danchor + i * args.D);
  return row.loss;
}

void store_loss(const InfoNceArgs& args, const double* loss) {
  if (args.mean) {
    args.loss[0] = mean_loss(loss, args.N, args.N);
  } else {
    for (int64_t i = 0; i < args.N; ++i) args.loss[i] = float(loss[i]);
  }
}

template <class T>
int64_t run_pass(const InfoNceArgs& args) {
  Carver carver{args.workspace};
  const auto s = carve_sums<T>(carver, args.N, args.D, tiles_of(args.M), args.danchor);
  double* loss = carver.take<double>(args.N);
  int* next = carver.take<int>(1);
  // every thread has a tile of keys
  const auto carve_tile = [&](Carver& own) { return carve_rows<T>(own, kMaxBlock, args.D); };
  const int64_t tile_bytes = bytes_of(carve_tile);
  if (!args.workspace) return carver.bytes + args.threads * tile_bytes;

  *next = 0;
  parallel(args.threads, [&](Team& team, int rank) {
    Carver own{args.workspace, carver.bytes + rank * tile_bytes};
    const Packed<T> k = carve_tile(own);
    pack_share(s, args.anchor, team, rank);
    team.barrier();
    add_tiles(
        s, next, [&](int64_t t) { pack_keys(k, args, t * kMaxBlock); },
        [&](int64_t chunk, int64_t I, int64_t t) {
          add_keys(s, args, chunk, I, k, t * kMaxBlock);
        });
    team.barrier();
    const Range rows = share(args.N, team, rank);
    for (int64_t i = rows.begin; i < rows.end; ++i) loss[i] = finish_anchor(s, args, k, i);
  });
  store_loss(args, loss);
  return 0;
}

// How many numbers a panel has at most.
constexpr int64_t kPanel = int64_t(1) << 21;

struct Panel {
  int block;  // rows and columns of a task
  int64_t padded_n, padded_m, rows;
  Packed<Fp32> u;  // [padded_n, D] of the anchors
  Packed<Fp32> v;  // [padded_m, D] of the keys
  float* p;        // [rows, padded_m] the softmax of some anchors, 0 at their positives
  float* q;        // [padded_n] the sum of each row of p
  double* loss;    // [N]
  float* du;       // [rows, u.width]
  float* dv;       // [padded_m, v.width]
  int* next;       // [2 N / rows] the next task of each loop over tasks
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

// Makes the softmax, the loss and the gradient of the block of anchors from I on. The panel's first
// row is that of anchor `first`.
void softmax_block(const Panel& s, const InfoNceArgs& args, int64_t first, int64_t I) {
  const float scale = float(kLog2e / args.temperature);
  const int64_t rows = smaller(args.N - I, s.block);
  float* panel = s.p + (I - first) * s.padded_m;
  store_similarities(s.u, I, s.block, s.v, 0, args.M, scale, panel, s.padded_m);
  const int64_t width = round_up(args.M, kCols);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = panel + i * s.padded_m;
    for (int64_t j = args.M; j < width; ++j) row[j] = -INFINITY;
    const int64_t positive = positive_of(args, I + i);
    row[positive] = -INFINITY;
    Vec top = splat(-INFINITY);
    for (int64_t j = 0; j < width; j += kWidth) top = maximum(top, load(row + j));
    const float peak = horizontal_maximum(top);
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

int64_t run_panels(const InfoNceArgs& args) {
  const Panel s = carve_panel(args);
  if (!args.workspace) return s.bytes;
  memset(s.next, 0, 2 * (s.padded_n / s.rows + 1) * sizeof *s.next);
  parallel(args.threads, [&](Team& team, int rank) {
    const Range n = share(s.padded_n, team, rank, s.block);
    pack_rows(s.u, n.begin, n.end, args.anchor, n.begin, args.N);
    const Range m = share(s.padded_m, team, rank, s.block);
    pack_rows(s.v, m.begin, m.end, args.keys, m.begin, args.M);
    pack_panels(s.v, m.begin, m.end);
    memset(s.dv + m.begin * s.v.width, 0, (m.end - m.begin) * s.v.width * sizeof *s.dv);
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
    // a key that is several anchors' positive takes them in their order, on one thread
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
  return 0;
}

// Whether symmetric.h serves the call. It does so in one direction too where rows stay bf16, which
// a panel does not support.
bool in_tiles(const InfoNceArgs& args) {
  const bool plain = args.mean && !args.positive && !args.weight;
  return args.symmetric || (args.dkeys && plain && stays_bf16(args.anchor.dtype));
}

}  // namespace

int64_t info_nce(const InfoNceArgs& args) {
  if (in_tiles(args)) {
    return symmetric({args, args.anchor, args.keys, args.N, args.N + args.M, args.D,
                      /*positive=*/args.N, args.symmetric ? Pairs::both_ways : Pairs::one_way,
                      args.temperature, args.loss, args.danchor, args.dkeys});
  }
  if (args.dkeys) return run_panels(args);
  return stays_bf16(args.anchor.dtype) ? run_pass<Bf16>(args) : run_pass<Fp32>(args);
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
