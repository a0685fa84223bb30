"""JPEG files are decoded as Pillow decodes them; crops of large ones, smaller, look the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maefast.data.images import jpeg
from maefast.data.images.augment import Augment
from maefast.data.images.files import find_images, shipped_photographs
from maefast.data.images.pixels import Decoder
from maefast.data.images.samples import TrainImages
from maefast.errors import BadImage

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
pytest.importorskip("skimage")
FORMS = [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"subsampling": "4:2:2"}, {"quality": 20}]
ORIENTATION = 0x112


@pytest.fixture(scope="module")
def photo():
    with Image.open(shipped_photographs()[0]) as image:
        return image.convert("RGB").resize((201, 150))


def saved(folder, image, name="a.jpg", **options):
    image.save(folder / name, "JPEG", **options)
    return folder / name


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pillows(tmp_path, photo, form, channels):
    for image in (photo, photo.convert("L")):
        path = saved(tmp_path, image, **({} if image.mode == "L" else form))
        found = Decoder(channels).open(path)
        assert isinstance(found, jpeg.Jpeg)
        want = Decoder(channels).whole(path).pixels
        assert found.decode().flags.writeable  # else torch warns of it
        assert (found.width, found.height) == (201, 150)
        assert np.array_equal(found.decode(), want)
        assert np.array_equal(found.cut((3, 4, 100, 90), (50, 50)).pixels, want[4:90, 3:100])


@pytest.mark.parametrize("turned", range(1, 9))
def test_exif(tmp_path, photo, turned):
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    path = saved(tmp_path, photo, exif=exif)
    found, want = Decoder().open(path), Decoder().whole(path)
    assert jpeg.has_exif(path.read_bytes())
    assert (found.width, found.height) == (want.width, want.height)
    assert np.array_equal(found.decode(), want.pixels)
    out = [torch.empty(3, 40, 40, dtype=torch.uint8) for _ in range(2)]
    for place, image in zip(out, (found, want)):
        Augment((40, 40)).into(place, image, np.random.default_rng(1))
    assert torch.equal(*out)


def test_what_pillow_has_to_see(tmp_path, photo):
    path = saved(tmp_path, photo.convert("CMYK"))
    assert isinstance(Decoder().open(path), jpeg.Whole)
    data = saved(tmp_path, photo).read_bytes()
    assert not jpeg.has_exif(data)
    assert jpeg.opened(data[:100], 3) is None
    assert jpeg.opened(b"no picture", 3) is None
    exif = Image.Exif()
    exif[0x131] = "maefast reconstruction"  # a picture that a user's tool names so is data
    assert isinstance(Decoder().open(saved(tmp_path, photo, exif=exif)), jpeg.Jpeg)
    assert isinstance(Decoder(value_range=(0.0, 200.0)).open(path), jpeg.Whole)
    photo.save(tmp_path / "b.png")
    assert isinstance(Decoder().open(tmp_path / "b.png"), jpeg.Whole)
    with pytest.raises(BadImage, match="are more than 100"):
        Decoder(max_pixels=100).open(path)


def test_a_damaged_file_is_told_as_pillow_tells_it(tmp_path, photo):
    data = saved(tmp_path, photo).read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    images = TrainImages(find_images(tmp_path), Augment((16, 16)), Decoder(), seed=0, skip_bad=False, cache=0)
    pixels, _, bad = images[(0, 0, 0)]
    assert pixels is None
    with pytest.raises(BadImage) as error:
        Decoder()(tmp_path / "a.jpg")
    assert bad == [(str(tmp_path / "a.jpg"), error.value.reason)]


@pytest.mark.parametrize(
    ("side", "shrunk"), [(16, 1), (95, 1), (96, 2), (191, 2), (192, 4), (383, 4), (384, 8), (9999, 8)]
)
def test_how_much_smaller(side, shrunk):
    assert jpeg.shrinkage(side, 2 * side, (32, 16)) == shrunk
    assert jpeg.shrinkage(4 * side, side, (16, 16)) == shrunk


@pytest.mark.parametrize("turned", range(1, 9))
def test_large_photographs_look_the_same(tmp_path, turned):
    """A tenth of the pixels are decoded; no crop is off by a pixel, which would show as a difference of edges."""
    with Image.open(shipped_photographs()[0]) as image:
        large = image.convert("RGB").resize((1203, 997), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    path = saved(tmp_path, large, exif=exif, quality=92)
    found, whole = Decoder().open(path), Decoder().whole(path)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(12):
        box = Augment((32, 32)).box(found.width, found.height, rng)
        seen.add(jpeg.shrinkage(box[2] - box[0], box[3] - box[1], (32, 32)))
        made = []
        for image in (found, whole):
            pixels, inner = image.cut(box, (32, 32))
            view = Image.fromarray(np.ascontiguousarray(pixels))
            made.append(np.asarray(view.resize((32, 32), Image.Resampling.BICUBIC, box=inner), dtype=float))
        apart = np.abs(made[0] - made[1])
        assert apart.mean() < 1.0
        shifted = np.abs(made[0][:, 1:] - made[1][:, :-1]).mean()
        assert apart.mean() < 0.2 * shifted
    assert seen >= {4, 8} or seen >= {2, 4}


def test_the_cache_changes_no_sample(tmp_path, photo):
    saved(tmp_path, photo.resize((801, 600)), "a.jpg")  # crops of it are decoded smaller
    saved(tmp_path, photo.resize((60, 50)), "b.jpg")
    photo.resize((70, 50)).save(tmp_path / "c.png")
    kinds = []
    for cache in (0, 10**8):
        data = TrainImages(find_images(tmp_path), Augment((32, 32)), Decoder(), seed=0, skip_bad=False, cache=cache)
        kinds.append([data[(p, epoch, p)][0] for epoch in range(3) for p in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*kinds))
    assert sorted(type(image).__name__ for image in data._cache.values()) == ["Jpeg", "Whole", "Whole"]


def test_a_batch_is_one_tensor(tmp_path, photo):
    for name in "abc":
        saved(tmp_path, photo, f"{name}.jpg")
    data = TrainImages(find_images(tmp_path), Augment((32, 32)), Decoder(), seed=0, skip_bad=False, cache=0)
    places = [(4, 0, 1), (5, 0, 2), (6, 1, 0)]
    samples = data.__getitems__(places)
    batch, bad = data.collate(samples)
    assert batch.images.data_ptr() == samples[0][0].data_ptr()
    assert batch.images.shape == (3, 3, 32, 32)
    assert not bad
    alone, _ = data.collate([data[where] for where in places])
    assert torch.equal(alone.images, batch.images)
    assert alone.key.tolist() == batch.key.tolist() == [4, 5, 6]
