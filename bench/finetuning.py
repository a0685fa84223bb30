"""Whether fine-tuning gains from pre-training: scikit-learn's digits, with all classes known and with a tenth of them.

    python -m bench.finetuning [--seeds 3]        # some minutes on one core

For each seed a small ViT-MAE is pre-trained as in `bench.evidence` and fine-tuned by `maefast finetune`; so are the
random weights that it began with. docs/evidence.md has the figures. Settings are the published ones of ViT-B but for
length and rate, and digits are not flipped; nothing was chosen by looking at the held-back samples.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.environment import describe
from bench.evidence import RUNS, write_digits
from bench.results import RESULTS, save
from maefast.train import PretrainConfig, pretrain
from maefast.train.finetune import Options, finetune
from maefast.train.reopen import open_recipe

RUN = "digits/vit"
STEPS = {"all": 600, "a tenth": 300}
FINE = {"batch_size": 64, "lr": 1e-3, "flip": 0.0, "crop_scale": (0.6, 1.0), "tensorboard": False, "workers": 0}


def write_tenth(folder: Path) -> None:
    """train-tenth.csv: the classes of every tenth training sample."""
    with open(folder / "train-digit.csv", newline="") as file:
        head, *rows = csv.reader(file)
    with open(folder / "train-tenth.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows[::10]])


def record(folder: Path, seed: int, steps: dict[str, int] = STEPS, **changes: Any) -> dict[str, Any]:
    """Accuracies of one seed, by what is known of the classes and what was begun with. `changes`: of the settings of
    the pre-training."""
    settings = {key: value for key, value in (RUNS[RUN] | changes).items() if key != "grey"}
    arguments = {**settings.pop("model_args"), "in_chans": 1}
    data, out = folder / "digits", folder / str(seed)
    common = {"device": "cpu", "workers": 0, "tensorboard": False, "picture_rows": 0, "picture_every": 0}
    pretrain(
        PretrainConfig(
            data=str(data / "train"),
            output_dir=str(out / "run"),
            model_args=arguments,
            seed=seed,
            flip=0.0,
            **common,
            **settings,
        )  # fmt: skip
    )
    opened = open_recipe(out / "run")
    model = opened.with_random_weights(seed).model
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "random.safetensors", {"format": "pt", "maefast": json.dumps(model.config)})
    found: dict[str, Any] = {}
    for known, file in (("all", "train-digit.csv"), ("a tenth", "train-tenth.csv")):
        for name, start in (("pre-trained", out / "run"), ("random weights", out / "random.safetensors")):
            began = time.perf_counter()
            options = Options(
                labels=str(data / file),
                val_data=str(data / "test"),
                val_labels=str(data / "test-digit.csv"),
                eval_every=steps[known],
                run={**FINE, "steps": steps[known], "seed": seed, "device": "cpu"},
            )
            document = finetune(start, str(data / "train"), out / f"{known} {name}", options, say=str)
            seconds = time.perf_counter() - began
            found[f"{known}, {name}"] = {**document, "checkpoint": name, "seconds": seconds}
    return {"seed": seed, "found": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "evidence" / "digits-finetuned-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    environment = describe("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_digits(folder / "digits")
        write_tenth(folder / "digits")
        records = [record(folder, seed) for seed in range(args.seeds)]
    document = {"schema": 1, "kind": "finetuning", "environment": environment, "settings": FINE | {"steps": STEPS}}
    save(args.output, {**document, "records": records})
    for name in records[0]["found"]:
        values = [entry["found"][name]["accuracy"] for entry in records]
        print(f"| {name} | {sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%}) |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
