"""CUDA C++ attention: 16-bit sequences of up to 256 tokens, without key bias or statistics.

Without a GPU: `test_attention_emulated.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from maefast import _native, ops
from maefast.ops import _attention_table, _dispatch
from tests.kernels import cuda_variants, resources
from tests.kernels.attention_case import Case, random_calls
from tests.ops.common import property_test

LONGEST = _attention_table.CUDA_LONGEST
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def both():
    """The raw ops, forward and backward."""
    if "attention" not in _dispatch.CUDA_OPS:
        pytest.skip("the CUDA library was not built")
    return torch.ops.maefast.attention.default, torch.ops.maefast.attention_backward.default


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=random_calls(LONGEST, 4, 3))
@property_test
def test_random_lengths(both, dtype, case):
    Case(dtype, **case).check("cuda", *both)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", range(16, 129, 8))
def test_every_head_width(both, dtype, width):
    for length in (1, 15, 16, 17, 32, 50, 64, 65, 98, 128, 129, 197, 224, 225, LONGEST):
        for causal in (False, True):
            Case(dtype, width, [length] * 3, causal=causal).check("cuda", *both)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_agree_bit_for_bit(both, dtype):
    for width, lengths in ((64, [50, 0, 26, 64]), (64, [50, 0, 197]), (32, [LONGEST, 1]), (128, [LONGEST, 70])):
        case = Case(dtype, width, lengths)
        first, second = case.run("cuda", *both), case.run("cuda", *both)
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1])):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64])
def test_many_blocks(both, dtype, width):
    """More than a device holds at once, as in a training step."""
    Case(dtype, width, [197] * 64, heads=8).check("cuda", *both)
    Case(dtype, width, [49] * 40, [197] * 40, heads=8).check("cuda", *both)


@pytest.mark.gpu
def test_a_view_into_odd_storage(both):
    """Rows that do not start at multiples of 16 bytes."""
    odd = torch.randn(2 * 9 * 3 * 2 * 16 + 1, device="cuda").half()[1:].view(2, 9, 3, 2, 16)
    want = ops.attention(odd.cpu().double(), backend="reference")
    torch.testing.assert_close(ops.attention(odd, backend="cuda").cpu().double(), want, rtol=0, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [50, 197])
def test_cuda_graph(both, dtype, length):
    qkv = torch.randn(4, length, 3, 12, 64, device="cuda").to(dtype).requires_grad_()

    def step():
        return torch.autograd.grad(ops.attention(qkv, backend="cuda").float().square().sum(), qkv)[0]

    want = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


def test_what_it_does_not_take():
    base = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "max_q": 64, "max_k": 64}
    call = _attention_table.Call(**base, packed=True, cross=False, causal=False, extras=False)
    reason = lambda **change: _attention_table.unavailable("cuda", call._replace(**change))  # noqa: E731
    for head_dim in (16, 64, 128):
        assert "up to 256 tokens" not in reason(head_dim=head_dim, max_q=256, max_k=256)
        assert "up to 256 tokens" in reason(head_dim=head_dim, max_k=257)
        assert "up to 256 tokens" in reason(head_dim=head_dim, max_q=257)
    assert "256 tokens" in reason(dtype=torch.float32)
    assert "statistics" in reason(extras=True)
    assert "head widths" in reason(head_dim=20)


def test_no_kernel_spills():
    """By the compiler's own account, in the library as it is built."""
    library = _native.find_library("cuda")
    if library is None or resources.tools() is None:
        pytest.skip("needs _cuda.so and cuobjdump")
    codes = [resources.extract(library, architecture) for architecture in cuda_variants.ARCHITECTURES.values()]
    found = [(name, code.resources) for each in codes for name, code in each.items() if "attention" in name]
    assert found
    assert [(name, used.stack) for name, used in found if used.stack > 0] == []
