"""Evaluation of runs: `python -m clae_fast.evaluate RUN [RUN ...]`.

The encoder of a checkpoint, its main BatchNorm in eval mode, gives features h of the labelled
training images and of the whole test set once; the probes are taken on them. Images that were held
out for validation count as neither. What is chosen, such as the penalty of the linear probe, is
chosen on training images. results.json in the run's folder has

"knn" "linear"             accuracies in per cent: a weighted vote, and logistic regression
"alignment" "uniformity"   of projections of the run's own views of the test images
"protocol"                 "clean": how these came about, as above
"step" "checkpoint"        what they belong to
"corrupt"                  images that were skipped
"finetune"                 {"0.01", "0.1": accuracy after fine-tuning on this part of the labels}
"robust"                   {"fgsm", "pgd20", "autoattack": {"8/255", "4/255": that of "linear"}}
"susceptibility"           {"cosine_attacked", "cosine_random"} of projections with those before
"released"                 numbers by the protocol of CLAE's released code, `evaluation.released`
"transfer"                 {data set: those that are accuracies or of projections, on it}

A later call with the same checkpoint at the same step adds to what is there; any other replaces it.
"""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clae_fast import cli, data
from clae_fast.config import Config
from clae_fast.distributed.device import pick_device
from clae_fast.evaluation import (
    accuracy,
    extract_features,
    fit_linear,
    knn_accuracy,
    view_geometry,
)
from clae_fast.evaluation.features import batches
from clae_fast.evaluation.finetune import finetune_accuracies
from clae_fast.evaluation.released import released_protocol
from clae_fast.evaluation.robust import (
    autoattack_accuracies,
    require_autoattack,
    robust_accuracies,
)
from clae_fast.evaluation.summary import repeated_seeds, report, summarise, table
from clae_fast.evaluation.susceptibility import susceptibility
from clae_fast.nn import Encoder
from clae_fast.training import encoders, provenance
from clae_fast.training.build import build_attack, hold_out
from clae_fast.training.run_folder import RunFolder

__all__ = ["evaluate", "main", "report"]

_FILE = "results.json"
_EXTRAS = {
    "finetune": "fine-tune on 1 %% and on 10 %% of the labels",
    "robust": "accuracy of the linear probe under FGSM and PGD-20, at 8/255 and 4/255",
    "autoattack": "the same under AutoAttack, which takes long: pip install 'clae_fast[robust]'",
    "susceptibility": "how far the training attack moves projections, and how far noise does",
}


def evaluate(
    folder: RunFolder,
    path: Path | None = None,
    *,
    splits: data.Splits | None = None,
    transfer: tuple[str, data.Splits] | None = None,
    extras: Collection[str] = (),
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes the run's results.json.

    Args:
        folder: the run.
        path: the checkpoint; by default the best in validation, or the last where none is held out.
        splits: the run's data set, if it is loaded already.
        transfer: another data set and its name, to evaluate on; on the run's own only where
            results.json has nothing of this checkpoint.
        extras: what to measure besides the quick probes: "finetune", "robust", "autoattack",
            "susceptibility", "released".

    Returns:
        What results.json has now, as the module says.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of another run.
        DataError: the data set cannot be used.
        ValueError: AutoAttack is not installed, or there are too few classes for it.
    """
    if "autoattack" in extras:
        require_autoattack()
    config = folder.config
    path = path or folder.best_or_last
    device = pick_device(config.engine.device)
    encoder, step = encoders.restore(folder, path, device)
    identity = {"step": step, "checkpoint": path.name}
    results = _read(folder, identity)
    if transfer is None or "knn" not in results:
        own, _ = hold_out(config, splits or _load(config))
        asked = extras if transfer is None else ()
        measured = _measure(encoder, own, config, device, asked)
        results = _merge(results, measured | identity | {"corrupt": len(own.test.corrupt)})
    if transfer is not None:
        name, others = transfer
        measured = _measure(encoder, others, config, device, extras)
        results = _merge(results, {"transfer": {name: measured}})
    folder.write_json(_FILE, results)
    return results


def _measure(
    encoder: Encoder,
    splits: data.Splits,
    config: Config,
    device: torch.device,
    extras: Collection[str],
) -> dict[str, Any]:
    train = extract_features(encoder, splits.labelled, config, device)
    test = extract_features(encoder, splits.test, config, device)
    probe = fit_linear(*train, seed=config.run.seed)
    results: dict[str, Any] = {
        "protocol": "clean",
        "knn": knn_accuracy(*train, *test),
        "linear": accuracy(probe, *test),
        **view_geometry(encoder, splits.test, config, device),
    }
    if "released" in extras:
        results["released"] = released_protocol(encoder, config, train, test)
    if "susceptibility" in extras:
        found = susceptibility(encoder, splits.test, config, device, build_attack(config))
        results["susceptibility"] = found
    if "finetune" in extras:
        results["finetune"] = finetune_accuracies(encoder, splits, config, device)
    classifier = nn.Sequential(encoder.backbone, probe)
    attacks: dict[str, Any] = {}
    if "robust" in extras:
        images = batches(splits.test, config, device)
        attacks |= robust_accuracies(classifier, images, seed=config.run.seed)
    if "autoattack" in extras:
        images = batches(splits.test, config, device)
        attacks["autoattack"] = autoattack_accuracies(classifier, images, seed=config.run.seed)
    if attacks:
        results["robust"] = attacks
    return results


def _read(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any]:
    """What results.json has of this checkpoint; nothing where it is of another, or damaged."""
    try:
        results = json.loads((folder.path / _FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    same = isinstance(results, dict) and identity.items() <= results.items()
    return results if same else {}


def _merge(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`before` with what is new, also inside of what both have."""
    both = {
        name: _merge(before[name], value)
        for name, value in new.items()
        if isinstance(value, dict) and isinstance(before.get(name), dict)
    }
    return before | new | both


def _load(config: Config) -> data.Splits:
    return data.load(
        config.data.dataset,
        data_dir=config.data.data_dir,
        limit=config.data.limit,
        download=config.data.download,
        on_corrupt=config.data.on_corrupt,
    )


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
    paths, name, as_json = args.pop("run"), args.pop("checkpoint", None), args.pop("json")
    extras = {name for name in _EXTRAS if args.pop(name)}
    if args.pop("protocol") == "released":
        extras.add("released")
    transfer = _other_data(args)
    # all that are named are there before the first is evaluated
    folders = [RunFolder.open(path) for path in paths]
    checkpoints = [folder.find(name) for folder in folders]
    runs = []
    for folder, path in zip(folders, checkpoints, strict=True):
        folder.config = folder.config.replace(**args)
        splits = None
        if transfer is None:
            splits = _load(folder.config)
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
        print(json.dumps({"runs": listed, "groups": summarise(runs)}, indent=2))
    elif len(runs) == 1:
        print(report(runs[0][2]))
    else:
        print("\n" + table(summarise(runs)))


def _other_data(args: dict[str, Any]) -> tuple[str, data.Splits] | None:
    """The data set that `--dataset` names, with the flags that belong to it, which are taken."""
    if "dataset" not in args:
        return None
    name, folder = args.pop("dataset"), args.pop("data_dir", None)
    splits = data.load(
        name,
        data_dir=folder,
        download=args.pop("download", False),
        on_corrupt=args.get("on_corrupt", "fail"),
    )
    # of these the name says nothing
    return (f"{name}/{Path(folder).name}" if name in ("folder", "parquet") else name), splits


def _parser() -> cli.Parser:
    # suppressed defaults: what is not given is as in the run
    parser = cli.Parser(
        {
            "python -m clae_fast.evaluate runs/cifar10": "kNN, linear probe, geometry",
            "python -m clae_fast.evaluate runs/seed0 runs/seed1 runs/seed2": "and their means",
            "python -m clae_fast.evaluate runs/cifar10 --dataset stl10": "on other images",
        },
        prog="python -m clae_fast.evaluate",
        description="Weighted kNN, a linear probe, alignment and uniformity of runs, and what is "
        "asked for besides, into their results.json, which is added to while the checkpoint is the "
        "same. Of several runs, those that differ in the seed alone are averaged.",
    )
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="run folder")
    add(
        "--checkpoint",
        metavar="NAME",
        help="best, last, another of the run such as epoch-0010, or a file; "
        "by default the best where there is one",
    )
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
        help="released: beside ours, that of CLAE's released code, which selects on the test set",
    )
    add("--json", action="store_true", default=False, help="print one JSON object and nothing else")
    cli.add_settings(parser, ("data_dir", "download", "workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
