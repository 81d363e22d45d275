"""Settings by name: what a data set's images need, and what papers and their code train with.

clae-METHOD-DATASET    CLAE's released scripts, with the attack on
METHOD-DATASET         the same scripts with it off: the base that CLAE is compared with; methods
                       that these scripts do not have as their own authors train them
simclr-paper-DATASET   SimCLR as its authors train it

`clae-simclr-cifar10` and `simclr-cifar10` differ in the attack and in nothing else, so a comparison
is two commands.
"""

from typing import Any

# photographs of 32x32; what is trained on digits are the defaults of the fields
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
# a folder of photographs of any size: what two cores can still train on
_IMAGE_SIZES = {"stl10": 96, "tiny_imagenet": 64, "imagenet100": 224, "folder": 96}

_CIFAR10_STD = (0.2023, 0.1994, 0.2010)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# Ho and Vasconcelos, "Contrastive learning with adversarial examples", NeurIPS 2020: the values
# that the scripts of github.com/chihhuiho/CLAE at 6986061 run with, not the flags that they ignore
_ALL_SCRIPTS: dict[str, Any] = {
    "adv_weight": 1.0,
    # of the normalised image and unclamped: with std .5 it is 3.8/255 of the range of pixels, with
    # CIFAR-10's 1.5/255, with ImageNet's 1.7/255
    "eps": 0.03,
    "eps_space": "normalized",
    "arch": "resnet18",
    "flip": True,
    "grey_prob": 0.2,
    "warmup_epochs": 0,
    "decay_1d": True,
    "workers": 4,
}
_SIMCLR: dict[str, Any] = _ALL_SCRIPTS | {
    "method": "simclr",
    "temperature": 0.5,
    "crop_min_scale": 0.08,
    "color_jitter": (0.8, 0.8, 0.8, 0.2),
    "color_jitter_prob": 0.8,
    "hidden_dim": 512,
    "proj_dim": 64,
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "epochs": 100,
}
# Plain and UEL: as in Ye et al., "Unsupervised embedding learning via invariant and spreading
# instance feature", CVPR 2019, whose code the scripts start from
_PLAIN: dict[str, Any] = _ALL_SCRIPTS | {
    "temperature": 0.1,
    "crop_min_scale": 0.2,
    "color_jitter": (0.4, 0.4, 0.4, 0.4),
    "color_jitter_prob": 1.0,
    "head_layers": 1,
    "proj_dim": 128,
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
}
_PLAIN_CIFAR: dict[str, Any] = _PLAIN | {
    "image_size": 32,
    # CIFAR-10's, for CIFAR-100 too
    "mean": (0.4914, 0.4822, 0.4465),
    "std": _CIFAR10_STD,
    "schedule": "step",
    "milestones": (120, 160, 200),
    "factors": (0.1, 0.05, 0.01),
    "epochs": 301,
}
_SIMCLR_CIFAR: dict[str, Any] = _SIMCLR | {
    "image_size": 32,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "batch_size": 256,
}
# enlarged to 224 for the ImageNet stem. The released network drops the result of that stem's
# BatchNorm; here it counts, as He et al., 2016, have it
_TINY: dict[str, Any] = _IMAGENET | {"dataset": "tiny_imagenet", "image_size": 224, "epochs": 100}
# ends before the first drop of the rate
_PLAIN_TINY: dict[str, Any] = _PLAIN | _TINY | {"schedule": "constant"}

_SCRIPTS: dict[str, dict[str, Any]] = {
    "simclr-cifar10": _SIMCLR_CIFAR | {"dataset": "cifar10"},
    "simclr-cifar100": _SIMCLR_CIFAR | {"dataset": "cifar100"},
    "simclr-tiny-imagenet": _SIMCLR | _TINY | {"batch_size": 128},
    "plain-cifar10": _PLAIN_CIFAR | {"method": "plain", "dataset": "cifar10"},
    "plain-cifar100": _PLAIN_CIFAR | {"method": "plain", "dataset": "cifar100"},
    "plain-tiny-imagenet": _PLAIN_TINY | {"method": "plain"},
    "uel-cifar10": _PLAIN_CIFAR | {"method": "uel", "dataset": "cifar10"},
    "uel-cifar100": _PLAIN_CIFAR | {"method": "uel", "dataset": "cifar100"},
    "uel-tiny-imagenet": _PLAIN_TINY | {"method": "uel"},
}

# Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020
_SIMCLR_PAPER: dict[str, Any] = {
    "method": "simclr",
    "attack": "none",
    "crop_min_scale": 0.08,
    "interpolation": "bicubic",
    "flip": True,
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    # the code leaves pixels in 0..1
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    # the code's, without a bias at its end
    "head_norm": "all",
    "proj_dim": 128,
    "optimizer": "lars",
    "momentum": 0.9,
    "decay_1d": False,
    "schedule": "cosine",
    "warmup_epochs": 10,
}
_PAPERS: dict[str, dict[str, Any]] = {
    # the command in the README of github.com/google-research/simclr, "around 91 %"; jitter of
    # strength 0.5, no blur
    "simclr-paper-cifar10": _SIMCLR_PAPER
    | {
        "dataset": "cifar10",
        "image_size": 32,
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "temperature": 0.5,
        "arch": "resnet18",
        "head_layers": 3,
        "hidden_dim": 512,
        # 1.0 for each 256 images
        "lr": 2.0,
        "weight_decay": 1e-4,
        "epochs": 1000,
        "batch_size": 512,
    },
    # the paper's defaults, 64.5 % in that README
    "simclr-paper-imagenet": _SIMCLR_PAPER
    | {
        "dataset": "folder",
        "data_dir": "data/imagenet",
        "image_size": 224,
        "color_jitter": (0.8, 0.8, 0.8, 0.2),
        "blur_prob": (0.5, 0.5),
        "temperature": 0.1,
        "arch": "resnet50",
        "hidden_dim": 2048,
        # 0.3 for each 256 images
        "lr": 4.8,
        "weight_decay": 1e-6,
        "epochs": 100,
        "batch_size": 4096,
    },
}

# Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021, by its code, which
# is Chuang et al., "Debiased contrastive learning", NeurIPS 2020, with weights
_HCL: dict[str, Any] = {
    "attack": "none",
    "image_size": 32,
    "crop_min_scale": 0.08,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    # CIFAR-10's, for STL-10 too
    "mean": (0.4914, 0.4822, 0.4465),
    "std": _CIFAR10_STD,
    "temperature": 0.5,
    "arch": "resnet50",
    "head_norm": "hidden",
    "hidden_dim": 512,
    "proj_dim": 128,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "decay_1d": True,
    "schedule": "constant",
    "warmup_epochs": 0,
    "batch_size": 256,
}
_HARD_NEGATIVES: dict[str, dict[str, Any]] = {
    "dcl-stl10": _HCL
    | {"method": "dcl", "dataset": "stl10", "epochs": 500, "options": {"tau_plus": 0.1}},
    "hcl-stl10": _HCL
    | {
        "method": "hcl",
        "dataset": "stl10",
        "epochs": 400,
        "options": {"beta": 1.0, "tau_plus": 0.1},
    },
    # Jiang et al., "Supervised contrastive learning with hard negative samples", 2022
    "h_scl-cifar100": _HCL
    | {"method": "h_scl", "dataset": "cifar100", "epochs": 200, "options": {"beta": 5.0}},
    # Dong et al., "Synthetic hard negative samples for contrastive learning", 2024, by its code;
    # views, schedule and momentum are not in it and taken from the others
    "sscl-cifar10": _HCL
    | {
        "method": "sscl",
        "dataset": "cifar10",
        "options": {"beta": 1.0, "tau_plus": 0.1, "hard": 64, "synthetic": 32},
        "arch": "resnet18",
        "head_norm": "none",
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "schedule": "cosine",
        "warmup_epochs": 20,
        "epochs": 200,
    },
    # Khosla et al., "Supervised contrastive learning", NeurIPS 2020: the command in the README of
    # github.com/HobbitLong/SupContrast
    "supcon-cifar10": _HCL
    | {
        "method": "supcon",
        "dataset": "cifar10",
        "crop_min_scale": 0.2,
        "temperature": 0.1,
        "head_norm": "none",
        "hidden_dim": 2048,
        "optimizer": "sgd",
        "lr": 0.5,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "warmup_epochs": 10,
        "epochs": 1000,
        "batch_size": 1024,
    },
}

_ROBUST: dict[str, Any] = {
    "dataset": "cifar10",
    "image_size": 32,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    # the code leaves pixels in 0..1
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "temperature": 0.5,
    "attack": "pair",
    "eps": 8 / 255,
    "attack_start": "random",
    "attack_norm": "eval",
    "arch": "resnet18",
    "momentum": 0.9,
    "decay_1d": False,
    "schedule": "cosine",
    "warmup_epochs": 10,
}
_ROBUST_METHODS: dict[str, dict[str, Any]] = {
    # Kim et al., "Adversarial self-supervised contrastive learning", NeurIPS 2020, by the command
    # in the README of github.com/Kim-Minseon/RoCL
    "rocl-cifar10": _ROBUST
    | {
        "method": "rocl",
        "options": {"reg_weight": 1 / 256},
        "crop_min_scale": 0.08,
        "eps": 0.0314,
        "step_size": 0.007,
        "attack_steps": 7,
        "hidden_dim": 2048,
        "proj_dim": 128,
        "optimizer": "lars",
        # 0.1, which the warm-up multiplies by 15
        "lr": 1.5,
        "weight_decay": 1e-6,
        "epochs": 1000,
        # 256 on each of two GPUs
        "batch_size": 512,
    },
    # Jiang et al., "Robust pre-training by adversarial contrastive learning", NeurIPS 2020, by the
    # defaults of github.com/VITA-Group/Adversarial-Contrastive-Learning
    "acl-cifar10": _ROBUST
    | {
        "method": "acl",
        "crop_min_scale": 0.1,
        "interpolation": "bicubic",
        "step_size": 2 / 255,
        "attack_steps": 5,
        "head_layers": 3,
        "head_norm": "all",
        "hidden_dim": 512,
        "proj_dim": 512,
        "optimizer": "lars",
        "lr": 5.0,
        "weight_decay": 1e-6,
        "epochs": 1000,
        "batch_size": 512,
    },
    # Zhang et al., "Decoupled adversarial contrastive learning for self-supervised adversarial
    # robustness", ECCV 2022, by the script of github.com/pantheon5100/DeACL
    "deacl-cifar10": _ROBUST
    | {
        "method": "deacl",
        "options": {"gamma": 2.0},
        # where `--preset simclr-paper-cifar10 --out` has it
        "teacher": "runs/simclr-paper-cifar10",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.243, 0.261),
        # the code moves images by up to 4 pixels and does not resize them
        "crop_min_scale": 0.77,
        "color_jitter_prob": 0.0,
        "grey_prob": 0.0,
        "step_size": 2 / 255,
        "attack_steps": 5,
        "head_layers": 0,
        "optimizer": "sgd",
        "lr": 0.5,
        "weight_decay": 5e-4,
        "decay_1d": True,
        "epochs": 100,
        "batch_size": 256,
    },
}

# He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020, as Chen
# et al., "Improved baselines with momentum contrastive learning", 2020, train its second version:
# the command in the README of github.com/facebookresearch/moco, 67.5 % after 200 epochs
_MOCO: dict[str, Any] = _IMAGENET | {
    "attack": "none",
    "dataset": "folder",
    "data_dir": "data/imagenet",
    "image_size": 224,
    "crop_min_scale": 0.2,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    "blur_prob": (0.5, 0.5),
    "temperature": 0.2,
    "arch": "resnet50",
    "head_layers": 2,
    "head_norm": "none",
    "hidden_dim": 2048,
    "proj_dim": 128,
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_1d": True,
    "schedule": "cosine",
    "warmup_epochs": 0,
    "epochs": 200,
    "batch_size": 256,
}
# on one device BatchNorm sees 8 parts of a batch, as on the papers' 8 GPUs; several processes that
# synchronise it need no parts: `--options norm_splits=1`
_QUEUE: dict[str, Any] = {
    "queue_size": 65536,
    "key_momentum": 0.999,
    "symmetric": False,
    "norm_splits": 8,
}
_QUEUE_METHODS: dict[str, dict[str, Any]] = {
    "moco-imagenet": _MOCO | {"method": "moco", "options": _QUEUE},
    # that repository's demo, 82.6 % by kNN after 200 epochs
    "moco-cifar10": _MOCO
    | {
        "method": "moco",
        "dataset": "cifar10",
        "data_dir": None,
        "image_size": 32,
        "crop_min_scale": 0.08,
        "blur_prob": (0.0, 0.0),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": _CIFAR10_STD,
        "temperature": 0.1,
        "arch": "resnet18",
        "head_layers": 1,
        "lr": 0.06,
        "weight_decay": 5e-4,
        "batch_size": 512,
        "options": _QUEUE | {"queue_size": 4096, "key_momentum": 0.99},
    },
    # Kalantidis et al., "Hard negative mixing for contrastive learning", NeurIPS 2020, trains as
    # MoCo v2; its numbers of hard and of synthetic negatives were not available, these are those of
    # github.com/davidsvy/hard-negative-mixing
    "mochi-imagenet": _MOCO
    | {
        "method": "mochi",
        "options": _QUEUE | {"hard": 32, "pairs": 16, "with_query": 16},
    },
    # Giakoumoglou and Stathaki, "SynCo: synthetic hard negatives for contrastive visual
    # representation learning", 2024, by the command in the README of github.com/giakoumoglou/synco:
    # 68.1 %
    "synco-imagenet": _MOCO
    | {
        "method": "synco",
        "options": _QUEUE
        | {
            "hard": 1024,
            "interpolated": 256,
            "extrapolated": 256,
            "pairs": 256,
            "noised": 64,
            "moved": 64,
            "signed": 64,
            "sigma": 0.01,
            "delta": 0.01,
            "eta": 0.01,
            # 10 epochs
            "warmup": 0.05,
        },
    },
}

# banks of learnable keys, on a folder of ImageNet; the bank's rate is constant, without the warm-up
# that CaCo's code has
_BANKS: dict[str, Any] = _IMAGENET | {
    "attack": "none",
    "dataset": "folder",
    "data_dir": "data/imagenet",
    "image_size": 224,
    "crop_min_scale": 0.2,
    "flip": True,
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    "arch": "resnet50",
    "hidden_dim": 2048,
    "momentum": 0.9,
    "schedule": "cosine",
    "epochs": 200,
}
_BANK_METHODS: dict[str, dict[str, Any]] = {
    # Hu et al., "AdCo: adversarial contrast for efficient learning of unsupervised representations
    # from self-trained negative adversaries", CVPR 2021: one crop, not symmetric, 68.6 %
    "adco-imagenet": _BANKS
    | {
        "method": "adco",
        "temperature": 0.12,
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "blur_prob": (0.5, 0.5),
        "head_layers": 2,
        "head_norm": "none",
        "proj_dim": 128,
        "optimizer": "sgd",
        "lr": 0.03,
        "weight_decay": 1e-4,
        "decay_1d": True,
        "warmup_epochs": 0,
        "batch_size": 256,
        "options": {
            "bank_size": 65536,
            "bank_lr": 3.0,
            "bank_momentum": 0.9,
            "bank_temperature": 0.02,
            "bank_decay": 1e-4,
            "key_momentum": 0.999,
        },
    },
    # Wang et al., "CaCo: both positive and negative samples are directly learnable via
    # cooperative-adversarial contrastive learning", TPAMI 2023, by the command in the README of
    # github.com/maple-research-lab/CaCo: one crop, 71.3 %
    "caco-imagenet": _BANKS
    | {
        "method": "caco",
        "temperature": 0.08,
        "color_jitter": (0.4, 0.4, 0.2, 0.1),
        "blur_prob": (1.0, 0.1),
        "solarize_prob": (0.0, 0.2),
        "head_layers": 3,
        "head_norm": "hidden",
        "proj_dim": 256,
        "optimizer": "lars",
        # 0.3 for each 256 images
        "lr": 1.2,
        "weight_decay": 1.5e-6,
        "decay_1d": False,
        "warmup_epochs": 10,
        "batch_size": 1024,
        "options": {
            "bank_size": 65536,
            "bank_lr": 3.0,
            "bank_momentum": 0.9,
            "bank_temperature": 0.08,
            "bank_decay": 0.0,
            "key_momentum": 0.99,
            "fill_temperature": 0.2,
        },
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"clae-{name}": settings | {"attack": "self"} for name, settings in _SCRIPTS.items()},
    **{name: settings | {"attack": "none"} for name, settings in _SCRIPTS.items()},
    **_PAPERS,
    **_HARD_NEGATIVES,
    **_ROBUST_METHODS,
    **_QUEUE_METHODS,
    **_BANK_METHODS,
}


def dataset_defaults(dataset: str) -> dict[str, Any]:
    """Where a data set's settings differ from the fields' defaults, which are the digits'."""
    if dataset == "digits":
        return {}
    return _PHOTOGRAPHS | {"image_size": _IMAGE_SIZES.get(dataset, 32)}
