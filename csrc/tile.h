// Rows made ready to be multiplied, and their products in register tiles; for *_simd.cpp alone.
//
// Products run over cells of 32 bits: one fp32 number, or two bf16 numbers that are neighbours
// along the depth of the product, which some processors multiply and add at once.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "carver.h"
#include "half.h"
#include "rows.h"
#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// The register tile: kRows x kCols accumulators, with room for one row of vectors and a broadcast.
#if defined(__ARM_NEON)
constexpr int kRows = 8, kVecs = 3;
#else
constexpr int kRows = kWidth == 16 ? 12 : 6, kVecs = 2;
#endif
constexpr int kCols = kVecs * kWidth;

// The most rows and columns of a tile in memory; it and its rows stay in the L2 cache.
constexpr int kMaxBlock = 96;
static_assert(kMaxBlock % kRows == 0 && kMaxBlock % kCols == 0, "a block holds whole tiles");

constexpr double kEps = 1e-12;  // of F.normalize

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows in fp32, normalised.
struct Fp32 {
  typedef float Cell __attribute__((may_alias));
  typedef Vec CellVec;
  static constexpr int kPack = 1;  // numbers in a cell

  static CLAE_FAST_INLINE CellVec load_cells(const Cell* p) { return load(p); }
  static CLAE_FAST_INLINE Vec multiply_add(Vec acc, Cell a, CellVec b) { return acc + a * b; }
  // Makes x the numbers of `row` from j on.
  static CLAE_FAST_INLINE void put(Cell* row, int64_t j, Vec x) {
    __builtin_memcpy(row + j, &x, sizeof x);
  }
};

// Rows of bf16 as they came but for a power of two, with a factor that makes them unit rows: their
// products are exact.
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
  // To nearest even, in the upper half.
  static CLAE_FAST_INLINE IVec rounded(Vec x) {
    const IVec bits = (IVec)x;
    return bits + 0x7fff + (bits >> 16 & 1);
  }
};

// Whether rows of this dtype stay bf16.
constexpr bool stays_bf16(DType dtype) { return kDotBf16 && dtype == DType::bf16; }

template <class T>
struct Packed {
  typedef typename T::Cell Cell;
  int64_t D;
  int64_t depth;     // cells of a row
  int64_t ld;        // cells from row to row
  int64_t width;     // cells from row to row of `pairs`, numbers of a row of gradients
  Cell* rows;        // [count, ld] with kPack neighbours of a row in a cell, 0 in the padding
  Cell* panels;      // [count / kCols, depth, kCols] the same, transposed in panels
  Cell* pairs;       // [count / kPack, width] with kPack neighbours of a column in a cell
  float* factor;     // [count] what makes a row a unit row; fp32 rows are that already
  double* inv_norm;  // [count] 1 / |z|, negative where eps replaced the norm
};

template <class T>
Packed<T> carve_rows(Carver& carver, int64_t count, int64_t D) {
  typedef typename T::Cell Cell;
  Packed<T> p;
  p.D = D;
  p.depth = (D + T::kPack - 1) / T::kPack;
  // the extra vector keeps rows off each other's cache sets
  p.width = round_up(D, kCols) + kWidth;
  p.ld = T::kPack == 1 ? p.width : round_up(p.depth, kWidth) + kWidth;
  p.rows = carver.take<Cell>(count * p.ld);
  p.panels = carver.take<Cell>(count * p.depth);
  p.pairs = T::kPack == 1 ? p.rows : carver.take<Cell>(count / T::kPack * p.width);
  p.factor = T::kPack == 1 ? nullptr : carver.take<float>(count);
  p.inv_norm = carver.take<double>(count);
  return p;
}

// As many fp32 numbers as a register holds in fp64.
constexpr int kNarrow = kWidth / 2;
typedef float NarrowVec __attribute__((vector_size(kNarrow * 4)));

CLAE_FAST_INLINE NarrowVec load_narrow(const float* p) {
  NarrowVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Sum over d < D of a b in fp64: of vectors at d, and of the products that fill none.
template <class A, class B, class Product>
CLAE_FAST_INLINE double dot(int64_t D, A a, B b, Product product) {
  typedef double DoubleVec __attribute__((vector_size(kNarrow * 8)));
  auto wide = [](NarrowVec v) { return __builtin_convertvector(v, DoubleVec); };
  DoubleVec even = {}, odd = {};
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    even += wide(a(d)) * wide(b(d));
    odd += wide(a(d + kNarrow)) * wide(b(d + kNarrow));
  }
  even += odd;
  double sum = 0;
  for (int l = 0; l < kNarrow; ++l) sum += even[l];
  for (; d < D; ++d) sum += product(d);
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

CLAE_FAST_INLINE double squared_norm(const float* z, int64_t D) {
  return dot(
      D, [&](int64_t d) { return load_narrow(z + d); },
      [&](int64_t d) { return load_narrow(z + d); },
      [&](int64_t d) { return double(z[d]) * double(z[d]); });
}

// Row i of `p` becomes row `row` of `source`.
void pack_row(const Packed<Fp32>& p, int64_t i, const Rows& source, int64_t row) {
  float* u = p.rows + i * p.ld;
  load_row(source, row, p.D, u);
  const double norm = sqrt(squared_norm(u, p.D));
  const bool clamped = norm < kEps;
  const double inv = 1 / (clamped ? kEps : norm);
  p.inv_norm[i] = clamped ? -inv : inv;
  for (int64_t d = 0; d < p.D; ++d) u[d] = float(u[d] * inv);
  memset(u + p.D, 0, (p.ld - p.D) * sizeof *u);
}

void pack_row(const Packed<Bf16>& p, int64_t i, const Rows& source, int64_t row) {
  const uint16_t* z = static_cast<const uint16_t*>(source.data) + row * source.stride;
  double square = 0;
  for (int64_t d = 0; d < p.D; ++d) square += double(load_bf16(z[d])) * double(load_bf16(z[d]));
  const double norm = sqrt(square);
  const bool clamped = norm < kEps;
  const double floored = clamped ? kEps : norm;
  p.inv_norm[i] = clamped ? -1 / floored : 1 / floored;
  // exact, and keeps products far from the ends of fp32's range
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

// Rows `begin` to `end` of `p` become those of `source` from `first` on, 0 past its `count` rows.
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

// The same of the N rows of `z0` above the n - N of `z1`.
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

CLAE_FAST_INLINE float unit(const Packed<Fp32>& p, int64_t i, int64_t d) {
  return p.rows[i * p.ld + d];
}

CLAE_FAST_INLINE float unit(const Packed<Bf16>& p, int64_t i, int64_t d) {
  uint16_t half;
  memcpy(&half, reinterpret_cast<const char*>(p.rows + i * p.ld) + d * sizeof half, sizeof half);
  return load_bf16(half) * p.factor[i];
}

// Of kNarrow elements from d on.
CLAE_FAST_INLINE NarrowVec units(const Packed<Fp32>& p, int64_t i, int64_t d) {
  return load_narrow(p.rows + i * p.ld + d);
}

CLAE_FAST_INLINE NarrowVec units(const Packed<Bf16>& p, int64_t i, int64_t d) {
  uint16_t halves __attribute__((vector_size(kNarrow * 2)));
  memcpy(&halves, reinterpret_cast<const char*>(p.rows + i * p.ld) + 2 * d, sizeof halves);
  typedef int32_t NarrowIVec __attribute__((vector_size(kNarrow * 4)));
  return (NarrowVec)(__builtin_convertvector(halves, NarrowIVec) << 16) * p.factor[i];
}

// The pairs of the rows from `begin` to `end`.
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

// The panels of the rows from `begin` to `end`, whole ones.
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
  return dot(
      p.D, [&](int64_t d) { return units(p, i, d); }, [&](int64_t d) { return units(q, j, d); },
      [&](int64_t d) { return double(unit(p, i, d)) * double(unit(q, j, d)); });
}

// dz = scale (du - u (u . du)) / |z| of row i, or scale du / eps where the row was only scaled.
template <class T>
void store_raw_grad(const Packed<T>& p, int64_t i, const float* du, double scale, float* dz) {
  const bool clamped = p.inv_norm[i] < 0;
  const float radial = float(dot(
      clamped ? 0 : p.D, [&](int64_t d) { return units(p, i, d); },
      [&](int64_t d) { return load_narrow(du + d); },
      [&](int64_t d) { return double(unit(p, i, d)) * double(du[d]); }));
  const double inv = fabs(p.inv_norm[i]) * scale;
  for (int64_t d = 0; d < p.D; ++d) dz[d] = float((du[d] - radial * unit(p, i, d)) * inv);
}

// A register tile to memory with rows `ld` apart.
CLAE_FAST_INLINE void store_tile(const Vec (&y)[kRows][kVecs], float* tile, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(tile + m * ld + v * kWidth, y[m][v]);
  }
}

// acc += A B over `depth` cells: A's rows are `lda` apart (its columns where transposed), B's
// `ldb`.
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

// C += A B for `rows` x `cols` of C, rounded up to register tiles.
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

// y = u_i . v_j * scale + shift of the register tile at row i of `p` and column j of `q`.
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

// The cells along `count` rows or columns.
template <class T>
constexpr int64_t cells(int64_t count) {
  return (count + T::kPack - 1) / T::kPack;
}

// A tile of weights, as the left operand of a product over its columns or over its rows.
template <class T>
struct Weights;

template <>
struct Weights<Fp32> {
  static constexpr int kLd = kMaxBlock;  // of `over_columns`
  alignas(64) float over_columns[kMaxBlock * kMaxBlock];
  const float* over_rows() const { return over_columns; }

  CLAE_FAST_INLINE void put(int64_t i, int64_t j, const Vec (&w)[kRows][kVecs]) {
    store_tile(w, over_columns + i * kLd + j, kLd);
  }
  // A vector each of rows i and i + 1, for products over rows alone.
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
