"""MFM, later MRM: cells of an encoder's feature maps are hidden and made anew, and the decoder must still tell the
classes (Zhou et al., 2025, arXiv:2509.13801). Segmentation of a domain without labels.

With s a labelled source image, t a target image, p and w pseudo-labels of it and their weight, f = encoder(t) and CE
the cross-entropy of each pixel,

    loss = CE(decoder(encoder(s)), labels) + uda * w CE(decoder(f), p) + mfm * w CE(decoder(rebuild(f, mask)), p)

The rebuilder (`maefast.nn.feature_rebuilder`) is left out after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maefast.data.domains import DomainBatch, Domains, shown_labels
from maefast.data.images.batch import normalise, normaliser
from maefast.nn.feature_rebuilder import FeatureRebuilder
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.segmentation import ConvPyramid, PyramidHead, resized, segmentation_loss
from maefast.nn.teachers import Averaged, teaching
from maefast.ops._checks import one_of
from maefast.recipe import Draw, Output, Picture, Progress, Recipe, Spec, View

MASKS = ("cells", "exact")
PSEUDO = ("teacher", "given")


class MFM(Recipe):
    """Args:
        img_size: int or (height, width). classes: K.
        encoder: images [B, 3, H, W] -> maps, fine ones first; None: a small `ConvPyramid`. decoder: maps -> logits [B,
            K, h, w]; None: a `PyramidHead` of `head_dim`.
        channels, strides: of the maps.
        grid: (rows, columns) of the cells; None: those of the last map.
        mask_ratio: a cell is hidden with this probability ("cells", the authors' code), or int(ratio * N) of all N are
            ("exact"), as `masks` says.
        pseudo: labels of target images are of a running average of the networks ("teacher", as of DACS and DAFormer,
            weighted by the share of an image's pixels of which it is surer than `threshold`), or in the batch
            ("given").
        decay: of that average. uda, mfm: weights of the target's terms.
        embed_dim, depth, num_heads: of the rebuilder.

    Shapes: images [B, 3, H, W], labels [B, H, W]; plan bool [B, rows, columns], True where hidden; pred: logits of the
    source, the target and the rebuilt target.
    """

    spec = Spec(
        name="mfm",
        title="MFM (MRM)",
        paper="Zhou et al., 2025, arXiv:2509.13801",
        modality="images of two domains, labels of one",
        sizes={"base": {}, "single": {"channels": (2048,), "strides": (8,), "grid": (16, 16)}},
        training={"lr": 6e-5, "weight_decay": 0.01, "warmup": 0.0375, "batch_size": 2, "crop_ratio": (1.0, 1.0)},
        demo={
            "model_args": {
                "img_size": 48, "classes": 4, "channels": (16, 32, 48), "strides": (2, 4, 8), "head_dim": 32,
                "embed_dim": 64, "depth": 1, "num_heads": 4, "decay": 0.98, "threshold": 0.9,
            },
            "steps": 250, "batch_size": 8, "lr": 2e-3, "warmup": 0.1, "crop_scale": (0.5, 1.0), "picture_rows": 4,
        },
        baseline="predicting how frequent each class is",
    )  # fmt: skip
    lead = 0

    def __init__(
        self,
        img_size: int | Sequence[int] = 512,
        classes: int = 19,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        channels: Sequence[int] = (64, 128, 320, 512),
        strides: Sequence[int] = (4, 8, 16, 32),
        grid: Sequence[int] | None = None,
        mask_ratio: float = 0.4,
        masks: str = "cells",
        pseudo: str = "teacher",
        threshold: float = 0.968,
        decay: float = 0.999,
        uda: float = 1.0,
        mfm: float = 1.0,
        head_dim: int = 256,
        embed_dim: int = 512,
        depth: int = 2,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        one_of("masks", masks, MASKS)
        one_of("pseudo", pseudo, PSEUDO)
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must lie in [0, 1], got {mask_ratio}")
        size = pair("img_size", img_size)
        maps = [patch_grid(size, (stride, stride)) for stride in strides]
        self.grid = maps[-1] if grid is None else pair("grid", grid)
        scales = {(rows / self.grid[0], columns / self.grid[1]) for rows, columns in maps}
        if len(channels) != len(maps) or any(down != across or down % 1 for down, across in scales):
            raise ValueError(f"maps of {maps} cells, with channels {channels}, do not fit a grid of {self.grid}")
        self.wants, self.classes = Domains(size, classes), classes
        self.mask_ratio, self.masks, self.pseudo, self.threshold = mask_ratio, masks, pseudo, threshold
        self.decay, self.uda, self.mfm = decay, uda, mfm
        self.encoder = ConvPyramid(channels, strides) if encoder is None else encoder
        self.decoder = PyramidHead(channels, classes, head_dim) if decoder is None else decoder
        scales = [rows // self.grid[0] for rows, _ in maps]
        self.rebuilder = FeatureRebuilder(channels, scales, self.grid, embed_dim, depth, num_heads)
        self.teacher = Averaged(encoder=self.encoder, decoder=self.decoder) if pseudo == "teacher" else None
        for name, numbers in zip(("mean", "std"), normaliser(3)):
            self.register_buffer(name, numbers, persistent=False)

    def prepare(self, batch: DomainBatch, draw: Draw, progress: Progress) -> View:
        """parts: source and target, float32 [B, 3, H, W]; target: labels, pseudo-labels and their weight."""
        self.wants.check(batch)
        source, target = (normalise(images, self.mean, self.std) for images in (batch.images, batch.target))
        noise = draw.uniform("mask", self.grid[0] * self.grid[1], target.device)
        mask = noise < self.mask_ratio
        if self.masks == "exact":
            mask = noise.argsort(1).argsort(1) < int(self.mask_ratio * noise.shape[1])
        return View((source, target), mask.unflatten(1, self.grid), (batch.labels, *self._pseudo(batch, target)))

    def _pseudo(self, batch: DomainBatch, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            if batch.pseudo is None:
                raise ValueError("pseudo labels are wanted: give them with the images, or pseudo='teacher'")
            one = target.new_ones(len(target), 1, 1)
            return batch.pseudo, one if batch.weight is None else batch.weight.to(one.dtype)
        with teaching():
            logits = self.teacher.decoder(self.teacher.encoder(target)).to(target.dtype)
            sure, labels = resized(logits, target.shape[2:]).softmax(1).max(1)
            return labels, (sure > self.threshold).to(target.dtype).mean((1, 2), keepdim=True)

    def compute(self, view: View) -> Output:
        source, target = view.parts
        maps = self.encoder(target)
        pred = (
            self.decoder(self.encoder(source)),
            self.decoder(maps),
            self.decoder(self.rebuilder(maps, view.plan)),
        )
        return Output(self._terms(pred, view), pred, view)

    def _terms(self, pred: Sequence[Tensor], view: View) -> dict[str, Tensor]:
        labels, pseudo, weight = view.target
        return {
            "source": segmentation_loss(pred[0], labels),
            "target": self.uda * segmentation_loss(pred[1], pseudo, weight),
            "rebuilt": self.mfm * segmentation_loss(pred[2], pseudo, weight),
        }

    def baseline(self, view: View) -> Output:
        shares = []
        for labels in view.target[:2]:
            each = torch.stack([(labels == k).to(self.mean.dtype).mean() for k in range(self.classes)])
            shares.append((each / each.sum()).clamp_min(1e-6).log().view(1, -1, 1, 1).expand(len(labels), -1, 1, 1))
        pred = shares[0], shares[1], shares[1]
        return Output(self._terms(pred, view), pred, view)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """As published for self-training, the average begins as the plain mean of the first steps."""
        if self.teacher is not None:
            decay = min(1 - 1 / (progress.step + 1), self.decay)
            self.teacher.follow(decay, encoder=self.encoder, decoder=self.decoder)

    def encode(self, batch: DomainBatch) -> Tensor:
        """[B, N, D], the last map of source images, row by row."""
        self.wants.check(batch)
        return self.encoder(normalise(batch.images, self.mean, self.std))[-1].flatten(2).transpose(1, 2)

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images import pictures

        source, target = (pictures.to_pixels(part, self.mean, self.std) for part in view.parts)
        pred = self.compute(view).pred
        found = [resized(logits, target.shape[2:]).argmax(1) for logits in pred]
        down, across = (side // cells for side, cells in zip(target.shape[2:], self.grid))
        hidden = view.plan.repeat_interleave(down, 1).repeat_interleave(across, 2)[:, None].cpu()
        columns = [source, shown_labels(view.target[0]), shown_labels(found[0]), target, shown_labels(found[1])]
        columns += [target.masked_fill(hidden, 128), shown_labels(found[2])]
        labels = ("source", "labels", "predicted", "target", "predicted", "hidden", "rebuilt")
        return pictures.Sheet(columns, names, f"{self.mask_ratio:.0%} of the cells of all maps hidden", labels)
