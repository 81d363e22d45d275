"""The compiled module: the only importer of `_C` and the only place that takes addresses.

Python owns allocation, contiguity and dtype; C++ owns arithmetic.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """The loss [] and the gradient [2N, D], d z0 above d z1, both in fp32.

    As everywhere here, a gradient that is not wanted is a tensor of shape [0].
    """
    return _of_two_views(_C.nt_xent, z0, z1, (temperature,), grad)


def uel(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """As `nt_xent`."""
    return _of_two_views(_C.uel, z0, z1, (temperature,), grad)


def hard_nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    beta: float,
    tau_plus: float,
    detach_weights: bool,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """As `nt_xent`."""
    numbers = (temperature, beta, tau_plus, detach_weights)
    return _of_two_views(_C.hard_nt_xent, z0, z1, numbers, grad)


def _of_two_views(
    function: Callable[..., int], z0: Tensor, z1: Tensor, numbers: tuple[float, ...], grad: bool
) -> tuple[Tensor, Tensor]:
    z0, z1 = _in_rows(z0), _in_rows(z1)
    N, D = z0.shape
    loss, dz = _outputs(z0, (), (2 * N, D) if grad else 0)
    threads = torch.get_num_threads()
    _run(function, _isa, _rows(z0), _rows(z1), N, D, *numbers, threads, loss, dz)
    return loss, dz


def tied_nt_xent(
    z: Tensor,  # [N, D]
    temperature: float,
) -> Tensor:
    """The gradient in fp32, [N, D]."""
    z = _in_rows(z)
    (dz,) = _outputs(z, z.shape)
    _run(_C.tied_nt_xent, _isa, _rows(z), *z.shape, temperature, torch.get_num_threads(), dz)
    return dz


def info_nce(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    temperature: float,
    symmetric: bool,
    mean: bool,
    grad_anchor: bool,
    grad_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, [] or [N], and the gradients [N, D] and [M, D], all in fp32."""
    anchor, keys = _in_rows(anchor), _in_rows(keys)
    positive, weight = _in_one_piece(positive, weight)
    N, D = anchor.shape
    M = len(keys)
    shapes = (() if mean else N, (N, D) if grad_anchor else 0, (M, D) if grad_keys else 0)
    loss, danchor, dkeys = _outputs(anchor, *shapes)
    operands = (_rows(anchor), _rows(keys), positive, weight, N, M, D)
    numbers = (temperature, symmetric, mean, torch.get_num_threads())
    _run(_C.info_nce, _isa, *operands, *numbers, loss, danchor, dkeys)
    return loss, danchor, dkeys


def bank_step(
    bank: Tensor,  # [K, D], contiguous, as the velocity
    velocity: Tensor,  # [K, D]
    anchor: Tensor,  # [N, D]
    keys: Tensor | None,  # [N, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    losses: Tensor | None,  # [N]
    lr: Tensor,  # []
    views: int,
    temperature: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """The step in place."""
    anchor = _in_rows(anchor)
    keys = anchor if keys is None else _in_rows(keys)
    given = _in_one_piece(positive, weight, losses)
    operands = (bank, velocity, _rows(anchor), _rows(keys), *given, len(bank), *anchor.shape)
    numbers = (views, temperature, float(lr), momentum, weight_decay)
    _run(_C.bank_step, _isa, *operands, *numbers, torch.get_num_threads())


def topk_similarity(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    exclude: Tensor | None,  # [N, E]
) -> tuple[Tensor, Tensor]:
    """The values in fp32 and their columns, [N, k] both."""
    anchor, keys = _in_rows(anchor), _in_rows(keys)
    (exclude,) = _in_one_piece(exclude)
    N, D = anchor.shape
    E = 0 if exclude is None else exclude.shape[1]
    (values,) = _outputs(anchor, (N, k))
    indices = torch.empty((N, k), dtype=torch.int64)
    operands = (_rows(anchor), _rows(keys), exclude, N, len(keys), D, E)
    _run(_C.topk_similarity, _isa, *operands, k, torch.get_num_threads(), values, indices)
    return values, indices


def augment(
    images: Tensor,  # [S, 3, H, W] or [bytes]
    offsets: Tensor | None,  # [S]
    sizes: Tensor | None,  # [S, 2]
    params: Tensor,  # [2, N, 16]
    rows: Tensor | None,  # [N]
    out: Tensor,  # [2N, 3, size, size]
    norm: list[float],  # [0] or [6]
    bicubic: bool,
) -> None:
    """Both views of each sample to `out`; rows and crops are inside the images."""
    offsets, sizes, rows = _in_one_piece(offsets, sizes, rows)
    strides = (ctypes.c_int64 * 4)(*(images.stride() if offsets is None else ()))
    N, size = len(out) // 2, out.shape[-1]
    operands = (images, strides, offsets, sizes, params.contiguous(), rows, N, size, bicubic)
    results = (_numbers(norm) if norm else None, _DTYPES[out.dtype], out.stride(1) == 1)
    _run(_C.augment, _isa, *operands, *results, torch.get_num_threads(), out)


def nt_xent_cuda_takes(n: int, D: int) -> bool:
    """Whether `nt_xent_cuda` takes n = 2N rows of D elements: shared memory is the limit."""
    return n <= (4096 if D <= 128 else 2048) and D <= 256


def nt_xent_cuda(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """As `nt_xent`, in one launch on the tensors' GPU; fp32, fp16 or bf16 in any strides."""
    N, D = z0.shape
    loss, dz = _outputs(z0, (), (2 * N, D) if grad else 0)
    operands = (z0, z1, _DTYPES[z0.dtype], *z0.stride(), *z1.stride(), N, D)
    with _current_stream(z0) as stream:
        _run(_C.nt_xent_cuda, *operands, temperature, loss, dz, last=(stream,))
    return loss, dz


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
    with _current_stream(x) as stream:
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
    with _current_stream(x) as stream:
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
def _current_stream(tensor: Tensor) -> Iterator[int]:
    """The stream to launch on, within which the tensor's GPU is the current one."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def _in_rows(z: Tensor) -> Tensor:
    """`z` with each row in one piece, itself where it is that already."""
    return z if z.stride(1) == 1 else z.contiguous()


def _in_one_piece(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each of them contiguous, itself where it is that already."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _rows(z: Tensor) -> tuple[int, int, int]:
    """What C++ knows of `z`, which has to outlive the call."""
    return z.data_ptr(), _DTYPES[z.dtype], z.stride(0)


def _numbers(bounds: list[float] | Tensor) -> Tensor | ctypes.Array:
    """The bounds of a step where C++ finds them: a tensor, or an array on the CPU in fp32."""
    if isinstance(bounds, Tensor):
        return bounds.contiguous()
    return (ctypes.c_float * len(bounds))(*bounds)


def _address(memory: Tensor | ctypes.Array | None) -> int:
    """Where `memory` begins, which has to outlive the call; 0 where there is none."""
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, Tensor) else ctypes.addressof(memory)


def _outputs(z: Tensor, *shapes: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Memory beside `z` for results in fp32; no elements have the address 0 in C++."""
    return tuple(z.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _run(function: Callable[..., int], *arguments: object, last: tuple[int, ...] = ()) -> None:
    """Calls a function of C++ with a workspace after `arguments`, and `last` after that.

    Without a workspace, which is the address 0, the function returns how many bytes it needs.
    Tensors and arrays are passed as their addresses.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    passed = [
        _address(value) if value is None or isinstance(value, (Tensor, ctypes.Array)) else value
        for value in arguments
    ]
    workspace = tensors[0].new_empty(function(*passed, 0, *last), dtype=torch.uint8)
    function(*passed, workspace.data_ptr(), *last)
