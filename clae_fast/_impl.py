"""Chooses which implementation of an op runs. Each op declares the ones that it has.

    "reference"  eager PyTorch, any dtype and device, differentiated by autograd: the specification
    "torch"      the closed-form gradient in torch ops, without an n x n buffer
    "native"     C++ on the CPU
    "triton"     Triton on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1
    "cuda"       CUDA C++
    "auto"       what CLAE_FAST_IMPL names, else the first of an op's implementations that can run

An explicit request, by argument or by CLAE_FAST_IMPL, never falls back to another implementation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from clae_fast import _native


class Limits(NamedTuple):
    """Which calls of an op an implementation takes, and which it is the best for.

    Both functions are called with the tensors and the options that `resolve` is called with.

    Attributes:
        refuses: Why the implementation cannot take a call, and "" where it can.
        outgrown: Whether a later implementation is faster for a call.
    """

    refuses: Callable[..., str] = lambda *_, **__: ""
    outgrown: Callable[..., bool] = lambda *_, **__: False


# the limits of an implementation that takes every call
ANY = Limits()

_DEFAULT = os.environ.get("CLAE_FAST_IMPL", "auto")
_DEVICES = {
    "torch": ("cpu", "cuda"),
    "native": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
}
_OPS: dict[str, dict[str, Limits]] = {}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# what an implementation lacks on this machine, and how to get it
_LACKS: dict[str, str] = {}
if not _native.has_cpu():
    _LACKS["native"] = "the compiled module: install clae_fast with CLAE_FAST_BUILD=auto"
if find_spec("triton") is None:
    _LACKS["triton"] = "triton: `pip install triton`"
if not _native.has_cuda():
    _LACKS["cuda"] = "CUDA C++ kernels: install clae_fast with CLAE_FAST_BUILD=cuda and nvcc"


def declare(op: str, **impls: Limits) -> None:
    """Make an op's implementations known; of those for one device the preferred comes first."""
    _OPS[op] = impls


def rows_of_at_most(columns: int) -> Limits:
    """The limits of a kernel that keeps whole rows of the first tensor on the chip."""

    def refuses(z: Tensor, *_: Tensor, **__: object) -> str:
        D = z.shape[1]
        return f"takes rows of at most {columns} elements, got {D}" if columns < D else ""

    return Limits(refuses)


def resolve(op: str, impl: str, *tensors: Tensor, **options: object) -> str:
    """The implementation of `op` that runs for a request `impl` on `tensors`, never "auto".

    Args:
        op: The op's name.
        impl: What the caller asks for.
        tensors: The operands that decide; the first one's device is where the op runs.
        options: What else the op's limits look at.

    Raises:
        ValueError: `impl` is no implementation's name, or does not take this call.
        RuntimeError: It was asked for by name, and does not exist for this op, device or machine.
        TypeError: It was asked for by name, and does not take these tensors' dtype.
    """
    impl = requested(impl)
    if impl == "reference":
        return impl
    device = tensors[0].device.type
    fp64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if impl == "auto":
        for impl in [] if fp64 else _automatic(op, device):
            limits = _OPS[op][impl]
            if not limits.refuses(*tensors, **options) and not limits.outgrown(*tensors, **options):
                return impl
        return "reference"
    if impl not in _DEVICES:
        names = ", ".join(("auto", "reference", *_DEVICES))
        raise ValueError(f"impl must be one of {names}, got {impl!r}")
    if impl not in _OPS[op]:
        names = ", ".join(("reference", *_OPS[op]))
        raise RuntimeError(f"{op} has no implementation {impl!r}, it has {names}")
    if impl in _LACKS:
        raise RuntimeError(f"impl={impl!r} needs {_LACKS[impl]}")
    if impl not in available(op, device):
        raise RuntimeError(f"impl={impl!r} does not run on {device} tensors")
    if fp64:
        raise TypeError(f"impl={impl!r} takes fp32, fp16 and bf16; fp64 needs impl='reference'")
    if refusal := _OPS[op][impl].refuses(*tensors, **options):
        raise ValueError(f"impl={impl!r} {refusal}")
    return impl


def requested(impl: str) -> str:
    """What the argument asks for or, where that is "auto", what CLAE_FAST_IMPL asks for."""
    return _DEFAULT if impl == "auto" else impl


def available(op: str, device: str) -> list[str]:
    """What can run `op` on a type of device besides the reference. The preferred comes first."""
    interpreted = ("triton",) if _INTERPRETED and device == "cpu" else ()
    return [
        impl
        for impl in _OPS[op]
        if (device in _DEVICES[impl] or impl in interpreted) and impl not in _LACKS
    ]


def describe(device: torch.device) -> str:
    """What the contrastive loss runs with on `device`, as in "native, avx2, 2 threads"."""
    impls = [_DEFAULT] if _DEFAULT != "auto" else _automatic("nt_xent", device.type)
    impls = impls or ["reference"]
    if device.type == "cuda":
        return ", ".join((*impls, torch.cuda.get_device_name(device)))
    threads = torch.get_num_threads()
    isa = f"{_native.isa()}, " if impls == ["native"] else ""
    return f"{impls[0]}, {isa}{threads} thread{'s' * (threads != 1)}"


def _automatic(op: str, device: str) -> list[str]:
    """What "auto" chooses from on a device: never the interpreter, which is for tests."""
    return [impl for impl in available(op, device) if device in _DEVICES[impl]]
