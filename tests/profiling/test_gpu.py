"""On a CUDA device: times of kernels, copies, idling, and what the host waits for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maefast import models
from maefast.profiling import profile

pytestmark = pytest.mark.gpu


def test_stages_and_idling_add_up_to_the_step():
    model = models.create("mae_tiny", img_size=64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = [torch.randn(64, 3, 64, 64) for _ in range(2)]

    def step(batch):
        model(batch.cuda())[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = profile(step, model, data=batches, optimizer=optimizer, steps=3)
    assert report.device == "cuda"
    assert sum(stage.seconds for stage in report.stages) == pytest.approx(report.seconds, rel=1e-3)
    for name in (
        "host to device",
        "mask",
        "embed",
        "encoder attention",
        "encoder MLP",
        "restore",
        "decoder MLP",
        "loss",
    ):
        assert report.stage(name).forward > 0, name
    for name in ("encoder attention", "encoder MLP", "embed", "loss"):
        assert report.stage(name).backward > 0, name
    assert report.stage("optimizer").forward > 0
    assert report.memory.peak > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_big_products_leave_no_idle_time():
    model, x = nn.Linear(8192, 8192, device="cuda"), torch.randn(8192, 8192, device="cuda")
    report = profile(lambda: model(x).mean().backward(), model, steps=3)
    assert report.advice.kind == "GEMM-bound"
    assert report.python < 0.2 * report.seconds


def test_tiny_kernels_are_launch_bound():
    weight = nn.Parameter(torch.ones(2, device="cuda"))

    def step():
        x = weight
        for _ in range(300):
            x = x + 1.0
        x.sum().backward()

    report = profile(step, nn.ParameterList([weight]), steps=3)
    assert report.advice.kind == "launch-bound"
    assert report.stage("device idle").seconds > 0.3 * report.seconds
    assert report.waits == {}


def test_waits_are_counted_where_they_are():
    model, x = nn.Linear(8, 8, device="cuda"), torch.randn(8, 8, device="cuda")

    def step():
        loss = model(x).mean()
        loss.backward()
        return loss.item(), loss.item()

    report = profile(step, model, steps=1)
    assert sum(report.waits.values()) == 2
    assert all(line.rpartition(":")[0] == __file__ for line in report.waits)
    assert torch.cuda.get_sync_debug_mode() == 0
