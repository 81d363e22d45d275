import pytest
from scipy import stats

from clae_fast.evaluation import mean_and_interval, with_interval


def test_interval_is_students():
    # t(0.975, 2) = 4.3027, the standard error of 1, 2, 3 is 1 / sqrt(3)
    assert mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), 1e-4)
    assert mean_and_interval([5.0]) == (5.0, None)


def test_interval_is_scipys():
    values = [97.1, 98.4, 96.0, 97.7, 99.2]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_as_text():
    assert with_interval(97.14, 0.26) == "97.1 ± 0.3"
    assert with_interval(1.0, 0.26, "+.1f") == "+1.0 ± 0.3"
    assert with_interval(-2.1071, None, ".3f") == "-2.107"
