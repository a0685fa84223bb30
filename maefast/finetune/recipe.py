"""Fine-tuning as a recipe, so that the loop of pre-training, its checkpoints and its resuming serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.data.channels import Channels
from maefast.data.source import Source
from maefast.nn.teachers import Averaged
from maefast.recipe import Draw, Output, Progress, View
from maefast.recipes._images import ImageRecipe
from maefast.recipes.masked_images import MaskedImages, image_shape

from .classifier import classifier_of
from .data import LabelledBatch
from .layers import parameter_groups
from .mix import mix, soft_targets


@dataclass(frozen=True)
class Given:
    """A recipe's `wants`, where the data are open already; `inputs`: which batches are within those with classes."""

    source: Source
    inputs: Any

    def open(self, options: Any) -> Source:
        return self.source

    def check(self, batch: Any) -> None:
        self.inputs.check(batch)


class Classify(ImageRecipe):
    """A classifier that learns from images with classes: soft cross-entropy of mixed, smoothed targets.

    Args:
        start: the pre-trained model, whose encoder is taken over, not copied, and how its images are normalised.
        classes: their names. source: see `maefast.finetune.data`.
        drop_path, layer_decay, smoothing: see `classifier_of`, `parameter_groups` and `soft_targets`.
        mixup, cutmix: see `mix`. ema_decay: of a running average of the weights; 0: there is none.
    """

    def __init__(
        self,
        start: MaskedImages,
        classes: Sequence[str],
        source: Source,
        *,
        drop_path: float = 0.0,
        layer_decay: float = 1.0,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema_decay: float = 0.0,
    ) -> None:
        channels, *size = image_shape(start.model)
        super().__init__(channels, size, isinstance(start.wants, Channels))
        self.classes, self.wants = list(classes), Given(source, self.wants)
        self.layer_decay, self.smoothing = layer_decay, smoothing
        self.mixup, self.cutmix, self.ema_decay = mixup, cutmix, ema_decay
        encoder = dict(start.config or start.model.config)
        self.config = {"name": f"classifier of {encoder['name']}", "encoder": encoder, "classes": self.classes}
        self.model = classifier_of(start.model, len(self.classes), drop_path)
        self.average = Averaged(model=self.model) if ema_decay else None

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return parameter_groups(self.model, weight_decay, self.layer_decay)

    def prepare(self, batch: LabelledBatch, draw: Draw, progress: Progress) -> View:
        """parts: float32 [B, C, H, W], normalised and mixed; target: [B, K]."""
        images = self.images(batch.inputs)
        targets = soft_targets(batch.labels, len(self.classes), self.smoothing, images.dtype)
        if self.mixup or self.cutmix:
            images, targets = mix(images, targets, draw.shared("mix"), self.mixup, self.cutmix)
        return View(images, None, targets)

    def compute(self, view: View) -> Output:
        logits = self.model(view.parts)
        return Output({"cross-entropy": cross_entropy(logits, view.target)}, logits, view)

    def networks(self) -> dict[str, nn.Module]:
        """What gives answers, the one that counts last."""
        average = {} if self.average is None else {"average": self.average.model}
        return {"model": self.model, **average}

    def after_step(self, progress: Progress) -> None:
        if self.average is not None:  # the average starts faster than it goes on, or a short run would be its start
            decay = min(self.ema_decay, progress.step / (progress.step + 9))
            self.average.follow(decay, model=self.model)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over [B, K] and soft targets [B, K], in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
