import math

import pytest
import torch
from op_cases import NEAR, TEMPERATURES, VIEWS, BadInputs, Case, Grid, assert_right, run, views

import clae_fast
from clae_fast import _native, reference
from clae_fast.testing import (
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in tests/kernels
IMPLEMENTATIONS = [name for name in implementations("uel") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

CASES = {
    "uel": Case(
        "uel",
        views,
        grids=(Grid(((2, 1), (7, 5), (33, 70), (131, 17)), TEMPERATURES, (*NEAR, 1e-3)),),
        searched=True,
        **VIEWS,
    ),
}
BAD_INPUTS = BadInputs({"z0": torch.ones(4, 3), "z1": torch.ones(4, 3)})


def check(implementation, z0, z1, temperature):
    case, tensors = CASES["uel"], {"z0": z0, "z1": z1}
    with running(implementation) as impl:
        for wrt in (case.wrt, ()):
            results = run(case, tensors, wrt=wrt, temperature=temperature, impl=impl)
            assert_right(case, tensors, results, wrt=wrt, temperature=temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.005])
def test_a_negative_nearer_than_the_positive(implementation, temperature):
    # 1 - p of that negative is lost in a softmax that does not set it apart
    z0, z1 = projections(6, 8)
    z0[1] = z0[0] + 1e-4 * z0[1]
    check(implementation, z0, z1, temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_two_negatives_equally_near(implementation, temperature):
    z0, z1 = projections(9, 8)
    z0[1] = z0[2]
    check(implementation, z0, z1, temperature)


@every_implementation
def test_well_separated_pairs_keep_their_digits(implementation):
    # 1 - p of the positive is below fp32's spacing near 1
    z = torch.eye(6)
    with running(implementation) as impl:
        loss, (dz, _) = value_and_grads(clae_fast.uel, z, z, temperature=0.02, impl=impl)
        eager_loss, (eager, _) = value_and_grads(reference.uel, z, z, temperature=0.02)
    assert loss.item() == pytest.approx(20 * math.exp(-50), rel=1e-5)
    assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-5)
    torch.testing.assert_close(dz, eager, rtol=1e-5, atol=1e-30)


@pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none")
def test_memory_is_linear_in_the_rows():
    memory = torch.empty(1)

    def size(N):
        # without a workspace nothing is read or written, and an address says what is wanted
        rows, wanted = (0, 0, 128), memory.data_ptr()
        return _native._C.uel(_native.isa(), rows, rows, N, 128, 0.5, 2, wanted, wanted, 0)

    assert size(1 << 16) < 1.2 * size(1 << 15) * 2
    assert size(1 << 16) < 0.01 * 4 * (2 << 16) ** 2
