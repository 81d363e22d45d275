import pytest
import torch

import clae_fast
from clae_fast.testing import projections


def test_is_nt_xent():
    z0, z1 = projections(6, 4)
    criterion = clae_fast.nn.NTXentLoss(temperature=0.2)
    assert criterion(z0, z1) == clae_fast.nt_xent(z0, z1, temperature=0.2)


def test_default_temperature_and_name():
    assert str(clae_fast.nn.NTXentLoss()) == "NTXentLoss(temperature=0.5)"


def test_calling_convention_and_value_of_lightly():
    lightly = pytest.importorskip("lightly.loss")
    z0, z1 = (z.requires_grad_() for z in projections(16, 8))
    ours, theirs = clae_fast.nn.NTXentLoss(0.5)(z0, z1), lightly.NTXentLoss(0.5)(z0, z1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(theirs, (z0, z1)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bad_temperature():
    with pytest.raises(ValueError, match="temperature must be positive"):
        clae_fast.nn.NTXentLoss(temperature=0.0)
