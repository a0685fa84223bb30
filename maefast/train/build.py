"""Building the recipe that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from maefast import recipes
from maefast.errors import CheckpointError, ConfigError
from maefast.recipe import Recipe
from maefast.recipes.masked_images import MaskedImages

from .config import PretrainConfig
from .image_models import build_model, mask_ratio_of
from .weights import load_pretrained

# Options of the run that are arguments of a recipe, where it has them.
_ARGUMENTS = ("img_size", "patch_size", "mask_ratio", "norm_pix", "channels")
_OF_WEIGHTS = ("teacher", "backbone", "metric")  # arguments of recipes that name weights
_FILES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")
# Options that only some data read.
_OF_DATA = (
    "crop_scale", "crop_ratio", "flip", "value_range", "mean", "std", "pixel_bits", "max_pixels", "gpu_decode",
)  # fmt: skip


def recipe_options(name: str, *, demo: bool = False) -> dict[str, Any]:
    """Options of a run with a recipe where they differ from PretrainConfig's defaults: those of the paper, and with
    `demo` those of a run of a minute or two on what ships with the recipe.

    Raises:
        ConfigError: no such recipe.
    """
    spec = kind_of(name).spec
    options = {"recipe": name, **spec.training}
    return {**options, "epochs": PretrainConfig.epochs, "data": "demo", **spec.demo} if demo else options


def build_recipe(config: PretrainConfig, create: Callable[..., nn.Module] | None = None) -> Recipe:
    """Freshly initialised from torch's global generator. `create` may return a recipe, or a model of images."""
    if config.recipe is not None and create is None:
        cls = kind_of(config.recipe)
        if not issubclass(cls, MaskedImages):
            return _checked(config, build_unchecked(config))
        sizes = _said(lambda: recipes.arguments_of(cls.spec, config.size))
        config = replace(config, model=sizes["model"])
    made = build_model(config, create)
    if isinstance(made, Recipe):
        return made
    measured = config.channels is not None
    return MaskedImages(made, mask_ratio_of(made, config.mask_ratio), raw=config.picture == "raw", measured=measured)


def kind_of(name: str) -> type[Recipe]:
    """The class of a recipe. ConfigError: there is none of this name."""
    return _said(lambda: recipes.kind(name))


def build_unchecked(config: PretrainConfig) -> Recipe:
    """A recipe that wraps no model of `maefast.models`, though it may lack what it is trained with."""
    name, arguments = config.recipe, dict(config.model_args)
    known = recipes.argument_names(name)
    for option in _ARGUMENTS:
        value = getattr(config, option)
        if value is not None:
            if option not in known:
                raise ConfigError(
                    f"the recipe {name!r} has no --{option.replace('_', '-')}; its arguments (--model-arg NAME=VALUE) "
                    f"are {', '.join(known)}"
                )
            arguments[option] = value
    recipe = _said(lambda: _with_weights(name, config.size, arguments))
    if config.recompute:
        raise ConfigError(f"the recipe {name!r} has no --recompute: only the mae_* models have it")
    return recipe


def _with_weights(name: str, size: str | None, arguments: dict[str, Any]) -> Recipe:
    """`recipes.create`, which reads the weights that arguments name. ConfigError: they cannot be read."""
    given = {key: value for key, value in arguments.items() if isinstance(value, str)}
    for key, value in given.items():
        if value.endswith(_FILES) and not Path(value).expanduser().exists():  # and no name for a hub to look up
            raise ConfigError(f"{key} {value!r}: there is no such file (--model-arg {key}=FILE)")
    try:
        return recipes.create(name, size, **arguments)
    except (OSError, ImportError) as error:  # of transformers too, which asks the network for a name
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        asked = [key for key in _OF_WEIGHTS if given.get(key, "random") != "random"]
        named = [key for key in asked if given[key] in reason] or asked
        if not named:
            raise
        which = " or ".join(f"{key} {given[key]!r}" for key in named)
        raise ConfigError(f"{which} cannot be read: {reason} (give a file or folder that is there)") from error


def _checked(config: PretrainConfig, recipe: Recipe) -> Recipe:
    """The recipe, if it has all that it needs and no option was given that its data would not read."""
    if missing := recipe.missing():
        raise ConfigError(f"the recipe {config.recipe!r} needs {missing}")
    read = getattr(recipe.wants, "options", ())  # those of _OF_DATA that it knows
    usual = {entry.name: entry.default for entry in fields(PretrainConfig)} | recipe.spec.training | recipe.spec.demo
    for option in _OF_DATA:
        if option not in read and getattr(config, option) != usual[option]:
            raise ConfigError(
                f"--{option.replace('_', '-')} means nothing to the {recipe.spec.modality} of {config.recipe}"
            )
    return recipe


def _said(make: Callable[[], Any]) -> Any:
    """What `make` returns, its complaints as ConfigError."""
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def load_start(recipe: Recipe, config: PretrainConfig, say: Callable[[str], object]) -> None:
    """The weights that `--init-from` names."""
    if recipe.network is not recipe:
        load_pretrained(recipe.network, config.init_from, say, ema=config.init_ema, exact=config.init_exact)
        return
    try:
        recipes.load_weights(recipe, config.init_from, ema=config.init_ema)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config.init_from} does not fit the recipe {config.recipe!r}: {error}") from error
    say(f"weights from {config.init_from}")
