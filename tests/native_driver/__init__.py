"""Runs csrc/ as a program of its own, built by other compilers and for other processors.

`bindings.cpp` is compiled against the header in this folder instead of pybind11, and linked with
`driver.cpp` to a program without Python that is called through a pipe. A `Module` makes these calls
in the place of `_C`, so that the functions of `_native`, and with them the public ops, run in that
program. Nothing here knows a particular op.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import runpy
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from clae_fast import _native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"


class Toolchain(NamedTuple):
    """How to compile a driver and how to run it."""

    compiler: str
    flags: tuple[str, ...]
    # the flags of every instruction set
    isas: dict[str, str]
    runner: tuple[str, ...] = ()
    # what to install where something is missing
    packages: str = "g++"

    def missing(self) -> str:
        """A sentence that says what this machine lacks for it, or "" if it lacks nothing."""
        for program in (self.compiler, *self.runner):
            if shutil.which(program) is None:
                return f"needs {program}: install {self.packages}"
        return ""


@functools.cache
def isas(machine: str = platform.machine()) -> dict[str, str]:
    """The compiler's flags for each instruction set of a kind of machine, from setup.py."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))["ISAS"].get(machine, {"portable": ""})


def cross() -> Toolchain:
    """NEON, run by an emulator of the processor."""
    return Toolchain(
        "aarch64-linux-gnu-g++",
        ("-static",),
        isas("aarch64"),
        ("qemu-aarch64-static",),
        "g++-aarch64-linux-gnu and qemu-user-static, as Debian names them",
    )


def emulated() -> Toolchain:
    """The instruction sets that this processor lacks, emulated with vectors of their width."""
    baseline, *_ = isas()
    # whoever asks what the processor supports is told yes
    flags = ("-D__builtin_cpu_supports(name)=true",)
    return Toolchain("g++", flags, {baseline: "-O0", **_lacking()})


def sanitized(kinds: str) -> Toolchain:
    """The narrowest and the widest instruction set under sanitizers such as "address,undefined".

    The others differ from these two only in the width of their vectors.
    """
    flags = ("-g1", f"-fsanitize={kinds}", "-fno-sanitize-recover=all", *emulated().flags)
    every = isas() | _lacking()
    baseline, *_, widest = every
    return Toolchain("g++", flags, {isa: every[isa] for isa in (baseline, widest)})


def _lacking() -> dict[str, str]:
    bf16 = "-DCLAE_FAST_WIDTH=16 -DCLAE_FAST_DOT_BF16"
    macros = {"avx2": "-DCLAE_FAST_WIDTH=8", "avx512": "-DCLAE_FAST_WIDTH=16", "avx512_bf16": bf16}
    # -O0, because optimizing wide vectors in narrow registers takes long
    return {isa: f"-O0 -march=native {macros[isa]}" for isa in isas() if isa not in _native.isas()}


def build(toolchain: Toolchain, cache: Path) -> Path:
    """The driver's program in `cache`. It is built again only if something has changed."""
    sources = [*CSRC.glob("*.cpp"), HERE / "driver.cpp"]
    others = [*CSRC.glob("*.h"), *HERE.rglob("*.h"), HERE / "libgomp.cpp", Path(__file__)]
    macros = [f"-DCLAE_FAST_HAS_{isa.upper()}" for isa in toolchain.isas]
    command = [toolchain.compiler, *_CXXFLAGS, *macros, *toolchain.flags]
    version = subprocess.run([toolchain.compiler, "--version"], capture_output=True, check=True)
    digest = hashlib.sha256(version.stdout + repr((command, toolchain.isas)).encode())
    for path in sorted(sources + others):
        digest.update(path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    if folder.exists():
        return folder / "driver"
    with tempfile.TemporaryDirectory(dir=cache) as scratch, ThreadPoolExecutor(2) as pool:
        units = []
        for source in sources:
            if not source.stem.endswith("_simd"):
                units.append((source, [], source.stem))
                continue
            for isa, flags in toolchain.isas.items():
                options = [*flags.split(), f"-DCLAE_FAST_ISA={isa}"]
                units.append((source, options, f"{source.stem}.{isa}"))
        objects = [Path(scratch, f"{name}.o") for *_, name in units]
        compiled = pool.map(
            lambda unit, target: _run(*command, *unit[1], "-c", unit[0], "-o", target),
            units,
            objects,
        )
        list(compiled)
        built = Path(scratch, "built")
        built.mkdir()
        threads = []
        if "-static" not in toolchain.flags:
            flags = ("-shared", "-Wl,-soname,libgomp.so")
            _run(*command, *flags, HERE / "libgomp.cpp", "-o", built / "libgomp.so")
            threads = ["-Wl,--no-as-needed", built / "libgomp.so", "-Wl,-rpath,$ORIGIN"]
        _run(*command, *objects, *threads, "-o", built / "driver")
        built.rename(folder)
    return folder / "driver"


# the flags of setup.py, but with -O1 to compile faster
_CXXFLAGS = (
    *("-O1", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fno-trapping-math", "-Wno-psabi", "-I", str(HERE), '-DCLAE_FAST_VERSION="driver"'),
)


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


class Module:
    """Takes the place of the compiled module, and runs its functions in a driver's process."""

    def __init__(self, program: Path, runner: tuple[str, ...] = ()) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*runner, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: object) -> Any:
        """Send a call, copy back the memory that it wrote to, and return what it returned."""
        arguments = tuple(_flat(arguments))
        memories = {
            int(argument): argument for argument in arguments if isinstance(argument, _Address)
        }
        sent = [memory.read() for memory in memories.values()]
        parts = [_text(name), _integer(len(memories))]
        for address, content in zip(memories, sent, strict=True):
            parts += [_integer(address % 64), _integer(len(content)), content]
        parts.append(_integer(len(arguments)))
        for argument in arguments:
            if isinstance(argument, _Address):
                parts += [b"p", _integer([*memories].index(argument))]
            elif isinstance(argument, int):
                parts += [b"i", _integer(argument)]
            elif isinstance(argument, float):
                parts += [b"f", struct.pack("d", argument)]
            else:
                parts += [b"s", _text(argument)]
        try:
            self._process.stdin.write(b"".join(parts))
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died(name)
        result = self._read_result(name)
        for memory, content in zip(memories.values(), sent, strict=True):
            received = self._read(len(content), name)
            # memory that did not change is left alone, because an input may overlap with an output
            if received != content:
                memory.write(received)
        return result

    def _read_result(self, name: str) -> Any:
        kind = self._read(1, name)
        if kind == b"n":
            return None
        if kind == b"i":
            return self._read_integer(name)
        if kind == b"l":
            return [self._read_text(name) for _ in range(self._read_integer(name))]
        raise RuntimeError(self._read_text(name))

    def _read_integer(self, name: str) -> int:
        return int.from_bytes(self._read(8, name), "little", signed=True)

    def _read_text(self, name: str) -> str:
        return self._read(self._read_integer(name), name).decode()

    def _read(self, size: int, name: str) -> bytes:
        content = self._process.stdout.read(size)
        if len(content) < size:
            self._died(name)
        return content

    def _died(self, name: str) -> None:
        self._process.wait()
        self._stderr.seek(0)
        raise AssertionError(f"the driver ended in {name}:\n{self._stderr.read()}")


def _flat(arguments: Iterable[object]) -> Iterator[object]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument


def _integer(value: int) -> bytes:
    return struct.pack("<q", value)


def _text(text: object) -> bytes:
    return _integer(len(str(text))) + str(text).encode()


class _Address(int):
    """An address that knows what is there: the memory of a tensor or of a ctypes array."""

    size: int
    owner: object

    @classmethod
    def of(cls, address: int, size: int, owner: object) -> _Address:
        self = cls(address)
        self.size, self.owner = size, owner
        return self

    def read(self) -> bytes:
        return ctypes.string_at(self, self.size)

    def write(self, content: bytes) -> None:
        ctypes.memmove(self, content, self.size)


@contextmanager
def addresses_with_sizes() -> Iterator[None]:
    """Make the functions that take addresses return ones that a `Module` can follow."""
    data_ptr, addressof = Tensor.data_ptr, ctypes.addressof

    def tensor_address(tensor: Tensor) -> int:
        if tensor.numel() == 0:
            return data_ptr(tensor)
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in strides)
        return _Address.of(data_ptr(tensor), elements * tensor.element_size(), tensor)

    def array_address(array: Any) -> _Address:
        return _Address.of(addressof(array), ctypes.sizeof(array), array)

    with (
        mock.patch.object(Tensor, "data_ptr", tensor_address),
        mock.patch.object(ctypes, "addressof", array_address),
    ):
        yield


@contextmanager
def in_place_of_compiled(module: Module, isa: str | None = None) -> Iterator[None]:
    """Run impl="native" through `module`, with the instruction set `isa` or its best one."""
    names = module.isas()
    with (
        addresses_with_sizes(),
        mock.patch.multiple(_native, _C=module, _isas=names, _isa=isa or names[-1]),
    ):
        yield
