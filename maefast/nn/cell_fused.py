"""Elementwise functions on `Cells` that a batch norm which waits takes along (`PendingNorm`): residual, ReLU, ReLU6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.nn.cell_elementwise import check_same, elementwise, handles, in_place, operand
from maefast.nn.cells import HANDLERS, Cells, pending

for _functions, _fused in (
    ((F.relu, torch.relu, Tensor.relu), "relu"),
    ((F.relu6,), "relu6"),
):
    for _function in _functions:
        HANDLERS[_function] = elementwise(_function, _fused)
for _function in (torch.relu_, Tensor.relu_):
    HANDLERS[_function] = in_place(HANDLERS[torch.relu])


@handles(F.hardtanh)
def hardtanh(x: Cells, min_val=-1.0, max_val=1.0, inplace=False) -> Cells:
    """nn.ReLU6 is one from 0 to 6."""
    function = F.relu6 if (min_val, max_val) == (0, 6) else None
    if function is not None:
        return HANDLERS[function](x, inplace=inplace)
    return elementwise(F.hardtanh)(x, min_val, max_val, inplace=inplace)


def _swapped(x, other) -> tuple:
    return (x, other) if isinstance(x, Cells) else (other, x)


@handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input, other, *, alpha=1) -> Cells:
    x, value = _swapped(input, other)
    if alpha == 1 and isinstance(value, Cells):
        check_same(x, value)
        first, second = (x, value) if x._norm is not None else (value, x)
        if first._norm is not None and first._channels == second._channels:
            both = first._norm.plus(second)
            if both is not None:
                return pending(both, first)
    if alpha == 1:
        return x.like(x.rows + operand(x, value))
    return x.like(torch.add(operand(x, input), operand(x, other), alpha=alpha))


HANDLERS[Tensor.add_] = HANDLERS[Tensor.__iadd__] = in_place(add)


@handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(input, other) -> Cells:
    x, other = _swapped(input, other)
    return x.like(x.rows * operand(x, other))


HANDLERS[Tensor.mul_] = HANDLERS[Tensor.__imul__] = in_place(mul)

# The others that networks call most: here, torch.compile need not look through the whole table.
for _function in (
    *(torch.sub, Tensor.sub, Tensor.__sub__, torch.div, Tensor.div, Tensor.__truediv__),
    *(F.gelu, F.silu, F.hardswish, F.leaky_relu, F.dropout),
):
    HANDLERS[_function] = elementwise(_function)
