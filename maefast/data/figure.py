"""Pictures that matplotlib draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maefast.data.runs import SOFTWARE
from maefast.errors import need

from .written import write_whole


def new_figure(title: str, **how: Any) -> Any:
    """A figure that no window shows. TrainError: matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise need("matplotlib", "Drawing pictures") from error
    figure = Figure(**how)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=8)
    return figure


class FigurePicture:
    """A `maefast.recipe.Picture`; a subclass draws the figure."""

    def _figure(self, title: str) -> Any:
        raise NotImplementedError

    def save(self, path: Path, title: str) -> None:
        figure = self._figure(title)
        how = {"format": path.suffix.lstrip(".") or "png", "metadata": {"Software": SOFTWARE}}
        write_whole(path, lambda temporary: figure.savefig(temporary, **how))

    def pixels(self) -> Tensor:
        figure = self._figure("")
        figure.canvas.draw()
        return torch.from_numpy(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)
