"""What the examples of training loops learn: crops of one photograph, by a small Hugging Face ViTMAE.

Put your data and your model in their place, e.g. ``ViTMAEForPreTraining.from_pretrained("facebook/vit-mae-base")``.
"""

from __future__ import annotations

import torch
from skimage import data
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ViTMAEConfig, ViTMAEForPreTraining


class Crops(Dataset):
    """`length` square crops, always the same ones, of the astronaut that ships with scikit-image. Values in [-1, 1]."""

    def __init__(self, length: int, size: int = 64) -> None:
        self.photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 127.5 - 1
        self.length = length
        self.size = size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        corner = torch.Generator().manual_seed(index)
        high, wide = (extent - self.size + 1 for extent in self.photo.shape[1:])
        top, left = int(torch.randint(high, (), generator=corner)), int(torch.randint(wide, (), generator=corner))
        return self.photo[:, top : top + self.size, left : left + self.size]


def vit_mae(size: int = 64) -> ViTMAEForPreTraining:
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=size,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=384,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=256,
            norm_pix_loss=True,
        )
    )
