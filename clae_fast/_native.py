"""The compiled module: the only importer of `_C` and the only place that takes addresses.

Python owns allocation, contiguity and dtype; C++ owns arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clae_fast import __version__

try:
    from clae_fast import _C
except ModuleNotFoundError as error:
    if error.name != "clae_fast._C":
        raise
    _isas: list[str] = []
    _has_cuda = False
else:
    if _C.version != __version__:
        raise ImportError(
            f"clae_fast {__version__} found the compiled module of {_C.version}: "
            "run `pip install .` again"
        )
    _isas = _C.isas()
    _has_cuda = _C.cuda

_isa = _isas[-1] if _isas else ""


def has_cpu() -> bool:
    """Whether the C++ kernels are built."""
    return bool(_isas)


def has_cuda() -> bool:
    """Whether the CUDA C++ kernels are built; says nothing of a GPU being there."""
    return _has_cuda


def isa() -> str:
    """The instruction set that the C++ kernels run with, "" without them."""
    return _isa


def isas() -> list[str]:
    """The instruction sets this build and processor can run, worst first."""
    return list(_isas)


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the C++ kernels with another instruction set than the best one."""
    global _isa
    if name not in _isas:
        raise ValueError(f"isa must be one of {_isas}, got {name!r}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss in fp32 and, where wanted, its gradient in fp32, d z0 above d z1: [], [2N, D]."""
    z0, z1 = _fp32_rows(z0), _fp32_rows(z1)
    N, D = z0.shape
    loss = torch.empty((), dtype=torch.float32)
    dz = torch.empty((2 * N, D), dtype=torch.float32) if grad else None
    workspace = torch.empty(_C.nt_xent_workspace(_isa, N, D, grad), dtype=torch.uint8)
    _C.nt_xent(
        _isa,
        z0.data_ptr(),
        z1.data_ptr(),
        z0.stride(0),
        z1.stride(0),
        N,
        D,
        temperature,
        torch.get_num_threads(),
        loss.data_ptr(),
        0 if dz is None else dz.data_ptr(),
        workspace.data_ptr(),
    )
    return loss, dz


def _fp32_rows(z: Tensor) -> Tensor:
    """`z` in fp32 with contiguous rows, itself where it is that already."""
    z = z.float()
    return z if z.stride(1) == 1 else z.contiguous()
