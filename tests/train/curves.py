"""A recipe that has nothing to do with images: curves, some points of which are hidden, with a teacher that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from maefast import masking, seeds
from maefast.ops import gather_tokens
from maefast.recipe import Batch, Draw, Output, Progress, Recipe, View


@dataclass
class CurveBatch(Batch):
    """values: float32 [B, points]."""

    values: Tensor


@dataclass(frozen=True)
class Curves:
    """`--data 20` has twenty curves."""

    points: int

    def open(self, options: Any) -> CurveSource:
        return CurveSource(self.points, int(options.data), options.seed)


class CurveSource:
    """A `Source` and its own `Samples`."""

    name, unit, notes, settled = "thin air", "curve", ("curves are free",), {}

    def __init__(self, points: int, count: int, seed: int) -> None:
        self.points, self.count, self.seed = points, count, seed

    def __len__(self) -> int:
        return self.count

    def resume(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None: ...

    def record(self) -> dict[str, Any]:
        return {"curves": self.count}

    def changes(self, record: Mapping[str, Any]) -> list[str]:
        return [] if record == {**record, **self.record()} else [f"curves: {record['curves']} -> {self.count}"]

    def samples(self) -> CurveSource:
        return self

    def __getitem__(self, where: tuple[int, int, int]) -> tuple[np.ndarray, int]:
        position, epoch, index = where
        phase = seeds.generator(self.seed, seeds.AUGMENT, epoch, index).random()
        return np.sin(np.linspace(phase, phase + index + 1, self.points)).astype(np.float32), position

    def collate(self, samples: list) -> tuple[CurveBatch, list]:
        values, key = zip(*samples)
        return CurveBatch(torch.from_numpy(np.stack(values)), key=np.array(key)), []

    def examples(self, count: int) -> tuple[CurveBatch, list[str]]:
        batch, _ = self.collate([self[i, 0, i] for i in range(min(count, self.count))])
        return batch, [f"curve {i}" for i in batch.key]


@dataclass
class Plot:
    values: Tensor
    names: Sequence[str]
    caption: str = "hidden points"

    def save(self, path: Path, title: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels()[0].numpy()).save(path)
        path.with_suffix(".txt").write_text(f"{title}: {', '.join(self.names)}")

    def pixels(self) -> Tensor:
        return (self.values.clamp(-1, 1) * 127 + 128).to(torch.uint8)[None]


class CurveRecipe(Recipe):
    """Predicts hidden points, and the features that a running average of its encoder has of the whole curve."""

    def __init__(self, points: int = 8, width: int = 6) -> None:
        super().__init__()
        self.wants = Curves(points)
        self.points, self.config = points, {"points": points, "width": width}
        self.encoder, self.head, self.likeness = nn.Linear(points, width), nn.Linear(width, points), nn.Linear(width, 3)
        self.register_buffer("teacher", self.encoder.weight.detach()[:3].clone())
        self.seen: list = []

    def prepare(self, batch: CurveBatch, draw: Draw, progress: Progress) -> View:
        self.seen.append((batch.key.tolist(), progress, torch.is_grad_enabled(), self.training))
        noise = draw.uniform("mask", self.points, batch.values.device)
        plan = masking.random(len(batch.key), self.points, keep=3, noise=noise)
        shift = draw.uniform("shift", 1, batch.values.device) * progress.step / progress.total
        values = batch.values + shift
        return View({"values": values, "shift": shift}, plan, values @ self.teacher.T)

    def compute(self, view: View) -> Output:
        values = view.parts["values"]
        latent = self.encoder(values.masked_fill(view.plan.mask, 0)).tanh()
        pred = gather_tokens(self.head(latent)[..., None], view.plan, "masked")
        target = gather_tokens(values[..., None], view.plan, "masked")
        terms = {
            "points": (pred - target).square().mean(),
            "teacher": 0.1 * (self.likeness(latent) - view.target).square().mean(),
        }
        return Output(terms, pred, view)

    def picture(self, view: View, names: Sequence[str]) -> Plot:
        assert not torch.is_grad_enabled()
        assert not self.training
        return Plot(self(view).pred.flatten(1), names)

    def after_step(self, progress: Progress) -> None:
        self.seen.append(("after", progress, torch.is_grad_enabled()))
        self.teacher.lerp_(self.encoder.weight[:3], 0.2)


def curves(name: str, **arguments) -> CurveRecipe:
    return CurveRecipe(**arguments)
