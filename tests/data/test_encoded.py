"""`--gpu-decode`: same samples, crops and flips as without it. A CPU decoder stands for the device's."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from maefast import ops
from maefast.data.images import encoded, jpeg, nvimagecodec
from maefast.data.images.augment import Augment
from maefast.data.images.files import find_images, shipped_photographs
from maefast.data.images.pixels import Decoder
from maefast.data.images.samples import TrainImages
from maefast.errors import BadImage, ConfigError
from maefast.train import pretrain
from maefast.train.data import Loader, Positions
from tests.train.common import in_two_parts, losses, rows, tiny_config

Image = pytest.importorskip("PIL.Image")
simplejpeg = pytest.importorskip("simplejpeg")
pytest.importorskip("skimage")


class OnCpu:
    """What `NvImageCodec` does, by simplejpeg. `asked` counts files, `refuse` says which it does not decode."""

    device = torch.device("cpu")

    def __init__(self, refuse: bool = False):
        self.asked, self.calls, self.refuse = 0, 0, refuse

    def __call__(self, files):
        self.asked, self.calls = self.asked + len(files), self.calls + 1
        return [None if self.refuse else torch.from_numpy(simplejpeg.decode_jpeg(bytes(file))) for file in files]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of which the device decodes a0 to a9, and the workers b0 to b4."""
    folder = tmp_path_factory.mktemp("mixed")
    with Image.open(shipped_photographs()[0]) as image:
        photo = image.convert("RGB").resize((201, 150))
    for turned in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = turned
        photo.save(folder / f"a{turned - 1}.jpg", exif=exif, quality=80 + turned)
    photo.save(folder / "a8.jpg", subsampling=0)
    photo.convert("L").save(folder / "a9.jpg")
    photo.save(folder / "b0.png")
    photo.convert("CMYK").save(folder / "b1.jpg")
    photo.save(folder / "b2.jpg", progressive=True)
    photo.save(folder / "b3.jpg", keep_rgb=True)
    (folder / "b4.jpg").write_bytes((folder / "a8.jpg").read_bytes() + b"trailing")
    return folder


def samples(folder, decode=None, channels=3, skip_bad=False, cache=0):
    arguments = find_images(folder), Augment((48, 40)), Decoder(channels)
    rules = {"seed": 3, "skip_bad": skip_bad, "cache": cache}
    if decode is None:
        return TrainImages(*arguments, **rules)
    return encoded.EncodedImages(*arguments, decode=decode, device="cpu", **rules)


def batch_of(data, places):
    batch, bad = data.collate(data.__getitems__(places))
    if batch is None or not hasattr(data, "finish"):
        return batch, bad
    batch, more = data.finish(batch)
    return batch, bad + more


def test_which_files_are_for_the_device(mixed):
    for path in sorted(mixed.iterdir()):
        image = Decoder().open(path)
        taken = isinstance(image, jpeg.Jpeg) and image.space != "RGB" and jpeg.is_baseline(image.data)
        assert taken == path.name.startswith("a"), path.name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache", [0, 10**8])
def test_the_same_samples(mixed, channels, cache):
    decode = OnCpu()
    data, plain = samples(mixed, decode, channels, cache=cache), samples(mixed, None, channels)
    for epoch in range(2):
        places = [(100 + i, epoch, i) for i in range(len(data))]
        (found, bad), (want, _) = batch_of(data, places), batch_of(plain, places)
        assert not bad
        assert found.key.tolist() == want.key.tolist()
        apart = (found.images.int() - want.images.int()).abs()
        assert apart.max() <= 1  # of the resizing
        assert (apart == 0).float().mean() > 0.99
        assert torch.equal(found.images[10:], want.images[10:])
    assert decode.asked == 20


def test_what_the_device_refuses_comes_out_as_ever(mixed):
    data, plain = samples(mixed, OnCpu(refuse=True)), samples(mixed)
    places = [(i, 0, i) for i in range(len(data))]
    assert torch.equal(batch_of(data, places)[0].images, batch_of(plain, places)[0].images)


def test_what_would_shrink_too_much_is_for_the_workers(mixed, monkeypatch):
    monkeypatch.setattr(encoded, "MOST", 0.0)
    decode = OnCpu()
    places = [(i, 0, i) for i in range(15)]
    found, _ = batch_of(samples(mixed, decode), places)
    assert torch.equal(found.images, batch_of(samples(mixed), places)[0].images)
    assert not decode.asked


def test_few_pixels_at_once(mixed, monkeypatch):
    monkeypatch.setattr(encoded, "_AT_ONCE", 3 * 201 * 150)
    decode = OnCpu()
    places = [(i, 0, i) for i in range(8)]
    found, _ = batch_of(samples(mixed, decode), places)
    assert (decode.calls, decode.asked) == (3, 8)
    assert torch.equal(found.images, batch_of(samples(mixed, OnCpu()), places)[0].images)


@pytest.mark.parametrize("harm", ["cut", "inside", "none"])
def test_damaged_files(mixed, tmp_path, harm):
    """The one that is cut off is told by the worker; the one with a fault inside, once the device gave up."""
    good = (mixed / "a8.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(good)
    harmed = {"cut": good[: len(good) // 2], "inside": good.replace(b"\xff\xdb", b"\xff\xe5"), "none": b"nothing"}[harm]
    (tmp_path / "a.jpg").write_bytes(harmed)
    places = [(0, 0, 0), (1, 0, 1)]
    refusing = OnCpu(refuse=True)
    batch, bad = batch_of(samples(tmp_path, refusing), places)
    assert batch is None
    assert [name for name, _ in bad] == [str(tmp_path / "a.jpg")]
    assert isinstance(samples(tmp_path, refusing).failure(bad), BadImage)
    found, bad = batch_of(samples(tmp_path, refusing, skip_bad=True), places)
    assert {name for name, _ in bad} == {str(tmp_path / "a.jpg")}
    assert torch.equal(found.images, batch_of(samples(tmp_path, skip_bad=True), places)[0].images)


@pytest.mark.parametrize("size", [(24, 20), (224, 224), (7, 100)])
def test_resize_is_that_of_ops(size):
    """Within the bound that the documentation names: a grey level, and hardly anywhere."""
    with Image.open(shipped_photographs()[0]) as image:
        photo = np.array(image.convert("RGB").resize((301, 205)))
    noise = np.random.default_rng(0).integers(0, 256, (190, 270, 3), dtype=np.uint8)
    for pixels in map(torch.from_numpy, (photo, photo[31:, 70:], noise, noise[:1], noise[:, :1])):
        apart = (encoded.resize(pixels, size).int() - ops.resize(pixels, size).int()).abs()
        assert apart.max() <= 1
        assert (apart == 0).float().mean() > 0.99


def test_grey_is_pillows():
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert np.array_equal(
        encoded.grey(torch.from_numpy(noise))[..., 0], np.asarray(Image.fromarray(noise).convert("L"))
    )


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(nvimagecodec, "opened", lambda options: OnCpu())


def test_a_run(mixed, tmp_path, on_cpu, monkeypatch):
    """Near the losses without the option; in two parts to the bit; and nothing but the run opens a device."""
    config = tiny_config(mixed, tmp_path / "whole", gpu_decode=True, workers=1, steps=6, picture_rows=2)
    result = pretrain(config)
    parts = replace(config, output_dir=str(tmp_path / "parts"))
    in_two_parts(parts, monkeypatch, 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    pretrain(replace(config, output_dir=str(tmp_path / "plain"), gpu_decode=False))
    column = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("whole", "plain")]
    assert column[0] == pytest.approx(column[1], rel=2e-2)
    monkeypatch.undo()
    from maefast.train.reopen import open_recipe

    assert len(open_recipe(result.checkpoint).data(str(mixed), "--data", tmp_path)) == 15


def test_data_speed_takes_it(mixed, tmp_path, on_cpu):
    from maefast.train.data_speed import data_speed

    config = tiny_config(mixed, tmp_path / "out", gpu_decode=True)
    assert data_speed(config, 0.1, lambda line: None).given[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--gpu-decode needs a CUDA device, and --device cpu has none"),
        ({"pixel_bits": 16}, "--gpu-decode is for photographs of eight bits"),
        ({"value_range": "0,200"}, "--gpu-decode is for photographs of eight bits"),
        ({"stream": True, "steps": 1}, "--gpu-decode is for data with an index"),
        ({"channels": 3}, "--gpu-decode is for photographs of eight bits"),
        ({"recipe": "graphmae", "model_args": {}, "img_size": None, "patch_size": None}, "--gpu-decode means nothing"),
    ],
)
def test_conflicts(mixed, tmp_path, changes, message):
    if "recipe" in changes:
        pytest.importorskip("torch_geometric")
    with pytest.raises(ConfigError, match=message):
        pretrain(tiny_config(mixed, tmp_path / "out", gpu_decode=True, **changes))
    assert not (tmp_path / "out").exists()


def test_what_is_missing(mixed, tmp_path, monkeypatch):
    config = tiny_config(mixed, tmp_path / "out", gpu_decode=True, device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device, and torch sees none"):
        nvimagecodec.opened(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(ConfigError, match=r"nvidia-nvimgcodec-cu13.*maefast\[gpu-decode\]"):
        nvimagecodec.opened(config)
    refusing = OnCpu(refuse=True)
    with pytest.raises(ConfigError, match="decodes no JPEG on cpu; nvJPEG is missing perhaps"):
        nvimagecodec.try_out(refusing)
    nvimagecodec.try_out(OnCpu())


def test_the_library_on_a_cpu(mixed):
    """Its interface, by its own CPU decoder."""
    pytest.importorskip("nvidia.nvimgcodec")
    decode = nvimagecodec.NvImageCodec(torch.device("cpu"))
    nvimagecodec.try_out(decode)
    names = ["a1.jpg", "a9.jpg", "b0.png"]
    files = [np.fromfile(mixed / name, dtype=np.uint8) for name in names] + [np.zeros(9, dtype=np.uint8)]
    *found, refused = decode(files)
    assert refused is None
    for name, pixels in zip(names, found):
        with Image.open(mixed / name) as image:
            want = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(pixels.numpy() - want).mean() < 1


@pytest.mark.gpu
def test_on_a_device(mixed, tmp_path):
    pytest.importorskip("nvidia.nvimgcodec")
    config = tiny_config(mixed, tmp_path / "out", gpu_decode=True, device="auto", workers=1, steps=4)
    decode = nvimagecodec.opened(config)
    data, plain = samples(mixed, decode), samples(mixed)
    data.device = decode.device
    places = [(i, 0, i) for i in range(len(data))]
    found, want = batch_of(data, places)[0].images, batch_of(plain, places)[0].images
    assert found.device == decode.device
    assert (found.cpu().int() - want.int()).abs().float().mean() < 1.5  # the inverse DCT is another
    loader = Loader(
        data, Positions(len(data), 0, batch=4, rank=0, world=1, start=0, micro_batches=2), workers=1, pin=True
    )
    assert loader.next().images.device == decode.device
    loader.close()
    assert pretrain(config).step == 4
