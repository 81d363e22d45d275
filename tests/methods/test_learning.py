"""Every method learns: a few epochs on the digits, by their neighbors."""

import pytest
from learning_cases import assert_learns

from clae_fast.methods import METHODS

PGD = {"attack": "pair", "attack_steps": 2, "attack_start": "random", "attack_norm": "eval"}
ROBUST = {**PGD, "step_size": 0.04, "epochs": 4}
# with a teacher to learn from in test_deacl.py; a method that is not named below learns as SimCLR
CASES = {
    **{name: (5, {}) for name, method in METHODS.items() if not method.needs_teacher},
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
    assert {case.split()[0] for case in CASES} == METHODS.keys() - {"deacl"}
