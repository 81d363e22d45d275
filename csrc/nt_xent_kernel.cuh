// NT-Xent in one cooperative launch, for sizes at which separate launches and idle multiprocessors
// would cost more than the matrix products; for nt_xent_cuda.cu alone.
//
// u are the unit rows, n = 2N of them, and p is the row of the positive of row i. Logits y are in
// base 2, and sums over j run over the negatives of row i.
//
// clang-format off
//
//     y_ij   = u_i . u_j / (T ln 2)
//     lse_i  = log2(2^y_ip + sum_j 2^y_ij)
//     loss_i = (lse_i - y_ip) ln 2
//     P_ij   = 2^(y_ij - lse_i)
//     q_i    = sum_j P_ij
//
//     du_i           = sum_j (P_ij + P_ji) u_j
//     d loss / d u_i = 1/(n T) (du_i - (q_i + q_p) u_p)
//
// clang-format on
//
// Barriers of the whole grid separate four phases:
//
//  1. A warp takes a pair of rows: it computes their norms and the logit of the pair in fp32, and
//     scales the rows to fp16.
//  2. A block takes a unit: kRows rows by a part of all columns. It sums the exponentials of the
//     negatives, one sum for each row and part. There are enough parts for most multiprocessors to
//     have a unit. With up to 2048 rows of 128 elements, the columns of a unit then fit into an
//     H200's shared memory, and are read once for this phase and the next.
//  3. A block takes the same unit. From all sums it makes the statistics of its rows and columns,
//     which costs less than another barrier. Then it makes the weights P, and du for each row and
//     part.
//  4. A warp takes a row: it adds up the parts of du in their order, subtracts the share of the
//     positive, and passes the result back through the normalization.
//
// No sum is added in an order that can change, so results repeat bit for bit.
//
// An fp16 row is the raw row times a power of two, so fp16 and bf16 input reaches the tensor cores
// without rounding. A factor for each row makes up for the difference to a unit row. Weights are
// scaled before they become fp16. The scale of a row follows its largest weight so far, because the
// sign of the gradient matters in rows with small weights too.
#pragma once

#include <cooperative_groups.h>

#include "dtype.cuh"
#include "mma.cuh"
#include "nt_xent_plan.cuh"

namespace clae_fast {
namespace {

namespace cg = cooperative_groups;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kEps = 1e-12f;  // F.normalize's: a shorter row is divided by this
constexpr int kUnitBits = 13;   // fp16 rows have norms in [2^13, 2^14)
constexpr float kUnit = 1 << kUnitBits;
constexpr int kWeightBits = 14;  // the largest fp16 weight of a row is in [2^14, 2^15)
constexpr int kMaxScaleBits = 100;
constexpr float kMaxScale = 0x1p100f;

template <int kWidth>
constexpr int kTiles = kColumns<kWidth> / kColumnGroups / 8;  // a warp's tiles of 8 columns
template <int kWidth>
constexpr int kItems = kWidth / 32;  // elements of a lane, where a warp has a whole row

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// The number of a warp in the grid, and how many there are.
__device__ int grid_warp() { return blockIdx.x * kWarps + warp(); }
__device__ int grid_warps() { return gridDim.x * kWarps; }

// Adds up the values of all lanes.
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

// The sum of two numbers, which have the same shift with kFixedShift.
template <bool kFixedShift>
__device__ Sum merged(Sum a, Sum b) {
  if constexpr (kFixedShift) return {a.shift, a.value + b.value};
  const float shift = fmaxf(a.shift, b.shift);
  return {shift, a.value * exp2_approx(a.shift - shift) + b.value * exp2_approx(b.shift - shift)};
}

// 2^(bits - floor(log2(value))), but at most 2^kMaxScaleBits. The value is positive, infinity or
// NaN.
__device__ float scale_to(int bits, float value) {
  const int exponent = max(__float_as_int(value) >> 23 & 0xff, 127 + bits - kMaxScaleBits);
  return __int_as_float((127 + bits + 127 - exponent) << 23);
}

// Not fmaxf(), which would make NaN a number.
__device__ float floored(float norm) { return norm < kEps ? kEps : norm; }

// Loads two of the 2N raw rows by a warp. Element lane() + 32 k of a row goes to x[][k].
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

// Phase 1.
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
    float sums[3] = {};  // the squares of both fp16 rows, and the dot product of the pair
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
      // the fp16 row is divided by its own length, so that rounding fp32 input turns it only
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

// Makes the statistics of some of the 2N rows from the sums of all parts. They mean nothing past
// the last row.
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

// Where a 16-byte chunk of a row is in shared memory. Chunks are permuted, because ldmatrix reads
// one chunk of eight rows at a time, and these have to be in different banks.
template <int kWidth>
__device__ int swizzled(int row, int chunk) {
  return row * kWidth + (chunk ^ row % 8) * 8;
}

// Starts to copy rows of u to shared memory, with zeros past the last row.
template <int kWidth, int kCount>
__device__ void stage(__half* to, const Problem& p, int first) {
  constexpr int kChunks = kWidth / 8;
#pragma unroll
  for (int step = 0; step < kCount * kChunks / kThreads; ++step) {
    const int i = step * kThreads + threadIdx.x;
    const int row = i / kChunks, chunk = i % kChunks;
    const __half* from = p.workspace.u + (first + row) * kWidth + chunk * 8;
    cp_async(to + swizzled<kWidth>(row, chunk), from, first + row < p.n);
  }
}

// A unit: some rows by a part of the columns, and the ring of tiles through which its columns come.
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

  // Waits for tile t, and starts to copy another over tile t - 1, which no thread reads any more.
  __device__ void advance(int t) const {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    fetch(t + kAhead);
  }

  // Makes the scale and the offset of every row and column. The scale turns a product of fp16 rows
  // into a logit. The offset is made from the statistics: 2^(scale2 - lse2) for a fixed shift,
  // otherwise lse2. Past the last row it makes exponentials 0. The unit with the first part of the
  // columns also keeps the losses and q of its rows.
  template <bool kFixedShift, bool kStatistics>
  __device__ void fill(bool with_columns) const {
    constexpr int kAtOnce = 3;  // rows or columns of a thread, whose loads run at the same time
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

  // Adds up the losses that fill() has kept, by a warp that has nothing else to do at the end of a
  // unit.
  __device__ void add_losses() const {
    if (split != 0 || warp() != kWarps - 1) return;
    const float loss = warp_sum(shared.losses[lane()] + shared.losses[lane() + 32]);
    if (lane() == 0) p.workspace.loss_of_tile[row_tile] = loss;
  }
};

// A warp's part of a unit: 16 rows by kTiles * 8 columns of every tile. A lane has two of the rows.
template <int kWidth>
struct WarpPart {
  // wider rows do not fit into the registers, and are loaded again for every tile
  static constexpr bool kKeepRows = kWidth <= 128;

  const Unit<kWidth>& unit;
  int row = warp() % kRowGroups * 16;                                     // in the unit
  int column = warp() / kRowGroups * (kColumns<kWidth> / kColumnGroups);  // in a tile
  float2 own[2];  // scale and offset of the lane's rows
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

  // The scale and offset of the columns of s[j][0] and s[j][1].
  __device__ const float2* columns(int t, int j) const {
    return unit.shared.columns + t * kColumns<kWidth> + column + 8 * j + lane() % 4 * 2;
  }

  // Makes base-2 logits of the rows with tile t. They are -inf for the row itself, for its positive
  // and past the last column.
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

  // Whether none of the 16 rows is among the warp's columns.
  __device__ static bool apart(int first_row, int first_column) {
    return first_row + 16 <= first_column || first_column + 8 * kTiles<kWidth> <= first_row;
  }
};

// Phase 2 of a unit.
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

// Two fp16 numbers in a register.
__device__ uint32_t packed(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Phase 3 of a unit. Its columns may be resident in shared memory since phase 2.
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
        w[j][k] *= column.x;  // makes up for the scale of fp16 u_j
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
      // the accumulators of two tiles of 8 columns are the left operand for 16
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

  // the second group of columns hands its sums to the first, in the memory of rows and tiles that
  // nobody needs any more
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

// Phase 4.
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
    // where u = z / |z| only du - (u . du) u passes; where u = z / kEps all of du does
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

}  // namespace
}  // namespace clae_fast
