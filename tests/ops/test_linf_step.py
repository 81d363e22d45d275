import math
from functools import partial

import pytest
import torch
from linf_cases import DTYPES, SPECIAL, bounds, images
from op_cases import BadInputs, Case, Grid

import clae_fast
from clae_fast import reference
from clae_fast.testing import assert_bitwise_equal, implementations, running

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # NumPy, which Triton's interpreter computes with, remarks on infinities
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

every_implementation = pytest.mark.parametrize("implementation", implementations("linf_step"))

SPECIAL += (6.1e-5, 6.0e-5, 6e-8, -6e-8, 1e-9, -1e-9, 1e-38, 1e-45)


def operands(N, side, *, centered=False, dtype=torch.float32, seed=0, noise=None):
    shape = (N, 3, side, side + 1)
    x = images(shape, dtype, seed=seed)
    others = {"grad": images(shape, seed=seed + 1)}
    if centered:
        others["x0"] = (x + 0.02 * images(shape, seed=seed + 2)).to(dtype)
    return {"x": x, **others}


def as_linf_step(tensors, results, options):
    assert_bitwise_equal(*results, clae_fast.linf_step(**tensors, **options, impl="reference"))


def _linf_step(centered=False, compiled=True, **options):
    return Case(
        "linf_step",
        partial(operands, centered=centered),
        grids=(Grid(((2, 3), (3, 9))),),
        large=(7, 60),
        options=options,
        images=("x", "grad", "x0") if centered else ("x", "grad"),
        empty=True,
        interpreted=True,
        compiled=compiled,
        judge=as_linf_step,
    )


CASES = {
    "linf_step": _linf_step(True, alpha=0.03, eps=0.02, lo=0.0, hi=1.0),
    "linf_step-channels": _linf_step(
        True, alpha=0.02, eps=[0.01, 0.02, 0.03], lo=(-1.0, -1.1, -1.2), hi=1.1
    ),
    "linf_step-tensors": _linf_step(
        compiled=False,
        alpha=torch.tensor([0.01, 0.02, 0.03]),
        eps=torch.tensor([0.02, 0.03, 0.04]).double(),
    ),
}
BAD_INPUTS = BadInputs(
    {"x": torch.ones(2, 3), "grad": torch.ones(2, 3), "alpha": 0.1},
    own=[
        ({"grad": torch.ones(2, 4)}, ValueError, "grad must have the shape of x"),
        ({"x0": torch.ones(2, 3).half()}, TypeError, "x0 must have the dtype of x"),
        ({"alpha": None}, TypeError, "alpha must be a number, a list"),
        ({"alpha": math.nan}, ValueError, "alpha must be a number"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, a list"),
        ({"eps": -0.1}, ValueError, "eps must be a number >= 0.0, got -0.1"),
        ({"eps": [0.1, -0.1, 0.1]}, ValueError, "eps must be a number >= 0.0"),
        ({"eps": [0.1, 0.1]}, ValueError, r"eps must be .* of shape \[2, 3\], got shape \[2\]"),
        ({"hi": torch.ones(())}, ValueError, r"hi must be .* got shape \[\]"),
        ({"lo": 1.0, "hi": 0.0}, ValueError, "lo must be at most hi, got 1.0 and 0.0"),
    ],
    any_dtype=("grad",),
    any_shape=("x",),
)


@every_implementation
@pytest.mark.parametrize("kind", ["step", "ball", "range", "sequences", "tensors"])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_to_the_reference(implementation, dtype, grad_dtype, kind):
    # an odd number of elements, more than one vector and less than a repeat of channels
    x = images((3, 5, 7, 3), dtype, special=True)
    x0 = (x.float() + 0.02 * images(x.shape, seed=1)).to(dtype)
    grad = images(x.shape, grad_dtype, special=True, seed=2)
    for center in (None, x0):
        options = {"x0": center, **bounds(kind, 5)}
        expected = reference.linf_step(x, grad, **options)
        with running(implementation) as impl:
            actual = clae_fast.linf_step(x, grad, impl=impl, **options)
        assert_bitwise_equal(actual, expected)


@every_implementation
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 300), (2, 3, 4), (1, 3, 5, 7, 2), (0, 3, 2)])
@pytest.mark.parametrize("kind", ["range", "sequences"])
def test_shapes(implementation, shape, kind):
    x, grad = images(shape), images(shape, seed=1)
    options = bounds(kind, shape[1])
    with running(implementation) as impl:
        actual = clae_fast.linf_step(x, grad, impl=impl, **options)
    assert_bitwise_equal(actual, reference.linf_step(x, grad, **options))


@every_implementation
def test_more_elements_than_one_thread_takes(implementation):
    if implementation == "triton":
        pytest.skip("the interpreter would take long and shows nothing new")
    x, grad = images((3, 3, 96, 97)), images((3, 3, 96, 97), seed=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        for kind in ("range", "sequences"):
            options = bounds(kind, 3)
            with running(implementation) as impl:
                actual = clae_fast.linf_step(
                    x.contiguous(memory_format=layout), grad, impl=impl, **options
                )
            assert_bitwise_equal(actual, reference.linf_step(x, grad, **options))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("eps", [0.03, 8 / 255, 1e-3, 0.1, 1e-9])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_ball_holds_exactly(dtype, eps, impl):
    x0 = torch.cat([images((1, 2000), dtype), images((1, 2000), dtype, seed=3) * 1e-3])
    x = (x0.double() + 2 * eps * images(x0.shape, seed=1)).to(dtype)
    grad = images(x0.shape, seed=2)
    for start, alpha in ((x0, eps), (x0, 10 * eps), (x, 0.3 * eps)):
        x_adv = clae_fast.linf_step(start, grad, alpha=alpha, x0=x0, eps=eps, impl=impl)
        # fp64 holds these differences exactly
        assert ((x_adv.double() - x0.double()).abs() <= eps).all()


@every_implementation
def test_takes_the_whole_step_where_it_can(implementation):
    x, grad = images((4, 50)), images((4, 50), seed=1)
    with running(implementation) as impl:
        x_adv = clae_fast.linf_step(x, grad, alpha=0.03, eps=0.03, impl=impl)
    torch.testing.assert_close(x_adv, x + 0.03 * grad.sign(), rtol=0, atol=5e-7)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_of_nan_and_infinity(implementation, dtype):
    grad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 6e-8, -6e-8], dtype=dtype)
    x = torch.ones(7)
    with running(implementation) as impl:
        x_adv = clae_fast.linf_step(x, grad, alpha=0.5, impl=impl)
    assert x_adv.tolist() == [1.0, 1.5, 0.5, 1.0, 1.0, 1.5, 0.5]


@every_implementation
def test_nan_stays(implementation):
    x = torch.tensor([math.nan, 1.0, 1.0])
    x0 = torch.tensor([1.0, math.nan, 1.0])
    with running(implementation) as impl:
        x_adv = clae_fast.linf_step(
            x, torch.ones(3), alpha=0.1, x0=x0, eps=0.1, lo=0.0, hi=1.0, impl=impl
        )
    assert x_adv.isnan().tolist() == [True, True, False]


def test_against_the_formula_in_fp64():
    x, grad = images((2, 3, 4, 4), torch.float64), images((2, 3, 4, 4), torch.float64, seed=1)
    x0 = x + 0.02
    expected = (x + 0.05 * grad.sign()).clamp(x0 - 0.03, x0 + 0.03).clamp(-0.5, 0.5)
    x_adv = clae_fast.linf_step(x, grad, alpha=0.05, x0=x0, eps=0.03, lo=-0.5, hi=0.5)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-15)
