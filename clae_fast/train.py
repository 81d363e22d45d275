"""Training from the command line: `python -m clae_fast.train`, configuration in, run folder out.

Without arguments it trains SimCLR with the pair attack on scikit-learn's digits, in less than two
minutes on two CPU cores, and evaluates it.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from clae_fast import _cli, _impl
from clae_fast.config import PRESETS, Config, resolve
from clae_fast.evaluate import evaluate, report
from clae_fast.run_folder import RunFolder, require_free
from clae_fast.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 failed, 2 bad input, 130 interrupted.

    Args:
        argv: arguments; those of the process by default.
    """
    return _cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    flags = vars(_parser().parse_args(argv))
    out, resume, preset, print_config = (
        flags.pop(name) for name in ("out", "resume", "preset", "print_config")
    )
    if print_config:
        print(json.dumps(resolve(flags, preset).to_dict(), indent=2))
        return
    if resume is not None:
        _refuse_changes(flags, out, preset)
        folder = RunFolder.open(resume)
        trainer = _build(folder.config)
        trainer.restore(folder)
    else:
        config = resolve(flags, preset)
        out = out or _default_out(config)
        require_free(out)
        trainer = _build(config)
        folder = RunFolder.create(out, config)
    try:
        trainer.fit(folder)
        results = evaluate(folder, trainer.splits)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with --resume {folder.path}") from None
    print(report(results))
    print(f"run folder: {folder.path}")


def _build(config: Config) -> Trainer:
    try:
        trainer = Trainer(config)
        ops = _impl.describe(trainer.device)
    except RuntimeError as error:
        # a package or an implementation that was asked for by name is not installed
        raise ValueError(error) from error
    encoder = trainer.method.encoder
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f"ops: {ops}")
    print(f"device: {trainer.device}")
    print(
        f"dataset: {config.dataset}, {len(trainer.train)} training and {len(trainer.test)} test "
        f"images, views of {config.image_size}x{config.image_size}"
    )
    print(f"encoder: {config.arch}, {parameters:,} parameters")
    print(f"method: {config.method}, attack {config.attack}", flush=True)
    return trainer


def _default_out(config: Config) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{now}-{config.method}-{config.attack}-{config.dataset}"


def _refuse_changes(flags: dict[str, Any], out: Path | None, preset: str | None) -> None:
    given = [*flags, *(["out"] if out else []), *(["preset"] if preset else [])]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--resume goes on with the run's own settings: drop {names}")


def _parser() -> argparse.ArgumentParser:
    # suppressed defaults: only what was given overrides a preset
    parser = _cli.Parser(
        prog="python -m clae_fast.train",
        description="Contrastive training with adversarial views.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=None, help="run folder to make")
    parser.add_argument(
        "--resume", type=Path, default=None, metavar="RUN", help="run folder to continue"
    )
    parser.add_argument(
        "--preset",
        default=None,
        metavar="NAME",
        help=f"settings to start from: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="print the settings and stop"
    )
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            help=f"{field.metadata['help']} (digits: {field.default})",
            **_argument(hints[field.name], field.metadata["choices"]),
        )
    return parser


def _argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    inner = [t for t in typing.get_args(hint) if t not in (type(None), ...)]
    if typing.get_origin(hint) is tuple:
        count = "*" if ... in typing.get_args(hint) else len(inner)
        return {"type": inner[0], "nargs": count, "metavar": "X"}
    kind = inner[0] if inner else hint
    return {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}


if __name__ == "__main__":
    sys.exit(main())
