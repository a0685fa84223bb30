from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast import recipes
from maefast.data.captioned_images import CaptionBatch
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

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (4, 3, *recipe.wants.size), generator=generator, dtype=torch.uint8)
        ids = torch.randint(0, 19, (4, 12), generator=generator)
        words = np.full((4, 12), -2)
        for row, some in zip(words, WORDS):
            row[: len(some)] = some
        return CaptionBatch(images[:size], ids[:size], words[:size])
