"""Models too small for kernels, as they are and accelerated: `accelerate` must not make them slower.

    maefast bench toys [--threads N] [--rounds N] [--device cpu|cuda] [--json FILE]

96 wide, 3 blocks, batch 4, 32 x 32 images in patches of 4: I-JEPA, ViT for masked image modelling, DINOv2 and
ViTMAE of transformers, the structure of facebookresearch/mae, a fork of it for spectrograms and one with a
cross-attention decoder. A step is forward and backward; each pair is timed in
turn, and the ratio is that of the minima. --device cuda has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

import maefast
from maefast.bench import environment, machine, results
from maefast.bench.micro import tables
from maefast.bench.peers import dropin_hf, dropin_vits, toy_models
from maefast.bench.worth import fastest, settle_memory

WIDTH, DEPTH, BATCH, SIDE, PATCH = 96, 3, 4, 32, 4
SIZES = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
DECODER = {"decoder_embed_dim": WIDTH, "decoder_depth": 1, "decoder_num_heads": 3}
HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "attn_implementation": "sdpa",
}


def _ijepa() -> nn.Module:
    from transformers import IJepaConfig, IJepaModel

    return IJepaModel(IJepaConfig(**HF, intermediate_size=4 * WIDTH))


def _vit_mim() -> nn.Module:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    return ViTForMaskedImageModeling(ViTConfig(**HF, intermediate_size=4 * WIDTH, encoder_stride=PATCH))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**HF))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "HF I-JEPA": _ijepa,
    "HF ViT for masked image modelling": _vit_mim,
    "HF DINOv2": _dinov2,
    "HF ViTMAE": partial(dropin_hf.hf_vitmae, {**SIZES, **DECODER}),
    "mae (structure)": partial(dropin_vits.own_mae, {**SIZES, **DECODER}),
    "mae's fork for spectrograms": partial(toy_models.SpectrogramMAE, 2 * SIDE, SIDE // 2, **SIZES, **DECODER),
    "mae with cross-attention": partial(toy_models.CrossMAE, **SIZES, **DECODER),
}


def _loss(out: object) -> Tensor:
    found = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if found is None:
        found = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", getattr(out, "logits", None))
    return found.float().square().mean()


def _step(model: nn.Module, images: Tensor, dtype: str) -> Callable[[], None]:
    device = images.device
    cast = torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    mask = torch.zeros(BATCH, (SIDE // PATCH) ** 2, dtype=torch.bool, device=device)
    mask[:, ::2] = True
    given = {"bool_masked_pos": mask} if "MaskedImage" in type(model).__name__ else {}

    def step() -> None:
        with cast:
            loss = _loss(model(images, **given))
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def compare(name: str, dtype: str, rounds: int, device: str = "cpu", limits: dict | None = None) -> dict:
    """The record of a model; its FLOPs are those of the model as it is. limits: what `machine.measure` found."""
    torch.manual_seed(0)
    model = MODELS[name]().train().to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = maefast.accelerate(copy.deepcopy(model))
    shape = (1, 2 * SIDE, SIDE // 2) if isinstance(model, toy_models.SpectrogramMAE) else (3, SIDE, SIDE)
    images = torch.randn(BATCH, *shape).to(device)
    steps = [_step(net, images, dtype) for net in (model, fast)]
    best = fastest(steps, rounds, least=30e-3, device=device)  # about five steps
    record = {"model": name, "dtype": dtype, "ms": [1e3 * t for t in best], "ratio": best[0] / best[1]}
    return record | machine.share(limits, dtype, machine.count_flops(steps[0]), *best)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if machine.absent("maefast bench toys", args.device):
        return 3
    if args.threads:
        torch.set_num_threads(args.threads)
    environment.exact_float32()
    settle_memory()
    limits, where, found = machine.measure(args.device), environment.describe(args.device), []
    label = "toys" if args.device == "cuda" else f"toys-{torch.get_num_threads()}-threads"
    cases = [(dtype, name) for dtype in ("float32", "bfloat16") for name in MODELS]
    for dtype, name in cases:
        record = compare(name, dtype, args.rounds, args.device, limits)
        found.append(record)
        plain, fast = record["ms"]
        print(
            f"{dtype:9} {name:36} {plain:7.2f} ms as it is {fast:7.2f} ms accelerated {record['ratio']:5.2f}x, "
            f"of limit {tables.of_limit(record)}",
            flush=True,
        )
        left = len(cases) - len(found)
        settings = {"rounds": args.rounds, "machine": limits, "cases_left_out": left}
        doc = results.document("toys", where, settings, ["as it is", "accelerated"], found)
        results.keep(args, doc, label, final=not left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
