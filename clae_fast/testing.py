"""What tests and benchmarks share: inputs, error budgets, implementations, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clae_fast import _impl, _native


def projections(
    N: int,
    D: int,
    *,
    noise: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # [N, D], [N, D]
    """Two views' projections; the second is the first plus `noise`, or independent for None."""
    generator = torch.Generator().manual_seed(seed)
    z0, z1 = torch.randn(2, N, D, generator=generator)
    return z0.to(dtype), (z1 if noise is None else z0 + noise * z1).to(dtype)


def value_and_grads(
    function: Callable[..., Tensor], *operands: Tensor, scale: float = 1.0, **options: object
) -> tuple[Tensor, list[Tensor]]:
    """A scalar function's value, and the gradients of `scale` times it by all operands."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    value = function(*leaves, **options)
    return value.detach(), list(torch.autograd.grad(value * scale, leaves))


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, *, temperature: float = 1.0, what: str = ""
) -> None:
    """Raises unless `actual` is as near to `exact` as twice the error of `eager` and a rounding.

    Errors are relative to the largest element of each row of `exact`, since rows' gradients differ
    by many orders of magnitude where their norms do. The rounding is that of the dtype and of
    logits, which are as large as 1 / temperature.

    Args:
        actual: The result to judge.
        eager: The reference's result for the same inputs in the same dtype.
        exact: The reference's result for the same inputs in fp64.
        temperature: T of the loss.
        what: What the message calls the result.
    """
    assert actual.shape == eager.shape == exact.shape, (actual.shape, eager.shape, exact.shape)
    assert actual.dtype == eager.dtype, (actual.dtype, eager.dtype)
    size = exact.abs().amax(-1, keepdim=True) if exact.ndim else exact.abs()
    tiny = torch.finfo(actual.dtype).tiny
    size = size.clamp_min(tiny)
    error, eager_error = ((result.double() - exact).abs() / size for result in (actual, eager))
    rounding = 4 * torch.finfo(actual.dtype).eps + 4 * torch.finfo(torch.float32).eps / temperature
    # numbers below `tiny` may be flushed to 0
    budget = 2 * eager_error.max() + rounding + 2 * tiny / size
    if not (error <= budget).all():
        at = int((error - budget).nan_to_num(nan=torch.inf).argmax())
        raise AssertionError(
            f"{what} element {at}: got {actual.flatten()[at].item():.9g}, "
            f"eager {eager.flatten()[at].item():.9g}, exact {exact.flatten()[at].item():.9g}; "
            f"relative error {error.flatten()[at].item():.2e}, "
            f"budget {budget.expand_as(error).flatten()[at].item():.2e}"
        )


def implementations(op: str) -> list[str]:
    """What can run `op` on this machine's CPU, as in ["native-portable", "native-avx2"].

    The reference is not among them, Triton is where it is interpreted.
    """
    names: list[str] = []
    for impl in _impl.available(op, "cpu"):
        names += [f"native-{isa}" for isa in _native.isas()] if impl == "native" else [impl]
    return names


@contextmanager
def running(implementation: str) -> Iterator[str]:
    """Runs one of `implementations`; yields the name to pass as `impl`."""
    impl, _, isa = implementation.partition("-")
    if isa:
        with _native.force_isa(isa):
            yield impl
    else:
        yield impl


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Fills what torch.empty and its like return with NaN: forgotten elements show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Raises unless both agree in shape, dtype and every bit, but for which NaN a NaN is."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    differ = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    differ &= ~(actual.isnan() & expected.isnan())
    if differ.any():
        pairs = zip(actual[differ][:3].tolist(), expected[differ][:3].tolist(), strict=True)
        raise AssertionError(f"{int(differ.sum())} of {differ.numel()} differ: {list(pairs)}")
