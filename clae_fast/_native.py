"""The compiled module. Nothing else imports `_C` or takes the address of a tensor.

Python allocates memory and sees to dtypes and layouts, and C++ computes.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clae_fast._version import __version__

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
# of csrc/dtype.h
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LINF_CHANNELS = 4


def has_cpu() -> bool:
    """Whether the C++ kernels are built."""
    return bool(_isas)


def has_cuda() -> bool:
    """Whether the CUDA C++ kernels are built, be there a GPU or not."""
    return _has_cuda


def isa() -> str:
    """The instruction set that the C++ kernels run with; "" where they are not built."""
    return _isa


def isas() -> list[str]:
    """The instruction sets that this build and this processor can run, the slowest first."""
    return list(_isas)


def files() -> list[Path]:
    """The file of the compiled module, if there is one."""
    return [Path(_C.__file__)] if has_cpu() else []


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Runs the C++ kernels with another instruction set than the fastest one."""
    global _isa
    if name not in _isas:
        raise ValueError(f"isa must be one of {_isas}, got {name!r}")
    before, _isa = _isa, name
    try:
        yield
    finally:
        _isa = before


class Rows:
    """An operand [N, D] of a C++ function, in fp32, fp16 or bf16; copied unless rows are dense."""

    def __init__(self, z: Tensor) -> None:
        self.z = z if z.stride(1) == 1 else z.contiguous()


def in_one_piece(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor as a contiguous one, which may be the tensor itself."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def run(name: str, *arguments: object) -> None:
    """Calls a C++ function on the CPU, which writes its results to tensors among the arguments.

    C++ gets the instruction set, the arguments and a workspace. It gets the address of a tensor and
    of a list's numbers, 0 for None, and its own number for a dtype.
    """
    held = _held(_isa, *arguments)
    _in_workspace(partial(getattr(_C, name), *map(_passed, held)), "cpu")


def run_cuda(name: str, device: torch.device, *arguments: object) -> None:
    """As `run` on a GPU. C++ gets the arguments, a workspace and the current stream."""
    held = _held(*arguments)
    function = partial(getattr(_C, name), *map(_passed, held))
    with _current_stream(device) as stream:
        _in_workspace(lambda workspace: function(workspace, stream), device)


def nt_xent_cuda_takes(n: int, D: int) -> bool:
    """Whether the CUDA kernel of NT-Xent has the shared memory for n = 2N rows of D elements."""
    return n <= (4096 if D <= 128 else 2048) and D <= 256


def linf_step_cpu(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x, and so the next two, in memory too
    x0: Tensor,
    out: Tensor,
    bounds: list[float] | Tensor,  # [4 * 1] or [4, C]
) -> None:
    """Writes the step with bounds alpha, eps, lo and hi to `out`."""
    arguments = _linf_arguments(x, grad, x0, out, bounds)
    _call("linf_step_cpu", _isa, *arguments, torch.get_num_threads())


def linf_step_cuda(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x, and so the next two
    x0: Tensor,
    out: Tensor,
    bounds: list[float] | Tensor,  # [4 * 1] or [4 * C] with C <= LINF_CHANNELS, or [4, C]
    layout: tuple[tuple[int, ...], ...],  # [4, 4]
) -> None:
    """Writes the step to `out`. `layout` says where the other tensors have its elements."""
    arguments = _linf_arguments(x, grad, x0, out, bounds)
    digits = list(itertools.chain(*layout))
    with _current_stream(x.device) as stream:
        _call("linf_step_cuda", *arguments, digits, isinstance(bounds, Tensor), stream)


def _linf_arguments(
    x: Tensor, grad: Tensor, x0: Tensor, out: Tensor, bounds: list[float] | Tensor
) -> tuple[object, ...]:
    """What the steps on both devices are given."""
    if isinstance(bounds, Tensor):
        bounds = bounds.contiguous()
    channels = bounds.shape[1] if isinstance(bounds, Tensor) else len(bounds) // 4
    stride = max(1, out.stride(1)) if channels > 1 else 1
    return x, grad, x0, out, x.dtype, grad.dtype, x.numel(), bounds, channels, stride


def stem_step(
    dy: Tensor,  # [N, C_out, dy_H, dy_W], channels_last
    weight: Tensor,  # [C_out, 3, size, size]
    x: Tensor,  # [N, 3, H, W]
    out: Tensor,  # as x, in memory too
    bounds: list[float] | Tensor,  # [4 * 1] or [4 * 3], or [4, 3]
) -> None:
    """Writes the step along the convolution's input gradient to `out`."""
    # the kernel copies 16 bytes at a time
    dy = dy if dy.data_ptr() % 16 == 0 else dy.clone()
    if isinstance(bounds, Tensor):
        bounds = bounds.contiguous()
    elif len(bounds) == 4:
        bounds = [value for value in bounds for _ in range(3)]
    dtypes = (dy.dtype, weight.dtype, x.dtype)
    sizes = (len(x), dy.shape[1], *x.shape[2:], weight.shape[2])
    strides = (ctypes.c_int * 8)(*weight.stride(), *x.stride())
    last = (strides, bounds, isinstance(bounds, Tensor))
    with _current_stream(x.device) as stream:
        _call("stem_step_cuda", dy, weight, x, out, *dtypes, *sizes, *last, stream)


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """The stream to launch on. Within the context its GPU is the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _in_workspace(call: Callable[[int], int], device: torch.device | str) -> None:
    """Calls a C++ function with a workspace. Called with 0 in its place, it returns its size."""
    workspace = torch.empty(call(0), dtype=torch.uint8, device=device)
    call(workspace.data_ptr())


def _call(name: str, *arguments: object) -> None:
    """Calls a C++ function that needs no workspace."""
    held = _held(*arguments)
    getattr(_C, name)(*map(_passed, held))


def _held(*arguments: object) -> list[object]:
    """The arguments with arrays for lists. They have to live as long as a call by address does."""
    return [_array(value) if isinstance(value, list) else value for value in arguments]


def _array(numbers: list[float] | list[int]) -> ctypes.Array:
    """Floats in fp32, or integers in 64 bits, on the CPU."""
    number: Any = ctypes.c_float if isinstance(numbers[0], float) else ctypes.c_int64
    return (number * len(numbers))(*numbers)


def _passed(value: object) -> object:
    """What C++ gets for an argument."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, Rows):
        return value.z.data_ptr(), _DTYPES[value.z.dtype], value.z.stride(0)
    if isinstance(value, ctypes.Array):
        return ctypes.addressof(value)
    return _DTYPES[value] if isinstance(value, torch.dtype) else 0
