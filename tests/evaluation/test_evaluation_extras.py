"""Fine-tuning, susceptibility and the released protocol."""

import pytest
import torch
from clusters import clusters
from torch import nn
from torch.nn import functional as F

from clae_fast import data
from clae_fast.config.layers import resolve
from clae_fast.evaluation import accuracy, finetune, knn_accuracy, released
from clae_fast.evaluation.released import released_protocol
from clae_fast.evaluation.susceptibility import susceptibility
from clae_fast.nn import Encoder
from clae_fast.training.build import build_attack
from clae_fast.training.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**settings):
    given = {"limit": 60, "image_size": 8, "batch_size": 16, "device": "cpu"}
    return resolve(given | settings)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(tiny())


class TestStratified:
    @pytest.mark.parametrize("size", [14, 100, 719])
    def test_has_the_same_share_of_each_class(self, size):
        labels = data.load("digits").labeled.labels
        counts = labels[data.stratified(labels, size, 0)].bincount()
        assert counts.sum() == size
        share = labels.bincount() * size / len(labels)
        assert (counts - share).abs().max() < 1
        assert counts.min() >= 1

    def test_the_seed_decides_which(self):
        labels = torch.arange(3).repeat(20)
        first, again, other = (data.stratified(labels, 6, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestFinetune:
    def test_trains_a_copy_on_a_part_of_the_labels(self, trainer, monkeypatch):
        parts = []
        train = finetune._finetuned

        def spy(encoder, part, epochs, *rest):
            parts.append((part, epochs))
            return train(encoder, part, 2, *rest)

        monkeypatch.setattr(finetune, "_finetuned", spy)
        encoder = trainer.method.encoder
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        found = finetune.finetune_accuracies(
            encoder, trainer.splits, trainer.config, trainer.device
        )
        assert found.keys() == {"0.01", "0.1"}
        assert all(0 <= accuracy <= 100 for accuracy in found.values())
        # one of each class at least
        assert [(len(part), epochs) for part, epochs in parts] == [(10, 60), (10, 30)]
        assert set(parts[0][0].rows.tolist()) <= set(trainer.labeled.rows.tolist())
        assert all(torch.equal(before[n], t) for n, t in encoder.state_dict().items())

    def test_moves_the_whole_encoder_and_learns(self, trainer):
        encoder, config = trainer.method.encoder, trainer.config
        classifier = finetune._finetuned(encoder, trainer.labeled, 12, config, trainer.device)
        assert not classifier.training
        pairs = zip(classifier[0].parameters(), encoder.backbone.parameters(), strict=True)
        assert all(not torch.equal(tuned, weight) for tuned, weight in pairs)
        x = torch.stack([data.eval_transform(8)(image) for image in trainer.labeled])
        labels = trainer.labeled.labels
        assert accuracy(classifier, x, labels) > 80

    def test_repeats(self, trainer):
        encoder, config = trainer.method.encoder, trainer.config
        first, again = (
            finetune._finetuned(encoder, trainer.labeled, 1, config, trainer.device)[1].weight
            for _ in range(2)
        )
        assert torch.equal(first, again)


class TestSusceptibility:
    def measure(self, trainer, **settings):
        config = tiny(**settings)
        encoder = trainer.method.encoder
        return susceptibility(encoder, trainer.test, config, trainer.device, build_attack(config))

    @pytest.mark.parametrize(
        "settings",
        [{}, {"attack": "self"}, {"attack": "none"}, {"eps_space": "normalized"}],
    )
    def test_the_attack_moves_further_than_noise(self, trainer, settings):
        found = self.measure(trainer, **settings)
        assert -1 <= found["cosine_attacked"] < found["cosine_random"] < 1
        assert found == self.measure(trainer, **settings)

    def test_more_steps_move_further(self, trainer):
        course = {"attack_steps": 5, "step_size": 0.02, "attack_start": "random"}
        once, often = self.measure(trainer), self.measure(trainer, **course)
        assert often["cosine_attacked"] < once["cosine_attacked"]
        # noise goes the whole way, however long a step of the attack is
        assert often["cosine_random"] == pytest.approx(once["cosine_random"], abs=0.02)

    def test_nothing_moves_without_a_radius(self, trainer):
        found = self.measure(trainer, eps=0.0)
        assert found == pytest.approx({"cosine_attacked": 1.0, "cosine_random": 1.0})


class TestReleased:
    @pytest.fixture
    def encoder(self):
        return Encoder(nn.Identity(), nn.Linear(8, 3))

    @pytest.mark.parametrize(
        ("method", "sigma", "batch_size"), [("simclr", 0.5, 256), ("plain", 0.1, 128)]
    )
    def test_is_that_of_the_code(self, encoder, method, sigma, batch_size, monkeypatch):
        train, test = clusters(100, 0.3, seed=0), clusters(100, 0.3, seed=1)
        seen = {}

        def regression(train, test, batch_size, epochs):
            seen.update(train=train, test=test, batch_size=batch_size, epochs=epochs)
            return [50.0, 70.0, 70.0, 60.0]

        monkeypatch.setattr(released, "_regression", regression)
        found = released_protocol(encoder, tiny(method=method), train, test)
        with torch.no_grad():
            z = [F.normalize(encoder.head(h)) for h, _ in (train, test)]
        vote = knn_accuracy(z[0], train[1], z[1], test[1], k=200, sigma=sigma)
        kept = 400 // batch_size * batch_size
        assert found == {
            "knn": vote,
            "linear_selected_on_test": 70.0,
            "linear_last_epoch": 60.0,
            "best_epoch": 2,
            "test_images": kept,
        }
        assert (seen["batch_size"], seen["epochs"]) == (batch_size, 1000)
        expected = (train[0], test[0]) if method == "simclr" else z
        torch.testing.assert_close(seen["train"][0], expected[0])
        torch.testing.assert_close(seen["test"][0], expected[1][:kept])

    def test_tiny_imagenet_has_fewer_epochs(self, encoder, monkeypatch):
        seen = []
        monkeypatch.setattr(released, "_regression", lambda *given: seen.append(given[-1]) or [1.0])
        sets = clusters(10, 0.3, seed=0), clusters(10, 0.3, seed=1)
        for method in ("simclr", "uel"):
            config = tiny(method=method).replace(dataset="tiny_imagenet")
            assert released_protocol(encoder, config, *sets)["test_images"] == 40
        assert seen == [1000, 200]

    def test_regression_learns(self, encoder):
        sets = clusters(300, 0.1, seed=0), clusters(40, 0.1, seed=1)
        sets = [(F.normalize(h), labels) for h, labels in sets]
        found = released_protocol(encoder, tiny(), *sets, epochs=300)
        assert found["linear_selected_on_test"] >= found["linear_last_epoch"] > 90

    def test_regression_repeats_and_leaves_the_generator(self, encoder):
        sets = clusters(100, 0.3, seed=0), clusters(40, 0.3, seed=1)
        state = torch.get_rng_state()
        first, again = (released_protocol(encoder, tiny(), *sets, epochs=5) for _ in range(2))
        assert first == again
        assert torch.equal(torch.get_rng_state(), state)
