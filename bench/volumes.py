"""A 3-D ResNet over the visible cells of a masked volume, against the same network over the whole one times the mask.

    maefast bench volumes [--batch 2] [--side 96] [--ratio 0.6] [--dtype float32] [--rounds 3] [--json FILE]

One forward and backward pass of the encoder of a residual 3-D U-Net: a 3x3x3 stem, then blocks of two 3x3x3
convolutions with batch norms, 32 to 256 channels, each stage half the size of the last; cells of 16 sites a side. The
peer (`bench.peers.plain_sparse`) runs in both memory formats, and the faster one counts. Both are timed in turn; the
least time of all rounds is taken.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maefast import Cells, masking, sparsify
from maefast.bench import environment, results
from maefast.bench.peers.plain_sparse import Active, masked
from maefast.bench.worth import settle_memory

WIDTHS = (32, 64, 128, 256)
CELL = 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm3d(cout)
        self.conv2, self.norm2 = nn.Conv3d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm3d(cout)
        same = cin == cout and stride == 1
        shortcut = nn.Sequential(nn.Conv3d(cin, cout, 1, stride, bias=False), nn.BatchNorm3d(cout))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class Encoder(nn.Module):
    """Maps of all stages."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm3d(widths[0]), nn.ReLU())
        stages = zip((widths[0], *widths), widths)
        self.stages = nn.ModuleList(Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(stages))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def runs(batch: int, side: int, ratio: float, dtype: torch.dtype, widths=WIDTHS) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; each returns the sum that its gradients are of."""
    torch.manual_seed(0)
    network, volumes = Encoder(widths).to(dtype), torch.randn(batch, 1, side, side, side).to(dtype)
    plan, active = masking.cells(batch, (side // CELL,) * 3, ratio), Active()
    active.set(~plan.mask[:, None])
    sparse = sparsify(copy.deepcopy(network))

    def ours() -> Tensor:
        total = sum(level.rows.float().square().mean() for level in sparse(Cells.pack(volumes, plan)))
        total.backward()
        return total.detach()

    def peer(memory: torch.memory_format) -> Callable[[], Tensor]:
        dense = masked(copy.deepcopy(network), active).to(memory_format=memory)
        images = (volumes * active.map(volumes)).to(memory_format=memory)

        def run() -> Tensor:
            maps = dense(images)
            share = [active.map(level).float().mean() for level in maps]
            total = sum((level * active.map(level)).float().square().mean() / s for level, s in zip(maps, share))
            total.backward()
            return total.detach()

        return run

    return {
        "maefast": ours,
        "dense, contiguous": peer(torch.contiguous_format),
        "dense, channels last": peer(torch.channels_last_3d),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    results.add_arguments(parser)
    args = parser.parse_args()
    settle_memory()
    calls = runs(args.batch, args.side, args.ratio, getattr(torch, args.dtype))
    best, found = dict.fromkeys(calls, float("inf")), {}
    for _ in range(args.rounds):
        for name, run in calls.items():
            start = time.perf_counter()
            value = run()
            best[name] = min(best[name], time.perf_counter() - start)
            found[name] = float(value)
            print(f"{name}: {best[name]:.2f} s, {found[name]:.5f}", flush=True)
        if max(found.values()) - min(found.values()) > TOLERANCE[args.dtype] * max(found.values()):
            raise SystemExit(f"the networks disagree: {found}")
    base = {"batch": args.batch, "side": args.side, "mask_ratio": args.ratio, "dtype": args.dtype}
    records = [{"peer": n, **base, "best_s": s, "ratio": s / best["maefast"]} for n, s in best.items()]
    print(f"{min(record['ratio'] for record in records[1:]):.2f}x")
    settings = {"cell": CELL, "widths": WIDTHS, "rounds": args.rounds}
    doc = results.document("volumes", environment.describe("cpu"), settings, list(best), records)
    results.keep(args, doc, f"volumes-{args.dtype}")


if __name__ == "__main__":
    main()
