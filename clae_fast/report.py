"""Reports of runs: `python -m clae_fast.report RUN [RUN ...] -o report.html`.

One page that loads nothing: curves of all runs, what a step costs, and of each run its adversarial
views, a map of its embedding, neighbours and similarities. Training leaves one in its run folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clae_fast import cli, data
from clae_fast.errors import CheckpointError, DataError
from clae_fast.reporting.runs import Run, read
from clae_fast.training.checkpoint import reason, write_atomically

if TYPE_CHECKING:
    from clae_fast.reporting.images import Pictures


def write(path: Path, runs: Sequence[Run], *, splits: data.Splits | None = None) -> None:
    """Writes a report.

    Args:
        path: where to.
        runs: what of.
        splits: the data set of all runs, if it is loaded already.

    Raises:
        CheckpointError: a checkpoint is damaged or of another run.
        OSError: it cannot be written; `path` is as it was.
    """
    from clae_fast.reporting.page import render

    page = render(runs, [_pictures(run, splits) for run in runs])
    write_atomically(path, page.encode())


def _pictures(run: Run, splits: data.Splits | None) -> "Pictures | str":
    """What the encoder makes of images, or why it cannot be had."""
    from clae_fast.reporting.images import look

    path = run.folder.best_or_last
    if not path.exists():
        return f"{path.name} is not there any more"
    try:
        return look(run, splits)
    # such as a data set, a GPU or a package that is not here
    except (DataError, ValueError, RuntimeError) as error:
        return reason(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    return cli.run(lambda: _main(argv))


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
        # one that was given, and not one that this command failed to write
        raise ValueError(error) from error
    print(f"report: {out}")


def _parser() -> cli.Parser:
    # suppressed defaults: what is not given is as in the runs
    parser = cli.Parser(
        {
            "python -m clae_fast.report runs/cifar10 runs/base ": "two runs, compared",
        },
        prog="python -m clae_fast.report",
        description="One page of curves, pictures and tables, of one run or of several beside each "
        "other.",
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
