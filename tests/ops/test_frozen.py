"""Any of an op's inputs may be frozen: exactly the gradients of the reference, none missing and none too many."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maefast import ops

from ..budget import examples
from .cases import BLOCK_WEIGHTS, CASES, CONSTANT, WITHOUT, make, on_cpu, onednn_everywhere, op_of, outputs, total  # noqa: F401
from .common import assert_close, property_test

pytestmark = pytest.mark.usefixtures("onednn_everywhere")


def check(name, backend, device, dtype, trainable, without, used, seed):
    """`used`: which outputs a loss reads, by bit."""
    case = CASES[name]
    made = make(case, seed, without)
    sides = []
    for side, where, kind in ((backend, device, dtype), ("reference", "cpu", torch.float64)):
        inputs = {k: t.to(where, kind, copy=True).requires_grad_(k in trainable) for k, t in made.items()}
        outs = outputs(case, side, where, inputs)
        read = [t for i, t in enumerate(outs) if used >> i & 1] or outs
        if any(t.requires_grad for t in read):
            total(read).backward()
        sides.append((inputs, outs))
    (low, outs), (high, refs) = sides
    for out, ref in zip(outs, refs, strict=True):
        assert out.requires_grad == ref.requires_grad
        assert_close(out, ref, dtype)
    for k, value in low.items():
        got, want = value.grad, high[k].grad
        assert (got is None) == (want is None), f"gradient of {k}: {got} instead of {want}"
        if want is not None:
            assert got.dtype is dtype
            assert_close(got, want, dtype, f"gradient of {k}")


def subsets(names) -> st.SearchStrategy:
    return st.lists(st.sampled_from(sorted(names)), unique=True) if names else st.just([])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", on_cpu())
@given(data=st.data())
@settings(parent=property_test, max_examples=examples(4, 10))
def test_gradients_are_those_of_the_trainable_inputs(name, backend, data):
    case = CASES[name]
    dtype = torch.float64 if backend == "cpu" and case.float64 else torch.float32
    trainable, without = data.draw(subsets(case.inputs)), data.draw(subsets(case.optional))
    check(name, backend, "cpu", dtype, trainable, without, data.draw(st.integers(0, 15)), data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", on_cpu())
def test_one_trainable_input_alone(name):
    dtype = torch.float64 if CASES[name].float64 else torch.float32
    for trainable in CASES[name].inputs:
        for without in ((), tuple(k for k in CASES[name].optional if k != trainable)):
            check(name, "cpu", "cpu", dtype, [trainable], without, 15, 0)


def test_the_table_has_every_op_and_every_input():
    public = set(ops.__all__) - WITHOUT
    assert {op_of(name) for name in CASES} == public
    for op in public:
        parameters = inspect.signature(getattr(ops, op)).parameters.values()
        tensors = {p.name for p in parameters if "Tensor" in str(p.annotation)} - CONSTANT
        inputs = {k for name, case in CASES.items() if op_of(name) == op for k in case.inputs}
        assert tensors == (inputs - BLOCK_WEIGHTS if op == "transformer_block" else inputs), op
