"""The schedules' options: loss scale, chunks, attacked fractions, both views in one pass."""

import copy
from contextlib import contextmanager

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
    without_norms,
)
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.methods import SimCLR
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin, build_encoder
from clae_fast.nn.resnet import narrow_resnet
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.steps.schedules import pair_step, plain_step, self_step

SCHEDULES = ("none", "pair", "self")
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)
both_attacks = pytest.mark.parametrize("kind", ["pair", "self"])


def run(kind: str, pair, x, **options):
    options = {"attack": attack(), "adv_weight": WEIGHT, **options}
    return method("simclr", pair).step(Batch(x), StepOptions(kind=kind, **options))


def assert_close(kind: str, pair, result, other, expected, factor: float = 1.0) -> None:
    """Losses, adversarial view, and the gradients of `other` times a factor."""
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-12, atol=0)
    if expected.adv_loss is None:
        assert result.adv_loss is None
    else:
        torch.testing.assert_close(result.adv_loss, expected.adv_loss, rtol=1e-12, atol=0)
    if kind != "none":
        assert torch.equal(result.x_adv, expected.x_adv)
    trained = 0
    for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
        assert (weight.grad is None) == (reference.grad is None)
        if weight.grad is not None:
            trained += 1
            torch.testing.assert_close(weight.grad, factor * reference.grad, rtol=1e-10, atol=1e-13)
    assert trained > 3


# the loss scale


@pytest.mark.parametrize("kind", [*SCHEDULES, "released"])
@pytest.mark.parametrize("options", [{}, {"adv_fraction": 0.5}, {"adv_replace": True}])
def test_scale_multiplies_gradients_alone(kind, options):
    if kind in ("none", "released") and options:
        pytest.skip("no such option")
    pair = encoders()
    other, x = copy.deepcopy(pair), views()
    result = run(kind, pair, x, scale=torch.tensor(1024.0, dtype=torch.float64), **options)
    assert_close(kind, pair, result, other, run(kind, other, x, **options), 1024.0)


def test_scale_multiplies_the_gradients_of_a_loss_of_weights():
    pair, x = encoders(), views()
    weight = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)

    def loss(a, b):
        return F.cross_entropy(weight * a @ b.T, torch.arange(len(a)))

    pair_step(*pair, *x, loss, attack=attack())
    unscaled, weight.grad = weight.grad, None
    pair_step(*pair, *x, loss, attack=attack(), scale=torch.tensor(8.0))
    torch.testing.assert_close(weight.grad, 8 * unscaled)


@both_attacks
def test_scale_keeps_half_precision_gradients(kind):
    """Gradients of 1e-9 are zero in fp16; scaled, they decide the attack and train."""

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half()

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), Narrow())
    pair = nn.ModuleList([encoder, adversarial_twin(encoder)])
    x = views(6, 4, torch.float32)

    def loss(a, b):
        return 1e-9 * F.cross_entropy(a.float() @ b.float().T, torch.arange(len(a)))

    def attack_grad(z):
        assert z.dtype == torch.float32
        b = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z, b), b)[0]

    options = {"attack": attack()} | ({"attack_grad": attack_grad} if kind == "self" else {})
    step = pair_step if kind == "pair" else self_step
    start = x[1] if kind == "pair" else x[0]
    assert torch.equal(step(*pair, *x, loss, **options).x_adv, start)
    assert not encoder[1].weight.grad.any()
    result = step(*pair, *x, loss, scale=torch.tensor(2.0**26), **options)
    assert (result.x_adv != start).double().mean() > 0.9
    assert encoder[1].weight.grad.abs().mean() > 1e-4


class Overflows(nn.Module):
    """The backward pass returns infinities of both signs and NaN among its numbers."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            dx = dx.clone()
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
                dx[..., i::x_stride] = value
            return dx

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x)


x_stride = 5


@both_attacks
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_a_gradient_that_overflows_stays_out_of_the_adversarial_statistics(kind, behind):
    """In the encoder's output, its middle and at the view itself."""
    pair, x = encoders(torch.float32), views(dtype=torch.float32)
    for encoder in pair:
        layers = [Overflows() if behind == i else nn.Identity() for i in (0, 1)]
        encoder.backbone = nn.Sequential(layers[0], encoder.backbone, layers[1])
        if behind == 3:
            encoder.head = nn.Sequential(encoder.head, Overflows())
    result = run(kind, pair, x, scale=torch.tensor(65536.0))
    finite = all(weight.grad.isfinite().all() for weight in pair.parameters())
    assert finite == (behind == 0)
    start = x[1] if kind == "pair" else x[0]
    assert result.x_adv.isfinite().all()
    assert (result.x_adv - start).abs().max() <= 0.05
    assert ((result.x_adv >= 0) & (result.x_adv <= 1)).all()
    assert result.adv_loss.isfinite()
    for name, buffer in norm_buffers(pair).items():
        assert buffer.isfinite().all(), name


# chunks


@every_schedule
@pytest.mark.parametrize("micro_batch", [2, 3, 4, 6, 9])
def test_chunks_equal_the_whole_batch(kind, micro_batch):
    pair, x = without_norms(), views()
    other = copy.deepcopy(pair)
    result = run(kind, pair, x, micro_batch=micro_batch)
    expected = run(kind, other, x)
    for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-14)
    assert_close(kind, pair, result, other, expected)


@both_attacks
@pytest.mark.parametrize("replace", [False, True])
def test_chunks_of_a_fraction(kind, replace):
    pair, x = without_norms(), views()
    other = copy.deepcopy(pair)
    options = {"adv_fraction": 0.7, "adv_replace": replace, "scale": torch.tensor(4.0)}
    result = run(kind, pair, x, micro_batch=3, **options)
    assert_close(kind, pair, result, other, run(kind, other, x, **options))


@every_schedule
def test_running_statistics_move_once_a_chunk(kind):
    pair, x = encoders(), views()
    clean, adv = copy.deepcopy(pair)
    result = run(kind, pair, x, micro_batch=3)
    with torch.no_grad():
        for view in x:
            clean(view[:3]), clean(view[3:])
        if kind != "none":
            adv(result.x_adv[:3]), adv(result.x_adv[3:])
    for module, expected in ((pair[0], clean), (pair[1], adv)):
        for name, buffer in norm_buffers(expected).items():
            torch.testing.assert_close(norm_buffers(module)[name], buffer, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_random_layers_draw_the_same_twice(kind):
    """Gradients are those of the loss at the embeddings of the first pass."""
    pair, (x_p, x_q) = without_norms(random=0.5), views()
    seen = []

    def loss(a, b):
        seen.append(a.detach())
        return F.cross_entropy(a @ b.T, torch.arange(len(a)))

    drawn = [torch.get_rng_state()]
    again = []
    hook = pair[0].register_forward_hook(lambda module, args, z: again.append(z.detach()))
    if kind == "none":
        plain_step(pair[0], x_p, x_q, loss, micro_batch=3)
    else:
        pair_step(*pair, x_p, x_q, loss, attack=attack(), micro_batch=3)
    hook.remove()
    drawn.append(torch.get_rng_state())
    first, second = again[:4], again[4:]
    # q is taken back before p
    torch.testing.assert_close(torch.cat(second), torch.cat(first[2:] + first[:2]), rtol=0, atol=0)
    assert torch.equal(torch.cat(first[:2]), seen[0])
    # and what is drawn next is not what has been
    assert not torch.equal(*drawn)
    torch.set_rng_state(drawn[0])
    expected = [nn.Dropout(0.5)(torch.ones(3, 384)) for _ in range(4 if kind == "none" else 6)]
    assert len(expected) > 3
    assert torch.equal(torch.get_rng_state(), drawn[1])


def test_chunks_under_autocast():
    """Autocast keeps casts of weights: one kept from the first pass would take no gradient."""
    pair, x = encoders(torch.float32), views(dtype=torch.float32)
    other = copy.deepcopy(pair)
    with torch.autocast("cpu", torch.bfloat16):
        run("pair", pair, x, micro_batch=3)
    run("pair", other, x, micro_batch=3)
    dw, reference = (
        torch.cat([weight.grad.flatten() for weight in module.parameters()])
        for module in (pair, other)
    )
    assert F.cosine_similarity(dw, reference, dim=0) > 0.95


def test_an_anchor_that_is_held_constant_is_not_encoded_again():
    pair, (x_p, x_q) = without_norms(), views()
    calls = []
    pair[0].register_forward_hook(lambda module, args, z: calls.append(z.requires_grad))

    def loss(a, b):
        return -F.cosine_similarity(a.detach(), b).mean()

    plain_step(pair[0], x_p, x_q, loss, micro_batch=3)
    assert calls == [False] * 4 + [True] * 2


@pytest.fixture(scope="module")
def resnet18():
    backbone, features = resnet(build_encoder, "resnet18", 8)
    encoder = Encoder(backbone, ProjectionHead(features, 512, 64))
    x = views(5, 8, torch.float32)
    return encoder, x, flops(lambda: SimCLR(encoder).step(Batch(x), StepOptions()))


@pytest.mark.parametrize(
    ("kind", "options", "units"),
    [
        ("none", {"batched": True}, 6),
        ("none", {"micro_batch": 3}, 8),
        ("pair", {"micro_batch": 3}, 12),
        ("self", {"micro_batch": 3}, 15),
        ("pair", {"adv_fraction": 0.4}, 7.2),
        ("self", {"adv_fraction": 0.4}, 8),
        ("pair", {"adv_fraction": 0.4, "adv_replace": True}, 6.8),
        ("self", {"adv_fraction": 0.4, "adv_replace": True}, 6.8),
        ("pair", {"adv_replace": True}, 8),
        ("self", {"adv_replace": True}, 8),
    ],
)
def test_units(resnet18, kind, options, units):
    encoder, x, plain = resnet18
    built = SimCLR(encoder, adversarial=True)
    options = StepOptions(kind=kind, attack=attack(), **options)
    ratio = flops(lambda: built.step(Batch(x), options)) / plain
    assert 6 * ratio == pytest.approx(units, rel=0.01)
    cost = SimCLR.cost(options)
    assert cost.units(chunks=options.micro_batch is not None) == pytest.approx(units)


def test_peak_of_saved_activations():
    backbone, features = resnet(narrow_resnet, width=16)
    encoder = Encoder(backbone, ProjectionHead(features, 32, 16))
    built, x = SimCLR(encoder, adversarial=True), views(16, 16, torch.float32)

    def peak(kind, views, **options):
        saved = SavedBytes(built)
        with saved:
            built.step(Batch(views), StepOptions(kind=kind, attack=attack(), **options))
        assert saved.live == 0
        return saved.peak

    plain = peak("none", x)
    # a quarter of one view, where the whole step keeps two; the images are there anyway
    images = x[0].untyped_storage().nbytes()
    for kind in SCHEDULES:
        activations = peak(kind, x, micro_batch=4) - images
        assert activations <= 1.02 * (plain - images) / 8
    assert peak("none", x, batched=True) <= 1.02 * plain
    for kind in ("pair", "self"):
        for replace in (False, True):
            for fraction in (0.25, 1.0):
                options = {"adv_fraction": fraction, "adv_replace": replace}
                assert peak(kind, x, **options) <= 1.02 * plain


# attacked fractions


def naive_fraction(kind, pair, x_p, x_q, loss, m, weight, replace):
    """The formulas of an attacked fraction, left to autograd."""
    encoder, adv_encoder = pair
    held = copy.deepcopy(pair)
    whole = x_q if kind == "pair" and not replace else None
    x = (whole if whole is not None else (x_q if kind == "pair" else x_p)[:m]).clone()
    start = x[:m].clone()
    x.requires_grad_()
    if kind == "self":
        value = loss(held[1](x_p[:m]), held[1](x))
    elif replace:
        value = loss(held[0](x_p)[:m], held[0](x))
    else:
        value = loss(held[0](x_p), held[0](x))
    (dx,) = torch.autograd.grad(value, x)
    x_adv = attack().step(start, dx[:m])
    z_p = encoder(x_p)
    if replace:
        z_q = [adv_encoder(x_adv)] + ([encoder(x_q[m:])] if m < len(x_q) else [])
        total = loss(z_p, torch.cat(z_q))
        total.backward()
        return total.detach(), None, x_adv
    clean, adv = loss(z_p, encoder(x_q)), loss(z_p[:m], adv_encoder(x_adv))
    (clean + weight * adv).backward()
    return clean.detach(), adv.detach(), x_adv


@both_attacks
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("fraction", "m"), [(0.5, 3), (0.3, 2), (0.01, 2), (0.9, 5), (1.0, 6)])
def test_fractions_equal_autograd(kind, replace, fraction, m):
    pair, x = encoders(), views()
    other = copy.deepcopy(pair)
    loss = method("simclr", pair).loss
    result = run(kind, pair, x, adv_fraction=fraction, adv_replace=replace)
    expected = naive_fraction(kind, other, *x, loss, m, WEIGHT, replace)
    assert len(result.x_adv) == m
    if replace:
        assert result.adv_loss is None
        result, expected = ((*r[:1], r[0], r[2]) for r in (result, expected))
        if m == 6:  # no clean view q, and BatchNorm's own weights there
            assert all(weight.grad is not None for weight in pair.parameters())
    assert_same(pair, result, other, expected)
    for name, buffer in norm_buffers(other).items():
        torch.testing.assert_close(norm_buffers(pair)[name], buffer, rtol=1e-12, atol=1e-15)


def test_all_rows_added_is_the_whole_schedule():
    pair, x = encoders(), views()
    other = copy.deepcopy(pair)
    loss = method("simclr", pair).loss
    result = run("pair", pair, x, adv_fraction=1)
    assert_same(pair, result, other, naive_pair(other, *x, loss, attack(), WEIGHT))


# both views in one pass


def test_batched_plain_equals_two_passes():
    pair, x = encoders(), views()
    other = copy.deepcopy(pair)
    result = run("none", pair, x, batched=True)
    expected = run("none", other, x)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-12, atol=0)
    for weight, reference in zip(pair[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-13)
    for name, buffer in norm_buffers(other).items():
        torch.testing.assert_close(norm_buffers(pair)[name], buffer, rtol=1e-12, atol=1e-15)


def test_batched_schedules_would_cost_more(resnet18):
    """What plain_step says of the others: 11 units for the pair attack, three views for self."""
    encoder, (x_p, x_q), plain = resnet18
    twin = adversarial_twin(encoder)
    loss = SimCLR(encoder).loss

    def batched_pair():
        x = torch.cat((x_p, x_q)).requires_grad_().view(10, 3, 8, 8)
        z = encoder(x)
        leaf = z.detach().requires_grad_()
        loss(*leaf.chunk(2)).backward()
        # to the input alone, since p's gradient is not complete
        (dx,) = torch.autograd.grad(z, x, leaf.grad, retain_graph=True)
        adversarial(z, leaf, attack().step(x_q, dx[5:]))

    def adversarial(z, leaf, x_adv):
        a = twin(x_adv)
        adv = a.detach().requires_grad_()
        loss(leaf[:5], adv).backward()
        a.backward(adv.grad)
        z.backward(leaf.grad)

    def batched_self():
        z = encoder(torch.cat((x_p, x_q)))
        a = twin(x_q)  # x_adv is known before
        (loss(*z.chunk(2)) + loss(z[:5], a)).backward()

    assert 6 * flops(batched_pair) / plain == pytest.approx(11, rel=0.01)
    assert 6 * flops(batched_self) / plain == pytest.approx(11 - 2, rel=0.01)
    peaks = []
    for step in (lambda: plain_step(encoder, x_p, x_q, loss), batched_self):
        saved = SavedBytes(encoder)
        with saved:
            step()
        peaks.append(saved.peak)
    assert peaks[1] == pytest.approx(1.5 * peaks[0], rel=0.05)


# the last backward pass


@pytest.mark.parametrize("kind", [*SCHEDULES, "released"])
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 3}, {"adv_replace": True, "adv_fraction": 0.5}, {"batched": True}],
)
def test_every_gradient_is_complete_after_the_last_backward(kind, options):
    if (kind == "released" and options) or (kind == "none" and "adv_replace" in options):
        pytest.skip("no such option")
    pair, x = encoders(), views()
    late: set[nn.Parameter] = set()
    inside = []
    last = []

    def accumulated(weight):
        if inside:
            assert weight not in late  # once
            late.add(weight)

    hooks = [w.register_post_accumulate_grad_hook(accumulated) for w in pair.parameters()]

    @contextmanager
    def last_backward():
        inside.append(True)
        yield
        inside.pop()
        last.append({w: w.grad.clone() for w in pair.parameters() if w.grad is not None})

    run(kind, pair, x, last_backward=last_backward, **options)
    for hook in hooks:
        hook.remove()
    (last_grads,) = last
    for weight in pair.parameters():
        assert (weight.grad is None) == (weight not in last_grads)
        if weight.grad is not None:
            assert torch.equal(weight.grad, last_grads[weight])
    assert late >= set(pair[0].parameters())


def test_the_last_backward_of_a_constant_anchor_is_empty():
    pair, x = encoders(), views()
    entered = []

    @contextmanager
    def last_backward():
        entered.append(pair[0].head[0].weight.grad is not None)
        yield

    for micro_batch in (None, 3):
        plain_step(
            pair[0],
            *x,
            lambda a, b: -F.cosine_similarity(a.detach(), b).mean(),
            micro_batch=micro_batch,
            last_backward=last_backward,
        )
    assert entered == [True, True]


# arguments


def test_bad_options():
    pair, x = encoders(), views()
    for options, error, text in (
        ({"scale": 2.0}, TypeError, "scale must be a tensor, got float"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be a scalar tensor, got shape \[2\]"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch must be an integer, got float"),
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1, got 0"),
    ):
        for kind in SCHEDULES:
            with pytest.raises(error, match=text):
                run(kind, pair, x, **options)
    for options, error, text in (
        ({"adv_fraction": "a"}, TypeError, "adv_fraction must be a number, got str"),
        ({"adv_fraction": 0.0}, ValueError, r"adv_fraction must be in \(0, 1\], got 0.0"),
        ({"adv_fraction": 1.5}, ValueError, r"adv_fraction must be in \(0, 1\], got 1.5"),
    ):
        for kind in ("pair", "self"):
            with pytest.raises(error, match=text):
                run(kind, pair, x, **options)
    with pytest.raises(ValueError, match="batched takes views of one shape, and no micro_batch"):
        run("none", pair, x, batched=True, micro_batch=2)
    for options in ({"micro_batch": 2}, {"adv_fraction": 0.5}, {"adv_replace": True}):
        with pytest.raises(ValueError, match="kind='released' has no adv_fraction"):
            run("released", pair, x, **options)
    assert all(weight.grad is None for weight in pair.parameters())
