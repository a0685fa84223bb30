"""What the families of Hugging Face transformers, 4 and 5, share: call conventions, and how outputs are recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from maefast.integrations import _swap
from maefast.integrations._guards import HOOKS, warn_once

# Arguments that change nothing in a vision model's arithmetic. `Trainer` sends the number of items to whoever takes it.
HARMLESS = frozenset(("output_hidden_states", "output_attentions", "return_dict", "use_cache", "num_items_in_batch"))

# Of a model and its configuration, read by `usual_call` at every call.
LIVE = frozenset(("config.return_dict", "config.output_hidden_states", "config.output_attentions", "config.is_causal"))
LIVE |= {"config.use_return_dict", "_output_capturing_hooks_installed", "gradient_checkpointing"}

_moved = WeakIdKeyDictionary()


def given(argument: object) -> bool:
    return argument is not None and argument is not False


def harmless(kwargs: dict) -> bool:
    return not any(given(v) for k, v in kwargs.items() if k not in HARMLESS)


def passes(args: tuple, kwargs: dict) -> bool:
    """Whether a layer is called with no attention mask and nothing unknown, and nobody asks for attention weights."""
    return not any(given(a) for a in args) and harmless(kwargs) and not kwargs.get("output_attentions")


def usual_call(model: nn.Module, kwargs: dict) -> bool:
    """Whether a model is asked for its usual output: no masks, hidden states or attentions, nothing unknown."""
    config = model.config
    if not harmless(kwargs) or not getattr(config, "return_dict", True) or getattr(config, "is_causal", None):
        return False
    wanted = {
        key: kwargs.get(key, getattr(config, key, False)) for key in ("output_hidden_states", "output_attentions")
    }
    if wanted["output_attentions"]:
        warn_once(
            "attention weights are asked for: the layers that return them run their own attention, not fused kernels"
        )
    if any(map(given, wanted.values())):
        return False
    return not (getattr(model, "_output_capturing_hooks_installed", False) and collecting())


def answer(output: Any, kwargs: dict) -> Any:
    """A ModelOutput, or a tuple for ``return_dict=False``."""
    return output.to_tuple() if kwargs.get("return_dict") is False else output


def output_class(module: nn.Module, name: str) -> type | None:
    """The class `name` that is known where the module's forward was written, or one that it overrides."""
    for kind in type(module).__mro__:
        found = getattr(inspect.unwrap(vars(kind).get("forward", kind)), "__globals__", {}).get(name)
        if found is not None:
            return found
    return None


def inner(module: nn.Module) -> nn.Module:
    """The module itself, without FSDP's and torch.compile's wrappers."""
    for name in ("_fsdp_wrapped_module", "_orig_mod"):
        module = getattr(module, name, module)
    return module


def moved(table: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A constant table from outside the state dict, where `like` is: copied to a device once, not at every step."""
    if table.device == like.device or torch.compiler.is_compiling():
        return table.detach().to(like.device, dtype)
    key, version = (like.device, dtype), table._version
    copies = _moved.setdefault(table, {})
    if copies.get(key, (None,))[0] != version:
        copies[key] = (version, table.detach().to(like.device, dtype))
    return copies[key][1]


def own_attention(attn: nn.Module) -> bool:
    """Whether the model runs an attention function of somebody else's, registered with transformers under a name."""
    name = getattr(getattr(attn, "config", None), "_attn_implementation", None)
    return name not in (None, "eager", "sdpa", "flex_attention") and not str(name).startswith("flash_attention")


def weightless(attn: nn.Module) -> bool:
    """Whether the attention function of a model computes no weights that its layers could return."""
    name = str(getattr(getattr(attn, "config", None), "_attn_implementation", None))
    return name == "sdpa" or name.startswith("flash_attention")


# --- recording ----------------------------------------------------------------------------------------------


def recorded(module: nn.Module) -> bool:
    """Whether somebody wants to see what `module` returns now.

    transformers 4 records with a forward of the object's own, for the time of a call. The hooks of transformers 5 stay
    for good after the first request, and collect only while a model says so.
    """
    if _swap.around(module, "forward"):
        return True
    return any(not _idle(hook) for name in HOOKS for hook in getattr(module, name).values())


def _idle(hook: Callable) -> bool:
    """Whether this is a hook of transformers 5 that does not collect now."""
    if getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    names, cells = hook.__code__.co_freevars, hook.__closure__ or ()
    return not collecting(dict(zip(names, cells))["key"].cell_contents if "key" in names else "")


def collecting(key: str = "") -> bool:
    """Whether a model of transformers 5 collects outputs now (of this kind)."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return True
    collected = _active_collector.get()
    return bool(collected) and (not key or key in collected)
