from __future__ import annotations

import pytest
import torch

from maefast import models, recipes
from maefast.data.points import PointBatch
from tests.recipes.common import RecipeTests, equal_to_reference


class TestI2PMAE(RecipeTests):
    name = "i2p_mae"
    toy = {
        "teacher": "random", "points": 60, "groups": [24, 12, 6], "group_sizes": [5, 4, 3], "mask_ratio": 0.6,
        "embed_dims": [16, 16, 32], "depths": [1, 2, 1], "num_heads": 2, "drop_path": 0.0, "img_size": 32,
        "patch_size": 8, "teacher_dim": 16,
    }  # fmt: skip
    taught = mask_of_teacher = True

    def batch(self, recipe, size=3):
        return PointBatch(torch.randn(size, 60, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
