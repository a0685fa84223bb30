"""How the time of an encoder grows with the share of visible tokens and with the batch.

    maefast bench scaling [--model mae_base] [--batch 4] [--dtype float32|bfloat16] [--device cpu|cuda] [--quick]

Forward and backward of a ViT's encoder on its visible patches, ours and the plain one (`bench.peers.plain_mae`) with
the same weights, images and noise, in turn, in shuffled rounds: at one batch for shares from 5 to 100 %, and at a share
of 25 % for batches from 1 to 4 times that. Ideally the time is the visible share of that at 100 %: work goes with the
tokens, and attention's with their square, so a little less. What comes above is what every call costs, whatever it
computes. Results must agree (1e-4 of the loss in float32, 2e-2 in bfloat16), or nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from maefast import masking, models
from maefast.bench import environment, machine, results, timing
from maefast.bench.micro import tables
from maefast.bench.peers.plain_mae import PlainMAE
from maefast.bench.worth import settle_memory

SHARES = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)
SHARE = 0.25  # of MAE, at which the batch grows
TIMES = (0.25, 0.5, 2, 4)  # the batch of the shares
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
PEERS = ("maefast", "plain")


def measure(
    model: str,
    batch: int,
    dtype: str,
    device: str,
    rounds: int,
    shares=SHARES,
    times=TIMES,
    progress: Callable[[dict], None] | None = None,
) -> dict:
    """The document of a run. FLOPs are those of the plain encoder. progress: is given the document so far after every
    case but the last.

    Raises:
        RuntimeError: the two encoders compute different things.
    """
    environment.exact_float32()
    settle_memory()
    torch.manual_seed(0)
    ours = models.create(model)
    plain = PlainMAE.from_config(ours.config)
    plain.load_state_dict(ours.state_dict())
    encoders = {"maefast": ours.to(device).train(), "plain": plain.to(device).train()}
    cases = [(batch, share) for share in shares]
    cases += [(size, SHARE) for size in dict.fromkeys(max(1, int(batch * n)) for n in times) if size != batch]
    records, where = [], environment.describe(device)
    limits = machine.measure(device, (getattr(torch, dtype),))
    settings = {"model": model, "part": "encoder, forward and backward", "rounds": rounds, "batch": batch}

    def so_far(left_out: int) -> dict:
        settings.update(machine=limits, cases_left_out=left_out)
        return results.document("scaling", where, settings, list(PEERS), records)

    for left, (size, share) in zip(range(len(cases) - 1, -1, -1), cases):
        keep = max(1, round(share * ours.num_patches))
        calls = {name: step(net, name, size, keep, dtype, device) for name, net in encoders.items()}
        losses = {name: call(0).item() for name, call in calls.items()}
        if not abs(losses["maefast"] - losses["plain"]) <= AGREE[dtype] * abs(losses["plain"]):
            raise RuntimeError(f"{keep} of {ours.num_patches} tokens, batch {size}: the encoders disagree: {losses}")
        clocks = {name: timing.sampler(call, 1, device, waits=True) for name, call in calls.items()}
        samples = timing.interleave(clocks, rounds)
        flops = machine.count_flops(lambda call=calls["plain"]: call(0))
        for name, seconds in samples.items():
            low, high = timing.quartiles(seconds)
            record = {"peer": name, "batch": size, "visible": keep, "tokens": ours.num_patches, "dtype": dtype}
            record |= {"median_s": statistics.median(seconds), "low_s": low, "high_s": high, "samples_s": seconds}
            record["ratio"] = timing.ratio(seconds, samples["maefast"])
            record["peak_bytes"] = machine.peak_bytes(lambda call=calls[name]: call(0), device)
            record |= machine.share(limits, dtype, flops, record["median_s"])
            records.append(record)
        print(line(records[-2], records[-1]), flush=True)
        if progress is not None and left:
            progress(so_far(left))
    return so_far(0)


def step(net: torch.nn.Module, name: str, batch: int, keep: int, dtype: str, device: str) -> Callable[[int], Tensor]:
    """Forward and backward of the encoder on given images and noise; the same for both."""
    generator = torch.Generator().manual_seed(1)
    grid = net.num_patches if name == "maefast" else net.grid[0] * net.grid[1]
    size = 224
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    noise = torch.rand(batch, grid, generator=generator).to(device)
    ratio = 1 - (keep + 0.5) / grid if keep < grid else 0.0  # the plain one takes int(N (1 - ratio))

    def run(i: int) -> Tensor:
        with torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            if name == "maefast":
                plan = masking.random(batch, grid, keep=keep, noise=noise)
                latent = net.encode_visible(images, plan)
            else:
                latent = net.encode(images, ratio, noise)[0]
            loss = latent.float().square().mean() + latent.float()[:, 0].mean()
        loss.backward()
        net.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def line(ours: dict, plain: dict) -> str:
    share = f"{ours['visible']:4} of {ours['tokens']} tokens ({ours['visible'] / ours['tokens']:4.0%})"
    times = f"maefast {ours['median_s'] * 1e3:.1f} ms, plain {plain['median_s'] * 1e3:.1f} ms, {plain['ratio']:.2f}x"
    times += f"; of limit {tables.of_limit(ours)}"
    return f"batch {ours['batch']:3}, {share}: {times}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("maefast bench scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_base", help="of maefast.models: a ViT for 224 px")
    parser.add_argument("--batch", type=int, help="4 on a CPU, 64 on a GPU")
    parser.add_argument("--dtype", choices=tuple(AGREE), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="three shares, three rounds")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if machine.absent("maefast bench scaling", args.device):
        return 3
    batch = args.batch or (64 if args.device == "cuda" else 1 if args.quick else 4)
    less = {"shares": (0.1, 0.25, 1.0), "times": ()} if args.quick else {}
    label, rounds = f"scaling-{args.model}-{args.dtype}", args.rounds or (3 if args.quick else 7)

    def keep(doc: dict) -> None:
        results.keep(args, doc, label, final=False)

    try:
        doc = measure(args.model, batch, args.dtype, args.device, rounds, **less, progress=keep)
    except RuntimeError as error:
        print(f"maefast bench scaling: {error}", file=sys.stderr)
        return results.WRONG
    results.keep(args, doc, label)
    return 0


if __name__ == "__main__":
    sys.exit(main())
