"""The transformer encoder of a masked autoencoder: visible tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Block, Packing
from maefast.nn.init import init_tokens_, init_weights_
from maefast.nn.layers import LayerNorm
from maefast.nn.positions import sincos_2d
from maefast.ops import TokenMask


def position_table(positions: str, width: int, grid: tuple[int, int], prefix: int = 1) -> nn.Parameter:
    """[1, prefix + N, width] for the N cells of `grid` (rows, columns), the prefix tokens' rows first. `positions`:
    "sincos", frozen (those rows zero), or "learned"; ValueError for another."""
    if positions == "sincos":
        return nn.Parameter(sincos_2d(width, grid, prefix=prefix)[None], requires_grad=False)
    if positions == "learned":
        table = nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], width))
        init_tokens_(table)
        return table
    raise ValueError(f"positions must be 'sincos' or 'learned', got {positions!r}")


def run_blocks(
    blocks: Iterable[Block],
    x: Tensor,
    packing: Packing | None = None,
    recompute: bool = False,
    *,
    each: Tensor | None = None,
    taps: dict[int, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x, [B, N, D] or by `packing` [T, D], through all blocks, as a pending sum (x, delta); see `maefast.nn.block`.

    With `recompute`, blocks keep their input alone for the backward. `each`, in the shape of x, is added to the input
    of every block (positions, as Point-MAE does). The outputs of the blocks whose indices are keys of `taps` are
    written there.
    """
    delta = None
    for index, block in enumerate(blocks):
        if each is not None:
            delta = each if delta is None else delta + each
        pending = not block._forward_hooks  # a hook shall see the block's whole output
        x = block(x, packing, delta, pending, keep="nothing" if recompute else None)
        x, delta = x if pending else (x, None)
        if taps is not None and index in taps:
            x, delta = x if delta is None else x + delta, None
            taps[index] = x
    return x, delta


def run_norm(norm: LayerNorm, x: Tensor, delta: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """norm(x + delta), in `dtype` (None: as `add_norm` has it)."""
    return norm(x, dtype=dtype) if delta is None else norm(x, delta, dtype)[1]


def run_encoder(
    parts: Any,
    plan: TokenMask | None,
    *,
    patch_embed: nn.Module,
    cls_token: Tensor | None,
    pos_embed: Tensor | nn.Module | None,
    blocks: nn.ModuleList,
    norm: LayerNorm,
    recompute: bool = False,
    features: bool = False,
    taps: dict[int, Tensor | None] | None = None,
) -> Tensor:
    """Latents of the prefix tokens and the visible tokens: [B, P + keep, D], or packed [B*P + T, D] for a ragged plan.

    Under autocast they come in its dtype, for the matrix product that follows; as `features`, in that of the residual
    stream. `taps`, `recompute`: see `run_blocks`.

    Args:
        parts, plan: what `patch_embed` takes, which embeds the visible tokens (plan None: all).
        cls_token: [..., P, D], the P prefix tokens, or None.
        pos_embed: a table [1, P + N, D], a module `parts -> [B, N, D]`, or None.
    """
    x, packing, each = _embed(parts, plan, patch_embed, cls_token, pos_embed)
    x, delta = run_blocks(blocks, x, packing, recompute, each=each, taps=taps)
    return run_norm(norm, x, delta, x.dtype if features else None)


def _embed(parts, plan, patch_embed, cls_token, pos_embed) -> tuple[Tensor, Packing | None, Tensor | None]:
    """What the first block takes: tokens, where they start, and what is added to the input of each block."""
    count = 0 if cls_token is None else cls_token.shape[-2]
    packing = Packing.of(plan, prefix=count) if plan is not None and plan.keep is None else None
    if isinstance(pos_embed, nn.Module):
        if count:
            raise ValueError("positions that are computed from the parts go without prefix tokens")
        each = pos_embed(parts)
        return patch_embed(parts, plan), packing, each if plan is None else ops.gather_tokens(each, plan)
    prefix, pos = cls_token, pos_embed
    if count and pos is not None:
        lead, pos = pos.split([count, pos.shape[-2] - count], -2)
        prefix = cls_token + lead
    return patch_embed(parts, plan, pos=pos, prefix=prefix), packing, None


def encoder_states(
    parts: Any,
    plan: TokenMask | None,
    at: Sequence[int],
    *,
    patch_embed: nn.Module,
    cls_token: Tensor | None,
    pos_embed: Tensor | nn.Module | None,
    blocks: nn.ModuleList,
) -> list[Tensor]:
    """Outputs of the blocks `at` (from 0), before any final norm, as `run_encoder` lays tokens out. Blocks behind the
    last of them are not run. The other arguments are those of `run_encoder`. ValueError: `at` names no block."""
    if not at or not all(0 <= index < len(blocks) for index in at):
        raise ValueError(f"at must name some of the {len(blocks)} blocks, from 0, got {list(at)}")
    x, packing, each = _embed(parts, plan, patch_embed, cls_token, pos_embed)
    taps = dict.fromkeys(at)
    run_blocks(blocks[: max(at) + 1], x, packing, each=each, taps=taps)
    return [taps[index] for index in at]


def encode_together(
    encoders: Sequence[Encoder], parts: Sequence[Any], plans: Sequence[TokenMask], blocks: nn.ModuleList
) -> list[Tensor]:
    """Tokens that several encoders make, through the same `blocks` and each encoder's own norm.

    All sequences, of whatever lengths, are one packed batch. `parts` and `plans`: what each encoder is called with.
    Returns what each encoder would, had it these blocks. ValueError: an encoder adds positions in every block.
    """
    made = [
        _embed(some, plan, e.patch_embed, e.cls_token, e.pos_embed) for e, some, plan in zip(encoders, parts, plans)
    ]
    starts, longest, total = [], 0, 0
    for x, packing, each in made:
        if each is not None:
            raise ValueError("positions for every block do not go with other encoders")
        if packing is None:
            packing = Packing.even(*x.shape[:2], x.device)
        starts.append(packing.cu_seqlens[bool(starts) :] + total)  # one begins where the last one ends
        longest, total = max(longest, packing.max_seqlen), total + x.numel() // x.shape[-1]
    packed = torch.cat([x.reshape(-1, x.shape[-1]) for x, _, _ in made])
    x, delta = run_blocks(blocks, packed, Packing(torch.cat(starts), longest))
    sizes = [x.numel() // x.shape[-1] for x, _, _ in made]
    deltas = [None] * len(sizes) if delta is None else delta.split(sizes)
    ends = [run_norm(e.norm, *both, x.dtype) for e, *both in zip(encoders, x.split(sizes), deltas)]
    return [end.view(before.shape) for end, (before, _, _) in zip(ends, made)]


def pool_visible(latent: Tensor, plan: TokenMask, prefix: int = 0) -> Tensor:
    """The mean of the visible tokens of each sample, [B, D], of latents as an encoder lays them out, [B, prefix + keep,
    D] or packed [B*prefix + T, D] by `plan`, without the prefix tokens. A sample that shows none has zeros."""
    if latent.ndim == 3:
        return latent[:, prefix:].mean(1)
    sample = torch.div(plan.visible.long(), plan.num_tokens, rounding_mode="floor")
    rows = latent[torch.arange(plan.total_visible, device=plan.device) + prefix * (sample + 1)]
    # A product, not a sum by index, which adds in no fixed order on a GPU.
    mine = (sample == torch.arange(plan.batch, device=plan.device)[:, None]).to(rows.dtype)
    return mine @ rows / mine.sum(1, keepdim=True).clamp_min(1)


class Encoder(nn.Module):
    """A transformer that computes visible tokens only (He et al., 2021). Parameter names of timm's ViT.

    Args:
        patch_embed: makes tokens of the visible parts, ``patch_embed(parts, plan, pos=, prefix=)``, as `PatchEmbed`.
        positions: [P + N, D], see `position_table` (a leading 1 is allowed); as a tensor that is no parameter, fixed
            and left out of the state_dict. Or a module, parts -> [B, N, D], whose result is added to the input of
            every block; without prefix tokens then.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer. prefix: P, tokens that are learned: 1 is a class
            token. norm_eps: of every LayerNorm.
        grid_size: (rows, columns) of the positions, so that weights of images of another size can be made to fit.
        block: further arguments of `Block`; `drop_path` rises linearly over the depth to the value given.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        positions: Tensor | nn.Module,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        prefix: int = 1,
        norm_eps: float = 1e-6,
        grid_size: tuple[int, int] | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        self.patch_embed, self.grid_size = patch_embed, grid_size
        self.cls_token = nn.Parameter(torch.empty(1, prefix, embed_dim)) if prefix else None
        set_positions(self, positions)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps, **block)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        if prefix:
            init_tokens_(self.cls_token)
        init_weights_(self.blocks)

    def forward(
        self,
        parts: Any,
        plan: TokenMask | None = None,
        taps: dict[int, Tensor | None] | None = None,
        features: bool = True,
    ) -> Tensor:
        """Parts, such as images [B, C, H, W], -> [B, P + keep, D] (packed [B*P + T, D] for a ragged plan); all tokens
        without a plan. `taps`, `features`: see `run_encoder`."""
        return run_encoder(parts, plan, **self._parts(), norm=self.norm, features=features, taps=taps)

    def states(self, parts: Any, plan: TokenMask | None = None, at: Sequence[int] = (-1,)) -> list[Tensor]:
        """Outputs of the blocks `at`, see `encoder_states`; negative numbers count from the last."""
        return encoder_states(parts, plan, [i % len(self.blocks) for i in at], **self._parts())

    def tapped(self, parts: Any, plan: TokenMask | None, at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What `forward` gives, and the outputs of the blocks `at` (from 0) through the same norm, in this order."""
        taps: dict[int, Tensor | None] = dict.fromkeys(at)
        latent = self(parts, plan, taps=taps)
        return latent, [self.norm(state) for state in taps.values()]

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("patch_embed", "cls_token", "pos_embed", "blocks")}


def set_positions(module: nn.Module, positions: Tensor | nn.Module) -> None:
    """`pos_embed` of a module: a parameter or module as it is, another tensor as a buffer outside of the state_dict."""
    if isinstance(positions, (nn.Parameter, nn.Module)):
        module.pos_embed = positions
    else:
        module.register_buffer("pos_embed", positions, persistent=False)


def make_blocks(
    dim: int, depth: int, num_heads: int, mlp_ratio: float, eps: float, drop_path: float = 0.0, **block: Any
) -> nn.ModuleList:
    """`depth` blocks; `drop_path` is that of the last, 0 that of the first, linear between."""
    rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, eps, drop_path=rate, **block) for rate in rates)
