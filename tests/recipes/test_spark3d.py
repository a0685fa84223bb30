from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.volumes import VolumeBatch
from maefast.nn.residual_unet import Conv3d, ResidualEncoder
from tests.recipes.common import RecipeTests, equal_to_reference


class TestSparK3D(RecipeTests):
    name = "spark3d"
    toy = {
        "img_size": [8, 16, 8], "cell": [4, 4, 4], "channels": 2, "widths": [4, 4, 6, 6], "depths": [1, 2, 1, 1],
        "mask_ratio": 0.6,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        shape = (recipe.wants.channels, *recipe.wants.size)
        return VolumeBatch(torch.rand(size, *shape, generator=generator, dtype=torch.float64))

    @pytest.mark.parametrize(
        "changes", [{"norm_cells": True}, {"densify": "token"}, {"decoder_depth": 2, "cell": [8, 8, 4]}]
    )
    def test_variants(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_counts(self):
        plan = self.make().view(self.batch(self.make()), seed=3).plan
        assert (plan.keep, plan.hide) == (7, 9)  # int(16 * 0.6)
        with torch.device("meta"):
            whole = recipes.create("spark3d")
        assert whole.grid == (10, 10, 10)
        assert whole.hidden == 750
        assert [len(stage.blocks) for stage in whole.encoder.stages] == [1, 3, 4, 6, 6, 6]

    def test_hidden_voxels_reach_no_prediction(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, *recipe.grid)
        for axis, side in enumerate(recipe.cell, 2):
            hidden = hidden.repeat_interleave(side, axis)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert not torch.equal(other, view.parts)
        assert torch.equal(recipe(type(view)(other, view.plan)).pred, recipe(view).pred)

    def test_the_baseline_is_the_mean_of_what_is_seen(self):
        recipe = self.make(channels=1)
        view = recipe.view(self.batch(recipe), seed=1)
        hidden = view.plan.mask.view(3, 1, *recipe.grid)
        for axis, side in enumerate(recipe.cell, 2):
            hidden = hidden.repeat_interleave(side, axis)
        each = [((x[h] - x[~h].mean()) ** 2).mean() for x, h in zip(view.parts, hidden)]
        torch.testing.assert_close(recipe.baseline(view).loss, torch.stack(each).mean())

    def test_a_step_trains_everything(self):
        """But the mask token of a stage that is coarser than the cells, which hides nothing."""
        recipe = self.make()
        recipe(self.batch(recipe)).loss.backward()
        still = [name for name, p in recipe.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == ["mask_tokens.3"]

    def test_names_of_the_public_code(self):
        found = recipes.public_weights(self.make())
        for name in (
            *("encoder.stem.convs.0.all_modules.0.weight", "encoder.stages.1.blocks.0.conv1.all_modules.1.bias"),
            *("encoder.stages.2.blocks.0.skip.1.all_modules.0.weight", "decoder.transpconvs.0.bias"),
            *("decoder.stages.2.convs.0.all_modules.0.weight", "decoder.seg_layers.4.weight", "densify_projs.1.weight"),
        ):
            assert name in found
        assert "densify_projs.0.weight" not in found

    def test_features_and_refusals(self):
        recipe = self.make()
        assert recipe.encode(self.batch(recipe)).shape == (3, 2, 6)
        for changes, reason in (
            ({"cell": 3}, "not a multiple of the patch size"),
            ({"img_size": 12}, r"no multiple of 2\^3"),
            ({"mask_ratio": 0.01}, "hides 0 of 16 cells"),
            ({"mask_ratio": 1.0}, "hides 16 of 16"),
            ({"densify": "none"}, "densify must be one of"),
            ({"depths": [1, 1]}, "one for every stage"),
        ):
            with pytest.raises(ValueError, match=reason):
                self.make(**changes)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bfloat16_on_maps_shorter_than_the_kernel(size):
    """Where oneDNN leaves the weight gradient of a plain convolution unwritten (with bfloat16 by AVX-512)."""
    torch.manual_seed(0)
    conv, x = Conv3d(16, 16, 3, padding=1), torch.randn(2, 16, size, size, size)
    grad, found = torch.randn_like(x), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = conv(x)
        found.append(torch.autograd.grad(out, conv.weight, grad.to(out.dtype))[0])
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_every_dense_convolution_is_of_that_kind():
    dense = [m for m in TestSparK3D().make().modules() if isinstance(m, torch.nn.Conv3d)]
    assert {type(m) for m in dense} == {Conv3d}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_dense_convolutions_are_torchs(size, stride):
    torch.manual_seed(0)
    plain = torch.nn.Conv3d(3, 5, 3, stride, 1).double()
    conv = Conv3d(3, 5, 3, stride, 1).double()
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, size, size + 1, size, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (plain, conv):
        out = module(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


def test_the_encoder_gives_every_stage():
    maps = ResidualEncoder(2, (4, 6, 6), (1, 1, 2))(torch.randn(1, 2, 8, 12, 4))
    assert [tuple(m.shape) for m in maps] == [(1, 4, 8, 12, 4), (1, 6, 4, 6, 2), (1, 6, 2, 3, 1)]
