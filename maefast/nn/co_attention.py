"""Two streams, of text and of images, whose layers look at each other (METER, Dou et al., 2022, arXiv:2111.02387)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.bert import PostNormLayer, init_bert_
from maefast.nn.block import Packing
from maefast.nn.layers import Linear

STREAMS = ("language", "vision")


class CoAttention(nn.Module):
    """Layers in pairs: each looks at its own stream, then at the other as it came into the pair. What nobody asks for
    is not computed.

    Texts come packed, [T, D], images as [P, S, D], P of each.

    Args:
        dim: D, of both streams and what enters them. depth: pairs of layers, at least one. num_heads, drop: of the
            layers, see `PostNormLayer`.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, drop: float = 0.0) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"co-attention needs at least one pair of layers, got depth {depth}")
        for stream in STREAMS:
            layers = (PostNormLayer(dim, num_heads, drop=drop, cross=True) for _ in range(depth))
            setattr(self, f"{stream}_proj", Linear(dim, dim))
            setattr(self, f"{stream}_layers", nn.ModuleList(layers))
            setattr(self, f"{stream}_pooler", nn.ModuleDict({"dense": Linear(dim, dim)}))
        self.type_embeddings = nn.Embedding(len(STREAMS), dim)
        init_bert_(self, dim)

    def entering(self, stream: str, x: Tensor) -> Tensor:
        """What an encoder gives, as the first layer takes it: a linear map, and the stream's embedding."""
        proj, kind = getattr(self, f"{stream}_proj"), self.type_embeddings.weight[STREAMS.index(stream)]
        return ops.linear(x, proj.weight, proj.bias + kind)

    def seen(self, x: Tensor, texts: Packing, y: Tensor, layer: int) -> Tensor:
        """The images' stream [P, S, D] as it enters pair `layer`, or, for `depth`, leaves the last."""
        shape, images = y.shape, Packing.even(*y.shape[:2], y.device)
        y = y.flatten(0, 1)
        for i in range(layer):
            told = x
            if i + 1 < layer:
                x = self.language_layers[i](x, texts, y, images)
            y = self.vision_layers[i](y, images, told, texts)
        return y.view(shape)

    def forward(
        self,
        x: Tensor,
        texts: Packing,
        y: Tensor,
        rows: Tensor,
        row_packing: Packing,
        last: Packing,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Behind the last pair: texts at `rows`, and the first tokens of the last B texts and images, pooled.

        Args:
            rows: int64 [R + B] of T, rising; the last B are the first tokens of the last B texts. row_packing: how many
                of them each text has. last: of the last B texts alone, whose tokens begin at `start`.

        Returns:
            [R, D] and [B, 2 D].
        """
        count, length, batch = *y.shape[:2], len(last.cu_seqlens) - 1
        images = Packing.even(count, length, y.device)
        y = y.flatten(0, 1)
        for layer, other in zip(self.language_layers[:-1], self.vision_layers[:-1]):
            x, y = layer(x, texts, y, images), other(y, images, x, texts)
        told, first = self.language_layers[-1](x, texts, y, images, rows, row_packing).split([len(rows) - batch, batch])
        own, ends = Packing.even(batch, length, y.device), torch.arange(batch, device=y.device)
        first_only = Packing.even(batch, 1, y.device)
        seen = self.vision_layers[-1](y[-batch * length :], own, x[start:], last, ends * length, first_only)
        pooled = self.language_pooler["dense"](first).tanh(), self.vision_pooler["dense"](seen).tanh()
        return told, torch.cat(pooled, 1)
