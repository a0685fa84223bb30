"""A run's loader and step without the run, for commands that measure them. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from maefast import seeds
from maefast.data.source import Source
from maefast.recipe import START, Batch, Recipe
from maefast.seeds import Draw

from . import schedule
from .accelerator import make_accelerator
from .config import PretrainConfig
from .data import Loader, Positions
from .streamed import Streams

_BATCHES = 2**20  # more than anybody waits for


def open_loader(source: Source, config: PretrainConfig, pin: bool = False) -> Loader:
    """From the first batch of a run on, with `config.workers`."""
    samples = source.samples()
    if config.stream:
        streams = Streams(source, config, rank=0, world=1)
        samples, positions = streams.samples(samples), streams.positions(0, _BATCHES)
    else:
        positions = Positions(
            len(source), config.seed, batch=config.batch_size, rank=0, world=1, start=0, micro_batches=_BATCHES
        )
    return Loader(samples, positions, workers=config.workers, pin=pin)


def make_step(recipe: Recipe, config: PretrainConfig) -> tuple[Callable[[Batch], torch.Tensor], Optimizer]:
    """A training step, which takes a batch and gives its loss, and its optimizer, whose learning rate is zero. The
    recipe is put on the device."""
    accelerator = make_accelerator(config)
    device, network = accelerator.device, recipe.network
    recipe.to(device).train()
    optimizer = schedule.make_optimizer(network, config.weight_decay, config.betas, config.optim_state)

    def step(batch: Batch) -> torch.Tensor:
        batch = batch.to(device)
        with accelerator.autocast():
            view = recipe.prepared(batch, Draw(config.seed, batch.key, seeds.MASK), START)
            loss = recipe(view).loss
        loss.backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer
