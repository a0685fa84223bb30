"""What only the C++ attention promises: every instruction set, any number of threads, no access out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maefast import _native
from tests.ops.cpu.common import needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops
ROOT = Path(__file__).parents[3]
FILES = ("test_attention.py", "test_attention_large_scores.py", "test_attention_positions.py")
LENGTHS = [50, 0, 7, 300, 1, 64]


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("isa", _native.ISAS[:-1])
def test_instruction_set(isa):
    """The tests of the op again, in a process that is held to a lower set; the best one runs in this process."""
    if _native.C is None:
        pytest.skip("maefast._C, which tells the instruction set, is not built")
    order = _native.ISAS.index
    if order(isa) >= order(_native.C.current_isa()):
        pytest.skip(f"this CPU has no {isa}, or this process runs on it")
    files = [str(Path(__file__).parents[1] / name) for name in FILES]
    check = f"from maefast import _native; assert _native.C.current_isa() == {isa!r}; import pytest, sys; "
    run = [
        sys.executable,
        "-c",
        check + f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'cpu', *{files!r}]))",
    ]
    result = subprocess.run(run, env={**os.environ, "MAEFAST_CPU_ISA": isa}, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype):
    rows = sum(LENGTHS)
    qkv, bias = randn(rows, 3, 4, 40, dtype=dtype), randn(rows, 4, seed=1)
    marked = torch.arange(rows) % 3 == 0
    sizes = starts(LENGTHS), None, len(LENGTHS), max(LENGTHS), max(LENGTHS), 0.2, False, bias, marked
    grads = randn(rows, 4, 40, dtype=dtype, seed=2), *(randn(rows, 4, seed=i) for i in (3, 4, 5))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found = raw("attention", qkv, None, *sizes, True)
            results.append([*found, *raw("attention_backward", *grads, qkv, None, *found, *sizes, True)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_threads_change_no_gradient_of_a_bias(dtype, groups):
    qkv, bias = randn(9 * 50, 3, 4, 40, dtype=dtype), randn(groups, 4, 50, 50, seed=1)
    turn = *randn(2, 50, 40, seed=2), True
    sizes = None, None, 9, 50, 50, 0.2, False, None, None
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found = raw("attention", qkv, None, *sizes, False, bias, *turn)
            grads = randn(9 * 50, 4, 40, dtype=dtype, seed=2), None, None, None
            back = raw("attention_backward", *grads, qkv, None, *found, *sizes, False, bias, *turn, True)
            results.append([*found, *back])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_bad_positions():
    qkv, bias, (cos, sin) = randn(8, 3, 2, 16), randn(2, 2, 4, 4), randn(2, 4, 16)
    dense, options = (None, None, 2, 4, 4, 0.25, False), (None, None, False)
    for args in (
        (qkv, None, *dense, *options, bias[:, :1].contiguous()),
        (qkv, None, *dense, *options, bias[..., :3].contiguous()),
        (qkv, None, *dense, *options, bias.mT),
        (qkv, None, *dense, *options, bias.double()),
        (qkv, None, *dense, *options, bias[0]),
        (qkv, None, *dense, *options, randn(3, 2, 4, 4)),
        (qkv, None, starts([4, 4]), *dense[1:], *options, bias),
        (qkv, None, *dense, *options, None, cos, None),
        (qkv, None, *dense, *options, None, cos, sin[1:]),
        (qkv, None, *dense, *options, None, cos[1:], sin[1:]),
        (qkv, None, *dense, *options, None, cos[:, 1:].contiguous(), sin[:, 1:].contiguous()),
        (qkv, None, *dense, *options, None, cos.half(), sin.half()),
        (qkv, None, starts([4, 4]), *dense[1:], *options, None, cos, sin),
        (qkv[:, 0].contiguous(), qkv[:, 1:].contiguous(), *dense, *options, None, cos, sin),
    ):
        with pytest.raises(RuntimeError, match="maefast: "):
            raw("attention", *args)
    found = raw("attention", qkv, None, *dense, *options)
    grad = found[0], None, None, None
    with pytest.raises(RuntimeError, match="there is no bias"):
        raw("attention_backward", *grad, qkv, None, *found, *dense, *options, None, None, None, False, True)


def test_bad_sizes():
    """Raw ops trust Python's checks of values; a mismatch of sizes still raises before memory is touched."""
    q, kv, cu, cu_k = randn(7, 2, 16), randn(9, 2, 2, 16), starts([3, 4]), starts([5, 4])
    qkv = randn(7, 3, 2, 16)
    bias, marked = randn(9, 2), torch.ones(9, dtype=torch.bool)
    sizes, rest = (2, 4, 5, 0.25, False), (None, None, False)
    for args in (
        (q, None, cu, None, *sizes, *rest),
        (q, kv, starts([3, 3]), cu_k, *sizes, *rest),
        (q, kv, starts([9, -2]), cu_k, *sizes, *rest),
        (q, kv, cu, starts([5, 4, 0]), *sizes, *rest),
        (q, kv, cu.long(), cu_k, *sizes, *rest),
        (q, kv, cu, cu_k, 2, 3, 5, 0.25, False, *rest),
        (q, kv, cu, cu_k, 2, 4, 4, 0.25, False, *rest),
        (q, kv, None, None, *sizes, *rest),
        (q, kv[:, :, :1].contiguous(), cu, cu_k, *sizes, *rest),
        (q, kv.double(), cu, cu_k, *sizes, *rest),
        (q.double(), kv.double(), cu, cu_k, *sizes, *rest),
        (q[..., :12].contiguous(), kv[..., :12].contiguous(), cu, cu_k, *sizes, *rest),
        (q.transpose(0, 1), kv, cu, cu_k, *sizes, *rest),
        (qkv, None, cu, None, 2, 4, 5, 0.25, False, *rest),
        (q, kv, cu, cu_k, *sizes, bias[1:], None, False),
        (q, kv, cu, cu_k, *sizes, bias.double(), None, False),
        (q, kv, cu, cu_k, *sizes, None, marked[1:], True),
        (q, kv, cu, cu_k, *sizes, None, marked.int(), True),
    ):
        with pytest.raises(RuntimeError, match="maefast: "):
            raw("attention", *args)
    found = raw("attention", q, kv, cu, cu_k, *sizes, bias, marked, True)
    out, lse, entropy, mass = found
    row = torch.ones_like(lse)
    tail = (q, kv, *found, cu, cu_k, *sizes, bias, marked, True)
    for args in (
        (out[1:], None, None, None, *tail),
        (out.half(), None, None, None, *tail),
        (out, row[1:], None, None, *tail),
        (out, None, row[1:], None, *tail),
        (out, None, None, row.double(), *tail),
        (out, None, None, None, q, kv, out, lse[1:], entropy, mass, cu, cu_k, *sizes, bias, marked, True),
        (out, None, row, None, q, kv, out, lse, entropy[1:], mass, cu, cu_k, *sizes, bias, marked, True),
        (out, None, None, row, q, kv, out, lse, entropy, mass[1:], cu, cu_k, *sizes, bias, marked, True),
        (out, None, None, None, q, kv, *found, cu, cu_k, *sizes, None, marked, True),
    ):
        with pytest.raises(RuntimeError, match="maefast: "):
            raw("attention_backward", *args)
