"""Other people's masked models, as they are and accelerated: the source of the workers of `maefast.bench.dropin`.

A model comes from the installed package, from a checkout that the user names, or else from our own description of its
structure in `bench/peers/public/`. `origin` in a record says which.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from maefast.bench.environment import ROOT, version
from maefast.bench.peers import checkouts, dropin_convnets, dropin_hf, dropin_vits
from maefast.bench.peers.dropin_family import Family
from maefast.bench.peers.models import BATCHES, Task

# Attention the other way: "tuned" has SDPA put in where the code writes its scores, "written" writes them where the
# code takes SDPA, which on a CPU is slow in bfloat16.
BASES = ("accelerated", "as_is", "tuned", "written")
PEERS = (*BASES, *(f"{name}_compiled" for name in BASES))
NAMES = {
    "accelerated": "accelerated",
    "as_is": "as it is",
    "tuned": "as it is, with SDPA put in",
    "written": "as it is, attention written out",
    "accelerated_compiled": "accelerated, torch.compile",
    "as_is_compiled": "as it is, torch.compile",
    "tuned_compiled": "as it is, with SDPA put in, torch.compile",
    "written_compiled": "as it is, attention written out, torch.compile",
}


def families() -> dict[str, Family]:
    return {**dropin_hf.FAMILIES, **dropin_vits.FAMILIES, **dropin_convnets.FAMILIES}


def load(peer: str, config: dict) -> None:
    """Import what `task` will need, by a toy model of the family."""
    import maefast  # noqa: F401

    if peer.endswith("_compiled"):
        import torch._inductor.config as inductor

        inductor.fallback_random = True  # the random numbers of eager torch, so that all draw the same masks
    checkouts.use(config["checkouts"])
    family = families()[config["family"]]
    make(family, family.sizes("toy"), config["checkouts"])


def make(family: Family, sizes: dict, paths: list[str]) -> tuple[nn.Module, dict]:
    """A model with weights drawn from seed 0, and where it comes from.

    Raises:
        ImportError: no package, no checkout and no description of our own.
    """
    torch.manual_seed(0)
    if paths and not family.needs:
        raise ImportError(f"{family.title} is taken from {family.package} alone; leave --checkout out")
    if not paths and family.package and version(family.package):
        model = family.public(sizes)
        origin = {"origin": "package", "code": f"{family.package} {version(family.package)}"}
    elif paths:
        try:
            model = family.public(sizes)
        except ImportError as error:
            raise ImportError(f"{error}; {family.title} needs --checkout of {family.needs}") from error
        origin = {"origin": "checkout", "code": checkouts.origin(model, paths)}
    else:
        try:
            if family.own is None:
                raise ImportError("no description of our own")
            model = family.own(sizes)
        except ImportError as error:
            ways = [f"pip install {family.package}"] if family.package else []
            ways += [f"give --checkout of {family.needs}"] if family.needs else []
            raise ImportError(f"{family.title} is not here ({error}): {' or '.join(ways)}") from error
        file = Path(inspect.getfile(type(model))).resolve()
        origin = {"origin": "structure", "code": os.path.relpath(file, ROOT)}
    # Many parameters start constant (mask tokens, scales, position tables), where an error would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model, origin


def task(peer: str, *, config: dict, batch: int, device: str, part: str) -> Task:
    """A peer with random inputs, the same for all peers.

    Raises:
        ValueError: unknown peer. ImportError: see `make`. RuntimeError: nothing was accelerated.
    """
    if peer not in PEERS:
        raise ValueError(f"unknown peer {peer!r}; choose from {', '.join(PEERS)}")
    family, sizes = families()[config["family"]], config["sizes"]
    model, notes = make(family, sizes, config["checkouts"])
    layout = torch.channels_last if config["channels_last"] else torch.contiguous_format
    model = model.to(device, memory_format=layout).train()
    loss = family.loss
    if peer.startswith("accelerated"):
        import maefast

        maefast.accelerate(model)
        report = maefast.report(model)
        if not report.replaced:
            raise RuntimeError(f"nothing was accelerated: {'; '.join(report.checks)}")
        notes = {**notes, "report": str(report)}
        loss = family.fast_loss or loss
    elif peer.startswith(family.variant):
        family.tune(model)

    def step(*inputs: Tensor) -> Tensor:
        return loss(model, *inputs)

    generator = torch.Generator().manual_seed(1)
    data = [family.inputs(sizes, batch, generator) for _ in range(BATCHES)]
    data = [tuple(_place(t, device, layout) for t in inputs) for inputs in data]
    if peer.endswith("_compiled"):
        step = torch.compile(step, dynamic=False)
    return Task(model, step, data, notes)


def _place(tensor: Tensor, device: str, layout: torch.memory_format) -> Tensor:
    return tensor.to(device, memory_format=layout) if tensor.ndim == 4 else tensor.to(device)
