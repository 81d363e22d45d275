"""Applies to every test: the interpreter for Triton where there is no GPU, and a fixed seed."""

import os

import pytest
import torch

# read by Triton when a kernel is defined, so before anything imports one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast.testing import nan_filled_empty


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_empty():
    """Uninitialised memory holds NaN, so that an element nobody wrote shows."""
    with nan_filled_empty():
        yield
