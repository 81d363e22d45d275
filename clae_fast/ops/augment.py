"""Both augmented views of a batch, from 8-bit images and a table of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast._ragged import RaggedImages
from clae_fast.ops.augment_params import COLUMNS, VIEWS
from clae_fast.reference.augment import augment as reference

_impl.declare("augment", native=_impl.ANY, triton=_impl.ANY)
# images are [S, 3, H, W] or, with offsets and sizes, the pixels of RaggedImages; norm is empty, or
# has the means of the three channels and their standard deviations
torch.library.define(
    "clae_fast::augment",
    "(Tensor images, Tensor? offsets, Tensor? sizes, Tensor params, Tensor? rows, int size, "
    "bool bicubic, ScalarType dtype, bool channels_last, float[] norm, str impl) -> Tensor",
)
_DTYPES = (torch.float32, torch.float16)
_FORMATS = (torch.contiguous_format, torch.channels_last)
_LARGEST = 2**14
_INTERPOLATIONS = ("bilinear", "bicubic")


@torch.library.register_fake("clae_fast::augment")
def _augment_fake(
    images: Tensor,
    offsets: Tensor | None,
    sizes: Tensor | None,
    params: Tensor,
    rows: Tensor | None,
    size: int,
    bicubic: bool,
    dtype: torch.dtype,
    channels_last: bool,
    *_: object,
) -> Tensor:
    shape = (VIEWS * params.shape[1], 3, size, size)
    layout = _FORMATS[channels_last]
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)


@torch.library.impl("clae_fast::augment", ("cpu", "cuda"))
def _augment_impl(
    images: Tensor,  # [S, 3, H, W] or [bytes]
    offsets: Tensor | None,  # [S]
    sizes: Tensor | None,  # [S, 2]
    params: Tensor,  # [2, N, 16]
    rows: Tensor | None,  # [N]
    size: int,
    bicubic: bool,
    dtype: torch.dtype,
    channels_last: bool,
    norm: list[float],  # [0] or [6]
    impl: str,
) -> Tensor:  # [2N, 3, size, size]
    if images.device.type == "cpu":
        _check_values(images, offsets, sizes, params, rows)
    if impl == "reference":
        data: Tensor | RaggedImages = images
        if offsets is not None and sizes is not None:
            data = RaggedImages(images, offsets, sizes)
        mean, std = (tuple(norm[:3]), tuple(norm[3:])) if norm else (None, None)
        views = reference(
            data,
            params,
            rows=rows,
            size=size,
            interpolation=_INTERPOLATIONS[bicubic],
            dtype=dtype,
            mean=mean,
            std=std,
        )
        return views.contiguous(memory_format=_FORMATS[channels_last])
    out = _augment_fake(images, offsets, sizes, params, rows, size, bicubic, dtype, channels_last)
    if out.numel() == 0:
        return out
    if impl == "native":
        strides = [0] * 4 if sizes is not None else list(images.stride())
        given = (images, strides, *_native.in_one_piece(offsets, sizes, params, rows))
        wanted = (params.shape[1], size, bicubic, norm or None, dtype, channels_last)
        _native.run("augment", *given, *wanted, torch.get_num_threads(), out)
    else:
        from clae_fast.kernels.augment import augment

        scratch = torch.empty_like(out)
        augment(images, offsets, sizes, params, rows, out, scratch, tuple(norm) or None, bicubic)
    return out


_augment = torch.ops.clae_fast.augment.default


def augment(
    images: Tensor | RaggedImages,  # [S, 3, H, W], or S of them
    params: Tensor,  # [2, N, 16]
    *,
    rows: Tensor | None = None,  # [N]
    size: int,
    interpolation: str = "bilinear",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # [N, 3, size, size] each
    r"""Makes both augmented views of a batch of 8-bit images.

    Each view of each sample is, in this order and as its row of `params` says: a crop, resized with
    antialiasing; its mirror image; brightness, contrast, saturation and hue in some order; gray;
    Gaussian blur with max(2 floor(size / 20) + 1, 3) taps a direction, reflected at the edges;
    solarized from 1/2 on. The formulas are those of torchvision.transforms.v2.functional on floats
    in [0, 1], cut to that range after the resizing; implementations agree within 1/255 before
    `mean` and `std`. Transforms of 8-bit images round after every step, these only at the end.

    On the CPU the views are distributed to threads, whose number does not change the result.

    On a GPU it is one launch for both views, with one block for each view of a sample. CUDA graphs
    can capture it. Between steps a block keeps its view in the result, and the blur needs as much
    memory again while it runs.

    Args:
        images: The batch, or all the data that its samples are rows of, uint8 in any strides:
            images [S, H, W, 3] go in as `images.permute(0, 3, 1, 2)`. Those of different sizes are
            `RaggedImages`.
        params: The table of `augment_params` for the samples and the heights and widths of their
            images. On a GPU it is not checked that crops lie inside of these.
        rows: Which of `images` each sample is, counted from 0, int64; None is that they are the
            batch itself. On a GPU it is not checked that these images exist.
        size: Side of the views in pixels.
        interpolation: How crops are resized, "bilinear" or "bicubic".
        dtype: The views' dtype, fp32 or fp16. The spacing of bf16 near 1 is larger than an attack's
            radius.
        memory_format: The views' format, torch.contiguous_format or torch.channels_last.
        mean: Subtracted from the three channels at the end; None, with `std`, leaves pixels.
        std: What the channels are divided by after that.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        The views p and q, which lie in one tensor [2N, 3, size, size], one after the other.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes or devices that do not fit one another, or a number out of its range.
        IndexError: On the CPU, a row that `images` does not have.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8)
        >>> ids = torch.randperm(1000)[:64]
        >>> recipe = dataclasses.asdict(clae_fast.data.RECIPES["simclr_cifar"])
        >>> interpolation = recipe.pop("interpolation")
        >>> params = clae_fast.augment_params(ids, seed=0, epoch=3, height=32, width=32, **recipe)
        >>> p, q = clae_fast.augment(
        ...     images, params, rows=ids, size=32, interpolation=interpolation
        ... )
    """
    pixels: Tensor
    offsets: Tensor | None = None
    sizes: Tensor | None = None
    if isinstance(images, RaggedImages):
        _check_ragged(*images)
        pixels, offsets, sizes = images
    else:
        _check_images(images)
        pixels = images
    _check_table(params, rows, len(pixels if offsets is None else offsets), pixels)
    norm = _checked_norm(mean, std)
    # the blur reflects the pixel beside the edge, and kernels count a view's pixels in 32 bits
    _check.integer("size", size, 2, _LARGEST)
    for name, value, wanted in (
        ("interpolation", interpolation, _INTERPOLATIONS),
        ("dtype", dtype, _DTYPES),
        ("memory_format", memory_format, _FORMATS),
    ):
        if value not in wanted:
            raise ValueError(f"{name} must be {wanted[0]} or {wanted[1]}, got {value}")
    impl = _impl.resolve("augment", impl, pixels)
    views = _augment(
        pixels,
        offsets,
        sizes,
        params,
        rows,
        size,
        interpolation == "bicubic",
        dtype,
        memory_format == torch.channels_last,
        norm,
        impl,
    )
    N = params.shape[1]
    return views[:N], views[N:]


def _check_values(
    images: Tensor,
    offsets: Tensor | None,
    sizes: Tensor | None,
    params: Tensor,
    rows: Tensor | None,
) -> None:
    """Raises unless rows, crops and orders exist; called on the CPU, where looking costs little."""
    count = len(images if offsets is None else offsets)
    if rows is None:
        rows = torch.arange(count)
    if not bool(((rows >= 0) & (rows < count)).all()):
        raise IndexError(f"rows must be from 0 to {count - 1}, got {rows.tolist()}")
    sides = torch.tensor(images.shape[-2:]) if sizes is None else sizes[rows]  # [2] or [N, 2]
    start, side = params[..., 0:2], params[..., 2:4]
    order = params[..., 5:9]
    inside = (start >= 0) & (side >= 1) & (start + side <= sides)
    if not bool(inside.all()) or not bool(((order >= 0) & (order <= 3)).all()):
        raise ValueError("params must be of the images' heights and widths, got a crop outside")
    if offsets is not None:
        # compared by division, since products and sums of such numbers can overflow
        begin, (height, width) = offsets[rows], sides.unbind(-1)
        room = (len(images) - begin.clamp(0, len(images))) // 3
        inside = (begin >= 0) & (begin <= len(images)) & (width <= room // height)
        if not bool(inside.all()):
            raise ValueError("images.offsets and images.sizes must lie inside of images.pixels")


def _check_images(images: Tensor) -> None:
    _check.of_dtype("images", images, torch.uint8)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape [S, 3, H, W], got {list(images.shape)}")


def _check_ragged(pixels: Tensor, offsets: Tensor, sizes: Tensor) -> None:
    _check.of_dtype("images.pixels", pixels, torch.uint8)
    for name, numbers in (("images.offsets", offsets), ("images.sizes", sizes)):
        _check.of_dtype(name, numbers, torch.int64)
        _check.same_place(name, numbers, "images", pixels, dtype=False)
    if pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(
            f"images.pixels must be one-dimensional and contiguous, got shape "
            f"{list(pixels.shape)}, strides {list(pixels.stride())}"
        )
    _check.shape("images.offsets", offsets, "S")
    _check.shape("images.sizes", sizes, len(offsets), 2)


def _check_table(params: Tensor, rows: Tensor | None, count: int, images: Tensor) -> None:
    """Raises unless this is a table of views and, if any, rows of `count` images for it."""
    _check.of_dtype("params", params, torch.float32)
    _check.same_place("params", params, "images", images, dtype=False)
    _check.shape("params", params, VIEWS, "N", COLUMNS)
    N = params.shape[1]
    if rows is None:
        if count != N:
            raise ValueError(f"without rows, images must be the {N} of params, got {count}")
        return
    _check.of_dtype("rows", rows, torch.int64)
    _check.same_place("rows", rows, "images", images, dtype=False)
    _check.shape("rows", rows, N)


def _checked_norm(mean: Sequence[float] | None, std: Sequence[float] | None) -> list[float]:
    """Both as six numbers, none where there is no normalization; raises where they are wrong."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together, got one of them")
    if mean is None or std is None:
        return []
    for name, numbers in (("mean", mean), ("std", std)):
        if not isinstance(numbers, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple, got {type(numbers).__name__}")
        if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} must be 3 finite numbers, got {numbers}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")
    return [float(number) for number in (*mean, *std)]
