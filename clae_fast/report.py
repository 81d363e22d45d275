"""Reports of runs: `python -m clae_fast.report RUN [RUN ...] -o report.html`.

A report is one page that loads nothing: curves of all runs, what a step costs, and for each run its
adversarial views, a map of its embedding, neighbors and similarities. Training leaves a report in
its run folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from clae_fast import cli
from clae_fast.errors import CheckpointError
from clae_fast.reporting.page import write
from clae_fast.reporting.runs import read


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse(argv)
    paths, out = args.pop("runs"), args.pop("out")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be in a folder that exists, got {out.parent}")
    runs = read(paths)
    for run in runs:
        run.folder.config = run.config.replace(**args)
    try:
        write(out, runs)
    except CheckpointError as error:
        # the checkpoint came with the input, and is nothing that this command failed to write
        raise ValueError(error) from error
    print(f"report: {out}")


main = cli.command(_main)


def _parser() -> cli.Parser:
    # without defaults: a flag that is not given leaves the runs' settings
    parser = cli.Parser(
        "report",
        {"python -m clae_fast.report runs/cifar10 runs/base ": "two runs, compared"},
        description="Writes one page of curves, pictures and tables, of one run or of several side "
        "by side.",
    )
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+", help="run folder")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("report.html"),
        help="page to write [report.html]",
    )
    cli.add_settings(parser, ("data_dir", "workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
