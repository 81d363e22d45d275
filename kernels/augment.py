"""Both augmented views of a batch in Triton: one launch, one program for each view of a sample.

The view lies in `out` between the phases of its program: contrast needs the mean of all its pixels,
the blur its neighbours, and the image of any size is worked on in tiles. Reading back what was
written costs less than cutting and resizing again, since it stays in the cache.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device_of

BLOCK = 256
# columns of the table
_FLIP = tl.constexpr(4)
_ORDER = tl.constexpr(5)
_FACTORS = tl.constexpr(9)
_GREY = tl.constexpr(13)
_SIGMA = tl.constexpr(14)
_SOLARIZE = tl.constexpr(15)
_COLUMNS = tl.constexpr(16)
# exp(-x / 2) is exp2 of this times x
_GAUSS = tl.constexpr(-0.5 / math.log(2))
# the place of contrast among the factors
_CONTRAST = tl.constexpr(1)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _grey(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _blend(x, other, factor):
    return _clamp(x * factor + other * (-factor + 1.0))


@triton.jit
def _filter(distance, BICUBIC: tl.constexpr):
    """What a pixel at a distance counts in resizing; Keys' cubic has a = -1/2."""
    x = tl.abs(distance)
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(-x + 1.0, 0.0)
    return weight


@triton.jit
def _taps(at, length, SIZE: tl.constexpr, BICUBIC: tl.constexpr):
    """The taps of the pixels `at` of a view over a crop of `length` pixels.

    Returns the first source pixel, its distance from the pixel's center in units of the filter, how
    far the next one is, and how many there are. A filter covers more pixels where it shrinks the
    image, which is the antialiasing.
    """
    scale = length / SIZE
    stretch = tl.maximum(scale, 1.0)
    radius = stretch * 2 if BICUBIC else stretch
    center = scale * (at + 0.5)
    first = tl.floor(center - radius + 0.5)
    step = 1.0 / stretch
    distance = (first - center + 0.5) * step
    return first.to(tl.int32), distance, step, tl.ceil(2 * radius).to(tl.int32)


@triton.jit
def _crop(
    image_ptr,  # [3, H, W]
    params_ptr,
    y,
    x,
    stride_c,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
):
    """The pixels (y, x) of the cut, resized and perhaps mirrored image."""
    top = tl.load(params_ptr).to(tl.int32)
    left = tl.load(params_ptr + 1).to(tl.int32)
    height = tl.load(params_ptr + 2)
    width = tl.load(params_ptr + 3)
    x = tl.where(tl.load(params_ptr + _FLIP) != 0, -x + (SIZE - 1), x)
    first_y, distance_y, step_y, taps_y = _taps(y, height, SIZE, BICUBIC)
    first_x, distance_x, step_x, taps_x = _taps(x, width, SIZE, BICUBIC)
    # the innermost loop is most of the kernel's work: it compares integers, which are not converted
    height = height.to(tl.int32)
    width = width.to(tl.int32)
    # 64 bits: in some layouts of a data set the pixels of an image lie far apart
    image_ptr += top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    start_ptr = image_ptr + first_x.to(tl.int64) * stride_w
    total = tl.zeros(y.shape, tl.float32)
    r = tl.zeros(y.shape, tl.float32)
    g = tl.zeros(y.shape, tl.float32)
    b = tl.zeros(y.shape, tl.float32)
    for tap_y in range(taps_y):
        at_y = first_y + tap_y
        weight_y = _filter(distance_y + tl.cast(tap_y, tl.float32) * step_y, BICUBIC)
        mask_y = (at_y >= 0) & (at_y < height)
        r_ptr = start_ptr + at_y.to(tl.int64) * stride_h
        for tap_x in range(taps_x):
            at_x = first_x + tap_x
            weight_x = _filter(distance_x + tl.cast(tap_x, tl.float32) * step_x, BICUBIC)
            mask = mask_y & (at_x >= 0) & (at_x < width)
            weight = tl.where(mask, weight_y * weight_x, 0.0)
            g_ptr = r_ptr + stride_c
            b_ptr = g_ptr + stride_c
            total += weight
            r += weight * tl.load(r_ptr, mask=mask, other=0).to(tl.float32)
            g += weight * tl.load(g_ptr, mask=mask, other=0).to(tl.float32)
            b += weight * tl.load(b_ptr, mask=mask, other=0).to(tl.float32)
            r_ptr += stride_w
    unit = 1.0 / (255.0 * total)
    return _clamp(r * unit), _clamp(g * unit), _clamp(b * unit)


@triton.jit
def _of_hue(hue, first, high, chroma):
    """A channel of a color; `hue` is in sixths of a turn, as is where the channel's ramp begins."""
    k = hue + first
    k -= 6.0 * tl.floor(k / 6.0)
    return high - chroma * _clamp(tl.minimum(k, -k + 4.0))


@triton.jit
def _turn_hue(r, g, b, shift):
    high = tl.maximum(r, tl.maximum(g, b))
    chroma = high - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.where(chroma == 0, 1.0, chroma)
    of_g = (b - r) / divisor + 2.0
    of_b = (r - g) / divisor + 4.0
    hue = tl.where(high == r, (g - b) / divisor, tl.where(high == g, of_g, of_b)) + 6.0 * shift
    return (
        _of_hue(hue, 5.0, high, chroma),
        _of_hue(hue, 3.0, high, chroma),
        _of_hue(hue, 1.0, high, chroma),
    )


@triton.jit
def _jitter(r, g, b, params_ptr, start, stop, mean):
    """The color changes from the `start`-th to before the `stop`-th in the view's order."""
    for place in range(start, stop):
        which = tl.load(params_ptr + _ORDER + place).to(tl.int32)
        factor = tl.load(params_ptr + _FACTORS + which)
        if which == 3:
            # going through the hue and back is not the identity
            if factor != 0:
                r, g, b = _turn_hue(r, g, b, factor)
        else:
            other = tl.zeros(r.shape, tl.float32)
            if which == 1:
                other += mean
            if which == 2:
                other = _grey(r, g, b)
            r = _blend(r, other, factor)
            g = _blend(g, other, factor)
            b = _blend(b, other, factor)
    return r, g, b


@triton.jit
def _blur(
    view_ptr, y, x, exponent, down, SIZE: tl.constexpr, RADIUS: tl.constexpr, STRIDE_C, STRIDE
):
    """Gaussian blur of the pixels (y, x) along columns where `down`, else along rows.

    A tap at a distance d counts exp2(exponent d^2).
    """
    total = 0.0
    r = tl.zeros(y.shape, tl.float32)
    g = tl.zeros(y.shape, tl.float32)
    b = tl.zeros(y.shape, tl.float32)
    for tap in range(-RADIUS, RADIUS + 1):
        weight = tl.exp2(tl.cast(tap * tap, tl.float32) * exponent)
        # reflected at both edges, which are not repeated
        at = tl.abs((y if down else x) + tap)
        at = -tl.abs(-at + (SIZE - 1)) + (SIZE - 1)
        pixel = at * SIZE + x if down else y * SIZE + at
        tap_r, tap_g, tap_b = _load(view_ptr, pixel, STRIDE_C, STRIDE)
        total += weight
        r += weight * tap_r
        g += weight * tap_g
        b += weight * tap_b
    return r / total, g / total, b / total


@triton.jit
def _load(view_ptr, pixel, STRIDE_C: tl.constexpr, STRIDE: tl.constexpr):
    at = view_ptr + pixel * STRIDE
    r = tl.load(at).to(tl.float32)
    g = tl.load(at + STRIDE_C).to(tl.float32)
    b = tl.load(at + 2 * STRIDE_C).to(tl.float32)
    return r, g, b


@triton.jit
def _store(view_ptr, pixel, mask, r, g, b, STRIDE_C: tl.constexpr, STRIDE: tl.constexpr):
    at = view_ptr + pixel * STRIDE
    tl.store(at, r.to(view_ptr.dtype.element_ty), mask=mask)
    tl.store(at + STRIDE_C, g.to(view_ptr.dtype.element_ty), mask=mask)
    tl.store(at + 2 * STRIDE_C, b.to(view_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(x, threshold, norm, c: tl.constexpr):
    """Solarization, the range, and the normalization of channel c."""
    x = _clamp(tl.where(x >= threshold, -x + 1.0, x))
    if norm is not None:
        x = (x - norm[c]) / norm[3 + c]
    return x


@triton.jit
def _tile(start, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Pixels of a view and where they lie; the last tile repeats its last pixel."""
    offs = start + tl.arange(0, BLOCK)
    pixel = tl.minimum(offs, SIZE * SIZE - 1)
    y = pixel // SIZE
    return pixel, y, pixel - y * SIZE, offs < SIZE * SIZE


@triton.jit
def _augment_kernel(
    images_ptr,  # [S, 3, H, W] or [bytes]
    offsets_ptr,  # [S] or None
    sizes_ptr,  # [S, 2] or None
    params_ptr,  # [2N, 16]
    rows_ptr,  # [N] or None
    out_ptr,  # [2N, 3, SIZE, SIZE]
    scratch_ptr,  # as out
    norm,  # means and standard deviations, [6], or None
    N,
    stride_s,
    stride_c,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    BICUBIC: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    row = view % N
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row)
    if offsets_ptr is not None:
        images_ptr += tl.load(offsets_ptr + row)
        stride_c = 1
        stride_h = 3 * tl.load(sizes_ptr + 2 * row + 1)
        stride_w = 3
    else:
        images_ptr += row * stride_s
    params_ptr += view * _COLUMNS
    out_ptr += view * (3 * SIZE * SIZE)
    scratch_ptr += view * (3 * SIZE * SIZE)
    PIXELS: tl.constexpr = SIZE * SIZE

    # the crop, and colors up to the contrast, which waits for the mean
    waits = 4
    for place in range(4):
        if tl.load(params_ptr + _ORDER + place) == _CONTRAST:
            waits = place
    if tl.load(params_ptr + _FACTORS + _CONTRAST) == 1:
        waits = 4
    # in lanes: a sum over the block in every tile would hold its warps together
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, PIXELS, BLOCK):
        pixel, y, x, mask = _tile(start, SIZE, BLOCK)
        r, g, b = _crop(images_ptr, params_ptr, y, x, stride_c, stride_h, stride_w, SIZE, BICUBIC)
        r, g, b = _jitter(r, g, b, params_ptr, 0, waits, 0.0)
        total += tl.where(mask, _grey(r, g, b), 0.0)
        _store(out_ptr, pixel, mask, r, g, b, STRIDE_C, STRIDE)
    mean = tl.sum(total) / PIXELS
    tl.debug_barrier()

    # the other colors
    grey = tl.load(params_ptr + _GREY)
    sigma = tl.load(params_ptr + _SIGMA)
    # no pixel reaches 2
    threshold = tl.where(tl.load(params_ptr + _SOLARIZE) != 0, 0.5, 2.0)
    for start in range(0, PIXELS, BLOCK):
        pixel, y, x, mask = _tile(start, SIZE, BLOCK)
        r, g, b = _load(out_ptr, pixel, STRIDE_C, STRIDE)
        r, g, b = _jitter(r, g, b, params_ptr, waits, 4, mean)
        if grey != 0:
            r = _grey(r, g, b)
            g = r
            b = r
        if sigma == 0:
            r = _finish(r, threshold, norm, 0)
            g = _finish(g, threshold, norm, 1)
            b = _finish(b, threshold, norm, 2)
        _store(out_ptr, pixel, mask, r, g, b, STRIDE_C, STRIDE)

    if sigma != 0:
        exponent = _GAUSS / (sigma * sigma)
        tl.debug_barrier()
        for start in range(0, PIXELS, BLOCK):
            pixel, y, x, mask = _tile(start, SIZE, BLOCK)
            r, g, b = _blur(out_ptr, y, x, exponent, False, SIZE, RADIUS, STRIDE_C, STRIDE)
            _store(scratch_ptr, pixel, mask, r, g, b, STRIDE_C, STRIDE)
        tl.debug_barrier()
        for start in range(0, PIXELS, BLOCK):
            pixel, y, x, mask = _tile(start, SIZE, BLOCK)
            r, g, b = _blur(scratch_ptr, y, x, exponent, True, SIZE, RADIUS, STRIDE_C, STRIDE)
            r = _finish(r, threshold, norm, 0)
            g = _finish(g, threshold, norm, 1)
            b = _finish(b, threshold, norm, 2)
            _store(out_ptr, pixel, mask, r, g, b, STRIDE_C, STRIDE)


def augment(
    images: Tensor,  # [S, 3, H, W] or [bytes]
    offsets: Tensor | None,  # [S]
    sizes: Tensor | None,  # [S, 2]
    params: Tensor,  # [2, N, 16]
    rows: Tensor | None,  # [N]
    out: Tensor,  # [2N, 3, size, size]
    scratch: Tensor,  # [2N, 3, size, size]
    norm: tuple[float, ...] | None,  # [6]
    bicubic: bool,
) -> None:
    """Crop, flip, colors, grey, blur, solarization and normalization of 2N views, to `out`.

    Args:
        images: uint8, in any strides; or in one piece images of different sizes, [H, W, 3] each.
        offsets: Where in `images` each of those begins, int64; None where all are of one size.
        sizes: Their heights and widths, int64.
        params: Box of the crop, flip, order and factors of brightness, contrast, saturation and
            hue, grey, standard deviation of the blur, solarization, in fp32.
        rows: Which of the images each sample is, int64; None is the first N.
        out: Contiguous or channels_last, fp32 or fp16, in which the view is kept between phases.
        scratch: Of the dtype and the strides of `out`, for the blur.
        norm: Three means and three standard deviations.
        bicubic: How crops are resized, else bilinear.
    """
    size = out.shape[-1]
    tables = (None if t is None else t.contiguous() for t in (offsets, sizes, params, rows))
    strides = images.stride() if offsets is None else (0, 0, 0, 0)
    with on_device_of(images):
        _augment_kernel[(len(out),)](
            images,
            *tables,
            out,
            scratch,
            norm,
            params.shape[1],
            *strides,
            SIZE=size,
            RADIUS=max(size // 20, 1),
            BICUBIC=bicubic,
            STRIDE_C=out.stride(1),
            STRIDE=out.stride(3),
            BLOCK=BLOCK,
            num_warps=8,
        )
