"""What the layouts of transformer blocks share: the whole block as one op, fused attention, and positions inside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _worth
from maefast.integrations._sites import base_of
from maefast.ops._joint_linear import joint_linear

DROPS = "dropout inside the attention is on"


class Positions(NamedTuple):
    """What one call tells a block about positions. Blocks with such are given whole sequences, one by one.

    bias, rope: as `ops.attention` takes them. arguments: the same for the model's own attention. grid: (height, width)
    of the tokens, where the block cuts them into windows.
    """

    bias: Tensor | None = None
    rope: ops.Rope | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012
    grid: tuple[int, int] | None = None

    def tables(self) -> dict[str, Any]:
        found = {"bias": self.bias, "rope": self.rope}
        return {name: table for name, table in found.items() if table is not None}


NOWHERE = Positions()
_OF_A_BLOCK = frozenset(inspect.signature(ops.transformer_block).parameters)


class Whole(NamedTuple):
    """A block that `ops.transformer_block` computes."""

    norm1: nn.Module
    qkv_weight: Tensor | tuple[Tensor, ...]
    qkv_bias: Tensor | tuple[Tensor | None, ...] | None
    proj: nn.Module
    norm2: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    heads: int
    scale: float | None
    act: nn.Module
    ends: tuple[tuple[Tensor | nn.Module | None, ...], ...]  # of both branches: factors and modules, or None
    positions: Positions = NOWHERE

    def fits(self) -> bool:
        norms, linear = (self.norm1, self.norm2), (self.proj, self.fc1, self.fc2)
        if not (all(map(layers.plain_norm, norms)) and all(map(layers.plain_linear, linear))):
            return False
        weight = self.qkv_weight if isinstance(self.qkv_weight, Tensor) else self.qkv_weight[0]
        width, (outputs, inputs) = self.norm1.weight.shape[0], self.proj.weight.shape
        rows = width * 3 if weight is self.qkv_weight else width
        return (
            width == inputs == outputs == weight.shape[1] == self.norm2.weight.shape[0]
            and weight.shape[0] == rows
            and width % self.heads == 0
            and self.fc1.weight.shape[0] == self.fc2.weight.shape[1]
            and layers.gelu(self.act) is not None
            and all(map(layers.scales, (end for ends in self.ends for end in ends)))
            and set(self.positions.tables()) <= _OF_A_BLOCK
        )

    def run(self, x: Tensor, delta: Tensor | None, count: int | None) -> tuple[Tensor, Tensor]:
        (scale1, drop1), (scale2, drop2) = (layers.factors(ends, x, self.proj.weight) for ends in self.ends)
        weights = ops.BlockWeights(
            self.norm1.weight,
            self.norm1.bias,
            self.qkv_weight,
            self.qkv_bias,
            self.proj.weight,
            self.proj.bias,
            self.norm2.weight,
            self.norm2.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            scale1,
            scale2,
        )
        return ops.transformer_block(
            x,
            delta,
            weights,
            self.heads,
            eps=(self.norm1.eps, self.norm2.eps),
            scale=self.scale,
            approximate=layers.gelu(self.act),
            drop1=drop1,
            drop2=drop2,
            count=None if count == x.shape[1] else count,
            **self.positions.tables(),
        )


def norms(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.LayerNorm) for name in names)


def is_gated(mlp: nn.Module) -> bool:
    """A SwiGLU in timm's packed layout has the names of a plain MLP, but halves the width in between."""
    wide, narrow = getattr(mlp.fc1, "out_features", None), getattr(mlp.fc2, "in_features", None)
    return None not in (wide, narrow) and wide != narrow


def live_mlp(path: str, mlp: nn.Module, act: str, names: tuple[str, ...]) -> list[str]:
    """A GELU is passed over, so it is guarded; another activation is called."""
    called = () if layers.gelu(getattr(mlp, act, None)) is not None else (act,)
    return [f"{path}.{name}" for name in (*names, *called)]


def either(block: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(block, name) for name in names if getattr(block, name, None) is not None), None)


_NUMBERS = (float, int)


def ends(block: nn.Module, names: tuple[tuple[str, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    """What comes behind each branch, by its names: modules, factors (numbers other than 1 too) or None."""
    return tuple(tuple(_factor(getattr(block, name, None)) for name in branch) for branch in names)


def _factor(end: Any) -> Any:
    return None if isinstance(end, _NUMBERS) and end == 1 else end


def has_numbers(ends: tuple[tuple[Any, ...], ...]) -> bool:
    return any(isinstance(end, _NUMBERS) for branch in ends for end in branch)


def ended(x: Tensor, ends: tuple[Any, ...]) -> Tensor:
    for end in ends:
        x = end * x if isinstance(end, (Tensor, *_NUMBERS)) else layers.then(x, end)
    return x


@cache
def parameters(forward: Callable) -> tuple[str, ...]:
    """Names of the arguments of a forward; none where it does not tell."""
    return tuple(signature(forward))


def signature(forward: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(forward).parameters)
    except (TypeError, ValueError):  # code in C
        return {}


@cache
def _places(forward: Callable) -> tuple[str, ...]:
    """Names of the further arguments that may be given by their places, which differ between versions."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(name for name, p in signature(forward).items() if p.kind in kinds)[2:]


def named(block: nn.Module, args: tuple, kwargs: dict) -> dict | None:
    """All further arguments of a call of a block by their names, or None where it does not take them."""
    names = _places(base_of(block).forward) if args else ()
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return None
    return {**dict(zip(names, args)), **kwargs}


def no_kernel(norm: nn.Module, heads: int, length: int) -> str | None:
    """Why no kernel serves positions in the attention of a block with this norm, or None."""
    if layers.parametrised(norm) or norm.weight is None:
        return None
    dtype = layers.product_dtype(norm.weight)
    return _worth.no_kernel(norm.weight.device.type, dtype, norm.weight.shape[0] // heads, length)


def attention(
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    scale: float | None,
    count: int | None,
    positions: Positions = NOWHERE,
) -> Tensor:
    """[B, S, D] -> [B, S or count, H * d], before the output projection; weight [3 * H * d, D], rows q, k, v."""
    if count is None:
        qkv = ops.linear(y, weight, bias).unflatten(-1, (3, heads, -1))
        return ops.attention(qkv, scale=scale, **positions.tables()).flatten(-2)
    width = weight.shape[0] // 3
    weight_q, weight_kv = weight.split([width, 2 * width])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
    q = ops.linear(y[:, -count:], weight_q, bias_q).unflatten(-1, (heads, -1))
    kv = ops.linear(y, weight_kv, bias_kv).unflatten(-1, (2, heads, -1))
    return ops.attention(q, kv, scale=scale).flatten(-2)


def attention_of_three(
    y: Tensor,
    parts: tuple[nn.Linear, ...],
    heads: int,
    scale: float | None,
    count: int | None,
    biases: list[Tensor | None] | None = None,
    positions: Positions = NOWHERE,
) -> Tensor:
    """The same from separate projections of queries, keys and values."""
    weights = tuple(part.weight for part in parts)
    biases = tuple(part.bias for part in parts) if biases is None else tuple(biases)
    if count is None:
        qkv = joint_linear(y, weights, biases).unflatten(-1, (3, heads, -1))
        return ops.attention(qkv, scale=scale, **positions.tables()).flatten(-2)
    q = ops.linear(y[:, -count:], weights[0], biases[0]).unflatten(-1, (heads, -1))
    kv = joint_linear(y, weights[1:], biases[1:]).unflatten(-1, (2, heads, -1))
    return ops.attention(q, kv, scale=scale).flatten(-2)
