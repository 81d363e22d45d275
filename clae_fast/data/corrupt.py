"""Keeps count of the images that cannot be read."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


class CorruptImages:
    """The images of a data set that could not be read. Each is named once on stderr.

    Args:
        on_corrupt: "fail" raises DataError at the first such image. "skip" trains on the next
            readable image in its place, and leaves it out of evaluation.
    """

    def __init__(self, on_corrupt: str = "fail") -> None:
        if on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt must be fail or skip, got {on_corrupt!r}")
        self.skip = on_corrupt == "skip"
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, errors: Iterable[str]) -> None:
        """Adds the messages of errors, which name the images, and prints the new ones."""
        for error in errors:
            if error not in self._names:
                self._names.add(error)
                # tqdm.write prints above a progress bar where there is one
                tqdm.write(f"skipped: {error}", file=sys.stderr)
