"""Transformers of public code, timm and lightly for `dropin_models`: how to build them, what a step is given, and its
loss. Those of Hugging Face are in `dropin_hf`."""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.dropin_family import Family, images

VIT_B = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DECODER_B = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
DECODER_TOY = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
DECODER_VIDEO = {"decoder_embed_dim": 384, "decoder_depth": 4, "decoder_num_heads": 6}
CLIP = {"num_frames": 16, "tubelet_size": 2, "mask_ratio": 0.9}
CROSS = {"weight_fm": True}
SOUND_B = {"img_size": [1024, 128], "in_chans": 1}  # time, frequency
SOUND_TOY = {"img_size": [64, 32], "in_chans": 1}
FRAMES = {"num_frames": 16, "t_patch_size": 2}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation
NORM = partial(nn.LayerNorm, eps=1e-6)  # what the published sizes use; the classes' own default is 1e-5


def num_patches(sizes: dict) -> int:
    return (sizes["img_size"] // sizes["patch_size"]) ** 2


def some_tokens(sizes: dict, batch: int, keep: int, generator: torch.Generator) -> Tensor:
    """Indices [B, keep], ascending."""
    return torch.rand(batch, num_patches(sizes), generator=generator).argsort(1)[:, :keep].sort(1).values


def put_in_sdpa(model: nn.Module, pairs: bool) -> None:
    """torch's attention in place of one that writes its scores. pairs: the attention returns (x, scores)."""

    def forward(self: nn.Module, x: Tensor):
        if hasattr(self, "qkv"):
            bias = self.qkv.bias
            if getattr(self, "q_bias", None) is not None:
                bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        rate = self.attn_drop.p if self.training and hasattr(self, "attn_drop") else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return (y, None) if pairs else y

    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.forward = MethodType(forward, module)


def write_out(model: nn.Module) -> None:
    """Attention as products and a softmax in the place of SDPA, by the switch that transformers and timm have."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


# --- MAE and ViTMAE -----------------------------------------------------------------------------------------


def public_mae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.checkouts import old_timm

    old_timm()
    from models_mae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True, norm_layer=NORM)


def own_mae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.mae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True)


def public_audiomae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.checkouts import old_timm

    old_timm()
    from models_mae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, audio_exp=True, norm_pix_loss=True, norm_layer=NORM)


def own_audiomae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.audiomae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes)


def spectrograms(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(batch, sizes["in_chans"], *sizes["img_size"], generator=generator),)


def audiomae_loss(model: nn.Module, x: Tensor) -> Tensor:
    """What its forward does first; then it makes a zero, which it wants on a GPU."""
    latent, mask, ids_restore, _ = model.forward_encoder(x, 0.8)
    return model.forward_loss(x, model.forward_decoder(latent, ids_restore)[0], mask, norm_pix_loss=True)


def public_crossmae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.checkouts import old_timm

    old_timm()
    from models_cross import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True, norm_layer=NORM)


def own_crossmae(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.crossmae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True)


def public_mae_st(sizes: dict) -> nn.Module:
    from mae_st.models_mae import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True, sep_pos_embed=True, cls_embed=True, norm_layer=NORM)


def own_mae_st(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.mae_st import MaskedAutoencoderViT

    return MaskedAutoencoderViT(**sizes, norm_pix_loss=True, sep_pos_embed=True, cls_embed=True)


# --- VideoMAE -----------------------------------------------------------------------------------------------


def tube_mask(sizes: dict, batch: int, generator: torch.Generator) -> Tensor:
    """bool [B, N], True = masked: the same patches in every frame."""
    patches = num_patches(sizes)
    hidden = int(sizes["mask_ratio"] * patches)
    frame = torch.rand(batch, patches, generator=generator).argsort(1).argsort(1) < hidden
    return frame.repeat(1, sizes["num_frames"] // sizes["tubelet_size"])


def videos_first(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, C, T, H, W] and its mask."""
    side = sizes["img_size"]
    clips = torch.randn(batch, 3, sizes["num_frames"], side, side, generator=generator)
    return clips, tube_mask(sizes, batch, generator)


def frames_first(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, T, C, H, W] and its mask."""
    clips, mask = videos_first(sizes, batch, generator)
    return clips.transpose(1, 2).contiguous(), mask


def public_videomae(sizes: dict) -> nn.Module:
    try:
        from modeling_pretrain import PretrainVisionTransformer
    except ImportError:  # v2
        from models.modeling_pretrain import PretrainVisionTransformer

    encoder = {f"encoder_{key}": sizes[key] for key in ("embed_dim", "depth", "num_heads")}
    decoder = {key: value for key, value in sizes.items() if key.startswith("decoder_")}
    patch = sizes["patch_size"]
    return PretrainVisionTransformer(
        img_size=sizes["img_size"],
        patch_size=patch,
        tubelet_size=sizes["tubelet_size"],
        decoder_num_classes=3 * sizes["tubelet_size"] * patch**2,
        **encoder,
        **decoder,
        qkv_bias=True,
        norm_layer=NORM,
    )


def own_videomae(sizes: dict) -> nn.Module:
    """Put together from its parts, because the whole has one size there."""
    from maefast.bench.peers.public import videomae as parts

    width, decoder_width, tube, patch = (
        sizes[key] for key in ("embed_dim", "decoder_embed_dim", "tubelet_size", "patch_size")
    )
    model = parts.VideoMAE()
    model.encoder = parts.Encoder(width, sizes["depth"], sizes["num_heads"])
    embed = parts.PatchEmbed(sizes["img_size"], patch, sizes["num_frames"], tube, width)
    model.encoder.patch_embed, model.encoder.pos_embed = embed, parts.sinusoids(embed.num_patches, width)
    values = 3 * tube * patch**2
    model.decoder = parts.Decoder(values, decoder_width, sizes["decoder_depth"], sizes["decoder_num_heads"])
    model.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
    model.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
    model.pos_embed = parts.sinusoids(embed.num_patches, decoder_width)
    return model


def videomae_target(videos: Tensor, mask: Tensor, tube: int, patch: int) -> Tensor:
    """[B, masked, tube * patch * patch * 3]: each channel of a masked cube normalised, as VideoMAE's loop has it."""
    mean, std = (torch.tensor(v, device=videos.device).view(1, 3, 1, 1, 1) for v in IMAGENET)
    b, c, t, h, w = videos.shape
    x = (videos * std + mean).view(b, c, t // tube, tube, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, tube * patch * patch, c)
    x = (x - x.mean(-2, keepdim=True)) / (x.var(-2, keepdim=True).sqrt() + 1e-6)
    return x.flatten(2)[mask].view(b, -1, tube * patch * patch * c)


def videomae_loss(model: nn.Module, videos: Tensor, mask: Tensor) -> Tensor:
    conv = model.encoder.patch_embed.proj
    with torch.no_grad():
        target = videomae_target(videos, mask, conv.kernel_size[0], conv.kernel_size[1])
    return F.mse_loss(model(videos, mask), target)


def videomae_fast_loss(model: nn.Module, videos: Tensor, mask: Tensor) -> Tensor:
    from maefast.integrations import videomae

    tube, *patch = model.encoder.patch_embed.proj.kernel_size
    return videomae.loss(model(videos, mask), videos, mask, patch_size=tuple(patch), tubelet_size=tube)


# --- timm, JEPA, lightly ------------------------------------------------------------------------------------


def timm_vit(sizes: dict) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**sizes)


def own_timm(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.timm_vit import VisionTransformer

    return VisionTransformer(**sizes)


def labelled(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return *images(sizes, batch, generator), torch.randint(sizes["num_classes"], (batch,), generator=generator)


def context(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the patches that the context encoder sees (two fifths, about what four target blocks leave), a target."""
    keep = 2 * num_patches(sizes) // 5
    tokens = some_tokens(sizes, batch, keep, generator)
    target = torch.randn(batch, keep, sizes["embed_dim"], generator=generator)
    return *images(sizes, batch, generator), tokens, target


def public_jepa(sizes: dict) -> nn.Module:
    from src.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**sizes, "img_size": [sizes["img_size"]]}, norm_layer=NORM)


def own_jepa(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public import jepa as parts

    width, patch = sizes["embed_dim"], sizes["patch_size"]
    model = parts.ImageEncoder(width, sizes["depth"], sizes["num_heads"])
    model.patch_embed = parts.PatchEmbed((patch, patch), width, sizes["img_size"])
    model.pos_embed = parts.table(num_patches(sizes), width)
    return model


def public_lightly(sizes: dict) -> nn.Module:
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    return MaskedVisionTransformerTIMM(timm_vit({**sizes, "num_classes": 0}))


def own_lightly(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.lightly import MaskedVisionTransformerTIMM

    return MaskedVisionTransformerTIMM(own_timm(sizes))


def kept(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the quarter of the tokens that is kept (with the class token, 0), a target."""
    tokens = 1 + some_tokens(sizes, batch, num_patches(sizes) // 4, generator)
    tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)
    target = torch.randn(*tokens.shape, sizes["embed_dim"], generator=generator)
    return *images(sizes, batch, generator), tokens, target


FAMILIES = {
    "mae": Family(
        "MAE",
        {"base": {**VIT_B, **DECODER_B, "batch": 16}, "toy": {**TOY, **DECODER_TOY, "batch": 2}},
        public_mae,
        own_mae,
        images,
        lambda model, pixels: model(pixels)[0],
        tune=write_out,
        variant="written",
        needs="facebookresearch/mae, and of timm where that is not installed",
    ),
    "audiomae": Family(
        "AudioMAE",
        {
            "base": {**VIT_B, **SOUND_B, **DECODER_B, "batch": 2},
            "toy": {**TOY, **SOUND_TOY, **DECODER_TOY, "batch": 2},
        },
        public_audiomae,
        own_audiomae,
        spectrograms,
        audiomae_loss,
        tune=write_out,
        variant="written",
        needs="facebookresearch/AudioMAE, and of timm where that is not installed",
    ),
    "crossmae": Family(
        "CrossMAE, weighted feature maps",
        {
            "base": {**VIT_B, **CROSS, **DECODER_B, "decoder_depth": 12, "batch": 16},
            "toy": {**TOY, **CROSS, **DECODER_TOY, "batch": 2},
        },
        public_crossmae,
        own_crossmae,
        images,
        lambda model, pixels: model(pixels, 0.75, 0.25),
        needs="TonyLianLong/CrossMAE, and of timm where that is not installed",
    ),
    "mae_st": Family(
        "MAE-ST",
        {
            "base": {**VIT_B, **FRAMES, **DECODER_B, "decoder_depth": 4, "batch": 2},
            "toy": {**TOY, **FRAMES, **DECODER_TOY, "batch": 2},
        },
        public_mae_st,
        own_mae_st,
        lambda sizes, batch, generator: videos_first({**sizes, **CLIP}, batch, generator)[:1],
        lambda model, clips: model(clips, 0.9)[0],
        tune=partial(put_in_sdpa, pairs=False),
        needs="a folder that holds facebookresearch/mae_st as mae_st, and of timm where that is not installed",
    ),
    "videomae": Family(
        "VideoMAE",
        {"base": {**VIT_B, **CLIP, **DECODER_VIDEO, "batch": 2}, "toy": {**TOY, **CLIP, **DECODER_TOY, "batch": 2}},
        public_videomae,
        own_videomae,
        videos_first,
        videomae_loss,
        videomae_fast_loss,
        partial(put_in_sdpa, pairs=False),
        needs="MCG-NJU/VideoMAE, and of timm where that is not installed",
    ),
    "timm": Family(
        "timm ViT, half of the patches dropped",
        {
            "base": {**VIT_B, "num_classes": 1000, "patch_drop_rate": 0.5, "batch": 16},
            "toy": {**TOY, "num_classes": 10, "patch_drop_rate": 0.5, "batch": 2},
        },
        timm_vit,
        own_timm,
        labelled,
        lambda model, pixels, labels: F.cross_entropy(model(pixels), labels),
        tune=write_out,
        variant="written",
        package="timm",
        needs="huggingface/pytorch-image-models",
    ),
    "jepa": Family(
        "I-JEPA context encoder",
        {"base": {**VIT_B, "batch": 16}, "toy": {**TOY, "batch": 2}},
        public_jepa,
        own_jepa,
        context,
        lambda model, pixels, tokens, target: F.smooth_l1_loss(model(pixels, [tokens]), target),
        tune=partial(put_in_sdpa, pairs=True),
        needs="facebookresearch/ijepa",
    ),
    "lightly": Family(
        "lightly's masked ViT",
        {"base": {**VIT_B, "batch": 16}, "toy": {**TOY, "batch": 2}},
        public_lightly,
        own_lightly,
        kept,
        lambda model, pixels, tokens, target: F.smooth_l1_loss(model.encode(pixels, idx_keep=tokens), target),
        tune=write_out,
        variant="written",
        package="lightly",
        needs="lightly-ai/lightly, and of timm where that is not installed",
    ),
}
