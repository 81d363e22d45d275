"""Measures what adversarial views do to accuracy: training with attack none, pair and self.

    python -m benchmarks.accuracy                                    # digits, 3 seeds, minutes
    python -m benchmarks.accuracy --seeds 5 --dataset parquet --data-dir DIR --epochs 20
    python -m benchmarks.accuracy --approximations
    python -m benchmarks.accuracy --equal-time --plot accuracy.png

Flags other than the ones below go to `python -m clae_fast.train`, which trains and evaluates every
run. The same encoder untrained and a probe on raw pixels stand beside the runs. Each accuracy is
the mean over the seeds with its 95 % interval (Student's t), on the whole test set after the last
epoch. A seed decides weights, order and augmentation, so the runs of one seed are paired, and
`over none` is the mean of the differences within seeds.

An attack costs time in which a run without one could have trained on. `--equal-time` therefore adds
`none for pair's time`: it trains without an attack for as many epochs as take as long as the run
with the pair attack did, and stretches the learning rate's schedule over them. Seconds are those of
training steps, from the rates that the run has logged; evaluation and checkpoints do not count.

`--approximations` adds the pair attack on a part of the batch or of the steps, which costs less,
and shows what each gain in time does to accuracy.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _cli, machine
from benchmarks.results import write_json
from clae_fast import data, train
from clae_fast.config import Config
from clae_fast.evaluation import (
    extract_features,
    knn_accuracy,
    linear_accuracy,
    mean_and_interval,
    with_interval,
)
from clae_fast.reporting.runs import read
from clae_fast.training.trainer import Trainer

ATTACKS = ("none", "pair", "self")
APPROXIMATIONS = {
    f"pair {flags}": ("pair", flags.split())
    for flags in ("--adv-fraction 0.2", "--adv-fraction 0.2 --adv-replace", "--adv-every 5")
}
OURS = ("--attack", "--seed", "--out", "--resume", "--print-config")
LONGER = "none for pair's time"
METRICS = ("knn", "linear")


class TrainError(Exception):
    """`python -m clae_fast.train` ended with this status, and has printed why."""


def main(argv: list[str] | None = None) -> int:
    args, flags = _parse(argv)
    try:
        config = Config.from_dict(json.loads(_train([*flags, "--print-config"])))
        scores = _measure(args, flags, config)
    except TrainError as error:
        return int(error.args[0])
    rows = [_row(name, values, scores["none"]) for name, values in scores.items()]
    facts = machine.shown()
    print("\n" + _markdown(rows))
    if args.plot:
        _plot(rows, args.plot)
    if args.json:
        settings = {k: v for k, v in config.to_dict().items() if k not in ("attack", "seed")}
        result = {"machine": facts, "seeds": args.seeds, "config": settings, "rows": rows}
        write_json(args.json, result)
    return 0


def _parse(argv: list[str] | None) -> tuple[Any, list[str]]:
    parser = _cli.Parser(
        prog="python -m benchmarks.accuracy",
        description=__doc__.splitlines()[0],
        epilog="Other flags go to python -m clae_fast.train.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=_cli.positive_int, default=3, help="how many; they are 0, 1, ...")
    add("--runs", type=Path, metavar="DIR", help="keep the run folders in this new folder")
    help = "also train without an attack for as long as the pair attack takes"
    add("--equal-time", action="store_true", help=help)
    help = "also attack a fifth of the batch, added or in its place, and every fifth step"
    add("--approximations", action="store_true", help=help)
    help = "draw accuracy over time, .png or .svg"
    add("--plot", type=_cli.json_path, metavar="FILE", help=help)
    _cli.add_json(parser)
    args, flags = parser.parse_known_args(argv)
    for flag in flags:
        if flag.split("=")[0] in OURS:
            parser.error(f"argument {flag}: this benchmark sets it itself")
    if args.runs and args.runs.exists():
        parser.error(f"argument --runs: {str(args.runs)!r} exists")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("argument --plot: needs matplotlib: pip install 'clae_fast[bench]'")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --plot: {str(args.plot)!r} is no .png, .svg or .pdf")
    return args, flags


def _measure(args: Any, flags: Sequence[str], config: Config) -> dict[str, list[dict[str, float]]]:
    """The accuracies of every row, and its seconds where it was trained, a dict for each seed."""
    # the attack and the flags of each row
    trained: dict[str, tuple[str, Sequence[str]]] = {attack: (attack, ()) for attack in ATTACKS}
    if args.approximations:
        trained |= APPROXIMATIONS
    if args.equal_time:
        trained[LONGER] = ("none", ())
    scores: dict[str, list[dict[str, float]]] = {"raw pixels": [], "untrained": []}
    scores |= {name: [] for name in trained}
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        for seed in range(args.seeds):
            for name, (attack, more) in trained.items():
                if name == LONGER:
                    longer = scores["pair"][-1]["seconds"] / scores["none"][-1]["seconds"]
                    more = ("--epochs", str(round(config.optimization.epochs * longer)))
                out = runs / f"{name.replace(' ', '-')}-{seed}"
                ours = ["--attack", attack, "--seed", str(seed), "--out", str(out)]
                _train([*flags, *more, *ours])
                results = json.loads((out / "results.json").read_text())
                found = {metric: results[metric] for metric in METRICS}
                scores[name].append(found | {"seconds": read([out])[0].duration})
                print(f"{name}, seed {seed}: {scores[name][-1]}", flush=True)
            fresh = Trainer(config.replace(seed=seed, attack="none"))
            scores["untrained"].append(_probe(fresh, features))
            if seed == 0:
                scores["raw pixels"].append(_probe(fresh, _pixels))
    return scores


def _train(flags: Sequence[str]) -> str:
    """Run the command and return what it prints; its progress and errors go to stderr."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = train.main(flags)
    if status:
        raise TrainError(status)
    return printed.getvalue()


def _probe(trainer: Trainer, transform: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Both accuracies of what `transform` makes of the training and of the test images."""
    splits = (trainer.labeled, trainer.test)
    sets = [part for split in splits for part in transform(trainer, split)]
    seed = trainer.config.run.seed
    return {"knn": knn_accuracy(*sets), "linear": linear_accuracy(*sets, seed=seed)}


def features(trainer: Trainer, split: data.Split) -> tuple[Tensor, Tensor]:
    """The encoder's features [N, F] of a split's images, and labels [N]."""
    return extract_features(trainer.method.encoder, split, trainer.config, trainer.device)


def _pixels(trainer: Trainer, split: data.Split) -> tuple[Tensor, Tensor]:
    """The images as an encoder is given them, flattened to [N, 3 * H * W], and labels [N]."""
    transform = data.eval_transform(trainer.config.views.image_size)
    workers = trainer.config.data.workers
    loader = data.image_loader(split, transform, batch_size=256, workers=workers)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images).flatten(1), torch.cat(labels)


def _row(
    name: str, runs: list[dict[str, float]], none: list[dict[str, float]]
) -> dict[str, str | int | float | None]:
    row: dict[str, str | int | float | None] = {"encoder": name, "n": len(runs)}
    if "seconds" in runs[0]:
        row["seconds"], row["seconds_ci95"] = mean_and_interval([run["seconds"] for run in runs])
    for metric in METRICS:
        values = [run[metric] for run in runs]
        row[metric], row[f"{metric}_ci95"] = mean_and_interval(values)
        if "seconds" in runs[0] and name != "none":
            gains = [run[metric] - base[metric] for run, base in zip(runs, none, strict=True)]
            row[f"{metric}_over_none"], row[f"{metric}_over_none_ci95"] = mean_and_interval(gains)
    return row


def _markdown(rows: Iterable[dict[str, Any]]) -> str:
    signs = {"seconds": "", "knn": "", "linear": "", "knn_over_none": "+", "linear_over_none": "+"}
    lines = [
        "| encoder | n | seconds | kNN, % | linear, % | kNN over none | linear over none |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            with_interval(row[key], row[f"{key}_ci95"], f"{sign}.1f") if key in row else ""
            for key, sign in signs.items()
        ]
        lines.append(f"| {row['encoder']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Both accuracies over the seconds of training, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        for row in rows:
            if "seconds" not in row:
                continue
            x_error, y_error = row["seconds_ci95"] or 0, row[f"{metric}_ci95"] or 0
            axes.errorbar(
                row["seconds"], row[metric], y_error, x_error, "o", capsize=3, label=row["encoder"]
            )
        axes.set(xlabel="training, seconds", ylabel=f"{metric} accuracy, %")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
