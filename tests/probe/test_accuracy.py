"""Shares, their interval, and what is held back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maefast.probe.accuracy import Accuracy, accuracy, majority, split


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 10), (950, 1000), (1, 1)])
def test_the_interval_is_wilsons(hits, count):
    """Its ends are the shares p that lie 1.96 of their own standard deviations from what was found."""
    found = Accuracy(hits, count)
    for end in found.interval:
        assert abs(found.value - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert low < high


def test_a_published_interval():
    """Newcombe (1998), table I: 81 of 263 and 15 of 148."""
    assert Accuracy(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Accuracy(15, 148).interval == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_shares():
    assert accuracy(np.array([1, 2, 3]), np.array([1, 2, 0])) == Accuracy(2, 3)
    assert majority(np.array([0, 2, 2]), np.array([2, 0, 2, 1])) == Accuracy(2, 4)
    assert Accuracy(2, 3).to_dict()["accuracy"] == 2 / 3


def test_what_is_held_back():
    labels = np.array([0] * 10 + [1] * 2 + [2] + [3] * 100)
    train, test = split(labels, 0.2, seed=3)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert np.bincount(labels[test], minlength=4).tolist() == [2, 1, 0, 20]
    again = split(labels, 0.2, seed=3)
    assert all(np.array_equal(one, two) for one, two in zip((train, test), again))
    assert not np.array_equal(test, split(labels, 0.2, seed=4)[1])
    assert np.bincount(labels[split(labels, 0.99, 0)[0]]).tolist() == [1, 1, 1, 1]  # never all of a class
    assert len(split(np.arange(5), 0.5, 0)[1]) == 0
