"""Every kernel compiles for every supported GPU generation, without spilling registers, and docs/kernels.md says what
it takes; see compile_all.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.support import INTERPRET


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="interpreted kernels cannot be compiled")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_without_a_gpu(capfd):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_all", "--check", "--no-nvcc"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    with capfd.disabled():
        print(f"[compile] {lines[-1] if lines else done.stderr}")
    problems = "\n".join(line for line in lines if "<--" in line or "kernels.md" in line)
    assert done.returncode == 0, problems + done.stderr[-4000:]
    assert not any("no cuobjdump" in line for line in lines), "registers and spills were not checked"
