"""A transformer block, forward and backward, beside an eager one with SDPA.

    maefast bench block [--rounds N] [--device cpu|cuda] [--json FILE]

Two questions. What a call costs where there is nothing to compute (width 32, 4 tokens, one thread), and what a stack of
blocks of a real width takes and keeps for the backward. Timed in turn; the ratio is of the fastest of each. FLOPs are
those of the eager block. --device cuda has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from maefast.bench import environment, machine, results
from maefast.bench.micro import tables
from maefast.bench.peers.plain_mae import TransformerBlock
from maefast.bench.worth import seconds
from maefast.nn import Block, run_blocks

CALL = {"width": 32, "heads": 2, "batch": 1, "tokens": 4, "depth": 1, "threads": 1, "dtype": "float32"}
STACKS = [  # the encoder's and the decoder's blocks of ViT-B's MAE
    {"width": width, "heads": heads, "batch": 16, "tokens": tokens, "depth": 4, "dtype": dtype}
    for (width, heads, tokens), dtype in itertools.product([(768, 12, 50), (512, 16, 197)], ["float32", "bfloat16"])
]


def step(blocks: nn.ModuleList, run: Callable[[Tensor], Tensor], x: Tensor, bf16: bool) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = run(x)
    out.backward(torch.ones_like(out))
    for parameter in blocks.parameters():
        parameter.grad = None


def kept_bytes(run: Callable[[Tensor], Tensor], x: Tensor, bf16: bool) -> int:
    """What the graph holds beside parameters, each piece of memory once."""
    found = {}

    def note(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = run(x)
    del out
    return sum(found.values())


def measure(
    width, heads, batch, tokens, depth, dtype, threads=None, rounds=30, calls=1, device="cpu", limits=None
) -> list[dict]:
    """The records of both sides. limits: what `machine.measure` found with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.manual_seed(0)
    ours = nn.ModuleList(Block(width, heads) for _ in range(depth))
    eager = nn.ModuleList(TransformerBlock(width, heads, 4.0, 1e-6) for _ in range(depth))
    eager.load_state_dict(ours.state_dict())
    ours.to(device), eager.to(device)
    x, bf16 = torch.randn(batch, tokens, width).to(device).requires_grad_(), dtype == "bfloat16"

    def run_ours(x: Tensor) -> Tensor:
        r, delta = run_blocks(ours, x)
        return r + delta

    def run_eager(x: Tensor) -> Tensor:
        for block in eager:
            x = block(x)
        return x

    sides = {"maefast": (ours, run_ours), "eager": (eager, run_eager)}
    torch.testing.assert_close(run_ours(x), run_eager(x), rtol=1e-3, atol=1e-3)
    samples = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (blocks, run) in sides.items():
            step(blocks, run, x, bf16)  # the other side was here just now
            samples[name].append(seconds(partial(step, blocks, run, x, bf16), calls, device))
    flops = machine.count_flops(partial(step, *sides["eager"], x, bf16))
    shape = {"width": width, "heads": heads, "batch": batch, "tokens": tokens, "depth": depth, "dtype": dtype}
    records = [
        {
            **shape,
            "threads": torch.get_num_threads(),
            "peer": name,
            "best_s": min(samples[name]),
            "median_s": statistics.median(samples[name]),
            "time_to_eager": min(samples[name]) / min(samples["eager"]),
            "kept_bytes": kept_bytes(run, x, bf16),
            **machine.share(limits, dtype, flops, min(samples[name])),
        }
        for name, (_, run) in sides.items()
    ]
    torch.set_num_threads(before)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("maefast bench block", description=__doc__.splitlines()[0])
    results.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="of a stack")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    if machine.absent("maefast bench block", args.device):
        return 3
    environment.exact_float32()
    limits, where, records = machine.measure(args.device), environment.describe(args.device), []
    # The call has one thread, and little to compute: no share of what the machine does with all of them.
    cases = [{**CALL, "calls": 40}, *({**stack, "rounds": args.rounds, "limits": limits} for stack in STACKS)]
    for done, case in enumerate(cases, 1):
        new = measure(**case, device=args.device)
        records += new
        for r in new:
            what = f"{r['width']:4} wide, {r['batch']:2} x {r['tokens']:3} tokens, {r['depth']} deep, {r['dtype']:8}"
            took = f"{r['best_s'] * 1e3:9.3f} ms ({r['time_to_eager']:.2f}x eager)"
            kept = f"keeps {r['kept_bytes'] / 2**20:.1f} MB, of limit {tables.of_limit(r)}"
            print(f"{r['peer']:8} {what} {took}, {kept}", flush=True)
        settings = {"rounds": args.rounds, "machine": limits, "cases_left_out": len(cases) - done}
        doc = results.document("block", where, settings, ["maefast", "eager"], records)
        results.keep(args, doc, "block", final=done == len(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
