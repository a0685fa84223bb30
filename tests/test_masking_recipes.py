"""Samplers of published recipes: exact counts, the structure that the papers describe, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maefast import masking

from .ops.common import check_invariants, property_test


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75])
def test_running_cells_rotate_within_each_cell(ratio):
    noise = torch.tensor([0.1, 0.3, 0.6, 0.9])
    chosen = masking.running_cells(4, 8, (4, 6), ratio, noise=noise[:, None])
    each = chosen.view(4, 8, 2, 2, 3, 2).sum((3, 5))
    assert (each == 4 * (1 - ratio)).all()
    assert (chosen[:, :4].sum(1) == 4 * (1 - ratio)).all(), "four frames visit each position as often"
    assert torch.equal(chosen[:, 4:], chosen[:, :4])
    if ratio == 0.5:
        assert len({tuple(row.flatten().tolist()) for row in chosen}) == 4
        assert not torch.equal(chosen[:, 0], chosen[:, 1])
        drawn = masking.running_cells(64, 1, (2, 2), generator=seeded())
        assert len({tuple(row.flatten().tolist()) for row in drawn}) == 4
    with pytest.raises(ValueError, match="even"):
        masking.running_cells(1, 1, (3, 4))
    with pytest.raises(ValueError, match="ratio must be"):
        masking.running_cells(1, 1, (2, 4), 0.6)


@pytest.mark.parametrize("masked", [1, 2, 3])
def test_cells_in_rows_are_the_queue_of_the_authors(masked):
    """A queue of `masked` ones and 4 - masked zeros, read from a place that moves on before each frame."""
    chosen = masking.running_cells(4, 8, (4, 6), masked / 4, path="rows", noise=torch.tensor([0.0, 0.25, 0.5, 0.75]))
    queue = [True] * masked + [False] * (4 - masked)
    for start in range(4):
        for frame in range(8):
            cell = [queue[(i + start + frame + 1) % 4] for i in range(4)]
            want = torch.tensor(cell).view(2, 2).repeat(2, 3)
            assert torch.equal(chosen[start, frame], ~want)
    assert (chosen[:, :4].sum(1) == 4 - masked).all()
    with pytest.raises(ValueError, match="path"):
        masking.running_cells(1, 1, (2, 2), path="columns")


@pytest.mark.parametrize("frames", [8, 6])
def test_dual_masks_only_what_is_decoded(frames):
    noise, start = torch.rand(3, 196, generator=seeded()), torch.rand(3, generator=seeded(1))
    plan = masking.dual(3, frames, (14, 14), noise=noise, cell_noise=start)
    tubes = masking.tube(3, frames, 196, 0.9, noise=noise)
    chosen = masking.running_cells(3, frames, (14, 14), noise=start).flatten(1)
    assert torch.equal(plan.visible, tubes.visible)
    assert torch.equal(plan.mask, tubes.mask & chosen)
    if frames == 8:
        assert (plan.keep, plan.hide) == (160, 704)
    whole = masking.dual(3, frames, (14, 14), decoder_ratio=0, noise=noise, cell_noise=start)
    assert torch.equal(whole.mask, tubes.mask)
    assert whole.total_absent == 0


@pytest.mark.parametrize("colour", ["red", "green", "blue", "purple"])
def test_coloured_is_topk_of_the_filtered_map(colour):
    plan = masking.coloured(5, (14, 14), 0.75, colour=colour, generator=seeded())
    check_invariants(plan)
    assert plan.keep == 49
    flat = masking.coloured(2, (5, 8), keep=7, colour=colour, noise=torch.randn(2, 5, 8, generator=seeded()))
    assert flat.keep == 7


def smoothing(n: int, sigma: float) -> torch.Tensor:
    """float64 [n, n], circular convolution with the Gaussian of that transform, summed cosine by cosine."""
    frequency = torch.arange(n, dtype=torch.float64)
    frequency = torch.where(frequency * 2 < n, frequency, frequency - n) / n
    away = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n, dtype=torch.float64)
    gain = torch.exp(-2 * (torch.pi * sigma * frequency) ** 2) / n
    return (gain * torch.cos(2 * torch.pi * away[:, :, None] * frequency)).sum(2)


def test_coloured_against_matrices_and_topk():
    noise = torch.randn(2, 12, 9, generator=seeded())
    red, narrow, wide = (smoothing(12, s) @ noise.double() @ smoothing(9, s) for s in (1.0, 0.5, 2.0))
    green = narrow - wide
    maps = {"red": red, "blue": noise - red, "green": green, "purple": noise - green}
    for colour, scores in maps.items():
        plan = masking.coloured(2, (12, 9), keep=20, colour=colour, noise=noise)
        assert torch.equal(plan.ids_keep, torch.topk(scores.flatten(1), 20).indices), colour


def test_coloured_masks_have_the_frequencies_of_their_colour():
    frequency = torch.sqrt(torch.fft.fftfreq(14)[:, None] ** 2 + torch.fft.fftfreq(14) ** 2)
    mean = {}
    for colour in ("red", "green", "blue"):
        mask = masking.coloured(64, (14, 14), 0.75, colour=colour, generator=seeded()).mask.float().view(-1, 14, 14)
        power = torch.fft.fft2(mask - mask.mean((1, 2), keepdim=True)).abs().square().mean(0)
        mean[colour] = float((power * frequency).sum() / power.sum())
    assert mean["red"] < mean["green"] < mean["blue"]


def test_weighted_includes_as_multinomial_does():
    weights, count = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 8.0]), 20000
    rows = weights.expand(count, -1)
    ours = (~masking.weighted(rows, keep=3, generator=seeded()).mask).float().sum(0)
    theirs = torch.zeros(count, 6).scatter(1, torch.multinomial(rows, 3, generator=seeded(1)), 1.0).sum(0)
    assert ours[0] == theirs[0] == 0
    p = (ours + theirs)[1:] / (2 * count)
    chi = ((ours - theirs)[1:].square() / (2 * count * p * (1 - p))).sum()
    assert chi < 20.5  # 99.9 % at five degrees of freedom; drawing without replacement correlates them negatively


def test_weighted_zeros_come_last_and_uniformly():
    rows = torch.tensor([1e-38, 0, 0, 0, 1e38]).expand(4000, 5)
    visible = ~masking.weighted(rows, keep=3, generator=seeded()).mask
    assert visible[:, 0].all()
    assert visible[:, 4].all()
    assert (visible.float().mean(0)[1:4] - 1 / 3).abs().max() < 0.04
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights must be"):
            masking.weighted(torch.tensor([[1.0, bad]]), keep=1)


def test_weighted_noise_of_float64_next_to_one():
    """Rounded to 1 it would mean an infinite wait, behind tokens of weight zero."""
    noise = torch.tensor([[1 - 1e-9, 0.5, 0.5, 0.1]], dtype=torch.float64)
    plan = masking.weighted(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), keep=2, noise=noise)
    assert plan.visible.tolist() == [3, 0]


@given(seed=st.integers(0, 10**6), tokens=st.integers(4, 40), views=st.integers(1, 4))
@property_test
def test_disjoint_views_share_nothing(seed, tokens, views):
    noise = torch.rand(3, tokens, generator=seeded(seed))
    keep = tokens // views
    plans = masking.disjoint(3, tokens, views=views, keep=keep, noise=noise)
    for plan in plans:
        check_invariants(plan)
    assert torch.equal(torch.cat([plan.ids_keep for plan in plans], 1), noise.argsort(1)[:, : views * keep])
    with pytest.raises(ValueError, match="views x keep"):
        masking.disjoint(3, tokens, views=tokens + 1, keep=1)


@given(seed=st.integers(0, 10**6), keep=st.integers(1, 12), group=st.integers(1, 5))
@property_test
def test_mixing_shows_each_place_once(seed, keep, group):
    noise = torch.rand(3, keep * group, generator=seeded(seed))
    plan = masking.mixing(3 * group, keep * group, group, noise=noise)
    check_invariants(plan)
    assert plan.keep == keep
    assert ((~plan.mask).view(3, group, -1).sum(1) == 1).all()
    assert torch.equal(plan.ids_keep.view(3, -1), noise.argsort(1))
    with pytest.raises(ValueError, match="group must divide batch and num_tokens"):
        masking.mixing(3 * (group + 1) + 1, keep * (group + 1), group + 1)


def test_channels():
    plan = masking.channels(3, 4, 10, 0.75, generator=seeded())
    assert ((~plan.mask).view(3, 4, 10).sum(2) == 2).all()
    noise = torch.tensor([[0.0, 1, 2, 3], [0.5, 3, 2, 1], [0.99, 2, 1, 3]])
    plan = masking.channels(3, 3, 5, mode="channel", channel_noise=noise)
    assert plan.mask.view(3, 3, 5)[:, :, 0].tolist() == [[False] * 3, [False, False, True], [True, True, False]]
    shared = masking.channels(3, 3, 5, mode="channel", shared=True, channel_noise=noise[2:])
    assert (shared.mask == shared.mask[:1]).all()
    assert shared.keep == 5
    present = torch.tensor([[True, False, True], [False, True, False], [True] * 3])
    for mode in ("patch", "channel", "both"):
        plan = masking.channels(3, 3, 5, 0.25, mode=mode, present=present, generator=seeded())
        assert torch.equal(plan.absent.view(3, 3, 5), ~present[:, :, None].expand(3, 3, 5))
        assert (plan.cu_visible.diff() > 0).all()
    with pytest.raises(ValueError, match="no channel"):
        masking.channels(1, 2, 3, present=torch.zeros(1, 2, dtype=torch.bool))


def test_ragged_and_similar_leave_the_padding_absent():
    lengths = [6, 0, 3]
    plan = masking.ragged(lengths, 6, 0.5, generator=seeded())
    assert plan.cu_visible.diff().tolist() == [3, 0, 1]
    assert plan.cu_masked.diff().tolist() == [3, 0, 2]
    assert torch.equal(plan.absent, torch.arange(6) >= torch.tensor(lengths)[:, None])
    angle = torch.tensor([0.0, 0.1, 1.1, 1.3, 3.0, 3.3])
    x = torch.stack([angle.cos(), angle.sin()], 1).repeat(3, 1, 1)
    x[1], x[2, 3:] = float("nan"), float("nan")
    release = masking.similar(x, torch.tensor(lengths), 0.5, order="release")
    assert release.visible.tolist() == [0, 2, 4, 12]
    paper = masking.similar(x, lengths, 0.5)
    assert paper.visible.tolist() == [0, 1, 3, 12]
    assert torch.equal(paper.absent, plan.absent)


def test_near_masks_a_ball_of_groups():
    centres = torch.randn(4, 64, 3, generator=seeded())
    noise = torch.rand(4, generator=seeded(1))
    plan = masking.near(centres, 0.6, noise=noise)
    check_invariants(plan)
    first = (noise * 64).long()
    away = (centres - centres[torch.arange(4), first][:, None]).norm(dim=2)
    assert plan.hide == 38
    for sample in range(4):
        assert set(plan.ids_masked[sample].tolist()) == set(away[sample].argsort()[:38].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_takes_centres_in_any_unit(dtype):
    centres, noise = torch.rand(8, 64, 3, generator=seeded(), dtype=torch.float64), torch.rand(8, generator=seeded(1))
    want = masking.near(centres.to(dtype), 0.6, noise=noise).mask
    for exponent in (-70, 66, -100, 120):  # powers of two leave the numbers as they are
        assert torch.equal(masking.near(centres.to(dtype) * 2.0**exponent, 0.6, noise=noise).mask, want)
    if dtype is torch.float64:
        for far in (1e6, 5e6):
            assert torch.equal(masking.near(centres + far, 0.6, noise=noise).mask, want)


def test_similar_takes_embeddings_of_any_size():
    x = torch.randn(3, 9, 6, generator=seeded(), dtype=torch.float64)
    want = masking.similar(x, [9, 5, 7], 0.5).mask
    for size in (1e-30, 1e20, 1e100):
        assert torch.equal(masking.similar(x * size, [9, 5, 7], 0.5).mask, want)
    assert torch.equal(masking.similar((x * 1e20).float(), [9, 5, 7], 0.5).mask, want)


def test_weighted_takes_float64_below_float32():
    weights = torch.tensor([[1e-300, 0, 1e-310, 0, 0, 0]], dtype=torch.float64)
    for seed in range(4):
        plan = masking.weighted(weights, keep=2, generator=seeded(seed))
        assert plan.ids_keep.sort(1).values.tolist() == [[0, 2]]


@pytest.mark.parametrize("bug_compat", [False, True])
def test_children_of_visible_groups_are_visible(bug_compat):
    index = torch.randint(0, 40, (3, 10, 4), generator=seeded())
    parents = masking.random(3, 10, keep=[2, 0, 10], generator=seeded(1))
    plan = masking.children(parents, index, 40, bug_compat=bug_compat)
    check_invariants(plan)
    assert plan.keep is None
    want = torch.ones(3, 40, dtype=torch.bool)
    for sample, row in enumerate(parents.mask):
        for group, masked in enumerate(row):
            for token in index[sample, group].tolist():
                if not masked:
                    want[sample, token] = False
                elif bug_compat:
                    want[0, 0] = False
    assert torch.equal(plan.mask, want)
    assert plan.mask[0, 0] != bug_compat
    every = masking.children(masking.TokenMask.all_visible(3, 10), index, 40, bug_compat=bug_compat)
    assert every.mask[0, 0] == (0 not in index[0])


def test_children_refuse_what_does_not_fit():
    parents, index = masking.random(3, 10, 0.5), torch.zeros(3, 10, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"index must be \[3, 10, K\] for this plan, got \[3, 9, 4\]"):
        masking.children(parents, index[:, 1:], 40)
    with pytest.raises(TypeError, match="index must be int64"):
        masking.children(parents, index.int(), 40)
    with pytest.raises(ValueError, match=r"index: a position lies outside \[0, 40\)"):
        masking.children(parents, index + 40, 40)
    with pytest.raises(TypeError, match="plan must be"):
        masking.children(parents.mask, index, 40)


@pytest.mark.parametrize(("sizes", "ratio", "replace"), [([10], 0.5, 0.0), ([7, 1, 30], 0.75, 0.25), ((4, 4), 1, 1)])
def test_nodes_are_masked_in_each_graph(sizes, ratio, replace):
    plan = masking.nodes(sizes, ratio, replace, generator=seeded())
    of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    hidden = [int(ratio * size) for size in sizes]
    assert torch.bincount(of[plan.masked], minlength=len(sizes)).tolist() == hidden
    assert torch.cat([plan.masked, plan.visible]).sort()[0].tolist() == list(range(sum(sizes)))
    assert int(plan.token.sum()) == sum(count - int(replace * count) for count in hidden)
    assert torch.equal(of[plan.source], of)
    shown = ~plan.token
    shown[plan.masked] = False
    assert torch.equal(plan.source[shown], torch.arange(sum(sizes))[shown])
    with pytest.raises(ValueError, match="donor_noise"):
        masking.nodes([4], 0.5, 0.5, noise=torch.rand(1, 4))
    with pytest.raises(ValueError, match="at least one graph"):
        masking.nodes([], 0.5)


@pytest.mark.parametrize(("mask", "sign"), [("highest", 1), ("lowest", -1)])
def test_guided_masks_the_top_of_each_frame(mask, sign):
    scores = torch.randn(3, 4, 10, generator=seeded())
    scores[:, :, 5:] = scores[:, :, :5]  # every score twice
    plan = masking.guided(scores, 0.56, mask=mask)
    check_invariants(plan)
    assert plan.keep == 4 * 5
    for sample, row in zip(scores.tolist(), plan.mask.view(3, 4, 10).tolist()):
        for frame, hidden in zip(sample, row):
            order = sorted(range(10), key=lambda i: (sign * frame[i], i))  # of equal ones the first stays visible
            assert [i for i in range(10) if hidden[i]] == sorted(order[5:])
    assert torch.equal(plan.ids_keep, plan.ids_keep.sort(1).values)


def test_guided_by_noise_is_random_in_each_frame():
    noise = torch.rand(6, 3, 8, generator=seeded(1))
    guided = masking.guided(noise, keep=3).mask.view(18, 8)
    assert torch.equal(guided, masking.random(18, 8, keep=3, noise=noise.view(18, 8)).mask)
    assert masking.guided(noise, 0.6).keep == 3 * (8 - int(0.6 * 8))


def test_guided_refuses():
    scores = torch.zeros(2, 3, 4)
    scores[0, 1, 0] = float("nan")
    assert masking.guided(scores, keep=3).mask.view(2, 3, 4)[0, 1].tolist() == [True, False, False, False]
    for arguments, error, reason in (
        ({"scores": scores[0], "ratio": 0.5}, ValueError, "scores must"),
        ({"scores": scores.long(), "ratio": 0.5}, TypeError, "scores must"),
        ({"scores": scores[:, :0], "ratio": 0.5}, ValueError, "at least one sample, frame and token"),
        ({"scores": scores, "ratio": 0.5, "mask": "top"}, ValueError, "mask must be one of"),
        ({"scores": scores, "keep": [1, 2]}, TypeError, "one ratio or keep"),
        ({"scores": scores, "keep": 5}, ValueError, "keep"),
        ({"scores": scores}, ValueError, "exactly one"),
    ):
        with pytest.raises(error, match=reason):
            masking.guided(**arguments)


def test_words_are_hidden_whole():
    words = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 3, -1, -2], [-1, 0, 0, 0, 0, 0, 0, 0, 0, -1]])
    for seed in range(30):
        hidden = masking.whole_words(words, 0.4, generator=seeded(seed))
        assert hidden[1].tolist() == [False, *[True] * 8, False]  # nothing fits: a word has to go
        found = sorted(set(words[0][hidden[0]].tolist()))
        assert -1 not in found
        assert hidden[0].sum() <= round(0.4 * 9)
        for word in found:
            assert hidden[0][words[0] == word].all()
    noise = torch.tensor([[0.0, 0.2, 0.1, 0.3, *[1.0] * 6]])
    assert masking.whole_words(words[:1], 0.4, noise=noise)[0].nonzero().flatten().tolist() == [1, 2, 3, 7]


def test_hidden_tokens_are_replaced():
    ids, hidden = torch.arange(4000).view(1, -1) % 7, torch.arange(4000).view(1, -1) % 2 == 0
    found = masking.replaced(ids, hidden, 9, 10, noise=torch.rand(1, 8000, generator=seeded()))
    assert torch.equal(found[~hidden], ids[~hidden])
    new, old = found[hidden], ids[hidden]
    assert abs((new == 9).double().mean() - 0.81) < 0.03
    assert abs((new == old).double().mean() - 0.11) < 0.03
    assert set(new.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="mask_id"):
        masking.replaced(ids, hidden, 10, 10, noise=torch.rand(1, 8000))


def test_nested_thresholds():
    noise = torch.rand(4, 49, generator=seeded())
    plan, hidden = masking.nested(4, 49, 25, 37, noise=noise)
    check_invariants(plan)
    rank = noise.argsort(1).argsort(1)
    assert torch.equal(plan.mask, rank < 25)
    assert torch.equal(hidden, rank < 37)
    tied = masking.nested(1, 6, 2, 4, noise=torch.zeros(1, 6))
    assert tied.plan.mask.tolist() == [[True, True, False, False, False, False]]
    assert tied.hidden.tolist() == [[True] * 4 + [False] * 2]
    for drop, hide in ((3, 2), (6, 6), (2, 7)):
        with pytest.raises(ValueError, match="must rise to num_tokens"):
            masking.nested(1, 6, drop, hide)
