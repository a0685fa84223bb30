"""One training step end to end: maefast beside a plain eager MAE and HF's ViTMAE, in one run.

Same weights, images, noise, dtype and optimiser (fused AdamW) for all; each in its own process; timed in turn, in
shuffled rounds. If the losses or gradients of the first step disagree, no time is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import environment, results, timing
from bench.peers.models import NAMES, PEERS

# preset -> model, default batch; and where they differ from the ViT's: share masked, peers, what is timed ("step", or
# "encoder": forward and backward of the encoder alone, without an optimiser).
PIXELS = {"norm_pix_loss": True}
CONVNET = {"mask_ratio": 0.6, "peers": ("maefast", "plain")}
ENCODER = {**CONVNET, "part": "encoder"}
PRESETS: dict[str, dict] = {
    "toy": {
        "model": {"name": "mae_tiny", "img_size": 32, "patch_size": 8, "depth": 1, "decoder_depth": 1, **PIXELS},
        "batch": 2,
    },
    "demo": {
        "model": {"name": "mae_tiny", "img_size": 64, "patch_size": 8, "depth": 3, "decoder_depth": 3, **PIXELS},
        "batch": 64,
    },
    "vit_b": {"model": {"name": "mae_base", **PIXELS}, "batch": 16},
    "vit_l": {"model": {"name": "mae_large", **PIXELS}, "batch": 16},
    "fcmae_toy": {"model": {"name": "fcmae_convnextv2_atto", "img_size": 96, **PIXELS}, "batch": 2, **CONVNET},
    "fcmae_t": {"model": {"name": "fcmae_convnextv2_tiny", **PIXELS}, "batch": 16, **CONVNET},
    "spark_r50": {"model": {"name": "spark_resnet50", "drop_path": 0.0}, "batch": 16, **CONVNET},
    "spark_r50_encoder": {"model": {"name": "spark_resnet50", "drop_path": 0.0}, "batch": 16, **ENCODER},
    "spark_cs_encoder": {"model": {"name": "spark_convnext_small", "drop_path": 0.0}, "batch": 16, **ENCODER},
}
BUDGET = {"toy": 3.0, "demo": 25.0, "vit_b": 120.0, "vit_l": 240.0, "fcmae_toy": 3.0}
DTYPES = ("float32", "bfloat16")
DEFAULT_PEERS = PEERS[:3]
# Allowed relative difference of (loss, gradient norm) from the plain model's. bfloat16 keeps 8 bits.
AGREE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}


class Disagreement(RuntimeError):
    """The peers do not compute the same loss and gradients, so their times cannot be compared."""


class Peer:
    """A worker process."""

    def __init__(self, name: str):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.worker"],
            cwd=environment.ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, **request) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, **request) -> dict:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(
    preset: str = "demo", batch: int | None = None, dtype: str = "float32", device: str = "cpu", **options
) -> list[dict]:
    """Records of one comparison, maefast first; see `measure`. A peer that could not run has only an "error"."""
    return measure(preset, batch, dtype, device, **options)["records"]


def measure(
    preset: str = "demo",
    batch: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    peers: tuple[str, ...] | None = None,
    rounds: int | None = None,
    steps: int | None = None,
    budget: float | None = None,
) -> dict:
    """Run a comparison; returns the document of `bench.results`.

    Args:
        peers: of `PEERS`; maefast is always among them. None takes those of the preset.
        rounds: timed rounds; None takes as many as fit `budget` seconds (3 to 15).
        steps: timed steps of a round.

    Raises:
        Disagreement: losses or gradient norms differ by more than the dtype's rounding explains.
        RuntimeError: maefast itself failed.
    """
    if preset not in PRESETS or dtype not in DTYPES:
        raise ValueError(f"choose a preset from {', '.join(PRESETS)} and a dtype from {', '.join(DTYPES)}")
    from maefast import models

    chosen = PRESETS[preset]
    model = models.create(**chosen["model"])
    request = {
        "config": model.config,
        "batch": batch or chosen["batch"],
        "dtype": dtype,
        "device": device,
        "tokens": model.num_patches,
        "mask_ratio": chosen.get("mask_ratio", 0.75),
        "part": chosen.get("part", "step"),
    }
    batch, config = request["batch"], model.config
    steps = steps or (2 if device == "cpu" else 10)
    budget = BUDGET.get(preset, 120.0) if budget is None else budget
    names = list(dict.fromkeys(["maefast", *(chosen.get("peers", DEFAULT_PEERS) if peers is None else peers)]))
    workers = {name: Peer(name) for name in names}
    base = {
        "preset": preset,
        "dtype": dtype,
        "shape": {"batch": batch, "img_size": list(model.img_size), "patch_size": list(model.patch_size)},
    }
    try:
        first, failed = _build(workers, **request)
        _agree(first, dtype)
        samples, losses = _time(workers, rounds, steps, budget)
        memory = {name: worker.ask(do="memory") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()

    records = []
    for name in names:
        record = {**base, "peer": name}
        if name in failed:
            records.append({**record, "error": failed[name]})
            continue
        low, high = timing.quartiles(samples[name])
        median = statistics.median(samples[name])
        records.append(
            {
                **record,
                "ratio": timing.ratio(samples[name], samples["maefast"]),
                "step_s": median,
                "low_s": low,
                "high_s": high,
                "rounds": len(samples[name]),
                "images_per_s": batch / median,
                **memory[name],
                "memory_ratio": memory[name]["peak_bytes"] / memory["maefast"]["peak_bytes"],
                "first_loss": first[name]["loss"],
                "grad_norm": first[name]["grad_norm"],
                "last_loss": losses[name],
                "parameters": first[name]["parameters"],
            }
        )
    settings = {
        "steps_a_round": steps,
        "budget_s": budget,
        "model": config,
        "mask_ratio": request["mask_ratio"],
        "part": request["part"],
        "optimizer": "AdamW, fused" if request["part"] == "step" else None,
    }
    return results.document("step", environment.describe(device), settings, names, records)


def _build(workers: dict[str, Peer], **request) -> tuple[dict, dict]:
    """Build all at once; those that fail leave `workers`. Returns (answers, failures)."""
    for name, worker in workers.items():
        worker.send(do="build", peer=name, **request)
    answers, failed = {}, {}
    for name in list(workers):
        try:
            answers[name] = workers[name].receive()
        except RuntimeError as error:
            if name == "maefast":
                raise
            failed[name] = str(error)
            workers.pop(name).close()
    return answers, failed


def _agree(first: dict[str, dict], dtype: str) -> None:
    """All against the plain model if it is there, else against the first."""
    reference = first.get("plain") or next(iter(first.values()))
    problems = []
    for name, answer in first.items():
        for what, tolerance in zip(("loss", "grad_norm"), AGREE[dtype], strict=True):
            error = abs(answer[what] - reference[what]) / abs(reference[what])
            if not error <= tolerance:  # NaN too
                problems.append(f"{name}: {what} {answer[what]:.7g}, expected {reference[what]:.7g} ({error:.1e} off)")
    if problems:
        raise Disagreement("the peers do not compute the same thing, so no time is given: " + "; ".join(problems))


def _time(
    workers: dict[str, Peer], rounds: int | None, steps: int, budget: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    # The first round warms up (compilation, allocators, optimiser state) and tells how long the others will take.
    for worker in workers.values():
        worker.ask(do="run", steps=1)
    start = time.monotonic()
    for worker in workers.values():
        worker.ask(do="run", steps=steps)
    if rounds is None:
        rounds = min(15, max(3, int(budget / (time.monotonic() - start))))
    else:
        budget = float("inf")
    samples: dict[str, list[float]] = {name: [] for name in workers}
    losses: dict[str, float] = {}
    order, shuffle = list(workers), random.Random(0).shuffle
    start = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:  # the machine became busier than it was
            break
        shuffle(order)
        for name in order:
            answer = workers[name].ask(do="run", steps=steps)
            samples[name].append(statistics.mean(answer["seconds"]))
            losses[name] = answer["loss"]
    return samples, losses


def show(doc: dict) -> None:
    """Print the table of a step run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    env, records = doc["environment"], doc["records"]
    encoder = doc["settings"].get("part") == "encoder"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("time vs maefast", "step ms", "images/s", "peak MB", "memory vs maefast"):
        table.add_column(name, justify="right")
    table.add_column("encoder forward and backward of" if encoder else "one training step of")
    for r in sorted((r for r in records if "error" not in r), key=lambda r: r["ratio"]):
        ours = r["peer"] == "maefast"
        table.add_row(
            "1" if ours else f"{r['ratio']:.2f}x",
            f"{r['step_s'] * 1e3:.1f}",
            f"{r['images_per_s']:.0f}",
            f"{r['peak_bytes'] / 2**20:.0f}",
            "1" if ours else f"{r['memory_ratio']:.2f}x",
            NAMES[r["peer"]],
            style="bold" if ours else None,
        )
    first = records[0]
    size = "x".join(map(str, first["shape"]["img_size"]))
    console = Console(width=None if Console().is_terminal else 110)
    console.print(
        f"{first['preset']}: {size} images, batch {first['shape']['batch']}, {first['dtype']}"
        f"{' autocast' if first['dtype'] != 'float32' else ''}; {env['device']}, {env['cpu_threads']} threads, "
        f"torch {env['torch']}",
        highlight=False,
    )
    console.print(table)
    for r in records:
        if "error" in r:
            console.print(f"{NAMES.get(r['peer'], r['peer'])} not timed: {r['error']}", highlight=False, markup=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", nargs="+", choices=PEERS)
    parser.add_argument("--compile", action="store_true", help="also time the torch.compile'd plain model")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="timed steps a round")
    parser.add_argument("--budget", type=float, help="seconds for the timed rounds, where --rounds is not given")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("bench.step: no CUDA device here", file=sys.stderr)
            return 3
    peers = tuple(args.peers or PRESETS[args.preset].get("peers", DEFAULT_PEERS))
    peers = (*peers, "plain_compiled") if args.compile else peers
    try:
        doc = measure(
            args.preset,
            args.batch,
            args.dtype,
            args.device,
            peers=peers,
            rounds=args.rounds,
            steps=args.steps,
            budget=args.budget,
        )
    except RuntimeError as error:
        print(f"bench.step: {error}", file=sys.stderr)
        return results.WRONG if isinstance(error, Disagreement) else 1
    show(doc)
    if args.json:
        print(f"written: {results.write(args.json, doc)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
