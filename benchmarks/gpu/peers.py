"""The contrastive losses that ours is measured against on a GPU.

Three kinds of work, all on raw projections z0, z1 of shape [N, D], normalisation included:

    nt_xent    NT-Xent of the n = 2N rows
    two_way    InfoNCE of z0 against z1 and back, the mean of both
    unmasked   NT-Xent with every row among its own negatives: what kernels for language models
               compute when all three operands are one matrix. Other work than nt_xent

`load` checks a peer against the float64 oracle at a small size before it is timed. A package that
is not there is named. The forms written in torch ops follow the formula and nobody's code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.peers import Loss, UnavailableError, _lightly, released_nt_xent, value_and_grad
from clae_fast import reference

TOLERANCE = 1e-2
CHECKED_ROWS = 256


@dataclass(frozen=True)
class GpuPeer:
    """One peer.

    Attributes:
        work: Which of the oracles it computes.
        make: `make(n, temperature, device)` gives the loss for n rows in all.
        package: The distribution it comes from, None for torch.
        captured: Whether a CUDA graph can hold it. It cannot where the host waits for the GPU.
        compiled: Whether it is made for one size in a minute, and so checked at no other.
    """

    work: str
    make: Callable[[int, float, torch.device], Loss]
    package: str | None = None
    captured: bool = False
    compiled: bool = False

    @property
    def version(self) -> str:
        """The package's version."""
        return version(self.package) if self.package else f"torch {torch.__version__}"


def views(
    n: int, D: int, device: torch.device, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two leaves [n/2, D]: normal rows, and the same with noise of half that size."""
    generator = torch.Generator(device).manual_seed(seed)
    z0, noise = torch.randn(2, n // 2, D, generator=generator, device=device)
    z0, z1 = z0.to(dtype), (z0 + 0.5 * noise).to(dtype)
    return z0.requires_grad_(), z1.requires_grad_()


def ours(work: str, temperature: float, **options: Any) -> Loss:
    """What of ours does a kind of work."""
    if work == "two_way":
        return functools.partial(
            clae_fast.info_nce, temperature=temperature, symmetric=True, **options
        )
    return functools.partial(clae_fast.nt_xent, temperature=temperature, **options)


def oracle(work: str, z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of a kind of work in float64."""
    z0, z1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    if work == "nt_xent":
        loss = functools.partial(reference.nt_xent, temperature=temperature)
    else:
        loss = functools.partial(_plain, work == "two_way", temperature=temperature)
    return value_and_grad(loss, z0, z1)


def _plain(two_way: bool, z0: Tensor, z1: Tensor, *, temperature: float) -> Tensor:
    u, v = F.normalize(z0), F.normalize(z1)
    labels = torch.arange(len(u), device=u.device)
    if not two_way:
        u, v = torch.cat((u, v)), torch.cat((u, v))
        labels = torch.arange(len(u), device=u.device).roll(len(u) // 2)
    logits = u @ v.t() / temperature
    loss = F.cross_entropy(logits, labels)
    return (loss + F.cross_entropy(logits.t(), labels)) / 2 if two_way else loss


def error_of(work: str, loss: Loss, temperature: float, z0: Tensor, z1: Tensor) -> float:
    """Relative Frobenius error of the gradient against float64, inf where the loss is wrong."""
    value, *grads = value_and_grad(loss, z0, z1)
    true_value, *truth = oracle(work, z0, z1, temperature)
    if not (value.double() - true_value).abs() <= TOLERANCE * true_value.abs():
        return float("inf")
    dz, true_dz = torch.cat(grads).double(), torch.cat(truth)
    return ((dz - true_dz).norm() / true_dz.norm()).item()


def load(name: str, n: int, temperature: float, D: int, device: torch.device) -> Loss:
    """A peer's loss for n rows, checked first.

    Raises:
        UnavailableError: Its package is missing, or it fails or is wrong.
    """
    peer = PEERS[name]
    if peer.package:
        try:
            version(peer.package)
        except PackageNotFoundError as failure:
            raise UnavailableError(f"{peer.package} is not installed") from failure
    small = n if peer.compiled else min(n, CHECKED_ROWS)
    try:
        loss = peer.make(small, temperature, device)
        error = error_of(peer.work, loss, temperature, *views(small, D, device))
    except Exception as failure:  # whatever a peer raises, the others go on
        reason = (str(failure) or type(failure).__name__).strip().splitlines()[0]
        raise UnavailableError(f"fails: {reason}") from failure
    if not error <= TOLERANCE:
        raise UnavailableError(f"wrong, {error:.1e} off the float64 reference")
    return peer.make(n, temperature, device)


def _released(n: int, temperature: float, device: torch.device) -> Loss:
    return released_nt_xent(n, temperature)


def _released_on_gpu(n: int, temperature: float, device: torch.device) -> Loss:
    return released_nt_xent(n, temperature, device)


def _eager(n: int, temperature: float, device: torch.device) -> Loss:
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    labels = torch.arange(n, device=device).roll(n // 2)

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm(z / temperature, z.t()).masked_fill_(diagonal, -torch.inf)
        return F.cross_entropy(logits, labels)

    return loss


@functools.cache
def _compiled(dtype: torch.dtype, backend: str) -> Callable[..., Tensor]:
    """NT-Xent in torch ops with products in `dtype`, compiled for each shape that it meets."""

    def loss(z0: Tensor, z1: Tensor, scale: Tensor) -> Tensor:
        n = 2 * len(z0)
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm((z * scale).to(dtype), z.to(dtype).t())
        column = torch.arange(n, device=z.device)
        logits = logits.masked_fill(column[:, None] == column, -torch.inf)
        return F.cross_entropy(logits.float(), column.roll(n // 2))

    if backend != "inductor":
        return torch.compile(loss, backend=backend, dynamic=False)
    # without its own graphs, which copy the inputs: the suite captures it instead
    return torch.compile(loss, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


def _compile(dtype: torch.dtype, n: int, temperature: float, device: torch.device) -> Loss:
    scale = torch.tensor(1 / temperature, device=device)
    compiled = _compiled(dtype, "inductor" if device.type == "cuda" else "eager")
    return lambda z0, z1: compiled(z0, z1, scale)


def _lightly_loss(n: int, temperature: float, device: torch.device) -> Loss:
    return _lightly(n, temperature)[""]


def _cut_cross_entropy(work: str, n: int, temperature: float, device: torch.device) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    cross_entropy = functools.partial(linear_cross_entropy, impl="cce", filter_eps=None)
    return _linear_cross_entropy(work, cross_entropy, temperature, torch.float16)


def _liger(work: str, n: int, temperature: float, device: torch.device) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def cross_entropy(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        return fused(columns, rows, labels)

    return _linear_cross_entropy(work, cross_entropy, temperature, torch.float16)


def _linear_cross_entropy(
    work: str,
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor],
    temperature: float,
    dtype: torch.dtype,
) -> Loss:
    """A loss out of `cross_entropy(rows, columns, labels)` of the logits rows @ columns.T."""

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u, v = F.normalize(z0), F.normalize(z1)
        labels = torch.arange(len(u), device=u.device)
        if work == "two_way":
            there = cross_entropy((u / temperature).to(dtype), v.to(dtype), labels)
            return (there + cross_entropy((v / temperature).to(dtype), u.to(dtype), labels)) / 2
        z = torch.cat((u, v))
        labels = torch.arange(len(z), device=z.device).roll(len(u))
        return cross_entropy((z / temperature).to(dtype), z.to(dtype), labels)

    return loss


def _inf_cl(n: int, temperature: float, device: torch.device) -> Loss:
    from inf_cl import cal_inf_loss

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u, v = F.normalize(z0), F.normalize(z1)
        width = min(u.shape[1], 256)
        there = cal_inf_loss(u / temperature, v, head_dim=width)
        return (there + cal_inf_loss(v / temperature, u, head_dim=width)) / 2

    return loss


_cce, _lgr = "cut-cross-entropy", "liger-kernel"
PEERS = {
    "released": GpuPeer("nt_xent", _released),
    "released, mask on the GPU": GpuPeer("nt_xent", _released_on_gpu, captured=True),
    "lightly": GpuPeer("nt_xent", _lightly_loss, "lightly"),
    "mm + cross_entropy, TF32": GpuPeer("nt_xent", _eager, captured=True),
    "torch.compile, TF32": GpuPeer(
        "nt_xent", functools.partial(_compile, torch.float32), captured=True, compiled=True
    ),
    "torch.compile, fp16": GpuPeer(
        "nt_xent", functools.partial(_compile, torch.float16), captured=True, compiled=True
    ),
    "cut-cross-entropy": GpuPeer("two_way", functools.partial(_cut_cross_entropy, "two_way"), _cce),
    "Inf-CL": GpuPeer("two_way", _inf_cl, "inf-cl"),
    "cut-cross-entropy, unmasked": GpuPeer(
        "unmasked", functools.partial(_cut_cross_entropy, "unmasked"), _cce
    ),
    "Liger, unmasked": GpuPeer("unmasked", functools.partial(_liger, "unmasked"), _lgr),
}
