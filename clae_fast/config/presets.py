"""Settings by name: what a data set's images need, and what papers and their code train with.

clae-METHOD-DATASET    CLAE's released scripts, with the attack on
METHOD-DATASET         the same scripts with the attack off, which is the base that CLAE is compared
                       with; methods that these scripts lack, as their own authors train them
simclr-paper-DATASET   SimCLR as its authors train it

`clae-simclr-cifar10` and `simclr-cifar10` differ in the attack and in nothing else, so two commands
make a comparison.

In the table below a preset names the recipe of `data.RECIPES` that it augments by, and under
"like" the preset that it starts from; what it says itself wins over both. A name that begins with
"_" is only there to start from. A line holds settings of one kind.
"""

from typing import Any

from clae_fast.data import RECIPES

# photographs of 32x32; the defaults of the fields are for digits
_PHOTOGRAPHS: dict[str, Any] = {
    "image_size": 32,
    "crop_min_scale": 0.2,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "grey_prob": 0.2,
    "workers": 2,
    "eps": 8 / 255,
    "arch": "resnet18",
    "hidden_dim": 512,
    "proj_dim": 128,
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "decay_1d": False,
    "epochs": 100,
    "batch_size": 256,
}
# in a folder of photographs of any size: what two cores can still train on
_IMAGE_SIZES = {"stl10": 96, "tiny_imagenet": 64, "imagenet100": 224, "folder": 96}

# CIFAR-10's, which the papers' code takes for CIFAR-100 and STL-10 too
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# the code leaves pixels in 0..1
_PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_NO_BLUR = {"blur_prob": (0.0, 0.0)}

# fmt: off
_TABLE: dict[str, dict[str, Any]] = {
    # Ho and Vasconcelos, "Contrastive learning with adversarial examples", NeurIPS 2020: the values
    # that the scripts of github.com/chihhuiho/CLAE at 6986061 run with, not the flags that they
    # ignore
    "_scripts": {
        "attack": "none", "adv_weight": 1.0,
        # of the normalized image and unclamped: with std .5 it is 3.8/255 of the range of pixels,
        # with CIFAR-10's 1.5/255, with ImageNet's 1.7/255
        "eps": 0.03, "eps_space": "normalized",
        "arch": "resnet18",
        "decay_1d": True, "schedule": "constant", "warmup_epochs": 0, "epochs": 100, "workers": 4,
    },
    "simclr-cifar10": {
        "like": "_scripts", "recipe": "simclr", "method": "simclr", "dataset": "cifar10",
        "interpolation": "bilinear", **_NO_BLUR, "image_size": 32, "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5), "temperature": 0.5,
        "hidden_dim": 512, "proj_dim": 64,
        "optimizer": "adam", "lr": 3e-4, "weight_decay": 0.0, "batch_size": 256,
    },
    "simclr-cifar100": {"like": "simclr-cifar10", "dataset": "cifar100"},
    # enlarged to 224 for the ImageNet stem. The released network drops the result of that stem's
    # BatchNorm; here it counts, as He et al., 2016, have it
    "simclr-tiny-imagenet": {
        "like": "simclr-cifar10", "dataset": "tiny_imagenet", "image_size": 224, **_IMAGENET,
        "batch_size": 128,
    },
    # Plain and UEL: as in Ye et al., "Unsupervised embedding learning via invariant and spreading
    # instance feature", CVPR 2019, whose code the scripts start from
    "plain-cifar10": {
        "like": "_scripts", "recipe": "plain", "method": "plain", "dataset": "cifar10",
        "image_size": 32, **_CIFAR, "temperature": 0.1,
        "head_layers": 1, "proj_dim": 128,
        "optimizer": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "step",
        "milestones": (120, 160, 200), "factors": (0.1, 0.05, 0.01), "epochs": 301,
        "batch_size": 128,
    },
    "plain-cifar100": {"like": "plain-cifar10", "dataset": "cifar100"},
    # ends before the first drop of the rate
    "plain-tiny-imagenet": {
        "like": "plain-cifar10", "dataset": "tiny_imagenet", "image_size": 224, **_IMAGENET,
        "schedule": "constant", "milestones": (), "factors": (), "epochs": 100,
    },
    "uel-cifar10": {"like": "plain-cifar10", "method": "uel"},
    "uel-cifar100": {"like": "plain-cifar100", "method": "uel"},
    "uel-tiny-imagenet": {"like": "plain-tiny-imagenet", "method": "uel"},
    # Chen et al., "A simple framework for contrastive learning of visual representations", ICML
    # 2020
    "_paper": {
        "method": "simclr", "attack": "none", **_PIXELS,
        # the code's, without a bias at its end
        "head_norm": "all", "proj_dim": 128,
        "optimizer": "lars", "momentum": 0.9, "decay_1d": False, "schedule": "cosine",
        "warmup_epochs": 10,
    },
    # the command in the README of github.com/google-research/simclr, "around 91 %"; jitter of
    # strength 0.5, no blur
    "simclr-paper-cifar10": {
        "like": "_paper", "recipe": "simclr_cifar", "dataset": "cifar10", "image_size": 32,
        "temperature": 0.5,
        "arch": "resnet18", "head_layers": 3, "hidden_dim": 512,
        # 1.0 for each 256 images
        "lr": 2.0, "weight_decay": 1e-4, "epochs": 1000, "batch_size": 512,
    },
    # the paper's defaults, 64.5 % in that README
    "simclr-paper-imagenet": {
        "like": "_paper", "recipe": "simclr", "dataset": "folder", "data_dir": "data/imagenet",
        "image_size": 224, "temperature": 0.1,
        "arch": "resnet50", "hidden_dim": 2048,
        # 0.3 for each 256 images
        "lr": 4.8, "weight_decay": 1e-6, "epochs": 100, "batch_size": 4096,
    },
    # Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021, by its code,
    # which is Chuang et al., "Debiased contrastive learning", NeurIPS 2020, with weights
    "_hcl": {
        "recipe": "simclr_cifar", "attack": "none", "interpolation": "bilinear", "image_size": 32,
        **_CIFAR, "temperature": 0.5,
        "arch": "resnet50", "head_norm": "hidden", "hidden_dim": 512, "proj_dim": 128,
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-6, "decay_1d": True,
        "schedule": "constant", "warmup_epochs": 0, "batch_size": 256,
    },
    "dcl-stl10": {
        "like": "_hcl", "method": "dcl", "dataset": "stl10",
        "epochs": 500,
        "options": {"tau_plus": 0.1},
    },
    "hcl-stl10": {
        "like": "dcl-stl10", "method": "hcl",
        "epochs": 400,
        "options": {"beta": 1.0},
    },
    # Jiang et al., "Supervised contrastive learning with hard negative samples", 2022
    "h_scl-cifar100": {
        "like": "_hcl", "method": "h_scl", "dataset": "cifar100",
        "epochs": 200,
        "options": {"beta": 5.0},
    },
    # Dong et al., "Synthetic hard negative samples for contrastive learning", 2024, by its code;
    # views, schedule and momentum are not in it and taken from the others
    "sscl-cifar10": {
        "like": "_hcl", "method": "sscl", "dataset": "cifar10",
        "options": {"beta": 1.0, "tau_plus": 0.1, "hard": 64, "synthetic": 32},
        "arch": "resnet18", "head_norm": "none",
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine",
        "warmup_epochs": 20, "epochs": 200,
    },
    # Khosla et al., "Supervised contrastive learning", NeurIPS 2020: the command in the README of
    # github.com/HobbitLong/SupContrast
    "supcon-cifar10": {
        "like": "_hcl", "recipe": "moco_v2", "method": "supcon", "dataset": "cifar10", **_NO_BLUR,
        "temperature": 0.1,
        "head_norm": "none", "hidden_dim": 2048,
        "optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine",
        "warmup_epochs": 10, "epochs": 1000, "batch_size": 1024,
    },
    "_robust": {
        "recipe": "simclr_cifar", "dataset": "cifar10", "image_size": 32, **_PIXELS,
        "temperature": 0.5, "attack": "pair",
        "eps": 8 / 255, "attack_start": "random", "attack_norm": "eval",
        "arch": "resnet18",
        "momentum": 0.9, "decay_1d": False, "schedule": "cosine", "warmup_epochs": 10,
    },
    # Kim et al., "Adversarial self-supervised contrastive learning", NeurIPS 2020, by the command
    # in the README of github.com/Kim-Minseon/RoCL
    "rocl-cifar10": {
        "like": "_robust", "method": "rocl", "options": {"reg_weight": 1 / 256},
        "interpolation": "bilinear",
        "eps": 0.0314, "step_size": 0.007, "attack_steps": 7,
        "hidden_dim": 2048, "proj_dim": 128,
        "optimizer": "lars",
        # 0.1, which the warm-up multiplies by 15
        "lr": 1.5, "weight_decay": 1e-6, "epochs": 1000,
        # 256 on each of two GPUs
        "batch_size": 512,
    },
    # Jiang et al., "Robust pre-training by adversarial contrastive learning", NeurIPS 2020, by the
    # defaults of github.com/VITA-Group/Adversarial-Contrastive-Learning
    "acl-cifar10": {
        "like": "_robust", "method": "acl", "crop_min_scale": 0.1,
        "step_size": 2 / 255, "attack_steps": 5,
        "head_layers": 3, "head_norm": "all", "hidden_dim": 512, "proj_dim": 512,
        "optimizer": "lars", "lr": 5.0, "weight_decay": 1e-6, "epochs": 1000, "batch_size": 512,
    },
    # Zhang et al., "Decoupled adversarial contrastive learning for self-supervised adversarial
    # robustness", ECCV 2022, by the script of github.com/pantheon5100/DeACL
    "deacl-cifar10": {
        "like": "_robust", "method": "deacl", "options": {"gamma": 2.0},
        # where `--preset simclr-paper-cifar10 --out` has it
        "teacher": "runs/simclr-paper-cifar10", "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.243, 0.261),
        # the code moves images by up to 4 pixels and does not resize them
        "crop_min_scale": 0.77, "interpolation": "bilinear", "color_jitter_prob": 0.0,
        "grey_prob": 0.0,
        "step_size": 2 / 255, "attack_steps": 5,
        "head_layers": 0,
        "optimizer": "sgd", "lr": 0.5, "weight_decay": 5e-4, "decay_1d": True, "epochs": 100,
        "batch_size": 256,
    },
    # He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020, as
    # Chen et al., "Improved baselines with momentum contrastive learning", 2020, train its second
    # version: the command in the README of github.com/facebookresearch/moco, 67.5 % after 200
    # epochs
    "moco-imagenet": {
        "recipe": "moco_v2", "method": "moco", "attack": "none", "dataset": "folder",
        "data_dir": "data/imagenet", "image_size": 224, **_IMAGENET, "temperature": 0.2,
        "arch": "resnet50", "hidden_dim": 2048, "proj_dim": 128,
        "optimizer": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "decay_1d": True,
        "schedule": "cosine", "warmup_epochs": 0, "epochs": 200, "batch_size": 256,
        # on one device BatchNorm sees 8 parts of a batch, as on the papers' 8 GPUs; several
        # processes that synchronize it need no parts: `--options norm_splits=1`
        "options": {
            "queue_size": 65536, "key_momentum": 0.999, "symmetric": False, "norm_splits": 8,
        },
    },
    # that repository's demo, 82.6 % by kNN after 200 epochs
    "moco-cifar10": {
        "like": "moco-imagenet", "recipe": "simclr_cifar", "dataset": "cifar10", "data_dir": None,
        "interpolation": "bilinear", "image_size": 32, **_CIFAR, "temperature": 0.1,
        "arch": "resnet18", "head_layers": 1,
        "lr": 0.06, "weight_decay": 5e-4, "batch_size": 512,
        "options": {"queue_size": 4096, "key_momentum": 0.99},
    },
    # Kalantidis et al., "Hard negative mixing for contrastive learning", NeurIPS 2020, trains as
    # MoCo v2; its numbers of hard and of synthetic negatives were not available, these are those of
    # github.com/davidsvy/hard-negative-mixing
    "mochi-imagenet": {
        "like": "moco-imagenet", "method": "mochi",
        "options": {"hard": 32, "pairs": 16, "with_query": 16},
    },
    # Giakoumoglou and Stathaki, "SynCo: synthetic hard negatives for contrastive visual
    # representation learning", 2024, by the command in the README of github.com/giakoumoglou/synco:
    # 68.1 %
    "synco-imagenet": {
        "like": "moco-imagenet", "method": "synco",
        "options": {
            "hard": 1024, "interpolated": 256, "extrapolated": 256, "pairs": 256, "noised": 64,
            "moved": 64, "signed": 64, "sigma": 0.01, "delta": 0.01, "eta": 0.01,
            # 10 epochs
            "warmup": 0.05,
        },
    },
    # Hu et al., "AdCo: adversarial contrast for efficient learning of unsupervised representations
    # from self-trained negative adversaries", CVPR 2021: one crop, not symmetric, 68.6 %
    "adco-imagenet": {
        "recipe": "moco_v2", "method": "adco", "attack": "none", "dataset": "folder",
        "data_dir": "data/imagenet", "image_size": 224, **_IMAGENET, "temperature": 0.12,
        "arch": "resnet50", "hidden_dim": 2048, "proj_dim": 128,
        "optimizer": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "decay_1d": True,
        "schedule": "cosine", "warmup_epochs": 0, "epochs": 200, "batch_size": 256,
        "options": {
            "bank_size": 65536, "bank_lr": 3.0, "bank_momentum": 0.9, "bank_temperature": 0.02,
            "bank_decay": 1e-4, "key_momentum": 0.999,
        },
    },
    # Wang et al., "CaCo: both positive and negative samples are directly learnable via
    # cooperative-adversarial contrastive learning", TPAMI 2023, by the command in the README of
    # github.com/maple-research-lab/CaCo: one crop, 71.3 %. Here the bank keeps its rate, without
    # the warm-up that this code has
    "caco-imagenet": {
        "like": "adco-imagenet", "recipe": "caco", "method": "caco", "temperature": 0.08,
        "head_layers": 3, "head_norm": "hidden", "proj_dim": 256,
        "optimizer": "lars",
        # 0.3 for each 256 images
        "lr": 1.2, "weight_decay": 1.5e-6, "decay_1d": False, "warmup_epochs": 10,
        "batch_size": 1024,
        "options": {
            "bank_temperature": 0.08, "bank_decay": 0.0, "key_momentum": 0.99,
            "fill_temperature": 0.2,
        },
    },
}
# fmt: on


def _settings(name: str) -> dict[str, Any]:
    """What a preset comes to, with the one that it starts from."""
    own = dict(_TABLE[name])
    base = _settings(own.pop("like")) if "like" in own else {}
    recipe = vars(RECIPES[own.pop("recipe")]) if "recipe" in own else {}
    options = base.get("options", {}) | own.get("options", {})
    return base | recipe | own | ({"options": options} if options else {})


_CLAE = (
    f"{method}-{images}"
    for method in ("simclr", "plain", "uel")
    for images in ("cifar10", "cifar100", "tiny-imagenet")
)
PRESETS: dict[str, dict[str, Any]] = {
    **{f"clae-{name}": _settings(name) | {"attack": "self"} for name in _CLAE},
    **{name: _settings(name) for name in _TABLE if not name.startswith("_")},
}


def dataset_defaults(dataset: str) -> dict[str, Any]:
    """Where a data set's settings differ from the fields' defaults, which are the digits'."""
    if dataset == "digits":
        return {}
    return _PHOTOGRAPHS | {"image_size": _IMAGE_SIZES.get(dataset, 32)}
