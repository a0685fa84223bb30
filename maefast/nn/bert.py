"""Post-norm transformers of text, BERT's (Devlin et al., 2019) and RoBERTa's (Liu et al., 2019), over packed sequences;
with cross-attention to another stream, the co-attention of METER (Dou et al., 2022). Names of parameters as in
transformers, so that checkpoints of theirs fit.

Sequences come packed, [T, D], with `Packing`; padding does not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.nn.block import Packing
from maefast.nn.layers import LayerNorm, Linear
from maefast.ops import _checks


def init_bert_(module: nn.Module, dim: int) -> None:
    """Linear layers and embeddings of a transformer of width `dim` normal with standard deviation 0.02 at BERT's width
    of 768, and larger by the square root at smaller ones; biases zero. In place."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02 * (768 / dim) ** 0.5)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class Projections(nn.Module):
    """Maps to queries, keys and values, kept apart; several of them are applied as one product."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, *names: str) -> Tensor:
        """[T, D] -> [T, len(names) * D]."""
        parts = [getattr(self, name) for name in names]
        if len(parts) == 1:
            return parts[0](x)
        weight, bias = (torch.cat([getattr(part, what) for part in parts]) for what in ("weight", "bias"))
        return ops.linear(x, weight, bias)


class AddAndNorm(nn.Module):
    """``LayerNorm(x + drop(dense(y)))``."""

    def __init__(self, width: int, dim: int, eps: float, drop: float) -> None:
        super().__init__()
        self.dense = Linear(width, dim)
        self.LayerNorm = LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(drop)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x, self.dropout(self.dense(y)), x.dtype)[1]


class PostNormAttention(nn.Module):
    """``LayerNorm(x + drop(dense(attention(x, other))))``, with the other stream, or x itself, as keys and values."""

    def __init__(self, dim: int, num_heads: int, eps: float, drop: float) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of the number of heads, got {num_heads}")
        self.num_heads = num_heads
        self.self = Projections(dim)
        self.output = AddAndNorm(dim, dim, eps, drop)

    def forward(
        self, x: Tensor, packing: Packing, other: Tensor | None = None, other_packing: Packing | None = None
    ) -> Tensor:
        """Queries [Tq, D], other [Tk, D] -> [Tq, D]; `packing` of the queries."""
        where = {"cu_seqlens_q": packing.cu_seqlens, "max_seqlen_q": packing.max_seqlen}
        if other is None:
            qkv = self.self(x, "query", "key", "value").unflatten(1, (3, self.num_heads, -1))
            seen = ops.attention(qkv, **where)
        else:
            q = self.self(x, "query").unflatten(1, (self.num_heads, -1))
            kv = self.self(other, "key", "value").unflatten(1, (2, self.num_heads, -1))
            where |= {"cu_seqlens_k": other_packing.cu_seqlens, "max_seqlen_k": other_packing.max_seqlen}
            seen = ops.attention(q, kv, **where)
        return self.output(seen.flatten(1), x)


class Intermediate(nn.Module):
    """``gelu(dense(x))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense = Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_gelu(self.dense(x, bias=False), self.dense.bias)


class PostNormLayer(nn.Module):
    """Self-attention, with `cross` attention to another stream behind it, and an MLP; a norm behind each:

        x = norm(x + attention(x));  x = norm(x + attention(x, other));  x = norm(x + mlp(x))

    Args:
        dim: D. num_heads: divides D. mlp_ratio: hidden width of the MLP over D. eps: of the LayerNorms. drop: share of
            what each branch gives that is left out in training; weights of attention are never.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-12,
        drop: float = 0.0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.attention = PostNormAttention(dim, num_heads, eps, drop)
        self.crossattention = PostNormAttention(dim, num_heads, eps, drop) if cross else None
        self.intermediate = Intermediate(dim, int(dim * mlp_ratio))
        self.output = AddAndNorm(int(dim * mlp_ratio), dim, eps, drop)
        init_bert_(self, dim)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        other: Tensor | None = None,
        other_packing: Packing | None = None,
        rows: Tensor | None = None,
        row_packing: Packing | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]; with `rows`, int64 [R], those of the output alone: [R, D].

        rows: rising within each sequence of `packing`; the others give keys and values only. row_packing: how many of
            them each sequence has, and the most. other, other_packing: where there is cross-attention.
        """
        if rows is None:
            x = self.attention(x, packing)
        else:
            x, packing = self.attention(x[rows], row_packing, x, packing), row_packing
        if self.crossattention is not None:
            x = self.crossattention(x, packing, other, other_packing)
        return self.output(self.intermediate(x), x)


class TextEmbeddings(nn.Module):
    """``drop(norm(word + position + type))``, the type being the first."""

    def __init__(self, vocabulary: int, positions: int, dim: int, eps: float, drop: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, dim)
        self.position_embeddings = nn.Embedding(positions, dim)
        self.token_type_embeddings = nn.Embedding(1, dim)
        self.LayerNorm = LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(drop)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        words = self.word_embeddings(ids)
        places = self.position_embeddings(positions) + self.token_type_embeddings.weight
        return self.dropout(self.LayerNorm(words, places, words.dtype)[1])


class TextEncoder(nn.Module):
    """RoBERTa without its pooler: packed ids int64 [T] -> [T, D].

    Args:
        vocabulary: how many tokens there are. length: the longest sequence. dim, depth, num_heads, mlp_ratio: of the
            transformer. eps: of the norms. drop: see `PostNormLayer`. first: the position of a first token; RoBERTa
            counts from 2.
    """

    def __init__(
        self,
        vocabulary: int = 50265,
        length: int = 512,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        drop: float = 0.1,
        first: int = 2,
    ) -> None:
        super().__init__()
        _checks.integer("vocabulary", vocabulary, 1)
        _checks.integer("length", length, 1)
        self.first = first
        self.embeddings = TextEmbeddings(vocabulary, first + length, dim, eps, drop)
        self.layer = nn.ModuleList(PostNormLayer(dim, num_heads, mlp_ratio, eps, drop) for _ in range(depth))
        init_bert_(self.embeddings, dim)

    def forward(self, ids: Tensor, places: Tensor, packing: Packing) -> Tensor:
        """ids, places: int64 [T], tokens and where in its sequence each stands, from 0."""
        x = self.embeddings(ids, places + self.first)
        for layer in self.layer:
            x = layer(x, packing)
        return x


class LanguageHead(nn.Module):
    """``decoder(norm(gelu(dense(x)))) + bias``: logits of tokens, [R, D] -> [R, vocabulary]."""

    def __init__(self, dim: int, vocabulary: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.transform = nn.ModuleDict({"dense": Linear(dim, dim), "LayerNorm": LayerNorm(dim, eps=eps)})
        self.decoder = Linear(dim, vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        init_bert_(self, dim)

    def forward(self, x: Tensor) -> Tensor:
        dense = self.transform["dense"]
        x = self.transform["LayerNorm"](ops.bias_gelu(dense(x, bias=False), dense.bias))
        return ops.linear(x, self.decoder.weight, self.bias)
