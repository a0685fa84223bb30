"""Transformer blocks of other libraries on our ops, found by their structure.

Pre-norm blocks ``x + attn(norm1(x))``, ``x + mlp(norm2(x))`` with the layouts of timm (and of the MAE, VideoMAE, DeiT,
JEPA and lightly code that follows it) and of Hugging Face transformers, 4 and 5, both also with relative or rotary
positions inside the attention, and with attention in windows. A block runs attention, residual additions with norms,
and bias with GELU in fused kernels, wherever a part is what it looks like; other parts (dropout in use, normalised
queries, adapters, watched modules) are called as they are.

Between our blocks a sum stays pending, see `Pending`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast.integrations import _explain, _hf, _swap, _verify, _worth
from maefast.integrations import _layers as layers
from maefast.integrations._guards import Guards
from maefast.integrations._layouts import LAYOUTS, Beit4, HuggingFace4, Swin, Swin4, Timm, VJepa2
from maefast.integrations._layouts_parts import NOWHERE, Positions, signature
from maefast.integrations._sites import base_of
from maefast.integrations._steps import given
from maefast.ops import _checks


class Pending(NamedTuple):
    """x + delta, not added yet: what one accelerated block hands to the next. Blocks answer in kind."""

    x: Tensor
    delta: Tensor | None = None

    def value(self) -> Tensor:
        return self.x if self.delta is None else self.x + self.delta


class Tail(NamedTuple):
    """Input of a last block whose output is wanted for the last `count` tokens only; the others are keys and values."""

    x: Tensor
    delta: Tensor | None
    count: int


_swap.HANDED.update((Pending, Tail))


WATCHED = "a module inside has a hook, another forward or a wrapper"


# --- computing ----------------------------------------------------------------------------------------------


def _run(
    layout: type,
    block: nn.Module,
    x: Tensor,
    delta: Tensor | None,
    count: int | None = None,
    positions: Positions = NOWHERE,
) -> Pending:
    placed = () if positions is NOWHERE else (positions,)
    whole = layout.whole(block, *placed)
    if whole is not None and whole.fits():
        return Pending(*whole.run(x, delta, count))
    first, second = layout.norms(block)
    x, y = layers.norm(first, x, delta)
    a = layout.attend(block, y, count, *placed)
    x, y = layers.norm(second, x if count is None else x[:, -count:], a)
    return Pending(x, layout.feed(block, y))


def _forward(layout: type, block: nn.Module, x, args: tuple, kwargs: dict):
    if isinstance(x, (Pending, Tail)):
        return _run(layout, block, *x)
    if not _usual(layout, block, x):
        return _swap.fall_back(block, "forward")(x, *args, **kwargs)
    reason = WATCHED if watched(block) else _left(layout, block, x) or _unserved(layout, block, x, args, kwargs)
    if reason:
        return _swap.fall_back(block, "forward", reason)(x, *args, **kwargs)
    positions = layout.positions(block, x, args, kwargs) if hasattr(layout, "positions") else NOWHERE
    if positions is None:
        return _swap.fall_back(block, "forward", _called_with(layout, kwargs))(x, *args, **kwargs)
    return _run(layout, block, x, None, positions=positions).value()


def _unserved(layout: type, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> str | None:
    """Why a call with these further arguments runs as it was, or None."""
    if not layout.passes(block, args, kwargs):
        return _called_with(layout, kwargs)
    if hasattr(layout, "positions") and (reason := layout.no_kernel(block, x.shape[1])):
        placed = layout.placed(block, args, kwargs) if hasattr(layout, "placed") else True
        return quicker(reason) if placed else None
    return None


def _called_with(layout: type, kwargs: dict) -> str:
    """Of a call that is not served. Positions are named only where nothing else can be the reason."""
    given = [k for k, v in kwargs.items() if _hf.given(v)] or ["further positional arguments"]
    others = [k for k in given if k not in getattr(layout, "arguments", ())]
    return f"it was called with {', '.join(others or given)}"


def _left(layout: type, block: nn.Module, x: Tensor) -> str | None:
    """Why the block runs as it was whatever it is given: it is quicker so without a fused attention, or None."""
    if reason := _returns(layout, block):
        return reason
    if _worth.needs_attention(x) and (problem := layout.problem(block)):
        return quicker(problem)
    return None


def quicker(problem: str) -> str:
    """Why a block runs as it was where its attention has this problem."""
    return f"{problem}, and without a fused attention it is quicker as it was"


def _returns(layout: type, block: nn.Module) -> str | None:
    """Why the block's own code has to answer, or None."""
    pair = getattr(layout, "returns_pair", False) and not _answers_in_tuples(base_of(block).forward)
    return "it returns the attention weights" if pair and not _hf.weightless(block.attention) else None


def _usual(layout: type, block: nn.Module, x: object) -> bool:
    """Tokens that the kernels take; the block's own code answers for others, or refuses them."""
    if not isinstance(x, Tensor) or not layers.plain_tensor(x) or x.ndim != 3 or not x.is_floating_point():
        return False
    if x.layout is not torch.strided or not x.numel():
        return False
    norm = layout.norms(block)[0]
    if x.shape[-1] != norm.normalized_shape[-1] or layers.parametrised(norm):
        return False
    weight = norm.weight
    if weight is None:
        return True
    fits = x.dtype is weight.dtype or _checks.autocast(x.device.type) is not None
    return fits and x.device == weight.device


def watched(block: nn.Module) -> bool:
    """Whether somebody watches a module inside the block: its own code runs then, and shows it what it always did."""
    if layers.hooked():
        return True
    todo = list(block._modules.values())
    for part in todo:  # grows meanwhile; asked at every call, so no generators
        if part is None:
            continue
        if layers.touched(part) and (layers.wrapper(part) or _hf.recorded(part)):
            return True
        if part._modules:
            todo.extend(part._modules.values())
    return False


def timm_forward(self: nn.Module, *args, **kwargs):
    if not args:  # the first argument by its name, whatever that is
        return _swap.fall_back(self, "forward")(**kwargs)
    return _forward(_swap.setting(self, "layout"), self, args[0], args[1:], kwargs)


def hf_forward(self: nn.Module, hidden_states, *args, **kwargs):
    layout = _swap.setting(self, "layout")
    out = _forward(layout, self, hidden_states, args, kwargs)
    answer = _ANSWERS.get(layout)
    return answer(self, out) if answer is not None and isinstance(out, Tensor) else out


def _in_a_tuple(block: nn.Module, out: Tensor) -> Tensor | tuple:
    return (out,) if _answers_in_tuples(_swap.original(block, "forward").__func__) else out


def _in_a_pair(block: nn.Module, out: Tensor) -> tuple:
    """Tokens and the place of attention weights, see `_returns`; only tokens where weights are asked for by a name."""
    return (out,) if _answers_in_tuples(_swap.original(block, "forward").__func__) else (out, None)


def _with_place(block: nn.Module, out: Tensor) -> Tensor | tuple:
    """In a tuple, with a place for attention weights where torch's function computed them."""
    found = _in_a_tuple(block, out)
    return (out, None) if isinstance(found, tuple) and Beit4.adds_weights(block) else found


@cache
def _answers_in_tuples(forward: Callable) -> bool:
    """Whether a layer returns (hidden states, maybe attention weights), as in transformers until 4.55."""
    return "output_attentions" in inspect.signature(forward).parameters


# In what shape a layer answers, where that is not the tokens alone.
_ANSWERS = {HuggingFace4: _in_a_tuple, Beit4: _with_place, VJepa2: _in_a_pair, Swin: _in_a_pair, Swin4: _in_a_pair}


def forward_of(layout: type) -> Callable:
    """The fast forward of its blocks."""
    return timm_forward if issubclass(layout, Timm) else hf_forward


def is_fast(block: nn.Module, x: object = None) -> bool:
    """Whether the block, for the input x, takes `Pending` and `Tail`, and nobody wants to see what it returns."""
    if not _swap.runs_fast(block, "forward", x):
        return False
    return not watched(block) and (layers.only_sharded(block) or not _hf.recorded(block))


def _pends(block: nn.Module, x: Tensor) -> bool:
    """`is_fast` for this input, and not recomputed in the backward: reentrant checkpointing wants plain tensors. Blocks
    with positions are told about them in a call of their own."""
    if (
        hasattr(_swap.setting(block, "layout"), "positions")
        or not is_fast(block, x)
        or (_worth.needs_attention(x) and _swap.setting(block, "layout").problem(block))
    ):
        return False
    return not (getattr(block, "gradient_checkpointing", False) and block.training)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args, **kwargs) -> Pending:
    """x through all blocks; further arguments go to blocks that run as they are."""
    at, some = Pending(x), bool(x.numel())  # the blocks' own code answers for none
    for block in blocks:
        if some and _pends(block, at.x):
            at = block(at)
        else:
            out = block(at.value(), *args, **kwargs)
            at = Pending(out[0] if isinstance(out, tuple) else out)
    return at


def run_tail(blocks: nn.ModuleList, x: Tensor, count: int, *args, **kwargs) -> Pending:
    """The last `count` tokens of the output of all blocks; further arguments go to blocks that run as they are."""
    last = blocks[-1] if len(blocks) else None
    if last is None or not x.numel() or not _pends(last, x) or _drops(last):
        at = run_blocks(blocks, x, *args, **kwargs)
        return Pending(at.x[:, -count:], None if at.delta is None else at.delta[:, -count:])
    return last(Tail(*run_blocks(blocks[:-1], x, *args, **kwargs), count))


def _drops(block: nn.Module) -> bool:
    """Whether a dropout is on: it draws a number for each token, so fewer tokens would change what is drawn. So may
    parts of classes that were not there when the block was compared."""
    known = _swap.setting(block, "kinds", ())
    for part in block.modules():
        if part is not block and type(part) not in known:
            return True
        if isinstance(part, (nn.Dropout, nn.modules.dropout._DropoutNd)) and part.training and part.p > 0:
            return True
    return False


# --- finding ------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module, type]]:
    """(name, block, layout) of every transformer block in the model."""
    for name, module in model.named_modules():
        layout = None if layers.wrapper(module) else layout_of(module)
        if layout is not None:
            yield name, module, layout


def layout_of(module: nn.Module) -> type | None:
    return next((layout for layout in LAYOUTS if layout.fits(module)), None)


def settings(block: nn.Module, layout: type) -> dict:
    """What the fast forward needs to know, found before the block is changed."""
    found = layout.settings(block) if hasattr(layout, "settings") else {}
    kinds = frozenset(type(part) for part in block.modules())
    return {**found, _swap.SIZE: _worth.Size(), "kinds": kinds, "layout": layout}


def unknown(block: nn.Module, layout: type) -> str | None:
    """Why the block is kept before anything is compared, or None."""
    wanted = _wanted(base_of(block).forward)
    if strange := [name for name in wanted if name not in getattr(layout, "arguments", ())]:
        return f"its forward wants {', '.join(strange)}, which maefast does not know"
    return layout.unknown(block) if hasattr(layout, "unknown") else _returns(layout, block)


@cache
def _wanted(forward: Callable) -> tuple[str, ...]:
    """Names of the arguments without a default, behind the module itself and the tokens."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    found = signature(forward).values()
    return tuple(p.name for p in found if p.default is p.empty and p.kind not in kinds)[2:]


def guards(block: nn.Module, layout: type, settings: dict) -> Guards:
    """Of the block's own forward.

    Raises:
        Unguarded: it reads or writes what cannot be guarded.
    """
    return Guards(block, ("forward",), layout.live(block, settings))


def text(block: nn.Module, layout: type) -> str:
    """What serves the (accelerated) block now, for the report."""
    with _verify.whole(block):  # sharded parameters would pass for strange ones
        modes = [_parts(block, layout, training) for training in (True, False)]
    if modes[0] == modes[1]:
        return modes[0]
    return f"{modes[1]} (in training: {modes[0]})"


def _parts(block: nn.Module, layout: type, training: bool) -> str:
    with _verify.mode(block, training):
        problem, act = layout.problem(block), layout.activation(block)
    attention = "fused attention" if problem is None else _explain.attention(block, layout, problem)
    if layers.gelu(act) is not None:
        mlp = "bias + GELU"
    else:
        mlp = _explain.mlp(block) if act is None else f"{getattr(act, '__name__', type(act).__name__)} as it was"
    if problem:
        return f"{attention}; residual + norm, {mlp}"
    reason = layout.no_kernel(block) if hasattr(layout, "positions") else None
    positions = f"; as it was with positions, because {reason}" if reason else ""
    return f"{attention}, residual + norm, {mlp}{positions}"


def probe(block: nn.Module, layout: type) -> Tensor:
    """A small input for the comparison with the block's own code."""
    norm = layout.norms(block)[0]
    like = norm.weight if norm.weight is not None else next(block.parameters())
    return given(torch.randn(2, 6, norm.normalized_shape[-1], device=like.device, dtype=like.dtype))


def _calls(block: nn.Module, layout: type) -> list[tuple[Tensor, dict]]:
    """Small inputs and further arguments of the calls that are compared."""
    x = probe(block, layout)
    return layout.calls(block, x) if hasattr(layout, "calls") else [(x, {})]


# --- comparing ----------------------------------------------------------------------------------------------


def kind(block: nn.Module) -> tuple:
    """Blocks of equal kind compute the same with the same weights: classes, sizes and plain attributes of all parts."""
    parts = []
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}
        plain.pop("training")
        plain.pop("drop_prob", None)  # of stochastic depth, which is called as it is
        parts.append((name, type(module), tuple(sorted(plain.items(), key=lambda item: item[0]))))
    tensors = [(n, p.shape, p.dtype, p.device) for n, p in (*block.named_parameters(), *block.named_buffers())]
    return tuple(parts), tuple(tensors)


def compare(block: nn.Module, layout: type) -> tuple[float, bool | None]:
    """`_verify.agreement` of the fast forward and the block's own. The block is left as it was.

    Raises:
        Mismatch: they differ. Unsuitable: they cannot be compared.
    """
    if (reason := _verify.unsuitable(block)) is not None:
        raise Unsuitable(reason)
    _swap.swap(block, {"forward": forward_of(layout)}, **settings(block, layout))
    try:
        return _verify.agreement(block, lambda: [block(x, **call) for x, call in _calls(block, layout)])
    finally:
        _swap.unswap(block)


class Unsuitable(Exception):
    """The block cannot be run here and now."""
