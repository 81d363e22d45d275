"""What happens to images that cannot be read."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


class CorruptImages:
    """The images of a data set that could not be read, each named once on stderr.

    Args:
        on_corrupt: "fail" to raise DataError at the first one; "skip" to train on the next readable
            image in its place, and to leave it out of evaluation.
    """

    def __init__(self, on_corrupt: str = "fail") -> None:
        if on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt must be fail or skip, got {on_corrupt!r}")
        self.skip = on_corrupt == "skip"
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, errors: Iterable[str]) -> None:
        """Takes the messages of errors, which name the images, and prints those that are new."""
        for error in errors:
            if error not in self._names:
                self._names.add(error)
                # above a progress bar, if there is one
                tqdm.write(f"skipped: {error}", file=sys.stderr)
