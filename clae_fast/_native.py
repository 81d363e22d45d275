"""The compiled module: the only importer of `_C` and the only place that takes addresses.

Python owns allocation, contiguity and dtype; C++ owns arithmetic.
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
    """Whether the CUDA C++ kernels are built; says nothing of a GPU being there."""
    return _has_cuda


def isa() -> str:
    """The instruction set that the C++ kernels run with, "" without them."""
    return _isa


def isas() -> list[str]:
    """The instruction sets this build and processor can run, worst first."""
    return list(_isas)


def files() -> list[Path]:
    """The file of the compiled module, if there is one."""
    return [Path(_C.__file__)] if has_cpu() else []


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


class Rows:
    """An operand [N, D] of a C++ function, with each row in one piece, in fp32, fp16 or bf16."""

    def __init__(self, z: Tensor) -> None:
        self.z = z if z.stride(1) == 1 else z.contiguous()


def in_one_piece(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor contiguous, itself where it is that already."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def run(name: str, *arguments: object) -> None:
    """Calls a C++ function on the CPU, which writes to memory among `arguments`.

    C++ is given the address of a tensor and of a list's numbers, 0 for None, and a dtype's number.
    The instruction set goes before the arguments, and a workspace after them.
    """
    held = [_array(value) if isinstance(value, list) else value for value in arguments]
    _in_workspace(partial(getattr(_C, name), _isa, *map(_passed, held)), "cpu")


def run_cuda(name: str, device: torch.device, *arguments: object) -> None:
    """As `run` for a CUDA C++ function, which takes the stream at the end."""
    function = partial(getattr(_C, name), *map(_passed, arguments))
    with _current_stream(device) as stream:
        _in_workspace(lambda workspace: function(workspace, stream), device)


def nt_xent_cuda_takes(n: int, D: int) -> bool:
    """Whether the CUDA kernel of NT-Xent takes n = 2N rows of D elements, by its shared memory."""
    return n <= (4096 if D <= 128 else 2048) and D <= 256


def linf_step_cpu(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x, and so the next two, in memory too
    x0: Tensor,
    out: Tensor,
    bounds: list[float] | Tensor,  # [4 * 1] or [4, C]
) -> None:
    """The step with bounds alpha, eps, lo and hi, to `out`."""
    numbers = _numbers(bounds)
    _C.linf_step_cpu(_isa, *_linf_arguments(x, grad, x0, out, numbers), torch.get_num_threads())


def linf_step_cuda(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x, and so the next two
    x0: Tensor,
    out: Tensor,
    bounds: list[float] | Tensor,  # [4 * 1] or [4 * C] with C <= LINF_CHANNELS, or [4, C]
    layout: tuple[tuple[int, ...], ...],  # [4, 4]
) -> None:
    """The step with bounds alpha, eps, lo and hi, to `out`, whose strides `layout` relates."""
    numbers = _numbers(bounds)
    digits = (ctypes.c_int64 * 16)(*itertools.chain(*layout))
    with _current_stream(x.device) as stream:
        _C.linf_step_cuda(
            *_linf_arguments(x, grad, x0, out, numbers),
            _address(digits),
            isinstance(bounds, Tensor),
            stream,
        )


def _linf_arguments(
    x: Tensor, grad: Tensor, x0: Tensor, out: Tensor, numbers: Tensor | ctypes.Array
) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    """What both steps are given, among it addresses of memory that has to outlive the call."""
    channels = numbers.shape[1] if isinstance(numbers, Tensor) else len(numbers) // 4
    return (
        x.data_ptr(),
        grad.data_ptr(),
        x0.data_ptr(),
        out.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[grad.dtype],
        x.numel(),
        _address(numbers),
        channels,
        max(1, out.stride(1)) if channels > 1 else 1,
    )


def stem_step(
    dy: Tensor,  # [N, C_out, dy_H, dy_W], channels_last
    weight: Tensor,  # [C_out, 3, size, size]
    x: Tensor,  # [N, 3, H, W]
    out: Tensor,  # as x, in memory too
    bounds: list[float] | Tensor,  # [4 * 1] or [4 * 3], or [4, 3]
) -> None:
    """The step with bounds alpha, eps, lo and hi along the convolution's input gradient."""
    # the kernel copies 16 bytes at a time
    dy = dy if dy.data_ptr() % 16 == 0 else dy.clone()
    strides = (ctypes.c_int * 8)(*weight.stride(), *x.stride())
    if isinstance(bounds, list) and len(bounds) == 4:
        bounds = [value for value in bounds for _ in range(3)]
    numbers = _numbers(bounds)
    with _current_stream(x.device) as stream:
        _C.stem_step_cuda(
            dy.data_ptr(),
            weight.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            _DTYPES[dy.dtype],
            _DTYPES[weight.dtype],
            _DTYPES[x.dtype],
            x.shape[0],
            dy.shape[1],
            x.shape[2],
            x.shape[3],
            weight.shape[2],
            _address(strides),
            _address(numbers),
            isinstance(bounds, Tensor),
            stream,
        )


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """The stream to launch on, within which the GPU is the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _array(numbers: list[float] | list[int]) -> ctypes.Array:
    """Floats in fp32, or integers in 64 bits, on the CPU."""
    number: Any = ctypes.c_float if isinstance(numbers[0], float) else ctypes.c_int64
    return (number * len(numbers))(*numbers)


def _numbers(bounds: list[float] | Tensor) -> Tensor | ctypes.Array:
    """The bounds of a step where C++ finds them."""
    return bounds.contiguous() if isinstance(bounds, Tensor) else _array(bounds)


def _address(memory: Tensor | ctypes.Array | None) -> int:
    """Where `memory` begins, which has to outlive the call; 0 where there is none."""
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, Tensor) else ctypes.addressof(memory)


def _passed(value: object) -> object:
    """What C++ is given for an argument of `run`."""
    if isinstance(value, Rows):
        return value.z.data_ptr(), _DTYPES[value.z.dtype], value.z.stride(0)
    if value is None or isinstance(value, (Tensor, ctypes.Array)):
        return _address(value)
    return _DTYPES[value] if isinstance(value, torch.dtype) else value


def _in_workspace(call: Callable[[int], int], device: torch.device | str) -> None:
    """Calls a C++ function with a workspace, whose size it returns where it is called with 0."""
    workspace = torch.empty(call(0), dtype=torch.uint8, device=device)
    call(workspace.data_ptr())
