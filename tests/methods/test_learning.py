"""Every method learns: a few epochs on the digits, by their neighbours."""

import pytest

from clae_fast.evaluation import extract_features, knn_accuracy
from clae_fast.methods import METHODS
from clae_fast.settings import resolve
from clae_fast.trainer import Trainer


def assert_learns(least: float, **settings) -> Trainer:
    """Accuracy of neighbours on the digits' test images: `least` points above before training."""
    config = resolve({"device": "cpu", "attack": "none", "image_size": 8, "epochs": 3, **settings})
    trainer = Trainer(config)

    def accuracy() -> float:
        sets = (
            extract_features(trainer.method.encoder, split, config, trainer.device)
            for split in (trainer.labelled, trainer.test)
        )
        features = [part for found in sets for part in found]
        trainer.method.train()
        return knn_accuracy(*features)

    untrained = accuracy()
    for batch in trainer.views:
        trainer._train_step(batch)
        trainer.step += 1
    trained = accuracy()
    assert trained > untrained + least, (untrained, trained)
    return trainer


PGD = {"attack": "pair", "attack_steps": 2, "attack_start": "random", "attack_norm": "eval"}
ROBUST = {**PGD, "step_size": 0.04, "epochs": 4}
CASES = {
    **{name: (5, {}) for name in ("simclr", "plain", "uel")},
    **{name: (5, {}) for name in ("dcl", "hcl", "sscl", "supcon", "h_scl")},
    **{name: (6, {}) for name in ("moco", "adco", "caco", "mochi", "synco")},
    "acssl": (5, {"epochs": 2}),
    "acssl softmax": (5, {"epochs": 2, "options": {"form": "softmax"}}),
    "rocl": (5, ROBUST),
    "acl": (5, ROBUST),
}


@pytest.mark.parametrize("case", CASES)
def test_learns(case):
    least, settings = CASES[case]
    assert_learns(least, method=case.split()[0], **settings)


def test_every_method_is_here():
    # with a teacher to learn from in test_deacl.py
    assert {case.split()[0] for case in CASES} == METHODS.keys() - {"deacl"}
