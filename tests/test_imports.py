"""What importing takes and does, each in a fresh process, and what csrc/ may include."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"


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
