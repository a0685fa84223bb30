"""Plans in which some tokens are neither visible nor masked, and every op that reads one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking, ops
from maefast.ops import CellMask, TokenMask, token_mask

from .common import backends, check_invariants, compare, dtypes_of, plans, property_test
from .test_restore import cases


def lists(plan: TokenMask) -> list[tuple[list[int], list[int]]]:
    """Positions of the visible and of the masked tokens of each sample, in plan order."""
    sides = []
    for flat, cu in ((plan.visible, plan.cu_visible), (plan.masked, plan.cu_masked)):
        sides.append([part.tolist() for part in (flat % plan.num_tokens).split(cu.diff().tolist())])
    return list(zip(*sides))


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", backends("token_mask"))
@pytest.mark.parametrize("order", ["score", "position"])
@given(data=st.data())
@property_test
def test_lowest_scores_are_visible_and_the_next_masked(where, order, data):
    backend, device = where
    batch, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    keep = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    hide = [data.draw(st.integers(0, tokens - k)) for k in keep]
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**16))))
    plan = token_mask(scores.to(device), keep, hide=hide, order=order, backend=backend).to("cpu")
    check_invariants(plan)
    for b, (visible, masked) in enumerate(lists(plan)):
        ranked = scores[b].argsort(stable=True).tolist()
        want = ranked[: keep[b]], ranked[keep[b] : keep[b] + hide[b]]
        assert (visible, masked) == (want if order == "score" else tuple(map(sorted, want)))


@given(plan=plans(absent=True))
@property_test
def test_masks_exchange_and_makers(plan):
    check_invariants(plan)
    assert int(plan.absent.sum()) == plan.total_absent
    assert not bool((plan.absent & plan.mask).any())
    assert int(plan.mask.sum()) == plan.total_masked
    other = plan.complement()
    check_invariants(other)
    assert lists(other) == [(masked, visible) for visible, masked in lists(plan)]
    assert torch.equal(other.absent, plan.absent)
    assert lists(other.complement()) == lists(plan)

    counts = plan.cu_visible.diff().tolist(), plan.cu_masked.diff().tolist()
    for given_counts in ({}, {"keep": counts[0], "hide": counts[1]}):
        again = TokenMask.from_bool(plan.mask, absent=plan.absent, **given_counts)
        check_invariants(again)
        assert torch.equal(again.mask, plan.mask)
        assert torch.equal(again.absent, plan.absent)
        assert all(side == sorted(side) for pair in lists(again) for side in pair)
    # Whatever the map says of absent tokens.
    assert torch.equal(TokenMask.from_bool(plan.mask | plan.absent, absent=plan.absent).slot, again.slot)
    rows = [[torch.tensor(side, dtype=torch.int64) for side in sides] for sides in zip(*lists(plan))]
    same = TokenMask.from_indices(rows[0], plan.num_tokens, masked=rows[1])
    for name in ("visible", "masked", "slot", "cu_visible", "cu_masked"):
        assert torch.equal(getattr(same, name), getattr(plan, name)), name
    assert (same.keep, same.hide, same.max_visible, same.max_masked) == (
        plan.keep, plan.hide, plan.max_visible, plan.max_masked,
    )  # fmt: skip


def test_none_absent_is_the_plan_without():
    scores = torch.rand(3, 12)
    for keep, hide in ((5, 7), ([1, 12, 3], [11, 0, 9])):
        for order in ("score", "position"):
            plan, same = token_mask(scores, keep, hide=hide, order=order), token_mask(scores, keep, order=order)
            assert plan.total_absent == 0
            assert torch.equal(plan.slot, same.slot)
            assert (plan.keep, plan.hide) == (same.keep, same.hide)


def test_ids_and_text():
    plan = token_mask(torch.rand(2, 10), 3, hide=2)
    assert (plan.keep, plan.hide, plan.total_absent) == (3, 2, 10)
    assert plan.ids_masked.shape == (2, 2)
    assert plan.cu_present.tolist() == [0, 5, 10]
    assert repr(plan) == "TokenMask(batch=2, num_tokens=10, keep=3, 4 masked, 10 absent, device=cpu)"
    with pytest.raises(ValueError, match="leaves some absent"):
        _ = plan.ids_restore


BOOL = torch.zeros(2, 4, dtype=torch.bool)
BAD = [
    (lambda: token_mask(torch.rand(2, 4), 3, hide=2), "keep \\+ hide must not exceed the 4 tokens, got 5"),
    (lambda: token_mask(torch.rand(2, 4), 3, hide=[0, 2]), "keep \\+ hide must not exceed the 4 tokens, got 5"),
    (lambda: token_mask(torch.rand(2, 4), 3, hide=-1), r"hide must lie in \[0, 4\]"),
    (lambda: token_mask(torch.rand(2, 4), 3, hide=[1]), "hide has 1 counts for a batch of 2"),
    (lambda: TokenMask.from_bool(BOOL, absent=BOOL[:1]), r"absent must be a bool tensor \[2, 4\]"),
    (lambda: TokenMask.from_bool(BOOL, absent=~BOOL, keep=4), "`keep` does not match the number of visible tokens"),
    (lambda: TokenMask.from_bool(~BOOL, absent=BOOL, hide=1), "`hide` does not match the number of masked tokens"),
    (lambda: TokenMask.from_indices(torch.tensor([[0]]), 4, masked=torch.tensor([[0]])), "a position is repeated"),
    (lambda: TokenMask.from_indices(torch.tensor([[0]]), 4, masked=torch.tensor([[4]])), "a position lies outside"),
    (lambda: TokenMask.from_indices(torch.tensor([[0]]), 4, masked=[]), "masked must be an int tensor"),
    (lambda: TokenMask.from_indices(torch.tensor([[0]]), 4, masked=torch.tensor([[1], [2]])), "the 1 samples"),
    (lambda: CellMask(token_mask(torch.rand(2, 4), 1, hide=1), (2, 2)), "4 tokens of this plan are absent"),
    (lambda: ops.restore_tokens(torch.rand(2, 1, 3), token_mask(torch.rand(2, 4), 1, hide=1), torch.rand(3)),
     'order must be "visible_first" for this plan: 4 of its tokens'),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_clear_errors(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


# --- the ops ------------------------------------------------------------------------------------------------


@given(case=cases(absent=True))
@property_test
def test_restore_reference_equals_a_loop(case):
    plan, inputs, options = case
    if not plan.total_absent:
        return
    prefix, pos = options["prefix"], inputs.get("pos")
    out = ops.restore_tokens(inputs["x"], plan, inputs["mask_token"], pos=pos, backend="reference", **options)
    table = torch.zeros(prefix + plan.num_tokens, out.shape[-1])
    if pos is not None:
        table[-pos.shape[0] :] = pos
    x, rows = iter(inputs["x"]), []
    for visible, masked in lists(plan):
        on_all = options["pos_on"] == "all"
        rows += [next(x) + on_all * table[p] for p in range(prefix)]
        rows += [next(x) + on_all * table[prefix + n] for n in visible]
        rows += [inputs["mask_token"] + table[prefix + n] for n in masked]
    if plan.keep is not None and plan.hide is not None:
        assert out.shape[:2] == (plan.batch, prefix + plan.keep + plan.hide)
    assert torch.equal(out.reshape(-1, out.shape[-1]), torch.stack(rows) if rows else out.reshape(-1, out.shape[-1]))


@pytest.mark.parametrize("where", backends("restore_tokens"))
@given(case=cases(absent=True), data=st.data())
@property_test
def test_restore_and_every_gradient(where, case, data):
    backend, device = where
    plan, inputs, options = case

    def call(backend, device, x, mask_token, pos=None):
        return ops.restore_tokens(x, plan.to(device), mask_token, pos=pos, backend=backend, **options)

    compare(call, inputs, backend, device, data.draw(st.sampled_from(dtypes_of(backend))))


@pytest.mark.parametrize("where", backends("gather_tokens"))
@given(plan=plans(absent=True), data=st.data())
@property_test
def test_gather_and_its_gradient(where, plan, data):
    backend, device = where
    prefix, which = data.draw(st.sampled_from([0, 2])), data.draw(st.sampled_from(["visible", "masked"]))
    x = torch.randn(plan.batch, prefix + plan.num_tokens, 5, generator=torch.Generator().manual_seed(0))

    def call(backend, device, x):
        return ops.gather_tokens(x, plan.to(device), which, prefix=prefix, backend=backend)

    compare(call, {"x": x}, backend, device, data.draw(st.sampled_from(dtypes_of(backend))))
    rows = call("reference", "cpu", x).reshape(-1, 5)
    want = [x[b, n] for b, sides in enumerate(lists(plan))
            for n in [*range(prefix), *(prefix + n for n in sides[which == "masked"])]]  # fmt: skip
    assert torch.equal(rows, torch.stack(want) if want else rows)


@pytest.mark.parametrize("where", backends("patch_loss"))
@pytest.mark.parametrize("rows", ["masked", "all"])
@pytest.mark.parametrize("layout", ["ppc", "cpp"])
@given(data=st.data())
@property_test
def test_loss_and_every_gradient(where, rows, layout, data):
    backend, device = where
    counts = [data.draw(st.tuples(st.integers(0, 3), st.integers(1, 3))) for _ in range(3)]
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**16))))
    plan = token_mask(scores, [k for k, _ in counts], hide=[h for _, h in counts], backend="reference")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pred": torch.randn(*((plan.total_masked,) if rows == "masked" else (3, 6)), 18, generator=generator),
        "images": torch.randn(3, 2, 6, 9, generator=generator),
    }
    options = {"norm": "mae", "rows": rows, "layout": layout, "reduction": data.draw(st.sampled_from(["mean", "none"]))}

    def call(backend, device, pred, images):
        return ops.patch_loss(pred, images, plan.to(device), 3, backend=backend, **options)

    compare(call, inputs, backend, device, data.draw(st.sampled_from(dtypes_of(backend))))
    if rows == "all":  # absent tokens are in no sum: a NaN there changes nothing
        pred = inputs["pred"].masked_fill(plan.absent[..., None], float("nan")).to(device).requires_grad_()
        loss = call(backend, device, pred, inputs["images"].to(device))
        assert torch.equal(loss, call(backend, device, inputs["pred"].to(device), inputs["images"].to(device)))
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert not bool(grad[~plan.mask.to(device)].any())


@pytest.mark.parametrize("where", backends("patch_rows"))
def test_patch_embed_leaves_absent_patches_alone(where):
    backend, device = where
    plan = token_mask(torch.rand(2, 6), [2, 1], hide=[1, 4])
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "images": torch.randn(2, 3, 8, 12, generator=generator),
        "weight": torch.randn(7, 3, 4, 4, generator=generator),
        "pos": torch.randn(6, 7, generator=generator),
        "prefix": torch.randn(2, 7, generator=generator),
    }

    def call(backend, device, images, weight, pos, prefix):
        options = {"pos": pos, "prefix": prefix, "backend": backend}
        return ops.patch_embed(images, weight, None, plan.to(device), **options)

    compare(call, inputs, backend, device, torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def step(x, scores, token, pos):
        plan = token_mask(scores, 3, hide=2)
        return ops.restore_tokens(x, plan, token, pos=pos, order="visible_first").square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 4):
        args = torch.randn(batch, 3, 8).requires_grad_(), torch.rand(batch, 9), torch.randn(8), torch.randn(9, 8)
        want, got = step(*args), compiled(*args)
        assert torch.equal(want, got)
        assert torch.equal(*(torch.autograd.grad(out, args[0])[0] for out in (want, got)))


def test_random_sampler_hides():
    plan = masking.random(4, 16, keep=4, hide=6, generator=torch.Generator().manual_seed(0))
    assert (plan.keep, plan.hide, plan.total_absent) == (4, 6, 24)
    whole = masking.random(4, 16, keep=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan.visible, whole.visible)
