"""CUDA C++ attention without a GPU: its device code on a CPU (see `emulation`) against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maefast.ops import _attention_table
from tests.kernels import cuda_variants
from tests.kernels.attention_case import Case, random_calls
from tests.ops.common import property_test
from tests.ops.cuda import emulation
from tests.ops.cuda.emulation import Emulated

LONGEST = _attention_table.CUDA_LONGEST
KIB = 1024
LIMITS = {"sm_86": 99 * KIB, "sm_80": 163 * KIB, "sm_90": 227 * KIB}  # shared memory that a block may have
DTYPES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable()))


def check(case: Case, **how) -> Emulated:
    emulated = Emulated(**how)
    case.check("cpu", emulated.forward, emulated.backward)
    return emulated


def run(case: Case, **how) -> list[torch.Tensor]:
    emulated = Emulated(**how)
    results, grads = case.run("cpu", emulated.forward, emulated.backward)
    return [*results, *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    case=random_calls(LONGEST, 3, 2),
    limit=st.sampled_from(list(LIMITS)),
    order=st.integers(0, 9),
    late=st.booleans(),
)
@settings(property_test, max_examples=12)
def test_random_lengths(dtype, case, limit, order, late):
    check(Case(dtype, **case), limit=LIMITS[limit], order=order, late=late)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("length", [1, 50, 64, 65, 128, 129, 197, 224, 225, LONGEST])
def test_edges_of_tiles(length, width, causal):
    check(Case(torch.float16, width, [length], heads=1, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", range(16, 129, 8))
def test_every_head_width(dtype, width):
    check(Case(dtype, width, [130, 3], heads=1, causal=width % 16 == 0))
    check(Case(dtype, width, [64, 17], heads=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_ragged_batches(dtype, width):
    check(Case(dtype, width, [65, 0, 1, 197, 64], heads=1))
    check(Case(dtype, width, [100, 0, 1, 7], [0, 5, 129, 256], heads=1))
    check(Case(dtype, width, [30, 5], [70, 90], heads=3))  # short queries
    check(Case(dtype, width, [70, 90], [30, 5], heads=3))  # short keys


def test_batches_without_queries_or_without_keys():
    check(Case(torch.float16, 32, [0, 0], [80, 0], heads=2))
    check(Case(torch.float16, 32, [80, 0], [0, 0], heads=2))


@pytest.mark.parametrize("width", [32, 64, 96])
@pytest.mark.parametrize("length", [50, 150, LONGEST])
def test_any_order_of_threads_gives_the_same_bits(width, length):
    """So no thread reads what another has not yet written, or writes what another has yet to read."""
    case = Case(torch.bfloat16, width, [length, 20], heads=1)
    first = run(case)
    for order, late in ((0, False), (1, True), (1, False), (2, True), (3, False)):
        for a, b in zip(first, run(case, order=order, late=late)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_keys_pass_in_rounds_where_shared_memory_is_small(width, limit):
    emulated = check(Case(torch.float16, width, [LONGEST], heads=1), limit=LIMITS[limit])
    assert emulated.bytes <= LIMITS[limit]
    assert emulated.rounds == {32: 1, 64: 2, 96: 3, 128: 3}[width]
    emulated = check(Case(torch.float16, width, [197], heads=1), limit=LIMITS[limit])
    assert emulated.rounds == {32: 1, 64: 1, 96: 2, 128: 3 if limit == "sm_86" else 2}[width]


def test_everything_fits_every_device():
    for width in range(16, 129, 16):
        for length in (65, 197, LONGEST):
            emulated = Emulated(limit=LIMITS["sm_86"])
            case = Case(torch.float16, width, [1], heads=1, packed=True)
            case.sizes = (1, length, length, *case.sizes[3:])
            out = emulated.forward(case.q, None, *case.cu, *case.sizes, None, None, False)
            assert emulated.bytes <= LIMITS["sm_86"]
            emulated.backward(case.grad, None, None, None, case.q, None, *out, *case.cu, *case.sizes, None, None, False)
            assert emulated.bytes <= LIMITS["sm_86"]


@pytest.mark.parametrize("width", range(16, 129, 16))
def test_launches_are_those_that_the_page_of_kernels_takes(width):
    """docs/kernels.md gives occupancy for the threads and the shared memory that the launchers choose."""
    for limit, length in itertools.product(LIMITS.values(), (16, 50, 64, 65, 197, LONGEST)):
        emulated, sizes = Emulated(limit=limit), (width, length)
        forward = cuda_variants.forward_launch(*sizes, limit), cuda_variants.short_launch(*sizes, False)
        backward = cuda_variants.backward_launch(*sizes, limit), cuda_variants.short_launch(*sizes, True)
        case = Case(torch.float16, width, [1], heads=1, packed=True)
        case.sizes = (1, length, length, *case.sizes[3:])
        out = emulated.forward(case.q, None, *case.cu, *case.sizes, None, None, False)
        assert (emulated.threads, emulated.bytes) == forward[length <= 64]
        emulated.backward(case.grad, None, None, None, case.q, None, *out, *case.cu, *case.sizes, None, None, False)
        assert (emulated.threads, emulated.bytes) == backward[length <= 64]


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
@pytest.mark.parametrize("length", [50, 130])
def test_other_scales(length, scale):
    case = Case(torch.float16, 32, [length], heads=2)
    case.sizes = (*case.sizes[:3], scale, False)
    check(case)


@pytest.mark.parametrize("width", [32, 64])
def test_scores_far_below_zero(width):
    """exp(0 - lse) of keys that are not there overflows; it must not meet their zeros."""
    case = Case(torch.float16, width, [7, 100, 3], [1, 2, 70])
    case.kv[:3, 0, :, 0], case.q[:107, :, 0] = -100.0, 100.0
    results = run(case)
    assert results[1][:107].max() < -1000
    assert all(t.isfinite().all() for t in results)


def test_nan_stays_in_its_sequence_and_head():
    case = Case(torch.float16, 32, [70, 80], heads=2)
    case.q[75, 1, 1] = float("nan")  # a key of the second sequence and head
    results = run(case)
    for t in (results[0], results[2 + 2]):
        bad = t.flatten(1).isnan().view(150, -1, 2, 32).any(-1).any(1)
        assert not bad[:70].any()
        assert not bad[:, 0].any()
        assert bad[70:, 1].all()
