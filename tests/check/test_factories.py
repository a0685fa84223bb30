"""From MODULE:NAME to a model; what goes wrong is said in one line."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from maefast.check import factories
from maefast.errors import ConfigError


def test_a_module_and_a_file_are_the_same(users):
    function = factories.load(f"{users.removesuffix('.py')}:mae")
    assert factories.load(f"{users}:mae") is function
    assert isinstance(factories.model(function, "mae"), nn.Module)


def test_a_file_elsewhere(users, tmp_path):
    """With what lies beside it."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "beside.py").write_text("VALUE = 3")
    (tmp_path / "below" / "another.py").write_text("import beside\n\ndef number():\n    return beside.VALUE\n")
    try:
        assert factories.load("below/another.py:number")() == 3
    finally:
        sys.modules.pop("beside", None)


def test_a_class(users):
    assert factories.load("torch.nn:Identity") is nn.Identity
    assert factories.load("torch:nn.Identity") is nn.Identity


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mae", "'mae' is not MODULE:NAME or FILE.py:NAME"),
        ("a_users_models.py:", "is not MODULE:NAME"),
        ("nowhere:build", "there is no module 'nowhere'"),
        ("nowhere.models:build", "there is no module 'nowhere.models'"),
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("a_users_models:mea", "a_users_models has no 'mea'; there are: "),
        ("a_users_models:model", "is one model, and two are compared: name a function that makes it"),
        ("a_users_models:SIZES", "is a dict, not a function or class"),
        ("a_users_models:wants", "wants arguments (size, depth)"),
        ("broken.py:build", "raised ModuleNotFoundError: No module named 'not_installed' (broken.py, line 2)"),
        ("wrong.py:build", "importing wrong.py raised RuntimeError: no (wrong.py, line 1)"),
        ("leaves.py:build", "importing leaves.py raised SystemExit: 0 (leaves.py, line 1)"),
        ("below/torch.py:build", "below/torch.py has the name of another module, "),
    ],
)  # fmt: skip
def test_wrong_names(users, tmp_path, spec, says):
    (tmp_path / "broken.py").write_text("import os\nimport not_installed\n")
    (tmp_path / "wrong.py").write_text("raise RuntimeError('no')")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "torch.py").write_text("build = 3")
    with pytest.raises(ConfigError) as error:
        factories.load(spec)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "raises raised ValueError: no such checkpoint (a_users_models.py, line "),
        ("leaves", "leaves raised SystemExit (a_users_models.py, line "),
        ("number", "number gives a int, not a torch.nn.Module"),
        ("meta", "on the meta device, without weights"),
        ("half_meta", "on the meta device, without weights"),
    ],
)
def test_no_model(users, name, says):
    with pytest.raises(ConfigError) as error:
        factories.model(factories.load(f"{users}:{name}"), name)
    assert says in str(error.value)
