"""Parameter names of public checkpoints and our own: one table for a system, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Names:
    """Pairs (public, ours) of beginnings of names; the longest that fits is replaced, other names stay as they are.

    >>> names = Names(("decoder_blocks.", "decoder.blocks."), ("blocks.", "encoder.blocks."))
    >>> names.public_of("decoder.blocks.0.norm1.weight")
    'decoder_blocks.0.norm1.weight'

    Raises:
        ValueError: two pairs share a beginning, so that the way back would not be known.
    """

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._ours, self._public = dict(pairs), {ours: public for public, ours in pairs}
        if not len(self._ours) == len(self._public) == len(pairs):
            raise ValueError("every beginning, public or ours, must stand in one pair only")

    def ours_of(self, name: str) -> str:
        return _replaced(name, self._ours)

    def public_of(self, name: str) -> str:
        return _replaced(name, self._public)

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ValueError: two tensors get the same name."""
        return _renamed(tensors, self.ours_of)

    def to_public(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ValueError: two tensors get the same name."""
        return _renamed(tensors, self.public_of)


def _replaced(name: str, table: Mapping[str, str]) -> str:
    found = max((start for start in table if name.startswith(start)), key=len, default="")
    return table.get(found, "") + name[len(found) :]


def _renamed(tensors: Mapping[str, Tensor], new) -> dict[str, Tensor]:
    renamed = {new(name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        clash = sorted(name for name in tensors if new(name) in tensors and new(name) != name)
        raise ValueError(f"two tensors would have the same name: {', '.join(clash)}")
    return renamed
