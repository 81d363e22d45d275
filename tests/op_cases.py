"""What the tests that treat all ops alike share: how an op is called, judged, and made to refuse.

Every op's own file, ops/test_<op>.py, says in `CASES` how the op is called, and in `BAD_INPUTS`
what it refuses. `every_case` and `every_bad_input` gather these.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import clae_fast
from clae_fast import _native, ops
from clae_fast.testing import assert_accurate, implementations, projections

# where the ops' own files are, for tests of other folders and for processes without pytest
sys.path.append(str(Path(__file__).parent / "ops"))

TEMPERATURES = (0.5, 0.1, 0.07, 0.05, 0.02, 0.005)
# an op's tensors by the names of its arguments; RaggedImages are one of them
Tensors = dict[str, Tensor]
Size = tuple[int, ...]
# a change of the arguments, the error, and a part of its message
Refusal = tuple[dict[str, object], type[Exception], str]


@dataclass(frozen=True)
class Grid:
    """Sizes, temperatures and noises at which results are compared with the reference in fp64."""

    sizes: tuple[Size, ...]
    temperatures: tuple[float | None, ...] = (None,)
    noises: tuple[float | None, ...] = (None,)


@dataclass(frozen=True)
class Case:
    """One way to call an op."""

    op: str
    # makes the tensors: (*size, noise=, dtype=, seed=) -> Tensors
    make: Callable[..., Tensors]
    # the size, as `make` takes it, for N samples and D columns
    size: Callable[[int, int], Size] = lambda N, D: (N, D)
    grids: tuple[Grid, ...] = ()
    # enough for several threads
    large: Size = (203, 33)
    options: dict[str, object] | None = None
    # names of the projections [N, D], which may have any strides, any dtype, NaN and tiny norms
    rows: tuple[str, ...] = ()
    # names of the images [N, C, H, W], which may have any strides
    images: tuple[str, ...] = ()
    # names of the tensors that the op changes in place; it then returns nothing
    in_place: tuple[str, ...] = ()
    # names of the tensors by which the first output, a loss, is differentiated
    wrt: tuple[str, ...] = ()
    # the largest exponent is this number over T
    sharpness: float = 1.0
    # whether a sample is compared with other samples alone, so that one sample has no loss
    negatives: bool = True
    # with this many samples or more, one NaN makes every result NaN
    coupled_from: int | None = None
    # the bits of one gradient may depend on which others are wanted
    separate: bool = False
    # an input without samples is no error and gives a result without samples
    empty: bool = False
    # the reference branches on values, so that torch.compile cannot trace it
    branches: bool = False
    # False where torch.compile is tried on another case of this op
    compiled: bool = True
    # Triton's interpreter is fast enough for all tests of this op
    interpreted: bool = False
    # impl="cuda" is emulated where there is no GPU
    emulated: bool = False
    # test_properties.py searches this case for counterexamples, and test_isas.py runs it on other
    # processors: there is one for each formula of native code on rows
    searched: bool = False
    # the only implementation besides the reference that takes these options, or "" for all
    only: str = ""
    # raises unless the results for (tensors, results, options) are right; None stands for
    # `assert_close_to_fp64`
    judge: Callable[[Tensors, list[Tensor], dict[str, object]], None] | None = None

    @property
    def is_loss(self) -> bool:
        return bool(self.wrt)

    def tensors(self, N: int, D: int, **options: object) -> Tensors:
        """The op's tensors for N samples, two views of which are drawn, and D columns."""
        return self.make(*self.size(N, D), **options)

    def implementations(self) -> list[str]:
        """The names of what runs the op on the CPU, the reference first.

        Triton's interpreter is too slow for most ops. tests/kernels runs their kernels in it.
        """
        names = [n for n in implementations(self.op) if n != "triton" or self.interpreted]
        names = [self.only] if self.only else names
        return ["reference", *names, *(["cuda"] if self.emulated else [])]

    def choose(self, *temperatures: float | None) -> tuple[float | None, ...]:
        """These temperatures, or none where the op has none."""
        has_one = "temperature" in inspect.signature(getattr(clae_fast, self.op)).parameters
        return temperatures if has_one else (None,)

    def gradients(self, results: list[Tensor]) -> list[Tensor]:
        """The gradients among the results of `run`, in the order of `rows`."""
        return results[1 : 1 + len(self.rows)] if self.is_loss else results


def caller(case: Case, **options: object) -> Callable[[Tensors], list[Tensor]]:
    """The op as a function of its tensors alone; it returns copies of what the op changes."""
    function = getattr(clae_fast, case.op)
    options = {**(case.options or {}), **options}
    # where the kernel is not emulated, it takes tensors on the GPU
    on_gpu = options.get("impl") == "cuda" and torch.cuda.is_available() and _native.has_cuda()

    def call(tensors: Tensors) -> list[Tensor]:
        if on_gpu:
            tensors = {name: value.cuda() for name, value in tensors.items()}
        tensors = dict(tensors)
        for name in case.in_place:
            tensors[name] = tensors[name].clone()
        outputs = function(**tensors, **options)
        if case.in_place:
            assert outputs is None
            outputs = [tensors[name] for name in case.in_place]
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return [output.cpu() for output in outputs] if on_gpu else outputs

    return call


def run(
    case: Case,
    tensors: Tensors,
    *,
    wrt: tuple[str, ...] | None = None,
    scale: float = 1.0,
    function: Callable[[Tensors], list[Tensor]] | None = None,
    **options: object,
) -> list[Tensor]:
    """The outputs or, with `wrt`, the first output and its gradients by these tensors.

    None stands for all that the case has in `wrt`. Losses of rows are weighted by random numbers
    of both signs and many magnitudes.
    """
    wrt = case.wrt if wrt is None else wrt
    leaves = {name: tensors[name].detach().requires_grad_() for name in wrt}
    outputs = (function or caller(case, **options))({**tensors, **leaves})
    if not wrt:
        return outputs
    loss = outputs[0]
    if loss.ndim:
        generator = torch.Generator().manual_seed(0)
        sign, size = torch.randn(2, len(loss), generator=generator)
        loss = loss @ (sign * size.mul(3).exp()).to(loss.dtype)
    return [outputs[0].detach(), *torch.autograd.grad(loss * scale, list(leaves.values()))]


def in_fp64(tensors: Tensors) -> Tensors:
    """The same numbers in fp64; integers, and what is no tensor, stay."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in tensors.items()
    }


def of_temperature(temperature: float | None) -> dict[str, object]:
    """The option that sets the temperature; no option for None."""
    return {} if temperature is None else {"temperature": temperature}


def assert_right(
    case: Case,
    tensors: Tensors,
    results: list[Tensor],
    *,
    wrt: tuple[str, ...] | None = None,
    **options: object,
) -> None:
    """Raises unless what `run` returned is within the error budget or obeys the op's own rule."""
    if case.judge is not None:
        case.judge(tensors, results, {**(case.options or {}), **options})
        return
    eager = run(case, tensors, wrt=wrt, impl="reference", **options)
    exact = run(case, in_fp64(tensors), wrt=wrt, impl="reference", **options)
    assert_close_to_fp64(case, tensors, results, eager, exact, **options)


def assert_close_to_fp64(
    case: Case,
    tensors: Tensors,
    results: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    temperature: float = 1.0,
    what: str = "",
) -> None:
    """Raises unless results are at most twice as wrong as the reference's of the same dtype.

    A gradient that is an output is judged in the dtype of its rows: with dot products of bf16, the
    softmax is rounded to it too.
    """
    dtype = None if case.is_loss else tensors[case.rows[0]].dtype
    for i, (result, other, truth) in enumerate(zip(results, eager, exact, strict=True)):
        assert_accurate(
            result.to(dtype),
            other.to(dtype),
            truth,
            temperature=temperature / case.sharpness,
            what=f"result {i} {what}",
        )


def check(case: Case, tensors: Tensors, temperature: float, results: list[Tensor]) -> None:
    """Raises unless what `run` returned for any rows is within the error budget.

    Gradients are judged in the operands' dtype, which they are cast to sooner or later, and may be
    off by two roundings of the at most 4 unit rows over N T |z| that cancel in them.
    """
    options = {"temperature": temperature, "impl": "reference"}
    eager = run(case, tensors, **options)
    exact = run(case, in_fp64(tensors), **options)
    temperature /= case.sharpness
    if case.is_loss:
        assert_accurate(results[0], eager[0], exact[0], temperature=temperature, what="loss")
    operands = [tensors[name] for name in case.rows]
    N, eps = len(operands[0]), torch.finfo(torch.float32).eps
    grads = (case.gradients(found) for found in (results, eager, exact))
    for z, dz, eager_dz, exact_dz in zip(operands, *grads, strict=True):
        norm = z.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        rounded = exact_dz.to(z.dtype)
        cancelled = (dz - exact_dz).abs() <= 8 * eps / (N * temperature * norm)
        dz = torch.where(cancelled, rounded, dz.to(z.dtype))
        assert_accurate(
            dz, eager_dz.to(z.dtype), exact_dz, temperature=temperature, what="gradient"
        )


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(N, D, **options):
    z0, z1 = projections(N, D, **options)
    return {"z0": z0, "z1": z1}


def labeled(n, D, classes, *, noise=None, dtype=torch.float32, **options):
    """With `noise`, the rows of a class are near one another."""
    labels = torch.randint(classes, (n,), generator=seeded())
    centers, z = projections(max(n, classes), D, **options)
    z = z[:n] if noise is None else centers[labels] + noise * z[:n]
    return {"z": z.to(dtype), "labels": labels}


NEAR = (None, 0.1)
VIEWS = {"rows": ("z0", "z1"), "wrt": ("z0", "z1"), "coupled_from": 1}
LABELS = {
    "make": labeled,
    "size": lambda N, D: (N, D, 2 + N // 8 if N > 3 else 1),
    "rows": ("z",),
    "wrt": ("z",),
    "coupled_from": 5,
    "branches": True,
}


class Call(NamedTuple):
    """A call of a torch op of clae_fast."""

    op: Any
    arguments: tuple
    keywords: dict[str, Any]
    outputs: list[Tensor]


class Recorder(TorchDispatchMode):
    """Records the calls of torch ops of clae_fast, with copies of what they were given."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        ours = func.namespace == "clae_fast"
        if ours:
            given = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)
        outputs = func(*args, **(kwargs or {}))
        if ours:
            self.calls.append(Call(func, *given, pytree.tree_leaves(outputs)))
        return outputs


def leaves(tensors: Tensors) -> list[Tensor]:
    """All tensors, also those inside of RaggedImages."""
    return pytree.tree_leaves(tensors)


@dataclass(frozen=True)
class BadInputs:
    """What an op refuses."""

    # arguments that are right; the first tensor says where all others have to be
    right: dict[str, object]
    # what this op alone refuses
    own: Iterable[Refusal] = ()
    # names of the tensors that may be of any floating dtype
    any_dtype: tuple[str, ...] = ()
    # names of the tensors that may have any number of dimensions
    any_shape: tuple[str, ...] = ()


def _of_all_ops(op: str, inputs: BadInputs) -> Iterator[Refusal]:
    """What is refused of every tensor, of the temperature and of flags, where an op has them."""
    tensors = {name: value for name, value in inputs.right.items() if isinstance(value, Tensor)}
    first = next(iter(tensors))
    for name, value in tensors.items():
        other_dtype = torch.int32 if value.dtype == torch.int64 else torch.int64
        yield {name: value.to(other_dtype)}, TypeError, f"{name} must be of dtype"
        yield {name: [1.0]}, TypeError, rf"{name} must be a torch\.Tensor, got list"
        if name not in inputs.any_shape:
            yield {name: value[0]}, ValueError, f"{name} must have"
        if name != first:
            yield {name: value.to("meta")}, ValueError, f"{name} must be on the device of"
            if value.is_floating_point() and name not in inputs.any_dtype:
                yield {name: value.half()}, TypeError, f"{name} must have the dtype of"
    arguments = inspect.signature(getattr(clae_fast, op)).parameters
    if "temperature" in arguments:
        for number in (0.0, -1, math.nan, math.inf):
            yield {"temperature": number}, ValueError, "temperature must be positive and finite"
        yield {"temperature": "0.5"}, TypeError, "temperature must be a number, got str"
    if "exact" in arguments:
        yield {"exact": 1}, TypeError, "exact must be True or False, got int"


def _files() -> dict[str, ModuleType]:
    """Each op's own file, by the op."""
    return {op: importlib.import_module(f"test_{op}") for op in ops.__all__}


def every_case() -> dict[str, Case]:
    """The cases of all ops, by their names."""
    return {name: case for file in _files().values() for name, case in file.CASES.items()}


def searched_cases() -> dict[str, Case]:
    """One case for each formula of native code on rows, by its name."""
    return {name: case for name, case in every_case().items() if case.searched}


def every_bad_input() -> list:
    """Parameters: an op, its arguments, the error's type, and a part of its message."""
    return [
        pytest.param(op, {**inputs.right, **change}, error, message, id=f"{op}-{'-'.join(change)}")
        for op, file in _files().items()
        # what augment refuses is tested in its own file
        if (inputs := getattr(file, "BAD_INPUTS", None))
        for change, error, message in (*_of_all_ops(op, inputs), *inputs.own)
    ]
