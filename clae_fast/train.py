"""Training from the command line: `python -m clae_fast.train` turns settings into a run folder.

Without arguments it trains SimCLR with the pair attack on scikit-learn's digits, in less than two
minutes on two CPU cores, and evaluates the encoder.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from clae_fast import _impl, cli, data, distributed
from clae_fast.cli import choices, dry_run
from clae_fast.config import MAY_CHANGE, Config, hints
from clae_fast.config.layers import layers, resolve
from clae_fast.distributed import World
from clae_fast.errors import LostWorkerError
from clae_fast.evaluation.summary import report
from clae_fast.training import checkpoint, provenance
from clae_fast.training.results import evaluate
from clae_fast.training.run_folder import RunFolder, require_free
from clae_fast.training.trainer import Trainer


def _main(argv: Sequence[str] | None) -> None:
    settings = _parser().parse(argv)
    options = {name: settings.pop(name) for name in _OPTIONS}
    if options["wandb"] and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb")
    if options["resume"] is not None:
        folder, trainer = _resume(settings, options)
    else:
        given = {"preset": options["preset"], "recipe": options["recipe"]}
        config = resolve(settings, file=options["config"], **given)
        if options["print_config"]:
            print(json.dumps(config.to_dict(), indent=2))
            return
        if options["dry_run"]:
            plan = dry_run.plan(config, layers(settings, file=options["config"], **given))
            print(json.dumps(plan, indent=2) if options["json"] else dry_run.text(plan))
            return
        folder, trainer = _start(config, options)
    try:
        if trainer.world.leads:
            _printer(options)(f"data: {trainer.views.where}")
        _fit(trainer, folder, options)
        trainer.world.shutdown()
        if not trainer.world.leads:
            return
        results = evaluate(folder, splits=trainer.splits)
        _write_page(folder, trainer.splits)
    except KeyboardInterrupt:
        saved = () if trainer.saved is None else (f"step {trainer.saved} is saved",)
        raise KeyboardInterrupt(*saved, f"continue with --resume {folder.path}") from None
    except LostWorkerError as error:
        raise LostWorkerError(f"{error}; continue with --resume {folder.path}") from error
    if options["json"]:
        print(json.dumps({"run": str(folder.path), **results}))
        return
    print(report(results))
    print(f"run folder: {folder.path}")


main = cli.command(_main)


def _printer(options: dict[str, Any]) -> Callable[[str], None]:
    """What prints lines that are neither results nor warnings."""
    if options["quiet"]:
        return lambda line: None
    return partial(print, file=sys.stderr if options["json"] else sys.stdout, flush=True)


def _fit(trainer: Trainer, folder: RunFolder, options: dict[str, Any]) -> None:
    with contextlib.ExitStack() as around:
        log = None
        if options["wandb"] and trainer.world.leads:
            log = around.enter_context(_wandb(folder))
        # several processes would have to agree on the step to stop at
        alone = trainer.world.size == 1
        stopped = around.enter_context(cli.stopped_gently()) if alone else lambda: False
        trainer.fit(folder, stopped=stopped, log=log)


@contextlib.contextmanager
def _wandb(folder: RunFolder) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Logs to a run of Weights & Biases that has the folder's name."""
    import wandb

    settings = folder.config.to_dict()
    with wandb.init(name=folder.path.name, dir=str(folder.path), config=settings) as run:
        yield lambda global_step, values: run.log(values, step=global_step)


def _build(config: Config, world: World, options: dict[str, Any]) -> Trainer:
    try:
        trainer = Trainer(config, world, progress=not options["quiet"])
        ops = _impl.describe(trainer.device)
    except LostWorkerError:
        raise
    except RuntimeError as error:
        # a package or an implementation that the settings name is not installed
        raise ValueError(error) from error
    if world.leads:
        say, size = _printer(options), config.views.image_size
        say(f"ops: {ops}")
        say(f"device: {trainer.device}" + f", {world.size} processes" * (world.size > 1))
        images = f"{len(trainer.train)} training and {len(trainer.test)} test images"
        say(f"dataset: {config.data.dataset}, {images}, views of {size}x{size}")
        encoder = sum(p.numel() for p in trainer.method.encoder.parameters())
        say(f"encoder: {config.encoder.arch}, {encoder:,} parameters")
        method, attack = config.objective.method, config.adversary.attack
        say(f"method: {method}, attack {attack}; steps: {trainer.engine}")
    return trainer


def _write_page(folder: RunFolder, splits: data.Splits) -> None:
    """Leaves a report in the run's folder; a run does not fail because of it."""
    from clae_fast.reporting import page
    from clae_fast.reporting.runs import read

    path = folder.path / "report.html"
    try:
        page.write(path, read([folder.path]), splits=splits)
    except Exception as error:
        cli.warn(f"no {path}: {checkpoint.reason(error)}")


def _start(config: Config, options: dict[str, Any]) -> tuple[RunFolder, Trainer]:
    world = distributed.init(config.engine.device)
    path = world.broadcast(options["out"] or _default_out(config))
    if world.leads:
        require_free(path)
    trainer = _build(config, world, options)
    if not world.leads:
        return RunFolder(path, config), trainer
    now = provenance.describe(trainer.device, trainer.splits)
    folder = RunFolder.create(path, config)
    provenance.record(folder, now, global_step=0)
    return folder, trainer


def _resume(settings: dict[str, Any], options: dict[str, Any]) -> tuple[RunFolder, Trainer]:
    given = [name for name in _STARTS if options[name]]
    if given:
        names = ", ".join(map(cli.flag, given))
        raise ValueError(f"--resume goes on with the run's own settings: drop {names}")
    folder = RunFolder.open(options["resume"])
    config = folder.config.resumed(settings)
    world = distributed.init(config.engine.device)
    trainer = _build(config, world, options)
    trainer.restore(folder)
    if not world.leads:
        return folder, trainer
    now = provenance.describe(trainer.device, trainer.splits)
    allowed = {"allow_changed_data": options["allow_changed_data"]}
    for line in provenance.record(folder, now, global_step=trainer.global_step, **allowed):
        cli.warn(line)
    folder.change(config)
    return folder, trainer


def _default_out(config: Config) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    dataset = config.data.dataset.replace("/", "-")
    return Path("runs") / f"{now}-{config.objective.method}-{config.adversary.attack}-{dataset}"


# flags that are no settings of a run; the first ones belong to a run that starts
_STARTS = ("out", "preset", "recipe", "config", "print_config", "dry_run")
_OPTIONS = (*_STARTS, "resume", "allow_changed_data", "quiet", "json", "wandb")


def _parser() -> cli.Parser:
    # without defaults: only a flag that is given overrides the other layers
    parser = cli.Parser(
        "train",
        _EXAMPLES,
        usage="%(prog)s [--preset NAME] [--dataset NAME] [--SETTING VALUE ...]",
        description="Trains an encoder by contrastive learning with adversarial views, and then "
        "measures its kNN and linear accuracy. Settings come from the defaults of the data set, "
        "--preset, --recipe, --config and the flags; each of these wins over the ones before it. "
        "The default on digits stands in [brackets]; --dry-run shows the values elsewhere.",
        epilog=choices.listed(),
    )
    run = parser.add_argument_group("a run, new or resumed")
    add = partial(run.add_argument, default=None)
    add("--out", type=Path, metavar="RUN", help="run folder to make [runs/TIME-METHOD-...]")
    add("--preset", metavar="NAME", help="settings to start from, listed below")
    add("--recipe", metavar="NAME", help="augmentation of a paper, listed below")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="file of settings in YAML or JSON, with _ for - in their names; it may also name a "
        "preset and a recipe",
    )
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help=f"run folder to continue; only {', '.join(map(cli.flag, MAY_CHANGE))} may differ",
    )
    run.add_argument(
        "--allow-changed-data",
        action="store_true",
        default=False,
        help="resume although images or labels are no longer those of the run",
    )
    out = parser.add_argument_group("what it prints")
    switch = partial(out.add_argument, action="store_true", default=False)
    switch("--print-config", help="print the settings in the form that --config takes, and stop")
    switch("--dry-run", help="print settings, units per step and an estimate of memory, and stop")
    switch("--quiet", help="print only results and warnings")
    switch("--json", help="print the results as one JSON object, and everything else on stderr")
    switch("--wandb", help="also log the metrics to Weights & Biases; needs wandb")
    cli.add_settings(parser, hints())
    return parser


_EXAMPLES = {
    "python -m clae_fast.train": "SimCLR with the pair attack on digits",
    "python -m clae_fast.train --preset clae-simclr-cifar10 --download": "a paper's settings",
    "python -m clae_fast.train --resume runs/cifar10": "go on after an interruption",
}


if __name__ == "__main__":
    sys.exit(main())
