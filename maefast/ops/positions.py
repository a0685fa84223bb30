"""Positions inside attention: the rotation of queries and keys, a table of relative biases, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _checks


class Rope(NamedTuple):
    """Rotary positions (Su et al., 2021), as `attention` takes them: ``x' = x * cos + turn(x) * sin``.

    cos, sin: [S, D], [B, S, D] or, for packed input, [T, D]; float32 or the dtype of q; no gradient. They are as wide
    as a head, and the two of a pair need not agree (those of V-JEPA 2 do not). A row of ones and zeros leaves its
    token as it is: class tokens, registers.
    interleaved: False: element i < D/2 is paired with D/2 + i, turn(x) = (-x[D/2:], x[:D/2]) (GPT-NeoX, DINOv3).
    True: 2i with 2i + 1, turn(x) = (-x[1], x[0], -x[3], x[2], ...) (RoFormer, EVA-02, V-JEPA 2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., S, H, D] with cos and sin [..., S, D], in the dtype of x."""
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        low, high = x.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
    return x * cos[..., None, :].to(x.dtype) + turned * sin[..., None, :].to(x.dtype)


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each pair of positions from a table of relative ones (Liu et al., 2021; Bao et al., 2022).

    Args:
        table: [R, H], a row for each relative position.
        index: int64 [Sq, Sk], the row of each pair.

    Returns:
        [H, Sq, Sk] in the dtype of `table`, as `attention` takes it for `bias`. The gradient of the table is
        deterministic. Differentiable any number of times.

    Raises:
        TypeError, ValueError: wrong shape, dtype or device; an index out of range (on a GPU by device-side assertion).
    """
    _checks.tensor("table", table, ndim=2)
    _checks.tensor("index", index, ndim=2, floating=False)
    _checks.same_device(table=table, index=index)
    if index.dtype is not torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    _checks.holds(
        (index >= 0) & (index < table.shape[0]), f"index must lie in [0, {table.shape[0]}), the rows of table"
    )
    if table.device.type == "cpu":
        # A gather, whose backward adds one element after another, is quicker here than that of an embedding.
        rows = index.reshape(1, -1).expand(table.shape[1], -1)
        return table.t().gather(1, rows).unflatten(1, index.shape)
    return F.embedding(index, table).permute(2, 0, 1)  # on a GPU the backward sorts, and so adds in a fixed order


def check_device(x: Tensor, bias: Tensor | None, rope: Rope | None) -> None:
    _checks.same_device(q=x, bias=bias)
    if isinstance(rope, Rope):
        _checks.same_device(q=x, **{"rope.cos": rope.cos, "rope.sin": rope.sin})


def check_bias(
    bias: Tensor, dtype: torch.dtype, batch: int, heads: int, max_q: int, max_k: int, packed: bool
) -> Tensor:
    """The bias as [G, H, Sq, Sk] in the dtype of scores, contiguous; `dtype`: of the queries."""
    _checks.tensor("bias", bias, ndim=(3, 4))
    if packed:
        raise ValueError("bias goes with dense input, sequences of equal lengths; these queries are packed")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if bias.dtype not in (torch.float32, dtype):
        raise TypeError(f"bias must be float32 or {dtype} as the queries, got {bias.dtype}")
    groups = bias.shape[0] if bias.ndim == 4 else 1
    if bias.shape[-3] not in (1, heads) or bias.shape[-2:] != (max_q, max_k):
        want = f"[G, {heads}, {max_q}, {max_k}]"
        raise ValueError(f"bias must be {want}, without G or with one head for all, got {list(bias.shape)}")
    if groups < 1 or batch % groups:
        raise ValueError(f"bias has {groups} groups, which must divide the number of sequences, {batch}")
    return bias.to(wide).expand(groups, heads, max_q, max_k).contiguous()


def _is(t: Tensor, shape: tuple) -> bool:
    """Number by number, which torch.compile can guard; whether a list holds a shape it takes for known."""
    return t.ndim == len(shape) and all(have == want for have, want in zip(t.shape, shape))


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join([f'{n}' for n in shape])}]"


def check_rope(
    rope: Rope, dtype: torch.dtype, tokens: torch.Size, width: int, some: bool
) -> tuple[Tensor, Tensor, bool]:
    """(cos, sin, interleaved): rows [S, D] of all sequences, or one for each token; in the dtype of scores, contiguous.

    tokens: [B, S] or packed [T]. width: of a head. some: queries and keys are not the same tokens.
    """
    if not isinstance(rope, Rope):
        raise TypeError(f"rope must be a maefast.ops.Rope, got {type(rope).__name__}")
    if some:
        raise ValueError("rope is defined for self-attention of all tokens only: rotate q and k yourself")
    if width % 2:
        raise ValueError(f"rope needs heads of an even width, got {width}")
    interleaved = _checks.flag("rope.interleaved", rope.interleaved)
    shapes = [(*tokens, width)] if len(tokens) == 1 else [(*tokens[1:], width), (*tokens, width)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for name, t in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        _checks.tensor(name, t)
        if t.dtype not in (torch.float32, dtype):
            raise TypeError(f"{name} must be float32 or {dtype} as the queries, got {t.dtype}")
        if not any(_is(t, shape) for shape in shapes) or t.shape != rope.cos.shape:
            want = " or ".join(map(_text, shapes))
            raise ValueError(
                f"rope.cos and rope.sin must both be {want}, got {_text(rope.cos.shape)}, {_text(t.shape)}"
            )
        if t.requires_grad:
            raise ValueError(f"{name} requires grad, but attention has no gradient for it: detach it")
    cos, sin = (t.to(wide).reshape(-1, width).contiguous() for t in (rope.cos, rope.sin))
    return cos, sin, interleaved
