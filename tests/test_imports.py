"""What importing takes and does, and which way imports and the includes of csrc/ may point."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# the rooms of the package from the ground up: each may import rooms of the floors below it, and
# neither its neighbors nor the package's root
FLOORS = (
    ("_check", "_ragged", "_version", "errors", "kernels"),
    ("_native", "distributed", "reference"),
    ("_impl",),
    ("ops", "testing"),
    ("attack", "nn"),
    ("steps",),
    ("methods",),
    ("data",),
    ("config",),
    ("evaluation",),
    ("training",),
    ("cli", "reporting"),
    ("embed", "evaluate", "report", "train"),
)


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_needs_torch_alone_and_touches_no_gpu():
    run("""
import sys
for name in ("triton", "torchvision", "sklearn", "pyarrow", "tensorboard", "tqdm", "timm"):
    sys.modules[name] = None  # importing it raises
import torch
import clae_fast
assert not torch.cuda.is_initialized()
z = torch.randn(4, 3, requires_grad=True)
clae_fast.nn.NTXentLoss()(z, z).backward()
clae_fast.linf_step(z, z, alpha=0.1)
clae_fast.uel(z, z), clae_fast.info_nce(z, z), clae_fast.tied_nt_xent(z)
assert not torch.cuda.is_initialized()
""")


def test_works_without_the_compiled_module():
    run("""
import sys
class NoCompiledModule:
    def find_spec(self, name, path=None, target=None):
        if name == "clae_fast._C":
            raise ModuleNotFoundError("blocked", name=name)
sys.meta_path.insert(0, NoCompiledModule())
import torch, clae_fast
from clae_fast import _impl, _native
assert not _native.has_cpu() and not _native.has_cuda() and _native.isas() == []
assert _impl.describe(torch.device("cpu")).startswith("reference")
z = torch.randn(4, 3, requires_grad=True)
clae_fast.nt_xent(z, z).backward()
clae_fast.linf_step(z, z, alpha=0.1, eps=0.1)
try:
    clae_fast.nt_xent(z, z, impl="native")
except RuntimeError as error:
    assert "install clae_fast" in str(error), error
else:
    raise AssertionError("an explicit request fell back")
""")


def test_first_call_may_be_a_compiled_one():
    run("""
import torch, clae_fast
z = torch.randn(4, 3, requires_grad=True)
step = torch.compile(clae_fast.nt_xent, backend="aot_eager", fullgraph=True)
step(z, 2 * z).backward()
""")


def test_names():
    import clae_fast

    for name in ("nt_xent", "tied_nt_xent", "info_nce", "uel", "linf_step", "nn", "__version__"):
        assert hasattr(clae_fast, name), name


@pytest.mark.skipif(not CSRC.is_dir(), reason="no checkout")
def test_sources_know_neither_torch_nor_one_another():
    sources = [path for path in CSRC.iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert len(sources) > 5
    for path in sources:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        for include in includes:
            assert not re.match(r"(torch|ATen|c10|pybind11/torch)", include), (path, include)
            if "pybind11" in include or "Python.h" in include:
                assert path.name == "bindings.cpp", (path, include)
            if include.startswith("cuda"):
                assert path.suffix in (".cu", ".cuh"), (path, include)


@pytest.fixture(scope="module")
def imports():
    """What every module of the package imports from it, by name; "clae_fast" is the root itself."""
    paths = [path for folder in ("clae_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    if not paths:
        pytest.skip("no checkout")
    files = {}
    for path in paths:
        parts = ("clae_fast", *path.relative_to(ROOT).with_suffix("").parts)
        files[".".join(parts).replace("clae_fast.clae_fast", "clae_fast")] = path
    modules = {name.removesuffix(".__init__") for name in files}
    return {
        name.removesuffix(".__init__"): {
            found
            for node in ast.walk(ast.parse(path.read_text()))
            for found in imported(node, name, modules)
        }
        for name, path in files.items()
    }


def imported(node, name, modules):
    """The modules of the package that a statement in the file `name` imports."""
    found = set()
    if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        above = name.split(".")[: -node.level] if node.level else []
        source = ".".join(above + [node.module] * (node.module is not None))
        names = {f"{source}.{alias.name}" for alias in node.names}
        found = {name if name in modules else source for name in names}
    return {other for other in found if other.split(".")[0] == "clae_fast"}


def room(module):
    return module.split(".")[1]


def test_imports_point_downwards(imports):
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert {room(module) for module in imports if module != "clae_fast"} == set(floors)
    for module, found in imports.items():
        # the root names what users import
        for other in found if module != "clae_fast" else ():
            if other in ("clae_fast", "clae_fast._C") or room(other) == room(module):
                continue
            assert floors[room(other)] < floors[room(module)], f"{module} imports {other}"


def test_nothing_imports_the_root(imports):
    assert [module for module, found in imports.items() if "clae_fast" in found] == []


def test_no_modules_import_each_other(imports):
    left = {module: set(found) for module, found in imports.items()}
    while ends := [module for module, found in left.items() if not found & left.keys()]:
        for module in ends:
            del left[module]
    assert left == {}, "these modules import each other in a circle"
