"""Builds, checks and measures everything that runs on a GPU, within a time budget.

    python -m benchmarks.gpu_suite --budget 540                        # every stage, in order
    python -m benchmarks.gpu_suite --stage nt_xent,small --budget 300
    python -m benchmarks.gpu_suite --rehearse                          # tiny sizes, on the CPU

One process; peers are timed interleaved with ours. Every row is in `results/<gpu>-<date>.json` as
soon as it is measured, after the rows that the day's file holds already. A task that would outlast
the budget is not begun. At the end stands a table of the bars, each met, missed or not measured, by
the latest row in the file. Without a GPU the suite rehearses: it runs every stage at tiny sizes,
writes `rehearsal-<date>.json`, and claims no bar. Nothing is fetched from a network.

Exit status: 0; 1 when a task failed or a bar of the stage `correctness` is missed; 2 for bad
arguments.
"""

from __future__ import annotations

import argparse
import os
import sys

if "--rehearse" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# read where kernels are defined, so before anything imports one
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import _cli, machine
from benchmarks.gpu import augment, bank, checks, engine, images, losses, sweep
from benchmarks.gpu.results import DayResults, file_name
from benchmarks.gpu.stage import Suite, Task
from benchmarks.harness import first_line

STAGES: dict[str, Callable[[Suite], Iterable[Task]]] = {
    "build": checks.build,
    "correctness": checks.correctness,
    "nt_xent": losses.nt_xent,
    "small": losses.small,
    "info_nce": losses.info_nce,
    "bank": bank.bank,
    "linf_step": images.linf_step,
    "stem": images.stem,
    "augment": augment.augment,
    "engine": engine.steps,
    "memory": losses.memory_use,
    "sweep": sweep.sweep,
    "profile": checks.profile,
    "sanitizer": checks.sanitizer,
}


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    args = _parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.rehearse else "cpu")
    facts = machine.shown(device)
    path = args.results / file_name(str(facts["gpu"]) if "gpu" in facts else None)
    try:
        results = DayResults(path, facts, device.type == "cpu")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    suite = Suite(results, device, started + args.budget)
    torch.backends.cuda.matmul.allow_tf32 = True
    skipped, failed = [], []
    for stage in args.stage:
        print(f"\n{stage}", flush=True)
        for task in STAGES[stage](suite):
            if suite.remaining() < (0.0 if suite.rehearsal else task.seconds):
                skipped.append(f"{stage}: {task.name}")
                continue
            began = time.monotonic()
            try:
                task.run()
            except Exception as failure:  # whatever went wrong in one task, the others count
                message = f"{type(failure).__name__}: {first_line(failure)}"
                print(f"  failed: {task.name}: {message}", flush=True)
                failed.append(f"{stage}: {task.name}")
                suite.results.add({"stage": stage, "case": task.name, "error": message})
            if not suite.rehearsal:
                torch.cuda.empty_cache()
            print(f"  {time.monotonic() - began:6.1f} s  {task.name}", flush=True)
    return _report(suite, args.stage, skipped, failed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _cli.Parser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    add = parser.add_argument
    known = ",".join(STAGES)
    add("--stage", type=_cli.name_list(tuple(STAGES)), default=list(STAGES), metavar=known)
    add("--budget", type=_cli.positive_float, default=540.0, metavar="SECONDS")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU; what happens without a GPU")
    add("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"argument --results: {str(args.results)!r} is not a folder")
    return args


def _report(suite: Suite, stages: list[str], skipped: list[str], failed: list[str]) -> int:
    results = suite.results
    bars = [bar for stage in STAGES.values() for task in stage(suite) for bar in task.bars]
    print("\nbars, by the latest measurement of the day:")
    print(results.table(bars))
    for title, names in (
        ("not measured, the budget being spent", skipped),
        ("failed", failed),
        ("not here", [f"{what}: {why}" for what, why in results.missing.items()]),
    ):
        if names:
            print(f"\n{title}:")
            print("\n".join(f"  {name}" for name in names))
    print(f"\nwrote {results.path}, {len(results.rows)} rows")
    wrong = [
        bar
        for bar in bars
        if bar.text.startswith("correctness: ") and "correctness" in stages
        if (results.latest(bar=bar.text) or {}).get("verdict") == "missed"
    ]
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
