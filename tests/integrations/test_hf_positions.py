"""Blocks of the installed transformers whose attention knows positions, and their kin, accelerated: BEiT, DINOv3,
V-JEPA 2, SigLIP, Swin."""

import pytest
import torch

from tests.integrations.common import DropIn

transformers = pytest.importorskip("transformers")
FIVE = int(transformers.__version__.split(".")[0]) >= 5
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 3}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8}


def made(name: str, kind: str = "Model", **changes):
    """A small model in float32."""
    if not hasattr(transformers, name + kind):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, name + "Config")(**changes)
    return getattr(transformers, name + kind)(config).train()


def images(dtype=torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(dtype)


class Hidden(DropIn):
    """Of models that return hidden states."""

    def inputs(self, dtype):
        return (images(dtype),), {}

    def loss(self, out):
        """Of pooled tokens too: under torch.compile parameters behind an output that nobody reads have gradients."""
        found = (out.last_hidden_state, out.get("pooler_output"))
        return sum((t - 1).pow(2).mean() for t in found if t is not None)


class TestBeit(Hidden):
    """A table of relative positions in each layer."""

    sweeps = True

    def make(self):
        return made("Beit", **SMALL, use_relative_position_bias=True, use_absolute_position_embeddings=True)


class TestBeitForMaskedImageModeling(DropIn):
    """One table for all layers, which comes as a mask."""

    def make(self):
        options = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 24}
        return made("Beit", "ForMaskedImageModeling", **SMALL, **options)

    def inputs(self, dtype):
        mask = torch.arange(16).remainder(3).eq(0).expand(2, -1)
        return (images(dtype),), {"bool_masked_pos": mask, "labels": torch.arange(int(mask.sum())) % 24}

    def loss(self, out):
        return out.loss


class TestData2Vec(Hidden):
    """The layers of BEiT in transformers 4."""

    sweeps = True

    def make(self):
        return made("Data2VecVision", **SMALL, use_relative_position_bias=True, use_shared_relative_position_bias=True)


class TestDinov3(Hidden):
    sweeps = True

    def make(self):
        return made("DINOv3ViT", **SMALL, num_register_tokens=3)


class TestDinov3Gated(Hidden):
    def make(self):
        options = {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False, "drop_path_rate": 0.3}
        return made("DINOv3ViT", **SMALL, **options, pos_embed_rescale=2.0)


class TestVJepa2(Hidden):
    """Encoder, and predictor with the places of its tokens; frames, rows and columns in different elements."""

    sweeps = True

    def make(self):
        small = {"hidden_size": 32, "pred_hidden_size": 64, "pred_num_attention_heads": 2, "crop_size": 32}
        small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "pred_num_hidden_layers": 2, "mlp_ratio": 2.0}
        return made("VJEPA2", **small, patch_size=8, frames_per_clip=4)

    def inputs(self, dtype):
        videos = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        ids = torch.arange(32).expand(2, -1)
        return (videos.to(dtype),), {"context_mask": [ids[:, :20]], "target_mask": [ids[:, 12:]]}

    def loss(self, out):
        return super().loss(out) + super().loss(out.predictor_output)


class TestSiglip(Hidden):
    sweeps = True

    def make(self):
        return made("SiglipVision", **SMALL)


class TestSwin(DropIn):
    """Two stages; windows are shifted in every second block, and padded in the first stage."""

    sweeps = True

    def make(self):
        return made("Swin", "ForMaskedImageModeling", **SWIN, encoder_stride=8)

    def inputs(self, dtype):
        return (images(dtype),), {"bool_masked_pos": torch.arange(64).remainder(3).eq(0).expand(2, -1)}

    def loss(self, out):
        return out.loss


class TestDonutSwin(Hidden):
    """The layers of Swin in transformers 4."""

    sweeps = True

    def make(self):
        return made("DonutSwin", **SWIN)
