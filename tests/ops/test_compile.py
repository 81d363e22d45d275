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


@pytest.mark.parametrize("index", [-1, 6, 1_000_000, 2**62])
@pytest.mark.parametrize(
    "call",
    [
        lambda z, bank, at: clae_fast.info_nce(z, bank, positive=at),
        lambda z, bank, at: clae_fast.topk_similarity(z, bank, 2, exclude=at[:, None])[0],
        lambda z, bank, at: clae_fast.bank_step(bank, bank + 1, z, positive=at, lr=0.1),
    ],
    ids=["info_nce", "topk_similarity", "bank_step"],
)
def test_a_compiled_graph_refuses_columns_that_do_not_exist(call, index):
    z, bank = torch.rand(4, 3), torch.rand(6, 3)
    before = bank.clone()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(z, bank.clone(), torch.arange(4))
    with pytest.raises(ValueError, match=f"must hold columns from 0 to 5, got {index}"):
        compiled(z, bank, torch.tensor([0, 1, index, 2]))
    assert torch.equal(bank, before)
