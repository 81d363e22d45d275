import pytest
import torch
from op_cases import TEMPERATURES, BadInputs, Case, Grid

from clae_fast import reference
from clae_fast.testing import projections


def one_view(N, D, **options):
    return {"z": projections(N, D, **options)[0]}


CASES = {
    "tied_nt_xent": Case(
        "tied_nt_xent",
        one_view,
        grids=(Grid(((2, 3), (7, 5), (40, 17)), TEMPERATURES),),
        rows=("z",),
        coupled_from=2,
        searched=True,
    ),
}
BAD_INPUTS = BadInputs({"z": torch.ones(4, 3)})


def by_autograd(z, temperature):
    """The definition: the second view's gradient where both views are `z`."""
    z_b = z.clone().requires_grad_()
    loss = reference.nt_xent(z, z_b, temperature=temperature)
    return torch.autograd.grad(loss, z_b)[0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("N", "D"), [(2, 3), (7, 5), (11, 6), (40, 17)])
def test_reference_is_the_definition(N, D, temperature):
    z = projections(N, D, dtype=torch.float64)[0]
    if N == 11:
        z[0], z[1] = 0, 1e-13
    dz = reference.tied_nt_xent(z, temperature=temperature)
    torch.testing.assert_close(dz, by_autograd(z, temperature), rtol=1e-12, atol=1e-14)
