"""What a model is given: shapes from the command line, a batch of the user's own, or a guess from the model itself."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from maefast.errors import ConfigError
from maefast.integrations._verify import example

from .factories import RAISED, call, described, required

_SIZES = ("image_size", "img_size", "input_size", "crop_size")
_FRAMES = ("num_frames", "frames_per_clip")
_CHANNELS = ("num_channels", "in_chans")
_VIDEOS = ("pixel_values", "pixel_values_videos")  # Hugging Face's names, whose videos have frames before channels
_MASKS = ("mask", "bool_masked_pos")
_SHAPE = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d{1,18}(?:x\d{1,18})*)")  # of numbers that torch can hold


@dataclass(frozen=True)
class Given:
    """Arguments of a call of the model, on its device. text: their names and shapes, and where they come from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def given(
    model: nn.Module, shapes: Sequence[str], batch: Callable[[], Any] | None, spec: str, batch_size: int | None
) -> Given:
    """The input of `model`, the same for the same seed of torch.

    Args:
        shapes: such as "8x3x224x224" or "pixel_values=8x3x224x224": random numbers of the model's dtype. batch: gives
            the input: a tensor, positional arguments in a tuple or list, or keywords in a mapping; spec: its name.
        batch_size: of a guess; None: 8 images, 2 videos.

    Raises:
        ConfigError: a bad shape, arguments that `forward` does not take, or an input that nobody can guess.
    """
    if shapes and batch is not None:
        raise ConfigError("give --input or --batch, not both")
    if batch_size is not None and (shapes or batch is not None):
        raise ConfigError("--batch-size goes with an input that is guessed; --input and --batch have one of their own")
    if batch is not None:
        args, kwargs = _of_batch(call(batch, spec), spec)
        origin = f"from {spec}"
    elif shapes:
        args, kwargs = _of_shapes(model, shapes)
        origin = "random"
    else:
        args, kwargs = _guessed(model, batch_size)
        origin = "a guess from the model"
    parameter = example(model)
    if parameter is not None:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(parameter.device), (args, kwargs))
    return Given(args, kwargs, f"{_named(model, args, kwargs)}; {origin}")


def fits(given: Given, model: nn.Module) -> Any:
    """What the model makes of its input. ConfigError: it refuses it."""
    try:
        return given(model)
    except RAISED as error:
        raise ConfigError(f"given {given.text}, the model raised {described(error)}: {_ask(model)}") from error


def _ask(model: nn.Module) -> str:
    name = next((f"{name}=" for name in _parameters(model)), "")
    return f"say what it is given: --input {name}8x3x224x224, or --batch MODULE:FUNCTION that returns it"


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Of `forward`, by name, without *args and **kwargs."""
    either = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(_wrapped(model).forward).parameters
    return {name: p for name, p in found.items() if p.kind not in either}


def _wrapped(model: nn.Module) -> nn.Module:
    """Inside torch.compile and data parallelism, whose own `forward` names no argument."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _named(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    """Names and shapes. ConfigError: arguments that are too many, missing or unknown."""
    try:
        bound = inspect.signature(_wrapped(model).forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ConfigError(f"{type(model).__name__}.forward: {error}: {_ask(model)}") from error
    return ", ".join(f"{name} {_shape(value)}" for name, value in bound.items())


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{list(value.shape)}{kind}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_shape(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shape, value)) + ")"
    return repr(value)


def _of_batch(found: Any, spec: str) -> tuple[tuple, dict[str, Any]]:
    if isinstance(found, Mapping):
        return (), dict(found)
    if isinstance(found, (tuple, list)):
        return tuple(found), {}
    if isinstance(found, Tensor):
        return (found,), {}
    kind = type(found).__name__
    raise ConfigError(f"{spec} gives a {kind}, not a tensor, a tuple of arguments or a dict of keywords")


def _of_shapes(model: nn.Module, shapes: Sequence[str]) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = [], {}
    for text in shapes:
        match = _SHAPE.fullmatch(text.strip())
        shape = [int(number) for number in match[2].split("x")] if match else [0]
        if 0 in shape:
            raise ConfigError(f"--input wants a shape such as 8x3x224x224 or pixel_values=8x3x224x224, not {text!r}")
        if match[1] in kwargs:
            raise ConfigError(f"--input gives {match[1]} twice")
        if match[1]:
            kwargs[match[1]] = _random(model, *shape)
        else:
            args.append(_random(model, *shape))
    return tuple(args), kwargs


def _random(model: nn.Module, *shape: int) -> Tensor:
    parameter = example(model)
    try:
        return torch.randn(shape, dtype=torch.float32 if parameter is None else parameter.dtype)
    except RuntimeError as error:  # no memory, or more values than can be counted
        raise ConfigError(f"an input of {'x'.join(map(str, shape))} cannot be made: it is too large") from error


# --- a guess ------------------------------------------------------------------------------------------------


def _guessed(model: nn.Module, batch_size: int | None) -> tuple[tuple, dict[str, Any]]:
    """Images, or videos, of the size that the model says itself; with a mask where `forward` wants one."""
    model = _wrapped(model)
    names = list(_parameters(model))
    name = next((n for n in _VIDEOS if n in names), names[0] if names else "")
    others = [n for n in required(model.forward) if n != name]
    unknown = [n for n in others if n not in _MASKS]
    conv = _image_convolution(model)
    size = _first(model, _SIZES)
    if unknown or not name or (conv is None and size is None):
        why = "its forward names no argument" if not name else "it names no size and has no convolution"
        why = f"forward wants {', '.join(unknown)} too" if unknown else why
        raise ConfigError(f"what {type(model).__name__} is given cannot be guessed, as {why}: {_ask(model)}")
    video = isinstance(conv, nn.Conv3d)
    channels = _first(model, _CHANNELS, lambda v: v if isinstance(v, int) else None) if conv is None else None
    channels = channels or (3 if conv is None else conv.in_channels)
    patch = (16, 16) if conv is None else tuple(conv.kernel_size)
    size = size or _from_positions(model, conv) or (224, 224)
    if video and len(size) == 2:
        frames = _first(model, _FRAMES, lambda v: v if isinstance(v, int) else None)
        size = (frames or _frames_from_positions(model, size, patch) or 16, *size)
    size = size if video else size[-2:]
    count = batch_size or (2 if video else 8)
    frames_first = video and name in _VIDEOS
    shape = (count, size[0], channels, *size[1:]) if frames_first else (count, channels, *size)
    images = _random(model, *shape)  # first: it says where that is too much
    masks = {other: _mask(count, [a // b for a, b in zip(size, patch)]) for other in others}
    return ((images,), masks) if name == names[0] else ((), {name: images, **masks})


def _image_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The patch embedding, or the first convolution of a convnet: neither pointwise nor depthwise."""
    kinds = (nn.Conv2d, nn.Conv3d)
    found = (part for part in model.modules() if isinstance(part, kinds))
    return next((conv for conv in found if max(conv.kernel_size) > 1 and conv.groups == 1), None)


def _sizes_of(value: Any) -> tuple[int, ...] | None:
    """(height, width) or (frames, height, width) of an attribute that may say so."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, value
    if isinstance(value, (tuple, list)) and 1 <= len(value) <= 3 and all(isinstance(v, int) for v in value):
        return (value[0], value[0]) if len(value) == 1 else tuple(value)
    return None


def _first(model: nn.Module, names: tuple[str, ...], read: Callable[[Any], Any] = _sizes_of) -> Any:
    """The first of these attributes that the configuration, the model or a part of it has and `read` understands."""
    for holder in _holders(model):
        for name in names:
            if (found := read(getattr(holder, name, None))) is not None:
                return found
    return None


def _holders(model: nn.Module) -> Iterator[Any]:
    if getattr(model, "config", None) is not None:
        yield model.config
    yield from model.modules()


def _tokens(model: nn.Module) -> int | None:
    """Of the longest position table [1, N, D] or [N, D]."""
    tables = (getattr(part, name, None) for part in model.modules() for name in ("pos_embed", "position_embeddings"))
    return max((t.shape[-2] for t in tables if isinstance(t, Tensor) and t.ndim in (2, 3)), default=None)


def _from_positions(model: nn.Module, conv: nn.Module | None) -> tuple[int, int] | None:
    """The size of square images, from a position table with a class token or without; SparK's from its map of cells."""
    ratio, rows, columns = (getattr(model, name, None) for name in ("downsample_raito", "fmap_h", "fmap_w"))
    if all(isinstance(value, int) for value in (ratio, rows, columns)):
        return ratio * rows, ratio * columns
    tokens = _tokens(model)
    if tokens is None or not isinstance(conv, nn.Conv2d):
        return None
    for count in (tokens, tokens - 1):
        side = math.isqrt(count)
        if side * side == count:
            return side * conv.kernel_size[0], side * conv.kernel_size[1]
    return None


def _frames_from_positions(model: nn.Module, size: tuple[int, ...], patch: tuple[int, ...]) -> int | None:
    tokens, plane = _tokens(model), (size[0] // patch[1]) * (size[1] // patch[2])
    return tokens // plane * patch[0] if tokens and plane and tokens % plane == 0 else None


def _mask(count: int, grid: list[int]) -> Tensor:
    """bool [B, N], True is masked: of images three quarters, of videos the same nine tenths in every frame."""
    plane = grid[-2] * grid[-1]
    seen = max(1, round(plane * (0.1 if len(grid) == 3 else 0.25)))
    masked = torch.rand(count, plane).argsort(1) >= seen
    return masked.repeat(1, math.prod(grid) // plane)
