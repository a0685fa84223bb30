"""Time and memory of a training step of recipes beside the same in plain PyTorch, at published sizes.

    maefast bench recipes [NAME ...] [--batch N] [--dtype float32|bfloat16] [--device cpu|cuda] [--quick]

Both sides compute forward and backward of one view, made once, from the same parameters. The plain side is
`bench.peers.recipes`: scaled_dot_product_attention, only visible tokens encoded, boolean indexing as authors' code does
it; ragged samples padded. Steps are timed in turn and the least times taken; memory is what a process that runs one
side alone needs above what it held before its first step.

The share of the machine's limit is of the FLOPs of a step's products, convolutions and attention: counted on the plain
side and on ours by its reference in plain PyTorch, and the fewer of the two, for the plain side embeds, pads or decodes
more here and there. Where both compute hidden sites (`DENSE`), nothing is said.

--device cuda has not been run on a GPU yet. Memory is that of torch's allocator there.

Where a recipe has a better way than the usual one with the same kernels, that one is timed beside it ("other ways"):
ragged samples padded to the longest, views one after the other, all of a teacher where part of it is read.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

import maefast
from maefast import recipes
from maefast.bench import environment, machine, results
from maefast.bench.micro import tables
from maefast.bench.peers import worker
from maefast.bench.peers.plain import parameters
from maefast.bench.peers.recipes.dmae import autoencoder
from maefast.bench.worth import fastest, in_turn, settle_memory
from maefast.ops import TokenMask

SIDES = ("plain", "maefast")
QUICK = ("videomae", "mr_mae", "point_mae")
# Masked convolutions, which plain PyTorch computes whole: its FLOPs say nothing of what is needed.
DENSE = ("dmjd", "mr_mae", "spark3d")
# Samples of a step; 2 for the others.
BATCHES = {
    **dict.fromkeys(("bird_mae", "cha_maevit", "colormae", "g2sd"), 4),
    **dict.fromkeys(("lv_mae", "point_cmae", "point_mae"), 8),
    **dict.fromkeys(("graphmae", "videomae", "videomae_v2", "mixed_ae", "tgm", "cross_video_mae", "hicmae"), 1),
    **dict.fromkeys(("m3ae", "mfm", "nvist", "q_former_ae", "spark3d"), 1),
}


def make_step(
    name: str, size: str | None, batch: int, side: str, dtype: str, device: str = "cpu"
) -> Callable[[], float]:
    """Forward and backward, gradients dropped; gives the loss."""
    torch.manual_seed(0)
    peer = peers(name)
    recipe = recipes.create(name, size, **getattr(peer, "ARGUMENTS", {})).train().to(device)
    for part in recipe.modules():  # the references know no drop path
        if hasattr(part, "drop_path"):
            part.drop_path = 0.0
    view = recipe.view(peer.batch(batch).to(device), seed=1)
    if side == "padded":
        view = replace(view, plan=padded_plan(view.plan))
    written = {"plain": getattr(peer, "padded", peer.reference), "apart": getattr(peer, "apart", None)}.get(side)
    cast = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    def step() -> float:
        with cast:
            loss = sum(written(recipe, view).values()) if written else recipe(view).loss
        loss.backward()
        recipe.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peers(name: str) -> ModuleType:
    return importlib.import_module(f"maefast.bench.peers.recipes.{name}")


def padded_plan(plan: TokenMask) -> TokenMask:
    """As many visible tokens in each sample as the most, and none absent: what padding computes."""
    scores = (plan.mask | plan.absent).to(torch.float32)
    return TokenMask.from_scores(scores, plan.max_visible, order="position")


def other_ways(name: str, size: str | None, batch: int) -> list[str]:
    """Sides of `make_step` that this recipe has beside `SIDES`."""
    peer = peers(name)
    plan = recipes.create(name, size, **getattr(peer, "ARGUMENTS", {})).view(peer.batch(batch), seed=1).plan
    ragged = isinstance(plan, TokenMask) and (plan.keep is None or plan.hide is None)
    return ["padded"] * ragged + ["apart"] * hasattr(peer, "apart")


def teacher_ways(
    name: str, size: str | None, batch: int, rounds: int, seconds: list[float], device: str = "cpu"
) -> dict[str, float]:
    """Of a recipe with a masked teacher, whose step takes `seconds` in plain PyTorch and here: the time of a view and a
    step with all of the teacher, its decoder too, as authors run it, here and in plain PyTorch, over that with the part
    of it that is read; and the teacher's time alone over that of the part."""
    peer = peers(name)
    recipe = recipes.create(name, size, **getattr(peer, "ARGUMENTS", {})).to(device)
    model = getattr(getattr(recipe, "teacher", None), "module", None)
    if not hasattr(model, "predict"):
        return {}
    given = peer.batch(batch).to(device)
    view = recipe.view(given, seed=1)
    weights, plan = parameters(model), view.plan

    @torch.no_grad()
    def whole() -> None:
        model.predict(view.parts, plan)

    @torch.no_grad()
    def plain() -> None:
        autoencoder(weights, "", model, view.parts, plan.ids_keep, plan.ids_restore)

    ways = [lambda: recipe.view(given, seed=1), whole, plain]
    part, all_of_it, theirs = fastest(ways, rounds, device=device)
    before, step = seconds
    return {
        "whole teacher": (all_of_it + step) / (part + step),
        "whole teacher alone": all_of_it / part,
        "whole teacher, plain": (theirs + before) / (part + step),
    }


def _memory(name: str, size: str | None, batch: int, side: str, dtype: str, device: str, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    step = make_step(name, size, batch, side, dtype, device)
    if device == "cuda":
        pipe.send(machine.peak_bytes(step, device) / 2**20)
        return
    worker.release_freed()
    before = worker.resident_bytes()
    worker.reset_peak(device)
    step()
    pipe.send((worker.peak_bytes() - before) / 2**20)


def memory(*what) -> float:
    """MiB of a first step, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_memory, args=(*what, torch.get_num_threads(), theirs))
    process.start()
    theirs.close()  # or a process that dies would be waited for
    found = ours.recv()
    process.join()
    return found


def needed_flops(name: str, plain: Callable[[], object], ours: Callable[[], object]) -> int | None:
    """Of a step, or None where neither side says; see above."""
    if name in DENSE:
        return None
    with maefast.backend("reference"):  # our kernels hide what they compute from torch's counter
        own = machine.count_flops(ours)
    return min(own, machine.count_flops(plain))


def compare(
    name: str, size: str | None, batch: int, dtype: str, rounds: int, device: str = "cpu", limits: dict | None = None
) -> dict:
    """The record of a recipe. limits: what `machine.measure` found; without, no share of them."""
    others = other_ways(name, size, batch)
    steps = [make_step(name, size, batch, side, dtype, device) for side in (*SIDES, *others)]
    plain, mine = (step() for step in steps[:2])
    if abs(plain - mine) > (1e-4 if dtype == "float32" else 3e-2) * abs(plain):
        raise SystemExit(f"{name}: the two sides disagree: loss {plain} in plain PyTorch, {mine} here")
    samples = in_turn(steps, rounds, device=device)
    best = [min(row) for row in samples]
    ways = {side: seconds / best[1] for side, seconds in zip(others, best[2:])}
    ways |= teacher_ways(name, size, batch, rounds, best[:2], device)
    flops = None if limits is None else needed_flops(name, *steps[:2])
    used = [memory(name, size, batch, side, dtype, device) for side in SIDES]
    return {
        "recipe": name,
        "size": size or next(iter(recipes.kind(name).spec.sizes)),
        "batch": batch,
        "dtype": dtype,
        "ms": [1e3 * t for t in best[:2]],
        "samples_s": dict(zip(SIDES, samples)),
        "ratio": best[0] / best[1],
        "other_ways": ways,
        "memory_mib": used,
        "memory_ratio": used[1] / used[0],
        **machine.share(limits, dtype, flops, *best[:2]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--size")
    parser.add_argument("--batch", type=int, help="what two cores step through in seconds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, two rounds")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if machine.absent("maefast bench recipes", args.device):
        return 3
    environment.exact_float32()
    settle_memory()
    folder = Path(__file__).parent / "peers" / "recipes"
    every = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    names = args.names or (QUICK if args.quick else every)
    if unknown := [name for name in names if name not in every]:
        parser.error(f"no recipe {', '.join(unknown)}; there are: {', '.join(every)}")
    rounds = args.rounds or (2 if args.quick else 5)
    limits, found = machine.measure(args.device, (getattr(torch, args.dtype),)), []
    settings = {"rounds": rounds, "machine": limits}
    for name in names:
        batch = args.batch or BATCHES.get(name, 2)
        row = compare(name, args.size, batch, args.dtype, rounds, args.device, limits)
        found.append(row)
        # Each as it is measured, for all of them take an hour.
        if args.json:
            left = len(names) - len(found)
            keep(args, {**settings, "cases_left_out": left}, found, "", final=not left)
        else:
            keep(args, settings, [row], f"recipes/{name}-{args.dtype}")
        print(
            f"{name:12} {row['size']:6} batch {row['batch']} {row['dtype']}: plain {row['ms'][0]:.0f} ms, "
            f"maefast {row['ms'][1]:.0f} ms, {row['ratio']:.2f}x; memory {row['memory_mib'][0]:.0f} MiB, "
            f"{row['memory_mib'][1]:.0f} MiB, {row['memory_ratio']:.2f}x; of limit {tables.of_limit(row)}"
            + "".join(f"; {way} {ratio:.2f}x" for way, ratio in row["other_ways"].items()),
            flush=True,
        )
    return 0


def keep(args: argparse.Namespace, settings: dict, rows: list[dict], label: str, final: bool = True) -> None:
    doc = results.document("recipes", environment.describe(args.device), settings, list(SIDES), rows)
    results.keep(args, doc, label, final)


if __name__ == "__main__":
    sys.exit(main())
