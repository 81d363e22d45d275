import pytest
import torch

import clae_fast
from clae_fast.testing import (
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in tests/kernels
IMPLEMENTATIONS = [name for name in implementations("info_nce") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
def test_positives_by_name_are_those_by_place(implementation):
    anchor, keys = projections(50, 7)
    with running(implementation) as impl:
        by_place = value_and_grads(clae_fast.info_nce, anchor[:20], keys, impl=impl)
        by_name = value_and_grads(
            clae_fast.info_nce, anchor[:20], keys, impl=impl, positive=torch.arange(20)
        )
    torch.testing.assert_close(by_name, by_place)


@every_implementation
def test_losses_of_rows_are_those_of_the_mean(implementation):
    anchor, keys = projections(31, 9)
    with running(implementation) as impl:
        losses = clae_fast.info_nce(anchor, keys, reduction="none", impl=impl)
        mean = clae_fast.info_nce(anchor, keys, impl=impl)
    assert losses.shape == (31,)
    torch.testing.assert_close(losses.mean(), mean)


@every_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_nobody_asks_for_is_not_computed(implementation, which):
    operands = list(projections(6, 4))
    operands[which].requires_grad_()
    with running(implementation) as impl:
        loss = clae_fast.info_nce(*operands, impl=impl)
    assert [saved.numel() for saved in loss.grad_fn.saved_tensors][1 - which] == 0
