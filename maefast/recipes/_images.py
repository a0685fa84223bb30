"""What recipes of images share: normalised pixels, a mask of patches, the mean colour as a baseline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import masking, models
from maefast.data.channels import ChannelBatch, Channels, shown_range
from maefast.data.images import Images
from maefast.data.images.batch import ImageBatch, normalise, normaliser
from maefast.nn.teachers import ImageTeacher
from maefast.ops import TokenMask
from maefast.recipe import Draw, Recipe


class ImageRecipe(Recipe):
    """Images of `channels` and `size` (height, width): photographs, grey or in colour, or with `measured` numbers of
    any kind, whose scale is found from the data (`maefast.data.channels`)."""

    def __init__(self, channels: int, size: Sequence[int], measured: bool = False) -> None:
        super().__init__()
        if measured:
            self.wants = Channels(channels, tuple(size), own_scale=False)
            mean, std = shown_range(channels)
        else:
            self.wants = Images(channels, tuple(size))
            mean, std = normaliser(channels)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def images(self, batch: ImageBatch | ChannelBatch) -> Tensor:
        """[B, C, H, W], normalised as ImageNet's, or as the data set is."""
        self.wants.check(batch)
        if isinstance(batch, ChannelBatch):
            return batch.images.to(self.mean.dtype)
        return normalise(batch.images, self.mean, self.std)

    def plan(self, images: Tensor, draw: Draw, patches: int, mask_ratio: float) -> TokenMask:
        """int(N * (1 - ratio)) random patches stay visible, MAE's draw."""
        return masking.random(len(images), patches, mask_ratio, noise=draw.uniform("mask", patches, images.device))


def mean_colour(images: Tensor, patch_size: tuple[int, int], count: int) -> Tensor:
    """`count` rows of a patch of the mean colour of [B, C, H, W], in (ph, pw, C) order."""
    colour = images.mean((0, 2, 3))
    return colour.repeat(patch_size[0] * patch_size[1]).expand(count, -1)


def mean_feature(target: Tensor) -> Tensor:
    """The mean of all rows [..., D], in the place of each."""
    return target.flatten(0, -2).mean(0).expand_as(target)


def feature_sheet(images: Tensor, shown: Tensor, features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Columns of a picture: `images` [B, C, H, W] in [0, 1], the same where `shown` [B, N] is, and each of `features`
    [B, N, D] as colours, the first three principal components of the first of them."""
    from maefast.data.images.pictures import to_pixels

    size = tuple(images.shape[2:])
    seen = F.interpolate(shown.view(-1, 1, *grid).float(), size)
    first = features[0].flatten(0, 1).double()
    mean = first.mean(0)
    axes = torch.linalg.eigh((first - mean).T @ (first - mean))[1][:, -3:].flip(1)
    low, high = ((first - mean) @ axes).quantile(torch.tensor([0.02, 0.98]).to(first), dim=0)
    columns = [images.float().expand(-1, 3, -1, -1), (images * seen).float().expand(-1, 3, -1, -1)]
    for values in features:
        colours = (((values.double() - mean) @ axes - low) / (high - low)).clamp(0, 1)
        columns.append(F.interpolate(colours.transpose(1, 2).unflatten(2, grid).float(), size))
    return [to_pixels(column) for column in columns]


def mae_teacher(
    given: nn.Module | str | None, name: str, arguments: dict[str, Any], part: str = "encoder"
) -> nn.Module:
    """A MaskedAutoencoderViT: `given`, or the model `name` with the weights of the file `given`; with fresh ones for
    "random", with a warning; without any, for its sizes alone, for None. `part` is "encoder" or "all", what is used.
    TypeError: `given` is neither, or a module without what is used."""
    if isinstance(given, nn.Module):
        used = ("states",) if part == "encoder" else ("encode_visible", "decoder_states")
        if lacks := [attribute for attribute in (*used, "config") if not hasattr(given, attribute)]:
            raise TypeError(f"teacher must be a mae_* model, got {type(given).__name__} without {', '.join(lacks)}")
        return given
    if not (given is None or isinstance(given, (str, os.PathLike))):
        raise TypeError(f"teacher must be a module, a file or 'random', got {type(given).__name__}")
    if given is None:  # its sizes alone
        with torch.device("meta"):
            return models.create(name, **arguments)
    made = models.create(name, **arguments)
    if given != "random":
        return models.load_checkpoint(made, given, part=part)
    warn_of_random_weights()
    return made


_WARNED: dict = {}  # what `warnings` keeps, to say it once
IMAGE_TEACHERS = (
    "a teacher: teacher=NAME (--model-arg), a CLIP or DINO of transformers such as openai/clip-vit-base-patch16, a"
    " module in Python, or teacher=random"
)


def image_teacher(
    given: nn.Module | str | None, kind: type[ImageTeacher] = ImageTeacher, **sizes: Any
) -> ImageTeacher | None:
    """What tells states and attention, or what another `kind` does: of a module; of the name or folder of a CLIP (of
    `kind.CLIP`) or, with "dino" in it, a ViTModel, for transformers; with fresh weights, a mae_* model of `sizes`, for
    "random", with a warning; None for None. TypeError: `given` is none of these."""
    if given is None:
        return None
    if isinstance(given, nn.Module):
        return kind(given)
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"teacher must be a module, a name or folder, or 'random', got {type(given).__name__}")
    if given == "random":
        warn_of_random_weights()
        return kind(models.create("mae", **sizes))
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a teacher by its name needs the package 'transformers'") from error
    model: Any = getattr(transformers, "ViTModel" if "dino" in str(given).lower() else kind.CLIP)
    return kind(model.from_pretrained(given))


def warn_of_random_weights() -> None:
    """Once and in one line: a teacher is made somewhere below `create`, and no line of code there tells anything."""
    warnings.warn_explicit(
        "the teacher has RANDOM weights: it teaches nothing and serves demos and tests alone",
        UserWarning, "maefast.recipes", 0, registry=_WARNED,
    )  # fmt: skip


def same_grid(teacher: nn.Module, student: nn.Module) -> None:
    """ValueError: the teacher's patches are not the student's, so that one mask cannot serve both."""
    theirs, mine = getattr(teacher, "grid_size", student.grid_size), student.grid_size
    if tuple(theirs) != tuple(mine):
        raise ValueError(f"teacher has a grid of {tuple(theirs)} patches, the student one of {tuple(mine)}")


def must_have(model: nn.Module, block: int, name: str, depth: str = "depth") -> None:
    """ValueError: the argument `name` does not name one of the model's blocks."""
    depth = model.config[depth]
    if not 0 <= block < depth:
        raise ValueError(f"{name} must name one of {depth} blocks, from 0, got {block}")
