import pytest
import torch
from clusters import clusters
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize

from clae_fast.evaluation import accuracy, fit_linear, linear, linear_accuracy


def unit_clusters(per_class, noise, seed):
    points, labels = clusters(per_class, noise, seed)
    return normalize(points), labels


class TestFit:
    @pytest.mark.parametrize("penalty", [1e-1, 1e-3])
    def test_is_scikit_learns_logistic_regression(self, penalty):
        features, labels = unit_clusters(30, 0.5, seed=0)
        # as the one of a ReLU that never fires, and one far from zero
        features[:, 5] = 0.3
        features[:, 6] += 100
        (probe,) = linear._path(features, labels, 4, (penalty,))
        scaler = StandardScaler().fit(features.double())
        reference = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=1000)
        reference.fit(scaler.transform(features.double()), labels)
        expected = reference.predict_proba(scaler.transform(features.double()))
        found = probe(features).softmax(dim=1)
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=2e-3, rtol=0)

    def test_one_path_ends_where_separate_fits_do(self):
        features, labels = unit_clusters(30, 0.5, seed=0)
        path = linear._path(features, labels, 4, (1e-1, 1e-2, 1e-3))
        (alone,) = linear._path(features, labels, 4, (1e-3,))
        found, expected = (probe(features).softmax(dim=1) for probe in (path[-1], alone))
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)

    def test_two_classes(self):
        features, labels = unit_clusters(30, 0.1, seed=0)
        probe = fit_linear(features[labels < 2], labels[labels < 2])
        assert probe.out_features == 2
        assert accuracy(probe, features[labels < 2], labels[labels < 2]) == 100


class TestPenalty:
    @pytest.fixture
    def fits(self, monkeypatch):
        """The features, labels and penalties of each path that is fitted."""
        fitted, path = [], linear._path

        def spy(features, labels, classes, penalties):
            fitted.append((features, labels, penalties))
            return path(features, labels, classes, penalties)

        monkeypatch.setattr(linear, "_path", spy)
        return fitted

    def test_is_chosen_on_images_that_are_not_fitted_on(self, fits):
        features, labels = unit_clusters(25, 0.5, seed=0)
        fit_linear(features, labels, seed=3)
        (some, some_labels, tried), (every, _, chosen) = fits
        assert len(some) == 90
        assert some_labels.bincount().max() - some_labels.bincount().min() <= 1
        assert tried == linear.PENALTIES
        assert torch.equal(every, features)
        assert chosen == tried[: len(chosen)]

    def test_noise_wants_a_strong_one_and_separate_classes_a_weak_one(self, fits):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(200, 40, generator=generator)
        fit_linear(noise, torch.randint(4, (200,), generator=generator))
        fit_linear(*unit_clusters(50, 0.05, seed=0))
        assert fits[1][2] == linear.PENALTIES[:1]
        assert fits[3][2] == linear.PENALTIES

    def test_the_seed_decides_which(self):
        features, labels = unit_clusters(25, 0.5, seed=0)
        first, again = (fit_linear(features, labels, seed=1).weight for _ in range(2))
        assert torch.equal(first, again)


class TestAccuracy:
    def test_separable_features_are_all_right(self):
        sets = (*unit_clusters(20, 0.05, seed=0), *unit_clusters(10, 0.05, seed=1))
        assert linear_accuracy(*sets) == 100

    def test_scales_of_features_do_not_matter(self):
        train, test = clusters(20, 0.2, seed=0), clusters(10, 0.2, seed=1)
        scale = torch.logspace(-6, 6, 8)
        plain = linear_accuracy(*train, *test)
        scaled = linear_accuracy(train[0] * scale, train[1], test[0] * scale, test[1])
        assert plain == pytest.approx(scaled, abs=1)

    def test_a_class_that_training_lacks_is_wrong(self):
        train, (test, labels) = unit_clusters(20, 0.05, seed=0), unit_clusters(10, 0.05, seed=1)
        seen = train[1] < 3
        assert linear_accuracy(train[0][seen], train[1][seen], test, labels) == 75
