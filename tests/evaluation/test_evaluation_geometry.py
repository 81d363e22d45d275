import itertools
import math

import pytest
import torch

from clae_fast.config.layers import resolve
from clae_fast.evaluation import alignment, uniformity, view_geometry
from clae_fast.training.trainer import Trainer


def rows(n, seed):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def unit(z):
    return [row / row.norm() for row in z.double()]


def test_alignment_is_the_mean_squared_distance():
    z_p, z_q = rows(7, 0), rows(7, 1)
    distances = [(u - v).norm() ** 2 for u, v in zip(unit(z_p), unit(z_q), strict=True)]
    assert alignment(z_p, z_q) == pytest.approx(float(sum(distances)) / 7, rel=1e-6)
    assert alignment(z_p, 3 * z_p) == pytest.approx(0, abs=1e-12)
    assert alignment(z_p, -z_p) == pytest.approx(4)


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_is_the_log_of_the_mean_potential(t):
    z = rows(9, 0)
    pairs = [math.exp(-t * (u - v).norm() ** 2) for u, v in itertools.combinations(unit(z), 2)]
    assert uniformity(z, t) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-6)


def test_uniformity_has_its_bounds():
    one = torch.ones(4, 3)
    assert uniformity(one) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.stack([one[0], -one[0]])) == pytest.approx(-8)
    with pytest.raises(ValueError, match="z must have two rows at least, got 1"):
        uniformity(one[:1])


def test_uniformity_of_more_rows_than_a_block():
    z = rows(1100, 0)
    s = torch.nn.functional.normalize(z.double()) @ torch.nn.functional.normalize(z.double()).T
    i, j = torch.triu_indices(1100, 1100, offset=1)
    expected = (4 * (s[i, j] - 1)).exp().mean().log()
    assert uniformity(z) == pytest.approx(float(expected), rel=1e-9)


def test_of_a_runs_views():
    config = resolve({"limit": 30, "image_size": 8, "batch_size": 8, "device": "cpu"})
    trainer = Trainer(config)
    encoder, test = trainer.method.encoder, trainer.test
    found = view_geometry(encoder, test, config, trainer.device)
    assert not encoder.training
    assert 0 < found["alignment"] < 4
    assert -8 < found["uniformity"] < 0
    assert found == view_geometry(encoder, test, config, trainer.device)
    # the whole image, unflipped, twice: the views are one
    config = resolve({"limit": 30, "image_size": 8, "crop_min_scale": 1.0, "device": "cpu"})
    still = view_geometry(encoder, test, config, trainer.device)
    assert still["alignment"] < found["alignment"]
    assert view_geometry(encoder, test.select(slice(1)), config, trainer.device) == {}
