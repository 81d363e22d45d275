"""The documented functions under torch.compile, autocast, opcheck and inference mode."""

import pytest
import torch

import clae_fast
from clae_fast import _impl
from clae_fast.testing import projections, value_and_grads

LOSSES = {
    "nt_xent": clae_fast.nt_xent,
    "info_nce": clae_fast.info_nce,
    "uel": clae_fast.uel,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# auto is what people run, the reference is ordinary torch and must be traceable too
every_impl = pytest.mark.parametrize("impl", ["auto", "reference"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@every_loss
@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_losses_compile_without_a_graph_break(loss, impl, dynamic):
    # the losses under another function, as in a training step
    def step(z0, z1):
        return 2 * loss(3 * z0, z1, temperature=0.2, impl=impl)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (6, 9):
        z = projections(N, 4)
        torch.testing.assert_close(value_and_grads(compiled, *z), value_and_grads(step, *z))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*z), step(*z))


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("constant_keys", [False, True])
def test_info_nce_of_rows_compiles_without_a_graph_break(impl, dynamic, constant_keys):
    def step(anchor, keys, positive):
        keys = keys.detach() if constant_keys else keys
        options = {"positive": positive, "reduction": "none", "temperature": 0.2}
        losses = clae_fast.info_nce(3 * anchor, keys, impl=impl, **options)
        return (losses * torch.linspace(-1, 2, len(losses))).sum() + 0 * keys.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (6, 9):
        anchor, keys = (z.requires_grad_() for z in projections(N, 4))
        wanted = [anchor] if constant_keys else [anchor, keys]
        values = [f(anchor, keys, torch.arange(N) // 2) for f in (compiled, step)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, wanted) for value in values))


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_tied_nt_xent_compiles_without_a_graph_break(impl, dynamic):
    def step(z):
        return 2 * clae_fast.tied_nt_xent(3 * z, impl=impl)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (6, 9):
        z, _ = projections(N, 4)
        torch.testing.assert_close(compiled(z), step(z))


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_linf_step_compiles_without_a_graph_break(impl, dynamic, per_channel):
    eps = (0.01, 0.02, 0.03) if per_channel else 0.03

    def step(x, grad):
        return 2 * clae_fast.linf_step(3 * x, grad, alpha=0.03, eps=eps, lo=0.0, hi=1.0, impl=impl)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (2, 5):
        x, grad = torch.rand(N, 3, 4, 4), torch.randn(N, 3, 4, 4)
        torch.testing.assert_close(compiled(x, grad), step(x, grad), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch 2.11's own
def test_default_backend():
    def step(z0, z1, x):
        x_adv = clae_fast.linf_step(x, z0 * z1, alpha=0.1)
        return clae_fast.nt_xent(2 * z0 + x_adv, z1)

    compiled = torch.compile(step, fullgraph=True)
    z0, z1 = projections(6, 4)
    x = torch.rand(6, 4)
    expected = value_and_grads(lambda a, b: step(a, b, x), z0, z1)
    torch.testing.assert_close(value_and_grads(lambda a, b: compiled(a, b, x), z0, z1), expected)


@every_loss
@every_impl
def test_autocast_leaves_the_losses_in_fp32(loss, impl):
    leaves = [z.requires_grad_() for z in projections(6, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(*leaves, impl=impl)
    value = loss(*leaves, impl=impl)
    assert under_autocast == value
    expected = torch.autograd.grad(value, leaves)
    torch.testing.assert_close(torch.autograd.grad(under_autocast, leaves), expected)


@every_impl
def test_autocast_leaves_the_gradient_in_fp32(impl):
    z, _ = projections(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = clae_fast.tied_nt_xent(z, impl=impl)
    torch.testing.assert_close(under_autocast, clae_fast.tied_nt_xent(z, impl=impl))


@every_loss
def test_inference_mode(loss):
    z0, z1 = projections(6, 4)
    with torch.inference_mode():
        assert loss(z0, z1) == loss(z0, z1, impl="auto")
        clae_fast.linf_step(z0, z1, alpha=0.1)
        clae_fast.tied_nt_xent(z0)


def op_samples():
    """Every registered op with arguments for it."""
    z0, z1 = projections(5, 4)
    native = _impl.resolve("nt_xent", "auto", z0)
    if native != "reference":
        yield "nt_xent", (z0, z1, 0.5, False, False, native)
        yield "nt_xent", (z0, z1, 0.5, True, False, native)
        x = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        grad, table = torch.randn(2, 3, 4, 5), torch.rand(4, 3)
        yield "linf_step", (x, grad, None, [0.1, 0.1, 0.0, 1.0], None, native)
        yield "linf_step", (x.half(), grad, x.half(), [], table, native)
    yield "tied_nt_xent", (z0, 0.5, False, "torch")
    yield "uel", (z0, z1, 0.1, True, False, "torch")
    yield "uel", (z0, z1, 0.1, False, False, "torch")
    mean, rows = (True, True, True, False), (False, True, True, False)
    yield "info_nce", (z0[:3], z1, None, None, 0.1, False, *mean, "torch")
    yield "info_nce", (z0[:3], z1, torch.arange(3), torch.ones(3), 0.1, False, *rows, "torch")
    yield "info_nce", (z0.half(), z1.half(), None, None, 0.1, True, *mean, "torch")


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*s, id=s[0]) for s in op_samples()])
def test_opcheck(op, arguments):
    torch.library.opcheck(
        getattr(torch.ops.clae_fast, op).default,
        arguments,
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )
