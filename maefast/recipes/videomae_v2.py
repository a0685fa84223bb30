"""VideoMAE V2: VideoMAE, half of whose hidden tubelets are decoded (Wang et al., CVPR 2023, arXiv:2303.16727).

The encoder sees 160 of 1568 tubelets, as VideoMAE's. Of each cell of 2 x 2 positions the decoder is asked for two,
other ones in each frame (`masking.running_cells`): 784, of which the encoder sees 80. With t a tubelet's pixels
in [0, 1],

    loss = mean over tubelets that are decoded and not visible of (pred - (t - mean(t)) / (std(t) + 1e-6))^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maefast import masking
from maefast.data.clips import ClipBatch
from maefast.recipe import Draw, Output, Progress, Spec, View
from maefast.recipes._clips import DEMO, ClipAutoencoder
from maefast.recipes._sizes import both


@dataclass(frozen=True)
class DualView(View):
    """again: int64 [B, E], decoded positions that the encoder sees too; None: the decoder gets none for them."""

    again: Tensor | None = None


class VideoMAEV2(ClipAutoencoder):
    """Args:
        decoder_ratio: share of the positions that is not decoded: 0 (VideoMAE), 0.25, 0.5 or 0.75.
        path: through a cell, see `masking.running_cells`; "rows" is that of the authors' code.
        again: as in the authors' code, the decoder also gets a mask token for each decoded position that the encoder
            sees, of which no prediction counts: 944 tokens of a clip. Without them, 864.
        arguments: of `ClipAutoencoder`.

    Shapes: those of `ClipAutoencoder`; pred [B, decoded and hidden, 3 * pt * ph * pw].

    Raises:
        ValueError: an odd number of positions in a row or column; `again`, with T / pt not a multiple of 4.
    """

    spec = Spec(
        name="videomae_v2",
        title="VideoMAE V2",
        paper="Wang et al., CVPR 2023, arXiv:2303.16727",
        modality="video",
        sizes={
            "base": both(768, 12, 12, 384, 4, 6),
            "small": both(384, 12, 6, 192, 4, 3),
            "large": both(1024, 24, 16, 512, 4, 8),
            "huge": both(1280, 32, 16, 512, 4, 8),
            "giant": {**both(1408, 40, 16, 512, 4, 8), "tubelet": (2, 14, 14), "mlp_ratio": 48 / 11},
        },
        training={"blr": 1e-3, "warmup": 0.1, "epochs": 200, "crop_scale": (0.5, 1.0), "flip": 0.0},
        demo=DEMO,
        baseline="predicting each tubelet's mean",
    )

    def __init__(self, decoder_ratio: float = 0.5, path: str = "rows", again: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        frames, *grid = self.grid
        masking.running_cells(1, 1, tuple(grid), decoder_ratio, path=path, device="meta")  # its errors, now
        if again and decoder_ratio and frames % 4:
            raise ValueError(
                f"frames must make a multiple of 4 tubelets in time, so that all samples repeat as many positions; got"
                f" {frames}; again=False does without them"
            )
        self.decoder_ratio, self.path, self.again = decoder_ratio, path, bool(again and decoder_ratio)

    def prepare(self, batch: ClipBatch, draw: Draw, progress: Progress) -> DualView:
        """As VideoMAE's, with a plan of which what is not decoded is absent."""
        parts, clips = self.normalised(batch)
        frames, rows, columns = self.grid
        noise, start = draw.uniform("mask", rows * columns, clips.device), draw.uniform("cells", 1, clips.device)
        sizes = len(clips), frames, (rows, columns)
        plan = masking.dual(
            *sizes, self.mask_ratio, self.decoder_ratio, path=self.path, noise=noise, cell_noise=start[:, 0]
        )
        again = None
        if self.again:
            chosen = masking.running_cells(*sizes, self.decoder_ratio, path=self.path, noise=start)
            # Over four frames each position is decoded equally often, a visible one too.
            again = masking.only(plan.complement(), chosen, hide=int(plan.keep * (1 - self.decoder_ratio))).ids_masked
        return DualView(parts, plan, clips, again)

    def compute(self, view: DualView) -> Output:
        pred = self.decoder(self.encoder(view.parts, view.plan, features=False), view.plan, again=view.again)
        return Output(self.score(pred, view), pred, view)
