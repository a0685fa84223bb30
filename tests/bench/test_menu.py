"""`maefast bench`: every benchmark is there, is run as it was asked for, and says where its results are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("rich")

from maefast.bench import environment, menu
from maefast.bench.micro import suite
from maefast.bench.peers import dropin_models
from maefast.errors import TrainError


@pytest.fixture
def runs(monkeypatch):
    """The processes that would have been started."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(menu, "_process", lambda module, arguments: found.append((module, arguments)) or 0)
    return found


def test_every_family_of_ops_is_in_the_menu():
    assert sorted([*menu.TOKENS, *menu.CELLS, "attention"]) == sorted(suite.FAMILIES)


def test_every_family_of_models_is_in_the_menu():
    assert sorted(menu.FAMILIES) == sorted(dropin_models.families())


def test_every_benchmark_is_in_the_menu():
    folder = environment.HERE
    modules = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    modules |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert modules == {item.module for item in (*menu.BENCHMARKS.values(), *menu.TOOLS.values())}


def test_the_list_fits_a_screen():
    lines = list(menu.listing())
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 110


def test_quick_is_the_default_and_results_have_a_place(runs, capsys):
    assert menu.run("step", [], print) == 0
    assert runs == [("step", ["--preset", "demo", "--results", os.path.join("out", "bench")])]
    assert environment.cpu_model() in capsys.readouterr().out


def test_what_is_typed_wins_and_nothing_runs_twice(runs):
    menu.run("step", ["--full", "--dtype", "bfloat16", "--results", "here"], print)
    given = [arguments for _, arguments in runs]
    assert ["--preset", "vit_b", "--compile", "--dtype", "bfloat16", "--results", "here"] in given
    assert len({tuple(arguments) for arguments in given}) == len(given) == len(menu.BENCHMARKS["step"].full) - 1


@pytest.mark.parametrize("typed", [["--preset", "full"], ["--preset=full"], ["--full"]])
def test_a_typed_size_is_what_runs(runs, typed):
    """And with the peers of that size: the quick form leaves the compiled ones out."""
    menu.run("ops", typed, print)
    menu.run("ops", ["--preset", "toy"], print)
    (_, full), (_, toy) = runs
    for arguments in (full, toy):
        assert "--quick" not in arguments
        assert sum("--preset" in word for word in arguments) == 1
    assert "full" in full[full.index("--preset") + 1] if "--preset" in full else "--preset=full" in full
    assert ("--no-compile" in full, "--no-compile" in toy) == (False, True)
    assert toy[toy.index("--preset") + 1] == "toy"


def test_a_compiled_peer_that_is_typed_is_timed(runs):
    menu.run("ops", ["--peers", "eager", "compile"], print)
    assert "--no-compile" not in runs[0][1]


def test_ops_of_two_sizes_are_refused(runs):
    with pytest.raises(TrainError, match="not both"):
        menu.run("ops", ["--quick", "--preset", "full"], print)
    assert not runs


def test_a_stopped_run_is_no_success_and_the_last(monkeypatch):
    def stopped(module, arguments):
        raise KeyboardInterrupt

    said = []
    monkeypatch.setattr(menu, "_process", stopped)
    assert menu.run("all", [], said.append) == 130
    assert "stopped" in said[-1]


def test_all_runs_every_one(runs):
    menu.run("all", ["--quick"], print)
    assert [module for module, _ in runs] == [item.module for item in menu.BENCHMARKS.values() for _ in item.quick]


def test_a_failure_is_the_exit_status(monkeypatch):
    statuses = iter([0, 4, 0, *[0] * 50])
    monkeypatch.setattr(menu, "_process", lambda module, arguments: next(statuses))
    assert menu.run("all", [], lambda text: None) == 4


def test_bad_names_and_options(runs):
    with pytest.raises(TrainError, match="no benchmark 'nothing'"):
        menu.run("nothing", [], print)
    with pytest.raises(TrainError, match="not both"):
        menu.run("step", ["--quick", "--full"], print)
    assert not runs


def test_tools_are_run_as_they_are(runs):
    menu.run("compare", ["a", "b"], print)
    menu.run("step", ["--help"], print)
    assert runs == [("compare", ["a", "b"]), ("step", ["--help"])]


def test_from_any_folder(tmp_path):
    """The command itself, where no checkout is: it measures, and says where its results are."""
    command = [sys.executable, "-m", "maefast.cli", "bench", "ops", "--family", "mask", "--rounds", "1"]
    command += ["--dtype", "float32", "--peers", "eager"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert environment.cpu_model() in lines[0]
    assert lines[-1].startswith("results: ")
    doc = json.loads((tmp_path / lines[-1].removeprefix("results: ")).read_text())
    assert {record["op"] for record in doc["records"]} == {"token_mask"}
    assert doc["settings"]["machine"]["copy_gb_s"] > 0
    (record,) = (r for r in doc["records"] if r.get("default"))
    assert record["limit"] == "memory"
    assert record["limit_share"] > 0
    assert len(record["samples_s"]) == 1
