"""What the ops on rows are called with, for tests that treat all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import clae_fast
from clae_fast.testing import assert_accurate, value_and_grads


class Case(NamedTuple):
    """One way to call an op."""

    op: str
    # of projections of M rows, two views of them, the op's operands for N anchors
    operands: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    # options beside the temperature, or what makes them of the operands
    options: dict[str, object] | Callable[..., dict[str, object]] = {}  # noqa: RUF012
    is_loss: bool = True
    # how much larger its exponents are than 1 / T
    sharpness: float = 1.0

    def settings(self, operands: tuple[Tensor, ...]) -> dict[str, object]:
        """The options for these operands."""
        return self.options(*operands) if callable(self.options) else self.options

    def gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Those among what `run` returns, in the order of the operands."""
        return outputs[1:] if self.is_loss else outputs


def _named(anchor: Tensor, _: Tensor) -> dict[str, object]:
    """Each anchor's positive by name, which shuffled batches have in its place again."""
    return {"positive": torch.arange(len(anchor))}


def _queue(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """Half as many anchors as keys."""
    return z0[: (len(z0) + 1) // 2], z1


CASES = {
    "nt_xent": Case("nt_xent", lambda z0, z1: (z0, z1)),
    "tied_nt_xent": Case("tied_nt_xent", lambda z0, _: (z0,), is_loss=False),
    "info_nce": Case("info_nce", _queue),
    "info_nce-named": Case("info_nce", _queue, _named),
    "info_nce-symmetric": Case("info_nce", lambda z0, z1: (z0, z1), {"symmetric": True}),
    "uel": Case("uel", lambda z0, z1: (z0, z1)),
    "hard_nt_xent": Case(
        "hard_nt_xent", lambda z0, z1: (z0, z1), {"beta": 1.0, "tau_plus": 0.1}, sharpness=2.0
    ),
    "hard_nt_xent-constant": Case(
        "hard_nt_xent",
        lambda z0, z1: (z0, z1),
        {"beta": 2.5, "tau_plus": 0.0, "detach_weights": True},
        sharpness=3.5,
    ),
}


def run(case: Case, operands: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """The loss and the gradients by every operand, or what the op returns instead."""
    function = getattr(clae_fast, case.op)
    options |= case.settings(operands)
    if not case.is_loss:
        return [function(*operands, **options)]
    loss, grads = value_and_grads(function, *operands, **options)
    return [loss, *grads]


def check(
    case: Case, operands: tuple[Tensor, ...], temperature: float, actual: list[Tensor]
) -> None:
    """Raises unless what `run` has returned is within the error budget.

    Gradients are judged in the operands' dtype, which they are cast to sooner or later, and may be
    off by two roundings of the at most 4 unit rows over N T |z| that cancel in them.
    """
    options = {"temperature": temperature, "impl": "reference"}
    eager = run(case, operands, **options)
    exact = run(case, tuple(z.double() for z in operands), **options)
    temperature /= case.sharpness
    if case.is_loss:
        assert_accurate(actual[0], eager[0], exact[0], temperature=temperature, what="loss")
    N, eps = len(operands[0]), torch.finfo(torch.float32).eps
    grads = (case.gradients(outputs) for outputs in (actual, eager, exact))
    for z, dz, eager_dz, exact_dz in zip(operands, *grads, strict=True):
        norm = z.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        rounded = exact_dz.to(z.dtype)
        cancelled = (dz - exact_dz).abs() <= 8 * eps / (N * temperature * norm)
        dz = torch.where(cancelled, rounded, dz.to(z.dtype))
        assert_accurate(
            dz, eager_dz.to(z.dtype), exact_dz, temperature=temperature, what="gradient"
        )
