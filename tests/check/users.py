"""A file as a user has it, for the tests: models, batches, and what goes wrong with both."""

TEXT = '''
import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.bench.peers.public.videomae import VideoMAE

SIZES = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=1,
             decoder_num_heads=2)
video = VideoMAE


def mae():
    return MaskedAutoencoderViT(**SIZES)


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def linear():
    return nn.Linear(4, 4)


@dataclass
class Output:
    pred: Tensor
    rest: dict


class Nested(MaskedAutoencoderViT):
    def __init__(self):
        super().__init__(**SIZES)

    def forward(self, imgs):
        loss, pred, mask = super().forward(imgs)
        return Output(pred, {"others": [mask, (loss.expand(3), "text", None)]})


class Text(MaskedAutoencoderViT):
    def __init__(self):
        super().__init__(**SIZES)

    def forward(self, imgs):
        super().forward(imgs)
        return "a text"


class Restless(MaskedAutoencoderViT):
    """Another result at every call, whatever the seed."""

    def __init__(self):
        super().__init__(**SIZES)

    def forward(self, imgs):
        loss, pred, mask = super().forward(imgs)
        return loss * random.SystemRandom().random(), pred, mask


class Averages(MaskedAutoencoderViT):
    """Its result depends on how often it was called before."""

    def __init__(self):
        super().__init__(**SIZES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, imgs):
        self.calls += 1
        loss, pred, mask = super().forward(imgs)
        return loss * self.calls, pred, mask


class Leaves(MaskedAutoencoderViT):
    def __init__(self):
        super().__init__(**SIZES)

    def forward(self, imgs):
        raise SystemExit(0)


def frozen():
    return mae().requires_grad_(False)


def meta():
    with torch.device("meta"):
        return mae()


model = mae()


def same():
    return model


def wants(size, *, depth):
    return mae()


def raises():
    raise ValueError("no such checkpoint")


def leaves():
    sys.exit()


def number():
    return 3


def half_meta():
    model = mae()
    model.register_buffer("table", torch.zeros(3, device="meta"))
    return model


def not_numbers():
    return torch.full((2, 3, 32, 32), float("nan"))


def images():
    return torch.randn(3, 3, 32, 32)


def keywords():
    return {"imgs": torch.randn(3, 3, 32, 32), "mask_ratio": 0.5}


def videos():
    return [torch.randn(1, 3, 4, 16, 16), torch.rand(1, 32).argsort(1) >= 4]
'''
