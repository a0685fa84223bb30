"""Where each family's toy model has the parts that people change (`changes`)."""

from __future__ import annotations

import torch
from torch import nn

from maefast.bench.peers.public.timm_vit import Block
from tests.integrations import (
    test_audiomae,
    test_crossmae,
    test_eva,
    test_fcmae,
    test_hf_positions,
    test_hf_videomae,
    test_hf_vitmae,
    test_jepa,
    test_lightly,
    test_mae,
    test_mae_st,
    test_spark,
    test_timm_vit,
    test_videomae,
)
from tests.integrations.common import DropIn
from tests.integrations.place import Places, given, inputs, turned


class Blocks(DropIn):
    """Plain transformer blocks, in no model."""

    def make(self):
        return nn.Sequential(*(Block(32, init_values=0.5) for _ in range(3)))

    def inputs(self, dtype):
        return (torch.randn(2, 7, 32, dtype=dtype),), {}

    def loss(self, out):
        return out.sub(1).square().mean()


def _hf_ratio(model: nn.Module, family: DropIn) -> None:
    model.config.mask_ratio = 0.5


def _hf_checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _patch_drop(model: nn.Module, family: DropIn) -> None:
    model.patch_drop.prob = 0.25


def _patches_drop(model: nn.Module, family: DropIn) -> None:
    model.patch_drop = True


def _with_cp(model: nn.Module) -> None:
    model.encoder.with_cp = model.decoder.with_cp = True


def _kept_of_spark(model: nn.Module, family: DropIn) -> None:
    model.len_keep = 1


def _video_masks(dtype: torch.dtype) -> tuple:
    return test_videomae.videos(dtype=dtype), test_videomae.tube_mask(visible=9)


def _decoded_video_masks(dtype: torch.dtype) -> tuple:
    videos, mask = _video_masks(dtype)
    return videos, mask, test_videomae.running_cells(mask)


def _jepa_masks(dtype: torch.dtype) -> tuple:
    kept = test_jepa.kept
    return test_jepa.images(dtype=dtype), [kept(4), kept(4)], [kept(5), kept(5), kept(5)]


def _vjepa_masks(dtype: torch.dtype) -> tuple:
    kept = test_jepa.kept
    return test_jepa.images(dtype=dtype, frames=4), [kept(4, 32), kept(7, 32)], [kept(8, 32), kept(11, 32)]


def _split(dtype: torch.dtype) -> tuple:
    return torch.randn(3, 3, 32, 32, dtype=dtype), *test_lightly.split(keep=9)


def _every(count: int, of: int, step: int) -> torch.Tensor:
    """bool [count, of], True = masked: other tokens than the model's own test hides."""
    return torch.arange(of).remainder(step).eq(1).expand(count, -1)


def _shown_videos(model: nn.Module, family: DropIn) -> None:
    family.inputs = lambda dtype: (
        (test_hf_videomae.videos().to(dtype),),
        {"bool_masked_pos": test_hf_videomae.mask(9)},
    )


TIMM = {"query": "attn.qkv", "norm": "norm1", "act": "mlp.act"}
HF5 = {"query": "attention.q_proj", "norm": "layernorm_before", "act": "mlp.activation_fn"}
HF4 = {
    "query": "attention.attention.query",
    "norm": "layernorm_before",
    "act": "intermediate.intermediate_act_fn",
}
SWIN4 = {**HF4, "query": "attention.self.query"}
FIVE = test_hf_vitmae.FIVE
VIT_LAYERS = "vit.layers" if FIVE else "vit.encoder.layer"
OUTSIDE = "the loss is computed outside of the model"
NO_RATIO = "all tokens are given"
CODES = {"norm_pix_loss": "the targets are tokens"}
HIDDEN = {"norm_pix_loss": "no loss"}

PLACES = {
    "mae": Places(
        test_mae.TestMAE,
        "blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=given(mask_ratio=0.4),
        normalise=turned("norm_pix_loss"),
    ),
    "hf_vitmae": Places(
        test_hf_vitmae.TestViTMAE,
        VIT_LAYERS,
        **(HF5 if FIVE else HF4),
        conv="vit.embeddings.patch_embeddings.projection",
        encoder="vit",
        ratio=_hf_ratio,
        normalise=turned("config.norm_pix_loss"),
        checkpoint=_hf_checkpointing,
    ),
    "audiomae": Places(
        test_audiomae.TestAudioMAE,
        "decoder_blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=given(mask_ratio=0.4),
        normalise=turned("norm_pix_loss"),
    ),
    "mae_st": Places(
        test_mae_st.TestMAEST,
        "blocks",
        **{**TIMM, "query": "attn.q"},
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=given(mask_ratio=0.4),
        normalise=turned("norm_pix_loss"),
    ),
    "crossmae": Places(
        test_crossmae.TestCrossMAE,
        "blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=given(mask_ratio=0.4, kept_mask_ratio=0.3),
        normalise=turned("norm_pix_loss"),
    ),
    "crossmae decoder": Places(
        test_crossmae.TestCrossMAE,
        "decoder_blocks",
        **{**TIMM, "query": "cross_attn.q"},
        conv="patch_embed.proj",
        encoder="decoder_blocks",
        ratio=given(mask_ratio=0.6, kept_mask_ratio=0.2),
        normalise=turned("norm_pix_loss"),
    ),
    "hf_videomae": Places(
        test_hf_videomae.TestVideoMAE,
        "videomae.encoder.layer",
        **HF4,
        conv="videomae.embeddings.patch_embeddings.projection",
        encoder="videomae",
        ratio=_shown_videos,
        normalise=turned("config.norm_pix_loss"),
        checkpoint=_hf_checkpointing,
    ),
    "hf_beit": Places(
        test_hf_positions.TestBeitForMaskedImageModeling,
        "beit.layers" if FIVE else "beit.encoder.layer",
        **(HF5 if FIVE else HF4),
        conv="beit.embeddings.patch_embeddings.projection",
        encoder="beit",
        ratio=given(bool_masked_pos=_every(2, 16, 4), labels=torch.arange(8)),
        checkpoint=_hf_checkpointing,
        without=CODES,
    ),
    "hf_dinov3": Places(
        test_hf_positions.TestDinov3,
        "model.layer" if FIVE else "layer",
        "attention.q_proj",
        "norm1",
        "mlp.act_fn",
        conv="embeddings.patch_embeddings",
        encoder="model.layer.0" if FIVE else "layer.0",
        ratio=given(bool_masked_pos=_every(2, 16, 4)),
        checkpoint=_hf_checkpointing,
        without=HIDDEN,
    ),
    "hf_vjepa2": Places(
        test_hf_positions.TestVJepa2,
        "predictor.layer",
        "attention.query",
        "norm1",
        "mlp.activation",
        conv="encoder.embeddings.patch_embeddings.proj",
        encoder="encoder",
        ratio=given(context_mask=[torch.arange(9).expand(2, -1)], target_mask=[torch.arange(20, 32).expand(2, -1)]),
        checkpoint=_hf_checkpointing,
        without=HIDDEN,
    ),
    "hf_swin": Places(
        test_hf_positions.TestSwin,
        "swin.encoder.layers.0.blocks",
        **(HF5 if FIVE else SWIN4),
        conv="swin.embeddings.patch_embeddings.projection",
        encoder="swin",
        ratio=given(bool_masked_pos=_every(2, 64, 4)),
        checkpoint=_hf_checkpointing,
        whole=False,  # windows
        without={"norm_pix_loss": "targets are never normalised"},
    ),
    "videomae": Places(
        test_videomae.TestV1,
        "encoder.blocks",
        **TIMM,
        conv="encoder.patch_embed.proj",
        encoder="encoder",
        ratio=inputs(_video_masks),
        checkpoint=_with_cp,
        called=False,
        without={"norm_pix_loss": OUTSIDE},
    ),
    "videomae v2": Places(
        test_videomae.TestV2,
        "decoder.blocks",
        **TIMM,
        conv="encoder.patch_embed.proj",
        encoder="encoder",
        ratio=inputs(_decoded_video_masks),
        checkpoint=_with_cp,
        called=False,
        whole=False,  # cosine attention
        without={"norm_pix_loss": OUTSIDE},
    ),
    "ijepa": Places(
        test_jepa.TestImages,
        "encoder.blocks",
        **TIMM,
        conv="encoder.patch_embed.proj",
        encoder="encoder",
        ratio=inputs(_jepa_masks),
        without={"norm_pix_loss": OUTSIDE},
    ),
    "vjepa": Places(
        test_jepa.TestVideos,
        "predictor.backbone.predictor_blocks",
        **TIMM,
        conv="encoder.backbone.patch_embed.proj",
        encoder="encoder",
        ratio=inputs(_vjepa_masks),
        without={"norm_pix_loss": OUTSIDE},
    ),
    "timm": Places(
        test_timm_vit.TestPatchDropout,
        "blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=_patch_drop,
        checkpoint=turned("grad_checkpointing"),
        without={"norm_pix_loss": OUTSIDE},
    ),
    "timm rope": Places(
        test_eva.TestEva,
        "blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        ratio=_patches_drop,
        called=False,
        without=HIDDEN,
    ),
    "timm relative positions": Places(
        test_eva.TestRelPos,
        "blocks",
        **TIMM,
        conv="patch_embed.proj",
        encoder="blocks",
        without={**HIDDEN, "mask ratio": NO_RATIO},
    ),
    "lightly": Places(
        test_lightly.TestLightly,
        "encoder.vit.blocks",
        **TIMM,
        conv="encoder.vit.patch_embed.proj",
        encoder="encoder",
        ratio=inputs(_split),
        without={"norm_pix_loss": OUTSIDE},
    ),
    "spark convnext": Places(
        test_spark.TestConvNeXt,
        "sparse_encoder.sp_cnn.stages.2",
        query="pwconv1",
        norm="norm",
        act="act",
        conv="sparse_encoder.sp_cnn.downsample_layers.0.0",
        encoder="sparse_encoder",
        ratio=_kept_of_spark,
        whole=False,
        without={"norm_pix_loss": "targets are always normalised", "block tied": "one block a stage"},
    ),
    "spark resnet": Places(
        test_spark.TestResNet,
        "sparse_encoder.sp_cnn.layer1",
        query="conv1",
        norm="bn1",
        act="act",
        conv="sparse_encoder.sp_cnn.conv1",
        encoder="sparse_encoder",
        ratio=_kept_of_spark,
        whole=False,
        without={
            "norm_pix_loss": "targets are always normalised",
            "block deleted": "the first of a stage widens it",
            "block tied": "one block a stage",
            "adapter": "no linear layers",
            "parametrised": "the public layers say super(type(self), self)",
            "convolution without bias": "it has none",
        },
    ),
    "fcmae": Places(
        test_fcmae.TestFCMAE,
        "encoder.stages.2",
        query="pwconv1.linear",
        norm="norm.ln",
        act="act",
        conv="encoder.downsample_layers.0.0",
        encoder="encoder",
        ratio=given(mask_ratio=0.4),
        normalise=turned("norm_pix_loss"),
        whole=False,
        without={"gradient checkpointing": "sparse tensors are no inputs of a checkpoint"},
    ),
    "blocks": Places(
        Blocks,
        "",
        **TIMM,
        conv="",
        encoder="0",
        without={
            "norm_pix_loss": "no loss",
            "mask ratio": NO_RATIO,
            "convolution without bias": "no convolution",
        },
    ),
}
