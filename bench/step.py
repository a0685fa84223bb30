"""One training step end to end: maefast beside a plain eager MAE and HF's ViTMAE, in one run.

Same weights, images, noise, dtype and optimiser (fused AdamW) for all; each in its own process; timed in turn, in
shuffled rounds. If the losses or gradients of the first step disagree, and float64 does not excuse it, no time is
printed.
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
from collections.abc import Callable
from typing import NamedTuple

import torch

from maefast.bench import environment, machine, results, timing
from maefast.bench.micro import tables
from maefast.bench.peers.models import CUDA_PEERS, NAMES, PEERS

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
            [sys.executable, "-m", "maefast.bench.peers.worker"],
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
    processes: int = 1,
    progress: Callable[[list[dict]], None] | None = None,
) -> dict:
    """Run a comparison; returns the document of `maefast.bench.results`.

    Args:
        peers: of `PEERS`; maefast is always among them. None takes those of the preset.
        rounds: timed rounds; None takes as many as fit `budget` seconds (3 to 15).
        steps: timed steps of a round.
        processes: of each peer, one after the other, over which rounds and budget are spread (rounds rounded up). Where
            a process has its memory moves its times by some per cent for as long as it lives.
        progress: is given the records so far after three rounds, so that a run that is cut off leaves something.

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
    steps = steps or (2 if device == "cpu" else 10)
    budget = BUDGET.get(preset, 120.0) if budget is None else budget
    names = list(dict.fromkeys(["maefast", *(chosen.get("peers", DEFAULT_PEERS) if peers is None else peers)]))
    base = {
        "preset": preset,
        "dtype": dtype,
        "shape": {"batch": request["batch"], "img_size": list(model.img_size), "patch_size": list(model.patch_size)},
    }
    limits = machine.measure(device, (getattr(torch, dtype),))
    # A dense network times a mask computes more than is needed, so a convnet's peer says nothing of that.
    counted = None if chosen.get("peers") else limits
    records = race(names, request, base, "plain", rounds, steps, budget, 1, progress, counted, processes)
    settings = {
        "machine": limits,
        "steps_a_round": steps,
        "budget_s": budget,
        "model": model.config,
        "mask_ratio": request["mask_ratio"],
        "part": request["part"],
        "optimizer": "AdamW, fused" if request["part"] == "step" else None,
    }
    return results.document("step", environment.describe(device), settings, names, records)


class _Run(NamedTuple):
    """What one process of each peer gave."""

    first: dict[str, dict]  # answers to `build`
    failed: dict[str, str]
    samples: dict[str, list[float]]
    losses: dict[str, float]
    memory: dict[str, dict]
    flops: float | None


def race(
    names: list[str],
    request: dict,
    base: dict,
    reference: str,
    rounds: int | None,
    steps: int,
    budget: float,
    required: int = 1,
    progress: Callable[[list[dict]], None] | None = None,
    limits: dict | None = None,
    processes: int = 1,
) -> list[dict]:
    """Build the named peers, each in its process, compare them, time them in turn; one record a peer.

    Args:
        names: the first is what ratios are about. The first `required` must run; one of the others that cannot be
            built has an "error" in its record.
        request: for the workers' `build`. base: goes into every record. reference: the peer whose losses are right.
        rounds, steps, budget, progress, processes: see `measure`.
        limits: what `machine.measure` found: records then say the FLOPs that the reference's step has, as what is
            needed, and the share of the limit that each peer reached.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; at least one is needed")
    rounds = rounds and -(-rounds // processes)
    shuffle = random.Random(0).shuffle
    runs: list[_Run] = []
    for _ in range(processes):
        early = progress and (lambda run: progress(_records(names, request["batch"], base, [*runs, run])))
        runs.append(_race(names, request, reference, rounds, steps, budget / processes, required, shuffle, early))
    done = _records(names, request["batch"], base, runs)
    if limits is not None and runs[0].flops is not None:
        for record in done:
            if "error" not in record:
                record |= machine.share(limits, request["dtype"], runs[0].flops, record["step_s"])
    return done


def _race(
    names: list[str],
    request: dict,
    reference: str,
    rounds: int | None,
    steps: int,
    budget: float,
    required: int,
    shuffle: Callable[[list], None],
    progress: Callable[[_Run], None] | None,
) -> _Run:
    """In one process of each peer."""
    dtype = request["dtype"]
    workers = {name: Peer(name) for name in names}
    try:
        first, failed = _build(workers, names[:required], **request)
        judge = workers.get(reference)
        _agree(first, dtype, reference, None if judge is None else lambda: judge.ask(do="exact"))
        _warm_up(workers, dtype, reference)

        def run(samples: dict[str, list[float]], losses: dict[str, float]) -> _Run:
            memory = {name: worker.ask(do="memory") for name, worker in workers.items()}
            return _Run(first, failed, samples, losses, memory, None)

        early = progress and (lambda *found: progress(run(*found)))
        done = run(*_time(workers, rounds, steps, budget, shuffle, early))
        return done._replace(flops=workers[reference].ask(do="flops")["flops"] if reference in workers else None)
    finally:
        for worker in workers.values():
            worker.close()


def _records(names: list[str], batch: int, base: dict, runs: list[_Run]) -> list[dict]:
    """One record a peer; the first name's peer is what ratios are about. Rounds are those of all runs, one after the
    other, bytes the median of the runs."""
    ours, first = names[0], runs[0].first
    failed = {name: error for run in runs for name, error in run.failed.items()}
    timed = [name for name in names if name not in failed]
    samples = {name: [s for run in runs for s in run.samples[name]] for name in timed}
    memory = {
        name: {key: statistics.median_low(run.memory[name][key] for run in runs) for key in runs[0].memory[name]}
        for name in timed
    }
    records = []
    for name in names:
        record = {**base, "peer": name}
        if name in failed:
            records.append({**record, "error": failed[name]})
            continue
        low, high = timing.quartiles(samples[name])
        median = statistics.median(samples[name])
        notes = {key: value for key, value in first[name].items() if key not in ("loss", "grad_norm", "parameters")}
        more = {}
        if name.endswith("_compiled") and f"{ours}_compiled" in samples:
            more["ratio_compiled"] = timing.ratio(samples[name], samples[f"{ours}_compiled"])
        if f"{ours}_graphed" in samples:
            more["ratio_graphed"] = timing.ratio(samples[name], samples[f"{ours}_graphed"])
        records.append(
            {
                **record,
                "ratio": timing.ratio(samples[name], samples[ours]),
                **more,
                "step_s": median,
                "low_s": low,
                "high_s": high,
                "rounds": len(samples[name]),
                "processes": len(runs),
                "samples_s": samples[name],
                "images_per_s": batch / median,
                **memory[name],
                "memory_ratio": memory[name]["peak_bytes"] / memory[ours]["peak_bytes"],
                **(
                    {"step_memory_ratio": memory[name]["step_bytes"] / memory[ours]["step_bytes"]}
                    if "step_bytes" in memory[name] and "step_bytes" in memory[ours]
                    else {}
                ),
                "first_loss": first[name]["loss"],
                "grad_norm": first[name]["grad_norm"],
                "last_loss": runs[-1].losses[name],
                "parameters": first[name]["parameters"],
                **notes,
            }
        )
    return records


def _build(workers: dict[str, Peer], required: list[str], **request) -> tuple[dict, dict]:
    """Build all at once; those that fail leave `workers`. Returns (answers, failures)."""
    for name, worker in workers.items():
        worker.send(do="build", peer=name, **request)
    answers, failed = {}, {}
    for name in list(workers):
        try:
            answers[name] = workers[name].receive()
        except RuntimeError as error:
            if name in required:
                raise
            failed[name] = str(error)
            workers.pop(name).close()
    return answers, failed


def _agree(
    first: dict[str, dict], dtype: str, reference: str = "plain", exact: Callable[[], dict] | None = None
) -> None:
    """All against the reference if it is there, else against the first.

    exact: gives the reference's in float64, asked where somebody differs by more than the tolerance. An answer within
    the tolerance of that, or no farther from it than twice the reference, is right (as in `maefast.bench.micro.agree`).
    """
    right = first.get(reference) or next(iter(first.values()))
    truth, problems = None, []
    for name, answer in first.items():
        for what, tolerance in zip(("loss", "grad_norm"), AGREE[dtype], strict=True):
            error = _apart(answer, right, what)
            if error <= tolerance:  # not NaN
                continue
            if exact is not None:
                truth = truth or exact()
                if _apart(answer, truth, what) <= max(tolerance, 2 * _apart(right, truth, what)):
                    continue
            problems.append(f"{name}: {what} {answer[what]:.7g}, expected {right[what]:.7g} ({error:.1e} off)")
    if problems:
        raise Disagreement("the peers do not compute the same thing, so no time is given: " + "; ".join(problems))


def _apart(one: dict, other: dict, what: str) -> float:
    return abs(one[what] - other[what]) / abs(other[what])


def _warm_up(workers: dict[str, Peer], dtype: str, reference: str) -> None:
    """Compilation, allocators, optimiser state. The loss after the first updates must agree, too; to the tolerance of
    gradients, because that is what it tells of."""
    answers = {name: worker.ask(do="run", steps=1)["loss"] for name, worker in workers.items()}
    right = answers.get(reference, next(iter(answers.values())))
    tolerance = AGREE[dtype][1]
    problems = [
        f"{name}: loss {loss:.7g} after two updates, expected {right:.7g}"
        for name, loss in answers.items()
        if not abs(loss - right) <= tolerance * abs(right)
    ]
    if problems:
        raise Disagreement("the peers do not train alike, so no time is given: " + "; ".join(problems))


def _time(
    workers: dict[str, Peer],
    rounds: int | None,
    steps: int,
    budget: float,
    shuffle: Callable[[list], None],
    early: Callable[[dict[str, list[float]], dict[str, float]], None] | None = None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    # The first round tells how long the others will take.
    start = time.monotonic()
    for worker in workers.values():
        worker.ask(do="run", steps=steps)
    if rounds is None:
        rounds = min(15, max(3, int(budget / (time.monotonic() - start))))
    else:
        budget = float("inf")
    samples: dict[str, list[float]] = {name: [] for name in workers}
    losses: dict[str, float] = {}
    order = list(workers)
    start = time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - start > budget:  # the machine became busier than it was
            break
        shuffle(order)
        for name in order:
            answer = workers[name].ask(do="run", steps=steps)
            samples[name].append(statistics.mean(answer["seconds"]))
            losses[name] = answer["loss"]
        if done == 2 and early is not None:
            early(samples, losses)
    return samples, losses


def show(doc: dict) -> None:
    """Print the table of a step run."""
    first = doc["records"][0]
    size = "x".join(map(str, first["shape"]["img_size"]))
    encoder = doc["settings"].get("part") == "encoder"
    what = "encoder forward and backward of" if encoder else "one training step of"
    print_table(doc, f"{first['preset']}: {size} images", what, NAMES)
    for line in graphed(doc["records"]):
        print(line)


def graphed(records: list[dict]) -> list[str]:
    """What the others say against maefast's step as one CUDA graph."""
    ours = f"{records[0]['peer']}_graphed"
    return [
        f"{NAMES[r['peer']]}, vs {NAMES[ours]}: {r['ratio_graphed']:.2f}x"
        for r in records
        if "ratio_graphed" in r and r["peer"] != ours
    ]


def print_table(doc: dict, title: str, what: str, names: dict[str, str]) -> None:
    """One row a peer, the fastest first; the first record's peer is what ratios are about."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    env, records = doc["environment"], doc["records"]
    first = records[0]
    ours = names[first["peer"]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        f"time vs {ours}",
        "step ms",
        "±",
        "of limit",
        "images/s",
        "peak MB",
        f"memory vs {ours}",
        "MB a step",
        f"vs {ours}",
    ):
        table.add_column(name, justify="right")
    table.add_column(what)
    for r in sorted((r for r in records if "error" not in r), key=lambda r: r["ratio"]):
        one = r is first
        table.add_row(
            "1" if one else f"{r['ratio']:.2f}x",
            f"{r['step_s'] * 1e3:.1f}",
            tables.spread(r),
            tables.of_limit(r),
            f"{r['images_per_s']:.{0 if r['images_per_s'] >= 10 else 1}f}",
            f"{r['peak_bytes'] / 2**20:.0f}",
            "1" if one else f"{r['memory_ratio']:.2f}x",
            f"{r['step_bytes'] / 2**20:.0f}" if "step_bytes" in r else "-",
            "1" if one else f"{r['step_memory_ratio']:.2f}x" if "step_memory_ratio" in r else "-",
            names[r["peer"]],
            style="bold" if one else None,
        )
    console = Console(width=None if Console().is_terminal else 170)
    console.print(
        f"{title}, batch {first['shape']['batch']}, {first['dtype']}"
        f"{' autocast' if first['dtype'] != 'float32' else ''}; {env['device']}, {env['cpu_threads']} threads, "
        f"torch {env['torch']}",
        highlight=False,
    )
    console.print(table)
    for r in records:
        if "error" in r:
            console.print(f"{names.get(r['peer'], r['peer'])} not timed: {r['error']}", highlight=False, markup=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every comparison of steps takes."""
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="timed steps a round")
    parser.add_argument("--budget", type=float, help="seconds for the timed rounds, where --rounds is not given")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="of each peer, one after the other, over which the rounds are spread: where a process has its memory "
        "moves its times by some per cent",
    )
    results.add_arguments(parser)


def finish(
    name: str, args: argparse.Namespace, run: Callable[[], dict], show: Callable[[dict], None], label: str
) -> int:
    """Run, print and write; the exit status."""
    if machine.absent(name, args.device):
        return 3
    try:
        doc = run()
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return results.WRONG if isinstance(error, Disagreement) else 1
    show(doc)
    results.keep(args, doc, label + (f"-b{args.batch}" if args.batch else ""))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("maefast bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="demo")
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, "cuda"), help=f"cuda: {' '.join(CUDA_PEERS)}")
    parser.add_argument("--compile", action="store_true", help="also time the torch.compile'd plain model")
    add_arguments(parser)
    args = parser.parse_args(argv)
    asked = args.peers or PRESETS[args.preset].get("peers", DEFAULT_PEERS)
    peers = tuple(name for peer in asked for name in (CUDA_PEERS if peer == "cuda" else (peer,)))
    peers = (*peers, "plain_compiled") if args.compile else peers
    given = {"peers": peers, "rounds": args.rounds, "steps": args.steps, "budget": args.budget}
    given["processes"] = args.processes

    def run() -> dict:
        return measure(args.preset, args.batch, args.dtype, args.device, **given)

    return finish("maefast bench step", args, run, show, f"step-{args.preset}-{args.dtype}")


if __name__ == "__main__":
    sys.exit(main())
