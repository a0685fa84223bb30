"""Runs the kernel tests of this folder in Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.support import INTERPRET

FOLDER = Path(__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("test_*_kernels.py"))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is the process that test_interpreter.py starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file, capfd):
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-q", "-x", "-p", "no:cacheprovider", "--color=no"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=env, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    with capfd.disabled():
        print(f"[interpreter: {file}] {summary}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed.group(1)) > 0
    assert "skipped" not in summary
