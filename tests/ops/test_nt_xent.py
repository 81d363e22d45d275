import math

import pytest
import torch

import clae_fast
from clae_fast.testing import (
    implementations,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in tests/kernels
IMPLEMENTATIONS = [name for name in implementations("nt_xent") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
def test_all_rows_equal(implementation):
    z = torch.ones(9, 4)
    with running(implementation) as impl:
        loss, (dz, _) = value_and_grads(clae_fast.nt_xent, z, z, impl=impl)
    assert loss.item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-6)
    assert dz.abs().max() < 1e-6
