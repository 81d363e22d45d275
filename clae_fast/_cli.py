"""What the command lines share: bad input is one line on stderr and an exit code."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from clae_fast.checkpoint import CheckpointError
from clae_fast.data import DataError
from clae_fast.run_folder import RunFolderError
from clae_fast.trainer import NonFiniteError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(message)


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit code, with one line for each way it is known to fail."""
    try:
        command()
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{''.join(f'; {arg}' for arg in interrupt.args)}", file=sys.stderr)
        return INTERRUPTED
    except (NonFiniteError, CheckpointError) as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)
    except DataError as error:
        # a loader process sends its traceback along, and the message last
        return _fail(str(error).rpartition("DataError: ")[2], BAD_INPUT)
    except (ValueError, RunFolderError) as error:
        return _fail(error, BAD_INPUT)
    return 0


def _fail(message: object, code: int) -> int:
    print(f"error: {str(message).strip()}", file=sys.stderr)
    return code
