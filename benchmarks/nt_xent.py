"""NT-Xent, loss and gradient of raw projections: clae_fast against its peers.

    python -m benchmarks.nt_xent                            # two threads, fp32, D = 128
    python -m benchmarks.nt_xent --warm-heap --n 8192       # the same with a heap that is kept
    python -m benchmarks.nt_xent --dtype bf16 --n 8192      # ours in fp32 stands beside it

`--warm-heap` starts the command again as

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m benchmarks.nt_xent ...

because glibc reads these settings at its start. One run is one process: at every size all
implementations are checked against float64, then timed in interleaved rounds together with
torch.mm at 2048^3. Rates count 4 n^2 D floating-point operations for everybody: what the symmetric
form needs when it recomputes the similarities. Exit status: 0; 1 when clae_fast disagrees with
float64, or with `--bars` when a bar is missed; 2 for bad arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clae_fast
from benchmarks import _cli, memory, peers, timing
from benchmarks.peers import Loss, Prepared, UnavailableError
from clae_fast import _native

IMPLS = ("clae_fast", *peers.PEERS)
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
MM = "torch.mm"
MM_SIZE = 2048
MEMORY_BAR_N = 16384


@dataclass(frozen=True)
class Bar:
    """A bound that a run is held to; it is set for D = 128, temperature 0.5, two threads.

    Attributes:
        peers: The bound is on the fastest of these.
        speedup: At least this, as the peer's time over ours.
        warm: True or False: the state of the heap the bar is for.
        dtype: Of the projections.
        isa: The instruction set that the bar is for, "" for every one.
    """

    n: int
    peers: tuple[str, ...]
    speedup: float
    warm: bool = False
    dtype: str = "fp32"
    isa: str = ""

    def __str__(self) -> str:
        who = self.peers[0] if len(self.peers) == 1 else "every peer"
        heap = "warm heap" if self.warm else "default heap"
        setting = ", ".join(word for word in (self.dtype, self.isa, heap) if word)
        return f"n = {self.n}, {setting}: >= {self.speedup:.2f} x {who}"


_TORCH = tuple(name for name in peers.PEERS if name.startswith("torch_"))
# ours on the same numbers in fp32, beside projections in half precision
OURS_IN_FP32 = "clae_fast_fp32"
BARS = (
    Bar(8192, ("lightly",), 6.0),
    Bar(8192, ("torch_compile",), 1.6),
    Bar(8192, ("torch_chunked_symmetric",), 1.0),
    Bar(512, ("lightly",), 2.5),
    Bar(512, ("torch_eager",), 1.5),
    Bar(128, tuple(peers.PEERS), 1 / 1.05),
    Bar(8192, ("lightly",), 2.2, warm=True),
    Bar(8192, ("torch_eager",), 1.4, warm=True),
    # all that fit into memory at this size
    Bar(8192, ("lightly", *_TORCH), 1.0, dtype="bf16"),
    Bar(8192, (OURS_IN_FP32,), 1.5, dtype="bf16", isa="avx512_bf16"),
)
MM_BAR_NS, MM_BAR_SHARE = (2048, 8192), 0.75
MEMORY_BAR_MIB = 64.0


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.warm_heap and not timing.warm_heap():
        words = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "benchmarks.nt_xent", *words]
        os.execve(sys.executable, command, {**os.environ, **WARM_HEAP})
    torch.set_num_threads(args.threads)
    machine = timing.machine()
    print(timing.header(machine))
    rows: list[dict[str, Any]] = []
    for n in args.n:
        try:
            rows += _measure(n, args)
        except UnavailableError as error:
            print(f"error: clae_fast at n = {n}: {error}", file=sys.stderr)
            return 1
    lean = None
    if args.memory:
        lean = _peak("clae_fast", "", MEMORY_BAR_N, args)
        print(f"\nclae_fast at n = {MEMORY_BAR_N}: {_mib(lean)} MiB above the inputs")
    verdicts = _judge(rows, lean, args)
    print("\nbars (speed-ups are the peer's time over ours):")
    for bar, verdict in verdicts.items():
        print(f"  {verdict:<24} {bar}")
    if args.json:
        setting = {"temperature": args.temperature, "dtype": args.dtype, "rounds": args.rounds}
        result = {"machine": machine, **setting, "rows": rows, "bars": verdicts}
        _cli.write_json(args.json, result)
    missed = any(verdict.startswith("missed") for verdict in verdicts.values())
    return 1 if args.bars and missed else 0


def prepare(
    impl: str, z0: Tensor, z1: Tensor, temperature: float, truth: tuple[Tensor, Tensor, Tensor]
) -> Prepared:
    """An implementation of IMPLS, checked and in its fastest form.

    Raises:
        UnavailableError: It is a peer that cannot run at this size, or it is wrong.
    """
    if impl == "clae_fast":
        return peers.prepare(_ours(2 * len(z0), temperature), z0, z1, truth)
    return peers.prepare_peer(impl, z0, z1, temperature, truth)


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.nt_xent", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--n", type=_cli.int_list, default=[128, 512, 2048, 8192], help="rows n = 2N, as 128,512")
    add("--dim", type=_cli.positive_int, default=128, help="width D of the projections")
    add("--temperature", type=_cli.positive_float, default=0.5)
    add("--dtype", choices=DTYPES, default="fp32")
    add("--impls", type=_cli.name_list(IMPLS), default=list(IMPLS), help=", ".join(IMPLS))
    add("--threads", type=_cli.positive_int, default=2)
    add("--rounds", type=_cli.positive_int, default=15)
    add("--json", type=_cli.json_path, metavar="FILE", help="write the results there too")
    add("--memory", action="store_true", help="also peak memory, each in a fresh process")
    add("--bars", action="store_true", help="exit with status 1 when a bar is missed")
    add("--warm-heap", action="store_true", help="run with malloc told to keep its memory")
    args = parser.parse_args(argv)
    for n in args.n:
        if n % 2:
            parser.error(f"argument --n: {n} is odd, but n = 2N counts the rows of both views")
    if "clae_fast" not in args.impls:
        args.impls.insert(0, "clae_fast")
    return args


def _measure(n: int, args: Any) -> list[dict[str, Any]]:
    """Check and time every implementation at one size, print the table, return the rows."""
    print(f"\nn = {n}, D = {args.dim}, T = {args.temperature}, {args.dtype}")
    z0, z1 = peers.paired_views(n, args.dim, DTYPES[args.dtype])
    truth = peers.oracle(z0, z1, args.temperature)
    prepared = {}
    for impl in args.impls:
        try:
            prepared[impl] = prepare(impl, z0, z1, args.temperature, truth)
        except UnavailableError as error:
            if impl == "clae_fast":
                raise
            print(f"  left out: {impl}: {error}")
    del truth
    calls: dict[str, Callable[[], object]] = {
        impl: partial(peers.value_and_grad, p.loss, z0, z1) for impl, p in prepared.items()
    }
    if args.dtype in ("fp16", "bf16"):
        full = [z.detach().float().requires_grad_() for z in (z0, z1)]
        prepared[OURS_IN_FP32] = prepared["clae_fast"]
        calls[OURS_IN_FP32] = partial(peers.value_and_grad, prepared["clae_fast"].loss, *full)
    calls[MM] = _mm()
    timings = timing.interleave(calls, rounds=args.rounds)

    ours, mm = timings["clae_fast"], timings[MM]
    # mm's time for 4 n^2 D operations, over its time for the 2 m^3 it was given
    mm_work = 4 * n * n * args.dim / (2 * MM_SIZE**3)
    rows = []
    for impl, p in prepared.items():
        t = timings[impl]
        row = {
            "n": n,
            "D": args.dim,
            "impl": impl,
            "ms": t.ms,
            "peak_mib": _peak(impl, p.form, n, args) if args.memory and impl in IMPLS else None,
            "p20_ms": t.p20_p80_ms[0],
            "p80_ms": t.p20_p80_ms[1],
            "over_clae_fast": t.over(ours),
            "share_of_mm": mm.over(t) * mm_work,
            "samples": len(t.seconds),
            "quiet": t.quiet,
            "error": p.error,
            "form": p.form,
        }
        rows.append(row)
    _print_table(rows)
    gflops = 2 * MM_SIZE**3 / mm.ms / 1e6
    print(f"  {MM} at {MM_SIZE}^3: {gflops:.0f} GFLOP/s, quiet {mm.quiet}/{len(mm.seconds)}")
    return rows


def _ours(n: int, temperature: float) -> dict[str, Loss]:
    return {"": partial(clae_fast.nt_xent, temperature=temperature)}


def _mm() -> Callable[[], Tensor]:
    """torch.mm at its best: fp32, square, into memory that is there already."""
    a, b, out = torch.randn(3, MM_SIZE, MM_SIZE).unbind()
    torch.mm(a, b, out=out)
    return partial(torch.mm, a, b, out=out)


def _print_table(rows: Iterable[dict[str, Any]]) -> None:
    print(
        f"  {'':<24}{'ms':>10}{'p20':>10}{'p80':>10}{'x ours':>8}{'% of mm':>9}{'MiB':>8}"
        f"{'quiet':>8}  form"
    )
    for row in rows:
        print(
            f"  {row['impl']:<24}{row['ms']:>10.3f}{row['p20_ms']:>10.3f}{row['p80_ms']:>10.3f}"
            f"{row['over_clae_fast']:>8.2f}{100 * row['share_of_mm']:>9.1f}"
            f"{_mib(row['peak_mib']):>8}{row['quiet']:>5}/{row['samples']:<2}  {row['form']}"
        )


def _mib(peak: float | None) -> str:
    return "-" if peak is None else f"{peak:.1f}"


def _peak(impl: str, form: str, n: int, args: Any) -> float | None:
    setting = (impl, form, n, args.dim, args.temperature, args.dtype, args.threads)
    peak: float | None = memory.in_fresh_process(_peak_here, *setting)
    return peak


def _peak_here(
    impl: str, form: str, n: int, dim: int, temperature: float, dtype: str, threads: int
) -> float | None:
    """Peak of one call above the inputs, or None where memory is too short for it."""
    torch.set_num_threads(threads)
    forms = _ours if impl == "clae_fast" else peers.PEERS[impl].forms
    loss = forms(n, temperature)[form]
    # a first call loads the code and starts the threads: a small one, but compiled code is made
    # for one size alone
    warm_n = n if impl == "torch_compile" else min(n, 64)
    warm_up = loss if warm_n == n else next(iter(forms(warm_n, temperature).values()))
    try:
        peers.value_and_grad(warm_up, *peers.paired_views(warm_n, dim, DTYPES[dtype]))
        z0, z1 = peers.paired_views(n, dim, DTYPES[dtype])
        return memory.peak_mib(partial(peers.value_and_grad, loss, z0, z1))
    except (RuntimeError, MemoryError):
        return None


def _judge(rows: list[dict[str, Any]], lean: float | None, args: Any) -> dict[str, str]:
    """Every bar's text with `met`, `missed` or `not measured`."""
    valid = (args.dim, args.temperature, args.threads) == (128, 0.5, 2)
    row_of = {(row["n"], row["impl"]): row for row in rows} if valid else {}
    warm = timing.warm_heap()
    verdicts = {}
    for bar in BARS:
        found = [row_of[bar.n, peer] for peer in bar.peers if (bar.n, peer) in row_of]
        here = bar.warm == warm and bar.dtype == args.dtype and bar.isa in ("", _native.isa())
        measured = here and len(found) == len(bar.peers)
        speedup = min(row["over_clae_fast"] for row in found) if measured else None
        verdicts[str(bar)] = _verdict(speedup, lambda got, bar=bar: got >= bar.speedup, "x")
    valid = valid and args.dtype == "fp32"
    for n in MM_BAR_NS:
        share = row_of.get((n, "clae_fast"), {}).get("share_of_mm") if valid else None
        verdicts[f"n = {n}: >= {MM_BAR_SHARE:.0%} of torch.mm's rate"] = _verdict(
            share, lambda got: got >= MM_BAR_SHARE, ""
        )
    verdicts[f"n = {MEMORY_BAR_N}: peak <= {MEMORY_BAR_MIB:.0f} MiB above the inputs"] = _verdict(
        lean if valid else None, lambda got: got <= MEMORY_BAR_MIB, " MiB"
    )
    return verdicts


def _verdict(got: float | None, met: Callable[[float], bool], unit: str) -> str:
    if got is None:
        return "not measured"
    return f"{'met' if met(got) else 'missed'} ({got:.2f}{unit})"


if __name__ == "__main__":
    sys.exit(main())
