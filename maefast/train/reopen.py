"""The recipe of a checkpoint, with or without its decoder, and data read as its run read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from maefast import recipes
from maefast.data.images.source import ImageSource
from maefast.data.runs import MODEL, MODEL_SHARDS, weights_of
from maefast.data.source import Source
from maefast.errors import CheckpointError, ConfigError
from maefast.models.fit import fit_state
from maefast.recipe import Recipe
from maefast.recipes.masked_images import MaskedImages

from . import checkpoint
from .build import build_unchecked, kind_of
from .config import PretrainConfig
from .image_models import create_model, mask_ratio_of
from .infer import infer_arguments
from .resume import resolve
from .weights import open_weights


@dataclass(frozen=True)
class Opened:
    """file: what was read; ema: of its two sets of weights the average. step, options, scale: of the run that it is of,
    where it is of one; scale is that of its images, see `maefast.data.images.pixels.Decoder`."""

    recipe: Recipe
    file: Path
    step: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: Mapping[str, float] | None = None
    ema: bool = False

    def with_random_weights(self, seed: int) -> Recipe:
        """The same recipe as training would start with."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if not isinstance(self.recipe, MaskedImages):
                return _recipe_of(self.options)
            return _wrapped(dict(self.recipe.config), self.options)

    def data(self, name: str, option: str, output: Path | str) -> Source:
        """Samples for it. TrainError: of `option`, see `Wants.open`."""
        return open_data(self.recipe, self.options, name, option, output, self.scale)


def open_data(
    recipe: Recipe,
    options: Mapping[str, Any],
    name: str,
    option: str,
    output: Path | str,
    scale: Mapping[str, float] | None = None,
) -> Source:
    """The data `name`, which were given as `option`, read with the options of a run, on the CPU."""
    given = {"data": name, "output_dir": str(output), "gpu_decode": False, "stream": False}
    try:
        source = recipe.wants.open(PretrainConfig(**{**options, **given}))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--data ", f"{option} ")) from error
    if scale and isinstance(source, ImageSource):
        source.decoder = replace(source.decoder, scale=scale)
    return source


def open_recipe(
    path: str | Path,
    name: str | None = None,
    img_size: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ema: bool = False,
    say: Callable[[str], object] = print,
) -> Opened:
    """The recipe of a run, a checkpoint or any file of weights, in eval mode.

    Args:
        path, ema: see `weights.open_weights`; also runs of the recipes of `maefast.recipes`. A decoder that the file
            has not stays as it starts.
        name, img_size, heads, say: see `infer.infer_arguments`.

    Raises:
        CheckpointError, ConfigError: what `path` holds cannot be used, and why.
    """
    folder, about = _run_folder(path), {"ema": ema}
    if folder is not None:
        state = checkpoint.read_state(folder)
        known = {entry.name for entry in fields(PretrainConfig)}
        options = {key: value for key, value in state.config.items() if key in known}
        about |= {"step": state.step, "options": options, "scale": state.extra.get("scale")}
        chosen = options.get("recipe")
        if chosen is not None and not issubclass(kind_of(chosen), MaskedImages):
            recipe = _recipe_of(options)
            try:
                recipes.load_weights(recipe, folder, ema=ema)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{folder} does not fit the recipe {chosen!r}: {error}") from error
            return Opened(recipe.eval(), weights_of(folder), **about)
    weights = open_weights(path, ema)
    preset = weights.config["name"] if weights.config else weights.family
    config = {"name": preset, **infer_arguments(weights, name, img_size, heads, say)}
    recipe = _wrapped(config, about.get("options", {}))
    try:
        recipe.model.load_state_dict(fit_state(weights.tensors, recipe.model.state_dict(), "encoder"), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{weights.source} does not fit the model: {error}") from error
    return Opened(recipe.eval(), weights.source, **about)


def _wrapped(config: dict[str, Any], options: Mapping[str, Any]) -> MaskedImages:
    """The model of images that `config` describes, freshly initialised; `options`: of its run."""
    model = create_model(config["name"], {key: value for key, value in config.items() if key != "name"})
    recipe = MaskedImages(model, mask_ratio_of(model, None), measured=options.get("channels") is not None)
    recipe.config = config
    return recipe


def _run_folder(path: str | Path) -> Path | None:
    """The checkpoint of a run, where `path` is one or holds some."""
    path = Path(path).expanduser()
    if path.name in (MODEL, MODEL_SHARDS) and (path.parent / checkpoint.STATE).is_file():
        path = path.parent
    ours = (path / checkpoint.STATE).is_file() or checkpoint.listing(path / "checkpoints")
    return resolve(path)[0] if path.is_dir() and ours else None


def _recipe_of(options: Mapping[str, Any]) -> Recipe:
    """Freshly initialised. A teacher whose file is gone is left out: features need none."""
    arguments = dict(options["model_args"])
    teacher = arguments.get("teacher")
    if isinstance(teacher, str) and teacher != "random" and not Path(teacher).exists():
        arguments["teacher"] = None
    return build_unchecked(PretrainConfig(**{**options, "model_args": arguments, "recompute": False}))
