"""bench/gpu_check.sh without a GPU: the plan, the exit statuses, what is needed. The stages: test_gpu_stages.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")

from maefast.bench.environment import ROOT
from maefast.bench.gpu import lines

SCRIPT = ROOT / "bench" / "gpu_check.sh"
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("bash", "cmake", "c++", "nvcc")), reason="needs nvcc, cmake and c++"
)


def run(*arguments: str, out, **env) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), **env}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@needs_tools
def test_dry_run(tmp_path):
    done = run("--dry-run", out=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in lines.STAGES:
        assert f"  {stage} " in done.stdout
    assert "_C _cpu _cuda compiled" in done.stdout
    assert not list(tmp_path.iterdir())


@needs_tools
def test_dry_run_of_some_stages(tmp_path):
    done = run("speed", "build", "--dry-run", out=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = done.stdout.partition("plan,")[2]
    assert plan.index("  build ") < plan.index("  speed ")
    assert "  smoke " not in plan


@needs_tools
@pytest.mark.parametrize("given", ["--libraries", "MAEFAST_CHECK_LIBRARIES"])
def test_libraries_that_are_brought_along_are_not_compiled(tmp_path, given):
    libraries, out = tmp_path / "libraries", tmp_path / "out"
    libraries.mkdir()
    for name in ("_cpu.so", "_cuda.so"):
        (libraries / name).touch()
    arguments = (given, str(libraries)) if given.startswith("--") else ()
    env = {} if arguments else {given: str(libraries)}
    done = run("--dry-run", *arguments, out=out, **env)
    assert done.returncode == 0, done.stderr
    assert "_C compiled" in done.stdout


@needs_tools
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tmp_path):
    done = run(out=tmp_path)
    assert done.returncode == 3
    assert "no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_prerequisites(tmp_path):
    done = run("--dry-run", out=tmp_path, PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python" in done.stderr
    done = run("--dry-run", "--libraries", str(tmp_path / "none"), out=tmp_path)
    assert done.returncode == 2
    assert "no such folder of libraries" in done.stderr
    done = run("--dry-run", "--lines", str(tmp_path / "none"), out=tmp_path)
    assert done.returncode == 2
    assert "no such file of results" in done.stderr


@pytest.mark.parametrize("argument", ["--what", "test"])
def test_unknown_argument(tmp_path, argument):
    assert run(argument, out=tmp_path).returncode == 2


def test_help_shows_the_head_of_the_script(tmp_path):
    done = run("--help", out=tmp_path)
    assert done.returncode == 0
    for part in ("--rehearse", "Exit status", "3 no GPU", "does not change the status."):
        assert part in done.stdout
    assert "set -uo" not in done.stdout


def test_the_rehearsal_has_the_same_stages(tmp_path):
    """The plan only: CI runs the rehearsal itself, as a step of its own."""
    pytest.importorskip("triton")
    done = run("--rehearse", "--dry-run", out=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = done.stdout.partition("plan,")[2]
    assert [row.split()[0] for row in plan.splitlines() if row.startswith("  ")] == list(lines.STAGES)
    assert plan.count("--rehearse") == 3
    assert "TRITON_INTERPRET=1" in plan
