"""The fused ops alone, in a masked autoencoder of one's own: masking, patches, attention, mask tokens and loss.

python examples/fused_ops.py --bf16

Here for one-channel images of any aspect, such as spectrograms; PyTorch's own modules hold the weights.
"""

from __future__ import annotations

import argparse

import torch
from skimage import data
from torch import Tensor, nn

from maefast import masking, ops


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, H, D], never transposed
        x = x + self.out(ops.attention(qkv).flatten(-2))
        return x + self.mlp(self.norm2(x))


class SpectrogramMAE(nn.Module):
    def __init__(self, shape: tuple[int, int], patch: tuple[int, int] = (16, 4), width: int = 96) -> None:
        super().__init__()
        self.patch, self.count = patch, (shape[0] // patch[0]) * (shape[1] // patch[1])
        self.embed = nn.Conv2d(1, width, patch, patch)  # holds the weights; ops.patch_embed uses them
        self.pos = nn.Parameter(0.02 * torch.randn(self.count, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_pos = nn.Parameter(0.02 * torch.randn(self.count, width))
        self.encoder = nn.Sequential(*(Layer(width, 3) for _ in range(3)), nn.LayerNorm(width))
        self.decoder = nn.Sequential(Layer(width, 3), nn.LayerNorm(width), nn.Linear(width, patch[0] * patch[1]))

    def forward(self, images: Tensor, ratio: float = 0.75) -> Tensor:
        plan = masking.random(len(images), self.count, ratio, device=images.device)
        x = ops.patch_embed(images, self.embed.weight, self.embed.bias, plan, pos=self.pos)  # [B, visible, D]
        x = ops.restore_tokens(self.encoder(x), plan, self.mask_token, pos=self.decoder_pos)  # [B, all, D]
        return ops.patch_loss(self.decoder(x), images, plan, self.patch, norm="mae", rows="all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    high, wide = 64, 96
    photo = torch.from_numpy(data.camera()).to(device)[None] / 127.5 - 1  # ships with scikit-image
    model = SpectrogramMAE((high, wide)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"{model.count} patches of {model.patch[0]} x {model.patch[1]}, three quarters masked")
    for step in range(1, args.steps + 1):
        corners = torch.randint(512 - wide, (args.batch_size, 2)).tolist()
        images = torch.stack([photo[:, top : top + high, left : left + wide] for top, left in corners])
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")


if __name__ == "__main__":
    main()
