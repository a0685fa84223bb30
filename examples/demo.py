"""Pre-train a small masked autoencoder on eleven photographs, in about three minutes on two CPU cores.

    python examples/demo.py        (or: make demo)

The photographs ship inside scikit-image and scikit-learn, so nothing is downloaded. Left in out/demo: the picture of
reconstructions, the loss curve, metrics.csv and the checkpoint. Eleven images are no data set: the model learns these
photographs by heart, which is enough to see that everything works. For the same reason the k-NN accuracy at the end
says only that its features are not those of random weights: crops of one half of each photograph are recognised by
crops of the other half, after a training on both. The last table times one training step of this very model against a
plain eager MAE and Hugging Face's ViTMAE on this machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maefast.data.images.batch import ImageBatch
from maefast.data.images.files import shipped_photographs
from maefast.probe.accuracy import accuracy
from maefast.probe.features import extract, raw_pixels
from maefast.probe.knn import knn
from maefast.train import PretrainConfig, TrainError, pretrain
from maefast.train.reopen import open_recipe

ROOT = Path(__file__).resolve().parents[1]
CROPS = 32  # of each half of each photograph


def demo_config(output_dir: Path, steps: int) -> PretrainConfig:
    """64x64 images, patches of 8, a 192-wide encoder. The model is that of `maefast.bench.step --preset demo`."""
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


def crops(side: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(uint8 [n, 3, side, side], the photograph that each is of, whether it is of its right half): squares of a third
    to two thirds of the height of the half, anywhere in it. Two photographs of one motorcycle are one class."""
    images, labels, right, rng = [], [], [], np.random.default_rng(0)
    for path in shipped_photographs():
        if path.stem == "motorcycle_right":
            continue
        with Image.open(path) as image:
            photo = image.convert("RGB")
        half = photo.width // 2
        for i in range(2 * CROPS):
            width = int(min(half, photo.height) * rng.uniform(1 / 3, 2 / 3))
            left = int(rng.uniform(0, half - width)) + half * (i % 2)
            top = int(rng.uniform(0, photo.height - width))
            crop = photo.crop((left, top, left + width, top + width)).resize((side, side), Image.Resampling.BICUBIC)
            images.append(np.asarray(crop).transpose(2, 0, 1))
            labels.append(path.stem)
            right.append(i % 2 == 1)
    return torch.from_numpy(np.stack(images)), np.unique(labels, return_inverse=True)[1], np.array(right)


def probe(checkpoint: Path, seed: int) -> list[str]:
    """Lines of a table: what was learned, by the k-NN accuracy of the encoder, of random weights and of pixels."""
    opened = open_recipe(checkpoint)
    images, labels, right = crops(opened.recipe.wants.size[0])
    batches = [ImageBatch(part) for part in images.split(64)]

    def features(recipe) -> torch.Tensor:
        return extract(recipe, ((batch, list(range(len(batch))), []) for batch in batches), "cpu").mean

    rows = {
        "pre-trained": features(opened.recipe),
        "random weights": features(opened.with_random_weights(seed)),
        "pixels": torch.cat([raw_pixels(batch) for batch in batches]),
    }
    lines = [
        f"k-NN accuracy (95 % interval): which of {labels.max() + 1} photographs is a crop of? {right.sum()} crops of",
        f"right halves, held back, by {(~right).sum()} of left halves. The training saw both halves, without labels.",
    ]
    for name, found in rows.items():
        answers = knn(found[~right], labels[~right], found[right])
        lines.append(f"  {name:16}{accuracy(answers, labels[right])}")
    return lines


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
    print("\n".join(probe(result.checkpoint, demo_config(args.output_dir, args.steps).seed)), "\n", sep="")
    if args.no_bench:
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return subprocess.run(
        [sys.executable, "-m", "maefast.bench.step", "--preset", "demo", "--device", device], cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
