"""`maefast.accelerate`, `report` and `restore` themselves: unknown models, wrappers, hooks, options."""

from __future__ import annotations

import copy
import inspect
import platform
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public.mae import MaskedAutoencoderViT
from maefast.integrations import _swap, _verify, mae
from maefast.integrations._report import Report
from tests.integrations.common import relative
from tests.integrations.test_mae import SIZES, images


def build() -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(**SIZES)


def run(model: nn.Module, *args):
    torch.manual_seed(1)
    return model(*(args or (images(),)))


# --- what it is given ---------------------------------------------------------------------------------------


def test_an_unknown_model_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    kinds = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="nothing to accelerate here, because Sequential holds no transformer blocks"):
        assert maefast.accelerate(model) is model
    assert [type(m) for m in model.modules()] == kinds
    text = str(maefast.report(model))
    assert "nothing is replaced" in text
    assert "facebookresearch/mae" in text  # what would have been known


def test_no_module():
    for function in (maefast.accelerate, maefast.report, maefast.restore):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function(lambda x: x)


def test_unknown_option():
    with pytest.raises(ValueError, match="pred must be"):
        maefast.accelerate(build(), pred="some")


def test_never_accelerated():
    with pytest.raises(ValueError, match="not accelerated"):
        maefast.report(build())
    model = build()
    assert maefast.restore(model) is model


# --- around it ----------------------------------------------------------------------------------------------


def test_compiled_before():
    torch._dynamo.reset()
    model, other = build(), build()
    compiled = torch.compile(model, backend="aot_eager")
    assert maefast.accelerate(compiled) is compiled
    assert relative(run(compiled)[0], run(other)[0]) < 1e-5
    assert "forward_encoder" in str(maefast.report(compiled))
    assert "_orig_mod" not in str(maefast.report(compiled))


def test_in_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)[0]

    model = maefast.accelerate(Wrapper(build()))
    assert "inner.forward_encoder" in str(maefast.report(model))
    assert relative(run(model), run(build())[0]) < 1e-5
    assert "inner.forward_encoder" in str(maefast.report(nn.DataParallel(model)))


def test_moved_afterwards():
    model = maefast.accelerate(build()).double()
    x = images(torch.float64)
    assert relative(run(model, x)[0], run(build().double(), x)[0]) < 1e-12


def test_on_the_meta_device():
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**SIZES)
    maefast.accelerate(model)
    assert "agree" in str(maefast.report(model))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    assert relative(run(model)[0], run(build())[0]) < 1e-5


def test_random_state_and_buffers_stay():
    torch.manual_seed(5)
    model = build()
    state = torch.get_rng_state()
    maefast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_signature_and_names_stay():
    model = build()
    before = inspect.signature(model.forward)
    maefast.accelerate(model)
    assert inspect.signature(model.forward) == before
    assert type(model).__name__ == "MaskedAutoencoderViT"
    assert type(model).__module__ == MaskedAutoencoderViT.__module__
    assert repr(model) == repr(build())


def test_the_class_of_others_stays():
    before = dict(vars(MaskedAutoencoderViT))
    maefast.accelerate(build())
    assert dict(vars(MaskedAutoencoderViT)) == before
    assert type(build()) is MaskedAutoencoderViT


def test_hooks_fire_and_see_the_same():
    model = build()
    fast = maefast.accelerate(copy.deepcopy(model))
    for where in (
        "blocks.0",
        "blocks.1.attn",
        "blocks.1.mlp.fc1",
        "decoder_blocks.0.norm2",
        "norm",
        "decoder_norm",
        "decoder_pred",
    ):
        seen = []

        def look(module, args, out, seen=seen):
            seen.append(out)

        for net in (model, fast):
            handle = net.get_submodule(where).register_forward_hook(look)
            loss = run(net)[0]
            handle.remove()
        assert len(seen) == 2, where
        assert relative(seen[1], seen[0]) < 1e-5
        assert loss.isfinite()


def test_pickle_of_a_class_with_its_own_way():
    class Own(MaskedAutoencoderViT):
        def __reduce_ex__(self, protocol):
            return (build, ())

    model = maefast.accelerate(Own(**SIZES))
    with pytest.raises(TypeError, match="restore"):
        copy.deepcopy(model)


def test_interrupted_nothing_is_half_done(monkeypatch):
    def interrupt(model, options, keep):
        raise KeyboardInterrupt

    monkeypatch.setattr(mae, "steps", interrupt)
    model = build()
    with pytest.raises(KeyboardInterrupt):
        maefast.accelerate(model)
    assert not any(_swap.methods(module) for module in model.modules())


def test_restore_a_part():
    model = maefast.accelerate(build())
    maefast.restore(model.decoder_blocks)
    assert not _swap.methods(model.decoder_blocks[0])
    assert relative(run(model)[0], run(build())[0]) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maefast.accelerate(model)
    assert _swap.methods(model.decoder_blocks[0])


# --- the comparison -----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return x * self.scale


X = torch.arange(4.0)


@pytest.mark.parametrize(
    ("fast", "message"),
    [
        (lambda self, x: x * self.scale * 1.01, "output 0 differs"),
        (lambda self, x: (x * self.scale).double(), "torch.float64"),
        (lambda self, x: (x * self.scale)[None], "accelerated"),
        (lambda self, x: (x * self.scale, x), "returns 1 values"),
        (lambda self, x: x * self.scale.detach(), "gradients reach"),
        (lambda self, x: x * self.scale + 0 * torch.rand(1), "random numbers"),
        (lambda self, x: x * self.scale + 0 * random.random(), "random numbers"),
        (lambda self, x: x * self.scale + 0 * np.random.uniform(), "random numbers"),  # noqa: NPY002
        (lambda self, x: 1 / 0, "ZeroDivisionError"),
        (lambda self, x: x * (2 * self.scale - self.scale.detach()), "gradient of scale"),
    ],
)
def test_a_difference_is_found(fast, message):
    model = Tiny()
    _swap.swap(model, {"forward": fast})
    with pytest.raises(_verify.Mismatch, match=message):
        _verify.compare(model, lambda: model(X))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda self: self.count.add_(1), "count"),
        (lambda self: setattr(self, "calls", getattr(self, "calls", 0) + 1), "calls"),
        (lambda self: self.seen.append(1), "seen"),
    ],
)
def test_what_only_the_original_writes_is_found_and_undone(write, name):
    class Counts(Tiny):
        def forward(self, x):
            write(self)
            return super().forward(x)

    model = Counts()
    model.seen = seen = []
    _swap.swap(model, {"forward": Tiny.forward})
    with pytest.raises(_verify.Mismatch, match=f"it writes {name}"):
        _verify.compare(model, lambda: model(X))
    assert model.count == 0
    assert model.seen is seen
    assert not seen
    assert "calls" not in vars(model)


class Large(nn.Module):
    """Its gradient is compared by projections."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(600, 300))

    def forward(self, x):
        return x @ self.weight


def test_gradients_of_large_parameters():
    model = Large()
    x = torch.randn(5, 600)
    _swap.swap(
        model, {"forward": lambda self, x: (x[:, :599] @ self.weight[:599]) + x[:, 599:] @ self.weight[599:].detach()}
    )
    with pytest.raises(_verify.Mismatch, match="gradient of weight differs"):
        _verify.compare(model, lambda: model(x))
    _swap.swap(model, {"forward": lambda self, x: (self.weight.T @ x.T).T})
    assert _verify.compare(model, lambda: model(x)) < 1e-5


def test_second_derivatives_name_the_remedy():
    model = maefast.accelerate(build())
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(run(model, x)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"maefast's \w+ has no second derivative: .* maefast\.restore\(model\)"):
        grad.square().sum().backward()
    with maefast.backend("reference"):
        (grad,) = torch.autograd.grad(run(model, x)[0], x, create_graph=True)
        grad.square().sum().backward()


class Noisy(Tiny):
    def forward(self, x):
        return x * self.scale * np.random.uniform()  # noqa: NPY002


def test_numbers_of_numpy_are_drawn_again():
    """As the stochastic depth of the public FCMAE is: both draw the same, and nobody notices afterwards."""
    model = Noisy()
    _swap.swap(model, {"forward": Noisy.forward})
    before = np.random.get_state()  # noqa: NPY002
    assert _verify.compare(model, lambda: model(X)) == 0
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_equal_code_passes():
    model = Tiny()
    _swap.swap(model, {"forward": lambda self, x: self.scale * x})
    assert _verify.compare(model, lambda: model(X)) == 0


# --- the text -----------------------------------------------------------------------------------------------


def test_report_reads_well():
    report = Report("Net", ["someone/net"])
    for i in range(4):
        report.add(f"blocks.{i}", "", True, "fused")
    report.add("blocks.5", "", True, "fused")
    report.add("heads.3", "", False, "watched")
    report.add("", "forward", True, "one plan")
    assert str(report).splitlines() == [
        "maefast.accelerate: Net (someone/net)",
        "  replaced",
        "    blocks.* (5)  fused",
        "    forward       one plan",
        "  not replaced",
        "    heads.3  watched",
    ]
    model = maefast.accelerate(build())
    assert "blocks.0-1 " in str(maefast.report(model))


def test_in_inference_mode():
    """Compared outside of it; a model that was made there, with a buffer, too."""
    with torch.inference_mode():
        model = build()
        model.blocks[0].register_buffer("extra", torch.zeros(3))
        want = run(model)
        assert maefast.accelerate(model) is model
        assert "agree" in str(maefast.report(model))
        assert all(relative(a, b) < 1e-5 for a, b in zip(run(model), want, strict=True))
    model = build()
    with torch.inference_mode():
        maefast.accelerate(model)
    run(model)[0].backward()
    assert "agree" in str(maefast.report(model))


def test_between_a_forward_and_its_backward():
    """Buffers that a graph has saved are not written."""
    model = build()
    model.blocks[0].register_buffer("gain", torch.rand(32))
    x = torch.randn(32, requires_grad=True)
    out = (model.blocks[0].gain * x).sum() + run(model)[0]
    maefast.accelerate(model)
    out.backward()
    assert torch.equal(x.grad, model.blocks[0].gain)


HELD = """
import torch, maefast
from maefast.bench.peers import worker
from maefast.bench.peers.public.mae import MaskedAutoencoderViT

model = MaskedAutoencoderViT(img_size=64, patch_size=16, embed_dim=768, depth=6, num_heads=12, decoder_embed_dim=64,
                             decoder_depth=1, decoder_num_heads=2)
before = worker.resident_bytes()
maefast.accelerate(model)
print(worker.resident_bytes() - before, worker.peak_bytes() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries give back by themselves, or not at all"
)
def test_what_the_comparisons_held_is_given_back():
    run = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    left, peak = map(int, run.stdout.split())
    assert peak > 100 * 2**20
    assert left < peak / 3
