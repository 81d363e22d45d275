"""Flags and help of the commands; a wrong flag is a ValueError that names the nearest one."""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from clae_fast.config import groups, hints, nearest
from clae_fast.config.layers import scalar

# width of a line of help, and of the longest name in a column
_WIDTH, _LONGEST = 98, 66
# more settings than this stand in groups; more choices than this are listed in the help text
_FEW = 6
_METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """The argument parser of a command, which raises ValueError instead of printing its usage.

    Args:
        command: The command's name, as in `python -m clae_fast.NAME`.
        examples: Commands, and what each does, which `--help` shows.
        description: What the command does; a paragraph.
        options: Other arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self, command: str, examples: Mapping[str, str], *, description: str, **options: Any
    ) -> None:
        super().__init__(
            prog=f"python -m clae_fast.{command}",
            description=f"{textwrap.fill(description, _WIDTH)}\n\nexamples:\n{columns(examples)}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            # a flag that is not given is no argument, so that another layer decides
            argument_default=argparse.SUPPRESS,
            **options,
        )

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            ValueError: An argument is wrong; for an unknown flag the message has the nearest one.
        """
        found, unknown = self.parse_known_args(argv)
        flags = [arg[2:].partition("=")[0] for arg in unknown if arg.startswith("--")]
        if flags:
            known = [name[2:] for action in self._actions for name in action.option_strings]
            nearest_one = nearest(flags[0], known)
            raise ValueError(f"unknown flag --{flags[0]}, the nearest is --{nearest_one}")
        if unknown:
            raise ValueError(f"unexpected argument {unknown[0]!r}")
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves descriptions as they are, and keeps lines short enough to read."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, "width": _WIDTH} | options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def columns(lines: Mapping[str, str]) -> str:
    """Names and their explanations in two columns; a very long name has a line of its own."""
    longest = max((len(name) for name in lines if len(name) <= _LONGEST), default=0)
    found = []
    for name, text in lines.items():
        start = f"  {name:<{longest}}  "
        if len(name) > longest:
            found.append(f"  {name}")
            start = " " * (longest + 4)
        rest = " " * (longest + 4)
        found.append(
            textwrap.fill(
                text,
                _WIDTH,
                initial_indent=start,
                subsequent_indent=rest,
                break_on_hyphens=False,
                break_long_words=False,
            )
        )
    return "\n".join(found)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` the flag `--checkpoint`, which `RunFolder.find` understands."""
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best, last, another checkpoint of the run such as epoch-0010, or a file; by default "
        "the best one, or the last one without validation",
    )


def add_settings(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Gives `parser` a flag for each of these settings of a run.

    Many settings stand in their groups and with their defaults. A few settings stand alone and
    without defaults: a flag that is not given leaves the run's setting.
    """
    many = len(names) > _FEW
    for title, fields in groups().items():
        fields = [field for field in fields if field.name in names]
        group = parser.add_argument_group(title) if many else parser
        for field in fields:
            choices, text = field.metadata["choices"], field.metadata["help"]
            if choices and len(choices) > _FEW:
                text += f": {', '.join(choices)}"
            if many and (default := shown(field.default)):
                text += f" [{default}]"
            group.add_argument(
                flag(field.name), help=text, **_argument(hints()[field.name], choices)
            )


def _argument(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    """The arguments of `add_argument` for a setting of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Mapping:
        return {"action": _Pairs, "nargs": "+", "metavar": "NAME=VALUE"}
    inner = [t for t in typing.get_args(hint) if t not in (type(None), ...)]
    if typing.get_origin(hint) is tuple:
        count = "*" if ... in typing.get_args(hint) else len(inner)
        return {"type": inner[0], "nargs": count, "metavar": _METAVARS[inner[0]]}
    kind = inner[0] if inner else hint
    few = choices is not None and len(choices) <= _FEW
    return {"type": kind, "choices": choices, "metavar": None if few else _METAVARS[kind]}


def shown(value: Any) -> str:
    """A setting's value as one would write it behind its flag; empty where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, dict):
        return " ".join(f"{name}={shown(own)}" for name, own in value.items())
    return "" if value in (None, dataclasses.MISSING) else str(value)


class _Pairs(argparse.Action):
    """Reads one or more NAME=VALUE; the flag may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs = dict(getattr(namespace, self.dest, {}))
        for text in values:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise argparse.ArgumentError(self, f"must be NAME=VALUE, got {text!r}")
            pairs[name] = scalar(value)
        setattr(namespace, self.dest, pairs)


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
