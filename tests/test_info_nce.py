import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.ops import _rows
from clae_fast.testing import (
    assert_accurate,
    assert_bitwise_equal,
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in test_kernels_rows.py
IMPLEMENTATIONS = [name for name in implementations("info_nce") if name != "triton"]
NATIVE = [name for name in IMPLEMENTATIONS if name.startswith("native")]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def check(implementation, anchor, keys, temperature, **options):
    options = {"temperature": temperature, **options}
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.info_nce, anchor, keys, impl=impl, **options)
        loss_alone = clae_fast.info_nce(anchor, keys, impl=impl, **options)
        # where keys are constants, one pass over them makes both
        loss_of_anchor, (danchor,) = value_and_grads(
            lambda a: clae_fast.info_nce(a, keys, impl=impl, **options), anchor
        )
    eager_loss, eager_grads = value_and_grads(reference.info_nce, anchor, keys, **options)
    exact_loss, exact_grads = value_and_grads(
        reference.info_nce, anchor.double(), keys.double(), **options
    )
    for value in (loss, loss_alone, loss_of_anchor):
        assert_accurate(value, eager_loss, exact_loss, temperature=temperature, what="loss")
    for name, grad, eager, exact in zip(
        ("danchor", "dkeys", "danchor alone"),
        (*grads, danchor),
        (*eager_grads, eager_grads[0]),
        (*exact_grads, exact_grads[0]),
        strict=True,
    ):
        assert_accurate(grad, eager, exact, temperature=temperature, what=name)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3], ids=["independent", "near", "equal"])
@pytest.mark.parametrize(("N", "M"), [(2, 2), (1, 4), (33, 33), (20, 61)])
def test_against_fp64(implementation, N, M, noise, temperature):
    anchor, keys = projections(M, 17, noise=noise)
    check(implementation, anchor[:N], keys, temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
def test_both_directions(implementation, temperature):
    check(implementation, *projections(20, 17, noise=0.1), temperature, symmetric=True)
    check(implementation, *projections(131, 9, noise=0.1), temperature, symmetric=True)


@every_implementation
@pytest.mark.parametrize("temperature", [0.2, 0.02])
# several blocks of anchors, groups of them, and more tiles of keys than chunks
@pytest.mark.parametrize(("N", "M"), [(7, 3500), (200, 203), (401, 790)])
def test_many_keys(implementation, N, M, temperature):
    anchor, keys = projections(M, 10, noise=0.5)
    check(implementation, anchor[:N], keys, temperature)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(implementation, dtype):
    check(implementation, *projections(23, 12, dtype=dtype), 0.1)
    check(implementation, *projections(115, 7, dtype=dtype), 0.05, symmetric=True)


@every_implementation
def test_rows_around_the_norm_floor(implementation):
    anchor, keys = projections(9, 6)
    anchor[0], anchor[1], anchor[2] = 0, 1e-13, anchor[2] * 1e-6
    keys[2], keys[3], keys[4] = 0, 1e-13, keys[4] * 1e-6
    check(implementation, anchor, keys, 0.1)


def test_blocks_of_rows(monkeypatch):
    anchor, keys = projections(13, 6)
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 13 + 1)
    check("torch", anchor, keys, 0.1)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("both", [True, False], ids=["both", "anchor"])
def test_the_number_of_threads_changes_nothing(implementation, both, threads):
    anchor, keys = projections(500, 13)

    def run():
        with running(implementation) as impl:
            loss = lambda a, k: clae_fast.info_nce(a, k, impl=impl)  # noqa: E731
            if both:
                return value_and_grads(loss, anchor[:100], keys)
            return value_and_grads(lambda a: loss(a, keys), anchor[:100])

    results = []
    for count in (1, 2, 3):
        with threads(count):
            value, grads = run()
        results.append((value, *grads))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_bitwise_equal(actual, expected)


@every_implementation
def test_one_key_has_no_loss(implementation):
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.info_nce, *projections(1, 5), impl=impl)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@every_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(implementation, which):
    operands = list(projections(6, 4))
    with running(implementation) as impl:
        both = value_and_grads(clae_fast.info_nce, *operands, impl=impl)[1]
        operands[which].requires_grad_()
        loss = clae_fast.info_nce(*operands, impl=impl)
    # the other one was not even computed
    assert [saved.numel() for saved in loss.grad_fn.saved_tensors][1 - which] == 0
    loss.backward()
    torch.testing.assert_close(operands[which].grad, both[which])
    assert operands[1 - which].grad is None


@every_implementation
def test_strided_inputs(implementation):
    anchor, keys = (torch.cat([z, z], 1)[:, :6] for z in projections(9, 6))
    with running(implementation) as impl:
        strided = value_and_grads(clae_fast.info_nce, anchor, keys, impl=impl)
        dense = value_and_grads(
            clae_fast.info_nce, anchor.contiguous(), keys.contiguous(), impl=impl
        )
    torch.testing.assert_close(strided, dense)


@every_implementation
@pytest.mark.parametrize(("which", "row"), [(0, 1), (1, 1), (1, 4)])
def test_nan_reaches_loss_and_gradients(implementation, which, row):
    operands = projections(5, 6)
    operands[which][row, 1] = math.nan
    anchor, keys = operands[0][:3], operands[1]
    with running(implementation) as impl:
        loss, (danchor, _) = value_and_grads(clae_fast.info_nce, anchor, keys, impl=impl)
        alone, (danchor_alone,) = value_and_grads(
            lambda a: clae_fast.info_nce(a, keys, impl=impl), anchor
        )
    assert loss.isnan()
    assert alone.isnan()
    reached = [row] if which == 0 else [0, 1, 2]
    assert danchor[reached].isnan().all()
    assert danchor_alone[reached].isnan().all()


def test_double_backward_raises():
    anchor, keys = (z.requires_grad_() for z in projections(4, 3))
    (danchor,) = torch.autograd.grad(clae_fast.info_nce(anchor, keys), anchor, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        danchor.sum().backward()


@pytest.mark.parametrize(
    ("anchor", "keys", "error", "message"),
    [
        ((4, 3), (3, 3), ValueError, r"keys must have shape \[M, D\] with M >= N"),
        ((4, 3), (4, 2), ValueError, r"keys must have shape \[M, D\] .*got \[4, 2\] for \[4, 3\]"),
        ((0, 3), (4, 3), ValueError, r"anchor must have shape .* got \[0, 3\]"),
        ((4, 3), (4,), ValueError, r"keys must have shape .* got \[4\]"),
    ],
)
def test_bad_shapes(anchor, keys, error, message):
    with pytest.raises(error, match=message):
        clae_fast.info_nce(torch.ones(anchor), torch.ones(keys))


def test_both_directions_need_as_many_keys():
    with pytest.raises(ValueError, match=r"keys must have the shape of anchor, \[3, 2\], where"):
        clae_fast.info_nce(torch.ones(3, 2), torch.ones(4, 2), symmetric=True)


def test_bad_flag():
    with pytest.raises(TypeError, match="symmetric must be True or False, got str"):
        clae_fast.info_nce(torch.ones(4, 3), torch.ones(4, 3), symmetric="yes")


def test_bad_dtype():
    with pytest.raises(TypeError, match="keys must have the dtype of anchor"):
        clae_fast.info_nce(torch.ones(4, 3), torch.ones(4, 3).half())
