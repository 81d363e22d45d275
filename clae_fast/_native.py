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
    import clae_fast._C as _C
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
# of csrc/linf_step.h
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def linf_step(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x
    x0: Tensor | None,  # as x
    bounds: tuple[float, float, float, float] | Tensor,  # [4, C]
) -> Tensor:
    """The step with bounds alpha, eps, lo, hi, in C++ or CUDA C++ as `x` is on CPU or GPU."""
    out = torch.empty_like(x)
    x, grad = _laid_out_as(x, out), _laid_out_as(grad, out)
    x0 = x if x0 is None else _laid_out_as(x0, out)
    if isinstance(bounds, Tensor):
        bounds = bounds.contiguous()
        scalars, per_channel, channels = (0.0, 0.0, 0.0, 0.0), bounds.data_ptr(), bounds.shape[1]
        channel_stride = max(1, out.stride(1))
    else:
        scalars, per_channel, channels, channel_stride = bounds, 0, 1, 1
    arguments = (
        x.data_ptr(),
        grad.data_ptr(),
        x0.data_ptr(),
        out.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[grad.dtype],
        x.numel(),
        *scalars,
        per_channel,
        channels,
        channel_stride,
    )
    if x.is_cuda:
        with torch.cuda.device(x.device):
            _C.linf_step_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _C.linf_step_cpu(_isa, *arguments, torch.get_num_threads())
    return out


def _laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the strides of `other`, itself where it has them."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def _fp32_rows(z: Tensor) -> Tensor:
    """`z` in fp32 with contiguous rows, itself where it is that already."""
    z = z.float()
    return z if z.stride(1) == 1 else z.contiguous()
