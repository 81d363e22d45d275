"""Problems that tests of bank_step share."""

import pytest
import torch
from op_cases import in_fp64

import clae_fast
from clae_fast import reference
from clae_fast.testing import (
    assert_accurate,
    projections,
)

both_methods = pytest.mark.parametrize("method", ["adco", "caco"])


def problem(method, N, K, D, *, noise=0.5, dtype=torch.float32, views=1):
    """A bank, its velocity, anchors, and what names their positives."""
    # other numbers than those of the bank, whose rows would be the anchors
    anchor, key = projections(N, D, noise=noise, dtype=dtype, seed=1)
    bank = torch.randn(K, D) * torch.rand(K, 1).mul(4).exp()
    options = {"views": views}
    if method == "adco":
        options["keys"] = key
    else:
        options["positive"] = torch.randint(K, (N,))
    return bank, 0.1 * torch.randn(K, D), anchor, options


def step(bank, velocity, anchor, function=clae_fast.bank_step, **options):
    """The bank and the velocity after a step, of copies."""
    bank, velocity = bank.clone(), velocity.clone()
    assert function(bank, velocity, anchor, **options) is None
    return bank, velocity


def assert_stepped(found, bank, velocity, anchor, *, temperature, **options):
    """Raises unless a step's result is within the error budget.

    The gradient may be off by two roundings of the at most 4 unit rows over T |W| that cancel in
    it, times what the anchors count in all.
    """
    options |= {"temperature": temperature}
    options.pop("losses", None)
    eager = step(bank, velocity, anchor, reference.bank_step, **options)
    exact = step(
        bank.double(),
        velocity.double(),
        anchor.double(),
        reference.bank_step,
        **in_fp64(options),
    )
    count = 1 if options.get("weight") is None else options["weight"].abs().sum()
    norm = bank.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cancelling = 8 * torch.finfo(torch.float32).eps * count / (temperature * norm)
    budgets = (options["lr"] * cancelling, cancelling)
    for name, result, other, truth, budget in zip(
        ("bank", "velocity"), found, eager, exact, budgets, strict=True
    ):
        result = torch.where((result - truth).abs() <= budget, truth.float(), result)
        assert_accurate(result, other, truth, temperature=temperature, what=name)
