"""Whether fine-tuning gains from pre-training: scikit-learn's digits, with all classes known and with a tenth of them.

    maefast bench finetuning [--seeds 3]        # some minutes on one core

For each seed a small ViT-MAE is pre-trained as in `maefast.bench.evidence`, and fine-tuned by
`maefast finetune`; so are the random weights that it began with. docs/evidence.md has the figures. Settings are the
published ones of ViT-B but for length, rate and crops, and digits are neither mixed nor flipped; nothing was chosen by
looking at the held-back samples.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from maefast.bench.environment import describe
from maefast.bench.evidence import config_of, write_digits
from maefast.bench.results import RESULTS, save
from maefast.train import pretrain
from maefast.train.finetune import Options, finetune
from maefast.train.reopen import open_recipe

BEFORE, AFTER = 1200, 400  # steps of 64 and of 32
FINE = {"batch_size": 32, "lr": 2e-3, "flip": 0.0, "crop_scale": (0.6, 1.0), "tensorboard": False, "workers": 0}
_PATHS = ("checkpoint", "data", "labels", "val_data", "val_share")  # of this machine, or nothing


def write_tenth(folder: Path) -> None:
    """train-tenth.csv: the classes of every tenth training sample."""
    with open(folder / "train-digit.csv", newline="") as file:
        head, *rows = csv.reader(file)
    with open(folder / "train-tenth.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows[::10]])


def record(folder: Path, seed: int, before: int = BEFORE, after: int = AFTER, **changes: Any) -> dict[str, Any]:
    """Accuracies of one seed, by what is known of the classes and what was begun with. `before`, `after`: steps of the
    pre-training and of the fine-tuning; `changes`: of its settings."""
    data, out = folder / "digits", folder / str(seed)
    quiet = {"probe_every": 0, "probe_data": None}
    pretrain(replace(config_of("digits/vit", folder, out / "run", seed), steps=before, **quiet))
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
                eval_every=after,
                mixup=0.0,
                cutmix=0.0,
                run={**FINE, "steps": after, "seed": seed, "device": "cpu", **changes},
            )
            document = finetune(start, str(data / "train"), out / f"{known} {name}", options, say=str)
            seconds = time.perf_counter() - began
            kept = {key: value for key, value in document.items() if key not in _PATHS}
            found[f"{known}, {name}"] = {**kept, "seconds": seconds}
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
    document = {
        "schema": 1,
        "kind": "finetuning",
        "environment": environment,
        "settings": FINE | {"steps": [BEFORE, AFTER]},
    }
    save(args.output, {**document, "records": records})
    for name in records[0]["found"]:
        values = [entry["found"][name]["accuracy"] for entry in records]
        print(f"| {name} | {sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%}) |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
