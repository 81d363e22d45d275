"""How a command runs and ends: one line for each way it is known to fail, signals, exit codes."""

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

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
TERMINATED = 143


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
    except (NonFiniteError, CheckpointError, LostWorkerError) as error:
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
