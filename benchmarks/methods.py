"""Measures what every method learns on digits, for the README's table of methods.

    python -m benchmarks.methods                               # a quarter of an hour on one core
    python -m benchmarks.methods --methods moco,caco --seeds 5

Each method trains on scikit-learn's digits, without an attack and with the pair attack, with the
settings that `python -m clae_fast.train --method NAME --image-size 8` comes to. The untrained
encoder stands beside them. Accuracy is that of a kNN vote on the encoder's features, on the whole
test set after the last epoch, and the mean over seeds. A seed decides weights, order and
augmentation. The settings are defaults, made for data as small as this (CaCo's temperature was
chosen on digits, by other seeds), and digits are easy. So a row says that a method learns, and not
that it is better than another.

DeACL learns from the encoder that SimCLR has trained without an attack with the same seed, and has
no projection head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _cli, machine
from benchmarks.accuracy import features
from benchmarks.results import write_json
from clae_fast.config.layers import resolve
from clae_fast.evaluation import knn_accuracy
from clae_fast.methods import METHODS
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer

ATTACKS = ("none", "pair")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    facts = machine.shown()
    settings = {"device": "cpu", "image_size": args.image_size, "epochs": args.epochs}
    kinds = [("untrained", "none")]
    kinds += [(name, attack) for name in args.methods for attack in ATTACKS]
    found: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(args.seeds):
            for name, attack in kinds:
                accuracy = _accuracy(name, attack, {**settings, "seed": seed}, Path(runs))
                found[name, attack].append(accuracy)
                print(f"{name}, attack {attack}, seed {seed}: {accuracy:.1f}", flush=True)
    rows = [
        {
            "method": name,
            "attack": attack,
            "units": METHODS[name].units[attack] if name in METHODS else None,
            "n": len(accuracies),
            "knn": statistics.fmean(accuracies),
            "knn_by_seed": accuracies,
        }
        for (name, attack), accuracies in found.items()
    ]
    print("\n" + _markdown(rows))
    if args.json:
        result = {"machine": facts, "seeds": args.seeds, "config": settings, "rows": rows}
        write_json(args.json, result)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _cli.Parser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", type=_cli.name_list(METHODS), default=list(METHODS), metavar="NAMES")
    add("--seeds", type=_cli.positive_int, default=2, help="how many; they are 0, 1, ...")
    add("--epochs", type=_cli.positive_int, default=30)
    add("--image-size", type=_cli.positive_int, default=8)
    _cli.add_json(parser)
    return parser.parse_args(argv)


def _accuracy(name: str, attack: str, settings: dict[str, Any], runs: Path) -> float:
    """The accuracy in % of a method's encoder once it is trained, or of an untrained one."""
    if name == "untrained":
        return _knn(Trainer(resolve(settings)))
    if METHODS[name].needs_teacher:
        teacher = runs / f"teacher-{settings['seed']}"
        if not teacher.exists():
            _trained({**settings, "attack": "none"}, teacher)
        settings = {**settings, "teacher": str(teacher), "head_layers": 0}
    folder = runs / f"{name}-{attack}-{settings['seed']}"
    return _knn(_trained({**settings, "method": name, "attack": attack}, folder))


def _trained(settings: dict[str, Any], folder: Path) -> Trainer:
    trainer = Trainer(resolve(settings))
    trainer.fit(RunFolder.create(folder, trainer.config))
    return trainer


def _knn(trainer: Trainer) -> float:
    splits = (trainer.labeled, trainer.test)
    return knn_accuracy(*(part for split in splits for part in features(trainer, split)))


def _markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each method: the units of a step and the accuracy, without and with the attack."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    lines = ["| method | units | kNN, % |", "|---|---|---|"]
    for name, own in by_method.items():
        units = ", ".join(str(row["units"]) for row in own if row["units"] is not None)
        accuracies = ", ".join(f"{row['knn']:.1f}" for row in own)
        lines.append(f"| {name} | {units} | {accuracies} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
