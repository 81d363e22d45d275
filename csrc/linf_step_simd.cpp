// Plain loops over selections and integers, which the compiler vectorizes for each instruction set.
// The results have the same bits on all of them, and the same as the reference.
#include <cstdint>

#include "half.h"
#include "linf_step.h"
#include "parallel.h"
#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// Whether rounding `value` towards `center` moves it away from 0. There is no branch, because a
// branch would keep the loop from being vectorized.
CLAE_FAST_INLINE int32_t grows(float value, float center) {
  const bool negative = to_bits(value) < 0;
  return (negative & (value > center)) | (!negative & (value < center));
}

// Dtypes. `load` is exact; `store` rounds towards a center that the dtype can represent.

struct Fp32 {
  using Storage = float;
  static CLAE_FAST_INLINE float load(float value) { return value; }
  static CLAE_FAST_INLINE float store(float value, float) { return value; }
};

struct Bf16 {
  using Storage = uint16_t;
  static CLAE_FAST_INLINE float load(uint16_t half) { return load_bf16(half); }
  static CLAE_FAST_INLINE uint16_t store(float value, float center) {
    const int32_t bits = to_bits(value);
    const int32_t inexact = (bits & 0xffff) != 0;
    const int32_t half = (bits >> 16) + (inexact & grows(value, center));
    return uint16_t(value != value ? 0x7fc0 : half);
  }
};

struct Fp16 {
  using Storage = uint16_t;
  static CLAE_FAST_INLINE float load(uint16_t half) { return load_fp16(half); }
  static CLAE_FAST_INLINE uint16_t store(float value, float center) {
    const int32_t magnitude = to_bits(value) & 0x7fffffff;
    const int32_t sign = int32_t(uint32_t(to_bits(value)) >> 16) & 0x8000;
    // below 2^-14 numbers are 2^-24 apart; the mask has all bits there, and none elsewhere
    const int32_t subnormal = -int32_t(magnitude < (113 << 23));
    const float scaled = from_bits(magnitude & subnormal) * 0x1p24f;
    const int32_t whole = int32_t(scaled);
    int32_t half = (((magnitude >> 13) - (112 << 10)) & ~subnormal) | whole;
    int32_t lost = (magnitude & 0x1fff & ~subnormal) | to_bits(scaled - float(whole));
    // a finite number from 2^16 on becomes the largest finite one, and inf stays inf
    const int32_t large = -int32_t(magnitude >= (143 << 23));
    lost = (lost & ~large) | ((magnitude ^ (255 << 23)) & large);
    half = (half & ~large) | ((0x7c00 - int32_t(lost != 0)) & large);
    half += int32_t(lost != 0) & grows(value, center);
    return uint16_t(value != value ? 0x7e00 : half | sign);
  }
};

// a + b rounded up, or without `up` rounded down. That is the nearest sum, or its neighbor where
// the nearest lies on the wrong side of a + b. An inexact sum is never 0, and the error of an
// infinite sum is NaN.
template <bool up>
CLAE_FAST_INLINE float directed_sum(float a, float b) {
  const float sum = a + b;
  const float b_part = sum - a;
  const float error = (a - (sum - b_part)) + (b - b_part);
  const int32_t bits = to_bits(sum);
  // unsigned, because the bits of -0 and of some NaN wrap around; those are not taken
  const uint32_t further = uint32_t(bits) + ((bits < 0) == up ? ~0u : 1u);
  return (up ? error > 0.f : error < 0.f) ? from_bits(int32_t(further)) : sum;
}

// The numbers of a channel.
struct Bounds {
  float alpha, eps, lo, hi;
};

CLAE_FAST_INLINE float stepped(float x, float grad, float x0, const Bounds& bounds) {
  const auto [alpha, eps, lo, hi] = bounds;
  const float move = grad < 0.f ? -alpha : 0.f;
  float y = x + (grad > 0.f ? alpha : move);
  y = x0 != x0 ? x0 : y;
  const float low = directed_sum<true>(x0, -eps);
  const float high = directed_sum<false>(x0, eps);
  y = y < low ? low : y;
  y = y > high ? high : y;
  y = y < lo ? lo : y;
  return y > hi ? hi : y;
}

// A run of elements: of a single channel, or with `each` of one channel after another. Row r of the
// table begins at table + r row.
template <class X, class G, bool each>
void step_run(const typename X::Storage* __restrict__ x,
              const typename G::Storage* __restrict__ grad,
              const typename X::Storage* x0,
              typename X::Storage* __restrict__ out,
              int64_t size,
              const float* table,
              int64_t row) {
  const float* eps = table + row;
  const float* lo = table + 2 * row;
  const float* hi = table + 3 * row;
  const Bounds same{*table, *eps, *lo, *hi};
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float center = X::load(x0[i]);
    const Bounds bounds{each ? table[i] : same.alpha, each ? eps[i] : same.eps,
                        each ? lo[i] : same.lo, each ? hi[i] : same.hi};
    out[i] = X::store(stepped(X::load(x[i]), G::load(grad[i]), center, bounds), center);
  }
}

// How many elements a run has where there are no channels. Fewer are not worth another thread.
constexpr int64_t kRun = 16384;
// Where neighbors are of different channels, the table is repeated for runs of about this many
// elements.
constexpr int64_t kRepeated = 256;

template <class X, class G>
void step(const LinfStepArgs& args) {
  const auto* x = static_cast<const typename X::Storage*>(args.x);
  const auto* grad = static_cast<const typename G::Storage*>(args.grad);
  const auto* x0 = static_cast<const typename X::Storage*>(args.x0);
  auto* out = static_cast<typename X::Storage*>(args.out);
  const float* table = args.bounds;
  const int64_t C = args.channels;

  const bool each = C > 1 && args.channel_stride == 1;
  const int64_t repeats = each && C < kRepeated ? kRepeated / C : 1;
  float repeated[4 * kRepeated];
  if (repeats > 1) {
    for (int64_t i = 0; i < 4 * repeats * C; ++i) {
      repeated[i] = table[i / (repeats * C) * C + i % C];
    }
    table = repeated;
  }
  const int64_t row = each ? repeats * C : C;  // from one row of the table to the next
  const int64_t length = C == 1 ? kRun : each ? row : args.channel_stride;
  const int64_t runs = (args.size + length - 1) / length;

  parallel(args.size > kRun ? args.threads : 1, [&](Team& team, int rank) {
    const Range mine = share(runs, team, rank);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t begin = r * length;
      const int64_t size = smaller(length, args.size - begin);
      if (each) {
        step_run<X, G, true>(x + begin, grad + begin, x0 + begin, out + begin, size, table, row);
      } else {
        const float* channel = table + r % C;
        step_run<X, G, false>(x + begin, grad + begin, x0 + begin, out + begin, size, channel, row);
      }
    }
  });
}

// Calls visit(T{}), where T is the dtype.
template <class Visit>
void with_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::fp32:
      return visit(Fp32{});
    case DType::fp16:
      return visit(Fp16{});
    case DType::bf16:
      return visit(Bf16{});
  }
}

}  // namespace

void linf_step(const LinfStepArgs& args) {
  with_dtype(args.x_dtype, [&](auto x) {
    with_dtype(args.grad_dtype, [&](auto grad) { step<decltype(x), decltype(grad)>(args); });
  });
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
