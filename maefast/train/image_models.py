"""Building the model of images that a configuration, or a file, asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from maefast.errors import ConfigError
from maefast.masking import keep_count
from maefast.recipe import Recipe

from .config import PretrainConfig


def build_model(config: PretrainConfig, create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The model a configuration asks for, freshly initialised from torch's global generator."""
    arguments = dict(config.model_args)
    _check_once(config, arguments)
    if config.img_size is not None:
        arguments["img_size"] = config.img_size
    if config.channels is not None and arguments.setdefault("in_chans", config.channels) != config.channels:
        raise ConfigError(f"--channels {config.channels}, and in_chans is {arguments['in_chans']}: leave one out")
    known = _argument_names(config.model) if create is None else None
    if known is None:  # a model of the user's own: its default, unless asked
        if config.norm_pix is not None:
            arguments.setdefault("norm_pix_loss", config.norm_pix)
    elif "norm_pix_loss" in known:
        arguments.setdefault("norm_pix_loss", config.norm_pix is not False)
    elif config.norm_pix is False:
        raise ConfigError(f"the model {config.model!r} has no --no-norm-pix: {ALWAYS_NORMAL}")
    if config.patch_size is not None:
        if known is not None and "patch_size" not in known:
            raise ConfigError(
                f"the model {config.model!r} has no --patch-size: it masks cells as large as the downsampling of its "
                "encoder, 32 x 32 pixels; leave the option out"
            )
        arguments["patch_size"] = config.patch_size
    if known is not None and (unknown := sorted(set(arguments) - set(known))):
        raise ConfigError(
            f"the model {config.model!r} takes no {', '.join(unknown)}; its arguments (--model-arg NAME=VALUE) are "
            f"{', '.join(known)}"
        )
    model = create_model(config.model, arguments, create)
    if not isinstance(model, Recipe):
        check_mask(model, mask_ratio_of(model, config.mask_ratio))
    if config.recompute:
        if not hasattr(model, "recompute"):
            raise ConfigError(f"the model {config.model!r} has no --recompute: only the mae_* models have it")
        model.recompute = True
    return model


def _check_once(config: PretrainConfig, arguments: dict[str, Any]) -> None:
    """Raise where an option and an argument of the model say different things, or the argument is no answer."""
    if not isinstance(arguments.get("norm_pix_loss", True), bool):
        raise ConfigError(f"norm_pix_loss must be true or false, not {arguments['norm_pix_loss']!r}")
    for flag, name, value in (
        ("--img-size", "img_size", config.img_size),
        ("--patch-size", "patch_size", config.patch_size),
        ("--norm-pix" if config.norm_pix else "--no-norm-pix", "norm_pix_loss", config.norm_pix),
    ):
        other = arguments.get(name)
        if value is not None and other is not None and _sides(value) != _sides(other):
            said = "" if isinstance(value, bool) else f" {value}"
            raise ConfigError(f"{flag}{said}, and {name} is {other}: leave one out")


def _sides(value: Any) -> Any:
    """A size and a pair of it are the same."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value, value]
    return list(value) if isinstance(value, (list, tuple)) else value


ALWAYS_NORMAL = "SparK's targets are always normalised cell by cell"


def _argument_names(name: str) -> list[str]:
    from maefast.models import argument_names

    try:
        return argument_names(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def mask_ratio_of(model: nn.Module, mask_ratio: float | None) -> float:
    """`mask_ratio`, or for None the usual one of the model: 0.75 for MAE, 0.6 for SparK and FCMAE."""
    return getattr(model, "usual_mask_ratio", 0.75) if mask_ratio is None else mask_ratio


def check_mask(model: nn.Module, mask_ratio: float) -> None:
    """Raise ConfigError unless `mask_ratio` masks some patches of the model and leaves some visible."""
    patches, visible = model.num_patches, -1
    if 0 <= mask_ratio <= 1:
        visible = keep_count(patches, mask_ratio, getattr(model, "keep_rule", "floor"))
    if not 0 < visible < patches:
        few = "; a larger --img-size has more of them" if patches < 16 else ""
        raise ConfigError(f"--mask-ratio {mask_ratio} leaves {max(visible, 0)} of {patches} patches visible{few}")


def create_model(name: str, arguments: dict[str, Any], create: Callable[..., nn.Module] | None = None) -> nn.Module:
    """`maefast.models.create`, with its complaints turned into ConfigError."""
    if create is None:
        from maefast.models import create
    try:
        return create(name, **arguments)
    except (TypeError, ValueError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ConfigError(f"the model {name!r} with {arguments} cannot be built: {text}") from error
