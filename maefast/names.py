"""Parameter names of public checkpoints and our own: one table for a system, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Names:
    """Pairs (public, ours) of beginnings of names; the longest that fits is replaced, other names stay as they are.

    >>> names = Names(("decoder_blocks.", "decoder.blocks."), ("blocks.", "encoder.blocks."))
    >>> names.public_of("decoder.blocks.0.norm1.weight")
    'decoder_blocks.0.norm1.weight'

    Args:
        unused: beginnings of public names that we have no use for. optional: beginnings of our names that a public file
            may lack.
        pointwise: beginnings of public names below which matrices are those of 1-D convolutions of one point, [out, in,
            1], and ours of linear layers.

    Raises:
        ValueError: two pairs share a beginning, so that the way back would not be known.
    """

    def __init__(
        self,
        *pairs: tuple[str, str],
        pointwise: tuple[str, ...] = (),
        unused: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
    ) -> None:
        self._pointwise, self.unused, self.optional = pointwise, unused, optional
        self._ours, self._public = dict(pairs), {ours: public for public, ours in pairs}
        if not len(self._ours) == len(self._public) == len(pairs):
            raise ValueError("every beginning, public or ours, must stand in one pair only")

    def ours_of(self, name: str) -> str:
        return _replaced(name, self._ours)

    def public_of(self, name: str) -> str:
        return _replaced(name, self._public)

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ValueError: two tensors get the same name."""
        used = {name: t for name, t in tensors.items() if not self.unused or not name.startswith(self.unused)}
        flat = {name: t.squeeze(-1) if self._convolution(name, t, 3) else t for name, t in used.items()}
        return _renamed(flat, self.ours_of)

    def to_public(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ValueError: two tensors get the same name."""
        public = _renamed(tensors, self.public_of)
        return {name: t.unsqueeze(-1) if self._convolution(name, t, 2) else t for name, t in public.items()}

    def _convolution(self, name: str, tensor: Tensor, ndim: int) -> bool:
        return bool(self._pointwise) and name.startswith(self._pointwise) and tensor.ndim == ndim


def _replaced(name: str, table: Mapping[str, str]) -> str:
    found = max((start for start in table if name.startswith(start)), key=len, default="")
    return table.get(found, "") + name[len(found) :]


def _renamed(tensors: Mapping[str, Tensor], new) -> dict[str, Tensor]:
    renamed = {new(name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        clash = sorted(name for name in tensors if new(name) in tensors and new(name) != name)
        raise ValueError(f"two tensors would have the same name: {', '.join(clash)}")
    return renamed


# MAE's decoder, whose names are flat, and those of `maefast.nn.Decoder` as `decoder`.
MAE_DECODER = (
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "decoder.pred."),
)


def clip_blocks(public: str, ours: str, depth: int = 24) -> tuple[tuple[str, str], ...]:
    """Pairs for up to `depth` blocks of CLIP's (Radford et al., 2021) and those of `maefast.nn`, below two beginnings.

    >>> clip_blocks("visual.transformer.resblocks.", "blocks.", 1)[0]
    ('visual.transformer.resblocks.0.attn.in_proj_', 'blocks.0.attn.qkv.')
    """
    parts = (
        ("attn.in_proj_", "attn.qkv."),
        ("attn.out_proj.", "attn.proj."),
        ("ln_1.", "norm1."),
        ("ln_2.", "norm2."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    )
    return tuple((f"{public}{i}.{theirs}", f"{ours}{i}.{mine}") for i in range(depth) for theirs, mine in parts)
