import math

import pytest
import torch

import clae_fast
from clae_fast import _native, reference
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
IMPLEMENTATIONS = [name for name in implementations("uel") if name != "triton"]
NATIVE = [name for name in IMPLEMENTATIONS if name.startswith("native")]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def check(implementation, z0, z1, temperature):
    with running(implementation) as impl:
        options = {"temperature": temperature, "impl": impl}
        loss, grads = value_and_grads(clae_fast.uel, z0, z1, **options)
        loss_alone = clae_fast.uel(z0, z1, **options)
    eager_loss, eager_grads = value_and_grads(reference.uel, z0, z1, temperature=temperature)
    exact_loss, exact_grads = value_and_grads(
        reference.uel, z0.double(), z1.double(), temperature=temperature
    )
    for value in (loss, loss_alone):
        assert_accurate(value, eager_loss, exact_loss, temperature=temperature, what="loss")
    for name, grad, eager, exact in zip(
        ("dz0", "dz1"), grads, eager_grads, exact_grads, strict=True
    ):
        assert_accurate(grad, eager, exact, temperature=temperature, what=name)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3], ids=["independent", "near", "equal"])
# rows and columns on both sides of vectors' and tiles' ends, and neither a multiple of them
@pytest.mark.parametrize(("N", "D"), [(2, 1), (7, 5), (33, 70), (131, 17)])
def test_against_fp64(implementation, N, D, noise, temperature):
    check(implementation, *projections(N, D, noise=noise), temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.005])
def test_a_negative_nearer_than_the_positive(implementation, temperature):
    # 1 - p of that negative is lost in a softmax that does not set it apart
    z0, z1 = projections(6, 8)
    z0[1] = z0[0] + 1e-4 * z0[1]
    check(implementation, z0, z1, temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_two_negatives_equally_near(implementation, temperature):
    z0, z1 = projections(9, 8)
    z0[1] = z0[2]
    check(implementation, z0, z1, temperature)


@every_implementation
def test_well_separated_pairs_keep_their_digits(implementation):
    # 1 - p of the positive is below fp32's spacing near 1
    z = torch.eye(6)
    with running(implementation) as impl:
        loss, (dz, _) = value_and_grads(clae_fast.uel, z, z, temperature=0.02, impl=impl)
        eager_loss, (eager, _) = value_and_grads(reference.uel, z, z, temperature=0.02)
    assert loss.item() == pytest.approx(20 * math.exp(-50), rel=1e-5)
    assert loss.item() == pytest.approx(eager_loss.item(), rel=1e-5)
    torch.testing.assert_close(dz, eager, rtol=1e-5, atol=1e-30)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_half_precision_inputs(implementation, dtype, temperature):
    check(implementation, *projections(37, 25, dtype=dtype), temperature)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_rows_around_the_norm_floor(implementation, temperature):
    z0, z1 = projections(9, 6)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check(implementation, z0, z1, temperature)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 26 + 1)
    check("torch", *projections(13, 6), 0.1)


@every_implementation
def test_one_pair_has_no_loss(implementation):
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.uel, *projections(1, 5), impl=impl)
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
        loss, grads = value_and_grads(clae_fast.uel, s0, s1, impl=impl)
        dense = value_and_grads(clae_fast.uel, s0.contiguous(), s1.contiguous(), impl=impl)
    assert_bitwise_equal(loss, dense[0])
    for grad, expected in zip(grads, dense[1], strict=True):
        assert_bitwise_equal(grad, expected)


@every_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(implementation, which):
    z = list(projections(6, 4))
    with running(implementation) as impl:
        both = value_and_grads(clae_fast.uel, *z, impl=impl)[1]
        z[which].requires_grad_()
        clae_fast.uel(*z, impl=impl).backward()
    assert_bitwise_equal(z[which].grad, both[which])
    assert z[1 - which].grad is None


@every_implementation
@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradients(implementation, bad, N):
    z0, z1 = projections(N, 6)
    z1[N - 1, 1] = bad
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.uel, z0, z1, impl=impl)
        loss_alone = clae_fast.uel(z0, z1, impl=impl)
    assert loss.isnan()
    assert loss_alone.isnan()
    assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(implementation, dtype, threads):
    z = projections(131, 17, dtype=dtype)
    with running(implementation) as impl:
        one, two, three = [], [], []
        for count, results in ((1, one), (2, two), (3, three)):
            with threads(count):
                loss, grads = value_and_grads(clae_fast.uel, *z, impl=impl)
                results += [loss, *grads]
    for results in (two, three):
        for result, expected in zip(results, one, strict=True):
            assert_bitwise_equal(result, expected)


@pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none")
def test_memory_is_linear_in_the_rows():
    def size(N):
        # without a workspace nothing is read, and any address stands for a gradient that is wanted
        rows, wanted = (0, 0, 128), 1
        return _native._C.uel(_native.isa(), rows, rows, N, 128, 0.5, 2, wanted, wanted, 0)

    assert size(1 << 16) < 1.2 * size(1 << 15) * 2
    assert size(1 << 16) < 0.01 * 4 * (2 << 16) ** 2


@every_implementation
def test_double_backward_raises(implementation):
    z0, z1 = (z.requires_grad_() for z in projections(4, 3))
    with running(implementation) as impl:
        loss = clae_fast.uel(z0, z1, impl=impl)
    (dz0,) = torch.autograd.grad(loss, z0, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz0.sum().backward()


@every_implementation
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(implementation, grad):
    with running(implementation) as impl:
        arguments = (*projections(5, 4), 0.1, grad, False, impl)
        torch.library.opcheck(torch.ops.clae_fast.uel.default, arguments)


def test_bad_arguments():
    with pytest.raises(ValueError, match="z1 must have the shape of z0"):
        clae_fast.uel(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="z0 must have shape"):
        clae_fast.uel(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        clae_fast.uel(torch.ones(4, 3), torch.ones(4, 3), temperature=-1)
    with pytest.raises(RuntimeError, match="uel has no implementation 'cuda'"):
        clae_fast.uel(torch.ones(4, 3), torch.ones(4, 3), impl="cuda")
