// A row's loss from the logarithms of its sums of exponentials; for *_simd.cpp alone.
#pragma once

#include <math.h>

#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// neg is a row's sum over its negatives, and pos its positive's exponential.
struct RowLoss {
  double loss;     // log(1 + neg / pos)
  double q;        // neg / (neg + pos)
  double log_den;  // log2(neg + pos)
};

// From logarithms to base 2. No two nearly equal numbers are subtracted, so the results keep their
// relative precision however small the loss is.
RowLoss row_loss(double log_neg, double log_pos) {
  const double x = (log_neg - log_pos) / kLog2e;
  const double decay = exp(-fabs(x));
  const double high = x > 0 ? 1. : decay, low = x > 0 ? decay : 1.;
  const double loss = (x > 0 ? x : 0.) + log1p(decay);
  return {loss, high / (high + low), log_pos + loss * kLog2e};
}

// The mean loss of `count` rows; rows without a loss have 0 among the `n`.
inline float mean_loss(const double* loss, int64_t n, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += loss[i];
  return float(total / double(count));
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
