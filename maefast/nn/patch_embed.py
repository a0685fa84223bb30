"""`PatchEmbed`: visible patches of an image as tokens."""

from __future__ import annotations

from torch import Tensor, nn

from maefast import ops
from maefast.ops import TokenMask


def pair(name: str, value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A positive size, or (height, width), as (height, width)."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2 or not all(map(_positive, sizes)):
        raise ValueError(f"{name} must be a positive int or (height, width), got {value!r}")
    return sizes


def triple(name: str, value: tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    """Positive (frames, height, width)."""
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(map(_positive, value)):
        raise ValueError(f"{name} must be positive (frames, height, width), got {value!r}")
    return tuple(value)


def cube(name: str, value: int | tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    """A positive size, or (depth, height, width), as (depth, height, width)."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value, value)
    if len(sizes) != 3 or not all(map(_positive, sizes)):
        raise ValueError(f"{name} must be a positive int or (depth, height, width), got {value!r}")
    return sizes


def patch_grid(size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """How many patches there are each way: (rows, columns), or (tubelets, rows, columns)."""
    if any(side % patch for side, patch in zip(size, patch_size)):
        what = "image" if len(size) == 2 else "clip or volume"
        raise ValueError(f"{what} size {size} is not a multiple of the patch size {patch_size}")
    return tuple(side // patch for side, patch in zip(size, patch_size))


def _positive(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


class PatchEmbed(nn.Module):
    """A linear map of each visible patch, plus its position, after the prefix tokens; see `maefast.ops.patch_embed`.

    The weights are those of the strided convolution of ViT and MAE: ``proj.weight`` [D, C, ph, pw] or, for tubelets,
    [D, C, pt, ph, pw], and ``proj.bias`` [D].

    Args:
        patch_size: int, (height, width) or (frames, height, width). in_chans: C. embed_dim: D.
    """

    def __init__(self, patch_size: int | tuple[int, ...], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        tubelet = isinstance(patch_size, (tuple, list)) and len(patch_size) == 3
        self.patch_size = triple("patch_size", patch_size) if tubelet else pair("patch_size", patch_size)
        # A container of the weights: its own forward, over all patches, is never called.
        conv = nn.Conv3d if tubelet else nn.Conv2d
        self.proj = conv(in_chans, embed_dim, self.patch_size, stride=self.patch_size)
        # MAE initialises it as the linear map that it is.
        nn.init.xavier_uniform_(self.proj.weight.view(embed_dim, -1))

    def forward(
        self,
        images: Tensor,
        plan: TokenMask | None = None,
        *,
        pos: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """images [B, C, H, W], or [B, C, T, H, W], -> [B, P + keep, D], or packed [B*P + T, D] for a ragged plan."""
        return ops.patch_embed(images, self.proj.weight, self.proj.bias, plan, pos=pos, prefix=prefix)
