"""token_mask and TokenMask: every backend makes exactly the plan of a stable argsort."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import TokenMask, _mask_arguments, _registry, token_mask

from .common import backends, check_invariants, plans, property_test

BACKENDS = backends("token_mask")


def expected(scores: torch.Tensor, counts: list[int], order: str) -> list[tuple[list[int], list[int]]]:
    """(visible, masked) positions of each row, by Python's own stable sort."""
    result = []
    for row, count in zip(scores.double().tolist(), counts):
        ids = sorted(range(len(row)), key=lambda i: (row[i] != row[i], 0.0 if row[i] != row[i] else row[i]))
        visible, masked = ids[:count], ids[count:]
        result.append((sorted(visible), sorted(masked)) if order == "position" else (visible, masked))
    return result


def assert_plan(plan: TokenMask, want: list[tuple[list[int], list[int]]]) -> None:
    check_invariants(plan)
    n = plan.num_tokens
    assert plan.visible.tolist() == [b * n + i for b, (visible, _) in enumerate(want) for i in visible]
    assert plan.masked.tolist() == [b * n + i for b, (_, masked) in enumerate(want) for i in masked]


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@given(data=st.data())
@property_test
def test_equals_a_stable_sort(where, dtype, data):
    backend, device = where
    if dtype is torch.float64 and backend in ("triton", "cuda"):
        pytest.skip("float64 scores are served by the reference and the CPU kernel")
    batch, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    # Few distinct values, so that ties are common, with signed zeros, infinities and NaN among them.
    pool = torch.tensor([-0.0, 0.0, 0.5, 0.25, -1.5, float("inf"), -float("inf"), float("nan"), 1e-3, 7.0])
    scores = pool[torch.randint(len(pool), (batch, tokens), generator=generator)]
    if data.draw(st.booleans()):
        scores = torch.randn(batch, tokens, generator=generator)
    scores = scores.to(dtype)
    counts = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    if data.draw(st.booleans()):
        counts = [counts[0]] * batch
    order = data.draw(st.sampled_from(["score", "position"]))
    plan = token_mask(scores.to(device), counts, order=order, backend=backend)
    assert_plan(plan, expected(scores, counts, order))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 196, 1024, 1568, 8192])
@pytest.mark.parametrize("order", ["score", "position"])
def test_sizes_in_use(where, tokens, order):
    backend, device = where
    scores = torch.rand(3, tokens, generator=torch.Generator().manual_seed(tokens))
    keep = tokens // 4
    plan = token_mask(scores.to(device), keep, order=order, backend=backend)
    assert_plan(plan, expected(scores, [keep] * 3, order))


@pytest.mark.parametrize("where", BACKENDS)
def test_matches_mae_names(where):
    backend, device = where
    noise = torch.rand(4, 30, generator=torch.Generator().manual_seed(0)).to(device)
    plan = token_mask(noise, 7, backend=backend)
    shuffle = noise.argsort(dim=1)
    assert torch.equal(plan.ids_keep, shuffle[:, :7])
    assert torch.equal(plan.ids_masked, shuffle[:, 7:])
    assert torch.equal(plan.ids_restore, shuffle.argsort(dim=1))
    assert torch.equal(plan.mask, plan.ids_restore >= 7)


@given(plan=plans())
@property_test
def test_complement_and_copies(plan):
    check_invariants(plan)
    other = plan.complement()
    check_invariants(other)
    assert torch.equal(other.mask, ~plan.mask)
    assert torch.equal(other.complement().visible, plan.visible)
    for clone in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.to("cpu")):
        assert torch.equal(clone.slot, plan.slot)
        assert clone.keep == plan.keep


@given(plan=plans())
@property_test
def test_round_trips(plan):
    counts = plan.cu_visible.diff().tolist()
    again = TokenMask.from_bool(plan.mask)
    check_invariants(again)
    assert torch.equal(again.mask, plan.mask)
    assert torch.equal(TokenMask.from_bool(plan.mask, keep=counts).slot, again.slot)
    lists = [ids % plan.num_tokens for ids in plan.visible.split(counts)]
    ordered = TokenMask.from_indices(lists, plan.num_tokens)
    check_invariants(ordered)
    assert torch.equal(ordered.visible, plan.visible)
    restored = TokenMask.from_ids_restore(plan.ids_restore, counts)
    assert torch.equal(restored.visible, plan.visible)
    assert torch.equal(restored.masked, plan.masked)


def test_ranks_beyond_the_digits_of_float32():
    tokens, keep = 2**24 + 64, 2**24 + 3
    ids = torch.arange(tokens).flip(0)[None]
    assert torch.equal(TokenMask.from_ids_restore(ids, keep).ids_restore, ids)


def test_all_visible():
    plan = TokenMask.all_visible(3, 5)
    check_invariants(plan)
    assert plan.keep == 5
    assert not plan.mask.any()


def test_integers_inside_a_graph():
    """What takes the place of a copy from the host while a CUDA graph is captured; it needs no graph to be right."""
    values = [0, 3, 3, 2**31 - 1, *range(300)]
    captured = _mask_arguments._captured_integers(values, torch.device("cpu"))
    assert torch.equal(captured, torch.tensor(values, dtype=torch.int32))


@pytest.mark.parametrize("capturing", [False, True])
def test_no_copy_from_the_host_while_a_graph_is_captured(monkeypatch, capturing):
    """Of whatever a maker knows on the host, on the way to a GPU."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_mask_arguments, "_captured_integers", lambda values, device: made.append(values))
    host = torch.device("cuda") if capturing else torch.device("cpu")
    copied = _mask_arguments.integers([0, 2, 5], host)
    assert made == ([[0, 2, 5]] if capturing else [])
    assert copied is None if capturing else copied.tolist() == [0, 2, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_ragged_plan_in_a_cuda_graph(backend):
    keep = [(7 * b) % 50 for b in range(130)]
    scores = torch.rand(130, 49, device="cuda")
    bools = token_mask(scores, keep, backend=backend).mask
    lists = [torch.arange(count, device="cuda") for count in keep]
    makers = [
        lambda: token_mask(scores, keep, backend=backend),
        lambda: TokenMask.from_bool(bools, keep=keep, backend=backend),
        lambda: TokenMask.from_indices(lists, 49, backend=backend),
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for make in makers:
            make()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for make in makers:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan = make()
        for tensor in (plan.visible, plan.masked, plan.slot, plan.cu_visible, plan.cu_masked):
            tensor.fill_(-7)
        scores.uniform_()
        bools.copy_(token_mask(scores, keep, backend="reference").mask)
        graph.replay()
        want = make()
        for name in ("visible", "masked", "slot", "cu_visible", "cu_masked"):
            assert torch.equal(getattr(plan, name), getattr(want, name)), name
        check_invariants(plan.to("cpu"))


BAD = [
    (lambda: token_mask(torch.rand(2, 4), 5), ValueError, "keep must lie in"),
    (lambda: token_mask(torch.rand(2, 4), -1), ValueError, "keep must lie in"),
    (lambda: token_mask(torch.rand(2, 4), True), TypeError, "keep must be an int"),
    (lambda: token_mask(torch.rand(2, 4), 1.5), TypeError, "keep must be an int"),
    (lambda: token_mask(torch.rand(2, 4), [1, 2, 3]), ValueError, "3 counts for a batch of 2"),
    (lambda: token_mask(torch.rand(2, 4), torch.tensor([0.5, 1])), ValueError, "int tensor"),
    (lambda: token_mask(torch.rand(4), 1), ValueError, "2 dimensions"),
    (lambda: token_mask(torch.rand(0, 4), 1), ValueError, "at least one sample"),
    (lambda: token_mask(torch.rand(4, 0), 0), ValueError, "at least one sample"),
    (lambda: token_mask(torch.zeros(2, 4, dtype=torch.int32), 1), TypeError, "float32"),
    (lambda: token_mask([[1.0]], 1), TypeError, "torch.Tensor"),
    (lambda: token_mask(torch.rand(2, 4), 1, order="noise"), ValueError, "order must be one of"),
    (lambda: token_mask(torch.rand(2, 4), 1, backend="gpu"), ValueError, "unknown backend"),
    (lambda: token_mask(torch.rand(2, 4), 1, backend="cuda"), RuntimeError, "asked for"),
    (lambda: token_mask(torch.rand(1).expand(2**16, 2**15), 1), ValueError, r"2\*\*31"),
    (lambda: masking.from_bool(torch.rand(2, 4)), TypeError, "bool"),
    (lambda: masking.from_bool(torch.tensor([[True, False]]), keep=2), ValueError, "does not match"),
    (lambda: masking.from_bool(torch.tensor([[True, False]]), keep=[1, 1]), ValueError, "2 counts for a batch of 1"),
    (lambda: masking.from_bool(torch.tensor([[True, False]]), keep=1.0), TypeError, "keep must be an int"),
    (lambda: masking.from_indices(torch.tensor([[0, 4]]), 4), ValueError, "outside"),
    (lambda: masking.from_indices(torch.tensor([[-1, 2]]), 4), ValueError, "outside"),
    (lambda: masking.from_indices(torch.tensor([[2, 2]]), 4), ValueError, "repeated"),
    (lambda: masking.from_indices(torch.tensor([[0, 1, 2]]), 2), ValueError, "keep"),
    (lambda: masking.from_indices([], 2), ValueError, "non-empty"),
    (lambda: masking.from_indices(torch.rand(2, 2), 4), TypeError, "int32 or int64"),
    (lambda: masking.from_ids_restore(torch.tensor([[0, 0, 1]]), 1), ValueError, "permutation"),
    (lambda: TokenMask.all_visible(0, 3), ValueError, "at least one sample"),
    (lambda: masking.random(2, 4, keep=[1, 2]).ids_keep, ValueError, "uniform plan"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", backends("token_mask", reference=False))
def test_opcheck(where):
    backend, device = where
    args = (torch.rand(3, 9, device=device), torch.tensor([0, 2, 2, 9], dtype=torch.int32, device=device), 9)
    for by_position in (False, True):
        torch.library.opcheck(_registry.raw("token_mask", backend), (*args, by_position))


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(where, dynamic):
    backend, device = where

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def make(scores):
        plan = ops.token_mask(scores, scores.shape[1] // 4, backend=backend)
        return plan.visible, plan.masked, plan.slot, plan.mask, plan.ids_restore

    for batch, tokens in ((2, 12), (3, 20)):
        scores = torch.rand(batch, tokens, device=device)
        plan = token_mask(scores, tokens // 4, backend=backend)
        want = plan.visible, plan.masked, plan.slot, plan.mask, plan.ids_restore
        assert all(torch.equal(a, b) for a, b in zip(make(scores), want))
