import builtins

import pytest
import torch
from torch import nn

from clae_fast import evaluate
from clae_fast.config.layers import resolve
from clae_fast.evaluation import accuracy, extract_features, fit_linear, robust
from clae_fast.evaluation.features import batches
from clae_fast.training.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """An encoder trained a little, with its probe, the test images in batches, and all of them."""
    config = resolve({"limit": 200, "image_size": 8, "batch_size": 64, "device": "cpu"})
    trainer = Trainer(config)
    for batch in trainer.views:
        trainer._train_step(batch)
        trainer.global_step += 1
        if trainer.global_step == 12:
            break
    trainer.method.zero_grad()
    encoder, device = trainer.method.encoder, trainer.device
    probe = fit_linear(*extract_features(encoder, trainer.labeled, config, device))
    images = list(batches(trainer.test, config, device))
    x, labels = (torch.cat(parts) for parts in zip(*images, strict=True))
    return nn.Sequential(encoder.backbone, probe), images, x, labels


class TestAttacks:
    @pytest.mark.parametrize("name", ["fgsm", "pgd20"])
    def test_stay_in_the_ball_and_in_range(self, digits, name):
        classifier, _, x, labels = digits
        for eps in robust.RADII.values():
            x_adv = robust.attacked(classifier, x, labels, robust.ATTACKS[name](eps))
            assert 0 < (x_adv - x).abs().max() <= eps
            assert x_adv.min() >= 0
            assert x_adv.max() <= 1

    def test_fgsm_is_a_step_along_the_sign(self, digits):
        classifier, _, x, labels = digits
        view = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(classifier(view), labels)
        (dx,) = torch.autograd.grad(loss, view)
        expected = (x + 8 / 255 * dx.sign()).clamp(0, 1)
        found = robust.attacked(classifier, x, labels, robust.fgsm(8 / 255))
        # where the gradient is nearly nothing its sign is rounding's
        steep = dx.abs() > 1e-3 * dx.abs().max()
        torch.testing.assert_close(found[steep], expected[steep])

    def test_pgd_raises_the_loss_further(self, digits):
        classifier, _, x, labels = digits

        def loss(x):
            with torch.no_grad():
                return nn.functional.cross_entropy(classifier(x), labels)

        once, often = (
            loss(robust.attacked(classifier, x, labels, attack(8 / 255)))
            for attack in (robust.fgsm, robust.pgd20)
        )
        assert loss(x) < once < often

    def test_leave_the_encoder_as_it_was(self, digits):
        classifier, images, *_ = digits
        before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        robust.robust_accuracies(classifier, images[:1])
        assert all(torch.equal(before[n], t) for n, t in classifier.state_dict().items())
        assert all(weight.grad is None for weight in classifier.parameters())


class TestAccuracies:
    def test_fall_with_the_radius_and_the_steps(self, digits):
        classifier, images, x, labels = digits
        found = robust.robust_accuracies(classifier, images)
        clean = accuracy(classifier, x, labels)
        for under in found.values():
            assert clean >= under["4/255"] >= under["8/255"]
        assert clean > found["pgd20"]["8/255"]
        for radius in robust.RADII:
            assert found["fgsm"][radius] >= found["pgd20"][radius]

    def test_repeat_and_leave_the_generator(self, digits):
        classifier, images, *_ = digits
        state = torch.get_rng_state()
        first = robust.robust_accuracies(classifier, images[:1], seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert robust.robust_accuracies(classifier, images[:1], seed=1) == first

    def test_of_a_linear_classifier_are_its_margins(self):
        """Against a linear classifier of two classes FGSM is the best attack."""
        generator = torch.Generator().manual_seed(0)
        x = 0.2 + 0.6 * torch.rand(200, 3, 4, 4, generator=generator)
        weight = torch.randn(48, generator=generator)
        margin = (x.flatten(1) - 0.5) @ weight
        labels = (margin > 0).long()
        linear = nn.Linear(48, 2)
        with torch.no_grad():
            linear.weight.copy_(torch.stack([-weight, weight]) / 2)
            linear.bias.copy_(torch.stack([weight, -weight]).sum(dim=1) / 4)
        found = robust.robust_accuracies(nn.Sequential(nn.Flatten(), linear), [(x, labels)])
        for radius, eps in robust.RADII.items():
            expected = 100 * (margin.abs() > eps * weight.abs().sum()).double().mean()
            assert 0 < expected < 100
            for under in found.values():
                assert under[radius] == pytest.approx(float(expected))

    def test_where_nothing_is_right(self):
        always_first = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        nn.init.zeros_(always_first[1].weight)
        with torch.no_grad():
            always_first[1].bias.copy_(torch.tensor([1.0, 0.0]))
        images = [(torch.rand(3, 3, 2, 2), torch.ones(3, dtype=torch.int64))]
        zero = dict.fromkeys(robust.RADII, 0.0)
        assert robust.robust_accuracies(always_first, images) == {"fgsm": zero, "pgd20": zero}


class TestAutoAttack:
    def test_finds_what_pgd_finds(self):
        pytest.importorskip("pyautoattack")
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
        classifier = classifier.to(memory_format=torch.channels_last).eval()
        # two images that a thousandth of the way tells apart
        x, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2)
        while labels.unique().numel() < 2:
            x = torch.rand(2, 3, 4, 4)
            labels = classifier(x).argmax(dim=1)
        for _ in range(10):
            middle = x.mean(dim=0, keepdim=True)
            same = classifier(middle).argmax(dim=1) == labels
            x = torch.where(same.view(2, 1, 1, 1), middle, x)
        # the third is wrong from the start
        x, labels = torch.cat([x, x[:1]]), torch.cat([labels, labels[1:]])
        images = [(x.to(memory_format=torch.channels_last), labels)]
        assert accuracy(classifier, x, labels) == pytest.approx(200 / 3)
        assert robust.robust_accuracies(classifier, images)["pgd20"] == {"8/255": 0, "4/255": 0}
        assert robust.autoattack_accuracies(classifier, images) == {"8/255": 0, "4/255": 0}

    def test_needs_four_classes(self):
        pytest.importorskip("pyautoattack")
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        x = torch.rand(4, 3, 2, 2)
        with pytest.raises(ValueError, match="needs four classes at least, there are 3"):
            robust.autoattack_accuracies(classifier, [(x, classifier(x).argmax(dim=1))])

    def test_without_the_library_is_one_line(self, tmp_path, monkeypatch, capsys):
        real = builtins.__import__

        def missing(name, *rest):
            if name == "pyautoattack":
                raise ModuleNotFoundError(name=name)
            return real(name, *rest)

        config = resolve({"limit": 16, "image_size": 8, "batch_size": 8, "device": "cpu"})
        run = evaluate.RunFolder.create(tmp_path / "run", config)
        monkeypatch.setattr(builtins, "__import__", missing)
        assert evaluate.main([str(run.path), "--autoattack"]) == 2
        assert capsys.readouterr().err == (
            "error: autoattack needs pyautoattack, which is not installed: "
            "pip install 'clae_fast[robust]'\n"
        )
