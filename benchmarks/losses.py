"""The other losses and the nearest keys on the CPU: clae_fast against torch.

    python -m benchmarks.losses                              # every case, two threads, fp32
    python -m benchmarks.losses --case queue --memory --bars

A case is an op at a size its users have. Its peers are `torch_eager`, the formula as it is written
for autograd, `torch_compile`, the same compiled, and `torch_blocks`, our closed forms in torch ops,
block by block (impl="torch"), each in its fastest form. All are checked against float64 and timed
in interleaved rounds; benchmarks/README.md has the protocol. Exit status: 0; 1 when clae_fast
disagrees with float64, or with `--bars` when a bar is missed; 2 for bad arguments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks import _cli, memory, timing
from benchmarks.peers import TOLERANCE
from clae_fast import reference

Operands = tuple[Tensor, ...]
# what is timed: the loss and the wanted gradients, or whatever the op returns
Outputs = tuple[Tensor, ...]
Call = Callable[..., Outputs]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "clae_fast"
PEERS = ("torch_eager", "torch_compile")
BARS = {"queue": (1.4, 10.0)}  # times torch's speed, torch's memory over ours


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        sizes: Shapes of the operands.
        op: The public op with its settings; takes `impl`.
        eager: Forms of it in torch ops, by name.
        leaves: How many of the operands, from the first, have a gradient that is wanted.
        truth: What it should return for float64 operands.
        state: How many of the operands, from the last, are in fp32 whatever the others are.
        compiled: Whether torch can compile the forms whole.
    """

    sizes: tuple[tuple[int, int], ...]
    op: Callable[..., Any]
    eager: dict[str, Callable[..., Any]]
    leaves: int
    truth: Callable[..., Any]
    state: int = 0
    compiled: bool = True

    def operands(self, dtype: torch.dtype) -> Operands:
        """Random rows; those of the second operand are near the first's where they are partners."""
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(size, generator=generator) for size in self.sizes]
        if len(made) > 1:
            partners = min(len(made[0]), len(made[1]))
            made[1][:partners] = made[0][:partners] + 0.5 * made[1][:partners]
        first = len(made) - self.state
        dtypes = [dtype if i < first else torch.float32 for i in range(len(made))]
        rows = [F.normalize(z).to(dtype) for z, dtype in zip(made, dtypes, strict=True)]
        return tuple(z.requires_grad_(i < self.leaves) for i, z in enumerate(rows))

    def call(self, function: Callable[..., Any]) -> Call:
        """`function` with what is wanted of it."""
        if self.leaves == 0:
            return lambda *operands: _as_tuple(function(*operands))

        def loss_and_grads(*operands: Tensor) -> Outputs:
            loss = function(*operands)
            return (loss.detach(), *torch.autograd.grad(loss, operands[: self.leaves]))

        return loss_and_grads


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    setting = {"dtype": args.dtype, "rounds": args.rounds}
    return _cli.run_cases(args, _measure, _judge, setting)


def cases(scale: int = 1) -> dict[str, Case]:
    """Every case; `scale` divides the numbers of rows."""
    N, K, n = 256 // scale, 65536 // scale, 4096 // scale
    settings = {"temperature": 0.2}
    self_attack = _tied(temperature=0.5)
    return {
        # a batch of MoCo's queries against its queue
        "queue": Case(
            ((N, 128), (N + K, 128)),
            partial(clae_fast.info_nce, **settings),
            {"cat": _moco, "whole": _cross_entropy},
            1,
            partial(reference.info_nce, **settings),
        ),
        "pairs": Case(
            ((n, 128), (n, 128)),
            partial(clae_fast.info_nce, **settings),
            {"": _cross_entropy},
            2,
            partial(reference.info_nce, **settings),
        ),
        "both_ways": Case(
            ((n, 128), (n, 128)),
            partial(clae_fast.info_nce, symmetric=True, **settings),
            {"": lambda a, k: (_cross_entropy(a, k) + _cross_entropy(k, a)) / 2},
            2,
            partial(reference.info_nce, symmetric=True, **settings),
        ),
        "tied": Case(
            ((n, 128),),
            partial(clae_fast.tied_nt_xent, temperature=0.5),
            {"": self_attack},
            0,
            partial(reference.tied_nt_xent, temperature=0.5),
            compiled=False,
        ),
        "uel": Case(
            ((n // 2, 128), (n // 2, 128)),
            partial(clae_fast.uel, temperature=0.1),
            {"": _uel},
            2,
            partial(reference.uel, temperature=0.1),
        ),
        "hard": Case(
            ((n // 2, 128), (n // 2, 128)),
            partial(clae_fast.hard_nt_xent, temperature=0.5),
            {"": _hcl},
            2,
            partial(reference.hard_nt_xent, temperature=0.5),
        ),
        "classes": Case(
            ((n, 128),),
            _by_class(clae_fast.sup_con),
            {"": _by_class(_sup_con)},
            1,
            _by_class(reference.sup_con),
        ),
        "hard_classes": Case(
            ((n, 128),),
            _by_class(clae_fast.h_scl),
            {"": _by_class(_h_scl)},
            1,
            _by_class(reference.h_scl),
        ),
        "nearest": Case(
            ((N, 128), (K, 128)),
            partial(clae_fast.topk_similarity, k=1),
            {"max": lambda a, k: (F.normalize(a) @ F.normalize(k).T).max(1, keepdim=True)},
            0,
            partial(reference.topk_similarity, k=1),
            compiled=False,
        ),
        "hardest": Case(
            ((N, 128), (K, 128)),
            partial(clae_fast.topk_similarity, k=64),
            {"topk": lambda a, k: (F.normalize(a) @ F.normalize(k).T).topk(64)},
            0,
            partial(reference.topk_similarity, k=64),
            compiled=False,
        ),
        # CaCo's bank: queries, bank and velocity, which is the gradient then
        "bank": Case(
            ((N, 128), (K, 128), (K, 128)),
            _bank(clae_fast.bank_step),
            {"": _caco},
            0,
            _bank(reference.bank_step),
            state=2,
        ),
    }


def _bank(step: Callable[..., None]) -> Callable[..., Tensor]:
    """A step that every repetition finds as it was: no momentum, and a rate of 0."""

    def velocity_of(q: Tensor, bank: Tensor, velocity: Tensor, **options: object) -> Tensor:
        options |= {"positive": torch.arange(len(q)), "temperature": 0.08, "momentum": 0.0}
        step(bank, velocity, q, lr=0.0, **options)
        return velocity

    return velocity_of


def _caco(q: Tensor, bank: Tensor, velocity: Tensor) -> Tensor:
    u, norm = F.normalize(q).float(), bank.norm(dim=1, keepdim=True)
    w = bank / norm
    p = (u @ w.T / 0.08).softmax(1)
    positive = torch.eye(len(q), len(w), dtype=torch.bool)
    p = torch.where(positive, 1 - p, p)
    r = p.T @ u / len(q)
    r = r - (r * w).sum(1, keepdim=True) * w
    velocity.mul_(0.0).sub_(r / (norm * 0.08))
    bank.sub_(0.0 * velocity)
    return velocity


def _moco(q: Tensor, keys: Tensor) -> Tensor:
    """As it is written for a queue whose rows are unit rows already."""
    N = len(q)
    u, own, queue = F.normalize(q), F.normalize(keys[:N]), keys[N:]
    # the keys of the batch are negatives of each other here, as in the op
    logits = torch.cat([u @ own.T, u @ queue.T], 1) / 0.2
    return F.cross_entropy(logits.float(), torch.arange(N))


def _cross_entropy(anchor: Tensor, keys: Tensor) -> Tensor:
    logits = F.normalize(anchor) @ F.normalize(keys).T / 0.2
    return F.cross_entropy(logits.float(), torch.arange(len(anchor)))


def _tied(temperature: float) -> Callable[[Tensor], Tensor]:
    def gradient(z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        u = F.normalize(torch.cat([z, leaf]))
        logits = (u @ u.T / temperature).float().fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(u)).roll(len(z)))
        return torch.autograd.grad(loss, leaf)[0]

    return gradient


def _uel(z0: Tensor, z1: Tensor) -> Tensor:
    u = F.normalize(torch.cat([z0, z1]))
    n = len(u)
    diagonal = torch.eye(n, dtype=torch.bool)
    positive = diagonal.roll(n // 2, 0)
    p = (u @ u.detach().T / 0.1).float().masked_fill(diagonal, -torch.inf).softmax(1)
    spread = torch.log1p(-p.masked_fill(diagonal | positive, 0)).sum()
    return -(p[positive].log().sum() + spread) / n


def _hcl(z0: Tensor, z1: Tensor) -> Tensor:
    """As released: both sums over the negatives taken out of the matrix."""
    u = F.normalize(torch.cat([z0, z1]))
    n, s = len(u), (u @ u.T / 0.5).float()
    others = ~torch.eye(n // 2, dtype=torch.bool).repeat(2, 2)
    positive, negatives = s.diagonal(n // 2).exp().repeat(2), s[others].view(n, -1).exp()
    mean = negatives.square().sum(1) / negatives.sum(1)
    debiased = ((mean - 0.1 * positive) / 0.9).clamp_min(math.exp(-1 / 0.5))
    return -(positive / (positive + (n - 2) * debiased)).log().mean()


def _by_class(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of rows whose classes have eight each."""
    return lambda z, **options: loss(z, torch.arange(len(z)) // 8, temperature=0.5, **options)


def _sup_con(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z)
    itself = torch.eye(len(u), dtype=torch.bool)
    log_p = (u @ u.T / temperature).float().masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    m = positive.sum(1)
    return -(log_p.masked_fill(~positive, 0).sum(1)[m > 0] / m[m > 0]).mean()


def _h_scl(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z)
    exp = (u @ u.T / temperature).float().exp()
    same = labels[:, None] == labels
    negatives = exp.masked_fill(same, 0)
    mean = negatives.square().sum(1, keepdim=True) / negatives.sum(1, keepdim=True)
    pair = same & ~torch.eye(len(u), dtype=torch.bool)
    return torch.log1p((len(u) - 2) * mean / exp)[pair].mean()


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.losses", description=__doc__.splitlines()[0])
    names = tuple(cases())
    add = parser.add_argument
    add("--case", type=_cli.name_list(names), default=list(names), help=", ".join(names))
    add("--dtype", choices=DTYPES, default="fp32")
    add("--scale", type=_cli.positive_int, default=1, help="divide the numbers of rows by this")
    add("--threads", type=_cli.positive_int, default=2)
    add("--rounds", type=_cli.positive_int, default=9)
    add("--json", type=_cli.json_path, metavar="FILE", help="write the results there too")
    add("--memory", action="store_true", help="also peak memory, each in a fresh process")
    add("--bars", action="store_true", help="exit with status 1 when a bar is missed")
    return parser.parse_args(argv)


def _forms(name: str, scale: int) -> dict[str, dict[str, Callable[..., Any]]]:
    """Every implementation of a case, by its forms."""
    case = cases(scale)[name]
    forms = {OURS: {"": case.op}, "torch_eager": case.eager}
    if case.compiled:
        torch.compiler.reset()
        compiled = {form: torch.compile(f, dynamic=False) for form, f in case.eager.items()}
        forms["torch_compile"] = compiled
    return {**forms, "torch_blocks": {"": partial(case.op, impl="torch")}}


def _measure(name: str, args: Any) -> list[dict[str, Any]]:
    """Check and time a case; no rows where ours is wrong."""
    case = cases(args.scale)[name]
    dtype = DTYPES[args.dtype]
    operands = case.operands(dtype)
    print(f"\n{name}: {' against '.join(str(list(size)) for size in case.sizes)}, {args.dtype}")
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in operands]
    truth = case.call(case.truth)(*exact)
    best: dict[str, tuple[str, Call, float]] = {}
    for impl, forms in _forms(name, args.scale).items():
        calls = {form: case.call(function) for form, function in forms.items()}
        errors = {form: _error(call(*operands), truth) for form, call in calls.items()}
        wrong = {form: error for form, error in errors.items() if not error <= TOLERANCE[dtype]}
        if wrong:
            print(f"  left out: {impl}: wrong, {max(wrong.values()):.1e} off the float64 reference")
            if impl == OURS:
                print(f"error: clae_fast is wrong at {name}", file=sys.stderr)
                return []
            continue
        form = timing.fastest({form: partial(call, *operands) for form, call in calls.items()})
        best[impl] = (form, calls[form], errors[form])
    del truth, exact
    timings = timing.interleave(
        {impl: partial(call, *operands) for impl, (_, call, _) in best.items()},
        rounds=args.rounds,
    )
    rows = []
    for impl, (form, _, error) in best.items():
        t = timings[impl]
        row = {
            "case": name,
            "impl": impl,
            "form": form,
            "ms": t.ms,
            "p20_ms": t.p20_p80_ms[0],
            "p80_ms": t.p20_p80_ms[1],
            "over_clae_fast": t.over(timings[OURS]),
            "peak_mib": _peak(name, impl, form, args) if args.memory else None,
            "samples": len(t.seconds),
            "quiet": t.quiet,
            "error": error,
        }
        rows.append(row)
    print(f"  {'':<16}{'ms':>10}{'x ours':>8}{'MiB':>8}{'error':>9}{'quiet':>8}  form")
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        print(
            f"  {row['impl']:<16}{row['ms']:>10.2f}{row['over_clae_fast']:>8.2f}{peak:>8}"
            f"{row['error']:>9.0e}{row['quiet']:>5}/{row['samples']:<2}  {row['form']}"
        )
    return rows


def _as_tuple(outputs: Any) -> Outputs:
    # of indices only the similarities that they lead to are compared
    return (outputs,) if isinstance(outputs, Tensor) else (outputs[0],)


def _error(outputs: Outputs, truth: Outputs) -> float:
    """The largest relative error of an output in the 2-norm, NaN where one is."""
    errors = [(o.double() - t).norm() / t.norm() for o, t in zip(outputs, truth, strict=True)]
    return float(torch.stack(errors).max())


def _peak(name: str, impl: str, form: str, args: Any) -> float | None:
    setting = (name, impl, form, args.dtype, args.scale, args.threads)
    peak: float | None = memory.in_fresh_process(_peak_here, *setting)
    return peak


def _peak_here(
    name: str, impl: str, form: str, dtype: str, scale: int, threads: int
) -> float | None:
    """Peak of one call above the operands, or None where memory is too short for it."""
    torch.set_num_threads(threads)
    case = cases(scale)[name]
    call = case.call(_forms(name, scale)[impl][form])
    operands = case.operands(DTYPES[dtype])
    # a first call loads the code and starts the threads: a small one, but compiled code is made
    # for one size alone
    small = operands
    if impl != "torch_compile":
        small = tuple(z[:128].detach().requires_grad_(z.requires_grad) for z in operands)
    try:
        call(*small)
        return memory.peak_mib(partial(call, *operands))
    except (RuntimeError, MemoryError):
        return None


def _judge(rows: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Every bar with its verdict and whether it was missed; torch is its best in each respect."""
    verdicts = {}
    for name, (speed, lean) in BARS.items():
        of_case = {row["impl"]: row for row in rows if row["case"] == name}
        fastest = min((of_case[i]["over_clae_fast"] for i in of_case if i != OURS), default=None)
        verdicts[f"{name}: >= {speed} x torch"] = _verdict(fastest, speed)
        peaks = [of_case[impl]["peak_mib"] for impl in PEERS if impl in of_case]
        known = [peak for peak in peaks if peak is not None]
        ratio = min(known) / of_case[OURS]["peak_mib"] if known else None
        verdicts[f"{name}: memory of torch >= {lean:.0f} x ours"] = _verdict(ratio, lean)
    return verdicts


def _verdict(got: float | None, wanted: float) -> tuple[str, bool]:
    if got is None:
        return "not measured", False
    return f"{'met' if got >= wanted else 'missed'} ({got:.2f}x)", got < wanted


if __name__ == "__main__":
    sys.exit(main())
