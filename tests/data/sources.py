"""The same pictures in every place that a run reads from, and a run that is killed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from maefast.train import PretrainConfig, pretrain
from tests.train import victims
from tests.train.common import losses, run_process


def encoded(index: int, kind: str = "PNG") -> bytes:
    """A smooth colour picture, another one for each index."""
    rng = np.random.default_rng(index)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((24 + index, 40 - index), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int = 2, each: int = 5) -> Path:
    """Samples as WebDataset has them: an image, a class and a description each, named by one number."""
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        members = ((f"{i:06}.{kind}", encoded(i) if kind == "png" else b"1") for i in numbers for kind in _ENDINGS)
        write_tar(folder / f"{shard:04}.tar", members)
    return folder


_ENDINGS = ("png", "cls", "json")


def write_images(folder: Path, count: int = 10) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:06}.png" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded(index))
    return paths


def goes_on_when_killed(config: PretrainConfig, out: Path, step: int, between: Callable[[], object] = int) -> None:
    """A run of `config` (saved after every step), and one into `out` that dies in `step` and is started again, after
    `between`: the same losses, bit for bit."""
    pretrain(config)
    again = replace(config, output_dir=str(out))
    assert run_process(victims.train_and_die, again, "in a step", step) < 0
    between()
    pretrain(again)
    assert losses(out) == losses(Path(config.output_dir))
