"""Two forks of the structure of facebookresearch/mae in plain PyTorch, for `bench.toys`: of spectrograms, and with a
decoder that looks at the encoder's tokens alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.public.mae import MaskedAutoencoderViT, Mlp


class SpectrogramMAE(MaskedAutoencoderViT):
    """One channel, an input of (time, mel) that is no square, patches in an order of its own."""

    def __init__(self, time: int, mels: int, **sizes) -> None:
        side, patch = sizes.pop("img_size"), sizes["patch_size"]
        assert time * mels == side * side
        super().__init__(img_size=side, in_chans=1, **sizes)
        self.patch_embed.img_size = (time, mels)
        self.patch_embed.grid_size = (time // patch, mels // patch)

    def patchify(self, imgs: Tensor) -> Tensor:
        p = self.patch_embed.patch_size[0]
        return F.unfold(imgs, p, stride=p).transpose(1, 2)


class CrossBlock(nn.Module):
    """Queries look at the encoder's tokens and not at each other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(self.norm1(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossMAE(MaskedAutoencoderViT):
    """A cross-attention decoder of the masked tokens alone (CrossMAE, Fu et al., 2024)."""

    def __init__(self, **sizes) -> None:
        super().__init__(**sizes, norm_pix_loss=True)
        width, heads = sizes["decoder_embed_dim"], sizes["decoder_num_heads"]
        self.decoder_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(sizes["decoder_depth"]))

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> Tensor:
        latent, _, ids_restore = self.forward_encoder(imgs, mask_ratio)
        memory = self.decoder_embed(latent)
        count = ids_restore.shape[1]
        hidden = ids_restore.argsort(1)[:, latent.shape[1] - 1 :]
        table = self.decoder_pos_embed[:, 1:].expand(len(imgs), count, -1)
        x = self.mask_token + table.gather(1, hidden[..., None].expand(-1, -1, table.shape[-1]))
        for block in self.decoder_blocks:
            x = block(x, memory)
        pred = self.decoder_pred(self.decoder_norm(x))
        target = self.patchify(imgs)
        target = target.gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(pred, target)
