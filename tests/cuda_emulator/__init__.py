"""CUDA C++ kernels on the CPU: csrc/<op>_cuda.cu, compiled by g++ against the headers here.

The fixture `cuda_device` of conftest.py puts a `Module` below the package where there is no GPU, so
that the functions of `_native` run the kernels on CPU tensors.
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
    """In place of the compiled module: <op>_cuda... of every op, built when first asked for."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op, found, _ = name.partition("_cuda")
        if not found:
            # what runs on the CPU anyway
            return getattr(importlib.import_module("clae_fast._C"), name)
        return getattr(_extension(op), name)


@functools.cache
def _extension(op: str) -> ModuleType:
    """`_C` with the CUDA functions of `op` alone."""
    kernels, library = (_build_dir() / f"{op}{suffix}" for suffix in (".o", ".so"))
    _run(*_cuda_flags(), "-c", CSRC / f"{op}_cuda.cu", "-o", kernels)
    # what other bindings call stays undefined, and is looked for when it is called
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
    """The shared library of a source file of this folder."""
    library = _build_dir() / f"{name}.so"
    _run("-shared", "-I", CSRC, *_cuda_flags(), HEADERS / f"{name}.cu", "-o", library)
    return library


# kernels read one type's registers as another's, and longjmp goes from one stack to another
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
