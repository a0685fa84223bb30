"""Building the recipe that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from maefast.recipe import Recipe
from maefast.recipes.masked_images import MaskedImages

from .config import PretrainConfig
from .image_models import build_model, mask_ratio_of


def build_recipe(config: PretrainConfig, create: Callable[..., nn.Module] | None = None) -> Recipe:
    """Freshly initialised from torch's global generator. `create` may return a recipe, or a model of images."""
    made = build_model(config, create)
    if isinstance(made, Recipe):
        return made
    return MaskedImages(made, mask_ratio_of(made, config.mask_ratio), raw=config.picture == "raw")
