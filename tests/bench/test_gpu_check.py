"""bench/gpu_check.sh without a GPU: the plan, the exit statuses, and the verdict."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")

from bench import gpu_summary, results
from bench.environment import ROOT
from tests.bench.common import micro_document

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
    for part in ("build", "tests", "micro", "step", "dropin"):
        assert f"  {part} " in done.stdout
    assert "-m gpu" in done.stdout
    assert not list(tmp_path.iterdir())


@needs_tools
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tmp_path):
    done = run(out=tmp_path)
    assert done.returncode == 3
    assert "no GPU here" in done.stderr


def test_missing_prerequisites(tmp_path):
    done = run("--dry-run", out=tmp_path, PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python" in done.stderr


def test_unknown_argument(tmp_path):
    assert run("--what", out=tmp_path).returncode == 2


def test_help_shows_the_head_of_the_script(tmp_path):
    done = run("--help", out=tmp_path)
    assert done.returncode == 0
    assert "Exit status" in done.stdout


GOOD = {"tests": 10, "failures": 0, "errors": 0, "skipped": 2}
FINE = {"build": "0", "tests": "0", "micro": "0", "step": "0", "dropin": "0"}


@pytest.mark.parametrize(
    ("parts", "tests", "wrong", "trouble"),
    [
        (FINE, GOOD, 0, 0),
        ({**FINE, "micro": "1", "step": "timeout"}, GOOD, 0, 2),
        ({**FINE, "step": "skipped"}, GOOD, 0, 1),
        ({**FINE, "micro": str(results.WRONG)}, GOOD, 1, 0),
        ({**FINE, "tests": "1"}, {**GOOD, "failures": 1}, 1, 0),
        ({**FINE, "tests": "timeout"}, {**GOOD, "tests": 0, "skipped": 0}, 1, 0),
        ({**FINE, "tests": "0"}, {**GOOD, "skipped": 10}, 1, 0),
        ({**FINE, "build": "1"}, GOOD, 1, 0),
    ],
)
def test_verdict(parts, tests, wrong, trouble):
    found = gpu_summary.verdict(parts, tests)
    assert (len(found[0]), len(found[1])) == (wrong, trouble), found


def test_summary(tmp_path, capsys):
    (tmp_path / "gpu_tests.xml").write_text(
        '<testsuites><testsuite tests="5" failures="0" errors="0" skipped="1"/></testsuites>'
    )
    results.write(tmp_path / "micro_cuda.json", micro_document(kind="cuda"))
    parts = ["build=0:30", "tests=0:100", "micro=0:40", "step=1:5"]
    assert gpu_summary.summarise([str(tmp_path), *parts]) == 0
    out = capsys.readouterr().out
    assert "3.00x eager" in out
    assert "tests: 5 run" in out
    assert "does not count" in out
    assert out.strip().endswith("CORRECTNESS HELD")
    assert (tmp_path / "gpu_check.json").exists()
    assert gpu_summary.summarise([str(tmp_path), "build=0:30", "tests=1:100"]) == 1
