#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda_check.cuh"
#include "linf_step.cuh"
#include "mma.cuh"
#include "stem_step.h"

// The gradient is a matrix product on tensor cores. Its accumulators also add up the kernel's rows.
//
// A position is a pair of neighboring pixels in a row of x. Row r of dY reaches several rows of x.
// What it adds to a position in all of them depends on a window of 4 pixels of dY, and so on 4 C
// numbers: that is the depth of the product. Where a pixel of dY does not reach a pixel of x, the
// weight is 0. The left operand has one row for each position. It is made alike for kernels of 3
// and of 7; the windows of neighboring positions are 2 pixels apart for 3, and 1 pixel for 7.
//
// For each row of x the product has 6 columns: the 2 pixels of a position times 3 channels. As r
// advances, rows of x enter and leave. Each keeps its columns, one slot of a ring of kRows, until
// all rows of the kernel have been added and its signs are taken. The weights turn instead: the
// columns of slot s hold kernel row (s - kStride r + const) mod kRows, the last of which is all
// zeros.
//
// The positions of all images lie side by side, with zeros between images. A warp walks down the
// rows with kPositions of them. Once the weights are packed, no warp waits for another.

namespace clae_fast {
namespace {

constexpr int kStages = 2;           // rows of dY in shared memory, one of them on its way
constexpr int kWindow = 4;           // pixels in a row of dY that a position depends on
constexpr int kChunk = 64;           // channels of a stage
constexpr int kPixelBytes = 128;     // bytes of a chunk's channels in one pixel
constexpr int kSteps = kChunk / 16;  // matrix products along a chunk
constexpr int kNowhere = -1;
constexpr int kFirstRow = 1;  // the first row of dY that completes a row of x: kPadding / kStride

template <int kSize>
struct Stem {
  static constexpr int kStride = kSize == 3 ? 1 : 2;
  static constexpr int kPadding = kSize / 2;
  static constexpr int kMaxWarps = 8;         // of a block: registers allow no more at kSize 7
  static constexpr int kApart = 2 / kStride;  // pixels of dY from one position to the next
  // Matrix tiles of a warp. Tile t has the positions t, t + kTiles, ... So the same pixels of dY
  // are at one offset of one tile's windows and at another offset of another tile's, and one
  // fragment serves both.
  static constexpr int kTiles = 4 / kApart;
  static constexpr int kFragments = kApart * (kTiles - 1) + kWindow;
  static constexpr int kPositions = 16 * kTiles;
  static constexpr int kPixels = kApart * (kPositions - kTiles) + kFragments;
  static constexpr int kRows = kSize + 1;  // the ring of rows of x
  static constexpr int kColumns = 6 * kRows;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kNumbers = kPositions * 6 / 32;  // numbers of a row of x that a lane has
  // rows of dY that a row of x depends on, above the one that completes it
  static constexpr int kReach = (kSize - 1) / kStride;
  static constexpr int kWeightBytes = kSteps * kWindow * kColumns * 4 * int(sizeof(uint2));
};

// A warp's part of shared memory.
template <int kSize>
struct alignas(128) Workspace {
  unsigned char stages[kStages][Stem<kSize>::kPixels * kPixelBytes];
  // The offsets in row 0, from the group's first image on, of its pixels of dY and of its numbers
  // of x, in the order of pixels and channels. kNowhere between images.
  int pixels[Stem<kSize>::kPixels];
  int numbers[Stem<kSize>::kPositions * 6];
  signed char signs[Stem<kSize>::kStride][Stem<kSize>::kPositions * 6];
};

// A step of a walk completes kStride rows of x. The steps of all groups of positions, one group
// after another, are dealt out to the warps in runs of equal length.
struct Schedule {
  int dy_H;
  int dy_W;
  int pitch;  // pixels of dY from one image to the next
  int steps;  // of a group of kPositions
  int all;    // steps of all groups
  int each;   // steps of a warp
};

// Two numbers of type Half in a register.
template <class Half>
__device__ uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<Half, __half>) {
    return __half_as_ushort(__float2half_rn(a)) | __half_as_ushort(__float2half_rn(b)) << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
           __bfloat16_as_ushort(__float2bfloat16_rn(b)) << 16;
  }
}

// Packs the weights into [C / 16, kWindow, kColumns, 4], with columns in the order of kernel rows.
// A product takes fragments of 16 channels by 8 columns, and an element holds the four weights that
// one lane has of a fragment.
template <class Half, class W, int kSize>
__device__ void pack_weights(const StemStepArgs& args, uint2* packed) {
  using S = Stem<kSize>;
  constexpr int kBatch = 4;  // elements whose weights are on their way at once
  const int* strides = args.strides.weight;
  const int count = args.C / 16 * kWindow * S::kColumns * 4;
  for (int begin = threadIdx.x; begin < count; begin += kBatch * blockDim.x) {
    W w[kBatch][4];
    bool hits[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * blockDim.x;
      const int column = i / 4 % S::kColumns;
      const int offset = i / (4 * S::kColumns) % kWindow;
      const int channel = i / (4 * S::kColumns * kWindow) * 16 + i % 4 * 2;
      const int row = column / 6, phase = column % 6 / 3, c = column % 3;
      // the tap that takes pixel kApart p + offset - 1 of dY to pixel 2 p + phase of x
      const int tap = phase + S::kPadding + S::kStride * (1 - offset);
      hits[b] = i < count && row < kSize && tap >= 0 && tap < kSize;
      const int at = channel * strides[0] + c * strides[1] + row * strides[2] + tap * strides[3];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int next = (k / 2 * 8 + k % 2) * strides[0];
        w[b][k] = static_cast<const W*>(args.weight)[hits[b] ? at + next : 0];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * blockDim.x;
      const auto weight = [&](int k) { return hits[b] ? load(w[b][k]) : 0.f; };
      if (i < count) {
        packed[i] = make_uint2(pack<Half>(weight(0), weight(1)), pack<Half>(weight(2), weight(3)));
      }
    }
  }
}

// The image of a pixel of dY and its column there.
struct Pixel {
  int image;
  int column;
};

// Finds a pixel by its number in a row of all images, counting what is between them.
__device__ Pixel locate(const Schedule& schedule, int pixel) {
  const unsigned image = unsigned(pixel) / unsigned(schedule.pitch);
  return {int(image), int(pixel - image * schedule.pitch)};
}

// Finds the offsets of a group's pixels and numbers. Returns its first image.
template <int kSize>
__device__ int locate_group(const StemStepArgs& args,
                            const Schedule& schedule,
                            int group,
                            Workspace<kSize>& work) {
  using S = Stem<kSize>;
  const int start = group * (S::kApart * S::kPositions);
  const int image = locate(schedule, start).image;
  const int* strides = args.strides.x;
  for (int i = threadIdx.x % 32; i < S::kPixels; i += 32) {
    // a window begins one pixel before its position
    const Pixel pixel = locate(schedule, start + i - 1);
    const bool inside = start + i > 0 && pixel.image < args.N && pixel.column < schedule.dy_W;
    const int rows = (pixel.image - image) * schedule.dy_H;
    work.pixels[i] = inside ? (rows * schedule.dy_W + pixel.column) * args.C : kNowhere;
  }
  for (int i = threadIdx.x % 32; i < S::kPositions * 6; i += 32) {
    const Pixel pixel = locate(schedule, start + i / 6 * S::kApart);
    const int column = S::kStride * pixel.column + i % 6 / 3;
    const bool inside = pixel.image < args.N && pixel.column < schedule.dy_W && column < args.W;
    work.numbers[i] =
        inside ? (pixel.image - image) * strides[0] + i % 3 * strides[1] + column * strides[3]
               : kNowhere;
  }
  __syncwarp();
  return image;
}

// Starts to copy a chunk of a row of dY. In the group's first image it begins at `dy`. The 16-byte
// parts of a pixel are permuted, so that the rows of a fragment, every fourth pixel, are in
// different banks.
template <int kSize>
__device__ void start_copy(const uint16_t* dy, const Workspace<kSize>& work, unsigned char* stage) {
  constexpr int kCopies = (Stem<kSize>::kPixels + 3) / 4;
  const int part = threadIdx.x % 8, first = threadIdx.x % 32 / 8;
  int pixels[kCopies];
#pragma unroll
  for (int k = 0; k < kCopies; ++k) {
    const int i = k * 4 + first;
    pixels[k] = i < Stem<kSize>::kPixels ? work.pixels[i] : kNowhere;
  }
#pragma unroll
  for (int k = 0; k < kCopies; ++k) {
    const int i = k * 4 + first;
    if (i >= Stem<kSize>::kPixels) continue;
    cp_async(stage + i * kPixelBytes + (part ^ k % 8) * 16, dy + max(pixels[k], 0) + part * 8,
             pixels[k] != kNowhere);
  }
}

// Multiplies a chunk of a row of dY with its weights, and adds the products to the sums.
template <class Half, int kSize>
__device__ void multiply(const unsigned char* stage,
                         const uint2* weights,  // [kSteps, kWindow, kColumns, 4]
                         int turn,
                         float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4]) {
  using S = Stem<kSize>;
  const int lane = threadIdx.x % 32;
  const int row = lane % 16, half = lane / 16;
  int columns[S::kColumnTiles];
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    const int column = j * 8 + lane / 4 - turn * S::kStride * 6;
    columns[j] = (column < 0 ? column + S::kColumns : column) * 4 + lane % 4;
  }
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[S::kFragments][4];
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      const int part = (2 * step + half) ^ (row + f / 4) % 8;
      ldmatrix_x4(a[f], stage + (4 * row + f) * kPixelBytes + part * 16);
    }
#pragma unroll
    for (int offset = 0; offset < kWindow; ++offset) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
        const uint2 pair = weights[(step * kWindow + offset) * (S::kColumns * 4) + columns[j]];
        const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t) {
          mma_m16n8k16<Half>(sums[t][j], a[S::kApart * t + offset], b);
        }
      }
    }
  }
}

// Takes the signs of the rows of x that the step completes, in the order of pixels and channels.
template <int kSize>
__device__ void take_signs(
    int turn,
    const float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4],
    signed char (&signs)[Stem<kSize>::kStride][Stem<kSize>::kPositions * 6]) {
  using S = Stem<kSize>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    // the lane has columns 2 pair and 2 pair + 1 of the step's rows
    const int pair = j * 4 + lane % 4 - turn * S::kStride * 3;
    if (pair < 0 || pair >= S::kStride * 3) continue;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = (lane / 4 + i / 2 * 8) * S::kTiles + t;
        const float sum = sums[t][j][i];
        signs[pair / 3][position * 6 + pair % 3 * 2 + i % 2] = (sum > 0.f) - (sum < 0.f);
      }
    }
  }
}

// Clears the slots that rows of x will enter with the next step: the ones before the slots of the
// rows that leave with this step. They may hold NaN, which a zero weight times infinity has added.
template <int kSize>
__device__ void clear_slots(int turn,
                            float (&sums)[Stem<kSize>::kTiles][Stem<kSize>::kColumnTiles][4]) {
  using S = Stem<kSize>;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    const int pair = j * 4 + int(threadIdx.x) % 4 - turn * S::kStride * 3 + 3;
    if ((pair + S::kColumns / 2) % (S::kColumns / 2) >= S::kStride * 3) continue;
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][j][i] = 0.f;
    }
  }
}

// Reads a lane's numbers of a row of x, for take_move().
template <class X, int kSize>
__device__ void read(const X* row, const Workspace<kSize>& work, X (&x)[Stem<kSize>::kNumbers]) {
#pragma unroll
  for (int k = 0; k < Stem<kSize>::kNumbers; ++k) {
    const int at = work.numbers[k * 32 + threadIdx.x % 32];
    if (at != kNowhere) x[k] = row[at];
  }
}

// Writes a lane's numbers of a row of out. Number k has the bounds of number k % 3.
template <class X, int kSize>
__device__ void take_move(const X (&x)[Stem<kSize>::kNumbers],
                          const Workspace<kSize>& work,
                          const signed char* signs,
                          const ChannelBounds (&bounds)[3],
                          X* row) {
#pragma unroll
  for (int k = 0; k < Stem<kSize>::kNumbers; ++k) {
    const int i = k * 32 + threadIdx.x % 32;
    const int at = work.numbers[i];
    if (at == kNowhere) continue;
    const float center = load(x[k]);
    store(row + at, stepped(center, signs[i], center, bounds[k % 3]), center);
  }
}

template <class Half, class X, int kSize>
__global__ void __launch_bounds__(Stem<kSize>::kMaxWarps * 32, 1)
    stem_step_kernel(StemStepArgs args, Bounds given, Schedule schedule) {
  using S = Stem<kSize>;
  __shared__ ChannelBounds channels[3];
  unsigned char* shared = dynamic_shared();
  const int chunks = args.C / kChunk;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto& work = reinterpret_cast<Workspace<kSize>*>(shared + chunks * S::kWeightBytes)[warp];
  auto* weights = reinterpret_cast<uint2*>(shared);

  int begin = (int(blockIdx.x) * warps + warp) * schedule.each;
  const int end = min(begin + schedule.each, schedule.all);
  // the operands from the group's first image on
  const uint16_t* dy = nullptr;
  const X* x = nullptr;
  X* out = nullptr;
  const int64_t dy_row = int64_t(schedule.dy_W) * args.C;
  const auto enter = [&] {
    const int64_t image = locate_group(args, schedule, begin / schedule.steps, work);
    dy = static_cast<const uint16_t*>(args.dy) + image * schedule.dy_H * dy_row;
    x = static_cast<const X*>(args.x) + image * args.strides.x[0];
    out = static_cast<X*>(args.out) + image * args.strides.x[0];
    const int row = kFirstRow + begin % schedule.steps - S::kReach;
    if (row >= 0) start_copy(dy + row * dy_row, work, work.stages[0]);
    cp_async_commit();
  };
  if (begin < end) enter();
  if (args.weight_dtype == DType::fp32) {
    pack_weights<Half, float, kSize>(args, weights);
  } else {
    pack_weights<Half, Half, kSize>(args, weights);
  }
  if (threadIdx.x < 3) channels[threadIdx.x] = bounds_of(given, threadIdx.x);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const ChannelBounds bounds[3] = {channels[lane % 3], channels[(lane + 32) % 3],
                                   channels[(lane + 64) % 3]};

  while (begin < end) {
    const int first = kFirstRow + begin % schedule.steps;
    const int count = min(end - begin, schedule.steps - begin % schedule.steps);
    float sums[S::kTiles][S::kColumnTiles][4] = {};
    X numbers[S::kStride][S::kNumbers];
    int stage = 0, turn = 0;
    for (int row = first - S::kReach; row < first + count; ++row) {
      // the first of the rows of x that are complete after this row of dY
      const int top = S::kStride * row - S::kPadding;
      const auto ends = [&](int y) { return row >= first && y >= 0 && y < args.H; };
#pragma unroll
      for (int y = top; y < top + S::kStride; ++y) {
        // early, so that x has arrived when the signs are known
        if (ends(y)) read(x + int64_t(y) * args.strides.x[2], work, numbers[y - top]);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const bool last = chunk + 1 == chunks;
        const int next = last ? row + 1 : row;
        if (next >= 0 && next < schedule.dy_H && next < first + count) {
          const int channel = last ? 0 : (chunk + 1) * kChunk;
          start_copy(dy + next * dy_row + channel, work, work.stages[stage ^ 1]);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncwarp();
        if (row >= 0 && row < schedule.dy_H) {
          multiply<Half, kSize>(work.stages[stage],
                                weights + chunk * (S::kWeightBytes / sizeof(uint2)), turn, sums);
        }
        __syncwarp();
        stage ^= 1;
      }
      if (row >= first) take_signs<kSize>(turn, sums, work.signs);
      __syncwarp();
#pragma unroll
      for (int y = top; y < top + S::kStride; ++y) {
        if (!ends(y)) continue;
        take_move(numbers[y - top], work, work.signs[y - top], bounds,
                  out + int64_t(y) * args.strides.x[2]);
      }
      __syncwarp();
      clear_slots<kSize>(turn, sums);
      turn = (turn + 1) % (S::kRows / S::kStride);
    }
    begin += count;
    if (begin < end) enter();
  }
}

constexpr char kOp[] = "stem_step";

template <class Half, class X, int kSize>
void launch(const StemStepArgs& args) {
  using S = Stem<kSize>;
  const int multiprocessors = device_attribute(kOp, cudaDevAttrMultiProcessorCount);
  const int shared = device_attribute(kOp, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int weight_bytes = args.C / kChunk * S::kWeightBytes;
  // 1024 bytes are for the bounds and for what the system takes
  const int left = shared - 1024 - weight_bytes;
  const int warps = std::min<int>(S::kMaxWarps, left / int(sizeof(Workspace<kSize>)));
  if (warps < 1) check(kOp, cudaErrorInvalidConfiguration);

  Schedule schedule;
  schedule.dy_H = (args.H - 1) / S::kStride + 1;
  schedule.dy_W = (args.W - 1) / S::kStride + 1;
  // at least two pixels of zeros on each side of an image, which windows reach into
  const int pitch = (args.W + 1) / 2 + S::kStride;
  schedule.pitch = pitch * S::kApart;
  schedule.steps = (args.H - 1 + S::kPadding) / S::kStride;
  const int groups = (args.N * pitch + S::kPositions - 1) / S::kPositions;
  schedule.all = groups * schedule.steps;
  const int slots = multiprocessors * warps;
  schedule.each = (schedule.all + slots - 1) / slots;
  const int share = schedule.each * warps;

  auto* kernel = &stem_step_kernel<Half, X, kSize>;
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((schedule.all + share - 1) / share);
  config.blockDim = unsigned(32 * warps);
  config.dynamicSmemBytes = weight_bytes + warps * sizeof(Workspace<kSize>);
  config.stream = static_cast<cudaStream_t>(args.stream);
  check(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(config.dynamicSmemBytes)));
  const Bounds bounds(args.bounds, args.bounds_on_device, 3);
  check(kOp, cudaLaunchKernelEx(&config, kernel, args, bounds, schedule));
}

template <class Half, class X>
void launch_for_size(const StemStepArgs& args) {
  args.size == 3 ? launch<Half, X, 3>(args) : launch<Half, X, 7>(args);
}

template <class Half>
void launch_for_x(const StemStepArgs& args) {
  args.x_dtype == DType::fp32 ? launch_for_size<Half, float>(args)
                              : launch_for_size<Half, __half>(args);
}

}  // namespace

void stem_step_cuda(const StemStepArgs& args) {
  args.dy_dtype == DType::fp16 ? launch_for_x<__half>(args) : launch_for_x<__nv_bfloat16>(args);
}

}  // namespace clae_fast
