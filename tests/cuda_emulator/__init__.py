"""Runs CUDA C++ kernels on the CPU: g++ compiles csrc/<op>_cuda.cu against this folder's headers.

Where there is no GPU, the fixture `cuda_device` of conftest.py puts a `Module` in the place of the
compiled module, so that the functions of `_native` run the kernels on CPU tensors.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HEADERS = Path(__file__).parent
CSRC = HEADERS.parents[1] / "csrc"


class Module:
    """Has every op's function <op>_cuda, and builds it when it is first asked for."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op, found, _ = name.partition("_cuda")
        if not found:
            # a function for the CPU
            return getattr(importlib.import_module("clae_fast._C"), name)
        return getattr(_extension(op), name)


@functools.cache
def _extension(op: str) -> ModuleType:
    """`_C` with the CUDA functions of one op."""
    kernels, library = (_build_dir() / f"{op}{suffix}" for suffix in (".o", ".so"))
    _run(*_cuda_flags(), "-c", CSRC / f"{op}_cuda.cu", "-o", kernels)
    # functions of other ops stay undefined, which is no error as long as nobody calls them
    _run("-shared", "-Wl,-z,lazy", _compile_bindings(), kernels, "-o", library)
    # pybind11 keeps modules by name
    loader = importlib.machinery.ExtensionFileLoader(f"{op}._C", str(library))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


@functools.cache
def build_test(name: str) -> Path:
    """Compile a source file of this folder to a shared library."""
    library = _build_dir() / f"{name}.so"
    _run("-shared", "-I", CSRC, *_cuda_flags(), HEADERS / f"{name}.cu", "-o", library)
    return library


# -fno-strict-aliasing: kernels read the registers of one type as another
# -U_FORTIFY_SOURCE: it would reject a longjmp from one stack to another
_CXXFLAGS = ("-std=c++17", "-fPIC", "-Wall", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")


def _cuda_flags() -> tuple[object, ...]:
    flags = ("-O2", "-fno-gnu-unique", "-Wno-unknown-pragmas", "-x", "c++", "-I", HEADERS)
    return (*_CXXFLAGS, *flags, "-include", HEADERS / "mma.h")


@functools.cache
def _compile_bindings() -> Path:
    pybind11 = pytest.importorskip("pybind11")
    includes = ("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())
    macros = ("-DCLAE_FAST_CUDA", '-DCLAE_FAST_VERSION="emulated"')
    target = _build_dir() / "bindings.o"
    _run(*_CXXFLAGS, *macros, *includes, "-c", CSRC / "bindings.cpp", "-o", target)
    return target


def _run(*arguments: object) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    subprocess.run([compiler, *map(str, arguments)], check=True)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_emulator-")


def _build_dir() -> Path:
    return Path(_temporary().name)
