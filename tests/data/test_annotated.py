from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.annotated import Annotated, AnnotatedBatch
from maefast.data.shapes_on_textures import often, shapes_on_texture
from maefast.errors import ConfigError

OPTIONS = {"crop_scale": (0.5, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5, "seed": 0, "skip_bad": False}
WANTS = Annotated((8, 8), units=2, subjects=3)


def write(folder, text: str):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((12, 16, 3), 60 if name == "a.png" else 200, np.uint8)).save(folder / name)
    (folder / "table.csv").write_text(text)
    return WANTS.open(SimpleNamespace(data=str(folder / "table.csv"), **OPTIONS))


def test_a_table(tmp_path):
    source = write(tmp_path, "image,subject,frown,smile\nb.png,zoe,1,0\na.png,ann,0,1\n")
    batch, bad = source.collate([source[i, 0, i] for i in range(2)])
    assert not bad
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.images[0].unique().tolist() == [200]
    assert batch.units.tolist() == [[1, 0], [0, 1]]
    assert batch.subjects.tolist() == [1, 0]
    WANTS.check(batch)
    assert source.examples(2)[1] == ["b.png", "a.png"]
    before = source.record()
    other = write(tmp_path, "image,subject,frown,smile\nb.png,zoe,1,0\na.png,ann,1,1\n")
    assert other.changes(before)
    assert not source.changes(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,frown,smile\na.png,0,1\n", "no column subject"),
        ("image,subject,frown\na.png,x,0\n", "it has 1 units, the recipe 2: units=1"),
        ("image,subject,frown,smile\na.png,x,0,maybe\n", "0 or 1 for each unit"),
        ("image,subject,frown,smile\n", "each row must have"),
        ("image,subject,u,v\n" + "".join(f"a.png,{name},0,1\n" for name in "wxyz"), "it has 4 subjects, the recipe 3"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, text)


def test_no_table(tmp_path):
    with pytest.raises(ConfigError, match="with the columns image, subject"):
        WANTS.open(SimpleNamespace(data=str(tmp_path), **OPTIONS))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), torch.zeros(2, 2), torch.zeros(2).long()),
            "images must be uint8",
        ),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3), torch.zeros(2).long()), "units must be"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 2), torch.zeros(3).long()), "subjects must be"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(ValueError, match=message):
        WANTS.check(AnnotatedBatch(*batch))


def test_shapes_on_textures():
    one, two = (shapes_on_texture(7, 32) for _ in range(2))
    assert np.array_equal(one[0], two[0])
    assert one[0].shape == (32, 32, 3)
    made = [shapes_on_texture(i, 8, 3, 8) for i in range(2000)]
    there, texture = np.stack([units for _, units, _ in made]), np.array([number for *_, number in made])
    for number in (0, 5):
        assert there[texture == number].mean(0) == pytest.approx(often(number, 3), abs=0.1)
    with pytest.raises(ValueError, match="shapes must lie in 1 to 4"):
        shapes_on_texture(0, 8, 5)
