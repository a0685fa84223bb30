"""Lightning: the accelerated model is one line in the LightningModule; its checkpoints fit the model as it was.

python examples/lightning_loop.py --precision bf16-mixed
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
import toy
from torch import Tensor
from torch.utils.data import DataLoader

import maefast


class MaskedAutoencoder(lightning.LightningModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        # The one line. A fresh ViTMAE has empty position tables, which the option fills; with weights it needs none.
        self.model = maefast.accelerate(toy.vit_mae(size), repair_positions=True)

    def training_step(self, images: Tensor, index: int) -> Tensor:
        loss = self.model(images).loss
        self.print(f"step {index + 1} loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="of the images, a multiple of 8")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, bf16-true, ...")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/lightning.ckpt"))
    args = parser.parse_args()

    lightning.seed_everything(0)
    module = MaskedAutoencoder(args.size)
    print(maefast.report(module))
    crops = DataLoader(toy.Crops(args.steps * args.batch_size, args.size), args.batch_size)
    trainer = lightning.Trainer(
        precision=args.precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, crops)
    trainer.save_checkpoint(args.checkpoint)

    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    plain = toy.vit_mae(args.size)  # not accelerated
    plain.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    print(f"saved {args.checkpoint}; the model without maefast takes its weights")


if __name__ == "__main__":
    main()
