from __future__ import annotations

import pytest
import torch

from maefast import recipes
from maefast.data.vectors import VectorBatch
from maefast.recipe import Progress, View
from tests.recipes.common import RecipeTests, equal_to_reference


class TestVec2Face(RecipeTests):
    name = "vec2face"
    toy = {
        "dim": 8, "img_size": 12, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16,
        "decoder_depth": 1, "decoder_num_heads": 2, "head_in": 8, "head_channels": 4, "head_multiples": [1, 2, 2],
        "head_blocks": 1, "drop": 0.0,
    }  # fmt: skip

    def batch(self, recipe, size=3):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (3, 3, *recipe.wants.size), generator=generator, dtype=torch.uint8)
        return VectorBatch(torch.randn(3, recipe.wants.dim, generator=generator)[:size], images[:size])
