"""The structure of lightly's masked vision transformers on timm, from a description of them; plain eager torch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from maefast.bench.peers.public.timm_vit import Block, VisionTransformer


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def put_mask_token(tokens: Tensor, idx_mask: Tensor | None, mask: Tensor | None, mask_token: Tensor) -> Tensor:
    if idx_mask is not None and mask is not None:
        raise ValueError("idx_mask or mask, not both")
    if idx_mask is not None:
        share = torch.zeros_like(tokens).scatter(1, idx_mask[..., None].expand(-1, -1, tokens.shape[-1]), 1)
    elif mask is not None:
        share = mask[..., None].bool().int()
    else:
        return tokens
    return (1 - share) * tokens + share * mask_token


class Masked(ABC, nn.Module):
    @abstractmethod
    def encode(self, images, idx_mask=None, idx_keep=None, mask=None): ...

    @abstractmethod
    def images_to_tokens(self, images): ...

    @abstractmethod
    def prepend_prefix_tokens(self, x): ...

    @abstractmethod
    def add_pos_embed(self, x): ...

    def preprocess(self, images, idx_mask=None, idx_keep=None, mask=None):
        tokens = self.prepend_prefix_tokens(self.images_to_tokens(images))
        tokens = self.add_pos_embed(put_mask_token(tokens, idx_mask, mask, self.mask_token))
        return tokens if idx_keep is None else pick(tokens, idx_keep)


class MaskedVisionTransformerTIMM(Masked):
    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))

    def forward(self, images, idx_mask=None, idx_keep=None, mask=None):
        x = self.encode(images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
        return x[:, 0]

    def forward_intermediates(self, images, idx_mask=None, idx_keep=None, norm=False, mask=None):
        x = self.preprocess(images=images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
        x, found = self.vit.norm_pre(x), []
        for block in self.vit.blocks:
            x = block(x)
            found.append(self.vit.norm(x) if norm else x)
        return self.vit.norm(x), found

    def encode(self, images, idx_mask=None, idx_keep=None, mask=None):
        x = self.preprocess(images=images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(x)))

    def images_to_tokens(self, images):
        return self.vit.patch_embed(images)

    def prepend_prefix_tokens(self, x):
        first = [t.expand(len(x), -1, -1) for t in (self.vit.cls_token, self.vit.reg_token) if t is not None]
        return torch.cat([*first, x], 1)

    def add_pos_embed(self, x):
        first, x = x.tensor_split([self.vit.num_prefix_tokens], 1)
        if self.vit.no_embed_class:
            x = torch.cat([first, x + self.vit.pos_embed], 1)
        else:
            x = torch.cat([first, x], 1) + self.vit.pos_embed
        return self.vit.pos_drop(x)


class MaskedVisionTransformerDecoderTIMM(nn.Module):
    def __init__(self, num_patches: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.num_patches, self.num_prefix_tokens = num_patches, 1
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches + 1, embed_dim) * 0.5, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x, idx_mask=None, idx_keep=None, mask=None):
        return self.decode(self.preprocess(x, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask))

    def preprocess(self, x, idx_mask=None, idx_keep=None, mask=None):
        x = self.add_pos_embed(put_mask_token(x, idx_mask, mask, self.mask_token))
        return x if idx_keep is None else pick(x, idx_keep)

    def add_pos_embed(self, x):
        return x + self.pos_embed

    def decode(self, x):
        return self.norm(self.blocks(x))


class MAEDecoderTIMM(nn.Module):
    def __init__(self, num_patches: int, embed_dim: int, width: int, out: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, num_patches + 1, width) * 0.5, requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(width, 2) for _ in range(2)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, out)

    def forward(self, input):
        return self.predict(self.decode(self.embed(input)))

    def embed(self, input):
        return self.decoder_embed(input)

    def decode(self, input):
        return self.decoder_norm(self.decoder_blocks(input + self.decoder_pos_embed))

    def predict(self, input):
        return self.decoder_pred(input)
