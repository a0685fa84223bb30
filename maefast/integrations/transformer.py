"""Transformer blocks of other libraries on our ops, found by their structure.

Pre-norm blocks ``x + attn(norm1(x))``, ``x + mlp(norm2(x))`` with the layouts of timm (and of the MAE, VideoMAE, DeiT,
JEPA and lightly code that follows it) and of Hugging Face transformers, 4 and 5. A block runs attention, residual
additions with norms, and bias with GELU in fused kernels, wherever a part is what it looks like; other parts (dropout
in use, normalised queries, adapters, watched modules) are called as they are.

Between our blocks a sum stays pending, see `Pending`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _layers as layers
from maefast.integrations import _swap

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

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        parts = (getattr(attn, "qkv", None), getattr(attn, "proj", None), getattr(mlp, "fc1", None))
        return all(isinstance(part, nn.Linear) for part in parts) and _norms(block, "norm1", "norm2")

    @staticmethod
    def passes(block: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call with these further arguments is the plain one. V-JEPA passes a mask that its blocks ignore."""
        ignored = {"mask"} if "use_sdpa" in vars(block.attn) else set()
        return not any(_given(a) for a in args) and not any(_given(v) for k, v in kwargs.items() if k not in ignored)

    @staticmethod
    def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    @staticmethod
    def attend(block: nn.Module, y: Tensor, count: int | None) -> Tensor:
        attn = block.attn
        if Timm.attention_problem(attn):
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
    def attention_problem(attn: nn.Module) -> str | None:
        """Why the attention is called as it is, or None where it is fused."""
        if layers.hooked(attn) or not layers.plain_linear(attn.qkv):
            return "the attention is watched or adapted"
        if not isinstance(getattr(attn, "scale", None), float):
            return "the scale of the attention is learned"
        for name in ("q_norm", "k_norm", "norm"):
            if not layers.still(getattr(attn, name, None)):
                return "the attention normalises queries, keys or its output"
        if getattr(attn, "gate", None) is not None:
            return "the attention is gated"
        if not layers.still(getattr(attn, "attn_drop", None)):
            return "dropout inside the attention is on"
        return None

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        mlp = block.mlp
        inner = [getattr(mlp, name, None) for name in ("drop", "drop1", "drop2", "norm")]
        if layers.hooked(mlp) or not all(layers.still(part) for part in inner) or not hasattr(mlp, "act"):
            out = mlp(y)
        else:
            out = layers.mlp(mlp.fc1, mlp.act, mlp.fc2, y)
        gamma = getattr(block, "gamma_2", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls2", None), _either(block, "drop_path2", "drop_path"))

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        return Timm.attention_problem(block.attn)


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
        return _hf_passes(block, block.attention, args, kwargs)

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
        if _recording(attn) or not all(layers.plain_linear(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj)):
            return "the attention is watched or adapted"
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
        return all(isinstance(part, nn.Linear) for part in parts) and _norms(
            block, "layernorm_before", "layernorm_after"
        )

    @staticmethod
    def passes(block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return _hf_passes(block, block.attention.attention, args, kwargs)

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
        out = _attention_of_three(y, (attn.query, attn.key, attn.value), attn.num_attention_heads, scale, count)
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
        watched = _recording(attn) or layers.hooked(block.attention, block.attention.output)
        if watched or not all(layers.plain_linear(part) for part in (attn.query, attn.key, attn.value)):
            return "the attention is watched or adapted"
        if block.training and getattr(attn, "dropout_prob", 0.0):
            return "dropout inside the attention is on"
        return None


LAYOUTS = (Timm, HuggingFace5, HuggingFace4)


def _norms(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.LayerNorm) for name in names)


def _given(argument: object) -> bool:
    return argument is not None and argument is not False


def _either(block: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(block, name) for name in names if getattr(block, name, None) is not None), None)


def _hf_passes(block: nn.Module, attn: nn.Module, args: tuple, kwargs: dict) -> bool:
    """No attention mask, and nobody reads the attention weights (or says so in the configuration)."""
    if any(_given(a) for a in args) or _given(kwargs.get("attention_mask")) or _given(kwargs.get("head_mask")):
        return False
    return not (kwargs.get("output_attentions") or _recording(attn))


def _recording(attn: nn.Module) -> bool:
    """Whether the attention has hooks that want its output now. Those that transformers 5 installs at the first request
    for attention weights stay for good; they collect only while `wants_attentions` is set by the model."""
    hooks = [h for name in ("_forward_hooks", "_forward_pre_hooks") for h in getattr(attn, name).values()]
    return any(getattr(h, "__name__", "") != "output_capturing_hook" or _collecting() for h in hooks)


def _collecting() -> bool:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return True
    collected = _active_collector.get()
    return bool(collected) and "attentions" in collected


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


def _attention_of_three(y: Tensor, parts: tuple[nn.Linear, ...], heads: int, scale: float, count: int | None) -> Tensor:
    """The same from separate projections: one product with their weights side by side."""
    weight = torch.cat([part.weight for part in parts])
    biases = [part.bias for part in parts]
    if all(b is None for b in biases):
        bias = None
    else:
        bias = torch.cat(
            [part.weight.new_zeros(part.out_features) if b is None else b for part, b in zip(parts, biases)]
        )
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
    if not isinstance(x, Tensor) or x.ndim != 3 or not layout.passes(block, args, kwargs):
        return _swap.original(block, "forward")(x, *args, **kwargs)
    return _run(layout, block, x, None).value()


def timm_forward(self: nn.Module, x, *args, **kwargs):
    return _forward(Timm, self, x, args, kwargs)


def hf5_forward(self: nn.Module, hidden_states, *args, **kwargs):
    return _forward(HuggingFace5, self, hidden_states, args, kwargs)


def hf4_forward(self: nn.Module, hidden_states, *args, **kwargs):
    out = _forward(HuggingFace4, self, hidden_states, args, kwargs)
    # Of transformers 4, whose layers return a tuple. What `original` returns is a tuple already.
    return (out,) if isinstance(out, Tensor) and _swap.setting(self, "tuple") else out


FORWARDS = {Timm: timm_forward, HuggingFace5: hf5_forward, HuggingFace4: hf4_forward}


def is_fast(block: nn.Module) -> bool:
    """Whether the block takes `Pending` and `Tail`, and nobody wants to see what it returns on the way."""
    return "forward" in _swap.methods(block) and not layers.hooked(block) and not _swap.is_plain()


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


def run_tail(blocks: nn.ModuleList, x: Tensor, count: int) -> Pending:
    """The last `count` tokens of the output of all blocks."""
    last = blocks[-1] if len(blocks) else None
    if last is None or not is_fast(last) or (getattr(last, "gradient_checkpointing", False) and last.training):
        at = run_blocks(blocks, x)
        return Pending(at.x[:, -count:], None if at.delta is None else at.delta[:, -count:])
    return last(Tail(*run_blocks(blocks[:-1], x), count))


# --- finding ------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module, type]]:
    """(name, block, layout) of every transformer block in the model."""
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None:
            yield name, module, layout


def layout_of(module: nn.Module) -> type | None:
    return next((layout for layout in LAYOUTS if layout.fits(module)), None)


def text(block: nn.Module, layout: type) -> str:
    """What serves the block now, for the report."""
    problem = layout.problem(block)
    return WHAT if problem is None else f"residual + norm, bias + GELU; {problem}, so it runs as it was"


def probe(block: nn.Module, layout: type) -> Tensor:
    """A small input for the comparison with the block's own code."""
    norm = layout.norms(block)[0]
    like = norm.weight if norm.weight is not None else next(block.parameters())
    return torch.randn(2, 6, norm.normalized_shape[-1], device=like.device, dtype=like.dtype)
