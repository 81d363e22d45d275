import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.ops import _rows
from clae_fast.testing import (
    assert_accurate,
    assert_bitwise_equal,
    projections,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")


def check(anchor, keys, temperature, **options):
    options = {"temperature": temperature, **options}
    loss, grads = value_and_grads(clae_fast.info_nce, anchor, keys, **options)
    loss_alone = clae_fast.info_nce(anchor, keys, **options)
    eager_loss, eager_grads = value_and_grads(reference.info_nce, anchor, keys, **options)
    exact_loss, exact_grads = value_and_grads(
        reference.info_nce, anchor.double(), keys.double(), **options
    )
    for value in (loss, loss_alone):
        assert_accurate(value, eager_loss, exact_loss, temperature=temperature, what="loss")
    for name, grad, eager, exact in zip(
        ("danchor", "dkeys"), grads, eager_grads, exact_grads, strict=True
    ):
        assert_accurate(grad, eager, exact, temperature=temperature, what=name)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3], ids=["independent", "near", "equal"])
@pytest.mark.parametrize(("N", "M"), [(2, 2), (1, 4), (33, 33), (20, 61)])
def test_against_fp64(N, M, noise, temperature):
    anchor, keys = projections(M, 17, noise=noise)
    check(anchor[:N], keys, temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_both_directions(temperature):
    check(*projections(20, 17, noise=0.1), temperature, symmetric=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    check(*projections(23, 12, dtype=dtype), 0.1)


def test_rows_around_the_norm_floor():
    anchor, keys = projections(9, 6)
    anchor[0], anchor[1], anchor[2] = 0, 1e-13, anchor[2] * 1e-6
    keys[2], keys[3], keys[4] = 0, 1e-13, keys[4] * 1e-6
    check(anchor, keys, 0.1)


def test_blocks_of_rows(monkeypatch):
    anchor, keys = projections(13, 6)
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 13 + 1)
    check(anchor, keys, 0.1)


def test_one_key_has_no_loss():
    loss, grads = value_and_grads(clae_fast.info_nce, *projections(1, 5))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(which, monkeypatch):
    operands = list(projections(6, 4))
    both = value_and_grads(clae_fast.info_nce, *operands)[1]
    operands[which].requires_grad_()
    loss = clae_fast.info_nce(*operands)
    # the other one was not even computed
    assert [saved.numel() for saved in loss.grad_fn.saved_tensors][1 - which] == 0
    loss.backward()
    assert_bitwise_equal(operands[which].grad, both[which])
    assert operands[1 - which].grad is None


def test_strided_inputs():
    anchor, keys = (torch.cat([z, z], 1)[:, :6] for z in projections(9, 6))
    strided = value_and_grads(clae_fast.info_nce, anchor, keys)
    dense = value_and_grads(clae_fast.info_nce, anchor.contiguous(), keys.contiguous())
    torch.testing.assert_close(strided, dense)


def test_nan_reaches_loss_and_gradients():
    anchor, keys = projections(5, 6)
    keys[4, 1] = math.nan
    loss, grads = value_and_grads(clae_fast.info_nce, anchor, keys)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


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
