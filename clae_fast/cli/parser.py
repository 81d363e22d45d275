"""What the command lines share: bad input is one line on stderr and an exit code."""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from clae_fast.config import groups, hints, nearest
from clae_fast.config.layers import scalar

# of a line of help, and of a name that has others beside it
_WIDTH, _LONGEST = 98, 66
# a command that takes more settings has them in groups; more choices than that are no metavar
_FEW = 6
_METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing its usage.

    Args:
        examples: commands, and what each does, that `--help` begins with.
        description: what the command does; a paragraph.
        options: other arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self, examples: Mapping[str, str] | None = None, *, description: str = "", **options: Any
    ) -> None:
        parts = [textwrap.fill(description, _WIDTH)]
        if examples:
            parts.append("examples:\n" + columns(examples))
        # what is not given is no argument: the layers below decide it
        options.setdefault("argument_default", argparse.SUPPRESS)
        super().__init__(
            description="\n\n".join(parts),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            ValueError: they are wrong; where there is no such flag, with the nearest one.
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
    """Leaves descriptions as they are, and lines short enough to be read."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, "width": _WIDTH} | options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def columns(lines: Mapping[str, str]) -> str:
    """Names and what they are, in two columns; a name that is too long has a line of its own."""
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


def add_settings(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Gives `parser` a flag for each of these settings of a run.

    Where they are many, they stand in groups and with their defaults; where they are few, what is
    not given is as it is in a run.
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
    """What argparse needs to know of a field's type."""
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
    """A setting's value as one would give it to its flag; nothing where there is none."""
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
    """Takes NAME=VALUE, several at a time and several times."""

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
