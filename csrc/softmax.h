// One row's loss from the logarithms of its sums; for *_simd.cpp alone.
#pragma once

#include <math.h>

#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Of neg, the sum over the negatives, and of pos, with logarithms to base 2. Nothing cancels,
// however small the loss.
struct RowLoss {
  double loss;     // log(1 + neg / pos)
  double q;        // neg / (neg + pos)
  double log_den;  // log2(neg + pos)
};

RowLoss row_loss(double log_neg, double log_pos) {
  const double x = (log_neg - log_pos) / kLog2e;
  const double decay = exp(-fabs(x));
  const double high = x > 0 ? 1. : decay, low = x > 0 ? decay : 1.;
  const double loss = (x > 0 ? x : 0.) + log1p(decay);
  return {loss, high / (high + low), log_pos + loss * kLog2e};
}

}  // namespace
}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
