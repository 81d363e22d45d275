"""Both augmented views of a batch in Triton: one launch, and one program for each view of a sample.

A program works in phases, because contrast needs the mean of all pixels of the view and the blur
needs a pixel's neighbors. It goes over the pixels in tiles and keeps the view in `out` between the
phases: to read back what it wrote costs less than to cut and resize again, since that stays in the
cache.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Compilations, constants, on_device_of

BLOCK = 256
# columns of `params`
_FLIP = tl.constexpr(4)
_ORDER = tl.constexpr(5)
_FACTORS = tl.constexpr(9)
_GRAY = tl.constexpr(13)
_SIGMA = tl.constexpr(14)
_SOLARIZE = tl.constexpr(15)
_COLUMNS = tl.constexpr(16)
# exp(-x / 2) is exp2 of this times x
_GAUSS = tl.constexpr(-0.5 / math.log(2))
# the place of contrast among the factors
_CONTRAST = tl.constexpr(1)


class Images(NamedTuple):
    """Images of one size in any strides, or images of different sizes in one piece."""

    ptr: Tensor  # [S, 3, H, W] or [bytes]
    offsets_ptr: Tensor | None  # [S]
    sizes_ptr: Tensor | None  # [S, 2]
    stride_s: int
    stride_c: int
    stride_h: int
    stride_w: int


class View(NamedTuple):
    """What the kernel is compiled for."""

    SIZE: int  # height and width
    RADIUS: int  # of the blur
    BICUBIC: bool
    STRIDE_C: int  # from a channel of `out` to the next
    STRIDE: int  # from a pixel of `out` to the next
    BLOCK: int  # pixels of a tile


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(r, g, b):
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
def _taps(at, length, view):
    """The taps of the pixels `at` of a view over a crop of `length` pixels.

    Returns the first source pixel, its distance from the pixel's center in units of the filter, how
    far the next one is, and how many there are. A filter covers more pixels where it shrinks the
    image, which is the antialiasing.
    """
    scale = length / view.SIZE
    stretch = tl.maximum(scale, 1.0)
    radius = stretch * 2 if view.BICUBIC else stretch
    center = scale * (at + 0.5)
    first = tl.floor(center - radius + 0.5)
    step = 1.0 / stretch
    distance = (first - center + 0.5) * step
    return first.to(tl.int32), distance, step, tl.ceil(2 * radius).to(tl.int32)


@triton.jit
def _image(images, row):
    """An image by its row: its pointer and the strides of its channels, rows and columns."""
    if images.offsets_ptr is not None:
        ptr = images.ptr + tl.load(images.offsets_ptr + row)
        strides = (1, 3 * tl.load(images.sizes_ptr + 2 * row + 1), 3)
    else:
        ptr = images.ptr + row * images.stride_s
        strides = (images.stride_c, images.stride_h, images.stride_w)
    return ptr, strides


@triton.jit
def _crop(image_ptr, strides, params_ptr, y, x, view):
    """The pixels (y, x) of the image after the cut, the resizing and the flip."""
    stride_c, stride_h, stride_w = strides
    top = tl.load(params_ptr).to(tl.int32)
    left = tl.load(params_ptr + 1).to(tl.int32)
    height = tl.load(params_ptr + 2)
    width = tl.load(params_ptr + 3)
    x = tl.where(tl.load(params_ptr + _FLIP) != 0, -x + (view.SIZE - 1), x)
    first_y, distance_y, step_y, taps_y = _taps(y, height, view)
    first_x, distance_x, step_x, taps_x = _taps(x, width, view)
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
        weight_y = _filter(distance_y + tl.cast(tap_y, tl.float32) * step_y, view.BICUBIC)
        mask_y = (at_y >= 0) & (at_y < height)
        r_ptr = start_ptr + at_y.to(tl.int64) * stride_h
        for tap_x in range(taps_x):
            at_x = first_x + tap_x
            weight_x = _filter(distance_x + tl.cast(tap_x, tl.float32) * step_x, view.BICUBIC)
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
                other = _gray(r, g, b)
            r = _blend(r, other, factor)
            g = _blend(g, other, factor)
            b = _blend(b, other, factor)
    return r, g, b


@triton.jit
def _blur(view_ptr, y, x, exponent, down, view):
    """Gaussian blur of the pixels (y, x) along columns where `down`, else along rows.

    A tap at a distance d counts exp2(exponent d^2).
    """
    last: tl.constexpr = view.SIZE - 1
    total = 0.0
    r = tl.zeros(y.shape, tl.float32)
    g = tl.zeros(y.shape, tl.float32)
    b = tl.zeros(y.shape, tl.float32)
    for tap in range(-view.RADIUS, view.RADIUS + 1):
        weight = tl.exp2(tl.cast(tap * tap, tl.float32) * exponent)
        # reflected at both edges, which are not repeated
        at = tl.abs((y if down else x) + tap)
        at = -tl.abs(-at + last) + last
        pixel = at * view.SIZE + x if down else y * view.SIZE + at
        tap_r, tap_g, tap_b = _load(view_ptr, pixel, view)
        total += weight
        r += weight * tap_r
        g += weight * tap_g
        b += weight * tap_b
    return r / total, g / total, b / total


@triton.jit
def _load(view_ptr, pixel, view):
    at = view_ptr + pixel * view.STRIDE
    r = tl.load(at).to(tl.float32)
    g = tl.load(at + view.STRIDE_C).to(tl.float32)
    b = tl.load(at + 2 * view.STRIDE_C).to(tl.float32)
    return r, g, b


@triton.jit
def _store(view_ptr, pixel, mask, r, g, b, view):
    at = view_ptr + pixel * view.STRIDE
    tl.store(at, r.to(view_ptr.dtype.element_ty), mask=mask)
    tl.store(at + view.STRIDE_C, g.to(view_ptr.dtype.element_ty), mask=mask)
    tl.store(at + 2 * view.STRIDE_C, b.to(view_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(x, threshold, norm, c: tl.constexpr):
    """Solarization, the range, and the normalization of channel c."""
    x = _clamp(tl.where(x >= threshold, -x + 1.0, x))
    if norm is not None:
        x = (x - norm[c]) / norm[3 + c]
    return x


@triton.jit
def _finish_all(r, g, b, threshold, norm):
    r = _finish(r, threshold, norm, 0)
    g = _finish(g, threshold, norm, 1)
    return r, g, _finish(b, threshold, norm, 2)


@triton.jit
def _tile(start, view):
    """Pixels of a view and where they lie; the last tile repeats its last pixel."""
    offs = start + tl.arange(0, view.BLOCK)
    pixel = tl.minimum(offs, view.SIZE * view.SIZE - 1)
    y = pixel // view.SIZE
    return pixel, y, pixel - y * view.SIZE, offs < view.SIZE * view.SIZE


@triton.jit
def _augment_kernel(
    images,  # Images
    params_ptr,  # [2N, 16]
    rows_ptr,  # [N] or None
    out_ptr,  # [2N, 3, SIZE, SIZE]
    scratch_ptr,  # as out
    norm,  # means and standard deviations, [6], or None
    N,
    view,  # View
):
    """Makes one view of one sample."""
    number = tl.program_id(0).to(tl.int64)
    row = number % N
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row)
    image_ptr, strides = _image(images, row)
    params_ptr += number * _COLUMNS
    PIXELS: tl.constexpr = view.SIZE * view.SIZE
    BLOCK: tl.constexpr = view.BLOCK
    out_ptr += number * (3 * PIXELS)
    scratch_ptr += number * (3 * PIXELS)

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
        pixel, y, x, mask = _tile(start, view)
        r, g, b = _crop(image_ptr, strides, params_ptr, y, x, view)
        r, g, b = _jitter(r, g, b, params_ptr, 0, waits, 0.0)
        total += tl.where(mask, _gray(r, g, b), 0.0)
        _store(out_ptr, pixel, mask, r, g, b, view)
    mean = tl.sum(total) / PIXELS
    tl.debug_barrier()

    # the other colors
    gray = tl.load(params_ptr + _GRAY)
    sigma = tl.load(params_ptr + _SIGMA)
    # no pixel reaches 2
    threshold = tl.where(tl.load(params_ptr + _SOLARIZE) != 0, 0.5, 2.0)
    for start in range(0, PIXELS, BLOCK):
        pixel, y, x, mask = _tile(start, view)
        r, g, b = _load(out_ptr, pixel, view)
        r, g, b = _jitter(r, g, b, params_ptr, waits, 4, mean)
        if gray != 0:
            r = _gray(r, g, b)
            g = r
            b = r
        if sigma == 0:
            r, g, b = _finish_all(r, g, b, threshold, norm)
        _store(out_ptr, pixel, mask, r, g, b, view)

    if sigma != 0:
        exponent = _GAUSS / (sigma * sigma)
        tl.debug_barrier()
        for start in range(0, PIXELS, BLOCK):
            pixel, y, x, mask = _tile(start, view)
            r, g, b = _blur(out_ptr, y, x, exponent, False, view)
            _store(scratch_ptr, pixel, mask, r, g, b, view)
        tl.debug_barrier()
        for start in range(0, PIXELS, BLOCK):
            pixel, y, x, mask = _tile(start, view)
            r, g, b = _blur(scratch_ptr, y, x, exponent, True, view)
            r, g, b = _finish_all(r, g, b, threshold, norm)
            _store(out_ptr, pixel, mask, r, g, b, view)


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
    """Writes 2N views: crop, flip, colors, gray, blur, solarization and normalization.

    Args:
        images: uint8 images of one size in any strides; or images of different sizes in one piece,
            [H, W, 3] each.
        offsets: Where each image of its own size begins in `images`, int64; None for one size.
        sizes: The heights and widths of such images, int64.
        params: For each view the box of the crop, flip, order and factors of brightness, contrast,
            saturation and hue, gray, standard deviation of the blur, and solarization, in fp32.
        rows: Which of the images each sample is, int64; None is the first N.
        out: Where the views go, fp32 or fp16, contiguous or channels_last.
        scratch: Memory for the blur, of the dtype and the strides of `out`.
        norm: Three means and three standard deviations.
        bicubic: Whether crops are resized bicubically; if not, they are resized bilinearly.
    """
    size = out.shape[-1]
    offsets, sizes, rows = (None if t is None else t.contiguous() for t in (offsets, sizes, rows))
    params = params.contiguous()
    strides = images.stride() if offsets is None else (0, 0, 0, 0)
    view = View(size, max(size // 20, 1), bicubic, out.stride(1), out.stride(3), BLOCK)
    with on_device_of(images):
        _augment_kernel[(len(out),)](
            Images(images, offsets, sizes, *strides),
            params,
            rows,
            out,
            scratch,
            norm,
            params.shape[1],
            constants(view),
            num_warps=8,
        )


def compilations() -> Compilations:
    """Calls that compile the kernel for every form of its arguments."""
    empty = partial(torch.empty, device="meta")
    ids, params = empty(64, dtype=torch.int64), empty(2, 64, 16)
    table = (empty(1000, dtype=torch.int64), empty(1000, 2, dtype=torch.int64))
    for size in (32, 224):
        images = empty(1000, 3, size, size, dtype=torch.uint8)
        out = empty(128, 3, size, size)
        last = out.half().contiguous(memory_format=torch.channels_last)
        plain = (images, None, None, params, None, out, out, None, False)
        yield f"{size}", partial(augment, *plain)
        rest: tuple[Any, ...] = (params, ids, last, last, (0.5,) * 6, True)
        yield f"{size} bicubic fp16 rows norm", partial(augment, images, None, None, *rest)
        yield f"{size} the same, ragged", partial(augment, images.flatten(), *table, *rest)
