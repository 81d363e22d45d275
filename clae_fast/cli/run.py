"""How a command runs and ends: a line for each known way to fail, signals and exit codes."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clae_fast import distributed
from clae_fast.errors import (
    CheckpointError,
    DataError,
    LostWorkerError,
    NonFiniteError,
    RunFolderError,
)

# exit codes
_FAILED, _BAD_INPUT, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143


def warn(message: str) -> None:
    """Prints a warning, which does not end the command."""
    print(f"warning: {message}", file=sys.stderr)


def command(body: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Makes the `main` of a command.

    Args:
        body: Runs the command with the arguments that it is given, or with those of the process.

    Returns:
        A function of the same arguments that returns the exit code: 0, or 1 failed, 2 bad input,
        130 interrupted, 143 terminated. It prints one line for each way to fail that is known.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        """Runs the command and returns its exit code."""
        with _terminable() as signals:
            return _run(lambda: body(argv), signals)

    return main


def _run(body: Callable[[], None], signals: Sequence[int]) -> int:
    try:
        body()
    except KeyboardInterrupt as interrupt:
        what, code = ("terminated", _TERMINATED) if signals else ("interrupted", _INTERRUPTED)
        _say("; ".join((what, *interrupt.args)))
        return code
    except (NonFiniteError, CheckpointError, LostWorkerError) as error:
        return _fail(error, _FAILED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, _FAILED)
    except DataError as error:
        # an error of a loader process begins with its traceback, and ends with the message
        return _fail(str(error).rpartition("DataError: ")[2], _BAD_INPUT)
    except (ValueError, RunFolderError) as error:
        return _fail(error, _BAD_INPUT)
    except RuntimeError as error:
        # torch raises this wherever training was when a loader process ended
        if not _lost_loader(error):
            raise
        reason = str(error).strip().rstrip(".").replace("\n", " ")
        return _fail(f"{reason}: is memory short? --resume with fewer --workers", _FAILED)
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Turns SIGTERM, which job schedulers send, into a KeyboardInterrupt.

    Yields the signals that have come. Only the main thread may set handlers; in other threads
    SIGTERM does what it did before.
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
        # without a SIGTERM, the handler is torch's by now, and stays
        if signals:
            signal.signal(signal.SIGCHLD, before[signal.SIGCHLD])


def _lost_loader(error: RuntimeError) -> bool:
    """Whether torch says with this error that a loader process is gone."""
    return str(error).startswith("DataLoader worker")


def _let_loaders_die() -> None:
    """Keeps torch from reporting loader processes that the same signal has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def stopped_gently() -> Iterator[Callable[[], bool]]:
    """Turns a first Ctrl-C or SIGTERM into a request to stop.

    Yields a function that says whether the request has come. The signal takes its usual effect at
    the end of the body; a second signal takes it at once.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    # a handler that cannot be called ignores the signal, as under nohup, or ends the process
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def request(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            _let_loaders_die()
        if len(came) > 1:
            before[number](number, frame)

    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: bool(came)
    except RuntimeError as error:
        # the signal may have ended loader processes, such as those of a validation
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
    """Prints why a command ends; of the processes of a run only one prints."""
    if distributed.reports_first():
        print(line, file=sys.stderr)
