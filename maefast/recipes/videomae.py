"""VideoMAE: clips, whole tubes of which are hidden (Tong et al., NeurIPS 2022, arXiv:2203.12602).

A tubelet is 2 x 16 x 16 pixels. One mask of the frame is repeated over time, so that nothing can be copied from the
frame before. With t a tubelet's pixels in [0, 1], normalised for each channel over its 512 values,

    loss = mean over masked tubelets of (pred - (t - mean(t)) / (std(t) + 1e-6))^2
"""

from __future__ import annotations

from maefast import masking
from maefast.data.clips import ClipBatch
from maefast.recipe import Draw, Progress, Spec, View
from maefast.recipes._clips import DEMO, ClipAutoencoder
from maefast.recipes._sizes import both


class VideoMAE(ClipAutoencoder):
    """Arguments and shapes are those of `ClipAutoencoder`."""

    spec = Spec(
        name="videomae",
        title="VideoMAE",
        paper="Tong et al., NeurIPS 2022, arXiv:2203.12602",
        modality="video",
        sizes={
            "base": both(768, 12, 12, 384, 4, 6),
            "small": both(384, 12, 6, 192, 4, 3),
            "large": both(1024, 24, 16, 512, 12, 8),
            "huge": both(1280, 32, 16, 640, 12, 10),
        },
        training={"blr": 1.5e-4, "warmup": 0.05, "epochs": 800, "crop_scale": (0.5, 1.0), "flip": 0.0},
        demo=DEMO,
        baseline="predicting each tubelet's mean",
    )

    def prepare(self, batch: ClipBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, 3, T, H, W], normalised as ImageNet's; target: the same in [0, 1]; plan: of tubes."""
        parts, clips = self.normalised(batch)
        frames, spatial = self.grid[0], self.grid[1] * self.grid[2]
        noise = draw.uniform("mask", spatial, clips.device)
        return View(parts, masking.tube(len(clips), frames, spatial, self.mask_ratio, noise=noise), clips)
