"""Arguments that recipes share: sizes of transformers, and ratios of masks."""

from __future__ import annotations

from maefast import masking

ENCODERS = {
    name: dict(zip(("embed_dim", "depth", "num_heads"), sizes))
    for name, sizes in {
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
        "huge": (1280, 32, 16),
    }.items()
}


def both(width: int, depth: int, heads: int, decoder_width: int, decoder_depth: int, decoder_heads: int) -> dict:
    """Of an encoder and its decoder."""
    return {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "decoder_embed_dim": decoder_width,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_heads,
    }


def check_visible(name: str, ratio: float, tokens: int, rule: str = "floor") -> None:
    """Raise ValueError where a mask ratio leaves nothing to see of so many tokens, for losses that take its mean."""
    if not masking.keep_count(tokens, ratio, rule):
        raise ValueError(f"{name} {ratio} leaves 0 of {tokens} tokens visible")
