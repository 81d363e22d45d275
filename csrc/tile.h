// Normalizes rows, lays them out for matrix products and multiplies them in register tiles; for
// *_simd.cpp alone.
//
// A product runs over cells of 32 bits. A cell holds one fp32 number, or two bf16 numbers that are
// neighbors along the product's depth: some processors multiply and add both at once.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "args.h"
#include "carver.h"
#include "half.h"
#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// A register tile has kRows x kCols accumulators. It leaves registers for a row of vectors and for
// one broadcast number.
#if defined(__ARM_NEON)
constexpr int kRows = 8, kVecs = 3;
#else
constexpr int kRows = kWidth == 16 ? 12 : 6, kVecs = 2;
#endif
constexpr int kCols = kVecs * kWidth;

// The most rows and columns of a tile in memory. The tile and the rows it is made of fit into the
// L2 cache.
constexpr int kMaxBlock = 96;
static_assert(kMaxBlock % kRows == 0 && kMaxBlock % kCols == 0, "a block holds whole tiles");

constexpr double kEps = 1e-12;  // F.normalize's: a shorter row is divided by this

// Rows that are kept as normalized fp32 numbers.
struct Fp32 {
  typedef float Cell __attribute__((may_alias));
  typedef Vec CellVec;
  static constexpr int kPack = 1;  // numbers in a cell

  static CLAE_FAST_INLINE CellVec load_cells(const Cell* p) { return load(p); }
  static CLAE_FAST_INLINE Vec multiply_add(Vec acc, Cell a, CellVec b) { return acc + a * b; }
  // Stores x as the numbers of `row` from j on.
  static CLAE_FAST_INLINE void put(Cell* row, int64_t j, Vec x) {
    __builtin_memcpy(row + j, &x, sizeof x);
  }
};

// Rows that are kept in bf16, as they came but for a power of two. Products of two of their numbers
// are then exact in fp32, and a factor for each row makes up for its length.
struct Bf16 {
  typedef int32_t Cell __attribute__((may_alias));
  typedef IVec CellVec;
  static constexpr int kPack = 2;

  static CLAE_FAST_INLINE CellVec load_cells(const Cell* p) {
    CellVec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static CLAE_FAST_INLINE Vec multiply_add(Vec acc, Cell a, CellVec b) {
    return dot_bf16(acc, a - CellVec{}, b);
  }
  static CLAE_FAST_INLINE void put(Cell* row, int64_t j, Vec x) {
    typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));
    const HalfVec halves = __builtin_convertvector(rounded(x) >> 16 & 0xffff, HalfVec);
    __builtin_memcpy(reinterpret_cast<char*>(row) + 2 * j, &halves, sizeof halves);
  }
  // The nearest bf16 numbers, of two that are as near the even one, in the upper half of each lane.
  static CLAE_FAST_INLINE IVec rounded(Vec x) {
    const IVec bits = (IVec)x;
    return bits + 0x7fff + (bits >> 16 & 1);
  }
};

// Whether rows of this dtype are kept in bf16.
constexpr bool stays_bf16(DType dtype) { return kDotBf16 && dtype == DType::bf16; }

// Rows that are laid out for products.
template <class T>
struct Packed {
  typedef typename T::Cell Cell;
  int64_t D;
  int64_t depth;     // cells that a row fills
  int64_t ld;        // cells from one row to the next
  int64_t width;     // cells from one row of `pairs` to the next, and numbers of a row of gradients
  Cell* rows;        // [count, ld] a cell holds kPack neighbors of a row; 0 in the padding
  Cell* panels;      // [count / kCols, depth, kCols] the same cells, each panel transposed
  Cell* pairs;       // [count / kPack, width] a cell holds kPack neighbors of a column
  float* factor;     // [count] what a bf16 row is multiplied with to make it a unit row
  double* inv_norm;  // [count] 1 / |z|, negative where eps took the place of the norm
};

template <class T>
Packed<T> carve_rows(Carver& carver, int64_t count, int64_t D) {
  typedef typename T::Cell Cell;
  Packed<T> p;
  p.D = D;
  p.depth = (D + T::kPack - 1) / T::kPack;
  // the extra vector keeps rows from competing for the same cache sets
  p.width = round_up(D, kCols) + kWidth;
  p.ld = T::kPack == 1 ? p.width : round_up(p.depth, kWidth) + kWidth;
  p.rows = carver.take<Cell>(count * p.ld);
  p.panels = carver.take<Cell>(count * p.depth);
  p.pairs = T::kPack == 1 ? p.rows : carver.take<Cell>(count / T::kPack * p.width);
  p.factor = T::kPack == 1 ? nullptr : carver.take<float>(count);
  p.inv_norm = carver.take<double>(count);
  return p;
}

// How many fp64 numbers a register holds.
constexpr int kNarrow = kWidth / 2;
typedef float NarrowVec __attribute__((vector_size(kNarrow * 4)));

CLAE_FAST_INLINE NarrowVec load_narrow(const float* p) {
  NarrowVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// An operand of dot(): some(d) are the numbers from d on, one(d) is number d alone.
struct Numbers {
  const float* numbers;

  CLAE_FAST_INLINE NarrowVec some(int64_t d) const { return load_narrow(numbers + d); }
  CLAE_FAST_INLINE float one(int64_t d) const { return numbers[d]; }
};

// The sum of a_d b_d over d < D, in fp64.
template <class A, class B>
CLAE_FAST_INLINE double dot(int64_t D, A a, B b) {
  typedef double DoubleVec __attribute__((vector_size(kNarrow * 8)));
  auto wide = [](NarrowVec v) { return __builtin_convertvector(v, DoubleVec); };
  DoubleVec even = {}, odd = {};
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    even += wide(a.some(d)) * wide(b.some(d));
    odd += wide(a.some(d + kNarrow)) * wide(b.some(d + kNarrow));
  }
  even += odd;
  double sum = 0;
  for (int l = 0; l < kNarrow; ++l) sum += even[l];
  for (; d < D; ++d) sum += double(a.one(d)) * double(b.one(d));
  return sum;
}

CLAE_FAST_INLINE void load_row(const Rows& source, int64_t row, int64_t D, float* out) {
  const int64_t at = row * source.stride;
  if (source.dtype == DType::fp32) {
    memcpy(out, static_cast<const float*>(source.data) + at, D * sizeof *out);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source.data) + at;
  if (source.dtype == DType::bf16) {
    for (int64_t d = 0; d < D; ++d) out[d] = load_bf16(halves[d]);
  } else {
    for (int64_t d = 0; d < D; ++d) out[d] = load_fp16(halves[d]);
  }
}

// Makes row i of `p` from row `row` of `source`.
void pack_row(const Packed<Fp32>& p, int64_t i, const Rows& source, int64_t row) {
  float* u = p.rows + i * p.ld;
  load_row(source, row, p.D, u);
  const double norm = sqrt(dot(p.D, Numbers{u}, Numbers{u}));
  const bool clamped = norm < kEps;
  const double inv = 1 / (clamped ? kEps : norm);
  p.inv_norm[i] = clamped ? -inv : inv;
  for (int64_t d = 0; d < p.D; ++d) u[d] = float(u[d] * inv);
  memset(u + p.D, 0, (p.ld - p.D) * sizeof *u);
}

inline void pack_row(const Packed<Bf16>& p, int64_t i, const Rows& source, int64_t row) {
  const uint16_t* z = static_cast<const uint16_t*>(source.data) + row * source.stride;
  double square = 0;
  for (int64_t d = 0; d < p.D; ++d) square += double(load_bf16(z[d])) * double(load_bf16(z[d]));
  const double norm = sqrt(square);
  const bool clamped = norm < kEps;
  const double floored = clamped ? kEps : norm;
  p.inv_norm[i] = clamped ? -1 / floored : 1 / floored;
  // multiplying with a power of two is exact, and it keeps products within fp32's range
  const int exponent = isfinite(norm) ? ilogb(floored) : 0;
  const double scale = ldexp(1., -exponent);
  p.factor[i] = float(ldexp(1., exponent) / floored);
  Bf16::Cell* cells = p.rows + i * p.ld;
  memset(cells, 0, p.ld * sizeof *cells);
  char* out = reinterpret_cast<char*>(cells);
  for (int64_t d = 0; d < p.D; ++d) {
    const uint16_t half = uint16_t(to_bits(float(load_bf16(z[d]) * scale)) >> 16);
    memcpy(out + d * sizeof half, &half, sizeof half);
  }
}

template <class T>
void pad_row(const Packed<T>& p, int64_t i) {
  memset(p.rows + i * p.ld, 0, p.ld * sizeof *p.rows);
  p.inv_norm[i] = 0;
  if (T::kPack > 1) p.factor[i] = 0;
}

// Makes rows `begin` to `end` of `p` from the rows of `source` from `first` on. Past its `count`
// rows they are 0.
template <class T>
void pack_rows(const Packed<T>& p,
               int64_t begin,
               int64_t end,
               const Rows& source,
               int64_t first,
               int64_t count) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = first + i - begin;
    if (row < count) {
      pack_row(p, i, source, row);
    } else {
      pad_row(p, i);
    }
  }
}

// The same from one matrix that has the N rows of `z0` above the n - N rows of `z1`.
template <class T>
void pack_rows(const Packed<T>& p,
               int64_t begin,
               int64_t end,
               const Rows& z0,
               int64_t N,
               const Rows& z1,
               int64_t n) {
  const int64_t below = begin > N ? begin : smaller(end, N);
  pack_rows(p, begin, below, z0, begin, N);
  pack_rows(p, below, end, z1, below - N, n - N);
}

// Number d of unit row i.
CLAE_FAST_INLINE float unit(const Packed<Fp32>& p, int64_t i, int64_t d) {
  return p.rows[i * p.ld + d];
}

CLAE_FAST_INLINE float unit(const Packed<Bf16>& p, int64_t i, int64_t d) {
  uint16_t half;
  memcpy(&half, reinterpret_cast<const char*>(p.rows + i * p.ld) + d * sizeof half, sizeof half);
  return load_bf16(half) * p.factor[i];
}

// kNarrow numbers of unit row i, from number d on.
CLAE_FAST_INLINE NarrowVec units(const Packed<Fp32>& p, int64_t i, int64_t d) {
  return load_narrow(p.rows + i * p.ld + d);
}

CLAE_FAST_INLINE NarrowVec units(const Packed<Bf16>& p, int64_t i, int64_t d) {
  uint16_t halves __attribute__((vector_size(kNarrow * 2)));
  memcpy(&halves, reinterpret_cast<const char*>(p.rows + i * p.ld) + 2 * d, sizeof halves);
  typedef int32_t NarrowIVec __attribute__((vector_size(kNarrow * 4)));
  return (NarrowVec)(__builtin_convertvector(halves, NarrowIVec) << 16) * p.factor[i];
}

// Unit row i as an operand of dot().
template <class T>
struct UnitRow {
  const Packed<T>& p;
  int64_t i;

  CLAE_FAST_INLINE NarrowVec some(int64_t d) const { return units(p, i, d); }
  CLAE_FAST_INLINE float one(int64_t d) const { return unit(p, i, d); }
};

// Makes `pairs` from the rows from `begin` to `end`. With fp32 they are the rows themselves.
inline void pack_pairs(const Packed<Fp32>&, int64_t, int64_t) {}

inline void pack_pairs(const Packed<Bf16>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 2) {
    const char* upper = reinterpret_cast<const char*>(p.rows + i * p.ld);
    const char* lower = reinterpret_cast<const char*>(p.rows + (i + 1) * p.ld);
    Bf16::Cell* cells = p.pairs + i / 2 * p.width;
    memset(cells, 0, p.width * sizeof *cells);
    char* out = reinterpret_cast<char*>(cells);
    for (int64_t d = 0; d < p.D; ++d) {
      memcpy(out + 4 * d, upper + 2 * d, 2);
      memcpy(out + 4 * d + 2, lower + 2 * d, 2);
    }
  }
}

// Makes `panels` from the rows from `begin` to `end`, which fill whole panels.
template <class T>
void pack_panels(const Packed<T>& p, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += kCols) {
    typename T::Cell* panel = p.panels + j * p.depth;
    for (int64_t k = 0; k < p.depth; ++k) {
      for (int c = 0; c < kCols; ++c) panel[k * kCols + c] = p.rows[(j + c) * p.ld + k];
    }
  }
}

template <class T>
double cosine(const Packed<T>& p, int64_t i, const Packed<T>& q, int64_t j) {
  return dot(p.D, UnitRow<T>{p, i}, UnitRow<T>{q, j});
}

// The gradient of raw row i from that of its unit row:
//
//     dz = scale (du - (u . du) u) / |z|
//     dz = scale du / eps                  where |z| < eps, and u = z / eps
template <class T>
void store_raw_grad(const Packed<T>& p, int64_t i, const float* du, double scale, float* dz) {
  const bool clamped = p.inv_norm[i] < 0;
  const float radial = float(dot(clamped ? 0 : p.D, UnitRow<T>{p, i}, Numbers{du}));
  const double inv = fabs(p.inv_norm[i]) * scale;
  for (int64_t d = 0; d < p.D; ++d) dz[d] = float((du[d] - radial * unit(p, i, d)) * inv);
}

// Stores a register tile in memory, its rows `ld` numbers apart.
CLAE_FAST_INLINE void store_tile(const Vec (&y)[kRows][kVecs], float* tile, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(tile + m * ld + v * kWidth, y[m][v]);
  }
}

// acc += A B over `depth` cells. The rows of A, or its columns where it is transposed, are `lda`
// cells apart, the rows of B `ldb`.
template <class T, bool transposed>
CLAE_FAST_INLINE void multiply(const typename T::Cell* a,
                               int64_t lda,
                               const typename T::Cell* b,
                               int64_t ldb,
                               int64_t depth,
                               Vec (&acc)[kRows][kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    typename T::CellVec row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = T::load_cells(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename T::Cell x = transposed ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = T::multiply_add(acc[i][v], x, row[v]);
    }
  }
}

// C += A B for `rows` x `cols` numbers of C, rounded up to whole register tiles.
template <class T, bool transposed>
void accumulate(const typename T::Cell* a,
                int64_t lda,
                const typename T::Cell* b,
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
      multiply<T, transposed>(a + (transposed ? i : i * lda), lda, b + j, ldb, depth, acc);
      store_tile(acc, tile, ldc);
    }
  }
}

// y = scale (u . v) + shift for the kRows rows u of `p` from i on and the kCols rows v of `q` from
// j on.
template <class T>
CLAE_FAST_INLINE void similarities(const Packed<T>& p,
                                   int64_t i,
                                   const Packed<T>& q,
                                   int64_t j,
                                   float scale,
                                   float shift,
                                   Vec (&y)[kRows][kVecs]) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) y[m][v] = Vec{};
  }
  multiply<T, false>(p.rows + i * p.ld, p.ld, q.panels + j * q.depth, kCols, q.depth, y);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      if (T::kPack == 1) {
        y[m][v] = y[m][v] * scale + shift;
      } else {
        y[m][v] = y[m][v] * (scale * p.factor[i + m]) * load(q.factor + j + v * kWidth) + shift;
      }
    }
  }
}

// Stores scale (u . v) for `rows` rows u of `p` from i on and `cols` rows v of `q` from j on, both
// rounded up to whole register tiles, in a matrix whose rows are `ld` numbers apart.
template <class T>
void store_similarities(const Packed<T>& p,
                        int64_t i,
                        int64_t rows,
                        const Packed<T>& q,
                        int64_t j,
                        int64_t cols,
                        float scale,
                        float* matrix,
                        int64_t ld) {
  for (int64_t column = 0; column < cols; column += kCols) {
    for (int64_t row = 0; row < rows; row += kRows) {
      Vec y[kRows][kVecs];
      similarities(p, i + row, q, j + column, scale, 0.f, y);
      store_tile(y, matrix + row * ld + column, ld);
    }
  }
}

// How many cells `count` numbers fill.
template <class T>
constexpr int64_t cells(int64_t count) {
  return (count + T::kPack - 1) / T::kPack;
}

// A tile of weights. It is the left operand of two products: one runs over its columns, the other
// over its rows.
template <class T>
struct Weights;

template <>
struct Weights<Fp32> {
  static constexpr int kLd = kMaxBlock;  // cells from one row of over_columns to the next
  alignas(64) float over_columns[kMaxBlock * kMaxBlock];
  const float* over_rows() const { return over_columns; }

  CLAE_FAST_INLINE void put(int64_t i, int64_t j, const Vec (&w)[kRows][kVecs]) {
    store_tile(w, over_columns + i * kLd + j, kLd);
  }
  // Stores a vector of row i and one of row i + 1, for a product over rows alone.
  CLAE_FAST_INLINE void put_rows(int64_t i, int64_t j, Vec upper, Vec lower) {
    store(over_columns + i * kLd + j, upper);
    store(over_columns + (i + 1) * kLd + j, lower);
  }
};

template <>
struct Weights<Bf16> {
  static constexpr int kLd = kMaxBlock / 2;
  alignas(64) Bf16::Cell over_columns[kMaxBlock * kMaxBlock / 2];
  alignas(64) Bf16::Cell paired_rows[kMaxBlock / 2 * kMaxBlock];
  const Bf16::Cell* over_rows() const { return paired_rows; }

  CLAE_FAST_INLINE void put(int64_t i, int64_t j, const Vec (&w)[kRows][kVecs]) {
    for (int m = 0; m < kRows; m += 2) {
      for (int v = 0; v < kVecs; ++v) {
        const int64_t column = j + v * kWidth;
        Bf16::put(over_columns + (i + m) * kLd, column, w[m][v]);
        Bf16::put(over_columns + (i + m + 1) * kLd, column, w[m + 1][v]);
        put_rows(i + m, column, w[m][v], w[m + 1][v]);
      }
    }
  }
  CLAE_FAST_INLINE void put_rows(int64_t i, int64_t j, Vec upper, Vec lower) {
    const IVec pair =
        (Bf16::rounded(upper) >> 16 & 0xffff) | (Bf16::rounded(lower) & int32_t(0xffff0000));
    __builtin_memcpy(paired_rows + i / 2 * kMaxBlock + j, &pair, sizeof pair);
  }
};

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
