"""SparK by structure: an encoder of layers that multiply by a mask, a dense decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import maefast
from maefast.bench.peers.public import spark as public
from tests.integrations.common import DropIn, gradient_error, relative

NAME = "keyu-tian/SparK"


def images(dtype: torch.dtype = torch.float64, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 96, 96, dtype=dtype)


class SparKDropIn(DropIn):
    families = (NAME,)
    replaced = 2
    single = 2e-4  # a chain of batch norms over few sites; float64 shows that they are the same

    def inputs(self, dtype):
        return (torch.randn(2, 3, 64, 64, dtype=dtype),), {}

    def loss(self, out):
        return out

    def test_50_steps(self):
        """In float64: from step to step, batch norms over few sites amplify what rounding there is."""
        pair, call = self.pair, self.call
        self.pair = lambda: pair(torch.float64)
        self.call = lambda model, seed: call(model, torch.float64, seed)
        super().test_50_steps()


class TestResNet(SparKDropIn):
    def make(self):
        return public.resnet(size=64)


class TestConvNeXt(SparKDropIn):
    sweeps = True

    def make(self):
        return public.convnext(drop_path=0.3, size=64)

    def test_bfloat16(self):
        pytest.skip("the model's own layer norm does not run under autocast")


def pair(make=public.resnet, **changes) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make(**changes).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model, maefast.accelerate(copy.deepcopy(model))


def run(function, *args, **kwargs):
    torch.manual_seed(1)
    return function(*args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"drop_path": 0.4}, {"sync": True}], ids=["plain", "drop path", "sync"])
def test_running_statistics_after_training(changes):
    model, fast = pair(**changes)
    assert not maefast.report(fast).kept
    for net in (model, fast):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(2)
        for _ in range(3):
            loss = net(images())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, a), (_, b) in zip(model.named_buffers(), fast.named_buffers()):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)
        if name.endswith("num_batches_tracked"):
            assert int(a) == 3
    assert all(relative(b, a) < 1e-8 for a, b in zip(model.parameters(), fast.parameters()))


def test_everything_else_as_before():
    """Pictures, a mask of the caller, the encoder and a sparse layer by themselves."""
    model, fast = pair()
    x = images()
    for a, b in zip(run(fast, x, vis=True), run(model, x, vis=True)):
        assert relative(a, b) < 1e-12
    mask = model.mask(3, "cpu")
    mask[0, 0, 0] = ~mask[0, 0, 0]  # samples keep different numbers
    for given in (mask, torch.ones_like(mask), torch.zeros_like(mask).index_fill_(3, torch.tensor([1]), True)):
        a, b = fast(x, given), model(x, given)
        assert torch.allclose(a, b, rtol=1e-12)
    fast(x, mask)
    assert public._cur_active is mask
    for a, b in zip(fast.sparse_encoder(x), model.sparse_encoder(x)):
        assert torch.equal(a, b)
    first, second = (net.sparse_encoder.sp_cnn.conv1 for net in (fast, model))
    assert torch.equal(first(x), second(x))


def test_wrong_input_raises_as_before():
    model, fast = pair()
    for bad in (torch.randn(2, 3, 64, 64).double(), torch.randn(2, 1, 96, 96).double(), torch.randn(2, 3, 96, 96)):
        with pytest.raises(RuntimeError):
            model(bad)
        with pytest.raises(RuntimeError):
            fast(bad)


PARTS = ["sparse_encoder.sp_cnn.layer2", "dense_decoder.dec.1", "dense_decoder.dec.1.conv.2"]


@pytest.mark.parametrize("name", PARTS)
def test_hooks_see_what_they_saw(name):
    (model, fast), x = pair(), images()
    seen = []
    for net in (model, fast):
        handle = net.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        run(net, x)
        handle.remove()
    assert relative(seen[1], seen[0]) < 1e-12
    run(fast, x)
    assert len(seen) == 2


@pytest.mark.parametrize("names", [("bias",), ("weight", "bias")])
def test_norms_without_parameters(names):
    """All of them, after accelerate."""
    (model, fast), x = pair(public.convnext), images()
    for net in (model, fast):
        for part in net.modules():
            if isinstance(part, nn.LayerNorm):
                for name in names:
                    setattr(part, name, None)
    want, got = run(model, x), run(fast, x)
    want.backward()
    got.backward()
    assert relative(got, want) < 1e-12
    assert gradient_error(fast, model) < 1e-9
    assert "ran fast once" in [note.runs for note in maefast.report(fast).notes if note.method == "forward"][-1]


def test_overrides_stay():
    class Corner(public.SparK):
        def mask(self, B, device, generator=None):
            chosen = torch.zeros(B, 1, 3, 3, dtype=torch.bool)
            chosen[:, :, :2, :2] = True
            return chosen

    class Doubled(public.SparK):
        def forward(self, inp_bchw, active_b1ff=None, vis=False):
            return 2 * super().forward(inp_bchw, active_b1ff, vis)

    model, fast = pair(kind=Corner)
    assert not maefast.report(fast).kept
    x = images()
    assert relative(fast(x), model(x)) < 1e-12
    model, fast = pair(kind=Doubled)
    report = maefast.report(fast)
    assert [note.method for note in report.kept] == ["forward"]
    assert "Doubled.forward overrides" in str(report)
    assert [note.path for note in report.replaced] == ["dense_decoder"]
    want, got = run(model, x), run(fast, x)
    assert relative(got, want) < 1e-12
    want.backward()
    got.backward()
    assert gradient_error(fast, model) < 1e-10


def test_a_network_of_another_meaning_stays():
    """A squeeze over all sites is not one over active sites: the comparison shows it."""

    class Squeeze(nn.Module):
        def forward(self, x):
            return x * (1 + x.mean((2, 3), keepdim=True))

    torch.manual_seed(0)
    model = public.resnet()
    model.sparse_encoder.sp_cnn.layer2.append(Squeeze())
    x = images(torch.float32)
    want = run(copy.deepcopy(model), x)
    maefast.accelerate(model)
    report = maefast.report(model)
    assert "not what it looks like" in str(report)
    assert [note.path for note in report.replaced] == ["dense_decoder"]
    assert relative(run(model, x), want) < 1e-5


@pytest.mark.parametrize("norm", ["linear", "foreign"])
def test_other_decoders_stay(norm):
    torch.manual_seed(0)
    model = public.resnet()
    if norm == "linear":
        model.dense_decoder.dec[0].conv[1] = nn.Identity()
    else:
        model.dense_decoder.dec[0].conv[2] = nn.ReLU()
    model.double()
    fast = maefast.accelerate(copy.deepcopy(model))
    assert [note.text for note in maefast.report(fast).kept] == ["dec.0 is another kind of block"]
    assert relative(run(fast, x := images()), run(model, x)) < 1e-12


def test_the_first_model_of_a_process(monkeypatch):
    """Its variable in a module holds no mask yet when it is accelerated."""
    monkeypatch.setattr(public, "_cur_active", None)
    fast = maefast.accelerate(public.resnet(), verify=False)
    for _ in range(2):
        fast(torch.randn(2, 3, 96, 96))
    assert [note.runs for note in maefast.report(fast).notes if note.method == "forward"] == ["ran fast 2 times"]
