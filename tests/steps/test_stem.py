"""Attacks that end at the first convolution: the same step, by a shorter backward pass."""

import copy

import pytest
import torch
from step_cases import assert_same, attack, norm_buffers, randomize_norms, views
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import clae_fast
from clae_fast import _native
from clae_fast.attack import LinfAttack
from clae_fast.nn import adversarial_twin
from clae_fast.nn.normalize import Normalize
from clae_fast.nn.resnet import ConvNet
from clae_fast.steps import stem
from clae_fast.steps.schedules import pair_step, self_step

both_attacks = pytest.mark.parametrize("kind", ["pair", "self"])


class Rest(nn.Sequential):
    """Behind the stem: BatchNorm, a branch and a head of two layers, for 30 weights or so."""

    def __init__(self, C: int, depth: int = 4) -> None:
        blocks = [
            nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
            for _ in range(depth)
        ]
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 8))
        super().__init__(nn.BatchNorm2d(C), nn.ReLU(), *blocks, *pool)


def normalize() -> Normalize:
    return Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def stem3(C: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(3, C, 3, **{"padding": 1, **options})


def stem7(C: int = 8) -> nn.Conv2d:
    return nn.Conv2d(3, C, 7, stride=2, padding=3, bias=False)


def pair_of(*layers: nn.Module, C: int = 8, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    """An encoder that begins with `layers`, and its twin, in one module."""
    encoder = nn.Sequential(*layers, Rest(C)).to(dtype)
    twin = adversarial_twin(encoder)
    for module in (encoder, twin):
        randomize_norms(module, torch.Generator().manual_seed(1))
    return nn.ModuleList([encoder, twin])


def loss(a: Tensor, b: Tensor) -> Tensor:
    return clae_fast.nt_xent(a, b, temperature=0.5, impl="reference")


def run(kind: str, pair, x, **options):
    if kind == "pair":
        return pair_step(*pair, *x, loss, attack=options.pop("attack", attack()), **options)
    return self_step(
        *pair,
        *x,
        loss,
        attack=options.pop("attack", attack()),
        attack_grad=clae_fast.tied_nt_xent,
        **options,
    )


@pytest.fixture
def fused(monkeypatch) -> list[Tensor]:
    """Lets the reference stand for the kernel; holds what stem_step has been given."""
    given: list[Tensor] = []
    step = clae_fast.attack.stem_step

    def recorded(dy, weight, x, **options):
        given.append(dy)
        return step(dy, weight, x, **options)

    monkeypatch.setattr(stem, "has_kernel", lambda impl, device: True)
    monkeypatch.setattr(stem, "kernel_takes", lambda *operands: True)
    monkeypatch.setattr(clae_fast.attack, "stem_step", recorded)
    return given


def unfused(kind: str, pair, x, **options):
    """The same step on a copy, taken back to the view; the copy and the result."""
    other = copy.deepcopy(pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stem, "has_kernel", lambda impl, device: False)
        return other, run(kind, other, x, **options)


def check_same(kind: str, pair, x, **options) -> None:
    pair.zero_grad()
    other, expected = unfused(kind, pair, x, **options)
    result = run(kind, pair, x, **options)
    assert_same(pair, result, other, expected)
    buffers = norm_buffers(other)
    for name, buffer in norm_buffers(pair).items():
        assert torch.equal(buffer, buffers[name]), name


STEMS = {
    "3x3": lambda: (stem3(),),
    "7x7": lambda: (stem7(),),
    "normalized": lambda: (normalize(), stem3(bias=False)),
    "normalized, nested": lambda: (nn.Sequential(normalize(), nn.Sequential(stem7())),),
    "normalized behind": lambda: (stem3(3), normalize(), stem3()),
    "normalized twice": lambda: (normalize(), normalize(), stem3()),
}


@both_attacks
@pytest.mark.parametrize("layers", STEMS)
def test_the_same_step(fused, kind, layers):
    pair = pair_of(*STEMS[layers]())
    check_same(kind, pair, views())
    check_same(kind, pair, views(n=3, size=9))
    assert len(fused) == 2


@both_attacks
def test_autocast(fused, kind):
    pair = pair_of(normalize(), stem3(), dtype=torch.float32)
    x = views(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        other, expected = unfused(kind, pair, x)
        result = run(kind, pair, x)
    assert [dy.dtype for dy in fused] == [torch.bfloat16]
    # signs of the gradient before and after its rounding to bf16
    assert (result.x_adv == expected.x_adv).double().mean() > 0.99
    assert torch.equal(result.loss, expected.loss)
    del other


class Images(TorchDispatchMode):
    """What computes tensors of one shape between two moments."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.on = False
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [output.shape for output in outputs if isinstance(output, Tensor)]
        if self.on and self.shape in sizes:
            self.seen.append(str(func))
        return result


@both_attacks
@pytest.mark.parametrize("shorter", [True, False])
def test_between_the_projections_and_x_adv_nothing_else_has_an_images_size(
    fused, kind, shorter, monkeypatch
):
    pair, x = pair_of(normalize(), stem3()), views()
    images = Images(x[0].shape)

    def begins(function):
        def wrapped(*operands):
            images.on = not images.seen and not fused
            return function(*operands)

        return wrapped

    def ends(name):
        step = getattr(clae_fast.attack, name)

        def wrapped(*operands, **options):
            images.on = False
            return step(*operands, **options)

        monkeypatch.setattr(clae_fast.attack, name, wrapped)

    ends("stem_step")
    ends("linf_step")
    monkeypatch.setattr(stem, "has_kernel", lambda impl, device: shorter)
    options = {"attack": attack()}
    if kind == "self":
        options["attack_grad"] = begins(clae_fast.tied_nt_xent)
    step = pair_step if kind == "pair" else self_step
    with images:
        step(*pair, *x, begins(loss) if kind == "pair" else loss, **options)
    if shorter:
        assert images.seen == []
        assert len(fused) == 1
    else:
        assert {"aten.convolution_backward.default", "aten.div.Tensor"} <= set(images.seen)


class Scaled(nn.Module):
    """Normalizes, but by what may be negative."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / torch.tensor([-0.2, 0.3, 0.4], dtype=x.dtype).view(3, 1, 1)


class Mirrored(Normalize):
    """Normalizes, and turns signs over."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.mean - x) / self.std


class Twice(nn.Module):
    """Sees the view beside its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = stem3()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x.mean(1, keepdim=True)


class Hooked(nn.Module):
    """Wants a gradient that a shorter backward pass would leave out."""

    def __init__(self, retain: bool) -> None:
        super().__init__()
        self.conv = stem3()
        self.retain = retain

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.retain_grad() if self.retain else x.register_hook(lambda dx: None)
        return self.conv(x)


class Checkpointed(nn.Module):
    """Recomputed in the backward pass."""

    def __init__(self, module: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.module = module
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


REFUSED = {
    "seen twice": lambda: (Twice(),),
    "negative std": lambda: (Scaled(), stem3()),
    "other signs": lambda: (Mirrored([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), stem3()),
    "scaled": lambda: (nn.Hardtanh(-1, 2), stem3()),
    "groups": lambda: (nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 8, 1)),
    "dilation": lambda: (stem3(dilation=2, padding=2),),
    "reflected": lambda: (stem3(padding_mode="reflect"),),
    "strides differ": lambda: (stem3(stride=(1, 2)),),
    "paddings differ": lambda: (stem3(padding=(1, 0)),),
    "transposed": lambda: (nn.ConvTranspose2d(3, 8, 3, padding=1),),
    "hook on the view": lambda: (Hooked(retain=False),),
    "the view's gradient kept": lambda: (Hooked(retain=True),),
}


@both_attacks
@pytest.mark.parametrize("layers", REFUSED)
def test_taken_back_to_the_view(fused, kind, layers):
    check_same(kind, pair_of(*REFUSED[layers]()), views())
    assert fused == []


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *given: None),
    "forward_pre": lambda module: module.register_forward_pre_hook(lambda *given: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *given: None),
    "backward_pre": lambda module: module.register_full_backward_pre_hook(lambda *given: None),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@both_attacks
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hooks(fused, kind, hook, layer):
    """Those that get a gradient which a shorter pass would leave out are in its way."""
    pair, x = pair_of(normalize(), stem3()), views()
    handle = HOOKS[hook](pair[0 if kind == "pair" else 1][layer])
    check_same(kind, pair, x)
    shorter = hook.startswith("forward") or layer == 2
    assert len(fused) == shorter
    handle.remove()
    check_same(kind, pair, x)
    assert len(fused) == shorter + 1


@both_attacks
def test_nothing_is_remembered(fused, kind):
    """Whatever has changed since the last step."""
    pair, x = pair_of(normalize(), stem3()), views()
    check_same(kind, pair, x)
    pair.eval()
    check_same(kind, pair, x)
    pair.train()
    weight = nn.Parameter(torch.randn(8, 3, 3, 3, dtype=torch.float64))
    for module in pair:
        module[1].weight = weight
    check_same(kind, pair, x)
    assert len(fused) == 3
    for module in pair:
        module[1] = nn.Sequential(module[1], nn.Identity())
        module[0] = Scaled()
    check_same(kind, pair, x)
    assert len(fused) == 3


@both_attacks
def test_a_frozen_stem(fused, kind):
    """A pass to the weights behind it does not reach it; one to the input alone does."""
    pair, x = pair_of(stem3()), views()
    pair[0][0].requires_grad_(False)
    _, expected = unfused(kind, pair, x)
    assert torch.equal(run(kind, pair, x).x_adv, expected.x_adv)
    assert len(fused) == (kind == "self")


@both_attacks
def test_a_computed_weight(fused, kind):
    """In a pass to the input alone it is a constant like any other."""
    pair = pair_of(nn.utils.parametrizations.weight_norm(stem3()))
    check_same(kind, pair, views())
    assert len(fused) == (kind == "self")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@both_attacks
@pytest.mark.parametrize("compiled", ["body", "encoder", "wrapped"])
def test_a_compiled_encoder(fused, kind, compiled):
    """The convolution is found in front of what is compiled, but not in it."""
    encoder = nn.Sequential(normalize(), ConvNet(stem3(), nn.Flatten(), nn.Linear(512, 4)))
    pair, x = nn.ModuleList([encoder, adversarial_twin(encoder)]).double(), views()
    other, expected = unfused(kind, pair, x)
    torch.compiler.reset()
    modules = list(pair)
    if compiled == "wrapped":
        modules = [torch.compile(module, backend="aot_eager") for module in pair]
    else:
        for module in pair:
            (module if compiled == "encoder" else module[1]).compile(backend="aot_eager")
    for _ in range(2):
        pair.zero_grad()
        result = run(kind, modules, x)
        assert torch.equal(result.x_adv, expected.x_adv)
        for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-10, atol=1e-13)
    assert len(fused) == 2 * (compiled == "body")


@both_attacks
def test_a_stem_that_is_checkpointed(fused, kind):
    pair = pair_of(Checkpointed(nn.Sequential(normalize(), stem3()), reentrant=False))
    check_same(kind, pair, views())
    assert len(fused) == 1


def test_a_checkpoint_that_takes_no_shorter_backward_pass(fused):
    pair = pair_of(stem3(), Checkpointed(nn.Conv2d(8, 8, 1), reentrant=True))
    check_same("pair", pair, views())
    assert fused == []


def test_a_loss_that_never_reaches_the_attacked_view(fused):
    pair, x = pair_of(stem3()), views()
    with pytest.raises(RuntimeError, match="run backward on a loss that depends on the view"):
        pair_step(*pair, *x, lambda a, b: a.square().sum(), attack=attack())
    assert fused == []


class SendsNothing(torch.autograd.Function):
    """Depends on both its operands, of which the second gets no gradient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(b)
        return a * b

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0], None


def test_a_loss_that_sends_the_attacked_view_no_gradient(fused):
    pair, x = pair_of(stem3()), views()
    with pytest.raises(RuntimeError, match="run backward on a loss that depends on the view"):
        pair_step(*pair, *x, lambda a, b: SendsNothing.apply(a, b).sum(), attack=attack())
    assert fused == []


class Blocked(nn.Module):
    """Sends its input no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return SendsNothing.apply(torch.ones_like(x), x)


@pytest.mark.parametrize("shorter", [True, False])
def test_an_encoder_that_sends_the_attacked_view_no_gradient(fused, monkeypatch, shorter):
    monkeypatch.setattr(stem, "has_kernel", lambda impl, device: shorter)
    pair, x = pair_of(stem3(), Blocked()), views()
    result = pair_step(*pair, *x, loss, attack=attack())
    assert torch.equal(result.x_adv, x[1])
    assert fused == []


def test_a_loss_with_weights_of_its_own(fused):
    pair, x = pair_of(stem3()), views()
    scale = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)

    def scaled(a, b):
        return F.cross_entropy(scale * a @ b.T, torch.arange(len(a)))

    grads = []
    for module in (copy.deepcopy(pair), pair):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stem, "has_kernel", lambda impl, device, on=module is pair: on)
            pair_step(*module, *x, scaled, attack=attack())
        grads.append(scale.grad)
        scale.grad = None
    assert len(fused) == 1
    assert torch.equal(*grads)


@both_attacks
def test_a_step_through_the_kernel(cuda_device, kind, monkeypatch):
    pair = pair_of(normalize(), stem3(64), C=64, dtype=torch.float32)
    pair = pair.to(cuda_device, memory_format=torch.channels_last)
    x = [
        view.to(cuda_device, memory_format=torch.channels_last)
        for view in views(n=3, dtype=torch.float32)
    ]
    calls = []
    step = _native.stem_step
    monkeypatch.setattr(_native, "stem_step", lambda *given: calls.append(step(*given)))
    cuda = LinfAttack(eps=0.05, impl="cuda")
    run(kind, copy.deepcopy(pair), x, attack=cuda)
    assert calls == []
    with torch.autocast(cuda_device, torch.bfloat16):
        run(kind, copy.deepcopy(pair), x, attack=LinfAttack(eps=0.05, impl="reference"))
        assert calls == []
        _, expected = unfused(kind, pair, x, attack=cuda)
        result = run(kind, pair, x, attack=cuda)
    assert len(calls) == 1
    assert (result.x_adv == expected.x_adv).double().mean() > 0.99
    moved = result.x_adv.double() - x[1 if kind == "pair" else 0].double()
    assert (moved.abs() <= 0.05).all()
