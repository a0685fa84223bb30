"""A 3-D ResNet over the visible cells of a masked volume, against the same network over the whole one times the mask.

    maefast bench volumes [--batch 2] [--side 96] [--ratio 0.6] [--dtype float32] [--rounds 3]
        [--device cpu|cuda] [--json FILE]

One forward and backward pass of the encoder of a residual 3-D U-Net: a 3x3x3 stem, then blocks of two 3x3x3
convolutions with batch norms, 32 to 256 channels, each stage half the size of the last; cells of 16 sites a side. The
peer (`bench.peers.plain_sparse`) runs in both memory formats, and the faster one counts. Both are timed in turn; the
least time of all rounds is taken. FLOPs are those of the visible sites alone, for all three: the share of the machine's
limit is of what is needed. Memory is the most that torch's allocator held in one pass above what it held before.

--device cuda has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import Cells, masking, sparsify
from maefast.bench import environment, machine, results
from maefast.bench.micro import tables
from maefast.bench.peers.plain_sparse import Active, masked
from maefast.bench.worth import seconds, settle_memory
from maefast.ops import CellMask

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


def planned(batch: int, side: int, ratio: float, device: str = "cpu") -> tuple[CellMask, Active]:
    """The visible cells, the same in every run."""
    plan = masking.cells(batch, (side // CELL,) * 3, ratio, generator=torch.Generator().manual_seed(1)).to(device)
    active = Active()
    active.set(~plan.mask[:, None])
    return plan, active


def needed_flops(batch: int, side: int, ratio: float, widths=WIDTHS) -> int:
    """Of the convolutions, forward and backward, between visible sites alone: each pair of an output and an input that
    its kernel reaches, counted in a network of one channel, times the channels. The input has no gradient."""
    network, thin, active = Encoder(widths), Encoder((1,) * len(widths)), planned(batch, side, ratio)[1]
    found = []

    def count(conv: nn.Conv3d, given: tuple[Tensor], out: Tensor) -> None:
        reached = F.conv3d(active.map(given[0]), torch.ones_like(conv.weight), None, conv.stride, conv.padding)
        found.append(int((reached * active.map(out)).double().sum()))

    for module in thin.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    order = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    with torch.no_grad():
        thin(torch.ones(batch, 1, side, side, side))
    passes = [2 if conv is network.stem[0] else 3 for conv in order]
    channels = [conv.in_channels * conv.out_channels for conv in order]
    return sum(2 * pairs * each * times for pairs, each, times in zip(found, channels, passes, strict=True))


def runs(
    batch: int, side: int, ratio: float, dtype: torch.dtype, device: str = "cpu", widths=WIDTHS
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; each returns the sum that its gradients are of."""
    torch.manual_seed(0)
    network = Encoder(widths).to(device, dtype)
    volumes = torch.randn(batch, 1, side, side, side).to(device, dtype)
    plan, active = planned(batch, side, ratio, device)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if machine.absent("maefast bench volumes", args.device):
        return 3
    environment.exact_float32()
    settle_memory()
    limits, where = machine.measure(args.device, (getattr(torch, args.dtype),)), environment.describe(args.device)
    flops = needed_flops(args.batch, args.side, args.ratio)
    calls = runs(args.batch, args.side, args.ratio, getattr(torch, args.dtype), args.device)
    base = {"batch": args.batch, "side": args.side, "mask_ratio": args.ratio, "dtype": args.dtype}
    best, found, peaks = dict.fromkeys(calls, float("inf")), {}, {}
    for done in range(1, args.rounds + 1):
        for name, run in calls.items():
            best[name] = min(
                best[name], seconds(lambda run=run, name=name: found.update({name: run()}), 1, args.device)
            )
            found[name] = float(found[name])
            print(f"{name}: {best[name]:.2f} s, {found[name]:.5f}", flush=True)
        if max(found.values()) - min(found.values()) > TOLERANCE[args.dtype] * max(found.values()):
            raise SystemExit(f"the networks disagree: {found}")
        peaks = peaks or {name: machine.peak_bytes(run, args.device) for name, run in calls.items()}
        records = [
            {"peer": name, **base, "best_s": s, "ratio": s / best["maefast"], "peak_bytes": peaks[name]}
            | machine.share(limits, args.dtype, flops, s)
            for name, s in best.items()
        ]
        settings = {"cell": CELL, "widths": WIDTHS, "rounds": done, "machine": limits}
        doc = results.document("volumes", where, settings, list(best), records)
        if done < args.rounds:
            results.keep(args, doc, f"volumes-{args.dtype}", final=False)
    for record in records:
        memory = tables.megabytes(record["peak_bytes"])
        print(f"{record['peer']}: of limit {tables.of_limit(record)}, peak {memory} MB")
    print(f"{min(record['ratio'] for record in records[1:]):.2f}x")
    results.keep(args, doc, f"volumes-{args.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
