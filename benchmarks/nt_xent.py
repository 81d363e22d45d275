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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import _cli, harness, machine
from benchmarks.case import DTYPES, OURS, Case, Operands
from benchmarks.cases import CASES
from benchmarks.results import Bar, Row, table, verdicts
from clae_fast import _native

PEERS = tuple(harness.cpu_peers(CASES["nt_xent"](2)))
IMPLS = (OURS, *PEERS)
MM = "torch.mm"
MM_SIZE = 2048
MEMORY_N = 16384
# ours on the same numbers in fp32, beside projections in half precision
OURS_IN_FP32 = "clae_fast_fp32"


_TORCH = tuple(name for name in PEERS if name.startswith("torch_"))
# n, peers, the bar on the time of the fastest of them over ours, and whether the heap is warm; for
# D = 128, temperature 0.5 and two threads, by data type and instruction set ("": every one)
SPEED_UPS = {
    ("fp32", ""): (
        (8192, ("lightly",), 6.0, False),
        (8192, ("torch_compile",), 1.6, False),
        (8192, ("torch_chunked_symmetric",), 1.0, False),
        (512, ("lightly",), 2.5, False),
        (512, ("torch_eager",), 1.5, False),
        (128, PEERS, 1 / 1.05, False),
        (8192, ("lightly",), 2.2, True),
        (8192, ("torch_eager",), 1.4, True),
    ),
    # lightly and torch fit into memory at this size
    ("bf16", ""): ((8192, ("lightly", *_TORCH), 1.0, False),),
    ("bf16", "avx512_bf16"): ((8192, (OURS_IN_FP32,), 1.5, False),),
}
MM_SHARES = {
    n: Bar(f"n = {n}: >= 75% of torch.mm's rate", 0.75, form="{:.2f}") for n in (2048, 8192)
}
MEMORY = Bar(f"n = {MEMORY_N}: peak <= 64 MiB above the inputs", at_most=64.0, form="{:.2f} MiB")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.warm_heap and not machine.warm_heap():
        words = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "benchmarks.nt_xent", *words]
        os.execve(sys.executable, command, {**os.environ, **machine.WARM_HEAP})
    setting = {"temperature": args.temperature, "dtype": args.dtype, "rounds": args.rounds}
    return _cli.run_cases(args, {f"n = {n}": n for n in args.n}, _measure, _judge, setting)


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.nt_xent", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--n", type=_cli.int_list, default=[128, 512, 2048, 8192], help="rows n = 2N, as 128,512")
    add("--dim", type=_cli.positive_int, default=128, help="width D of the projections")
    add("--temperature", type=_cli.positive_float, default=0.5)
    add("--dtype", choices=DTYPES, default="fp32")
    add("--impls", type=_cli.name_list(IMPLS), default=list(IMPLS), help=", ".join(IMPLS))
    add("--memory", action="store_true", help="also peak memory, each in a fresh process")
    add("--warm-heap", action="store_true", help="run with malloc told to keep its memory")
    _cli.add_timing(parser, rounds=15)
    args = parser.parse_args(argv)
    for n in args.n:
        if n % 2:
            parser.error(f"argument --n: {n} is odd, but n = 2N counts the rows of both views")
    return args


def _size(n: int, args: Any) -> dict[str, Any]:
    return {"n": n, "D": args.dim, "temperature": args.temperature}


def _measure(n: int, args: Any) -> list[Row]:
    """Check and time every implementation at one size, print the table, return the rows."""
    print(f"\nn = {n}, D = {args.dim}, T = {args.temperature}, {args.dtype}")
    names = [name for name in args.impls if name != OURS]
    extra = partial(_beside, args.dtype in ("fp16", "bf16"))
    found, timings = harness.compare(CASES["nt_xent"], _size(n, args), names, args, extra)
    mm = timings[MM]
    if OURS_IN_FP32 in timings:
        error = found[OURS]["error"]
        found[OURS_IN_FP32] = harness.row(OURS_IN_FP32, timings, "", error) | {"peak_mib": None}
    # mm's time for 4 n^2 D operations, over its time for the 2 m^3 it was given
    work = CASES["nt_xent"](**_size(n, args)).flops / (2 * MM_SIZE**3)
    rows = [
        {"n": n, "D": args.dim, **row, "share_of_mm": mm.over(timings[name]) * work}
        for name, row in found.items()
    ]
    keys = "ms p20_ms p80_ms over_clae_fast share_of_mm peak_mib form"
    print(table(rows, "impl", keys))
    gflops = 2 * MM_SIZE**3 / mm.ms / 1e6
    print(f"  {MM} at {MM_SIZE}^3: {gflops:.0f} GFLOP/s, quiet {mm.quiet}/{len(mm.seconds)}")
    return rows


def _beside(half: bool, case: Case, operands: Operands) -> dict[str, Callable[[], object]]:
    """What is timed beside the peers: torch.mm at its best, and ours in fp32."""
    # fp32 and square, into memory that is there already
    a, b, out = torch.randn(3, MM_SIZE, MM_SIZE).unbind()
    torch.mm(a, b, out=out)
    calls: dict[str, Callable[[], object]] = {MM: partial(torch.mm, a, b, out=out)}
    if half:
        full = [z.detach().float().requires_grad_() for z in operands]
        calls[OURS_IN_FP32] = partial(case.call, case.op, tuple(full))
    return calls


def _judge(rows: list[Row], args: Any) -> dict[str, str]:
    """The verdict on every bar."""
    lean = None
    if args.memory:
        lean = harness.peak(CASES["nt_xent"], _size(MEMORY_N, args), OURS, "", args)
        told = "-" if lean is None else f"{lean:.1f}"
        print(f"\n{OURS} at n = {MEMORY_N}: {told} MiB above the inputs")
    valid = (args.dim, args.temperature, args.threads) == (128, 0.5, 2)
    row_of = {(row["n"], row["impl"]): row for row in rows} if valid else {}
    values: dict[Bar, float | None] = {}
    for (dtype, isa), bars in SPEED_UPS.items():
        for n, peers, at_least, warm in bars:
            who = peers[0] if len(peers) == 1 else "every peer"
            where = [f"n = {n}", dtype, isa, "warm heap" if warm else "default heap"]
            text = f"{', '.join(filter(None, where))}: >= {at_least:.2f} x {who}"
            found = [row_of[n, peer]["over_clae_fast"] for peer in peers if (n, peer) in row_of]
            here = (warm, dtype) == (machine.warm_heap(), args.dtype) and isa in ("", _native.isa())
            measured = here and len(found) == len(peers)
            values[Bar(text, at_least)] = min(found) if measured else None
    valid = valid and args.dtype == "fp32"
    for n, bar in MM_SHARES.items():
        values[bar] = row_of.get((n, OURS), {}).get("share_of_mm") if valid else None
    values[MEMORY] = lean if valid else None
    return verdicts(values)


if __name__ == "__main__":
    sys.exit(main())
