import math
from functools import partial

import pytest
import torch
from op_cases import BadInputs, Case, Grid
from topk_cases import assert_nearest, check, rows, topk
from torch.nn import functional as F

from clae_fast import reference
from clae_fast.testing import assert_bitwise_equal, implementations

pytestmark = pytest.mark.usefixtures("nan_empty")

IMPLEMENTATIONS = implementations("topk_similarity")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_one = pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])


def nearest(excluding, N, M, D, *, noise=None, dtype=torch.float32, seed=0):
    anchor, keys = rows(N, M, D, dtype)
    exclude = {"exclude": (torch.arange(N)[:, None] + 1) % M} if excluding else {}
    return {"anchor": anchor, "keys": keys, **exclude}


def as_topk(tensors, results, options):
    assert_nearest(*results, k=options["k"], **tensors)


def _topk_similarity(excluding, **fields):
    return Case(
        "topk_similarity",
        partial(nearest, excluding),
        size=lambda N, D: (N, 2 * N + 2, D),
        grids=(Grid(((1, 4, 1), (7, 97, 5), (33, 131, 70))),),
        large=(41, 8203, 3),
        options={"k": 3},
        rows=("anchor", "keys"),
        judge=as_topk,
        **fields,
    )


CASES = {
    "topk_similarity": _topk_similarity(True),
    "topk_similarity-all": _topk_similarity(False, compiled=False),
}
INDEX = torch.zeros(4, dtype=torch.int64)
BAD_INPUTS = BadInputs(
    {"anchor": torch.ones(4, 3), "keys": torch.ones(6, 3), "k": 2},
    own=[
        ({"keys": torch.ones(0, 3)}, ValueError, r"keys must have shape .* got \[0, 3\]"),
        ({"keys": torch.ones(6, 2)}, ValueError, r"keys must .* got \[6, 2\] for \[4, 3\]"),
        ({"keys": torch.ones(1, 3).expand(2**32, 3)}, ValueError, r"keys must .* M < 2\^32"),
        ({"k": 0}, ValueError, "k must be from 1 to 6, .* got 0"),
        ({"k": 7}, ValueError, "k must be from 1 to 6, .* got 7"),
        ({"k": 5, "exclude": INDEX.view(4, 1).expand(4, 2)}, ValueError, "k must be from 1 to 4"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"exclude": [0]}, TypeError, "exclude must be a torch.Tensor, got list"),
        ({"exclude": INDEX[:, None].int()}, TypeError, "exclude must be of dtype int64, got"),
        ({"exclude": INDEX[:2]}, ValueError, r"exclude must have shape .* N = 4 .* got \[2\]"),
        ({"exclude": INDEX[:3, None]}, ValueError, r"exclude must have shape .* got \[3, 1\]"),
        ({"exclude": INDEX[:, None].to("meta")}, ValueError, "exclude must be on the device of"),
        ({"exclude": INDEX[:, None] + 6}, ValueError, "exclude must hold columns from 0 to 5"),
        ({"exclude": INDEX[:, None] - 1}, ValueError, "exclude must .* from 0 to 5, got -1"),
    ],
)


def grid(N, D, seed):
    """Rows of 4 numbers of -1 or 1 and of zeros: their cosines are multiples of 1 / 4, exactly."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.zeros(N, D)
    for row in z:
        row[torch.randperm(D, generator=generator)[:4]] = 1
    return z * (2 * torch.randint(2, (N, D), generator=generator) - 1)


def test_reference_by_a_loop():
    anchor, keys = rows(3, 7, 4, torch.float64)
    exclude = torch.tensor([[6, 0], [1, 1], [2, 5]])
    values, indices = reference.topk_similarity(anchor, keys, 3, exclude=exclude)
    for i, row in enumerate(F.normalize(anchor) @ F.normalize(keys).T):
        order = sorted((-s, j) for j, s in enumerate(row.tolist()) if j not in exclude[i].tolist())
        assert indices[i].tolist() == [j for _, j in order[:3]]
        assert values[i].tolist() == pytest.approx([-s for s, _ in order[:3]], rel=1e-12)


@every_implementation
# rows, keys and buffers on both sides of vectors', tiles' and the number of candidates' ends
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (5, 2, 3), (7, 97, 5), (33, 131, 70)])
@pytest.mark.parametrize("k", [1, 2, 64, 65, 131])
def test_against_fp64(implementation, N, M, D, k):
    check(implementation, *rows(N, M, D), min(k, M))


@every_implementation
def test_more_keys_than_a_tile_holds(implementation):
    anchor, keys = rows(3, 20001, 2)
    check(implementation, anchor, keys, 100)
    # every key is nearer than all before it, or farther
    angle = torch.linspace(0, 3, 20001)
    keys = torch.stack([angle.cos(), angle.sin()], 1)
    check(implementation, keys[[0, -1, 10000]], keys, 100)


@every_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 6, 70, 150])
def test_equal_values_come_in_the_order_of_their_keys(implementation, dtype, k):
    anchor, keys = grid(29, 6, 0).to(dtype), grid(150, 6, 1).to(dtype)
    values, indices = topk(implementation, anchor, keys, k)
    expected = (anchor.float() @ keys.float().T / 4).sort(dim=1, descending=True, stable=True)
    assert_bitwise_equal(indices, expected.indices[:, :k])
    assert_bitwise_equal(values, expected.values[:, :k] + 0.0)


@every_implementation
@pytest.mark.parametrize("E", [0, 1, 3])
def test_excluded_keys(implementation, E):
    anchor, keys = rows(23, 61, 9)
    exclude = torch.rand(23, 61).argsort(1)[:, :E]
    for k in (1, 17, 61 - E):
        check(implementation, anchor, keys, k, exclude)
    # the best ones, in other strides and twice
    best = topk(implementation, anchor, keys, 4)
    exclude = best[1][:, [0, 2, 0]].T.contiguous().T
    values, indices = topk(implementation, anchor, keys, 2, exclude=exclude)
    assert_bitwise_equal(indices, best[1][:, [1, 3]])
    assert_bitwise_equal(values, best[0][:, [1, 3]])


@every_one
def test_nan_is_above_all(implementation):
    anchor, keys = grid(9, 6, 0), grid(40, 6, 1)
    keys[[11, 30], 2] = math.nan
    anchor[4, 0] = math.inf
    exclude = torch.full((9, 1), 30)
    for k in (1, 5, 39):
        values, indices = topk(implementation, anchor, keys, k, exclude=exclude)
        expected = reference.topk_similarity(anchor, keys, k, exclude=exclude)
        assert_bitwise_equal(indices, expected[1])
        assert_bitwise_equal(values, expected[0])
        assert (indices[:, 0] == torch.where(torch.arange(9) == 4, 0, 11)).all()
        assert values[:, 0].isnan().all()
        assert values[4].isnan().all()
        assert values.isnan().sum() == 8 + k


@pytest.mark.parametrize("implementation", [n for n in IMPLEMENTATIONS if n.startswith("native")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(implementation, dtype, threads):
    anchor, keys = rows(41, 8203, 3, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(topk(implementation, anchor, keys, 70))
    for values, indices in results[1:]:
        assert_bitwise_equal(values, results[0][0])
        assert_bitwise_equal(indices, results[0][1])


@pytest.mark.parametrize("implementation", [n for n in IMPLEMENTATIONS if n.startswith("native")])
def test_a_value_does_not_depend_on_what_is_beside_it(implementation):
    anchor, keys = rows(41, 203, 37)
    values, indices = topk(implementation, anchor, keys, 203)
    values = values.gather(1, indices.argsort(1))
    for first, count in ((0, 1), (3, 50), (101, 102)):
        some, columns = topk(implementation, anchor[5:12], keys[first:][:count], count)
        assert_bitwise_equal(some.gather(1, columns.argsort(1)), values[5:12, first:][:, :count])


@every_implementation
def test_scale_of_rows_does_not_matter(implementation):
    # powers of 2 leave unit rows as they are, bit for bit
    anchor, keys = rows(11, 90, 7)
    expected = topk(implementation, anchor, keys, 9)
    scaled = (z * torch.randint(-20, 21, (len(z), 1)).float().exp2() for z in (anchor, keys))
    values, indices = topk(implementation, *scaled, 9)
    assert_bitwise_equal(values, expected[0])
    assert_bitwise_equal(indices, expected[1])
