"""One training step of somebody else's model, as it is and after `maefast.accelerate`.

Same weights, inputs, random draws, dtype and optimiser (fused AdamW); each in its own process; timed in turn, in
shuffled rounds. If losses or gradients disagree, no time is printed. The model as it is runs at its best: transformers
with SDPA and, as another peer, with attention written out; convnets in channels-last memory; with --compile also
compiled.
"""

from __future__ import annotations

import argparse
import sys

import torch

from maefast.bench import environment, machine, results, step
from maefast.bench.peers.dropin_models import NAMES, families

BUDGET = {"toy": 2.0, "base": 120.0}
PEERS = ("accelerated", "as_is")


def measure(
    family: str,
    preset: str = "base",
    batch: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    compiled: bool = False,
    checkouts: tuple[str, ...] = (),
    channels_last: bool | None = None,
    rounds: int | None = None,
    steps: int | None = None,
    budget: float | None = None,
    processes: int = 1,
) -> dict:
    """Run a comparison; returns the document of `maefast.bench.results`.

    Args:
        compiled: time both under torch.compile, too.
        checkouts: folders that hold the family's public code; without any, the installed package or our own description
            of the structure is timed.
        channels_last: memory layout of model and images; None: what suits the family.
        rounds, steps, budget, processes: as in `maefast.bench.step.measure`.

    Raises:
        maefast.bench.step.Disagreement: losses or gradients differ by more than the dtype's rounding explains.
        RuntimeError: either of the two could not run, or nothing was accelerated.
    """
    known = families()
    if family not in known:
        raise ValueError(f"choose a family from {', '.join(known)}")
    chosen = known[family]
    if preset not in chosen.presets or dtype not in step.DTYPES:
        raise ValueError(f"choose a preset from {', '.join(chosen.presets)} and a dtype from {', '.join(step.DTYPES)}")
    sizes = chosen.sizes(preset)
    config = {
        "family": family,
        "sizes": sizes,
        "checkouts": [str(path) for path in checkouts],
        "channels_last": chosen.convnet if channels_last is None else channels_last,
    }
    batch = batch or chosen.presets[preset]["batch"]
    steps = steps or (2 if device == "cpu" else 10)
    budget = BUDGET[preset] if budget is None else budget
    names = [*PEERS, chosen.variant] if chosen.tune else [*PEERS]
    names += [f"{name}_compiled" for name in names if compiled]
    side = sizes["img_size"]
    size = list(side) if isinstance(side, (list, tuple)) else [side] * 2
    base = {
        "family": family,
        "preset": preset,
        "dtype": dtype,
        "shape": {"batch": batch, "img_size": [sizes["num_frames"], *size] if "num_frames" in sizes else size},
    }
    request = {"source": "dropin_models", "config": config, "batch": batch, "dtype": dtype, "device": device}
    limits = machine.measure(device, (getattr(torch, dtype),))
    counted = None if chosen.convnet else limits
    records = step.race(names, request, base, "as_is", rounds, steps, budget, len(PEERS), None, counted, processes)
    settings = {
        "machine": limits,
        "steps_a_round": steps,
        "budget_s": budget,
        "title": chosen.title,
        "model": sizes,
        "channels_last": config["channels_last"],
        "code": records[0]["code"],
        "origin": records[0]["origin"],
        "optimizer": "AdamW, fused",
    }
    return results.document("dropin", environment.describe(device), settings, names, records)


def show(doc: dict) -> None:
    """Print the table of a run."""
    settings, records = doc["settings"], doc["records"]
    size = "x".join(map(str, records[0]["shape"]["img_size"]))
    title = f"{settings['title']} ({settings['code']}), {records[0]['preset']}: {size}"
    step.print_table(doc, title, "one training step, the model", NAMES)
    for line in compiled(records):
        print(line)


def compiled(records: list[dict]) -> list[str]:
    """What the compiled models say against the compiled accelerated one."""
    return [
        f"{NAMES[r['peer']]}, vs {NAMES['accelerated_compiled']}: {r['ratio_compiled']:.2f}x"
        for r in records
        if "ratio_compiled" in r and r["peer"] != "accelerated_compiled"
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("maefast bench dropin", description=__doc__.splitlines()[0])
    known = families()
    parser.add_argument("--family", choices=tuple(known), required=True)
    parser.add_argument("--preset", choices=tuple(BUDGET), default="base")
    parser.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    parser.add_argument(
        "--checkout", action="append", default=[], help="folder with public code; more than one may be given"
    )
    parser.add_argument("--memory-format", choices=("contiguous", "channels_last"))
    step.add_arguments(parser)
    args = parser.parse_args(argv)

    def run() -> dict:
        return measure(
            args.family,
            args.preset,
            args.batch,
            args.dtype,
            args.device,
            compiled=args.compile,
            checkouts=tuple(args.checkout),
            channels_last=args.memory_format and args.memory_format == "channels_last",
            rounds=args.rounds,
            steps=args.steps,
            budget=args.budget,
            processes=args.processes,
        )

    return step.finish("maefast bench dropin", args, run, show, f"dropin-{args.family}-{args.dtype}")


if __name__ == "__main__":
    sys.exit(main())
