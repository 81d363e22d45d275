"""For every test: the interpreter for Triton where there is no GPU, threads and a fixed seed."""

import contextlib
import os
from types import SimpleNamespace

import pytest

# the workers of pytest-xdist share the cores; read when torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# read by Triton when a kernel is defined, so before anything imports one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_emulator

from clae_fast import _impl, _native
from clae_fast.testing import nan_filled_empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with two runs on 64 digits, "pair" with that attack and "none" without one."""
    from clae_fast import train

    folder = tmp_path_factory.mktemp("runs")
    tiny = ["--device", "cpu", "--limit", "64", "--image-size", "8", "--batch-size", "8"]
    for attack, more in (("pair", []), ("none", ["--val-size", "20"])):
        flags = [*tiny, "--epochs", "2", "--log-every", "2", *more, "--attack", attack]
        assert train.main([*flags, "--out", str(folder / attack)]) == 0
    return folder


@pytest.fixture
def nan_empty():
    """Uninitialized memory holds NaN, so that an element nobody wrote shows."""
    with nan_filled_empty():
        yield


@pytest.fixture
def threads():
    """A context in which torch has another number of threads."""

    @contextlib.contextmanager
    def running_with(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return running_with


@pytest.fixture
def cuda_device(monkeypatch):
    """Where impl="cuda" runs: the GPU, or emulated on the CPU where it cannot."""
    if torch.cuda.is_available() and _native.has_cuda():
        return "cuda"
    monkeypatch.setattr(_native, "_C", cuda_emulator.Module())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(_impl._DEVICES, "cuda", ("cuda", "cpu"))
    monkeypatch.delitem(_impl._LACKS, "cuda", raising=False)
    return "cpu"
