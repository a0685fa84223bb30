"""A plain PyTorch loop around an accelerated ViTMAE: bfloat16, a checkpoint at the end, and resuming from it.

python examples/plain_loop.py --bf16 && python examples/plain_loop.py --bf16 --steps 60 --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import toy
from torch.utils.data import DataLoader, Subset

import maefast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="of the images, a multiple of 8")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/plain_loop.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    model = toy.vit_mae(args.size).to(device)
    # The one line. A fresh ViTMAE has empty position tables, which the option fills; with weights it needs none.
    model = maefast.accelerate(model, repair_positions=True)
    print(maefast.report(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    start = 0
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])  # one that was saved without maefast loads as well
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    crops = toy.Crops(args.steps * args.batch_size, args.size)
    rest = Subset(crops, range(start * args.batch_size, len(crops)))
    for step, images in enumerate(DataLoader(rest, args.batch_size, generator=torch.Generator()), start + 1):
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = model(images.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")

    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save({"step": args.steps, **states}, args.checkpoint)
    print(f"saved {args.checkpoint}")


if __name__ == "__main__":
    main()
