"""`PatchEmbed`: visible patches of an image as tokens."""

from __future__ import annotations

from torch import Tensor, nn

from maefast import ops
from maefast.ops import TokenMask


def pair(name: str, value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A positive size, or (height, width), as (height, width)."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"{name} must be a positive int or (height, width), got {value!r}")
    return sizes


class PatchEmbed(nn.Module):
    """A linear map of each visible patch, plus its position, after the prefix tokens; see `maefast.ops.patch_embed`.

    The weights are those of the strided convolution of ViT and MAE: ``proj.weight`` [D, C, ph, pw], ``proj.bias`` [D].

    Args:
        patch_size: int or (height, width). in_chans: C. embed_dim: D.
    """

    def __init__(self, patch_size: int | tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = pair("patch_size", patch_size)
        # A container of the weights: its own forward, over all patches, is never called.
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size)
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
        """images [B, C, H, W] -> [B, P + keep, D], or packed [B*P + T, D] for a ragged plan."""
        return ops.patch_embed(images, self.proj.weight, self.proj.bias, plan, pos=pos, prefix=prefix)
