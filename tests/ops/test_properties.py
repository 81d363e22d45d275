"""What holds of the ops for any input, searched for counterexamples; the same search every time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from op_cases import check, run, searched_cases

import clae_fast
from clae_fast.testing import assert_bitwise_equal, implementations, running

search = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    # the fixtures seed and fill memory, which one example does not undo for the next
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.usefixtures("nan_empty")


def on_the_cpu(op):
    """All but the interpreter, which is slow and has tests of its own."""
    return ["reference", *(name for name in implementations(op) if name != "triton")]


CASES = searched_cases()
CALLS = [
    pytest.param(case, implementation, id=f"{name}-{implementation}")
    for name, case in CASES.items()
    for implementation in on_the_cpu(case.op)
]
every_op = pytest.mark.parametrize(("case", "implementation"), CALLS)
every_step = pytest.mark.parametrize("implementation", on_the_cpu("linf_step"))
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 1000)
# below, the gradients of whole rows are near the smallest normal number
temperatures = st.sampled_from([1.0, 0.5, 0.1, 0.07, 0.02])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = {
    "contiguous": lambda z: z,
    "transposed": lambda z: z.T.contiguous().T,
    "sliced": lambda z: torch.cat([z, torch.full_like(z, torch.nan)], 1)[:, : z.shape[1]],
    "every other row": lambda z: torch.stack([z, torch.full_like(z, torch.nan)], 1)[:, 0],
    "offset": lambda z: torch.cat([z.new_full((3,), torch.nan), z.flatten()])[3:].view(z.shape),
    "reversed": lambda z: z.flip(0).contiguous().flip(0),
}
layouts = st.sampled_from(list(LAYOUTS))


def results(case, implementation, tensors, temperature):
    with running(implementation) as impl:
        return run(case, tensors, temperature=temperature, impl=impl)


@every_op
@search
@given(size=sizes, seed=seeds, temperature=temperatures, dtype=dtypes, layout=layouts)
def test_within_the_error_budget(case, implementation, size, seed, temperature, dtype, layout):
    tensors = case.tensors(*size, dtype=dtype, seed=seed)
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in case.rows}
    check(case, tensors, temperature, results(case, implementation, tensors, temperature))


@every_op
@search
@given(size=sizes, seed=seeds, data=st.data())
def test_rows_scale_the_gradient_alone(case, implementation, size, seed, data):
    # powers of 2 leave unit rows as they are, bit for bit; from 1e-9, above the norm's floor
    tensors = case.tensors(*size, seed=seed)
    largest = 99 if implementation.startswith("native") else 60
    plain, scaled, scales = dict(tensors), dict(tensors), []
    for name in case.rows:
        z = tensors[name] + 0.1 * tensors[name].sign()
        exponents = st.lists(st.integers(-30, largest), min_size=len(z), max_size=len(z))
        scales.append(torch.tensor(data.draw(exponents))[:, None].float().exp2())
        plain[name], scaled[name] = z, scales[-1] * z
    scaled = results(case, implementation, scaled, 0.1)
    plain = results(case, implementation, plain, 0.1)
    if case.is_loss:
        assert_bitwise_equal(scaled[0], plain[0])
    for d_scaled, d_plain, scale in zip(
        case.gradients(scaled), case.gradients(plain), scales, strict=True
    ):
        # |z| = 1e30 sends a gradient below the smallest normal number
        torch.testing.assert_close(d_scaled, d_plain / scale, rtol=1e-6, atol=1e-37)


@every_op
@search
@given(size=sizes, seed=seeds, temperature=temperatures)
def test_gradient_is_orthogonal_to_its_row(case, implementation, size, seed, temperature):
    tensors = case.tensors(*size, noise=0.5, seed=seed)
    outputs = results(case, implementation, tensors, temperature)
    N = len(tensors[case.rows[0]])
    for name, dz in zip(case.rows, case.gradients(outputs), strict=True):
        z = tensors[name]
        radial = (z.double() * dz.double()).sum(1).abs()
        # of what is projected: at most 4 unit rows over N T, and D products of it
        size_of_terms = (z.double() * dz.double()).abs().sum(1) + 4 / (N * temperature)
        assert (radial <= 8 * torch.finfo(torch.float32).eps * size_of_terms).all()


@every_op
@search
@given(size=sizes, seed=seeds, temperature=temperatures)
def test_order_of_the_batch_does_not_matter(case, implementation, size, seed, temperature):
    tensors = case.tensors(*size, seed=seed)
    operands = [tensors[name] for name in case.rows]
    # all of a batch, but of keys those that have an anchor
    order = torch.randperm(len(operands[0]))
    orders = [torch.cat([order, torch.arange(len(order), len(z))]) for z in operands]
    shuffled = {**tensors, **{n: tensors[n][o] for n, o in zip(case.rows, orders, strict=True)}}
    if "positive" in tensors:
        # where the key is now that an anchor names
        shuffled["positive"] = orders[1].argsort()[tensors["positive"][order]]
    outputs = results(case, implementation, shuffled, temperature)
    grads = [dz[order.argsort()] for dz, order in zip(case.gradients(outputs), orders, strict=True)]
    loss = outputs[:1] if case.is_loss else []
    check(case, tensors, temperature, loss + grads)


@every_op
@search
@given(size=sizes, data=st.data(), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_nan_and_infinity_are_not_swallowed(case, implementation, size, data, bad):
    tensors = case.tensors(*size)
    which = data.draw(st.integers(0, len(case.rows) - 1))
    z = tensors[case.rows[which]].clone()
    row, column = (data.draw(st.integers(0, n - 1)) for n in z.shape)
    z[row, column] = bad
    outputs = results(case, implementation, {**tensors, case.rows[which]: z}, 0.1)
    if case.is_loss:
        assert outputs[0].isnan()
    assert case.gradients(outputs)[which][row].isnan().all()


numbers = st.floats(width=32)


def vectors(elements):
    return st.integers(1, 70).flatmap(lambda n: arrays(np.float32, (3, n), elements=elements))


def step(implementation, x, grad, **options):
    with running(implementation) as impl:
        return clae_fast.linf_step(x, grad, impl=impl, **options)


@every_step
@search
@given(values=vectors(numbers), dtype=dtypes, eps=st.floats(0, 1e4), alpha=st.floats(0, 1e4))
def test_step_stays_in_the_ball(implementation, values, dtype, eps, alpha):
    x, x0, grad = torch.from_numpy(values).to(dtype)[:, None]
    x_adv = step(implementation, x, grad, alpha=alpha, x0=x0, eps=eps)
    nan = x.isnan() | x0.isnan()
    assert torch.equal(x_adv.isnan(), nan)
    finite = x0.isfinite() & ~nan
    assert ((x_adv.double() - x0.double()).abs() <= eps)[finite].all()


@every_step
@search
@given(
    values=vectors(numbers),
    dtype=dtypes,
    limits=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)),
)
def test_step_stays_in_range(implementation, values, dtype, limits):
    # numbers that every dtype has
    lo, hi = (float(torch.tensor(limit).bfloat16().half()) for limit in sorted(limits))
    x, x0, grad = torch.from_numpy(values).to(dtype)[:, None]
    x0 = x0.nan_to_num().clamp(lo, hi)
    x_adv = step(implementation, x, grad, alpha=0.5, x0=x0, eps=0.25, lo=lo, hi=hi)
    inside = (x_adv.double() >= lo) & (x_adv.double() <= hi)
    assert (inside | x.isnan()).all()


@every_step
@search
@given(values=vectors(numbers), dtype=dtypes)
def test_step_follows_the_sign(implementation, values, dtype):
    x, _, grad = torch.from_numpy(values).to(dtype)[:, None]
    x = x.nan_to_num().clamp(-4, 4)
    grad[:, ::3] = torch.nan
    x_adv = step(implementation, x, grad, alpha=0.5)
    moved = (x_adv.double() - x.double()).sign()
    assert (moved == grad.double().nan_to_num(0.0).sign()).all()


@every_step
@search
@given(seed=seeds, shape=st.tuples(*[st.integers(1, 6)] * 4), data=st.data())
def test_step_in_any_layout(implementation, seed, shape, data):
    generator = torch.Generator().manual_seed(seed)
    operands = torch.randn(3, *shape, generator=generator)
    x, grad, x0 = (
        z.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        for z, order in zip(
            operands, (data.draw(st.permutations(range(4))) for _ in range(3)), strict=True
        )
    )
    options = {"alpha": 0.5, "eps": [0.1 + 0.1 * c for c in range(shape[1])]}
    dense = step("reference", x.contiguous(), grad.contiguous(), x0=x0.contiguous(), **options)
    assert_bitwise_equal(step(implementation, x, grad, x0=x0, **options), dense)
