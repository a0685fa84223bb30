"""Images a second that loaders give on one core: photographs of 500 x 375 pixels as JPEG files, crops of 224 x 224.

    maefast bench data [--images 200] [--rounds 5] [--workers 1 2] [--json FILE]

Beside ours, in turn, the least time of each:

- decode: libjpeg-turbo alone, every pixel of every file (simplejpeg), and Pillow alone; a loader's share of the first
  says how near it comes to what the core can do (above 100 % where it decodes less than every pixel);
- torchvision: what published MAE code does (`RandomResizedCrop`, flip, `ToTensor`, `Normalize` on Pillow's images),
  written out, for the registry's torchvision does not import beside every torch;
- datasets: those transforms on rows of a table of Hugging Face's `datasets` with an `Image` column, as its fine-tuning
  scripts do, by torch's DataLoader; left out, saying so, where `datasets` is not installed (it is in no extra, for it
  brings pandas);
- timm: the same up to the crop, bytes to the batch (its `fast_collate`), normalised on the device;
- before: this loader before it had `ops.resize` and simplejpeg.

All sides draw a crop for each image anew and give batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from maefast.bench import environment, results
from maefast.data.images.augment import Augment
from maefast.data.images.files import find_images, shipped_photographs
from maefast.data.images.jpeg import GAP
from maefast.data.images.pixels import Decoder, crop, to_array
from maefast.data.images.samples import TrainImages
from maefast.train.data import Loader, Positions

if TYPE_CHECKING:
    from PIL import Image

SIZE, BATCH = (224, 224), 50
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def write_files(folder: Path, count: int) -> list[Path]:
    """Parts of the shipped photographs, quality 90."""
    from PIL import Image

    rng, paths = np.random.default_rng(0), []
    photos = [Image.open(path).convert("RGB") for path in shipped_photographs()]
    for index in range(count):
        photo = photos[index % len(photos)]
        width = int(min(photo.width, photo.height / 0.75) * rng.uniform(0.7, 1))
        left, top = (int(rng.uniform(0, side)) for side in (photo.width - width, photo.height - width * 0.75))
        part = photo.crop((left, top, left + width, top + int(width * 0.75))).resize((500, 375))
        paths.append(folder / f"{index:04}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def sides(folder: Path, paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What is timed: each goes through all files once."""
    import simplejpeg
    from PIL import Image

    augment, decoder, rng = Augment(SIZE), Decoder(), np.random.default_rng(0)
    data = TrainImages(find_images(folder), augment, decoder, seed=0, skip_bad=False, cache=0)
    epoch = iter(range(10**9))

    def ours() -> None:
        now = next(epoch)
        for start in range(0, len(paths), BATCH):
            data.collate(data.__getitems__([(i, now, i) for i in range(start, min(len(paths), start + BATCH))]))

    def cut(path: Path) -> Image.Image:
        return drawn(Image.open(path))

    def drawn(image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        image = crop(image, augment.box(image.width, image.height, rng)).resize(SIZE, Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def normalised(image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.float().div_(255) - MEAN) / STD

    def torchvision() -> None:
        made = [normalised(cut(path)) for path in paths]
        for start in range(0, len(made), BATCH):
            torch.stack(made[start : start + BATCH])

    def timm() -> None:
        for start in range(0, len(paths), BATCH):
            some = paths[start : start + BATCH]
            batch = torch.empty(len(some), 3, *SIZE, dtype=torch.uint8)
            for place, path in zip(batch, some):
                place.copy_(torch.from_numpy(np.array(cut(path)).transpose(2, 0, 1)))

    def before() -> None:
        for start in range(0, len(paths), BATCH):
            made = []
            for path in paths[start : start + BATCH]:
                image = decoder(path)
                image = crop(image, augment.box(image.width, image.height, rng))
                image = image.resize(SIZE, Image.Resampling.BICUBIC, reducing_gap=GAP)
                if rng.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                made.append(to_array(image, 3))
            torch.from_numpy(np.stack(made))

    return {
        "decode, simplejpeg": lambda: [simplejpeg.decode_jpeg(path.read_bytes(), "RGB") for path in paths],
        "decode, Pillow": lambda: [np.asarray(Image.open(path).convert("RGB")) for path in paths],
        "torchvision": torchvision,
        **_datasets(paths, lambda image: normalised(drawn(image))),
        "timm": timm,
        "before": before,
        "maefast": ours,
    }


def _datasets(paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> dict[str, Callable[[], object]]:
    """The side of `datasets`, if it is there: a transform from Pillow's images, called when rows are read."""
    try:
        import datasets
    except ImportError:
        print("datasets: not installed (pip install datasets), left out")
        return {}
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths]})
    table = table.cast_column("image", datasets.Image())
    table.set_transform(lambda rows: {"pixel_values": [transform(image) for image in rows["image"]]})
    loader = DataLoader(table, batch_size=BATCH)  # whose own collate stacks the rows
    return {"datasets": lambda: [batch["pixel_values"] for batch in loader]}


def loader_speed(folder: Path, workers: int, seconds: float = 5.0) -> float:
    """Images a second from `maefast.train`'s loader with so many processes."""
    data = TrainImages(find_images(folder), Augment(SIZE), Decoder(), seed=0, skip_bad=False, cache=0)
    positions = Positions(len(data), 0, batch=BATCH, rank=0, world=1, start=0, micro_batches=10**6)
    loader = Loader(data, positions, workers=workers, pin=False)
    try:
        for _ in range(1 + 4 * workers):
            loader.next()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            loader.next()
            count += BATCH
        return count / (time.perf_counter() - began)
    finally:
        loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    results.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_files(folder, args.images)
        timed = sides(folder, paths)
        best = dict.fromkeys(timed, float("inf"))
        for _ in range(args.rounds + 1):
            for side, run in timed.items():
                began = time.perf_counter()
                run()
                best[side] = min(best[side], time.perf_counter() - began)
        speed = {side: len(paths) / seconds for side, seconds in best.items()}
        for side, rate in speed.items():
            share = rate / speed["decode, simplejpeg"]
            print(
                f"{side:20} {rate:7.0f} images/s on a core, ours over it {speed['maefast'] / rate:5.2f}x, "
                f"{share:4.0%} of decoding alone"
            )
        loaders = {workers: loader_speed(folder, workers) for workers in args.workers}
        for workers, rate in loaders.items():
            print(f"loader, {workers} workers: {rate:.0f} images/s")
    records = [{"side": side, "workers": 0, "images_per_s": rate} for side, rate in speed.items()]
    records += [{"side": "maefast", "workers": workers, "images_per_s": rate} for workers, rate in loaders.items()]
    settings = {"images": args.images, "rounds": args.rounds}
    results.keep(args, results.document("data", environment.describe("cpu"), settings, list(speed), records), "data")


if __name__ == "__main__":
    main()
