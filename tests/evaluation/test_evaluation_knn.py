import pytest
import torch
from clusters import clusters

from clae_fast.evaluation import knn_accuracy, leave_one_out_knn


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


def test_leave_one_out_is_a_vote_of_the_others():
    features, labels = torch.randn(60, 5), torch.arange(60) % 3
    right = [
        knn_accuracy(features[rest], labels[rest], features[[i]], labels[[i]], k=1)
        for i in range(60)
        for rest in [torch.arange(60) != i]
    ]
    assert leave_one_out_knn(features, labels) == pytest.approx(sum(right) / 60)
