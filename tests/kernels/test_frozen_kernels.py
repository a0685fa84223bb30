"""Frozen inputs of the public ops on backend="triton": exactly the gradients of the reference."""

from __future__ import annotations

import pytest
import torch

from maefast.ops import _registry
from tests.ops.cases import CASES, make, outputs, total
from tests.ops.test_frozen import check


def served(name: str) -> bool:
    raw = CASES[name].raw
    return raw is not None and _registry.FAMILY_OF[raw] not in _registry.CPU_ONLY


NAMES = [name for name in CASES if served(name)]


@pytest.mark.parametrize("name", NAMES)
def test_one_trainable_input_alone(device, name):
    case = CASES[name]
    for trainable in case.inputs:
        without = [k for k in case.optional if k != trainable]
        check(name, "triton", device, torch.float32, [trainable], without, 15, 0)
    check(name, "triton", device, torch.float32, list(case.inputs)[1:], (), 15, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_is_refused(device, name):
    case = CASES[name]
    inputs = {k: t.to(device).requires_grad_() for k, t in make(case, 0).items()}
    loss = total(outputs(case, "triton", device, inputs))
    grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.square().sum() for g in grads).backward()
