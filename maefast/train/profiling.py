"""`maefast profile`: where the time of a training step of a run goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from maefast.errors import ConfigError
from maefast.profiling import Report, machine
from maefast.profiling.feed import Feed
from maefast.profiling.run import measure
from maefast.profiling.summary import Options
from maefast.recipe import Batch, Recipe

from .accelerator import make_accelerator
from .build import build_recipe
from .config import PretrainConfig
from .data import Loader
from .graph import problem
from .parse import must_be_file
from .trial import make_step, open_loader


def profile_run(
    config: PretrainConfig, steps: int = 5, trace: Path | None = None, say: Callable[[str], object] = print
) -> Report:
    """Profile the training step of a run. Nothing is written but `trace`.

    Without `config.data` one batch of what ships with the recipe (or of the shipped photographs) is kept for all steps.

    Args:
        config: of the run. steps: how many are timed.
    """
    must_be_file("--trace", trace)
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {steps}")
    kept = not config.data
    data = config.data or ("skimage" if config.recipe is None else "demo")
    config = replace(config, data=data, steps=config.steps or 1, workers=0 if kept else config.workers)
    config.check(writes=False)
    gpu = config.device != "cpu" and torch.cuda.is_available()
    say(machine.describe("cuda" if gpu else "cpu"))
    torch.manual_seed(config.seed)
    recipe = build_recipe(config)
    source = recipe.wants.open(config)
    for note in source.notes:
        say(note)
    loader = open_loader(source, config, pin=gpu)
    try:
        if kept:
            feed, batch = Feed(None), loader.next()
            say(f"one batch of {config.batch_size} {source.unit}s of {source.name}, kept: --data times others")
        else:
            feed, batch = Feed(_batches(loader), ahead=1 + 4 * config.workers), None
            say(f"batches of {config.batch_size} {source.unit}s of {source.name}, {config.workers} worker(s)")
        return _profiled(recipe, config, feed, batch, steps, trace)
    finally:
        loader.close()


def _batches(loader: Loader) -> Iterator[Batch]:
    while True:
        yield loader.next()


def _profiled(
    recipe: Recipe, config: PretrainConfig, feed: Feed, kept: Batch | None, steps: int, trace: Path | None
) -> Report:
    step, optimizer = make_step(recipe, config)
    options = Options(
        command=True,
        workers=config.workers,
        narrow=config.optim_state == "bf16",
        graphed=config.graph == "auto" and problem(config, make_accelerator(config)) is None,
    )
    run = step if kept is None else lambda: step(kept)
    return measure(run, recipe, feed, steps, 2, optimizer, trace, options)
