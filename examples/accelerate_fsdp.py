"""Hugging Face Accelerate with FSDP2: an accelerated ViTMAE, sharded over processes block by block.

torchrun --nproc-per-node 2 examples/accelerate_fsdp.py            (two GPUs, or two processes on a CPU)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import toy
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader

import maefast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--size", type=int, default=64, help="of the images, a multiple of 8")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--output-dir", type=Path, default=Path("out/accelerate_fsdp"))
    args = parser.parse_args()

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTMAELayer"],  # the names of classes stay
    )
    accelerator = Accelerator(
        fsdp_plugin=plugin, mixed_precision=args.mixed_precision, cpu=not torch.cuda.is_available()
    )
    if accelerator.device.type == "cpu":  # PyTorch shards there too; Accelerate, of itself, does not
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin

    set_seed(0)
    # The one line, before the model is sharded, while its parts can still be compared with their own code. A fresh
    # ViTMAE has empty position tables, which the option fills; with weights it needs none.
    model = maefast.accelerate(toy.vit_mae(args.size), repair_positions=True)
    accelerator.print(maefast.report(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    count = args.steps * args.batch_size * accelerator.num_processes
    loader = DataLoader(toy.Crops(count, args.size), args.batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sharded = sum(type(p).__name__ == "DTensor" for p in model.parameters())
    accelerator.print(f"{accelerator.num_processes} processes, {sharded} sharded parameters")

    set_seed(accelerator.process_index)  # other masks in every process
    for step, images in enumerate(loader, 1):
        loss = model(images).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step} loss {accelerator.reduce(loss.detach(), 'mean').item():.6f}")

    # Whole tensors under their own names: ViTMAEForPreTraining.from_pretrained(output_dir) loads them.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=state)
    accelerator.print(f"saved {args.output_dir}")
    # No process leaves while another still saves: one that ends with its collectives' threads at work is aborted.
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
