"""The gradient kernel that benchmarks time beside the shipped one computes the same sums."""

import sys
from pathlib import Path

import pytest
import torch

# behind everything else, so that clae_fast stays the installed one
sys.path.append(str(Path(__file__).parents[2]))

pytest.importorskip("triton")

from benchmarks.gpu.symmetric_gradient import example, symmetric_gradient
from clae_fast.kernels._launch import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("n", [16, 70, 96])
@pytest.mark.parametrize("tiles", [Tiling(16, 16, 16, 4, 1), Tiling(32, 16, 16, 4, 1)])
def test_against_fp64(n, tiles):
    torch.manual_seed(0)
    u, scale, inverse, du = example(n, 10, DEVICE, tiles)
    symmetric_gradient(u, scale, inverse, du, 3.0, tiles)
    rows = u[:n].double() * scale[:n, None]
    weights = torch.exp2(rows @ rows.T * 3.0) * (inverse[:, None] + inverse).double()
    index = torch.arange(n, device=DEVICE)
    weights[index, index] = weights[index, (index + n // 2) % n] = 0
    expected = weights @ rows
    assert (du - expected).norm() < 5e-4 * expected.norm()
