// A step of the bank in two passes over its rows, neither of which stores a matrix of similarities.
//
// The first, which losses that are known make needless, sums exponentials for every anchor's
// denominator: 2 N K D FLOPs. In the second a tile of the bank, its rows, meets all anchors again.
// Its weights p c, with c what an anchor counts, are multiplied with the anchors while they are
// hot, 4 N K D in all, and the tile's rows go through gradient, velocity and update before the next
// tile comes. The positive's 1 - p is the share q of the negatives, of which nothing cancels.
#include "bank_step.h"
#include "row_sums.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

struct Scratch {
  int64_t groups, key_tiles, bank_tiles;
  RowSums<Fp32> sums;  // of the anchors, over the negatives
  float* log_den;      // [padded] to base 2
  float* weight;       // [padded]
  float* share;        // [padded] weight q
  int* next;           // [2] the next task of either pass
  int64_t bytes;
};

// What every thread has of its own: a tile of columns, and the gradient of its rows.
struct Tile {
  Packed<Fp32> rows;  // [kMaxBlock, D]
  float* du;          // [kMaxBlock, rows.width]
};

Tile carve_tile(Carver& carver, int64_t D) {
  Tile tile;
  tile.rows = carve_rows<Fp32>(carver, kMaxBlock, D);
  tile.du = carver.take<float>(kMaxBlock * tile.rows.width);
  return tile;
}

int64_t tile_bytes(int64_t D) {
  Carver counted{nullptr};
  carve_tile(counted, D);
  return counted.bytes;
}

constexpr int64_t tiles_of(int64_t rows) { return (rows + kMaxBlock - 1) / kMaxBlock; }

Scratch carve(const BankStepArgs& args) {
  Scratch s;
  s.groups = (args.N + kGroup - 1) / kGroup;
  s.key_tiles = args.positive ? 0 : tiles_of(args.N);
  s.bank_tiles = tiles_of(args.K);
  const int64_t chunks = smaller(s.key_tiles + s.bank_tiles, (kTasks + s.groups - 1) / s.groups);
  Carver carver{args.workspace};
  s.sums = carve_sums<Fp32>(carver, args.N, args.D, chunks, /*vectors=*/false);
  s.log_den = carver.take<float>(s.sums.padded);
  s.weight = carver.take<float>(s.sums.padded);
  s.share = carver.take<float>(s.sums.padded);
  s.next = carver.take<int>(2);
  s.bytes = carver.bytes;
  return s;
}

Rows bank_rows(const BankStepArgs& args) { return {args.bank, DType::fp32, args.D}; }

// The positives of a block of anchors from I on, in the logits of a tile of the bank from J on.
void exclude_positives(const BankStepArgs& args,
                       int64_t I,
                       int64_t anchors,
                       int64_t J,
                       int64_t entries,
                       float* y) {
  for (int64_t i = 0; i < anchors && args.positive; ++i) {
    const int64_t at = args.positive[I + i] - J;
    if (0 <= at && at < entries) y[at * kMaxBlock + i] = -INFINITY;
  }
}

// Adds tile number t of all columns, keys and then bank, to the sums of anchors from I on.
void add_columns(const Scratch& s,
                 const BankStepArgs& args,
                 int64_t chunk,
                 int64_t I,
                 const Tile& k,
                 int64_t t) {
  const int64_t anchors = smaller(args.N - I, kMaxBlock);
  if (t >= s.key_tiles) {
    const int64_t J = (t - s.key_tiles) * kMaxBlock, entries = smaller(args.K - J, kMaxBlock);
    add_tile(s.sums, chunk, I, anchors, k.rows, entries, args.temperature,
             [&](float* y) { exclude_positives(args, I, anchors, J, entries, y); });
    return;
  }
  const int64_t n = args.N / args.views;
  const int64_t J = t * kMaxBlock, keys = smaller(args.N - J, kMaxBlock);
  if (J / n > (I + anchors - 1) / n || I / n > (J + keys - 1) / n) return;
  add_tile(s.sums, chunk, I, anchors, k.rows, keys, args.temperature, [&](float* y) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < anchors; ++i) {
        const bool negative = (I + i) / n == (J + j) / n && I + i != J + j;
        if (!negative) y[j * kMaxBlock + i] = -INFINITY;
      }
    }
  });
}

void sum_denominators(const Scratch& s, const BankStepArgs& args, const Tile& k) {
  for (;;) {
    const int64_t task = __atomic_fetch_add(s.next, 1, __ATOMIC_RELAXED);
    if (task >= s.groups * s.sums.chunks) break;
    const int64_t chunk = task / s.groups, begin = task % s.groups * kGroup;
    const int64_t end = smaller(begin + kGroup, args.N);
    clear(s.sums, chunk, begin, end);
    const Range tiles = chunk_of(s.key_tiles + s.bank_tiles, s.sums, chunk);
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      if (t < s.key_tiles) {
        pack_rows(k.rows, 0, kMaxBlock, args.keys, t * kMaxBlock, args.N);
      } else {
        const int64_t J = (t - s.key_tiles) * kMaxBlock;
        pack_rows(k.rows, 0, kMaxBlock, bank_rows(args), J, args.K);
      }
      for (int64_t I = begin; I < end; I += kMaxBlock) add_columns(s, args, chunk, I, k, t);
    }
  }
}

// What the bank's gradient needs of an anchor; `k` has room for a row.
void finish_anchor(const Scratch& s, const BankStepArgs& args, const Packed<Fp32>& k, int64_t i) {
  if (args.positive) {
    pack_row(k, 0, bank_rows(args), args.positive[i]);
  } else {
    pack_row(k, 0, args.keys, i);
  }
  const double log_pos = cosine(s.sums.u, i, k, 0) * (kLog2e / args.temperature);
  double log_den, q;
  if (args.losses) {
    log_den = log_pos + args.losses[i] * kLog2e;
    q = -expm1(-double(args.losses[i]));
  } else {
    const RowLoss row = row_loss(log_sum(s.sums, i), log_pos);
    log_den = row.log_den;
    q = row.q;
  }
  const double weight = args.weight ? args.weight[i] : 1 / double(args.N);
  s.log_den[i] = float(log_den);
  s.weight[i] = float(weight);
  s.share[i] = float(weight * q);
}

// du = sum over anchors of c p u for a tile of the bank from J on.
void sum_anchors(const Scratch& s, const BankStepArgs& args, const Tile& w, int64_t J) {
  alignas(64) float y[kMaxBlock * kMaxBlock];
  const Packed<Fp32>& u = s.sums.u;
  const int64_t entries = smaller(args.K - J, kMaxBlock), rows = round_up(entries, kRows);
  memset(w.du, 0, kMaxBlock * w.rows.width * sizeof *w.du);
  for (int64_t I = 0; I < args.N; I += kMaxBlock) {
    const int64_t anchors = smaller(args.N - I, kMaxBlock);
    logits(w.rows, entries, u, I, anchors, args.temperature, y);
    exclude_positives(args, I, anchors, J, entries, y);
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t i = 0; i < round_up(anchors, kCols); i += kWidth) {
        float* p = y + j * kMaxBlock + i;
        store(p, exp2<true>(load(p) - load(s.log_den + I + i)) * load(s.weight + I + i));
      }
    }
    accumulate<Fp32, false>(y, kMaxBlock, u.rows + I * u.ld, u.ld, anchors, w.du, w.rows.width,
                            rows, round_up(args.D, kCols));
  }
  for (int64_t i = 0; i < args.N && args.positive; ++i) {
    const int64_t at = args.positive[i] - J;
    if (at < 0 || at >= entries) continue;
    float* du = w.du + at * w.rows.width;
    for (int64_t d = 0; d < args.D; ++d) du[d] += s.share[i] * unit(u, i, d);
  }
}

void update(const BankStepArgs& args, const Tile& w, int64_t J) {
  const int64_t entries = smaller(args.K - J, kMaxBlock);
  for (int64_t j = 0; j < entries; ++j) {
    float* ascent = w.du + j * w.rows.width;
    store_raw_grad(w.rows, j, ascent, 1 / double(args.temperature), ascent);
    float* bank = args.bank + (J + j) * args.D;
    float* velocity = args.velocity + (J + j) * args.D;
    for (int64_t d = 0; d < args.D; ++d) {
      velocity[d] = args.momentum * velocity[d] - ascent[d] + args.weight_decay * bank[d];
      bank[d] -= args.lr * velocity[d];
    }
  }
}

}  // namespace

int64_t bank_step_workspace(const BankStepArgs& args) {
  return carve(args).bytes + args.threads * tile_bytes(args.D);
}

void bank_step(const BankStepArgs& args) {
  const Scratch s = carve(args);
  s.next[0] = s.next[1] = 0;
  parallel(args.threads, [&](Team& team, int rank) {
    Carver carver{args.workspace, s.bytes + rank * tile_bytes(args.D)};
    const Tile tile = carve_tile(carver, args.D);
    const Range blocks = share(s.sums.padded / kMaxBlock, team, rank);
    const int64_t begin = blocks.begin * kMaxBlock, end = blocks.end * kMaxBlock;
    pack_rows(s.sums.u, begin, end, args.anchor, begin, args.N);
    pack_panels(s.sums.u, begin, end);
    for (int64_t i = begin > args.N ? begin : args.N; i < end; ++i) {
      s.log_den[i] = s.weight[i] = 0;
    }
    team.barrier();
    if (!args.losses) sum_denominators(s, args, tile);
    team.barrier();
    const Range rows = share(args.N, team, rank);
    for (int64_t i = rows.begin; i < rows.end; ++i) finish_anchor(s, args, tile.rows, i);
    team.barrier();
    for (;;) {
      const int64_t J = int64_t(__atomic_fetch_add(s.next + 1, 1, __ATOMIC_RELAXED)) * kMaxBlock;
      if (J >= args.K) break;
      pack_rows(tile.rows, 0, kMaxBlock, bank_rows(args), J, args.K);
      sum_anchors(s, args, tile, J);
      update(args, tile, J);
    }
  });
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
