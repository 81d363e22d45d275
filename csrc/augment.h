// Two augmented views of a batch of 8-bit images, as a table of parameters says: crop and
// antialiased resize, horizontal flip, color jitter in any order, grayscale, Gaussian blur,
// solarization, normalization.
#pragma once

#include "args.h"

namespace clae_fast {

struct AugmentArgs : CpuArgs {
  // [S, 3, H, W] with the strides below; or, if offsets and sizes are given, S images of sizes of
  // their own, each contiguous as [height, width, 3]
  const uint8_t* images;
  const int64_t* strides;  // [4] from one image, channel, row and column to the next
  const int64_t* offsets;  // [S] where each image begins, or null
  const int64_t* sizes;    // [S, 2] the height and width of each image, or null
  // [2, N, 16] the columns are those of clae_fast.augment_params; every crop lies in its image
  const float* params;
  const int64_t* rows;  // [N] which image each sample is made of; null for the first N in order
  int64_t N;
  int64_t size;       // height and width of the views
  bool bicubic;       // otherwise bilinear
  const float* norm;  // [6] the channels' means, then their standard deviations, or null
  DType dtype;        // of the views: fp32 or fp16
  bool channels_last;
  void* out;  // [2N, 3, size, size]
};

// The workspace holds one view, and some of its rows, for each thread.
int64_t augment(const AugmentArgs& args);

}  // namespace clae_fast
