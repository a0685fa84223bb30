"""Masked convnets for `dropin_models`: how to build them, what a step is given, and its loss."""

from __future__ import annotations

from torch import nn

from maefast.bench.peers.dropin_family import Family, images


def public_spark(sizes: dict) -> nn.Module:
    from maefast.bench.peers.checkouts import old_timm

    old_timm()
    from decoder import LightDecoder
    from models import build_sparse_encoder, pretrain_default_model_kwargs
    from spark import SparK

    name = sizes["encoder"]
    pretrain_default_model_kwargs[name]["drop_path_rate"] = sizes["drop_path"]  # 0 given to the function means its own
    encoder = build_sparse_encoder(name, input_size=sizes["img_size"])
    decoder = LightDecoder(encoder.downsample_raito, width=sizes["decoder_width"], sbn=False)
    return SparK(encoder, decoder, mask_ratio=sizes["mask_ratio"], densify_norm="bn" if "resnet" in name else "ln")


def own_spark(sizes: dict) -> nn.Module:
    from maefast.bench.peers.public.spark import SparK, converted
    from maefast.models.resnet import DEPTHS, ResNet

    cnn = ResNet(DEPTHS[sizes["encoder"]], drop_path=sizes["drop_path"])
    return SparK(converted(cnn), sizes["img_size"], sizes["decoder_width"])


def own_fcmae(sizes: dict) -> nn.Module:
    """Dense layers times the mask under the public names: what can run where MinkowskiEngine is not installed."""
    from maefast.models.public_fcmae import PublicFCMAE

    return PublicFCMAE(widths=sizes["dims"], **{key: value for key, value in sizes.items() if key != "dims"})


def public_fcmae(sizes: dict) -> nn.Module:
    from models.fcmae import FCMAE

    return FCMAE(**sizes)


SPARK = {"encoder": "resnet50", "mask_ratio": 0.6, "drop_path": 0.05}
FCMAE = {"mask_ratio": 0.6, "norm_pix_loss": True}
FAMILIES = {
    "spark": Family(
        "SparK ResNet-50",
        {
            "base": {**SPARK, "img_size": 224, "decoder_width": 768, "batch": 16},
            "toy": {**SPARK, "img_size": 96, "decoder_width": 64, "batch": 4},
        },
        public_spark,
        own_spark,
        images,
        lambda model, pixels: model(pixels),
        needs="keyu-tian/SparK (its folder pretrain), and of timm where that is not installed",
        convnet=True,
    ),
    "fcmae": Family(
        "FCMAE ConvNeXt V2-T",
        {
            "base": {
                **FCMAE,
                "img_size": 224,
                "depths": [3, 3, 9, 3],
                "dims": [96, 192, 384, 768],
                "decoder_depth": 1,
                "decoder_embed_dim": 512,
                "batch": 16,
            },
            "toy": {
                **FCMAE,
                "img_size": 96,
                "depths": [1, 1, 1, 1],
                "dims": [8, 16, 24, 32],
                "decoder_depth": 1,
                "decoder_embed_dim": 16,
                "batch": 2,
            },
        },
        public_fcmae,
        own_fcmae,
        images,
        lambda model, pixels: model(pixels)[0],
        needs="facebookresearch/ConvNeXt-V2, of timm where that is not installed, and MinkowskiEngine",
        convnet=True,
    ),
}
