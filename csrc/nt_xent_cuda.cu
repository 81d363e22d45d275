#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.cuh"
#include "mma.cuh"
#include "nt_xent.h"

// One cooperative launch, for sizes at which launches and idle multiprocessors cost more than the
// products. kernels/_softmax.py has the formulas; who does what between the grid's barriers:
//
//  1. Warps own pairs: norms, the positive logit in fp32, rows scaled to fp16.
//  2. Blocks own units, kRows rows by a part of all columns. So many parts are made that most
//     multiprocessors have a unit; up to 2048 rows of 128 elements its columns then fit into an
//     H200's shared memory, and are read once for 2 and 3. Sums of the negatives' exponentials, one
//     for row and part.
//  3. Blocks own the same units: every block makes the statistics of its rows and columns from
//     those sums, which costs less than another barrier; then weights, and du, one for row and
//     part.
//  4. Warps own rows: the parts of du in their order, the positive, the backward of normalising.
//
// Nothing is added in an order that can change: results repeat bit for bit.
//
// fp16 rows are the raw ones times a power of two, so fp16 and bf16 input reaches the tensor cores
// unrounded; the rest of the normalisation is a factor of the row. Logits are in base 2. Weights
// become fp16 after a scaling by row that follows the largest so far, for a gradient's sign counts
// in rows with small weights too.

namespace clae_fast {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64;                           // rows of a unit, 16 a warp
constexpr int kRowGroups = kRows / 16;              // warps below each other
constexpr int kColumnGroups = kWarps / kRowGroups;  // warps side by side, which share rows
constexpr int kAhead = 2;                           // tiles of columns that are being copied
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float kEps = 1e-12f;  // F.normalize's: a shorter row is divided by this
constexpr float kLn2 = 0.693147180559945309f;
// from here up exp(-2 / T) is a normal number, and 1 / T can stand for every row's maximum
constexpr float kFixedShiftTemperature = 0.023f;
constexpr int kUnitBits = 13;  // fp16 rows have norms in [2^13, 2^14)
constexpr float kUnit = 1 << kUnitBits;
constexpr int kWeightBits = 14;  // and the largest weights of their rows lie in [2^14, 2^15)
constexpr int kMaxScaleBits = 100;
constexpr float kMaxScale = 0x1p100f;

template <int kWidth>
constexpr int kColumns = kWidth <= 128 ? 64 : 32;  // columns of a tile
template <int kWidth>
constexpr int kTiles = kColumns<kWidth> / kColumnGroups / 8;  // of 8 columns, in a warp's part
template <int kWidth>
constexpr int kItems = kWidth / 32;  // elements of a lane, where a warp has a row

// value 2^shift
struct Sum {
  float shift;
  float value;
};

struct Plan {
  int width;      // D, padded
  int row_tiles;  // of kRows
  int splits;     // parts of the columns
  int part;       // tiles of columns in a part, the last one may have less
  int slots;      // tiles that shared memory has room for
  int blocks;
  int shared_bytes;
};

struct Workspace {
  __half* u;            // [2N, width]
  float* scale;         // [2N], of u, times kUnit
  float* norm;          // [2N]
  float* pos2;          // [N]
  Sum* sums;            // [2N, splits]
  float* q;             // [2N]
  float* loss_of_tile;  // [row_tiles]
  float* du;            // [splits, 2N, width]
  int64_t bytes;
};

struct Problem {
  NtXentCudaArgs args;
  Plan plan;
  Workspace workspace;
  int n;             // 2N
  float scale2;      // 1 / (T log 2)
  float grad_scale;  // 1 / (n T)
};

struct Shared {
  __half* own;      // [kRows, width], swizzled
  __half* slots;    // [slots, kColumns, width], swizzled
  float2* columns;  // [part * kColumns]: scale and offset, see fill()
  float2* rows;     // [kRows]
  Sum* sums;        // [kColumnGroups, kRows]
  float* losses;    // [kRows]
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// number of a warp in the grid, and their count
__device__ int grid_warp() { return blockIdx.x * kWarps + warp(); }
__device__ int grid_warps() { return gridDim.x * kWarps; }

template <int count>
__device__ void warp_sum(float (&values)[count]) {
  for (int bits = 16; bits > 0; bits /= 2) {
#pragma unroll
    for (float& value : values) value += __shfl_xor_sync(kAllLanes, value, bits);
  }
}

__device__ float warp_sum(float value) {
  float values[1] = {value};
  warp_sum(values);
  return values[0];
}

template <bool kFixedShift>
__device__ Sum merged(Sum a, Sum b) {
  if constexpr (kFixedShift) return {a.shift, a.value + b.value};
  const float shift = fmaxf(a.shift, b.shift);
  return {shift, a.value * exp2_approx(a.shift - shift) + b.value * exp2_approx(b.shift - shift)};
}

// 2^(bits - floor(log2(value))), at most 2^kMaxScaleBits, for a positive value, infinity or NaN
__device__ float scale_to(int bits, float value) {
  const int exponent = max(__float_as_int(value) >> 23 & 0xff, 127 + bits - kMaxScaleBits);
  return __int_as_float((127 + bits + 127 - exponent) << 23);
}

// a comparison: the maximum of NaN and a number is the number
__device__ float floored(float norm) { return norm < kEps ? kEps : norm; }

template <class T, int count>
__device__ void load_rows(float (&x)[2][count], const NtXentCudaArgs& args, const int (&rows)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool second = rows[i] >= args.N;
    const int64_t row = second ? rows[i] - args.N : rows[i];
    const T* z = static_cast<const T*>(second ? args.z1 : args.z0) +
                 row * (second ? args.row_stride1 : args.row_stride0);
    const int64_t stride = second ? args.column_stride1 : args.column_stride0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int d = lane() + 32 * k;
      x[i][k] = d < args.D ? load(z[d * stride]) : 0.f;
    }
  }
}

// Two of the 2N raw rows by a warp, element lane() + 32 k in x[][k].
template <int count>
__device__ void load_rows(float (&x)[2][count], const NtXentCudaArgs& args, const int (&rows)[2]) {
  switch (args.dtype) {
    case DType::fp32:
      return load_rows<float>(x, args, rows);
    case DType::fp16:
      return load_rows<__half>(x, args, rows);
    case DType::bf16:
      return load_rows<__nv_bfloat16>(x, args, rows);
  }
}

template <int kWidth>
__device__ void normalize(const Problem& p) {
  const int N = int(p.args.N);
  for (int pair = grid_warp(); pair < N; pair += grid_warps()) {
    const int rows[2] = {pair, pair + N};
    float z[2][kItems<kWidth>];
    load_rows(z, p.args, rows);
    float norms[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (float x : z[i]) norms[i] += x * x;
    }
    warp_sum(norms);
    float divisors[2], scales[2];
    float sums[3] = {};  // squares of the fp16 rows, and the positive pair's product
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      norms[i] = sqrtf(norms[i]);
      divisors[i] = floored(norms[i]);
      scales[i] = scale_to(kUnitBits, divisors[i]);
      const float inverse = 1.f / divisors[i];
#pragma unroll
      for (int k = 0; k < kItems<kWidth>; ++k) {
        const __half element = __float2half_rn(z[i][k] * scales[i]);
        p.workspace.u[rows[i] * kWidth + lane() + 32 * k] = element;
        sums[i] += load(element) * load(element);
        z[i][k] *= inverse;
      }
    }
#pragma unroll
    for (int k = 0; k < kItems<kWidth>; ++k) sums[2] += z[0][k] * z[1][k];
    warp_sum(sums);
    if (lane() != 0) continue;
    p.workspace.pos2[pair] = sums[2] * p.scale2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // the fp16 row's own length: what fp32 input loses is direction alone
      const float length =
          norms[i] < kEps || isinf(norms[i]) ? divisors[i] * scales[i] : sqrtf(sums[i]);
      p.workspace.norm[rows[i]] = norms[i];
      p.workspace.scale[rows[i]] = kUnit / length;
    }
  }
}

struct Statistics {
  float loss;
  float q;
  float lse2;
};

// Of some of the 2N rows, from the sums of all parts; meaningless past the last row.
template <bool kFixedShift, int count>
__device__ void make_statistics(Statistics (&statistics)[count],
                                const Problem& p,
                                const int (&rows)[count]) {
  const int splits = p.plan.splits, N = int(p.args.N);
  const Sum* sums[count];
  Sum neg[count];
  float pos2[count];
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const int row = min(rows[k], p.n - 1);
    pos2[k] = p.workspace.pos2[row < N ? row : row - N];
    sums[k] = p.workspace.sums + row * splits;
    neg[k] = sums[k][0];
  }
  for (int split = 1; split < splits; ++split) {
#pragma unroll
    for (int k = 0; k < count; ++k) neg[k] = merged<kFixedShift>(neg[k], sums[k][split]);
  }
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float margin = (neg[k].shift + log2f(neg[k].value) - pos2[k]) * kLn2;  // -inf for N = 1
    const float ratio = expf(-fabsf(margin));
    const float loss = fmaxf(margin, 0.f) + log1pf(ratio);
    statistics[k] = {loss, (margin > 0.f ? 1.f : ratio) / (1.f + ratio), pos2[k] + loss / kLn2};
  }
}

// Rows in shared memory have their 16-byte chunks permuted, so that ldmatrix, which reads one chunk
// of eight rows, finds them in different banks.
template <int kWidth>
__device__ int swizzled(int row, int chunk) {
  return row * kWidth + (chunk ^ row % 8) * 8;
}

// Starts copying rows of u, zeros past the last.
template <int kWidth, int kCount>
__device__ void stage(__half* to, const Problem& p, int first) {
  constexpr int kChunks = kWidth / 8;
#pragma unroll
  for (int step = 0; step < kCount * kChunks / kThreads; ++step) {
    const int i = step * kThreads + threadIdx.x;
    const int row = i / kChunks, chunk = i % kChunks;
    const __half* from = p.workspace.u + (first + row) * kWidth + chunk * 8;
    cp_async<16>(to + swizzled<kWidth>(row, chunk), from, first + row < p.n);
  }
}

// Rows by a part of the columns, and the ring of tiles that brings the columns along.
template <int kWidth>
struct Unit {
  const Problem& p;
  const Shared& shared;
  int split;
  int row_tile;
  int first_row;
  int first_column;
  int tiles;

  __device__ Unit(const Problem& p, const Shared& shared, int number)
      : p(p),
        shared(shared),
        split(number % p.plan.splits),
        row_tile(number / p.plan.splits),
        first_row(row_tile * kRows),
        first_column(split * p.plan.part * kColumns<kWidth>),
        tiles(min(p.plan.part, (p.n - first_column - 1) / kColumns<kWidth> + 1)) {}

  __device__ __half* tile(int t) const {
    return shared.slots + t % p.plan.slots * (kColumns<kWidth> * kWidth);
  }

  __device__ void fetch(int t) const {
    if (t < tiles) {
      stage<kWidth, kColumns<kWidth>>(tile(t), p, first_column + t * kColumns<kWidth>);
    }
    cp_async_commit();
  }

  __device__ void start() const {
    stage<kWidth, kRows>(shared.own, p, first_row);
    for (int t = 0; t < kAhead; ++t) fetch(t);
  }

  // Waits for tile t, and copies one over tile t - 1, which no thread reads any more.
  __device__ void advance(int t) const {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    fetch(t + kAhead);
  }

  // What products with tiles need: a factor for each row and column, and with statistics an offset,
  // which is 2^(scale2 - lse2) for a fixed shift and else lse2. Past the last row their
  // exponentials are 0. The unit with the first part of the columns keeps its rows' statistics.
  template <bool kFixedShift, bool kStatistics>
  __device__ void fill(bool with_columns) const {
    constexpr int kAtOnce = 3;  // of a thread, so that their loads are under way together
    const int count = kRows + (with_columns ? tiles * kColumns<kWidth> : 0);
    for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
      int rows[kAtOnce];
      float scales[kAtOnce];
      Statistics statistics[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = first + k * kThreads;
        rows[k] = at < kRows ? first_row + at : first_column + at - kRows;
        scales[k] = rows[k] < p.n ? p.workspace.scale[rows[k]] : 0.f;
      }
      if constexpr (kStatistics) make_statistics<kFixedShift>(statistics, p, rows);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = first + k * kThreads;
        if (at >= count) break;
        float offset = 0.f;
        if constexpr (kStatistics) {
          const float lse2 = rows[k] < p.n ? statistics[k].lse2 : INFINITY;
          offset = kFixedShift ? exp2f(p.scale2 - lse2) : lse2;
          if (at < kRows && split == 0) {
            shared.losses[at] = rows[k] < p.n ? statistics[k].loss : 0.f;
            if (rows[k] < p.n) p.workspace.q[rows[k]] = statistics[k].q;
          }
        }
        if (at < kRows) {
          shared.rows[at] = {scales[k] * p.scale2 / (kUnit * kUnit), offset};
        } else {
          shared.columns[at - kRows] = {scales[k], offset};
        }
      }
    }
  }

  // Adds the losses that fill() kept, in a warp that has nothing else to do at the end of a unit.
  __device__ void add_losses() const {
    if (split != 0 || warp() != kWarps - 1) return;
    const float loss = warp_sum(shared.losses[lane()] + shared.losses[lane() + 32]);
    if (lane() == 0) p.workspace.loss_of_tile[row_tile] = loss;
  }
};

// What a warp has of a unit: 16 rows by kTiles * 8 columns of every tile. A lane has two rows.
template <int kWidth>
struct WarpPart {
  // wider rows are loaded again for every tile, for want of registers
  static constexpr bool kKeepRows = kWidth <= 128;

  const Unit<kWidth>& unit;
  int row = warp() % kRowGroups * 16;                                     // in the unit
  int column = warp() / kRowGroups * (kColumns<kWidth> / kColumnGroups);  // in a tile
  float2 own[2];                                                          // scale and offset
  uint32_t fragments[kKeepRows ? kWidth / 16 : 1][4];

  __device__ explicit WarpPart(const Unit<kWidth>& unit) : unit(unit) {
    for (int half = 0; half < 2; ++half) own[half] = unit.shared.rows[row + lane() / 4 + 8 * half];
    if constexpr (kKeepRows) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) load_fragment(fragments[k], k);
    }
  }

  __device__ void load_fragment(uint32_t (&a)[4], int k) const {
    ldmatrix_x4(a, unit.shared.own + swizzled<kWidth>(row + lane() % 16, 2 * k + lane() / 16));
  }

  // scale and offset of the columns of s[j][0] and s[j][1]
  __device__ const float2* columns(int t, int j) const {
    return unit.shared.columns + t * kColumns<kWidth> + column + 8 * j + lane() % 4 * 2;
  }

  // Base-2 logits with tile t, -inf for the row itself, its positive and columns past the last.
  __device__ void negative_logits(float (&s)[kTiles<kWidth>][4], int t) {
    const __half* tile = unit.tile(t);
#pragma unroll
    for (auto& values : s) {
      for (float& value : values) value = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      if constexpr (!kKeepRows) load_fragment(fragments[0], k);
      const uint32_t (&a)[4] = fragments[kKeepRows ? k : 0];
#pragma unroll
      for (int j = 0; j < kTiles<kWidth>; j += 2) {
        uint32_t b[4];
        const int at = column + 8 * j + lane() / 16 * 8 + lane() % 8;
        ldmatrix_x4(b, tile + swizzled<kWidth>(at, 2 * k + lane() / 8 % 2));
        mma_m16n8k16<__half>(s[j], a, {b[0], b[1]});
        mma_m16n8k16<__half>(s[j + 1], a, {b[2], b[3]});
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles<kWidth>; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) s[j][k] *= columns(t, j)[k % 2].x * own[k / 2].x;
    }
    const int first_row = unit.first_row + row;
    const int first_column = unit.first_column + t * kColumns<kWidth> + column;
    const int N = int(unit.p.args.N);
    if (apart(first_row, first_column) && apart(first_row + N, first_column) &&
        apart(first_row, first_column + N) && first_column + 8 * kTiles<kWidth> <= unit.p.n) {
      return;
    }
#pragma unroll
    for (int j = 0; j < kTiles<kWidth>; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = first_row + lane() / 4 + k / 2 * 8;
        const int c = first_column + 8 * j + lane() % 4 * 2 + k % 2;
        if (r == c || r + N == c || r == c + N || c >= unit.p.n) s[j][k] = -INFINITY;
      }
    }
  }

  // Whether none of 16 rows is among a warp's columns.
  __device__ static bool apart(int first_row, int first_column) {
    return first_row + 16 <= first_column || first_column + 8 * kTiles<kWidth> <= first_row;
  }
};

template <int kWidth, bool kFixedShift>
__device__ void sum_exponentials(const Unit<kWidth>& unit) {
  const Problem& p = unit.p;
  unit.start();
  unit.template fill<kFixedShift, false>(true);
  unit.advance(0);
  WarpPart<kWidth> part(unit);
  // no logit is below -scale2 or above scale2
  const float shift = kFixedShift ? p.scale2 : -p.scale2;
  Sum sums[2] = {{shift, 0.f}, {shift, 0.f}};
  for (int t = 0; t < unit.tiles; ++t) {
    if (t > 0) unit.advance(t);
    float s[kTiles<kWidth>][4];
    part.negative_logits(s, t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Sum& sum = sums[half];
      if constexpr (!kFixedShift) {
        float top = sum.shift;
        for (auto& values : s) top = fmaxf(top, fmaxf(values[2 * half], values[2 * half + 1]));
        sum.value *= exp2_approx(sum.shift - top);
        sum.shift = top;
      }
#pragma unroll
      for (auto& values : s) {
        sum.value += exp2_approx(values[2 * half] - sum.shift);
        sum.value += exp2_approx(values[2 * half + 1] - sum.shift);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int bits = 1; bits <= 2; bits *= 2) {
      const Sum other = {__shfl_xor_sync(kAllLanes, sums[half].shift, bits),
                         __shfl_xor_sync(kAllLanes, sums[half].value, bits)};
      sums[half] = merged<kFixedShift>(sums[half], other);
    }
    const int row = part.row + lane() / 4 + 8 * half;
    if (lane() % 4 == 0) unit.shared.sums[warp() / kRowGroups * kRows + row] = sums[half];
  }
  __syncthreads();
  const int i = unit.first_row + threadIdx.x;
  if (threadIdx.x < kRows && i < p.n) {
    p.workspace.sums[i * p.plan.splits + unit.split] =
        merged<kFixedShift>(unit.shared.sums[threadIdx.x], unit.shared.sums[kRows + threadIdx.x]);
  }
}

__device__ uint32_t packed(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

// sum over negatives j of (P_ij + P_ji) u_j, for the rows and columns of a unit
template <int kWidth, bool kFixedShift>
__device__ void accumulate_du(const Unit<kWidth>& unit, bool resident) {
  const Problem& p = unit.p;
  if (!resident) unit.start();
  unit.template fill<kFixedShift, true>(true);
  if (resident) {
    __syncthreads();
  } else {
    unit.advance(0);
  }
  WarpPart<kWidth> part(unit);
  float du[kWidth / 8][4] = {};
  float scales[2] = {kMaxScale, kMaxScale};
  for (int t = 0; t < unit.tiles; ++t) {
    if (t > 0 && !resident) unit.advance(t);
    float w[kTiles<kWidth>][4];
    part.negative_logits(w, t);
    float top[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kTiles<kWidth>; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 column = part.columns(t, j)[k % 2];
        const float2 row = part.own[k / 2];
        if constexpr (kFixedShift) {
          w[j][k] = exp2_approx(w[j][k] - p.scale2) * (row.y + column.y);
        } else {
          w[j][k] = exp2_approx(w[j][k] - row.y) + exp2_approx(w[j][k] - column.y);
        }
        w[j][k] *= column.x;  // what fp16 u_j lacks
        top[k / 2] = fmaxf(top[k / 2], w[j][k]);
      }
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int bits = 1; bits <= 2; bits *= 2) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], bits));
      }
      const float scale = fminf(scales[half], scale_to(kWeightBits, top[half]));
      factors[half] = scale / scales[half];
      scales[half] = scale;
    }
    if (__any_sync(kAllLanes, factors[0] < 1.f || factors[1] < 1.f)) {
#pragma unroll
      for (auto& values : du) {
        for (int k = 0; k < 4; ++k) values[k] *= factors[k / 2];
      }
    }
    const __half* tile = unit.tile(t);
#pragma unroll
    for (int j = 0; j < kTiles<kWidth>; j += 2) {
      // two accumulators of 8 columns are the left operand of 16
      const uint32_t a[4] = {packed(w[j][0] * scales[0], w[j][1] * scales[0]),
                             packed(w[j][2] * scales[1], w[j][3] * scales[1]),
                             packed(w[j + 1][0] * scales[0], w[j + 1][1] * scales[0]),
                             packed(w[j + 1][2] * scales[1], w[j + 1][3] * scales[1])};
#pragma unroll
      for (int d = 0; d < kWidth / 16; ++d) {
        uint32_t b[4];
        const int at = part.column + 8 * j + lane() % 16;
        ldmatrix_x4_trans(b, tile + swizzled<kWidth>(at, 2 * d + lane() / 16));
        mma_m16n8k16<__half>(du[2 * d], a, {b[0], b[1]});
        mma_m16n8k16<__half>(du[2 * d + 1], a, {b[2], b[3]});
      }
    }
  }
#pragma unroll
  for (auto& values : du) {
    for (int k = 0; k < 4; ++k) values[k] *= 1.f / kUnit / scales[k / 2];
  }

  // the second group of columns hands its sums to the first, over rows and tiles that are done with
  auto* exchange = reinterpret_cast<float4*>(unit.shared.own) + threadIdx.x % (kThreads / 2);
  __syncthreads();
  if (warp() >= kRowGroups) {
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      exchange[d * (kThreads / 2)] = make_float4(du[d][0], du[d][1], du[d][2], du[d][3]);
    }
  }
  __syncthreads();
  if (warp() >= kRowGroups) return;
#pragma unroll
  for (int d = 0; d < kWidth / 8; ++d) {
    const float4 other = exchange[d * (kThreads / 2)];
    const float2 sums[2] = {{du[d][0] + other.x, du[d][1] + other.y},
                            {du[d][2] + other.z, du[d][3] + other.w}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = unit.first_row + part.row + lane() / 4 + 8 * half;
      float* to = p.workspace.du + (unit.split * p.n + i) * kWidth + 8 * d + lane() % 4 * 2;
      if (i < p.n) *reinterpret_cast<float2*>(to) = sums[half];
    }
  }
}

template <int kWidth>
__device__ void finish_dz(const Problem& p) {
  const int N = int(p.args.N), D = int(p.args.D);
  for (int row = grid_warp(); row < p.n; row += grid_warps()) {
    const int positive = row < N ? row + N : row - N;
    float u[2][kItems<kWidth>], du[kItems<kWidth>] = {};
    load_rows(u, p.args, {row, positive});
    const float q = p.workspace.q[row] + p.workspace.q[positive];
    const float norm = p.workspace.norm[row];
    const float inverse = 1.f / floored(norm);
    const float inverse_pos = 1.f / floored(p.workspace.norm[positive]);
#pragma unroll 8
    for (int split = 0; split < p.plan.splits; ++split) {
      const float* part = p.workspace.du + (split * p.n + row) * kWidth + lane();
#pragma unroll
      for (int k = 0; k < kItems<kWidth>; ++k) du[k] += part[32 * k];
    }
    float radial = 0.f;
#pragma unroll
    for (int k = 0; k < kItems<kWidth>; ++k) {
      u[0][k] *= inverse;
      du[k] = (du[k] - q * (u[1][k] * inverse_pos)) * p.grad_scale;
      radial += u[0][k] * du[k];
    }
    // u = z / |z| passes du - (u . du) u on, and u = z / kEps the whole of du
    radial = warp_sum(radial);
    if (norm < kEps) radial = 0.f;
#pragma unroll
    for (int k = 0; k < kItems<kWidth>; ++k) {
      const int d = lane() + 32 * k;
      if (d < D) p.args.dz[row * D + d] = (du[k] - radial * u[0][k]) * inverse;
    }
  }
}

__device__ void finish_loss(const Problem& p) {
  if (grid_warp() != 0) return;
  float loss = 0.f;
  for (int t = lane(); t < p.plan.row_tiles; t += 32) loss += p.workspace.loss_of_tile[t];
  loss = warp_sum(loss);
  if (lane() == 0) *p.args.loss = loss / p.n;
}

// Addresses in memory from `at` on, which advances.
template <class T, class Address>
__host__ __device__ T* take(Address& at, int64_t count) {
  T* const taken = reinterpret_cast<T*>(at);
  at += (count * sizeof(T) + 127) / 128 * 128;
  return taken;
}

template <class Address>
__host__ __device__ Shared shared_layout(Address& at, const Plan& plan, int columns) {
  Shared shared;
  shared.own = take<__half>(at, kRows * plan.width);
  shared.slots = take<__half>(at, plan.slots * columns * plan.width);
  shared.columns = take<float2>(at, plan.part * columns);
  shared.rows = take<float2>(at, kRows);
  shared.sums = take<Sum>(at, kColumnGroups * kRows);
  shared.losses = take<float>(at, kRows);
  return shared;
}

template <int kWidth, bool kFixedShift>
__global__ void __launch_bounds__(kThreads, 1) nt_xent_kernel(const Problem p) {
  const cg::grid_group grid = cg::this_grid();
  unsigned char* memory = dynamic_shared();
  const Shared shared = shared_layout(memory, p.plan, kColumns<kWidth>);
  const int units = p.plan.row_tiles * p.plan.splits;
  const bool resident = units <= int(gridDim.x) && p.plan.part <= p.plan.slots;

  normalize<kWidth>(p);
  grid.sync();
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    __syncthreads();
    sum_exponentials<kWidth, kFixedShift>(Unit<kWidth>(p, shared, unit));
  }
  grid.sync();
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    __syncthreads();
    const Unit<kWidth> unit(p, shared, number);
    if (p.args.dz) {
      accumulate_du<kWidth, kFixedShift>(unit, resident);
    } else {
      unit.template fill<kFixedShift, true>(false);
      __syncthreads();
    }
    unit.add_losses();
  }
  grid.sync();
  if (p.args.dz) finish_dz<kWidth>(p);
  finish_loss(p);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("nt_xent: ") + cudaGetErrorString(error));
  }
}

int attribute_of_device(cudaDeviceAttr attribute) {
  int device, value;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

int padded(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

int shared_bytes(const Plan& plan, int columns) {
  uintptr_t at = 0;
  shared_layout(at, plan, columns);
  return int(at);
}

Plan make_plan(int64_t N, int64_t D) {
  const int n = int(2 * N);
  const int multiprocessors = attribute_of_device(cudaDevAttrMultiProcessorCount);
  const int limit = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  Plan plan;
  plan.width = padded(D);
  const int columns = plan.width <= 128 ? kColumns<128> : kColumns<256>;
  const int column_tiles = (n + columns - 1) / columns;
  plan.row_tiles = (n + kRows - 1) / kRows;
  const int most = std::max(1, std::min(column_tiles, multiprocessors / plan.row_tiles));
  plan.part = (column_tiles + most - 1) / most;
  plan.splits = (column_tiles + plan.part - 1) / plan.part;
  // enough for the units and for every row's warp; one block of a multiprocessor is always
  // resident, as the grid's barrier needs
  plan.blocks =
      std::min(std::max(plan.row_tiles * plan.splits, (n + kWarps - 1) / kWarps), multiprocessors);
  // the tile at work and those on their way fit into 99 KB at every size that
  // nt_xent_cuda_takes(); the exchange of du needs no more
  plan.slots = kAhead + 1;
  const int free = limit - shared_bytes(plan, columns);
  plan.slots += std::clamp(free / int(columns * plan.width * sizeof(__half)), 0,
                           std::max(0, plan.part - plan.slots));
  plan.shared_bytes = shared_bytes(plan, columns);
  return plan;
}

Workspace make_workspace(unsigned char* memory, int64_t n, const Plan& plan, bool grad) {
  uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  Workspace workspace;
  workspace.u = take<__half>(at, n * plan.width);
  workspace.scale = take<float>(at, n);
  workspace.norm = take<float>(at, n);
  workspace.pos2 = take<float>(at, n / 2);
  workspace.sums = take<Sum>(at, n * plan.splits);
  workspace.q = take<float>(at, n);
  workspace.loss_of_tile = take<float>(at, plan.row_tiles);
  workspace.du = take<float>(at, grad ? plan.splits * n * plan.width : 0);
  workspace.bytes = int64_t(at - reinterpret_cast<uintptr_t>(memory));
  return workspace;
}

template <int kWidth, bool kFixedShift>
void launch(const Problem& problem, cudaStream_t stream) {
  const auto kernel = nt_xent_kernel<kWidth, kFixedShift>;
  const Plan& plan = problem.plan;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes));
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, problem));
}

template <int kWidth>
void launch_for_temperature(const Problem& problem, cudaStream_t stream) {
  if (problem.args.temperature >= kFixedShiftTemperature) {
    return launch<kWidth, true>(problem, stream);
  }
  launch<kWidth, false>(problem, stream);
}

}  // namespace

int64_t nt_xent_cuda_workspace(int64_t N, int64_t D, bool grad) {
  return make_workspace(nullptr, 2 * N, make_plan(N, D), grad).bytes;
}

void nt_xent_cuda(const NtXentCudaArgs& args, void* stream) {
  Problem problem;
  problem.args = args;
  problem.plan = make_plan(args.N, args.D);
  problem.workspace = make_workspace(args.workspace, 2 * args.N, problem.plan, args.dz != nullptr);
  problem.n = int(2 * args.N);
  problem.scale2 = 1.f / (args.temperature * kLn2);
  problem.grad_scale = 1.f / (2 * args.N * args.temperature);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (problem.plan.width) {
    case 64:
      return launch_for_temperature<64>(problem, on);
    case 128:
      return launch_for_temperature<128>(problem, on);
    default:
      return launch_for_temperature<256>(problem, on);
  }
}

}  // namespace clae_fast
