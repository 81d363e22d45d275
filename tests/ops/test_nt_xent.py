import math

import pytest
import torch
from op_cases import NEAR, TEMPERATURES, VIEWS, BadInputs, Case, Grid, views

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

CASES = {
    "nt_xent": Case(
        "nt_xent",
        views,
        grids=(Grid(((2, 1), (7, 5), (33, 130), (131, 17)), TEMPERATURES, (*NEAR, 1e-3)),),
        searched=True,
        **VIEWS,
    ),
}
BAD_INPUTS = BadInputs(
    {"z0": torch.ones(4, 3), "z1": torch.ones(4, 3)},
    own=[
        ({"z0": torch.ones(4)}, ValueError, r"z0 must have shape \[N, D\].*got \[4\]"),
        ({"z1": torch.ones(5, 3)}, ValueError, r"z1 must have the shape of z0, \[4, 3\], got"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ],
)


@every_implementation
def test_all_rows_equal(implementation):
    z = torch.ones(9, 4)
    with running(implementation) as impl:
        loss, (dz, _) = value_and_grads(clae_fast.nt_xent, z, z, impl=impl)
    assert loss.item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-6)
    assert dz.abs().max() < 1e-6
