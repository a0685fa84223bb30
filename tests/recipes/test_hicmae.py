from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maefast import recipes
from maefast.data.audiovisual import AudioVisualBatch
from tests.recipes.common import RecipeTests, equal_to_reference


class TestHiCMAE(RecipeTests):
    name = "hicmae"
    toy = {
        "frames": 4, "img_size": [16, 24], "tubelet": [2, 8, 8], "stride": 1, "mask_ratio": 0.5, "sound_frames": 16,
        "mels": 8, "patch_size": 4, "sound_mask_ratio": 0.6, "seconds": 0.175, "taps": [0, 1], "contrast": 0.3,
        "embed_dim": 16, "depth": 2, "num_heads": 2, "fusion_depth": 1, "decoder_embed_dim": 8, "decoder_num_heads": 1,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        clips = torch.randint(0, 256, (size, 3, 4, 16, 24), dtype=torch.uint8, generator=generator)
        return AudioVisualBatch(clips, torch.randn(size, 1, 16, 8, generator=generator) * 4 - 4)

    @pytest.mark.parametrize(
        "changes",
        [
            {"norm_pix": False, "difference": 1},
            {"difference": 4, "taps": [1], "fusion_depth": 2},
            {"difference": 2, "taps": [], "contrast": 0.0, "fusion_depth": 0},
        ],
    )
    def test_other_arguments(self, changes):
        recipe = self.make(**changes)
        equal_to_reference(recipe, recipe.view(self.batch(recipe), seed=1), self.reference)

    def test_target_is_a_loop(self):
        recipe = self.make()
        batch = self.batch(recipe)
        view = recipe.view(batch, seed=1)
        for b, tokens in enumerate(view.plan[0].ids_masked.tolist()):
            for row, token in zip(view.target[b], tokens):
                t, y, x = token // 6 * 2, token % 6 // 3 * 8, token % 3 * 8
                part = batch.clips[b, :, t : t + 2, y : y + 8, x : x + 8].double() / 255
                flat = part.flatten(1)
                part = ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)).view_as(part)
                want = torch.stack([part[:, 0], part[:, 1] - part[:, 0]])  # [pt, C, ph, pw]
                torch.testing.assert_close(row, want.permute(0, 2, 3, 1).flatten(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("missing", ["clips", "spectrograms"])
    def test_one_stream_alone(self, missing):
        """Trained without the other, and not by what the other would have changed."""
        recipe = self.make()
        batch = self.batch(recipe)
        both = recipe.view(batch, seed=1)
        view = recipe.view(replace(batch, **{missing: None}), seed=1)
        stays = 0 if missing == "spectrograms" else 1
        assert torch.equal(view.plan[stays].mask, both.plan[stays].mask)
        assert view.plan[1 - stays] is None
        equal_to_reference(recipe, view, self.reference)
        assert recipe(view).terms.keys() == recipe.baseline(view).terms.keys() == {("clips", "sound")[stays]}
        assert recipe.encode(replace(batch, **{missing: None})).shape == (3, (12, 8)[stays], 16)
        assert recipe.picture(view, ["a", "b", "c"]).pixels().dtype is torch.uint8
        idle = [name for name, p in recipe.named_parameters() if p.grad is not None]
        assert not idle

    def test_masks(self):
        recipe = self.make()
        seen, heard = recipe.view(self.batch(recipe), seed=3).plan
        frames = seen.mask.view(3, 2, 2, 3)
        assert torch.equal(frames[:, 0], frames[:, 1])
        assert (seen.keep, seen.hide, heard.keep, heard.hide) == (6, 6, 4, 4)
        assert not torch.equal(heard.mask[0], heard.mask[1])

    def test_published_counts(self):
        with torch.device("meta"):
            recipe = recipes.create("hicmae")
        assert (recipe.grid, recipe.sound_grid, recipe.wants.sound.samples) == ((8, 10, 10), (16, 8), 41200)
        assert recipe.wants.sound.bank.frames(41200) == 256
        for name in ("mean", "std"):
            setattr(recipe, name, torch.ones(3, 1, 1, 1))
        recipe.sound_mean, recipe.sound_scale = torch.zeros(()), torch.ones(())
        batch = AudioVisualBatch(torch.zeros(1, 3, 16, 160, 160, dtype=torch.uint8), torch.zeros(1, 1, 256, 128))
        seen, heard = recipe.view(batch, seed=0).plan
        assert (seen.keep, seen.hide, heard.keep, heard.hide) == (80, 720, 26, 102)

    def test_hidden_input_reaches_no_latent(self):
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        seen, heard = view.plan
        tubes = seen.mask.view(3, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        patches = heard.mask.view(3, 1, 4, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
        parts = [torch.where(*both, part) for both, part in zip(
            ((tubes, torch.randn_like(view.parts[0])), (patches, torch.randn_like(view.parts[1]))), view.parts
        )]  # fmt: skip
        assert not torch.equal(parts[0], view.parts[0])
        one, two = recipe(view), recipe(replace(view, parts=tuple(parts)))
        assert all(torch.equal(*both) for both in zip(one.pred, two.pred))
        assert torch.equal(one.terms["contrast"], two.terms["contrast"])

    def test_sound_tells_of_the_clip(self):
        """And the clip of its sound."""
        recipe = self.make()
        view = recipe.view(self.batch(recipe), seed=1)
        for stream in (0, 1):
            parts = list(view.parts)
            parts[stream] = parts[stream].roll(1, 0)
            mine, other = recipe(view).pred, recipe(replace(view, parts=tuple(parts))).pred
            assert not torch.allclose(mine[1 - stream], other[1 - stream])

    def test_names_of_the_authors(self):
        names = recipes.public_weights(self.make()).keys()
        for name in ("encoder.blocks.1.attn.q_bias", "encoder_audio.patch_embed.proj.weight", "mask_token",
                     "decoder.blocks.1.cross_attn.kv.weight", "decoder_audio.blocks.2.cross_norm2.bias",
                     "encoder_fusion.blocks.0.cross_attn.q.weight", "encoder_fusion.blocks_audio.0.norm1.weight",
                     "encoder_fusion.norm.weight", "encoder_fusion.norm_audio.bias", "decoder.head.weight",
                     "decoder_audio.head.bias", "encoder_to_decoder.weight", "encoder_to_decoder_audio.weight",
                     "mask_token_audio", "encoder.norm.weight"):  # fmt: skip
            assert name in names
        assert len(names) == len(self.make().state_dict())

    def test_features_and_refusals(self):
        recipe = self.make()
        batch = self.batch(recipe)
        assert recipe.encode(batch).shape == (3, 20, 16)
        for given, match in (
            (AudioVisualBatch(), "clips, spectrograms or both are wanted"),
            (replace(batch, clips=batch.clips[:, :, :2]), r"clips must be uint8 \[B, 3, 4, 16, 24\]"),
            (replace(batch, spectrograms=batch.spectrograms[:, :, :4]), r"spectrograms must be \[B, 1, 16, 8\]"),
            (replace(batch, clips=batch.clips[:2]), "as many spectrograms as clips are wanted, got 3 and 2"),
        ):
            with pytest.raises(ValueError, match=match):
                recipe(given)
        for changes, match in (
            ({"taps": [1, 0]}, r"taps must rise and name some of 2 blocks, from 0, got \[1, 0\]"),
            ({"taps": [2]}, "taps must rise"),
            ({"difference": 3}, "difference must divide the 4 frames of a clip, got 3"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"mask_ratio": 1.0}, "mask_ratio 1.0 leaves 0 of 6 tokens visible"),
            ({"sound_mask_ratio": 1.0}, "sound_mask_ratio 1.0 leaves 0 of"),
            ({"mels": 10}, "not a multiple of the patch size"),
            ({"seconds": 1.0}, r"1.0 seconds are 98 frames, which must lie in \[1, 16\]"),
        ):
            with pytest.raises(ValueError, match=match):
                self.make(**changes)
