"""`maefast data-speed`: samples a second that a source gives, and that a step would take."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from maefast.errors import ConfigError
from maefast.recipe import Batch, Recipe

from .build import build_recipe
from .config import PretrainConfig
from .trial import make_step, open_loader


@dataclass(frozen=True)
class DataSpeed:
    """Samples a second. `given`: of each number of worker processes, 0 for none. `taken`: by the training step."""

    unit: str
    given: dict[int, float]
    taken: float
    seconds: float

    def lines(self, cores: int) -> list[str]:
        unit, alone = self.unit, self.given[min(self.given)]
        lines = [
            f"{'no worker' if workers == 0 else f'{workers} worker(s)'}: {rate:.0f} {unit}s/s"
            for workers, rate in sorted(self.given.items())
        ]
        lines.append(f"a step: {self.taken:.0f} {unit}s/s ({1e3 * self.seconds:.0f} ms)")
        most = max(self.given.values())
        needed = max(1, -(-self.taken // alone))
        if most >= self.taken:
            lines.append(f"the step is the bottleneck: the data keep up with {most / self.taken:.1f} times as much")
        elif needed <= cores:
            lines.append(f"the data are the bottleneck: --workers {needed:.0f} would keep up, on cores that are free")
        else:
            lines.append(
                f"the data are the bottleneck: they would need {needed:.0f} cores, and this machine has {cores}. "
                "Smaller files or images help, and --cache-mb where the decoded images fit"
            )
        return lines


def data_speed(config: PretrainConfig, seconds: float = 5.0, say: Callable[[str], object] = print) -> DataSpeed:
    """Measure the loader of a run, without and with its workers, nothing cached, and its training step on one batch.
    Nothing is written.

    Args:
        config: of the run. seconds: for each measurement, about.
    """
    if not 0 < seconds < math.inf:  # nor NaN
        raise ConfigError(f"--seconds must be above 0 and finite, got {seconds}")
    config = replace(config, cache_mb=0, steps=config.steps or 1)
    config.check(writes=False)
    torch.manual_seed(config.seed)
    recipe = build_recipe(config)
    source = recipe.wants.open(config)
    for note in source.notes:
        say(note)
    count = "streams" if config.stream else f"{len(source)} {source.unit}s"
    say(f"{count} of {source.name}, batches of {config.batch_size}")
    given, batch = {}, None
    for workers in sorted({0, config.workers}):
        given[workers], batch = _loaded(source, config, workers, seconds)
    step = _step(recipe, batch, config, seconds)
    found = DataSpeed(source.unit, given, config.batch_size / step, step)
    for line in found.lines(os.cpu_count() or 1):
        say(line)
    return found


def _loaded(source, config: PretrainConfig, workers: int, seconds: float) -> tuple[float, Batch]:
    """Samples a second, after the batches that were fetched ahead; and a batch."""
    loader = open_loader(source, replace(config, workers=workers))
    threads = torch.get_num_threads()
    try:
        if workers == 0:
            torch.set_num_threads(1)
        for _ in range(1 + 4 * workers):
            batch = loader.next()
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds or not count:
            batch = loader.next()
            count += 1
        spent = time.perf_counter() - began
        return count * config.batch_size / spent, batch
    finally:
        torch.set_num_threads(threads)
        loader.close()


def _step(recipe: Recipe, batch: Batch, config: PretrainConfig, seconds: float) -> float:
    """Seconds of a training step on a batch, the median."""
    step, _ = make_step(recipe, config)
    device = next(recipe.network.parameters()).device
    batch, taken = batch.to(device), []
    while len(taken) < 4 or (sum(taken) < seconds and len(taken) < 50):
        began = time.perf_counter()
        step(batch).item()  # waits for the device
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - began)
    taken = sorted(taken[2:])  # the first ones compile, and fill caches
    return taken[len(taken) // 2]
