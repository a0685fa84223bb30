"""From which size on an accelerated transformer block is no slower than it was: the table of
`maefast/integrations/_worth.py`.

    maefast bench worth [--device cpu] [--threads N] [--json FILE]

A pre-norm block in timm's layout, as it is (SDPA) and accelerated, at several widths and numbers of tokens; training is
forward and backward. Each pair is timed in turn, 15 rounds; the ratio is that of the minima, which a busy machine
disturbs least. Printed is, for each kind of run, from which size on no pair was slower by more than the noise.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import maefast
from maefast.bench import environment, results
from maefast.bench.peers.public.timm_vit import Block
from maefast.check.speed import seconds_of as seconds
from maefast.integrations import _worth

WIDTHS = (48, 96, 192, 384, 768)
TOKENS = (17, 32, 64, 128, 256, 512, 1024)
MOST = 2**18  # tokens x width
SEQUENCE = 64
SLACK = 0.99  # ratios of equal code differ by as much


def cases() -> Iterator[tuple[int, int, str, bool]]:
    """(width, tokens, kind of arithmetic, training)."""
    for kind in ("float32", "bfloat16", "float64"):
        for training in (True, False):
            for width in WIDTHS:
                for tokens in TOKENS:
                    if width * tokens <= MOST:
                        yield width, tokens, kind, training


def settle_memory() -> None:
    """glibc gives freed memory back at once until a process has freed something large, as any real step does. Until
    then a lone block pays page faults, more than its arithmetic at few tokens, and by chance more on either side."""
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)  # glibc's limit follows the size freed, up to 32 MiB


def ratio(width: int, tokens: int, kind: str, training: bool, device: str, rounds: int = 15) -> float:
    """Time of the block as it is over that of the accelerated one."""
    torch.manual_seed(0)
    dtype = torch.float64 if kind == "float64" else torch.float32
    block = Block(width, max(1, width // 64)).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = maefast.accelerate(copy.deepcopy(block))
    length = min(tokens, SEQUENCE)
    x = torch.randn(tokens // length, length, width, device=device, dtype=dtype)
    with _worth.always():
        steps = [_step(net, x, kind, training) for net in (block, fast)]
        best = fastest(steps, rounds, device=device)
    return best[0] / best[1]


def fastest(steps: list[Callable[[], None]], rounds: int, least: float = 1e-3, device: str = "cpu") -> list[float]:
    """The least seconds of each step in `in_turn`."""
    return [min(samples) for samples in in_turn(steps, rounds, least, device)]


def in_turn(
    steps: list[Callable[[], None]], rounds: int, least: float = 1e-3, device: str = "cpu"
) -> list[list[float]]:
    """Seconds of each step in each round, timed in turn, at least about `least` seconds at a time."""
    for _ in range(3):
        for step in steps:
            step()
    inner = max(1, int(least / seconds(steps[0], 3, device)))
    rows = [[seconds(step, inner, device) for step in steps] for _ in range(rounds)]
    return [list(samples) for samples in zip(*rows)]


def _step(net: nn.Module, x: Tensor, kind: str, training: bool) -> Callable[[], None]:
    cast = torch.autocast(x.device.type, torch.bfloat16) if kind == "bfloat16" else nullcontext()

    def train() -> None:
        given = x.detach().requires_grad_()
        with cast:
            out = net(given)
        out.sum().backward()

    @torch.no_grad()
    def run() -> None:
        with cast:
            net(x)

    return train if training else run


def least(found: list[dict]) -> dict[str, tuple[int, int] | None]:
    """Kind of run -> (power, size): with tokens x width ** power of at least that size no pair was slower. Of the
    powers 1 and 2 the one that leaves fewer pairs behind. None where even the largest pair was slower."""
    table = {}
    for kind, training in dict.fromkeys((row["dtype"], row["training"]) for row in found):
        rows = [row for row in found if (row["dtype"], row["training"]) == (kind, training)]
        options = []
        for power in (1, 2):
            sizes = [(row["tokens"] * row["width"] ** power, row["ratio"] >= SLACK) for row in rows]
            largest_slow = max((size for size, good in sizes if not good), default=0)
            above = [size for size, _ in sizes if size > largest_slow]
            if above:
                options.append((-len(above), power, min(above)))
        table[f"{kind}, {'training' if training else 'no gradients'}"] = min(options)[1:] if options else None
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settle_memory()
    found = []
    for width, tokens, kind, training in cases():
        value = ratio(width, tokens, kind, training, args.device)
        found.append({"width": width, "tokens": tokens, "dtype": kind, "training": training, "ratio": round(value, 3)})
        mode = "training" if training else "no gradients"
        print(f"{kind:9} {mode:13} width {width:4} tokens {tokens:5} {width * tokens:7}: {value:.2f}x", flush=True)
    table = least(found)
    for name, limit in table.items():
        print(f"{name}: {'never' if limit is None else f'tokens x width^{limit[0]} >= {limit[1]:,}'}")
    if args.json:
        env = environment.describe(args.device)
        results.save(args.json, {"environment": env, "least": table, "pairs": found})


if __name__ == "__main__":
    main()
