"""k-NN against its definition, the linear probe against its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast.probe.knn import knn
from maefast.probe.linear import DECAYS, linear_probe


def plain_knn(train, labels, test, k, temperature):
    """One query after another, in float64."""
    found = []
    for query in test.astype(np.float64):
        cosine = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in train.astype(np.float64)]
        votes = np.zeros(labels.max() + 1)
        for i in sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        found.append(votes.argmax())
    return np.array(found)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.07)])
def test_knn_is_its_definition(k, temperature):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 7)).astype(np.float32), rng.normal(size=(40, 7)).astype(np.float32)
    labels = rng.integers(0, 4, 60)
    found = knn(torch.from_numpy(train), labels, torch.from_numpy(test), k, temperature)
    assert np.array_equal(found, plain_knn(train, labels, test, min(k, 60), temperature))


def test_knn_in_chunks_and_by_direction_alone():
    rng = np.random.default_rng(1)
    train, test = torch.from_numpy(rng.normal(size=(50, 5))), torch.from_numpy(rng.normal(size=(1500, 5)))
    labels = rng.integers(0, 3, 50)
    whole = knn(train, labels, test)
    assert np.array_equal(np.concatenate([knn(train, labels, part) for part in test.split(700)]), whole)
    scale = torch.from_numpy(rng.uniform(0.1, 10, (1500, 1)))
    assert np.array_equal(knn(train * 3, labels, test * scale), whole)
    assert len(knn(train, labels, test[:0])) == 0


def test_the_linear_probe_minimises_what_it_says(monkeypatch):
    from maefast.probe import linear

    solvers, fitted = [], linear._fitted
    monkeypatch.setattr(linear, "_fitted", lambda *how: solvers.append((how, fitted(*how))) or solvers[-1][1])
    rng = np.random.default_rng(2)
    train, labels = torch.from_numpy(rng.normal(3, 5, (90, 4))), rng.integers(0, 3, 90)
    found = linear_probe(train, labels, train, decays=(0.1,))
    features, _, decay, _ = solvers[-1][0]
    assert features.mean(0) == pytest.approx(np.zeros(4), abs=1e-9)
    assert features.std(0) == pytest.approx(np.ones(4))
    solver = solvers[-1][1][0]
    weight, bias = (torch.from_numpy(part).requires_grad_() for part in (solver.coef_, solver.intercept_))
    scores = torch.from_numpy(features) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels)) + decay / 2 * weight.square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-3
    assert float(bias.grad.abs().max()) < 1e-3
    assert found.converged


def test_the_linear_probe_separates_and_chooses():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 300)
    features = torch.from_numpy(rng.normal(size=(300, 6)) + 8 * np.eye(6)[labels])
    features = torch.cat([features, torch.full((300, 1), 7.0, dtype=torch.float64)], 1)  # a constant
    found = linear_probe(features[:200], labels[:200], features[200:], seed=1)
    assert (found.found == labels[200:]).mean() > 0.98
    tried = [decay for decay, _ in found.grid]
    assert tried == sorted(DECAYS, reverse=True)[: len(tried)]
    best = max(accuracy for _, accuracy in found.grid)
    assert found.weight_decay == next(decay for decay, accuracy in found.grid if accuracy == best)  # the strongest
    worse = [accuracy < best for _, accuracy in found.grid]
    assert len(tried) == len(DECAYS) or worse[-2:] == [True, True]
    assert [True, True] not in [worse[i : i + 2] for i in range(worse.index(False), len(worse) - 2)]
    again = linear_probe(features[:200], labels[:200], features[200:], seed=1)
    assert np.array_equal(found.found, again.found)
    assert found.grid == again.grid


def test_the_linear_probe_with_a_sample_a_class():
    features = torch.eye(3)
    found = linear_probe(features, np.arange(3), features)
    assert found.found.tolist() == [0, 1, 2]
    assert found.grid == [(found.weight_decay, None)]
