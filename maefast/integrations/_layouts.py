"""Layouts of pre-norm transformer blocks: where a block keeps its parts, and when each of them may be fused.

A layout is a class of static functions of a block: `fits` (is it one), `norms`, `attend` (the first branch, from the
normed tokens to what is added to them; `count` asks for the last tokens only), `feed` (the second), `whole` (the block
as one op, if all of its parts are what they look like), `passes` (whether a call with further arguments is the plain
one), `problem` (why the attention runs as it was).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maefast import ops
from maefast.integrations import _code, _hf, _swap
from maefast.integrations import _layers as layers


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
    scale: float
    act: nn.Module
    ends: tuple[tuple[Tensor | nn.Module | None, ...], ...]  # of both branches: factors and modules, or None

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
        )


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
    # What we look at, at every call; the rest of what they use is guarded.
    LIVE = ("norm1", "norm2", "drop_path", "drop_path1", "drop_path2", "ls1", "ls2", "gamma_1", "gamma_2")
    LIVE_ATTENTION = ("qkv", "proj", "attn_drop", "proj_drop", "proj_drop_prob")
    LIVE_ATTENTION += ("q_norm", "k_norm", "norm", "gate", "q_bias", "v_bias")
    LIVE_MLP = ("fc1", "fc2", "drop", "drop1", "drop2", "norm")

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn = getattr(block, "attn", None)
        parts = (getattr(attn, "qkv", None), getattr(attn, "proj", None))  # adapters may stand in their place
        fits = all(isinstance(part, nn.Module) for part in parts) and _norms(block, "norm1", "norm2")
        return fits and isinstance(getattr(block, "mlp", None), nn.Module)

    @staticmethod
    def unknown(block: nn.Module) -> str | None:
        """Why the block's own forward is kept whatever it computes now, or None."""
        found = _code.beyond(block, *Timm.BLOCK)
        return None if not found else f"its forward uses {found}, which maefast does not know"

    @staticmethod
    def settings(block: nn.Module) -> dict:
        """Kept on the block: the classes of attention and MLP whose forward we know; others are called as they are."""
        attn, mlp = block.attn, block.mlp
        known = {
            "attn": None if _code.beyond(attn, *Timm.ATTENTION) else type(attn),
            "mlp": None if _code.beyond(mlp, *Timm.MLP) or _is_gated(mlp) else type(mlp),
        }
        # V-JEPA hands down a mask that its attention never looks at.
        known["ignored"] = ("mask",) if known["attn"] and _code.ignores(attn, "mask") else ()
        return known

    @staticmethod
    def live(block: nn.Module, settings: dict) -> frozenset[str]:
        attn = [f"attn.{name}" for name in Timm.LIVE_ATTENTION] if settings["attn"] else ["attn"]
        if isinstance(getattr(block.attn, "scale", None), Tensor):  # learned: the attention is called
            attn.append("attn.scale")
        mlp = _live_mlp("mlp", block.mlp, "act", Timm.LIVE_MLP) if settings["mlp"] else ["mlp"]
        return frozenset((*Timm.LIVE, *attn, *mlp))

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
    def whole(block: nn.Module) -> Whole | None:
        attn, mlp, act = block.attn, block.mlp, Timm.activation(block)
        if act is None or Timm.problem(block) is not None:
            return None
        q_bias = getattr(attn, "q_bias", None)
        path1, path2 = _either(block, "drop_path1", "drop_path"), _either(block, "drop_path2", "drop_path")
        gamma1, gamma2 = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
        return Whole(
            block.norm1,
            attn.qkv.weight,
            attn.qkv.bias if q_bias is None else (q_bias, None, attn.v_bias),  # VideoMAE: keys have no bias
            attn.proj,
            block.norm2,
            mlp.fc1,
            mlp.fc2,
            attn.num_heads,
            attn.scale,
            act,
            (
                (getattr(attn, "proj_drop", None), gamma1, getattr(block, "ls1", None), path1),
                (gamma2, getattr(block, "ls2", None), path2),
            ),
        )

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
        # Some hold a rate in the place of this dropout, some take its rate and ask the attention whether it trains.
        drop = getattr(attn, "attn_drop", None)
        if not layers.still(drop) or (attn.training and getattr(drop, "p", 0) > 0):
            return DROPS
        if getattr(attn, "proj_drop_prob", 0) > 0:  # V-JEPA drops with it inside, in evaluation too
            return DROPS
        return None

    @staticmethod
    def activation(block: nn.Module) -> nn.Module | None:
        """The activation of an MLP whose layers are run one by one; None where the MLP is called as it is."""
        mlp = block.mlp
        inner = [getattr(mlp, name, None) for name in ("drop", "drop1", "drop2", "norm")]
        known = type(mlp) is _swap.setting(block, "mlp") and not layers.hooked(mlp)
        return mlp.act if known and all(layers.still(part) for part in inner) else None

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        mlp, act = block.mlp, Timm.activation(block)
        out = mlp(y) if act is None else layers.mlp(mlp.fc1, act, mlp.fc2, y)
        gamma = getattr(block, "gamma_2", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls2", None), _either(block, "drop_path2", "drop_path"))


DROPS = "dropout inside the attention is on"


class HuggingFace5:
    """layernorm_before, attention (q_proj, k_proj, v_proj, o_proj), layernorm_after, mlp (fc1, activation_fn, fc2)."""

    name = "transformers 5"
    LIVE = ("norm1", "norm2", "layernorm_before", "layernorm_after", "dropout", "layer_scale1", "layer_scale2")
    LIVE_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "attention_dropout")

    @staticmethod
    def live(block: nn.Module, settings: dict) -> frozenset[str]:
        attn = [f"attention.{name}" for name in HuggingFace5.LIVE_ATTENTION]
        mlp = _live_mlp("mlp", block.mlp, "activation_fn", ("fc1", "fc2"))
        return frozenset((*HuggingFace5.LIVE, "drop_path", *attn, *mlp))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn, mlp = getattr(block, "attention", None), getattr(block, "mlp", None)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        parts = [getattr(attn, name, None) for name in names]
        parts += [getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)]
        # Linear layers, or adapters in their place.
        return all(isinstance(part, nn.Module) for part in parts) and _norms(block, *HuggingFace5._names(block))

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
        mlp, act = block.mlp, HuggingFace5.activation(block)
        out = mlp(y) if act is None else layers.mlp(mlp.fc1, act, mlp.fc2, y)
        return layers.then(out, *(getattr(block, name, None) for name in ("dropout", "layer_scale2", "drop_path")))

    @staticmethod
    def whole(block: nn.Module) -> Whole | None:
        attn, mlp, act = block.attention, block.mlp, HuggingFace5.activation(block)
        if act is None or HuggingFace5.problem(block) is not None:
            return None
        first, second = HuggingFace5.norms(block)
        dropout, path = getattr(block, "dropout", None), getattr(block, "drop_path", None)
        parts = attn.q_proj, attn.k_proj, attn.v_proj
        return Whole(
            first,
            tuple(part.weight for part in parts),
            tuple(part.bias for part in parts),
            attn.o_proj,
            second,
            mlp.fc1,
            mlp.fc2,
            attn.num_attention_heads,
            attn.scaling,
            act,
            (
                (dropout, getattr(block, "layer_scale1", None), path),
                (dropout, getattr(block, "layer_scale2", None), path),
            ),
        )

    @staticmethod
    def activation(block: nn.Module) -> nn.Module | None:
        return None if layers.hooked(block.mlp) else getattr(block.mlp, "activation_fn", None)

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        attn = block.attention
        if _hf.recorded(attn) or not all(layers.plain_linear(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj)):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if block.training and getattr(attn, "attention_dropout", 0.0):
            return DROPS
        if getattr(attn, "num_key_value_groups", 1) != 1:
            return "keys and values have fewer heads than queries"
        return None


class HuggingFace4:
    """attention.attention (query, key, value), attention.output.dense, intermediate.dense, output.dense; VideoMAE in
    transformers 5 too."""

    name = "transformers 4"
    LIVE = ("layernorm_before", "layernorm_after", "attention.output.dense", "attention.output.dropout")
    LIVE += ("output.dense", "output.dropout")
    LIVE_ATTENTION = ("query", "key", "value", "dropout", "dropout_prob", "q_bias", "v_bias")

    @staticmethod
    def live(block: nn.Module, settings: dict) -> frozenset[str]:
        attn = [f"attention.attention.{name}" for name in HuggingFace4.LIVE_ATTENTION]
        mlp = _live_mlp("intermediate", block.intermediate, "intermediate_act_fn", ("dense",))
        return frozenset((*HuggingFace4.LIVE, *attn, *mlp))

    @staticmethod
    def fits(block: nn.Module) -> bool:
        attn = getattr(getattr(block, "attention", None), "attention", None)
        dense = [getattr(getattr(block, name, None), "dense", None) for name in ("intermediate", "output")]
        dense.append(getattr(getattr(getattr(block, "attention", None), "output", None), "dense", None))
        parts = [getattr(attn, name, None) for name in ("query", "key", "value")] + dense
        if not all(isinstance(part, nn.Module) for part in parts):  # linear layers, or adapters in their place
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
        first, last, act = block.intermediate, block.output, HuggingFace4.activation(block)
        out = layers.linear(last.dense, first(y)) if act is None else layers.mlp(first.dense, act, last.dense, y)
        return layers.then(out, last.dropout)

    @staticmethod
    def whole(block: nn.Module) -> Whole | None:
        attn, output, act = block.attention.attention, block.attention.output, HuggingFace4.activation(block)
        if act is None or HuggingFace4.problem(block) is not None:
            return None
        parts = attn.query, attn.key, attn.value
        biases = [part.bias for part in parts]
        if getattr(attn, "q_bias", None) is not None:  # VideoMAE: keys have no bias
            biases = [attn.q_bias, None, attn.v_bias]
        return Whole(
            block.layernorm_before,
            tuple(part.weight for part in parts),
            tuple(biases),
            output.dense,
            block.layernorm_after,
            block.intermediate.dense,
            block.output.dense,
            attn.num_attention_heads,
            getattr(attn, "scaling", attn.attention_head_size**-0.5),
            act,
            ((output.dropout,), (block.output.dropout,)),
        )

    @staticmethod
    def activation(block: nn.Module) -> nn.Module | None:
        return None if layers.hooked(block.intermediate) else block.intermediate.intermediate_act_fn

    @staticmethod
    def problem(block: nn.Module) -> str | None:
        attn = block.attention.attention
        watched = _hf.recorded(attn) or layers.hooked(block.attention, block.attention.output)
        if watched or not all(layers.plain_linear(part) for part in (attn.query, attn.key, attn.value)):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if (block.training and getattr(attn, "dropout_prob", 0.0)) or not layers.still(getattr(attn, "dropout", None)):
            return DROPS
        return None


LAYOUTS = (Timm, HuggingFace5, HuggingFace4)


def _norms(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.LayerNorm) for name in names)


def _is_gated(mlp: nn.Module) -> bool:
    """A SwiGLU in timm's packed layout has the names of a plain MLP, but halves the width in between."""
    wide, narrow = getattr(mlp.fc1, "out_features", None), getattr(mlp.fc2, "in_features", None)
    return None not in (wide, narrow) and wide != narrow


def _live_mlp(path: str, mlp: nn.Module, act: str, names: tuple[str, ...]) -> list[str]:
    """A GELU is passed over, so it is guarded; another activation is called."""
    called = () if layers.gelu(getattr(mlp, act, None)) is not None else (act,)
    return [f"{path}.{name}" for name in (*names, *called)]


def _either(block: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(block, name) for name in names if getattr(block, name, None) is not None), None)


def _hf_passes(args: tuple, kwargs: dict) -> bool:
    """No attention mask, nothing unknown, and nobody asks for the attention weights."""
    return not any(_hf.given(a) for a in args) and _hf.harmless(kwargs) and not kwargs.get("output_attentions")


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
