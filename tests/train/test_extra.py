"""Whether the other tests of this folder were collected."""

from __future__ import annotations

import importlib

import pytest

from tests.train.conftest import MISSING, NEEDED


def test_the_training_extra_is_installed():
    if MISSING:
        pytest.skip(f"tests/train needs maefast[train]; missing: {', '.join(MISSING)}")
    for name in NEEDED:
        importlib.import_module(name)
