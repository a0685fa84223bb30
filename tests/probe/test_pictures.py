"""The pictures that a probe leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maefast import recipes
from maefast.data.images.pixels import drawn_by_us, open_header
from maefast.probe.pictures import Neighbours, Scatter, _components, grid_of, patch_sheet
from tests.probe.test_features import images
from tests.train.common import FCMAE, TINY


@pytest.mark.parametrize(("classes", "width"), [(3, 8), (25, 2), (2, 1)])
def test_classes(tmp_path, classes, width):
    labels = np.arange(60) % classes
    scatter = Scatter(torch.randn(60, width), labels, [f"class {i}" for i in range(classes)])
    scatter.save(tmp_path / "classes.png", "a title")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.width > 500
    with open_header(tmp_path / "classes.png") as image:
        assert drawn_by_us(image)  # so it is never taken for data


@pytest.mark.parametrize(("classes", "table"), [(10, "tab10"), (11, "tab20")])
def test_few_classes_have_strong_colours(classes, table):
    from matplotlib import colormaps

    figure = Scatter(torch.randn(22, 3), np.arange(22) % classes, [str(i) for i in range(classes)])._figure("")
    drawn = [tuple(part.get_facecolor()[0]) for part in figure.axes[0].collections]
    assert drawn == [colormaps[table](place) for place in range(classes)]


def test_names_of_any_script(tmp_path, recwarn):
    scatter = Scatter(torch.randn(6, 3), np.arange(6) % 2, ["\u732b", "\u72d7"])
    scatter.save(tmp_path / "classes.png", "a title")
    scatter.pixels()
    assert not recwarn.list


def test_components():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator).double())[0]
    values = torch.randn(200, 5, generator=generator).double() * torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1])
    flat, share = _components(values @ axes.T)
    assert abs(np.corrcoef(flat[:, 0], values[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(flat[:, 1], values[:, 3])[0, 1]) > 0.99
    assert 0.8 < share[0] < 0.95
    assert sum(share) < 1


def test_patches():
    vit = recipes.create("mae", model="mae", img_size=[16, 32], patch_size=4, **TINY)
    sheet = patch_sheet(vit, images(3, 3, 16, 32), ["a", "b", "c"], "cpu")
    assert [column.shape for column in sheet.columns] == [(3, 3, 16, 32)] * 2
    assert torch.equal(sheet.columns[0], images(3, 3, 16, 32).images)
    cells = sheet.columns[1].view(3, 3, 4, 4, 8, 4)
    assert bool((cells == cells[:, :, :, :1, :, :1]).all())  # one colour a patch
    convnet = recipes.create("fcmae", model="fcmae", img_size=128, **FCMAE)
    assert patch_sheet(convnet, images(2, 3, 128, 128), ["a", "b"], "cpu").columns[1].shape == (2, 3, 128, 128)
    small = recipes.create("fcmae", model="fcmae", img_size=64, **FCMAE)
    assert patch_sheet(small, images(2, 3, 64, 64), ["a", "b"], "cpu") is None  # 2 x 2 show nothing


def test_grids():
    assert grid_of(32, (16, 32)) == (4, 8)
    assert grid_of(196, (224, 224)) == (14, 14)
    assert grid_of(30, (224, 224)) is None


def test_neighbours_are_a_function_of_features_and_seed(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = torch.from_numpy(rng.normal(size=(90, 60)) + 8 * np.eye(3)[labels] @ rng.normal(size=(3, 60)))
    drawn = Neighbours(features, labels, ["a", "b", "c"], seed=2**40)
    chosen, flat, _ = drawn._flat()
    assert np.array_equal(flat, drawn._flat()[1])
    assert list(chosen) == list(range(90))
    centres = np.stack([flat[labels == label].mean(0) for label in range(3)])
    nearest = np.linalg.norm(flat[:, None] - centres, axis=2).argmin(1)
    assert (nearest == labels).all()
    drawn.save(tmp_path / "tsne.png", "a title")
    with Image.open(tmp_path / "tsne.png") as image:
        assert image.width > 500
