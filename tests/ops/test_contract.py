"""The contract of the ops: each test is one promise, checked on every op and implementation.

What is true of one op alone is tested in that op's file. There, `CASES` says how the op is called,
at which sizes, and how its results are judged; `BAD_INPUTS` says what it refuses.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product

import pytest
import torch
from linf_cases import LAYOUTS
from op_cases import (
    Case,
    Recorder,
    assert_close_to_fp64,
    assert_right,
    caller,
    every_bad_input,
    every_case,
    in_fp64,
    leaves,
    of_temperature,
    run,
)
from torch import Tensor

import clae_fast
from clae_fast import _impl
from clae_fast.ops import _rows
from clae_fast.testing import assert_bitwise_equal, running

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # NumPy, which Triton's interpreter computes with, remarks on infinities
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

CASES = every_case()
ROWS = {
    "transposed": lambda z: z.T.contiguous().T,
    "sliced": lambda z: torch.cat([z, torch.full_like(z, math.nan)], 1)[:, : z.shape[1]],
    "expanded": lambda z: z[:, :1].expand(z.shape),
    "every other row": lambda z: torch.stack([z, torch.full_like(z, math.nan)], 1)[:, 0],
}


@pytest.fixture
def impl(request):
    """Makes one implementation run and returns the name to pass as `impl`; "cuda" is emulated."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_device")
    with running(request.param) as name:
        yield name


def calls(
    where: Callable[[Case], object] = lambda _: True,
    *,
    reference: Callable[[Case], object] = lambda _: True,
    isas: bool = True,
):
    """Parametrizes a test by the cases for which `where` holds, and by what runs them.

    The reference is among these for the cases for which `reference` holds. Native code runs with
    every instruction set of this processor, or with the preferred one alone.
    """
    params = []
    for key, case in CASES.items():
        names = case.implementations()
        if not isas:
            names = list(dict.fromkeys(name.partition("-")[0] for name in names))
        for name in names if reference(case) else names[1:]:
            if where(case):
                params.append(pytest.param(case, name, id=f"{key}-{name}"))
    return pytest.mark.parametrize(("case", "impl"), params, indirect=["impl"])


def never(_):
    return False


def is_loss(case):
    return case.is_loss


def on_rows(case):
    return case.rows


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_bitwise_equal(one, other)


@lru_cache(64)
def problem(key: str, size, temperature, noise):
    """The tensors, and the reference's results in their dtype and in fp64."""
    case = CASES[key]
    tensors = case.make(*size, noise=noise)
    options = {"impl": "reference", **of_temperature(temperature)}
    return tensors, run(case, tensors, **options), run(case, in_fp64(tensors), **options)


@pytest.mark.parametrize(
    ("key", "grid", "size", "impl"),
    [
        pytest.param(key, grid, size, name, id=f"{key}-{'x'.join(map(str, size))}-{name}")
        for key, case in CASES.items()
        for grid in case.grids
        for size in grid.sizes
        for name in case.implementations()[1:]
    ],
    indirect=["impl"],
)
def test_within_the_error_budget_of_fp64(key, grid, size, impl):
    case = CASES[key]
    for temperature in grid.temperatures:
        options = of_temperature(temperature)
        for noise in grid.noises:
            if case.judge is not None:
                tensors = case.make(*size, noise=noise)
                assert_right(case, tensors, run(case, tensors, impl=impl, **options), **options)
                continue
            tensors, eager, exact = problem(key, size, temperature, noise)
            what = f"at T = {temperature}, noise = {noise}"
            judge = partial(assert_close_to_fp64, case, tensors, what=what, **options)
            results = run(case, tensors, impl=impl, **options)
            assert results[0].dtype == torch.float32
            judge(results, eager, exact)
            # other code may run where no gradient is wanted, or only some
            judge(run(case, tensors, wrt=(), impl=impl, **options), eager[:1], exact[:1])
            if case.separate:
                results = run(case, tensors, wrt=case.wrt[:1], impl=impl, **options)
                judge(results, eager[:2], exact[:2])


@calls(on_rows, reference=never)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(case, impl, dtype):
    for (N, D), temperature in product(
        ((37, 25), (115, 7)), case.choose(0.5, 0.2, 0.1, 0.07, 0.05, 0.02)
    ):
        tensors = case.tensors(N, D, dtype=dtype)
        options = of_temperature(temperature)
        results = run(case, tensors, impl=impl, **options)
        assert_right(case, tensors, results, **options)
        wanted = [torch.float32, *(tensors[name].dtype for name in case.wrt)]
        assert [result.dtype for result in results[: len(wanted)]] == wanted


@calls(on_rows, reference=never)
def test_rows_around_the_norm_floor(case, impl):
    tensors = case.tensors(12, 10)
    for first, name in enumerate((*case.rows, *({"bank"} & tensors.keys()))):
        z = tensors[name]
        for row, value in zip(range(2 * first, 2 * first + 3), (0, 1e-13, None), strict=True):
            z[row] = z[row] * 1e-6 if value is None else value
    for temperature in case.choose(0.5, 0.1, 0.005):
        options = of_temperature(temperature)
        assert_right(case, tensors, run(case, tensors, impl=impl, **options), **options)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=k) for k, c in CASES.items() if "torch" in c.implementations()]
)
def test_blocks_of_rows(case, monkeypatch):
    # of several rows each, and fewer in the last one
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 79)
    tensors = case.tensors(13, 6)
    options = of_temperature(*case.choose(0.1))
    assert_right(case, tensors, run(case, tensors, impl="torch", **options), **options)


@calls(lambda case: case.rows and case.judge is None)
def test_one_sample(case, impl):
    tensors = case.tensors(1, 5)
    results = run(case, tensors, impl=impl)
    assert_right(case, tensors, results)
    # without a negative there is no loss
    if case.negatives:
        assert not any(result.any() for result in results)


@calls()
def test_no_samples(case, impl):
    if case.empty:
        results = run(case, case.tensors(0, 4), impl=impl)
        assert all(result.numel() == 0 == len(result) for result in results)
        return
    tensors = case.tensors(1, 1)
    for shape in ((0, 3), (3, 0), (0, 0)):
        for name in (*case.rows, *({"bank", "velocity"} & tensors.keys())):
            tensors[name] = torch.ones(shape)
        with pytest.raises(ValueError, match=r"must have shape \[., D\] .* got \[\d, \d\]"):
            run(case, tensors, impl=impl)


@calls(on_rows, reference=never)
@pytest.mark.parametrize("layout", ROWS)
def test_strides_of_rows(case, impl, layout):
    strided = case.tensors(14, 10)
    for name in case.rows:
        strided[name] = ROWS[layout](strided[name])
    for name in {"labels", "positive", "exclude"} & strided.keys():
        strided[name] = torch.stack([strided[name], strided[name] + 1], -1)[..., 0]
    dense = {name: value.contiguous() for name, value in strided.items()}
    results, expected = (run(case, tensors, impl=impl) for tensors in (strided, dense))
    if impl == "torch" and case.op not in ("uel", "hard_nt_xent"):
        # whose products of matrices depend on the strides; those of equal columns cancel
        if layout == "expanded" and case.judge is None:
            torch.testing.assert_close(results, expected)
        else:
            assert_right(case, strided, results)
        results, expected = (
            found[:1] if "labels" in dense else [] for found in (results, expected)
        )
    assert_all_equal(results, expected)


@calls(lambda case: case.images)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_images(case, impl, layout):
    for other in ("contiguous", "channels_last"):
        strided = case.tensors(2, 5)
        for name in case.images:
            strided[name] = LAYOUTS[layout if name == case.images[0] else other](strided[name])
        dense = {**strided, **{name: strided[name].contiguous() for name in case.images}}
        (result, *_), (expected, *_) = (run(case, t, impl=impl) for t in (strided, dense))
        if case.op == "stem_step" and impl == "reference":
            # a convolution sums in another order
            assert (result != expected).float().mean() < 0.01
        else:
            assert_bitwise_equal(result, expected)
        dense_memory = layout in ("contiguous", "channels_last", "transposed")
        if case.op != "augment" and impl != "reference" and dense_memory:
            assert result.stride() == strided["x"].stride()


@calls(on_rows)
@pytest.mark.parametrize("N", [1, 9])
def test_nan_and_infinity_are_not_swallowed(case, impl, N):
    # one row has no partner of its label, and no loss
    if "labels" in case.tensors(1, 1) and N == 1:
        N = 5
    coupled = case.coupled_from is not None and case.coupled_from <= N
    for name, bad, temperature in product(
        (*case.rows, *({"bank"} & case.tensors(1, 1).keys())),
        (math.nan, math.inf, -math.inf),
        case.choose(None, 0.5, 0.01),
    ):
        options = of_temperature(temperature)
        tensors = case.tensors(N, 6)
        for row in {len(tensors[name]) // 2, len(tensors[name]) - 1}:
            broken = {**tensors, name: tensors[name].clone()}
            broken[name][row, 1] = bad
            expected = run(case, broken, impl="reference", **options)
            assert expected[0].isnan().any()
            for wrt in {case.wrt, case.wrt[:1], ()}:
                results = run(case, broken, wrt=wrt, impl=impl, **options)
                for result, other in zip(results, expected[: len(results)], strict=True):
                    assert result.isnan()[other.isnan()].all()
                    assert result.isnan().all() or not coupled


@calls(is_loss)
def test_only_the_gradients_that_are_asked_for(case, impl):
    tensors = case.tensors(6, 4)
    results = run(case, tensors, impl=impl)
    for name, expected in zip(case.wrt, results[1:], strict=True):
        alone = run(case, tensors, wrt=(name,), impl=impl)[1]
        if case.separate:
            torch.testing.assert_close(alone, expected)
        else:
            assert_bitwise_equal(alone, expected)


@calls(is_loss)
def test_no_gradient_under_no_grad(case, impl):
    tensors = case.tensors(6, 4)
    expected = run(case, tensors, wrt=(), impl=impl)
    wanting = {**tensors, **{name: tensors[name].clone().requires_grad_() for name in case.wrt}}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, Recorder() as recorder:
            results = caller(case, impl=impl)(wanting)
        assert not any(result.requires_grad for result in results)
        assert_all_equal(results, expected)
        # none is computed: it would have elements
        assert not any(output.numel() for call in recorder.calls for output in call.outputs[1:])


@calls(lambda case: not case.is_loss and case.op != "augment")
def test_a_result_without_gradient_is_a_constant(case, impl):
    tensors = case.tensors(6, 4)
    expected = run(case, tensors, impl=impl)
    for name in (*case.rows, *case.images):
        tensors[name] = tensors[name].clone().requires_grad_()
    results = run(case, tensors, impl=impl)
    assert not any(result.requires_grad for result in results)
    assert_all_equal(results, expected)
    with torch.inference_mode():
        assert_all_equal(run(case, tensors, impl=impl), expected)


# the gradient of one is the sum of two in half precision
@calls(lambda case: case.is_loss and case is not CASES["info_nce-rows-symmetric"], reference=never)
def test_gradient_is_scaled_before_the_cast_to_half(case, impl):
    # unscaled, these gradients are below fp16's smallest number
    tensors = case.tensors(64, 8)
    tensors |= {name: (8192 * tensors[name]).half() for name in case.rows}
    single = {**tensors, **{name: tensors[name].float() for name in case.rows}}
    op, scale = caller(case, impl=impl), 2.0**16

    def mean(tensors):
        return [op(tensors)[0].mean()]

    half, full = run(case, tensors, scale=scale, function=mean), run(case, single, function=mean)
    for name, h, f in zip(case.wrt, half[1:], full[1:], strict=True):
        assert f.abs().max() < 2**-14 or name not in case.rows
        assert h.dtype == tensors[name].dtype
        torch.testing.assert_close(h.float() / scale, f, rtol=2**-10, atol=2**-25 / scale)


@calls(is_loss, reference=never)
def test_double_backward_raises(case, impl):
    tensors = case.tensors(4, 3)
    for name in case.wrt:
        tensors[name] = tensors[name].requires_grad_()
    loss = caller(case, impl=impl)(tensors)[0].sum()
    first = tensors[case.wrt[0]]
    (dz,) = torch.autograd.grad(loss, first, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz.sum().backward()
    # nor silently through the scale of the loss
    scale = torch.ones((), requires_grad=True)
    (dz,) = torch.autograd.grad(loss * scale, first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dz.sum().backward()


@calls(is_loss)
def test_backward_twice_gives_the_same(case, impl):
    tensors = case.tensors(4, 3)
    for name in case.wrt:
        tensors[name] = tensors[name].requires_grad_()
    wanted = [tensors[name] for name in case.wrt]
    loss = caller(case, impl=impl)(tensors)[0].sum()
    first = torch.autograd.grad(3 * loss, wanted, retain_graph=True)
    assert_all_equal(torch.autograd.grad(3 * loss, wanted), first)


@calls(lambda case: len(case.wrt) > 1)
def test_one_tensor_as_two_operands(case, impl):
    tensors = case.tensors(6, 4)
    z = tensors[case.rows[0]]
    # the anchors may be fewer than the keys
    named = {"positive": tensors["positive"] % len(z)} if "positive" in tensors else {}
    tensors = {**tensors, **dict.fromkeys(case.rows, z), **named}
    first, second = run(case, tensors, impl=impl)[1:3]
    op = caller(case, impl=impl)
    # `run` makes one leaf, which stands in both places
    both = run(
        case,
        tensors,
        wrt=case.rows[:1],
        function=lambda given: op({**given, case.rows[1]: given[case.rows[0]]}),
    )[1]
    torch.testing.assert_close(both, first + second)


@calls()
def test_input_is_left_as_it_was(case, impl):
    tensors, before = case.tensors(6, 4), case.tensors(6, 4)
    run(case, tensors, impl=impl)
    assert all(map(torch.equal, leaves(tensors), leaves(before)))


@calls(lambda case: case.op != "augment")
def test_fp64_is_the_references_alone(case, impl):
    tensors = in_fp64(case.tensors(6, 4))
    if impl == "reference":
        auto, expected = (run(case, tensors, impl=name) for name in ("auto", impl))
        assert auto[0].dtype == torch.float64
        return assert_all_equal(auto, expected)
    with pytest.raises((TypeError, ValueError), match=r"fp64 needs|takes 16-bit"):
        run(case, tensors, impl=impl)


@calls(lambda case: case.op != "augment")
def test_autocast_changes_nothing(case, impl):
    op, tensors = caller(case, impl=impl), case.tensors(6, 4)

    def under_autocast(tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(tensors)

    results, expected = (run(case, tensors, function=f) for f in (under_autocast, op))
    assert_bitwise_equal(results[0], expected[0])
    torch.testing.assert_close(results, expected)


@calls()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_nothing(case, impl, dtype, threads):
    native = impl == "native"
    tensors = case.make(*(case.large if native else case.size(9, 7)), dtype=dtype)
    for temperature in case.choose(0.5, 0.02):
        options = {"impl": impl, **of_temperature(temperature)}
        for wrt in (case.wrt, case.wrt[:1]) if case.separate else (case.wrt,):
            compute = partial(run, case, tensors, wrt=wrt, **options)
            with threads(1):
                expected = compute()
            # without threads of our own, a second run has to give the same bits
            for count in (2, 3, 3, 2) if native else (1,):
                with threads(count):
                    assert_all_equal(compute(), expected)


@calls(isas=False)
def test_an_implementation_asked_for_is_what_runs(case, impl):
    tensors = case.tensors(5, 4)
    for wrt in {case.wrt, ()}:
        with Recorder() as recorder:
            run(case, tensors, wrt=wrt, impl=impl)
        if impl == "reference" and case.op != "augment":
            assert not recorder.calls
            continue
        assert recorder.calls
        for recorded in recorder.calls:
            names = [value for value in recorded.arguments if isinstance(value, str)]
            assert names == [impl] or case.op == "stem_step"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_cannot_run_is_refused(case):
    tensors = case.tensors(5, 4)
    there = (*_impl.available(case.op, "cpu"), "reference")
    for impl in {"reference", *_impl._DEVICES} - set(there):
        reason = f"no implementation '{impl}'|does not run on cpu|impl='{impl}' needs"
        with pytest.raises(RuntimeError, match=reason):
            run(case, tensors, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, torch"):
        run(case, tensors, impl="fast")


@calls(isas=False)
def test_opcheck(case, impl):
    # by operator, dtype and flags, of which each is checked once
    recorded = {}
    for dtype in (torch.float32, torch.float16):
        tensors = case.tensors(5, 4, dtype=dtype)
        for wrt in {case.wrt, case.wrt[:1], ()} if dtype == torch.float32 else {case.wrt}:
            with Recorder() as recorder:
                run(case, tensors, wrt=wrt, impl=impl)
            for call in recorder.calls:
                flags = tuple(v for v in call.arguments if not isinstance(v, (Tensor, list)))
                recorded[call.op, dtype if case.op != "augment" else None, flags] = call
    for call in recorded.values():
        torch.library.opcheck(call.op, call.arguments, call.keywords)


@calls(lambda case: case.compiled, reference=lambda case: not case.branches, isas=False)
def test_compiles_without_a_graph_break(case, impl):
    op = caller(case, impl=impl)

    def step(tensors: dict[str, Tensor]) -> list[Tensor]:
        # between other ops, as in a training step
        tensors = {
            name: 3 * value if name in case.rows else value for name, value in tensors.items()
        }
        return [2 * output for output in op(tensors)]

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    # the first size is compiled as it is, the second one for all others
    for N, D in ((6, 4), (9, 5), (13, 7)):
        tensors = case.tensors(N, D)
        results, expected = (run(case, tensors, function=f) for f in (compiled, step))
        if impl == "reference" and case.op != "linf_step":
            torch.testing.assert_close(results, expected)
        else:
            assert_all_equal(results, expected)
    if case.separate:
        first = case.wrt[:1]
        results, expected = (run(case, tensors, wrt=first, function=f) for f in (compiled, step))
        torch.testing.assert_close(results, expected)
    if case.is_loss:
        with torch.no_grad():
            torch.testing.assert_close(compiled(tensors), step(tensors))


@pytest.mark.parametrize(("op", "arguments", "error", "message"), every_bad_input())
def test_bad_input_is_refused_by_name(op, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(clae_fast, op)(**arguments)
