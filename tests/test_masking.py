"""Samplers: published counts and orders, structure of the masks, and replayable randomness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking

from .ops.common import check_invariants, property_test


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_keep_count_rules_of_published_systems():
    assert masking.keep_count(196, 0.75) == 49  # MAE ViT-B/16 at 224
    assert masking.keep_count(196, 0.9, "floor") == int(196 * (1 - 0.9)) == 19
    assert masking.keep_count(196, 0.9, "complement") == 20  # VideoMAE: 196 - int(.9 * 196)
    assert masking.keep_count(49, 0.6, "round") == 20  # SparK at 224
    assert masking.keep_count(49, 0.6, "floor") == 19  # FCMAE
    assert masking.keep_count(7, 0.0) == 7
    assert masking.keep_count(7, 1.0) == 0
    for bad in (float("nan"), float("inf"), -0.1, 1.1, "half"):
        with pytest.raises(ValueError, match="finite number"):
            masking.keep_count(7, bad)
    with pytest.raises(ValueError, match="rule must be"):
        masking.keep_count(7, 0.5, "nearest")


def test_random_draws_what_mae_draws():
    torch.manual_seed(3)
    noise = torch.rand(4, 196)
    after = torch.rand(1)
    torch.manual_seed(3)
    plan = masking.random(4, 196, 0.75)
    assert torch.equal(torch.rand(1), after), "the sampler consumed other random numbers than MAE"
    assert torch.equal(plan.ids_keep, noise.argsort(dim=1)[:, :49])
    assert torch.equal(masking.random(4, 196, 0.75, generator=seeded(3)).visible, plan.visible)
    assert torch.equal(masking.random(4, 196, 0.75, noise=noise).visible, plan.visible)


def test_ratio_of_each_sample():
    plan = masking.random(3, 20, [0.75, 0.0, 1.0])
    check_invariants(plan)
    assert plan.keep is None
    assert plan.cu_visible.tolist() == [0, 5, 25, 25]
    assert (plan.max_visible, plan.max_masked) == (20, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_may_be_a_tensor(dtype):
    ratios = [0.6, 0.75, 0.9]  # int(20 * (1 - 0.6)) is 8, and 7 with what float32 has for 0.6
    plan = masking.random(3, 20, torch.tensor(ratios, dtype=dtype, requires_grad=True))
    assert torch.equal(plan.cu_visible, masking.random(3, 20, ratios).cu_visible)
    with pytest.raises(ValueError, match=r"finite number in \[0, 1\], got 1\.5"):
        masking.random(2, 20, torch.tensor([0.5, 1.5]))


@given(seed=st.integers(0, 10**6), frames=st.integers(1, 5), tokens=st.integers(1, 30), ratio=st.floats(0, 1))
@property_test
def test_tubes_are_whole(seed, frames, tokens, ratio):
    # Coarse noise: equal values at the threshold must not split a tube.
    noise = torch.randint(3, (2, tokens), generator=seeded(seed)).float()
    plan = masking.tube(2, frames, tokens, ratio, noise=noise)
    check_invariants(plan)
    mask = plan.mask.view(2, frames, tokens)
    assert (mask == mask[:, :1]).all()
    assert plan.keep == frames * (tokens - int(ratio * tokens))
    assert (plan.ids_keep.diff(dim=1) > 0).all()


def test_tube_of_videomae():
    plan = masking.tube(2, 8, 196, 0.9, generator=seeded())
    assert plan.keep == 160
    assert plan.total_masked == 2 * 1408


def test_grid_keeps_a_regular_lattice():
    plan = masking.grid(2, (14, 14), 2, offset=(1, 0))
    check_invariants(plan)
    assert plan.keep == 49
    assert plan.ids_keep[1].tolist() == [14 * r + c for r in range(1, 14, 2) for c in range(0, 14, 2)]


@given(seed=st.integers(0, 10**6), ratio=st.floats(0, 1))
@property_test
def test_block_masks_an_exact_count(seed, ratio):
    plan = masking.block(2, (14, 14), ratio, generator=seeded(seed))
    check_invariants(plan)
    assert plan.keep == int(196 * (1 - ratio))


def test_block_masks_are_blocks():
    """Rectangles of 16 patches and more leave few masked tokens without a masked neighbour; random masks leave many."""

    def lonely(mask):
        mask = mask.view(-1, 14, 14).float()
        near = torch.nn.functional.conv2d(
            mask[:, None], torch.tensor([[[[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]]]), padding=1
        )
        return ((mask > 0) & (near[:, 0] < 2)).float().sum() / mask.sum()

    blocks = masking.block(32, (14, 14), 0.4, generator=seeded())
    loose = masking.random(32, 196, 0.4, generator=seeded())
    assert lonely(blocks.mask) < 0.2 < lonely(loose.mask)
    other = masking.block(32, (14, 14), 0.4, generator=seeded())
    assert torch.equal(blocks.visible, other.visible), "the same generator state must give the same masks"
    assert not torch.equal(blocks.visible, masking.block(32, (14, 14), 0.4, generator=seeded(1)).visible)


BAD = [
    (lambda: masking.random(2, 9), ValueError, "exactly one of"),
    (lambda: masking.random(2, 9, 0.5, keep=3), ValueError, "exactly one of"),
    (lambda: masking.random(2, 9, float("nan")), ValueError, "finite"),
    (lambda: masking.random(2, 9, 0.5, noise=torch.rand(2, 8)), ValueError, "noise must have shape"),
    (lambda: masking.random(2, 9, 0.5, noise=torch.rand(2, 9), generator=seeded()), ValueError, "not both"),
    (lambda: masking.random(2, 9, [0.5, 0.5, 0.5]), ValueError, "3 counts for a batch of 2"),
    (lambda: masking.tube(2, 3, 9, [0.5, 0.6]), TypeError, "one ratio"),
    (lambda: masking.block(2, (3, 3), keep=10), ValueError, r"\[0, 9\]"),
    (lambda: masking.block(2, (3, 3), 0.5, min_area=0), ValueError, "min_area"),
    (lambda: masking.grid(2, (4, 4), 0), ValueError, "stride must be at least 1"),
    (lambda: masking.grid(2, (4, 4), 2, offset=(2, 0)), ValueError, "within the stride"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
