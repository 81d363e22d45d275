"""The documented functions under the default backend of torch.compile."""

import pytest
import torch

import clae_fast
from clae_fast.testing import projections, value_and_grads


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own
def test_default_backend():
    def step(z0, z1, x):
        x_adv = clae_fast.linf_step(x, z0 * z1, alpha=0.1)
        return clae_fast.nt_xent(2 * z0 + x_adv, z1)

    compiled = torch.compile(step, fullgraph=True)
    z0, z1 = projections(6, 4)
    x = torch.rand(6, 4)
    expected = value_and_grads(lambda a, b: step(a, b, x), z0, z1)
    torch.testing.assert_close(value_and_grads(lambda a, b: compiled(a, b, x), z0, z1), expected)
