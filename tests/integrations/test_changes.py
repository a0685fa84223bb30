"""Every family, changed in every usual way after `accelerate`: what is computed is what the same change makes of a twin
that was never accelerated."""

from __future__ import annotations

import warnings

import pytest
import torch

import maefast
from maefast import ops
from maefast.integrations._layouts import LAYOUTS
from tests.integrations import changes
from tests.integrations.changes import outcome
from tests.integrations.places import PLACES
from tests.integrations.sweep import alike

LAYOUT_OF_EACH = ("mae", "hf_vitmae", "hf_videomae", "hf_beit", "hf_dinov3", "hf_vjepa2")


def same(got: tuple, want: tuple) -> None:
    for a, b, what in zip(got[:2], want[:2], ("outputs", "what hooks saw")):
        assert alike(a, b, 1e-9), what
    assert got[2].keys() == want[2].keys()
    wrong = [name for name in want[2] if (got[2][name] is None) != (want[2][name] is None)]
    assert not wrong, f"gradient in one of the two only: {wrong}"
    assert alike(list(got[2].values()), list(want[2].values()), 1e-8), "gradients"
    assert torch.equal(got[3], want[3]), "random numbers"


@pytest.mark.parametrize(
    ("name", "change"), [pytest.param(name, change, id=f"{name}-{change.name}") for name, change in changes.cases()]
)
def test_changes(name, change, monkeypatch):
    """With blocks as one node; one family of each layout with blocks of separate ops too."""
    places, calls = PLACES[name], []
    node = ops.transformer_block
    monkeypatch.setattr(ops, "transformer_block", lambda *args, **kwargs: calls.append(1) or node(*args, **kwargs))
    for whole in (True, False)[: 1 + (name in LAYOUT_OF_EACH)]:
        family = places.family()
        model, fast = family.pair(torch.float64)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for layout in LAYOUTS * (not whole):
                patch.setattr(layout, "whole", staticmethod(lambda block, *positions: None))
            calls.clear()
            same(outcome(family, fast), outcome(family, model))
            assert bool(calls) is (whole and places.whole)
            seen = [change.apply(net, places, family) for net in (fast, model)]
            found = [outcome(family, net, change.how, looked) for net, looked in zip((fast, model), seen)]
            silent = change.name == "hook on queries" and not places.called
            assert seen[0] is None or bool(found[1][1]) is not silent, "no hook was called"
            same(*found)
            assert "maefast.accelerate: " in str(maefast.report(fast))


def test_the_table_can_fail(monkeypatch):
    """A model that takes no notice of a change is found out."""
    places = PLACES["mae"]
    family = places.family()
    model, fast = family.pair(torch.float64)
    changes.other_norm(model, places, family)
    with pytest.raises(AssertionError, match="outputs"):
        same(outcome(family, fast), outcome(family, model))
