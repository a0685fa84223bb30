"""Transformer blocks that somebody changed, watches or adapts, and blocks that only look like those we know."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import maefast
from maefast.bench.peers.public.timm_vit import Attention, Block, LayerScale
from maefast.integrations import transformer
from tests.integrations.blocks import DIM, accelerated, build, compare, is_fast, is_fused, pretend, run, tokens
from tests.integrations.common import gradient_error, relative

# --- what somebody does to a block afterwards ---------------------------------------------------------------


INSIDE = ["attn", "attn.qkv", "attn.q_norm", "attn.proj_drop", "attn.proj", "norm1", "norm2", "ls1", "drop_path1"]
INSIDE += ["mlp", "mlp.fc1", "mlp.act", "mlp.norm", "mlp.fc2", "mlp.drop2"]


@pytest.mark.parametrize("bf16", [False, True])
def test_hooks_inside_see_what_they_saw(bf16):
    """The same inputs, keyword arguments and outputs, of the same dtype, under autocast too."""
    block = build(Block(DIM), torch.float32)
    fast = accelerated(block)
    x = tokens(dtype=torch.float32)
    for name in INSIDE:
        seen = []

        def look(module, args, kwargs, out, seen=seen):
            seen.append((*args, *kwargs.items(), out))

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for net in (block, fast):
                handle = net.get_submodule(name).register_forward_hook(look, with_kwargs=True)
                net(x)
                handle.remove()
        assert len(seen) == 2, name
        for a, b in zip(*seen, strict=True):
            same = a.dtype is b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, name


def test_hooks_that_change_things():
    block = build(Block(DIM))
    fast = accelerated(block)
    for name in INSIDE:
        for net in (block, fast):
            part = net.get_submodule(name)
            part.handles = [
                part.register_forward_hook(lambda m, args, out: out * 1.5),
                part.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi)),
            ]
        compare(block, fast)
        for net in (block, fast):
            for handle in net.get_submodule(name).handles:
                handle.remove()


def test_hooks_on_a_block():
    """They see tensors, also where sums stay pending between blocks."""
    blocks = nn.Sequential(*(build(Block(DIM)) for _ in range(3)))
    fast = accelerated(blocks)
    seen = []
    fast[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    fast[1].register_forward_hook(lambda m, args, out: seen.append(out))
    x = tokens()
    assert relative(transformer.run_blocks(fast, x).value(), blocks(x)) < 1e-12
    assert relative(seen[0], blocks[0](x)) < 1e-12
    assert relative(seen[1], blocks[:2](x)) < 1e-12


def test_hooks_on_every_module():
    block = build(Block(DIM))
    fast = accelerated(block)
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: names.append(type(m).__name__))
    try:
        block(tokens())
        want = list(names)
        names.clear()
        fast(tokens())
    finally:
        handle.remove()
    assert names == want


def test_forward_of_one_object():
    """Before: kept, with the reason. Afterwards: called, for the block and for parts of it."""
    block = build(Block(DIM))
    early = copy.deepcopy(block)
    early.forward = lambda x: x * 2
    with pytest.warns(UserWarning, match="this object has its own forward"):
        assert not is_fast(maefast.accelerate(early))
    for name in ("", "attn", "mlp", "norm1", "ls1"):
        blocks = nn.Sequential(copy.deepcopy(block))
        fast = accelerated(blocks)
        for net in (blocks, fast):
            part = net[0].get_submodule(name)
            part.forward = lambda *args, part=part, **kwargs: type(part).forward(part, *args, **kwargs) * 3
        compare(blocks, fast)
        assert relative(transformer.run_blocks(fast, tokens()).value(), blocks(tokens())) > 0
        x = tokens()
        assert relative(transformer.run_blocks(fast, x).value(), blocks(x)) < 1e-12


class LowRank(nn.Module):
    """An adapter in the place of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Linear):
    """A subclass of Linear, like quantised ones."""

    def forward(self, x):
        return super().forward(x) / 2


LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["adapter", "subclass", "weight_norm", "old weight_norm", "prune", "weight subclass"])
def test_other_linears(how, when):
    for name in LINEARS:
        block = build(Block(DIM))
        fast = copy.deepcopy(block)
        if when == "after":
            maefast.accelerate(fast)
        for net in (block, fast):
            torch.manual_seed(5)
            parent, _, last = name.rpartition(".")
            parent, linear = net.get_submodule(parent), net.get_submodule(name)
            if how == "adapter":
                setattr(parent, last, LowRank(linear))
            elif how == "subclass":
                linear.__class__ = Halved
            elif how == "weight_norm":
                torch.nn.utils.parametrizations.weight_norm(linear)
            elif how == "old weight_norm":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.nn.utils.weight_norm(linear)
            elif how == "prune":
                prune.random_unstructured(linear, "weight", 0.5)
            else:
                linear.weight = nn.Parameter(Doubled(linear.weight.detach()))
        if when == "before":
            maefast.accelerate(fast)
            assert is_fast(fast)
        compare(block, fast)


class Doubled(torch.Tensor):
    """A tensor that counts for twice its values in a product, as quantised weights stand for others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * F.linear(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def test_other_parts_afterwards():
    """Attention, MLP and norms replaced by something else; another scale; dropout raised."""

    class Mean(nn.Module):
        def forward(self, x, **kwargs):
            return x.mean(1, keepdim=True).expand_as(x)

    for change in (
        lambda b: setattr(b, "attn", Mean()),
        lambda b: setattr(b, "mlp", Mean()),
        lambda b: setattr(b, "norm1", nn.LayerNorm(DIM, elementwise_affine=False)),
        lambda b: setattr(b, "norm2", nn.LayerNorm(DIM, bias=False).double()),
        lambda b: setattr(b, "norm1", nn.RMSNorm(DIM).double()),
        lambda b: setattr(b.norm2, "eps", 0.0),
        lambda b: setattr(b.attn, "scale", 0.7),
        lambda b: setattr(b.attn, "num_heads", 4) or setattr(b.attn, "head_dim", DIM // 4),
        lambda b: setattr(b.attn.attn_drop, "p", 0.5),
        lambda b: setattr(b.mlp.drop1, "p", 0.5),
        lambda b: setattr(b, "ls2", LayerScale(DIM, 0.2).double()),
        lambda b: setattr(b.mlp, "act", nn.SiLU()),
        lambda b: setattr(b.attn, "q_norm", nn.LayerNorm(DIM // 2).double()),
    ):
        block = build(Block(DIM))
        fast = accelerated(block)
        change(block)
        change(fast)
        compare(block, fast)


def test_dropout_that_evaluates_in_attention_that_trains():
    """timm's attention takes the rate of its dropout, whatever mode that is in."""
    block = build(Block(DIM, attn_drop=0.5))
    fast = accelerated(block)
    for net in (block, fast):
        net.train()
        net.attn.attn_drop.eval()
    x = tokens()
    (want, drawn), (got, also) = run(block, x), run(fast, x)
    assert torch.equal(drawn, also)
    assert relative(got, want) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    block = build(Block(DIM, drop_path=0.5, attn_drop=0.2))
    fast = accelerated(block)
    x, found = tokens(), []
    for net in (block, fast):
        mine = x.clone().requires_grad_()
        torch.manual_seed(1)
        checkpoint(net, mine, use_reentrant=reentrant).pow(3).sum().backward()
        found.append(mine.grad)
    assert relative(*found) < 1e-11
    assert gradient_error(fast, block) < 1e-11


def test_transforms_of_functions():
    """torch.func cannot go through our kernels: the block's own code runs there."""
    block = build(Block(DIM))
    fast = accelerated(block)
    x = tokens()
    found = []
    for net in (block, fast):
        parameters = dict(net.named_parameters())

        def loss(p, sample, net=net):
            return torch.func.functional_call(net, p, (sample[None],)).pow(3).sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for name, grad in found[0].items():
        assert relative(found[1][name], grad) < 1e-9 or grad.norm() < 1e-9, name
    tangents = []
    for net in (block, fast):
        with forward_ad.dual_level(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            tangents.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    assert relative(*tangents) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fast.eval(), x)
    assert relative(traced(x), block.eval()(x)) < 1e-12


# --- blocks that look alike and are not ---------------------------------------------------------------------


def post_norm(self, x):
    x = x + self.drop_path1(self.norm1(self.ls1(self.attn(x))))
    return x + self.drop_path2(self.norm2(self.ls2(self.mlp(x))))


def parallel(self, x):
    return x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))) + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def switch(self, x):
    x = x + self.attn(self.norm1(x)) * (2 if getattr(self, "twice", False) else 1)
    return x + self.mlp(self.norm2(x))


def keeps_the_last(self, x):
    self.last = x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


def subsets(self, x):
    """Stochastic depth over samples while it trains, as in DINOv2."""
    if self.training and self.norm1.eps > 0:
        x = x + self.attn(self.norm1(x)) * torch.rand(len(x), 1, 1, dtype=x.dtype)
    else:
        x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("training", [True, False])
def test_kept_in_training(training):
    """Fast in the mode that agrees, whatever the mode was while compared."""
    block = pretend("Alike", subsets)
    block.train(training)
    fast = maefast.accelerate(copy.deepcopy(block))
    assert "in training it computes something else, and runs as it was" in str(maefast.report(fast))
    compare(block, fast)
    assert "ran fast once, as it was once because in training" in str(maefast.report(fast))


@pytest.mark.parametrize("scales", [None, 1e-6])
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (post_norm, "differs"),
        (parallel, "differs"),
        (switch, "uses twice"),
        (keeps_the_last, "cannot be looked into"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_kept(forward, reason, scales, training):
    """Also where layer scales make the difference small, and where only training or a switch shows it."""
    block = pretend("Alike", forward, init_values=scales)
    block.train(training)
    if forward is switch:
        block.twice = False
    if scales:
        nn.init.constant_(block.ls1.gamma, scales)
        nn.init.constant_(block.ls2.gamma, scales)
    with pytest.warns(UserWarning, match="nothing to accelerate"):
        fast = maefast.accelerate(copy.deepcopy(block))
    assert reason in str(maefast.report(fast))
    if forward is switch:
        block.twice = fast.twice = True
    compare(block, fast)
    assert block.training is fast.training


def test_zero_projections_hide_nothing():
    block = pretend("Alike", parallel)
    for linear in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(linear.weight)
    assert not is_fast(accelerated(block))


def test_overriding_forward_is_kept():
    class Doubles(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x)

    block = build(Doubles(DIM))
    with pytest.warns(UserWarning, match=r"Doubles.forward overrides that of Block"):
        fast = maefast.accelerate(copy.deepcopy(block))
    compare(block, fast)


class Windows(Attention):
    window = 0

    def forward(self, x, attn_mask=None, is_causal=False):
        if self.window:
            return super().forward(x[:, : self.window]).mean(1, keepdim=True).expand_as(x)
        return super().forward(x)


class Remembers(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        out = super().forward(x)
        self.last = out.detach()
        return out


class Rotates(Attention):
    """Rotary positions inside."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("rope", torch.randn(64, 1))

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = q * self.rope[: x.shape[1]].cos(), k * self.rope[: x.shape[1]].cos()
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", [Windows, Remembers, Rotates])
@pytest.mark.parametrize("verify", [True, False])
def test_unknown_attention_is_called(kind, verify):
    """Its own code runs inside the block, also where nothing is compared, or it would compute the same now."""
    block = Block(DIM)
    block.attn = kind(DIM, 2)
    block = build(block)
    fast = maefast.accelerate(copy.deepcopy(block), verify=verify)
    assert is_fast(fast)
    assert not is_fused(fast)
    assert "does not know" in str(maefast.report(fast))
    compare(block, fast)
    for net in (block, fast):
        net.attn.window = 3
    compare(block, fast)
    assert hasattr(fast.attn, "last") is (kind is Remembers)


class Gated(nn.Module):
    """SwiGLU in timm's packed layout, which has the names of a plain MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 64), nn.SiLU(), nn.Linear(32, DIM)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(self.act(a) * b)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(DIM, 64), nn.Linear(32, DIM)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


def test_other_mlps():
    block = Block(DIM)
    block.mlp = Other()
    block = build(block)
    fast = accelerated(block)
    assert is_fused(fast)
    compare(block, fast)
    block.mlp = Gated().double()
    fast = accelerated(block)
    compare(block, fast)


def test_blocks_of_one_class_that_differ():
    """Each kind is compared by itself: one of them standing for all would be wrong."""
    blocks = nn.Sequential(*(build(Block(DIM)) for _ in range(3)))
    blocks[1].attn.qkv.bias = None
    blocks[2].norm1 = nn.LayerNorm(DIM, eps=1e-2).double()
    assert len({transformer.kind(block) for block in blocks}) == 3
    fast = accelerated(blocks)
    assert all(map(is_fused, fast))
    compare(blocks, fast)
