from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import below, blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import encoder_input
from maefast.data.scenes import SceneBatch
from maefast.recipe import View

__all__ = ["batch", "reference"]
ARGUMENTS = {"rays": 512}


def batch(size: int) -> SceneBatch:
    views = torch.randint(0, 256, (size, 5, 3, 160, 90), dtype=torch.uint8)
    poses = torch.eye(3, 4).repeat(size, 5, 1, 1)
    poses[..., 3] = torch.tensor([0.0, 0.0, -1.0])
    return SceneBatch(views, poses, torch.full((size,), 150.0))


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """NViST (Jang & Agapito, 2024), without the perceptual term."""
    p, v = parameters(recipe), view.parts
    x = encoder_input(p, "encoder.", v["image"], recipe.encoder.patch_embed.patch_size)
    x = blocks(x, p, "encoder.blocks.", recipe.encoder.blocks[0].attn.num_heads)[-1]
    planes, lines = _field(recipe.decoder, below(p, "decoder."), x, v["camera"])
    middle, width = (v["edges"][:, 1:] + v["edges"][:, :-1]) / 2, v["edges"].diff(dim=1)
    points = v["origins"][:, :, None] + v["directions"][:, :, None] * middle[:, None, :, None]
    (b, n, s, _), at = points.shape, points / recipe.renderer.box
    density, colour = 0.0, []
    for i, (axes, axis) in enumerate(zip(([0, 1], [2, 0], [1, 2]), (2, 1, 0))):
        line = torch.stack([torch.zeros(b, n, s).to(at), at[..., axis]], -1)
        both = F.grid_sample(planes[i], at[..., axes], align_corners=False)
        both = both * F.grid_sample(lines[i][..., None], line, align_corners=False)  # [B, C, N, S]
        first, second = both.split(recipe.renderer.split, 1)
        density, colour = density + first.sum(1), [*colour, second]
    features = F.gelu(torch.cat(colour, 1).permute(0, 2, 3, 1))
    features = F.gelu(linear(features, p, "renderer.rgb_matrix.1"))
    seen = v["directions"]
    waves = torch.cat([seen[..., i : i + 1] * 2**k for i in range(3) for k in range(recipe.renderer.freqs)], -1)
    seen = torch.cat([waves.sin(), waves.cos(), seen], -1)[:, :, None].expand(-1, -1, s, -1)
    x = F.gelu(linear(torch.cat([features, seen], -1), p, "renderer.rgb_mlp.0"))
    alpha = 1 - torch.exp(-density.relu() * width[:, None])
    left = torch.cat([torch.ones(b, n, 1).to(alpha), 1 - alpha + 1e-10], -1).cumprod(-1)[..., :-1]
    weights = alpha * left
    pred = (weights[..., None] * linear(x, p, "renderer.rgb_mlp.2").sigmoid()).sum(2)
    apart = (middle[:, :, None] - middle[:, None]).abs()
    apart = torch.einsum("bni,bij,bnj->bn", weights, apart, weights) + (weights**2 * width[:, None]).sum(-1) / 3
    return {"colours": (pred - view.target).square().mean(), "distortion": recipe.weights[1] * apart.mean()}


def _field(decoder: nn.Module, p: dict[str, Tensor], latent: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    """[3, B, C, R, R] and [3, B, C, R]."""
    image = latent[:, 1:] + p["encoded_patches_pos_embed"]
    x = torch.cat([latent[:, :1], p["output_token"].expand(len(latent), decoder.cells, -1)], 1) + p["decoder_pos_embed"]
    waves = torch.cat([camera[:, i : i + 1] * 2**k * math.pi for i in (0, 1) for k in range(decoder.freqs)], -1)
    c = linear(torch.cat([camera, waves.sin(), waves.cos()], -1), p, "camera_params_embed.0").relu()
    c = linear(c, p, "camera_params_embed.2")
    for i, block in enumerate(decoder.blocks):
        q = below(p, f"blocks.{i}.")
        shift, scale, gate, shift2, scale2, gate2 = linear(F.silu(c), q, "adaLN_modulation.1")[:, None].chunk(6, -1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        k, v = (norm(image, q, "norm_k"), norm(image, q, "norm_v")) if i % 2 == 0 else (y, y)
        heads = [linear(t, q, f"attn.{n}").unflatten(2, (block.attn.num_heads, -1)) for n, t in zip("qkv", (y, k, v))]
        seen = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in heads)).transpose(1, 2).flatten(2)
        x = x + gate * linear(seen, q, "attn.proj")
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        x = x + gate2 * linear(F.gelu(linear(y, q, "mlp.fc1")), q, "mlp.fc2")
    side, patch, many = decoder.side, decoder.patch, 3 * decoder.side**2
    planes = F.gelu(norm(x[:, 1 : 1 + many], p, "decoder_out_norm.0")).chunk(3, 1)
    lines = F.gelu(norm(x[:, 1 + many :], p, "decoder_vector_norm.0")).chunk(3, 1)
    planes = [linear(part, p, f"decoder_pred.{i}") for i, part in enumerate(planes)]
    planes = [part.view(len(x), side, side, patch, patch, -1) for part in planes]
    planes = torch.stack([torch.einsum("nhwpqc->nchpwq", part).flatten(4).flatten(2, 3) for part in planes])
    lines = [linear(part, p, f"decoder_vector_pred.{i}") for i, part in enumerate(lines)]
    return planes, torch.stack([part.view(len(x), side * patch, -1).transpose(1, 2) for part in lines])
