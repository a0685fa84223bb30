"""Whether pre-training teaches anything: probes of small models before and after it, on data that need no download.

    maefast bench evidence                      # all, some minutes on two cores
    maefast bench evidence --only digits/vit --seeds 1

Two sets: scikit-learn's digits (1797 scans of 8 x 8, enlarged), and shapes that are drawn here, with known factors
(shape, colour, place), each on a background of its own. Two models: a small ViT-MAE and a small FCMAE. For each of
several seeds a model is pre-trained without labels on the training part; k-NN and linear probes of its features on
held-back samples are written down beside those of the weights that it started from, and of raw pixels.
docs/evidence.md has the tables.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from maefast.bench.environment import describe
from maefast.bench.results import RESULTS, save
from maefast.probe.accuracy import majority
from maefast.probe.watch import read_rows
from maefast.train import PretrainConfig, pretrain
from maefast.train.probe import Options, Probe
from maefast.train.reopen import open_recipe

SHAPES = ("disc", "square", "triangle", "pentagon", "star", "cross", "ring", "bar")
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
TRAIN, TEST = 3000, 1000  # shapes
_FINE = 4  # shapes are drawn so many times larger

VIT = {"model": "mae", "model_args": {"embed_dim": 96, "depth": 4, "num_heads": 4, "decoder_embed_dim": 48,
       "decoder_depth": 2, "decoder_num_heads": 4}, "lr": 2e-3, "batch_size": 64}  # fmt: skip
FCMAE = {"model": "fcmae", "model_args": {"depths": [1, 1, 2, 1], "widths": [24, 48, 96, 192], "decoder_embed_dim": 96},
         "lr": 2e-3, "batch_size": 32}  # fmt: skip
RUNS = {
    "digits/vit": {**VIT, "img_size": 32, "patch_size": 4, "steps": 1200, "grey": True},
    "digits/fcmae": {**FCMAE, "img_size": 96, "steps": 1000, "grey": True},
    "shapes/vit": {**VIT, "img_size": 32, "patch_size": 4, "steps": 1500, "norm_pix": False},
    "shapes/fcmae": {**FCMAE, "img_size": 96, "steps": 3000, "norm_pix": False},
}
LABELS = {"digits": ("digit",), "shapes": ("shape", "colour", "place")}


def write_digits(folder: Path) -> None:
    """train/ and test/ (every fifth) as PNGs of 32 x 32, and test.csv, train.csv with the column "digit"."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows: dict[str, list] = {"train": [], "test": []}
    for i, (image, digit) in enumerate(zip(digits.images, digits.target.tolist())):
        part = "train" if i % 5 else "test"
        path = folder / part / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8))
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(path)
        rows[part].append((path.name, digit))
    for part, found in rows.items():
        _write_labels(folder, part, {"digit": found})


def write_shapes(folder: Path, size: int = 96) -> None:
    """TRAIN and TEST pictures of one shape each, and CSV files of their factors. Position, size, angle, shade and
    background vary beside."""
    for part, count, first in (("train", TRAIN, 0), ("test", TEST, TRAIN)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows: dict[str, list] = {factor: [] for factor in LABELS["shapes"]}
        for i in range(count):
            image, factors = draw_shape(np.random.default_rng([1, first + i]), size)
            image.save(folder / part / f"{i:05d}.png")
            for factor, value in factors.items():
                rows[factor].append((f"{i:05d}.png", value))
        _write_labels(folder, part, rows)


def _write_labels(folder: Path, part: str, rows: dict[str, list]) -> None:
    for factor, found in rows.items():
        with open(folder / f"{part}-{factor}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file", "label"), *found])


def draw_shape(rng: np.random.Generator, size: int) -> tuple[Image.Image, dict[str, str]]:
    shape, hue, place = rng.integers(len(SHAPES)), rng.integers(len(HUES)), rng.integers(4)
    x, y = ((0.4 + 0.2 * (place >> bit & 1) + rng.uniform(-0.06, 0.06)) for bit in (0, 1))
    radius, angle = rng.uniform(0.22, 0.32), rng.uniform(0, 2 * np.pi)
    outline = [
        ((x + radius * r * np.cos(angle + a)) * size * _FINE, (y + radius * r * np.sin(angle + a)) * size * _FINE)
        for r, a in _outline(SHAPES[shape])
    ]
    mask = Image.new("L", (size * _FINE, size * _FINE))
    pen = ImageDraw.Draw(mask)
    pen.polygon(outline, fill=255)
    if SHAPES[shape] == "ring":
        inner = [(0.55 * px + 0.45 * x * size * _FINE, 0.55 * py + 0.45 * y * size * _FINE) for px, py in outline]
        pen.polygon(inner, fill=0)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    colour = _colour((hue + rng.uniform(-0.2, 0.2)) / len(HUES), rng.uniform(0.6, 1), rng.uniform(0.5, 1))
    # A slope between two greyish colours, and noise.
    ends = np.array([_colour(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.2, 0.9)) for _ in range(2)])
    down, across = np.mgrid[:size, :size] / size
    along = across * np.cos(slope := rng.uniform(0, 2 * np.pi)) + down * np.sin(slope)
    along = ((along - along.min()) / np.ptp(along))[..., None]
    ground = ends[0] * (1 - along) + ends[1] * along
    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255
    pixels = ground * (1 - cover) + np.array(colour) * cover + rng.normal(0, 0.01, (size, size, 3))
    image = Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
    names = {"shape": SHAPES[shape], "colour": HUES[hue]}
    return image, {**names, "place": f"{('top', 'bottom')[place >> 1]} {('left', 'right')[place & 1]}"}


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners as (radius, angle), about the same area for all."""
    corners = {"triangle": 3, "square": 4, "pentagon": 5}.get(shape)
    if corners:
        return [(1.1, 2 * np.pi * i / corners) for i in range(corners)]
    if shape in ("disc", "ring"):
        return [(1.0, 2 * np.pi * i / 48) for i in range(48)]
    if shape == "star":
        return [(1.25 if i % 2 == 0 else 0.5, np.pi * i / 5) for i in range(10)]
    points = {
        "cross": [(1.2, .35), (.35, .35), (.35, 1.2), (-.35, 1.2), (-.35, .35), (-1.2, .35),
                  (-1.2, -.35), (-.35, -.35), (-.35, -1.2), (.35, -1.2), (.35, -.35), (1.2, -.35)],
        "bar": [(1.4, .45), (-1.4, .45), (-1.4, -.45), (1.4, -.45)],
    }[shape]  # fmt: skip
    return [(float(np.hypot(px, py)), float(np.arctan2(py, px))) for px, py in points]


def _colour(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def config_of(name: str, folder: Path, out: Path, seed: int) -> PretrainConfig:
    data = name.split("/")[0]
    options = dict(RUNS[name])
    if options.pop("grey", False):
        options["model_args"] = {**options["model_args"], "in_chans": 1}
    return PretrainConfig(
        **options, data=str(folder / data / "train"), output_dir=str(out), seed=seed, device="cpu", workers=1,
        # A digit that is turned over is none, and small crops show no digit.
        flip=0.0 if data == "digits" else 0.5, crop_scale=(0.6, 1.0), warmup=0.1, clip=1.0,
        picture_every=0, picture_rows=0, tensorboard=False, save_every=10**6, log_every=100,
        probe_every=options["steps"] // 5, probe_data=str(folder / data / "train"),
        probe_labels=str(folder / data / f"train-{LABELS[data][0]}.csv"),
    )  # fmt: skip


def record(name: str, folder: Path, out: Path, seed: int) -> dict[str, Any]:
    """One seed of one run: accuracies by label and features, the loss, the k-NN accuracy on the way. Pixels, which no
    seed changes, are probed with the first."""
    began, data = time.monotonic(), name.split("/")[0]
    result = pretrain(config_of(name, folder, out, seed))
    took, probes, opened = time.monotonic() - began, {}, open_recipe(out)
    for label in LABELS[data]:
        files = {part: str(folder / data / f"{part}-{label}.csv") for part in ("train", "test")}
        options = Options(labels=files["train"], test=str(folder / data / "test"), test_labels=files["test"], seed=seed)
        asked = Probe(opened, str(folder / data / "train"), options, out / "probe", say=str)
        rows = {"pre-trained": asked.features, "random weights": asked.of(asked.random_weights())}
        if seed == 0:
            rows["pixels"] = asked.of_pixels()
        probes[label] = {row: asked.judged(features) for row, features in rows.items()}
        probes[label]["most frequent class"] = majority(asked.labels[asked.learn], asked.labels[asked.held]).to_dict()
    curve = [(int(row["step"]), float(row["knn"])) for row in read_rows(out / "probe.csv")]
    return {"run": name, "seed": seed, "loss": result.loss, "seconds": took, "probes": probes, "knn_on_the_way": curve}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=sorted(RUNS), help="instead of all; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "evidence", help="folder; a file for each run")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    lines, environment = [], describe("cpu")  # of the code that runs, whatever happens to the files meanwhile
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_digits(folder / "digits")
        write_shapes(folder / "shapes")
        for name in args.only or RUNS:
            records = [record(name, folder, folder / "runs" / name / str(seed), seed) for seed in range(args.seeds)]
            document = {"schema": 1, "kind": "evidence", "environment": environment, "settings": RUNS[name]}
            save(args.output / f"{name.replace('/', '-')}-cpu.json", {**document, "records": records})
            lines += summary(records)
    print("\n".join(["| run, label | features | k-NN | linear |", "|---|---|---|---|", *lines]))
    return 0


def summary(records: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown: mean over the seeds, and the lowest and the highest."""
    lines = []
    for name in dict.fromkeys(entry["run"] for entry in records):
        ours = [entry["probes"] for entry in records if entry["run"] == name]
        for label in ours[0]:
            for row in ("pre-trained", "random weights", "pixels"):
                cells = []
                for kind in ("knn", "linear"):
                    values = [probes[label][row][kind]["accuracy"] for probes in ours if row in probes[label]]
                    spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
                    cells.append(f"{sum(values) / len(values):.1%}{spread}")
                lines.append(f"| {name}, {label} | {row} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
