"""Compile every GPU kernel ahead of time, as its launcher would, on a machine without a GPU.

    python -m benchmarks.compile_kernels --targets 80,90,100

Prints registers a thread, bytes spilled a thread and static shared memory a block for each Triton
kernel at every default configuration, for each kernel of csrc/*.cu where nvcc is there, and each
compute capability; exits 1 where one does not compile, spills, or asks for more shared memory than
every card since compute capability 8.0 grants.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# a kernel is compiled or interpreted, as decided where it is defined
os.environ.pop("TRITON_INTERPRET", None)
# what every Triton so far does; 3.9 warns where it is not told
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks._cli import Parser, int_list
from clae_fast.kernels import (
    augment,
    bank_step,
    hard_nt_xent,
    info_nce,
    linf_step,
    nt_xent,
    tied_nt_xent,
    uel,
)
from clae_fast.ops.linf_step import _layout

CSRC = Path(__file__).parents[1] / "csrc"
SHARED_LIMIT = 99 * 1024
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the launchers that take every kernel through its default configurations."""
    empty = partial(torch.empty, device="meta")
    for D in (16, 64, 128, 256, 512, 1024):
        z = empty(2048, D, dtype=torch.float16)
        yield f"D={D}", partial(nt_xent.nt_xent_fwd_bwd, z, z, 0.5)
    for D in (128, 256):
        z = empty(2048, D, dtype=torch.float16)
        yield f"D={D} T=0.01", partial(nt_xent.nt_xent_fwd_bwd, z, z, 0.01)
    for D in (64, 128, 1024):
        z = empty(2048, D)
        yield f"D={D} exact", partial(nt_xent.nt_xent_fwd_bwd, z, z, 0.5, exact=True)
    z = empty(2048, 128, dtype=torch.float16)
    yield "D=128 tied", partial(tied_nt_xent.tied_nt_xent, z, 0.5)
    for case, symmetric, grads in (
        ("one way", False, (True, True)),
        ("queue", False, (True, False)),
        ("two-way", True, (True, True)),
    ):
        options = {"symmetric": symmetric, "grads": grads}
        yield f"D=128 {case}", partial(info_nce.info_nce, z, z, 0.5, **options)
    named = {"positive": empty(2048, dtype=torch.int64), "mean": False}
    for D, T in ((128, 0.5), (128, 0.01), (256, 0.5)):
        z = empty(2048, D, dtype=torch.float16)
        options = {"symmetric": False, "grads": (True, True), "weight": empty(2048), **named}
        yield f"D={D} T={T} rows", partial(info_nce.info_nce, z, z, T, **options)
    widths = (64, 128, 256, 512)
    for D, exact in (*zip(widths, (False,) * 4, strict=True), (64, True), (128, True)):
        z = empty(256, D, dtype=torch.float32 if exact else torch.float16)
        bank, names, rows = empty(4096, D), empty(256, dtype=torch.int64), empty(256)
        numbers = (empty(()), 1, 0.02, 0.9, 1e-4, exact)
        for case, given in (
            ("keys", (z, None, None, None)),
            ("named", (None, names, rows, None)),
            ("losses", (None, names, None, rows)),
        ):
            yield (
                f"D={D}{exact * ' exact'} {case}",
                partial(bank_step.bank_step, bank, bank, z, *given, *numbers),
            )
    for D, exact in ((64, False), (128, False), (128, True), (256, False)):
        z = empty(2048, D, dtype=torch.float32 if exact else torch.float16)
        yield f"D={D}{exact * ' exact'}", partial(uel.uel, z, z, 0.5, True, exact=exact)
    for D, exact in ((64, False), (128, False), (128, True), (256, False)):
        z = empty(2048, D, dtype=torch.float32 if exact else torch.float16)
        for case, *setting in (("", 0.5, 1.0), (" T=0.01", 0.01, 1.0), (" beta=0", 0.5, 0.0)):
            call = partial(hard_nt_xent.hard_nt_xent, z, z, *setting, 0.1, False, True, exact)
            yield f"D={D}{exact * ' exact'}{case}", call
    for name, dtype in DTYPES.items():
        x = empty(64, 3, 32, 32, dtype=dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        one, three = ((0.1,),) * 4, ((0.1, 0.2, 0.3),) * 4
        for case, grad, x0, bounds in (
            ("", x, None, one),
            (" per channel, x0", x, x, three),
            (" table", x, None, empty(4, 3)),
            (" channels_last", last, last, three),
        ):
            layout = _layout(x, x, grad, x if x0 is None else x0)
            yield f"{name}{case}", partial(linf_step.linf_step, x, grad, x0, x, bounds, layout)
    for size in (32, 224):
        images = empty(1000, 3, size, size, dtype=torch.uint8)
        ids, params = empty(64, dtype=torch.int64), empty(2, 64, 16)
        out = empty(128, 3, size, size)
        last = out.half().contiguous(memory_format=torch.channels_last)
        plain = (images, None, None, params, None, out, out, None, False)
        yield f"{size}", partial(augment.augment, *plain)
        all_of_it = (params, ids, last, last, (0.5,) * 6, True)
        yield (
            f"{size} bicubic fp16 rows norm",
            partial(augment.augment, images, None, None, *all_of_it),
        )
        ragged = (images.flatten(), empty(1000, dtype=torch.int64))
        ragged += (empty(1000, 2, dtype=torch.int64),)
        yield f"{size} the same, ragged", partial(augment.augment, *ragged, *all_of_it)


class Launch(NamedTuple):
    """A kernel as Triton specialises it for what a launcher gave it."""

    case: str
    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and every card has the memory."""
        return self.spilled == 0 and self.shared <= SHARED_LIMIT

    def __str__(self) -> str:
        return f"{self.registers} {self.spilled:>5} {self.shared:>7}"


class _Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_device(self) -> int:
        """Triton caches by device what it knows of the target."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@functools.cache
def launches(target: int) -> list[Launch]:
    """Every kernel at every default configuration, as Triton would compile it for a launch."""
    found: list[Launch] = []
    driver.set_active(_Absent(target))
    for case, call in cases():
        with mock.patch.object(JITFunction, "_do_compile", _recorder(case, found)):
            call()
    return found


def _recorder(case: str, found: list[Launch]) -> Callable[..., None]:
    """In place of the method that compiles what is launched."""

    def record(
        kernel: JITFunction,
        key: str,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        launch = Launch(case, kernel, signature, constants, attributes, options.__dict__)
        # not every kernel depends on what tells this case from the ones before
        if all(launch[1:] != other[1:] for other in found):
            found.append(launch)

    return record


def compile_launch(index: int, target: int) -> Usage:
    """Usage of the kernel of launches(target)[index]."""
    _, kernel, signature, constants, attributes, options = launches(target)[index]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(file.name).values()
    # what the launch adds is in no file
    return usage._replace(shared=compiled.metadata.shared)


def compile_source(name: str, target: int) -> dict[str, Usage]:
    """Usage of every kernel of a file of csrc/, by its name and template arguments."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{target}", "-cubin"]
        result = subprocess.run(
            [*command, str(CSRC / name), "-o", file.name],
            check=False,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"nvcc: {result.stderr.strip()}")
        return resource_usage(file.name)


def resource_usage(cubin: str) -> dict[str, Usage]:
    """What every kernel of a file takes, shared memory without the dynamic."""
    command = [nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usages = {}
    for name, line in re.findall(r"Function (\S+):\s*(.*)", text):
        numbers = {key: int(number) for key, number in re.findall(r"\b([A-Z]+):(\d+)", line)}
        # nothing here has an array or a call, so what is on the stack was spilled
        spilled = numbers["STACK"] + numbers["LOCAL"]
        usages[demangled(name)] = Usage(numbers["REG"], spilled, numbers["SHARED"])
    return usages


def demangled(symbol: str) -> str:
    """A C++ kernel's name and template arguments; a Triton kernel's name."""
    text = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\w+(<.*>)?)\(.*\)$", text.strip())
    name = match[1] if match else symbol
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = name.replace(long, short)
    return name


def report(targets: list[int], kernels: str) -> bool:
    """Compiles and prints the table; whether all is well."""
    print(f"triton {triton.__version__}: registers, bytes spilled, bytes of shared memory")
    title = "".join(f"{f'sm_{target}':>20}" for target in targets)
    print(f"{'kernel':<28}{'case':<28}{title}", flush=True)
    rows: dict[tuple[str, str], dict[int, Usage]] = {}
    failures = []
    # fresh processes: one that has used threads cannot be forked safely
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for (kernel, case, target), future in submitted(pool, targets, kernels).items():
            try:
                result = future.result()
            except Exception as error:  # whatever the compiler raises is the result
                failures.append(f"{kernel}, {case}, sm_{target}: {type(error).__name__}: {error}")
                continue
            if isinstance(result, Usage):
                rows.setdefault((kernel, case), {})[target] = result
                continue
            for instance, usage in result.items():
                name, _, arguments = instance.partition("<")
                rows.setdefault((name, f"<{arguments}"), {})[target] = usage
    well = not failures
    for (kernel, case), usages in rows.items():
        cells = "".join(f"{usages.get(target, '-')!s:>20}" for target in targets)
        print(f"{kernel:<28}{case:<28}{cells}")
        well = well and all(usage.fits for usage in usages.values())
    for failure in failures:
        print(failure)
    print("all fit" if well else "some failed, spilled or take too much shared memory")
    return well


def submitted(
    pool: ProcessPoolExecutor, targets: list[int], kernels: str
) -> dict[tuple[str, str, int], Future[Any]]:
    """The compilations under way: kernel, or file, and case and target."""
    jobs: dict[tuple[str, str, int], Future[Any]] = {}
    sources = [path.name for path in sorted(CSRC.glob("*.cu")) if kernels in path.stem]
    if shutil.which("nvcc") is None:
        print("nvcc is not there: csrc/*.cu is not compiled")
        sources = []
    for target in targets:
        # these take longest
        for name in sources:
            jobs[name, "", target] = pool.submit(compile_source, name, target)
    for target in targets:
        for index, launch in enumerate(launches(target)):
            name = launch.kernel.__name__.strip("_")
            if kernels in name:
                jobs[name, launch.case, target] = pool.submit(compile_launch, index, target)
    return jobs


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m benchmarks.compile_kernels", description=__doc__)
    parser.add_argument("--targets", type=int_list, default=[80, 90, 100], metavar="80,90,100")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only those named so")
    args = parser.parse_args(argv)
    return 0 if report(args.targets, args.kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
