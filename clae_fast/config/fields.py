"""A setting: a field of a frozen dataclass with its default, help text, choices and bounds."""

import dataclasses
import math
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WANTED = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_SEVERAL = {int: "whole numbers", float: "numbers"}


def field(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Declares a setting of a `Group`.

    Args:
        default: Its value where nobody gives one.
        text: What the command line's help says about it.
        choices: The words that it takes, where it takes only some.
        above: What every number has to be greater than.
        least: The least number that it takes.
        most: The greatest number that it takes.
    """
    about = {"help": text, "choices": choices, "above": above, "least": least, "most": most}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=dict, metadata=about)
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Group:
    """Settings that belong together.

    Raises:
        TypeError: A value has another type than its field; the message names the field.
        ValueError: A value is out of range, or contradicts another one; the message names the
            field.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for setting in dataclasses.fields(self):
            name = setting.name
            value = convert(name, hints[name], getattr(self, name))
            # a frozen dataclass leaves no other way
            object.__setattr__(self, name, value)
            _require_in_range(name, value, setting.metadata)
        self._check()

    def _check(self) -> None:
        """Raises ValueError where settings of this group contradict each other."""


def convert(name: str, hint: Any, value: Any) -> Any:
    """The value as a setting of type `hint` holds it: lists become tuples, whole numbers floats.

    Raises:
        TypeError: The value has another type; the message has the name, the value and what is
            wanted.
    """
    inner = [kind for kind in typing.get_args(hint) if kind not in (type(None), ...)]
    if value is None and type(None) in typing.get_args(hint):
        return None
    if typing.get_origin(hint) is Mapping:
        # the group that knows the method converts the values
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
        wanted = "names and values"
    elif typing.get_origin(hint) is tuple:
        count = None if ... in typing.get_args(hint) else len(inner)
        fits = isinstance(value, (list, tuple)) and count in (None, len(value))
        if fits and all(_is(inner[0], v) for v in value):
            return tuple(inner[0](v) for v in value)
        wanted = f"a list of {f'{count} ' if count else ''}{_SEVERAL[inner[0]]}"
    else:
        kind = inner[0] if inner else hint
        if _is(kind, value):
            return kind(value)
        wanted = _WANTED[kind]
    raise TypeError(f"{name} must be {wanted}, got {value!r}")


def _is(kind: type, value: Any) -> bool:
    """Whether `value` has a setting's type; true and false do not count as numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _require_in_range(name: str, value: Any, about: Mapping[str, Any]) -> None:
    choices, above, least, most = (about[key] for key in ("choices", "above", "least", "most"))
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    bounds = (
        (above, operator.gt, "positive" if above == 0 else f"above {above}"),
        (least, operator.ge, f"{least} or more"),
        (most, operator.le, f"at most {most}"),
    )
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if _is(float, v)]
    for bound, holds, wanted in bounds:
        if bound is not None and not all(math.isfinite(v) and holds(v, bound) for v in numbers):
            raise ValueError(f"{name} must be {wanted}, got {value}")
