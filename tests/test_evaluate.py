import json

import pytest
import torch

from clae_fast import data, evaluate
from clae_fast.config import resolve
from clae_fast.evaluate import extract_features, knn_accuracy, linear_accuracy
from clae_fast.run_folder import RunFolder
from clae_fast.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clusters(per_class, noise, seed):
    """Points around four directions in eight dimensions, at lengths from 1 to 100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(per_class)
    points = torch.eye(8)[labels] + noise * torch.randn(len(labels), 8, generator=generator)
    return points * torch.logspace(0, 2, len(labels)).unsqueeze(1), labels


class TestKnn:
    def test_equals_the_definition(self):
        train, train_labels = clusters(20, 0.5, seed=0)
        test, labels = clusters(10, 0.5, seed=1)
        correct = 0
        for h, label in zip(test, labels, strict=True):
            cos = torch.nn.functional.cosine_similarity(h.unsqueeze(0), train)
            votes = [0.0] * 4
            for row in cos.argsort(descending=True)[:7]:
                votes[train_labels[row]] += (cos[row] / 0.2).exp().item()
            correct += votes.index(max(votes)) == label
        expected = 100 * correct / len(labels)
        assert 50 < expected < 100
        found = knn_accuracy(train, train_labels, test, labels, k=7, sigma=0.2)
        assert found == pytest.approx(expected)

    def test_separate_clusters_are_all_right(self):
        sets = (*clusters(20, 0.01, seed=0), *clusters(10, 0.01, seed=1))
        assert knn_accuracy(*sets) == 100
        assert knn_accuracy(*sets, k=1000) == 100

    def test_small_temperatures_do_not_overflow(self):
        sets = (*clusters(20, 0.01, seed=0), *clusters(10, 0.01, seed=1))
        assert knn_accuracy(*sets, sigma=1e-4) == 100

    def test_more_queries_than_a_chunk(self):
        train, train_labels = clusters(20, 0.01, seed=0)
        test, labels = clusters(600, 0.01, seed=1)
        labels[-1] = 2  # one wrong answer, in the last chunk
        accuracy = knn_accuracy(train, train_labels, test, labels)
        assert accuracy == pytest.approx(100 * 2399 / 2400)


class TestLinear:
    def test_separable_features_are_all_right(self):
        train, test = clusters(20, 0.05, seed=0), clusters(10, 0.05, seed=1)
        unit = torch.nn.functional.normalize
        assert linear_accuracy(unit(train[0]), train[1], unit(test[0]), test[1]) == 100

    def test_scales_of_features_do_not_matter(self):
        train, test = clusters(20, 0.2, seed=0), clusters(10, 0.2, seed=1)
        scale = torch.logspace(-6, 6, 8)
        plain = linear_accuracy(*train, *test)
        scaled = linear_accuracy(train[0] * scale, train[1], test[0] * scale, test[1])
        assert plain == pytest.approx(scaled, abs=1)


TINY = {"limit": 32, "image_size": 8, "batch_size": 8, "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = resolve(TINY)
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config)
    Trainer(config).fit(run)
    return run


class TestRun:
    def test_writes_what_it_prints(self, folder, capsys):
        assert evaluate.main([str(folder.path)]) == 0
        results = json.loads((folder.path / "results.json").read_text())
        assert capsys.readouterr().out == (
            f"knn accuracy: {results['knn']:.1f} %\nlinear accuracy: {results['linear']:.1f} %\n"
        )
        assert results["step"] == 4
        assert all(0 <= results[name] <= 100 for name in ("knn", "linear"))

    def test_features_are_those_of_the_main_branch_in_eval_mode(self, folder):
        trainer = Trainer(folder.config)
        trainer.restore(folder)
        trainer.method.train()
        encoder = trainer.method.encoder
        device = torch.device("cpu")
        features, labels = extract_features(encoder, trainer.test, folder.config, device)
        assert torch.equal(labels, trainer.test.labels)
        assert not encoder.training
        transform = data.eval_transform(8)
        images = torch.stack([transform(trainer.test[i]) for i in range(32)])
        with torch.no_grad():
            torch.testing.assert_close(features, encoder.features(images))
            twin = trainer.method.adv_encoder.eval().features(images)
        assert not torch.allclose(features, twin)

    def test_a_second_evaluation_agrees(self, folder):
        assert evaluate.evaluate(folder) == evaluate.evaluate(folder)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (None, "is no run folder: it has no config.json"),
            ("config.json", "config.json: "),
            ("checkpoints/last.pt", "cannot read checkpoint"),
        ],
    )
    def test_bad_runs_are_one_line(self, folder, tmp_path, capsys, damage, message):
        if damage is not None:
            (tmp_path / "config.json").write_text((folder.path / "config.json").read_text())
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / damage).write_text("damaged")
        assert evaluate.main([str(tmp_path)]) == (1 if damage == "checkpoints/last.pt" else 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line

    def test_a_missing_argument_is_one_line(self, capsys):
        assert evaluate.main([]) == 2
        assert "RUN" in capsys.readouterr().err


def test_report_has_a_line_each():
    lines = "knn accuracy: 97.1 %\nlinear accuracy: 98.3 %"
    assert evaluate.report({"knn": 97.14, "linear": 98.26}) == lines
