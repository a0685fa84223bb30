"""What the processes of the resume tests run: trainings that die at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # this and matplotlib: imported late by a run, so here once instead of in each process

import maefast.models  # noqa: F401
from maefast.train import PretrainConfig, checkpoint
from maefast.train.build import build_recipe
from maefast.train.loop import Run, pretrain
from maefast.train.schedule import make_optimizer
from maefast.train.sharding import shard
from tests.train.common import CREATORS


def train(config: PretrainConfig) -> None:
    """Train; what is printed goes to log.txt in the run's folder."""
    torch.set_num_threads(1)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w", buffering=1) as file, contextlib.redirect_stdout(file):
        pretrain(config, create_model=CREATORS.get(config.model))


def train_and_die(config: PretrainConfig, moment: str, step: int) -> None:
    """Train, and die by SIGKILL at `moment` of the checkpoint of `step` (or in the middle of that training step)."""

    def die(*_, **__):
        children = Path(f"/proc/self/task/{os.getpid()}/children")  # loader workers, which must not outlive us
        Path(config.output_dir, "children.txt").write_text(children.read_text() if children.exists() else "")
        os.kill(os.getpid(), signal.SIGKILL)

    def at(name: str) -> bool:
        return f"step-{step:08d}" in str(name)

    if moment == "writing tensors":
        original = checkpoint.save_file

        def save_file(tensors, path, *rest, **more):
            original(tensors, path, *rest, **more)
            if at(path) and path.name == checkpoint.OPTIMIZER:
                os.truncate(path, path.stat().st_size // 2)
                die()

        checkpoint.save_file = save_file
    elif moment == "before the rename":
        rename = os.rename
        os.rename = lambda source, target: (
            die() if at(source) and ".writing-" in str(source) else rename(source, target)
        )
    elif moment == "after the rename":
        checkpoint._prune = lambda folder, found, keep: die() if found == step else None
    elif moment == "removing an old one":
        rmtree = shutil.rmtree

        def remove(path, *rest, **more):
            if ".removing-" in str(path) and at(path):
                (Path(path) / checkpoint.MODEL).unlink()
                die()
            rmtree(path, *rest, **more)

        shutil.rmtree = remove
    elif moment == "in a step":
        backward = Run._step

        def step_(self):
            backward(self)
            if self.done == step:
                die()

        Run._step = step_
    else:
        raise ValueError(moment)
    train(config)
    raise AssertionError(f"still alive: nothing happened at {moment!r} of step {step}")


def train_and_be_told(config: PretrainConfig, step: int, number: int) -> None:
    """Train; the signal arrives in the middle of `step`."""
    original = Run._step

    def step_(self):
        if self.done == step - 1:
            os.kill(os.getpid(), number)
        original(self)

    Run._step = step_
    train(config)


def train_and_be_told_as_a_group(config: PretrainConfig, step: int, number: int, times: int = 2) -> None:
    """The same with the signal sent to this process and its loader workers, `times` times."""
    os.setsid()
    original = Run._step

    def step_(self):
        if self.done == step - 1:
            for _ in range(times):
                os.killpg(0, number)
        original(self)

    Run._step = step_
    train(config)


def be(rank: int, world: int, port: int) -> None:
    """One of `world` processes, with the environment that torchrun would give it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)


def save_again(rank: int, world: int, port: int, path: Path, folder: Path) -> None:
    """Read a checkpoint into shards for `world` processes, and write these to `folder`."""
    be(rank, world, port)
    torch.distributed.init_process_group("gloo")
    state = checkpoint.read_state(path)
    config = PretrainConfig(**state.config)
    recipe = build_recipe(config, None)
    shard(recipe, config, world, torch.device("cpu"))
    optimizer = make_optimizer(recipe.network, config.weight_decay, config.betas)
    checkpoint.restore(path, recipe.network, optimizer)
    checkpoint.save_shards(folder, None if rank else state, recipe.network, optimizer)
    torch.distributed.destroy_process_group()


def train_as(rank: int, world: int, port: int, config: PretrainConfig, told_at: int | None = None) -> None:
    """One of `world` gloo processes. `told_at`: SIGTERM then."""
    be(rank, world, port)
    log = Path(config.output_dir).parent / f"rank{rank}.txt"
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        if told_at is None:
            pretrain(config, create_model=CREATORS.get(config.model))
        else:
            train_and_be_told(config, told_at, signal.SIGTERM)
