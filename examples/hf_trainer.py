"""Hugging Face's Trainer with an accelerated ViTMAE. What it saves is loaded by plain transformers.

python examples/hf_trainer.py --bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import toy
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTMAEForPreTraining

import maefast


def collate(images: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="of the images, a multiple of 8")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--output-dir", type=Path, default=Path("out/hf_trainer"))
    args = parser.parse_args()

    torch.manual_seed(0)
    # The one line. A fresh ViTMAE has empty position tables, which the option fills; with weights it needs none.
    model = maefast.accelerate(toy.vit_mae(args.size), repair_positions=True)
    print(maefast.report(model))
    if args.recompute:
        model.gradient_checkpointing_enable()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-3,
            bf16=args.bf16,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=toy.Crops(256, args.size),
        data_collator=collate,
    )
    trainer.train()
    model.save_pretrained(args.output_dir)

    # Anybody loads it, with maefast or without.
    plain = ViTMAEForPreTraining.from_pretrained(args.output_dir)
    images, noise = torch.stack([trainer.train_dataset[i] for i in range(8)]), torch.rand(8, (args.size // 8) ** 2)
    with torch.no_grad():
        losses = [net.cpu().eval()(images, noise=noise).loss.item() for net in (model, plain)]
    print(f"loss of the same 8 images: accelerated {losses[0]:.6f}, as saved and loaded {losses[1]:.6f}")


if __name__ == "__main__":
    main()
