from __future__ import annotations

import sys

import pytest

from maefast.integrations import _worth
from tests.check.users import TEXT

NAME = "a_users_models"


@pytest.fixture
def users(tmp_path, monkeypatch):
    """The current folder holds the file; afterwards Python knows nothing of it."""
    (tmp_path / f"{NAME}.py").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield f"{NAME}.py"
    for name in [NAME, "another"]:
        sys.modules.pop(name, None)


@pytest.fixture
def always():
    """However small the model is, what is replaced runs."""
    with _worth.always():
        yield
