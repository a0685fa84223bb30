"""Masks of the caller's own, and samples that keep different numbers of patches."""

from __future__ import annotations

import pytest
import torch

import maefast
from maefast import masking
from maefast.ops import TokenMask
from tests.models.common import backends, gradients, inputs, largest_error, small


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("pred", ["masked", "full"])
def test_ragged_batch_equals_each_sample_alone(pred, backend):
    """Loss of the batch = sum over its masked patches / their number; so are the gradients."""
    ratios = [0.75, 0.25, 0.5, 0.75]
    model = small(norm_pix_loss=True, positions="learned", img_size=(32, 40))
    images, noise = inputs(model, batch=4)
    with maefast.backend(backend):
        loss, out, mask = model(images, ratios, noise, pred=pred)
        loss.backward()
        batched = {k: g.clone() for k, g in gradients(model).items()}
        model.zero_grad()
        alone = [model(images[i : i + 1], r, noise[i : i + 1], pred=pred) for i, r in enumerate(ratios)]
        removed = torch.stack([one[2].sum() for one in alone]).double()
        total = sum(one[0] * count for one, count in zip(alone, removed)) / removed.sum()
        total.backward()
    assert [int(row.sum()) for row in mask] == [15, 5, 10, 15]
    assert torch.equal(mask, torch.cat([one[2] for one in alone]))
    assert abs(loss.item() - total.item()) < 1e-12
    rows = torch.cat([one[1].flatten(0, 1) for one in alone])
    assert out.shape == ((45, 192) if pred == "masked" else (4, 20, 192))
    torch.testing.assert_close(out.reshape(-1, 192), rows, rtol=0, atol=1e-12)
    error, name = largest_error(batched, gradients(model))
    assert error < 1e-10, name


def test_equal_ratios_as_a_list_are_the_plain_case():
    model = small()
    images, noise = inputs(model)
    want = model(images, 0.5, noise)
    got = model(images, [0.5, 0.5, 0.5], noise)
    assert torch.equal(got[0], model(images, torch.tensor([0.5, 0.5, 0.5]), noise)[0])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_samples_that_mask_nothing_or_everything():
    model = small()
    images, noise = inputs(model)
    loss, out, mask = model(images, [0.0, 1.0, 0.5], noise)
    loss.backward()
    assert out.shape[0] == 16 + 8
    assert mask.sum(1).tolist() == [0, 16, 8]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_a_generator_of_ones_own():
    """The same draw as the noise made with it; the default generator is left alone."""
    model = small()
    images, _ = inputs(model)
    noise = torch.rand(len(images), model.num_patches, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    found = model(images, generator=torch.Generator().manual_seed(3))
    assert all(map(torch.equal, found, model(images, noise=noise)))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="give `noise` or `generator`, not both"):
        model(images, noise=noise, generator=torch.Generator())
    with pytest.raises(ValueError, match="give `generator` or `mask`, not both"):
        model(images, mask=masking.random(len(images), model.num_patches, 0.5), generator=torch.Generator())


def test_own_masks():
    """A plan, its bool map, and the noise that made it give the same loss; the ratio is ignored then."""
    model = small()
    images, noise = inputs(model)
    want, out, mask = model(images, 0.75, noise)
    plan = masking.random(3, 16, 0.75, noise=noise)
    same, out_plan, _ = model(images, 0.1, mask=plan)
    assert torch.equal(want, same)
    assert torch.equal(out, out_plan)
    as_bool, out_bool, mask_bool = model(images, mask=mask.bool())
    assert torch.equal(mask, mask_bool)
    assert abs(as_bool.item() - want.item()) < 1e-12
    # The bool map lists tokens by position, the noise by its order: the same predictions, permuted.
    rank = plan.ids_masked.argsort(1)[..., None].expand_as(out)
    torch.testing.assert_close(out_bool, out.gather(1, rank), rtol=0, atol=1e-12)


def test_ragged_bool_mask():
    model = small()
    images, _ = inputs(model)
    removed = torch.zeros(3, 16, dtype=torch.bool)
    removed[0, :5] = removed[1, 3:15] = removed[2, ::2] = True
    loss, out, mask = model(images, mask=removed)
    assert torch.equal(mask.bool(), removed)
    assert out.shape == (5 + 12 + 8, 192)
    full = model(images, mask=removed, pred="full")
    torch.testing.assert_close(full[1].view(-1, 192)[removed.view(-1)], out, rtol=0, atol=1e-12)
    assert abs(full[0].item() - loss.item()) < 1e-12


def test_block_and_grid_masks_of_masking():
    model = small()
    images, _ = inputs(model)
    for plan in (
        masking.block(3, model.grid_size, 0.5, min_area=2, generator=torch.Generator().manual_seed(0)),
        masking.grid(3, model.grid_size, 2),
        TokenMask.from_indices(torch.tensor([[0, 5], [3, 2], [15, 1]]), 16),
    ):
        loss, out, mask = model(images, mask=plan)
        assert torch.isfinite(loss)
        assert out.shape[1] == plan.max_masked == int(mask[0].sum())
