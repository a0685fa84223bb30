"""resize: crops of photographs of 500 x 375 pixels to the size of a batch. The peer is Pillow's crop and resize, as
torchvision's RandomResizedCrop does it for images of Pillow's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import resize

BOX = (40, 30, 460, 345)  # left, top, right, bottom


def make(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    images = torch.randint(0, 256, (shape.batch, 375, 500, 3), generator=generator, dtype=torch.uint8)
    return {"images": images, "size": shape.size}


def pillow(inputs: Inputs) -> Tensor:
    from PIL import Image

    made = []
    for image in inputs["images"]:
        crop = Image.fromarray(image.numpy()).crop(BOX)
        crop = crop.resize(inputs["size"][::-1], Image.Resampling.BICUBIC)
        made.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(made)


def ours(inputs: Inputs, backend: str | None) -> Tensor:
    left, top, right, bottom = BOX
    images, size = inputs["images"], inputs["size"]
    out = torch.empty(len(images), 3, *size, dtype=torch.uint8)
    for image, place in zip(images, out):
        resize(image[top:bottom, left:right], size, out=place, backend=backend)
    return out


def traffic(shape: Shape, item: int) -> tuple[int, int]:
    """Bytes of the crop in, bytes of the image out."""
    left, top, right, bottom = BOX
    return 3 * shape.batch * ((right - left) * (bottom - top) + shape.size[0] * shape.size[1]), 0


OPS = [
    Op(
        "resize",
        ("resize",),
        make,
        pillow,
        pillow,
        ours,
        dtypes=(torch.float32,),  # of nothing: all are bytes
        traffic=traffic,
        view=lambda out: (out.double(),),
        devices=("cpu",),
        named=True,
    )
]


def bench_resize(report):
    report()
