"""Constant keys as negatives: against the whole matrix, and against explicit vectors."""

import pytest
import torch
from torch.nn import functional as F

from clae_fast.nn.negatives import log_sum_exp, mixed, nearest


def rows(n, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64))


def tangent(gradient, u):
    """What normalization lets through of a gradient at unit rows."""
    return gradient - (gradient * u).sum(1, keepdim=True) * u


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_log_sum_exp(temperature):
    u, keys = rows(5).requires_grad_(), rows(12, seed=1)
    weights = torch.linspace(1, 2, 5, dtype=torch.float64)
    found = log_sum_exp(u, keys, temperature=temperature)
    expected = (u @ keys.T / temperature).logsumexp(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (du,) = torch.autograd.grad(found @ weights, u)
    (reference,) = torch.autograd.grad(expected @ weights, u)
    torch.testing.assert_close(tangent(du, u), tangent(reference, u), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("excluded", [False, True])
def test_nearest(excluded):
    u, keys = rows(5).requires_grad_(), rows(12, seed=1)
    exclude = torch.arange(5)[:, None] if excluded else None
    values, indices = nearest(u, keys, 3, exclude=exclude)
    s = u @ keys.T
    masked = s.detach().clone()
    if excluded:
        masked.diagonal().fill_(-2)
    assert torch.equal(indices, masked.topk(3).indices)
    assert not indices.requires_grad
    torch.testing.assert_close(values, s.gather(1, indices), rtol=1e-12, atol=1e-14)
    weights = torch.randn(5, 3, dtype=torch.float64)
    (du,) = torch.autograd.grad((values * weights).sum(), u)
    (expected,) = torch.autograd.grad((s.gather(1, indices) * weights).sum(), u)
    torch.testing.assert_close(du, expected, rtol=1e-12, atol=1e-14)


def test_mixtures_of_keys():
    u, keys = rows(4).requires_grad_(), rows(8, seed=1)
    n_i, n_j = keys[:4], keys[4:]
    a = torch.tensor([-0.4, 0.0, 0.3, 0.9], dtype=torch.float64)
    h = F.normalize(a[:, None] * n_i + (1 - a[:, None]) * n_j)
    found = mixed(a, (u * n_i).sum(1), (u * n_j).sum(1), (n_i * n_j).sum(1))
    torch.testing.assert_close(found, (u * h).sum(1), rtol=1e-12, atol=1e-14)
    (du,) = torch.autograd.grad(found.sum(), u)
    torch.testing.assert_close(du, h, rtol=1e-12, atol=1e-14)


def test_mixtures_with_the_anchor_are_constants():
    u, n = rows(4).requires_grad_(), rows(4, seed=1)
    a = torch.tensor([-0.4, 0.1, 0.3, 0.5], dtype=torch.float64)
    s = (u * n).sum(1)
    found = mixed(a, torch.ones_like(a), s, s)
    h = F.normalize(a[:, None] * u.detach() + (1 - a[:, None]) * n)
    torch.testing.assert_close(found, (u * h).sum(1), rtol=1e-12, atol=1e-14)
    (du,) = torch.autograd.grad(found.sum(), u)
    torch.testing.assert_close(tangent(du, u), tangent(h, u), rtol=1e-12, atol=1e-14)
