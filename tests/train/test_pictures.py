"""Reconstruction pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maefast.data.images import pictures
from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder
from maefast.models import create
from maefast.train import BadImage, pretrain
from tests.train.common import TINY, pick_examples, tiny_config, write_photos


def tiny_model():
    torch.manual_seed(0)
    return create("mae", img_size=16, patch_size=4, **TINY)


def cells(path, count):
    """The 4 x count pictures cut out of a sheet without a title, shrunk back to 16 x 16."""
    sheet = np.asarray(Image.open(path)).astype(int)
    size = 160
    return [
        [sheet[26 + r * (size + 24) :, 6 + c * (size + 6) :][:size, :size][5::10, 5::10] for c in range(4)]
        for r in range(count)
    ]


def test_columns_hold_what_their_labels_say(photos, tmp_path):
    model = tiny_model().train()
    examples = pick_examples(find_images(photos), 3, (16, 16), Decoder(), 16, seed=0)
    columns = pictures.reconstruct(model, examples, 0.75, "cpu")
    assert model.training
    pictures.save_picture(columns, examples.names, tmp_path / "deep" / "sheet.png")
    originals = examples.images.permute(0, 2, 3, 1).numpy().astype(int)
    for row, original, noise in zip(cells(tmp_path / "deep" / "sheet.png", 3), originals, examples.noise, strict=True):
        hidden = (noise.argsort().argsort() >= 4).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        shown, masked, rebuilt, pasted = row
        assert np.abs(shown - original).max() <= 1
        assert np.abs(masked - original)[~hidden].max() <= 1
        assert np.abs(masked[hidden] - np.array([124, 116, 104])).max() <= 1  # the mean colour
        assert np.abs(pasted - original)[~hidden].max() <= 1
        assert np.array_equal(pasted[hidden], rebuilt[hidden])
        assert np.abs(rebuilt[~hidden] - np.array([124, 116, 104])).max() <= 1
        assert np.abs(rebuilt - original)[hidden].mean() > 5  # an untrained model
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def correlation(columns) -> float:
    """Of the hidden pixels, reconstructed and true."""
    original, masked, rebuilt, _ = (column.double() for column in columns)
    hidden = (original != masked).any(1, keepdim=True).expand_as(original)
    return float(torch.corrcoef(torch.stack([original[hidden], rebuilt[hidden]]))[0, 1])


def test_raw_pictures_know_nothing_of_the_hidden_pixels(photos):
    """Restored ones do: even an untrained model's resemble the truth."""
    torch.manual_seed(0)
    model = create("mae", img_size=16, patch_size=4, norm_pix_loss=True, **TINY)
    examples = pick_examples(find_images(photos), 8, (16, 16), Decoder(), 16, seed=0)
    restored = pictures.reconstruct(model, examples, 0.75, "cpu")
    raw = pictures.reconstruct(model, examples, 0.75, "cpu", raw=True)
    assert correlation(restored) > 0.3
    assert abs(correlation(raw)) < 0.2
    # The proof: other pixels below the mask change the one and not the other.
    hidden = (examples.noise.argsort().argsort() >= 4).view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = pictures.Examples(
        torch.where(hidden, 255 - examples.images, examples.images), examples.noise, examples.names
    )
    assert torch.equal(pictures.reconstruct(model, other, 0.75, "cpu", raw=True)[2], raw[2])
    assert not torch.equal(pictures.reconstruct(model, other, 0.75, "cpu")[2], restored[2])
    assert "true mean and variance" in pictures.note(model, raw=False)
    assert "--picture raw" in pictures.note(model, raw=False)
    assert pictures.note(model, raw=True).startswith("raw: ")
    assert pictures.note(tiny_model(), raw=False) == ""  # pixels as they are


def test_long_titles_are_wrapped(photos, tmp_path):
    examples = pick_examples(find_images(photos), 1, (16, 16), Decoder(), 16, seed=0)
    columns = pictures.reconstruct(tiny_model(), examples, 0.75, "cpu")
    heights = []
    for i, title in enumerate(("", "short", "long words " * 30)):
        pictures.save_picture(columns, examples.names, tmp_path / f"{i}.png", title)
        with Image.open(tmp_path / f"{i}.png") as image:
            heights.append(image.height)
            assert image.width == 4 * 166 + 6
            assert image.info["Software"] == "maefast"
    assert heights[0] < heights[1] < heights[2]


def test_examples_are_fixed_and_spread(photos):
    images = find_images(photos)
    one, two = (pick_examples(images, 5, (16, 16), Decoder(), 16, seed=3) for _ in range(2))
    assert one.names == two.names == [images.files[i] for i in (0, 2, 4, 6, 8)]
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.noise, two.noise)
    assert len(np.unique(one.noise.numpy())) == one.noise.numel()
    assert pick_examples(images, 99, (16, 16), Decoder(), 16, seed=3).names == list(images.files)


def test_unreadable_examples_are_replaced(tmp_path):
    folder = write_photos(tmp_path / "photos", count=4)
    images = find_images(folder)
    images.path(0).write_bytes(b"broken")
    names = pick_examples(images, 2, (16, 16), Decoder(), 16, seed=0).names
    assert names == [images.files[1], images.files[2]]
    for path in map(images.path, range(4)):
        path.write_bytes(b"broken")
    with pytest.raises(BadImage, match=r"image00\.png.*nor can any of the 4 images be read"):
        pick_examples(images, 2, (16, 16), Decoder(), 16, seed=0)


def test_many_unreadable_files_in_front(tmp_path):
    """Twenty bad files once ended a run that was to skip them."""
    folder = write_photos(tmp_path / "photos", count=3)
    (folder / "a").mkdir()
    for i in range(60):
        (folder / "a" / f"{i:02d}.png").write_bytes(b"broken")
    images = find_images(folder)
    assert images.name(0) == "a/00.png"
    for count in (1, 2, 6):
        names = pick_examples(images, count, (16, 16), Decoder(), 16, seed=0).names
        assert 1 <= len(names) <= count
        assert all(name.startswith("group") for name in names)
    result = pretrain(tiny_config(folder, tmp_path / "out", skip_bad=True, picture_rows=6, steps=2))
    assert result.step == 2
