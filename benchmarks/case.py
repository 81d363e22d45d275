"""What a case is: an op at one size, ours, and the peers that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OURS = "clae_fast"
CPU = torch.device("cpu")
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}

Operands = tuple[Tensor, ...]
# what is timed: the loss and the wanted gradients, or whatever the op returns
Outputs = tuple[Tensor, ...]
# the ways to write one thing, by name
Forms = dict[str, Callable[..., Any]]


class UnavailableError(Exception):
    """An implementation cannot run here or at this size, or is wrong; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the outputs of a case.

    Attributes:
        forms: `forms(device)` gives the ways to write it. On the CPU the fastest of them stands
            for the peer; a peer of the GPU suite has one.
        package: The distribution that it comes from, or None for torch.
        numbers: How many numbers it holds at its peak, about.
        gpu_only: Whether only the GPU suite measures it.
        captured: Whether a CUDA graph can hold it. A graph cannot where the host waits for the GPU.
        compiled: Whether it is compiled anew for every size, and so is called at no other.
    """

    forms: Callable[[torch.device], Forms]
    package: str | None = None
    numbers: float = 0
    gpu_only: bool = False
    captured: bool = False
    compiled: bool = False

    @property
    def version(self) -> str:
        """The version of its package."""
        return version(self.package) if self.package else f"torch {torch.__version__}"


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
        inputs: `inputs(dtype, device, seed)` draws the operands.
        op: Our public op with its settings. It takes `impl`.
        truth: What the op should return for operands in float64.
        peers: Who else computes it, by name.
        leaves: How many of the operands, from the first, have a gradient that is wanted.
        flops: The floating-point operations that everybody's rate counts.
    """

    inputs: Callable[[torch.dtype, torch.device, int], Operands]
    op: Callable[..., Any]
    truth: Callable[..., Any]
    peers: dict[str, Peer] = field(default_factory=dict)
    leaves: int = 0
    flops: float = 0

    def call(self, function: Callable[..., Any], operands: Operands) -> Outputs:
        """What is wanted of `function`: its outputs, or its loss and the gradients."""
        outputs = function(*operands)
        if self.leaves:
            return (outputs.detach(), *torch.autograd.grad(outputs, operands[: self.leaves]))
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def exact(self, operands: Operands) -> Outputs:
        """The outputs in float64."""
        doubled = (
            z.detach().double().requires_grad_(z.requires_grad) if z.is_floating_point() else z
            for z in operands
        )
        return self.call(self.truth, tuple(doubled))


def rows(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    leaves: int = 0,
    state: int = 0,
    unit: bool = False,
) -> Operands:
    """Normal random rows, those of the second operand near those of the first.

    The first `leaves` operands require a gradient, and the last `state` are in fp32 whatever the
    others are. With `unit` the rows have length 1.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    if len(made) > 1:
        partners = min(len(made[0]), len(made[1]))
        made[1][:partners] = made[0][:partners] + 0.5 * made[1][:partners]
    if unit:
        made = [F.normalize(z) for z in made]
    made = [z.to(dtype) if i < len(made) - state else z for i, z in enumerate(made)]
    return tuple(z.requires_grad_(i < leaves) for i, z in enumerate(made))


def dtype_name(dtype: torch.dtype) -> str:
    """The name that rows have for a data type, for instance fp16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def relative_error(outputs: Outputs, truth: Outputs) -> float:
    """The largest relative error of an output in the 2-norm, NaN where one is."""
    errors = [(o.double() - t).norm() / t.norm() for o, t in zip(outputs, truth, strict=True)]
    return float(torch.stack(errors).max())
