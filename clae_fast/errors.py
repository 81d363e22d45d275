"""The errors that a command reports in one line."""


class DataError(Exception):
    """Data that cannot be used; the message names the file, and the row where there is one."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the file."""


class RunFolderError(Exception):
    """A folder that cannot be a new run, or holds none; the message names it."""


class NonFiniteError(Exception):
    """Training diverged: the loss or a weight is infinite or not a number."""


class LostWorkerError(RuntimeError):
    """Another process of the run ended, or did not answer in time."""
