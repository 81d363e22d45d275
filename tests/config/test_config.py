import dataclasses
import json

import pytest

from clae_fast.config import MAY_CHANGE, Config, Objective, convert, hints, nearest


def test_json_round_trip():
    config = Config.from_dict(
        {"limit": 5, "milestones": (1, 3), "factors": (0.5, 0.1), "step_size": 0.01}
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_values_take_the_type_of_their_setting():
    config = Config.from_dict({"lr": 1, "mean": [0, 0, 1], "milestones": [3], "factors": [1]})
    assert (config.optimization.lr, config.views.mean, config.optimization.milestones) == (
        1.0,
        (0.0, 0.0, 1.0),
        (3,),
    )
    for value in (config.optimization.lr, *config.views.mean, *config.optimization.factors):
        assert type(value) is float


def test_the_temperature_is_the_methods_own_by_default():
    for method, temperature in (("simclr", 0.5), ("plain", 0.1), ("moco", 0.2)):
        assert Objective(method=method).temperature == temperature
    assert Objective(method="moco", temperature=0.3).temperature == 0.3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "fast", "lr must be a number, got 'fast'"),
        ("lr", True, "lr must be a number, got True"),
        ("lr", None, "lr must be a number, got None"),
        ("epochs", 2.0, "epochs must be a whole number, got 2.0"),
        ("epochs", False, "epochs must be a whole number, got False"),
        ("limit", "5", "limit must be a whole number, got '5'"),
        ("flip", "yes", "flip must be true or false, got 'yes'"),
        ("dataset", 5, "dataset must be text, got 5"),
        ("std", 0.5, r"std must be a list of 3 numbers, got 0\.5"),
        ("std", (0.5, 0.5), r"std must be a list of 3 numbers, got \(0\.5, 0\.5\)"),
        ("std", "abc", "std must be a list of 3 numbers, got 'abc'"),
        ("blur_prob", [1, None], r"blur_prob must be a list of 2 numbers, got \[1, None\]"),
        ("milestones", [1.5], r"milestones must be a list of whole numbers, got \[1\.5\]"),
    ],
)
def test_wrong_types_are_named(name, value, message):
    for make in (lambda: Config.from_dict({name: value}), lambda: convert(name, value)):
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "mnist"}, "dataset must be one of digits, .*, got 'mnist'"),
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
        ({"hidden_dim": 0}, "hidden_dim must be positive"),
        ({"head_layers": 4}, "head_layers must be at most 3, got 4"),
        ({"head_norm": "last"}, "head_norm must be one of none, hidden, all, got 'last'"),
        ({"dataset": "parquet"}, "data_dir is required"),
        ({"warmup_epochs": 31}, r"warmup_epochs must be at most epochs \(30\), got 31"),
        ({"milestones": (10,), "factors": ()}, "factors must match milestones, got 0 for 1"),
        ({"milestones": (20, 10), "factors": (1.0, 1.0)}, "milestones must increase"),
        ({"blur_prob": (0.5, 1.5)}, "blur_prob must be at most 1"),
        ({"on_corrupt": "stop"}, "on_corrupt must be one of fail, skip, got 'stop'"),
        ({"val_size": -1}, "val_size must be 0 or more"),
        ({"val_every": 0}, "val_every must be positive"),
        ({"keep_every": 0}, "keep_every must be positive"),
        ({"micro_batch": 0}, "micro_batch must be positive"),
        ({"micro_batch": 8, "batch_views": True}, "batch_views must not be True with micro_batch"),
        ({"micro_batch": 8, "capture": "yes"}, "capture must not be yes with micro_batch"),
        ({"adv_fraction": 1.5}, "adv_fraction must be at most 1"),
        ({"small_crops": 3}, "small_crops must be even, got 3"),
        ({"small_crops": 2}, "small_crops must be 0 for simclr, got 2"),
        ({"small_crop_scale": (0.2, 0.1)}, "small_crop_scale must not decrease"),
        ({"attack_steps": 0}, "attack_steps must be positive"),
        ({"teacher": "runs/a"}, "teacher must not be given for simclr, got 'runs/a'"),
        ({"options": {"beta": 1.0}}, "options: simclr has no 'beta', it has none"),
        ({"temprature": 0.1}, "unknown setting 'temprature', the nearest is 'temperature'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("temp", "temperature"), ("temprature", "temperature"), ("batchsize", "batch_size")],
)
def test_the_nearest_name(name, expected):
    assert nearest(name, hints()) == expected


class TestResumed:
    def test_where_and_how_long_may_change(self):
        config = Config.from_dict({"schedule": "constant", "data_dir": "a"})
        changed = config.resumed(
            {"data_dir": "b", "workers": 2, "epochs": 99, "lr": config.optimization.lr}
        )
        assert changed == config.replace(data_dir="b", workers=2, epochs=99)
        assert set(MAY_CHANGE) <= set(hints())

    @pytest.mark.parametrize("name", ["lr", "seed", "batch_size", "limit", "val_size"])
    def test_what_decided_the_run_so_far_may_not(self, name):
        with pytest.raises(ValueError, match=f"goes on with its own {name}; only epochs, data_dir"):
            Config.from_dict({"schedule": "constant"}).resumed({name: 7})

    def test_the_cosine_schedule_fixes_the_epochs(self):
        config = Config.from_dict({"schedule": "cosine", "epochs": 5})
        assert config.resumed({"epochs": 5}) == config
        with pytest.raises(ValueError, match="epochs cannot change under the cosine schedule"):
            config.resumed({"epochs": 6})

    def test_new_values_are_checked(self):
        with pytest.raises(ValueError, match="workers must be 0 or more"):
            Config.from_dict({}).resumed({"workers": -1})


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.from_dict({}).optimization.lr = 1.0
