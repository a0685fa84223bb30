"""Pre-train a small masked autoencoder on eleven photographs, in about three minutes on two CPU cores.

    python examples/demo.py        (or: make demo)

The photographs ship inside scikit-image and scikit-learn, so nothing is downloaded. Left in out/demo: the picture of
reconstructions, the loss curve, metrics.csv and the checkpoint. Eleven images are no data set: the model learns these
photographs by heart, which is enough to see that everything works. The last table times one training step of this
very model against a plain eager MAE and Hugging Face's ViTMAE on this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from maefast.train import PretrainConfig, TrainError, pretrain

ROOT = Path(__file__).resolve().parents[1]


def demo_config(output_dir: Path, steps: int) -> PretrainConfig:
    """64x64 images, patches of 8, a 192-wide encoder. The model is that of `bench.step --preset demo`."""
    return PretrainConfig(
        data="skimage",
        output_dir=str(output_dir),
        model="mae_tiny",
        model_args={"depth": 3, "decoder_depth": 3},
        img_size=64,
        patch_size=8,
        # Pictures need colours: with normalised targets a patch's mean comes from the original, not from the model.
        norm_pix=False,
        steps=steps,
        batch_size=64,
        # blr 1.5e-4 is for hundreds of epochs of a million images. A run this short needs a rate this high.
        lr=3e-3,
        warmup=0.1,
        clip=1.0,
        # Gentle crops, near the centred squares that the picture shows: it is to learn eleven photographs by heart.
        crop_scale=(0.75, 1.0),
        crop_ratio=(0.95, 1.05),
        flip=0.0,
        workers=1,
        picture_every=steps // 4,
        picture_rows=7,
        save_every=200,
        tensorboard=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--no-bench", action="store_true", help="leave out the comparison at the end")
    args = parser.parse_args()

    began = time.monotonic()
    try:
        result = pretrain(demo_config(args.output_dir, args.steps))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.stopped:
        return 0
    print(f"\nloss {result.loss:.4f} after {result.step} steps, {time.monotonic() - began:.0f} s. Look at:")
    for name in ("reconstruction.png", "loss_curve.png", "metrics.csv"):
        print(f"  {args.output_dir / name}")
    print(f"  {result.checkpoint}\n(to train again, remove {args.output_dir})\n")
    if args.no_bench:
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return subprocess.run(
        [sys.executable, "-m", "bench.step", "--preset", "demo", "--device", device], cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
