"""DCL, HCL, SSCL, SupCon and H-SCL against definitions of their own in float64, and on digits."""

import math

import processes
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clae_fast.attack import LinfAttack
from clae_fast.config.layers import resolve
from clae_fast.methods.dcl import DCL
from clae_fast.methods.h_scl import HSCL
from clae_fast.methods.hcl import HCL
from clae_fast.methods.simclr import SimCLR
from clae_fast.methods.sscl import SSCL
from clae_fast.methods.supcon import SupCon
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepContext, StepOptions

PAIRS = (DCL, HCL, SSCL)
SUPERVISED = (SupCon, HSCL)
EVERY = pytest.mark.parametrize("cls", [*PAIRS, *SUPERVISED], ids=lambda cls: cls.name)


def embeddings(n=6, dim=5):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, n, dim, generator=generator, dtype=torch.float64).unbind()


def labels(n=6):
    return torch.arange(n) % 3


def network():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )


def views():
    return torch.rand(2, 6, 3, 6, 6, generator=torch.Generator().manual_seed(6)).unbind()


def hard_loss(negatives, positive, T, beta, tau_plus):
    """Of each row's negatives [n, k] and positive [n], cosines both: a sum over rows."""
    k = negatives.shape[1]
    weights = (beta * negatives / T).exp()
    mean = (weights * (negatives / T).exp()).sum(1) / weights.sum(1)
    positive = (positive / T).exp()
    debiased = (mean - tau_plus * positive) / (1 - tau_plus)
    return torch.log1p(k * debiased.clamp_min(math.exp(-1 / T)) / positive).mean()


def of_batch(z_a, z_b):
    """Unit rows, their cosines to negatives, [2N, 2N - 2], and to positives."""
    u = F.normalize(torch.cat([z_a, z_b]))
    N = len(z_a)
    others = ~torch.eye(N, dtype=torch.bool).repeat(2, 2)
    cosines = u @ u.T
    return u, cosines[others].view(2 * N, -1), cosines.diagonal(N).repeat(2)


def assert_same_function(method, definition, *others):
    found = [z.requires_grad_() for z in embeddings()]
    torch.manual_seed(3)
    loss = method.loss(*found, *others)
    torch.manual_seed(3)
    expected = definition(*found)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(value, found) for value in (loss, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize(
    ("cls", "beta", "tau_plus"), [(DCL, 0, 0.1), (HCL, 1, 0.1), (HCL, 2.5, 0), (HCL, 0.5, 0.3)]
)
def test_dcl_and_hcl(cls, beta, tau_plus, temperature):
    own = {"tau_plus": tau_plus} | ({"beta": beta} if cls is HCL else {})
    method = cls(network(), temperature=temperature, **own)

    def definition(z_a, z_b):
        _, negatives, positive = of_batch(z_a, z_b)
        return hard_loss(negatives, positive, temperature, beta, tau_plus)

    assert_same_function(method, definition)


def test_hcl_with_constant_weights():
    method = HCL(network(), beta=2.0, detach_weights=True)

    def definition(z_a, z_b):
        _, negatives, positive = of_batch(z_a, z_b)
        weights = (2 * negatives / 0.5).exp().detach()
        mean = (weights * (negatives / 0.5).exp()).sum(1) / weights.sum(1)
        positive = (positive / 0.5).exp()
        return torch.log1p(10 * (mean - 0.1 * positive) / 0.9 / positive).mean()

    assert_same_function(method, definition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hcl_without_either_is_simclr(dtype):
    hcl, simclr = HCL(network(), beta=0.0, tau_plus=0.0), SimCLR(network())
    found, expected = (
        (loss := method.loss(*z), *torch.autograd.grad(loss, z))
        for method in (hcl, simclr)
        for z in [[z.to(dtype).requires_grad_() for z in embeddings()]]
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# fewer hardest ones than there are, and more
@pytest.mark.parametrize("hard", [4, 64])
def test_sscl(hard):
    method = SSCL(network(), temperature=0.3, beta=1.5, tau_plus=0.05, hard=hard, synthetic=7)

    def definition(z_a, z_b):
        """Vectors of unit length, constants, drawn as the method draws them."""
        u, negatives, positive = of_batch(z_a, z_b)
        k = min(hard, 10)
        i, j = (torch.randint(k, (12, 7)) for _ in range(2))
        alpha = torch.empty(12, 7, 1, dtype=torch.float64).uniform_(0, 1)
        cosines = (u @ u.T).masked_fill(torch.eye(6, dtype=torch.bool).repeat(2, 2), -math.inf)
        hardest = u[cosines.topk(k).indices].detach()
        n_i, n_j = (hardest.gather(1, at[:, :, None].expand(-1, -1, 5)) for at in (i, j))
        h = F.normalize(alpha * n_i + (1 - alpha) * n_j, dim=2)
        further = torch.einsum("nd,nkd->nk", u, h)
        return hard_loss(torch.cat([negatives, further], 1), positive, 0.3, 1.5, 0.05)

    assert_same_function(method, definition)


def test_sscl_draws_anew_and_reproducibly():
    method = SSCL(network())
    z = embeddings()
    first, second = method.loss(*z), method.loss(*z)
    assert first != second
    torch.manual_seed(0)
    assert method.loss(*z) == first


def test_sscl_of_one_pair_has_no_loss():
    assert SSCL(network()).loss(*embeddings(1)) == 0


def _loss_of(world):
    torch.manual_seed(world.rank)
    own = Batch(tuple(world.own_rows(view) for view in views()))
    return SSCL(network(), hard=3).step(own, StepOptions(world=world)).loss


def test_sscl_draws_alike_in_all_processes(tmp_path):
    one, two = processes.run(_loss_of, 2, tmp_path)
    assert one == two


def test_supcon():
    method = SupCon(network(), temperature=0.2)
    classes = labels().repeat(2)

    def definition(z_a, z_b):
        u = F.normalize(torch.cat([z_a, z_b]))
        itself = torch.eye(12, dtype=torch.bool)
        s = (u @ u.T / 0.2).masked_fill(itself, -math.inf)
        positive = (classes[:, None] == classes) & ~itself
        return -s.log_softmax(1)[positive].view(12, 3).mean(1).mean()

    assert_same_function(method, definition, StepContext(labels=labels()))


@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0])
def test_h_scl(beta):
    method = HSCL(network(), beta=beta)
    classes = labels().repeat(2)

    def definition(z_a, z_b):
        u = F.normalize(torch.cat([z_a, z_b]))
        s = u @ u.T / 0.5
        same = classes[:, None] == classes
        weights = (beta * s).exp() * ~same
        mean = (weights * s.exp()).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return torch.log1p(10 * mean / s.exp())[same & ~torch.eye(12, dtype=torch.bool)].mean()

    assert_same_function(method, definition, StepContext(labels=labels()))


@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.name)
def test_attack_gradient_is_that_of_the_second_operand(cls):
    z, _ = embeddings()
    method = cls(network())
    z_b = z.clone().requires_grad_()
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(method.loss(z, z_b), z_b)
    torch.manual_seed(3)
    with torch.no_grad():
        dz = method.attack_grad(z)
    torch.testing.assert_close(dz, expected, rtol=1e-12, atol=0)
    assert dz.norm() > 0.01


@EVERY
@pytest.mark.parametrize("kind", ["none", "pair", "self"])
def test_every_attack_runs_and_a_step_lowers_the_loss(cls, kind):
    method = cls(network(), adversarial=kind != "none")
    assert cls.units == {"none": 6, "pair": 9, "self": 11, "released": 15}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    options = StepOptions(kind=kind, attack=LinfAttack(eps=8 / 255, lo=0.0, hi=1.0))
    totals = []
    for _ in range(4):
        torch.manual_seed(0)
        optimizer.zero_grad()
        result = method.step(Batch(views(), labels()), options)
        assert all(weight.grad is not None for weight in method.parameters())
        optimizer.step()
        method.after_step()
        totals.append(result.loss + (result.adv_loss or 0))
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("cls", SUPERVISED, ids=lambda cls: cls.name)
def test_supervised_methods_need_labels(cls):
    assert cls.needs_labels
    with pytest.raises(ValueError, match="labels must be given"):
        cls(network()).step(Batch(views()), StepOptions())


def test_own_options():
    assert DCL.own_options() == {"tau_plus": (float, 0.1)}
    hcl = {"beta": (float, 1.0), "tau_plus": (float, 0.1), "detach_weights": (bool, False)}
    assert HCL.own_options() == hcl
    assert SSCL.own_options() == hcl | {"hard": (int, 64), "synthetic": (int, 32)}
    assert SupCon.own_options() == {}
    assert HSCL.own_options() == {"beta": (float, 1.0), "detach_weights": (bool, False)}


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (DCL, {"tau_plus": 1.0}, r"tau_plus must be in \[0, 1\), got 1.0"),
        (HCL, {"beta": -1.0}, r"beta must be in \[0, inf\), got -1.0"),
        (HCL, {"tau_plus": -0.1}, r"tau_plus must be in \[0, 1\)"),
        (SSCL, {"hard": 0}, "hard must be at least 1, got 0"),
        (SSCL, {"synthetic": 0}, "synthetic must be at least 1, got 0"),
        (HSCL, {"beta": math.nan}, r"beta must be in \[0, inf\), got nan"),
    ],
)
def test_bad_options(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(network(), **given)


HCL_SETTINGS = {
    "attack": "none",
    "image_size": 32,
    "crop_min_scale": 0.08,
    "interpolation": "bilinear",
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
    "blur_prob": (0.0, 0.0),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "temperature": 0.5,
    "arch": "resnet50",
    "head_layers": 2,
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
SGD = {"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine", "head_norm": "none"}
WEIGHTED = {"beta": 1.0, "tau_plus": 0.1, "detach_weights": False}
PRESETS = {
    "dcl-stl10": ({"epochs": 500}, {"tau_plus": 0.1}),
    "hcl-stl10": ({"epochs": 400}, WEIGHTED),
    "h_scl-cifar100": ({"epochs": 200}, {"beta": 5.0, "detach_weights": False}),
    "sscl-cifar10": (
        SGD
        | {"arch": "resnet18", "lr": 0.1, "weight_decay": 1e-3, "warmup_epochs": 20, "epochs": 200},
        WEIGHTED | {"hard": 64, "synthetic": 32},
    ),
    "supcon-cifar10": (
        SGD
        | {"crop_min_scale": 0.2, "temperature": 0.1, "hidden_dim": 2048, "lr": 0.5}
        | {"weight_decay": 1e-4, "warmup_epochs": 10, "epochs": 1000, "batch_size": 1024},
        {},
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    settings = resolve({}, name).to_dict()
    method, dataset = name.split("-")
    expected, own = PRESETS[name]
    expected = HCL_SETTINGS | expected | {"method": method, "dataset": dataset}
    assert {key: settings[key] for key in expected} == expected
    assert settings["options"] == own
