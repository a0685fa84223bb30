from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from maefast import recipes
from maefast.data.captioned_images import CaptionBatch
from maefast.recipe import View
from tests.recipes.common import RecipeTests, equal_to_reference

# Words of captions, -1 special: of one token each, of several, a long one.
WORDS = [[-1, 0, 1, -1], [-1, 0, 0, 1, 1, 1, 2, -1], [-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1], [-1, 0, -1]]


class TestM3AE(RecipeTests):
    name = "m3ae"
    toy = {
        "length": 12, "vocabulary": 19, "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "text_depth": 1,
        "fusion_depth": 3, "layer": 2, "num_heads": 2, "drop": 0.0, "decoder_embed_dim": 16, "decoder_depth": 1,
        "decoder_num_heads": 2,
    }  # fmt: skip

    def batch(self, recipe, size=4):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (4, 3, *recipe.wants.size), generator=generator, dtype=torch.uint8)
        ids = torch.randint(0, 19, (4, 12), generator=generator)
        words = np.full((4, 12), -2)
        for row, some in zip(words, WORDS):
            row[: len(some)] = some
        return CaptionBatch(images[:size], ids[:size], words[:size])

    @pytest.mark.parametrize("changes", [{"layer": 0}, {"layer": 3}, {"norm_pix": False, "whole_words": False}])
    def test_other_layers_and_targets(self, changes):
        """That of the pixels ends at `layer`: what the reference, which goes on to the last, throws away."""
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=3), self.reference)

    def test_what_is_not_used_is_not_computed(self):
        recipe, calls = self.make(), []
        for stream in ("language", "vision"):
            for i, layer in enumerate(getattr(recipe.fusion, f"{stream}_layers")):
                layer.register_forward_hook(lambda _, args, out, at=(stream, i): calls.append((*at, len(out))))
        encoded = []
        for part in (recipe.language_encoder, recipe.vision_encoder):
            part.register_forward_hook(lambda _, args, out: encoded.append(tuple(out.shape)))
        view = recipe.view(self.batch(recipe), seed=1)
        recipe(view)
        tokens, hidden = sum(map(len, WORDS)), len(view.target.ids)
        assert encoded == [(2 * tokens, 16), (4, 17, 16), (4, 5, 16)]  # whole captions and images once
        patches = [("language", 0, tokens), ("vision", 0, 20), ("vision", 1, 20)]
        pairs = [("language", 0, 2 * tokens), ("vision", 0, 136), ("language", 1, 2 * tokens), ("vision", 1, 136)]
        assert calls == [*patches, *pairs, ("language", 2, hidden + 4), ("vision", 2, 4)]

    def test_masks(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        plan, told, starts = view.plan, view.target, [0, 4, 12, 24]
        assert (plan.image.keep, plan.image.hide) == (4, 12)
        # max(1, round(.15 * tokens)) hidden tokens, of whole words: 1 of 4, 1 of 8 (only one word is as short), 2 of
        # 12 (of words of nine and one), 1 of 3.
        rows = plan.rows[:-4].tolist()
        assert plan.telling.cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
        assert rows[0] in (1, 2)
        assert rows[1:] == [4 + 6, 12 + 10, 24 + 1]
        assert plan.rows[-4:].tolist() == [27 + start for start in starts]
        batch = self.batch(recipe)
        whole = torch.cat([ids[: len(words)] for ids, words in zip(batch.ids, WORDS)])
        assert torch.equal(plan.ids[27:], whole)
        assert torch.equal(told.ids, whole[rows])
        same = torch.ones(27, dtype=torch.bool)
        same[rows] = False
        assert torch.equal(plan.ids[:27][same], whole[same])
        assert plan.places.tolist() == [i for words in WORDS for i in range(len(words))] * 2
        assert told.matched.sum() == 2
        assert torch.equal(plan.image_of == torch.arange(4), told.matched == 1)

    def test_a_caption_that_is_alone_keeps_its_image(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe, 1), seed=1)
        assert view.target.matched.tolist() == [1]
        assert recipe(view).loss.isfinite()
        assert recipe.view(self.batch(recipe, 3), seed=1).target.matched.sum() == 1

    def test_tokens_alone(self):
        recipe = self.make(whole_words=False, word_ratio=0.5)
        plan = recipe.view(self.batch(recipe), seed=1).plan
        assert plan.telling.cu_seqlens.diff()[:4].tolist() == [2, 4, 6, 1]

    def test_hidden_patches_and_words_reach_nothing(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        plan = view.plan
        hidden = plan.image.mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        other = torch.where(hidden, torch.randn_like(view.parts), view.parts)
        assert torch.equal(recipe.vision_encoder(other, plan.image), recipe.vision_encoder(view.parts, plan.image))
        # What hidden tokens were stands in the target alone, and in the whole captions, of which no token is told.
        ids = plan.ids.clone()
        ids[27:] = torch.randint(0, 19, (27,), generator=torch.Generator().manual_seed(1))
        found = recipe(View(view.parts, replace(plan, ids=ids), view.target))
        assert torch.equal(found.pred[0], recipe(view).pred[0])
        assert not torch.equal(found.pred[1], recipe(view).pred[1])
        assert not torch.equal(found.pred[2], recipe(view).pred[2])

    def test_packed_is_each_caption_alone(self):
        recipe = self.make()
        batch = self.batch(recipe)
        whole = recipe.encode(batch)
        assert whole.shape == (4, 32)
        for b in range(4):
            one = CaptionBatch(batch.images[b : b + 1], batch.ids[b : b + 1], batch.words[b : b + 1])
            torch.testing.assert_close(recipe.encode(one), whole[b : b + 1], rtol=0, atol=1e-12)
        batch.ids[torch.from_numpy(batch.words == -2)] = 1000  # padding, which nobody reads
        assert torch.equal(recipe.encode(batch), whole)

    def test_names_of_the_authors(self):
        names = set(recipes.public_weights(self.make()))
        assert names >= {
            "vision_encoder.visual.conv1.weight", "vision_encoder.visual.transformer.resblocks.0.attn.in_proj_weight",
            "vision_encoder.visual.class_embedding", "vision_encoder.visual.ln_post.bias",
            "language_encoder.embeddings.word_embeddings.weight",
            "language_encoder.encoder.layer.0.attention.self.query.weight", "modality_type_embeddings.weight",
            "multi_modal_language_layers.2.crossattention.output.LayerNorm.bias",
            "multi_modal_vision_pooler.dense.bias",
            "multi_modal_vision_proj.weight", "mlm_head.transform.dense.weight", "mlm_head.bias",
            "mim_head.decoder.resblocks.0.mlp.c_fc.weight", "mim_head.decoder_pos_embed", "mim_head.mask_token",
            "mim_head.decoder_pred.weight", "itm_head.fc.weight",
        }  # fmt: skip

    def test_fusion_and_heads_learn_faster(self):
        recipe = self.make()
        groups = recipe.parameter_groups(0.01)
        assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {
            (a, b) for a in (1, 5) for b in (0, 0.01)
        }
        assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in recipe.parameters())

    def test_dropout_is_drawn_in_training_alone(self):
        recipe = self.make(drop=0.5)
        view = recipe.view(self.batch(recipe), seed=1)
        assert torch.equal(recipe(view).loss, recipe(view).loss)
        recipe.train()
        assert not torch.equal(recipe(view).loss, recipe(view).loss)

    def test_refusals(self):
        for arguments, message in (
            ({"layer": 4}, "layer must name"),
            ({"fusion_depth": 0}, "fusion_depth must be at least 1"),
            ({"mask_id": 19}, r"mask_id must lie in \[0, 19\)"),
            ({"img_size": 18}, "not a multiple of the patch size"),
        ):
            with pytest.raises(ValueError, match=message):
                recipes.create("m3ae", **{**self.toy, **arguments})
        recipe = self.make()
        for change, message in (
            ({"ids": torch.full((4, 12), 19)}, r"ids must lie in \[0, 19\)"),
            ({"ids": torch.zeros(4, 11).long()}, r"ids must be int64 \[4, 12\]"),
            ({"words": np.full((4, 12), -1)}, r"captions \[0, 1, 2, 3\] have no word"),
            ({"words": np.full((4, 12), -2)}, "begin at the first token"),
            ({"images": torch.zeros(4, 3, 16, 16)}, "images must be uint8"),
        ):
            with pytest.raises((ValueError, RuntimeError), match=message):
                recipe(replace(self.batch(recipe), **change))
