"""I-JEPA and V-JEPA in our own words: the names, keys and maths of their encoders, predictors and wrappers."""

import torch
import torch.nn.functional as F
from torch import nn


def apply_masks(x, masks):
    return torch.cat([x.gather(1, m[..., None].repeat(1, 1, x.shape[-1])) for m in masks])


def as_list(masks):
    return masks if isinstance(masks, list) else [masks]


class Mlp(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Returns its weights too."""

    def __init__(self, dim, num_heads, drop):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2))), weights


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, drop)
        self.drop_path = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, drop)

    def forward(self, x, return_attention=False):
        y, weights = self.attn(self.norm1(x))
        if return_attention:
            return weights
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VideoAttention(Attention):
    """V-JEPA's: takes a mask and ignores it; the rate of its dropout inside is that of the output."""

    def __init__(self, dim, num_heads, drop):
        super().__init__(dim, num_heads, drop)
        self.proj_drop_prob = drop
        self.use_sdpa = True

    def forward(self, x, mask=None):
        weights = None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.use_sdpa:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.proj_drop_prob)
        else:
            weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
            x = weights @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), weights


class VideoBlock(nn.Module):
    def __init__(self, dim, num_heads, drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VideoAttention(dim, num_heads, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, drop)

    def forward(self, x, return_attention=False, mask=None):
        y, weights = self.attn(self.norm1(x), mask=mask)
        if return_attention:
            return weights
        x = x + y
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim, img_size):
        super().__init__()
        self.img_size = img_size
        self.proj = (nn.Conv2d if len(patch) == 2 else nn.Conv3d)(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def table(length, dim):
    return nn.Parameter(torch.randn(1, length, dim), requires_grad=False)


class ImageEncoder(nn.Module):
    def __init__(self, dim=48, depth=2, num_heads=3, **options):
        super().__init__()
        self.patch_embed = PatchEmbed((4, 4), dim, 16)
        self.pos_embed = table(16, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, masks=None):
        x = self.patch_embed(x)
        x = x + self.interpolate_pos_encoding(x, self.pos_embed)
        if masks is not None:
            x = apply_masks(x, as_list(masks))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def interpolate_pos_encoding(self, x, pos_embed):
        if x.shape[1] == pos_embed.shape[1]:
            return pos_embed
        return F.interpolate(pos_embed.mT, size=x.shape[1], mode="linear").mT


class VideoEncoder(nn.Module):
    def __init__(self, dim=48, depth=2, num_heads=3, num_frames=4, out_layers=None, **options):
        super().__init__()
        self.input_size, self.num_frames, self.is_video = 16, num_frames, num_frames > 1
        self.out_layers = out_layers
        self.patch_embed = PatchEmbed((2, 4, 4) if self.is_video else (4, 4), dim, None)
        self.pos_embed = table(16 * (num_frames // 2) if self.is_video else 16, dim)
        self.blocks = nn.ModuleList(VideoBlock(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, masks=None):
        pos_embed = self.interpolate_pos_encoding(x, self.pos_embed)
        x = self.patch_embed(x)
        x += pos_embed  # in place: under autocast the sum has 16 bits
        if masks is not None:
            x = apply_masks(x, as_list(masks))
            masks = torch.cat(as_list(masks))
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x, mask=masks)
            if self.out_layers is not None and i in self.out_layers:
                outs.append(self.norm(x))
        return self.norm(x) if self.out_layers is None else outs

    def interpolate_pos_encoding(self, x, pos_embed):
        length = x[0, 0].numel() // self.patch_embed.proj.weight[0, 0].numel()
        if length == pos_embed.shape[1]:
            return pos_embed
        return F.interpolate(pos_embed.mT, size=length, mode="linear").mT


class ImagePredictor(nn.Module):
    def __init__(self, dim=48, width=32, depth=2, num_heads=2, num_patches=16, **options):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.predictor_pos_embed = table(num_patches, width)
        self.predictor_blocks = nn.ModuleList(Block(width, num_heads, **options) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, x, masks_x, masks):
        masks_x, masks = as_list(masks_x), as_list(masks)
        batch = len(x) // len(masks_x)
        pos = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = self.predictor_embed(x)
        x += apply_masks(pos, masks_x)
        wanted = torch.cat([m for chunk in apply_masks(pos, masks).split(batch) for m in [chunk] * len(masks_x)])
        tokens = self.mask_token.repeat(len(wanted), wanted.shape[1], 1) + wanted
        count = x.shape[1]
        x = torch.cat([x.repeat(len(masks), 1, 1), tokens], 1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, count:])


class VideoPredictor(nn.Module):
    def __init__(self, dim=48, width=32, depth=2, num_heads=2, num_patches=32, use_mask_tokens=True, **options):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_tokens, self.num_mask_tokens = None, 0
        if use_mask_tokens:
            self.num_mask_tokens = 2
            self.mask_tokens = nn.ParameterList(nn.Parameter(torch.randn(1, 1, width) * 0.02) for _ in range(2))
        self.num_patches = num_patches
        self.predictor_pos_embed = table(num_patches, width)
        self.predictor_blocks = nn.ModuleList(VideoBlock(width, num_heads, **options) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, ctxt, tgt, masks_ctxt, masks_tgt, mask_index=1):
        masks_ctxt, masks_tgt = as_list(masks_ctxt), as_list(masks_tgt)
        batch = len(ctxt) // len(masks_ctxt)
        pos = self.predictor_pos_embed.repeat(batch, 1, 1)
        x = self.predictor_embed(ctxt)
        count = x.shape[1]
        x += apply_masks(pos, masks_ctxt)
        if self.mask_tokens is None:
            tokens = self.predictor_embed(tgt)
            tokens = tokens + torch.randn(tokens.shape, device=x.device)
        else:
            token = self.mask_tokens[mask_index % self.num_mask_tokens]
            tokens = apply_masks(token.repeat(batch, self.num_patches, 1), masks_tgt)
        tokens = tokens + apply_masks(pos, masks_tgt)
        x = torch.cat([x.repeat(len(masks_tgt), 1, 1), tokens], 1)
        masks = torch.cat([torch.cat(masks_ctxt), torch.cat(masks_tgt)], 1)
        for block in self.predictor_blocks:
            x = block(x, mask=masks)
        return self.predictor_proj(self.predictor_norm(x)[:, count:])


class MultiMaskWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, masks=None):
        return self.backbone(x) if masks is None else [self.backbone(x, masks=m) for m in as_list(masks)]


class PredictorMultiMaskWrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, ctxt, tgt, masks_ctxt, masks_tgt):
        pairs = zip(ctxt, tgt, masks_ctxt, masks_tgt, strict=True)
        return [self.backbone(*pair, mask_index=i) for i, pair in enumerate(pairs)]


class IJepa(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder, self.predictor = ImageEncoder(**options), ImagePredictor(**options)

    def forward(self, x, masks_enc, masks_pred):
        return self.predictor(self.encoder(x, masks_enc), masks_enc, masks_pred)


class VJepa(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder = MultiMaskWrapper(VideoEncoder(**options))
        self.predictor = PredictorMultiMaskWrapper(VideoPredictor(**options))

    def forward(self, x, masks_enc, masks_pred):
        return self.predictor(self.encoder(x, masks_enc), [None] * len(masks_pred), masks_enc, masks_pred)
