"""Compile every GPU kernel ahead of time, as its launcher would, on a machine without a GPU.

    python -m benchmarks.compile_kernels --targets 80,90,100

This prints registers a thread, bytes spilled a thread and static shared memory a block, for every
compute capability. It has a line for each Triton kernel at every default configuration and, if nvcc
is installed, for each kernel of csrc/*.cu. It exits with 1 if a kernel does not compile, spills, or
asks for more shared memory than every card since compute capability 8.0 grants.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# a kernel is compiled or interpreted, as decided where it is defined
os.environ.pop("TRITON_INTERPRET", None)
# what every Triton so far does; 3.9 warns where it is not told
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks._cli import Parser, int_list
from clae_fast import kernels

CSRC = Path(__file__).parents[1] / "csrc"
SHARED_LIMIT = 99 * 1024


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of every op's launchers that take its kernels through their default configurations.

    An op declares them beside its kernels, as `compilations`.
    """
    for info in pkgutil.iter_modules(kernels.__path__):
        if not info.name.startswith("_"):
            op = importlib.import_module(f"{kernels.__name__}.{info.name}")
            for case, call in op.compilations():
                yield f"{info.name} {case}", call


class Launch(NamedTuple):
    """A kernel, and what Triton compiles it for when a launcher calls it."""

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
    """Stands in for the driver of a GPU that is not there."""

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
    """What replaces the method that compiles a launch: it only notes the launch in `found`."""

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
        again = any(other.kernel is kernel and other.case == case for other in found)
        name = f"{case}, again" if again else case
        launch = Launch(name, kernel, signature, constants, attributes, options.__dict__)
        # what tells this case from those before may make no difference to this kernel
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


def report(targets: list[int], named: str) -> bool:
    """Compiles and prints the table; whether all is well."""
    print(f"triton {triton.__version__}: registers, bytes spilled, bytes of shared memory")
    title = "".join(f"{f'sm_{target}':>20}" for target in targets)
    print(f"{'kernel':<22}{'case':<34}{title}", flush=True)
    rows: dict[tuple[str, str], dict[int, Usage]] = {}
    failures = []
    # fresh processes: one that has used threads cannot be forked safely
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for (kernel, case, target), future in submitted(pool, targets, named).items():
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
        print(f"{kernel:<22}{case:<34}{cells}")
        well = well and all(usage.fits for usage in usages.values())
    for failure in failures:
        print(failure)
    print("all fit" if well else "some failed, spilled or take too much shared memory")
    return well


def submitted(
    pool: ProcessPoolExecutor, targets: list[int], named: str
) -> dict[tuple[str, str, int], Future[Any]]:
    """The compilations under way: kernel, or file, and case and target."""
    jobs: dict[tuple[str, str, int], Future[Any]] = {}
    sources = [path.name for path in sorted(CSRC.glob("*.cu")) if named in path.stem]
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
            if named in name:
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
