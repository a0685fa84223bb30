"""What the tests of transformer blocks share."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

import maefast
from maefast.bench.peers.public.timm_vit import Block
from maefast.integrations import _swap, transformer
from tests.integrations.common import gradient_error, relative

DIM = 32


def tokens(count: int = 7, dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, DIM, dtype=dtype)


def build(block: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights, so that nothing starts at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return block.to(dtype)


def accelerated(block: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return maefast.accelerate(copy.deepcopy(block))


def run(block, x, *args, **kwargs):
    torch.manual_seed(1)
    out = block(x, *args, **kwargs)
    return (out[0] if isinstance(out, tuple) else out), torch.get_rng_state()


def compare(block, fast, x=None, *args, tolerance=1e-11, **kwargs):
    """Outputs, gradients and random draws, training and evaluating."""
    x = tokens() if x is None else x
    for training in (True, False):
        block.train(training)
        fast.train(training)
        (want, drawn), (got, also) = run(block, x, *args, **kwargs), run(fast, x, *args, **kwargs)
        assert got.dtype is want.dtype
        assert relative(got, want) < tolerance
        assert torch.equal(drawn, also)
        for net, out in ((block, want), (fast, got)):
            net.zero_grad()
            out.pow(3).sum().backward()
        assert gradient_error(fast, block) < 10 * tolerance


def is_fast(block: nn.Module) -> bool:
    return "forward" in _swap.methods(block)


def is_fused(block: nn.Module) -> bool:
    """Attention too."""
    return is_fast(block) and transformer.layout_of(block).problem(block) is None


def pretend(name: str, forward, attention: nn.Module | None = None, **options) -> nn.Module:
    """A block of a class of its own with this forward, which overrides nobody's."""
    kind = type(name, (nn.Module,), {"forward": forward, "__module__": __name__})
    block, like = kind(), options.pop("like", None) or Block(DIM, **options)
    vars(block).update(vars(like))
    if attention is not None:
        block.attn = attention
    return build(block)
