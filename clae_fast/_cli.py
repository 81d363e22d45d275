"""What the command lines share: bad input is one line on stderr and an exit code."""

import argparse
import contextlib
import dataclasses
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from clae_fast import distributed
from clae_fast.checkpoint import CheckpointError
from clae_fast.config import groups, hints, nearest
from clae_fast.data import DataError
from clae_fast.run_folder import RunFolderError
from clae_fast.settings import scalar
from clae_fast.trainer import NonFiniteError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
TERMINATED = 143

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
    if typing.get_origin(hint) is dict:
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


def warn(message: str) -> None:
    """Says something that does not stop the command."""
    print(f"warning: {message}", file=sys.stderr)


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit code, with one line for each way it is known to fail."""
    with _terminable() as signals:
        return _run(command, signals)


def _run(command: Callable[[], None], signals: Sequence[int]) -> int:
    try:
        command()
    except KeyboardInterrupt as interrupt:
        what, code = ("terminated", TERMINATED) if signals else ("interrupted", INTERRUPTED)
        _say("; ".join((what, *interrupt.args)))
        return code
    except (NonFiniteError, CheckpointError, distributed.LostWorkerError) as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)
    except DataError as error:
        # a loader process sends its traceback along, and the message last
        return _fail(str(error).rpartition("DataError: ")[2], BAD_INPUT)
    except (ValueError, RunFolderError) as error:
        return _fail(error, BAD_INPUT)
    except RuntimeError as error:
        # torch's words, wherever the training was when the signal came
        if not _lost_loader(error):
            raise
        reason = str(error).strip().rstrip(".").replace("\n", " ")
        return _fail(f"{reason}: is memory short? --resume with fewer --workers", FAILED)
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Makes SIGTERM, which job schedulers send, a KeyboardInterrupt; gives the signals that came.

    Only the main thread may; in others SIGTERM does what it did.
    """
    signals: list[int] = []

    def terminate(number: int, _: object) -> None:
        signals.append(number)
        _let_loaders_die()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        # without a SIGTERM it is torch's by now, which stays
        if signals:
            signal.signal(signal.SIGCHLD, before[signal.SIGCHLD])


def _lost_loader(error: RuntimeError) -> bool:
    """Whether these are torch's words for a loader process that is gone."""
    return str(error).startswith("DataLoader worker")


def _let_loaders_die() -> None:
    """Loader processes that die of the same signal are no error to report."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def stopped_gently() -> Iterator[Callable[[], bool]]:
    """Makes a first Ctrl-C or SIGTERM a wish to stop, which the body asks for and heeds.

    The signal has its effect at the end of the body; a second one has it at once.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    # others are ignored, as nohup has it, or end the process
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def wish(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            _let_loaders_die()
        if len(came) > 1:
            before[number](number, frame)

    for number in before:
        signal.signal(number, wish)
    try:
        yield lambda: bool(came)
    except RuntimeError as error:
        # loader processes, such as a validation's, had the same signal
        if not (came and _lost_loader(error)):
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        before[came[0]](came[0], None)


def _fail(message: object, code: int) -> int:
    _say(f"error: {str(message).strip()}")
    return code


def _say(line: str) -> None:
    """Prints why a command ends, once for all processes of a run."""
    if distributed.reports_first():
        print(line, file=sys.stderr)
