"""What the commands share: flags and help, exit codes and signals, the dry run."""

from clae_fast.cli.parser import Parser, add_checkpoint, add_settings, flag
from clae_fast.cli.run import command, stopped_gently, warn

__all__ = [
    "Parser", "add_checkpoint", "add_settings", "command", "flag", "stopped_gently", "warn"
]  # fmt: skip
