"""Training from the command line: `python -m clae_fast.train`, configuration in, run folder out.

Without arguments it trains SimCLR with the pair attack on scikit-learn's digits, in less than two
minutes on two CPU cores, and evaluates it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from clae_fast import _cli, _impl, distributed, provenance
from clae_fast.config import MAY_CHANGE, Config, hints
from clae_fast.data import RECIPES
from clae_fast.distributed import LostWorkerError, World
from clae_fast.evaluate import evaluate, report
from clae_fast.presets import PRESETS
from clae_fast.run_folder import RunFolder, require_free
from clae_fast.settings import resolve
from clae_fast.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    return _cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    settings = _parser().parse(argv)
    options = {name: settings.pop(name) for name in _OPTIONS}
    if options["resume"] is not None:
        folder, trainer = _resume(settings, options)
    else:
        config = resolve(
            settings, options["preset"], recipe=options["recipe"], file=options["config"]
        )
        if options["print_config"]:
            print(json.dumps(config.to_dict(), indent=2))
            return
        folder, trainer = _start(config, options["out"] or _default_out(config))
    try:
        if trainer.world.leads:
            print(f"data: {trainer.views.where}", flush=True)
        trainer.fit(folder)
        trainer.world.shutdown()
        if not trainer.world.leads:
            return
        results = evaluate(folder, splits=trainer.splits)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with --resume {folder.path}") from None
    except LostWorkerError as error:
        raise LostWorkerError(f"{error}; continue with --resume {folder.path}") from error
    print(report(results))
    print(f"run folder: {folder.path}")


def _build(config: Config, world: World) -> Trainer:
    try:
        trainer = Trainer(config, world)
        ops = _impl.describe(trainer.device)
    except LostWorkerError:
        raise
    except RuntimeError as error:
        # a package or an implementation that was asked for by name is not installed
        raise ValueError(error) from error
    if not world.leads:
        return trainer
    encoder = trainer.method.encoder
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"ops: {ops}")
    print(f"device: {trainer.device}" + f", {world.size} processes" * (world.size > 1))
    print(
        f"dataset: {config.dataset}, {len(trainer.train)} training and {len(trainer.test)} test "
        f"images, views of {config.image_size}x{config.image_size}"
    )
    print(f"encoder: {config.arch}, {parameters:,} parameters")
    print(f"method: {config.method}, attack {config.attack}; steps: {trainer.engine}", flush=True)
    return trainer


def _start(config: Config, path: Path) -> tuple[RunFolder, Trainer]:
    world = distributed.init(config.device)
    path = world.broadcast(path)
    if world.leads:
        require_free(path)
    trainer = _build(config, world)
    if not world.leads:
        return RunFolder(path, config), trainer
    now = provenance.describe(trainer.device, trainer.splits)
    folder = RunFolder.create(path, config)
    provenance.record(folder, now, step=0)
    return folder, trainer


def _resume(settings: dict[str, Any], options: dict[str, Any]) -> tuple[RunFolder, Trainer]:
    given = [name for name in _STARTS if options[name]]
    if given:
        names = ", ".join(map(_cli.flag, given))
        raise ValueError(f"--resume goes on with the run's own settings: drop {names}")
    folder = RunFolder.open(options["resume"])
    config = folder.config.resumed(settings)
    world = distributed.init(config.device)
    trainer = _build(config, world)
    trainer.restore(folder)
    if not world.leads:
        return folder, trainer
    changes = provenance.record(
        folder,
        provenance.describe(trainer.device, trainer.splits),
        step=trainer.step,
        allow_changed_data=options["allow_changed_data"],
    )
    for line in changes:
        _cli.warn(line)
    folder.change(config)
    return folder, trainer


def _default_out(config: Config) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    dataset = config.dataset.replace("/", "-")
    return Path("runs") / f"{now}-{config.method}-{config.attack}-{dataset}"


# flags that are no setting of a run: what starts one, what resumes one
_STARTS = ("out", "preset", "recipe", "config", "print_config")
_OPTIONS = (*_STARTS, "resume", "allow_changed_data")


def _parser() -> _cli.Parser:
    # suppressed defaults: only what was given overrides the layers below
    parser = _cli.Parser(
        prog="python -m clae_fast.train",
        description="Contrastive training with adversarial views. Settings come from the defaults "
        "of the data set, --preset, --recipe, --config and the flags, the later winning.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = partial(parser.add_argument, default=None)
    add("--out", type=Path, metavar="RUN", help="run folder to make")
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help=f"run folder to continue; only {', '.join(map(_cli.flag, MAY_CHANGE))} may differ",
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        default=False,
        help="continue although images or labels are no longer those of the run",
    )
    add("--preset", metavar="NAME", help=f"settings to start from: {', '.join(PRESETS)}")
    add("--recipe", metavar="NAME", help=f"augmentation of a paper: {', '.join(RECIPES)}")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings in YAML or JSON by their names here, with _ for -; also preset and recipe",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        default=False,
        help="print the settings, in the form that --config takes, and stop",
    )
    _cli.add_settings(parser, hints())
    return parser


if __name__ == "__main__":
    sys.exit(main())
