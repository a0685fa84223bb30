"""adamw of the C++ CPU kernels: every pair of dtypes that it reads, sizes around those of a register, many threads."""

from __future__ import annotations

import pytest
import torch

from maefast.ops.adamw import adamw_reference
from tests.ops.cpu.common import FLOATS, WIDTHS, close, identical, needs_cpu_ops, randn, raw

pytestmark = needs_cpu_ops

HALF = [torch.float16, torch.bfloat16]
PAIRS = [(d, d) for d in FLOATS] + [(torch.float32, h) for h in HALF] + [(h, torch.float32) for h in HALF]
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "shadow", "step")


def make(sizes, dtype, grad, shadow, amsgrad):
    lists = [[randn(n, dtype=dtype, seed=n) for n in sizes], [randn(n, dtype=grad, seed=n + 1) for n in sizes]]
    lists.append([randn(n, dtype=dtype, seed=n + 2) for n in sizes])
    lists += [[randn(n, dtype=dtype, seed=n + k).abs() + 0.5 for n in sizes] for k in (3, 4)]
    lists[4] = lists[4] if amsgrad else []
    lists.append([torch.empty(n, dtype=shadow) for n in sizes] if shadow else [])
    lists.append([torch.tensor(float(i)) for i in range(len(sizes))])
    return lists


@pytest.mark.parametrize(("dtype", "grad"), PAIRS, ids=str)
@pytest.mark.parametrize("shadow", [None, *HALF], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_step(dtype, grad, shadow, amsgrad, scale):
    if shadow is not None and dtype in HALF:
        shadow = None
    low = make(WIDTHS, dtype, grad, shadow, amsgrad)
    high = [[t.to(torch.float64, copy=True) for t in tensors] for tensors in low]
    scalars = 0.9, 0.95, 1e-8, 0.3, amsgrad
    scale = None if scale is None else torch.tensor(scale)
    raw("adamw", *low, None, 0.2, *scalars, scale, None)
    for i in range(len(WIDTHS)):
        adamw_reference(*(tensors[i] if tensors else None for tensors in high), 0.2, *scalars, scale, None)
    for name, ours, exact in zip(NAMES, low, high):
        for i, (a, b) in enumerate(zip(ours, exact)):
            if name == "shadow":
                identical(a, low[0][i].to(a.dtype), f"shadow of {WIDTHS[i]}")
            else:
                close(a, b, f"{name} of {WIDTHS[i]}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_change_nothing(dtype):
    """They share the elements of all tensors, so a share begins and ends anywhere."""
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        runs.append(make([40_001, 3, 0, 17, 20_000], dtype, dtype, None, True))
        raw("adamw", *runs[-1], None, 0.2, 0.9, 0.95, 1e-8, 0.3, False, None, None)
    torch.set_num_threads(before)
    for other in runs[1:]:
        for name, tensors, first in zip(NAMES, other, runs[0]):
            for a, b in zip(tensors, first):
                identical(a, b, name)


def test_what_does_not_fit_is_refused():
    def call(change):
        lists = make([4, 5], torch.float32, torch.float32, torch.bfloat16, True)
        change(lists)
        raw("adamw", *lists, None, 0.2, 0.9, 0.95, 1e-8, 0.3, False, None, None)

    for change in (
        lambda lists: lists[1].pop(),
        lambda lists: lists[2].__setitem__(0, torch.zeros(3)),
        lambda lists: lists[3].__setitem__(0, torch.zeros(4, dtype=torch.float64)),
        lambda lists: lists[0].__setitem__(0, torch.zeros(8)[::2]),
        lambda lists: lists[1].__setitem__(0, torch.zeros(4, dtype=torch.float64)),
        lambda lists: lists[5].__setitem__(0, torch.zeros(4)),
        lambda lists: lists[6].__setitem__(0, torch.zeros(2)),
    ):
        with pytest.raises(RuntimeError, match="adamw"):
            call(change)
