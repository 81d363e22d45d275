import pytest
import torch

from clae_fast import _check


def test_accepts_what_it_should():
    z = torch.ones(2, 3)
    _check.projections("z", z)
    _check.like("a", z.half(), "z", z, dtype=False)
    _check.temperature(1)
    for value in (0.1, 1, [1, 2, 3], (1.0, 2.0, 3.0), torch.ones(3), -float("inf")):
        _check.per_channel("lo", value, z)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (1, 2, 3)])
def test_projections_name_the_argument_and_the_shape(shape):
    with pytest.raises(ValueError, match="my_z must have shape") as raised:
        _check.projections("my_z", torch.ones(shape))
    assert str(list(shape)) in str(raised.value)


def test_number_of_channels():
    with pytest.raises(ValueError, match=r"lo must be .* x, of shape \[5\], got shape \[5\]"):
        _check.per_channel("lo", [1.0] * 5, torch.ones(5))


def test_nan_is_no_bound():
    with pytest.raises(ValueError, match=r"hi must be a number >= -inf, got nan"):
        _check.per_channel("hi", float("nan"), torch.ones(2, 3))


def test_wrong_type():
    with pytest.raises(TypeError, match=r"z must be a torch\.Tensor, got ndarray"):
        _check.tensor("z", torch.ones(2).numpy())
