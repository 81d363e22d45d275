// A thread makes one view after another, in memory that stays in its caches.
//
// Resizing is separable. For a row of the view, the rows of the crop that it covers are first added
// up with weights: a line of bytes at a time, in the order in which they lie in memory. Then each
// pixel is a weighted sum of that line's pixels, with all channels of a pixel in one vector.
//
// From there on the view is three planes of floats. The color jitter takes a vector of pixels
// through all of its steps in registers. Contrast needs the mean of the whole view, so it splits
// the steps into those before it and the rest.
//
// Blur is separable too. The rows of a plane are blurred along themselves into a ring of as many
// rows as the kernel is high, from which the blurred rows of the plane are made.
//
// A view depends on its image and its parameters alone, and so not on the number of threads.
#include <math.h>
#include <string.h>

#include "augment.h"
#include "carver.h"
#include "half.h"
#include "parallel.h"
#include "simd.h"

namespace clae_fast {
namespace CLAE_FAST_ISA {
namespace {

// How many pixels are colored or finished at a time. Their three channels stay in the L1 cache.
constexpr int64_t kChunk = 1024;
constexpr int64_t kColumns = 16;

// Columns of the parameters. Four begin at kOrder and four at kFactors.
enum Column {
  kTop,
  kLeft,
  kCropHeight,
  kCropWidth,
  kFlip,
  kOrder,
  kFactors = 9,
  kGrayscale = 13,
  kSigma,
  kSolarize
};
// Steps of the color jitter, by their numbers in the order.
enum Color { kBrightness, kContrast, kSaturation, kHue };

// For each pixel of a resized line, the source pixels that it is made of.
struct Taps {
  int64_t most;
  int32_t* first;  // [size]
  int32_t* count;  // [size] at most `most`
  float* weights;  // [size, most] 0 from count on
};

struct Scratch {
  Taps y, x;
  float* line;       // a row of the view before it is resized along itself
  float* planes[3];  // [size, size] each, in whole vectors
  // for the blur:
  float* gauss;        // [radius + 1] weights by distance
  float* padded;       // a row of a plane, reflected at both ends
  float* ring;         // [2 radius + 1, pitch] rows that are blurred along themselves
  const float** rows;  // [2 radius + 1] the rows of the ring around one row of the result
  int64_t pitch;
  int64_t bytes;
};

struct Image {
  const uint8_t* pixels;
  int64_t channel, row, column;  // strides
};

int64_t blur_radius(int64_t size) { return size < 40 ? 1 : size / 20; }

// The most taps that a pixel of the view has for a crop of `length`.
int64_t most_taps(int64_t length, int64_t size, bool bicubic) {
  const float scale = float(length) / float(size);
  return int64_t(ceilf((bicubic ? 4.f : 2.f) * (scale > 1.f ? scale : 1.f)));
}

Scratch carve(const AugmentArgs& args, unsigned char* base) {
  int64_t longest = 1;
  for (int64_t view = 0; view < 2 * args.N; ++view) {
    for (const int side : {kCropHeight, kCropWidth}) {
      const int64_t length = int64_t(args.params[view * kColumns + side]);
      longest = length > longest ? length : longest;
    }
  }
  const int64_t size = args.size;
  const int64_t taps = most_taps(longest, size, args.bicubic);
  const int64_t radius = blur_radius(size);
  Scratch s;
  Carver carver{base};
  for (Taps* each : {&s.y, &s.x}) {
    each->first = carver.take<int32_t>(size);
    each->count = carver.take<int32_t>(size);
    each->weights = carver.take<float>(size * taps);
  }
  // at every tap of the last pixel a vector of four floats is loaded, some of them past the line
  s.line = carver.take<float>(3 * (longest + taps) + 4);
  for (float*& plane : s.planes) plane = carver.take<float>(round_up(size * size, kWidth));
  s.pitch = round_up(size, kWidth);
  s.gauss = carver.take<float>(radius + 1);
  s.padded = carver.take<float>(s.pitch + 2 * radius);
  s.ring = carver.take<float>((2 * radius + 1) * s.pitch);
  s.rows = carver.take<const float*>(2 * radius + 1);
  s.bytes = carver.bytes;
  return s;
}

// The weight of a source pixel at a distance. The cubic filter is Keys' with a = -1/2.
CLAE_FAST_INLINE float filter(float distance, bool bicubic) {
  const float x = distance < 0.f ? -distance : distance;
  if (!bicubic) return x < 1.f ? 1.f - x : 0.f;
  if (x < 1.f) return (1.5f * x - 2.5f) * x * x + 1.f;
  return x < 2.f ? ((-0.5f * x + 2.5f) * x - 4.f) * x + 2.f : 0.f;
}

// Finds the taps of `size` pixels over a crop of `length`, with the last pixel first where
// `mirrored`. Weights add up to `sum`. Where the crop shrinks, the filter covers more pixels: that
// is the antialiasing.
void find_taps(int64_t length, int64_t size, bool bicubic, bool mirrored, float sum, Taps* taps) {
  const float scale = float(length) / float(size);
  const float stretch = scale > 1.f ? scale : 1.f;
  const float radius = bicubic ? 2.f * stretch : stretch;
  taps->most = most_taps(length, size, bicubic);
  for (int64_t i = 0; i < size; ++i) {
    const float center = scale * (float(i) + 0.5f);
    const int64_t low = int64_t(center - radius + 0.5f), high = int64_t(center + radius + 0.5f);
    const int64_t first = low < 0 ? 0 : low;
    const int64_t count = smaller(smaller(high, length) - first, taps->most);
    const int64_t at = mirrored ? size - 1 - i : i;
    float* weights = taps->weights + at * taps->most;
    float total = 0.f;
    for (int64_t t = 0; t < taps->most; ++t) {
      const float distance = (float(first + t) - center + 0.5f) / stretch;
      weights[t] = t < count ? filter(distance, bicubic) : 0.f;
      total += weights[t];
    }
    for (int64_t t = 0; t < count; ++t) weights[t] *= sum / total;
    taps->first[at] = int32_t(first);
    taps->count[at] = int32_t(count);
  }
}

// Adds the weighted bytes of a few lines to `out`, or with `begin` sets it to them.
template <int taps, int spread>
void add_lines(const uint8_t* const* lines,
               const float* weights,
               int64_t stride,
               int64_t count,
               bool begin,
               float* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = begin ? 0.f : out[spread * i];
    for (int t = 0; t < taps; ++t) sum += weights[t] * float(lines[t][i * stride]);
    out[spread * i] = sum;
  }
}

// Makes the weighted sum of `taps` lines of bytes, `row` bytes apart. Numbers are `stride` bytes
// apart in a line, and `spread` apart in `out`.
template <int spread>
void weigh_lines(const uint8_t* bytes,
                 int64_t row,
                 int64_t stride,
                 int64_t count,
                 const float* weights,
                 int64_t taps,
                 float* out) {
  for (int64_t t = 0; t < taps; t += 4) {
    const uint8_t* lines[4];
    for (int l = 0; l < 4; ++l) lines[l] = bytes + (t + l < taps ? t + l : t) * row;
    const float* w = weights + t;
    switch (taps - t) {
      case 1:
        add_lines<1, spread>(lines, w, stride, count, t == 0, out);
        break;
      case 2:
        add_lines<2, spread>(lines, w, stride, count, t == 0, out);
        break;
      case 3:
        add_lines<3, spread>(lines, w, stride, count, t == 0, out);
        break;
      default:
        add_lines<4, spread>(lines, w, stride, count, t == 0, out);
    }
  }
}

// Makes row y of the view before it is resized along itself: line [width, 3].
void resize_down(const Image& crop, int64_t width, const Taps& taps, int64_t y, float* line) {
  const uint8_t* bytes = crop.pixels + taps.first[y] * crop.row;
  const float* weights = taps.weights + y * taps.most;
  const int64_t count = taps.count[y];
  if (crop.channel == 1 && crop.column == 3) {
    return weigh_lines<1>(bytes, crop.row, 1, 3 * width, weights, count, line);
  }
  for (int c = 0; c < 3; ++c) {
    weigh_lines<3>(bytes + c * crop.channel, crop.row, crop.column, width, weights, count,
                   line + c);
  }
}

// Resizes the line along itself, to a row of each plane.
void resize_along(const float* line, const Taps& taps, int64_t size, float* const* rows) {
  typedef float Pixel __attribute__((vector_size(16)));
  for (int64_t x = 0; x < size; ++x) {
    const float* from = line + 3 * taps.first[x];
    const float* weights = taps.weights + x * taps.most;
    Pixel sum = {};
    for (int64_t t = 0; t < taps.most; ++t) {
      Pixel pixel;
      memcpy(&pixel, from + 3 * t, sizeof pixel);
      sum += weights[t] * pixel;
    }
    for (int c = 0; c < 3; ++c) rows[c][x] = sum[c];
  }
}

// A vector of pixels.
struct Pixels {
  Vec r, g, b;
};

CLAE_FAST_INLINE Vec clamp(Vec x) { return minimum(maximum(x, Vec{}), splat(1.f)); }
CLAE_FAST_INLINE Vec gray(const Pixels& p) { return 0.2989f * p.r + 0.587f * p.g + 0.114f * p.b; }

CLAE_FAST_INLINE Pixels load_pixels(const float* const* planes, int64_t at) {
  return {load(planes[0] + at), load(planes[1] + at), load(planes[2] + at)};
}
CLAE_FAST_INLINE void store_pixels(const Pixels& p, float* const* planes, int64_t at) {
  store(planes[0] + at, p.r);
  store(planes[1] + at, p.g);
  store(planes[2] + at, p.b);
}

CLAE_FAST_INLINE void blend(Pixels& p, Vec other, float factor) {
  other *= 1.f - factor;
  p = {clamp(p.r * factor + other), clamp(p.g * factor + other), clamp(p.b * factor + other)};
}

// One channel of a color. `hue` is in sixths of a turn, as is `first`, which tells the channels
// apart; both are positive.
CLAE_FAST_INLINE Vec of_hue(Vec hue, float first, Vec high, Vec chroma) {
  Vec k = hue + first;
  k -= 6.f * __builtin_convertvector(__builtin_convertvector(k * (1.f / 6.f), IVec), Vec);
  return high - chroma * clamp(minimum(k, 4.f - k));
}

// Turns the hue by `shift` turns, from 0 to 1.
CLAE_FAST_INLINE void turn_hue(Pixels& p, float shift) {
  const Vec high = maximum(p.r, maximum(p.g, p.b));
  const Vec chroma = high - minimum(p.r, minimum(p.g, p.b));
  const Vec inverse = 1.f / (chroma == Vec{} ? splat(1.f) : chroma);
  Vec hue = high == p.g ? (p.b - p.r) * inverse + 2.f : (p.r - p.g) * inverse + 4.f;
  hue = (high == p.r ? (p.g - p.b) * inverse : hue) + 6.f * shift;
  p = {of_hue(hue, 5.f, high, chroma), of_hue(hue, 3.f, high, chroma),
       of_hue(hue, 1.f, high, chroma)};
}

struct Step {
  int color;
  float factor;
};

CLAE_FAST_INLINE void recolor(Pixels& p, const Step* begin, const Step* end, float mean) {
  for (const Step* step = begin; step != end; ++step) {
    switch (step->color) {
      case kBrightness:
        blend(p, Vec{}, step->factor);
        break;
      case kContrast:
        blend(p, splat(mean), step->factor);
        break;
      case kSaturation:
        blend(p, gray(p), step->factor);
        break;
      default:
        turn_hue(p, step->factor);
    }
  }
}

// The steps of a view's color jitter, without those that change nothing.
struct Colors {
  Step steps[4];
  const Step* contrast;  // the first step that needs the view's mean, or end
  const Step* end;

  explicit Colors(const float* params) {
    Step* last = steps;
    contrast = nullptr;
    for (int place = 0; place < 4; ++place) {
      const int color = int(params[kOrder + place]);
      float factor = params[kFactors + color];
      if (factor == (color == kHue ? 0.f : 1.f)) continue;
      if (color == kHue) factor -= floorf(factor);
      if (color == kContrast) contrast = last;
      *last++ = {color, factor};
    }
    end = last;
    if (contrast == nullptr) contrast = end;
  }
  Colors(const Colors&) = delete;
};

// Clamps the values from `begin` to before `end`, whole vectors, to [0, 1], and takes the steps
// before contrast. Returns the sum of the gray of those before `pixels`.
double begin_colors(float* const* planes,
                    const Colors& colors,
                    int64_t begin,
                    int64_t end,
                    int64_t pixels) {
  Vec sum = {};
  float rest = 0.f;
  for (int64_t i = begin; i < end; i += kWidth) {
    Pixels p = load_pixels(planes, i);
    p = {clamp(p.r), clamp(p.g), clamp(p.b)};
    recolor(p, colors.steps, colors.contrast, 0.f);
    store_pixels(p, planes, i);
    const Vec light = gray(p);
    if (i + kWidth <= pixels) {
      sum += light;
    } else {
      for (int64_t l = 0; l < pixels - i; ++l) rest += light[l];
    }
  }
  return double(horizontal_sum(sum)) + double(rest);
}

// Resizes the crop and takes the color steps before contrast. Returns the sum of the view's gray.
double begin_view(const AugmentArgs& args,
                  const Image& image,
                  const float* params,
                  const Colors& colors,
                  Scratch* s) {
  const int64_t size = args.size, pixels = size * size;
  const int64_t height = int64_t(params[kCropHeight]), width = int64_t(params[kCropWidth]);
  Image crop = image;
  crop.pixels += int64_t(params[kTop]) * crop.row + int64_t(params[kLeft]) * crop.column;
  find_taps(height, size, args.bicubic, false, 1.f / 255.f, &s->y);
  find_taps(width, size, args.bicubic, params[kFlip] != 0.f, 1.f, &s->x);
  memset(s->line + 3 * width, 0, sizeof(float) * (3 * s->x.most + 4));
  double sum = 0.;
  int64_t done = 0;
  for (int64_t y = 0; y < size; ++y) {
    resize_down(crop, width, s->y, y, s->line);
    float* const rows[] = {s->planes[0] + y * size, s->planes[1] + y * size,
                           s->planes[2] + y * size};
    resize_along(s->line, s->x, size, rows);
    const bool last = y + 1 == size;
    const int64_t ready = last ? round_up(pixels, kWidth) : (y + 1) * size / kWidth * kWidth;
    if (last || ready - done >= kChunk) {
      sum += begin_colors(s->planes, colors, done, ready, pixels);
      done = ready;
    }
  }
  return sum;
}

// Takes the other color steps, and the one to grayscale.
void end_colors(float* const* planes,
                const Colors& colors,
                bool grayscale,
                float mean,
                int64_t begin,
                int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    Pixels p = load_pixels(planes, i);
    recolor(p, colors.contrast, colors.end, mean);
    if (grayscale) p.r = p.g = p.b = gray(p);
    store_pixels(p, planes, i);
  }
}

// The weighted sum of row(0) and of its neighbors on both sides, up to a distance of `radius`.
template <class Row>
CLAE_FAST_INLINE Vec blurred(const float* weights, int64_t radius, Row row) {
  Vec sum = weights[0] * row(0);
  for (int64_t d = 1; d <= radius; ++d) sum += weights[d] * (row(-d) + row(d));
  return sum;
}

// Blurs a row of a plane along itself; it is reflected at its ends.
void blur_along(const float* from, int64_t size, int64_t radius, const Scratch& s, float* to) {
  memcpy(s.padded + radius, from, sizeof(float) * size);
  for (int64_t d = 1; d <= radius; ++d) {
    s.padded[radius - d] = from[d];
    s.padded[radius + size - 1 + d] = from[size - 1 - d];
  }
  for (int64_t x = 0; x < size; x += kWidth) {
    const float* center = s.padded + radius + x;
    store(to + x, blurred(s.gauss, radius, [=](int64_t d) { return load(center + d); }));
  }
}

// Blurs a plane in place.
void blur(float* plane, int64_t size, const Scratch& s) {
  const int64_t radius = blur_radius(size), height = 2 * radius + 1;
  for (int64_t below = 0; below < size + radius; ++below) {
    if (below < size) {
      blur_along(plane + below * size, size, radius, s, s.ring + below % height * s.pitch);
    }
    const int64_t y = below - radius;
    if (y < 0) continue;
    for (int64_t d = -radius; d <= radius; ++d) {
      int64_t at = y + d < 0 ? -(y + d) : y + d;
      at = at < size ? at : 2 * (size - 1) - at;
      s.rows[radius + d] = s.ring + at % height * s.pitch;
    }
    const float* const* center = s.rows + radius;
    float* to = plane + y * size;
    for (int64_t x = 0; x < size; x += kWidth) {
      const Vec sum = blurred(s.gauss, radius, [=](int64_t d) { return load(center[d] + x); });
      // a whole vector could overwrite the next row, which is not in the ring yet
      memcpy(to + x, &sum, sizeof(float) * smaller(size - x, kWidth));
    }
  }
}

void find_gauss(float sigma, int64_t radius, float* weights) {
  float total = 0.f;
  for (int64_t d = 0; d <= radius; ++d) {
    const float distance = float(d) / sigma;
    weights[d] = expf(-0.5f * distance * distance);
    total += d == 0 ? weights[d] : 2.f * weights[d];
  }
  for (int64_t d = 0; d <= radius; ++d) weights[d] /= total;
}

struct Fp32 {
  typedef float Storage;
  static CLAE_FAST_INLINE float store(float value) { return value; }
};

struct Fp16 {
  typedef uint16_t Storage;
  static CLAE_FAST_INLINE uint16_t store(float value) { return nearest_fp16(value); }
};

// Writes up to kChunk finished pixels to the view, from pixel `begin` on.
template <class T>
void write(const float (*pixels)[kChunk],
           int64_t begin,
           int64_t count,
           const AugmentArgs& args,
           typename T::Storage* view) {
  if (args.channels_last) {
    view += 3 * begin;
    for (int64_t i = 0; i < count; ++i) {
      for (int c = 0; c < 3; ++c) view[3 * i + c] = T::store(pixels[c][i]);
    }
    return;
  }
  for (int c = 0; c < 3; ++c) {
    typename T::Storage* plane = view + c * args.size * args.size + begin;
    for (int64_t i = 0; i < count; ++i) plane[i] = T::store(pixels[c][i]);
  }
}

// Solarizes, clamps, normalizes and writes the pixels from `begin` to before `end`.
void finish(const float* const* planes,
            int64_t begin,
            int64_t end,
            bool solarize,
            const AugmentArgs& args,
            int64_t view) {
  float pixels[3][kChunk];
  for (int c = 0; c < 3; ++c) {
    const float mean = args.norm ? args.norm[c] : 0.f, std = args.norm ? args.norm[3 + c] : 1.f;
    for (int64_t i = begin; i < end; i += kWidth) {
      Vec x = load(planes[c] + i);
      if (solarize) x = x < splat(0.5f) ? x : 1.f - x;
      x = clamp(x);
      if (args.norm) x = (x - mean) / std;
      store(pixels[c] + i - begin, x);
    }
  }
  const int64_t area = args.size * args.size;
  const int64_t count = smaller(end, area) - begin;
  if (args.dtype == DType::fp16) {
    write<Fp16>(pixels, begin, count, args, static_cast<uint16_t*>(args.out) + view * 3 * area);
  } else {
    write<Fp32>(pixels, begin, count, args, static_cast<float*>(args.out) + view * 3 * area);
  }
}

Image image_of(const AugmentArgs& args, int64_t row) {
  if (args.offsets) {
    return {args.images + args.offsets[row], 1, 3 * args.sizes[2 * row + 1], 3};
  }
  const int64_t* strides = args.strides;
  return {args.images + row * strides[0], strides[1], strides[2], strides[3]};
}

void make_view(const AugmentArgs& args, int64_t view, Scratch* s) {
  const float* params = args.params + view * kColumns;
  const int64_t sample = view % args.N, size = args.size;
  const Image image = image_of(args, args.rows ? args.rows[sample] : sample);
  const Colors colors(params);
  const double sum = begin_view(args, image, params, colors, s);
  const float mean = float(sum / double(size * size));
  const bool blurs = params[kSigma] != 0.f, solarize = params[kSolarize] != 0.f;
  const int64_t padded = round_up(size * size, kWidth);
  for (int64_t begin = 0; begin < padded; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, padded);
    end_colors(s->planes, colors, params[kGrayscale] != 0.f, mean, begin, end);
    if (!blurs) finish(s->planes, begin, end, solarize, args, view);
  }
  if (!blurs) return;
  find_gauss(params[kSigma], blur_radius(size), s->gauss);
  for (float* plane : s->planes) blur(plane, size, *s);
  for (int64_t begin = 0; begin < padded; begin += kChunk) {
    finish(s->planes, begin, smaller(begin + kChunk, padded), solarize, args, view);
  }
}

}  // namespace

int64_t augment(const AugmentArgs& args) {
  const int threads = int(smaller(args.threads, 2 * args.N));
  const int64_t bytes = carve(args, nullptr).bytes;
  if (!args.workspace) return threads * bytes;
  parallel(threads, [&](Team& team, int rank) {
    Scratch s = carve(args, args.workspace + rank * bytes);
    // views are dealt out in turn, so that all threads get about the same work
    for (int64_t view = rank; view < 2 * args.N; view += team.size()) make_view(args, view, &s);
  });
  return 0;
}

}  // namespace CLAE_FAST_ISA
}  // namespace clae_fast
