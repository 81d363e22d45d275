"""How each op is called and judged, for the tests that treat all ops alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import augment_cases
import bank_step_cases
import linf_cases
import stem_cases
import topk_cases
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import clae_fast
from clae_fast import _native
from clae_fast.data import RECIPES
from clae_fast.testing import assert_accurate, assert_bitwise_equal, implementations, projections

TEMPERATURES = (0.5, 0.1, 0.07, 0.05, 0.02, 0.005)
# an op's tensors by the names of its arguments; RaggedImages are one of them
Tensors = dict[str, Tensor]
Size = tuple[int, ...]


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
    # names of the tensors by which the first output, a loss, is differentiated
    wrt: tuple[str, ...] = ()
    # the largest exponent is this number over T
    sharpness: float = 1.0
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

        Triton's interpreter is slow, and tests/kernels have its turn, except for that of linf_step.
        impl="cuda" of stem_step is emulated where there is no GPU.
        """
        names = [n for n in implementations(self.op) if n != "triton" or self.op == "linf_step"]
        names = [self.only] if self.only else names
        return ["reference", *names, *(["cuda"] if self.op == "stem_step" else [])]

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
    in_place = ("bank", "velocity") if case.op == "bank_step" else ()
    # where the kernel is not emulated, it takes tensors on the GPU
    on_gpu = options.get("impl") == "cuda" and torch.cuda.is_available() and _native.has_cuda()

    def call(tensors: Tensors) -> list[Tensor]:
        if on_gpu:
            tensors = {name: value.cuda() for name, value in tensors.items()}
        tensors = dict(tensors)
        for name in in_place:
            tensors[name] = tensors[name].clone()
        outputs = function(**tensors, **options)
        if in_place:
            assert outputs is None
            outputs = [tensors[name] for name in in_place]
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
    """The same numbers in fp64; integers stay."""
    return {name: bank_step_cases.in_fp64(value) for name, value in tensors.items()}


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


def views_and_extra(N, D, *, dtype=torch.float32, **options):
    extra = torch.randn(2 * N, 3, generator=seeded())
    return {**views(N, D, dtype=dtype, **options), "extra": extra.to(dtype)}


def one_view(N, D, **options):
    return {"z": projections(N, D, **options)[0]}


def queue(N, M, D, **options):
    anchor, keys = projections(max(N, M), D, **options)
    return {"anchor": anchor[:N], "keys": keys[:M]}


def named(N, M, D, **options):
    """Several anchors may share a positive."""
    return {**queue(N, M, D, **options), "positive": torch.randint(M, (N,), generator=seeded())}


def labelled(n, D, classes, *, noise=None, dtype=torch.float32, **options):
    """With `noise`, the rows of a class are near one another."""
    labels = torch.randint(classes, (n,), generator=seeded())
    centers, z = projections(max(n, classes), D, **options)
    z = z[:n] if noise is None else centers[labels] + noise * z[:n]
    return {"z": z.to(dtype), "labels": labels}


def bank(method, moving, N, K, D, *, noise=0.5, dtype=torch.float32, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        noise = 0.5 if noise is None else noise
        W, V, anchor, options = bank_step_cases.problem(method, N, K, D, noise=noise, dtype=dtype)
    options.pop("views")
    return {"bank": W, "velocity": V if moving else 0 * V, "anchor": anchor, **options}


def nearest(excluding, N, M, D, *, noise=None, dtype=torch.float32, seed=0):
    anchor, keys = topk_cases.rows(N, M, D, dtype)
    exclude = {"exclude": (torch.arange(N)[:, None] + 1) % M} if excluding else {}
    return {"anchor": anchor, "keys": keys, **exclude}


def images(N, side, *, centered=False, dtype=torch.float32, seed=0, noise=None):
    shape = (N, 3, side, side + 1)
    x = linf_cases.images(shape, dtype, seed=seed)
    others = {"grad": linf_cases.images(shape, seed=seed + 1)}
    if centered:
        others["x0"] = (x + 0.02 * linf_cases.images(shape, seed=seed + 2)).to(dtype)
    return {"x": x, **others}


def stem(kernel, N, side, *, dtype=torch.float32, seed=0, noise=None):
    """The gradient at a convolution's output, its weight and its input."""
    half = dtype if dtype == torch.float64 else torch.float16
    shape = (N, side, side + 3)
    x_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
    dy, weight, x = stem_cases.operands(kernel, shape, dtype=half, x_dtype=x_dtype, seed=seed)
    return {"dy": dy, "weight": weight, "x": x}


def photos_and_table(mixed, whole_batch, N, side, *, seed=0, noise=None, dtype=None):
    """8-bit images, of one size or of any, and the table of some of them."""
    rows = torch.arange(N) * 7 % 5
    picked = {} if whole_batch else {"rows": rows}
    sides = [(18, 25), (7, 60), (31, 12), (16, 16), (1, 1)] if mixed else [(18, 25)] * 5
    whole = [augment_cases.photos(1, *s, seed=seed + i)[0] for i, s in enumerate(sides)]
    height, width = torch.tensor(sides)[rows].unbind(1)
    fields = asdict(RECIPES["byol"])
    fields.pop("interpolation")
    params = clae_fast.augment_params(
        torch.arange(N), seed=seed, epoch=0, height=height, width=width, **fields
    )
    data = augment_cases.ragged(whole, gap=5) if mixed else torch.stack(whole)
    return {"images": data[rows] if whole_batch else data, "params": params, **picked}


def as_bank_step(tensors, results, options):
    tensors, options = dict(tensors), {**options}
    operands = (tensors.pop(name) for name in ("bank", "velocity", "anchor"))
    options.setdefault("temperature", 0.1)
    bank_step_cases.assert_stepped(results, *operands, **tensors, **options)


def as_topk(tensors, results, options):
    topk_cases.assert_nearest(*results, k=options["k"], **tensors)


def as_linf_step(tensors, results, options):
    assert_bitwise_equal(*results, clae_fast.linf_step(**tensors, **options, impl="reference"))


def as_stem_step(tensors, results, options):
    stem_cases.assert_stepped(*results, **tensors, **options)


def as_augment(tensors, results, options):
    """To the rounding of fp32, which three factors amplify up to 2.5 times each, or of fp16."""
    tolerance = 2**-10 if options.get("dtype") == torch.float16 else 2e-5
    for result, expected in zip(
        results, clae_fast.augment(**tensors, **options, impl="reference"), strict=True
    ):
        assert result.numel() == 0 or (result - expected).abs().max() < tolerance


_SIZES = ((2, 1), (7, 5), (33, 130), (131, 17))
_NEAR = (None, 0.1)
_VIEWS = {"rows": ("z0", "z1"), "wrt": ("z0", "z1"), "coupled_from": 1}
_KEYS = {"rows": ("anchor", "keys"), "wrt": ("anchor", "keys"), "separate": True}
_LABELS = {
    "make": labelled,
    "size": lambda N, D: (N, D, 2 + N // 8 if N > 3 else 1),
    "rows": ("z",),
    "wrt": ("z",),
    "coupled_from": 5,
    "branches": True,
}


def _half_as_many(N, D):
    return (N + 1) // 2, N, D


def _hard(beta, tau_plus, detach=False, make=views, **fields):
    options = {"beta": beta, "tau_plus": tau_plus, "detach_weights": detach}
    # 0.04 is above the temperature where exponents leave fp32's range with beta = 0 alone
    sizes = ((2, 3), (7, 5), (131, 17)) if make is views else ((1, 5), (6, 5))
    grid = Grid(sizes, (0.5, 0.1, 0.04, 0.005), _NEAR)
    return Case(
        "hard_nt_xent",
        make,
        grids=(grid,),
        options=options,
        sharpness=1 + beta,
        **{**_VIEWS, **fields},
    )


def _with_extra(beta, tau_plus, detach=False):
    return _hard(beta, tau_plus, detach, views_and_extra, wrt=("z0", "z1", "extra"), only="torch")


def _sup_con(compiled=True, **options):
    grid = Grid(((2, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)), (0.5, 0.07, 0.005), _NEAR)
    return Case("sup_con", grids=(grid,), options=options, compiled=compiled, **_LABELS)


def _h_scl(beta, detach, **fields):
    grid = Grid(((3, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)), (0.5, 0.07, 0.005), _NEAR)
    options = {"beta": beta, "detach_weights": detach}
    fields = {"sharpness": 1 + beta, **_LABELS, **fields}
    return Case("h_scl", grids=(grid,), options=options, **fields)


def _bank_step(method, moving, **fields):
    grid = Grid(((1, 1, 2), (2, 3, 3), (7, 97, 5), (33, 130, 17)), (0.5, 0.1, 0.02, 0.005), (0.5,))
    return Case(
        "bank_step",
        partial(bank, method, moving),
        size=lambda N, D: (N, 2 * N, D),
        grids=(grid,),
        large=(210, 1000, 9),
        options={"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01 if moving else 0.0},
        rows=("anchor", "keys") if method == "adco" else ("anchor",),
        coupled_from=1,
        judge=as_bank_step,
        **fields,
    )


def _topk_similarity(excluding, **fields):
    return Case(
        "topk_similarity",
        partial(nearest, excluding),
        size=lambda N, D: (N, 2 * N + 2, D),
        grids=(Grid(((1, 4, 1), (7, 97, 5), (33, 131, 70))),),
        large=(41, 8203, 3),
        options={"k": 3},
        rows=("anchor", "keys"),
        judge=as_topk,
        **fields,
    )


def _linf_step(centered=False, compiled=True, **options):
    return Case(
        "linf_step",
        partial(images, centered=centered),
        grids=(Grid(((2, 3), (3, 9))),),
        large=(7, 60),
        options=options,
        images=("x", "grad", "x0") if centered else ("x", "grad"),
        empty=True,
        compiled=compiled,
        judge=as_linf_step,
    )


def _stem_step(kernel, **bounds):
    return Case(
        "stem_step",
        partial(stem, kernel),
        grids=(Grid(((1, 1), (2, 6))),),
        options={**stem_cases.STEMS[kernel], **stem_cases.RANGE, **bounds},
        images=("x", "dy", "weight"),
        empty=True,
        compiled=kernel == 3 and not bounds,
        judge=as_stem_step,
    )


def _augment(mixed, *, whole_batch=False, **options):
    return Case(
        "augment",
        partial(photos_and_table, mixed, whole_batch),
        grids=(Grid(((1, 1), (7, 9))),),
        large=(5, 9),
        options=options,
        images=() if mixed else ("images",),
        empty=True,
        judge=as_augment,
    )


CASES = {
    "nt_xent": Case(
        "nt_xent", views, grids=(Grid(_SIZES, TEMPERATURES, (*_NEAR, 1e-3)),), **_VIEWS
    ),
    "tied_nt_xent": Case(
        "tied_nt_xent",
        one_view,
        grids=(Grid(((2, 3), (7, 5), (40, 17)), TEMPERATURES),),
        rows=("z",),
        coupled_from=2,
    ),
    "info_nce": Case(
        "info_nce",
        queue,
        size=_half_as_many,
        grids=(
            Grid(
                ((2, 2, 17), (1, 4, 17), (33, 33, 17), (20, 61, 17)),
                TEMPERATURES,
                (*_NEAR, 1e-3),
            ),
            # several blocks of anchors, groups of them, and more tiles of keys than chunks
            Grid(((7, 3500, 10), (200, 203, 10), (401, 790, 10)), (0.2, 0.02), (0.5,)),
        ),
        large=(100, 500, 13),
        **_KEYS,
    ),
    # more keys than anchors, and fewer
    "info_nce-named": Case(
        "info_nce",
        named,
        size=_half_as_many,
        grids=(
            Grid(
                ((3, 1, 17), (20, 61, 17), (61, 20, 17), (200, 203, 17)), (0.5, 0.07, 0.02), _NEAR
            ),
        ),
        large=(100, 500, 13),
        compiled=False,
        **_KEYS,
    ),
    "info_nce-symmetric": Case(
        "info_nce",
        queue,
        size=lambda N, D: (N, N, D),
        grids=(Grid(((20, 20, 17), (131, 131, 9)), (0.5, 0.05, 0.01), (0.1,)),),
        large=(203, 203, 33),
        options={"symmetric": True},
        compiled=False,
        **_KEYS,
    ),
    **{
        f"info_nce-rows{kind}": Case(
            "info_nce",
            named if kind == "-named" else queue,
            size=_half_as_many if kind != "-symmetric" else lambda N, D: (N, N, D),
            grids=(
                Grid(
                    ((33, 40, 17),) if kind != "-symmetric" else ((40, 40, 17),),
                    (0.5, 0.07, 0.02),
                    (0.3,),
                ),
            ),
            options={"reduction": "none", "symmetric": kind == "-symmetric"},
            compiled=kind == "-named",
            large=(100, 500, 13) if kind != "-symmetric" else (203, 203, 33),
            **_KEYS,
        )
        for kind in ("", "-named", "-symmetric")
    },
    "uel": Case(
        "uel",
        views,
        grids=(Grid(((2, 1), (7, 5), (33, 70), (131, 17)), TEMPERATURES, (*_NEAR, 1e-3)),),
        **_VIEWS,
    ),
    # HCL; plain, DCL, and harder ones with constant weights
    "hard_nt_xent": _hard(1.0, 0.1),
    "hard_nt_xent-constant": _hard(2.5, 0.0, True, compiled=False),
    "hard_nt_xent-debiased": _hard(0.0, 0.1, compiled=False),
    "hard_nt_xent-plain": _hard(0.0, 0.0, compiled=False),
    "hard_nt_xent-extra": _with_extra(1.0, 0.1),
    "sup_con": _sup_con(detach_columns=False),
    "sup_con-constant": _sup_con(detach_columns=True, compiled=False),
    "h_scl": _h_scl(1.0, False),
    "h_scl-easy": _h_scl(0.0, False, compiled=False),
    "h_scl-constant": _h_scl(5.0, True, compiled=False),
    "bank_step-adco": _bank_step("adco", True),
    "bank_step-caco": _bank_step("caco", True),
    "bank_step-adco-first": _bank_step("adco", False, compiled=False),
    "bank_step-caco-first": _bank_step("caco", False, compiled=False),
    "topk_similarity": _topk_similarity(True),
    "topk_similarity-all": _topk_similarity(False, compiled=False),
    "linf_step": _linf_step(True, alpha=0.03, eps=0.02, lo=0.0, hi=1.0),
    "linf_step-channels": _linf_step(
        True, alpha=0.02, eps=[0.01, 0.02, 0.03], lo=(-1.0, -1.1, -1.2), hi=1.1
    ),
    "linf_step-tensors": _linf_step(
        compiled=False,
        alpha=torch.tensor([0.01, 0.02, 0.03]),
        eps=torch.tensor([0.02, 0.03, 0.04]).double(),
    ),
    "stem_step-3": _stem_step(3),
    "stem_step-3-tensors": _stem_step(3, alpha=torch.tensor([0.01, 0.02, 0.03])),
    "stem_step-7": _stem_step(7),
    "augment": _augment(False, size=16, interpolation="bicubic"),
    "augment-half": _augment(
        False,
        whole_batch=True,
        size=8,
        dtype=torch.float16,
        memory_format=torch.channels_last,
    ),
    "augment-ragged": _augment(True, size=9, mean=(0.5, 0.4, 0.3), std=[0.2, 0.25, 0.3]),
}
# those on rows that have native code, by one case a formula: for searches and other processors
ON_ROWS = {
    name: CASES[name]
    for name in (
        "nt_xent",
        "tied_nt_xent",
        "info_nce",
        "info_nce-named",
        "info_nce-symmetric",
        "uel",
        "hard_nt_xent",
        "hard_nt_xent-constant",
    )
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
