"""Images with vectors beside them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from maefast.data.vectors import Vectors
from maefast.errors import BadFile
from maefast.train import PretrainConfig


def options(data, **changes):
    return PretrainConfig(data=str(data), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), **changes)


def test_files(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((10, 16, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", np.full(4, i / 2))
    source = Vectors(4, (8, 8)).open(options(tmp_path))
    batch, names = source.examples(2)
    source.kind.wants.check(batch)
    assert names == ["0.png", "1.png"]
    assert batch.vectors[:, 0].tolist() == [0, 0.5]
    assert batch.images.flatten(1)[:, 0].tolist() == [0, 40]
    assert (source[0, 0, 1][0].image == batch.images[1].numpy()).all()
    with pytest.raises(BadFile, match="160 pixels are more than 100"):
        Vectors(4, (8, 8)).open(options(tmp_path, max_pixels=100)).examples(1)
    np.save(tmp_path / "0.npy", np.ones(3))
    with pytest.raises(BadFile, match="4 finite numbers"):
        source.examples(1)
    (tmp_path / "0.npy").unlink()
    with pytest.raises(BadFile, match=r"no vector 0\.npy"):
        source.examples(1)


def test_flowers():
    wants = Vectors(16, (20, 20))
    batch, _ = wants.open(options("demo")).examples(30)
    wants.check(batch)
    assert len({tuple(row) for row in batch.vectors.tolist()}) == 30
    np.testing.assert_allclose(batch.vectors.square().mean(1), 1, rtol=1e-5)
    again, _ = wants.open(options("demo")).examples(30)
    assert (batch.images == again.images).all()
