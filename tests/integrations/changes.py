"""What people do to a model after it is accelerated: `CHANGES`, each for every family that has a place for it."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map_only

import maefast
from tests.integrations.common import Drawing, DropIn, tensors
from tests.integrations.place import Places
from tests.integrations.places import PLACES
from tests.integrations.test_adapters import Adapter

Apply = Callable[[nn.Module, Places, DropIn], list | None]


class Change(NamedTuple):
    """`apply` changes a model, and returns a list that fills with what hooks see, or None. how: "step" (with
    gradients), "functional" (with other parameters), "inference" (without gradients)."""

    name: str
    apply: Apply
    how: str = "step"


def _blocks(model: nn.Module, places: Places) -> nn.Module:
    return model.get_submodule(places.blocks)


def _in_block(model: nn.Module, places: Places, path: str, index: int = 0) -> nn.Module:
    return _blocks(model, places)[index].get_submodule(path)


def _put(model: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)


def swapped(model, places, family):
    """For one that was never accelerated."""
    blocks = _blocks(model, places)
    new = maefast.restore(copy.deepcopy(blocks[0]))
    with torch.no_grad():
        for p in new.parameters():
            p.mul_(-0.7).add_(0.05)
    blocks[0] = new


def deleted(model, places, family):
    del _blocks(model, places)[0]


def tied(model, places, family):
    blocks = _blocks(model, places)
    blocks[1] = blocks[0]


def other_norm(model, places, family):
    _in_block(model, places, places.norm).eps = 0.1


def other_activation(model, places, family):
    _put(_blocks(model, places)[0], places.act, nn.SiLU())


def frozen(model, places, family):
    model.get_submodule(places.encoder).requires_grad_(False)


def _scaled(out):
    return tree_map_only(Tensor, lambda t: t * 1.5, out)


def hook_on_a_block(model, places, family):
    seen = []
    block = _blocks(model, places)[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.register_forward_hook(lambda module, args, out: seen.append(out) or _scaled(out))
    return seen


def hook_on_queries(model, places, family):
    seen = []
    part = _in_block(model, places, places.query)
    part.register_forward_hook(lambda module, args, out: seen.extend((*args, out)) or _scaled(out))
    part.register_full_backward_hook(lambda module, gi, go: tuple(None if g is None else g * 2 for g in gi))
    return seen


def adapter(model, places, family):
    torch.manual_seed(5)
    block = _blocks(model, places)[0]
    _put(block, places.query, Adapter(block.get_submodule(places.query)))


def parametrised(model, places, family):
    part = parametrizations.weight_norm(_in_block(model, places, places.query))
    with torch.no_grad():
        part.parametrizations.weight.original0.mul_(1.5)


LAYERS = nn.Linear, nn.LayerNorm, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm


def _draw(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> None:
    for part in [part for part in model.modules() if chosen(part)]:
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                parametrize.register_parametrization(part, name, Drawing())


def drawing_layers(model, places, family):
    _draw(model, lambda part: isinstance(part, LAYERS[:2]))


def drawing_others(model, places, family):
    """Tokens, positions, factors of layer scale, biases that stand in no layer."""
    _draw(model, lambda part: not isinstance(part, LAYERS))


def pruned(model, places, family):
    prune.l1_unstructured(_in_block(model, places, places.query), "weight", 0.5)


def no_bias(model, places, family):
    conv = model.get_submodule(places.conv)
    assert conv.bias is not None
    conv.bias = None


def checkpointed(model, places, family):
    if places.checkpoint is not None:
        places.checkpoint(model)
        return
    blocks = _blocks(model, places)
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)


def _nothing(model, places, family):
    return None


CHANGES = (
    Change("block swapped", swapped),
    Change("block deleted", deleted),
    Change("block tied", tied),
    Change("norm_pix_loss", lambda model, places, family: places.normalise(model)),
    Change("mask ratio", lambda model, places, family: places.ratio(model, family)),
    Change("eps", other_norm),
    Change("activation", other_activation),
    Change("encoder frozen", frozen),
    Change("hook on a block", hook_on_a_block),
    Change("hook on queries", hook_on_queries),
    Change("adapter", adapter),
    Change("parametrised", parametrised),
    Change("layers that draw", drawing_layers),
    Change("parameters that draw", drawing_others),
    Change("pruned", pruned),
    Change("convolution without bias", no_bias),
    Change("gradient checkpointing", checkpointed),
    Change("functional call", _nothing, "functional"),
    Change("inference mode", _nothing, "inference"),
)


def cases() -> Iterator[tuple[str, Change]]:
    """Every family with every change that it has a place for."""
    for name, places in PLACES.items():
        assert set(places.without) <= {change.name for change in CHANGES}, name
        for change in CHANGES:
            if change.name not in places.without:
                yield name, change


def outcome(family: DropIn, model: nn.Module, how: str = "step", seen: list | None = None) -> tuple:
    """Outputs, what hooks saw, gradients by name and the state of the generator after one call in float64."""
    torch.manual_seed(2)
    args, kwargs = family.inputs(torch.float64)
    torch.manual_seed(1)
    random.seed(4)  # FCMAE draws there
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a guard failed
        if how == "inference":
            with torch.inference_mode():
                out = model(*args, **kwargs)
            return tensors(out), [], {}, torch.get_rng_state()
        named = dict(model.named_parameters())
        if how == "functional":
            named = {name: (p.detach() * 1.1).requires_grad_(p.requires_grad) for name, p in named.items()}
            out = torch.func.functional_call(model, named, args, kwargs)
        else:
            out = model(*args, **kwargs)
        state = torch.get_rng_state()
        watched = tensors(list(seen or ()))
        family.loss(out).backward()
    return tensors(out), watched, {name: p.grad for name, p in named.items()}, state
