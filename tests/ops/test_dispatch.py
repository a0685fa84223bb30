"""The backend choice: automatic, forced, per call; a forced backend never falls back in silence."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maefast
from maefast.ops import _dispatch, _registry, token_mask

CPU_READY = "token_mask" in _dispatch.CPU_OPS


def test_every_raw_op_has_a_fake_and_a_family():
    assert set(_registry.FAMILY_OF) == set(_registry.SCHEMAS)
    for op in _registry.SCHEMAS:
        for namespace in ("maefast", "maefast_triton"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", "Meta")
        gpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"maefast_triton::{op}", "CUDA")
        assert gpu != (_registry.FAMILY_OF[op] in _registry.CPU_ONLY)
        if _registry.FAMILY_OF[op] in _registry.TRITON_ONLY:
            assert not _registry.has_kernel(op, "CPU")
            assert not _registry.has_kernel(op, "CUDA")


def test_importing_the_ops_registers_every_family():
    ops = Path(_dispatch.__file__).parent
    written = re.compile(r'^_raw_op = _registry\.family\("(\w+)"', re.MULTILINE)
    names = [name for file in ops.glob("*.py") for name in written.findall(file.read_text())]
    assert sorted(names) == sorted(_registry.FAMILIES)
    assert all((ops / f"{family}.py").exists() for family in _registry.FAMILIES)
    assert all(_registry.FAMILIES.values())


@pytest.mark.skipif(not CPU_READY, reason="the C++ kernels are not built")
def test_cpp_serves_every_op_on_a_cpu():
    triton_only = {op for op, family in _registry.FAMILY_OF.items() if family in _registry.TRITON_ONLY}
    assert set(_registry.SCHEMAS) - triton_only == _dispatch.CPU_OPS
    for op in _dispatch.PUBLIC_OPS:
        assert _dispatch.why(op, "cpu")[0] == "cpu"


def test_context_forces_and_restores():
    before = _dispatch._forced
    with maefast.backend("reference"):
        assert _dispatch.choose("token_mask", "cpu", torch.float32) == "reference"
        with maefast.backend("auto"):
            assert _dispatch.choose("token_mask", "cpu", torch.float32) == ("cpu" if CPU_READY else "reference")
        assert _dispatch.choose("token_mask", "cpu", torch.float32) == "reference"
    assert _dispatch._forced is before
    with pytest.raises(ZeroDivisionError), maefast.backend("reference"):
        1 / 0  # noqa: B018
    assert _dispatch._forced is before
    with pytest.raises(ValueError, match="unknown backend 'metal'"), maefast.backend("metal"):
        pass


def test_forced_backend_raises_instead_of_falling_back():
    with maefast.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for"):
        token_mask(torch.rand(2, 4), 1)
    with pytest.raises(RuntimeError, match="'triton' was asked for"):
        token_mask(torch.rand(2, 4, dtype=torch.float64), 1, backend="triton")


def test_cuda_kernels_wait_for_evidence():
    """What was only compiled is never chosen automatically."""
    for op in _registry.SCHEMAS:
        if op not in _dispatch.CUDA_EVIDENCE:
            assert _dispatch.choose(op, "cuda", torch.float32) != "cuda"


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("tpu", "unknown backend 'tpu'")])
def test_environment_variable(value, expected):
    code = (
        "import torch; from maefast.ops import _dispatch; print(_dispatch.choose('token_mask', 'cpu', torch.float32))"
    )
    env = {**os.environ, "MAEFAST_BACKEND": value}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr


def test_sizes_beyond_triton_go_to_the_reference():
    assert _dispatch.choose("token_mask", "cuda", torch.float32, None, False) == "reference"
    with pytest.raises(RuntimeError, match="asked for"):
        _dispatch.choose("token_mask", "cuda", torch.float32, "triton", False)


@pytest.mark.skipif(not _dispatch.HAS_TRITON, reason="Triton is not installed")
def test_size_limits_are_those_of_the_kernels():
    from maefast.kernels.loss import MAX_PATCH
    from maefast.kernels.mask import MAX_TOKENS

    loss, mask = (importlib.import_module(f"maefast.ops.{name}") for name in ("loss", "mask"))
    assert (mask.TRITON_TOKENS, loss.TRITON_VALUES) == (MAX_TOKENS, MAX_PATCH)
