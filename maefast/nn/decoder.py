"""The light transformer decoder of a masked autoencoder: latents of visible tokens to predictions of masked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Packing
from maefast.nn.encoder import make_blocks, run_blocks, run_norm, set_positions
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import TokenMask
from maefast.ops._checks import one_of
from maefast.ops.restore import masked_rows

PREDICTIONS = ("masked", "full")


def run_decoder(
    latent: Tensor,
    plan: TokenMask,
    *,
    embed: nn.Module,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    blocks: nn.ModuleList,
    norm: LayerNorm,
    pred: nn.Module,
    which: str = "masked",
    recompute: bool = False,
    prefix: int = 1,
    each: Tensor | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """Predictions from the latents of the prefix tokens and the visible tokens of each sample.

    which="masked": in plan order, [B, masked, K] or packed [M, K] for a ragged plan; "full": in place, [B, N, K].

    For masked tokens only, the last block needs the others as keys and values and nothing after it needs them. In
    a uniform plan the sequence is therefore laid out with the masked tokens last, so that all of this is slicing.
    Absent tokens have no row: where that makes samples of different lengths, they are packed.

    `each` [B, N, D]: positions that are added to the input of every block instead of once (no prefix, no packed rows).
    `extra` [B, E, D]: further tokens, of which nothing is predicted, with positions of their own (no prefix, as many
    visible tokens in every sample).
    """
    one_of("pred", which, PREDICTIONS)
    if which == "masked" and plan.total_masked == 0:
        raise ValueError("the plan masks no token, so there is no masked token to predict; use pred='full'")
    tail = which == "masked" and plan.keep is not None and plan.hide is not None
    if plan.total_absent and which == "full":
        raise ValueError("the plan leaves tokens absent, which nobody can predict; use pred='masked'")
    order = "visible_first" if tail or plan.total_absent else "position"
    latent = embed(latent)
    if extra is not None:
        if prefix or each is not None or plan.keep is None:
            raise ValueError("extra tokens go without a prefix, a position for each block and ragged visible tokens")
        latent, prefix = torch.cat([extra, latent], 1), extra.shape[1]
    x = ops.restore_tokens(latent, plan, mask_token, pos=pos_embed, prefix=prefix, order=order)
    if each is not None:
        if prefix or x.ndim == 2:
            raise ValueError("positions for every block go without prefix tokens and without packed rows")
        if order == "visible_first":
            each = torch.cat([ops.gather_tokens(each, plan, which) for which in ("visible", "masked")], 1)
    if which == "full":
        return pred(run_norm(norm, *run_blocks(blocks, x, recompute=recompute, each=each))[:, prefix:])
    if x.ndim == 2:  # samples of different lengths, packed
        x, delta = run_blocks(blocks, x, packing=Packing.of(plan, prefix, masked=True), recompute=recompute)
        rows = masked_rows(plan, prefix)
        return pred(run_norm(norm, x[rows], None if delta is None else delta[rows]))
    x, delta = run_blocks(blocks[:-1], x, recompute=recompute, each=each)
    if each is not None:
        delta = each if delta is None else delta + each
    keep = "nothing" if recompute else None
    if tail:
        x, delta = blocks[-1].forward_tail(x, plan.max_masked, delta, pending=True, keep=keep)
    else:
        x, delta = blocks[-1].forward_masked(x, plan, prefix, delta, pending=True, keep=keep)
    return pred(run_norm(norm, x, delta))


def decoder_states(
    latent: Tensor,
    plan: TokenMask,
    at: Sequence[int],
    *,
    embed: nn.Module,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    blocks: nn.ModuleList,
    prefix: int = 1,
    each: Tensor | None = None,
) -> list[Tensor]:
    """Outputs of the decoder's blocks `at` (from 0), of all tokens in place: [B, P + N, D] each, before any norm.
    Blocks behind the last of them are not run. `each`: see `run_decoder`."""
    if not at or not all(0 <= index < len(blocks) for index in at):
        raise ValueError(f"at must name some of the {len(blocks)} blocks, from 0, got {list(at)}")
    x = ops.restore_tokens(embed(latent), plan, mask_token, pos=pos_embed, prefix=prefix)
    taps = dict.fromkeys(at)
    run_blocks(blocks[: max(at) + 1], x, each=each, taps=taps)
    return [taps[index] for index in at]


class Decoder(nn.Module):
    """MAE's decoder (He et al., 2021): mask tokens at the masked positions, then a few transformer blocks.

    Args:
        latent_dim: width of the encoder. out_dim: K, values predicted for a token.
        positions: [P + N, D] as `Encoder` takes them, with P = `prefix`; or a module, parts -> [B, N, D], whose result
            is added to the input of every block; without prefix tokens then.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer; at least one block.
        prefix: P, how many tokens of the encoder stand before the visible ones. embed_bias: of the linear map from one
            width to the other; None: no such map, the widths being equal. norm_eps: of every LayerNorm.
        block: further arguments of `Block`, see `Encoder`.
    """

    def __init__(
        self,
        latent_dim: int,
        out_dim: int,
        positions: Tensor | nn.Module,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        *,
        prefix: int = 1,
        embed_bias: bool | None = True,
        norm_eps: float = 1e-6,
        **block: Any,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a decoder needs at least one block, got depth {depth}")
        self.prefix = prefix
        if embed_bias is None and latent_dim != embed_dim:
            raise ValueError(f"latents {latent_dim} wide need a linear map to a decoder {embed_dim} wide")
        self.embed = nn.Identity() if embed_bias is None else Linear(latent_dim, embed_dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        set_positions(self, positions)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps, **block)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        self.pred = Linear(embed_dim, out_dim)
        init_tokens_(self.mask_token)
        init_weights_(self)

    def forward(
        self,
        latent: Tensor,
        plan: TokenMask,
        which: str = "masked",
        parts: Any = None,
        again: Tensor | None = None,
    ) -> Tensor:
        """[B, P + keep, latent_dim] -> [B, masked, K] or [B, N, K]; packed for a ragged plan (see `run_decoder`).

        Args:
            parts: what positions are computed from, where they are a module.
            again: int64 [B, E], positions that get a mask token of which nothing is predicted, whatever else is there.
        """
        pos, each = self.pos_embed, None
        if isinstance(pos, nn.Module):
            pos, each = None, pos(parts)
        extra = None
        if again is not None:
            if self.prefix or pos is None:
                raise ValueError("again goes with a table of positions and without prefix tokens")
            extra = self.mask_token + pos.reshape(-1, pos.shape[-1])[again]
        return run_decoder(
            latent,
            plan,
            embed=self.embed,
            mask_token=self.mask_token,
            pos_embed=pos,
            blocks=self.blocks,
            norm=self.norm,
            pred=self.pred,
            which=which,
            prefix=self.prefix,
            each=each,
            extra=extra,
        )
