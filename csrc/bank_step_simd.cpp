// A step of the bank in two passes over its rows, neither of which stores a matrix of similarities.
//
// p is the softmax of an anchor over its negatives and its positive, c what the anchor counts, and
// q the share of its negatives. q is 1 - p of the positive, but it is computed from the negatives,
// so that nothing cancels.
//
// The first pass sums exponentials for every anchor's denominator, in 2 N K D FLOPs. It is left out
// where the anchors' losses are known. In the second pass a tile of the bank's rows meets all
// anchors: their weights c p are multiplied with the anchors while these are in the cache, in
// 4 N K D FLOPs. Then the tile's rows go through gradient, velocity and update before the next tile
// comes.
#include "bank_step.h"
#include "row_sums.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

struct Scratch {
  int64_t key_tiles;   // of the sums' columns the first are keys, the others entries of the bank
  RowSums<Fp32> sums;  // of the anchors, over their negatives
  float* log_den;      // [padded] the denominator's logarithm to base 2
  float* weight;       // [padded] c
  float* share;        // [padded] c q
  int* next;           // [2] the next task of each pass
  int64_t bytes;
};

// Every thread has a tile of columns of its own, and the gradient of its rows.
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

Scratch carve(const BankStepArgs& args) {
  Scratch s;
  s.key_tiles = args.positive ? 0 : tiles_of(args.N);
  const int64_t tiles = s.key_tiles + tiles_of(args.K);
  Carver carver{args.workspace};
  s.sums = carve_sums<Fp32>(carver, args.N, args.D, tiles, /*vectors=*/false);
  s.log_den = carver.take<float>(s.sums.padded);
  s.weight = carver.take<float>(s.sums.padded);
  s.share = carver.take<float>(s.sums.padded);
  s.next = carver.take<int>(2);
  s.bytes = carver.bytes;
  return s;
}

Rows bank_rows(const BankStepArgs& args) { return {args.bank, DType::fp32, args.D}; }

// Sets to -inf the positives of the anchors from I on, in the logits of the tile of the bank from J
// on.
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

// Adds tile t of the columns, `k`, to the sums of the anchors from I on.
void add_columns(const Scratch& s,
                 const BankStepArgs& args,
                 int64_t chunk,
                 int64_t I,
                 const Tile& k,
                 int64_t t) {
  const int64_t anchors = smaller(args.N - I, kMaxBlock);
  if (t >= s.key_tiles) {
    const int64_t J = (t - s.key_tiles) * kMaxBlock, entries = smaller(args.K - J, kMaxBlock);
    add_tile(s.sums, chunk, I, k.rows, entries, args.temperature,
             [&](float* y) { exclude_positives(args, I, anchors, J, entries, y); });
    return;
  }
  const int64_t n = args.N / args.views;
  const int64_t J = t * kMaxBlock, keys = smaller(args.N - J, kMaxBlock);
  // no anchor and key of these blocks are of the same view
  if (J / n > (I + anchors - 1) / n || I / n > (J + keys - 1) / n) return;
  add_tile(s.sums, chunk, I, k.rows, keys, args.temperature, [&](float* y) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < anchors; ++i) {
        const bool negative = (I + i) / n == (J + j) / n && I + i != J + j;
        if (!negative) y[j * kMaxBlock + i] = -INFINITY;
      }
    }
  });
}

// Packs tile t of the columns.
void pack_columns(const Scratch& s, const BankStepArgs& args, const Tile& k, int64_t t) {
  if (t < s.key_tiles) {
    pack_rows(k.rows, 0, kMaxBlock, args.keys, t * kMaxBlock, args.N);
  } else {
    pack_rows(k.rows, 0, kMaxBlock, bank_rows(args), (t - s.key_tiles) * kMaxBlock, args.K);
  }
}

// Makes what the bank's gradient needs of anchor i. The positive is packed into row 0 of `k`.
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

// Sums c p u over the anchors, with their unit rows u, for the tile of the bank from J on.
void sum_anchors(const Scratch& s, const BankStepArgs& args, const Tile& w, int64_t J) {
  alignas(64) float y[kMaxBlock * kMaxBlock];
  const float scale = float(kLog2e / args.temperature);
  const Packed<Fp32>& u = s.sums.u;
  const int64_t entries = smaller(args.K - J, kMaxBlock), rows = round_up(entries, kRows);
  memset(w.du, 0, kMaxBlock * w.rows.width * sizeof *w.du);
  for (int64_t I = 0; I < args.N; I += kMaxBlock) {
    const int64_t anchors = smaller(args.N - I, kMaxBlock);
    store_similarities(w.rows, 0, entries, u, I, anchors, scale, y, kMaxBlock);
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

// Moves the tile's rows by their gradient.
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

int64_t bank_step(const BankStepArgs& args) {
  const Scratch s = carve(args);
  const int64_t tile_bytes = bytes_of([&](Carver& own) { carve_tile(own, args.D); });
  if (!args.workspace) return s.bytes + args.threads * tile_bytes;

  s.next[0] = s.next[1] = 0;
  parallel(args.threads, [&](Team& team, int rank) {
    Carver own{args.workspace, s.bytes + rank * tile_bytes};
    const Tile tile = carve_tile(own, args.D);
    const Range packed = pack_share(s.sums, args.anchor, team, rank);
    for (int64_t i = packed.begin; i < packed.end; ++i) s.log_den[i] = s.weight[i] = 0;
    team.barrier();
    if (!args.losses) {
      add_tiles(
          s.sums, s.next, [&](int64_t t) { pack_columns(s, args, tile, t); },
          [&](int64_t chunk, int64_t I, int64_t t) { add_columns(s, args, chunk, I, tile, t); });
    }
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
  return 0;
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
