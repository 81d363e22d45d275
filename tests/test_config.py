import dataclasses
import json

import pytest

from clae_fast.config import PRESETS, Config, resolve


def test_defaults_are_the_digits_run():
    config = resolve({})
    assert config == Config()
    assert (config.dataset, config.method, config.attack) == ("digits", "simclr", "pair")
    assert not config.flip
    assert config.crop_min_scale >= 0.4
    assert config.image_size == 16


def test_other_data_sets_get_defaults_for_photographs():
    config = resolve({"dataset": "parquet", "data_dir": "somewhere", "lr": 0.5})
    assert (config.arch, config.image_size, config.flip, config.lr) == ("resnet18", 32, True, 0.5)
    assert any(config.color_jitter)


def test_what_is_given_wins_over_the_preset():
    config = resolve({"eps": 0.01, "dataset": "parquet", "data_dir": "d"}, "clae-simclr-cifar10")
    assert (config.eps, config.dataset, config.eps_space) == (0.01, "parquet", "normalized")


# the settings of CLAE's scripts, one line each
CLAE = {
    "clae-simclr": ("self", 256, 100, "adam", 3e-4, 0.0, "constant", 0.5, 512, 64, 0.08),
    "clae-plain": ("self", 128, 301, "sgd", 0.03, 5e-4, "step", 0.1, 0, 128, 0.2),
    "clae-uel": ("self", 128, 301, "sgd", 0.03, 5e-4, "step", 0.1, 0, 128, 0.2),
}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("name", CLAE)
def test_presets_hold_the_released_settings(name, dataset):
    c = resolve({}, f"{name}-{dataset}")
    assert (c.dataset, f"clae-{c.method}") == (dataset, name)
    assert CLAE[name] == (
        *(c.attack, c.batch_size, c.epochs, c.optimizer, c.lr, c.weight_decay, c.schedule),
        *(c.temperature, c.hidden_dim, c.proj_dim, c.crop_min_scale),
    )
    assert (c.eps, c.eps_space, c.adv_weight) == (0.03, "normalized", 1.0)
    assert (c.arch, c.flip, c.grey_prob, c.warmup_epochs) == ("resnet18", True, 0.2, 0)
    if c.schedule == "step":
        assert (c.milestones, c.factors) == ((120, 160, 200), (0.1, 0.05, 0.01))
        assert c.std == (0.2023, 0.1994, 0.2010)
        assert (c.color_jitter, c.color_jitter_prob) == ((0.4, 0.4, 0.4, 0.4), 1.0)
    else:
        assert c.std == (0.5, 0.5, 0.5)
        assert (c.color_jitter, c.color_jitter_prob) == ((0.8, 0.8, 0.8, 0.2), 0.8)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    config = resolve({}, preset)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mnist"}, "dataset must be one of digits, parquet, cifar10, cifar100, got"),
        ({"method": "byol"}, "method must be one of"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"lr": float("inf")}, "lr must be positive, got inf"),
        ({"eps": -0.1}, "eps must be 0 or more, got -0.1"),
        ({"adv_weight": -1.0}, "adv_weight must be 0 or more"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"limit": 0}, "limit must be positive"),
        ({"crop_min_scale": 1.5}, "crop_min_scale must be at most 1"),
        ({"grey_prob": 1.5}, "grey_prob must be at most 1"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter must have a hue of at most 0.5"),
        ({"dataset": "parquet"}, "data_dir is required"),
        ({"warmup_epochs": 31}, r"warmup_epochs must be at most epochs \(30\), got 31"),
        ({"milestones": (10,), "factors": ()}, "factors must match milestones, got 0 for 1"),
        ({"milestones": (20, 10), "factors": (1.0, 1.0)}, "milestones must increase"),
        ({"temprature": 0.1}, "unknown settings: temprature"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(settings)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"preset must be one of clae-simclr-cifar10.*got 'x'"):
        resolve({}, "x")


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0
