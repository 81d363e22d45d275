import os
import subprocess
import sys

import pytest
import torch

from clae_fast import _impl, _native, ops

OPS = sorted(ops.__all__)
CPU = torch.ones(4, 3)
META = torch.ones(4, 3, device="meta")
# what the limits of an op look at beside its tensors
OPTIONS = {"stem_step": {"weight": torch.ones(64, 3, 3, 3), "stride": 1, "padding": 1}}


class OnGPU:
    """All of a tensor that `resolve` looks at; no GPU need be there."""

    device = torch.device("cuda")
    dtype = torch.float32

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]


GPU = OnGPU(4, 3)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_an_implementation_everywhere(op):
    for tensor in (CPU, GPU, META):
        found = _impl.resolve(op, "auto", tensor, tensor, **OPTIONS.get(op, {}))
        assert found in ("reference", *_impl._OPS[op])
    assert _impl.resolve(op, "reference", CPU) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_fp64_and_unknown_devices_are_the_reference(op):
    assert _impl.resolve(op, "auto", CPU.double()) == "reference"
    assert _impl.resolve(op, "auto", META) == "reference"


@pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none")
@pytest.mark.parametrize("op", ["nt_xent", "linf_step"])
def test_auto_is_native_on_the_cpu(op):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert _impl.resolve(op, "auto", CPU.to(dtype)) == "native"


def test_auto_is_the_reference_without_the_compiled_module(monkeypatch):
    monkeypatch.setitem(_impl._LACKS, "native", "the compiled module")
    assert _impl.resolve("nt_xent", "auto", CPU) == "reference"
    assert _impl.describe(CPU.device).startswith("reference, ")


@pytest.mark.parametrize("op", ["info_nce", "tied_nt_xent", "uel", "linf_step"])
def test_auto_on_a_gpu(op, monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    assert _impl.resolve(op, "auto", GPU) == "triton"
    monkeypatch.setattr(_impl, "_LACKS", {"triton": "triton", "cuda": "nvcc"})
    rows = op != "linf_step"
    assert _impl.resolve(op, "auto", GPU) == ("torch" if rows else "reference")


@pytest.mark.parametrize(
    ("shape", "exact", "expected"),
    [
        ((256, 128), False, "cuda"),
        ((256, 128), True, "triton"),
        ((256, 512), False, "triton"),
        ((8192, 128), False, "triton"),
        ((256, 2048), False, "reference"),
    ],
)
def test_auto_of_nt_xent_on_a_gpu(shape, exact, expected, monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    monkeypatch.setattr(_native, "nt_xent_cuda_takes", lambda n, D: n <= 4096 and D <= 256)
    assert _impl.resolve("nt_xent", "auto", OnGPU(*shape), exact=exact) == expected
    monkeypatch.setattr(_impl, "_LACKS", {"cuda": "nvcc"})
    without = "triton" if expected == "cuda" else expected
    assert _impl.resolve("nt_xent", "auto", OnGPU(*shape), exact=exact) == without


def test_wide_rows_of_uel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    assert _impl.resolve("uel", "auto", OnGPU(4, 256)) == "triton"
    assert _impl.resolve("uel", "auto", OnGPU(4, 257)) == "torch"


@pytest.mark.parametrize(
    ("impl", "shape", "exact", "message"),
    [
        ("triton", (4, 1025), False, "takes rows of at most 1024 elements, got 1025"),
        ("cuda", (4, 8), True, "exact=True needs impl='triton'"),
        ("cuda", (4096, 8), False, "takes few and narrow rows, got 8192 of 8 elements"),
    ],
)
def test_sizes_that_an_implementation_refuses(impl, shape, exact, message, monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    monkeypatch.setattr(_native, "nt_xent_cuda_takes", lambda n, D: n <= 4096 and D <= 256)
    with pytest.raises(ValueError, match=message):
        _impl.resolve("nt_xent", impl, OnGPU(*shape), exact=exact)


@pytest.mark.parametrize(
    ("op", "impl", "tensor", "error", "message"),
    [
        ("nt_xent", "fastest", CPU, ValueError, "impl must be one of auto, reference, torch"),
        ("uel", "cuda", GPU, RuntimeError, "uel has no implementation 'cuda', it has"),
        ("nt_xent", "native", GPU, RuntimeError, "does not run on cuda tensors"),
        ("linf_step", "cuda", CPU, RuntimeError, "does not run on cpu tensors"),
        ("nt_xent", "native", CPU.double(), TypeError, "fp64 needs impl='reference'"),
        ("info_nce", "torch", CPU.double(), TypeError, "fp64 needs impl='reference'"),
    ],
)
def test_a_request_never_falls_back(op, impl, tensor, error, message, monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    with pytest.raises(error, match=message):
        _impl.resolve(op, impl, tensor)


@pytest.mark.parametrize("impl", ["native", "triton", "cuda"])
def test_what_is_missing_is_named_with_its_remedy(impl, monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {impl: "something: install it"})
    with pytest.raises(RuntimeError, match=f"impl='{impl}' needs something: install it"):
        _impl.resolve("linf_step", impl, CPU)


def test_triton_runs_on_the_cpu_only_when_interpreted(monkeypatch):
    monkeypatch.setattr(_impl, "_LACKS", {})
    monkeypatch.setattr(_impl, "_INTERPRETED", True)
    assert _impl.resolve("nt_xent", "triton", CPU) == "triton"
    assert _impl.resolve("nt_xent", "auto", CPU) == "native"
    monkeypatch.setattr(_impl, "_INTERPRETED", False)
    with pytest.raises(RuntimeError, match="does not run on cpu tensors"):
        _impl.resolve("nt_xent", "triton", CPU)


@pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none")
def test_describe(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert _impl.describe(CPU.device) == f"native, {_native.isas()[-1]}, 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with _native.force_isa("portable"):
        assert _impl.describe(CPU.device) == "native, portable, 2 threads"


def test_environment_variable_replaces_auto():
    code = """
import torch
from clae_fast import _impl
z = torch.ones(2, 3)
assert _impl.resolve("nt_xent", "auto", z) == "reference"
assert _impl.describe(z.device).startswith("reference, ")
assert _impl.resolve("uel", "torch", z) == "torch"
"""
    result = run(code, CLAE_FAST_IMPL="reference")
    assert result.returncode == 0, result.stderr


def test_environment_variable_never_falls_back():
    code = "import torch, clae_fast; clae_fast.uel(torch.ones(2, 3), torch.ones(2, 3))"
    result = run(code, CLAE_FAST_IMPL="cuda")
    assert "uel has no implementation 'cuda'" in result.stderr
    result = run(code, CLAE_FAST_IMPL="fastest")
    assert "impl must be one of auto" in result.stderr
