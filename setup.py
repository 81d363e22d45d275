"""Build clae_fast._C with ninja: the C++ for the CPU, and the CUDA C++ where nvcc is found.

Neither this file nor csrc/ needs torch, so one wheel serves every torch. Two environment variables
choose what is built:

    CLAE_FAST_BUILD=auto|cuda|cpu|none   auto: for CUDA too if nvcc is there, and says if it is not
    CLAE_FAST_CUDA_ARCHS="80;90"         compute capabilities; PTX of the last one is always added

Sources are found by their names. csrc/*.cpp is compiled once, csrc/*_simd.cpp once for each
instruction set, and csrc/*.cu by nvcc.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"

# The compiler's flags for each instruction set. csrc/isa.cpp finds out at run time which ones the
# processor has.
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512"
ISAS = {
    "x86_64": {
        "portable": "",
        "avx2": "-mavx2 -mfma",
        "avx512": AVX512,
        "avx512_bf16": f"{AVX512} -mavx512bf16",
    },
    "aarch64": {"neon": ""},
}

BUILD = os.environ.get("CLAE_FAST_BUILD", "auto")
if BUILD not in ("auto", "cuda", "cpu", "none"):
    sys.exit(f"CLAE_FAST_BUILD must be auto, cuda, cpu or none, got {BUILD!r}")


def find_nvcc() -> str | None:
    """The nvcc to build with, or None if CUDA is not wanted or, with auto, not there."""
    if BUILD == "cpu":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and BUILD == "cuda":
        sys.exit("CLAE_FAST_BUILD=cuda, but nvcc was not found: put it on PATH or set CUDA_HOME")
    if nvcc is None:
        print("clae_fast: nvcc not found, building for the CPU only (Triton serves the GPU)")
    return nvcc


def find_compiler() -> str:
    """The command of the C++ compiler. Exits if it or Python's headers are missing."""
    compiler = os.environ.get("CXX") or "g++"
    otherwise = "or set CLAE_FAST_BUILD=none to do without compiled code"
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(f"clae_fast: {compiler} was not found: install g++, set CXX, {otherwise}")
    if not Path(python_include(), "Python.h").is_file():
        sys.exit(f"clae_fast: Python.h was not found: install python3-dev {otherwise}")
    return compiler


def cuda_archs() -> list[str]:
    """The compute capabilities to build for, as nvcc writes them: ["80", "90"]."""
    text = os.environ.get("CLAE_FAST_CUDA_ARCHS", "80;90")
    archs = [arch.strip().replace(".", "") for arch in re.split(r"[;,]", text) if arch.strip()]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        sys.exit(f'CLAE_FAST_CUDA_ARCHS must look like "80;90", got {text!r}')
    return archs


class NinjaBuildExt(build_ext):
    """Writes one build.ninja for the extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile all of csrc/ and link it to the file that setuptools wants."""
        import ninja
        import pybind11

        nvcc = find_nvcc()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects_dir = Path(self.build_temp).resolve()
        objects_dir.mkdir(parents=True, exist_ok=True)

        isas = ISAS.get(platform.machine(), {"portable": ""})
        macros = [f'-DCLAE_FAST_VERSION=\\"{self.distribution.get_version()}\\"']
        macros += [f"-DCLAE_FAST_HAS_{isa.upper()}" for isa in isas]
        macros += ["-DCLAE_FAST_CUDA"] if nvcc else []
        includes = [
            f"-isystem {quote(path)}" for path in (python_include(), pybind11.get_include())
        ]
        compiler = find_compiler()
        cxxflags = (
            "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno "
            "-fno-trapping-math -ffp-contract=fast -g0 -Wall -Wextra "
            + os.environ.get("CXXFLAGS", "")
        )
        lines = [
            f"builddir = {ninja_path(objects_dir)}",
            f"cxxflags = {cxxflags} {' '.join(macros)} {' '.join(includes)}",
            "rule cxx",
            f"  command = {compiler} $cxxflags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in sorted(CSRC.glob("*.cpp")):
            variants = isas if source.stem.endswith("_simd") else {"": ""}
            for isa, flags in variants.items():
                obj = ninja_path(objects_dir / f"{source.stem}{isa and '.'}{isa}.o")
                lines.append(f"build {obj}: cxx {ninja_path(source)}")
                lines.append(f"  isa = {flags} {isa and f'-DCLAE_FAST_ISA={isa}'}")
                objects.append(obj)
        if nvcc:
            archs = cuda_archs()
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            nvccflags = f"-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden {' '.join(gencode)}"
            lines += [
                f"nvccflags = {nvccflags}",
                "rule nvcc",
                f"  command = {quote(nvcc)} $nvccflags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            for source in sorted(CSRC.glob("*.cu")):
                obj = ninja_path(objects_dir / f"{source.stem}.cu.o")
                lines.append(f"build {obj}: nvcc {ninja_path(source)}")
                objects.append(obj)
            # nvcc links its own static CUDA runtime. If g++ linked, the build would succeed and the
            # import would fail.
            link = f"{quote(nvcc)} -shared --cudart=static $in -o $out"
            link += " -Xlinker=--exclude-libs,ALL"
        else:
            link = f"{compiler} -shared $in -o $out -Wl,--exclude-libs,ALL"
        lines += ["rule link", f"  command = {link}"]
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        (objects_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        try:
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", objects_dir], check=True)
        except subprocess.CalledProcessError:
            sys.exit("clae_fast: compiling csrc/ failed, see the compiler's message above")


def python_include() -> str:
    """The directory of Python.h."""
    return sysconfig.get_path("include")


def quote(path: str) -> str:
    """`path` as one word of ninja's shell command."""
    return f'"{path}"'


def ninja_path(path: Path) -> str:
    """`path` as ninja wants it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


setup(
    ext_modules=[] if BUILD == "none" else [Extension("clae_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt},
)
