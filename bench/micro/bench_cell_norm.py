"""batch_norm_act and grn: over the active cells of an encoder, and over the dense maps of SparK's decoder.

On active cells the eager peer does what published code does: it looks up the active sites of the masked map, normalises
those rows and scatters them back; the tuned one is handed the indices. Their maps stand unpacked and ours packed before
the clock starts. On dense maps both peers are torch's own channels-last BatchNorm and the activation behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.bench.micro.bench_sparse_conv import plan_of
from maefast.bench.micro.op import Inputs, Op
from maefast.bench.micro.shapes import Shape
from maefast.ops import batch_norm_act, grn, pack_cells, unpack_cells

RAW = ("segment_stats", "norm_act", "norm_act_sums", "norm_act_backward")
ACTS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}
PARAMETERS = ("weight", "bias")


def _parameters(channels: int, generator: torch.Generator) -> Inputs:
    values = torch.randn(4, channels, generator=generator, device=generator.device)
    values[3].square_()  # a variance
    return {name: value.clone() for name, value in zip((*PARAMETERS, "mean", "var"), values, strict=True)}


def _cells(shape: Shape, level: int, channels: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Packed x and residual at 1 / level of the image, and the same as channels-last maps."""
    plan = plan_of(shape, generator)
    sizes = plan.total, shape.patch[0] // level, shape.patch[1] // level, channels
    inputs: Inputs = {"plan": plan}
    for name in ("x", "residual"):
        inputs[name] = torch.randn(sizes, generator=generator, device=generator.device).to(dtype)
        inputs[f"{name}_map"] = unpack_cells(inputs[name], plan).contiguous(memory_format=torch.channels_last)
    mask = plan.upsampled_mask(tuple(size // level for size in shape.size))
    return inputs | {"mask": mask, "sites": mask.flatten().nonzero()[:, 0]}


def _pack(inputs: Inputs, full: Tensor) -> Tensor:
    return pack_cells(full, inputs["plan"])


def encoder(name: str, level: int, width: int, act: str, added: bool) -> Op:
    """A BatchNorm of `width` times the first stage's channels over active sites."""

    def make(shape, dtype, generator):
        inputs = _cells(shape, level, width * shape.width, dtype, generator)
        return inputs | _parameters(width * shape.width, generator)

    def dense(inputs: Inputs, sites: Tensor) -> Tensor:
        full = inputs["x_map"].permute(0, 2, 3, 1)
        rows = full.reshape(-1, full.shape[-1])
        normed = F.batch_norm(rows[sites], *(inputs[n] for n in ("mean", "var", "weight", "bias")), training=True)
        out = torch.zeros_like(rows).index_copy(0, sites, normed).view(full.shape).permute(0, 3, 1, 2)
        return ACTS[act](out + inputs["residual_map"] if added else out)

    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        x, weight, bias, mean, var = (inputs[n] for n in ("x", *PARAMETERS, "mean", "var"))
        residual = inputs["residual"] if added else None
        return batch_norm_act(x, weight, bias, mean, var, act=act, residual=residual, backend=backend)

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        sites = shape.patch[0] * shape.patch[1] // level**2
        values = shape.batch * shape.keep * sites * width * shape.width * item
        forward = values * (3 + added)  # x, x again, y; residual
        return forward, values * (8 if added else 5)  # grad, x, twice; grad x; y or gated gradient, both ways

    leaves = ("x", "residual", *PARAMETERS) if added else ("x", *PARAMETERS)
    return Op(
        f"batch_norm_act ({name})",
        RAW,
        make,
        lambda inputs: dense(inputs, inputs["mask"].flatten().nonzero()[:, 0]),
        lambda inputs: dense(inputs, inputs["sites"]),
        ours,
        leaves=leaves,
        # In bfloat16 the peers round before the sum, and so send other elements through the relu.
        dtypes=(torch.float32,) if added else (torch.float32, torch.bfloat16),
        traffic=traffic,
        maps={leaf: f"{leaf}_map" for leaf in leaves if leaf not in PARAMETERS},
        pack=_pack,
        cells=True,
        waits=("eager",),
    )


def decoder(name: str, level: int, act: str) -> Op:
    """A BatchNorm of SparK's decoder: dense, as many channels as that level has."""

    def make(shape, dtype, generator):
        channels = max(1, shape.decoder_width * level // 32)
        sizes = shape.batch, *(size // level for size in shape.size), channels
        x = torch.randn(sizes, generator=generator, device=generator.device).to(dtype)
        return {"x": x} | _parameters(channels, generator)

    def eager(inputs: Inputs) -> Tensor:
        tables = (inputs[n] for n in ("mean", "var", *PARAMETERS))
        return ACTS[act](F.batch_norm(inputs["x"].permute(0, 3, 1, 2), *tables, training=True)).permute(0, 2, 3, 1)

    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        x, weight, bias, mean, var = (inputs[n] for n in ("x", *PARAMETERS, "mean", "var"))
        return batch_norm_act(x, weight, bias, mean, var, act=act, backend=backend)

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        values = shape.batch * shape.size[0] * shape.size[1] // level * shape.decoder_width // 32 * item
        return 3 * values, 5 * values

    return Op(
        f"batch_norm_act ({name})",
        RAW,
        make,
        eager,
        eager,
        ours,
        leaves=("x", *PARAMETERS),
        traffic=traffic,
        cells=True,
    )


def response(name: str, level: int, width: int) -> Op:
    """GRN of each sample between the two pointwise layers of a ConvNeXt V2 block."""

    def make(shape, dtype, generator):
        return _cells(shape, level, width * shape.width, dtype, generator) | _parameters(width * shape.width, generator)

    def eager(inputs: Inputs) -> Tensor:
        x = inputs["x_map"].permute(0, 2, 3, 1).float()  # zero where masked
        norm = (x.square().sum((1, 2), keepdim=True) + 1e-6).sqrt()
        y = inputs["weight"] * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + inputs["bias"] + x
        return y.to(inputs["x_map"].dtype).permute(0, 3, 1, 2) * inputs["mask"]

    def tuned(inputs: Inputs) -> Tensor:
        x = inputs["x_map"]
        norm = (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32).square() + 1e-6).sqrt()
        scale = inputs["weight"][:, None, None] * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + 1
        return torch.addcmul(inputs["bias"][:, None, None], x, scale).to(x.dtype) * inputs["mask"]

    def ours(inputs: Inputs, backend: str | None) -> Tensor:
        return grn(inputs["x"], inputs["plan"], inputs["weight"], inputs["bias"], backend=backend)

    def traffic(shape: Shape, item: int) -> tuple[int, int]:
        values = shape.batch * shape.keep * shape.patch[0] * shape.patch[1] // level**2 * width * shape.width * item
        return 3 * values, 5 * values

    return Op(
        f"grn ({name})",
        RAW,
        make,
        eager,
        tuned,
        ours,
        leaves=("x", *PARAMETERS),
        traffic=traffic,
        maps={"x": "x_map"},
        pack=_pack,
        cells=True,
        waits=("maefast-reference",),
    )


OPS = [
    encoder("stage 1, relu", 4, 1, "relu", False),
    encoder("stage 1, add, relu", 4, 4, "relu", True),
    encoder("stage 3, add, relu", 16, 16, "relu", True),
    decoder("decoder 224", 1, "none"),
    decoder("decoder 112, relu6", 2, "relu6"),
    decoder("decoder 28, relu6", 8, "relu6"),
    response("stage 1", 4, 6),
    response("stage 3", 16, 24),
]


def bench_cell_norm(report):
    report()
