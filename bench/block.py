"""A transformer block, forward and backward, beside an eager one with SDPA: `python -m bench.block [--json FILE]`.

Two questions. What a call costs where there is nothing to compute (width 32, 4 tokens, one thread), and what a stack of
blocks of a real width takes and keeps for the backward. Timed in turn; the ratio is of the fastest of each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from maefast.bench import environment, results
from maefast.bench.peers.plain_mae import TransformerBlock
from maefast.nn import Block, run_blocks

CALL = {"width": 32, "heads": 2, "batch": 1, "tokens": 4, "depth": 1, "threads": 1, "dtype": "float32"}
STACKS = [  # the encoder's and the decoder's blocks of ViT-B's MAE
    {"width": width, "heads": heads, "batch": 16, "tokens": tokens, "depth": 4, "dtype": dtype}
    for (width, heads, tokens), dtype in itertools.product([(768, 12, 50), (512, 16, 197)], ["float32", "bfloat16"])
]


def step(blocks: nn.ModuleList, run: Callable[[Tensor], Tensor], x: Tensor, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
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

    with saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = run(x)
    del out
    return sum(found.values())


def measure(width, heads, batch, tokens, depth, dtype, threads=None, rounds=30, calls=1) -> list[dict]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    torch.manual_seed(0)
    ours = nn.ModuleList(Block(width, heads) for _ in range(depth))
    eager = nn.ModuleList(TransformerBlock(width, heads, 4.0, 1e-6) for _ in range(depth))
    eager.load_state_dict(ours.state_dict())
    x, bf16 = torch.randn(batch, tokens, width, requires_grad=True), dtype == "bfloat16"

    def run_ours(x: Tensor) -> Tensor:
        r, delta = run_blocks(ours, x)
        return r + delta

    def run_eager(x: Tensor) -> Tensor:
        for block in eager:
            x = block(x)
        return x

    sides = {"maefast": (ours, run_ours), "eager": (eager, run_eager)}
    torch.testing.assert_close(run_ours(x), run_eager(x), rtol=1e-3, atol=1e-3)
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (blocks, run) in sides.items():
            step(blocks, run, x, bf16)  # the other side was here just now
            start = time.perf_counter()
            for _ in range(calls):
                step(blocks, run, x, bf16)
            seconds[name].append((time.perf_counter() - start) / calls)
    shape = {"width": width, "heads": heads, "batch": batch, "tokens": tokens, "depth": depth, "dtype": dtype}
    records = [
        {
            **shape,
            "threads": torch.get_num_threads(),
            "peer": name,
            "best_s": min(seconds[name]),
            "median_s": statistics.median(seconds[name]),
            "time_to_eager": min(seconds[name]) / min(seconds["eager"]),
            "kept_bytes": kept_bytes(run, x, bf16),
        }
        for name, (_, run) in sides.items()
    ]
    torch.set_num_threads(before)
    return records


def main() -> None:
    parser = argparse.ArgumentParser("maefast bench block", description=__doc__.splitlines()[0])
    results.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="of a stack")
    args = parser.parse_args()
    records = measure(**CALL, calls=40)
    for stack in STACKS:
        records += measure(**stack, rounds=args.rounds)
    for r in records:
        what = f"{r['width']:4} wide, {r['batch']:2} x {r['tokens']:3} tokens, {r['depth']} deep, {r['dtype']:8}"
        took = f"{r['best_s'] * 1e3:9.3f} ms ({r['time_to_eager']:.2f}x eager)"
        print(f"{r['peer']:8} {what} {took}, keeps {r['kept_bytes'] / 2**20:.1f} MB")
    doc = results.document("block", environment.describe("cpu"), {"rounds": args.rounds}, ["maefast", "eager"], records)
    results.keep(args, doc, "block")


if __name__ == "__main__":
    main()
