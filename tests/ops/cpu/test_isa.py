"""The kernels of the lower instruction sets pass the same tests. The choice is made once a process, so each set runs
in a process of its own; the best one runs in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maefast import _native
from tests.budget import examples
from tests.ops.cpu.common import needs_cpu_ops

pytestmark = needs_cpu_ops
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_numerics_on(isa):
    order = list(_native.ISAS)
    if _native.C is None:
        pytest.skip("maefast._C, which tells the instruction set, is not built")
    if order.index(isa) > order.index(_native.C.supported_isa()):
        pytest.skip(f"this CPU has no {isa}")
    if isa == _native.C.current_isa():
        pytest.skip(f"{isa} is what the other tests of this process run on")
    env = {**os.environ, "MAEFAST_CPU_ISA": isa, "MAEFAST_TEST_EXAMPLES": str(examples(6, 15))}
    files = [
        str(Path(__file__).with_name(name))
        for name in ("test_numerics.py", "test_threads.py", "test_gelu.py", "test_sparse_conv.py", "test_adamw.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout  # test_instruction_set, above all, did run
