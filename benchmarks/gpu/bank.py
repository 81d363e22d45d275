"""The stage of the banks of learnable keys: CaCo's and AdCo's work on a batch, against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.gpu.results import Bar
from benchmarks.gpu.stage import OURS, Candidate, Case, Suite
from clae_fast import reference

N, K, D = 256, 65536, 128
AT_LEAST = 4.0
# relative error of the encoder's and of the bank's gradient above which a form counts as wrong
TOLERANCE = 1e-2
TEMPERATURES = {"caco": (0.08, 0.08), "adco": (0.12, 0.02)}


@dataclass(frozen=True)
class Work:
    """A batch of queries against a bank.

    Attributes:
        method: "caco" or "adco".
        columns: Keys of the batch in front of the bank, for AdCo, or the bank alone.
        velocity: Of the bank.
        query: A leaf, [N, D].
        positive: Column of each query's positive, [N].
        lr: The bank's rate, 0: every call does the same work, and so to the same end.
    """

    method: str
    columns: Tensor
    velocity: Tensor
    query: Tensor
    positive: Tensor
    lr: Tensor

    @property
    def bank(self) -> Tensor:
        """[K, D]."""
        return self.columns[-len(self.velocity) :]


# the query's gradient; the bank and its velocity move
Step = Callable[[Work], Tensor]


def bank(suite: Suite) -> Iterator[Case]:
    """Loss, encoder's gradient and bank's update."""
    for method in TEMPERATURES:
        text = f"best of torch over replayed {OURS}, {method}, N={N}, K={K}, D={D}"
        bar = Bar("bank", text, at_least=AT_LEAST)
        # torch.compile takes most of it
        yield Case("bank", method, 150, partial(_compare, suite, method, bar), (bar,))


def work(method: str, n: int, k: int, d: int, device: torch.device, seed: int = 0) -> Work:
    """Random queries, keys near them for AdCo, and a bank."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    query, columns = normal(n, d), normal(k, d)
    if method == "adco":
        columns = torch.cat([F.normalize(query + 0.5 * normal(n, d)), columns])
    positive = torch.arange(n, device=device)
    if method == "caco":
        positive = positive * (k // n)
    velocity, lr = torch.zeros(k, d, device=device), torch.zeros((), device=device)
    return Work(method, columns, velocity, query.requires_grad_(), positive, lr)


def ours(given: Work) -> Tensor:
    """By `info_nce` and `bank_step`."""
    T, bank_T = TEMPERATURES[given.method]
    positive = given.positive if given.method == "caco" else None
    losses = clae_fast.info_nce(
        given.query, given.columns, temperature=T, positive=positive, reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.mean(), given.query)
    clae_fast.bank_step(
        given.bank,
        given.velocity,
        given.query,
        lr=given.lr,
        keys=given.columns[: len(given.query)] if positive is None else None,
        positive=positive,
        losses=losses.detach() if bank_T == T else None,
        temperature=bank_T,
    )
    return gradient


def _torch_step(
    columns: Tensor,
    velocity: Tensor,
    query: Tensor,
    positive: Tensor,
    lr: Tensor,
    T: float,
    bank_T: float,
    dtype: torch.dtype,
) -> Tensor:
    """Both gradients of one matrix of similarities, in closed form."""
    n, first = len(query), len(columns) - len(velocity)
    norm = query.norm(dim=1, keepdim=True)
    u = query / norm
    length = columns.norm(dim=1, keepdim=True)
    v = columns / length
    s = (u.to(dtype) @ v.to(dtype).T).float()
    is_positive = torch.arange(len(v), device=v.device) == positive[:, None]
    p = (s / T).softmax(1)
    du = (p - is_positive.float()).to(dtype) @ v.to(dtype)
    du = du.float() / (n * T)
    dquery = (du - (du * u).sum(1, keepdim=True) * u) / norm
    if bank_T != T:
        p = (s / bank_T).softmax(1)
    p = torch.where(is_positive, 1 - p, p)[:, first:]
    r = (p.to(dtype).T @ u.to(dtype)).float() / n
    w = v[first:]
    r = r - (r * w).sum(1, keepdim=True) * w
    velocity.mul_(0.9).sub_(r / (length[first:] * bank_T))
    columns[first:].sub_(lr * velocity)
    return dquery


def _by_torch(step: Callable[..., Tensor], dtype: torch.dtype) -> Step:
    def call(given: Work) -> Tensor:
        tensors = (given.columns, given.velocity, given.query.detach(), given.positive, given.lr)
        return step(*tensors, *TEMPERATURES[given.method], dtype)

    return call


def forms(device: torch.device) -> dict[str, Step]:
    """Torch's, by name."""
    if device.type == "cuda":
        options = {"mode": "max-autotune-no-cudagraphs", "fullgraph": True}
    else:
        options = {"backend": "eager"}
    compiled = torch.compile(_torch_step, dynamic=False, **options)
    found = {}
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    for name, dtype in (("TF32", torch.float32), ("16 bit", half)):
        found[f"torch eager, {name}"] = _by_torch(_torch_step, dtype)
        found[f"torch.compile, {name}"] = _by_torch(compiled, dtype)
    return found


def error_of(step: Step, given: Work) -> float:
    """The larger relative error of both gradients, against float64."""
    T, bank_T = TEMPERATURES[given.method]
    exact_query = given.query.detach().double().requires_grad_()
    columns, velocity = given.columns.double(), given.velocity.double()
    loss = reference.info_nce(exact_query, columns, temperature=T, positive=given.positive)
    (exact,) = torch.autograd.grad(loss, exact_query)
    keys = columns[: len(given.query)] if given.method == "adco" else None
    positive = given.positive if keys is None else None
    options = {"keys": keys, "positive": positive, "temperature": bank_T}
    bank = columns[-len(velocity) :].clone()
    reference.bank_step(bank, velocity, exact_query.detach(), lr=0.0, **options)
    found = step(given)
    pairs = ((found, exact), (given.velocity, velocity))
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


def _compare(suite: Suite, method: str, bar: Bar) -> None:
    n, k, d = suite.size(N, 8), suite.size(K, 64), suite.size(D, 16)
    small = (n, suite.size(8192, 64), d, suite.device)
    sets = [work(method, n, k, d, suite.device, seed) for seed in range(2)]
    candidates = {}
    for name, step in {OURS: ours, **forms(suite.device)}.items():
        error = error_of(step, work(method, *small))
        if not error <= TOLERANCE:
            if name == OURS:
                raise ArithmeticError(f"{method} is {error:.1e} off the float64 reference")
            suite.results.lacks(name, f"wrong, {error:.1e} off the float64 reference")
            continue
        candidates[name] = Candidate([partial(step, given) for given in sets], True)
    measured = suite.measure(candidates)
    over = {name: row.pop("over")[OURS] for name, row in measured.items()}
    best = min((name for name in measured if name != OURS), key=lambda name: over[name])
    for name, row in measured.items():
        row |= {"stage": "bank", "method": method, "candidate": name, "N": n, "K": k, "D": d}
        row |= {"ratio": over[name]}
        if name == best:
            suite.results.judge(bar, over[name], row)
        else:
            suite.results.add(row)
