"""Q-Former Autoencoder: images are rebuilt from what a frozen network tells of them, by a bottleneck of queries, and
where that fails to a frozen MAE's eyes is an anomaly (Dalmonte et al., WACV 2026, arXiv:2507.18481).

Nothing is masked. States of two blocks of a frozen backbone go through a linear map to learned queries, which look at
them once, and from there through a decoder to pixels. Trained on images without anomalies; with h_i the states of a
frozen MAE for patches of p pixels,

    loss = mean over pixels and i of  product over p of upsample(1 - cos(h_i(image), h_i(rebuilt)))

and the same map, with more patch sizes and states, tells anomalies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.data.images.batch import ImageBatch
from maefast.data.images.smooth import NormalImages, with_square
from maefast.models.perceptual import PerceptualMAE
from maefast.names import Names
from maefast.nn import Linear, QFormer, TokenDecoder, sincos_2d
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.patches import unpatchify
from maefast.nn.teachers import Frozen, HiddenStates
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe, mae_teacher, must_have

_TINY = {"embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_embed_dim": 32, "decoder_depth": 1, "patch_size": 8}


class QFormerAE(ImageRecipe):
    """Args:
        backbone: frozen: a `maefast.models.MaskedAutoencoderViT` or a file of its weights; a ViT of transformers, as
            Dinov2WithRegistersModel; or "random" for fresh weights, for demos. backbone_model, backbone_args: the
            model's name in `maefast.models` and its arguments, where it is read from a file.
        at: its blocks whose outputs, all tokens of them, are looked at; negative numbers count from the last.
        metric, metric_model, metric_args: the MAE of the loss, likewise.
        loss_patches, loss_at: patch sizes and blocks (from 0) of the loss; map_patches, map_at: of anomaly maps.
        img_size: int or (H, W). patch_size: of what is rebuilt; there are as many queries as such patches.
        embed_dim, num_heads, depth, dropout: of the Q-Former. causal: see `maefast.nn.QFormer`. decoder_*:
            of the decoder. registers: in front of its tokens.
        pixels: weight of the mean squared error of pixels, beside the loss above; the paper has none.

    Shapes: images [B, 3, H, W]; features [B, tokens of all states, D of the backbone]; pred [B, 3, H, W], normalised.
    """

    spec = Spec(
        name="q_former_ae",
        title="Q-Former Autoencoder",
        paper="Dalmonte et al., WACV 2026, arXiv:2507.18481",
        modality="images, a backbone, an MAE",
        sizes={"base": {}},
        training={
            "lr": 8e-5, "warmup": 0.15, "epochs": 300, "batch_size": 64, "betas": (0.9, 0.999), "weight_decay": 0.0,
            "crop_scale": (0.9, 1.0), "crop_ratio": (0.8, 1.2),
        },
        demo={
            "model_args": {
                "backbone": "random", "backbone_args": _TINY, "metric": "random", "metric_args": _TINY, "at": [1, 3],
                "loss_patches": [8, 16], "loss_at": [1, 2], "map_patches": [4, 8, 16], "map_at": [0, 1, 2],
                "embed_dim": 96, "num_heads": 3, "decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3,
                "pixels": 1.0,
            },
            "img_size": 32, "patch_size": 8, "steps": 280, "batch_size": 16, "lr": 2e-3, "warmup": 0.1,
            "picture_rows": 4,
        },
        baseline="each image's mean colour",
    )  # fmt: skip
    names = Names(
        ("encoders.0.final_projection.", "embed."),
        ("junction.", "q_former."),
        ("decoder.decoder_embed.", "decoder.embed."),
        ("decoder.decoder_blocks.", "decoder.blocks."),
        ("decoder.decoder_norm.", "decoder.norm."),
        ("decoder.decoder_prediction.", "decoder.pred."),
        unused=("encoders.0.model.", "decoder.decoder_pos_embed"),
    )
    lead = 0

    def __init__(
        self,
        backbone: nn.Module | str | None = None,
        backbone_model: str = "mae_large",
        backbone_args: dict[str, Any] | None = None,
        at: Sequence[int] = (-2, -4),
        metric: nn.Module | str | None = None,
        metric_model: str = "mae_large",
        metric_args: dict[str, Any] | None = None,
        loss_patches: Sequence[int] = (32, 56),
        loss_at: Sequence[int] = (15, 19),
        map_patches: Sequence[int] = (16, 32, 56),
        map_at: Sequence[int] = (11, 15, 19),
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 8,
        embed_dim: int = 768,
        num_heads: int = 8,
        depth: int = 1,
        dropout: float = 0.01,
        causal: bool = True,
        decoder_embed_dim: int = 768,
        decoder_depth: int = 6,
        decoder_num_heads: int = 12,
        registers: int = 4,
        pixels: float = 0.0,
    ) -> None:
        size, self.patch_size = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.pixels = float(pixels)
        self.wants, grid = NormalImages(3, size), patch_grid(size, self.patch_size)
        self.on_loss, self.on_maps = (tuple(loss_patches), tuple(loss_at)), (tuple(map_patches), tuple(map_at))
        with torch.random.fork_rng(devices=[]):  # random ones are the same whenever a run is opened
            torch.manual_seed(0)
            seen = _opened(backbone, backbone_model, {"img_size": img_size, **(backbone_args or {})})
            eyes = mae_teacher(metric, metric_model, {"img_size": img_size, **(metric_args or {})})
        count, self.at = seen.config["depth"], tuple(at)
        if not self.at or not all(-count <= index < count for index in self.at):
            raise ValueError(f"at must name some of the backbone's {count} blocks, got {list(at)}")
        for name, blocks in (("loss_at", loss_at), ("map_at", map_at)):
            for index in blocks:
                must_have(eyes, index, name)
        self.backbone = self.metric = None
        if backbone is not None:
            self.backbone = Frozen(seen)
        if metric is not None:
            self.metric = Frozen(PerceptualMAE(eyes, sorted({*loss_patches, *map_patches}), (*loss_at, *map_at)))
            if self.metric.module.size != size:
                raise ValueError(f"metric takes images of {self.metric.module.size}, not of {size}")
        self.embed = Linear(seen.config["embed_dim"], embed_dim)
        queries = grid[0] * grid[1]
        self.q_former = QFormer(embed_dim, queries, num_heads, depth, dropout=dropout, causal=causal)
        self.decoder = TokenDecoder(
            embed_dim,
            3 * self.patch_size[0] * self.patch_size[1],
            sincos_2d(decoder_embed_dim, grid),
            decoder_embed_dim,
            decoder_depth,
            decoder_num_heads,
            registers=registers,
        )

    def missing(self) -> str | None:
        lacks = [name for name in ("backbone", "metric") if getattr(self, name) is None]
        how = "=FILE (--model-arg), weights of a mae_* model, a module in Python, or =random"
        return f"{' and '.join(lacks)}: {lacks[0]}{how}" if lacks else None

    def prepare(self, batch: ImageBatch, draw: Draw, progress: Progress) -> View:
        """parts: images; target: the backbone's features, and the metric's states of the images."""
        self.require()
        images = self.images(batch)
        return View(images, None, {"features": self._features(images), "states": self.metric(images, *self.on_loss)})

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat(self.backbone.states(images, at=self.at), 1)

    def rebuilt(self, features: Tensor) -> Tensor:
        """[B, tokens, D] -> [B, 3, H, W], normalised."""
        rows = self.decoder(self.q_former(self.embed(features.to(self.embed.weight.dtype))))
        return unpatchify(rows, self.patch_size, self.wants.size)

    def compute(self, view: View) -> Output:
        return self._seen(self.rebuilt(view.target["features"]), view)

    def _seen(self, pred: Tensor, view: View) -> Output:
        far = self.metric.module.maps(pred.to(view.parts.dtype), view.target["states"], *self.on_loss)
        terms = {"perceptual": far.mean()}
        if self.pixels:
            terms["pixels"] = self.pixels * F.mse_loss(pred.to(view.parts.dtype), view.parts)
        return Output(terms, pred, view)

    def baseline(self, view: View) -> Output:
        return self._seen(view.parts.mean((2, 3), keepdim=True).expand_as(view.parts), view)

    @torch.no_grad()
    def anomalies(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> maps [B, H, W], the higher the stranger, and the rebuilt images. The score
        of an image is the largest value of its map."""
        self.require()
        rebuilt = self.rebuilt(self._features(images))
        states = self.metric(images, *self.on_maps)
        return self.metric.module.maps(rebuilt.to(images.dtype), states, *self.on_maps).mean(0), rebuilt

    def encode(self, batch: ImageBatch) -> Tensor:
        """What the queries found, [B, queries, width]."""
        self.require()
        return self.q_former(self.embed(self._features(self.images(batch))))

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images.pictures import Sheet, heat, to_pixels

        columns, both = [], (view.parts, with_square(view.parts, (1 - self.mean) / self.std)[0])
        found = [self.anomalies(images) for images in both]
        most = torch.stack([far for far, _ in found]).amax((0, 2, 3))[:, None, None].clamp_min(1e-12)
        for images, (far, rebuilt) in zip(both, found):
            columns += [to_pixels(part, self.mean, self.std) for part in (images, rebuilt)] + [heat(far / most)]
        labels = ("image", "rebuilt", "anomalies", "with a square", "rebuilt", "anomalies")
        return Sheet(columns, names, "both maps of a row have one scale", labels)


def _opened(backbone: nn.Module | str | None, name: str, arguments: dict[str, Any]) -> nn.Module:
    if isinstance(backbone, nn.Module) and hasattr(getattr(backbone, "config", None), "num_hidden_layers"):
        return HiddenStates(backbone)
    if isinstance(backbone, nn.Module) and not {"states", "config"} <= {*dir(backbone)}:
        raise TypeError(f"backbone must be a mae_* model or a ViT of transformers, got {type(backbone).__name__}")
    if isinstance(backbone, nn.Module):
        return backbone
    return mae_teacher(backbone, name, arguments)
