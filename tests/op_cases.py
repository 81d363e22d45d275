"""What the ops on rows are called with, for tests that treat all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import clae_fast
from clae_fast.testing import assert_accurate, value_and_grads


class Case(NamedTuple):
    """One way to call an op."""

    op: str
    # of projections of M rows, two views of them, the op's operands for N anchors
    operands: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    # options beside the temperature
    options: dict[str, object] = {}  # noqa: RUF012
    is_loss: bool = True


def _queue(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """Half as many anchors as keys."""
    return z0[: (len(z0) + 1) // 2], z1


CASES = {
    "nt_xent": Case("nt_xent", lambda z0, z1: (z0, z1)),
    "tied_nt_xent": Case("tied_nt_xent", lambda z0, _: (z0,), is_loss=False),
    "info_nce": Case("info_nce", _queue),
    "info_nce-symmetric": Case("info_nce", lambda z0, z1: (z0, z1), {"symmetric": True}),
    "uel": Case("uel", lambda z0, z1: (z0, z1)),
}


def run(case: Case, operands: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """The loss and the gradients by every operand, or what the op returns instead."""
    function = getattr(clae_fast, case.op)
    options |= case.options
    if not case.is_loss:
        return [function(*operands, **options)]
    loss, grads = value_and_grads(function, *operands, **options)
    return [loss, *grads]


def check(
    case: Case, operands: tuple[Tensor, ...], temperature: float, actual: list[Tensor]
) -> None:
    """Raises unless what `run` has returned is within the error budget.

    Gradients are judged in the operands' dtype, which they are cast to sooner or later.
    """
    options = {"temperature": temperature, "impl": "reference"}
    eager = run(case, operands, **options)
    if not case.is_loss:
        actual, eager = ([dz.to(operands[0].dtype) for dz in each] for each in (actual, eager))
    exact = run(case, tuple(z.double() for z in operands), **options)
    for number, results in enumerate(zip(actual, eager, exact, strict=True)):
        assert_accurate(*results, temperature=temperature, what=f"{case.op}, result {number},")
