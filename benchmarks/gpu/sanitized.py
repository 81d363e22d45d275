"""Runs every kernel of the package once, at sizes that no tile divides, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized cuda
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.case import Case
from benchmarks.cases import CASES
from clae_fast import _impl

CHANNELS = (0.01, 0.02, 0.03)
LAYOUTS = [
    (torch.contiguous_format, gradient)
    for gradient in (torch.contiguous_format, torch.channels_last)
]


def cases() -> Iterator[tuple[str, Case]]:
    """Every op with a kernel on a GPU, and a case of it."""
    for D in (72, 128):
        for T in (0.5, 0.01):
            yield "nt_xent", CASES["nt_xent"](150, D, T)
            yield "info_nce", CASES["pairs"](75, D, T)
            yield "tied_nt_xent", CASES["tied"](75, D, T)
        yield "uel", CASES["uel"](150, D)
        yield "hard_nt_xent", CASES["hard"](150, D)
        yield "bank_step", CASES["bank"](75, 75, D)
    for layouts, eps in itertools.product(LAYOUTS, (0.03, CHANNELS)):
        yield "linf_step", CASES["linf_step"]((5, 3, 11, 13), torch.float32, eps, layouts)


def main(device: str) -> int:
    for op, case in cases():
        for impl in _impl.available(op, device):
            operands = case.inputs(torch.float32, torch.device(device), 0)
            case.call(partial(case.op, impl=impl), operands)
    for method in ("caco", "adco"):
        case = CASES["batch"](method, 75, 75, 72)
        case.call(case.op, case.inputs(torch.float32, torch.device(device), 0))
    for size, stride, padding in ((3, 1, 1), (7, 2, 3)):
        case = CASES["stem"](5, 11, size, stride, padding)
        case.call(case.op, case.inputs(torch.float32, torch.device(device), 0))
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    print("ran every kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
