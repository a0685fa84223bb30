"""Sizes of transformers, as arguments of recipes."""

from __future__ import annotations

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
