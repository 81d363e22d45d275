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


# more keys than anchors, and fewer; several anchors share a positive
@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("noise", [None, 0.1], ids=["independent", "near"])
@pytest.mark.parametrize(("N", "M"), [(3, 1), (20, 61), (61, 20), (200, 203)])
def test_named_positives(implementation, N, M, noise, temperature):
    anchor, keys = (z[:n] for z, n in zip(projections(203, 17, noise=noise), (N, M), strict=True))
    positive = torch.randint(M, (N,))
    check(implementation, anchor, keys, temperature, positive=positive)


@every_implementation
def test_named_positives_in_half_precision(implementation):
    anchor, keys = projections(115, 12, dtype=torch.bfloat16)
    check(implementation, anchor[:30], keys, 0.1, positive=torch.arange(30) % 7)


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
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"positive": "random"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_rows(implementation, options, temperature, dtype):
    anchor, keys = projections(40, 17, noise=0.3, dtype=dtype)
    if "symmetric" not in options:
        anchor = anchor[:33]
    if "positive" in options:
        options = {"positive": torch.randint(40, (33,))}
    options = {"temperature": temperature, "reduction": "none", **options}
    # what the rows count in the gradient: both signs, and of many magnitudes
    cotangent = torch.randn(len(anchor)) * torch.randn(len(anchor)).mul(3).exp()

    def rows(a, k, **options):
        losses = clae_fast.info_nce(a, k, **options)
        assert losses.shape == (len(a),)
        return losses

    def weighted(a, k, loss=rows, **options):
        return (
            loss(a, k, **options) * cotangent.to(torch.promote_types(a.dtype, torch.float32))
        ).sum()

    with running(implementation) as impl:
        losses = rows(anchor, keys, impl=impl, **options)
        _, grads = value_and_grads(weighted, anchor, keys, impl=impl, **options)
        _, (alone,) = value_and_grads(lambda a: weighted(a, keys, impl=impl, **options), anchor)
    by = {"loss": reference.info_nce, **options}
    assert_accurate(
        losses,
        reference.info_nce(anchor, keys, **options),
        reference.info_nce(anchor.double(), keys.double(), **options),
        temperature=temperature,
        what="losses",
    )
    _, eager = value_and_grads(weighted, anchor, keys, **by)
    _, exact = value_and_grads(weighted, anchor.double(), keys.double(), **by)
    for name, grad, other, truth in zip(
        ("danchor", "dkeys", "danchor alone"),
        (*grads, alone),
        (*eager, eager[0]),
        (*exact, exact[0]),
        strict=True,
    ):
        assert_accurate(grad, other, truth, temperature=temperature, what=name)


@every_implementation
def test_losses_of_rows_are_those_of_the_mean(implementation):
    anchor, keys = projections(31, 9)
    with running(implementation) as impl:
        losses = clae_fast.info_nce(anchor, keys, reduction="none", impl=impl)
        mean = clae_fast.info_nce(anchor, keys, impl=impl)
    torch.testing.assert_close(losses.mean(), mean)


def test_blocks_of_rows(monkeypatch):
    anchor, keys = projections(13, 6)
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 13 + 1)
    check("torch", anchor, keys, 0.1)
    check("torch", anchor, keys, 0.1, positive=torch.arange(13).flip(0))


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("both", [True, False], ids=["both", "anchor"])
@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
def test_the_number_of_threads_changes_nothing(implementation, both, named, threads):
    anchor, keys = projections(500, 13)
    positive = torch.arange(100) * 7 % 90 if named else None

    def run():
        with running(implementation) as impl:
            loss = lambda a, k: clae_fast.info_nce(a, k, positive=positive, impl=impl)  # noqa: E731
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


INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positive": [0, 0, 0]}, TypeError, "positive must be a torch.Tensor, got list"),
        ({"positive": INDEX.int()}, TypeError, "positive must be of dtype int64, got torch.int32"),
        ({"positive": INDEX[:2]}, ValueError, r"positive must have shape .* N = 3 .* got \[2\]"),
        ({"positive": INDEX.to("meta")}, ValueError, "positive must be on the device of anchor"),
        ({"positive": INDEX + 5}, ValueError, "positive must hold columns from 0 to 4, got 5"),
        ({"positive": INDEX - 1}, ValueError, "positive must hold columns from 0 to 4, got -1"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        clae_fast.info_nce(torch.ones(3, 2), torch.ones(5, 2), **options)


def test_positives_by_name_have_one_direction():
    z = torch.ones(3, 2)
    with pytest.raises(ValueError, match="positive must be None where symmetric"):
        clae_fast.info_nce(z, z, positive=INDEX, symmetric=True)


def test_bad_flag():
    with pytest.raises(TypeError, match="symmetric must be True or False, got str"):
        clae_fast.info_nce(torch.ones(4, 3), torch.ones(4, 3), symmetric="yes")


def test_bad_dtype():
    with pytest.raises(TypeError, match="keys must have the dtype of anchor"):
        clae_fast.info_nce(torch.ones(4, 3), torch.ones(4, 3).half())
