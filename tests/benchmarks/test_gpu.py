"""What only a GPU shows: graph capture, torch.compile and opcheck of what runs there."""

from functools import partial

import pytest
import torch

import clae_fast
from clae_fast import _impl
from clae_fast.testing import assert_bitwise_equal, projections, value_and_grads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOSSES = ("nt_xent", "info_nce", "uel", "hard_nt_xent")


_POSITIVE = torch.arange(48, device="cuda") // 3 if torch.cuda.is_available() else None


def on_gpu(op):
    return _impl.available(op, "cuda") if torch.cuda.is_available() else []


def bank_step(impl, named, z0, z1):
    """A bank of z1's rows after a step, and its velocity."""
    bank, velocity = 2 * z1, torch.zeros_like(z1)
    options = {"positive": _POSITIVE} if named else {"keys": z1.roll(1, 0)}
    lr = z0.abs().mean()
    clae_fast.bank_step(bank, velocity, z0, lr=lr, temperature=0.02, impl=impl, **options)
    return bank, [velocity]


def cases():
    """A name and a call on inputs, which captures must follow, for every kernel."""
    for op in LOSSES:
        for impl in on_gpu(op):
            yield (
                f"{op}-{impl}",
                lambda z0, z1, op=op, impl=impl: value_and_grads(
                    getattr(clae_fast, op), z0, z1, temperature=0.2, impl=impl
                ),
            )
    for impl in on_gpu("info_nce"):
        yield (
            f"info_nce-rows-{impl}",
            lambda z0, z1, impl=impl: value_and_grads(
                lambda a, k: (
                    clae_fast.info_nce(a, k, positive=_POSITIVE, reduction="none", impl=impl)
                    .square()
                    .sum()
                ),
                z0,
                z1,
            ),
        )
    for impl in on_gpu("bank_step"):
        yield f"bank_step-keys-{impl}", partial(bank_step, impl, False)
        yield f"bank_step-named-{impl}", partial(bank_step, impl, True)
    for impl in on_gpu("tied_nt_xent"):
        yield (
            f"tied_nt_xent-{impl}",
            lambda z0, z1, impl=impl: clae_fast.tied_nt_xent(z0, impl=impl),
        )
    for impl in on_gpu("linf_step"):
        yield (
            f"linf_step-{impl}",
            lambda z0, z1, impl=impl: clae_fast.linf_step(
                z0.view(16, 3, 8, 8),
                z1.view(16, 8, 8, 3).permute(0, 3, 1, 2),
                alpha=0.03,
                eps=(0.01, 0.02, 0.03),
                lo=0.0,
                hi=[1.0, 1.1, 1.2],
                impl=impl,
            ),
        )
    weight = torch.randn(64, 3, 3, 3, device="cuda") if on_gpu("stem_step") else None
    for impl in on_gpu("stem_step"):
        yield (
            f"stem_step-{impl}",
            lambda z0, z1, impl=impl: clae_fast.stem_step(
                z0.half().view(1, 64, 6, 8),
                weight,
                z1.flatten()[:144].view(1, 3, 6, 8),
                stride=1,
                padding=1,
                alpha=0.03,
                eps=(0.01, 0.02, 0.03),
                impl=impl,
            ),
        )


every_case = pytest.mark.parametrize("call", [pytest.param(c, id=name) for name, c in cases()])


def flattened(result):
    return [result] if isinstance(result, torch.Tensor) else [result[0], *result[1]]


@every_case
def test_capture_follows_its_inputs(call):
    z0, z1 = (z.cuda() for z in projections(48, 64))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(z0, z1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(z0, z1)
    for seed in (1, 2):
        for z, fresh in zip((z0, z1), projections(48, 64, seed=seed), strict=True):
            z.copy_(fresh)
        graph.replay()
        for actual, expected in zip(flattened(captured), flattened(call(z0, z1)), strict=True):
            assert_bitwise_equal(actual.cpu(), expected.cpu())


@every_case
def test_runs_on_a_stream_of_its_own(call):
    z0, z1 = (z.cuda() for z in projections(48, 64))
    expected = flattened(call(z0, z1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = flattened(call(z0, z1))
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise_equal(one.cpu(), other.cpu())


@pytest.mark.parametrize(
    ("op", "impl"), [(op, impl) for op in (*LOSSES, "linf_step") for impl in on_gpu(op)]
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # the compiler's, on TF32 and the like
def test_compiles_without_a_graph_break(op, impl, mode):
    torch.compiler.reset()
    options = {"alpha": 0.1} if op == "linf_step" else {"temperature": 0.2}

    def step(z0, z1):
        return 2 * getattr(clae_fast, op)(3 * z0, z1, impl=impl, **options)

    compiled = torch.compile(step, mode=mode, fullgraph=True)
    z0, z1 = (z.cuda() for z in projections(48, 64))
    for _ in range(3):
        if op == "linf_step":
            assert_bitwise_equal(compiled(z0, z1).cpu(), step(z0, z1).cpu())
        else:
            torch.testing.assert_close(
                value_and_grads(compiled, z0, z1), value_and_grads(step, z0, z1)
            )


def op_samples():
    z0, z1 = projections(48, 64)
    for impl in on_gpu("nt_xent"):
        yield "nt_xent", (z0, z1, 0.5, False, False, impl)
        yield "nt_xent", (z0, z1, 0.5, True, False, impl)
    x, grad = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for impl in on_gpu("linf_step"):
        yield "linf_step", (x, grad, None, [0.1, 0.1, 0.0, 1.0], None, impl)
        yield "linf_step", (x.half(), grad, x.half(), [], torch.rand(4, 3), impl)


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*s, id=s[0]) for s in op_samples()])
def test_opcheck(op, arguments):
    on_device = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(getattr(torch.ops.clae_fast, op).default, tuple(on_device))
