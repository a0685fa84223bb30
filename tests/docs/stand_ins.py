"""What the blocks of a page take for granted, as toys. The first function of a page gives the names that are there
before its first Python block, the second those that join them before the second one, and so on. `small` makes published
models toys while blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import maefast
from maefast import models

TINY = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@contextmanager
def small(monkeypatch: Any) -> Iterator[None]:
    """`mae_base` and the sizes of recipes are tiny, under the same names and with all their arguments."""
    for name in ("mae_base", "mae_small"):
        cls, preset = models._PRESETS[name]
        monkeypatch.setitem(models._PRESETS, name, (cls, {**preset, **TINY}))
    real = maefast.recipes.arguments_of

    def tiny(spec: Any, size: str | None = None) -> dict[str, Any]:
        toys = {"point_mae": {"depth": 1, "decoder_depth": 1}, "videomae": {"depth": 1, "decoder_depth": 1},
                "mfm": {"img_size": 64}}  # fmt: skip
        return {**real(spec, size), **toys.get(spec.name, {})}

    monkeypatch.setattr(maefast.recipes, "arguments_of", tiny)
    yield


def vitmae() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
             "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
             "decoder_intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ResNetModel(ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], embedding_size=8))

        def forward(self, images: Any) -> Any:
            return self.net(images).last_hidden_state

    return Maps()


def plain() -> dict[str, Any]:
    return {"maefast": maefast, "torch": torch}


def weights_of_mae_base() -> dict[str, Any]:
    save_file(models.create("mae_base").state_dict(), "model.safetensors")
    return plain()


def readme() -> dict[str, Any]:
    images, dim = torch.randn(2, 3, 224, 224), 16
    return {
        "maefast": maefast, "torch": torch, "model": vitmae(), "images": images, "batch": 2, "num_patches": 196,
        "weight": torch.randn(dim, 3, 16, 16), "bias": torch.zeros(dim), "pos": torch.randn(196, dim),
        "decoder_pos": torch.randn(196, dim), "mask_token": torch.zeros(dim), "encode": lambda x: x,
        "decode": nn.Linear(dim, 768), "points": torch.randn(2, 1024, 3), "queries": torch.randn(2, 8, 3),
        "predicted": torch.randn(4, 8, 3), "groups": torch.randn(4, 8, 3), "resnet50": resnet(),
    }  # fmt: skip


def checkpoint() -> dict[str, Any]:
    """A file in the working directory."""
    model = models.create("mae_tiny", img_size=32, patch_size=8, **TINY)
    torch.save({"model": model.state_dict()}, "weights.pth")
    return {"models": models, "model": model, "path": "weights.pth"}


def videomae_and_jepa() -> dict[str, Any]:
    mask = torch.tensor([[False, False, True, True]])
    return {
        "videos": torch.randn(1, 3, 2, 32, 32), "mask": mask, "masks": [torch.tensor([[0, 1], [2, 3]])],
        "model": lambda videos, mask: torch.randn(1, 2, 1536), "images": torch.randn(2, 3, 32, 32),
        "target_encoder": lambda images: torch.randn(2, 4, 8),
    }  # fmt: skip


def graphs() -> dict[str, Any]:
    model = models.create("mae_tiny", img_size=32, patch_size=8, **TINY)
    return {"maefast": maefast, "torch": torch, "model": model, "loader": [torch.randn(2, 3, 32, 32)] * 2,
            "schedule": SimpleNamespace(step=lambda: None)}  # fmt: skip


CHANNELS = (64, 128, 320, 512)


def mfm() -> dict[str, Any]:
    from maefast.data.domains import DomainBatch
    from maefast.nn.segmentation import ConvPyramid, PyramidHead

    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    return {
        "maefast": maefast, "torch": torch, "DomainBatch": DomainBatch, "images": pixels, "target": pixels,
        "labels": torch.randint(0, 19, (1, 64, 64)), "mine": ConvPyramid(CHANNELS, (4, 8, 16, 32)),
        "head": PyramidHead(CHANNELS, 19, 8),
    }  # fmt: skip


def trainer_of_domains() -> dict[str, Any]:
    return {
        "encoder": lambda images: [torch.randn(1, c, 16 * n, 16 * n) for c, n in zip(CHANNELS, (8, 4, 2, 1))],
        "decoder": lambda maps: maps[0][:, :19], "pseudo_labels": torch.randint(0, 19, (1, 128, 128)),
        "weight": torch.ones(1, 1, 1),
    }  # fmt: skip


def run_with_classes() -> dict[str, Any]:
    """A run of one step in out/, and photos/ in two folders."""
    import numpy as np
    from PIL import Image

    from maefast.train import PretrainConfig, pretrain

    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        Path("photos", name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(f"photos/{name}/{number}.png")
    pretrain(
        PretrainConfig(data="photos", steps=1, batch_size=4, model="mae_tiny", img_size=32, patch_size=8, workers=0,
                       model_args=TINY, device="cpu", tensorboard=False, picture_rows=0, output_dir="out")
    )  # fmt: skip
    return {}


def graphmae() -> dict[str, Any]:
    recipe = maefast.recipes.create("graphmae", features=4, embed_dim=16, num_heads=2)
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    return {"recipe": recipe, "x": torch.randn(3, 4), "x2": torch.randn(3, 4), "edge_index": edges,
            "edge_index2": edges}  # fmt: skip


def optimizer() -> dict[str, Any]:
    layer = nn.Linear(8, 8)
    return {"maefast": maefast, "torch": torch, "model": nn.Sequential(layer), "layer": layer}


def profile() -> dict[str, Any]:
    model = vitmae()
    return {"maefast": maefast, "model": model, "optimizer": torch.optim.AdamW(model.parameters()), "device": "cpu",
            "loader": [torch.randn(2, 3, 32, 32)] * 40}  # fmt: skip


NAMES: dict[str, tuple[Callable[[], dict[str, Any]], ...]] = {
    "README.md": (readme,),
    "docs/checkpoints.md": (checkpoint,),
    "docs/convnets.md": (readme,),
    "docs/drop-in.md": (readme, dict, videomae_and_jepa),
    "docs/graphs.md": (graphs,),
    "docs/optimizer.md": (optimizer,),
    "docs/probe.md": (run_with_classes,),
    "docs/profile.md": (profile,),
    **{f"docs/questions/{name}.md": (plain,) for name in ("non-square-images", "channels")},
    "docs/questions/fine-tuning.md": (weights_of_mae_base,),
    "docs/recipes/graphmae.md": (graphmae,),
    "docs/recipes/mfm.md": (mfm, trainer_of_domains),
    "examples/README.md": (lambda: {"maefast": maefast, "model": vitmae()},),
}
