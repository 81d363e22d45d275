"""Compile every Triton kernel ahead of time, as its launcher would, on a machine without a GPU.

    python -m benchmarks.compile_kernels --targets 80,90,100

Prints registers a thread, bytes spilled a thread and shared memory a block for each kernel and
compute capability; exits 1 where one does not compile, spills, or asks for more shared memory than
every card since compute capability 8.0 grants.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

# a kernel is compiled or interpreted, as decided where it is defined
os.environ.pop("TRITON_INTERPRET", None)
# what every Triton so far does; 3.9 warns where it is not told
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from triton.runtime.jit import JITFunction, mangle_type

from benchmarks._cli import Parser, int_list
from clae_fast.kernels import linf_step, nt_xent

SHARED_LIMIT = 99 * 1024
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# every width of a tile, and the last one with rows that are not aligned
DIMENSIONS = (16, 32, 64, 128, 256, 512, 1024, 1023)


class Launch(NamedTuple):
    """A kernel as it is specialised for what a launcher gave it."""

    case: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    options: dict[str, int]  # num_warps, num_stages


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and every card has the memory."""
        return self.spilled == 0 and self.shared <= SHARED_LIMIT


@functools.cache
def launches() -> list[Launch]:
    """Every kernel at every default configuration, as the launchers call it."""
    found: list[Launch] = []
    for name, dtype in DTYPES.items():
        for D in DIMENSIONS:
            z = torch.empty(2048, D, dtype=dtype, device="meta")
            with _recorded(nt_xent, f"{name} D={D}", found):
                nt_xent.nt_xent_fwd_bwd(z, z, 0.5)
            with _recorded(nt_xent, f"{name} D={D} T=0.01", found):
                nt_xent.nt_xent_fwd(z, z, 0.01)
        x = torch.empty(64, 3, 32, 32, dtype=dtype, device="meta")
        per_channel = torch.empty(4, 3, device="meta")
        with _recorded(linf_step, f"{name}", found):
            linf_step.linf_step(x, x, None, 0.1, 0.1, 0.0, 1.0)
        with _recorded(linf_step, f"{name} per channel, x0", found):
            linf_step.linf_step(x, x, x, *per_channel)
    return found


@contextmanager
def _recorded(module: ModuleType, case: str, found: list[Launch]) -> Iterator[None]:
    """Within, the kernels of `module` are not launched but added to `found`."""
    with ExitStack() as stack:
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(module, name, _Recorder(value, case, found)))
        yield


class _Recorder:
    def __init__(self, kernel: JITFunction, case: str, found: list[Launch]) -> None:
        self.kernel, self.case, self.found = kernel, case, found

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.signature(self.kernel.fn)
        options = {key: kwargs.pop(key) for key in list(kwargs.keys() - parameters.parameters)}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}
        # as Triton does at a launch: on None, on 1 and on multiples of 16
        for position, (name, value) in enumerate(
            parameters.bind(*args, **kwargs).arguments.items()
        ):
            is_int = isinstance(value, int)
            if (
                self.kernel.params[position].is_constexpr
                or value is None
                or (is_int and value == 1)
            ):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if isinstance(value, Tensor) or (is_int and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        launch = Launch(self.case, self.kernel, signature, constants, attributes, options)
        # not every kernel depends on what tells this case from the ones before
        if all(launch[1:] != other[1:] for other in self.found):
            self.found.append(launch)


def compile_launch(index: int, target: int) -> Usage | str:
    """Usage of the kernel of launches()[index] for a compute capability, or why it has none."""
    _, kernel, signature, constants, attributes, options = launches()[index]
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
    except Exception as error:  # whatever the compiler raises is the result
        return f"{type(error).__name__}: {error}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # nothing here has an array or a call, so what is on the stack was spilled
    numbers = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared)


def report(targets: list[int], kernels: str) -> bool:
    """Compiles and prints the table; whether all is well."""
    indices = [i for i, launch in enumerate(launches()) if kernels in launch.kernel.__name__]
    jobs = [(index, target) for index in indices for target in targets]
    print(f"triton {triton.__version__}: registers, bytes spilled, bytes of shared memory")
    title = "".join(f"{f'sm_{target}':>20}" for target in targets)
    print(f"{'kernel':<28}{'case':<22}{title}", flush=True)
    well = True
    # fresh processes: one that has used threads cannot be forked safely
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = dict(zip(jobs, pool.map(compile_launch, *zip(*jobs, strict=True)), strict=True))
    for index in indices:
        launch = launches()[index]
        cells = []
        for target in targets:
            usage = results[index, target]
            if isinstance(usage, str):
                print(f"{launch.kernel.__name__}, {launch.case}, sm_{target}: {usage}")
                well, cell = False, "failed"
            else:
                well, cell = well and usage.fits, "{} {:>5} {:>7}".format(*usage)
            cells.append(f"{cell:>20}")
        print(f"{launch.kernel.__name__.strip('_'):<28}{launch.case:<22}{''.join(cells)}")
    print("all fit" if well else "some failed, spilled or take too much shared memory")
    return well


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m benchmarks.compile_kernels", description=__doc__)
    parser.add_argument("--targets", type=int_list, default=[80, 90, 100], metavar="80,90,100")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only those named so")
    args = parser.parse_args(argv)
    return 0 if report(args.targets, args.kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
