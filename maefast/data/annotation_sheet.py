"""What a classifier with two heads says of annotated images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maefast.data.figure import FigurePicture, new_figure


@dataclass
class AnnotationSheet(FigurePicture):
    """A row for each image: itself, and bars of what each head says, the true ones dark. A `maefast.recipe.Picture`.

    Attributes:
        images: [B, 3, H, W] in [0, 1]. heads: (title, probabilities [B, K], bool [B, K], which are true) of each.
    """

    images: Tensor
    heads: Sequence[tuple[str, Tensor, Tensor]]
    names: Sequence[str]
    caption: str

    def _figure(self, title: str) -> Any:
        rows, columns = len(self.images), 1 + len(self.heads)
        title = "\n".join(textwrap.wrap(title, 90))
        figure = new_figure(title, figsize=(2.6 * columns, 1.5 * rows + 0.5), dpi=90, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for row, name in enumerate(self.names):
            pixels = self.images[row].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            grid[row, 0].imshow(pixels)
            grid[row, 0].set_axis_off()
            grid[row, 0].set_title(name, fontsize=7)
            for axes, (what, said, true) in zip(grid[row, 1:], self.heads):
                colours = ["tab:blue" if is_true else "0.8" for is_true in true[row].tolist()]
                axes.bar(range(said.shape[1]), said[row].detach().float().cpu().numpy(), color=colours)
                axes.set_ylim(0, 1)
                axes.set_xticks(range(said.shape[1]))
                axes.tick_params(labelsize=6)
                axes.set_title(what if row == 0 else "", fontsize=8)
        return figure
