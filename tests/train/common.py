"""A small set of pictures, a tiny model, and processes that can be killed."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.images import pictures
from maefast.models import shards
from maefast.models.resnet import ResNet
from maefast.models.spark import SparK
from maefast.train import PretrainConfig, checkpoint, loop, pretrain
from tests.train.curves import curves

TINY = {
    "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2,
}  # fmt: skip


def write_photos(folder: Path, count: int = 10, seed: int = 0) -> Path:
    """`count` smooth colour pictures of different shapes, in nested folders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        path = folder / f"group{i % 3}" / f"image{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((24 + 3 * i, 40 - 2 * i), Image.Resampling.BICUBIC).save(path)
    return folder


def tiny_config(data: Path, out: Path, **changes) -> PretrainConfig:
    options = {
        "data": str(data), "output_dir": str(out), "model": "mae", "model_args": TINY, "img_size": 16, "patch_size": 4,
        "steps": 12, "batch_size": 4, "lr": 1e-2, "warmup": 0.25, "workers": 0, "device": "cpu", "save_every": 3,
        "picture_every": 0, "picture_rows": 0, "tensorboard": False,
    }  # fmt: skip
    return PretrainConfig(**{**options, **changes})


def in_two_parts(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, stop: int, **more) -> None:
    """`pretrain`, interrupted before the step behind `stop`, and once more."""
    original = loop.Run._step

    def step(self):
        if self.done == stop:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, **more)
    pretrain(config, **more)


FCMAE = {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "decoder_embed_dim": 16}


def toy_spark(name: str, **arguments) -> SparK:
    """A SparK around a small net of the user's own, which has no `config`."""
    return SparK(ResNet((1, 1, 1, 1), width=8, drop_path=0.1), decoder_width=32, **arguments)


def plain_spark(name: str, **arguments) -> SparK:
    """`toy_spark` without drop path."""
    return SparK(ResNet((1, 1, 1, 1), width=8), decoder_width=32, **arguments)


CREATORS = {"toy_spark": toy_spark, "plain_spark": plain_spark, "curves": curves}


def convnet_config(kind: str, data: Path, out: Path, **changes) -> PretrainConfig:
    """`tiny_config` of a masked convnet: "fcmae", or "toy_spark" with `CREATORS`."""
    arguments = {"model_args": FCMAE if kind == "fcmae" else {}, "img_size": 64, "patch_size": None, "steps": 6}
    return tiny_config(data, out, **{"model": kind, **arguments, "save_every": 2, "lr": 3e-3, "clip": 1.0, **changes})


def pick_examples(images, count: int, size, decoder, patches: int, seed: int, *, skip_bad: bool = True):
    """Up to `count` of the images with masks, as `maefast reconstruct` draws them."""
    picked = pictures.pick(images, count, decoder, skip_bad=skip_bad)
    paths, names = [images.path(i) for i in picked], [images.name(i) for i in picked]
    return pictures.load_examples(paths, names, size, decoder, patches, seed)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[tuple[str, str, str]]:
    """(step, loss, lr) of every row, as written: repr of floats, so equality is bit for bit."""
    return [(row["step"], row["loss"], row["lr"]) for row in rows(out)]


def tensors(out: Path, step: int) -> tuple[dict[str, torch.Tensor], ...]:
    """The weights and the optimizer's tensors of a checkpoint, whatever it was written by."""
    path = out / "checkpoints" / f"step-{step:08d}"
    return tuple(
        shards.read(path / folder) if (path / folder).is_dir() else checkpoint.load_weights(path / file)
        for folder, file in (("model", checkpoint.MODEL), ("optimizer", checkpoint.OPTIMIZER))
    )


def assert_equal(one: Iterable[dict[str, torch.Tensor]], other: Iterable[dict[str, torch.Tensor]]) -> None:
    """Names, dtypes and bits."""
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert tensor.dtype is theirs[key].dtype
            assert torch.equal(tensor, theirs[key]), key


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.victims"])


def run_process(target, *arguments, wait=None) -> int:
    """Run `target(*arguments)` in a fresh process, forked from one that has only imported things. Returns its exit
    status. With `wait`, the process is killed by SIGKILL as soon as wait() is true."""
    process = _context.Process(target=target, args=arguments)
    process.start()
    while wait is not None and process.is_alive():
        if wait():
            os.kill(process.pid, signal.SIGKILL)
            break
    process.join(60)
    assert not process.is_alive(), "the process did not end within a minute"
    return process.exitcode


def run_together(target, world: int, *arguments, told_rank: int | None = None, told_at: int | None = None) -> list[int]:
    """Run target(rank, world, port, *arguments) in `world` processes at once; their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        extra = (told_at,) if rank == told_rank else ()
        processes.append(_context.Process(target=target, args=(rank, world, port, *arguments, *extra)))
        processes[-1].start()
    for process in processes:
        process.join(90)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
