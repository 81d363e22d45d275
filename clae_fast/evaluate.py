"""Evaluation of a run: `python -m clae_fast.evaluate RUN`.

The encoder of a checkpoint, its main BatchNorm in eval mode, gives features h of the labelled
training images and of the test set once; a weighted kNN vote and a linear probe are taken on them,
over the whole test set. Images that were held out for validation count as neither.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clae_fast import _cli, data, encoders, provenance
from clae_fast.config import Config
from clae_fast.device import pick_device
from clae_fast.probes import extract_features, knn_accuracy, linear_accuracy
from clae_fast.run_folder import RunFolder
from clae_fast.trainer import hold_out


def evaluate(
    folder: RunFolder, path: Path | None = None, *, splits: data.Splits | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes the run's results.json.

    Args:
        folder: the run.
        path: the checkpoint; by default the best in validation, or the last where none is held out.
        splits: the run's data set, if it is loaded already.

    Returns:
        "knn" and "linear", accuracies in per cent, the optimiser "step" they belong to, the name
        of the "checkpoint", and how many images were "corrupt" and skipped.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another run.
        DataError: the data set cannot be used.
    """
    config = folder.config
    path = path or folder.best_or_last
    device = pick_device(config.device)
    encoder, step = encoders.restore(folder, path, device)
    (_, labelled, test), _ = hold_out(config, splits or _load(config))
    sets = (
        *extract_features(encoder, labelled, config, device),
        *extract_features(encoder, test, config, device),
    )
    results = {
        "knn": knn_accuracy(*sets),
        "linear": linear_accuracy(*sets),
        "step": step,
        "checkpoint": path.name,
        "corrupt": len(test.corrupt),
    }
    folder.write_json("results.json", results)
    return results


def _load(config: Config) -> data.Splits:
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        limit=config.limit,
        on_corrupt=config.on_corrupt,
    )


def report(results: dict[str, Any]) -> str:
    """The accuracies, a line each."""
    lines = [f"{probe} accuracy: {results[probe]:.1f} %" for probe in ("knn", "linear")]
    if results["checkpoint"] != "last.pt":
        lines.insert(0, f"checkpoint: {results['checkpoint']}, step {results['step']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    return _cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse(argv)
    folder = RunFolder.open(args.pop("run"))
    path = _find(folder, args.pop("checkpoint", None))
    folder.config = dataclasses.replace(folder.config, **args)
    splits = _load(folder.config)
    for line in provenance.data_changes(folder, splits):
        _cli.warn(line)
    print(report(evaluate(folder, path, splits=splits)))


def _find(folder: RunFolder, name: str | None) -> Path:
    """The checkpoint that `--checkpoint` names."""
    if name is None:
        return folder.best_or_last
    kept = folder.checkpoint.parent / f"{name}.pt"
    if kept.exists() or Path(name).exists():
        return kept if kept.exists() else Path(name)
    if name == "best":
        raise ValueError(f"{folder.path} keeps no best checkpoint: only --val-size makes one")
    names = ", ".join(sorted(path.stem for path in kept.parent.glob("*.pt")))
    raise ValueError(f"{name!r} is neither a file nor a checkpoint of {folder.path}: {names}")


def _parser() -> _cli.Parser:
    # suppressed defaults: what is not given is as in the run
    parser = _cli.Parser(
        prog="python -m clae_fast.evaluate",
        description="Weighted kNN and a linear probe on a run's features.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best, last, another of the run such as epoch-0010, or a file; "
        "by default the best where there is one",
    )
    _cli.add_settings(parser, ("data_dir", "workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
