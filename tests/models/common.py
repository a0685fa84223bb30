"""What the model tests share: small models, their plain twins, and the comparison of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maefast import models
from maefast.bench.peers.plain_mae import PlainMAE
from maefast.models import MaskedAutoencoderViT
from maefast.nn import Encoder, PatchEmbed, position_table
from maefast.ops import _dispatch

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 48,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}
BATCH = 3


def backends() -> list:
    """The plain reference, and what is chosen on this CPU: C++ kernels, less those (attention) without float64."""
    why = _dispatch.unavailable("token_mask", "cpu", "cpu")
    return ["reference", pytest.param("auto", marks=pytest.mark.skipif(why is not None, reason=str(why)))]


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> MaskedAutoencoderViT:
    torch.manual_seed(seed)
    model = models.create("mae", **{**SMALL, **overrides})
    for parameter in model.parameters():  # zero biases and unit norms would hide what they do
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def plain_twin(model: MaskedAutoencoderViT) -> PlainMAE:
    """The plain eager MAE with the same weights."""
    twin = PlainMAE.from_config(model.config).to(model.cls_token)
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def inputs(model: nn.Module, batch: int = BATCH, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images in the model's dtype and float32 noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, model.in_chans, *model.img_size, generator=generator)
    return images.to(model.cls_token), torch.rand(batch, model.num_patches, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; every trainable parameter must have one."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """(largest ‖got - want‖ / ‖want‖, its name) over the same names.

    A gradient that is zero in exact arithmetic (a key's bias shifts all scores of a row alike) is only rounding, so
    norms below 1e-8 of the largest one count as that.
    """
    assert got.keys() == want.keys()
    floor = 1e-8 * max(value.norm() for value in want.values())
    errors = [(((got[k] - want[k]).norm() / want[k].norm().clamp(min=floor)).item(), k) for k in want]
    assert all(error == error for error, _ in errors), "NaN in a gradient"
    return max(errors)


def encoder_of(width: int, depth: int, heads: int) -> Encoder:
    """Of images of 32 x 32 in patches of 8 x 8."""
    return Encoder(
        PatchEmbed(8, 3, width), position_table("sincos", width, (4, 4)), width, depth, heads, grid_size=(4, 4)
    )
