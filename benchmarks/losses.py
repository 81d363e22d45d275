"""The other losses and the nearest keys on the CPU: clae_fast against torch.

    python -m benchmarks.losses                              # every case, two threads, fp32
    python -m benchmarks.losses --case queue --memory --bars

A case is an op at a size that its users have. Its peers are `torch_eager`, the formula as it is
written for autograd, `torch_compile`, the same compiled, and `torch_blocks`, our closed forms in
torch ops, block by block (impl="torch"), each in its fastest form. All are checked against float64
and timed in interleaved rounds; benchmarks/README.md has the protocol. Exit status: 0; 1 when
clae_fast disagrees with float64, or with `--bars` when a bar is missed; 2 for bad arguments.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import _cli, harness
from benchmarks.case import OURS
from benchmarks.cases import CASES
from benchmarks.results import Bar, Row, table, verdicts

PEERS = ("torch_eager", "torch_compile")
SIZES = {
    "queue": {"N": 256, "K": 65536},
    "pairs": {"n": 4096},
    "both_ways": {"n": 4096},
    "tied": {"n": 4096},
    "uel": {"n": 4096},
    "hard": {"n": 4096},
    "classes": {"n": 4096},
    "hard_classes": {"n": 4096},
    "nearest": {"N": 256, "K": 65536},
    "hardest": {"N": 256, "K": 65536},
    "bank": {"N": 256, "K": 65536},
}
SPEED = Bar("queue: >= 1.4 x torch", 1.4)
MEMORY = Bar("queue: memory of torch >= 10 x ours", 10.0)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    setting = {"dtype": args.dtype, "rounds": args.rounds}
    return _cli.run_cases(args, {name: name for name in args.case}, _measure, _judge, setting)


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.losses", description=__doc__.splitlines()[0])
    _cli.add_cases(parser, SIZES)
    add = parser.add_argument
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--scale", type=_cli.positive_int, default=1, help="divide the numbers of rows by this")
    add("--memory", action="store_true", help="also peak memory, each in a fresh process")
    _cli.add_timing(parser, rounds=9)
    return parser.parse_args(argv)


def _measure(name: str, args: Any) -> list[Row]:
    """Check and time a case, print the table, return the rows."""
    size = {key: max(1, rows // args.scale) for key, rows in SIZES[name].items()}
    print(f"\n{name}: {', '.join(f'{key} = {rows}' for key, rows in size.items())}, {args.dtype}")
    names = harness.cpu_peers(CASES[name](**size))
    found, _ = harness.compare(CASES[name], size, names, args)
    rows = [{"case": name, **row} for row in found.values()]
    print(table(rows, "impl", "ms over_clae_fast peak_mib error form"))
    return rows


def _judge(rows: list[Row], args: Any) -> dict[str, str]:
    """The verdict on every bar; torch is its best in each respect."""
    queue = {row["impl"]: row for row in rows if row["case"] == "queue"}
    speed = min((queue[impl]["over_clae_fast"] for impl in queue if impl != OURS), default=None)
    peaks = [queue[impl]["peak_mib"] for impl in PEERS if impl in queue]
    known = [peak for peak in peaks if peak is not None]
    lean = min(known) / queue[OURS]["peak_mib"] if known else None
    return verdicts({SPEED: speed, MEMORY: lean})


if __name__ == "__main__":
    sys.exit(main())
