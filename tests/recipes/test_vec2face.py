from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maefast import masking, recipes
from maefast.data.vectors import VectorBatch
from maefast.recipe import Progress, View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestVec2Face(RecipeTests):
    name = "vec2face"
    demo_share = 0.7
    toy = {
        "dim": 8, "img_size": 12, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16,
        "decoder_depth": 1, "decoder_num_heads": 2, "head_in": 8, "head_channels": 4, "head_multiples": [1, 2, 2],
        "head_blocks": 1, "drop": 0.0,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (3, 3, *recipe.wants.size), generator=generator, dtype=torch.uint8)
        return VectorBatch(torch.randn(3, recipe.wants.dim, generator=generator)[:size], images[:size])

    @pytest.mark.parametrize("changes", [{"rows": "hidden"}, {"head_shortcut": "input"}, {"drop_ratio": 0.0}])
    def test_other_losses_and_heads(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=3), self.reference)

    def test_masks_are_nested(self):
        recipe, shares = self.make(), []
        for seed in range(30):
            plan, hidden = recipe.view(self.batch(recipe), seed=seed).plan
            assert (plan.hide, plan.keep) == (5, 4)  # ceil(9 / 2) dropped
            assert (hidden | ~plan.mask).all()  # what is dropped is hidden
            count = hidden.sum(1)
            assert (count == count[0]).all()
            shares.append(int(count[0]))
        assert set(shares) == {5, 6, 7, 8, 9}

    def test_with_all_hidden_every_place_is_filled_alike(self):
        """Before positions, that is of f's latent."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        noise = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
        seen = []
        with torch.no_grad():
            recipe.decoder_pos_embed_learned.zero_()
        recipe.decoder_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for hide in (9, 6):
            recipe(replace(view, plan=masking.nested(3, 9, 5, hide, noise=noise)))
        assert torch.equal(seen[0], seen[0][:, :1].expand_as(seen[0]))
        same = (seen[1] == seen[1][:, :1]).all(2)
        assert same[:, 1:].sum(1).tolist() == [6, 6, 6]

    def test_hidden_rows_reach_nothing(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        f = recipe.latent_prior_proj_f(view.parts)
        rows = recipe.map(f)
        other = torch.where(view.plan.hidden[..., None], torch.randn_like(rows), rows)
        assert torch.equal(recipe.latents(f, rows, view.plan), recipe.latents(f, other, view.plan))

    def test_the_map_is_a_target_without_a_gradient(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        found = recipe(view)
        (grad,) = torch.autograd.grad(found.terms["rows"], recipe.decoder_norm.bias, retain_graph=True)
        y = found.pred[0]
        want = 2 * (y - recipe.map(recipe.latent_prior_proj_f(view.parts))).mean(0).sum(0) / (9 * 16)
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)

    def test_networks_of_the_user(self):
        matrix = torch.randn(8, 3 * 12 * 12, dtype=torch.float64)
        calls = {
            "perceptual": lambda one, other: (one - other).abs().mean((1, 2, 3)),
            "identity": lambda images: images.flatten(1) @ matrix.T,
            "adversary": lambda images: images.mean((1, 2, 3)),
        }
        recipe = self.make(**calls)
        batch = self.batch(recipe)
        early, late = (recipe.view(batch, seed=1, progress=Progress(step, 10, 0.0)) for step in (7, 8))
        found = recipe(late)
        made, images = found.pred[1], late.target[0]
        want = {
            "perceptual": 0.2 * (made - images).abs().mean(),
            "identity": (1 - torch.cosine_similarity(made.flatten(1) @ matrix.T, late.parts)).mean(),
            "adversary": -made.mean(),
        }
        for name, term in want.items():
            torch.testing.assert_close(found.terms[name], term, rtol=1e-9, atol=1e-12)
        assert recipe(early).terms["adversary"] == 0
        assert not any("calls" in name for name in recipe.state_dict())

    def test_dropout_is_drawn_in_training_alone(self):
        recipe = self.make(drop=0.5)
        view = recipe.view(self.batch(recipe), seed=1)
        assert torch.equal(recipe(view).loss, recipe(view).loss)
        recipe.train()
        assert not torch.equal(recipe(view).loss, recipe(view).loss)

    def test_names_of_the_authors(self):
        names = set(recipes.public_weights(self.make()))
        assert names >= {
            "latent_prior_proj_f.weight", "feature_token.bias", "token_emb.position_embeddings.weight",
            "token_emb.LayerNorm.weight", "blocks.0.attn.qkv.weight", "norm.bias", "decoder_embed.weight",
            "decoder_pos_embed_learned", "decoder_blocks.0.mlp.fc1.weight", "decoder_norm.weight",
            "im_decoder_proj.weight", "im_decoder.conv_in.weight", "im_decoder.mid.block_1.norm1.weight",
            "im_decoder.up.1.upsample.conv.bias", "im_decoder.up.0.block.0.nin_shortcut.weight",
            "im_decoder.norm_out.weight", "im_decoder.conv_out.bias",
        }  # fmt: skip

    def test_refusals(self):
        for arguments, message in (
            ({"img_size": 14}, "multiple of the head's 4"),
            ({"decoder_embed_dim": 8}, "8 must be 16 wide"),
            ({"rows": "some"}, "rows must be"),
            ({"drop_ratio": 1.0}, r"drop_ratio 1.0 must lie in \[0, 1\)"),
            ({"drop_ratio": 0.98}, "drop_ratio 0.98 keeps 0 of"),
            ({"head_shortcut": "none"}, "shortcut must be"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.create("vec2face", **{**self.toy, **arguments})
        with pytest.raises(TypeError, match="identity must be callable"):
            recipes.create("vec2face", **self.toy, identity=3)
        recipe = self.make()
        batch = self.batch(recipe)
        with pytest.raises(ValueError, match=r"vectors must be \[3, 8\]"):
            recipe(VectorBatch(batch.vectors[:, :5], batch.images))
        with pytest.raises(ValueError, match="images must be uint8"):
            recipe(VectorBatch(batch.vectors, batch.images.float()))
        assert isinstance(recipe.view(batch), View)
