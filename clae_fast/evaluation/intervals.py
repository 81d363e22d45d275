"""Means over seeds, with confidence intervals."""

import math
import statistics
from collections.abc import Sequence


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half the width of its 95 % interval (Student's t); None for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    from scipy import stats

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


def with_interval(mean: float, half_width: float | None, form: str = ".1f") -> str:
    """The mean as text, with its interval if there is one; `form` is a format specification."""
    if half_width is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {half_width:{form.lstrip('+')}}"
