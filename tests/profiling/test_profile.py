"""Real steps: times and memory of modules that take known amounts, what bounds them, and that nothing is left."""

from __future__ import annotations

import copy
import io
import json
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import maefast
from maefast import models
from maefast.profiling import profile
from tests.profiling.common import patient

MIB = 2**20
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 2,
        "decoder_num_heads": 2, "img_size": 32, "patch_size": 8}  # fmt: skip


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


class Sleeper(nn.Module):
    def __init__(self, forward, backward):
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x):
        return Sleep.apply(x, *self.seconds)


class Sleepers(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Sleeper(0.10, 0.15), Sleeper(0.05, 0.02)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self):
        return self.decoder(self.encoder(self.weight)).sum()


def summed(report):
    return sum(stage.seconds for stage in report.stages)


@patient
def test_times_of_stages_that_sleep():
    model = Sleepers()
    report = profile(lambda: model().backward(), model, steps=3, warmup=1)
    encoder, decoder = report.stage("encoder other"), report.stage("decoder other")
    found = [encoder.forward, encoder.backward, decoder.forward, decoder.backward]
    assert found == pytest.approx([0.10, 0.15, 0.05, 0.02], rel=0.2, abs=0.01)
    assert summed(report) == pytest.approx(report.seconds, rel=1e-6)
    assert report.seconds == pytest.approx(0.32, rel=0.25)
    assert sum(stage.share for stage in report.stages) == pytest.approx(1)
    assert sum(report.shares.values()) == pytest.approx(1, abs=1e-6)
    assert 0.8 < report.scale < 1.25
    assert report.advice.kind == "host-bound"
    assert "sleep" in report.advice.sentence


@patient
def test_a_slow_loader():
    model = nn.Linear(4, 4)

    def slow():
        while True:
            time.sleep(0.03)
            yield torch.ones(2, 4)

    report = profile(lambda batch: model(batch).sum().backward(), model, data=slow(), steps=3)
    assert report.advice.kind == "data-bound"
    assert report.stage("data").seconds == pytest.approx(0.03, rel=0.3)
    assert summed(report) == pytest.approx(report.seconds, rel=1e-6)


@patient
def test_hundreds_of_tiny_ops():
    weight = nn.Parameter(torch.ones(2))
    model = nn.ParameterList([weight])

    def step():
        x = weight
        for _ in range(300):
            x = x + 1.0
        x.sum().backward()

    report = profile(step, model, steps=9)
    assert report.advice.kind == "launch-bound"
    assert 300 <= report.ops < 330  # the fill of the gradient and the sum too
    assert report.python > 0.1 * report.seconds
    assert summed(report) == pytest.approx(report.seconds, rel=1e-6)


@patient
def test_big_products():
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768))
    x = torch.randn(512, 768)
    report = profile(lambda: model(x).mean().backward(), model, steps=3)
    assert report.advice.kind == "GEMM-bound"
    linear = report.stage("linear")
    assert linear.share > 0.6
    assert linear.forward < linear.backward  # one product against two, the first layer's one
    assert linear.calls == 2


@patient
def test_big_elementwise():
    model = nn.ParameterList([nn.Parameter(torch.ones(MIB))])

    def step():
        x = model[0]
        for _ in range(6):
            x = x * 1.5 + 0.5
        x.sum().backward()

    report = profile(step, model, steps=3)
    assert report.advice.kind == "memory-bound"


def test_memory_that_a_stage_keeps():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Hardtanh(), nn.Linear(256, 256, bias=False)

        def forward(self, x):
            return self.decoder(self.encoder(x + 1)).sum()

    model, x = Keeps(), torch.randn(4096, 256)  # 4 MiB
    report = profile(lambda: model(x).backward(), model, steps=1)
    kept = {stage.name: stage.bytes / MIB for stage in report.stages if stage.bytes > 1000}
    assert kept["encoder activation"] == pytest.approx(4, abs=0.1)  # read again for the gradient of the weight
    assert sum(kept.values()) < 4.3
    assert report.memory.kept == sum(stage.bytes for stage in report.stages)
    assert 8 < report.memory.peak / MIB < 17
    assert report.memory.weights == 256 * 256 * 4 == report.memory.gradients


OPTIMIZERS = {
    "torch": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "narrow": lambda parameters: maefast.optim.AdamW(parameters, lr=0.1, state_dtype=torch.bfloat16),
    "shadow": lambda parameters: maefast.optim.AdamW(parameters, lr=0.1, shadow=torch.bfloat16),
}


def training(kind="torch"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = OPTIMIZERS[kind](model.parameters())

    def step():
        x = torch.randn(6, 4) + random.random() + np.random.rand()  # noqa: NPY002
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    return model, optimizer, step


@pytest.mark.parametrize(("kind", "before"), [("torch", 0), *((kind, 2) for kind in OPTIMIZERS)])
def test_nothing_is_left_behind(kind, before):
    ends = []
    for profiled in (False, True):
        model, optimizer, step = training(kind)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        for _ in range(before):
            step()
        gradients = [p.grad for p in model.parameters()]
        if profiled:
            kept = copy.deepcopy(model.state_dict())
            profile(step, model, optimizer=optimizer, steps=2)
            assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert len(optimizer.state) == (0 if before == 0 else len(gradients))
        for _ in range(3):
            step()
        state = [value for entry in optimizer.state.values() for value in entry.values() if value is not None]
        ends.append([*model.state_dict().values(), *state, torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_it_is_put_back_when_a_step_fails():
    model, optimizer, step = training()
    kept, calls = copy.deepcopy(model.state_dict()), []

    def failing():
        step()
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        profile(failing, model, optimizer=optimizer)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


@patient
def test_stages_of_a_masked_autoencoder():
    torch.manual_seed(0)
    model = models.create("mae", **TINY)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(8, 3, 32, 32)

    def step():
        assert model.blocks[0]._weights() is not None  # the fused block, as without the profiler
        model(images)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    report = profile(step, model, optimizer=optimizer, steps=2)
    for name in ("encoder attention", "encoder MLP", "encoder norms", "decoder attention", "decoder MLP",
                 "decoder norms", "embed", "restore", "loss"):  # fmt: skip
        stage = report.stage(name)
        assert stage.forward > 0, name
        assert stage.backward > 0, name
    for name in ("mask", "optimizer"):
        assert report.stage(name).seconds > 0
        assert report.stage(name).backward == 0
    names = [stage.name for stage in report.stages]
    assert names.index("mask") < names.index("encoder attention") < names.index("restore") < names.index("optimizer")
    assert report.stage("encoder attention").bytes > 0
    assert report.memory.gradients == 0  # dropped at the end of a step
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert report.memory.optimizer == pytest.approx(2 * trained, rel=0.01)
    assert report.memory.peak > trained
    other = sum(stage.share for stage in report.stages if stage.name in ("other", "autograd"))
    assert other < 0.3
    assert summed(report) == pytest.approx(report.seconds, rel=1e-6)


def test_the_report_in_words_and_as_json():
    from rich.console import Console

    model, optimizer, step = training()
    report = profile(step, model, optimizer=optimizer, steps=1)
    console = Console(width=120, file=io.StringIO())
    report.show(console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[0] == report.machine
    assert lines[-1] == report.advice.sentence
    assert lines[1].startswith(f"one step: {1e3 * report.seconds:.1f} ms")
    for stage in report.stages:
        assert any(line.startswith(stage.name) and f"{stage.share:.1%}" in line for line in lines)
    assert any(line.startswith("a step ") and "100.0%" in line for line in lines)
    found = json.loads(report.json())
    assert found["format"] == 1
    assert found["seconds"] == report.seconds
    assert {stage["name"] for stage in found["stages"]} == {stage.name for stage in report.stages}
    assert found["waits"] is None
    assert found["advice"]["sentence"] == report.advice.sentence
    assert report.machine.endswith(f"torch {torch.__version__}")
    with pytest.raises(KeyError, match="no stage 'mask'; there are: "):
        report.stage("mask")


def test_a_chrome_trace(tmp_path):
    model, optimizer, step = training()
    profile(step, model, optimizer=optimizer, steps=1, trace=tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_a_data_loader_is_begun_again():
    model, seen = nn.Linear(2, 1), []

    def step(batch):
        seen.append(batch[:, 0].tolist())
        model(batch).sum().backward()

    data = DataLoader(torch.arange(6.0).view(3, 2), batch_size=1)
    profile(step, model, data=data, steps=2, warmup=1)
    assert [first for (first,) in seen] == [0.0, 2.0, 4.0, 0.0, 2.0, 4.0]  # warm-up, two, one more and two


def test_bad_input(tmp_path):
    model = nn.Linear(1, 1)

    def step():
        raise AssertionError("nothing may run")

    with pytest.raises(TypeError, match="step must be a function"):
        profile(3, model)
    with pytest.raises(TypeError, match="model must be a torch"):
        profile(step, "model")
    with pytest.raises(TypeError, match="optimizer must be"):
        profile(step, model, optimizer="adam")
    with pytest.raises(ValueError, match="steps must be an int of at least 1, got 0"):
        profile(step, model, steps=0)
    with pytest.raises(ValueError, match="warmup must be an int of at least 0, got True"):
        profile(step, model, warmup=True)
    with pytest.raises(ValueError, match="no folder"):
        profile(step, model, trace=tmp_path / "none" / "step.json")
    for folder in (tmp_path / "empty", tmp_path):  # which the profiler would replace, or fail at without a word
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="is a folder; give the name of a file"):
            profile(step, model, trace=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with pytest.raises(ValueError, match="lies on the meta device, without values"):
        profile(step, nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="data has no batch"):
        profile(lambda batch: None, model, data=[])
    with pytest.raises(TypeError, match="data must be iterable"):
        profile(step, model, data=3)
