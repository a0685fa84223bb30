"""Layout of timm's transformer blocks, and of the MAE, VideoMAE, DeiT, JEPA and lightly code that follows it."""

from __future__ import annotations

from torch import Tensor, nn

from maefast.integrations import _attentions as attentions
from maefast.integrations import _code, _hf, _swap
from maefast.integrations import _layers as layers
from maefast.integrations import _layouts_parts as common
from maefast.integrations._layouts_parts import NOWHERE, Positions


class Timm:
    """norm1, attn (qkv or q, k and v, proj, num_heads), norm2, mlp (fc1, act, fc2); maybe drop_path, layer scale, q and
    v biases."""

    name = "timm"
    # (attributes that the forward of a part must use, those that it may use) to be computed by us. Any other attribute
    # may be a switch that changes what it computes.
    BLOCK = (
        {"norm1", "attn", "norm2", "mlp"},
        {"training", "drop_path", "drop_path1", "drop_path2", "ls1", "ls2", "gamma_1", "gamma_2"},
    )
    MLP = {"fc1", "act", "fc2"}, {"training", "drop", "drop1", "drop2", "norm"}
    # What we look at, at every call; the rest of what they use is guarded.
    LIVE = ("norm1", "norm2", "drop_path", "drop_path1", "drop_path2", "ls1", "ls2", "gamma_1", "gamma_2")
    LIVE_MLP = ("fc1", "fc2", "drop", "drop1", "drop2", "norm")
    AMONG = attentions.SELF  # the projections that an attention may have
    ATTENTION: frozenset[str] = frozenset()  # further attributes that its forward may use

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        parts = attentions.projections(getattr(block, "attn", None), cls.AMONG)
        fits = parts is not None and common.norms(block, "norm1", "norm2")
        return fits and isinstance(getattr(block, "mlp", None), nn.Module)

    @staticmethod
    def unknown(block: nn.Module) -> str | None:
        """Why the block's own forward is kept whatever it computes now, or None."""
        found = _code.beyond(block, *Timm.BLOCK)
        return None if not found else f"its forward uses {found}, which maefast does not know"

    @classmethod
    def beyond(cls, attn: nn.Module) -> str:
        """What of an attention we do not know, for the report."""
        return attentions.beyond(attn, cls.AMONG, cls.ATTENTION)

    @classmethod
    def settings(cls, block: nn.Module) -> dict:
        """Kept on the block: the classes of attention and MLP whose forward we know; others are called as they are."""
        known = {"attn": attentions.known(block.attn, cls.AMONG, cls.ATTENTION), "mlp": known_mlp(block.mlp)}
        # V-JEPA hands down a mask that its attention never looks at.
        known["ignored"] = ("mask",) if known["attn"] and _code.ignores(block.attn, "mask") else ()
        return known

    @classmethod
    def live(cls, block: nn.Module, settings: dict) -> frozenset[str]:
        attn = attentions.live("attn", block.attn, settings["attn"])
        return frozenset((*cls.LIVE, *attn, *live_mlp(block.mlp, settings["mlp"])))

    @classmethod
    def passes(cls, block: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call with these further arguments is the plain one."""
        known = _swap.setting(block, "attn")
        ignored = _swap.setting(block, "ignored", ()) if known and type(block.attn) is known.kind else ()
        return not any(_hf.given(a) for a in args) and not any(
            _hf.given(v) for k, v in kwargs.items() if k not in ignored
        )

    @staticmethod
    def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    @classmethod
    def attend(cls, block: nn.Module, y: Tensor, count: int | None, positions: Positions = NOWHERE) -> Tensor:
        attn = block.attn
        if cls.problem(block):
            out = attn(y, **positions.arguments)
            out = out[0] if isinstance(out, tuple) else out
            out = out if count is None else out[:, -count:]
        else:
            out = attentions.attend(attn, _swap.setting(block, "attn"), y, count, positions)
        gamma = getattr(block, "gamma_1", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls1", None), common.either(block, "drop_path1", "drop_path"))

    @classmethod
    def whole(cls, block: nn.Module, positions: Positions = NOWHERE) -> common.Whole | None:
        attn, mlp, act = block.attn, block.mlp, cls.activation(block)
        if act is None or cls.problem(block) is not None:
            return None
        known = _swap.setting(block, "attn")
        path1, path2 = common.either(block, "drop_path1", "drop_path"), common.either(block, "drop_path2", "drop_path")
        gamma1, gamma2 = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
        return common.Whole(
            block.norm1,
            *attentions.weights(attn, known),
            attn.proj,
            block.norm2,
            mlp.fc1,
            mlp.fc2,
            attn.num_heads,
            attentions.scale(attn, known),
            act,
            (
                (getattr(attn, "proj_drop", None), gamma1, getattr(block, "ls1", None), path1),
                (gamma2, getattr(block, "ls2", None), path2),
            ),
            positions,
        )

    @classmethod
    def problem(cls, block: nn.Module) -> str | None:
        """Why the attention is called as it is, or None where it is fused."""
        return attentions.problem(block.attn, _swap.setting(block, "attn"))

    @staticmethod
    def activation(block: nn.Module) -> nn.Module | None:
        """The activation of an MLP whose layers are run one by one; None where the MLP is called as it is."""
        return activation(block.mlp, _swap.setting(block, "mlp"))

    @staticmethod
    def feed(block: nn.Module, y: Tensor) -> Tensor:
        out = feed(block.mlp, Timm.activation(block), y)
        gamma = getattr(block, "gamma_2", None)
        out = out if gamma is None else gamma * out
        return layers.then(out, getattr(block, "ls2", None), common.either(block, "drop_path2", "drop_path"))


# --- MLPs of (fc1, act, fc2), in other blocks too ------------------------------------------------------------


def known_mlp(mlp: nn.Module) -> type | None:
    """The class of an MLP whose forward we know."""
    return None if _code.beyond(mlp, *Timm.MLP) or common.is_gated(mlp) else type(mlp)


def live_mlp(mlp: nn.Module, known: type | None) -> list[str]:
    """Dotted names of what is read of it at every call; all of one that is called as it is."""
    return common.live_mlp("mlp", mlp, "act", Timm.LIVE_MLP) if known else ["mlp"]


def activation(mlp: nn.Module, known: type | None) -> nn.Module | None:
    """The activation of an MLP whose layers are run one by one; None where it is called as it is."""
    inner = [getattr(mlp, name, None) for name in ("drop", "drop1", "drop2", "norm")]
    runs = type(mlp) is known and not layers.hooked(mlp)
    return mlp.act if runs and all(layers.still(part) for part in inner) else None


def feed(mlp: nn.Module, act: nn.Module | None, y: Tensor) -> Tensor:
    """Through an MLP, whose `activation` this is."""
    return mlp(y) if act is None else layers.mlp(mlp.fc1, act, mlp.fc2, y)
