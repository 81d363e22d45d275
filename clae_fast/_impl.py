"""Which implementation of an op runs. Decided here and nowhere else.

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
from importlib.util import find_spec

import torch
from torch import Tensor

from clae_fast import _native

_DEFAULT = os.environ.get("CLAE_FAST_IMPL", "auto")

# the preferred one of a device comes first
_IMPLS = {
    "nt_xent": ("native", "cuda", "triton"),
    "tied_nt_xent": ("native", "triton", "torch"),
    "info_nce": ("native", "triton", "torch"),
    "uel": ("native", "triton", "torch"),
    "hard_nt_xent": ("native", "triton", "torch"),
    "hard_nt_xent with extra": ("torch",),
    "sup_con": ("torch",),
    "h_scl": ("torch",),
    "bank_step": ("native", "triton", "torch"),
    "topk_similarity": ("native", "torch"),
    "linf_step": ("native", "triton", "cuda"),
    "stem_step": ("cuda",),
    "augment": ("native", "triton"),
}
_DEVICES = {
    "torch": ("cpu", "cuda"),
    "native": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
}
_ON_IMAGES = ("linf_step", "stem_step", "augment")
# the widest accumulators that stay in registers, where they are not of 1024 columns
_TRITON_COLUMNS = {"uel": 256, "hard_nt_xent": 256}
# up to here one launch of NT-Xent is taken to beat three; not measured yet
_SINGLE_LAUNCH_ROWS = 2048
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# what an implementation lacks on this machine, and how to get it
_LACKS: dict[str, str] = {}
if not _native.has_cpu():
    _LACKS["native"] = "the compiled module: install clae_fast with CLAE_FAST_BUILD=auto"
if find_spec("triton") is None:
    _LACKS["triton"] = "triton: `pip install triton`"
if not _native.has_cuda():
    _LACKS["cuda"] = "CUDA C++ kernels: install clae_fast with CLAE_FAST_BUILD=cuda and nvcc"


def resolve(op: str, impl: str, *tensors: Tensor, exact: bool = False) -> str:
    """The implementation of `op` that runs for a request `impl` on `tensors`, never "auto".

    Raises:
        ValueError: `impl` is no implementation's name, or does not take these sizes.
        RuntimeError: It was asked for by name, and does not exist for this op, device or machine.
        TypeError: It was asked for by name, and does not take these tensors' dtype.
    """
    impl = requested(impl)
    if impl == "reference":
        return impl
    device = tensors[0].device.type
    fp64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if impl == "auto":
        return "reference" if fp64 else _preferred(op, tensors, exact)
    if impl not in _DEVICES:
        names = ", ".join(("auto", "reference", *_DEVICES))
        raise ValueError(f"impl must be one of {names}, got {impl!r}")
    if impl not in _IMPLS[op]:
        names = ", ".join(("reference", *_IMPLS[op]))
        raise RuntimeError(f"{op} has no implementation {impl!r}, it has {names}")
    if impl in _LACKS:
        raise RuntimeError(f"impl={impl!r} needs {_LACKS[impl]}")
    if impl not in available(op, device):
        raise RuntimeError(f"impl={impl!r} does not run on {device} tensors")
    if fp64:
        raise TypeError(f"impl={impl!r} takes fp32, fp16 and bf16; fp64 needs impl='reference'")
    if refusal := _refusal(op, impl, tensors, exact):
        raise ValueError(f"impl={impl!r} {refusal}")
    return impl


def requested(impl: str) -> str:
    """What is asked for by argument or, where that is "auto", by CLAE_FAST_IMPL."""
    return _DEFAULT if impl == "auto" else impl


def available(op: str, device: str) -> list[str]:
    """What can run `op` on tensors of a device type besides the reference, the preferred first."""
    interpreted = ("triton",) if _INTERPRETED and device == "cpu" else ()
    return [
        impl
        for impl in _IMPLS[op]
        if (device in _DEVICES[impl] or impl in interpreted) and impl not in _LACKS
    ]


def describe(device: torch.device) -> str:
    """What the contrastive loss runs with on `device`, as in "native, avx2, 2 threads"."""
    impls = [_DEFAULT] if _DEFAULT != "auto" else _on(device.type, "nt_xent") or ["reference"]
    if device.type == "cuda":
        return ", ".join((*impls, torch.cuda.get_device_name(device)))
    threads = torch.get_num_threads()
    isa = f"{_native.isa()}, " if impls == ["native"] else ""
    return f"{impls[0]}, {isa}{threads} thread{'s' * (threads != 1)}"


def _preferred(op: str, tensors: tuple[Tensor, ...], exact: bool) -> str:
    """What "auto" means for these tensors."""
    for impl in _on(tensors[0].device.type, op):
        if not _refusal(op, impl, tensors, exact) and not _outgrown(op, impl, tensors):
            return impl
    return "reference"


def _on(device: str, op: str) -> list[str]:
    """What "auto" chooses from on a device: never the interpreter."""
    return [impl for impl in available(op, device) if device in _DEVICES[impl]]


def _refusal(op: str, impl: str, tensors: tuple[Tensor, ...], exact: bool) -> str:
    """Why an implementation does not take these rows, "" where it does."""
    if op in _ON_IMAGES:
        return ""
    N, D = tensors[0].shape
    columns = _TRITON_COLUMNS.get(op, 1024)
    if impl == "triton" and columns < D:
        return f"takes rows of at most {columns} elements, got {D}"
    if op == "nt_xent" and impl == "cuda":
        if exact:
            return "rounds rows to fp16: exact=True needs impl='triton'"
        if not _native.nt_xent_cuda_takes(2 * N, D):
            return f"takes few and narrow rows, got {2 * N} of {D} elements"
    return ""


def _outgrown(op: str, impl: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether a later implementation is faster at this size."""
    return op == "nt_xent" and impl == "cuda" and 2 * len(tensors[0]) > _SINGLE_LAUNCH_ROWS
