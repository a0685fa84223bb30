"""Models of transformers for `dropin_models`: how to build them, what a step is given, and its loss.

With random weights, at the sizes of the published base models. The heads of DINOv3 and the teachers of DINOv3 and
V-JEPA 2 are not in the package: there a step ends in the error of the tokens against a random target.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.dropin_family import Family, images
from maefast.bench.peers.dropin_vits import (
    CLIP,
    DECODER_B,
    DECODER_TOY,
    DECODER_VIDEO,
    TOY,
    VIT_B,
    frames_first,
    num_patches,
    some_tokens,
    write_out,
)

JEPA_B = {**VIT_B, "img_size": 112, "num_frames": 16, "tubelet_size": 2, "decoder_embed_dim": 384, "decoder_depth": 12}
JEPA_B |= {"decoder_num_heads": 12}
JEPA_TOY = {**TOY, "num_frames": 4, "tubelet_size": 2, **DECODER_TOY}
SWIN_B = {"img_size": 192, "patch_size": 4, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
SWIN_B |= {"window_size": 6, "encoder_stride": 32}
SWIN_TOY = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
SWIN_TOY |= {"window_size": 4, "encoder_stride": 8}


def _encoder(sizes: dict) -> dict:
    width = sizes["embed_dim"]
    return {
        "hidden_size": width,
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": 4 * width,
        "image_size": sizes["img_size"],
        "patch_size": sizes["patch_size"],
        "attn_implementation": "sdpa",
    }


def _with_decoder(sizes: dict) -> dict:
    width = sizes["decoder_embed_dim"]
    return {
        **_encoder(sizes),
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": sizes["decoder_depth"],
        "decoder_num_attention_heads": sizes["decoder_num_heads"],
        "decoder_intermediate_size": 4 * width,
        "norm_pix_loss": True,
    }


def hf_vitmae(sizes: dict) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(ViTMAEConfig(**_with_decoder(sizes), mask_ratio=0.75))


def hf_videomae(sizes: dict) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    frames = {key: sizes[key] for key in ("num_frames", "tubelet_size")}
    return VideoMAEForPreTraining(VideoMAEConfig(**_with_decoder(sizes), **frames))


def hf_beit(sizes: dict) -> nn.Module:
    """One table of relative positions for all layers, as it is pre-trained."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    options = {"use_mask_token": True, "use_shared_relative_position_bias": True}
    return BeitForMaskedImageModeling(BeitConfig(**_encoder(sizes), vocab_size=sizes["vocab_size"], **options))


def hf_dinov3(sizes: dict) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**_encoder(sizes), num_register_tokens=sizes["registers"]))


def hf_vjepa2(sizes: dict) -> nn.Module:
    from transformers import VJEPA2Config, VJEPA2Model

    found = _encoder(sizes)
    found["crop_size"], found["mlp_ratio"] = (
        found.pop("image_size"),
        found.pop("intermediate_size") / sizes["embed_dim"],
    )
    return VJEPA2Model(
        VJEPA2Config(
            **found,
            frames_per_clip=sizes["num_frames"],
            tubelet_size=sizes["tubelet_size"],
            pred_hidden_size=sizes["decoder_embed_dim"],
            pred_num_hidden_layers=sizes["decoder_depth"],
            pred_num_attention_heads=sizes["decoder_num_heads"],
        )
    )


def hf_swin(sizes: dict) -> nn.Module:
    """SimMIM's: without stochastic depth."""
    from transformers import SwinConfig, SwinForMaskedImageModeling

    rest = {key: value for key, value in sizes.items() if key != "img_size"}
    return SwinForMaskedImageModeling(SwinConfig(**rest, image_size=sizes["img_size"], drop_path_rate=0.0))


# --- what a step is given -----------------------------------------------------------------------------------


def hidden(batch: int, of: int, count: int, generator: torch.Generator) -> Tensor:
    """bool [batch, of], True = masked: `count` of them in each sample."""
    return torch.rand(batch, of, generator=generator).argsort(1).argsort(1) < count


def codes(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, BEiT's share of masked patches (75 of 196), the visual token of each."""
    count = 75 * num_patches(sizes) // 196
    labels = torch.randint(sizes["vocab_size"], (batch * count,), generator=generator)
    return *images(sizes, batch, generator), hidden(batch, num_patches(sizes), count, generator), labels


def student(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, a third of the patches masked, a target for every token."""
    count = num_patches(sizes)
    target = torch.randn(batch, 1 + sizes["registers"] + count, sizes["embed_dim"], generator=generator)
    return *images(sizes, batch, generator), hidden(batch, count, count // 3, generator), target


def predicted(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Videos, the tokens that the predictor sees (a quarter of the places, in all frames), those that it predicts (the
    rest), a target for these."""
    side, frames, places = sizes["img_size"], sizes["num_frames"] // sizes["tubelet_size"], num_patches(sizes)
    videos = torch.randn(batch, sizes["num_frames"], 3, side, side, generator=generator)
    seen = some_tokens(sizes, batch, places // 4, generator)
    mask = torch.ones(batch, places, dtype=torch.bool).scatter(1, seen, False).repeat(1, frames)
    context, targets = (chosen.nonzero()[:, 1].view(batch, -1) for chosen in (~mask, mask))
    return videos, context, targets, torch.randn(*targets.shape, sizes["embed_dim"], generator=generator)


def units(sizes: dict, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, and SimMIM's mask: three fifths of the squares that a last token stands for."""
    stride = sizes["encoder_stride"]
    side, each = sizes["img_size"] // stride, stride // sizes["patch_size"]
    mask = hidden(batch, side * side, -(-3 * side * side // 5), generator).view(batch, side, side)
    mask = mask.repeat_interleave(each, 1).repeat_interleave(each, 2)
    return *images(sizes, batch, generator), mask.flatten(1)


def beit_loss(model: nn.Module, pixels: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return model(pixel_values=pixels, bool_masked_pos=mask, labels=labels).loss


def dinov3_loss(model: nn.Module, pixels: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(model(pixel_values=pixels, bool_masked_pos=mask).last_hidden_state, target)


def vjepa2_loss(model: nn.Module, videos: Tensor, context: Tensor, targets: Tensor, target: Tensor) -> Tensor:
    out = model(pixel_values_videos=videos, context_mask=[context], target_mask=[targets])
    return F.l1_loss(out.predictor_output.last_hidden_state, target)


FAMILIES = {
    "hf_vitmae": Family(
        "HF ViTMAE",
        {"base": {**VIT_B, **DECODER_B, "batch": 16}, "toy": {**TOY, **DECODER_TOY, "batch": 2}},
        hf_vitmae,
        None,
        images,
        lambda model, pixels: model(pixel_values=pixels).loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
    "hf_videomae": Family(
        "HF VideoMAE",
        {"base": {**VIT_B, **CLIP, **DECODER_VIDEO, "batch": 2}, "toy": {**TOY, **CLIP, **DECODER_TOY, "batch": 2}},
        hf_videomae,
        None,
        frames_first,
        lambda model, pixels, mask: model(pixel_values=pixels, bool_masked_pos=mask).loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
    "hf_beit": Family(
        "HF BEiT for masked image modelling",
        {"base": {**VIT_B, "vocab_size": 8192, "batch": 2}, "toy": {**TOY, "vocab_size": 64, "batch": 2}},
        hf_beit,
        None,
        codes,
        beit_loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
    "hf_dinov3": Family(
        "HF DINOv3, some patches masked",
        {"base": {**VIT_B, "registers": 4, "batch": 2}, "toy": {**TOY, "registers": 4, "batch": 2}},
        hf_dinov3,
        None,
        student,
        dinov3_loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
    "hf_vjepa2": Family(
        "HF V-JEPA 2, encoder and predictor",
        {"base": {**JEPA_B, "batch": 1}, "toy": {**JEPA_TOY, "batch": 2}},
        hf_vjepa2,
        None,
        predicted,
        vjepa2_loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
    "hf_swin": Family(
        "HF Swin for masked image modelling",
        {"base": {**SWIN_B, "batch": 2}, "toy": {**SWIN_TOY, "batch": 2}},
        hf_swin,
        None,
        units,
        lambda model, pixels, mask: model(pixel_values=pixels, bool_masked_pos=mask).loss,
        tune=write_out,
        variant="written",
        package="transformers",
    ),
}
