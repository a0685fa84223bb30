"""`--fsdp`: parameters, gradients and optimizer state in shards, one for each process (FSDP2; Zhao et al., 2023,
arXiv:2304.11277).

Each transformer block is gathered when it is computed, what lies outside of them for the whole step. Buffers, tables
and running averages, which nothing trains, stay whole on each process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from maefast.errors import ConfigError
from maefast.nn import Block
from maefast.recipe import Recipe, View

from .config import PretrainConfig


class Found(NamedTuple):
    """Of an `Output`, what a step needs."""

    loss: Tensor
    terms: Mapping[str, Tensor]


class Objective(nn.Module):
    """A recipe as FSDP wraps it: it looks for the tensors that a forward returns, and finds none in an `Output`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, view: View) -> Found:
        output = self.recipe(view)
        return Found(output.loss, dict(output.terms))


def problem(config: PretrainConfig, processes: int) -> str | None:
    """Why a run cannot be sharded, or None."""
    if processes < 2:
        return "there is one process: start several, as torchrun --nproc-per-node 8 -m maefast.cli pretrain ..."
    if config.amp == "fp16":
        return "fp16 needs a gradient scaler that sees all gradients; --amp bf16 needs none"
    return None


def shard(recipe: Recipe, config: PretrainConfig, processes: int, device: torch.device) -> Objective:
    """The recipe, on its device and with equal weights on all processes, in shards.

    Raises:
        ConfigError: it cannot be.
    """
    if reason := problem(config, processes):
        raise ConfigError(f"--fsdp: {reason}")
    mesh = init_device_mesh(device.type, (processes,))
    untrained = {parameter for parameter in recipe.parameters() if not parameter.requires_grad}
    objective = Objective(recipe)
    for block in [part for part in recipe.modules() if isinstance(part, Block)]:
        if any(parameter.requires_grad for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=untrained)
            for method in ("forward_tail", "forward_masked"):
                register_fsdp_forward_method(block, method)
    return fully_shard(objective, mesh=mesh, ignored_params=untrained)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shards. All processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, shards: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, in the shards that another lies in."""
    if not isinstance(shards, DTensor):
        return tensor
    return distribute_tensor(tensor.to(shards.device), shards.device_mesh, shards.placements)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together. All processes must ask."""
    shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms = [whole(nn.utils.get_total_norm(some)) for some in (shards, others) if some]
    return norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


class Gathered:
    """A copy of a recipe, on the host of the main process, that takes the weights of the one in shards to be looked at.

    Args:
        recipe: not yet sharded. device: where it is looked at. main: whether this is the main process.
    """

    def __init__(self, recipe: Recipe, device: torch.device, main: bool) -> None:
        self.device, self.main = device, main
        self.recipe = copy.deepcopy(recipe) if main else recipe

    def fill(self, model: nn.Module) -> Recipe:
        """The recipe with the weights of `model`, on the main process. All processes must ask."""
        weights = gathered(model, keep=self.main)
        if self.main:
            self.recipe.network.load_state_dict(weights)
            self.recipe.to(self.device)
        return self.recipe

    def rest(self) -> None:
        if self.main:
            self.recipe.to("cpu")


def gathered(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The whole state_dict of a model in shards, on the host, one tensor after another. All processes must ask; those
    that do not `keep` it get none."""
    found = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu().contiguous()
    return found
