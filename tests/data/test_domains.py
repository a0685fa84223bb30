from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.domains import Domains, scene, shown_labels
from maefast.errors import BadFile, ConfigError

OPTIONS = {"crop_scale": (0.5, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.5, "seed": 0, "skip_bad": False}
WANTS = Domains((8, 12), 4)


def opened(data, wants=WANTS):
    return wants.open(SimpleNamespace(data=str(data), **OPTIONS))


def write(root, count=2):
    for name in ("source", "labels", "target"):
        (root / name).mkdir()
    for index in range(count):
        found = scene(index, 24)
        Image.fromarray(found.image).save(root / "source" / f"{index}.png")
        np.save(root / "labels" / f"{index}.npy", found.labels)
        Image.fromarray(scene(index, 30, other=True).image).save(root / "target" / f"t{index}.png")


def test_folders(tmp_path):
    write(tmp_path)
    source = opened(tmp_path)
    batch, names = source.examples(2)
    WANTS.check(batch)
    assert names == ["0.png", "1.png"]
    assert batch.labels.dtype is torch.int64
    assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 3}
    again = [source.collate([source[i, 0, i] for i in range(2)])[0] for _ in range(2)]
    for name in ("images", "labels", "target"):
        assert torch.equal(getattr(again[0], name), getattr(again[1], name))
    (tmp_path / "labels" / "1.npy").unlink()
    with pytest.raises(BadFile, match=r"1\.png"):
        opened(tmp_path).examples(2)


def test_labels_go_with_their_image():
    """An image that shows its labels shows them after crops and flips too, away from borders."""
    kind = opened("demo").kind
    labels = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 12, 0), 12, 1)
    image = np.repeat(labels[..., None], 3, 2)
    raw = SimpleNamespace(source=(image, labels), targets=[image], index=0)
    raw.source = type(scene(0, 8))(image, labels)
    for seed in range(10):
        shown, found, _ = kind.sample(raw, np.random.default_rng(seed))
        assert (abs(shown[0].astype(int) - found) < 12).mean() > 0.6


def test_the_demo():
    batch, _ = opened("demo", Domains((16, 16), 4)).examples(4)
    assert not torch.equal(batch.images, batch.target)
    one, other = scene(3, 32), scene(3, 32)
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.labels, other.labels)
    assert one.labels.max() <= 3
    assert shown_labels(batch.labels).shape == (4, 3, 16, 16)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        opened(tmp_path)
    write(tmp_path, 1)
    np.save(tmp_path / "labels" / "0.npy", np.zeros((4, 4)))
    with pytest.raises(BadFile, match=r"labels are uint8 \[height, width\], not float64"):
        opened(tmp_path).examples(1)
    with pytest.raises(TypeError, match="a DomainBatch is wanted, got int"):
        WANTS.check(3)
