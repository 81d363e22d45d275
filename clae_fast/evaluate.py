"""Evaluation of runs: `python -m clae_fast.evaluate RUN [RUN ...]`.

`clae_fast.training.results` says what is measured, and what the results.json of a run has.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clae_fast import cli, data
from clae_fast.evaluation.summary import repeated_seeds, report, summarize, table
from clae_fast.training import provenance
from clae_fast.training.build import load_data
from clae_fast.training.results import evaluate
from clae_fast.training.run_folder import RunFolder

__all__ = ["evaluate", "main", "report"]

_EXTRAS = {
    "finetune": "fine-tune on 1 %% and on 10 %% of the labels",
    "robust": "accuracy of the linear probe under FGSM and PGD-20, at 8/255 and 4/255",
    "autoattack": "the same under AutoAttack, which takes long: pip install 'clae_fast[robust]'",
    "susceptibility": "how far the training attack moves projections, and how far noise does",
}


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse(argv)
    paths, name, as_json = args.pop("run"), args.pop("checkpoint", None), args.pop("json")
    extras = {name for name in _EXTRAS if args.pop(name)}
    if args.pop("protocol") == "released":
        extras.add("released")
    transfer = _other_data(args)
    # a run that is missing is reported before the first one is evaluated
    folders = [RunFolder.open(path) for path in paths]
    checkpoints = [folder.find(name) for folder in folders]
    runs = []
    for folder, path in zip(folders, checkpoints, strict=True):
        folder.config = folder.config.replace(**args)
        splits = None
        if transfer is None:
            splits = load_data(folder.config.data)
            for line in provenance.data_changes(folder, splits):
                cli.warn(line)
        results = evaluate(folder, path, splits=splits, transfer=transfer, extras=extras)
        runs.append((str(folder.path), folder.config, results))
        if len(folders) > 1 and not as_json:
            print(f"{folder.path}: evaluated", flush=True)
    for first, second in repeated_seeds(runs):
        cli.warn(f"{first} and {second} have the same seed: they are not two samples")
    if as_json:
        listed = [{"run": name} | results for name, _, results in runs]
        print(json.dumps({"runs": listed, "groups": summarize(runs)}, indent=2))
    elif len(runs) == 1:
        print(report(runs[0][2]))
    else:
        print("\n" + table(summarize(runs)))


main = cli.command(_main)


def _other_data(args: dict[str, Any]) -> tuple[str, data.Splits] | None:
    """The data set that `--dataset` names; takes the flags that belong to it out of `args`."""
    if "dataset" not in args:
        return None
    name, folder = args.pop("dataset"), args.pop("data_dir", None)
    splits = data.load(
        name,
        data_dir=folder,
        download=args.pop("download", False),
        on_corrupt=args.get("on_corrupt", "fail"),
    )
    # these two names say nothing about the images
    return (f"{name}/{Path(folder).name}" if name in ("folder", "parquet") else name), splits


def _parser() -> cli.Parser:
    # without defaults: a flag that is not given leaves the run's setting
    parser = cli.Parser(
        "evaluate",
        {
            "python -m clae_fast.evaluate runs/cifar10": "kNN, linear probe, geometry",
            "python -m clae_fast.evaluate runs/seed0 runs/seed1 runs/seed2": "and their means",
            "python -m clae_fast.evaluate runs/cifar10 --dataset stl10": "on other images",
        },
        description="Measures weighted kNN, a linear probe, alignment and uniformity of runs, and "
        "what the flags ask for besides, and writes a results.json into each run folder. The file "
        "is added to while the checkpoint is the same. Of several runs, those that differ in the "
        "seed alone are averaged.",
    )
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="run folder")
    cli.add_checkpoint(parser)
    add(
        "--dataset",
        metavar="NAME",
        help="evaluate on this data set instead of the run's own; --data-dir is then its folder",
    )
    for name, text in _EXTRAS.items():
        add(cli.flag(name), action="store_true", default=False, help=text)
    add(
        "--protocol",
        choices=("clean", "released"),
        default="clean",
        help="released adds the protocol of CLAE's released code, which selects an epoch on the "
        "test set",
    )
    add("--json", action="store_true", default=False, help="print one JSON object and nothing else")
    cli.add_settings(parser, ("data_dir", "download", "workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
