"""Stage `speed`: what decides whether maefast is worth using, the most telling figures first, each line written when it
is measured: training steps of ViT-B, attention, the token ops, steps of the masked convnets."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from maefast.bench.gpu import lines

STEP_PEERS = ("plain", "plain_cudnn", "hf", "plain_compiled", "maefast_compiled", "maefast_graphed")
TUNED_PEERS = ("plain", "plain_autotuned", "plain_cudagraphs", "maefast_graphed")  # minutes of autotuning
BATCHES = (256, 64, 1024, 4096)
LENGTHS = (50, 197, 17, 65, 257)
HEADS = ((12, 64), (16, 32))
TOKEN_FAMILIES = ("mask", "embed", "restore", "loss", "norm", "gelu")
Write = Callable[[str, dict], None]


class Item(NamedTuple):
    """A group of ids that are measured together. seconds: about what it takes on an H100, or it is not begun."""

    name: str
    run: Callable[[Write], None]
    seconds: float


# --- steps -----------------------------------------------------------------------------------------------------


def step_item(
    preset: str,
    batch: int,
    device: str,
    peers: tuple[str, ...] | None,
    toy: bool,
    seconds: float = 75.0,
    more: str = "",
) -> Item:
    dtype = "bfloat16"
    name = f"step/{preset}/b{batch}/{dtype}{more}"

    def run(write: Write) -> None:
        from maefast.bench import step

        def records(found: list[dict]) -> None:
            for record in found:
                write(f"{name}/{record['peer']}", {"record": record, "settings": settings})

        settings = {"rounds": "3 first", "mask_ratio": step.PRESETS[preset].get("mask_ratio", 0.75)}
        options = {"rounds": 2, "steps": 1} if toy else {"budget": 12.0, "steps": 5}
        doc = step.measure(preset, batch, dtype, device, peers=peers, progress=records, **options)
        settings = doc["settings"]
        records(doc["records"])

    return Item(name, run, seconds)


def warm(device: str) -> None:
    """Compile the peers of the ViT-B steps, into torch's cache on disk: meant to run beside the smoke stage."""
    from maefast import models
    from maefast.bench import step

    chosen = step.PRESETS["vit_b"]
    model = models.create(**chosen["model"])
    request = {"config": model.config, "dtype": "bfloat16", "device": device, "tokens": model.num_patches}
    request |= {"mask_ratio": 0.75, "part": "step"}
    peers = []
    for batch in BATCHES[:2]:
        for name in STEP_PEERS:
            if name.endswith("_compiled"):
                peers.append(step.Peer(name))
                peers[-1].send(do="build", peer=name, batch=batch, **request)
    for peer in peers:
        try:
            peer.receive()
        except RuntimeError as error:
            print(f"warm: {peer.name}: {error}", file=sys.stderr)
        peer.close()


# --- single ops ------------------------------------------------------------------------------------------------

Limits = Callable[[], dict]  # what `machine.measure` finds, once, when the first item asks


def device_limits(device: str) -> Limits:
    from maefast.bench import machine

    return functools.cache(lambda: machine.measure(device) if device == "cuda" else machine.UNKNOWN)


def case_item(case, peers: tuple[str, ...], name: str, extra: dict, rounds: int, limits: Limits) -> Item:
    def run(write: Write) -> None:
        from maefast.bench.micro import suite

        for record in suite.one_by_one(case, peers, rounds, limits()):
            write(f"{name}/{record['variant']}", {"record": record, **extra})

    return Item(name, run, 1.5)


def attention_items(device: str, toy: bool, limits: Limits) -> Iterator[Item]:
    """Dense self-attention, forward and backward."""
    import torch

    from maefast.bench.micro import attention_peers, bench_attention
    from maefast.bench.micro.op import BOTH, Case
    from maefast.bench.micro.shapes import VIT_B

    more = {k: v for k, v in attention_peers.DENSE.items() if k not in ("sdpa_math", "flex")}
    batches, lengths, heads = ((2,), (5,), ((2, 16),)) if toy else (BATCHES, LENGTHS, HEADS)
    for batch in batches:
        for length in lengths:
            for count, width in heads:

                def make(shape, dtype, generator, length=length, count=count, width=width):
                    return bench_attention.dense(shape.batch, length, count, width, dtype, generator)

                op = replace(bench_attention.OPS[0], name="attention", make=make, more=more)
                shape = replace(VIT_B, name=f"s{length}-{count}x{width}", batch=batch)
                case = Case(op, shape, torch.bfloat16, BOTH, device)
                extra = {"attention": {"batch": batch, "length": length, "heads": count, "width": width}}
                extra["attention"] |= {"packed": False, "dtype": "bfloat16"}
                name = f"attention/b{batch}/{length}/{count}x{width}"
                yield case_item(case, ("eager", "library"), name, extra, 3 if toy else 7, limits)


def ragged_items(device: str, toy: bool, limits: Limits) -> Iterator[Item]:
    """Packed sequences of half to one and a half times a length; `length` is the longest."""
    import torch

    from maefast.bench.micro import attention_peers, bench_attention
    from maefast.bench.micro.op import BOTH, Case
    from maefast.bench.micro.shapes import VIT_B

    more = {k: v for k, v in attention_peers.RAGGED.items() if k != "flex"}
    for middle in (5,) if toy else (33, 42, 131, 171):
        for count, width in ((1, 16),) if toy else HEADS:

            def make(shape, dtype, generator, count=count, width=width):
                made = bench_attention.ragged(replace(shape, width=64 * count), dtype, generator)
                qkv = torch.randn((sum(made["lengths"]), 3, count, width), generator=generator, device=generator.device)
                return {**made, "qkv": qkv.to(dtype)}

            op = replace(bench_attention.OPS[2], name="attention (ragged)", make=make, more=more)
            shape = replace(VIT_B, name=f"r{middle}-{count}x{width}", batch=4 if toy else 256, keep=middle, prefix=0)
            case = Case(op, shape, torch.bfloat16, BOTH, device)
            extra = {"attention": {"batch": shape.batch, "length": middle + middle // 2, "heads": count}}
            extra["attention"] |= {"width": width, "packed": True, "dtype": "bfloat16"}
            name = f"ragged/{middle}/{count}x{width}"
            yield case_item(case, ("tuned", "eager", "library"), name, extra, 3 if toy else 7, limits)


def token_items(device: str, toy: bool, limits: Limits) -> Iterator[Item]:
    import torch

    from maefast.bench.micro import suite
    from maefast.bench.micro.shapes import TOY, VIT_B

    shapes = [TOY if toy else replace(VIT_B, batch=256)]
    for case in suite.cases(TOKEN_FAMILIES, shapes, [torch.bfloat16, torch.float32], device):
        if case.dtype is torch.float32 and torch.bfloat16 in case.op.dtypes:
            continue  # float32 only where there is nothing else: scores
        if toy and case.direction != case.op.directions[-1]:
            continue
        rounds = 3 if toy else 9
        yield case_item(case, ("eager", "tuned"), f"op/{case}", {}, rounds, limits)


def route_items(device: str, toy: bool, limits: Limits) -> Iterator[Item]:
    """The routes of a convolution over packed cells, 3x3 at stride 1, at each size of a cell."""
    import torch

    from maefast.bench.micro import bench_sparse_conv
    from maefast.bench.micro.op import BOTH, Case, Peer
    from maefast.bench.micro.shapes import RESNET50, TOY_CELLS
    from maefast.ops import conv_cells

    def route(name: str, inputs):
        return conv_cells(inputs["x"], inputs["plan"], inputs["weight"], None, 1, 1, route=name)

    def unable(name: str, case) -> str | None:
        return "Triton only" if case.device == "cpu" and name == "implicit" else None

    names = ("halo", "taps", "dense", "implicit")
    more = {f"maefast-{n}": Peer(functools.partial(route, n), functools.partial(unable, n)) for n in names}
    shape = TOY_CELLS if toy else replace(RESNET50, batch=128)
    for op in bench_sparse_conv.OPS:
        if not op.name.startswith("conv_cells (3x3 stage"):
            continue
        level = 2 ** (1 + int(op.name[-2]))
        case = Case(replace(op, more=more), shape, torch.bfloat16, BOTH, device)
        extra = {"conv": {"cell": shape.patch[0] // level, "grouped": False, "dtype": "bfloat16"}}
        yield case_item(case, ("eager", "library"), f"route/{shape.patch[0] // level}", extra, 3 if toy else 7, limits)


# --- the stage -------------------------------------------------------------------------------------------------


def items(device: str, toy: bool) -> list[Item]:
    """In the order of their weight."""
    limits = device_limits(device)

    convnets = (("fcmae_toy", 2),) if toy else (("fcmae_t", 64), ("spark_r50", 64))
    steps = [("toy", 2)] if toy else [("vit_b", batch) for batch in BATCHES[:2]]
    peers = ("plain", "hf") if toy else STEP_PEERS
    return [
        *(step_item(preset, batch, device, peers, toy) for preset, batch in steps),
        *attention_items(device, toy, limits),
        *token_items(device, toy, limits),
        *(step_item(preset, batch, device, None, toy, 40.0) for preset, batch in convnets),
        *(step_item(preset, 64, device, TUNED_PEERS, toy, 180.0, "/tuned") for preset, _ in steps[1:]),
    ]


def run(stage: str, path: Path, chosen: list[Item], device: str, seconds: float) -> int:
    """Run the items in order, as far as the time goes; the exit status."""
    start = time.monotonic()
    output = lines.Lines(path, stage)
    output.environment(device)
    output.plan(item.name for item in chosen)
    wrong = 0
    left = set(output.left(item.name for item in chosen))
    for item in chosen:
        if item.name not in left:
            continue
        spent = time.monotonic() - start
        if spent + (item.seconds if device == "cuda" else 0) > seconds:
            continue  # a shorter one may still fit
        began, bad = time.monotonic(), []
        try:
            item.run(functools.partial(_write, output, bad))
            outcome = {"outcome": "failed", "error": f"wrong: {', '.join(bad)}"} if bad else {"outcome": "measured"}
        except Exception as error:  # the others are worth their time
            outcome = {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
            print(f"failed   {item.name}: {outcome['error']}", flush=True)
        wrong += outcome["outcome"] == "failed"
        output.write(item.name, **outcome, seconds=round(time.monotonic() - began, 2))
        print(f"{outcome['outcome']:8} {item.name} {time.monotonic() - began:.1f} s", flush=True)
    print(f"{stage}: {time.monotonic() - start:.0f} s, {wrong} failed")
    return 1 if wrong else 0


def _write(output: lines.Lines, bad: list[str], id: str, fields: dict) -> None:
    """The line of one variant; a wrong result goes to `bad`."""
    error = fields["record"].get("error", "")
    outcome = "failed" if "WRONG" in error else "unable" if error else "measured"
    output.write(id, outcome, **fields, **({"error": error} if error else {}))
    if outcome == "failed":
        bad.append(id)
        print(f"WRONG    {id}: {error}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maefast.bench.gpu.speed", description=__doc__)
    parser.add_argument("--lines", type=Path, help="the file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--warm", action="store_true", help="only compile the compiled peers of the steps")
    args = parser.parse_args(argv)
    if args.warm:
        warm("cuda")
        return 0
    from maefast.bench.environment import exact_float32

    os.environ.pop("TRITON_INTERPRET", None)
    exact_float32()
    device = "cpu" if args.rehearse else "cuda"
    return run("speed", args.lines, items(device, args.rehearse), device, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
