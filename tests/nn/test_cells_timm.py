"""timm's networks on `Cells`: those that run equal themselves, those that do not are refused by name, and nothing else.

One small network (or a few, where they differ) of every file of timm that has any: gemma4_vit and deepseek_vit
have none. Needs timm, not torchvision.
"""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

import maefast
from maefast import Cells, masking
from maefast.nn import UnknownSparseOp
from maefast.ops import CellMask


class Hollow(types.ModuleType):
    """timm imports torchvision for data and for one class of norm: whatever is asked for is a class."""

    __path__: tuple = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        modes = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")  # keys of a table of timm's
        kind = type(name, (nn.Module,), {mode.upper(): mode for mode in modes})
        setattr(self, name, kind)
        return kind


def import_timm():
    """timm, also where torchvision is not there or does not go with this torch."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    try:
        import torchvision  # noqa: F401

        hollow = {}
    except Exception:  # built for another torch, it raises whatever it meets
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        parts = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets")
        hollow = {name: Hollow(name) for name in ("torchvision", *(f"torchvision.{part}" for part in parts))}
    for name, module in hollow.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(hollow[parent], child, module)
    sys.modules.update(hollow)
    try:
        return importlib.import_module("timm")
    finally:
        for name in hollow:  # nobody else shall find it
            del sys.modules[name]


timm = import_timm()

# A side of 64 pixels, or what stands behind the colon.
RUNS = """
    test_byobnet mobileone_s0 eca_resnext26ts convmixer_768_32:56 test_convnext convnextv2_atto cs3darknet_focus_s
    cspnext_tiny densenet121 dla46x_c dpn48b test_efficientnet test_efficientnet_gn mixnet_s tf_efficientnet_b0
    fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 hardcorenas_b hgnetv2_b0 inception_next_atto lcnetv2_small
    test_mambaout poolformerv2_s12 lcnet_035 mobilenetv4_conv_small_035 tf_mobilenetv3_small_minimal_100 test_nfnet
    rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnet18d seresnet18 resnetv2_18
    resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 skresnet18 starnet_s050 vgg11 ese_vovnet19b_slim_dw
    xception41p
"""
# The class of the module that is named.
REFUSED = {
    "resnetblur18": "BlurPool2d",
    "ghostnetv2_100": "GhostModuleV2",
    "test_efficientnet_evos": "EvoNorm2dS0",
    "gcresnext26ts": "GlobalContext",
    "efficientnet_cc_b0_4e": "CondConv2d",
    "caformer_s18": "MetaFormerStage",
    "fastvit_sa12": "Attention",
    "mobilenetv4_hybrid_medium_075": "MultiQueryAttention2d",
    "densenetblur121d": "BlurPool2d",
    "halonet_h1:256": "HaloAttn",
    "csatv2": "AdaptiveAvgPool2d",
    "hrnet_w18_small": "Upsample",
    "inception_resnet_v2:128": "Conv2d",
    "inception_v3:128": "Conv2d",
    "inception_v4:128": "Conv2d",
    "nasnetalarge": "Conv2d",
    "pnasnet5large": "Conv2d",
    "tresnet_m": "SpaceToDepth",
    "legacy_xception": "Conv2d",
    # attention
    "beit_base_patch16_224": "PatchEmbed",
    "cait_xxs24_224": "PatchEmbed",
    "coat_tiny": "PatchEmbed",
    "convit_tiny": "PatchEmbed",
    "cpubone_nano": "Upsample",
    "crossvit_tiny_240": "PatchEmbed",
    "davit_tiny": "SpatialBlock",
    "deit_tiny_patch16_224": "PatchEmbed",
    "edgenext_xx_small": "SplitTransposeBlock",
    "efficientformer_l1:224": "Flat",
    "efficientformerv2_s0": "Upsample",
    "efficientvim_m1": "HSMSSD",
    "efficientvit_b0": "LiteMLA",
    "efficientvit_m0": "CascadedGroupAttention",
    "vit_tiny_patch16_dinov3_qkvb": "Eva",
    "gcvit_xxtiny": "GlobalContextVitBlock",
    "hiera_tiny_224": "PatchEmbed",
    "sam2_hiera_tiny": "MultiScaleBlock",
    "iformer_t": "SHMA",
    "levit_128s": "BatchNorm1d",
    "lowformer_b0": "ConvAttention",
    "test_coatnet": "Attention2d",
    "gmlp_ti16_224": "PatchEmbed",
    "mobilenetv5_base": "MultiQueryAttention2d",
    "mobilevit_xxs": "MobileVitBlock",
    "mvitv2_tiny": "PatchEmbed",
    "naflexvit_base_patch16_parfac_gap": "NaFlexEmbeds",
    "nest_tiny": "NestLevel",
    "nextvit_small": "AvgPool1d",
    "pit_ti_224": "Conv2d",
    "pvt_v2_b0": "PyramidVisionTransformerStage",
    "qwen3_vit_88m": "Qwen3VitEncoder",
    "sequencer2d_s": "LSTM",
    "shvit_s1": "SHSA",
    "swiftformer_xs": "EfficientAdditiveAttention",
    "swin_tiny_patch4_window7_224": "SwinTransformerBlock",
    "swinv2_tiny_window16_256": "SwinTransformerV2Block",
    "swinv2_cr_tiny_224": "SwinTransformerV2CrBlock",
    "tiny_vit_5m_224": "TinyVitBlock",
    "tnt_s_legacy_patch16_224": "Unfold",
    "twins_svt_small": "PatchEmbed",
    "visformer_tiny": "Attention",
    "test_vit": "VisionTransformer",
    "vit_tiny_r_s16_p8_224": "HybridEmbed",
    "test_vit_relpos": "PatchEmbed",
    "samvit_base_patch16_224": "Block",
    "vitamin_small_224": "HybridEmbed",
    "volo_d1_224": "Unfold",
    "xcit_nano_12_p8_224": "ConvPatchEmbed",
}
SIDE = 64


def build(name: str) -> tuple[nn.Module, int]:
    """The network without head and without draws, in float64, and the side of its images."""
    name, _, side = name.partition(":")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    side = int(side or SIDE)
    try:
        model = timm.create_model(name, num_classes=0, img_size=side)
    except TypeError:  # a network for images of any size
        model = timm.create_model(name, num_classes=0)
    for module in model.modules():
        for rate in {"p", "drop_prob", "drop_rate"} & vars(module).keys():
            setattr(module, rate, 0.0)
    if hasattr(model, "pre_logits"):
        model.pre_logits = nn.Identity()  # of VGG: 100 million parameters that features do not pass
    return model.double(), side


def features(model: nn.Module, x):
    """[B, C, H, W] or [B, H, W, C], as the network has it."""
    out = model.forward_features(x)
    if not isinstance(out, Cells):
        return out
    dense = out.dense()
    return dense.permute(0, 2, 3, 1) if out.channels_last else dense


@pytest.mark.parametrize("name", RUNS.split())
def test_all_cells_active_is_the_dense_network(name):
    dense, side = build(name)
    sparse = maefast.sparsify(copy.deepcopy(dense))
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    everything = CellMask.all_visible(2, (2, 2))
    dense.eval(), sparse.eval()
    with torch.no_grad():
        want = features(dense, images)
        torch.testing.assert_close(features(sparse, Cells.pack(images, everything)), want, **near(want))
        half = masking.cells(2, (2, 2), 0.5)
        seen = half.upsampled_mask((side, side))
        one, other = (sparse.forward_features(Cells.pack(x, half)) for x in (images, images * seen + 7.0 * ~seen))
        assert torch.equal(one.rows, other.rows)

    dense.train(), sparse.train()
    want, got = features(dense, images), features(sparse, Cells.pack(images, everything))
    torch.testing.assert_close(got, want, **near(want))
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    largest = max(p.grad.abs().max().item() for p in dense.parameters() if p.grad is not None)
    for (key, p), q in zip(sparse.named_parameters(), dense.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8 * largest, msg=key)
    for (key, p), q in zip(sparse.named_buffers(), dense.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8, msg=key)


def near(want: torch.Tensor) -> dict:
    return {"rtol": 1e-7, "atol": 1e-9 * want.abs().max().item()}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name):
    model, side = build(name)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    with pytest.raises(UnknownSparseOp, match=rf"\({REFUSED[name]}\): "), torch.no_grad():
        maefast.sparsify(model.eval()).forward_features(Cells.pack(images, CellMask.all_visible(2, (2, 2))))
