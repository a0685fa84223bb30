from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast.bench.peers.plain import blocks, linear, norm, parameters
from maefast.bench.peers.recipes.dmae import batch, encoder_input
from maefast.recipe import View

__all__ = ["batch", "decoder_states", "reference"]

ARGUMENTS = {"teacher": "random"}


def reference(recipe: nn.Module, view: View) -> dict[str, Tensor]:
    """G2SD's generic stage (Huang et al., 2023); what the teacher gives is there."""
    p, plan = parameters(recipe), view.plan
    state = decoder_states(p, "student.", recipe.student, view.parts, plan.ids_keep, plan.ids_restore)[-1]
    if recipe.rows == "masked":
        state = state[:, 1:].gather(1, plan.ids_masked[..., None].expand(-1, -1, state.shape[2]))
    pred = linear(F.gelu(linear(state, p, "head.fc1")), p, "head.fc2")
    target = F.layer_norm(view.target, view.target.shape[-1:], eps=1e-6)
    return {"features": F.smooth_l1_loss(pred, target, beta=recipe.beta)}


def decoder_states(
    p: dict[str, Tensor], at: str, model: nn.Module, images: Tensor, ids_keep: Tensor, ids_restore: Tensor
) -> list[Tensor]:
    """MAE: the outputs of the decoder's blocks, [B, 1 + N, D] in place."""
    x = encoder_input(p, at, images, model.patch_size)
    x = torch.cat([x[:, :1], x[:, 1:].gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))], 1)
    x = norm(blocks(x, p, f"{at}blocks.", model.config["num_heads"])[-1], p, f"{at}norm")
    x = linear(x, p, f"{at}decoder_embed")
    full = torch.cat([x[:, 1:], p[f"{at}mask_token"].expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)], 1)
    full = full.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
    x = torch.cat([x[:, :1], full], 1) + p[f"{at}decoder_pos_embed"]
    return blocks(x, p, f"{at}decoder_blocks.", model.config["decoder_num_heads"])
