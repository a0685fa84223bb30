"""The stream of samples: order, sharding, crops, flips, masks, cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maefast import seeds
from maefast.data.images.augment import Augment
from maefast.data.images.batch import normalise, normaliser
from maefast.data.images.files import find_images
from maefast.data.images.pixels import Decoder
from maefast.data.images.samples import TrainImages
from maefast.errors import TrainError
from maefast.train.data import Loader, Positions


def stream(count=10, batch=4, rank=0, world=1, start=0, batches=10, seed=3):
    positions = Positions(count, seed, batch=batch, rank=rank, world=world, start=start, micro_batches=batches)
    assert len(positions) == batches
    return [entry for group in positions for entry in group]


def dataset(photos, **changes):
    options = {"seed": 1, "skip_bad": False, "cache": 2**24, **changes}
    return TrainImages(find_images(photos), Augment((16, 16)), Decoder(), **options)


def test_every_epoch_is_a_permutation_of_its_own():
    entries = stream(batches=10)  # 40 positions = 4 epochs of 10, batches of 4 lie across their ends
    assert [position for position, _, _ in entries] == list(range(40))
    orders = [[index for _, epoch, index in entries if epoch == e] for e in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert stream(seed=4) != entries


def test_starting_in_the_middle_needs_no_replay():
    assert stream(start=12, batches=7) == stream(batches=10)[12:]


def test_processes_share_one_stream():
    one = stream(batch=4, batches=6)
    first, second = (stream(batch=2, rank=rank, world=2, batches=6) for rank in (0, 1))
    joint = [entry for k in range(6) for part in (first, second) for entry in part[2 * k : 2 * k + 2]]
    assert joint == one


def test_noise_and_streams_are_independent():
    noise = np.stack([seeds.mask_noise(0, p, 64) for p in range(500)])
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    assert noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.03
    assert len(np.unique(noise)) > 0.99 * noise.size  # no stream repeats another
    assert not np.array_equal(seeds.mask_noise(0, 5, 64), seeds.mask_noise(1, 5, 64))
    assert not np.array_equal(seeds.mask_noise(0, 5, 64), seeds.mask_noise(0, 5, 64, seeds.PICTURE))
    assert seeds.torch_seed(0, 1, 0) != seeds.torch_seed(0, 1, 1)


def test_a_sample_depends_on_its_address_only(photos):
    a, b = dataset(photos), dataset(photos, cache=0)
    b[(0, 0, 3)], b[(1, 0, 7)]  # other samples drawn before
    for where in [(5, 0, 2), (6, 1, 2), (5, 0, 2)]:
        (pixels, key, bad), (pixels2, key2, _) = a[where], b[where]
        assert np.array_equal(pixels, pixels2)
        assert key == key2 == where[0]
        assert np.array_equal(seeds.mask_noise(1, key, 16), seeds.mask_noise(1, key2, 16))
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == torch.uint8
        assert not bad
    assert not np.array_equal(a[(5, 0, 2)][0], a[(5, 1, 2)][0])  # another epoch, another crop
    noise = [seeds.mask_noise(1, a[(position, 0, 2)][1], 16) for position in (5, 6)]
    assert not np.array_equal(*noise)  # another position, another mask


def test_crop_boxes_have_the_promised_statistics():
    augment, rng = Augment((64, 64)), np.random.default_rng(0)
    width, height = 640, 480
    boxes = np.array([augment.box(width, height, rng) for _ in range(4000)], dtype=float)
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    w, h = right - left, bottom - top
    area, aspect = w * h / (width * height), w / h
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() <= 1.0
    assert aspect.min() == pytest.approx(3 / 4, abs=0.01)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.01)
    # Draws that do not fit are drawn again, so area and log aspect are uniform over what fits: integrate over it.
    share, ratio = np.meshgrid(np.linspace(0.2, 1, 801), np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 801)))
    fits = (share * ratio <= width / height) & (share / ratio <= height / width)
    assert area.mean() == pytest.approx(share[fits].mean(), rel=0.02)
    assert area.std() == pytest.approx(share[fits].std(), rel=0.03)
    assert np.log(aspect).mean() == pytest.approx(np.log(ratio[fits]).mean(), abs=0.01)
    small = area < 0.4  # here every aspect ratio fits, so its logarithm is uniform around 0
    assert np.log(aspect[small]).mean() == pytest.approx(0, abs=0.02)
    assert np.log(aspect[small]).std() == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), rel=0.05)
    centre = ((left + right) / 2)[small]
    assert centre.mean() == pytest.approx(width / 2, rel=0.03)
    assert (left[small] == 0).mean() < 0.03


def test_crops_take_the_shape_of_a_target_that_is_not_square():
    augment, rng = Augment((32, 128)), np.random.default_rng(0)
    boxes = np.array([augment.box(1000, 500, rng) for _ in range(500)], dtype=float)
    aspect = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert aspect.min() == pytest.approx(3, rel=0.02)
    assert aspect.max() == pytest.approx(16 / 3, rel=0.02)


def test_a_shape_that_no_draw_fits_gets_the_centre():
    assert Augment((8, 8), scale=(1.0, 1.0)).box(1000, 10, np.random.default_rng(0)) == (493, 0, 506, 10)
    assert Augment((8, 8), scale=(1.0, 1.0)).box(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 506)
    assert Augment((8, 8)).box(1, 1, np.random.default_rng(0)) == (0, 0, 1, 1)


def test_flip_mirrors_about_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    augment = Augment((16, 16))
    flipped = []
    for i in range(400):
        row = np.asarray(augment(ramp, np.random.default_rng(i)))[8].astype(int)
        flipped.append(row[-1] < row[0])
    assert 0.43 < np.mean(flipped) < 0.57
    never = [np.asarray(Augment((16, 16), flip=0.0)(ramp, np.random.default_rng(i)))[8] for i in range(40)]
    assert all(row[-1] > row[0] for row in never)


def test_a_crop_of_everything_is_a_bicubic_resize():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    crop = Augment((20, 20), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)(image, rng)
    assert np.array_equal(np.asarray(crop), np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)))


def test_cache_stops_at_its_bound(photos):
    data = dataset(photos, cache=12_000)
    for index in range(10):
        data[(0, 0, index)]
    sizes = [image.nbytes for image in data._cache.values()]
    assert 0 < len(sizes) < 10
    assert sum(sizes) <= 12_000


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_measures_the_wait_and_gives_batches_in_order(photos, workers):
    data = dataset(photos)
    positions = Positions(10, 1, batch=4, rank=0, world=1, start=0, micro_batches=3)
    loader = Loader(data, positions, workers=workers, pin=False)
    batches = [loader.next() for _ in range(3)]
    assert loader.waited > 0
    for batch, group in zip(batches, positions, strict=True):
        expected = [data[where] for where in group]
        assert torch.equal(batch.images, torch.stack([sample[0] for sample in expected]))
        assert batch.key.tolist() == [sample[1] for sample in expected] == [where[0] for where in group]
        noise = np.stack([seeds.mask_noise(1, where[0], 16) for where in group])
        assert torch.equal(seeds.Draw(1, batch.key).uniform("mask", 16), torch.from_numpy(noise))


def test_normalise():
    mean, std = normaliser(3)
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(normalise(images, mean, std)[0, :, 0, 0], expected)
    assert normaliser(1)[0].shape == (1, 1, 1)
    with pytest.raises(TrainError, match="the model wants 4"):
        normaliser(4)
