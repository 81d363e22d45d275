"""Rows and checks that tests of topk_similarity share."""

import math

import torch
from torch.nn import functional as F

import clae_fast
from clae_fast.testing import projections, running


def topk(implementation, *arguments, **options):
    with running(implementation) as impl:
        return clae_fast.topk_similarity(*arguments, impl=impl, **options)


def rows(N, M, D, dtype=torch.float32):
    return projections(max(N, M), D)[0][:N].to(dtype), projections(M, D)[1].to(dtype)


def check(implementation, anchor, keys, k, exclude=None):
    values, indices = topk(implementation, anchor, keys, k, exclude=exclude)
    assert_nearest(values, indices, anchor, keys, k, exclude)


def assert_nearest(values, indices, anchor, keys, k, exclude=None):
    """Values to rounding, and each that of its key: nearly equal keys may change places."""
    exact = F.normalize(anchor.double(), eps=1e-12) @ F.normalize(keys.double(), eps=1e-12).T
    if exclude is not None:
        exact.scatter_(1, exclude, -math.inf)
    # of products that are at most 1 in sum
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(torch.float32).eps}
    assert values.shape == indices.shape == (len(anchor), k)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert all(len(row.unique()) == k for row in indices)
    torch.testing.assert_close(values.double(), exact.gather(1, indices), **tolerance)
    torch.testing.assert_close(values.double(), exact.topk(k, dim=1).values, **tolerance)
    assert (values.diff(dim=1) <= 0).all()
    ties = values.diff(dim=1) == 0
    assert (indices.diff(dim=1)[ties] > 0).all()
