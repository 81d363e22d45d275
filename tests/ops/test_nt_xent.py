import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.testing import (
    assert_accurate,
    assert_bitwise_equal,
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

TEMPERATURES = (0.5, 0.1, 0.07, 0.05, 0.02, 0.005)
# the interpreter's turn is in test_kernels_rows.py
IMPLEMENTATIONS = [name for name in implementations("nt_xent") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def check(implementation, z0, z1, temperature):
    with running(implementation) as impl:
        options = {"temperature": temperature, "impl": impl}
        loss, grads = value_and_grads(clae_fast.nt_xent, z0, z1, **options)
        with torch.no_grad():
            loss_alone = clae_fast.nt_xent(z0, z1, **options)
    eager_loss, eager_grads = value_and_grads(reference.nt_xent, z0, z1, temperature=temperature)
    exact_loss, exact_grads = value_and_grads(
        reference.nt_xent, z0.double(), z1.double(), temperature=temperature
    )
    assert loss.dtype == torch.float32
    for value in (loss, loss_alone):
        assert_accurate(value, eager_loss, exact_loss, temperature=temperature, what="loss")
    for name, grad, eager, exact in zip(
        ("dz0", "dz1"), grads, eager_grads, exact_grads, strict=True
    ):
        assert_accurate(grad, eager, exact, temperature=temperature, what=name)


@every_implementation
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3], ids=["independent", "near", "equal"])
# rows and columns on both sides of vectors' and tiles' ends, and neither a multiple of them
@pytest.mark.parametrize(("N", "D"), [(2, 1), (7, 5), (33, 130), (131, 17)])
def test_against_fp64(implementation, N, D, noise, temperature):
    check(implementation, *projections(N, D, noise=noise), temperature)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_half_precision_inputs(implementation, dtype, temperature):
    check(implementation, *projections(37, 24, dtype=dtype), temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.005])
def test_rows_around_the_norm_floor(implementation, temperature):
    z0, z1 = projections(12, 10)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check(implementation, z0, z1, temperature)


@every_implementation
def test_all_rows_equal(implementation):
    z = torch.ones(9, 4)
    with running(implementation) as impl:
        loss, (dz, _) = value_and_grads(clae_fast.nt_xent, z, z, impl=impl)
    assert loss.item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-6)
    assert dz.abs().max() < 1e-6


@every_implementation
def test_one_pair_has_no_loss(implementation):
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.nt_xent, *projections(1, 5), impl=impl)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@every_implementation
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs(implementation, layout):
    z0, z1 = projections(14, 10)
    strided = {
        "transposed": lambda z: z.T.contiguous().T,
        "sliced": lambda z: torch.cat([z, z], 1)[:, :10],
        "expanded": lambda z: z[:, :1].expand(-1, 10),
    }[layout]
    s0, s1 = strided(z0), strided(z1)
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.nt_xent, s0, s1, impl=impl)
        dense = value_and_grads(clae_fast.nt_xent, s0.contiguous(), s1.contiguous(), impl=impl)
    assert_bitwise_equal(loss, dense[0])
    for grad, expected in zip(grads, dense[1], strict=True):
        assert_bitwise_equal(grad, expected)


@every_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(implementation, which):
    z = list(projections(6, 4))
    with running(implementation) as impl:
        both = value_and_grads(clae_fast.nt_xent, *z, impl=impl)[1]
        z[which].requires_grad_()
        clae_fast.nt_xent(*z, impl=impl).backward()
    assert_bitwise_equal(z[which].grad, both[which])
    assert z[1 - which].grad is None


@every_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradient(implementation, bad):
    z0, z1 = projections(5, 6)
    z0[3, 2] = bad
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.nt_xent, z0, z1, impl=impl)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


@every_implementation
def test_gradient_is_scaled_before_the_cast_to_half(implementation):
    # unscaled, these gradients are below fp16's smallest number
    z0, z1 = (1000 * z for z in projections(64, 8))
    with running(implementation) as impl:
        scale = 2.0**16
        _, half = value_and_grads(clae_fast.nt_xent, z0.half(), z1.half(), scale=scale, impl=impl)
        _, full = value_and_grads(
            clae_fast.nt_xent, z0.half().float(), z1.half().float(), impl=impl
        )
    assert full[0].abs().max() < 2**-14
    for h, f in zip(half, full, strict=True):
        assert h.dtype == torch.float16
        torch.testing.assert_close(h.float() / scale, f, rtol=2**-10, atol=2**-25 / scale)


@every_implementation
def test_double_backward_raises(implementation):
    z0, z1 = (z.requires_grad_() for z in projections(4, 3))
    with running(implementation) as impl:
        loss = clae_fast.nt_xent(z0, z1, impl=impl)
    (dz0,) = torch.autograd.grad(loss, z0, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz0.sum().backward()
    # nor silently through the scale of the loss
    scale = torch.ones((), requires_grad=True)
    (dz0,) = torch.autograd.grad(loss * scale, z0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz0.sum().backward()


@every_implementation
def test_backward_twice_gives_the_same(implementation):
    z0, z1 = (z.requires_grad_() for z in projections(4, 3))
    with running(implementation) as impl:
        loss = clae_fast.nt_xent(z0, z1, impl=impl)
    first = torch.autograd.grad(3 * loss, (z0, z1), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (z0, z1))
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)


@every_implementation
def test_same_tensor_twice(implementation):
    z, _ = projections(6, 4)
    with running(implementation) as impl:
        _, (d0, d1) = value_and_grads(clae_fast.nt_xent, z, z, impl=impl)
        leaf = z.clone().requires_grad_()
        clae_fast.nt_xent(leaf, leaf, impl=impl).backward()
    torch.testing.assert_close(leaf.grad, d0 + d1)


def test_fp64_is_the_reference():
    z0, z1 = projections(6, 4, dtype=torch.float64)
    assert clae_fast.nt_xent(z0, z1) == reference.nt_xent(z0, z1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z0": [1.0]}, TypeError, "z0 must be a torch.Tensor, got list"),
        ({"z1": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "z1 must be of dtype"),
        ({"z1": torch.ones(4, 3, dtype=torch.float16)}, TypeError, "z1 must have the dtype of z0"),
        ({"z0": torch.ones(4)}, ValueError, r"z0 must have shape \[N, D\].*got \[4\]"),
        ({"z0": torch.ones(0, 3)}, ValueError, r"z0 must have shape .* got \[0, 3\]"),
        ({"z1": torch.ones(5, 3)}, ValueError, r"z1 must have the shape of z0, \[4, 3\], got"),
        ({"z1": torch.ones(4, 3, device="meta")}, ValueError, "z1 must be on the device of z0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"temperature": "0.5"}, TypeError, "temperature must be a number, got str"),
        ({"exact": 1}, TypeError, "exact must be True or False, got int"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"z0": torch.ones(4, 3), "z1": torch.ones(4, 3), "temperature": 0.5, **change}
    with pytest.raises(error, match=message):
        clae_fast.nt_xent(arguments.pop("z0"), arguments.pop("z1"), **arguments)
