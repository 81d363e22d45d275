import pytest
import torch
from op_cases import NEAR, TEMPERATURES, BadInputs, Case, Grid, seeded

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


def queue(N, M, D, **options):
    anchor, keys = projections(max(N, M), D, **options)
    return {"anchor": anchor[:N], "keys": keys[:M]}


def named(N, M, D, **options):
    """Several anchors may share a positive."""
    return {**queue(N, M, D, **options), "positive": torch.randint(M, (N,), generator=seeded())}


def _half_as_many(N, D):
    return (N + 1) // 2, N, D


_KEYS = {"rows": ("anchor", "keys"), "wrt": ("anchor", "keys"), "separate": True}

CASES = {
    "info_nce": Case(
        "info_nce",
        queue,
        size=_half_as_many,
        grids=(
            Grid(
                ((2, 2, 17), (1, 4, 17), (33, 33, 17), (20, 61, 17)),
                TEMPERATURES,
                (*NEAR, 1e-3),
            ),
            # several blocks of anchors, groups of them, and more tiles of keys than chunks
            Grid(((7, 3500, 10), (200, 203, 10), (401, 790, 10)), (0.2, 0.02), (0.5,)),
        ),
        large=(100, 500, 13),
        searched=True,
        **_KEYS,
    ),
    # more keys than anchors, and fewer
    "info_nce-named": Case(
        "info_nce",
        named,
        size=_half_as_many,
        grids=(
            Grid(((3, 1, 17), (20, 61, 17), (61, 20, 17), (200, 203, 17)), (0.5, 0.07, 0.02), NEAR),
        ),
        large=(100, 500, 13),
        searched=True,
        compiled=False,
        **_KEYS,
    ),
    "info_nce-symmetric": Case(
        "info_nce",
        queue,
        size=lambda N, D: (N, N, D),
        grids=(Grid(((20, 20, 17), (131, 131, 9)), (0.5, 0.05, 0.01), (0.1,)),),
        large=(203, 203, 33),
        options={"symmetric": True},
        searched=True,
        compiled=False,
        **_KEYS,
    ),
    **{
        f"info_nce-rows{kind}": Case(
            "info_nce",
            named if kind == "-named" else queue,
            size=_half_as_many if kind != "-symmetric" else lambda N, D: (N, N, D),
            grids=(
                Grid(
                    ((33, 40, 17),) if kind != "-symmetric" else ((40, 40, 17),),
                    (0.5, 0.07, 0.02),
                    (0.3,),
                ),
            ),
            options={"reduction": "none", "symmetric": kind == "-symmetric"},
            compiled=kind == "-named",
            large=(100, 500, 13) if kind != "-symmetric" else (203, 203, 33),
            **_KEYS,
        )
        for kind in ("", "-named", "-symmetric")
    },
}
INDEX = torch.zeros(4, dtype=torch.int64)
BAD_INPUTS = BadInputs(
    {"anchor": torch.ones(4, 2), "keys": torch.ones(5, 2)},
    own=[
        ({"keys": torch.ones(3, 2)}, ValueError, r"keys must have shape \[M, D\] with M >= N"),
        (
            {"keys": torch.ones(4, 3)},
            ValueError,
            r"keys must have shape \[M, D\] .*got \[4, 3\] for \[4, 2\]",
        ),
        ({"symmetric": True}, ValueError, r"keys must have the shape of anchor, \[4, 2\], where"),
        ({"symmetric": "yes"}, TypeError, "symmetric must be True or False, got str"),
        ({"positive": [0, 0, 0, 0]}, TypeError, "positive must be a torch.Tensor, got list"),
        ({"positive": INDEX.int()}, TypeError, "positive must be of dtype int64, got torch.int32"),
        ({"positive": INDEX[:2]}, ValueError, r"positive must have shape .* N = 4 .* got \[2\]"),
        ({"positive": INDEX.to("meta")}, ValueError, "positive must be on the device of anchor"),
        ({"positive": INDEX + 5}, ValueError, "positive must hold columns from 0 to 4, got 5"),
        ({"positive": INDEX - 1}, ValueError, "positive must hold columns from 0 to 4, got -1"),
        (
            {"positive": INDEX, "keys": torch.ones(4, 2), "symmetric": True},
            ValueError,
            "positive must be None where symmetric",
        ),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)


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
