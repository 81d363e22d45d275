"""The schedules: against straightforward autograd, by units, by memory, by BatchNorm's buffers."""

import copy

import pytest
import torch
from step_cases import (
    WEIGHT,
    SavedBytes,
    assert_same,
    attack,
    encoders,
    flops,
    method,
    naive_pair,
    norm_buffers,
    resnet,
    views,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from clae_fast import nt_xent
from clae_fast.attack import LinfAttack, linf_twin
from clae_fast.methods import METHODS, SimCLR
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin, build_encoder
from clae_fast.nn.resnet import narrow_resnet
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.steps.schedules import pair_step, plain_step, released_step, self_step


def naive_self(pair, x_p, x_q, loss, attack, weight):
    """The formula of self_step and released_step, left to autograd."""
    encoder, adv_encoder = pair
    x = x_p.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(adv_encoder(x_p), adv_encoder(x)), x)
    x_adv = attack.step(x_p, dx)
    clean = loss(encoder(x_p), encoder(x_q))
    adv = loss(encoder(x_p), adv_encoder(x_adv))
    (clean + weight * adv).backward()
    return clean, adv, x_adv


@pytest.mark.parametrize("name", ["simclr", "plain", "uel"])
def test_pair_equals_autograd(name):
    pair, (x_p, x_q) = encoders(), views()
    other = copy.deepcopy(pair)
    loss = method(name, pair).loss
    result = pair_step(*pair, x_p, x_q, loss, attack=attack(), adv_weight=WEIGHT)
    assert_same(pair, result, other, naive_pair(other, x_p, x_q, loss, attack(), WEIGHT))


@pytest.mark.parametrize("name", ["simclr", "plain", "uel"])
@pytest.mark.parametrize("kind", ["self", "released"])
def test_self_and_released_equal_autograd(name, kind):
    pair, x = encoders(), views()
    other = copy.deepcopy(pair)
    built = method(name, pair)
    result = built.step(Batch(x), StepOptions(kind=kind, attack=attack(), adv_weight=WEIGHT))
    assert_same(pair, result, other, naive_self(other, *x, built.loss, attack(), WEIGHT))


def test_the_comparison_can_fail():
    """A radius off by a tenth, a twin with the encoder's BatchNorm, the other attack: all seen."""
    pair, (x_p, x_q) = encoders(), views()
    loss = method("simclr", pair).loss
    result = pair_step(*pair, x_p, x_q, loss, attack=attack(), adv_weight=WEIGHT)
    moved = LinfAttack(eps=0.05, step_size=0.033, lo=0.0, hi=1.0)
    wrong = encoders()
    expected = naive_pair(wrong, x_p, x_q, loss, moved, WEIGHT)
    with pytest.raises(AssertionError):
        assert_same(pair, (*result[:2], expected[2]), wrong, (*result[:2], expected[2]))
    wrong = encoders()
    expected = naive_pair([wrong[0], wrong[0]], x_p, x_q, loss, attack(), WEIGHT)
    with pytest.raises(AssertionError):
        assert_same(pair, result, wrong, (result[0], expected[1], result[2]))
    assert not torch.equal(result[2], naive_self(encoders(), x_p, x_q, loss, attack(), WEIGHT)[2])


def test_plain_equals_autograd():
    pair, (x_p, x_q) = encoders(), views()
    other = copy.deepcopy(pair)
    loss = method("simclr", pair).loss
    result = plain_step(pair[0], x_p, x_q, loss)
    expected = loss(other[0](x_p), other[0](x_q))
    expected.backward()
    assert torch.equal(result.loss, expected.detach())
    assert result.adv_loss is None
    assert result.x_adv is None
    for weight, reference in zip(pair[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=0)


def test_a_loss_with_weights_of_its_own_trains_them():
    pair, (x_p, x_q) = encoders(), views()
    other = copy.deepcopy(pair)
    scale, reference = (torch.full((), 3.0, dtype=torch.float64, requires_grad=True) for _ in "ab")

    def loss(scale, a, b):
        return F.cross_entropy(scale * a @ b.T, torch.arange(len(a)))

    result = pair_step(*pair, x_p, x_q, lambda a, b: loss(scale, a, b), attack=attack())
    expected = naive_pair(other, x_p, x_q, lambda a, b: loss(reference, a, b), attack(), 1.0)
    assert_same(pair, result, other, expected)
    # the naive attack goes through autograd.grad, so both count the two losses once
    torch.testing.assert_close(scale.grad, reference.grad, rtol=1e-10, atol=0)


def test_a_loss_that_holds_the_anchor_constant():
    pair, (x_p, x_q) = encoders(), views()
    other = copy.deepcopy(pair)

    def loss(a, b):
        return -F.cosine_similarity(a.detach(), b).mean()

    result = pair_step(*pair, x_p, x_q, loss, attack=attack(), adv_weight=WEIGHT)
    assert_same(pair, result, other, naive_pair(other, x_p, x_q, loss, attack(), WEIGHT))


def test_gradients_add_to_those_already_there():
    pair, (x_p, x_q) = encoders(), views()
    loss = method("simclr", pair).loss
    for _ in range(2):
        pair_step(*pair, x_p, x_q, loss, attack=attack())
        twice = [weight.grad.clone() for weight in pair.parameters()]
    pair.zero_grad()
    pair_step(*pair, x_p, x_q, loss, attack=attack())
    for weight, double in zip(pair.parameters(), twice, strict=True):
        torch.testing.assert_close(2 * weight.grad, double, rtol=1e-10, atol=1e-13)


@pytest.fixture(scope="module")
def resnet18():
    backbone, features = resnet(build_encoder, "resnet18", 8)
    encoder = Encoder(backbone, ProjectionHead(features, 512, 64))
    return encoder, views(2, 8, torch.float32)


def recipe(encoder, adv_encoder, x_p, x_q, loss):
    """The documented loop around linf_twin."""
    z_p = encoder(x_p)
    a = z_p.detach().requires_grad_()
    x_q, twin = linf_twin(x_q, eps=0.05, step_size=0.03, lo=0.0, hi=1.0)
    clean = loss(a, encoder(x_q))
    clean.backward()
    adv = loss(a, adv_encoder(twin.x_adv))
    adv.backward()
    z_p.backward(a.grad)
    return clean.detach(), adv.detach(), twin.x_adv


def test_linf_twin_in_a_loop_of_ones_own(resnet18):
    pair, (x_p, x_q) = encoders(), views()
    other = copy.deepcopy(pair)
    loss = method("simclr", pair).loss
    result = recipe(*pair, x_p, x_q, loss)
    assert_same(pair, result, other, pair_step(*other, x_p, x_q, loss, attack=attack()))

    encoder, x = resnet18
    twin = adversarial_twin(encoder)
    plain = flops(lambda: plain_step(encoder, *x, loss))
    assert flops(lambda: recipe(encoder, twin, *x, loss)) == pytest.approx(1.5 * plain, rel=0.01)


def test_peak_of_saved_activations():
    backbone, features = resnet(narrow_resnet, width=16)
    encoder = Encoder(backbone, ProjectionHead(features, 32, 16))
    built, x = SimCLR(encoder, adversarial=True), views(8, 16, torch.float32)
    peaks = {}
    for kind in ("none", "pair", "self", "released"):
        saved = SavedBytes(built)
        with saved:
            built.step(Batch(x), StepOptions(kind=kind, attack=attack()))
        assert saved.live == 0
        peaks[kind] = saved.peak
    assert peaks["none"] > 8 * 16 * 16 * 16 * 4  # more than one layer's activations
    assert peaks["pair"] <= 1.02 * peaks["none"]
    assert peaks["self"] <= 1.02 * peaks["none"]
    assert peaks["released"] == pytest.approx(1.5 * peaks["none"], rel=0.05)


@pytest.mark.parametrize("kind", ["pair", "self"])
def test_batchnorm_buffers(kind):
    """The encoder's see view 1, then view 2; the twin's see x_adv and nothing else."""
    pair, x = encoders(), views()
    clean, adv = copy.deepcopy(pair)
    swapped = copy.deepcopy(clean)
    result = method("simclr", pair).step(Batch(x), StepOptions(kind=kind, attack=attack()))
    with torch.no_grad():
        clean(x[0]), clean(x[1])
        swapped(x[1]), swapped(x[0])
        adv(result.x_adv)
    for module, expected in ((pair[0], clean), (pair[1], adv)):
        expected = norm_buffers(expected)
        assert len(expected) == 3 * 9
        for name, buffer in norm_buffers(module).items():
            torch.testing.assert_close(buffer, expected[name], rtol=1e-12, atol=1e-15)
    name = "backbone.bn1.running_mean"
    assert not torch.allclose(norm_buffers(swapped)[name], norm_buffers(pair[0])[name])


def test_released_buffers_see_what_the_released_code_shows_them():
    pair, x = encoders(), views()
    clean, adv = copy.deepcopy(pair)
    result = method("simclr", pair).step(Batch(x), StepOptions(kind="released", attack=attack()))
    with torch.no_grad():
        clean(x[0]), clean(x[1])
        adv(x[0]), adv(x[0]), adv(result.x_adv)
    for module, expected in ((pair[0], clean), (pair[1], adv)):
        for name, buffer in norm_buffers(expected).items():
            torch.testing.assert_close(norm_buffers(module)[name], buffer, rtol=1e-12, atol=1e-15)


def test_self_leaves_statistics_and_weights_switched_on():
    pair, (x_p, x_q) = encoders(), views()
    frozen = pair[1].head[0].bias.requires_grad_(False)

    def broken(z):
        raise KeyError

    with pytest.raises(KeyError):
        self_step(*pair, x_p, x_q, F.mse_loss, attack=attack(), attack_grad=broken)
    norms = [m for m in pair.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    assert [weight for weight in pair.parameters() if not weight.requires_grad] == [frozen]


class FunctionalDropout(nn.Module):
    """torchvision's DenseNet and timm's ResNet keep a rate and call the functional form."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_rate, self.training)


@pytest.mark.parametrize(
    "layer",
    [
        lambda rate: nn.Dropout(rate),
        lambda rate: nn.AlphaDropout(rate),
        lambda rate: pytest.importorskip("torchvision.ops").StochasticDepth(rate, "row"),
        lambda rate: pytest.importorskip("timm.layers").DropPath(rate),
        lambda rate: FunctionalDropout(rate),
        lambda rate: nn.MultiheadAttention(8, 2, dropout=rate),
    ],
)
def test_self_refuses_random_layers(layer):
    x_p, x_q = views(4, 4)

    def run(random):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8)).double()
        if not isinstance(random, nn.MultiheadAttention):
            encoder.add_module("noisy", random)
        else:
            encoder[1].noisy = random  # found wherever it sits, called or not
        self_step(
            encoder,
            adversarial_twin(encoder),
            x_p,
            x_q,
            F.mse_loss,
            attack=attack(),
            attack_grad=lambda z: z,
        )

    with pytest.raises(ValueError, match=r"adv_encoder's (1\.)?noisy .*0\.25.* pair attack"):
        run(layer(0.25))
    run(layer(0.0))
    run(layer(0.25).eval())


def test_pair_takes_random_layers():
    x_p, x_q = views(4, 4)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Dropout(0.5)).double()
    loss = METHODS["simclr"](encoder).loss
    result = pair_step(encoder, adversarial_twin(encoder), x_p, x_q, loss, attack=attack())
    assert result.loss.isfinite()


@pytest.mark.parametrize("kind", ["pair", "self", "released"])
def test_half_precision_views_in_channels_last(kind):
    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            return x.float()

    pair = encoders(torch.float32)
    for encoder in pair:
        encoder.backbone = nn.Sequential(Widen(), encoder.backbone)
    x = [
        view.to(torch.float16, memory_format=torch.channels_last)
        for view in views(dtype=torch.float32)
    ]
    result = method("simclr", pair).step(Batch(x), StepOptions(kind=kind, attack=attack(2 / 255)))
    start = x[1] if kind == "pair" else x[0]
    assert result.x_adv.dtype == torch.float16
    assert result.x_adv.is_contiguous(memory_format=torch.channels_last)
    moved = (result.x_adv.double() - start.double()).abs()
    assert moved.max() <= 2 / 255
    assert (moved > 1 / 255).double().mean() > 0.9


@pytest.mark.parametrize("kind", ["none", "pair", "self", "released"])
def test_autocast(kind):
    """Half-precision passes share their cast weights, and each backward still finds its own."""
    x = views(dtype=torch.float32)
    pair = encoders(torch.float32)
    full = copy.deepcopy(pair)
    expected = method("simclr", full).step(Batch(x), StepOptions(kind=kind, attack=attack()))
    with torch.autocast("cpu", torch.float16):
        result = method("simclr", pair).step(Batch(x), StepOptions(kind=kind, attack=attack()))
    torch.testing.assert_close(result.loss, expected.loss, rtol=0.01, atol=0)
    used = pair[0] if kind == "none" else pair
    dw, reference = (
        torch.cat([weight.grad.flatten() for weight in module.parameters()])
        for module in (used, full[0] if kind == "none" else full)
    )
    assert F.cosine_similarity(dw, reference, dim=0) > 0.98


@pytest.mark.parametrize("step", [pair_step, released_step])
def test_bad_arguments(step):
    pair, (x_p, x_q) = encoders(), views(4)
    loss = method("simclr", pair).loss

    def run(x_p=x_p, x_q=x_q, loss=loss, adv_weight=1.0, **attacked):
        step(*pair, x_p, x_q, loss, adv_weight=adv_weight, **({"attack": attack()} | attacked))

    with pytest.raises(ValueError, match="one batch, got 4 and 3 rows"):
        run(x_q=x_q[:3])
    with pytest.raises(TypeError, match="x_q must be a tensor, got list"):
        run(x_q=[1.0])
    with pytest.raises(TypeError, match="fp32 or fp16, got bf16"):
        run(x_p=x_p.bfloat16(), x_q=x_q.bfloat16())
    with pytest.raises(TypeError, match=r"must be of dtype .*, got torch\.uint8"):
        run(x_p=x_p.byte(), x_q=x_q.byte())
    with pytest.raises(TypeError, match="attack must be a LinfAttack, got float"):
        run(attack=0.1)
    with pytest.raises(TypeError, match="adv_weight must be a number, got str"):
        run(adv_weight="1")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="adv_weight must be finite and not negative"):
            run(adv_weight=weight)
    assert all(buffer.sum() == 0 for n, buffer in norm_buffers(pair).items() if "mean" in n)
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, got \[4, 8\]"):
        run(loss=lambda a, b: a * b)
    with pytest.raises(ValueError, match="loss must return a scalar tensor, got float"):
        run(loss=lambda a, b: 1.0)


@pytest.mark.parametrize(("kind", "name"), [(tuple, "tuple"), (dict, "dict")])
def test_an_encoder_that_returns_no_tensor_is_refused(kind, name):
    class Pair(nn.Linear):
        def forward(self, x):
            z = super().forward(x.flatten(1))
            return kind([("z", z)])

    encoder = Pair(192, 8).double()
    with pytest.raises(TypeError, match=f"encoder must return projections.*got {name}"):
        pair_step(encoder, adversarial_twin(encoder), *views(), nt_xent, attack=attack())


def test_an_encoder_in_distributed_data_parallel_is_refused():
    # made without its processes, which are not needed to tell what it is
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    pair, (x_p, x_q) = encoders(), views()
    for encoder, adv_encoder in ((wrapped, pair[1]), (pair[0], wrapped)):
        with pytest.raises(TypeError, match="must not be wrapped in DistributedDataParallel"):
            pair_step(encoder, adv_encoder, x_p, x_q, nt_xent, attack=attack())
    with pytest.raises(TypeError, match="must not be wrapped in DistributedDataParallel"):
        plain_step(wrapped, x_p, x_q, nt_xent)


def test_a_loss_that_never_reaches_the_attacked_view():
    pair, (x_p, x_q) = encoders(), views()
    with pytest.raises(RuntimeError, match="run backward on a loss that depends on the view"):
        pair_step(*pair, x_p, x_q, lambda a, b: a.square().sum(), attack=attack())


def test_a_method_refuses_what_it_cannot_run():
    pair, x = encoders(), views()
    built = method("simclr", pair)
    kinds = "kind must be none, pair, self or released for simclr, got 'cross'"
    with pytest.raises(ValueError, match=kinds):
        built.step(Batch(x), StepOptions(kind="cross", attack=attack()))
    with pytest.raises(ValueError, match="views must be 2 for simclr, got 1"):
        built.step(Batch(x[:1]), StepOptions())
    with pytest.raises(ValueError, match="needs an attack"):
        built.step(Batch(x), StepOptions(kind="pair"))
    with pytest.raises(ValueError, match="adversarial=True"):
        SimCLR(pair[0]).step(Batch(x), StepOptions(kind="self", attack=attack()))
