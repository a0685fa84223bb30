"""How two steps are timed, by a clock that only the steps move: what the real one shows is not the same twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from maefast.check import speed


class Clock:
    def __init__(self):
        self.now, self.ran = 100.0, []

    def perf_counter(self) -> float:
        return self.now

    def step(self, name: str, *seconds: float):
        """It takes these, one after another, then always the last of them."""
        left = list(seconds)

        def run():
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(speed, "peak", lambda step, model, device: model.bytes)
    return clock


def measured(steps, seconds: float) -> speed.Speed:
    models = nn.Identity(), nn.Identity()
    models[0].bytes, models[1].bytes = 300, 200
    return speed.measure(steps, models, seconds, "cpu")


def test_medians_ratios_and_quartiles(clock):
    """The first two calls of each are not counted; the ratio is of each round, not of the medians."""
    own = clock.step("own", 9.0, 9.0, 6.0, 8.0, 1.0)
    fast = clock.step("fast", 9.0, 9.0, 2.0, 4.0, 1.0)
    found = measured((own, fast), seconds=0.0)
    assert found.seconds == pytest.approx((6.0, 2.0))
    assert found.ratio == pytest.approx(2.0)  # of 3, 2 and 1
    assert found.spread == pytest.approx((1.5, 2.5))
    assert (found.rounds, found.memory) == (3, (300, 200))


def test_the_order_changes_from_round_to_round(clock):
    measured((clock.step("own", 1.0), clock.step("fast", 1.0)), seconds=0.0)
    assert clock.ran[4:] == ["own", "fast", "fast", "own", "own", "fast"]


def test_no_round_starts_after_the_time(clock):
    assert measured((clock.step("own", 2.0), clock.step("fast", 1.0)), seconds=14.0).rounds == 5


def test_quick_steps_are_repeated(clock):
    """A sample is as many calls of each as take the quicker one 0.02 s, and its time is of one call."""
    found = measured((clock.step("own", 0.01), clock.step("fast", 0.005)), seconds=0.0)
    assert found.seconds == pytest.approx((0.01, 0.005))
    assert len(clock.ran) == 4 + 3 * 2 * 4
