"""Every number of every preset, against the scripts and papers it is taken from."""

import dataclasses

import pytest

from clae_fast.config import Config
from clae_fast.config.layers import resolve
from clae_fast.config.presets import PRESETS, dataset_defaults
from clae_fast.data import RECIPES
from clae_fast.training.build import build_attack
from clae_fast.training.optimizer import lr_factor

DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
IMAGENET_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# github.com/chihhuiho/CLAE, commit 6986061: SimCLR/main.py and run_*.sh
SIMCLR = {
    "method": "simclr",
    "temperature": 0.5,
    "arch": "resnet18",
    "head_layers": 2,
    "head_norm": "none",
    "hidden_dim": 512,
    "proj_dim": 64,
    "crop_min_scale": 0.08,
    "interpolation": "bilinear",
    "flip": True,
    "color_jitter": (0.8, 0.8, 0.8, 0.2),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    "blur_prob": (0.0, 0.0),
    "solarize_prob": (0.0, 0.0),
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_epochs": 0,
    "epochs": 100,
}
SIMCLR_CIFAR = {
    "image_size": 32,
    "batch_size": 256,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
SIMCLR_TINY = {"image_size": 224, "batch_size": 128, **IMAGENET_STATISTICS}
# Plain/main.py, UEL/main.py, their main_imagenet.py and run_*.sh
PLAIN = {
    "temperature": 0.1,
    "arch": "resnet18",
    "head_layers": 1,
    "head_norm": "none",
    "proj_dim": 128,
    "crop_min_scale": 0.2,
    "interpolation": "bilinear",
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.4),
    "color_jitter_prob": 1.0,
    "grey_prob": 0.2,
    "blur_prob": (0.0, 0.0),
    "solarize_prob": (0.0, 0.0),
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "decay_1d": True,
    "warmup_epochs": 0,
    "batch_size": 128,
}
PLAIN_CIFAR = {
    "image_size": 32,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "schedule": "step",
    "milestones": (120, 160, 200),
    "factors": (0.1, 0.05, 0.01),
    "epochs": 301,
}
PLAIN_TINY = {"image_size": 224, "schedule": "constant", "epochs": 100, **IMAGENET_STATISTICS}
SCRIPTS = {
    "simclr-cifar10": SIMCLR | SIMCLR_CIFAR,
    "simclr-cifar100": SIMCLR | SIMCLR_CIFAR,
    "simclr-tiny-imagenet": SIMCLR | SIMCLR_TINY,
    **{f"{method}-{dataset}": PLAIN | PLAIN_CIFAR | {"method": method}
       for method in ("plain", "uel") for dataset in ("cifar10", "cifar100")},
    **{f"{method}-tiny-imagenet": PLAIN | PLAIN_TINY | {"method": method}
       for method in ("plain", "uel")},
}  # fmt: skip
ATTACK = {"adv_weight": 1.0, "eps": 0.03, "step_size": None, "eps_space": "normalized"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_clae_holds_the_released_settings(name):
    for preset, attack in ((name, "none"), (f"clae-{name}", "self")):
        settings = resolve({}, preset).to_dict()
        expected = (
            SCRIPTS[name]
            | ATTACK
            | {"attack": attack, "dataset": name.partition("-")[2].replace("-", "_")}
        )
        assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_base_and_clae_differ_in_the_attack_alone(name):
    assert resolve({"attack": "self"}, name) == resolve({}, f"clae-{name}")


# the radius in 255ths of the range of pixels, by data set
EPS = {
    "simclr-cifar10": (3.825, 3.825, 3.825),
    "plain-cifar100": (1.548, 1.525, 1.538),
    "uel-tiny-imagenet": (1.752, 1.714, 1.721),
}


@pytest.mark.parametrize("name", EPS)
def test_the_same_radius_is_another_one_in_pixels(name):
    attack = build_attack(resolve({}, f"clae-{name}"))
    assert [255 * eps for eps in attack.eps] == pytest.approx(EPS[name], abs=1e-3)
    assert (attack.lo, attack.hi) == (None, None)


def test_plain_and_uel_end_at_a_hundredth_of_the_rate():
    factor = lr_factor(resolve({}, "uel-cifar10").optimization, steps_per_epoch=390)
    rates = [factor(epoch * 390) for epoch in (0, 119, 120, 159, 160, 199, 200, 300)]
    assert rates == [1, 1, 0.1, 0.1, 0.05, 0.05, 0.01, 0.01]


# Chen et al., ICML 2020, and the commands in the README of github.com/google-research/simclr: the
# rates are 1.0 and 0.3 for each 256 images
PAPER = {
    "method": "simclr",
    "attack": "none",
    "proj_dim": 128,
    "optimizer": "lars",
    "momentum": 0.9,
    "decay_1d": False,
    "schedule": "cosine",
    "warmup_epochs": 10,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
PAPERS = {
    "simclr-paper-cifar10": PAPER
    | dataclasses.asdict(RECIPES["simclr_cifar"])
    | {
        "dataset": "cifar10",
        "image_size": 32,
        "arch": "resnet18",
        "head_layers": 3,
        "hidden_dim": 512,
        "temperature": 0.5,
        "batch_size": 512,
        "lr": 1.0 * 512 / 256,
        "weight_decay": 1e-4,
        "epochs": 1000,
    },
    "simclr-paper-imagenet": PAPER
    | dataclasses.asdict(RECIPES["simclr"])
    | {
        "dataset": "folder",
        "data_dir": "data/imagenet",
        "image_size": 224,
        "arch": "resnet50",
        "head_layers": 2,
        "hidden_dim": 2048,
        "temperature": 0.1,
        "batch_size": 4096,
        "lr": 0.3 * 4096 / 256,
        "weight_decay": 1e-6,
        "epochs": 100,
    },
}


@pytest.mark.parametrize("name", PAPERS)
def test_simclr_as_its_authors_train_it(name):
    settings = resolve({}, name).to_dict()
    expected = {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in PAPERS[name].items()
    }
    assert {key: settings[key] for key in expected} == expected


def test_there_are_no_others():
    # those of other methods are with the methods' tests
    found = {name for name in PRESETS if PRESETS[name]["method"] in ("simclr", "plain", "uel")}
    assert found == {*SCRIPTS, *(f"clae-{name}" for name in SCRIPTS), *PAPERS}


@pytest.mark.parametrize("method", ["plain", "uel"])
def test_plain_and_uel_augment_as_their_recipe(method):
    recipe = dataclasses.asdict(RECIPES["plain"])
    for dataset in DATASETS:
        assert resolve({}, f"{method}-{dataset}", recipe="plain") == resolve(
            recipe, f"{method}-{dataset}"
        )
        assert resolve({}, f"{method}-{dataset}", recipe="plain") == resolve(
            {}, f"{method}-{dataset}"
        )


def test_digits_need_no_more_than_the_defaults():
    assert dataset_defaults("digits") == {}
    assert resolve({}) == Config.from_dict({})


def test_photographs_keep_their_size():
    sizes = {name: dataset_defaults(name)["image_size"] for name in ("cifar100", "stl10")}
    assert sizes == {"cifar100": 32, "stl10": 96}
    assert dataset_defaults("tiny_imagenet")["image_size"] == 64
    assert dataset_defaults("imagenet100")["image_size"] == 224
