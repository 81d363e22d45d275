"""What the commands share: flags and help, exit codes and signals, the dry run."""

from clae_fast.cli.parser import Parser, add_checkpoint, add_settings, columns, flag, shown
from clae_fast.cli.run import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    TERMINATED,
    command,
    stopped_gently,
    warn,
)

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "INTERRUPTED",
    "TERMINATED",
    "Parser",
    "add_checkpoint",
    "add_settings",
    "columns",
    "command",
    "flag",
    "shown",
    "stopped_gently",
    "warn",
]
