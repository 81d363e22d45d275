"""How the settings of a method state their bounds: in the type of each field.

A field `beta: NotNegative = 1.0` of a method's `Options` is a float from 0 on, and stays so in
every subclass that only changes the default.
"""

from collections.abc import Callable
from dataclasses import fields
from math import inf
from numbers import Real
from typing import Annotated, Any, NamedTuple, get_type_hints


class Bounds(NamedTuple):
    """What a value must be.

    Attributes:
        hold: Whether they hold for a value.
        wanted: How an error message says what is wanted.
    """

    hold: Callable[[Any], bool]
    wanted: str


Count = Annotated[int, Bounds(lambda n: n >= 0, "at least 0")]
Size = Annotated[int, Bounds(lambda n: n >= 1, "at least 1")]
Temperature = Annotated[float, Bounds(lambda t: 0 < t < inf, "positive and finite")]
AboveZero = Annotated[float, Bounds(lambda v: v > 0, "above 0")]
NotNegative = Annotated[float, Bounds(lambda v: 0 <= v < inf, "in [0, inf)")]
BelowOne = Annotated[float, Bounds(lambda v: 0 <= v < 1, "in [0, 1)")]
Fraction = Annotated[float, Bounds(lambda v: 0 <= v <= 1, "in [0, 1]")]


def check_bounds(options: Any) -> None:
    """Raises where a field of a dataclass is not within the bounds that its type states.

    Raises:
        TypeError: If a number is wanted and something else came.
        ValueError: If a value is out of bounds.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        for bounds in getattr(hint, "__metadata__", ()):
            if hint.__origin__ is not str and not isinstance(value, Real):
                raise TypeError(f"{field.name} must be a number, got {type(value).__name__}")
            if not bounds.hold(value):
                raise ValueError(f"{field.name} must be {bounds.wanted}, got {value!r}")


def require_any(**counts: int) -> None:
    """Raises ValueError where all of the counts are 0."""
    if not any(counts.values()):
        raise ValueError(f"{' + '.join(counts)} must be at least 1, got 0")
