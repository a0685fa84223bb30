"""What the fuzz of `test_fuzz` calls and with what: the public functions, a valid call of each, and bad arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from random import Random

import numpy
import torch
from torch import Tensor

from maefast import masking, ops
from maefast.ops import BlockWeights, CellMask, TokenMask


def targets() -> dict[str, Callable]:
    """Every public op, sampler and maker of a plan that takes an argument, by name."""
    found = {f"ops.{name}": getattr(ops, name) for name in ops.__all__}
    found["ops.backend"] = entered
    found |= {f"masking.{name}": value for name, value in vars(masking).items() if not name.startswith("_")}
    for plan in (TokenMask, CellMask):
        makers = [name for name, value in vars(plan).items() if isinstance(value, staticmethod)]
        found |= {f"{plan.__name__}.{name}": getattr(plan, name) for name in makers}
    ours = {
        name: value
        for name, value in found.items()
        if isinstance(value, types.FunctionType) and value.__module__.startswith("maefast") and parameters(value)
    }
    seen: dict[Callable, str] = {}  # a maker that `masking` names again is one target
    return {name: value for name, value in ours.items() if seen.setdefault(value, name) == name}


@functools.wraps(ops.backend)
def entered(name):
    with ops.backend(name):
        pass


def parameters(function: Callable) -> list[str]:
    known = inspect.signature(function).parameters.values()
    names = [p.name for p in known if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(known):  # a maker passes the rest on to `token_mask`
        names += [name for name in inspect.signature(ops.token_mask).parameters if name in ("order", "backend")]
    return names


# --- a valid call of each ------------------------------------------------------------------------------------


def floats(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).reshape(shape)


def tokens(keep: int | list[int] = 2) -> TokenMask:
    return masking.random(2, 6, keep=keep, noise=floats(2, 6).flip(1), backend="reference")


def cells() -> CellMask:
    return CellMask(tokens([2, 4]), (2, 3))


def packed(channels: int = 4) -> dict:
    return {"x": floats(6, 4, 4, channels), "plan": cells()}


def packed_volumes(channels: int = 4) -> dict:
    return {"x": floats(6, 2, 4, 2, channels), "plan": CellMask(tokens([2, 4]), (1, 2, 3))}


def affine(channels: int = 4) -> dict:
    return {"weight": floats(channels), "bias": floats(channels)}


def _starts() -> Tensor:
    return torch.tensor([0, 2, 5], dtype=torch.int32)


def _block() -> BlockWeights:
    sizes = [
        (16,),
        (16,),
        (48, 16),
        (48,),
        (16, 16),
        (16,),
        (16,),
        (16,),
        (24, 16),
        (24,),
        (16, 24),
        (16,),
        (16,),
        (16,),
    ]
    return BlockWeights(*(floats(*size) for size in sizes))


# Name -> the arguments of valid calls, made anew for each call: an op may write its buffers.
VALID: dict[str, list[Callable[[], dict]]] = {
    "ops.add_norm": [
        lambda: {"x": floats(2, 5, 8), "delta": floats(2, 5, 8), **affine(8), "eps": 1e-6, "dtype": torch.float32}
    ],
    "ops.bias_gelu": [lambda: {"x": floats(2, 5, 8), "bias": floats(8), "approximate": "tanh"}],
    "ops.adamw": [
        lambda: {
            **{name: [floats(2, 3), floats(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
            "steps": [torch.tensor(1.0), torch.tensor(2.0)],
            "lr": 1e-3,
            "betas": (0.9, 0.99),
            "weight_decay": 0.1,
        }
    ],
    "ops.transformer_block": [
        lambda: {"x": floats(2, 5, 16), "delta": floats(2, 5, 16), "weights": _block(), "num_heads": 1, "count": 2},
        lambda: {"x": floats(2, 6, 16), "weights": _block(), "num_heads": 2, "masked": tokens(), "delta": None},
        lambda: {
            "x": floats(5, 16),
            "delta": None,
            "weights": _block(),
            "num_heads": 1,
            "cu_seqlens": _starts(),
            "max_seqlen": 3,
            "drop1": floats(5),
            "eps": (1e-6, 1e-5),
            "scale": 0.5,
        },
    ],
    "ops.linear": [lambda: {"x": floats(2, 5, 8), "weight": floats(3, 8), "bias": floats(3)}],
    "ops.attention": [
        lambda: {"q": floats(2, 5, 3, 2, 8), "key_bias": floats(2, 5, 2), "scale": 0.5, "causal": True},
        lambda: {
            "q": floats(2, 3, 2, 8),
            "kv": floats(2, 5, 2, 2, 8),
            "marked": floats(2, 5) > 0,
            "stats": True,
        },
        lambda: {"q": floats(5, 3, 2, 8), "cu_seqlens_q": _starts(), "max_seqlen_q": 3},
        lambda: {
            "q": floats(5, 2, 8),
            "kv": floats(5, 2, 2, 8),
            "cu_seqlens_q": _starts(),
            "cu_seqlens_k": _starts(),
            "max_seqlen_q": 3,
            "max_seqlen_k": 3,
        },
        lambda: {
            "q": floats(4, 5, 3, 2, 8),
            "bias": floats(2, 2, 5, 5),
            "rope": ops.Rope(floats(5, 8), floats(5, 8), True),
        },
    ],
    "ops.relative_bias": [lambda: {"table": floats(6, 2), "index": torch.arange(12).view(3, 4) % 6}],
    "ops.patch_embed": [
        lambda: {
            "images": floats(2, 3, 8, 12),
            "weight": floats(8, 3, 4, 4),
            "bias": floats(8),
            "plan": tokens(),
            "pos": floats(6, 8),
            "prefix": floats(1, 8),
        }
    ],
    "ops.gather_tokens": [lambda: {"x": floats(2, 7, 8), "plan": tokens([2, 4]), "which": "masked", "prefix": 1}],
    "ops.restore_tokens": [
        lambda: {"x": floats(2, 3, 8), "plan": tokens(), "mask_token": floats(8), "pos": floats(7, 8), "prefix": 1}
    ],
    "ops.patch_loss": [
        lambda: {
            "pred": floats(2, 4, 48),
            "images": floats(2, 3, 8, 12),
            "plan": tokens(),
            "patch_size": (4, 4),
            "norm": "videomae",
            "loss": "smooth_l1",
            "beta": 0.5,
            "reduction": "sample_mean",
        }
    ],
    "ops.backend": [lambda: {"name": "reference"}],
    "ops.token_mask": [
        lambda: {"scores": floats(2, 6), "keep": [1, 4], "order": "position"},
        lambda: {"scores": floats(2, 6), "keep": 2, "hide": [1, 4]},
    ],
    "ops.farthest_points": [lambda: {"points": floats(2, 6, 3), "count": 3, "start": 1}],
    "ops.knn": [lambda: {"queries": floats(2, 4, 3), "points": floats(2, 6, 3), "k": 3}],
    "ops.chamfer": [lambda: {"a": floats(2, 4, 3), "b": floats(2, 6, 3), "reduction": "sum"}],
    "ops.feature_loss": [
        lambda: {"pred": floats(2, 4, 8), "target": floats(2, 4, 8), "norm": "layernorm", "loss": "smooth_l1"},
        lambda: {"pred": floats(4, 8), "target": floats(6, 8), "index": torch.tensor([0, 5, 2, 2]), "loss": "cosine"},
    ],
    "ops.resize": [
        lambda: {"image": torch.arange(90, dtype=torch.uint8).view(5, 6, 3), "size": (4, 3), "box": (1, 0.5, 6, 5)},
    ],
    "ops.pack_cells": [
        lambda: {"x": floats(2, 3, 8, 12), "plan": cells()},
        lambda: {"x": floats(2, 3, 2, 4, 6), "plan": packed_volumes()["plan"]},
    ],
    "ops.unpack_cells": [lambda: {**packed(), "fill": floats(4)}, lambda: {**packed_volumes(), "fill": floats(4)}],
    "ops.depthwise_cells": [lambda: {**packed(), "weight": floats(4, 1, 3, 3), "bias": floats(4)}],
    "ops.max_pool_cells": [
        lambda: {**packed(), "kernel": 3, "stride": 2, "padding": 1},
        lambda: {**packed_volumes(), "kernel": (1, 3, 3), "stride": 2, "padding": (0, 1, 1)},
    ],
    "ops.avg_pool_cells": [lambda: {**packed(), "kernel": (3, 3), "stride": 2, "padding": 1}],
    "ops.global_pool_cells": [packed],
    "ops.segment_sum": [packed],
    "ops.conv_transpose_cells": [
        lambda: {
            **packed(),
            "weight": floats(4, 3, 3, 3),
            "bias": floats(6),
            "stride": 2,
            "padding": 1,
            "output_padding": 1,
            "groups": 2,
            "dilation": 1,
        },
        lambda: {**packed(), "weight": floats(4, 6, 2, 2), "stride": 2, "route": "rows"},
        lambda: {**packed_volumes(), "weight": floats(4, 6, 2, 2, 2), "stride": 2},
    ],
    "ops.conv_cells": [
        lambda: {
            **packed(),
            "weight": floats(6, 2, 3, 3),
            "bias": floats(6),
            "stride": 1,
            "padding": 1,
            "dilation": 1,
            "groups": 2,
            "route": "taps",
        },
        lambda: {**packed(), "weight": floats(6, 4, 2, 2), "bias": floats(6), "stride": 2},
        lambda: {**packed(), "weight": floats(4, 1, 3, 3), "padding": "same", "groups": 4},
        lambda: {**packed_volumes(), "weight": floats(6, 4, 3, 3, 3), "bias": floats(6), "padding": 1, "route": "halo"},
    ],
    "ops.batch_norm_act": [
        lambda: {
            "x": floats(2, 5, 4),
            **affine(),
            "running_mean": floats(4),
            "running_var": floats(4).square(),
            "act": "relu",
            "residual": floats(2, 5, 4),
            "momentum": 0.1,
        },
        lambda: {
            "x": floats(2, 5, 4),
            **affine(),
            "running_mean": floats(4),
            "running_var": floats(4).square(),
            "training": False,
            "process_group": None,
        },
    ],
    "ops.grn": [lambda: {**packed(), **affine(), "scope": "batch"}, lambda: {**packed(), **affine(), "plan": None}],
    "ops.group_norm_cells": [lambda: {**packed(), "groups": 2, **affine()}],
    "ops.instance_norm_cells": [lambda: {**packed(), **affine()}, lambda: {**packed_volumes(), **affine()}],
    "masking.keep_count": [lambda: {"num_tokens": 6, "ratio": 0.5, "rule": "round"}],
    "masking.random": [
        lambda: {"batch": 2, "num_tokens": 6, "ratio": 0.5, "noise": floats(2, 6), "order": "score"},
        lambda: {"batch": 2, "num_tokens": 6, "keep": [1, 4], "generator": torch.Generator(), "device": "cpu"},
    ],
    "masking.tube": [
        lambda: {"batch": 2, "frames": 3, "tokens_per_frame": 4, "ratio": 0.5, "generator": torch.Generator()},
        lambda: {"batch": 2, "frames": 3, "tokens_per_frame": 4, "keep": 1, "noise": floats(2, 4)},
    ],
    "masking.grid": [lambda: {"batch": 2, "grid_size": (4, 6), "stride": (2, 3), "offset": (1, 0)}],
    "masking.block": [
        lambda: {"batch": 2, "grid_size": (4, 6), "ratio": 0.5, "min_area": 2, "max_area": 6, "aspect": (0.3, 3.0)},
        lambda: {"batch": 2, "grid_size": (4, 6), "keep": 7, "generator": torch.Generator()},
    ],
    "masking.cells": [
        lambda: {"batch": 2, "grid_size": (2, 3), "ratio": [0.5, 0.2], "rule": "floor"},
        lambda: {"batch": 2, "grid_size": (2, 3), "keep": 2, "noise": floats(2, 6)},
        lambda: {"batch": 2, "grid_size": (1, 2, 3), "keep": 2, "noise": floats(2, 6)},
    ],
    "masking.running_cells": [
        lambda: {"batch": 2, "frames": 3, "grid_size": (2, 4), "ratio": 0.25, "noise": floats(2).abs() / 2},
        lambda: {"batch": 2, "frames": 3, "grid_size": (2, 4), "generator": torch.Generator(), "path": "rows"},
        lambda: {"batch": 2, "frames": 3, "grid_size": (2, 4), "device": "cpu"},
    ],
    "masking.only": [lambda: {"plan": tokens(), "chosen": floats(2, 6) > 0, "hide": None}],
    "masking.dual": [
        lambda: {
            "batch": 2,
            "frames": 4,
            "grid_size": (2, 4),
            "noise": floats(2, 8),
            "cell_noise": floats(2),
            "path": "rows",
        },
    ],
    "masking.coloured": [
        lambda: {"batch": 2, "grid_size": (3, 4), "ratio": 0.5, "sigma": (0.5, 2.0), "noise": floats(2, 3, 4)},
        lambda: {"batch": 2, "grid_size": (3, 4), "keep": 5, "colour": "red", "sigma": 1.0},
    ],
    "masking.weighted": [
        lambda: {"weights": floats(2, 6).square(), "keep": 2, "noise": floats(2, 6).abs() / 2},
        lambda: {"weights": floats(2, 6).square(), "ratio": [0.5, 0.2], "generator": torch.Generator()},
    ],
    "masking.disjoint": [lambda: {"batch": 2, "num_tokens": 6, "views": 2, "keep": 3, "noise": floats(2, 6)}],
    "masking.mixing": [lambda: {"batch": 4, "num_tokens": 6, "group": 2, "noise": floats(2, 6)}],
    "masking.enlarge": [lambda: {"plan": masking.random(2, 6, 0.5), "grid_size": (2, 3), "factor": (2, 1)}],
    "masking.channels": [
        lambda: {"batch": 2, "num_channels": 3, "num_patches": 4, "ratio": 0.5, "noise": floats(2, 3, 4)},
        lambda: {
            "batch": 2,
            "num_channels": 3,
            "num_patches": 4,
            "mode": "channel",
            "present": torch.ones(2, 3, dtype=torch.bool),
            "channel_noise": floats(2, 4).abs() / 2,
        },
    ],
    "masking.ragged": [lambda: {"lengths": [2, 6], "num_tokens": 6, "ratio": 0.5, "noise": floats(2, 6)}],
    "masking.similar": [lambda: {"x": floats(2, 4, 3), "lengths": [2, 4], "ratio": 0.5, "order": "release"}],
    "masking.near": [lambda: {"centres": floats(2, 5, 3), "ratio": 0.5, "noise": floats(2).abs() / 2}],
    "masking.guided": [
        lambda: {"scores": floats(2, 3, 4), "ratio": 0.5, "rule": "floor"},
        lambda: {"scores": floats(2, 3, 4), "keep": 1, "mask": "lowest"},
    ],
    "masking.children": [
        lambda: {"plan": tokens([2, 4]), "index": torch.arange(24).view(2, 6, 2) % 9, "num_tokens": 9},
    ],
    "masking.nodes": [
        lambda: {"sizes": [2, 6], "ratio": 0.5, "noise": floats(2, 6)},
        lambda: {"sizes": (2, 6), "ratio": 0.5, "replace": 0.5, "noise": floats(2, 6), "donor_noise": floats(2, 6)},
    ],
    "masking.nested": [lambda: {"batch": 2, "num_tokens": 6, "drop": 2, "hide": 4, "noise": floats(2, 6)}],
    "masking.whole_words": [
        lambda: {"words": torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, -1, -2, -2]]), "ratio": 0.3, "noise": floats(2, 5)}
    ],
    "masking.replaced": [
        lambda: {
            "ids": torch.ones(2, 3).long(),
            "hidden": floats(2, 3) > 0,
            "mask_id": 2,
            "vocabulary": 5,
            "noise": floats(2, 6).abs() / 2,
        }
    ],
    "masking.from_scores": [lambda: {"scores": floats(2, 6), "keep": 2}],
    "masking.from_bool": [
        lambda: {"masked": floats(2, 6) > 0, "keep": [6, 0]},
        lambda: {"masked": floats(2, 6) > 0, "absent": floats(2, 6) > 1},
    ],
    "masking.from_indices": [
        lambda: {"indices": torch.tensor([[0, 3], [5, 1]]), "num_tokens": 6},
        lambda: {"indices": [torch.tensor([0, 3]), torch.tensor([1])], "num_tokens": 6},
        lambda: {"indices": torch.tensor([[0], [5]]), "num_tokens": 6, "masked": torch.tensor([[1, 2], [3, 4]])},
    ],
    "masking.from_ids_restore": [lambda: {"ids_restore": torch.tensor([[1, 0, 2], [2, 1, 0]]), "keep": 2}],
    "TokenMask.all_visible": [lambda: {"batch": 2, "num_tokens": 6, "device": "cpu"}],
    "CellMask.from_bool": [lambda: {"masked": floats(2, 2, 3) > 0}],
    "CellMask.all_visible": [lambda: {"batch": 2, "grid": (2, 3)}],
}


# --- bad arguments ---------------------------------------------------------------------------------------------

# No large size that would fit: only what must be refused may be large.
ANYTHING: list[Callable[[], object]] = [
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: 1,
    lambda: 3,
    lambda: -1,
    lambda: 2**31,
    lambda: 2**63,
    lambda: 0.5,
    lambda: -0.5,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: 1j,
    lambda: "",
    lambda: "no such name",
    lambda: b"\0",
    lambda: [],
    lambda: [1, 2],
    lambda: (2, 2, 2),
    lambda: (-1, 2),
    lambda: [float("nan"), 0.5],
    lambda: ["a", "b"],
    lambda: [None, None],
    lambda: {"x": 1},
    lambda: {1, 2},
    lambda: range(2),
    object,
    lambda: len,
    lambda: torch.float16,
    lambda: torch.int32,
    lambda: torch.device("meta"),
    torch.Generator,
    lambda: numpy.ones((2, 6), numpy.float32),
    lambda: numpy.float32(0.5),
    lambda: numpy.int64(-2),
    tokens,
    cells,
    lambda: TokenMask.all_visible(1, 1),
    lambda: TokenMask.all_visible(2, 6, "meta"),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor([float("nan"), 1.0]),
    lambda: torch.tensor(2),
    lambda: torch.tensor([3, -1]),
    lambda: torch.tensor([], dtype=torch.int32),
    lambda: torch.empty(0),
    lambda: torch.empty(2, 0, 4),
    lambda: torch.zeros(2, 6, dtype=torch.bool),
    lambda: torch.zeros(1, 1, 1, 1, 1, 1),
    lambda: torch.zeros(2, 6, device="meta"),
    lambda: torch.zeros(3, 4, dtype=torch.complex64),
    lambda: torch.eye(6).to_sparse(),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    lambda: torch.nn.Linear(2, 2),
]

# One step away from a valid tensor.
NEAR: list[Callable[[Tensor], object]] = [
    lambda t: t[None],
    lambda t: t[0] if t.ndim else t,
    lambda t: t[1:] if t.ndim else t,
    lambda t: t[..., :-1] if t.ndim else t,
    lambda t: t.flatten(),
    lambda t: torch.cat([t, t]) if t.ndim else t,
    lambda t: t.mT if t.ndim > 1 else t,
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.tolist(),
    lambda t: t.numpy(),
    lambda t: t.mul(float("nan")) if t.is_floating_point() else t.long() - 5,
    lambda t: t.new_empty((0,) * t.ndim),
]


def spoil(rng: Random, value: object) -> object:
    """`value` one step from valid, or anything else."""
    if rng.random() < 0.5:
        if hasattr(value, "_replace"):
            name = rng.choice(value._fields)
            return value._replace(**{name: spoil(rng, getattr(value, name))})
        if isinstance(value, Tensor):
            return rng.choice(NEAR)(value)
        if isinstance(value, (int, float)):
            return rng.choice([-value, -value - 1, str(value), [value], (value,) * 3, float("nan"), value + 0.25])
        if isinstance(value, (list, tuple)):
            return rng.choice([value[:-1], [*value, *value], [-v for v in value], [str(v) for v in value], value[0]])
    return rng.choice(ANYTHING)()


def bad_call(rng: Random, name: str, function: Callable) -> dict:
    """Arguments of a call with one to three bad ones, or one that is left out."""
    given = rng.choice(VALID[name])()
    for what in rng.sample(parameters(function), min(len(parameters(function)), rng.choice([1, 1, 1, 2, 3]))):
        if rng.random() < 0.05:
            given.pop(what, None)
        else:
            given[what] = spoil(rng, given.get(what))
    return given
