"""VideoMAE v1 and v2 in our own words: the names, keys and maths of `PretrainVisionTransformer`."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        alive = torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device) < keep
        return x * alive / keep


class Attention(nn.Module):
    """Queries and values have a bias, keys have none."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.mT).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class CosAttention(Attention):
    """v2's: cosine similarities with a learned temperature for each head."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.scale = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log())

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        similar = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        weights = self.attn_drop((similar * self.scale.clamp(max=4.6052).exp()).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop=0.0, drop_path=0.0, init_values=0.0, cos_attn=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = (CosAttention if cos_attn else Attention)(dim, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, drop)
        scaled = init_values > 0
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if scaled else None

    def forward(self, x):
        if self.gamma_1 is None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, num_frames, tubelet_size, dim):
        super().__init__()
        self.img_size = (img_size, img_size)
        self.num_patches = (img_size // patch_size) ** 2 * (num_frames // tubelet_size)
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, size, size)

    def forward(self, x):
        assert tuple(x.shape[-2:]) == self.img_size, "videos of another size"
        return self.proj(x).flatten(2).transpose(1, 2)


def sinusoids(length, dim):
    angle = torch.arange(length)[:, None] / 10000 ** (2 * (torch.arange(dim) // 2) / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos())[None].float()


class Encoder(nn.Module):
    def __init__(self, dim, depth, num_heads, with_cp=False, **options):
        super().__init__()
        self.patch_embed = PatchEmbed(16, 4, 4, 2, dim)
        self.pos_embed = sinusoids(self.patch_embed.num_patches, dim)  # no buffer: not in the state dict, never moved
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(Block(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()

    def forward_features(self, x, mask):
        x = self.patch_embed(x)
        x = x + self.pos_embed.type_as(x).to(x.device).clone().detach()
        x = x[~mask].reshape(len(x), -1, x.shape[-1])
        for block in self.blocks:
            x = checkpoint(block, x) if self.with_cp else block(x)
        return self.norm(x)

    def forward(self, x, mask):
        return self.head(self.forward_features(x, mask))


class Decoder(nn.Module):
    def __init__(self, values, dim, depth, num_heads, with_cp=False, **options):
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList(Block(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, values)

    def forward(self, x, return_token_num):
        for block in self.blocks:
            x = checkpoint(block, x) if self.with_cp else block(x)
        return self.head(self.norm(x[:, -return_token_num:] if return_token_num > 0 else x))


class Pair(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder = Encoder(48, 2, 3, **options)
        self.decoder = Decoder(3 * 2 * 4 * 4, 32, 2, 2, **options)
        self.encoder_to_decoder = nn.Linear(48, 32, bias=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        self.pos_embed = sinusoids(self.encoder.patch_embed.num_patches, 32)

    def predict(self, x, mask, decoded):
        latent = self.encoder_to_decoder(self.encoder(x, mask))
        pos = self.pos_embed.expand(len(x), -1, -1).type_as(x).to(x.device).clone().detach()
        visible = pos[~mask].reshape(len(x), -1, pos.shape[-1])
        wanted = pos[decoded].reshape(len(x), -1, pos.shape[-1])
        full = torch.cat([latent + visible, self.mask_token + wanted], 1)
        return self.decoder(full, wanted.shape[1])


class VideoMAE(Pair):
    def forward(self, x, mask):
        return self.predict(x, mask, mask)


class VideoMAE2(Pair):
    def forward(self, x, mask, decode_mask=None):
        return self.predict(x, mask, mask if decode_mask is None else ~decode_mask)


def engine_target(videos, patch_size, normalize):
    """What the training engine makes of videos normalised with ImageNet's mean and deviation: [B, N, K]."""
    mean, std = (torch.tensor(v)[:, None, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    videos = videos * std + mean
    batch, channels, *size = videos.shape
    t, h, w = size[0] // 2, size[1] // patch_size, size[2] // patch_size
    tubes = videos.reshape(batch, channels, t, 2, h, patch_size, w, patch_size).permute(0, 2, 4, 6, 3, 5, 7, 1)
    tubes = tubes.reshape(batch, t * h * w, 2 * patch_size**2, channels)
    if normalize:
        tubes = (tubes - tubes.mean(2, keepdim=True)) / (tubes.var(2, keepdim=True).sqrt() + 1e-6)
    return tubes.flatten(2)
