"""The sdist and the wheel: what they hold and link to, and what a bad build setting says."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "clae_fast" / "_version.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', SOURCE, re.M).group(1)
# the C and C++ run-time libraries: no torch, no CUDA, and no OpenMP, which is torch's
LINKED = r"(libstdc\+\+|libm|libmvec|libgcc_s|libc|libpthread|ld-linux-[\w-]+)\.so\.\d+"


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in `cwd`, with `env` on top of an environment without build settings."""
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "CUDA_HOME", "PYTHONPATH") and not name.startswith("CLAE_FAST_")
    }
    return subprocess.run(command, cwd=cwd, env=base | env, capture_output=True, text=True)


def python(*arguments: str | Path, cwd: Path, **env: str) -> str:
    """What this interpreter prints, given that it succeeds."""
    done = run(sys.executable, *arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, out: Path, build: str) -> Path:
    """Build a wheel of `source` with CLAE_FAST_BUILD=`build`, without the network."""
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out]
    python("-m", "pip", "wheel", *flags, source, cwd=source, CLAE_FAST_BUILD=build)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout as it is cloned, without anything compiled."""
    copy = tmp_path_factory.mktemp("a checkout")
    compiled = shutil.ignore_patterns("__pycache__", "*.so")
    for path in ROOT.iterdir():
        if path.name in ("benchmarks", "clae_fast", "csrc", "kernels", "tests"):
            shutil.copytree(path, copy / path.name, ignore=compiled)
        elif path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    python("-c", build, out, cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory) -> Path:
    """The CPU wheel, built from the unpacked sdist in a folder with a space in its name."""
    source = tmp_path_factory.mktemp("unpacked sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(source)
    return build_wheel(source / f"clae_fast-{VERSION}", tmp_path_factory.mktemp("wheel"), "cpu")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """A folder with the wheel installed as pip installs it, not editable."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_sdist_holds_every_source(sdist: Path, checkout: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("clae_fast", "csrc", "kernels", "tests")
    sources = {
        path.relative_to(checkout).as_posix()
        for folder in folders
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    assert sources - names == set()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {
        "clae_fast",
        f"clae_fast-{VERSION}.dist-info",
    }
    compiled = {name for name in names if name.endswith(".so")}
    assert len(compiled) == 1
    assert compiled.pop().startswith("clae_fast/_C.")
    modules = {
        path.relative_to(checkout).as_posix() for path in (checkout / "clae_fast").rglob("*.py")
    }
    kernels = {f"clae_fast/kernels/{path.name}" for path in (checkout / "kernels").glob("*.py")}
    assert (modules | kernels | {"clae_fast/py.typed", "clae_fast/_C.pyi"}) - names == set()


def test_extension_links_to_no_torch(installed: Path) -> None:
    (extension,) = (installed / "clae_fast").glob("_C.*.so")
    dynamic = run("readelf", "--dynamic", "--wide", extension, cwd=installed).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert [name for name in needed if not re.fullmatch(LINKED, name)] == []


def test_regular_install_serves_the_checkouts_root(installed: Path, checkout: Path) -> None:
    code = (
        "import clae_fast, clae_fast._C, clae_fast.kernels, torch; from clae_fast import _impl\n"
        "for module in (clae_fast, clae_fast._C, clae_fast.kernels): print(module.__file__)\n"
        "print(_impl.describe(torch.device('cpu')))"
    )
    package, extension, kernels, ops = python(
        "-c", code, cwd=checkout, PYTHONPATH=str(installed)
    ).splitlines()
    assert Path(package).is_relative_to(checkout)
    assert Path(extension).is_relative_to(installed)
    assert Path(kernels).is_relative_to(installed)
    assert ops.startswith("native, ")


def test_build_none_gives_a_pure_wheel_that_runs_the_reference(
    checkout: Path, tmp_path: Path
) -> None:
    wheel = build_wheel(checkout, tmp_path, "none")
    assert wheel.name == f"clae_fast-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import pkgutil; pkgutil.extend_path = lambda path, name: path\n"
        "import torch; from clae_fast import _impl; print(_impl.describe(torch.device('cpu')))"
    )
    # neither the installed clae_fast nor an editable one's import hook (-S) is to lend its _C
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(torch.__file__).parents[1])])
    ops = python("-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert ops.startswith("reference, ")


def test_building_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = ast.literal_eval(re.search(r"^requires = (\[.*?\])", text, re.M | re.S).group(1))
    assert sorted(re.match(r"\w+", name).group() for name in requires) == [
        "ninja",
        "pybind11",
        "setuptools",
    ]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"CLAE_FAST_BUILD": "fast"},
            "CLAE_FAST_BUILD must be auto, cuda, cpu or none, got 'fast'",
        ),
        (
            {"CLAE_FAST_BUILD": "cuda", "CLAE_FAST_CUDA_ARCHS": "ampere"},
            "CLAE_FAST_CUDA_ARCHS must look like \"80;90\", got 'ampere'",
        ),
        (
            {"CLAE_FAST_BUILD": "cuda", "CUDA_HOME": "nowhere"},
            "CLAE_FAST_BUILD=cuda, but nvcc was not found: put it on PATH or set CUDA_HOME",
        ),
        (
            {"CLAE_FAST_BUILD": "cpu", "CXX": "no-such-compiler"},
            "clae_fast: no-such-compiler was not found: install g++, set CXX, "
            "or set CLAE_FAST_BUILD=none to do without compiled code",
        ),
    ],
    ids=["build", "archs", "nvcc", "compiler"],
)
def test_bad_build_setting_gets_one_line(
    env: dict[str, str], message: str, checkout: Path, tmp_path: Path
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    env = {"CUDA_HOME": str(tmp_path / "cuda")} | env
    folders = [f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    done = run(sys.executable, "setup.py", "build_ext", *folders, cwd=checkout, **env)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [message]
