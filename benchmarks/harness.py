"""How a case is measured: every implementation is checked, then all are timed interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import memory, timing
from benchmarks.case import (
    CPU,
    DTYPES,
    OURS,
    Case,
    Forms,
    Operands,
    Outputs,
    UnavailableError,
    relative_error,
)
from benchmarks.results import Row
from benchmarks.timing import Key, Timing

Call = Callable[[], object]

# relative error of an output above which a form counts as wrong
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# rows of a call that only loads the code
FEW_ROWS = 128


@dataclass(frozen=True)
class Prepared:
    """A checked implementation: its fastest form, the name of that, and its relative error."""

    form: str
    function: Callable[..., Any]
    error: float


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        calls: What a sample makes in turn, for instance calls on inputs that rotate.
        captured: Whether a CUDA graph holds the calls.
        each: How often all the calls together do what is timed; 0 for once a call.
    """

    calls: Sequence[Call]
    captured: bool = False
    each: int = 0


def forms_of(case: Case, name: str, device: torch.device = CPU) -> Forms:
    """The forms of ours or of a peer. Raises `UnavailableError` where its package does not load."""
    if name == OURS:
        return {"": case.op}
    peer = case.peers[name]
    try:
        return peer.forms(device)
    except ModuleNotFoundError as error:
        hint = "" if peer.gpu_only else " (the extra `bench` has it)"
        raise UnavailableError(f"{peer.package} is not installed{hint}") from error
    except Exception as error:  # whatever a package raises while it loads, the others go on
        raise UnavailableError(f"fails: {first_line(error)}") from error


def prepare(
    case: Case,
    name: str,
    operands: Operands,
    truth: Outputs,
    *,
    device: torch.device = CPU,
    tolerance: float | None = None,
) -> Prepared:
    """Check every form of ours or of a peer on these operands and keep the fastest.

    Raises:
        UnavailableError: Its package is missing, memory is too short, a form fails or is wrong.
    """
    need = 0 if name == OURS else case.peers[name].numbers * operands[0].element_size()
    if need > 0.8 * memory.available_bytes():
        raise UnavailableError(f"needs about {need / 2**30:.0f} GiB of memory")
    forms, errors = forms_of(case, name, device), {}
    for form, function in forms.items():
        try:
            errors[form] = relative_error(case.call(function, operands), truth)
        except Exception as error:  # whatever a peer raises, the others go on
            raise UnavailableError(f"fails: {first_line(error)}") from error
        if not errors[form] <= (tolerance or TOLERANCE[operands[0].dtype]):
            off = f"{errors[form]:.1e} off the float64 reference"
            raise UnavailableError(f"wrong, {off}{form and f' ({form})'}")
    best = timing.fastest({form: partial(case.call, f, operands) for form, f in forms.items()})
    return Prepared(best, forms[best], errors[best])


def cpu_peers(case: Case) -> list[str]:
    """The names of the peers that the CPU's commands measure."""
    return [name for name, peer in case.peers.items() if not peer.gpu_only]


def compare(
    make: Callable[..., Case],
    size: dict[str, Any],
    names: Iterable[str],
    args: Any,
    beside: Callable[[Case, Operands], dict[str, Call]] = lambda case, operands: {},
) -> tuple[dict[str, Row], dict[str, Timing]]:
    """Check and time ours and the named peers of a case on the CPU, and what is to stand beside.

    Args:
        make: The entry of the registry that makes the case, of `size`.
        size: What `make` takes.
        names: The peers. One that cannot run here is named and left out.
        args: The command's arguments: `dtype`, `rounds`, `threads` and `memory`.
        beside: Gives what else is timed in the same rounds.

    Returns:
        The rows of ours and of the peers, and the timings of all.

    Raises:
        UnavailableError: Ours is wrong.
    """
    case = make(**size)
    operands = case.inputs(DTYPES[args.dtype], CPU, 0)
    truth = case.exact(operands)
    found: dict[str, Prepared] = {}
    for name in (OURS, *names):
        try:
            found[name] = prepare(case, name, operands, truth)
        except UnavailableError as error:
            if name == OURS:
                raise
            print(f"  left out: {name}: {error}")
    del truth
    calls: dict[str, Call] = {
        name: partial(case.call, p.function, operands) for name, p in found.items()
    }
    timings = timing.interleave(calls | beside(case, operands), rounds=args.rounds)
    rows = {name: row(name, timings, p.form, p.error) for name, p in found.items()}
    for name, p in found.items():
        rows[name]["peak_mib"] = peak(make, size, name, p.form, args) if args.memory else None
    return rows, timings


def row(name: str, timings: Mapping[str, Timing], form: str, error: float | None) -> Row:
    """The entries of a result's row for an implementation, without its memory."""
    timed = timings[name]
    over = timed.over(timings[OURS])
    return {"impl": name, "form": form, **timed.row(), "over_clae_fast": over, "error": error}


def peak(
    make: Callable[..., Case], size: dict[str, Any], name: str, form: str, args: Any
) -> float | None:
    """Peak memory of one call above the operands in MiB, or None where memory is too short."""
    return memory.peak_of(_ready, make, size, name, form, args.dtype, args.threads)


def measure(
    candidates: Mapping[Key, Candidate],
    *,
    device: torch.device,
    rounds: int,
    rehearsal: bool = False,
    lacks: Callable[[str, str], None] | None = None,
) -> dict[Key, Timing]:
    """Time candidates interleaved, each after two calls or as a CUDA graph.

    What fails is left out, unless its name is ours, and `lacks` is told its name and why. A
    rehearsal captures nothing and takes two short rounds.
    """
    calls = {}
    for key, candidate in candidates.items():
        name = _text(key)
        try:
            capture = candidate.captured and not rehearsal
            call = (timing.replayed if capture else timing.in_turn)(candidate.calls)
            for _ in range(2):
                call()
            calls[key] = call
        except Exception as failure:  # whatever a peer raises, the others go on
            if OURS in name:
                raise
            if lacks:
                lacks(name, first_line(failure))
    timings = timing.interleave(
        calls,
        rounds=2 if rehearsal else rounds,
        device=device,
        min_seconds=0.0 if rehearsal else 0.02,
        max_seconds=3.0,
    )
    for key, timed in timings.items():
        each = candidates[key].each or len(candidates[key].calls)
        timed.seconds = {r: seconds / each for r, seconds in timed.seconds.items()}
    return timings


def _text(key: Any) -> str:
    return key if isinstance(key, str) else ", ".join(map(str, key))


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(failure) or type(failure).__name__).strip().splitlines()[0]


def _ready(
    make: Callable[..., Case], size: dict[str, Any], name: str, form: str, dtype: str, threads: int
) -> Call:
    """One call of a form, after another that has loaded the code and started the threads."""
    torch.set_num_threads(threads)
    case = make(**size)
    function, operands = forms_of(case, name)[form], case.inputs(DTYPES[dtype], CPU, 0)
    call = partial(case.call, function, operands)
    if name != OURS and case.peers[name].compiled:
        call()
    else:
        small = {k: min(v, FEW_ROWS) if k in ("n", "N", "K") else v for k, v in size.items()}
        few = make(**small)
        first = next(iter(forms_of(few, name).values()))
        few.call(first, few.inputs(DTYPES[dtype], CPU, 0))
    return call
