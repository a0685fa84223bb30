"""Why parts of a model run as they were, in the model's own names, for the report: nothing is decided here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from maefast.integrations import _layers as layers
from maefast.integrations import _swap

GAIN = "fused attention, residual + norm, bias + GELU"  # of a block
_ATTENTIONS = ("attn", "attention.attention", "attention", "self_attn", "self_attention", "mixer")
_MLPS = ("mlp", "intermediate", "ffn", "feed_forward", "fc", "linear1")
_PROJECTIONS = ({"qkv", "proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"query", "key", "value"})
_PRODUCTS = "of the block's products with weights"


def _first(block: nn.Module, paths: tuple[str, ...]) -> tuple[str, nn.Module | None]:
    """The first of these parts that a block has."""
    for path in paths:
        part: object = block
        for name in path.split("."):
            part = getattr(part, name, None)
        if isinstance(part, nn.Module):
            return path, part
    return "", None


def attention(block: nn.Module, layout: type, problem: str) -> str:
    """The problem of a block's attention, with the part that is to blame, and what share of the block that is."""
    path, attn = _first(block, _ATTENTIONS)
    if attn is None:
        return f"attention as it was, because {problem}"
    blamed = _blamed(path, attn, layout, problem)
    return f"attention as it was{_share(block, attn)}, because {problem}{f' ({blamed})' if blamed else ''}"


def mlp(block: nn.Module) -> str:
    """Of a block whose MLP is called."""
    path, part = _first(block, _MLPS)
    share = "" if part is None else _share(block, part)
    if part is None or not share:
        return "MLP as it was"
    if layers.hooked(part):
        return f"MLP as it was{share}, because {path} has hooks"
    for name in ("norm", "drop", "drop1", "drop2"):
        inner = getattr(part, name, None)
        if isinstance(inner, nn.Module) and not layers.still(inner):
            return f"MLP as it was{share}, because of {path}.{name}, {_a(inner)}"
    return f"MLP as it was{share}, because maefast does not know {path}, {_a(part)}"


def _share(block: nn.Module, part: nn.Module) -> str:
    """How many of the multiplications with weights of linear layers a part of a block has; those of queries with keys
    depend on the tokens."""
    mine, all_ = (sum(m.weight.numel() for m in parts.modules() if _linear(m)) for parts in (part, block))
    return f" ({mine / all_:.0%} {_PRODUCTS})" if mine else ""


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module.weight, "ndim", 0) == 2


def _blamed(path: str, attn: nn.Module, layout: type, problem: str) -> str:
    """What in the attention has this problem, or ""."""
    if "normalises" in problem:
        found = [name for name in ("q_norm", "k_norm", "norm") if not layers.still(getattr(attn, name, None))]
        return ", ".join(f"{path}.{name} is {_a(getattr(attn, name))}" for name in found)
    if "watched or adapted" in problem:
        if layers.hooked(attn):
            return f"{path} has hooks"
        return next(iter(_strange(path, attn)), "")
    if "does not know" in problem:
        if overrides := _swap.overriding(attn, "forward"):
            return f"{path} is {_a(attn)}: {overrides}"
        beyond = layout.beyond(attn) if hasattr(layout, "beyond") else ""
        return f"{path} is {_a(attn)}" + (f", whose forward uses {beyond}" if beyond else "")
    for name in ("gate", "scale"):
        value = getattr(attn, name, None)
        if name in problem and value is not None:
            return f"{path}.{name} is {_a(value)}"
    if "dropout" in problem:
        for name in ("attn_drop", "dropout", "attention_dropout", "dropout_prob", "proj_drop_prob"):
            rate = getattr(attn, name, None)
            rate = getattr(rate, "p", rate)
            if isinstance(rate, float) and rate > 0:
                return f"{path}.{name} has a rate of {rate:g}"
    return ""


def _strange(path: str, attn: nn.Module) -> Iterator[str]:
    """Projections that are no plain Linear."""
    for name, part in attn.named_children():
        if layers.plain_linear(part) or not any(p.ndim == 2 for p in part.parameters()):
            continue
        if type(part) is not nn.Linear:
            yield f"{path}.{name} is {_a(part)}"
        elif layers.hooked(part):
            yield f"{path}.{name} has hooks"
        else:
            yield f"the weight of {path}.{name} is {_a(part.weight)}"


def raised(own: bool, error: Exception) -> str:
    """What an error of one of the two that are compared says; its traceback is a detail. The model's own code runs
    first: what it does not take is a fault of the input that was made up for it."""
    if not own:
        return f"the accelerated code raised {_a(error)}"
    missing = re.search(r"missing \d+ required .*arguments?: (.*)", str(error))
    if missing and isinstance(error, TypeError):
        names = ", ".join(re.findall(r"'(\w+)'", missing[1]))
        return f"its code takes arguments that maefast does not know ({names}), so nothing was compared"
    return f"its own code raised {_a(error)} on an input that maefast made up, so nothing was compared"


def _a(thing: object) -> str:
    name = type(thing).__name__
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def near(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, why it is not served) of parts that look like transformer blocks, where nothing is served."""
    done: set[type] = set()
    for path, module in model.named_modules():
        (at, attn), (_, inner) = _first(module, _ATTENTIONS), _first(module, _MLPS)
        if attn is None or inner is None or not path or type(module) in done:
            continue
        done.add(type(module))
        yield path, f"{type(module).__name__} looks like a transformer block, but {_misfit(module, at, attn, inner)}"


def _misfit(block: nn.Module, at: str, attn: nn.Module, inner: nn.Module) -> str:
    norms = [(name, part) for name, part in block.named_children() if "norm" in f"{name} {type(part).__name__}".lower()]
    for name, part in norms:
        if not isinstance(part, nn.LayerNorm):
            return f"its {name} is {_a(part)}, and maefast knows LayerNorm"
    if len(norms) != 2:
        return f"it has {len(norms) or 'no'} norms ({', '.join(name for name, _ in norms)}), and maefast knows two"
    cosine = next((name for name, _ in attn.named_parameters() if name.endswith("logit_scale")), None)
    if cosine is not None:  # Swin V2
        return f"its {at}, {_a(attn)}, compares queries with keys by their cosine ({cosine}), and maefast does not"
    children = {name for name, _ in attn.named_children()}
    if not any(known <= children for known in _PROJECTIONS):
        known = "; ".join(", ".join(sorted(names)) for names in _PROJECTIONS)
        return f"its {at}, {_a(attn)}, has none of the projections that maefast knows ({known})"
    within = ", ".join(name for name, _ in inner.named_children())
    other = f"{_a(inner)} of {within}" if within else _a(inner)
    return f"no layout that maefast knows has {' and '.join(name for name, _ in norms)} with {other}"
