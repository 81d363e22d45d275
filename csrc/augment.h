// Both views of a batch of 8-bit images, as a table of parameters says: crop and antialiased
// resizing, mirror image, colours in some order, grey, Gaussian blur, solarization, normalisation.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace clae_fast {

struct AugmentArgs {
  // [S, 3, H, W] or, with offsets and sizes, S images [height, width, 3] in rows
  const uint8_t* images;
  const int64_t* strides;  // [4] from image to image, channel, row and column; not of ragged ones
  const int64_t* offsets;  // [S] where ragged images begin, nullptr where all are of one size
  const int64_t* sizes;    // [S, 2] their heights and widths
  // [2, N, 16] the columns are those of clae_fast.augment_params; crops lie inside the images
  const float* params;
  const int64_t* rows;  // [N] which image each sample is, nullptr where it is the first N
  int64_t N;
  int64_t size;       // of the views
  bool bicubic;       // else bilinear
  const float* norm;  // [6] means and standard deviations of the channels, or nullptr
  DType dtype;        // of the views, fp32 or fp16
  bool channels_last;
  int threads;
  void* out;                 // [2N, 3, size, size]
  unsigned char* workspace;  // [augment_workspace(...)] bytes, 64-byte aligned
};

// Bytes of scratch: a view and some of its lines for each thread.
int64_t augment_workspace(Isa isa, const AugmentArgs& args);

void augment(Isa isa, const AugmentArgs& args);

}  // namespace clae_fast
