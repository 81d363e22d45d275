"""Keys normalized by other parts of a batch than their queries."""

import copy

import pytest
import torch
from norm_cases import encoder, views
from step_cases import norm_buffers
from torch import nn

from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.nn.split_norm import dealt


class Parts(nn.BatchNorm1d):
    """Records which rows are normalized together: rows that hold their numbers."""

    def __init__(self):
        super().__init__(1, affine=False)
        self.seen = []

    def forward(self, x):
        self.seen.append(set(x.flatten().int().tolist()))
        return super().forward(x)


@pytest.mark.parametrize(("rows", "parts"), [(16, 4), (12, 3), (8, 4), (24, 2)])
def test_a_key_shares_statistics_with_few_of_its_querys_rows(rows, parts):
    queries, keys = Parts(), Parts()
    x = torch.arange(float(rows))[:, None]
    with grouped_norm(queries, parts, split=True):
        queries(x)
    z = dealt(keys, x, parts)
    assert set().union(*keys.seen) == set(range(rows))
    for among in queries.seen:
        for others in keys.seen:
            assert len(among) == len(others) == rows // parts
            # each part of the keys has its share of each part of the queries
            assert rows // parts // parts <= len(among & others) <= -(-rows // parts // parts)
    # in the order of rows again: numbers grow within a part
    for others in keys.seen:
        assert (z[sorted(others), 0].diff() > 0).all()


def test_dealt_equals_passes_of_the_parts():
    module, x = encoder(nn.BatchNorm2d(4)), torch.cat(views(3))[:12]
    other = copy.deepcopy(module)
    before = norm_buffers(module)
    z = dealt(module, x, 3)
    # rows 0 to 3 are one part of the queries, 4 to 7 the next
    parts = [[0, 4, 8, 1], [5, 9, 2, 6], [10, 3, 7, 11]]
    expected, buffers = torch.empty_like(z), []
    for rows in parts:
        one = copy.deepcopy(other)
        expected[rows] = one(x[rows])
        buffers.append(norm_buffers(one))
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(z, other(x))
    for name, buffer in norm_buffers(module).items():
        if not name.endswith("num_batches_tracked"):
            mean = torch.stack([part[name] for part in buffers]).mean(0)
            torch.testing.assert_close(buffer, mean, rtol=1e-12, atol=1e-14)
            assert not torch.equal(buffer, before[name])


def test_one_part_is_the_batch():
    module, (x,) = encoder(nn.BatchNorm2d(4)), views(1)
    other = copy.deepcopy(module)
    assert torch.equal(dealt(module, x, 1), other(x))


def test_keeps_channels_last():
    seen = []
    module = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten())
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dealt(module, torch.rand(6, 4, 5, 5).to(memory_format=torch.channels_last), 2)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
