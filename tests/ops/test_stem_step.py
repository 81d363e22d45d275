"""The sign step behind a convolution: its reference, and the kernel, emulated without a GPU."""

from functools import partial

import pytest
import torch
from op_cases import BadInputs, Case, Grid
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

import clae_fast
from clae_fast import _impl, reference
from clae_fast.ops.stem_step import has_kernel, kernel_takes
from clae_fast.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("nan_empty")

# kernel size to stride and padding
STEMS = {3: {"stride": 1, "padding": 1}, 7: {"stride": 2, "padding": 3}}
RANGE = {"alpha": 8 / 255, "eps": 8 / 255, "lo": 0.0, "hi": 1.0}
every_size = pytest.mark.parametrize("size", STEMS)
every_order = pytest.mark.parametrize("order", ["up", "down"])


def operands(
    size: int,
    shape: tuple[int, int, int],  # N, H, W
    C: int = 64,
    *,
    dtype: torch.dtype = torch.float16,
    x_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, weight and x, in channels_last; some of x near the ends of its range."""
    N, H, W = shape
    stride = STEMS[size]["stride"]
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(N, C, (H - 1) // stride + 1, (W - 1) // stride + 1, generator=generator)
    weight = torch.randn(C, 3, size, size, generator=generator)
    x = torch.rand(N, 3, H, W, generator=generator)
    layout = torch.channels_last
    return (
        dy.to(dtype, memory_format=layout),
        weight.contiguous(memory_format=layout),
        x.to(x_dtype, memory_format=layout),
    )


def assert_stepped(
    x_adv: Tensor,
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    *,
    stride: int,
    padding: int,
    **bounds: object,
) -> None:
    """Raises unless x_adv is the step along the gradient in fp64 of the same rounded numbers."""
    stem = (stride, padding)
    exact_dy, exact_weight = dy.double(), weight.to(dy.dtype).double()
    dx = conv2d_input(list(x.shape), exact_weight, exact_dy, *stem)
    # of a sum in fp32, in any order
    terms = dy.shape[1] * weight.shape[2:].numel()
    error = conv2d_input(list(x.shape), exact_weight.abs(), exact_dy.abs(), *stem)
    sure = dx.abs() > error * terms * torch.finfo(torch.float32).eps
    expected = reference.linf_step(x, dx, **bounds)
    assert x_adv.stride() == torch.empty_like(x).stride()
    assert_bitwise_equal(x_adv[sure], expected[sure])
    # the gradient rounded to 16 bits
    rounded = conv2d_input(list(x.shape), weight.to(dy.dtype), dy, *stem)
    for other in (expected, reference.linf_step(x, rounded, **bounds)):
        assert dx.abs()[x_adv == other].sum() >= 0.999 * dx.abs().sum()
    eps = torch.as_tensor(bounds["eps"], dtype=torch.float64).reshape(-1, 1, 1)
    assert ((x_adv.double() - x.double()).abs() <= eps).all()


def stem(kernel, N, side, *, dtype=torch.float32, seed=0, noise=None):
    """The gradient at a convolution's output, its weight and its input."""
    half = dtype if dtype == torch.float64 else torch.float16
    shape = (N, side, side + 3)
    x_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    dy, weight, x = operands(kernel, shape, dtype=half, x_dtype=x_dtype, seed=seed)
    return {"dy": dy, "weight": weight, "x": x}


def as_stem_step(tensors, results, options):
    assert_stepped(*results, **tensors, **options)


def _stem_step(kernel, **bounds):
    return Case(
        "stem_step",
        partial(stem, kernel),
        grids=(Grid(((1, 1), (2, 6))),),
        options={**STEMS[kernel], **RANGE, **bounds},
        images=("x", "dy", "weight"),
        empty=True,
        emulated=True,
        compiled=kernel == 3 and not bounds,
        judge=as_stem_step,
    )


CASES = {
    "stem_step-3": _stem_step(3),
    "stem_step-3-tensors": _stem_step(3, alpha=torch.tensor([0.01, 0.02, 0.03])),
    "stem_step-7": _stem_step(7),
}
_DY, _WEIGHT, _X = operands(3, (2, 4, 4))
BAD_INPUTS = BadInputs(
    {"x": _X, "dy": _DY, "weight": _WEIGHT, **STEMS[3], **RANGE},
    own=[
        (
            {"x": torch.ones(2, 3, 4)},
            ValueError,
            r"x must have 4 dimensions, got shape \[2, 3, 4\]",
        ),
        ({"x": torch.ones(2, 4, 4, 4)}, ValueError, "weight must have the 4 channels of x"),
        (
            {"x": torch.ones(2, 3, 5, 4)},
            ValueError,
            r"dy must have .* \[2, 64, 5, 4\], got \[2, 64",
        ),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"stride": (1, 1)}, TypeError, "stride must be an integer, got tuple"),
        ({"eps": -0.1}, ValueError, r"eps must be a number >= 0.0, got -0.1"),
        ({"lo": 2.0}, ValueError, "lo must be at most hi"),
    ],
    any_dtype=("dy", "weight"),
)


def check(device, dy, weight, x, *, size, **bounds) -> Tensor:
    """Runs the kernel and compares it with the gradient in fp64 of the same rounded numbers."""
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in bounds.items()}
    operands = (dy.to(device), weight.to(device), x.to(device))
    x_adv = clae_fast.stem_step(*operands, impl="cuda", **STEMS[size], **on_device).cpu()
    assert_stepped(x_adv, dy, weight, x, **STEMS[size], **bounds)
    return x_adv


@pytest.mark.parametrize(
    ("stride", "padding", "size", "side"), [(1, 1, 3, 6), (2, 3, 7, 9), (3, 0, 2, 8), (1, 2, 5, 1)]
)
def test_reference_is_linf_step_along_the_gradient_of_autograd(stride, padding, size, side):
    x = torch.rand(2, 4, side, side + 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, size, size, dtype=torch.float64)
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    bounds = {"alpha": 0.02, "eps": (0.01, 0.02, 0.03, 0.04), "lo": 0.1, "hi": 0.9}
    x_adv = clae_fast.stem_step(dy, weight, x, stride=stride, padding=padding, **bounds)
    assert torch.equal(x_adv, clae_fast.linf_step(x, dx, **bounds))
    assert not x_adv.requires_grad


@every_size
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("C", [64, 128])
def test_dtypes_and_channels(cuda_device, size, dtype, x_dtype, C):
    check(
        cuda_device,
        *operands(size, (2, 9, 14), C, dtype=dtype, x_dtype=x_dtype),
        size=size,
        **RANGE,
    )


# a pixel; less than a tile; one more than a tile or a warp takes; tiles that straddle images
SHAPES = [(1, 1, 1), (5, 1, 2), (2, 3, 1), (1, 2, 33), (1, 8, 65), (7, 4, 4), (3, 5, 31)]


@every_size
@pytest.mark.parametrize("shape", [*SHAPES, (1, 7, 128), (2, 5, 225)])
def test_shapes(cuda_device, size, shape):
    check(cuda_device, *operands(size, shape), size=size, **RANGE)


@every_size
@every_order
@pytest.mark.parametrize("multiprocessors", [1, 3, 40])
def test_walks_begin_and_end_anywhere(cuda_device, size, order, multiprocessors, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", order)
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    check(cuda_device, *operands(size, (5, 20, 34)), size=size, **RANGE)


@every_size
def test_channels_that_leave_memory_for_few_warps(cuda_device, size, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_MEMORY", str(99 * 1024))
    check(cuda_device, *operands(size, (2, 6, 6), 192), size=size, **RANGE)


@pytest.mark.parametrize(
    "bounds",
    [
        {"alpha": 0.03, "eps": 0.02},
        {"alpha": (0.01, 0.02, 0.03), "eps": [0.03, 0.02, 0.01], "lo": 0.0, "hi": (1.0, 1.1, 1.2)},
        {"alpha": torch.tensor([0.01, 0.02, 0.03]), "eps": torch.tensor([0.1, 0.2, 0.3]).double()},
    ],
    ids=["ball", "sequences", "tensors"],
)
def test_bounds(cuda_device, bounds):
    check(cuda_device, *operands(3, (2, 6, 7)), size=3, **bounds)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "misaligned": lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape),
}


@every_size
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cuda_device, size, layout):
    laid_out = map(LAYOUTS[layout], operands(size, (2, 6, 9)))
    check(cuda_device, *laid_out, size=size, **RANGE)


def test_a_16_bit_weight(cuda_device):
    dy, weight, x = operands(3, (2, 6, 9))
    x_adv = check(cuda_device, dy, weight.half(), x, size=3, **RANGE)
    assert torch.equal(x_adv, check(cuda_device, dy, weight, x, size=3, **RANGE))


@every_size
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_near(cuda_device, size, value):
    dy, weight, x = operands(size, (2, 21, 22))
    stem = STEMS[size]
    Y, X = 4, 5
    x_adv = clae_fast.stem_step(
        dy.to(cuda_device), weight.to(cuda_device), x.to(cuda_device), impl="cuda", **stem, **RANGE
    ).cpu()
    dy[1, 3, Y, X] = value
    broken = clae_fast.stem_step(
        dy.to(cuda_device), weight.to(cuda_device), x.to(cuda_device), impl="cuda", **stem, **RANGE
    ).cpu()
    reach = size // 2
    rows = slice(stem["stride"] * Y - reach, stem["stride"] * Y + reach + 1)
    columns = slice(stem["stride"] * X - reach, stem["stride"] * X + reach + 1)
    if value != value:
        assert torch.equal(broken[1, :, rows, columns], x[1, :, rows, columns])
    else:
        expected = reference.stem_step(dy, weight, x, **stem, **RANGE)
        assert torch.equal(broken[1, :, rows, columns], expected[1, :, rows, columns])
    around = slice(columns.start - 1, columns.stop + 1)
    assert torch.equal(broken[0], x_adv[0])
    x_adv[1, :, rows, around] = broken[1, :, rows, around]
    assert torch.equal(broken, x_adv)


def test_no_images(cuda_device):
    dy, weight, x = operands(3, (0, 4, 4))
    bounds = {"impl": "cuda", **STEMS[3], **RANGE}
    x_adv = clae_fast.stem_step(
        dy.to(cuda_device), weight.to(cuda_device), x.to(cuda_device), **bounds
    )
    assert x_adv.shape == x.shape


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float32}, False),
        ({"x_dtype": torch.float64}, False),
        ({"C": 32}, False),
        ({"C": 256}, False),
    ],
)
def test_auto_is_the_kernel_where_it_takes_the_operands(cuda_device, change, takes):
    dy, weight, x = (operand.to(cuda_device) for operand in operands(3, (1, 4, 4), **change))
    assert kernel_takes(dy.dtype, weight, x, 1, 1) == takes
    if not takes:
        auto = clae_fast.stem_step(dy, weight, x, **STEMS[3], **RANGE)
        assert torch.equal(auto, reference.stem_step(dy, weight, x, **STEMS[3], **RANGE))
        with pytest.raises((ValueError, TypeError), match="takes"):
            clae_fast.stem_step(dy, weight, x, impl="cuda", **STEMS[3], **RANGE)


@pytest.mark.parametrize("shape", [(1, 3, 5000, 5000), (1, 3, 1 << 20, 1), (1 << 28, 3, 1, 1)])
def test_more_than_the_kernel_counts(shape):
    x = torch.empty(shape, device="meta")
    assert not kernel_takes(torch.float16, torch.empty(64, 3, 3, 3), x, 1, 1)


@pytest.mark.parametrize("default", ["reference", "triton", "native"])
def test_an_implementation_asked_for_by_the_environment_is_not_fused(
    cuda_device, monkeypatch, default
):
    device = torch.device(cuda_device)
    assert has_kernel("auto", device)
    assert not has_kernel("triton", device)
    monkeypatch.setattr(_impl, "_DEFAULT", default)
    assert not has_kernel("auto", device)
    assert has_kernel("cuda", device)
