"""`maefast profile`."""

# ruff: noqa: E402 (skipped before the imports that need the extra)

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

for package in ("typer", "accelerate", "PIL", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(package, reason="the command line's tests need maefast[train]")

from typer.testing import CliRunner

from maefast import cli
from tests.train.common import TINY, write_photos

MODEL = [f"--model-arg={name}={value}" for name, value in TINY.items()]
SMALL = ["--model", "mae", *MODEL, "--img-size", "16", "--patch-size", "4", "--device", "cpu", "--batch-size", "2"]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["profile", *map(str, arguments)])


def test_a_model_on_files(tmp_path):
    photos = write_photos(tmp_path / "photos")
    out, trace = tmp_path / "found.json", tmp_path / "trace.json"
    result = run("--data", photos, *SMALL, "--workers", 0, "--steps", 2, "--json", out, "--trace", trace)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    names = [stage["name"] for stage in found["stages"]]
    assert names[0] == "data"
    for name in ("mask", "embed", "encoder attention", "restore", "decoder MLP", "loss", "optimizer"):
        assert name in names
        assert name in result.output
    assert sum(stage["seconds"] for stage in found["stages"]) == pytest.approx(found["seconds"])
    assert result.output.splitlines()[0] == found["machine"]
    assert result.output.count(found["machine"]) == 1
    assert found["advice"]["sentence"] in result.output.replace("\n", " ")
    assert json.loads(trace.read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "photos", "trace.json"]


def test_a_recipe_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"points": 64, "groups": 8, "group_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
             "decoder_depth": 1, "decoder_num_heads": 2}  # fmt: skip
    arguments = [f"--model-arg={name}={value}" for name, value in small.items()]
    result = run("--recipe", "point_mae", *arguments, "--steps", 1, "--batch-size", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "one batch of 2 clouds of analytic shapes, kept" in result.output
    rows = [line.split()[0] for line in result.output.splitlines() if line.strip()]
    assert "prepare" in rows
    assert "data" not in rows
    assert not list(tmp_path.iterdir())


def test_the_table_is_shown_before_a_file_fails(tmp_path, monkeypatch):
    report = SimpleNamespace(show=lambda heading: print("the table"), json=lambda: "{}")
    monkeypatch.setattr("maefast.train.profiling.profile_run", lambda *given: report)
    monkeypatch.setattr("maefast.train.parse.must_be_file", lambda *given: None)
    result = run("--json", tmp_path)
    assert result.exit_code == 1
    assert "the table" in result.output
    assert f"error: {tmp_path}: Is a directory" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--trace", "nowhere/step.json"], "--trace nowhere/step.json: there is no such folder"),
        (["--json", "nowhere/step.json"], "--json nowhere/step.json: there is no such folder"),
        (["--trace", "."], "--trace . is a folder; give the name of a file"),
        (["--json", "."], "--json . is a folder; give the name of a file"),
        (["--data", "nowhere"], "nowhere"),
        (["--recipe", "nothing"], "unknown recipe 'nothing'"),
    ],
)
def test_bad_options(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*([] if "--recipe" in arguments else SMALL), *arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
