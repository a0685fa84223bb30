"""Where in a clip its caption is to be seen, by CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn.teachers import CLIP_MEAN, CLIP_STD
from maefast.ops import _checks


class ClipScores(nn.Module):
    """Cosines of the patches of each frame and the embedding of a caption, in the space that CLIP (Radford et al.,
    2021) has for both: what TGM (Fan et al., ECCV 2024) masks by. Patches go the way of the class token, through the
    last norm and the visual projection.

    Args:
        model: a CLIPModel of transformers; its image tower is used. grid: (T', rows, columns) of the scores.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int, int]) -> None:
        super().__init__()
        if lacks := [name for name in ("vision_model", "visual_projection") if not hasattr(model, name)]:
            raise TypeError(f"model must be a CLIPModel, got {type(model).__name__} without {', '.join(lacks)}")
        self.vision, self.project, self.grid = model.vision_model, model.visual_projection, tuple(grid)
        self.side = model.config.vision_config.image_size
        for name, numbers in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            self.register_buffer(name, torch.tensor(numbers).view(3, 1, 1), persistent=False)

    def maps(self, clips: Tensor, text: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [0, 1] and text [B, D] -> [B, T, h, w], of CLIP's patches, to be kept in files."""
        _checks.tensor("clips", clips, ndim=5)
        _checks.tensor("text", text, ndim=2)
        if clips.shape[1] != 3 or text.shape != (len(clips), self.project.out_features):
            raise ValueError(
                f"clips must be [B, 3, T, H, W] and text [B, {self.project.out_features}], got {tuple(clips.shape)} and"
                f" {tuple(text.shape)}"
            )
        frames = clips.transpose(1, 2).flatten(0, 1).to(self.mean.dtype)
        if frames.shape[2:] != (self.side, self.side):
            frames = F.interpolate(frames, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self.vision(pixel_values=(frames - self.mean) / self.std).last_hidden_state[:, 1:]
        patches = F.normalize(self.project(self.vision.post_layernorm(tokens)), dim=-1)
        patches = patches.unflatten(0, (len(clips), -1))
        cosines = torch.einsum("btnd,bd->btn", patches, F.normalize(text.to(patches.dtype), dim=-1))
        return cosines.unflatten(2, (int(cosines.shape[2] ** 0.5), -1))

    def forward(self, clips: Tensor, text: Tensor) -> Tensor:
        """[B, T', S]: averaged over the frames of each tubelet, and bilinear between CLIP's patches."""
        maps, (slots, *size) = self.maps(clips, text), self.grid
        if maps.shape[1] % slots:
            raise ValueError(f"clips must have a multiple of {slots} frames, got {maps.shape[1]}")
        maps = maps.unflatten(1, (slots, -1)).mean(2)
        return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False).flatten(2).to(maps.dtype)
