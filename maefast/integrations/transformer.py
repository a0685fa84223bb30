"""Transformer blocks of other libraries on our ops, found by their structure.

Pre-norm blocks ``x + attn(norm1(x))``, ``x + mlp(norm2(x))`` with the layouts of timm (and of the MAE, VideoMAE, DeiT,
JEPA and lightly code that follows it) and of Hugging Face transformers, 4 and 5. A block runs attention, residual
additions with norms, and bias with GELU in fused kernels, wherever a part is what it looks like; other parts (dropout
in use, normalised queries, adapters, watched modules) are called as they are.

Between our blocks a sum stays pending, see `Pending`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _hf, _swap, _verify
from maefast.integrations import _layers as layers

WHAT = "fused attention, residual + norm, bias + GELU"


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


# --- layouts ------------------------------------------------------------------------------------------------


class Timm:
    """norm1, attn (qkv, proj, num_heads), norm2, mlp (fc1, act, fc2); maybe drop_path, layer scale, q and v biases."""

    name = "timm"
    # (attributes that the forward of a part must use, those that it may use) to be computed by us. Any other attribute
    # may be a switch that changes what it computes.
    BLOCK = (
        {"norm1", "attn", "norm2", "mlp"},
        {"training", "drop_path", "drop_path1", "drop_path2", "ls1", "ls2", "gamma_1", "gamma_2"},
    )
    ATTENTION = (
        {"qkv", "proj", "num_heads", "scale"},
        {"training", "attn_drop", "proj_drop", "proj_drop_prob", "q_norm", "k_norm", "norm", "gate", "q_bias", "v_bias"}
        | {"head_dim", "attn_dim", "dim", "embed_dim", "fused_attn", "fast_attn", "use_sdpa"},
    )
    MLP = {"fc1", "act", "fc2"}, {"training", "drop", "drop1", "drop2", "norm"}

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn = getattr(block, "attn", None)
        parts = (getattr(attn, "qkv", None), getattr(attn, "proj", None))  # adapters may stand in their place
        fits = all(isinstance(part, nn.Module) for part in parts) and _norms(block, "norm1", "norm2")
        return fits and isinstance(getattr(block, "mlp", None), nn.Module)

    @staticmethod
    def unknown(block: nn.Module) -> str | None:
        """Why the block's own forward is kept whatever it computes now, or None."""
        found = layers.beyond(block, *Timm.BLOCK)
        return None if not found else f"its forward uses {found}, which maefast does not know"

    @staticmethod
    def settings(block: nn.Module) -> dict:
        """Kept on the block: the classes of attention and MLP whose forward we know; others are called as they are."""
        attn, mlp = block.attn, block.mlp
        known = {
            "attn": None if layers.beyond(attn, *Timm.ATTENTION) else type(attn),
            "mlp": None if layers.beyond(mlp, *Timm.MLP) else type(mlp),
        }
        # V-JEPA hands down a mask that its attention never looks at.
        known["ignored"] = ("mask",) if known["attn"] and layers.ignores(attn, "mask") else ()
        return known

    @staticmethod
    def passes(block: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call with these further arguments is the plain one."""
        ignored = _swap.setting(block, "ignored", ()) if type(block.attn) is _swap.setting(block, "attn") else ()
        return not any(_hf.given(a) for a in args) and not any(
            _hf.given(v) for k, v in kwargs.items() if k not in ignored
        )

    @staticmethod
    def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    @staticmethod
    def attend(block: nn.Module, y: Tensor, count: int | None) -> Tensor:
        attn = block.attn
        if Timm.problem(block):
            out = attn(y)
            out = out[0] if isinstance(out, tuple) else out
            out = out if count is None else out[:, -count:]
        else:
            q_bias = getattr(attn, "q_bias", None)
            bias = attn.qkv.bias
            if q_bias is not None:  # VideoMAE: keys have no bias
                bias = torch.cat([q_bias, torch.zeros_like(q_bias), attn.v_bias])
            heads = _attention(y, attn.qkv.weight, bias, attn.num_heads, attn.scale, count)
            out = layers.then(layers.linear(attn.proj, heads), getattr(attn, "proj_drop", None))
        gamma = getattr(block, "gamma_1", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls1", None), _either(block, "drop_path1", "drop_path"))

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        """Why the attention is called as it is, or None where it is fused."""
        attn = block.attn
        if type(attn) is not _swap.setting(block, "attn"):
            return "the attention is of a kind that maefast does not know"
        if layers.hooked(attn) or not layers.plain_linear(attn.qkv):
            return "the attention is watched or adapted"
        if not isinstance(getattr(attn, "scale", None), float):
            return "the scale of the attention is learned"
        for name in ("q_norm", "k_norm", "norm"):
            if not layers.still(getattr(attn, name, None)):
                return "the attention normalises queries, keys or its output"
        if getattr(attn, "gate", None) is not None:
            return "the attention is gated"
        # Some take the rate of this dropout and ask the attention itself whether it trains.
        drop = getattr(attn, "attn_drop", None)
        if not layers.still(drop) or (attn.training and getattr(drop, "p", 0) > 0):
            return "dropout inside the attention is on"
        if getattr(attn, "proj_drop_prob", 0) > 0:  # V-JEPA drops with it inside, in evaluation too
            return "dropout inside the attention is on"
        return None

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        mlp = block.mlp
        inner = [getattr(mlp, name, None) for name in ("drop", "drop1", "drop2", "norm")]
        known = type(mlp) is _swap.setting(block, "mlp") and not layers.hooked(mlp)
        if not known or not all(layers.still(part) for part in inner):
            out = mlp(y)
        else:
            out = layers.mlp(mlp.fc1, mlp.act, mlp.fc2, y)
        gamma = getattr(block, "gamma_2", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls2", None), _either(block, "drop_path2", "drop_path"))


class HuggingFace5:
    """layernorm_before, attention (q_proj, k_proj, v_proj, o_proj), layernorm_after, mlp (fc1, activation_fn, fc2)."""

    name = "transformers 5"

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn, mlp = getattr(block, "attention", None), getattr(block, "mlp", None)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        parts = [getattr(attn, name, None) for name in names]
        parts += [getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)]
        return all(isinstance(part, nn.Linear) for part in parts) and _norms(block, *HuggingFace5._names(block))

    @staticmethod
    def _names(block: nn.Module) -> tuple[str, str]:
        return ("norm1", "norm2") if hasattr(block, "norm1") else ("layernorm_before", "layernorm_after")

    @staticmethod
    def passes(block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return _hf_passes(args, kwargs)

    @staticmethod
    def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
        first, second = HuggingFace5._names(block)
        return getattr(block, first), getattr(block, second)

    @staticmethod
    def attend(block: nn.Module, y: Tensor, count: int | None) -> Tensor:
        attn = block.attention
        if HuggingFace5.problem(block):
            out = attn(y)[0]
            out = out if count is None else out[:, -count:]
        else:
            out = _attention_of_three(
                y, (attn.q_proj, attn.k_proj, attn.v_proj), attn.num_attention_heads, attn.scaling, count
            )
            out = layers.linear(attn.o_proj, out)
        return layers.then(out, *(getattr(block, name, None) for name in ("dropout", "layer_scale1", "drop_path")))

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        mlp = block.mlp
        act = getattr(mlp, "activation_fn", None)
        out = mlp(y) if layers.hooked(mlp) or act is None else layers.mlp(mlp.fc1, act, mlp.fc2, y)
        return layers.then(out, *(getattr(block, name, None) for name in ("dropout", "layer_scale2", "drop_path")))

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        attn = block.attention
        if _hf.recorded(attn) or not all(layers.plain_linear(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj)):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if block.training and getattr(attn, "attention_dropout", 0.0):
            return "dropout inside the attention is on"
        if getattr(attn, "num_key_value_groups", 1) != 1:
            return "keys and values have fewer heads than queries"
        return None


class HuggingFace4:
    """attention.attention (query, key, value), attention.output.dense, intermediate.dense, output.dense; VideoMAE in
    transformers 5 too."""

    name = "transformers 4"

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn = getattr(getattr(block, "attention", None), "attention", None)
        dense = [getattr(getattr(block, name, None), "dense", None) for name in ("intermediate", "output")]
        dense.append(getattr(getattr(getattr(block, "attention", None), "output", None), "dense", None))
        parts = [getattr(attn, name, None) for name in ("query", "key", "value")] + dense
        if not all(isinstance(part, nn.Linear) for part in parts):
            return False
        # BEiT and its kin look alike, but scale their layers, drop some, and shift scores by relative positions.
        known = {"attention", "intermediate", "output", "layernorm_before", "layernorm_after"}
        alike = set(dict(block.named_children())) == known
        alike = alike and set(dict(attn.named_children())) <= {"query", "key", "value", "dropout"}
        return alike and _norms(block, "layernorm_before", "layernorm_after")

    @staticmethod
    def passes(block: nn.Module, args: tuple, kwargs: dict) -> bool:
        # The last module adds to the stream by itself: it is either bypassed or called by the model's own code.
        return _hf_passes(args, kwargs) and not layers.hooked(block.output)

    @staticmethod
    def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
        return block.layernorm_before, block.layernorm_after

    @staticmethod
    def attend(block: nn.Module, y: Tensor, count: int | None) -> Tensor:
        attn, output = block.attention.attention, block.attention.output
        if HuggingFace4.problem(block):
            out = block.attention(y)
            out = out[0] if isinstance(out, tuple) else out
            return out if count is None else out[:, -count:]
        scale = getattr(attn, "scaling", attn.attention_head_size**-0.5)
        parts, biases = (attn.query, attn.key, attn.value), None
        if getattr(attn, "q_bias", None) is not None:  # VideoMAE: keys have no bias
            biases = [attn.q_bias, None, attn.v_bias]
        out = _attention_of_three(y, parts, attn.num_attention_heads, scale, count, biases)
        return layers.then(layers.linear(output.dense, out), output.dropout)

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        first, last = block.intermediate, block.output
        if layers.hooked(first):
            out = layers.linear(last.dense, first(y))
        else:
            out = layers.mlp(first.dense, first.intermediate_act_fn, last.dense, y)
        return layers.then(out, last.dropout)

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        attn = block.attention.attention
        watched = _hf.recorded(attn) or layers.hooked(block.attention, block.attention.output)
        if watched or not all(layers.plain_linear(part) for part in (attn.query, attn.key, attn.value)):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if (block.training and getattr(attn, "dropout_prob", 0.0)) or not layers.still(getattr(attn, "dropout", None)):
            return "dropout inside the attention is on"
        return None


LAYOUTS = (Timm, HuggingFace5, HuggingFace4)


def _norms(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.LayerNorm) for name in names)


def _either(block: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(block, name) for name in names if getattr(block, name, None) is not None), None)


def _hf_passes(args: tuple, kwargs: dict) -> bool:
    """No attention mask, nothing unknown, and nobody asks for the attention weights."""
    return not any(_hf.given(a) for a in args) and _hf.harmless(kwargs) and not kwargs.get("output_attentions")


# --- computing ----------------------------------------------------------------------------------------------


def _attention(y: Tensor, weight: Tensor, bias: Tensor | None, heads: int, scale: float, count: int | None) -> Tensor:
    """[B, S, D] -> [B, S or count, H * d], before the output projection; weight [3 * H * d, D], rows q, k, v."""
    if count is None:
        qkv = ops.linear(y, weight, bias).unflatten(-1, (3, heads, -1))
        return ops.attention(qkv, scale=scale).flatten(-2)
    width = weight.shape[0] // 3
    weight_q, weight_kv = weight.split([width, 2 * width])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
    q = ops.linear(y[:, -count:], weight_q, bias_q).unflatten(-1, (heads, -1))
    kv = ops.linear(y, weight_kv, bias_kv).unflatten(-1, (2, heads, -1))
    return ops.attention(q, kv, scale=scale).flatten(-2)


def _attention_of_three(
    y: Tensor,
    parts: tuple[nn.Linear, ...],
    heads: int,
    scale: float,
    count: int | None,
    biases: list[Tensor | None] | None = None,
) -> Tensor:
    """The same from separate projections: one product with their weights side by side."""
    weight = torch.cat([part.weight for part in parts])
    biases = [part.bias for part in parts] if biases is None else biases
    bias = None
    if any(b is not None for b in biases):
        zeros = [part.weight.new_zeros(part.out_features) if b is None else b for part, b in zip(parts, biases)]
        bias = torch.cat(zeros)
    return _attention(y, weight, bias, heads, scale, count)


def _run(layout: type, block: nn.Module, x: Tensor, delta: Tensor | None, count: int | None = None) -> Pending:
    first, second = layout.norms(block)
    x, y = layers.norm(first, x, delta)
    a = layout.attend(block, y, count)
    x, y = layers.norm(second, x if count is None else x[:, -count:], a)
    return Pending(x, layout.feed(block, y))


def _forward(layout: type, block: nn.Module, x, args: tuple, kwargs: dict):
    if isinstance(x, Pending):
        return _run(layout, block, *x)
    if isinstance(x, Tail):
        return _run(layout, block, *x)
    if not _usual(layout, block, x) or watched(block) or not layout.passes(block, args, kwargs):
        return _swap.original(block, "forward")(x, *args, **kwargs)
    return _run(layout, block, x, None).value()


def _usual(layout: type, block: nn.Module, x: object) -> bool:
    """Tokens that the kernels take; the block's own code answers for others, or refuses them."""
    if not isinstance(x, Tensor) or not layers.plain_tensor(x) or x.ndim != 3 or not x.is_floating_point():
        return False
    if x.layout is not torch.strided or not x.numel():
        return False
    norm = layout.norms(block)[0]
    if x.shape[-1] != norm.normalized_shape[-1]:
        return False
    weight = norm.weight
    if weight is None:
        return True
    fits = x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)
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
        return _swap.original(self, "forward")(**kwargs)
    return _forward(Timm, self, args[0], args[1:], kwargs)


def hf5_forward(self: nn.Module, hidden_states, *args, **kwargs):
    return _forward(HuggingFace5, self, hidden_states, args, kwargs)


def hf4_forward(self: nn.Module, hidden_states, *args, **kwargs):
    out = _forward(HuggingFace4, self, hidden_states, args, kwargs)
    return (out,) if isinstance(out, Tensor) and _answers_in_tuples(_swap.original(self, "forward").__func__) else out


@cache
def _answers_in_tuples(forward: Callable) -> bool:
    """Whether a layer returns (hidden states, maybe attention weights), as in transformers until 4.55."""
    return "output_attentions" in inspect.signature(forward).parameters


FORWARDS = {Timm: timm_forward, HuggingFace5: hf5_forward, HuggingFace4: hf4_forward}


def is_fast(block: nn.Module) -> bool:
    """Whether the block takes `Pending` and `Tail`, and nobody wants to see what it returns on the way."""
    if "forward" not in _swap.methods(block) or _swap.is_plain():
        return False
    return not watched(block) and (layers.only_sharded(block) or not _hf.recorded(block))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *args, **kwargs) -> Pending:
    """x through all blocks; further arguments go to blocks that run as they are."""
    at = Pending(x)
    for block in blocks:
        if is_fast(block) and not (getattr(block, "gradient_checkpointing", False) and block.training):
            at = block(at)
        else:
            out = block(at.value(), *args, **kwargs)
            at = Pending(out[0] if isinstance(out, tuple) else out)
    return at


def run_tail(blocks: nn.ModuleList, x: Tensor, count: int, *args, **kwargs) -> Pending:
    """The last `count` tokens of the output of all blocks; further arguments go to blocks that run as they are."""
    last = blocks[-1] if len(blocks) else None
    fast = last is not None and is_fast(last) and not (getattr(last, "gradient_checkpointing", False) and last.training)
    if not fast or _drops(last):
        at = run_blocks(blocks, x, *args, **kwargs)
        return Pending(at.x[:, -count:], None if at.delta is None else at.delta[:, -count:])
    return last(Tail(*run_blocks(blocks[:-1], x, *args, **kwargs), count))


def _drops(block: nn.Module) -> bool:
    """Whether a dropout is on: it draws a number for each token, so fewer tokens would change what is drawn."""
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in block.modules())


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
    return layout.settings(block) if hasattr(layout, "settings") else {}


def unknown(block: nn.Module, layout: type) -> str | None:
    """Why the block is kept before anything is compared, or None."""
    return layout.unknown(block) if hasattr(layout, "unknown") else None


def text(block: nn.Module, layout: type) -> str:
    """What serves the (accelerated) block now, for the report."""
    with _verify.whole(block):  # sharded parameters would pass for strange ones
        problem = layout.problem(block)
    return WHAT if problem is None else f"residual + norm, bias + GELU; {problem}, so it runs as it was"


def probe(block: nn.Module, layout: type) -> Tensor:
    """A small input for the comparison with the block's own code."""
    norm = layout.norms(block)[0]
    like = norm.weight if norm.weight is not None else next(block.parameters())
    return torch.randn(2, 6, norm.normalized_shape[-1], device=like.device, dtype=like.dtype)


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


def compare(block: nn.Module, layout: type) -> float:
    """The largest relative difference between the fast forward and the block's own, training and evaluating. Both run
    with random weights. The block is left as it was.

    Raises:
        Mismatch: they differ.
    """
    if (reason := _verify.unsuitable(block)) is not None:
        raise Unsuitable(reason)
    trains = [(part, part.training) for part in block.modules()]
    _swap.swap(block, {"forward": FORWARDS[layout]}, **settings(block, layout))
    worst = 0.0
    try:
        for training in (True, False):
            for part, _ in trains:
                part.training = training
            worst = max(worst, _verify.compare(block, lambda: block(probe(block, layout)), fresh=True))
    finally:
        _swap.unswap(block)
        for part, training in trains:
            part.training = training
    return worst


class Unsuitable(Exception):
    """The block cannot be run here and now."""
