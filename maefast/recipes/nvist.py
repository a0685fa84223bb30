"""NViST: other views of a scene from one image (Jang & Agapito, CVPR 2024, arXiv:2312.08568).

The encoder of a masked autoencoder, the recipe `nvist_mae`, sees a whole image. One learned token, repeated for each
cell of three planes and three lines, looks at its tokens, conditioned by the camera; they become a radiance field in
vector-matrix form, which is rendered along rays of all views. With c the colours of rays and w, m, d the weights,
middles and widths of their samples,

    loss = mean |c - true|^2 + a * perceptual(view, true) + b * distortion(w, m, d)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.data.images.batch import normalise
from maefast.data.scenes import SceneBatch, Scenes
from maefast.names import Names
from maefast.nn import Encoder, PatchEmbed, position_table
from maefast.nn.cameras import first_at_rest, rays_of
from maefast.nn.patch_embed import pair, patch_grid
from maefast.nn.vm_decoder import VMDecoder
from maefast.nn.vm_field import Rendered, VMRenderer, distortion
from maefast.recipe import Draw, Output, Picture, Progress, Spec, View
from maefast.recipes._images import ImageRecipe


class NViST(ImageRecipe):
    """Args:
        img_size, patch_size: int or (height, width). views: V of a sample, the first of which is given.
        rays: drawn among all pixels of all views. samples: of a ray, from near to far of `near_far`.
        perceptual: a distance of images in [0, 1], [B, 3, H, W] twice -> a number or [B, ...], such as LPIPS; one of
            the other views is then rendered whole, too. perceptual_weight, distortion_weight: a and b.
        embed_dim, depth, num_heads: of the encoder. decoder_depth, decoder_num_heads: of the decoder, which is as wide.
        resolution, decoder_patch, density_dim, colour_dim: of planes and lines. box: half of the side of their cube.
        hidden: width of the layers that make a colour.
        encoder_rate: learning rate of the encoder over that of the rest.

    Shapes: views [B, V, 3, H, W]; planes [B, 3, C, R, R]; lines [B, 3, C, R]; pred, target: colours [B, rays, 3].
    """

    spec = Spec(
        name="nvist",
        title="NViST",
        paper="Jang & Agapito, CVPR 2024, arXiv:2312.08568",
        modality="views of scenes with cameras",
        sizes={"base": {}},
        training={"steps": 300_000, "batch_size": 4, "lr": 2e-4, "min_lr": 1e-6, "warmup": 1 / 30,
                  "betas": (0.9, 0.999), "weight_decay": 0.01, "clip": 1.0},
        demo={
            "model_args": {"views": 3, "rays": 64, "samples": 12, "near_far": [0.5, 1.5], "embed_dim": 64, "depth": 2,
                           "num_heads": 4, "decoder_depth": 2, "decoder_num_heads": 4, "resolution": 8,
                           "decoder_patch": 2, "density_dim": 4, "colour_dim": 8, "hidden": 16, "box": 0.5,
                           "encoder_rate": 1.0},
            "img_size": 32, "patch_size": 8, "steps": 500, "batch_size": 8, "lr": 6e-3, "warmup": 0.1,
            "betas": (0.9, 0.99), "picture_rows": 4,
        },
        baseline="the mean colour",
    )  # fmt: skip
    names = Names(
        ("", "encoder."),
        ("decoder.", "decoder."),
        ("renderer.", "renderer."),
        unused=("decoder_", "mask_token", "norm."),
        optional=("decoder.", "renderer."),
    )

    def __init__(
        self,
        img_size: int | Sequence[int] = (160, 90),
        patch_size: int | Sequence[int] = 5,
        views: int = 5,
        rays: int = 15_000,
        samples: int = 48,
        near_far: Sequence[float] = (0.0, 1.5),
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: float = 0.1,
        distortion_weight: float = 0.001,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_depth: int = 12,
        decoder_num_heads: int = 12,
        resolution: int = 48,
        decoder_patch: int = 3,
        density_dim: int = 8,
        colour_dim: int = 24,
        hidden: int = 64,
        box: float = 0.8,
        encoder_rate: float = 0.2,
    ) -> None:
        size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
        super().__init__(3, size)
        self.wants, grid = Scenes(size, views), patch_grid(size, patch)
        if views < 2 or rays < 1 or samples < 1:
            raise ValueError(f"views must be 2 at least, rays and samples 1, got {views}, {rays} and {samples}")
        if len(near_far) != 2 or not 0 <= near_far[0] < near_far[1]:
            raise ValueError(f"near_far must rise from 0 or more, got {tuple(near_far)}")
        self.rays, self.samples, self.near_far, self.rate = rays, samples, tuple(near_far), encoder_rate
        self.weights = perceptual_weight, distortion_weight
        object.__setattr__(self, "perceptual", perceptual)  # a module is the caller's, neither trained nor saved here
        self.encoder = Encoder(
            PatchEmbed(patch, 3, embed_dim), position_table("sincos", embed_dim, grid), embed_dim, depth, num_heads
        )
        self.encoder.norm = nn.Identity()
        cells = resolution, decoder_patch, density_dim + colour_dim
        self.decoder = VMDecoder(grid[0] * grid[1], *cells, embed_dim, decoder_depth, decoder_num_heads)
        self.renderer = VMRenderer(box, density_dim, colour_dim, hidden)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        parts = (self.encoder, self.rate), (self.decoder, 1.0), (self.renderer, 1.0)
        trained = [([p for p in part.parameters() if p.requires_grad], rate) for part, rate in parts]
        return [{"params": some, "weight_decay": weight_decay, "lr_scale": rate} for some, rate in trained]

    def prepare(self, batch: SceneBatch, draw: Draw, progress: Progress) -> View:
        """parts: the image, camera [B, 2], poses, rays and edges of their samples."""
        self.wants.check(batch)
        image = normalise(batch.views[:, 0], self.mean, self.std)
        (height, width), (count, views) = self.wants.size, batch.views.shape[:2]
        poses, focals = first_at_rest(batch.poses.to(image)), batch.focals.to(image)
        which = (draw.uniform("rays", self.rays, image.device).double() * views * height * width).long()
        if self.perceptual:  # the pixels of one of the other views, in front
            other = 1 + (draw.uniform("view", 1, image.device).double() * (views - 1)).long()
            whole = torch.arange(height * width, device=image.device)
            which = torch.cat([other * height * width + whole, which], 1)
        pixels = batch.views.transpose(2, 4).transpose(2, 3).reshape(count, -1, 3)
        colours = pixels.gather(1, which[..., None].expand(-1, -1, 3)).to(image) / 255
        edges = self.edges(image).repeat(count, 1)
        shift = draw.uniform("samples", self.samples, image.device).to(image)
        edges[:, :-1] += shift * (self.near_far[1] - self.near_far[0]) / self.samples
        camera = torch.stack([poses[:, 0, :, 3].norm(dim=1), focals / height], 1)
        origins, directions = rays_of(poses, focals, which, self.wants.size)
        parts = {"image": image, "camera": camera, "poses": poses, "focals": focals,
                 "origins": origins, "directions": directions, "edges": edges, "views": batch.views}  # fmt: skip
        return View(parts, None, colours)

    def edges(self, like: Tensor) -> Tensor:
        """[1, samples + 1], evenly from near to far."""
        return torch.linspace(*self.near_far, self.samples + 1, device=like.device, dtype=like.dtype)[None]

    def field(self, image: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """Planes and lines, of a normalised image [B, 3, H, W] and its camera's distance and focal length [B, 2]."""
        return self.decoder(self.encoder.states(image)[0], camera)

    def compute(self, view: View) -> Output:
        p = view.parts
        seen = self.renderer(*self.field(p["image"], p["camera"]), p["origins"], p["directions"], p["edges"])
        return Output(self._terms(seen, view), seen.colours, view)

    def _terms(self, seen: Rendered, view: View) -> dict[str, Tensor]:
        terms = {"colours": F.mse_loss(seen.colours, view.target)}
        if self.perceptual:
            height, width = self.wants.size
            pair = (
                t[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
                for t in (seen.colours, view.target)
            )
            terms["perceptual"] = self.weights[0] * self.perceptual(*pair).mean()
        return {**terms, "distortion": self.weights[1] * distortion(seen.weights, seen.middles, seen.widths)}

    def baseline(self, view: View) -> Output:
        pred = view.target.mean((0, 1)).expand_as(view.target)
        return Output({"colours": F.mse_loss(pred, view.target)}, pred, view)

    def encode(self, batch: SceneBatch) -> Tensor:
        """[B, 1 + N, D] of the first view, class token first."""
        self.wants.check(batch)
        return self.encoder.states(normalise(batch.views[:, 0], self.mean, self.std))[0]

    def picture(self, view: View, names: Sequence[str]) -> Picture:
        from maefast.data.images.pictures import Sheet, to_pixels

        p, (height, width) = view.parts, self.wants.size
        last = p["poses"].shape[1] - 1
        which = last * height * width + torch.arange(height * width, device=p["image"].device).expand(len(names), -1)
        rays = rays_of(p["poses"], p["focals"], which, self.wants.size)
        seen = self.renderer(*self.field(p["image"], p["camera"]), *rays, self.edges(p["image"]).repeat(len(names), 1))
        near, far = self.near_far
        met = seen.weights.sum(-1)
        depth = ((far - seen.depth / met.clamp_min(1e-6)) / (far - near) * (met > 0.5))[:, None].expand(-1, 3, -1)
        drawn = (seen.colours.transpose(1, 2), depth)
        drawn = (to_pixels(columns.unflatten(2, (height, width))) for columns in drawn)
        columns = [p["views"][:, 0].cpu(), *drawn, p["views"][:, -1].cpu()]
        labels = ("given", "another view", "its nearness", "as it is")
        return Sheet(columns, names, "one image is given, and the camera", labels)
