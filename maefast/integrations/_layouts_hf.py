"""Layout of the transformer blocks of Hugging Face transformers 5, and of those that name their parts as CLIP does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from maefast.integrations import _hf
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_parts import NOWHERE, Positions

_MLPS = (("fc1", "activation_fn", "fc2"), ("fc1", "activation", "fc2"), ("up_proj", "act_fn", "down_proj"))


class HuggingFace5:
    """layernorm_before, attention (q_proj, k_proj, v_proj, o_proj), layernorm_after, mlp (fc1, activation_fn, fc2); or
    norm1 and norm2, layer scale, a gated MLP. Those under it have other names for some, or positions."""

    name = "transformers 5"
    NORMS = (("norm1", "norm2"), ("layernorm_before", "layernorm_after"))
    ATTENTION = "attention"
    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
    HEADS, SCALE, DROPOUT = "num_attention_heads", "scaling", "attention_dropout"
    ENDS = (("dropout", "layer_scale1", "drop_path"), ("dropout", "layer_scale2", "drop_path"))  # of both branches
    arguments: tuple[str, ...] = ("attention_mask",)
    returns_pair = False

    # --- where things are ---------------------------------------------------------------------------------------

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        attn, mlp = getattr(block, cls.ATTENTION, None), getattr(block, "mlp", None)
        parts = [getattr(attn, name, None) for name in cls.PROJECTIONS]
        # Linear layers, or adapters in their place.
        fits = all(isinstance(part, nn.Module) for part in parts) and cls._names(block) is not None
        return fits and (is_gated(mlp) or _mlp_names(mlp) is not None)

    @classmethod
    def _names(cls, block: nn.Module) -> tuple[str, str] | None:
        return next((names for names in cls.NORMS if common.norms(block, *names)), None)

    @classmethod
    def norms(cls, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        first, second = cls.NORMS[0] if hasattr(block, cls.NORMS[0][0]) else cls.NORMS[-1]
        return getattr(block, first), getattr(block, second)

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        attn = [f"{cls.ATTENTION}.{name}" for name in (*cls.PROJECTIONS, cls.DROPOUT)]
        names = _mlp_names(block.mlp)
        mlp = ["mlp"] if is_gated(block.mlp) else common.live_mlp("mlp", block.mlp, names[1], (names[0], names[2]))
        norms = [name for pair in cls.NORMS for name in pair]
        return frozenset((*norms, *cls.ENDS[0], *cls.ENDS[1], *attn, *mlp))

    @classmethod
    def heads(cls, block: nn.Module) -> int:
        return getattr(getattr(block, cls.ATTENTION), cls.HEADS)

    @classmethod
    def projections(cls, attn: nn.Module) -> list[nn.Module]:
        """Of queries, keys, values and the output."""
        return [getattr(attn, name) for name in cls.PROJECTIONS]

    @classmethod
    def no_kernel(cls, block: nn.Module, length: int = 1) -> str | None:
        """Why the block runs as it was where a call says something about positions, or None."""
        return common.no_kernel(cls.norms(block)[0], cls.heads(block), length)

    # --- when ---------------------------------------------------------------------------------------------------

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        return _hf.passes(args, kwargs)

    @classmethod
    def problem(cls, block: nn.Module) -> str | None:
        attn = getattr(block, cls.ATTENTION)
        if _hf.recorded(attn) or not all(map(layers.plain_linear, cls.projections(attn)[:3])):
            return "the attention is watched or adapted"
        if _hf.own_attention(attn):
            return "the attention is computed by a function that was registered for it"
        if attn.training and getattr(attn, cls.DROPOUT, 0.0):
            return common.DROPS
        if getattr(attn, "num_key_value_groups", 1) != 1:
            return "keys and values have fewer heads than queries"
        return None

    @classmethod
    def activation(cls, block: nn.Module) -> nn.Module | None:
        names = None if layers.hooked(block.mlp) or is_gated(block.mlp) else _mlp_names(block.mlp)
        return None if names is None else getattr(block.mlp, names[1])

    # --- computing ----------------------------------------------------------------------------------------------

    @classmethod
    def attend(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions = NOWHERE) -> Tensor:
        return common.ended(cls.attention(block, y, count, positions), cls.ends(block)[0])

    @classmethod
    def attention(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions) -> Tensor:
        attn = getattr(block, cls.ATTENTION)
        if cls.problem(block):
            out = attn(y, **positions.arguments)[0]
            return out if count is None else out[:, -count:]
        *parts, last = cls.projections(attn)
        heads, scale = getattr(attn, cls.HEADS), getattr(attn, cls.SCALE)
        out = common.attention_of_three(y, tuple(parts), heads, scale, count, positions=positions)
        return layers.linear(last, out)

    @classmethod
    def feed(cls, block: nn.Module, y: Tensor) -> Tensor:
        mlp, act = block.mlp, cls.activation(block)
        if act is None:
            out = mlp(y)
        else:
            first, _, last = _mlp_names(mlp)
            out = layers.mlp(getattr(mlp, first), act, getattr(mlp, last), y)
        return common.ended(out, cls.ends(block)[1])

    @classmethod
    def ends(cls, block: nn.Module) -> tuple[tuple[Any, ...], ...]:
        """What comes behind each branch: modules, factors or None."""
        return common.ends(block, cls.ENDS)

    @classmethod
    def whole(cls, block: nn.Module, positions: Positions = NOWHERE) -> common.Whole | None:
        attn, mlp, act = getattr(block, cls.ATTENTION), block.mlp, cls.activation(block)
        ends = cls.ends(block)
        if act is None or cls.problem(block) is not None or common.has_numbers(ends):
            return None
        first, second = cls.norms(block)
        *parts, last = cls.projections(attn)
        fc1, _, fc2 = _mlp_names(mlp)
        return common.Whole(
            first,
            tuple(part.weight for part in parts),
            tuple(part.bias for part in parts),
            last,
            second,
            getattr(mlp, fc1),
            getattr(mlp, fc2),
            getattr(attn, cls.HEADS),
            getattr(attn, cls.SCALE),
            act,
            ends,
            positions,
        )


class Siglip(HuggingFace5):
    """layer_norm1, self_attn (q_proj, k_proj, v_proj, out_proj), layer_norm2, mlp: SigLIP, CLIP and their kin."""

    name = "transformers CLIP"
    NORMS = (("layer_norm1", "layer_norm2"),)
    ATTENTION = "self_attn"
    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
    HEADS, SCALE, DROPOUT = "num_heads", "scale", "dropout"
    ENDS = ((), ())

    @classmethod
    def calls(cls, block: nn.Module, x: Tensor) -> list[tuple[Tensor, dict]]:
        return [(x, {"attention_mask": None})]  # it has no default


def is_gated(mlp: nn.Module | None) -> bool:
    """A gated MLP (Shazeer, 2020), which is called as it is."""
    return all(isinstance(getattr(mlp, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))


def _mlp_names(mlp: nn.Module | None) -> tuple[str, str, str] | None:
    for names in _MLPS:
        first, act, last = (getattr(mlp, name, None) for name in names)
        if isinstance(first, nn.Module) and isinstance(last, nn.Module) and callable(act):
            return names
    return None
